"""Meta-training of OmniRL by decoupled policy distillation.

The loss of a segment is that of the world model - cross-entropy of the next observation, the reward's error, cross-entropy of
the end - plus the cross-entropy of each policy's action: of all that the model reads out, or of the one that the prompt asks
for. The world model's weight is 1 at first and less later: it learns first, and the policy by it. A curriculum of stages
makes tasks larger and records longer; records longer than a segment are read with the state carried, detached.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icrl.data.prefetch import Stream
from icrl.data.seeds import hash_seed
from icrl.omnirl.distill import PUBLISHED_BEHAVIOURS, DPDConfig, Records, draw_policies, make_batch, sample_tasks
from icrl.omnirl.evaluate import mean_ci, normalized, references, run_agent
from icrl.omnirl.learner import DistillationLearner, check_distillation
from icrl.omnirl.model import OmniRL, OmniRLConfig, Output
from icrl.omnirl.tags import UNKNOWN
from icrl.omnirl.targets import Targets, Transitions, next_transitions, previous_transitions, targets_of, tokens_of
from icrl.omnirl.tokens import Tokens
from icrl.training.config import LoopConfig, configured
from icrl.training.process import autocast, rank, world_size
from icrl_kernels.arguments import integer_fields, number


@dataclass(frozen=True)
class Stage:
    """A part of a run: how large its tasks are, and how long its records."""

    share: float = 1.0
    """Of the run's updates."""
    least_states: int = 8
    states: int = 16
    records: int = 32
    steps: int = 512
    segment: int = 512

    def __post_init__(self) -> None:
        integer_fields(self, least_states=1, states=1, records=1, steps=1, segment=1)
        if not 0 < number("share", self.share) <= 1:
            raise ValueError(f"share: wanted a share of the updates in (0, 1], got {self.share}")


STAGES = (
    Stage(0.05, 8, 8, 128, 128, 128),
    Stage(0.45, 8, 16, 32, 512, 512),
    Stage(0.35, 8, 32, 32, 1024, 512),
    Stage(0.15, 8, 64, 32, 2048, 512),
)
LOOP = LoopConfig(
    updates=12_000,
    learning_rate=2e-3,
    muon_learning_rate=0.02,
    warmup=100,
    decay=0.3,
    checkpoint_every=100,
    evaluate_every=500,
    autocast=True,
)


@dataclass(frozen=True)
class OmniRLTraining:
    """The defaults are the recipe for a CPU; `published` is the paper's."""

    model: OmniRLConfig = field(default_factory=OmniRLConfig)
    data: DPDConfig = field(
        default_factory=lambda: DPDConfig(
            tasks={"anymdp": 0.7, "garnet": 0.1, "bandit": 0.05, "grid": 0.15},
            behaviours={
                "uniform": 0.2,
                "random_policy": 0.15,
                "q_learning+noise": 0.15,
                "model_based+noise": 0.3,
                "model_based+noise->greedy3": 0.05,
                "greedy3+noise": 0.05,
                "greedy3->model_based": 0.1,
            },
        )
    )
    """Tasks and behaviours; sizes are those of the stages, where there are some."""
    stages: tuple[Stage, ...] = STAGES
    segment: int = 512
    """Without stages: steps of a record between two optimiser steps."""
    shuffle: bool = True
    """Whether observations are renumbered at random, a record at a time, among all that the model has."""
    observation_weight: float = 1.0
    reward_weight: float = 1.0
    done_weight: float = 1.0
    squared: bool = False
    """Whether the reward's error is squared; else it is smooth L1 of rewards clamped to ten of their root mean squares."""
    world_until: float = 0.4
    """Share of the run after which the world model's losses count `world_later` times as much."""
    world_later: float = 0.3
    policy_weights: tuple[float, ...] = (0.5, 0.5, 0.7, 0.5, 1.0)
    """Of each policy's loss: the optimal one at each discount, and the explorer; with policy "prompted" the probabilities
    with which prompts ask for them, and the loss counts `prompted_weight`."""
    prompted_weight: float = 1.0
    prompt_mask: float = 0.15
    """Probability that the prompt is unknown for the whole record."""
    observation_dropout: float = 0.0
    """Probability that an observation is left out of the tokens."""
    position_steps: int = 0
    """Over a context's first steps, so many, losses' weights rise linearly from .001 to 1; 0: all count the same."""
    explorer_bonus: float = 0.2
    """Of the model-based learner that the explorer imitates: see icrl_kernels.model_based_q."""
    dagger: float = 0.4
    """Share of the batch in which the model itself acted."""
    dagger_begin: float = 0.25
    """Share of the run's updates before that."""
    dagger_every: int = 30
    """Updates between two collections."""
    dagger_records: int = 64
    """Records of one collection, no fewer than a batch's share."""
    dagger_kept: int = 3
    """How many collections are kept, the newest: they are in every checkpoint."""
    evaluation_tasks: int = 64
    evaluation_states: int = 16
    """Of AnyMDP tasks to act in; with fewer than 8, tasks as the data's."""
    evaluation_steps: int = 2000
    bandit_steps: int = 100
    """Steps of an evaluation in bandits, of which the last half counts; 0: none."""
    records: str = ""
    """Folder of records (`icrl distill`) to train from, without stages; empty: made on the fly."""

    def __post_init__(self) -> None:
        one = ("segment", "dagger_every", "dagger_records", "dagger_kept")
        one += ("evaluation_tasks", "evaluation_states", "evaluation_steps")
        integer_fields(self, position_steps=0, bandit_steps=0, **dict.fromkeys(one, 1))
        c = self.model
        if self.evaluation_states > c.states:
            raise ValueError(f"evaluation_states: wanted at most the model's {c.states}, got {self.evaluation_states}")
        if c.channels:
            raise ValueError(f"channels: records have observations by number, got a model of {c.channels} channels")
        if len(self.policy_weights) != c.policies:
            raise ValueError(f"policy_weights: wanted {c.policies} of them, got {self.policy_weights}")
        shares = [number("policy_weights", weight) for weight in self.policy_weights]
        if not min(shares) >= 0 or (c.policy == "prompted" and not sum(shares) > 0):
            raise ValueError(
                f"policy_weights: wanted at least 0 each, and not all 0 where prompts ask, got {self.policy_weights}"
            )
        weights = ("observation_weight", "reward_weight", "done_weight", "world_later", "prompted_weight")
        for name in weights:
            if not number(name, getattr(self, name)) >= 0:
                raise ValueError(f"{name}: wanted at least 0, got {getattr(self, name)}")
        for name in ("world_until", "prompt_mask", "observation_dropout", "dagger_begin"):
            if not 0 <= number(name, getattr(self, name)) <= 1:
                raise ValueError(f"{name}: wanted a number in [0, 1], got {getattr(self, name)}")
        if self.stages:
            if self.records:
                raise ValueError(
                    f"records: wanted none with stages, whose sizes they do not have, got {self.records!r}"
                )
            if abs(sum(s.share for s in self.stages) - 1) > 1e-6:
                raise ValueError(f"stages: wanted shares that sum to 1, got {[s.share for s in self.stages]}")
        for i in range(max(1, len(self.stages))):
            data = self.staged(i).data
            if data.states > c.states:
                raise ValueError(f"states: the model has {c.states} observations, the data {data.states}")
            check_distillation(self.staged(i))

    def staged(self, stage: int) -> OmniRLTraining:
        """This configuration in one of its stages."""
        if not self.stages:
            return self
        s = self.stages[stage]
        sizes = {"least_states": s.least_states, "states": s.states, "batch": s.records, "steps": s.steps}
        return replace(self, data=replace(self.data, **sizes), stages=(), segment=s.segment)

    @property
    def own_records(self) -> int:
        """Records of a batch in which the model itself acted."""
        return int(self.dagger * self.data.batch)

    def begins(self, updates: int) -> list[int]:
        """The first update of each stage, of so many; [0] without stages."""
        shares = [0.0, *(s.share for s in self.stages[:-1])]
        return [round(sum(shares[: i + 1]) * updates) for i in range(len(shares))]

    @classmethod
    def published(cls) -> OmniRLTraining:
        """The paper's model, data, losses and weights of positions; stages of one size, in segments of 2,048 steps."""
        data = DPDConfig(
            tasks={"anymdp": 1.0}, behaviours=PUBLISHED_BEHAVIOURS, batch=5, steps=12_000, least_states=16, states=128
        )
        weights: dict[str, Any] = {"observation_weight": 0.4, "reward_weight": 0.4, "done_weight": 0.0, "squared": True}
        weights |= {"world_until": 1.0, "prompted_weight": 0.2, "policy_weights": (0.1, 0.1, 0.2, 0.4, 0.2)}
        return cls(
            OmniRLConfig.published(),
            data,
            stages=(),
            segment=2048,
            observation_dropout=0.15,
            position_steps=512,
            dagger=0.0,
            **weights,
        )


PUBLISHED_LOOP = LoopConfig(updates=25_600, learning_rate=2e-4, muon_learning_rate=0.0, warmup=500, autocast=True)
"""AdamW at the paper's rate: 128,000 sequences, 5 at a time. (The paper makes an optimiser step a sequence; this loop, a
segment.)"""

PRESETS: dict[str, tuple[Callable[[], OmniRLTraining], LoopConfig]] = {
    "cpu": (OmniRLTraining, LOOP),
    "published": (OmniRLTraining.published, PUBLISHED_LOOP),
}


class Asked(NamedTuple):
    """What a segment's loss compares its output with, `[B,T,...]`."""

    targets: Targets
    transitions: Transitions
    prompt: Tensor  # [B,T] int64, the policy whose action is the label
    position: Tensor  # [T] float32, weights of positions


def loss_of(
    model: OmniRL, output: Output, asked: Asked, config: OmniRLTraining, world_weight: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of a segment, a float32 scalar, and scalars to log; all on the output's device."""
    c, t, world = config, asked.transitions, output.world
    weight = asked.position.expand_as(asked.prompt)

    def mean(x: Tensor, where: Tensor) -> Tensor:
        w = weight * where
        return (x * w).sum() / w.sum().clamp(min=1e-6)

    everywhere = torch.ones_like(t.happened)
    entropies = -(asked.targets.policy * F.log_softmax(output.logits.float(), 2).clamp(min=-1e4)).sum(2)  # [B,T,G]
    if c.model.policy == "prompted":
        names, policy = ["policy"], [mean(entropies[..., 0], everywhere)]
        total = c.prompted_weight * policy[0]
    else:
        names = [*(f"policy_{g:g}" for g in c.model.discounts), "explorer"]
        policy = [mean(e, everywhere) for e in entropies.unbind(-1)]
        total = torch.stack([w * e for w, e in zip(c.policy_weights, policy, strict=True)]).sum()
    reward = t.reward / output.reward_scale
    if c.squared:
        error = (world.reward.float() - reward.clamp(-100, 100)).square()
    else:
        error = F.smooth_l1_loss(world.reward.float(), reward.clamp(-10, 10), reduction="none")
    done = F.binary_cross_entropy_with_logits(world.done.float(), (t.done == 1).float(), reduction="none")
    losses = {
        "observation": (c.observation_weight, mean(model.tokenizer.loss(world.observation, t.observation), t.seen)),
        "reward": (c.reward_weight, mean(error, t.happened)),
        "done": (c.done_weight, mean(done, t.happened)),
    }
    total = total + world_weight * torch.stack([w * x for w, x in losses.values()]).sum()
    logged = {**dict(zip(names, policy, strict=True)), **{name: x for name, (_, x) in losses.items()}}
    return total, {"loss": total.detach(), **{name: x.detach() for name, x in logged.items()}}


def _staged_batch(configs: list[DPDConfig], begins: list[int], seed: int, index: int) -> Records:
    stage = max(i for i, begin in enumerate(begins) if begin <= index)
    return make_batch(configs[stage], seed, index)


class StagedStream(Stream[Records]):
    """Batch i is that of update i, of the stage that it lies in."""

    def __init__(self, configs: list[DPDConfig], begins: list[int], seed: int) -> None:
        super().__init__(seed, name="dpd")
        self.configs, self.begins = configs, begins

    def _maker(self) -> Callable[[int], Records]:
        return partial(_staged_batch, self.configs, self.begins, self.seed)


def renumbered(records: Records, states: int, ids: int) -> Records:
    """Each record's observations 0..states-1 as others of 0..ids-1, by a random injection; by torch's generator."""
    B = len(records.observation)
    to = torch.rand(B, ids, device="cpu", dtype=torch.float32).argsort(1)[:, :states]
    return records._replace(observation=to.gather(1, records.observation))


def read_config(given: dict[str, Any], preset: str = "cpu") -> tuple[OmniRLTraining, LoopConfig]:
    """The configuration in a JSON object {"training": {...}, "loop": {...}} over a preset's; a run's record is one.

    Raises:
        ValueError: naming a key or value that is not one.
    """
    if unknown := set(given) - {"training", "loop", "world_size", "init"}:
        raise ValueError(f"config: there is no {', '.join(sorted(unknown))}; wanted training, loop")
    training, loop = PRESETS[preset]
    return configured(training(), given.get("training", {}), "training"), configured(
        loop, given.get("loop", {}), "loop"
    )


class OmniRLLearner(DistillationLearner):
    """What `icrl.training.loop.train` drives: see DistillationLearner for arguments and what is raised."""

    model: OmniRL

    def __init__(
        self, config: OmniRLTraining, loop: LoopConfig, init: Path | None = None, *, fresh: bool = True
    ) -> None:
        torch.manual_seed(loop.seed)
        self.training, self._begins = config, config.begins(loop.updates)
        self._stages = [self.training.staged(i) for i in range(len(self._begins))]
        with torch.device("cpu"):
            model = OmniRL(config.model)
        super().__init__(model, self.training, loop, init, fresh)
        self._bandits: Any = None

    def _stream(self, config: Any, seed: int) -> Stream[Records]:
        if not self.training.stages:
            return super()._stream(config, seed)
        return StagedStream([s.data for s in self._stages], self._begins, seed * world_size() + rank())

    def at(self, update: int) -> OmniRLTraining:
        return self._stages[max(i for i, begin in enumerate(self._begins) if begin <= update)]

    def config(self) -> dict[str, Any]:
        return {"training": asdict(self.training), **({"init": str(self.init)} if self.init else {})}

    @property
    def dagger_from(self) -> int:
        return int(self.training.dagger_begin * self.loop.updates)

    def hidden_matrices(self) -> list[nn.Parameter]:
        """The matrices of mixers and MLPs, but not those that make a few gates."""
        return [
            p
            for name, p in self.model.stack.named_parameters()
            if p.ndim == 2 and min(p.shape) > 16 and "lora" not in name
        ]

    def losses(self, update: int) -> Iterable[tuple[Tensor, dict[str, Tensor]]]:
        c = self.at(update)
        records = self.records(update)
        targets = targets_of(records, c)
        if c.shuffle:
            records = renumbered(records, c.data.states, c.model.states)
        later = update >= c.world_until * self.loop.updates
        return self.segments(records, targets, c, c.world_later if later else 1.0)

    def segments(
        self, records: Records, targets: Targets, c: OmniRLTraining, world_weight: float
    ) -> Iterable[tuple[Tensor, dict[str, Tensor]]]:
        """The loss of each segment of a batch and what to log, as `loss_of` gives them."""
        B, T = records.action.shape
        tokens = tokens_of(records)
        transitions = next_transitions(records) if c.model.layout == "fused" else previous_transitions(tokens)
        tokens = Tokens(*(x.to(self.device) for x in tokens))
        transitions = Transitions(*(x.to(self.device) for x in transitions))
        targets = Targets(*(x.to(self.device) for x in targets))
        label, told = self._prompts(c, B, T)
        if c.model.policy == "prompted":
            chosen = label[:, :, None, None].expand(-1, -1, targets.policy.shape[2], 1)
            targets = Targets(targets.policy.gather(3, chosen), targets.value)
        missing = None
        if c.observation_dropout:
            missing = torch.rand(B, T, dtype=torch.float32, device="cpu").to(self.device) < c.observation_dropout
        steps = torch.arange(T, dtype=torch.float32, device=self.device)
        position = (
            (1e-3 + steps / max(1, c.position_steps)).clamp(max=1) if c.position_steps else torch.ones_like(steps)
        )
        state = self.model.initial_state(B)
        for begin in range(0, T, c.segment):
            at = slice(begin, begin + c.segment)
            part = Tokens(*(x[:, at] for x in tokens))
            asked = Asked(
                Targets(*(x[:, at] for x in targets)),
                Transitions(*(x[:, at] for x in transitions)),
                label[:, at],
                position[at],
            )
            with autocast(self.loop, self.device):
                output, state = self.forward(
                    part,
                    state.detach(),
                    told[:, at],
                    asked.transitions.action,
                    None if missing is None else missing[:, at],
                )
            yield loss_of(self.model, output, asked, c, world_weight)

    def _prompts(self, c: OmniRLTraining, B: int, T: int) -> tuple[Tensor, Tensor]:
        """Which policy's action is the label, and what the model is told of it, `[B,T]` each."""
        if c.model.policy != "prompted":
            nothing = torch.full((B, T), UNKNOWN, dtype=torch.int64, device=self.device)
            return nothing, nothing
        data = replace(c.data, steps=T)
        label = draw_policies(data, c.policy_weights, B, torch.default_generator)
        hidden = torch.rand(B, 1, dtype=torch.float32, device="cpu") < c.prompt_mask
        return label.to(self.device), label.masked_fill(hidden, UNKNOWN).to(self.device)

    def evaluate(self) -> dict[str, float]:
        c = self._stages[-1]
        c = replace(c, data=replace(c.data, states=max(c.data.states, c.evaluation_states)))
        scores = self._score(c, c.evaluation_states)
        if c.bandit_steps:
            if self._bandits is None:
                tasks = sample_tasks(c.data, c.evaluation_tasks, hash_seed(2**41, 18), kind="bandit")
                self._bandits = tasks, references(tasks)
            tasks, reference = self._bandits
            context = run_agent(self.model, tasks, c.bandit_steps, seed=7)
            scores["score_bandits"] = mean_ci(normalized(context, reference, c.bandit_steps // 2, c.bandit_steps))[0]
        return scores
