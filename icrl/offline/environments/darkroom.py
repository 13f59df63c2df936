"""DarkRoom: find a goal that is not seen in a square room, and stay there. As a Gymnasium environment and as tables.

The state is the position (x, y), the actions are left, right, up, down and stay; a step that ends at the goal pays 1; an
episode has `horizon` steps and starts anywhere, or at (0, 0). Tasks differ in their goal alone. The default is the size of
the decision-pretrained transformer's room (arXiv 2306.14892): 10 × 10, 100 steps, 80 goals to train with and 20 to test.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from icrl.offline.environments.source import DataSource, check_histories, half, on_cpu
from icrl.offline.trajectories import Trajectories
from icrl.worlds.tasks import TabularTasks
from icrl_kernels import Rollout, constant_behaviours, rollout
from icrl_kernels.arguments import integer, integer_fields

MOVES = ((-1, 0), (1, 0), (0, -1), (0, 1), (0, 0))
STARTS = ("random", "corner")
QUALITIES = ("mixed", "medium", "expert", "q_learning")


class DarkRoom(gymnasium.Env[np.ndarray, np.int64]):
    """One DarkRoom. `horizon` steps, then truncated; nothing is random but the start, and that only if `start` says so."""

    metadata = {"render_modes": []}  # noqa: RUF012 (Gymnasium's declaration)

    def __init__(
        self, goal: tuple[int, int] = (5, 5), size: int = 10, horizon: int = 100, start: str = "random"
    ) -> None:
        if start not in STARTS:
            raise ValueError(f"start: wanted one of {', '.join(STARTS)}, got {start!r}")
        size, horizon = integer("size", size, 1), integer("horizon", horizon, 1)
        goal = integer("goal", goal[0]), integer("goal", goal[1])
        if not (0 <= goal[0] < size and 0 <= goal[1] < size):
            raise ValueError(f"goal: wanted a cell of the room of size {size}, got {goal}")
        self.goal, self.size, self.horizon, self.start = goal, size, horizon, start
        self.observation_space = spaces.Box(0, size - 1, (2,), np.float32)
        self.action_space = spaces.Discrete(len(MOVES))
        self._at, self._elapsed = (0, 0), 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=None if seed is None else integer("seed", seed, 0))
        self._at, self._elapsed = (0, 0), 0
        if self.start == "random":
            x, y = self.np_random.integers(self.size, size=2)
            self._at = int(x), int(y)
        return np.array(self._at, np.float32), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        if not self.action_space.contains(action):
            raise ValueError(f"action: wanted 0 to {len(MOVES) - 1}, got {action!r}")
        dx, dy = MOVES[int(action)]
        x, y = self._at
        self._at = min(max(x + dx, 0), self.size - 1), min(max(y + dy, 0), self.size - 1)
        self._elapsed += 1
        return np.array(self._at, np.float32), float(self._at == self.goal), False, self._elapsed >= self.horizon, {}


def darkroom_tasks(goals: Tensor, size: int = 10, horizon: int = 100, start: str = "random") -> TabularTasks:
    """The rooms with these goals [N,2] as tables; state x·size + y."""
    size, horizon = integer("size", size, 1), integer("horizon", horizon, 1)
    N, S, A = len(goals), size * size, len(MOVES)
    at = torch.stack([torch.arange(S, device="cpu") // size, torch.arange(S, device="cpu") % size], 1)
    following = (at[:, None] + torch.tensor(MOVES, dtype=torch.int64, device="cpu")).clamp(0, size - 1)  # [S,A,2]
    index = following[..., 0] * size + following[..., 1]
    transition = torch.zeros(S, A, S, dtype=torch.float32, device="cpu").scatter_(2, index[..., None], 1.0)
    goal = torch.nn.functional.one_hot(goals[:, 0] * size + goals[:, 1], S).float()
    first = torch.full((N, S), 1.0 / S, dtype=torch.float32, device="cpu")
    if start == "corner":
        first = torch.nn.functional.one_hot(torch.zeros(N, dtype=torch.int64, device="cpu"), S).float()
    return TabularTasks(
        transition.expand(N, S, A, S).contiguous(),
        goal[:, None, None, :].expand(N, S, A, S).contiguous(),
        torch.zeros(N, S, dtype=torch.float32, device="cpu"),
        torch.zeros(N, S, A, dtype=torch.float32, device="cpu"),
        first,
        torch.zeros(N, S, dtype=torch.bool, device="cpu"),
        torch.full((N,), horizon, dtype=torch.int64, device="cpu"),
        torch.arange(S, device="cpu").expand(N, S).contiguous(),
        torch.full((N,), S, dtype=torch.int64, device="cpu"),
        torch.full((N,), A, dtype=torch.int64, device="cpu"),
        num_observations=S,
    )


@dataclass(frozen=True)
class DarkRoomData(DataSource):
    """Which goals, and the behaviour that gathered the training data in them."""

    name: ClassVar[str] = "darkroom"
    counts_goals: ClassVar[bool] = True
    size: int = 10
    horizon: int = 100
    start: str = "random"
    """Where episodes start: "random", anywhere; "corner", at (0, 0)."""
    train_goals: int = 80
    """Of size²; the others are the test tasks."""
    split: str = "random"
    """"random", or "far": the test goals are those farthest from (0, 0), none nearer than one in training."""
    episodes: int = 100
    """Of each training task, gathered as learning histories of `history` episodes."""
    history: int = 20
    quality: str = "mixed"
    """Of a history: "mixed", an optimal policy whose share of uniform actions falls from 1 to 0 (Zisman et al. 2023,
    arXiv 2312.12275); "medium", with a share of .5 throughout; "expert", of .05; "q_learning", tabular Q-learning."""
    seed: int = 0

    def __post_init__(self) -> None:
        integer_fields(self)
        if self.size < 2 or self.horizon < 1 or not 0 < self.train_goals < self.size**2:
            raise ValueError(
                f"size, horizon, train_goals: wanted at least 2, at least 1, and 1 to size²-1, got {self.size}, "
                f"{self.horizon}, {self.train_goals}"
            )
        if self.start not in STARTS:
            raise ValueError(f"start: wanted one of {', '.join(STARTS)}, got {self.start!r}")
        if self.split not in ("random", "far"):
            raise ValueError(f"split: wanted 'random' or 'far', got {self.split!r}")
        if self.quality not in QUALITIES:
            raise ValueError(f"quality: wanted one of {', '.join(QUALITIES)}, got {self.quality!r}")
        check_histories(self.episodes, self.history)

    @on_cpu
    def goals(self) -> tuple[Tensor, Tensor]:
        """Training and test goals, [.,2] each."""
        order = torch.randperm(self.size**2, generator=torch.Generator().manual_seed(self.seed), device="cpu")
        cells = torch.stack([order // self.size, order % self.size], 1)
        if self.split == "far":
            cells = cells[cells.sum(1).argsort(stable=True)]
        return cells[: self.train_goals], cells[self.train_goals :]

    @on_cpu
    def train_data(self) -> Trajectories:
        tasks = darkroom_tasks(self.goals()[0], self.size, self.horizon, self.start)
        best = tasks.solve(0.99).q.argmax(-1)
        N = len(best)
        steps, each = self.history * self.horizon, self.episodes // self.history
        weights: dict[int | str, float] = {"q_learning": 1.0} if self.quality == "q_learning" else {0: 1.0}
        noise = {"mixed": (1.0, 1.0 / steps), "medium": (0.5, 0.0), "expert": (0.05, 0.0), "q_learning": (0.1, 0.0)}
        epsilon, decay = noise[self.quality]
        behaviours = constant_behaviours(N * each, 1, weights, epsilon=epsilon, epsilon_decay=decay, q_discount=0.95)
        out = rollout(
            tasks.tables(),
            steps=steps,
            seed=self.seed,
            task_index=torch.arange(N, device="cpu").repeat_interleave(each),
            policies=best[:, None],
            behaviours=behaviours,
        )
        return trajectories("DarkRoom", out, self.size, self.horizon, best.repeat_interleave(each, 0), each)

    @on_cpu
    def environments(self, which: str = "test") -> gymnasium.vector.VectorEnv:
        """One environment a goal of the "train" or "test" tasks."""
        return darkroom_environments(self.goals()[half(which)], self.size, self.horizon, self.start)

    @on_cpu
    def best_returns(self, which: str = "test") -> Tensor:
        """[N] what an optimal policy earns in an episode of each task, the start's distribution averaged over."""
        return best_returns(self.goals()[half(which)], self.size, self.horizon, self.start)


def best_returns(goals: Tensor, size: int, horizon: int, start: str) -> Tensor:
    cells = (
        torch.cartesian_prod(torch.arange(size, device="cpu"), torch.arange(size, device="cpu"))
        if start == "random"
        else torch.zeros(1, 2, dtype=torch.int64, device="cpu")
    )
    steps = (cells[None] - goals[:, None]).abs().sum(-1)
    return (horizon - (steps - 1).clamp_min(0)).clamp_min(0).float().mean(1)


def darkroom_environments(goals: Tensor, size: int, horizon: int, start: str) -> gymnasium.vector.VectorEnv:
    makers = [lambda g=tuple(g): DarkRoom(g, size, horizon, start) for g in goals.tolist()]
    return gymnasium.vector.SyncVectorEnv(makers, autoreset_mode=gymnasium.vector.AutoresetMode.SAME_STEP)


def trajectories(
    environment: str, out: Rollout, size: int, horizon: int, best: Tensor, records: int = 1
) -> Trajectories:
    """A rollout [R,T] of DarkRooms as data: a task has `records` records, each a history; best [R,S], optimal actions."""
    R, T = out.state.shape

    def place(states: Tensor) -> Tensor:
        index = states.long().flatten()
        return torch.stack([index // size, index % size], 1).float()

    return Trajectories(
        environment,
        len(MOVES),
        place(out.state),
        out.action.long().flatten(),
        out.reward.flatten(),
        place(out.next_state),
        torch.zeros(R * T, dtype=torch.bool, device="cpu"),
        torch.arange(1, R * T // horizon + 1, device="cpu") * horizon,
        torch.arange(R // records, device="cpu").repeat_interleave(records * T // horizon),
        best.gather(1, out.state.long()).flatten(),
        T // horizon if records > 1 else 0,
    )
