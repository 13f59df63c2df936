"""IC-IQL: algorithm distillation's raw context with implicit Q-learning's heads in place of imitation.

π and V read the features of a step, Q those features and an action; V(s') is that of the next token, where the episode
goes on. The losses are S-ICQL's (`icrl.offline.iql.iql_losses`), at every step of the history.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from icrl.offline.history import History, HistoryConfig, HistoryMethod, HistoryTrunk
from icrl.offline.iql import IQL, iql_losses
from icrl.offline.method import Metrics, Spaces, head, target_of
from icrl.offline.trajectories import Trajectories


@dataclass(frozen=True)
class ICIQLConfig(HistoryConfig):
    iql: IQL = field(default_factory=IQL)


class ICIQL(HistoryMethod):
    name, title, config_class = "ic_iql", "IC-IQL", ICIQLConfig
    config: ICIQLConfig

    def __init__(self, config: ICIQLConfig, spaces: Spaces) -> None:
        super().__init__(config, spaces)
        width = config.trunk.width
        self.trunk = HistoryTrunk(config, spaces)
        self.pi, self.v = head(width, spaces.action_size), head(width, 1)
        self.embed_action = nn.Linear(spaces.action_size, width)
        self.q = nn.ModuleList([head(width, 1), head(width, 1)])
        self.target_q = target_of(self.q)

    def before_update(self) -> None:
        for target, online in zip(self.target_q.parameters(), self.q.parameters(), strict=True):
            target.data.lerp_(online.data, self.config.iql.target_rate)

    def objective(self, data: Trajectories, batch: History) -> tuple[Tensor, Metrics]:
        c, h = self.config, batch
        features = self.features(h)
        whole, rest = divmod(features.shape[1] - 1, c.horizon)
        t = torch.arange(whole * (c.horizon - 1) + rest, device=features.device)
        goes_on = t + t // max(1, c.horizon - 1)  # the steps whose next token is s', in the same episode
        v = self.v(features)[..., 0]
        paired = (features + self.embed_action(self.spaces.features(h.action)))[:, :-1][:, goes_on]
        losses = iql_losses(
            self.imitation(self.pi(features), h.action)[:, :-1][:, goes_on],
            v[:, :-1][:, goes_on],
            torch.cat([q(paired) for q in self.q], -1),
            torch.cat([q(paired.detach()) for q in self.target_q], -1),
            v[:, 1:][:, goes_on],
            h.reward[:, :-1][:, goes_on],
            data.terminated[h.steps][:, :-1][:, goes_on],
            c.iql,
        )
        total = losses.policy + losses.q + losses.v
        metrics = {f"{name}_loss": x.detach() for name, x in losses._asdict().items()}
        return total, {"loss": total.detach(), **metrics}
