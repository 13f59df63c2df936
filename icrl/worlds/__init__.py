"""Tabular worlds: batches of tasks, their samplers, and environments over them."""

from icrl.worlds.gym_env import TabularEnv, TabularVectorEnv
from icrl.worlds.quality import Quality, quality
from icrl.worlds.samplers import sample_anymdp, sample_bandit, sample_garnet
from icrl.worlds.tables import TabularTasks

__all__ = [
    "Quality",
    "TabularEnv",
    "TabularTasks",
    "TabularVectorEnv",
    "quality",
    "sample_anymdp",
    "sample_bandit",
    "sample_garnet",
]
