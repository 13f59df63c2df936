"""Discrete-Pendulum (OmniRL, arXiv 2502.02869): Gymnasium's Pendulum-v1 seen in bins and driven by five torques, batched.

    cell      bin of the angle, 12 of equal width from upright on, times 5, plus bin of the speed, 5 of equal width
    action    torque -2, -1, 0, 1, 2
    reward    max(r/30 + .1, -.1), r that of Pendulum-v1
    episode   200 steps, then truncated; it starts at any angle and at a speed of -1 to 1

The bins hide where in them the pendulum is, so that no table in cells is its dynamics.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from icrl.worlds.vector_world import Step, checked
from icrl_kernels.arguments import integer, number
from icrl_kernels.tabular.counter_rng import keys_of, uniforms

ANGLES, SPEEDS = 12, 5
HORIZON = 200
FASTEST = 8.0
SECONDS = 0.05  # of a step
TORQUES = (-2.0, -1.0, 0.0, 1.0, 2.0)
GRID = (120, 81)  # points of angle and of speed at which the oracle's values are stored
DISCOUNT = 0.99
STREAM = 9  # of the counter-based random numbers; samplers of tasks use those before


def moved(angle: Tensor, speed: Tensor, torque: Tensor, g: float) -> tuple[Tensor, Tensor]:
    """Angle and speed a step later, as Pendulum-v1 has them: a rod of length 1 and mass 1, semi-implicit Euler."""
    speed = (speed + (1.5 * g * torch.sin(angle) + 3.0 * torque) * SECONDS).clamp(-FASTEST, FASTEST)
    return angle + speed * SECONDS, speed


def rewarded(angle: Tensor, speed: Tensor, torque: Tensor) -> Tensor:
    """The reward of a step from here."""
    from_upright = torch.remainder(angle + math.pi, 2 * math.pi) - math.pi
    given = -(from_upright.square() + 0.1 * speed.square() + 0.001 * torque.square())
    return (given / 30 + 0.1).clamp(min=-0.1)


def cell(angle: Tensor, speed: Tensor) -> Tensor:
    """int64 in [0, 60): the bin that is observed."""
    turn = torch.remainder(angle, 2 * math.pi) / (2 * math.pi)
    of_angle = (turn * ANGLES).long().clamp(max=ANGLES - 1)
    of_speed = ((speed + FASTEST) / (2 * FASTEST) * SPEEDS).long().clamp(max=SPEEDS - 1)
    return of_angle * SPEEDS + of_speed


class DiscretePendulum:
    """n contexts, a `VectorWorld`. Context i of a seed is the same whatever n.

    Args:
        g: gravity; the paper has 1, 5 and 9.8.
    Raises:
        ValueError: n below 1, or a g that is not finite.
    """

    num_observations, num_actions, agents = ANGLES * SPEEDS, len(TORQUES), 1

    def __init__(self, n: int, g: float, *, seed: int, device: torch.device | str = "cpu") -> None:
        self.num_contexts, self.g = integer("n", n, 1), number("g", g)
        if not math.isfinite(self.g):
            raise ValueError(f"g: wanted a finite number, got {g}")
        device = torch.device(device)
        self._keys = keys_of(seed, torch.arange(self.num_contexts, dtype=torch.int64, device=device), STREAM)
        self._torques = torch.tensor(TORQUES, dtype=torch.float64, device=device)
        self._episode, self._elapsed = 0, 0
        self._begin()

    def _begin(self) -> None:
        drawn = 2 * uniforms(self._keys, self._episode, 2) - 1
        self.angle, self.speed = drawn[:, 0] * math.pi, drawn[:, 1]
        self._episode, self._elapsed = self._episode + 1, 0

    @property
    def observation(self) -> Tensor:
        return cell(self.angle, self.speed)

    def step(self, action: Tensor) -> Step:
        torque = self._torques[checked(action, self.num_contexts, self.num_actions)]
        reward = rewarded(self.angle, self.speed, torque).float()
        self.angle, self.speed = moved(self.angle, self.speed, torque, self.g)
        following = self.observation
        self._elapsed += 1
        over = self._elapsed == HORIZON
        done = torch.full_like(action, 2 * over, dtype=torch.uint8)
        if over:
            self._begin()
        return Step(reward, done, following)

    def oracle_action(self) -> Tensor:
        """The best torque for the angle and speed themselves, which no agent sees: one step ahead of values stored on a grid."""
        values = optimal_values(self.g).to(self.angle.device)
        return _look_ahead(values, self.angle, self.speed, self._torques, self.g).argmax(-1)


@lru_cache(maxsize=8)
def optimal_values(g: float) -> Tensor:
    """`[121,81]` float64 values at a discount of .99, by value iteration between the points of a grid, on the CPU."""
    torques = torch.tensor(TORQUES, dtype=torch.float64, device="cpu")
    angle = torch.linspace(-math.pi, math.pi, GRID[0] + 1, dtype=torch.float64, device=torques.device)
    speed = torch.linspace(-FASTEST, FASTEST, GRID[1], dtype=torch.float64, device=torques.device)
    angles, speeds = (x.flatten()[:, None] for x in torch.meshgrid(angle, speed, indexing="ij"))
    reward = rewarded(angles, speeds, torques)
    places, weights = _corners(*moved(angles, speeds, torques, g))
    values = torch.zeros((GRID[0] + 1) * GRID[1], dtype=torch.float64, device=torques.device)
    for _ in range(600):  # .99^600 is .002
        values = (reward + DISCOUNT * (values[places] * weights).sum(0)).amax(-1)
    return values.view(GRID[0] + 1, GRID[1])


def _look_ahead(values: Tensor, angle: Tensor, speed: Tensor, torques: Tensor, g: float) -> Tensor:
    """`[N,5]`: the value of each torque."""
    angle, speed = angle[:, None], speed[:, None]
    places, weights = _corners(*moved(angle, speed, torques, g))
    return rewarded(angle, speed, torques) + DISCOUNT * (values.flatten()[places] * weights).sum(0)


def _corners(angle: Tensor, speed: Tensor) -> tuple[Tensor, Tensor]:
    """The four points of the grid around each place, as `[4,...]` indices, and their weights in a bilinear mean."""
    x = torch.remainder(angle + math.pi, 2 * math.pi) / (2 * math.pi) * GRID[0]
    y = (speed + FASTEST) / (2 * FASTEST) * (GRID[1] - 1)
    i, j = x.long().clamp(max=GRID[0] - 1), y.long().clamp(max=GRID[1] - 2)
    u, v = x - i, y - j
    first = i * GRID[1] + j
    places = torch.stack([first, first + 1, first + GRID[1], first + GRID[1] + 1])
    return places, torch.stack([(1 - u) * (1 - v), (1 - u) * v, u * (1 - v), u * v])
