"""The rows of OmniRL's table (arXiv 2502.02869): environments, how long a learner is given, and what its authors report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from icrl.worlds import TabularTasks, sample_anymdp, sample_bandit, sample_garnet
from icrl.worlds.grids import dark_room
from icrl.worlds.gymnasium_tables import CLASSIC, cliff_walking
from icrl.worlds.pendulum import DiscretePendulum
from icrl.worlds.switch2 import Switch2
from icrl.worlds.vector_world import VectorWorld

PAPER = ("TQL-UCB", "PPO", "OmniRL (AnyMDP)", "OmniRL (GarnetMDP)")
"""The columns of the paper's table."""
Figure = tuple[float, int | None, int | None]
"""A performance, and the steps and the episodes that it took, as reported."""


@dataclass(frozen=True)
class Row:
    title: str
    make: Callable[[int, int], TabularTasks | VectorWorld]
    """(contexts, seed) -> tasks, or an environment without a table that has as many contexts, or teams of agents."""
    states: int  # that are observed
    actions: int
    steps: int  # of a model's context, and of the model-based learner's
    window: int  # steps of a curve's window
    q_steps: int  # of the Q-learner
    ppo_steps: int  # 0: it is not trained here
    paper: tuple[Figure | None, ...]  # by the columns of PAPER
    same: bool = False  # all contexts are one and the same task
    levels: tuple[float, ...] = (0.8,)  # whose steps are told
    q_constants: dict[str, float] = field(default_factory=dict)  # of the Q-learner, over those that other rows have


def _same(make: Callable[[], TabularTasks], contexts: int, seed: int) -> TabularTasks:
    return make()[[0] * contexts]


def _anymdp(states: int, contexts: int, seed: int) -> TabularTasks:
    return sample_anymdp(contexts, states, seed=seed)


def _garnet(states: int, contexts: int, seed: int) -> TabularTasks:
    return sample_garnet(contexts, states, 5, 2, seed=seed)


def _bandit(contexts: int, seed: int) -> TabularTasks:
    return sample_bandit(contexts, 5, seed=seed)


def _dark_room(size: int, contexts: int, seed: int) -> TabularTasks:
    return dark_room(size, contexts, seed=seed)


def _pendulum(g: float, contexts: int, seed: int) -> VectorWorld:
    return DiscretePendulum(contexts, g, seed=seed)


def _switch2(contexts: int, seed: int) -> VectorWorld:
    return Switch2(contexts)


ONE_STEP = {"q_discount": 0.0, "q_bonus": 0.5}
"""Constants of the Q-learner where an episode is one step: its horizon is 1, a tenth of the long ones', and so is the bonus."""


def _pendulum_row(g: float, ppo_steps: int, paper: tuple[Figure | None, ...]) -> Row:
    sizes = DiscretePendulum.num_observations, DiscretePendulum.num_actions
    title, make = f"Discrete-Pendulum, g {g:g}", partial(_pendulum, g)
    return Row(title, make, *sizes, 8_000, 500, 100_000, ppo_steps, paper, same=True)


ROWS = {
    "bandit": Row(
        *("Bandits, T(1, 5)", _bandit, 1, 5, 200, 10, 500, 8_192),
        ((0.921, 100, 100), (0.956, 1_200, 1_200), (0.825, 103, 103), (0.466, 33, 33)),
        q_constants=ONE_STEP,
    ),
    "anymdp-16": Row(
        *("AnyMDP T(16, 5)", partial(_anymdp, 16), 16, 5, 4_000, 250, 300_000, 491_520),
        ((0.920, 297_000, 4_700), (0.906, 476_000, 9_700), (0.953, 2_000, 29), (0.478, 1_600, 24)),
        levels=(0.8, 0.88),
    ),
    "anymdp-32": Row(
        *("AnyMDP T(32, 5)", partial(_anymdp, 32), 32, 5, 8_000, 500, 620_000, 491_520),
        ((0.847, 616_000, 5_600), (0.722, 618_000, 9_700), (0.903, 6_500, 47), (0.420, 5_000, 44)),
    ),
    "anymdp-64": Row(
        *("AnyMDP T(64, 5)", partial(_anymdp, 64), 64, 5, 8_000, 500, 1_100_000, 491_520),
        ((0.837, 1_100_000, 5_100), (0.583, 1_100_000, 9_400), (0.913, 7_700, 25), (0.471, 6_600, 24)),
    ),
    "anymdp-128": Row(
        *("AnyMDP T(128, 5)", partial(_anymdp, 128), 128, 5, 10_000, 500, 1_800_000, 491_520),
        ((0.732, 1_800_000, 6_900), (0.490, 1_300_000, 8_600), (0.802, 36_300, 100), (0.323, 9_000, 31)),
    ),
    "garnet-16": Row(
        *("Garnet(16, 5, 2)", partial(_garnet, 16), 16, 5, 4_000, 250, 240_000, 65_536),
        ((0.988, 241_000, 2_100), (0.971, 57_000, 500), (0.859, 8_200, 71), (0.990, 10_800, 95)),
    ),
    "garnet-64": Row(
        *("Garnet(64, 5, 2)", partial(_garnet, 64), 64, 5, 8_000, 500, 610_000, 98_304),
        ((0.987, 614_000, 1_700), (0.981, 96_000, 260), (0.804, 8_000, 19), (0.873, 7_400, 23)),
    ),
    "cliff": Row(
        *("CliffWalking", partial(_same, cliff_walking), 48, 4, 4_000, 250, 10_000, 98_304),
        ((1.0, 3_100, 35), (0.959, 99_300, 2_700), (1.0, 3_000, 65), (0.63, 29_000, 300)),
        same=True,
    ),
    "lake": Row(
        *("FrozenLake", partial(_same, CLASSIC["FrozenLake 4x4"].table), 16, 4, 2_000, 100, 24_000, 32_768),
        ((0.953, 23_600, 3_700), (0.968, 18_200, 2_100), (0.998, 300, 35), (0.751, 4_000, 250)),
        same=True,
    ),
    "lake-slippery": Row(
        "FrozenLake, slippery",
        *(partial(_same, CLASSIC["FrozenLake 4x4 slippery"].table), 16, 4, 8_000, 500, 208_000, 81_920),
        ((0.960, 208_000, 10_000), (0.956, 73_600, 4_700), (0.795, 7_700, 245), (0.313, 11_800, 800)),
        same=True,
    ),
    "pendulum-1": _pendulum_row(
        1.0, 196_608, ((0.949, 22_000, 110), (0.993, 198_000, 990), (0.905, 8_000, 40), (0.0, None, None))
    ),
    "pendulum-5": _pendulum_row(
        5.0, 131_072, ((0.997, 426_000, 2_130), (0.998, 132_000, 660), (0.918, 34_000, 170), (0.0, None, None))
    ),
    "pendulum-9.8": _pendulum_row(
        9.8, 196_608, ((0.902, 2_000_000, 10_000), (0.983, 186_000, 930), (0.734, 33_000, 165), (0.0, None, None))
    ),
    "switch2": Row(
        *("Switch2, two agents", _switch2, Switch2.num_observations, 5, 4_000, 250, 10_000, 0),
        ((0.980, 3_800, 110), None, (0.804, 2_800, 100), None),
        same=True,
    ),
    "darkroom-6": Row(
        *("DarkRoom 6 x 6", partial(_dark_room, 6), 36, 5, 2_000, 100, 10_000, 16_384),
        ((0.981, 6_200, 481), (0.976, 10_600, 560), (0.952, 845, 40), (0.905, 21_300, 440)),
    ),
    "darkroom-8": Row(
        *("DarkRoom 8 x 8", partial(_dark_room, 8), 64, 5, 4_000, 250, 25_000, 16_384),
        ((0.968, 24_500, 2_000), (0.967, 15_900, 930), (0.938, 1_500, 40), (0.889, 30_400, 480)),
    ),
    "darkroom-10": Row(
        *("DarkRoom 10 x 10", partial(_dark_room, 10), 100, 5, 4_000, 250, 32_000, 16_384),
        ((0.890, 31_100, 1_700), (0.923, 15_700, 570), (0.917, 2_800, 100), (0.756, 20_800, 280)),
    ),
}
