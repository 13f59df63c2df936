"""Cheetah-Vel, Ant-Dir and Walker-Param: the continuous tasks of meta-reinforcement learning, on Gymnasium's MuJoCo robots.

A task's parameters are never in the observation. Episodes last `horizon` steps, whatever happens to the robot, and are then
truncated; actions are clipped to [-1, 1]. Robots are Gymnasium's v5 ones. They need the extra `mujoco`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from icrl.extras import require
from icrl.offline.environments.source import DataSource, check_grades, half, on_cpu
from icrl.offline.trajectories import Trajectories
from icrl_kernels.arguments import integer, integer_fields


class MujocoTask(gymnasium.Env[np.ndarray, np.ndarray]):
    """A robot of Gymnasium's with a task's reward or body. `simulator` is the robot's environment, which never ends.

    Args:
        task: [D] its parameters. horizon: steps of an episode. render_mode: of the robot's environment.
    """

    metadata = {"render_modes": ["human", "rgb_array", "depth_array", "rgbd_tuple"]}  # noqa: RUF012 (Gymnasium's)
    name: ClassVar[str]
    num_parameters: ClassVar[int]

    def __init__(self, task: Any, horizon: int = 200, render_mode: str | None = None) -> None:
        self.task = np.asarray(task, np.float64).reshape(-1)
        if self.task.shape != (self.num_parameters,) or not np.isfinite(self.task).all():
            raise ValueError(f"task: wanted {self.num_parameters} finite numbers, got {task}")
        horizon = integer("horizon", horizon, 1)
        require("mujoco", self.name, "mujoco")
        self.horizon, self.render_mode = horizon, render_mode
        self.simulator: Any = self._robot(render_mode)
        size = self.simulator.observation_space.shape
        self.observation_space = spaces.Box(-np.inf, np.inf, size, np.float32)
        self.action_space = self.simulator.action_space
        self._elapsed = horizon

    def _robot(self, render_mode: str | None) -> Any:
        raise NotImplementedError

    def _reward(self, action: np.ndarray, info: dict[str, Any]) -> float:
        """Of a clipped action, after which the robot's environment said `info`."""
        raise NotImplementedError

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        seed = None if seed is None else integer("seed", seed, 0)
        super().reset(seed=seed)
        observation, _ = self.simulator.reset(seed=seed)
        self._elapsed = 0
        return observation.astype(np.float32), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        if self._elapsed >= self.horizon:
            raise RuntimeError("step: the episode has ended or not begun, call reset first")
        clipped = np.clip(np.asarray(action, np.float64), -1.0, 1.0)
        if not np.isfinite(clipped).all():
            raise ValueError(f"action: wanted finite numbers, got {action}")
        observation, _, _, _, info = self.simulator.step(clipped)
        self._elapsed += 1
        reward = float(self._reward(clipped, info))
        return observation.astype(np.float32), reward, False, self._elapsed >= self.horizon, {}

    def render(self) -> Any:
        return self.simulator.render()

    def close(self) -> None:
        self.simulator.close()


class CheetahVel(MujocoTask):
    """HalfCheetah at a wanted velocity v*: reward −|v − v*| − .05·|a|² (Finn et al. 2017, arXiv 1703.03400)."""

    name, num_parameters = "cheetah-vel", 1

    def __init__(self, task: Any = 1.5, horizon: int = 200, render_mode: str | None = None) -> None:
        super().__init__(task, horizon, render_mode)

    def _robot(self, render_mode: str | None) -> Any:
        from gymnasium.envs.mujoco.half_cheetah_v5 import HalfCheetahEnv

        return HalfCheetahEnv(render_mode=render_mode)

    def _reward(self, action: np.ndarray, info: dict[str, Any]) -> float:
        return -abs(info["x_velocity"] - self.task[0]) - 0.05 * np.square(action).sum()


class AntDir(MujocoTask):
    """Ant in a wanted direction θ: reward v·(cos θ, sin θ) − .5·|a|² − .0005·|f|² + 1, f the contact forces clipped to
    [-1, 1]. The 1 is paid in every step, fallen or not (the terms of Rothfuss et al. 2018, arXiv 1810.06784)."""

    name, num_parameters = "ant-dir", 1

    def __init__(self, task: Any = 0.0, horizon: int = 200, render_mode: str | None = None) -> None:
        super().__init__(task, horizon, render_mode)

    def _robot(self, render_mode: str | None) -> Any:
        from gymnasium.envs.mujoco.ant_v5 import AntEnv

        return AntEnv(include_cfrc_ext_in_observation=False, terminate_when_unhealthy=False, render_mode=render_mode)

    def _reward(self, action: np.ndarray, info: dict[str, Any]) -> float:
        along = info["x_velocity"] * math.cos(self.task[0]) + info["y_velocity"] * math.sin(self.task[0])
        return along - 0.5 * np.square(action).sum() + info["reward_contact"] + 1.0


# Of Walker2d's task, by MuJoCo's name: the rows (and columns) that matter, and the base that an exponent raises. The world
# has no mass, the root's three joints no damping; contacts of this model slide, so that only the first friction counts.
WALKER_PARAMETERS: dict[str, tuple[Any, tuple[int, ...], float]] = {
    "body_mass": (np.s_[1:], (7,), 1.5),
    "body_inertia": (np.s_[1:], (7, 3), 1.5),
    "dof_damping": (np.s_[3:], (6,), 1.3),
    "geom_friction": (np.s_[:, 0], (8,), 1.5),
}


class WalkerParam(MujocoTask):
    """Walker2d with another body: each mass, inertia and friction times 1.5^u, each joint's damping times 1.3^u, u the task
    [42] (rand_param_envs; Rakelly et al. 2019, arXiv 1903.08254). Reward v − .001·|a|² + 1 while upright: the published one
    ends an episode where the walker falls, here it earns the 1 no more."""

    name, num_parameters = "walker-param", 42

    def __init__(self, task: Any = (0.0,) * 42, horizon: int = 200, render_mode: str | None = None) -> None:
        super().__init__(task, horizon, render_mode)

    def _robot(self, render_mode: str | None) -> Any:
        from gymnasium.envs.mujoco.walker2d_v5 import Walker2dEnv

        robot = Walker2dEnv(terminate_when_unhealthy=False, render_mode=render_mode)
        first = 0
        for name, (rows, shape, base) in WALKER_PARAMETERS.items():
            size = math.prod(shape)
            getattr(robot.model, name)[rows] *= base ** self.task[first : first + size].reshape(shape)
            first += size
        mujoco = require("mujoco", self.name, "mujoco")
        mujoco.mj_setConst(robot.model, robot.data)  # what the simulator derives from masses and inertias
        return robot

    def _reward(self, action: np.ndarray, info: dict[str, Any]) -> float:
        return info["x_velocity"] + info["reward_survive"] - 1e-3 * np.square(action).sum()


@dataclass(frozen=True)
class MujocoData(DataSource):
    """Tasks of one environment, and a teacher that gathers data in them: see `icrl.offline.environments.teacher`.

    Every tenth of `tasks` is a test task, or with `split: "far"` the last tenth, outside of what is trained in.
    """

    horizon: int = 200
    tasks: int = 50
    """45 of 50 to train with, as published."""
    split: str = "random"
    episodes: int = 20
    """Of each training task."""
    quality: str = "mixed"
    """"mixed", by all of the teacher's checkpoints, in the order of its training, each as many episodes; "medium", by the
    middle one; "expert", by the last."""
    checkpoints: int = 10
    """Of the teacher, evenly along its training, the untrained one first."""
    teacher_steps: int = 720_000
    """In all training tasks together; rounded up to whole episodes of them all."""
    seed: int = 0

    environment: ClassVar[type[MujocoTask]]
    simulators: ClassVar[tuple[str, ...]] = ("mujoco", "gymnasium")
    tools: ClassVar[tuple[str, ...]] = ("stable-baselines3",)
    has_teacher: ClassVar[bool] = True
    best_of: ClassVar[str] = "teacher"

    def __post_init__(self) -> None:
        integer_fields(self)
        if self.horizon < 2 or self.tasks < 10:
            raise ValueError(f"horizon, tasks: wanted at least 2 and at least 10, got {self.horizon}, {self.tasks}")
        check_grades(self.split, self.quality)
        if self.checkpoints < 2 or self.iterations < self.checkpoints - 1:
            raise ValueError(
                f"checkpoints, teacher_steps: wanted at least 2 checkpoints, and more than "
                f"{(self.checkpoints - 2) * int((~self._test()).sum()) * self.horizon} steps (an episode of each training task "
                f"from one to the next), got {self.checkpoints}, {self.teacher_steps}"
            )
        each = self.checkpoints if self.quality == "mixed" else 1
        if self.episodes < 1 or self.episodes % each:
            raise ValueError(f"episodes: wanted a multiple of {each}, got {self.episodes}")

    @property
    def iterations(self) -> int:
        """Of the teacher's training: an episode of every training task each."""
        return -(-self.teacher_steps // (int((~self._test()).sum()) * self.horizon))

    @on_cpu
    def _test(self) -> Tensor:
        """[tasks] which are test tasks."""
        index = torch.arange(self.tasks, device="cpu")
        return index >= self.tasks - self.tasks // 10 if self.split == "far" else index % 10 == 5

    def _parameters(self) -> Tensor:
        """[tasks,D] of all tasks, in an order that ends with the far ones."""
        raise NotImplementedError

    @on_cpu
    def goals(self) -> tuple[Tensor, Tensor]:
        """Parameters of training and test tasks, [.,D] each."""
        parameters, test = self._parameters(), self._test()
        return parameters[~test], parameters[test]

    @on_cpu
    def make(self, which: str) -> list[MujocoTask]:
        """One environment a task, "train" or "test"."""
        return [self.environment(task, self.horizon) for task in self.goals()[half(which)].numpy()]

    @on_cpu
    def environments(self, which: str = "test") -> gymnasium.vector.VectorEnv:
        """One environment a task of the "train" or "test" tasks."""
        makers = [lambda t=t: self.environment(t, self.horizon) for t in self.goals()[half(which)].numpy()]
        return gymnasium.vector.SyncVectorEnv(makers, autoreset_mode=gymnasium.vector.AutoresetMode.SAME_STEP)

    def best_returns(self, which: str = "test") -> None:
        """None: they are not known. What the teacher reached is kept with the data that it gathered."""
        half(which)

    def train_data(self) -> Trajectories:
        """Raises ValueError: a teacher comes first, and it is trained by a command of its own."""
        name = self.environment.name
        raise ValueError(
            f"records: {name} has its data from a teacher, which is trained first: icrl collect data/{name} --environment "
            f'{name}; then "records": "data/{name}" in the configuration'
        )

    @on_cpu
    def collect(self, teacher: Path) -> tuple[Trajectories, dict[str, Any]]:
        """Train the teacher in its folder, or go on there, and let it gather the data; these, and facts on the teacher."""
        from icrl.offline.environments.teacher import gather

        return gather(self, teacher)


@dataclass(frozen=True)
class CheetahVelData(MujocoData):
    """Velocities 3·i/tasks, i = 1..tasks: up to the published 3; far are the fastest."""

    name: ClassVar[str] = CheetahVel.name
    environment = CheetahVel

    def _parameters(self) -> Tensor:
        return 3.0 * torch.arange(1, self.tasks + 1, dtype=torch.float64, device="cpu")[:, None] / self.tasks


@dataclass(frozen=True)
class AntDirData(MujocoData):
    """Directions 2π·i/tasks, i = 0..tasks-1; far is the last tenth of the circle."""

    name: ClassVar[str] = AntDir.name
    episodes: int = 10
    teacher_steps: int = 180_000
    environment = AntDir

    def _parameters(self) -> Tensor:
        return 2 * math.pi * torch.arange(self.tasks, dtype=torch.float64, device="cpu")[:, None] / self.tasks


@dataclass(frozen=True)
class WalkerParamData(MujocoData):
    """Exponents uniform in [-3, 3]; of far tasks, in [-4, -3] and [3, 4]."""

    name: ClassVar[str] = WalkerParam.name
    episodes: int = 10
    teacher_steps: int = 180_000
    environment = WalkerParam

    def _parameters(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        shape = (self.tasks, WalkerParam.num_parameters)
        u = 6 * torch.rand(shape, generator=generator, dtype=torch.float64, device="cpu") - 3
        if self.split == "far":
            beyond = u.sign() * (3 + u.abs() / 3)
            u = torch.where(self._test()[:, None], beyond, u)
        return u
