"""Gymnasium environments over tabular tasks: `gym.make("icrl/AnyMDP-v0")` and a native vector environment."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from icrl.worlds import counter
from icrl.worlds.samplers import Sizes, sample_anymdp
from icrl.worlds.tables import TabularTasks
from icrl_kernels import RolloutState, rollout_start, rollout_step


class TabularEnv(gymnasium.Env[np.int64, np.int64]):
    """One tabular task, an AnyMDP task unless another is given.

    Observations are observed ids (`state_mapping`), actions the task's own. It terminates on entering a terminal state,
    is truncated after the task's max_steps otherwise, and is reproducible by `reset(seed=...)`. The info holds the inner `state`
    and, after a step, `mean_reward`, the reward without its noise.

    Args:
        task: a TabularTasks of one task, or the seed of an AnyMDP task with num_states states and num_actions actions.
            `reset(options={"task": ...})` changes it, as long as the spaces stay the same.
        render_mode: "ansi" (a line of text), "rgb_array" (the task's graph, `icrl.worlds.draw`) or None.
    """

    metadata = {"render_modes": ["ansi", "rgb_array"], "render_fps": 4}  # noqa: RUF012 (Gymnasium's declaration)

    def __init__(
        self,
        task: TabularTasks | int = 0,
        num_states: int = 16,
        num_actions: int = 5,
        render_mode: str | None = None,
    ) -> None:
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f"render_mode: wanted 'ansi', 'rgb_array' or None, got {render_mode!r}")
        self.render_mode = render_mode
        self._sampled = num_states, num_actions
        self._set_task(task)
        self._sizes = self.task.num_observations, int(self.task.num_actions[0])
        self.observation_space, self.action_space = (spaces.Discrete(k) for k in self._sizes)
        self._state: int | None = None
        self._last: tuple[int, float] | None = None

    def _set_task(self, task: TabularTasks | int) -> None:
        if not isinstance(task, TabularTasks):
            task = sample_anymdp(1, *self._sampled, seed=int(task))
        if len(task) != 1:
            raise ValueError(f"task: wanted one task, got {len(task)}")
        self.task = task.validate().to("cpu")
        transition, reward = self.task.dense_tables()
        self._cumulative = transition[0].cumsum(-1, dtype=torch.float64).numpy()
        self._start = self.task.start[0].cumsum(-1, dtype=torch.float64).numpy()
        self._reward, self._ids = reward[0].numpy(), self.task.state_mapping[0].numpy()
        self._noise_state, self._noise_action = self.task.noise_state[0].numpy(), self.task.noise_action[0].numpy()
        self._terminal, self._horizon = self.task.terminal[0].numpy(), int(self.task.max_steps[0])

    def _draw(self, cumulative: np.ndarray) -> int:
        u = self.np_random.random() * (1 - 2.0**-52)  # so that rounding cannot reach the total
        return int(cumulative.searchsorted(u * cumulative[-1], side="right"))

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.int64, dict[str, Any]]:
        super().reset(seed=seed)
        if options and (unknown := set(options) - {"task"}):
            raise ValueError(f"options: wanted 'task' only, got {sorted(unknown)}")
        if options and "task" in options:
            self._set_task(options["task"])
            sizes = self.task.num_observations, int(self.task.num_actions[0])
            if sizes != self._sizes:
                raise ValueError(f"task: has (observed ids, actions) {sizes}, but the spaces are of {self._sizes}")
        self._state, self._steps, self._last = self._draw(self._start), 0, None
        return self._ids[self._state], {"state": self._state}

    def step(self, action: Any) -> tuple[np.int64, float, bool, bool, dict[str, Any]]:
        if self._state is None:
            raise RuntimeError("step: the episode has ended or not begun, call reset first")
        if not 0 <= action < self._sizes[1]:
            raise ValueError(f"action: wanted 0 to {self._sizes[1] - 1}, got {action}")
        s, a = self._state, int(action)
        following = self._draw(self._cumulative[s, a])
        mean = float(self._reward[s, a, following])
        deviation = float(self._noise_state[following] + self._noise_action[s, a])
        reward = mean + deviation * self.np_random.standard_normal() if deviation else mean
        self._steps += 1
        terminated = bool(self._terminal[following])
        truncated = self._steps >= self._horizon and not terminated
        self._last = a, reward
        self._state = None if terminated or truncated else following
        self._shown = following
        return self._ids[following], reward, terminated, truncated, {"state": following, "mean_reward": mean}

    def render(self) -> Any:
        if self.render_mode is None:
            return None
        state = self._shown if self._last else self._state
        if state is None:
            raise RuntimeError("render: call reset first")
        if self.render_mode == "ansi":
            end = " (terminal)" if self._terminal[state] else ""
            did = f"action {self._last[0]}, reward {self._last[1]:+.3f} -> " if self._last else ""
            return f"step {self._steps}: {did}state {state}, observed as {self._ids[state]}{end}"
        from icrl.worlds.draw import draw_task, to_rgb

        return to_rgb(draw_task(self.task, current=state))


class TabularVectorEnv(VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """N environments, the i-th over the i-th of N tasks, stepped together by `icrl_kernels.rollout_step`.

    Each has its own stream: `reset(seed=k)` gives environment i the seed k + i, and its trajectory then depends on that
    seed and its actions alone. Rewards are float32. Infos hold the inner `state` [N]; with SAME_STEP, where episodes
    ended, `final_obs` [N] and `_final_obs` (the mask), as Gymnasium has it.

    Args:
        tasks: a batch of tasks. autoreset_mode: NEXT_STEP (the step after an end resets, ignoring its action) or
            SAME_STEP.
    """

    def __init__(self, tasks: TabularTasks, autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP) -> None:
        mode = AutoresetMode(autoreset_mode)
        if mode == AutoresetMode.DISABLED:
            raise ValueError("autoreset_mode: wanted NEXT_STEP or SAME_STEP, got DISABLED")
        if not len(tasks):
            raise ValueError("tasks: wanted at least one task, got none")
        self.tasks = tasks.validate().to("cpu")
        self.num_envs = len(tasks)
        self.metadata = {"autoreset_mode": mode}
        self.single_observation_space = spaces.Discrete(tasks.num_observations)
        self.single_action_space = spaces.Discrete(int(tasks.num_actions.max()))
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = spaces.MultiDiscrete(self.tasks.num_actions.numpy())
        self._same_step = mode == AutoresetMode.SAME_STEP
        self._tables = self.tasks.tables()
        self._keys: torch.Tensor | None = None
        self._state: RolloutState | None = None
        self._asleep = torch.zeros(self.num_envs, dtype=torch.bool)

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode everywhere.

        Args:
            seed: an int, or an int or None for each environment; None goes on from the environment's last seed, or from
                fresh entropy where there was none.
        """
        if options:
            raise ValueError(f"options: wanted none, got {sorted(options)}")
        if seed is None:
            seeds: list[int | None] = [None] * self.num_envs
        elif isinstance(seed, (int, np.integer)):
            seeds = [int(seed) + i for i in range(self.num_envs)]
        else:
            seeds = list(seed)
        if len(seeds) != self.num_envs:
            raise ValueError(f"seed: wanted one for each of {self.num_envs} environments, got {len(seeds)}")
        if self._keys is None:
            fresh = np.random.SeedSequence().generate_state(self.num_envs, np.uint64)
            self._keys = torch.from_numpy(fresh.view(np.int64))
        following = counter.mix(self._keys + counter.GOLDEN)
        given = torch.tensor([s is not None for s in seeds])
        wanted = counter.keys_of(0, torch.tensor([counter.wrap(s or 0) for s in seeds]))
        self._keys = torch.where(given, wanted, following)
        self._state = rollout_start(self._tables, seed=self._keys, record=torch.zeros_like(self._keys))
        self._asleep.zero_()
        return self._observe(self._state.state), {"state": self._state.state.numpy().copy()}

    def _observe(self, states: torch.Tensor) -> np.ndarray:
        return self.tasks.observe(states).numpy()

    def step(self, actions: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        if self._state is None:
            raise RuntimeError("step: call reset first")
        actions = torch.as_tensor(actions).long()
        if actions.shape != (self.num_envs,):
            raise ValueError(f"actions: wanted shape [{self.num_envs}], got {list(actions.shape)}")
        if ((actions < 0) | (actions >= self.tasks.num_actions)).any():
            raise ValueError(f"actions: out of range, first in environment {self._bad(actions)}")
        asleep, any_asleep = self._asleep, bool(self._asleep.any())
        if any_asleep:  # their episode has begun already, within the step that ended the last one: it waits
            waiting = [(t, t[asleep]) for t in (self._state.step, self._state.state, self._state.elapsed)]
        reward, done, moved = rollout_step(self._tables, self._state, actions)
        moved = moved.long()
        if any_asleep:
            for tensor, kept in waiting:
                tensor[asleep] = kept
            done, reward = done.masked_fill(asleep, 0), reward.masked_fill(asleep, 0)
            moved = torch.where(asleep, self._state.state, moved)
        ended = done > 0
        info: dict[str, Any] = {}
        shown = moved
        if self._same_step:
            shown = self._state.state.clone()
            if ended.any():
                info = {"final_obs": self._observe(moved), "_final_obs": ended.numpy()}
        else:
            self._asleep = ended
        info["state"] = shown.numpy()
        return self._observe(shown), reward.numpy(), (done == 1).numpy(), (done == 2).numpy(), info

    def _bad(self, actions: torch.Tensor) -> str:
        i = int(((actions < 0) | (actions >= self.tasks.num_actions)).nonzero()[0, 0])
        return f"{i}: wanted 0 to {int(self.tasks.num_actions[i]) - 1}, got {int(actions[i])}"


def make_anymdp_vec(
    num_envs: int,
    task: TabularTasks | int = 0,
    num_states: Sizes = 16,
    num_actions: int = 5,
    autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
) -> TabularVectorEnv:
    """What `gym.make_vec("icrl/AnyMDP-v0", num_envs)` makes: tasks of the seed `task`, or the batch given."""
    if not isinstance(task, TabularTasks):
        task = sample_anymdp(num_envs, num_states, num_actions, seed=int(task))
    if len(task) != num_envs:
        raise ValueError(f"task: wanted {num_envs} tasks, got {len(task)}")
    return TabularVectorEnv(task, autoreset_mode)
