"""Rooms of cells: DarkRoom as OmniRL's evaluation has it, and random ones to train on.

Five actions: stay, up, down, left, right; a move against a wall stays. Only the cell's number is seen. A goal ends the
episode; so does a pit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from icrl.worlds.samplers import empty_tasks, task_keys
from icrl.worlds.tasks import TabularTasks
from icrl_kernels.arguments import integer
from icrl_kernels.tabular.counter_rng import integers, uniforms

MOVES = ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1))


def _neighbours(rows: int, columns: int, device: torch.device) -> Tensor:
    """`[rows·columns, 5]` int64: the cell that each action leads to."""
    cells = torch.arange(rows * columns, dtype=torch.int64, device=device)
    moves = torch.tensor(MOVES, dtype=torch.int64, device=device)
    row = (cells[:, None] // columns + moves[:, 0]).clamp(0, rows - 1)
    return row * columns + (cells[:, None] % columns + moves[:, 1]).clamp(0, columns - 1)


def dark_room(size: int, n: int = 1, *, seed: int, device: torch.device | str = "cpu") -> TabularTasks:
    """n DarkRooms of size·size cells (OmniRL, arXiv 2502.02869): start and goal anywhere, the goal pays 1 and ends the episode.

    Episodes are truncated after 2·size² steps, as long as a walk over every cell and back. Task i of a seed is the same
    whatever n. ValueError for sizes below 2.
    """
    size, n = integer("size", size, 2), integer("n", n, 0)
    device = torch.device(device)
    cells = size * size
    keys = task_keys(n, seed, 0, stream=7, device=device)
    tasks = empty_tasks(n, cells, 5, cells, torch.full((n,), cells, dtype=torch.int64, device=device))
    each = torch.arange(n, dtype=torch.int64, device=device)
    goal = integers(keys, 1, 1, cells)[:, 0]
    transition, reward = tasks.dense_tables()
    transition.scatter_(3, _neighbours(size, size, device)[None, :, :, None].expand(n, -1, -1, -1), 1.0)
    transition[each, goal] = 0
    reward[each, :, :, goal] = 1
    tasks.terminal[each, goal] = True
    tasks.start.fill_(1 / (cells - 1))
    tasks.start[each, goal] = 0
    tasks.max_steps.fill_(2 * cells)
    tasks.state_mapping.copy_(torch.arange(cells, dtype=torch.int64, device=device))
    return tasks


def sample_grids(
    n: int,
    num_states: tuple[int, int] = (16, 64),
    *,
    seed: int,
    num_observations: int | None = None,
    device: torch.device | str = "cpu",
) -> TabularTasks:
    """n random rooms, each of at most num_states[1] cells and, where a rectangle allows, at least num_states[0].

    The goal pays 1 and ends the episode. Of a task's features each is drawn on its own: pits that cost 1 and end the episode
    (in half of the tasks, 5 to 20 % of the cells), moves that slip sideways with probability 1/3 to each side (in a quarter),
    a cost of .03 a step (in a quarter), one start or any (half and half), and which of the five actions is which move.
    Episodes are truncated after 2 to 6 times the number of cells.

    Raises:
        ValueError: sizes below 4, or fewer observed ids than cells.
    """
    n = integer("n", n, 0)
    low, high = (integer("num_states", s, 4) for s in num_states)
    if low > high:
        raise ValueError(f"num_states: wanted (low, high) with low ≤ high, got {(low, high)}")
    ids = high if num_observations is None else integer("num_observations", num_observations, high)
    device = torch.device(device)
    keys = task_keys(n, seed, 0, stream=8, device=device)
    shapes = [(r, c) for r in range(2, 17) for c in range(r, 17) if low <= r * c <= high] or [(2, high // 2)]
    chosen = integers(keys, 1, 1, len(shapes))[:, 0].tolist()
    sizes = torch.tensor([shapes[i][0] * shapes[i][1] for i in chosen], dtype=torch.int64, device=device)
    width = int(sizes.max()) if n else high
    tasks = empty_tasks(n, width, 5, ids, sizes)
    transition, reward = tasks.dense_tables()
    places = uniforms(keys, 2, 2).double()
    pits = uniforms(keys, 3, 2)
    scores = uniforms(keys, 4, width)
    slips, costs, fixed = (uniforms(keys, draw, 1)[:, 0] for draw in (5, 6, 7))
    order = uniforms(keys, 8, 5).argsort(-1)
    horizon = uniforms(keys, 9, 1)[:, 0]
    for i, shape in enumerate(shapes[c] for c in chosen):
        cells = shape[0] * shape[1]
        to = _neighbours(shape[0], shape[1], device)
        goal, start = int(places[i, 0] * cells), int(places[i, 1] * (cells - 1))
        start += start >= goal
        end = torch.zeros(cells, dtype=torch.bool, device=device)
        if pits[i, 0] < 0.5:
            share = 0.05 + 0.15 * float(pits[i, 1])
            end = scores[i, :cells] < share
            end[start] = False
        end[goal] = True
        step = torch.nn.functional.one_hot(to, cells).float()
        if slips[i] < 0.25:
            sideways = torch.tensor([[0, 0], [3, 4], [3, 4], [1, 2], [1, 2]], dtype=torch.int64, device=device)
            step = (step + step[:, sideways].sum(2)) / 3
        own = transition[i, :cells, :, :cells]
        own.copy_(step[:, order[i]] * ~end[:, None, None])
        gain = torch.where(end, -1.0, -0.03 if costs[i] < 0.25 else 0.0)
        gain[goal] = 1.0
        reward[i, :cells, :, :cells] = gain * (own > 0)
        tasks.terminal[i, :cells] = end
        if fixed[i] < 0.5:
            tasks.start[i, start] = 1
        else:
            tasks.start[i, :cells] = ~end / (~end).sum()
        tasks.max_steps[i] = int(cells * (2 + 4 * float(horizon[i])))
    seen = uniforms(keys, 10, ids).argsort(-1)[:, :width]
    tasks.state_mapping.copy_(seen.where(tasks.state_mask(), -1))
    return tasks
