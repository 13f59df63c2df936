"""What the linear-attention ops and their users share: limits, the packing of sequences, the scale."""

from __future__ import annotations

import functools
from array import array
from itertools import pairwise

import torch
from torch import Tensor

from icrl_kernels import _checks

GATE_ALLOWANCE = 1e-4
"""Gates are logarithms of decays in [0, 1]. What rounding may put above 0 passes; a gate above this is refused."""

MAX_HEAD_DIM = 512
"""Channels of a key (K), and slots (M)."""

MAX_VALUE_DIM = 4096
"""Channels of a value (V): the columns of a state, which do not touch one another."""

MOST = torch.finfo(torch.float32).max
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # the codes of csrc/common/vec.h


def check_packing(q: Tensor, cu_seqlens: Tensor) -> int:
    """The number of sequences that cu_seqlens [N + 1] packs into q's [1, T] tokens."""
    if q.shape[0] != 1:
        raise ValueError(f"cu_seqlens: packed sequences want a batch of B=1, got B={q.shape[0]}")
    N = cu_seqlens.shape[0] - 1
    if N < 0:
        raise ValueError("cu_seqlens: wanted N + 1 ≥ 1 entries, got 0")
    if N == 0 and q.shape[1]:
        raise ValueError(f"cu_seqlens: holds no sequence for {q.shape[1]} tokens")
    return N


def default_scale(scale: float | None, q: Tensor) -> float:
    if scale is None:
        return max(1, q.shape[-1] if q.dim() else 1) ** -0.5
    if isinstance(scale, (float, torch.SymFloat, torch.SymInt)):
        return float(scale)
    return _checks.number("scale", scale)


def check_scale(scale: float, q: Tensor) -> None:
    most = MOST if q.dtype != torch.float64 else 1e308
    if not -most <= scale <= most:  # math.isfinite cannot be traced where torch.compile makes floats symbolic
        raise ValueError(f"scale: wanted a finite number, got {scale}")


@functools.lru_cache(maxsize=64)
def _equal_bounds(B: int, T: int) -> array[int]:
    return array("q", [b * T for b in range(B + 1)])


def bounds(B: int, T: int, cu_seqlens: Tensor | None) -> array[int]:
    """Where each sequence's tokens begin, [N + 1] 64-bit integers in memory of their own: no mode or transform of torch sees
    them. Not to be written to."""
    if cu_seqlens is None:
        return _equal_bounds(B, T)
    values = cu_seqlens.tolist()
    if not values or values[0] != 0 or values[-1] != T or any(a > b for a, b in pairwise(values)):
        raise ValueError(f"cu_seqlens: wanted a non-decreasing sequence from 0 to T={T}, got {values}")
    return array("q", values)


def gate_error(name: str = "g") -> ValueError:
    return ValueError(
        f"{name}: wanted natural logarithms of decays, at most 0 (to within {GATE_ALLOWANCE}), got a larger one"
    )


def spans(q: Tensor, cu_seqlens: Tensor | None) -> list[tuple[slice, int, int]]:
    """For each sequence: its row of the batch, its first token and the one after its last."""
    if cu_seqlens is None:
        return [(slice(b, b + 1), 0, q.shape[1]) for b in range(q.shape[0])]
    return [(slice(0, 1), a, b) for a, b in pairwise(cu_seqlens.tolist())]
