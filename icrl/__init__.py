"""In-context reinforcement learning on icrl_kernels: worlds, models, training, evaluation.

Importing it registers the Gymnasium environment "icrl/AnyMDP-v0" and nothing else.
"""

from importlib import import_module
from typing import Any

import gymnasium

gymnasium.register(
    "icrl/AnyMDP-v0",
    entry_point="icrl.worlds.gym_env:TabularEnv",
    vector_entry_point="icrl.worlds.gym_env:make_anymdp_vec",
)


def load(path: Any, device: Any = "cpu") -> Any:
    """The model that a file holds, on a device: `icrl.omnirl.checkpoints.load`, which says what it raises."""
    return import_module("icrl.omnirl.checkpoints").load(path, device)  # the models take a second to import
