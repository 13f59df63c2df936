"""Random tasks by the batch: AnyMDP, Garnet, bandits. Task i of a seed is the same whatever batch it is drawn in."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from icrl.worlds.tasks import TabularTasks
from icrl_kernels import PackedTransition
from icrl_kernels.arguments import integer, number
from icrl_kernels.tabular import anymdp_reference
from icrl_kernels.tabular.anymdp import sample_anymdp_tables, sample_anymdp_windows
from icrl_kernels.tabular.counter_rng import exponential, integers, keys_of, normals, uniforms
from icrl_kernels.tabular.packed import compact, concatenate

Sizes = int | tuple[int, int] | Tensor
Device = torch.device | str
BACKENDS = ("cpu", "torch")


def sample_anymdp(
    n: int,
    num_states: Sizes = 16,
    num_actions: int = 5,
    *,
    seed: int,
    first: int = 0,
    num_observations: int | None = None,
    max_attempts: int = 100_000,
    progress: bool = False,
    packed: bool = False,
    device: Device = "cpu",
    backend: str | None = None,
) -> TabularTasks:
    """n AnyMDP tasks (arXiv 2502.02869): ranked states, banded transitions, composite rewards, filtered for quality.

    A candidate is refused, and drawn anew from the task's own stream, unless its terminal rewards settle within five
    rounds at γ = .99, and at γ = 2^(−1/ns) the optimal policy earns at least 2 more than the random one from every
    start state and its visits are spread (Gini > .7, normalised entropy > .35): see `icrl.worlds.quality`.

    Args:
        n: how many. num_states: of every task, or (low, high) for a uniform draw in [low, high], or an [n] tensor; ≥ 8.
        num_actions: ≥ 2. seed: any integer. first: index of the first task; `sample(10, seed=0)[4:]` equals
            `sample(6, seed=0, first=4)` for a fixed `num_observations`.
        num_observations: how many ids observed states are drawn from, at least the largest num_states (the default).
        max_attempts: candidates after which a task is given up. progress: show a bar.
        packed: tables as windows, sampled without making the dense ones; the same tasks, bit for bit.
        device: where the tasks are made and stay. backend: "cpu" (C++) or "torch" (any device, many candidates at once);
            None is "cpu" for the CPU and "torch" elsewhere. A backend gives the same bits for any number of threads and
            any cut into batches; the two give the same tasks up to float32's last bits, but for the rare candidate that
            lies within rounding of a filter's border.
    Raises:
        ValueError: a bad argument. RuntimeError: a task that `max_attempts` candidates did not yield.
    """
    device = torch.device(device)
    backend = backend or ("cpu" if device.type == "cpu" else "torch")
    if backend not in BACKENDS or (backend == "cpu" and device.type != "cpu"):
        raise ValueError(f"backend: wanted one of {', '.join(BACKENDS)} that serves {device}, got {backend!r}")
    n, num_actions = integer("n", n, 0), integer("num_actions", num_actions, 2)
    max_attempts = integer("max_attempts", max_attempts, 1)
    keys = task_keys(n, seed, first, stream=1, device=device)
    sizes, most = _sizes(num_states, n, seed, first, least=8, device=device)
    width = int(sizes.max()) if n else most
    ids = _ids(num_observations, width)
    options: dict[str, Any] = {"num_observations": ids, "max_attempts": max_attempts}
    if backend == "torch":
        tasks = _by_torch(keys, sizes, width, num_actions, ids, max_attempts, progress)
        return tasks if packed else tasks.dense()
    tasks = empty_tasks(n, width, num_actions, ids, sizes, packed)
    block = 64 if progress else max(n, 1)
    windows = []
    for i in tqdm(range(0, n, block), unit_scale=block, unit="task", disable=not progress):
        part = slice(i, i + block)
        views: dict[str, Any] = {name: getattr(tasks, name)[part] for name in _WRITTEN}
        if packed:
            windows.append(sample_anymdp_windows(keys[part], sizes[part], **views, **options))
        else:
            tables: dict[str, Any] = {"transition": tasks.transition[part], "reward": tasks.reward[part]}
            sample_anymdp_tables(keys[part], sizes[part], **tables, **views, **options)
    if windows:
        tasks.transition = concatenate([w.transition for w in windows])
        tasks.reward = torch.cat([w.reward for w in windows])
    return tasks


_WRITTEN = ("noise_state", "noise_action", "start", "terminal", "state_mapping", "max_steps")


def _by_torch(
    keys: Tensor, sizes: Tensor, states: int, actions: int, ids: int, max_attempts: int, progress: bool
) -> TabularTasks:
    steps = anymdp_reference.max_steps_of(keys, sizes)
    found = anymdp_reference.sample(keys, sizes, steps, states, actions, max_attempts, progress)
    order = found.task.argsort()
    rows = anymdp_reference.as_transition(found)
    transition, reward = compact(PackedTransition(rows[0], *(x[order] for x in rows[1:])), found.reward)
    return TabularTasks(
        transition=transition,
        reward=reward,
        noise_state=found.noise_state[order],
        noise_action=found.noise_action[order],
        start=found.start[order],
        terminal=found.terminal[order],
        max_steps=steps,
        state_mapping=anymdp_reference.state_mapping_of(keys, sizes, states, ids),
        num_states=sizes,
        num_actions=torch.full_like(sizes, actions),
        num_observations=ids,
    )


def sample_garnet(
    n: int,
    num_states: Sizes = 16,
    num_actions: int = 5,
    branching: int = 2,
    *,
    seed: int,
    first: int = 0,
    sigma: float = 0.1,
    num_observations: int | None = None,
    packed: bool = False,
    device: Device = "cpu",
) -> TabularTasks:
    """n Garnet tasks: `branching` distinct successors of each (s, a) with uniform-spacing weights, R ~ N(0, sigma²).

    No terminal state, start in state 0, horizon as AnyMDP's. Arguments as `sample_anymdp`; num_states ≥ branching.
    """
    n, num_actions, branching = (
        integer("n", n, 0),
        integer("num_actions", num_actions, 1),
        integer("branching", branching, 1),
    )
    if not 0 <= number("sigma", sigma) < torch.inf:
        raise ValueError(f"sigma: wanted a finite number of at least 0, got {sigma}")
    keys = task_keys(n, seed, first, stream=2, device=torch.device(device))
    sizes, _ = _sizes(num_states, n, seed, first, least=max(branching, 2), device=keys.device)
    width = int(sizes.max()) if n else branching
    ids = _ids(num_observations, width)
    block = max(1, _ENTRIES // (width * width * num_actions))
    if packed and n > block:  # so that few dense tables exist at a time
        one: dict[str, Any] = {"num_observations": ids, "seed": seed, "sigma": sigma, "packed": True, "device": device}
        starts = range(0, n, block)
        parts = [sizes[i : i + block] for i in starts]
        return TabularTasks.concatenate(
            [
                sample_garnet(len(part), part, num_actions, branching, first=first + i, **one)
                for i, part in zip(starts, parts, strict=True)
            ]
        )
    tasks = empty_tasks(n, width, num_actions, ids, sizes)
    shape = (n, width, num_actions)
    draw = uniforms(keys, 3, width * num_actions * branching).view(*shape, branching).double()
    chosen = torch.full((*shape, branching), -1, device=keys.device, dtype=torch.int64)
    for k in range(branching):  # Floyd's sampling without replacement
        last = sizes.view(n, 1, 1) - branching + k
        pick = (draw[..., k] * (last + 1)).long()
        chosen[..., k] = torch.where((chosen == pick[..., None]).any(-1), last, pick)
    cuts = uniforms(keys, 4, width * num_actions * (branching - 1)).view(*shape, branching - 1).sort(-1).values
    edges = torch.nn.functional.pad(cuts, (1, 1))
    edges[..., -1] = 1
    live = tasks.state_mask()[:, :, None, None]
    weights = edges.diff(dim=-1) * live
    rewards = sigma * normals(keys, 5, width * num_actions * branching).view(*shape, branching) * live
    transition, reward = tasks.dense_tables()
    transition.scatter_(3, chosen, weights.float())
    reward.scatter_(3, chosen, rewards.float())
    tasks.start[:, 0] = 1
    low = (4 * sizes).clamp(min=100)
    high = torch.maximum((8 * sizes).clamp(max=500), low + 1)
    tasks.max_steps.copy_((low + (high - low) * uniforms(keys, 6, 1)[:, 0]).ceil())
    order = uniforms(keys, 7, ids).argsort(-1)[:, :width]
    tasks.state_mapping.copy_(order.where(tasks.state_mask(), -1))
    return tasks.pack() if packed else tasks


def sample_bandit(
    n: int,
    num_actions: int = 5,
    *,
    seed: int,
    first: int = 0,
    num_observations: int = 1,
    device: Device = "cpu",
) -> TabularTasks:
    """n bandits: one state, an episode is one step (max_steps = 1, so it ends by truncation).

    Means ~ U(b/2, b), b = clip(Exp(1), .05, 2), drawn until their deviation passes .01; noise is c·mean,
    c = max(0, U(−.3, .3)). Observed ids are drawn from [0, num_observations).
    """
    n, num_actions = integer("n", n, 0), integer("num_actions", num_actions, 2)
    num_observations = integer("num_observations", num_observations, 1)
    keys = task_keys(n, seed, first, stream=3, device=torch.device(device))
    tasks = empty_tasks(n, 1, num_actions, num_observations, torch.ones(n, dtype=torch.int64, device=keys.device))
    base = exponential(keys, 3, 1).clamp(0.05, 2.0)
    means = torch.zeros(n, num_actions, dtype=torch.float64, device=keys.device)
    left = torch.ones(n, dtype=torch.bool, device=keys.device)
    attempt = 0
    while left.any():
        fresh = base[left] * (0.5 + 0.5 * uniforms(keys[left], 16 + attempt, num_actions))
        means[left] = fresh
        left[left.clone()] = fresh.std(-1, correction=0) <= 0.01
        attempt += 1
    noise = (0.6 * uniforms(keys, 4, 1) - 0.3).clamp(min=0)
    transition, reward = tasks.dense_tables()
    transition.fill_(1)
    reward.copy_(means[:, None, :, None])
    tasks.noise_action.copy_((noise * means)[:, None])
    tasks.start.fill_(1)
    tasks.max_steps.fill_(1)
    tasks.state_mapping.copy_(integers(keys, 5, 1, num_observations))
    return tasks


_ENTRIES = 1 << 22  # of dense tables that exist at a time where windows are wanted


def task_keys(n: int, seed: int, first: int, stream: int, device: torch.device) -> Tensor:
    seed, first = integer("seed", seed), integer("first", first, 0)
    return keys_of(seed, torch.arange(first, first + n, device=device), stream)


def _sizes(num_states: Sizes, n: int, seed: int, first: int, least: int, device: torch.device) -> tuple[Tensor, int]:
    """Each task's, and the largest that there could be."""
    if isinstance(num_states, (tuple, list)):
        if len(num_states) != 2:
            raise ValueError(f"num_states: wanted an integer, (low, high) or a tensor [n], got {num_states}")
        low, high = (integer("num_states", size, least) for size in num_states)
        if low > high:
            raise ValueError(f"num_states: wanted (low, high) with low ≤ high, got {(low, high)}")
        return low + integers(task_keys(n, seed, first, stream=0, device=device), 1, 1, high - low + 1)[:, 0], high
    if not isinstance(num_states, (Tensor, np.ndarray)) or not num_states.ndim:
        size = integer("num_states", num_states, least, 2**62)
        return torch.full((n,), size, dtype=torch.int64, device=device), size
    given = torch.from_numpy(np.array(num_states)) if isinstance(num_states, np.ndarray) else num_states
    if given.is_floating_point() or given.is_complex() or given.dtype == torch.bool:
        raise ValueError(f"num_states: wanted integers, got {given.dtype}")
    if given.shape != (n,):
        raise ValueError(f"num_states: wanted shape [{n}], got {list(given.shape)}")
    if n and int(given.min()) < least:
        raise ValueError(f"num_states: wanted at least {least}, got {int(given.min())}")
    return given.to(device, torch.int64).contiguous(), int(given.max()) if n else least


def _ids(num_observations: int | None, width: int) -> int:
    """How many ids states are observed as: `width` unless more are asked for."""
    ids = width if num_observations is None else integer("num_observations", num_observations)
    if ids < width:
        raise ValueError(f"num_observations: wanted at least num_states = {width}, got {ids}")
    return ids


def empty_tasks(n: int, states: int, actions: int, ids: int, sizes: Tensor, packed: bool = False) -> TabularTasks:
    device = sizes.device
    windows = [torch.zeros(n, states, actions, dtype=d, device=device) for d in (torch.int64, torch.int32, torch.int32)]
    dense = (n, states, actions, states)
    none = torch.zeros(0, dtype=torch.float32, device=device)
    return TabularTasks(
        transition=PackedTransition(none, *windows)
        if packed
        else torch.zeros(dense, dtype=torch.float32, device=device),
        reward=none if packed else torch.zeros(dense, dtype=torch.float32, device=device),
        noise_state=torch.zeros(n, states, dtype=torch.float32, device=device),
        noise_action=torch.zeros(n, states, actions, dtype=torch.float32, device=device),
        start=torch.zeros(n, states, dtype=torch.float32, device=device),
        terminal=torch.zeros(n, states, dtype=torch.bool, device=device),
        max_steps=torch.zeros(n, dtype=torch.int64, device=device),
        state_mapping=torch.full((n, states), -1, dtype=torch.int64, device=device),
        num_states=sizes,
        num_actions=torch.full_like(sizes, actions),
        num_observations=ids,
    )
