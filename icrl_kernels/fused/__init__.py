"""The step of a whole model as one call: a program of fused layer ops over packed weights, interpreted in C++."""

from icrl_kernels.fused.acting import closed_loop, hooked, plain_integers, plain_outcome, watched
from icrl_kernels.fused.mixers import add_affine, add_mixer, add_window_attention, bind_state, require_plain
from icrl_kernels.fused.program import Matrix, Program, Rows, Slot, Step

__all__ = [
    "Matrix",
    "Program",
    "Rows",
    "Slot",
    "Step",
    "add_affine",
    "add_mixer",
    "add_window_attention",
    "bind_state",
    "closed_loop",
    "hooked",
    "plain_integers",
    "plain_outcome",
    "require_plain",
    "watched",
]
