"""Kernels for in-context reinforcement learning: linear attention and tabular control, as torch ops."""

from icrl_kernels._version import __version__
from icrl_kernels.value_iteration import ValueIteration, value_iteration

__all__ = ["ValueIteration", "__version__", "value_iteration"]
