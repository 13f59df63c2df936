"""The stitching study: a DarkRoom whose data holds only halves of good paths, and never a whole one.

Half of the episodes start where tests do, at (0, 0), and go to some cell of the left half and about it, never into the
right half: they see no reward. The others start on the left half's border and go to the goal, which lies in the right half.
So no trajectory leads from the start to a goal; whoever reaches it from there has put halves together.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import gymnasium
import torch
import torch.nn.functional as F
from torch import Tensor

from icrl.offline import Trajectories
from icrl.worlds.darkroom import MOVES, best_returns, darkroom_environments, darkroom_tasks, trajectories
from icrl_kernels import Behaviours, constant_behaviours, rollout


@dataclass(frozen=True)
class StitchingData:
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

    def goals(self) -> tuple[Tensor, Tensor]:
        """Training and test goals, [.,2] each."""
        half = self.size**2 // 2
        order = half + torch.randperm(half, generator=torch.Generator().manual_seed(self.seed))
        cells = torch.stack([order // self.size, order % self.size], 1)
        return cells[: self.train_goals], cells[self.train_goals :]

    def train_data(self) -> Trajectories:
        goals = self.goals()[0]
        N, half, S, A = len(goals), self.size // 2, self.size**2, len(MOVES)
        tasks = darkroom_tasks(goals, self.size, self.horizon, "corner")
        best = tasks.solve(0.99).q.argmax(-1)

        generator = torch.Generator().manual_seed(self.seed + 1)
        cells = torch.randint(half * self.size, (N * self.targets,), generator=generator)
        places = torch.stack([cells // self.size, cells % self.size], 1)
        to_target = darkroom_tasks(places, self.size, self.horizon)
        leave = F.one_hot(to_target.solve(0.99).q.argmax(-1), A).float().view(N, self.targets, S, A)
        allowed = torch.ones(S, A)
        allowed[(half - 1) * self.size : half * self.size, MOVES.index((1, 0))] = 0.0  # not into the right half
        uniform = allowed / allowed.sum(1, keepdim=True)
        arrive = F.one_hot(best, A).float()[:, None]
        border = torch.zeros(N, S)
        border[:, (half - 1) * self.size : half * self.size] = 1.0 / self.size
        parts = []
        for k, (policies, spread, start) in enumerate(
            ((leave, uniform, tasks.start), (arrive, torch.full((S, A), 1.0 / A), border))
        ):
            noisy = (1 - self.noise) * policies + self.noise * spread
            out = rollout(
                replace(tasks, start=start).tables(),
                steps=self.horizon * self.episodes // 2,
                seed=2 * self.seed + k,
                policies=noisy,
                behaviours=each_episode(N, policies.shape[1]),
            )
            parts.append(trajectories("Stitching", out, self.size, self.horizon, best))
        # a task's episodes together: those that leave, then those that arrive
        n = self.episodes // 2
        order = (torch.arange(2)[None, :, None] * N + torch.arange(N)[:, None, None]) * n + torch.arange(n)
        return Trajectories.concatenate(parts).reorder(order.flatten(), torch.arange(N).repeat_interleave(2 * n))

    def environments(self, which: str = "test") -> gymnasium.vector.VectorEnv:
        return darkroom_environments(self.goals()[0 if which == "train" else 1], self.size, self.horizon, "corner")

    def best_returns(self, which: str = "test") -> Tensor:
        """[N] the optimal return of each task's episode from (0, 0)."""
        return best_returns(self.goals()[0 if which == "train" else 1], self.size, self.horizon, "corner")


def each_episode(records: int, policies: int) -> Behaviours:
    """One of the policies, drawn anew for each episode."""
    return constant_behaviours(records, policies, dict.fromkeys(range(policies), 1.0), switch=1.0)
