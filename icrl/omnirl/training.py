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
from icrl.omnirl.distill import DPDConfig, DPDStream, Records, sample_tasks
from icrl.omnirl.evaluate import mean_ci, normalized, references, run_agent
from icrl.omnirl.model import OmniRL, OmniRLConfig, Output, Tokens
from icrl.omnirl.record_shards import RecordStream
from icrl.omnirl.tags import EXPLORER, START, UNKNOWN
from icrl.training.config import LoopConfig
from icrl.training.process import rank, world_size
from icrl_kernels import model_based_q


@dataclass(frozen=True)
class OmniRLTraining:
    model: OmniRLConfig = field(default_factory=OmniRLConfig)
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
    """Records of one collection; the newest eight collections are kept."""
    evaluation_tasks: int = 64
    evaluation_steps: int = 1000
    records: str = ""
    """Folder of records (`icrl distill`) to train from; empty: made on the fly."""
    seed: int = 0
    """Of the data and of the model's initial weights."""

    def __post_init__(self) -> None:
        if len(self.policy_weights) != self.model.policies:
            raise ValueError(f"policy_weights: wanted {self.model.policies} of them, got {self.policy_weights}")
        if self.model.discounts != self.data.discounts:
            raise ValueError(f"discounts: the model has {self.model.discounts}, the data {self.data.discounts}")
        if self.model.actions != self.data.actions:
            raise ValueError(f"actions: the model has {self.model.actions}, the data {self.data.actions}")
        for name in ("segment", "dagger_every", "dagger_records", "evaluation_tasks", "evaluation_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: wanted at least 1, got {getattr(self, name)}")
        if not 0 <= self.dagger < 1:
            raise ValueError(f"dagger: wanted a share in [0, 1), got {self.dagger}")


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


def targets_of(records: Records, config: OmniRLTraining) -> Targets:
    """The references' labels: optimal at each discount, and the model-based learner that watched the same history."""
    c = config.model
    explorer = model_based_q(
        records.observation,
        records.action,
        records.reward,
        records.done,
        config.data.states,
        c.actions,
        bonus=config.explorer_bonus,
        discount=c.explorer_discount,
    )
    q = torch.cat([records.q, explorer[:, :, None]], 2).transpose(-1, -2)
    best = q.amax(2, keepdim=True)
    ties = (q >= best - 1e-6 * (1 + best.abs())).float()
    discounts = torch.tensor(c.policy_discounts)
    return Targets(ties / ties.sum(2, keepdim=True), q * (1 - discounts))


def loss_of(output: Output, targets: Targets, config: OmniRLTraining) -> tuple[Tensor, dict[str, float]]:
    """Loss of a segment and what to log."""
    value = (targets.value - output.reward_mean[..., None, None]) / output.reward_scale[..., None, None]
    value = value.clamp(-5, 5)
    weights = torch.tensor(config.policy_weights)
    total = torch.zeros(())
    metrics: dict[str, float] = {}
    for i, readout in enumerate(output.readouts):
        last = i == len(output.readouts) - 1
        entropy = -(targets.policy * F.log_softmax(readout.logits, 2)).sum(2).mean((0, 1))
        q_loss = F.smooth_l1_loss(readout.q, value)
        total = total + (1.0 if last else config.auxiliary_weight) * (
            (entropy * weights).sum() + config.q_weight * q_loss
        )
        if last:
            names = [*(f"policy_{g:g}" for g in config.model.discounts), "explorer"]
            metrics = {name: float(e) for name, e in zip(names, entropy.detach(), strict=True)}
            metrics["q"] = float(q_loss.detach())
    return total, {"loss": float(total.detach()), **metrics}


def _stream(config: OmniRLTraining) -> Stream[Records]:
    """This process's batches, from disk or made on the fly."""
    if not config.records:
        return DPDStream(config.data, seed=config.seed * world_size() + rank())
    stream = RecordStream(config.records, config.data.batch, config.seed, rank=rank(), world=world_size())
    stream.check(config.data)
    return stream


class OmniRLLearner:
    """What `icrl.training.loop.train` drives."""

    def __init__(self, config: OmniRLTraining, loop: LoopConfig) -> None:
        torch.manual_seed(config.seed)
        self.training = config
        self.model: OmniRL = OmniRL(config.model)
        self.forward = torch.compile(self.model, dynamic=False) if loop.compile else self.model
        self.stream = _stream(config)
        self.own: Records | None = None
        self.collections = 0
        self._judge: Any = None

    def config(self) -> dict[str, Any]:
        return {"training": asdict(self.training)}

    def hidden_matrices(self) -> list[nn.Parameter]:
        return [
            p
            for name, p in self.model.named_parameters()
            if p.ndim == 2 and name.startswith(("blocks.", "write.", "read.")) and "score" not in name
        ]

    def losses(self, update: int) -> Iterable[tuple[Tensor, dict[str, float]]]:
        c = self.training
        records = next(self.stream)
        if c.dagger and update >= c.dagger_from:
            if self.own is None or (update - c.dagger_from) % c.dagger_every == 0:
                self._collect()
            assert self.own is not None
            n = int(c.dagger * len(records.observation))
            chosen = torch.randperm(len(self.own.observation))[:n]
            records = Records(*(torch.cat([a[n:], b[chosen]]) for a, b in zip(records, self.own, strict=True)))
        tokens, targets = tokens_of(records), targets_of(records, c)
        B, T = records.observation.shape
        state = self.model.initial_state(B, c.data.states)
        for begin in range(0, T, c.segment):
            part = Tokens(*(x[:, begin : begin + c.segment] for x in tokens))
            output, state = self.forward(part, state.detach())
            yield loss_of(output, Targets(*(x[:, begin : begin + c.segment] for x in targets)), c)

    def _collect(self) -> None:
        """Let the model act in fresh tasks, and label where it went."""
        c = self.training
        seed = (1 + self.collections * world_size() + rank()) * 1_000_003 + c.seed + 2**40  # apart from the stream's
        tasks = sample_tasks(c.data, c.dagger_records, seed)
        q = tasks.solve(torch.tensor(c.model.discounts)).q.float()
        end = (1.0, 0.5, 0.2)[self.collections % 3]  # of the temperature: from exploring to exploiting
        rows: list[tuple[Tensor, ...]] = []
        everyone = torch.arange(len(tasks))

        def record(state: Tensor, observation: Tensor, action: Tensor, reward: Tensor, done: Tensor) -> None:
            rows.append((observation, action, reward, done.long(), q[everyone, :, state]))

        prompt = (EXPLORER, 2, EXPLORER, 3)[self.collections % 4]
        run_agent(
            self.model,
            tasks,
            c.data.steps,
            prompt=prompt,
            temperature=Temperature(1.0, end, c.data.steps // 2),
            seed=seed,
            record=record,
        )
        observation, action, reward, done, values = (torch.stack(x, 1) for x in zip(*rows, strict=True))
        new = Records(observation, action, reward, done, torch.full_like(action, UNKNOWN), values)
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
            tasks = sample_tasks(c.data, c.evaluation_tasks, 2**41 + 17, kind="anymdp", num_states=c.data.states)
            self._judge = tasks, references(tasks)
        tasks, reference = self._judge
        context = run_agent(self.model, tasks, c.evaluation_steps, seed=7)
        half = c.evaluation_steps // 2
        spans = {"score_first_half": (0, half), "score": (half, c.evaluation_steps)}
        return {name: mean_ci(normalized(context, reference, *span))[0] for name, span in spans.items()}

    def state_dict(self) -> dict[str, Any]:
        own = None if self.own is None else self.own._asdict()
        return {"stream": self.stream.state_dict(), "own": own, "collections": self.collections}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stream.load_state_dict(state["stream"])
        self.own = None if state["own"] is None else Records(**state["own"])
        self.collections = state["collections"]

    def save_model(self, path: Path, **facts: Any) -> None:
        self.model.save(path, training=asdict(self.training), **facts)
