"""PointRobot: a point in the plane seeks a goal on a half circle that it does not see. The continuous environment that
needs no simulator.

The state is the position, which starts at the origin; an action moves it by at most `reach` along each axis; the reward is
minus the distance to the goal after the move. Tasks differ in their goal, on the upper half of the unit circle.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from icrl.offline.environments.source import DataSource, check_grades, check_histories, half, on_cpu
from icrl.offline.trajectories import Trajectories
from icrl_kernels.arguments import integer, integer_fields


class PointRobot(gymnasium.Env[np.ndarray, np.ndarray]):
    """One PointRobot. Actions lie in [-1, 1]², in units of `reach`; `horizon` steps, then truncated; nothing is random."""

    metadata = {"render_modes": []}  # noqa: RUF012 (Gymnasium's declaration)

    def __init__(self, angle: float = 1.0, horizon: int = 50, reach: float = 0.1) -> None:
        horizon = integer("horizon", horizon, 1)
        if not reach > 0:
            raise ValueError(f"reach: wanted a positive number, got {reach}")
        self.goal = np.array([math.cos(angle), math.sin(angle)])
        self.horizon, self.reach = horizon, reach
        self.observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
        self._at, self._elapsed = np.zeros(2), 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=None if seed is None else integer("seed", seed, 0))
        self._at, self._elapsed = np.zeros(2), 0
        return self._at.astype(np.float32), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self._at = self._at + self.reach * np.clip(np.asarray(action, np.float64), -1.0, 1.0)
        self._elapsed += 1
        reward = -float(np.linalg.norm(self._at - self.goal))
        return self._at.astype(np.float32), reward, False, self._elapsed >= self.horizon, {}


@dataclass(frozen=True)
class PointRobotData(DataSource):
    """Goals at evenly spaced angles, every tenth a test goal; data by a straight walk to the goal with noise."""

    name: ClassVar[str] = "point-robot"
    horizon: int = 50
    reach: float = 0.1
    tasks: int = 50
    """45 of 50 to train with, as the published continuous environments have it."""
    split: str = "random"
    """"random", every tenth goal for tests; "far", the last tenth, beyond all training angles."""
    episodes: int = 40
    """Of each training task, in histories of `history` episodes."""
    history: int = 20
    quality: str = "mixed"
    """"mixed": noise falls over a history from all to none; "medium", half; "expert", a twentieth."""
    seed: int = 0

    def __post_init__(self) -> None:
        integer_fields(self)
        if self.horizon < 1 or self.tasks < 10 or not self.reach > 0:
            raise ValueError(
                f"horizon, tasks, reach: wanted at least 1, at least 10 and a positive number, got {self.horizon}, "
                f"{self.tasks}, {self.reach}"
            )
        check_grades(self.split, self.quality)
        check_histories(self.episodes, self.history)

    @on_cpu
    def angles(self) -> tuple[Tensor, Tensor]:
        """Of training and test goals."""
        angles = torch.linspace(0, math.pi, self.tasks, dtype=torch.float64, device="cpu")
        test = torch.arange(self.tasks, device="cpu") % 10 == 5
        if self.split == "far":
            test = torch.arange(self.tasks, device="cpu") >= self.tasks - self.tasks // 10
        return angles[~test], angles[test]

    @on_cpu
    def goals(self) -> tuple[Tensor, Tensor]:
        """Training and test goals, [.,2] each."""
        train, test = (torch.stack([a.cos(), a.sin()], 1) for a in self.angles())
        return train, test

    @on_cpu
    def train_data(self) -> Trajectories:
        goals = self.goals()[0].repeat_interleave(self.episodes, 0)  # [E,2]
        E, H = len(goals), self.horizon
        generator = torch.Generator().manual_seed(self.seed)
        falling = 1.0 - (torch.arange(E, device="cpu") % self.history).double() / max(1, self.history - 1)
        share = {
            "mixed": falling,
            "medium": torch.full((E,), 0.5, dtype=torch.float32, device="cpu"),
            "expert": torch.full((E,), 0.05, dtype=torch.float32, device="cpu"),
        }[self.quality]
        at = torch.zeros(E, 2, dtype=torch.float64, device="cpu")
        rows: list[tuple[Tensor, ...]] = []
        for _ in range(H):
            noisy = torch.rand(E, generator=generator, dtype=torch.float32, device="cpu") < share
            anything = 2 * torch.rand(E, 2, generator=generator, dtype=torch.float64, device="cpu") - 1
            action = torch.where(noisy[:, None], anything, ((goals - at) / self.reach).clamp(-1, 1))
            following = at + self.reach * action
            rows.append((at, action, -(following - goals).norm(dim=1), following))
            at = following
        states, actions, rewards, next_states = (
            torch.stack(x, 1).flatten(0, 1).float() for x in zip(*rows, strict=True)
        )
        return Trajectories(
            "PointRobot",
            0,
            states,
            actions,
            rewards,
            next_states,
            torch.zeros(E * H, dtype=torch.bool, device="cpu"),
            torch.arange(1, E + 1, device="cpu") * H,
            torch.arange(len(self.goals()[0]), device="cpu").repeat_interleave(self.episodes),
            history=self.history,
        )

    @on_cpu
    def environments(self, which: str = "test") -> gymnasium.vector.VectorEnv:
        """One environment a goal of the "train" or "test" tasks."""
        angles = self.angles()[half(which)].tolist()
        makers = [lambda a=a: PointRobot(a, self.horizon, self.reach) for a in angles]
        return gymnasium.vector.SyncVectorEnv(makers, autoreset_mode=gymnasium.vector.AutoresetMode.SAME_STEP)

    @on_cpu
    def best_returns(self, which: str = "test") -> Tensor:
        """[N] the return of the straight walk."""
        goals = self.goals()[half(which)]
        at, total = torch.zeros_like(goals), torch.zeros(len(goals), dtype=torch.float64, device="cpu")
        for _ in range(self.horizon):
            at = at + self.reach * ((goals - at) / self.reach).clamp(-1, 1)
            total -= (at - goals).norm(dim=1)
        return total.float()
