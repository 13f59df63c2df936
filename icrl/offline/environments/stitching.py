"""The stitching study: a DarkRoom whose data holds only halves of good paths, and never a whole one.

Half of the episodes start where tests do, at (0, 0), and go to some cell of the left half and about it, never into the
right half: they see no reward. The others start on the left half's border and go to the goal, which lies in the right half.
So no trajectory leads from the start to a goal. A test gives one episode of the second kind as the first prompt, and
starts at (0, 0): an agent that reaches the goal from there has put halves together.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import gymnasium
import torch
import torch.nn.functional as F
from torch import Tensor

from icrl.offline.environments.darkroom import MOVES, best_returns, darkroom_environments, darkroom_tasks, trajectories
from icrl.offline.environments.source import DataSource, half, on_cpu
from icrl.offline.trajectories import Trajectories
from icrl.worlds.tasks import TabularTasks
from icrl_kernels import constant_behaviours, rollout
from icrl_kernels.arguments import integer_fields


@dataclass(frozen=True)
class StitchingData(DataSource):
    """Which goals, and how many episodes of either kind."""

    name: ClassVar[str] = "stitching"
    counts_goals: ClassVar[bool] = True
    counts_first: ClassVar[bool] = True
    size: int = 10
    horizon: int = 40
    train_goals: int = 32
    """Of the right half's cells; the others are the test goals."""
    episodes: int = 40
    """Of each task, half of each kind."""
    targets: int = 8
    """Cells of the left half that a task's first kind of episode goes to."""
    noise: float = 0.3
    """Share of uniform actions."""
    seed: int = 0

    def __post_init__(self) -> None:
        integer_fields(self)
        if self.size < 4 or self.size % 2:
            raise ValueError(f"size: wanted an even number of at least 4, got {self.size}")
        cells = self.size**2 // 2
        if not 0 < self.train_goals < cells:
            raise ValueError(f"train_goals: wanted 1 to {cells - 1}, got {self.train_goals}")
        if self.episodes < 2 or self.episodes % 2 or self.horizon < 1 or self.targets < 1:
            raise ValueError(
                f"episodes, horizon, targets: wanted an even number, and at least 1, got {self.episodes}, "
                f"{self.horizon}, {self.targets}"
            )
        if not 0 <= self.noise < 1:
            raise ValueError(f"noise: wanted a share in [0, 1), got {self.noise}")

    @on_cpu
    def goals(self) -> tuple[Tensor, Tensor]:
        """Training and test goals, [.,2] each."""
        half = self.size**2 // 2
        order = half + torch.randperm(half, generator=torch.Generator().manual_seed(self.seed), device="cpu")
        cells = torch.stack([order // self.size, order % self.size], 1)
        return cells[: self.train_goals], cells[self.train_goals :]

    @on_cpu
    def train_data(self) -> Trajectories:
        """Of each training task as many episodes of either kind, in any order: a context of several holds both."""
        goals, n = self.goals()[0], self.episodes // 2
        N = len(goals)
        both = Trajectories.concatenate([self._leaving(N, 2 * self.seed), self._arriving(goals, n, 2 * self.seed + 1)])
        order = (
            torch.arange(2, device="cpu")[None, :, None] * N + torch.arange(N, device="cpu")[:, None, None]
        ) * n + torch.arange(n, device="cpu")
        generator = torch.Generator().manual_seed(self.seed + 2)
        order = order.flatten(1).gather(
            1, torch.rand(N, 2 * n, generator=generator, dtype=torch.float32, device="cpu").argsort(1)
        )
        return both.reorder(order.flatten(), torch.arange(N, device="cpu").repeat_interleave(2 * n))

    @on_cpu
    def prompts(self) -> Trajectories:
        """Of each test task one episode that arrives: what a few-shot evaluation is given to begin with."""
        return self._arriving(self.goals()[1], 1, 2 * self.seed + 2**20)

    def _leaving(self, N: int, seed: int) -> Trajectories:
        """From (0, 0) to cells of the left half; no reward, so that the goal does not matter."""
        half, S, A = self.size // 2, self.size**2, len(MOVES)
        generator = torch.Generator().manual_seed(self.seed + 1)
        cells = torch.randint(half * self.size, (N * self.targets,), generator=generator, device="cpu")
        places = torch.stack([cells // self.size, cells % self.size], 1)
        to_target = darkroom_tasks(places, self.size, self.horizon)
        policies = F.one_hot(to_target.solve(0.99).q.argmax(-1), A).float().view(N, self.targets, S, A)
        allowed = torch.ones(S, A, dtype=torch.float32, device="cpu")
        allowed[(half - 1) * self.size : half * self.size, MOVES.index((1, 0))] = 0.0  # not into the right half
        tasks = darkroom_tasks(self.goals()[0][:N], self.size, self.horizon, "corner")
        return self._gather(tasks, policies, allowed / allowed.sum(1, keepdim=True), self.episodes // 2, seed)

    def _arriving(self, goals: Tensor, episodes: int, seed: int) -> Trajectories:
        """From the left half's border to the goal."""
        half, S, A = self.size // 2, self.size**2, len(MOVES)
        border = torch.zeros(len(goals), S, dtype=torch.float32, device="cpu")
        border[:, (half - 1) * self.size : half * self.size] = 1.0 / self.size
        tasks = replace(darkroom_tasks(goals, self.size, self.horizon), start=border)
        policies = F.one_hot(tasks.solve(0.99).q.argmax(-1), A).float()[:, None]
        return self._gather(
            tasks, policies, torch.full((S, A), 1.0 / A, dtype=torch.float32, device="cpu"), episodes, seed
        )

    def _gather(self, tasks: TabularTasks, policies: Tensor, spread: Tensor, episodes: int, seed: int) -> Trajectories:
        """Episodes of the policies [N,P,S,A], one drawn anew for each, with a share of actions drawn from `spread`."""
        N, P = policies.shape[:2]
        out = rollout(
            tasks.tables(),
            steps=self.horizon * episodes,
            seed=seed,
            policies=(1 - self.noise) * policies + self.noise * spread,
            behaviours=constant_behaviours(N, P, dict.fromkeys(range(P), 1.0), switch=1.0),
        )
        return trajectories("Stitching", out, self.size, self.horizon, tasks.solve(0.99).q.argmax(-1))

    @on_cpu
    def environments(self, which: str = "test") -> gymnasium.vector.VectorEnv:
        """One room a goal of the "train" or "test" tasks, every episode from (0, 0)."""
        return darkroom_environments(self.goals()[half(which)], self.size, self.horizon, "corner")

    @on_cpu
    def best_returns(self, which: str = "test") -> Tensor:
        """[N] the optimal return of each task's episode from (0, 0)."""
        return best_returns(self.goals()[half(which)], self.size, self.horizon, "corner")
