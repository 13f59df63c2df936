"""What suites train: settings by method and environment, ablations, titles, and the published figures."""

from __future__ import annotations

from typing import Any

from icrl.offline.history import HistoryConfig
from icrl.offline.methods import METHODS
from icrl.offline.prompt import PromptConfig
from icrl.training.config import LoopConfig


def titles() -> dict[str, str]:
    """Of methods and ablations, by name."""
    return {name: method.title for name, method in METHODS.items()} | {
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
    ("darkroom", "random"): {
        "sicql": 66.05,
        "dpt": 22.12,
        "ad": 42.72,
        "idt": 40.70,
        "dicp": 59.76,
        "dit": 30.90,
        "ic_iql": 60.12,
    },
    ("push", "random"): {
        "sicql": 653.04,
        "dpt": 362.74,
        "ad": 604.50,
        "idt": 621.58,
        "dicp": 487.28,
        "dit": 633.58,
        "ic_iql": 646.08,
    },
    ("reach", "random"): {
        "sicql": 806.97,
        "dpt": 736.72,
        "ad": 738.96,
        "idt": 790.68,
        "dicp": 706.46,
        "dit": 758.92,
        "ic_iql": 773.33,
        "sicql w/o cq": 736.72,
        "sicql w/o c": 792.09,
        "sicql w/o q": 752.41,
    },
    ("cheetah-vel", "random"): {
        "sicql": -35.48,
        "dpt": -78.35,
        "ad": -67.37,
        "idt": -59.46,
        "dicp": -66.53,
        "dit": -74.50,
        "ic_iql": -56.53,
        "sicql w/o cq": -78.35,
        "sicql w/o c": -56.19,
        "sicql w/o q": -63.66,
    },
    ("walker-param", "random"): {
        "sicql": 466.72,
        "dpt": 257.11,
        "ad": 424.82,
        "idt": 343.01,
        "dicp": 403.90,
        "dit": 253.94,
        "ic_iql": 391.38,
    },
    ("ant-dir", "random"): {
        "sicql": 813.34,
        "dpt": 591.31,
        "ad": 215.01,
        "idt": 631.83,
        "dicp": 745.05,
        "dit": 723.49,
        "ic_iql": 713.26,
        "sicql w/o cq": 591.31,
        "sicql w/o c": 693.87,
        "sicql w/o q": 784.07,
    },
    ("cheetah-vel", "far"): {
        "sicql": -83.45,
        "dpt": -137.26,
        "ic_iql": -101.89,
    },
    ("ant-dir", "far"): {
        "sicql": 664.95,
        "dpt": 205.29,
        "ic_iql": 540.20,
    },
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


def settings_of(method: str) -> dict[str, Any]:
    """The suite's settings of a method; of one that is not listed, those of its kind, as far as it has such fields."""
    kind = METHODS[method].config_class
    if method in SETTINGS:
        return SETTINGS[method]
    return (
        PROMPT if issubclass(kind, PromptConfig) else HISTORY if issubclass(kind, HistoryConfig) else {"trunk": TRUNK}
    )


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
