"""Switch2: two agents that must change rooms through a corridor of one cell's width (the game of ma-gym), batched.

    . .       . .       The rooms are the two outer columns on each side, the corridor is the middle row. Agent 0 starts at
    . . # # # . .       the top of the left room, in the second column, and wants the top right corner; agent 1 the mirror
    . .       . .       image. Actions: down, left, up, right, stay.

A move into a wall or into the other agent stays; agent 0 moves first. A step costs .1; that which reaches an agent's goal pays
it 5, and it stays there and is paid nothing more. An episode ends when both are at their goals, and is truncated after 50 steps.
An agent sees, as OmniRL's evaluation (arXiv 2502.02869) has it, its own cell and the other's column: one of 15·7 ids.
"""

from __future__ import annotations

import torch
from torch import Tensor

from icrl.worlds.vector_world import Step, checked
from icrl_kernels.arguments import integer

ROWS, COLUMNS = 3, 7
MOVES = ((1, 0), (0, -1), (-1, 0), (0, 1), (0, 0))  # down, left, up, right, stay
STARTS, GOALS = ((0, 1), (0, 5)), ((0, 6), (0, 0))
STEP_REWARD, GOAL_REWARD = -0.1, 5.0
HORIZON = 50
CELLS = tuple((r, c) for r in range(ROWS) for c in range(COLUMNS) if r == 1 or c < 2 or c > 4)
"""Row and column of each cell that is no wall, by its number."""
OBSERVATIONS = len(CELLS) * COLUMNS


def _cell(place: tuple[int, int]) -> int:
    return CELLS.index(place)


class Switch2:
    """n teams of two agents, 2·n contexts, a `VectorWorld`: contexts 2·i and 2·i + 1 are the agents of team i.

    Nothing in it is random. ValueError for n below 1.
    """

    num_observations, num_actions, agents = OBSERVATIONS, len(MOVES), 2

    def __init__(self, n: int, *, device: torch.device | str = "cpu") -> None:
        self.teams = integer("n", n, 1)
        self.num_contexts = 2 * self.teams
        to = [
            [_cell(there) if (there := (r + down, c + right)) in CELLS else _cell((r, c)) for down, right in MOVES]
            for r, c in CELLS
        ]
        device = torch.device(device)
        self._to = torch.tensor(to, dtype=torch.int64, device=device)
        self._column = torch.tensor([c for _, c in CELLS], dtype=torch.int64, device=device)
        self._start = torch.tensor([_cell(place) for place in STARTS], dtype=torch.int64, device=device)
        self._goal = torch.tensor([_cell(place) for place in GOALS], dtype=torch.int64, device=device)
        self._plan: Tensor | None = None
        self.cells = self._start.repeat(self.teams, 1)
        """`[n,2]` int64: where the agents are."""
        self.elapsed = torch.zeros(self.teams, dtype=torch.int64, device=device)

    @property
    def observation(self) -> Tensor:
        return self._seen(self.cells)

    def _seen(self, cells: Tensor) -> Tensor:
        return (self._column[cells.flip(1)] * len(CELLS) + cells).flatten()

    def moved(self, cells: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Cells `[...,2]` and actions `[...,2]` -> cells and rewards (float32) after a step."""
        cells, action = cells.clone(), action.expand_as(cells)
        reward = torch.zeros(cells.shape, dtype=torch.float32, device=cells.device)
        for agent in range(2):
            own, other = cells[..., agent], cells[..., 1 - agent]
            there = self._to[own, action[..., agent]]
            waits = own == self._goal[agent]
            there = torch.where(waits | (there == other), own, there)
            arrives = ~waits & (there == self._goal[agent])
            reward[..., agent] = torch.where(arrives, GOAL_REWARD, torch.where(waits, 0.0, STEP_REWARD))
            cells[..., agent] = there
        return cells, reward

    def step(self, action: Tensor) -> Step:
        action = checked(action, self.num_contexts, self.num_actions)
        self.cells, reward = self.moved(self.cells, action.view(self.teams, 2))
        self.elapsed += 1
        home = (self.cells == self._goal).all(1)
        over = home | (self.elapsed >= HORIZON)
        following = self.observation
        self.cells = torch.where(over[:, None], self._start, self.cells)
        self.elapsed = self.elapsed.masked_fill(over, 0)
        done = torch.where(home, 1, 2 * over).to(torch.uint8)
        return Step(reward.flatten(), done.repeat_interleave(2), following)

    def oracle_action(self) -> Tensor:
        """The actions of the plan that earns the team most, by dynamic programming over both agents' cells."""
        if self._plan is None:
            self._plan = self._planned()
        left = HORIZON - self.elapsed
        joint = self._plan[left, self.cells[:, 0], self.cells[:, 1]]
        return torch.stack([joint // len(MOVES), joint % len(MOVES)], 1).flatten()

    def _planned(self) -> Tensor:
        """`[51,15,15]` int64: the best joint action, 5·agent 0's + agent 1's, by steps that are left and both cells."""
        count, device = len(CELLS), self._to.device
        cells = torch.cartesian_prod(*[torch.arange(count, dtype=torch.int64, device=device)] * 2)
        actions = torch.cartesian_prod(*[torch.arange(len(MOVES), dtype=torch.int64, device=device)] * 2)
        after, reward = self.moved(cells[:, None].expand(-1, len(actions), -1), actions)
        gain, after = reward.sum(-1), after[..., 0] * count + after[..., 1]
        over = (cells == self._goal).all(1)
        values = torch.zeros(count * count, dtype=torch.float32, device=device)
        plan = [torch.zeros(count * count, dtype=torch.int64, device=device)]
        for _ in range(HORIZON):
            q = gain + values[after]
            best = q.max(-1)
            values = best.values.masked_fill(over, 0.0)
            plan.append(best.indices)
        return torch.stack(plan).view(HORIZON + 1, count, count)
