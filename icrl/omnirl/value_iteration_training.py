"""Meta-training of OmniRL by decoupled policy distillation, with the model's own rollouts mixed in (DAgger).

A batch holds records: a behaviour policy acted, references label every state. The loss, after each block of the model (the
last at weight 1, the others at `auxiliary_weight`), is the cross-entropy of each policy's action - optimal at each
discount, and that of the model-based learner fed with the same history - plus a smooth-L1 loss of the Q-values. From `dagger_from` on, a share of each batch is records in which the model itself acted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icrl.data.seeds import hash_seed
from icrl.omnirl.distill import DPDConfig
from icrl.omnirl.learner import DistillationLearner, check_distillation
from icrl.omnirl.targets import Targets, targets_of, tokens_of
from icrl.omnirl.tokens import Tokens
from icrl.omnirl.value_iteration_network import Output, ValueIterationNetwork, ValueIterationNetworkConfig, whole
from icrl.training.config import LoopConfig, configured
from icrl.training.process import autocast
from icrl_kernels.arguments import integer, integer_fields


@dataclass(frozen=True)
class ValueIterationTraining:
    model: ValueIterationNetworkConfig = field(default_factory=ValueIterationNetworkConfig)
    data: DPDConfig = field(
        default_factory=lambda: DPDConfig(
            batch=8,
            steps=2048,
            states=64,
            tasks={"anymdp": 0.6, "garnet": 0.1, "bandit": 0.05, "grid": 0.25},
            behaviours={
                "uniform": 0.2,
                "random_policy": 0.15,
                "q_learning+noise": 0.1,
                "model_based+noise": 0.35,
                "model_based+noise->greedy3": 0.05,
                "greedy3+noise": 0.05,
                "greedy3->model_based": 0.1,
            },
        )
    )
    depths: tuple[int, ...] = (5, 8)
    """Of tied layers: a batch runs through as many as are drawn from these. Empty: the model's."""
    segment: int = 512
    """Steps of a record between two updates; the model's state is carried on, detached."""
    policy_weights: tuple[float, ...] = (0.5, 0.5, 0.7, 0.5, 1.0)
    """Of each policy's loss: the optimal one at each discount, and the explorer."""
    explorer_bonus: float = 0.1
    """Of the model-based learner that the explorer imitates: see icrl_kernels.model_based_q."""
    q_weight: float = 0.3
    """Of the losses of values, after the last block and the first, whose values no other block reads. Those between have none:
    a few backups cannot reach the values that are asked for, and a guess would fill the gap."""
    auxiliary_weight: float = 0.3
    """Of the policies' losses after each block but the last."""
    dagger: float = 0.4
    """Share of the batch in which the model itself acted."""
    dagger_from: int = 150
    """The first update with it."""
    dagger_every: int = 50
    """Updates between two collections."""
    dagger_records: int = 32
    """Records of one collection, no fewer than a batch's share; the newest eight collections are kept."""
    evaluation_tasks: int = 64
    """Of AnyMDP, of 16 states or as many as the data have at most; where these have too few, tasks as the data's."""
    evaluation_steps: int = 1000
    records: str = ""
    """Folder of records (`icrl distill`) to train from; empty: made on the fly."""

    def __post_init__(self) -> None:
        one = ("segment", "dagger_every", "dagger_records", "evaluation_tasks", "evaluation_steps")
        integer_fields(self, dagger_from=0, **dict.fromkeys(one, 1))
        if len(self.policy_weights) != self.model.policies:
            raise ValueError(f"policy_weights: wanted {self.model.policies} of them, got {self.policy_weights}")
        for depth in self.depths if isinstance(self.depths, (tuple, list)) else (self.depths,):
            integer("depths", depth, 1)
        if self.depths and not self.model.tied:
            raise ValueError(f"depths: wanted none for layers that have weights of their own, got {self.depths}")
        check_distillation(self)

    @property
    def own_records(self) -> int:
        """Records of a batch in which the model itself acted."""
        return int(self.dagger * self.data.batch)

    @property
    def dagger_kept(self) -> int:
        return 8


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
        total = total + (1.0 if last else config.auxiliary_weight) * (entropy * weights).sum()
        if last or i == 0:
            q_loss = F.smooth_l1_loss(readout.q.float(), value)
            total = total + config.q_weight * q_loss
            metrics["q"] = q_loss.detach()
        if last:
            names = [*(f"policy_{g:g}" for g in config.model.discounts), "explorer"]
            metrics |= zip(names, entropy.detach(), strict=True)
    return total, {"loss": total.detach(), **metrics}


def upgraded(config: dict[str, Any]) -> dict[str, Any]:
    """A run's record as it is written today: settings that were none yet, and the seed, which once stood in "training"."""
    training, loop = config.get("training", {}), config.get("loop", {})
    if not isinstance(training, dict) or not isinstance(loop, dict):
        return config
    training = {"depths": [], **training}
    if isinstance(training.get("model"), dict):
        training["model"] = whole(training["model"])
    if "seed" in training:
        loop = {**loop, "seed": training.pop("seed")}
    return {**config, "training": training, "loop": loop}


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


class ValueIterationLearner(DistillationLearner):
    """What `icrl.training.loop.train` drives: see DistillationLearner for arguments and what is raised."""

    model: ValueIterationNetwork

    def __init__(
        self, config: ValueIterationTraining, loop: LoopConfig, init: Path | None = None, *, fresh: bool = True
    ) -> None:
        torch.manual_seed(loop.seed)
        self.training = config
        with torch.device("cpu"):
            model = ValueIterationNetwork(config.model)
        super().__init__(model, config, loop, init, fresh)

    def at(self, update: int) -> ValueIterationTraining:
        return self.training

    @property
    def dagger_from(self) -> int:
        return self.training.dagger_from

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
        records = self.records(update)
        tokens = Tokens(*(x.to(self.device) for x in tokens_of(records)))
        targets = Targets(*(x.to(self.device) for x in targets_of(records, self.training)))
        return self.segments(tokens, targets, self.depth(update))

    def depth(self, update: int) -> int:
        """Through how many layers an update's batch runs, in every process the same."""
        depths = self.training.depths or (self.training.model.layers,)
        return depths[hash_seed(self.loop.seed, update, 7) % len(depths)]

    def segments(
        self, tokens: Tokens, targets: Targets, layers: int | None = None
    ) -> Iterable[tuple[Tensor, dict[str, Tensor]]]:
        """The loss of each segment of a batch and what to log, as `loss_of` gives them."""
        c = self.training
        B, T = tokens.observation.shape
        state = self.model.initial_state(B, c.data.states, layers)
        for begin in range(0, T, c.segment):
            part = Tokens(*(x[:, begin : begin + c.segment] for x in tokens))
            with autocast(self.loop, self.device):
                output, state = self.forward(part, state.detach())
            yield loss_of(output, Targets(*(x[:, begin : begin + c.segment] for x in targets)), c)

    def evaluate(self) -> dict[str, float]:
        return self._score(self.training, min(16, self.training.data.states))
