"""Environments that are stepped together and may have no table: what an agent, a tabular learner and PPO act in."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from icrl.worlds.tasks import TabularTasks
from icrl_kernels import rollout_start, rollout_step
from icrl_kernels.arguments import dense


class Step(NamedTuple):
    """What a step brought, `[N]` each."""

    reward: Tensor  # float32
    done: Tensor  # uint8: 0 no, 1 terminated, 2 truncated
    following: Tensor  # int64, the observation that the step led to, before any reset


class VectorWorld(Protocol):
    """N contexts of an environment with discrete observations and actions, stepped together.

    Where an episode ends, the next one has begun when `step` returns. Where `agents` act together, contexts i·agents to
    (i + 1)·agents - 1 are one team, whose episodes begin and end together.
    """

    num_contexts: int
    num_observations: int
    num_actions: int
    agents: int

    @property
    def observation(self) -> Tensor:
        """`[N]` int64: what is seen now."""
        ...

    def step(self, action: Tensor) -> Step:
        """Actions `[N]` int64, each in [0, num_actions)."""
        ...

    def oracle_action(self) -> Tensor:
        """`[N]` int64: the best actions, chosen with all that the environment knows of itself."""
        ...


class TabularWorld:
    """Tabular tasks, one context each, as a VectorWorld. ValueError for tasks of several tokens.

    Args:
        policies: `[N,S]` int64, the oracle's actions by inner state; without them there is no `oracle_action`.
    """

    agents = 1

    def __init__(self, tasks: TabularTasks, seed: int, policies: Tensor | None = None) -> None:
        if tasks.emission is not None or tasks.multi_token:
            raise ValueError("tasks: wanted tasks whose states are observed and steps are one action, got other ones")
        self.tasks, self.policies = tasks, policies
        self.num_contexts, self.num_observations = len(tasks), tasks.num_observations
        self.num_actions = int(tasks.num_actions.min())
        self._tables = tasks.tables()
        self._state = rollout_start(self._tables, seed=seed)

    @property
    def observation(self) -> Tensor:
        return self.tasks.state_mapping.gather(1, self._state.state[:, None])[:, 0]

    def step(self, action: Tensor) -> Step:
        reward, done, moved = rollout_step(self._tables, self._state, action)
        return Step(reward, done, self.tasks.state_mapping.gather(1, moved.long()[:, None])[:, 0])

    def oracle_action(self) -> Tensor:
        if self.policies is None:
            raise ValueError("policies: wanted the oracle's, got none")
        return self.policies.gather(1, self._state.state[:, None])[:, 0]


def checked(action: Tensor, contexts: int, actions: int) -> Tensor:
    """The actions; ValueError unless they are `[contexts]` int64 in [0, actions)."""
    dense("action", action)
    if action.shape != (contexts,) or action.dtype != torch.int64:
        raise ValueError(f"action: wanted [{contexts}] of int64, got {list(action.shape)} of {action.dtype}")
    low, high = (int(x) for x in action.aminmax())
    if low < 0 or high >= actions:
        raise ValueError(f"action: wanted 0 to {actions - 1}, got {low} to {high}")
    return action
