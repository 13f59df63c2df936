"""Tabular worlds: batches of tasks, their samplers, and environments over them."""

from icrl.worlds.samplers import sample_anymdp, sample_bandit, sample_garnet
from icrl.worlds.tables import TabularTasks

__all__ = ["TabularTasks", "sample_anymdp", "sample_bandit", "sample_garnet"]
