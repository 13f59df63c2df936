"""Partially observed tasks: AnyMDP tasks seen through random tokens, and the environment's steps of several actions.

The process is xenoverse's (AnyMDP's POMDP and multi-token POMDP, arXiv 2502.02869): each of K tokens has a sparse
stochastic matrix from states to observed ids, and an environment's step may take several actions in turn.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from icrl.worlds.samplers import Sizes, sample_anymdp
from icrl.worlds.tasks import TabularTasks
from icrl_kernels import Rollout
from icrl_kernels.arguments import integer, number
from icrl_kernels.tabular import counter_rng
from icrl_kernels.tabular import packed as packed_tables

STREAM = 4  # of keys; AnyMDP's, Garnet's and the bandits' come before


def sample_pomdp(
    n: int,
    num_states: Sizes = 16,
    num_actions: int = 5,
    *,
    seed: int,
    first: int = 0,
    num_observations: int = 64,
    observation_tokens: int = 1,
    action_tokens: int = 1,
    density: float = 0.2,
    most: float = 4,
    **options: Any,
) -> TabularTasks:
    """n AnyMDP tasks whose states are seen as `observation_tokens` random tokens, in steps of `action_tokens` actions.

    Each token's matrix of ns states by O = num_observations ids has round(d·ns·O) entries of U(0, 1), d = min(density,
    most/O), at places drawn without replacement from the whole matrix; a row without one gets a random id; rows are
    normalised. Task i of a seed is the same in any batch; its dynamics are those of `sample_anymdp` at that seed.

    Args:
        num_observations, observation_tokens, action_tokens: at least 1. density: in (0, 1]. most: > 0, how many ids a
            state has on average at most. options: of `sample_anymdp`, as are the other arguments.
    """
    n, first = integer("n", n, 0), integer("first", first, 0)
    num_observations = integer("num_observations", num_observations, 1)
    observation_tokens = integer("observation_tokens", observation_tokens, 1)
    action_tokens = integer("action_tokens", action_tokens, 1)
    if not 0 < number("density", density) <= 1 or not number("most", most) > 0:
        raise ValueError(f"density, most: wanted (0, 1] and > 0, got {density}, {most}")
    if "num_observations" not in options and isinstance(num_states, tuple):
        options["num_observations"] = num_states[1]  # of the states' ids, which must not depend on the batch
    tasks = sample_anymdp(n, num_states, num_actions, seed=seed, first=first, **options)
    keys = counter_rng.keys_of(seed, torch.arange(first, first + n, device=tasks.device), STREAM)
    emission = _emissions(keys, tasks.num_states, tasks.shape[1], num_observations, observation_tokens, density, most)
    return replace(tasks, emission=emission, num_observations=num_observations, action_tokens=action_tokens)


def _emissions(keys: Tensor, sizes: Tensor, states: int, ids: int, tokens: int, density: float, most: float) -> Tensor:
    """[N,K,S,O] float32.

    The c least of m uniforms mark c places drawn without replacement, and given the next larger one, τ, these c are
    independent and uniform on (0, τ): the entries themselves, but for a factor that normalising removes.
    """
    out = torch.zeros(len(keys), tokens, states, ids, dtype=torch.float32, device=keys.device)
    density = min(density, most / ids)
    for ns in sizes.unique().tolist():
        places = ns * ids
        count = round(density * places)
        of_size = (sizes == ns).nonzero()[:, 0]
        for some in of_size.split(max(1, packed_tables.ENTRIES // places)):
            for k in range(tokens):
                u = counter_rng.uniforms(keys[some], 2 * k, places)
                if count < places:
                    u = torch.where(u < u.kthvalue(count + 1).values[:, None], u, 0.0)
                u = u.view(-1, ns, ids)
                random_id = counter_rng.integers(keys[some], 2 * k + 1, ns, ids)
                empty = (u.sum(-1) == 0).double()
                u = u.scatter_add(2, random_id[..., None], empty[..., None])
                out[some, k, :ns] = (u / u.sum(-1, keepdim=True)).float()
    return out


class EnvironmentSteps(NamedTuple):
    """The environment's steps in R records' single actions; record r has count[r] of them, the rest of E is -1 or 0."""

    state: Tensor  # [R,E] int16, inner state before the first action
    action: Tensor  # [R,E,D] int16, -1 for those that an end cut off
    reward: Tensor  # [R,E] float32, summed over the actions
    done: Tensor  # [R,E] uint8: 0 no, 1 terminated, 2 truncated
    behaviour: Tensor  # [R,E] uint8, the behaviour that took the first action
    next_state: Tensor  # [R,E] int16, inner state after the last action, before any reset
    step: Tensor  # [R,E] int64, the column of the first action
    count: Tensor  # [R] int64


def regroup(run: Rollout, action_tokens: int, elapsed: Tensor | None = None) -> EnvironmentSteps:
    """A simulation's single actions (each [R,T]) as environment steps of D = `action_tokens` actions each.

    A step has D actions, or fewer where the episode ends within it. Steps cut by the simulation's own beginning or end
    are left out. With these tables' `max_steps`, which counts environment steps, only terminal states cut a step.

    Args:
        elapsed: [R], actions of the running episode before the simulation: `RolloutState.elapsed` of the state that
            it continued. 0 by default.
    Returns:
        the steps; their observations are `tasks.emit(steps.state, seed=, record=, step=steps.step)` (plus the step at
        which the simulation began).
    """
    action_tokens = integer("action_tokens", action_tokens, 1)
    ended = run.done != 0
    if ended.dim() != 2:
        raise ValueError(f"run: wanted tensors [R, T], got {list(ended.shape)}")
    r, t = ended.shape
    if elapsed is not None and elapsed.shape != (r,):
        raise ValueError(f"elapsed: wanted shape [{r}], got {list(elapsed.shape)}")
    column = torch.arange(t, device=ended.device).expand(r, t)
    fresh = torch.nn.functional.pad(ended[:, :-1], (1, 0)) if t else ended
    inner = column - torch.where(fresh, column, 0).cummax(1).values
    if elapsed is not None:
        inner = inner + torch.where(fresh.cumsum(1) == 0, elapsed[:, None], 0)
    place = inner % action_tokens
    begins, closes = place == 0, ended | (place == action_tokens - 1)
    number = begins.cumsum(1) - 1
    count = (closes & (number >= 0)).sum(1)
    whole = (number >= 0) & (number < count[:, None])
    most = int(count.max()) if r else 0
    to = (number + most * torch.arange(r, device=ended.device)[:, None]).flatten()

    def spread(values: Tensor, at: Tensor, fill: int) -> Tensor:
        out = values.new_full((r * most,), fill)
        return out.index_copy_(0, to[at], values.reshape(-1)[at]).view(r, most)

    every, first, last = (x.flatten().nonzero()[:, 0] for x in (whole, whole & begins, whole & closes))
    action = run.action.new_full((r * most * action_tokens,), -1)
    action.index_copy_(0, to[every] * action_tokens + place.flatten()[every], run.action.reshape(-1)[every])
    reward = torch.zeros(r * most, dtype=torch.float64, device=ended.device)
    reward.index_add_(0, to[every], run.reward.reshape(-1)[every].double())
    return EnvironmentSteps(
        state=spread(run.state, first, -1),
        action=action.view(r, most, action_tokens),
        reward=reward.float().view(r, most),
        done=spread(run.done, last, 0),
        behaviour=spread(run.behaviour, first, 0),
        next_state=spread(run.next_state, last, -1),
        step=spread(column, first, -1),
        count=count,
    )
