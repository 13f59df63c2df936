"""The step of a whole model as one call: a program of fused layer ops over packed weights, interpreted in C++."""

from icrl_kernels.fused.acting import closed_loop, hooked, plain_integers, plain_outcome, watched
from icrl_kernels.fused.program import Program, Rows, Step

__all__ = ["Program", "Rows", "Step", "closed_loop", "hooked", "plain_integers", "plain_outcome", "watched"]
