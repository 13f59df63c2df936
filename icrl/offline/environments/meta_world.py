"""Reach and Push of Meta-World (arXiv 1910.10897), with their goal hidden, and data from noisy versions of Meta-World's own
scripted policies. Needs the extra `metaworld`; goals and configurations do not.

A robot's hand goes to a goal, or pushes a puck there; a step pays 0 to 10; `horizon` steps, then truncated. Tasks differ in
their goal alone, drawn uniformly from where Meta-World's ML1 draws it. (ML1 also draws where the object lies. It is seen, so
it would tell training tasks apart without their goals; here it always lies at the environment's default place.)

Of Meta-World's 39 observed numbers a learner is shown those that can tell it something: the hand's position and the
gripper's opening, in Push also the puck's position and orientation, each now and one step before. Left out are the padding
and the goal's zeros, which never change, and in Reach the object, which plays no part: it only trembles where it lies.
"""

from __future__ import annotations

import pickle
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor
from tqdm import tqdm

from icrl.extras import require
from icrl.offline.environments.source import DataSource, check_grades, check_histories, half, on_cpu
from icrl.offline.trajectories import Trajectories
from icrl.offline.trajectory_shards import TaskByTask
from icrl_kernels.arguments import integer, integer_fields

OBJECT = (0.0, 0.6, 0.02)  # where it starts: Meta-World's own default
GOALS = {
    "reach": ((-0.1, 0.8, 0.05), (0.1, 0.9, 0.3)),
    "push": ((-0.1, 0.8, 0.01), (0.1, 0.9, 0.02)),
}  # lowest, highest
STARTS = {"reach": (0.0, 0.6, 0.2), "push": OBJECT}  # what must get to the goal, the hand or the puck
SHOWN = {name: [*range(n), *range(18, 18 + n)] for name, n in (("reach", 4), ("push", 11))}  # of the 39 numbers
MOST_STEPS = 500  # Meta-World refuses to go on after these


class MetaWorld(gymnasium.Env[np.ndarray, np.ndarray]):
    """One Reach or Push: `name`, its goal's position, its `horizon`. Actions in [-1, 1]⁴: the hand's move along x, y, z, and
    the gripper's effort. Nothing is random. Raises ValueError where Meta-World is not installed."""

    metadata = {"render_modes": []}  # noqa: RUF012 (Gymnasium's declaration)

    def __init__(self, name: str, goal: tuple[float, float, float], horizon: int = 100) -> None:
        if name not in GOALS:
            raise ValueError(f"name: wanted one of {', '.join(GOALS)}, got {name!r}")
        horizon = integer("horizon", horizon, 1, MOST_STEPS)
        metaworld = require("metaworld", name, "metaworld")
        policies = require("metaworld.policies", name, "metaworld")
        kind = metaworld.ALL_V3_ENVIRONMENTS[f"{name}-v3"]
        self._simulator = kind()
        facts = {"env_cls": kind, "rand_vec": np.array([*OBJECT, *goal]), "partially_observable": True}
        self._simulator.set_task(metaworld.Task(f"{name}-v3", pickle.dumps(facts)))
        self._policy = policies.ENV_POLICY_MAP[f"{name}-v3"]()
        self.horizon, self._shown = horizon, SHOWN[name]
        self.observation_space = spaces.Box(-np.inf, np.inf, (len(self._shown),), np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, (4,), np.float32)
        self._seen, self._elapsed = np.zeros(39), 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=None if seed is None else integer("seed", seed, 0))
        self._seen, _ = self._simulator.reset()
        self._elapsed = 0
        return self._seen[self._shown].astype(np.float32), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self._seen, reward, _, _, info = self._simulator.step(np.clip(np.asarray(action, np.float32), -1.0, 1.0))
        self._elapsed += 1
        truncated = self._elapsed >= self.horizon
        return self._seen[self._shown].astype(np.float32), float(reward), False, truncated, {"success": info["success"]}

    def scripted_action(self) -> np.ndarray:
        """[4] float32 of Meta-World's scripted policy, which sees the goal."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Constant")  # that its moves will be clipped: here, next line
            action = self._policy.get_action(np.concatenate([self._seen[:-3], self._simulator._target_pos]))
        return action[:4].clip(-1.0, 1.0).astype(np.float32)

    def close(self) -> None:
        self._simulator.close()


@dataclass(frozen=True)
class MetaWorldData(DataSource):
    """Which goals, and the behaviour that gathered the training data: the scripted policy with noise. Use `ReachData` or `PushData`."""

    simulators: ClassVar[tuple[str, ...]] = ("mujoco", "gymnasium", "metaworld")
    best_of: ClassVar[str] = "scripted"
    horizon: int = 100
    tasks: int = 50
    """A tenth of them, rounded down, to test with: 45 and 5."""
    split: str = "random"
    """"random", or "far": the test goals are those farthest from where the hand or the puck starts, farther than any in
    training."""
    episodes: int = 40
    """Of each training task, in histories of `history` episodes."""
    history: int = 20
    quality: str = "mixed"
    """Of a history: "mixed", the share of uniform actions falls from 1 to 0; "medium", .5 throughout; "expert", .05."""
    seed: int = 0

    def __post_init__(self) -> None:
        integer_fields(self)
        if not 1 <= self.horizon <= MOST_STEPS or self.tasks < 10:
            raise ValueError(
                f"horizon, tasks: wanted 1 to {MOST_STEPS}, and at least 10, got {self.horizon}, {self.tasks}"
            )
        check_grades(self.split, self.quality)
        check_histories(self.episodes, self.history)

    @on_cpu
    def goals(self) -> tuple[Tensor, Tensor]:
        """Training and test goals, [.,3] float64 each."""
        low, high = torch.tensor(GOALS[self.name], dtype=torch.float64, device="cpu")
        uniform = torch.rand(
            self.tasks, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(self.seed), device="cpu"
        )
        goals = low + (high - low) * uniform
        if self.split == "far":
            distance = (goals - torch.tensor(STARTS[self.name], dtype=torch.float64, device="cpu")).norm(dim=1)
            goals = goals[distance.argsort(stable=True)]
        train = self.tasks - self.tasks // 10
        return goals[:train], goals[train:]

    @on_cpu
    def train_data(self) -> Trajectories:
        gathered = self.task_by_task()
        return gathered.tasks_slice(0, gathered.num_tasks)

    def collect(self, teacher: Path) -> tuple[TaskByTask, dict[str, Any]]:
        """The data task by task, so that a kill costs one task's work; there is no teacher."""
        return self.task_by_task(), {}

    def task_by_task(self) -> TaskByTask:
        """The training data, to be gathered some tasks at a time; a task's is the same whichever others are."""
        states, tasks = len(SHOWN[self.name]), len(self.goals()[0])
        return TaskByTask(self._environment(), 0, states, 4, tasks, self._gather, self.history)

    def _environment(self) -> str:
        return f"MetaWorld-{self.name}"

    @on_cpu
    def _gather(self, first: int, count: int) -> Trajectories:
        tasks = range(first, first + count)
        bar = tqdm(tasks, desc=self.name, unit="task", delay=2.0, leave=False, disable=count == 1)
        parts = [self._gather_task(task) for task in bar]
        return Trajectories.concatenate(parts)

    def _gather_task(self, task: int) -> Trajectories:
        env = MetaWorld(self.name, tuple(self.goals()[0][task].tolist()), self.horizon)
        random = np.random.default_rng([self.seed, task])
        T, steps = self.episodes * self.horizon, self.history * self.horizon
        falling = 1.0 - (np.arange(T) % steps) / steps
        share = {"mixed": falling, "medium": np.full(T, 0.5), "expert": np.full(T, 0.05)}[self.quality]
        noisy, noise = random.random(T) < share, random.uniform(-1.0, 1.0, (T, 4)).astype(np.float32)
        S = len(SHOWN[self.name])
        states, next_states = np.empty((T, S), np.float32), np.empty((T, S), np.float32)
        actions, rewards = np.empty((T, 4), np.float32), np.empty(T, np.float32)
        following = np.empty(S, np.float32)
        for t in range(T):
            states[t] = env.reset()[0] if t % self.horizon == 0 else following
            actions[t] = noise[t] if noisy[t] else env.scripted_action()
            following, rewards[t], _, _, _ = env.step(actions[t])
            next_states[t] = following
        env.close()
        return Trajectories(
            self._environment(),
            0,
            torch.from_numpy(states),
            torch.from_numpy(actions),
            torch.from_numpy(rewards),
            torch.from_numpy(next_states),
            torch.zeros(T, dtype=torch.bool, device="cpu"),
            torch.arange(1, self.episodes + 1, device="cpu") * self.horizon,
            torch.zeros(self.episodes, dtype=torch.int64, device="cpu"),
            history=self.history,
        )

    @on_cpu
    def environments(self, which: str = "test") -> gymnasium.vector.VectorEnv:
        """One environment a goal of the "train" or "test" tasks, each with a simulator of its own (about 60 MB)."""
        goals = self.goals()[half(which)].tolist()
        makers = [lambda g=tuple(g): MetaWorld(self.name, g, self.horizon) for g in goals]
        return gymnasium.vector.SyncVectorEnv(makers, autoreset_mode=gymnasium.vector.AutoresetMode.SAME_STEP)

    @on_cpu
    def best_returns(self, which: str = "test") -> Tensor:
        """[N] what the scripted policy earns in each task without noise: near what can be had, no bound on it."""
        goals = self.goals()[half(which)].tolist()
        return torch.tensor(
            [scripted_return(self.name, tuple(g), self.horizon) for g in goals], dtype=torch.float32, device="cpu"
        )


@cache
def scripted_return(name: str, goal: tuple[float, float, float], horizon: int) -> float:
    """Of an episode of the scripted policy without noise."""
    env = MetaWorld(name, goal, horizon)
    env.reset()
    total = sum(env.step(env.scripted_action())[1] for _ in range(horizon))
    env.close()
    return total


@dataclass(frozen=True)
class ReachData(MetaWorldData):
    """The hand goes to the goal."""

    name: ClassVar[str] = "reach"


@dataclass(frozen=True)
class PushData(MetaWorldData):
    """The hand pushes a puck to the goal."""

    name: ClassVar[str] = "push"
