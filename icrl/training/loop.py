"""The one training loop: schedules, optimisers, logs, checkpoints, exact resume. What is learned is a `Learner`'s business.

A run lives in one folder: `config.json`, `metrics.jsonl`, `tensorboard/`, `checkpoints/<update>/rank<i>.safetensors` (the
newest two) and, at its end, `model.safetensors`. Starting the same command again continues it from its newest checkpoint.
Several processes (`torchrun --nproc-per-node 2 -m icrl.cli train ...`) share one model by averaging gradients.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from icrl.training import checkpoint
from icrl.training.config import LoopConfig
from icrl.training.process import rank, world_size


class Learner(Protocol):
    """What the loop trains. One update's losses are `losses()`: segments of one batch, each backpropagated on its own."""

    @property
    def model(self) -> nn.Module: ...

    def config(self) -> dict[str, Any]: ...
    def hidden_matrices(self) -> list[nn.Parameter]: ...
    def losses(self, update: int) -> Iterable[tuple[Tensor, dict[str, float]]]: ...
    def evaluate(self) -> dict[str, float]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...
    def save_model(self, path: Path, **facts: Any) -> None: ...


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
        made.append(torch.optim.Muon(hidden, config.muon_learning_rate, weight_decay=config.weight_decay))
    for optimizer in made:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return made


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """One all-reduce of all gradients, laid end to end."""
    if world_size() == 1:
        return
    grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    flat = torch.cat([g.reshape(-1) for g in grads])
    dist.all_reduce(flat)
    for p, g in zip(parameters, flat.div_(world_size()).split([g.numel() for g in grads]), strict=True):
        p.grad = g.view_as(p)


class Run:
    """A training run's folder."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        self.folder, self.checkpoints = folder, folder / "checkpoints"
        record = folder / "config.json"
        config = json.loads(json.dumps(config, default=str))
        if not record.exists() and folder.exists() and any(folder.iterdir()):
            raise ValueError(f"out: {folder} is not empty and holds no run (no config.json); choose another")
        if record.exists() and self.newest() is not None:
            try:
                old = json.loads(record.read_text())
            except ValueError as e:
                raise ValueError(f"out: {record} is damaged ({e})") from e
            changed = sorted(k for k in config.keys() | old.keys() if config.get(k) != old.get(k))
            if changed:
                raise ValueError(
                    f"out: {folder} holds a run with another configuration ({', '.join(changed)} differ); choose another"
                )
        elif rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            record.write_text(json.dumps(config, indent=1) + "\n")
        self._board: Any = None

    def newest(self) -> Path | None:
        found = self._whole()
        return found[-1] if found else None

    def _whole(self) -> list[Path]:
        """The finished checkpoints, oldest first; what a kill cut short ends in .part."""
        return sorted(p for p in self.checkpoints.glob("[0-9]*") if p.name.isdigit())

    def save(self, update: int, state: dict[str, Any]) -> None:
        """Every rank writes its part; the folder takes its final name only when all are whole."""
        part, final = self.checkpoints / f"{update:08d}.part", self.checkpoints / f"{update:08d}"
        tensors: dict[str, Tensor] = {}
        facts: dict[str, Any] = {}
        checkpoint.flatten("run", state, tensors, facts)
        checkpoint.save(part / f"rank{rank()}.safetensors", tensors, facts)
        if world_size() > 1:
            dist.barrier()
        if rank() == 0:
            part.replace(final)
            for old in [*self._whole()[:-2], *self.checkpoints.glob("*.part")]:
                shutil.rmtree(old)
        if world_size() > 1:
            dist.barrier()

    def load(self) -> dict[str, Any] | None:
        newest = self.newest()
        if newest is None:
            return None
        try:
            tensors, facts = checkpoint.load(newest / f"rank{rank()}.safetensors")
        except ValueError as e:
            raise ValueError(f"{e}; delete {newest} to go on from the checkpoint before it") from e
        return checkpoint.unflatten("run", tensors, facts)

    def forget_after(self, update: int) -> None:
        """Drop logged rows that the run will log again."""
        log = self.folder / "metrics.jsonl"
        if rank() == 0 and log.exists():
            kept = [line for line in log.read_text().splitlines() if json.loads(line)["update"] <= update]
            log.write_text("".join(line + "\n" for line in kept))

    def log(self, update: int, metrics: dict[str, float]) -> None:
        if rank():
            return
        with open(self.folder / "metrics.jsonl", "a") as f:
            f.write(json.dumps({"update": update, **metrics}) + "\n")
        if self._board is None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                self._board = False
                print(
                    "tensorboard is not installed (pip install 'icrl-kernels[train]'): logging to metrics.jsonl alone"
                )
            else:
                self._board = SummaryWriter(str(self.folder / "tensorboard"))
        if self._board:
            for name, value in metrics.items():
                self._board.add_scalar(name, value, update)


def train(learner: Learner, config: LoopConfig, out: Path) -> Path:
    """Train to `config.updates` updates, or on from where a run in `out` stopped; returns the model's file.

    Raises:
        ValueError: `out` holds a run with another configuration, or a damaged checkpoint. FloatingPointError: the
        gradient is not finite.
    """
    run = Run(out, {"loop": asdict(config), "world_size": world_size(), **learner.config()})
    made = optimizers(learner, config)
    parameters = list(learner.model.parameters())
    update, seconds = 0, 0.0
    state = run.load()
    if state is not None:
        update, seconds = state["update"], state["seconds"]
        run.forget_after(update)
        learner.model.load_state_dict(state["model"])
        for optimizer, s in zip(made, state["optimizers"], strict=True):
            optimizer.load_state_dict(s)
        learner.load_state_dict(state["learner"])
        torch.set_rng_state(state["rng"])
        if rank() == 0:
            print(f"resuming {out} at update {update} of {config.updates}")

    sums: dict[str, float] = {}
    clock = time.perf_counter()
    settings: dict[str, Any] = {"total": config.updates, "initial": update, "disable": rank() != 0}
    with tqdm(unit="update", smoothing=0.05, mininterval=1.0, **settings) as bar:  # closed before an error is printed
        while update < config.updates:
            for optimizer in made:
                for group in optimizer.param_groups:
                    group["lr"] = group["base_lr"] * rate(update, config)
            for loss, metrics in learner.losses(update):
                loss.backward()
                average_gradients(parameters)
                norm = nn.utils.clip_grad_norm_(parameters, config.clip)
                if not torch.isfinite(norm):
                    raise FloatingPointError(
                        f"the gradient is not finite at update {update}; the last checkpoint is {run.newest()}"
                    )
                for optimizer in made:
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                for name, value in {**metrics, "gradient_norm": float(norm), "segments": 1.0}.items():
                    sums[name] = sums.get(name, 0.0) + value
            update += 1
            bar.update()
            if update % config.log_every == 0 or update == config.updates:
                now = time.perf_counter()
                seconds, clock = seconds + now - clock, now
                n = sums.pop("segments")
                means = {name: value / n for name, value in sums.items()}
                run.log(update, {**means, "seconds": seconds, "rate": rate(update - 1, config)})
                bar.set_postfix({k: f"{v:.3f}" for k, v in list(means.items())[:3]})
                sums = {}
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
                        "model": learner.model.state_dict(),
                        "optimizers": [optimizer.state_dict() for optimizer in made],
                        "learner": learner.state_dict(),
                        "rng": torch.get_rng_state(),
                    },
                )
    path = out / "model.safetensors"
    if rank() == 0:
        learner.save_model(path, updates=update, seconds=round(seconds, 1), world_size=world_size())
    return path
