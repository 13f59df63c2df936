"""One step of many tasks at once: the only place where tables become transitions.

Random numbers are a hash of (environment's key, its count of draws), so a trajectory depends on its own key and actions
only: not on the batch, the device or the thread count.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from icrl.worlds import counter
from icrl.worlds.tables import TabularTasks

START, STEP = 0, 1  # streams


def choose(weights: Tensor, u: Tensor) -> Tensor:
    """Index drawn from each row of non-negative weights [N,S] by a uniform u [N] float64 in [0, 1): [N] int64."""
    total = weights.cumsum(-1, dtype=torch.float64)
    below = u * (1 - 2.0**-52) * total[:, -1]  # so that rounding cannot reach the total
    return torch.searchsorted(total, below[:, None], right=True)[:, 0]


def first_states(start: Tensor, keys: Tensor, count: Tensor) -> Tensor:
    """Start states [N] int64 from start [N,S], by keys [N] int64 and the number of draws so far, count [N] int64."""
    return choose(start, counter.uniforms(keys + count * counter.GOLDEN, START, 1)[:, 0])


def step(
    tasks: TabularTasks, states: Tensor, actions: Tensor, keys: Tensor, count: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Next states [N] int64, noisy rewards [N] float32 and whether the next state is terminal [N] bool."""
    _, s, a, _ = tasks.transition.shape
    task = torch.arange(len(tasks), device=states.device)
    row = (task * s + states) * a + actions
    u = counter.uniforms(keys + count * counter.GOLDEN, STEP, 3)
    following = choose(tasks.transition.view(-1, s)[row], u[:, 0])
    at = task * s + following
    deviation = tasks.noise_state.view(-1)[at] + tasks.noise_action.view(-1)[row]
    noise = torch.sqrt(-2 * torch.log1p(-u[:, 1])) * torch.cos(2 * math.pi * u[:, 2])
    reward = tasks.reward.view(-1)[row * s + following] + deviation * noise
    return following, reward.float(), tasks.terminal.view(-1)[at]
