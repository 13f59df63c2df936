"""PPO (Stable-Baselines3), trained in each task from nothing: the evaluation's gradient-based learner. Needs the extra "rl"."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gymnasium
import numpy as np
import torch
from tqdm import tqdm

from icrl.extras import require
from icrl.omnirl.evaluate import Context
from icrl.training.process import seeded
from icrl.worlds.vector_world import VectorWorld

ENVIRONMENTS = 8
"""Of a task, side by side; a learner's steps are theirs together."""
SETTINGS: dict[str, Any] = {"n_steps": 64, "batch_size": 64}
"""Over Stable-Baselines3's defaults, which are for one environment of 2048 steps between updates."""


def needed() -> Any:
    """Stable-Baselines3; ValueError where it is not installed."""
    return require("stable_baselines3", "PPO", "rl")


def train_ppo(make: Callable[[int], VectorWorld], tasks: int, steps: int, seed: int, progress: str | None) -> Context:
    """A policy trained for `steps` steps in each of `tasks` tasks, on the CPU.

    Args:
        make: task -> an environment of `ENVIRONMENTS` contexts, all of that task.
    Returns:
        what happened in training, of environment e of task i in row i·ENVIRONMENTS + e: `[tasks·ENVIRONMENTS,
        steps // ENVIRONMENTS]`.
    """
    sb3, shape = needed(), (tasks * ENVIRONMENTS, steps // ENVIRONMENTS)
    rewards = torch.zeros(shape, dtype=torch.float32, device="cpu")
    dones = torch.zeros(shape, dtype=torch.uint8, device="cpu")
    with tqdm(total=tasks * steps, desc=progress, unit="step", disable=progress is None) as bar:
        for task in range(tasks):
            rows = slice(task * ENVIRONMENTS, (task + 1) * ENVIRONMENTS)
            envs = _environments(make(task), rewards[rows], dones[rows], bar)
            with seeded(seed * tasks + task):
                sb3.PPO("MlpPolicy", envs, device="cpu", **SETTINGS).learn(steps)
    return Context(rewards, dones)


def _environments(world: VectorWorld, rewards: torch.Tensor, dones: torch.Tensor, bar: Any) -> Any:
    """The world as Stable-Baselines3 steps it; what it brings goes to `rewards` and `dones`, as far as they reach."""
    base = require("stable_baselines3.common.vec_env", "PPO", "rl").VecEnv

    class Environments(base):
        def __init__(self) -> None:
            seen = gymnasium.spaces.Discrete(world.num_observations)
            super().__init__(world.num_contexts, seen, gymnasium.spaces.Discrete(world.num_actions))
            self.at = 0

        def reset(self) -> np.ndarray:
            return world.observation.numpy().copy()

        def step_async(self, actions: np.ndarray) -> None:
            self.actions = torch.as_tensor(actions, dtype=torch.int64, device="cpu")

        def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
            step = world.step(self.actions)
            if self.at < rewards.shape[1]:
                rewards[:, self.at], dones[:, self.at] = step.reward, step.done
                self.at += 1
                bar.update(world.num_contexts)
            infos = [
                {"TimeLimit.truncated": done == 2, "terminal_observation": last} if done else {}
                for done, last in zip(step.done.tolist(), step.following.numpy(), strict=True)
            ]
            return self.reset(), step.reward.numpy().copy(), (step.done > 0).numpy(), infos

        def close(self) -> None:
            """There is nothing to close."""

        def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
            return [getattr(self, attr_name, None)] * world.num_contexts

        def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
            raise NotImplementedError("these environments have no attributes of their own")

        def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
            raise NotImplementedError("these environments have no methods of their own")

        def env_is_wrapped(self, wrapper_class: type, indices: Any = None) -> Sequence[bool]:
            return [False] * world.num_contexts

    return Environments()
