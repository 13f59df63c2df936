"""What suites train: settings by method and environment, ablations, titles, and the published figures."""

from __future__ import annotations

from typing import Any

from icrl.offline.learner import METHODS
from icrl.training.config import LoopConfig

TITLES = {
    "dpt": "DPT",
    "ad": "AD",
    "idt": "IDT",
    "dicp": "DICP",
    "dit": "DIT",
    "ic_iql": "IC-IQL",
    "sicql": "S-ICQL",
    "sicql w/o cq": "w/o_cq",
    "sicql w/o c": "w/o_c",
    "sicql w/o q": "w/o_q",
}


ABLATIONS: dict[str, dict[str, Any]] = {
    "sicql w/o cq": {"world_model": False, "q_learning": False, "stride": 1},
    "sicql w/o c": {"world_model": False, "stride": 1},
    "sicql w/o q": {"q_learning": False},
}


PUBLISHED: dict[tuple[str, str], dict[str, float]] = {
    where: dict(zip(METHODS | ABLATIONS, returns, strict=False))  # ablations were not published everywhere
    for where, returns in {
        ("darkroom", "random"): (66.05, 22.12, 42.72, 40.70, 59.76, 30.90, 60.12),
        ("push", "random"): (653.04, 362.74, 604.50, 621.58, 487.28, 633.58, 646.08),
        ("reach", "random"): (806.97, 736.72, 738.96, 790.68, 706.46, 758.92, 773.33, 736.72, 792.09, 752.41),
        ("cheetah-vel", "random"): (-35.48, -78.35, -67.37, -59.46, -66.53, -74.50, -56.53, -78.35, -56.19, -63.66),
        ("walker-param", "random"): (466.72, 257.11, 424.82, 343.01, 403.90, 253.94, 391.38),
        ("ant-dir", "random"): (813.34, 591.31, 215.01, 631.83, 745.05, 723.49, 713.26, 591.31, 693.87, 784.07),
    }.items()
} | {
    ("cheetah-vel", "far"): {"sicql": -83.45, "dpt": -137.26, "ic_iql": -101.89},
    ("ant-dir", "far"): {"sicql": 664.95, "dpt": 205.29, "ic_iql": 540.20},
}
"""Few-shot returns by environment and split of its tasks, from mixed data (arXiv 2506.01299: table 1, ablations, OOD)."""


LIKE_PUBLISHED = ("size", "horizon", "start", "train_goals", "tasks", "quality")
"""Fields of data sources that are as published where they have their defaults."""


# What suites train: one trunk for all, as many updates for all, and batches whose updates take about as long (80 to 110 ms
# of one core; S-ICQL's 80). Sized for two CPU cores; the methods' own defaults are the published sizes.
TRUNK = {"width": 64, "layers": 3, "heads": 2}


PROMPT = {"trunk": TRUNK, "layout": "branch", "queries": 16, "batch": 64, "balanced": 1.0}


HISTORY = {"trunk": TRUNK, "episodes": 4, "batch": 8}


IQL = {"iql": {"discount": 0.95, "inverse_temperature": 3.0, "max_weight": 100.0}}


SETTINGS: dict[str, dict[str, Any]] = {
    "sicql": {**PROMPT, **IQL, "stride": 4},
    "dpt": {**PROMPT, "batch": 40},
    "dit": {**PROMPT, "batch": 40, "discount": 0.95},
    "ad": HISTORY,
    "idt": {**HISTORY, "batch": 64},
    "dicp": {**HISTORY, "discount": 0.95},
    "ic_iql": {**HISTORY, **IQL},
}


CONTINUOUS = {"balanced": 0.0}  # no state is seen twice


ENVIRONMENT_SETTINGS: dict[str, dict[str, Any]] = {
    "stitching": {"iql": {"target_rate": 0.02}},  # values must come a long way: from the goal to the start
    "point-robot": CONTINUOUS,
    "reach": {**CONTINUOUS, "iql": {"reward_scale": 0.1}},  # up to 10 a step
    "push": {**CONTINUOUS, "iql": {"reward_scale": 0.1}},
    "cheetah-vel": CONTINUOUS,
    "ant-dir": CONTINUOUS,
    "walker-param": CONTINUOUS,
}


LOOP = {
    "updates": 2500,
    "learning_rate": 1e-3,
    "muon_learning_rate": 3e-3,
    "weight_decay": 1e-4,
    "evaluate_every": 1000,
    "checkpoint_every": 250,
}


WORLD_LOOP = LoopConfig(
    updates=3000, learning_rate=1e-3, muon_learning_rate=0.0, checkpoint_every=500, evaluate_every=1000
)
