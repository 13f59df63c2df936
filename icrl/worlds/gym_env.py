"""Gymnasium environments over tabular tasks: `gym.make("icrl/AnyMDP-v0")` and a native vector environment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from icrl.worlds.samplers import Sizes, sample_anymdp
from icrl.worlds.tasks import TabularTasks
from icrl_kernels import RolloutState, rollout_start, rollout_step
from icrl_kernels.arguments import integer
from icrl_kernels.tabular import counter_rng


def _space(size: int, tokens: int) -> spaces.Discrete | spaces.MultiDiscrete:
    return spaces.Discrete(size) if tokens == 1 else spaces.MultiDiscrete([size] * tokens)


def _integers(name: str, given: Any) -> torch.Tensor:
    """Actions, an array, a tensor or a list of integers, as int64 on the CPU."""
    if isinstance(given, torch.Tensor):
        given = given.numpy(force=True)
    try:
        array = np.asarray(given)
    except (TypeError, ValueError) as error:  # of a list whose parts are of unlike lengths, say
        raise ValueError(f"{name}: wanted integers, got {given!r:.80}") from error
    if array.dtype.kind not in "iu" or array.dtype == np.uint64:
        raise ValueError(f"{name}: wanted integers, got {array.dtype}")
    return torch.from_numpy(array.astype(np.int64))


class TabularEnv(gymnasium.Env[Any, Any]):
    """One tabular task, an AnyMDP task unless another is given.

    Observations are observed ids (`state_mapping`), or a partially observed task's tokens, drawn anew at each visit;
    actions the task's own, all of several action tokens taken in turn in one step. Spaces are Discrete, MultiDiscrete
    for several tokens. It terminates on entering a terminal state, is truncated after the task's max_steps otherwise,
    and is reproducible by `reset(seed=...)`. The info holds the inner `state` and, after a step, `mean_reward`, the
    reward without its noise; where states lack actions also `action_mask`, as Gymnasium's Taxi has it: int8, 1 for each
    action that the new state has. A step by one that it lacks is a ValueError.

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
        self.observation_space, self.action_space = self._spaces(self.task)
        self._state: int | None = None
        self._last: tuple[int, float] | None = None

    @staticmethod
    def _spaces(task: TabularTasks) -> tuple[spaces.Space[Any], spaces.Space[Any]]:
        seen = _space(task.num_observations, task.observation_tokens)
        return seen, _space(int(task.num_actions[0]), task.action_tokens)

    def _set_task(self, task: TabularTasks | int) -> None:
        if not isinstance(task, TabularTasks):
            task = sample_anymdp(1, *self._sampled, seed=integer("task", task))
        if len(task) != 1:
            raise ValueError(f"task: wanted one task, got {len(task)}")
        self.task = task.validate().to("cpu")
        transition, reward = self.task.dense_tables()
        self._cumulative = transition[0].cumsum(-1, dtype=torch.float64).numpy()
        self._start = self.task.start[0].cumsum(-1, dtype=torch.float64).numpy()
        self._reward, self._ids = reward[0].numpy(), self.task.state_mapping[0].numpy()
        self._noise_state, self._noise_action = self.task.noise_state[0].numpy(), self.task.noise_action[0].numpy()
        emission = self.task.emission
        self._emission = None if emission is None else emission[0].cumsum(-1, dtype=torch.float64).numpy()
        self._tokens = self.task.action_tokens
        masked = self.task.action_mask is not None
        has = self.task.available_actions()[0, :, : int(self.task.num_actions[0])].numpy()
        self._has = has.astype(np.int8) if masked else None
        self._terminal, self._horizon = self.task.terminal[0].numpy(), int(self.task.max_steps[0])

    def _draw(self, cumulative: np.ndarray) -> int:
        u = self.np_random.random() * (1 - 2.0**-52)  # so that rounding cannot reach the total
        return int(cumulative.searchsorted(u * cumulative[-1], side="right"))

    def _emit(self, state: int) -> Any:
        assert self._emission is not None
        tokens = np.array([self._draw(rows[state]) for rows in self._emission])
        return tokens if len(tokens) > 1 else tokens[0]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=None if seed is None else integer("seed", seed, 0))
        if options and (unknown := set(options) - {"task"}):
            raise ValueError(f"options: wanted 'task' only, got {sorted(unknown)}")
        if options and "task" in options:
            self._set_task(options["task"])
            fresh = self._spaces(self.task)
            if fresh != (self.observation_space, self.action_space):
                raise ValueError(
                    f"task: has observed ids and actions {fresh[0]}, {fresh[1]}, but the spaces are "
                    f"{self.observation_space}, {self.action_space}"
                )
        self._state, self._steps, self._last = self._draw(self._start), 0, None
        self._seen = self._ids[self._state] if self._emission is None else self._emit(self._state)
        return self._seen, {"state": self._state, **self._mask(self._state)}

    def _mask(self, state: int) -> dict[str, Any]:
        return {} if self._has is None else {"action_mask": self._has[state].copy()}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        if self._state is None:
            raise RuntimeError("step: the episode has ended or not begun, call reset first")
        if self._tokens == 1:
            action = integer("action", action, 0, self._reward.shape[1] - 1)
            state, reward, mean = self._act(self._state, action)
            terminated = self._terminal.item(state)
        else:
            state, reward, mean, terminated = self._act_in_turn(self._state, action)
        self._steps += 1
        truncated = self._steps >= self._horizon and not terminated
        self._last = action, reward
        self._state = None if terminated or truncated else state
        self._shown = state
        self._seen = self._ids[state] if self._emission is None else self._emit(state)
        info = {"state": state, "mean_reward": mean, **self._mask(state)}
        return self._seen, reward, terminated, truncated, info

    def _act(self, state: int, action: int) -> tuple[int, float, float]:
        """The next state, the reward and its mean."""
        if self._has is not None and not self._has[state, action]:
            raise ValueError(f"action: state {state} does not have action {action}, see the info's action_mask")
        following = self._draw(self._cumulative[state, action])
        mean = self._reward.item(state, action, following)
        deviation = self._noise_state.item(following) + self._noise_action.item(state, action)
        return following, mean + deviation * self.np_random.standard_normal() if deviation else mean, mean

    def _act_in_turn(self, state: int, actions: Any) -> tuple[int, float, float, bool]:
        """The same after several actions, summed; and whether one of them ended the episode."""
        na = self._reward.shape[1]
        refusal = ValueError(f"action: wanted {self._tokens} of 0 to {na - 1}, got {actions!s:.80}")
        try:
            taken = _integers("action", actions).tolist()
        except ValueError as error:
            raise refusal from error
        if not isinstance(taken, list) or len(taken) != self._tokens or not all(a in range(na) for a in taken):
            raise refusal
        total, total_mean = 0.0, 0.0
        for a in taken:
            state, reward, mean = self._act(state, a)
            total, total_mean = total + reward, total_mean + mean
            if self._terminal[state]:
                return state, total, total_mean, True
        return state, total, total_mean, False

    def render(self) -> Any:
        if self.render_mode is None:
            return None
        state = self._shown if self._last else self._state
        if state is None:
            raise RuntimeError("render: call reset first")
        if self.render_mode == "ansi":
            end = " (terminal)" if self._terminal[state] else ""
            did = f"action {self._last[0]}, reward {self._last[1]:+.3f} -> " if self._last else ""
            return f"step {self._steps}: {did}state {state}, observed as {self._seen}{end}"
        from icrl.worlds.draw import draw_task, to_rgb

        return to_rgb(draw_task(self.task, current=state))


class TabularVectorEnv(VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """N environments, the i-th over the i-th of N tasks, stepped together by `icrl_kernels.rollout_step`.

    Each has its own stream: `reset(seed=k)` gives environment i the seed k + i, and its trajectory then depends on that
    seed and its actions alone. Rewards are float32. Observations are [N], or [N,K] for several observation tokens, and
    actions [N] or [N,D], as `TabularEnv` has them.

    Infos are as those of Gymnasium's own vector environments: the inner `state` [N] and its mask `_state`; where states lack
    actions, `action_mask` [N,A] and `_action_mask`; with SAME_STEP, where episodes ended, `final_obs` (None where none did)
    and `final_info`, with their masks.

    Args:
        tasks: a batch of tasks. autoreset_mode: NEXT_STEP (the step after an end resets, ignoring its action), SAME_STEP,
            or DISABLED, where `reset(options={"reset_mask": ...})` must follow an end.
    """

    def __init__(self, tasks: TabularTasks, autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP) -> None:
        mode = AutoresetMode(autoreset_mode)
        if not len(tasks):
            raise ValueError("tasks: wanted at least one task, got none")
        self.tasks = tasks.validate().to("cpu")
        self.num_envs = len(tasks)
        self.metadata = {"autoreset_mode": mode}
        self.single_observation_space = _space(tasks.num_observations, tasks.observation_tokens)
        self.single_action_space = _space(int(tasks.num_actions.max()), tasks.action_tokens)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        own = self.tasks.num_actions.numpy()
        D = tasks.action_tokens
        self.action_space = spaces.MultiDiscrete(own if D == 1 else np.repeat(own[:, None], D, 1))
        self._mode = mode
        self._tables = self.tasks.tables()
        self._has = None if tasks.action_mask is None else self.tasks.available_actions()
        self._keys: torch.Tensor | None = None
        self._state: RolloutState | None = None
        self._asleep = torch.zeros(self.num_envs, dtype=torch.bool, device="cpu")

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode everywhere, or where a mask says.

        Args:
            seed: an int, or an int or None for each environment; None goes on from the environment's last seed, or from
                fresh entropy where there was none.
            options: {"reset_mask": [N] bool, a numpy array}: the other environments go on, and their observations are
                the last ones.
        """
        if options and (unknown := set(options) - {"reset_mask"}):
            raise ValueError(f"options: wanted 'reset_mask' only, got {sorted(unknown)}")
        mask = self._reset_mask((options or {}).get("reset_mask"))
        if seed is None:
            seeds: list[int | None] = [None] * self.num_envs
        elif isinstance(seed, Sequence) or (isinstance(seed, (np.ndarray, torch.Tensor)) and seed.ndim):
            seeds = [None if s is None else integer("seed", s, 0) for s in seed]
        else:
            seeds = [integer("seed", seed, 0) + i for i in range(self.num_envs)]
        if len(seeds) != self.num_envs:
            raise ValueError(f"seed: wanted one for each of {self.num_envs} environments, got {len(seeds)}")
        if self._keys is None:
            fresh = np.random.SeedSequence().generate_state(self.num_envs, np.uint64)
            self._keys = torch.from_numpy(fresh.view(np.int64))
        following = counter_rng.mix(self._keys + counter_rng.GOLDEN)
        given = torch.tensor([s is not None for s in seeds], dtype=torch.bool, device="cpu")
        wrapped = [counter_rng.wrap(s or 0) for s in seeds]
        wanted = counter_rng.keys_of(0, torch.tensor(wrapped, dtype=torch.int64, device="cpu"))
        self._keys = torch.where(mask, torch.where(given, wanted, following), self._keys)
        fresh = rollout_start(self._tables, seed=self._keys, record=torch.zeros_like(self._keys))
        if self._state is None or mask.all():
            self._state = fresh
            self._seen = self._observe(fresh.state)
        else:
            for old, new in zip(self._state, fresh, strict=True):
                if len(old):  # a learner's tensors are empty
                    old[mask] = new[mask]
            again = mask.numpy()
            self._seen = self._seen.copy()
            self._seen[again] = self._observe(self._state.state)[again]
        self._asleep = self._asleep & ~mask
        return self._seen.copy(), self._info(fresh.state, mask)

    def _info(self, states: torch.Tensor, told: torch.Tensor | None = None) -> dict[str, Any]:
        """What is said of the environments in these states; of those that are `told`, zeros for the others."""
        told = torch.ones(self.num_envs, dtype=torch.bool, device="cpu") if told is None else told
        info = {"state": states.where(told, 0).numpy(), "_state": told.numpy().copy()}
        if self._has is not None:
            has = self._has[torch.arange(self.num_envs, dtype=torch.int64, device="cpu"), states]
            actions = has[:, : int(self.tasks.num_actions.max())] & told[:, None]
            info |= {"action_mask": actions.to(torch.int8).numpy(), "_action_mask": told.numpy().copy()}
        return info

    def _reset_mask(self, mask: Any) -> torch.Tensor:
        """Which environments to reset: all where it is None."""
        if mask is None:
            return torch.ones(self.num_envs, dtype=torch.bool, device="cpu")
        name = "options['reset_mask']"
        if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_:  # what Gymnasium raises
            given = mask.dtype if isinstance(mask, np.ndarray) else type(mask).__name__
            raise TypeError(f"{name}: wanted a numpy array of bool, got {given}")
        if mask.shape != (self.num_envs,) or not mask.any():
            given = list(mask.shape) if mask.shape != (self.num_envs,) else "none"
            raise ValueError(f"{name}: wanted shape [{self.num_envs}] and at least one True, got {given}")
        if self._state is None and not mask.all():
            raise RuntimeError("reset: wanted a reset of all environments before one of some")
        return torch.from_numpy(mask.copy())

    def _observe(self, states: torch.Tensor, ended: torch.Tensor | None = None) -> np.ndarray:
        """What is seen in them; those `ended` have a step's number of their own, ~t where its simulator's was t."""
        if self.tasks.emission is None:
            return self.tasks.observe(states).numpy()
        assert self._state is not None
        now, record = self._state.step, torch.zeros_like(self._state.step)
        step = now if ended is None else torch.where(ended, -now, now)
        tokens = self.tasks.emit(states, seed=self._state.seed, record=record, step=step)
        return (tokens if tokens.shape[1] > 1 else tokens[:, 0]).numpy()

    def step(self, actions: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        if self._state is None:
            raise RuntimeError("step: call reset first")
        actions = _integers("actions", actions)
        if actions.shape != self.action_space.shape:
            raise ValueError(f"actions: wanted shape {list(self.action_space.shape or ())}, got {list(actions.shape)}")
        actions = actions.view(self.num_envs, -1)
        if (bad := (actions < 0) | (actions >= self.tasks.num_actions[:, None])).any():
            i, d = bad.nonzero()[0].tolist()
            raise ValueError(
                f"actions: out of range, first in environment {i}: wanted 0 to {int(self.tasks.num_actions[i]) - 1}, "
                f"got {int(actions[i, d])}"
            )
        if self._mode == AutoresetMode.DISABLED and self._asleep.any():
            over = self._asleep.nonzero()[:, 0].tolist()
            raise RuntimeError(
                f"step: the episodes of environments {over[:8]}{' and others' * (len(over) > 8)} have ended, reset them "
                "first, by options={'reset_mask': ...}"
            )
        if self._has is not None:
            each = torch.arange(self.num_envs, dtype=torch.int64, device="cpu")
            lacks = ~self._has[each, self._state.state, actions[:, 0]] & ~self._asleep
            if lacks.any():
                i = int(lacks.nonzero()[0])
                raise ValueError(
                    f"actions: state {int(self._state.state[i])} of environment {i} does not have action "
                    f"{int(actions[i, 0])}, see the info's action_mask"
                )
        # the next episode of those asleep has begun already, within the step that ended the last one: it waits
        reward, done, moved = self._act(actions[:, 0], self._asleep)
        if actions.shape[1] > 1:
            total = reward.double()
            for column in actions[:, 1:].unbind(1):
                waits = self._asleep | (done > 0)
                earned, over, following = self._act(column, waits)
                total += earned
                done, moved = done | over, torch.where(waits, moved, following)
            reward = total.float()
        ended = done > 0
        info: dict[str, Any] = {}
        if self._mode == AutoresetMode.SAME_STEP:
            shown = self._state.state.clone()
            self._seen = self._observe(shown)
            if ended.any():
                last, over = self._observe(moved, ended), ended.numpy()
                final = np.full(self.num_envs, None, dtype=object)
                for i in over.nonzero()[0]:
                    final[i] = last[i]
                told = self._info(moved, ended)
                info = {"final_obs": final, "_final_obs": over, "final_info": told, "_final_info": over.copy()}
        else:
            shown, self._seen = moved, self._observe(moved, ended)
            self._asleep = ended
        info |= self._info(shown)
        return self._seen.copy(), reward.numpy(), (done == 1).numpy(), (done == 2).numpy(), info

    def _act(self, actions: torch.Tensor, waits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Reward, done and state of one action each; where it `waits`, 0, 0 and the state that it is in."""
        state, some_wait = self._state, bool(waits.any())
        assert state is not None
        if some_wait and self._has is not None:  # what they do is undone, and must be an action that they have
            each = torch.arange(self.num_envs, dtype=torch.int64, device="cpu")
            actions = torch.where(waits, self._has[each, state.state].to(torch.int8).argmax(-1), actions)
        kept = [(t, t[waits]) for t in (state.step, state.state, state.elapsed)] if some_wait else []
        reward, done, moved = rollout_step(self._tables, state, actions.contiguous())
        moved = moved.long()
        for tensor, values in kept:
            tensor[waits] = values
        if some_wait:
            done, reward = done.masked_fill(waits, 0), reward.masked_fill(waits, 0)
            moved = torch.where(waits, state.state, moved)
        return reward, done, moved


def make_anymdp_vec(
    num_envs: int,
    task: TabularTasks | int = 0,
    num_states: Sizes = 16,
    num_actions: int = 5,
    autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
) -> TabularVectorEnv:
    """What `gym.make_vec("icrl/AnyMDP-v0", num_envs)` makes: tasks of the seed `task`, or the batch given."""
    num_envs = integer("num_envs", num_envs, 1)
    if not isinstance(task, TabularTasks):
        task = sample_anymdp(num_envs, num_states, num_actions, seed=integer("task", task))
    if len(task) != num_envs:
        raise ValueError(f"task: wanted {num_envs} tasks, got {len(task)}")
    return TabularVectorEnv(task, autoreset_mode)
