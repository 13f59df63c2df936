"""Methods whose context is several episodes of a task, in most a learning history: the raw steps, one token each.

The token of step t holds the state s_t, and the action and the reward of the step before; the first of an episode says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from icrl.models.step import TrunkStep, trunk_step
from icrl.models.trunk import Trunk, TrunkState
from icrl.offline.method import Episode, Method, MethodConfig, Spaces
from icrl.offline.trajectories import Trajectories
from icrl_kernels.arguments import integer_fields


@dataclass(frozen=True)
class HistoryConfig(MethodConfig):
    batch: int = 32
    episodes: int = 4
    """That a context holds, the current one among them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        integer_fields(self, episodes=1)


class History(NamedTuple):
    """[B,T] steps, T = episodes · horizon, on the data's device."""

    state: Tensor
    action: Tensor
    reward: Tensor
    next_state: Tensor
    steps: Tensor  # int64, of the data


class HistoryTrunk(nn.Module):
    """The trunk over a history's tokens."""

    def __init__(self, config: HistoryConfig, spaces: Spaces) -> None:
        super().__init__()
        width = config.trunk.width
        self.trunk = Trunk(config.trunk, config.episodes * config.horizon)
        self.embed_state = nn.Linear(spaces.state_size, width)
        self.embed_previous = nn.Linear(spaces.action_size + 2, width)

    def forward(self, state: Tensor, previous: Tensor, memory: TrunkState | None = None) -> tuple[Tensor, TrunkState]:
        """Normalised states [B,T,S] and what came before each [B,T,A+2]: see `HistoryMethod.previous`."""
        return self.trunk(self.embed_state(state) + self.embed_previous(previous), memory)


class HistoryMethod(Method):
    decides_by_memory = False
    """Whether `decide` looks at the memory, and not at the features of the current step alone."""
    config: HistoryConfig
    trunk: HistoryTrunk
    pi: nn.Module

    def prepare(self, data: Trajectories) -> None:
        super().prepare(data)
        if int(data.lengths.max()) > self.config.horizon:
            raise ValueError(
                f"horizon: wanted the episodes' length, up to {int(data.lengths.max())} steps, got {self.config.horizon}"
            )
        self.draw_context(data, torch.arange(data.num_tasks, device="cpu"))  # refuses tasks with too few episodes

    def draw(self, data: Trajectories) -> History:
        c = self.config
        tasks = data.draw_tasks(c.batch)
        begins = data.begins[self.draw_context(data, tasks)][..., None]
        steps = (begins + torch.arange(c.horizon, device="cpu")).flatten(1).to(data.device)
        return History(data.states[steps], data.actions[steps], data.rewards[steps], data.next_states[steps], steps)

    def draw_context(self, data: Trajectories, tasks: Tensor) -> Tensor:
        """[B,episodes] the episodes of each context, on the CPU: consecutive ones, of one history."""
        episodes = self.config.episodes
        return data.draw_episodes(tasks, episodes)[:, None] + torch.arange(episodes, device="cpu")

    def previous(self, action: Tensor, reward: Tensor) -> Tensor:
        """[B,T,A+2]: the features of each step's predecessor in its episode, and whether it has none."""
        c = self.config
        x = torch.cat([self.spaces.features(action), reward[..., None], torch.zeros_like(reward)[..., None]], -1)
        x = x.roll(1, 1)
        x[:, :: c.horizon] = self.nothing(x.shape[0])[:, None]
        return x

    def nothing(self, batch: int) -> Tensor:
        """What comes before an episode's first step, [B,A+2]."""
        x = torch.zeros(batch, self.spaces.action_size + 2, device=self.device, dtype=torch.float32)
        x[:, -1] = 1.0
        return x

    def features(self, h: History) -> Tensor:
        """[B,T,D] of a whole history."""
        return self.trunk(self.normal(h.state), self.previous(h.action, h.reward))[0]

    def decide(self, features: Tensor, memory: TrunkState | None, state: Tensor) -> Tensor:
        """The action, from the features of the current step; the memory is given where `decides_by_memory` says so."""
        return self.choose(self.pi(features))

    def agent(self, batch: int) -> HistoryAgent:
        return HistoryAgent(self, batch)


class HistoryAgent:
    """Acts at the end of its own history; when a context is full, it goes on with its newest episodes but one.

    The trunk's step is one call of C++ where that serves (icrl.models.step), and else the module's.
    """

    def __init__(self, method: HistoryMethod, batch: int) -> None:
        self.method, self.episode = method, Episode(batch, method.spaces, begun=False)
        self.batch = self.episode.batch
        self.past: list[tuple[Tensor, ...]] = []
        self.memory: TrunkState | None = None
        self.step: TrunkStep | None = None
        self.last = method.nothing(batch)

    @torch.no_grad()
    def begin(self) -> None:
        m = self.method
        if self.episode.steps:
            self.past = [*self.past, self.episode.stacked()]
        if len(self.past) >= m.config.episodes:  # else `memory` holds them all
            self.past = self.past[-(m.config.episodes - 1) :] if m.config.episodes > 1 else []
            self.memory = None
            if self.past:
                s, a, r, _ = (torch.cat(x, 1) for x in zip(*self.past, strict=True))
                _, self.memory = m.trunk(m.normal(s), m.previous(a, r))
            if self.step is not None:
                self.step.replace(self.memory)
        if (self.step is None or self.step.stale) and not m.decides_by_memory:
            t = m.trunk
            memory = self.memory if self.step is None else self.step.state
            self.step = trunk_step(t.trunk, self.batch, [t.embed_state, t.embed_previous])
            if self.step is None:
                self.memory = memory
            else:
                self.step.replace(memory)
        self.episode, self.last = Episode(self.batch, self.method.spaces), m.nothing(self.batch)

    @torch.no_grad()
    def act(self, state: Tensor) -> Tensor:
        m = self.method
        self.episode.see(state)
        if self.step is not None:
            return m.decide(self.step(m.normal(state), self.last), None, state)
        features, self.memory = m.trunk(m.normal(state)[:, None], self.last[:, None], self.memory)
        return m.decide(features[:, 0], self.memory, state)

    def observe(self, state: Tensor, action: Tensor, reward: Tensor, next_state: Tensor) -> None:
        self.episode.add(state, action, reward, next_state)
        self.last = self.after(self.method, action, reward)

    @staticmethod
    def after(method: HistoryMethod, action: Tensor, reward: Tensor) -> Tensor:
        return torch.cat([method.spaces.features(action), reward[:, None], torch.zeros_like(reward)[:, None]], -1)
