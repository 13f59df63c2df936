"""IDT, the in-context decision transformer (Huang et al. 2024, arXiv 2405.20692): decisions over sorted episodes.

A context is several episodes in ascending order of their return. One high-level token stands for `span` steps: the return
still wanted, the state, and a summary of the span before; the trunk makes a decision of it, which with the current state
guides the `span` low-level actions. To act, the best return in the training data is wanted of each episode.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from icrl.models.trunk import Trunk, TrunkState
from icrl.offline.history import History, HistoryConfig, HistoryMethod
from icrl.offline.method import Episode, Metrics, Spaces, head
from icrl.offline.trajectories import Trajectories


@dataclass(frozen=True)
class IDTConfig(HistoryConfig):
    span: int = 10
    """Steps that one decision guides; a divisor of the horizon."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.span < 1 or self.horizon % self.span:
            raise ValueError(f"span: wanted a divisor of horizon={self.horizon}, got {self.span}")


class IDT(HistoryMethod):
    name, title, config_class = "idt", "IDT", IDTConfig
    config: IDTConfig

    def __init__(self, config: IDTConfig, spaces: Spaces) -> None:
        super().__init__(config, spaces)
        width = config.trunk.width
        self.decider = Trunk(config.trunk, config.episodes * config.horizon // config.span)
        self.embed_wanted = nn.Linear(spaces.state_size + 1, width)
        self.summarise = nn.Sequential(
            nn.Linear(spaces.state_size + spaces.action_size + 1, width), nn.ReLU(), nn.Linear(width, width)
        )
        self.embed_state = nn.Linear(spaces.state_size, width)
        self.pi = head(width, spaces.action_size)
        self.best: Tensor
        self.register_buffer("best", torch.empty(()))
        self.scale: Tensor
        self.register_buffer("scale", torch.empty(()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.ones_(self.best)
        nn.init.ones_(self.scale)

    def prepare(self, data: Trajectories) -> None:
        super().prepare(data)
        self._returns = data.returns_to_go(1.0)
        self.best.copy_(self._returns[data.begins].max())
        self.scale.copy_(self._returns.abs().max().clamp_min(1e-6))

    def draw_context(self, data: Trajectories, tasks: Tensor) -> Tensor:
        """Any episodes of the task: consecutive ones are too alike for the last to be much better than the first."""
        return data.draw_distinct_episodes(tasks, self.config.episodes)

    def decide_all(self, h: History, wanted: Tensor) -> tuple[Tensor, TrunkState]:
        """Decisions [B,T/span,D] of a context, and the trunk's state; wanted [B,T], the return from each step on."""
        begin = slice(None, None, self.config.span)
        x = self.tokens(h.state[:, begin], wanted[:, begin], self.summaries(h))
        return self.decider(x)

    def tokens(self, state: Tensor, wanted: Tensor, before: Tensor) -> Tensor:
        return self.embed_wanted(torch.cat([self.normal(state), (wanted / self.scale)[..., None]], -1)) + before

    def summaries(self, h: History) -> Tensor:
        """[B,T/span,D]: of the span before each span; zero before the first of an episode."""
        s = self.summary(h.state, h.action, h.reward).roll(1, 1)
        per_episode = self.config.horizon // self.config.span
        starts = torch.arange(s.shape[1], device=s.device) % per_episode == 0
        return s.masked_fill(starts[:, None], 0.0)

    def summary(self, state: Tensor, action: Tensor, reward: Tensor) -> Tensor:
        """[B,T/span,D] of steps [B,T]."""
        x = torch.cat([self.normal(state), self.spaces.features(action), reward[..., None]], -1)
        return self.summarise(x).unflatten(1, (-1, self.config.span)).mean(2)

    def objective(self, data: Trajectories, batch: History) -> tuple[Tensor, Metrics]:
        c, h = self.config, sort_episodes(batch, self.config.episodes)
        decisions, _ = self.decide_all(h, self._returns[h.steps])
        low = decisions.repeat_interleave(c.span, 1) + self.embed_state(self.normal(h.state))
        loss = self.imitation(self.pi(low), h.action).mean()
        return loss, {"loss": loss.detach()}

    def agent(self, batch: int) -> IDTAgent:
        return IDTAgent(self, batch)


def sort_episodes(h: History, episodes: int) -> History:
    """The same history with its episodes in ascending order of their return."""
    order = h.reward.unflatten(1, (episodes, -1)).sum(-1).argsort(dim=1, stable=True)
    rows = torch.arange(len(order), device=order.device)[:, None]
    return History(*(x.unflatten(1, (episodes, -1))[rows, order].flatten(1, 2) for x in h))


class IDTAgent:
    """Keeps its newest episodes, sorted by return, and wants the best return of each new one."""

    def __init__(self, method: IDT, batch: int) -> None:
        self.method, self.episode = method, Episode(batch, method.spaces, begun=False)
        self.batch = self.episode.batch
        self.past: list[tuple[Tensor, ...]] = []
        self.state: TrunkState | None = None

    @torch.no_grad()
    def begin(self) -> None:
        m = self.method
        keep = m.config.episodes - 1
        if self.episode.steps:
            self.past = [*self.past, self.episode.stacked()][-keep:] if keep else []
        self.state = None
        if self.past:
            s, a, r, n = (torch.cat(x, 1) for x in zip(*self.past, strict=True))
            h = sort_episodes(History(s, a, r, n, torch.zeros_like(r)), len(self.past))
            left = h.reward.unflatten(1, (len(self.past), -1)).flip(-1).cumsum(-1).flip(-1).flatten(1)
            _, self.state = m.decide_all(h, left)
        self.episode = Episode(self.batch, self.method.spaces)
        self.wanted = m.best.expand(self.batch)

    @torch.no_grad()
    def act(self, state: Tensor) -> Tensor:
        m = self.method
        self.episode.see(state)
        t = len(self.episode.steps)
        if t % m.config.span == 0:
            before = torch.zeros(self.batch, 1, m.config.trunk.width, device=m.device, dtype=torch.float32)
            if t:
                s, a, r, _ = (torch.stack(x, 1) for x in zip(*self.episode.steps[-m.config.span :], strict=True))
                before = m.summary(s, a, r)
            decision, self.state = m.decider(m.tokens(state[:, None], self.wanted[:, None], before), self.state)
            self.decision = decision[:, 0]
        return m.choose(m.pi(self.decision + m.embed_state(m.normal(state))))

    def observe(self, state: Tensor, action: Tensor, reward: Tensor, next_state: Tensor) -> None:
        self.episode.add(state, action, reward, next_state)
        self.wanted = self.wanted - reward
