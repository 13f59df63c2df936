"""In-context reinforcement learning on icrl_kernels: worlds, models, training, evaluation.

Importing it registers the Gymnasium environment "icrl/AnyMDP-v0" and nothing else.
"""

import gymnasium

gymnasium.register(
    "icrl/AnyMDP-v0",
    entry_point="icrl.worlds.gym_env:TabularEnv",
    vector_entry_point="icrl.worlds.gym_env:make_anymdp_vec",
)
