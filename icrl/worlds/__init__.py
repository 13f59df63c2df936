"""Tabular worlds: batches of tasks, their samplers, and environments over them."""

from icrl.worlds.filters import Quality, quality
from icrl.worlds.gym_env import TabularEnv, TabularVectorEnv
from icrl.worlds.pomdp import EnvironmentSteps, regroup, sample_pomdp
from icrl.worlds.samplers import sample_anymdp, sample_bandit, sample_garnet
from icrl.worlds.tasks import TabularTasks

__all__ = [
    "EnvironmentSteps",
    "Quality",
    "TabularEnv",
    "TabularTasks",
    "TabularVectorEnv",
    "quality",
    "regroup",
    "sample_anymdp",
    "sample_bandit",
    "sample_garnet",
    "sample_pomdp",
]
