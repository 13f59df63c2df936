"""The linear-attention ops as the benches see them: inputs, the op, its reference, its peers, its work.

`flops` counts, per token and head, the multiplies and adds of chunks of 16 tokens: scores as whole squares, what they are
multiplied with as triangles. Backward includes the states and scores that it computes again. K = V = D, and 64 slots for
gsa (D where D is smaller).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize

import icrl_kernels as ik
from icrl_kernels import testing

CHUNK = 16
TRIANGLE = CHUNK + 1  # a chunk's lower triangle with its diagonal, times 2 / CHUNK: FLOP per token and column


@dataclass(frozen=True)
class Op:
    gates: tuple[str, ...]
    inputs: Callable[..., list[Tensor | None]]  # (B, T, H, D, gate, device, dtype)
    run: Callable[..., Any]
    reference: Callable[..., Any]
    torch: Callable[..., Any]  # (*inputs, chunk=...)
    chunks: tuple[int, ...]  # what the torch form is tried at; its best counts
    states: Callable[..., Any]  # (B, H, D, device): zeros
    step: Callable[..., Any]  # (one token's inputs, state)
    torch_step: Callable[..., Any]
    flops: Callable[[int], tuple[float, float]]  # (D): forward; forward and backward


def _random(B: int, T: int, H: int, D: int, device: str, dtype: torch.dtype) -> Tensor:
    return torch.randn(B, T, H, D, device=device, dtype=dtype)


def _gates(B: int, T: int, H: int, D: int, gate: str, device: str) -> Tensor | None:
    shape = {"none": None, "scalar": (B, T, H), "channel": (B, T, H, D)}[gate]
    return None if shape is None else logsigmoid(torch.randn(shape, device=device)) / 16


def _state(B: int, H: int, D: int, device: str) -> Tensor:
    return torch.zeros(B, H, D, D, device=device)


def _slots(D: int) -> int:
    return min(D, 64)


def _gla_inputs(B, T, H, D, gate, device, dtype):
    return [*(_random(B, T, H, D, device, dtype) for _ in range(3)), _gates(B, T, H, D, gate, device)]


def _gla_torch_step(x, state):
    q, k, v, g = x
    if g is not None:
        state.mul_(g.exp().reshape(*g.shape, *[1] * (4 - g.dim())))
    state.addcmul_(k[..., None], v[..., None, :])
    return (q[..., None, :] @ state).squeeze(-2) * q.shape[-1] ** -0.5


def _delta_inputs(B, T, H, D, gate, device, dtype):
    q, k, v = (_random(B, T, H, D, device, dtype) for _ in range(3))
    return [q, normalize(k, dim=-1), v, _gates(B, T, H, D, gate, device), torch.rand(B, T, H, device=device)]


def _delta_torch_step(x, state):
    q, k, v, g, beta = x
    if g is not None:
        state.mul_(g.exp().reshape(*g.shape, *[1] * (4 - g.dim())))
    u = beta[..., None] * (v - (k[..., None, :] @ state).squeeze(-2))
    state.addcmul_(k[..., None], u[..., None, :])
    return (q[..., None, :] @ state).squeeze(-2) * q.shape[-1] ** -0.5


def _gsa_inputs(B, T, H, D, gate, device, dtype):
    g = logsigmoid(torch.randn(B, T, H, _slots(D), device=device)) / 16
    return [*(_random(B, T, H, D, device, dtype) for _ in range(3)), (1 - g.exp()).to(dtype), g]  # as in the paper


def _gsa_state(B, H, D, device):
    return torch.zeros(B, H, D, _slots(D), device=device), torch.zeros(B, H, _slots(D), D, device=device)


def _gsa_torch_step(x, state):
    (q, k, v, s, g), (keys, values) = x, state
    decay = g.exp()
    keys.mul_(decay[..., None, :]).addcmul_(k[..., None], s[..., None, :])
    values.mul_(decay[..., None]).addcmul_(s[..., None], v[..., None, :])
    p = (q[..., None, :] @ keys * q.shape[-1] ** -0.5).softmax(-1)
    return (p @ values).squeeze(-2)


def _rwkv7_inputs(B, T, H, D, gate, device, dtype):
    """As RWKV-7's layer makes them: decays between exp(-exp(-1/2)) and 1, a = -kk, b = kk * rate."""
    r, k, v, kk, rate = (_random(B, T, H, D, device, dtype) for _ in range(5))
    kk = normalize(kk, dim=-1)
    return [r, -math.exp(-0.5) * torch.rand(B, T, H, D, device=device), k, v, -kk, kk * rate.sigmoid()]


def _rwkv7_torch_step(x, state):
    r, w, k, v, a, b = x
    u = a[..., None, :] @ state
    state.mul_(w.exp()[..., None]).addcmul_(b[..., None], u).addcmul_(k[..., None], v[..., None, :])
    return (r[..., None, :] @ state).squeeze(-2)


def _gla_flops(D: int) -> tuple[float, float]:
    forward = 4 * D * D + 2 * CHUNK * D + TRIANGLE * D
    return forward, forward + 10 * D * D + 4 * CHUNK * D + 3 * TRIANGLE * D


def _delta_flops(D: int) -> tuple[float, float]:
    triangles = 4 * CHUNK * D + 2 * TRIANGLE * D  # two kinds of scores; the solve and the scores' use
    forward = 6 * D * D + triangles
    return forward, forward + 20 * D * D + 2 * triangles + 4 * TRIANGLE * D


def _gsa_flops(D: int) -> tuple[float, float]:
    M = _slots(D)
    forward = 8 * D * M + CHUNK * (2 * D + 2 * M) + TRIANGLE * (D + M)
    again = 6 * D * M + CHUNK * (2 * D + M)
    return forward, forward + again + 16 * D * M + CHUNK * (4 * M + 2 * D) + TRIANGLE * (3 * M + 3 * D)


def _rwkv7_flops(D: int) -> tuple[float, float]:
    # S read by a and r, written by k and b; four kinds of scores; their use and the solve
    forward = 8 * D * D + 8 * CHUNK * D + 4 * TRIANGLE * D
    return forward, forward + 24 * D * D + 24 * CHUNK * D + 16 * TRIANGLE * D


OPS: dict[str, Op] = {
    "gla": Op(
        ("none", "scalar", "channel"), _gla_inputs, ik.gla, ik.gla_reference, testing.gla_chunkwise_torch,
        (32, 64, 128), _state, lambda x, s: ik.gla_step(*x, s), _gla_torch_step, _gla_flops,
    ),
    "gsa": Op(
        ("slot",), _gsa_inputs, ik.gsa, ik.gsa_reference, testing.gsa_chunkwise_torch,
        (32, 64, 128), _gsa_state, lambda x, s: ik.gsa_step(*x, s), _gsa_torch_step, _gsa_flops,
    ),
    "gated_delta_rule": Op(
        ("none", "scalar", "channel"), _delta_inputs, ik.gated_delta_rule, ik.gated_delta_rule_reference,
        testing.gated_delta_rule_chunkwise_torch, (16, 32, 64), _state,
        lambda x, s: ik.gated_delta_rule_step(*x, s), _delta_torch_step, _delta_flops,
    ),
    "rwkv7": Op(
        ("channel",), _rwkv7_inputs, ik.rwkv7, ik.rwkv7_reference, testing.rwkv7_chunkwise_torch,
        (16, 32, 64), _state, lambda x, s: ik.rwkv7_step(*x, s), _rwkv7_torch_step, _rwkv7_flops,
    ),
}  # fmt: skip
