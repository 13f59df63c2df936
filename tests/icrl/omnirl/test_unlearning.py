"""What was learned in a context stays learned: goals that are far from most states, in longer contexts than any of training."""

import torch

from icrl.worlds.tasks import TabularTasks

CONTEXTS = 32


def dark_room(size: int, steps: int) -> TabularTasks:
    """A square of `size`² cells, of which only the number is seen; the goal, in a corner, pays 1 and ends the episode."""
    cells = torch.arange(size * size)
    row, column = cells // size, cells % size
    moves = torch.tensor([[0, 0], [-1, 0], [1, 0], [0, -1], [0, 1]])
    to = (row[:, None] + moves[:, 0]).clamp(0, size - 1) * size + (column[:, None] + moves[:, 1]).clamp(0, size - 1)
    transition = torch.nn.functional.one_hot(to, size * size).double()[None]
    goal = cells == size * size - 1
    reward = goal.double().expand(1, size * size, 5, size * size)
    start = (~goal).double()[None] / int((~goal).sum())
    return TabularTasks.from_tables(transition, reward, start=start, terminal=goal[None], max_steps=steps)
