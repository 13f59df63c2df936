"""Kernels for in-context reinforcement learning: linear attention and tabular control, as torch ops."""

from icrl_kernels._version import __version__

__all__ = ["__version__"]
