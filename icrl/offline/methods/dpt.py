"""DPT, the decision-pretrained transformer (Lee et al. 2023, arXiv 2306.14892).

The prompt is an episode of raw transitions, the query a state; the loss is the cross-entropy of an optimal action there,
at every prompt length. Where no optimal action is known, as S-ICQL's comparison has it, the label is the data's own action.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from icrl.offline.method import Metrics, Spaces, head
from icrl.offline.prompt import Batch, PromptConfig, PromptMethod, PromptTrunk
from icrl.offline.trajectories import Trajectories


@dataclass(frozen=True)
class DPTConfig(PromptConfig):
    labels: str = "data"
    """"data", or "optimal", where the data knows them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.labels not in ("data", "optimal"):
            raise ValueError(f"labels: wanted 'data' or 'optimal', got {self.labels!r}")


class DPT(PromptMethod):
    name, title, config_class = "dpt", "DPT", DPTConfig
    config: DPTConfig

    def __init__(self, config: DPTConfig, spaces: Spaces) -> None:
        super().__init__(config, spaces)
        self.trunk = PromptTrunk(config, spaces, 2 * spaces.state_size + spaces.action_size + 1)
        self.pi = head(config.trunk.width, spaces.action_size)

    def policy(self, features: Tensor) -> Tensor:
        return self.pi(features)

    def prepare(self, data: Trajectories) -> None:
        super().prepare(data)
        if self.config.labels == "optimal" and data.optimal is None:
            raise ValueError("labels: this data knows no optimal actions; use 'data'")

    def objective(self, data: Trajectories, batch: Batch) -> tuple[Tensor, Metrics]:
        labels = data.optimal if self.config.labels == "optimal" else data.actions
        assert labels is not None
        memory = self.trunk.remember(self.prompt_tokens(data, batch.prompt), batch.lengths)
        queries = self.trunk.embed_state(self.normal(data.states[batch.steps]))[:, :, None]
        output = self.pi(self.trunk.read(queries, memory)[:, :, 0])
        loss = self.imitation(output, self.at_lengths(labels[batch.steps], batch)).mean()
        return loss, {"loss": loss.detach()}
