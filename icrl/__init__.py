"""In-context reinforcement learning on icrl_kernels: worlds, models, training, evaluation."""
