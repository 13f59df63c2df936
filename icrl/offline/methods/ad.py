"""AD, algorithm distillation (Laskin et al. 2022, arXiv 2210.14215): predict the next action of a learning history.

A model that predicts how a learner goes on must know how it improves; acting by it goes on improving, in context.
"""

from __future__ import annotations

from torch import Tensor

from icrl.offline.history import History, HistoryConfig, HistoryMethod, HistoryTrunk
from icrl.offline.method import Metrics, Spaces, head
from icrl.offline.trajectories import Trajectories


class AD(HistoryMethod):
    name, title, config_class = "ad", "AD", HistoryConfig

    def __init__(self, config: HistoryConfig, spaces: Spaces) -> None:
        super().__init__(config, spaces)
        self.trunk = HistoryTrunk(config, spaces)
        self.pi = head(config.trunk.width, spaces.action_size)

    def objective(self, data: Trajectories, batch: History) -> tuple[Tensor, Metrics]:
        loss = self.imitation(self.pi(self.features(batch)), batch.action).mean()
        return loss, {"loss": loss.detach()}
