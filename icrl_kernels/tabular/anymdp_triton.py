"""AnyMDP's transition rows in one pass: what `_rows` of anymdp_reference.py does to tables in a dozen, for GPUs.

Symbols. Tensors are contiguous.
  B, S, A      tasks; states of the largest task; actions
  W            constexpr, the power of two that holds S, at least 16: next states of a program
  key          int64 [B], the stream of a task's weights
  size         int64 [B], states of a task
  first, end   int64 [B, S], a state's window of successors, first to end - 1; empty where it has none
  sigma        float64 [B, S], width of a state's bells, in states
  center       float64 [B, S, A], center of each action's bell
  self_loop    float64 [1], what a state's own weight is multiplied by
  out          float64 [B, S, A, S], the rows: probabilities of next states, rounded to float32
  z, u         int64 and float64 of any shape: hashed numbers, uniform numbers

A program has one state of one task. Weights of next states are hashed and bells of actions computed in registers, twice
rather than kept; rows are written once, in float64 of float32's precision.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

GOLDEN = tl.constexpr(0x9E3779B97F4A7C15 - (1 << 64))
FIRST = tl.constexpr(0xBF58476D1CE4E5B9 - (1 << 64))
SECOND = tl.constexpr(0x94D049BB133111EB - (1 << 64))


@triton.jit
def _unit(z):
    """splitmix64 of int64, as a uniform number in [0, 1)."""
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * FIRST
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * SECOND
    z = z ^ ((z >> 31) & 0x1FFFFFFFF)
    return ((z >> 11) & 0x1FFFFFFFFFFFFF).to(tl.float64) * 1.1102230246251565e-16


@triton.jit
def _clipped_normal(u):
    """clip(N(0,1), .1, 1): the central form of Wichura's PPND16 (AS 241), as in csrc/tabular/anymdp_random.inl."""
    # a bare number would reach minimum and maximum as float32
    low, high = tl.full([], 0.5398278372770290, tl.float64), tl.full([], 0.8413447460685429, tl.float64)
    q = tl.minimum(tl.maximum(u, low), high) - 0.5
    r = 0.180625 - q * q
    a = r * 2.5090809287301226727e3 + 3.3430575583588128105e4
    a = a * r + 6.7265770927008700853e4
    a = a * r + 4.5921953931549871457e4
    a = a * r + 1.3731693765509461125e4
    a = a * r + 1.9715909503065514427e3
    a = a * r + 1.3314166789178437745e2
    a = a * r + 3.3871328727963666080
    b = r * 5.2264952788528545610e3 + 2.8729085735721942674e4
    b = b * r + 3.9307895800092710610e4
    b = b * r + 2.1213794301586595867e4
    b = b * r + 5.3941960214247511077e3
    b = b * r + 6.8718700749205790830e2
    b = b * r + 4.2313330701600911252e1
    b = b * r + 1.0
    return tl.minimum(tl.maximum(q * a / b, tl.full([], 0.1, tl.float64)), 1.0)


@triton.jit
def _rows(key, size, first, end, sigma, center, self_loop, out, S, A, W: tl.constexpr):
    """Grid B·S: a state of a task, with all its actions. Reads key, size, first, end, sigma, center, self_loop. Writes
    out's A rows; they are zero where the window is empty."""
    row = tl.program_id(0).to(tl.int64)
    task, s = row // S, row % S
    j = tl.arange(0, W).to(tl.int64)
    lo, hi = tl.load(first + row), tl.load(end + row)
    out += row * A * S + j
    if lo >= hi:
        for a in range(A):
            tl.store(out + a * S, tl.zeros([W], tl.float64), mask=j < S)
    else:
        ns = tl.load(size + task)
        weight = _clipped_normal(_unit(tl.load(key + task) + (s * ns + j + 1) * GOLDEN))
        weight = tl.where((j >= lo) & (j < hi), weight, 0.0)
        own = tl.where(s == ns - 1, 0.0, tl.load(self_loop))
        weight = tl.where(j == s, weight * own, weight)
        width = tl.load(sigma + row)

        total = tl.zeros([W], tl.float64)
        least = tl.full([W], float("inf"), tl.float64)
        nearest = tl.zeros([W], tl.int32)
        its_bell = tl.zeros([W], tl.float64)
        for a in range(A):
            c = tl.load(center + row * A + a)
            d = c / width - j.to(tl.float64) / width
            bell = tl.exp(-d * d)
            distance = tl.abs(c - j.to(tl.float64))
            closer = distance < least
            total += bell
            least = tl.where(closer, distance, least)
            nearest = tl.where(closer, a, nearest)
            its_bell = tl.where(closer, bell, its_bell)
        far = (total < 1e-10) & (weight != 0)  # from every action: the nearest one takes it
        total = tl.where(far, total + (1.0 - its_bell), total)
        share = tl.where(weight == 0, 0.0, weight / (tl.sum(weight) * tl.where(weight == 0, 1.0, total)))
        for a in range(A):
            c = tl.load(center + row * A + a)
            d = c / width - j.to(tl.float64) / width
            x = tl.where(far & (nearest == a), 1.0, tl.exp(-d * d)) * share
            p = (x * (1.0 / tl.sum(x))).to(tl.float32)
            p = tl.where(p > 1.1754943508222875e-38, p, 0.0)  # no denormals
            tl.store(out + a * S, p.to(tl.float64), mask=j < S)


def transition_rows(
    key: Tensor, size: Tensor, first: Tensor, end: Tensor, sigma: Tensor, center: Tensor, self_loop: float
) -> Tensor:
    """[B,S,A,S] float64.

    Args:
        key: [B] int64, of the weights' stream. size: [B] int64. first, end: [B,S] int64, a state's window of successors,
            empty where it has none. sigma: [B,S] float64. center: [B,S,A] float64.
        self_loop: what a state's own weight is multiplied by.
    """
    b, s, a = center.shape
    out = torch.empty(b, s, a, s, dtype=torch.float64, device=center.device)
    width = max(16, triton.next_power_of_2(s))
    given = [x.contiguous() for x in (key, size, first, end, sigma, center)]
    loop = torch.full((1,), self_loop, dtype=torch.float64, device=center.device)
    if b:
        _rows[(b * s,)](*given, loop, out, s, a, W=width, num_warps=max(1, min(8, width // 64)))
    return out
