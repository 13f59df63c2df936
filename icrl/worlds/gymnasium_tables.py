"""Real Gymnasium tasks with tables: FrozenLake and CliffWalking, rewards shaped as in the seeds' evaluation.

The model acts in the environment itself; the tabular baselines and the references act in the table the environment
publishes (`env.unwrapped.P`), which is exactly its dynamics. The shaping is one function, used on both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from icrl.worlds.tasks import TabularTasks


def _frozen_lake(reward: Tensor, end: Tensor) -> Tensor:
    """A hole costs 1."""
    return torch.where(end & (reward == 0), -1.0, reward)


def _cliff_walking(reward: Tensor, end: Tensor) -> Tensor:
    """The goal pays 1, a fall costs 1 (and leads back to the start), any other step .03."""
    return torch.where(reward < -50, -1.0, torch.full_like(reward, -0.03)).masked_fill(end, 1.0)


@dataclass(frozen=True)
class ClassicTask:
    env_id: str
    shape: Callable[[Tensor, Tensor], Tensor]
    max_steps: int
    options: dict[str, Any] = field(default_factory=dict)

    def make(self) -> gym.Env:
        return gym.make(self.env_id, max_episode_steps=self.max_steps, **self.options)

    def make_vec(self, num_envs: int) -> gym.vector.VectorEnv:
        """`num_envs` environments; an episode's last step returns the next one's first observation."""
        return gym.vector.SyncVectorEnv([self.make] * num_envs, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)

    def shaped(self, reward: np.ndarray, terminated: np.ndarray) -> Tensor:
        given = torch.as_tensor(reward, dtype=torch.float32, device="cpu")
        return self.shape(given, torch.as_tensor(terminated, dtype=torch.bool, device="cpu"))

    def table(self) -> TabularTasks:
        """The environment as one tabular task, its reward shaped."""
        env = self.make()
        tasks = TabularTasks.from_gymnasium(env)
        env.close()
        transition, reward = tasks.dense_tables()
        end = tasks.terminal[:, None, None, :].expand_as(reward)
        return replace(tasks, reward=torch.where(transition > 0, self.shape(reward, end), 0.0))


CLASSIC = {
    "FrozenLake 4x4": ClassicTask("FrozenLake-v1", _frozen_lake, 100, {"map_name": "4x4", "is_slippery": False}),
    "FrozenLake 4x4 slippery": ClassicTask(
        "FrozenLake-v1", _frozen_lake, 100, {"map_name": "4x4", "is_slippery": True}
    ),
    "CliffWalking": ClassicTask("CliffWalking-v1", _cliff_walking, 200),
}


CLIFF = 37
"""A cell of the cliff: where a fall ends in `cliff_walking`."""


def cliff_walking() -> TabularTasks:
    """CliffWalking as one tabular task by OmniRL's rule (arXiv 2502.02869): the goal pays 1 and a fall costs 1, each ends the
    episode, and any other step costs .03. Gymnasium's own leads back to the start after a fall."""
    task = CLASSIC["CliffWalking"].table()
    transition, reward = (table.clone() for table in task.dense_tables())
    falls = (transition > 0) & (reward == -1)
    fallen = (transition * falls).sum(-1)
    transition = transition.masked_fill(falls, 0.0)
    transition[..., CLIFF] += fallen
    reward = reward.masked_fill(falls, 0.0)
    reward[..., CLIFF] -= fallen
    terminal = task.terminal.clone()
    terminal[:, CLIFF] = True
    for table in (transition, reward):
        table[:, CLIFF] = 0
    return replace(task, transition=transition, reward=reward, terminal=terminal)
