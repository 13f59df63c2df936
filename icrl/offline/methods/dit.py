"""DIT, the decision importance transformer (Dong et al. 2025): DPT on the data's own actions, weighted by advantage.

A value head learns the behaviour's value of a state from the prompt, by regression on the discounted return that followed;
an action's weight is exp(advantage / λ), clipped, its advantage being that return minus the value.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from icrl.offline.method import Metrics, Spaces, deviation, head
from icrl.offline.prompt import Batch, PromptConfig, PromptMethod, PromptTrunk
from icrl.offline.trajectories import Trajectories


@dataclass(frozen=True)
class DITConfig(PromptConfig):
    discount: float = 0.99
    inverse_temperature: float = 1.0
    """1/λ, of advantages in deviations of the data's returns."""
    max_weight: float = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.discount < 1:
            raise ValueError(f"discount: wanted a number in [0, 1), got {self.discount}")
        for name in ("inverse_temperature", "max_weight"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: wanted a positive number, got {getattr(self, name)}")


class DIT(PromptMethod):
    name, title, config_class = "dit", "DIT", DITConfig
    config: DITConfig

    def __init__(self, config: DITConfig, spaces: Spaces) -> None:
        super().__init__(config, spaces)
        self.trunk = PromptTrunk(config, spaces, 2 * spaces.state_size + spaces.action_size + 1)
        self.pi, self.v = head(config.trunk.width, spaces.action_size), head(config.trunk.width, 1)

    def policy(self, features: Tensor) -> Tensor:
        return self.pi(features)

    def prepare(self, data: Trajectories) -> None:
        super().prepare(data)
        returns = data.returns_to_go(self.config.discount)
        self._returns = (returns - returns.mean()) / deviation(returns)

    def objective(self, data: Trajectories, batch: Batch) -> tuple[Tensor, Metrics]:
        c = self.config
        memory = self.trunk.remember(self.prompt_tokens(data, batch.prompt), batch.lengths)
        queries = self.trunk.embed_state(self.normal(data.states[batch.steps]))[:, :, None]
        features = self.trunk.read(queries, memory)[:, :, 0]
        advantage = self._returns[batch.steps] - self.v(features)[..., 0]
        weight = (c.inverse_temperature * advantage.detach()).exp().clamp(max=c.max_weight)
        imitation = self.imitation(self.pi(features), self.at_lengths(data.actions[batch.steps], batch))
        policy_loss, value_loss = (weight * imitation).mean(), advantage.square().mean()
        loss = policy_loss + value_loss
        metrics = {"loss": loss, "policy_loss": policy_loss, "value_loss": value_loss}
        return loss, {k: v.detach() for k, v in metrics.items()}
