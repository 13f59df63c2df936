"""Meta-training of OmniRL by decoupled policy distillation, with the model's own rollouts mixed in (DAgger).

A batch holds records: a behaviour policy acted, references label every state. The loss, after each block of the model (the
last at weight 1, the others at `auxiliary_weight`), is the cross-entropy of each policy's action - optimal at each
discount, and that of the model-based learner fed with the same history - plus a smooth-L1 loss of the Q-values. From `dagger_from` on, a share of each batch is records in which the model itself acted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icrl.data.prefetch import Stream
from icrl.omnirl.agent import Temperature
from icrl.omnirl.distill import ANYMDP_LEAST, DPDConfig, DPDStream, Records, sample_tasks
from icrl.omnirl.evaluate import mean_ci, normalized, references, run_agent
from icrl.omnirl.labels import name_others, refuse_others, version_of
from icrl.omnirl.record_shards import RecordStream
from icrl.omnirl.tags import EXPLORER, START, UNKNOWN
from icrl.omnirl.tokens import Tokens
from icrl.omnirl.value_iteration_network import Output, ValueIterationNetwork, ValueIterationNetworkConfig
from icrl.training.config import LoopConfig, changes, configured
from icrl.training.process import autocast, parallel, rank, resolve, world_size
from icrl_kernels import model_based_q
from icrl_kernels.arguments import integer_fields


@dataclass(frozen=True)
class ValueIterationTraining:
    model: ValueIterationNetworkConfig = field(default_factory=ValueIterationNetworkConfig)
    data: DPDConfig = field(default_factory=lambda: DPDConfig(batch=12, steps=1024))
    segment: int = 512
    """Steps of a record between two updates; the model's state is carried on, detached."""
    policy_weights: tuple[float, ...] = (0.5, 0.5, 0.7, 0.5, 1.0)
    """Of each policy's loss: the optimal one at each discount, and the explorer."""
    explorer_bonus: float = 0.2
    """Of the model-based learner that the explorer imitates: see icrl_kernels.model_based_q."""
    q_weight: float = 0.3
    auxiliary_weight: float = 0.3
    """Of the losses after each block but the last."""
    dagger: float = 0.4
    """Share of the batch in which the model itself acted."""
    dagger_from: int = 150
    """The first update with it."""
    dagger_every: int = 50
    """Updates between two collections."""
    dagger_records: int = 64
    """Records of one collection, no fewer than a batch's share; the newest eight collections are kept."""
    evaluation_tasks: int = 64
    """Of AnyMDP, of as many states as the data have at most; where these have too few, tasks as the data's."""
    evaluation_steps: int = 1000
    records: str = ""
    """Folder of records (`icrl distill`) to train from; empty: made on the fly."""

    def __post_init__(self) -> None:
        one = ("segment", "dagger_every", "dagger_records", "evaluation_tasks", "evaluation_steps")
        integer_fields(self, dagger_from=0, **dict.fromkeys(one, 1))
        if len(self.policy_weights) != self.model.policies:
            raise ValueError(f"policy_weights: wanted {self.model.policies} of them, got {self.policy_weights}")
        if self.model.discounts != self.data.discounts:
            raise ValueError(f"discounts: the model has {self.model.discounts}, the data {self.data.discounts}")
        if self.model.actions != self.data.actions:
            raise ValueError(f"actions: the model has {self.model.actions}, the data {self.data.actions}")
        if not 0 <= self.dagger < 1:
            raise ValueError(f"dagger: wanted a share in [0, 1), got {self.dagger}")
        if self.evaluation_steps < 2:
            raise ValueError(f"evaluation_steps: wanted at least 2, as halves are scored, got {self.evaluation_steps}")
        if self.data.actions < 2:
            raise ValueError(f"actions: wanted at least 2 to choose from, got {self.data.actions}")
        if self.own_records > self.dagger_records:
            raise ValueError(
                f"dagger_records: wanted at least {self.own_records}, the share of a batch of {self.data.batch} in which "
                f"the model acts, got {self.dagger_records}"
            )

    @property
    def own_records(self) -> int:
        """Records of a batch in which the model itself acted."""
        return int(self.dagger * self.data.batch)


def tokens_of(records: Records) -> Tokens:
    """The model's tokens of whole records `[B,T]`: each step beside the transition that led to it."""

    def shift(x: Tensor, first: float) -> Tensor:
        return torch.cat([torch.full_like(x[:, :1], first), x[:, :-1]], 1)

    return Tokens(
        records.observation,
        shift(records.observation, 0),
        shift(records.action, 0),
        shift(records.reward, 0.0),
        shift(records.done, START),
        shift(records.tag, UNKNOWN),
    )


class Targets(NamedTuple):
    """What a loss asks for, `[B,T,A,G]`: policies, and values (1-discount)·Q in raw reward units."""

    policy: Tensor
    value: Tensor


def targets_of(records: Records, config: ValueIterationTraining) -> Targets:
    """The references' labels: optimal at each discount, and the model-based learner that watched the same history.

    They lie where the records do; the model-based learner runs on the CPU.
    """
    c = config.model
    explorer = model_based_q(
        records.observation.cpu(),
        records.action.cpu(),
        records.reward.cpu(),
        records.done.cpu(),
        config.data.states,
        c.actions,
        bonus=config.explorer_bonus,
        discount=c.explorer_discount,
        action_mask=_action_mask(records, config.data.states),
    ).to(records.q.device)
    q = torch.cat([records.q, explorer[:, :, None]], 2).transpose(-1, -2)
    best = q.amax(2, keepdim=True)
    ties = (q >= best - 1e-6 * (1 + best.abs())).float()
    discounts = torch.tensor(c.policy_discounts, dtype=torch.float32, device=q.device)
    return Targets(ties / ties.sum(2, keepdim=True), q * (1 - discounts))


def _action_mask(records: Records, states: int) -> Tensor | None:
    """[B,states,A] bool on the CPU: what was seen lacks the actions whose value is −inf; None where nothing is lacking."""
    lacks = records.q[:, :, 0].isneginf().cpu()
    if not lacks.any():
        return None
    mask = torch.ones(len(lacks), states, lacks.shape[2], dtype=torch.bool, device="cpu")
    return mask.scatter_(1, records.observation.cpu()[..., None].expand_as(lacks), ~lacks)


def loss_of(output: Output, targets: Targets, config: ValueIterationTraining) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of a segment, a float32 scalar, and scalars to log; all on the output's device."""
    value = (targets.value - output.reward_mean[..., None, None]) / output.reward_scale[..., None, None]
    value = value.clamp(-5, 5)
    weights = torch.tensor(config.policy_weights, dtype=torch.float32, device=value.device)
    total = torch.zeros((), dtype=torch.float32, device=value.device)
    metrics: dict[str, Tensor] = {}
    for i, readout in enumerate(output.readouts):
        last = i == len(output.readouts) - 1
        entropy = -(targets.policy * F.log_softmax(readout.logits.float(), 2)).sum(2).mean((0, 1))
        q_loss = F.smooth_l1_loss(readout.q.float(), value)
        total = total + (1.0 if last else config.auxiliary_weight) * (
            (entropy * weights).sum() + config.q_weight * q_loss
        )
        if last:
            names = [*(f"policy_{g:g}" for g in config.model.discounts), "explorer"]
            metrics = dict(zip(names, entropy.detach(), strict=True))
            metrics["q"] = q_loss.detach()
    return total, {"loss": total.detach(), **metrics}


def upgraded(config: dict[str, Any]) -> dict[str, Any]:
    """A run's record as it is written today: the seed once stood in "training", and counted there."""
    training, loop = config.get("training", {}), config.get("loop", {})
    if not isinstance(training, dict) or not isinstance(loop, dict) or "seed" not in training:
        return config
    training = dict(training)
    seed = training.pop("seed")
    return {**config, "training": training, "loop": {**loop, "seed": seed}}


def read_config(given: dict[str, Any]) -> tuple[ValueIterationTraining, LoopConfig]:
    """The configuration in a JSON object {"training": {...}, "loop": {...}} over the defaults; a run's record is one.

    Raises:
        ValueError: naming a key or value that is not one, or `training.seed` where no run wrote it.
    """
    if unknown := set(given) - {"training", "loop", "world_size", "init"}:
        raise ValueError(f"config: there is no {', '.join(sorted(unknown))}; wanted training, loop")
    if "world_size" in given:  # only runs write that
        given = upgraded(given)
    training = given.get("training", {})
    if isinstance(training, dict) and "seed" in training:
        raise ValueError(f"config: training.seed: the seed is loop.seed; got {training['seed']!r} here")
    return configured(ValueIterationTraining, training, "training"), configured(
        LoopConfig, given.get("loop", {}), "loop"
    )


def _stream(config: ValueIterationTraining, seed: int) -> Stream[Records]:
    """This process's batches, from disk or made on the fly."""
    if not config.records:
        return DPDStream(config.data, seed=seed * world_size() + rank())
    stream = RecordStream(config.records, config.data.batch, seed, rank=rank(), world=world_size())
    stream.check(config.data)
    return stream


class ValueIterationLearner:
    """What `icrl.training.loop.train` drives.

    Records are made and labelled on the CPU; the model, its tokens and its targets live on the loop's device.

    Args:
        init: a model's file to begin from, instead of from random weights; its configuration must be `config.model`.
        fresh: whether the run begins; one that goes on from a checkpoint does not read `init` again.
    Raises:
        ValueError: the device is not to be had, `init` is no such file, or the records are not what the model takes.
    """

    def __init__(
        self, config: ValueIterationTraining, loop: LoopConfig, init: Path | None = None, *, fresh: bool = True
    ) -> None:
        torch.manual_seed(loop.seed)
        self.training, self.loop, self.init = config, loop, init
        self.device = resolve(loop.device)
        with torch.device("cpu"):
            self.model: ValueIterationNetwork = ValueIterationNetwork(config.model)
        if init is not None and fresh:
            self._begin_from(init)
        self.model.to(self.device)
        if loop.compile:
            self.model.compile(dynamic=False)
        self.forward = parallel(self.model)
        self.stream = _stream(config, loop.seed)
        self.own: Records | None = None
        self.collections = 0
        self._judge: Any = None

    def _begin_from(self, init: Path) -> None:
        given = ValueIterationNetwork.load(init)
        refuse_others(f"init: {init}", given.labels)
        if found := changes(asdict(given.config), asdict(self.training.model), "training.model"):
            what = ", ".join(f"{name}: {there!r} in {init}, {here!r} given" for name, there, here in found)
            raise ValueError(f"init: {what}")
        self.model.load_state_dict(given.state_dict())

    def config(self) -> dict[str, Any]:
        return {"training": asdict(self.training), **({"init": str(self.init)} if self.init else {})}

    def upgraded(self, config: dict[str, Any]) -> dict[str, Any]:
        return upgraded(config)

    def hidden_matrices(self) -> list[nn.Parameter]:
        return [
            p
            for name, p in self.model.named_parameters()
            if p.ndim == 2 and name.startswith(("blocks.", "write.", "read.")) and "score" not in name
        ]

    def losses(self, update: int) -> Iterable[tuple[Tensor, dict[str, Tensor]]]:
        return self.segments(*self._batch(update))

    def _batch(self, update: int) -> tuple[Tokens, Targets]:
        """The tokens and targets of an update, on the model's device."""
        c = self.training
        records = next(self.stream)
        if c.dagger and update >= c.dagger_from:
            if self.own is None or (update - c.dagger_from) % c.dagger_every == 0:
                self._collect()
            assert self.own is not None
            n = c.own_records
            chosen = torch.randperm(len(self.own.observation), device="cpu")[:n]
            records = Records(*(torch.cat([a[n:], b[chosen]]) for a, b in zip(records, self.own, strict=True)))
        tokens = Tokens(*(x.to(self.device) for x in tokens_of(records)))
        return tokens, Targets(*(x.to(self.device) for x in targets_of(records, c)))

    def segments(self, tokens: Tokens, targets: Targets) -> Iterable[tuple[Tensor, dict[str, Tensor]]]:
        """The loss of each segment of a batch and what to log, as `loss_of` gives them."""
        c = self.training
        B, T = tokens.observation.shape
        state = self.model.initial_state(B, c.data.states)
        for begin in range(0, T, c.segment):
            part = Tokens(*(x[:, begin : begin + c.segment] for x in tokens))
            with autocast(self.loop, self.device):
                output, state = self.forward(part, state.detach())
            yield loss_of(output, Targets(*(x[:, begin : begin + c.segment] for x in targets)), c)

    def _collect(self) -> None:
        """Let the model act in fresh tasks, and label where it went."""
        c = self.training
        seed = (
            (1 + self.collections * world_size() + rank()) * 1_000_003 + self.loop.seed + 2**40
        )  # apart from the stream's
        tasks = sample_tasks(c.data, c.dagger_records, seed)
        q = tasks.solve(torch.tensor(c.model.discounts, dtype=torch.float32, device=tasks.device)).q.float()
        end = (1.0, 0.5, 0.2)[self.collections % 3]  # of the temperature: from exploring to exploiting
        prompt = (EXPLORER, 2, EXPLORER, 3)[self.collections % 4]
        went = run_agent(
            self.model,
            tasks,
            c.data.steps,
            prompt=prompt,
            temperature=Temperature(1.0, end, c.data.steps // 2),
            seed=seed,
        )
        everyone = torch.arange(len(tasks), dtype=torch.int64, device=q.device)[:, None]
        values = q[everyone, :, went.state]
        unknown = torch.full_like(went.action, UNKNOWN)
        new = Records(went.observation, went.action, went.reward, went.done.long(), unknown, values)
        keep = 7 * c.dagger_records
        self.own = (
            new
            if self.own is None
            else Records(*(torch.cat([a[-keep:], b]) for a, b in zip(self.own, new, strict=True)))
        )
        self.collections += 1

    def evaluate(self) -> dict[str, float]:
        c = self.training
        if self._judge is None:
            large = c.data.states >= ANYMDP_LEAST
            chosen: dict[str, Any] = {"kind": "anymdp", "num_states": c.data.states} if large else {}
            tasks = sample_tasks(c.data, c.evaluation_tasks, 2**41 + 17, **chosen)
            self._judge = tasks, references(tasks)
        tasks, reference = self._judge
        context = run_agent(self.model, tasks, c.evaluation_steps, seed=7)
        half = c.evaluation_steps // 2
        spans = {"score_first_half": (0, half), "score": (half, c.evaluation_steps)}
        return {name: mean_ci(normalized(context, reference, *span))[0] for name, span in spans.items()}

    def state_dict(self) -> dict[str, Any]:
        own = None if self.own is None else self.own._asdict()
        return {
            "stream": self.stream.state_dict(),
            "own": own,
            "collections": self.collections,
            "labels": self.model.labels,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._go_on_with_labels(version_of(state))
        self.stream.load_state_dict(state["stream"])
        self.own = None if state["own"] is None else Records(**state["own"])
        self.collections = state["collections"]

    def _go_on_with_labels(self, version: int) -> None:
        """A run of another version is refused; one from before there were versions goes on, and its weights stay of none."""
        if version:
            refuse_others("out: the run", version)
        if not self.model.labels_named:
            name_others("the run", version)
        self.model.labels, self.model.labels_named = version, True

    def redistribute(self, state: dict[str, Any], processes: int, own: bool) -> None:
        """Go on from a state of a run of another number of processes.

        No batch comes twice: streams made on the fly keep the position of the next batch, under the seeds of the new
        processes; records on disk go on where all processes together had come to in the epoch. A process whose state is
        not its own (`own`) lets the model act anew for records of its own.
        """
        self._go_on_with_labels(version_of(state))
        before, here = state["stream"], self.stream
        position = before["next_batch"]
        if isinstance(here, RecordStream):
            position = here.position_after(position, processes)
        here.load_state_dict({"seed": here.seed, "next_batch": position})
        self.own = None if state["own"] is None or not own else Records(**state["own"])
        self.collections = -(-state["collections"] * processes // world_size())  # numbers that no process has used

    def save_model(self, path: Path, **facts: Any) -> None:
        self.model.save(path, training=asdict(self.training), seed=self.loop.seed, **facts)
