"""The one training loop: schedules, optimisers, logs, checkpoints, exact resume. What is learned is a `Learner`'s business.

A run lives in one folder: `config.json`, `versions.json`, `metrics.jsonl`, `tensorboard/`,
`checkpoints/<update>/rank<i>.safetensors` (the newest two) and, at its end, `model.safetensors`. One process, or one group, is
at work there at a time: it holds the lock on `.lock`, which ends with it.

Starting the same command again continues it from its newest checkpoint, bit for bit, its log too. It may also go on

- to more updates: the rates are from there on those of a run of the new total;
- with another number of processes: see `Redistributed`; a process without a file of its own begins from rank 0's;
- with another number of threads, on another device, compiled or not, with other versions: that is said and recorded.

Any other setting is the run's; another value is refused. Several processes (`torchrun --nproc-per-node 2 -m icrl.cli train
value-iteration-network`) share one model: `process.parallel` averages their gradients, and the log has means over all of them.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from icrl.training import checkpoint
from icrl.training.config import LoopConfig
from icrl.training.muon import Muon
from icrl.training.process import rank, world_size
from icrl.training.run import Run


class Learner(Protocol):
    """What the loop trains. One update's losses are `losses()`: segments of one batch, each backpropagated on its own.

    What it gives to log are floats or scalar tensors; tensors are read when a line is logged.
    """

    @property
    def model(self) -> nn.Module: ...

    def config(self) -> dict[str, Any]: ...
    def hidden_matrices(self) -> list[nn.Parameter]: ...
    def losses(self, update: int) -> Iterable[tuple[Tensor, Mapping[str, float | Tensor]]]: ...
    def evaluate(self) -> dict[str, float]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...
    def save_model(self, path: Path, **facts: Any) -> None: ...


@runtime_checkable
class Redistributed(Protocol):
    """A learner that trains in several processes: its `forward` is `process.parallel`'s, which averages gradients."""

    forward: Any

    def redistribute(self, state: dict[str, Any], processes: int, own: bool) -> None:
        """Go on from a state of a run of another number of `processes`: this process's `own`, or rank 0's."""
        ...


def rate(update: int, config: LoopConfig) -> float:
    """The learning rate's factor: linear warm-up, constant, linear decay to a hundredth."""
    left = (config.updates - update) / max(1.0, config.decay * config.updates)
    return min(1.0, (update + 1) / max(1, config.warmup)) * min(1.0, left + 0.01)


def optimizers(learner: Learner, config: LoopConfig) -> list[torch.optim.Optimizer]:
    hidden = learner.hidden_matrices() if config.muon_learning_rate else []
    taken = {id(p) for p in hidden}
    rest = [p for p in learner.model.parameters() if id(p) not in taken]
    made: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(rest, config.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    ]
    if hidden:
        made.append(Muon(hidden, config.muon_learning_rate, weight_decay=config.weight_decay))
    for optimizer in made:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return made


def gradient(loss: Tensor, parameters: list[nn.Parameter], clip: float) -> Tensor:
    """Backpropagate a loss and clip the gradient; its norm before that, a scalar on the parameters' device."""
    loss.backward()
    return nn.utils.clip_grad_norm_(parameters, clip)


def take_step(optimizers: list[torch.optim.Optimizer]) -> None:
    """A step of every optimiser; the gradient is gone afterwards."""
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


class _Sums:
    """Sums of what segments log, between two lines of the log; float64 on the device where the values are."""

    def __init__(self, values: dict[str, float]) -> None:
        self.values: dict[str, float | Tensor] = dict(values)

    def add(self, metrics: Mapping[str, float | Tensor]) -> None:
        for name, value in metrics.items():
            term = value.detach().double() if isinstance(value, Tensor) else value
            self.values[name] = self.values.get(name, 0.0) + term

    def floats(self) -> dict[str, float]:
        """This process's sums, for a checkpoint."""
        return {name: float(value) for name, value in self.values.items()}

    def means(self, device: torch.device) -> dict[str, float]:
        """Means over segments and processes. Every process must ask for them at the same time."""
        sums = self.floats()
        if world_size() > 1:
            names = sorted(sums)
            total = torch.tensor([sums[name] for name in names], dtype=torch.float64, device=device)
            dist.all_reduce(total)
            reduced = dict(zip(names, total.tolist(), strict=True))
            sums = {name: reduced[name] for name in sums}
        n = sums.pop("segments")
        return {name: value / n for name, value in sums.items()}


def _go_on(run: Run, learner: Learner, optimizers: list[torch.optim.Optimizer]) -> dict[str, Any]:
    """Bring the learner and the optimisers to the run's newest checkpoint; what else is in it, or nothing."""
    found = run.load()
    if found is None:
        run.forget_after(-1)  # what a run logged that was killed before its first checkpoint
        return {}
    state, processes, own = found
    try:
        _restore(learner, optimizers, state, processes, own)
    except checkpoint.MALFORMED as e:
        raise ValueError(f"checkpoint: {run.newest()} does not fit this run ({checkpoint.why(e)})") from e
    run.forget_after(state["update"])
    return state


def _restore(
    learner: Learner, optimizers: list[torch.optim.Optimizer], state: dict[str, Any], processes: int, own: bool
) -> None:
    """Give the learner and the optimisers what a checkpoint holds. Raises one of `checkpoint.MALFORMED` for anything else."""
    if not all(type(x) in (int, float) for x in (state.get("seconds", 0.0), *state.get("sums", {}).values())):
        raise ValueError("seconds, sums: wanted numbers")
    learner.model.load_state_dict(state["model"])
    for optimizer, s in zip(optimizers, state["optimizers"], strict=True):
        for here, there in zip(optimizer.param_groups, s["param_groups"], strict=True):  # another torch may have others
            for name in {*here} & {*there} | {"params", "lr", "base_lr"}:
                kinds = {_kind(here[name]), _kind(there[name])} - {"NoneType"}
                if len(kinds) > 1:
                    raise ValueError(f"optimizers: {name}: wanted {_kind(here[name])}, got {_kind(there[name])}")
        optimizer.load_state_dict(s)
        for parameter, values in optimizer.state.items():
            for name, value in values.items():
                if isinstance(value, Tensor) and value.dim() and value.shape != parameter.shape:
                    raise ValueError(f"optimizers: {name}: wanted {list(parameter.shape)}, got {list(value.shape)}")
    if processes == world_size():
        learner.load_state_dict(state["learner"])
    elif isinstance(learner, Redistributed):
        learner.redistribute(state["learner"], processes, own)
        state["sums"] = {}  # of the processes there were
    else:
        raise ValueError(f"world_size: {processes} in the run, {world_size()} given; this learner keeps to its own")
    torch.set_rng_state(state["rng"])
    device = next(learner.model.parameters()).device
    if device.type == "cuda" and "cuda_rng" in state:
        torch.cuda.set_rng_state(state["cuda_rng"], device)


def _kind(value: Any) -> str:
    """The type of an optimiser's setting; a checkpoint has lists for tuples, and numbers may be whole."""
    return {"tuple": "list", "int": "float"}.get(type(value).__name__, type(value).__name__)


def train(learner: Learner, config: LoopConfig, out: Path) -> Path:
    """Train to `config.updates` updates, or on from where a run in `out` stopped; returns the model's file.

    Raises:
        ValueError: `out` holds a run with another configuration, or a damaged checkpoint, or another process is at work
            there; or there are several processes
            and the learner's `forward` does not average their gradients. FloatingPointError: the gradient is not finite.
    """
    if world_size() > 1 and not isinstance(getattr(learner, "forward", None), DistributedDataParallel):
        raise ValueError(f"torchrun: this learner trains in one process, got {world_size()}")
    record = {"loop": asdict(config), "world_size": world_size(), **learner.config()}
    with closing(Run(out, record, getattr(learner, "upgraded", dict))) as run:
        return _train(learner, config, run)


def _train(learner: Learner, config: LoopConfig, run: Run) -> Path:
    made = optimizers(learner, config)
    parameters = list(learner.model.parameters())
    device = parameters[0].device
    state = _go_on(run, learner, made)
    update, seconds = state.get("update", 0), state.get("seconds", 0.0)
    if state and rank() == 0:
        print(f"resuming {run.folder} at update {update} of {config.updates}")
    run.begin(update, device)

    sums = _Sums(state.get("sums", {}))
    clock = time.perf_counter()
    settings: dict[str, Any] = {"total": config.updates, "initial": update, "disable": rank() != 0}
    with tqdm(unit="update", smoothing=0.05, mininterval=1.0, **settings) as bar:  # closed before an error is printed
        while update < config.updates:
            for optimizer in made:
                for group in optimizer.param_groups:
                    group["lr"] = group["base_lr"] * rate(update, config)
            for loss, metrics in learner.losses(update):
                norm = gradient(loss, parameters, config.clip)
                if not torch.isfinite(norm):
                    raise FloatingPointError(
                        f"the gradient is not finite at update {update}; the last checkpoint is {run.newest()}"
                    )
                take_step(made)
                sums.add({**metrics, "gradient_norm": norm, "segments": 1.0})
            update += 1
            bar.update()
            if update % config.log_every == 0 or update == config.updates:
                now = time.perf_counter()
                seconds, clock = seconds + now - clock, now
                means = sums.means(device)
                run.log(update, {**means, "seconds": seconds, "rate": rate(update - 1, config)})
                bar.set_postfix({k: f"{v:.3f}" for k, v in list(means.items())[:3]})
                sums = _Sums({})
            if update % config.evaluate_every == 0 or update == config.updates:
                scores = learner.evaluate() if rank() == 0 else {}
                run.log(update, scores)
                if rank() == 0:
                    bar.write(f"update {update}: " + ", ".join(f"{k} {v:.3f}" for k, v in scores.items()))
            if update % config.checkpoint_every == 0 or update == config.updates:
                now = time.perf_counter()
                seconds, clock = seconds + now - clock, now
                run.save(
                    update,
                    {
                        "update": update,
                        "seconds": seconds,
                        "sums": sums.floats(),
                        "model": learner.model.state_dict(),
                        "optimizers": [optimizer.state_dict() for optimizer in made],
                        "learner": learner.state_dict(),
                        "rng": torch.get_rng_state(),
                        **({"cuda_rng": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}),
                    },
                )
    path = run.folder / "model.safetensors"
    if rank() == 0:
        learner.save_model(path, updates=update, seconds=round(seconds, 1), world_size=world_size())
    return path
