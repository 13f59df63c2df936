"""Gated linear attention: S_t = diag(exp g_t) S_{t-1} + k_t v_tᵀ, o_t = scale · S_tᵀ q_t.

Linear attention (Katharopoulos et al. 2020, g=None), retention and Mamba-2's scalar decay (Sun et al. 2023; Dao and Gu
2024, g [B, T, Hk]) and GLA (Yang et al. 2023, eq. 4, g [B, T, Hk, K]).
"""

from __future__ import annotations

import torch
from torch import Tensor

from icrl_kernels.linear_attention import common
from icrl_kernels.linear_attention.op import Op


def gla_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The specification of `gla`: the recurrence token by token in plain torch, differentiable, in any dtype.

    It computes and keeps the state in the widest of float32 and the inputs' dtypes, so float64 in gives float64 states.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    if g is not None:
        wide = torch.promote_types(wide, g.dtype)
    group = q.shape[2] // k.shape[2]
    scale = float(q.shape[-1] ** -0.5) if scale is None else scale
    outputs, states = [], []
    for n, (batch, first, last) in enumerate(common.spans(q, cu_seqlens)):
        state = q.new_zeros(k.shape[2], k.shape[3], v.shape[3], dtype=wide)  # [Hk, K, V]
        if initial_state is not None:
            state = initial_state[n].to(wide)
        for t in range(first, last):
            if g is not None:
                decay = g[batch, t].to(wide).exp().squeeze(0)  # [Hk] or [Hk, K]
                state = decay.reshape(*decay.shape, *[1] * (3 - decay.dim())) * state
            state = state + k[batch, t].to(wide).squeeze(0)[:, :, None] * v[batch, t].to(wide).squeeze(0)[:, None, :]
            query = q[batch, t].to(wide).squeeze(0).unflatten(0, (k.shape[2], group))  # [Hk, group, K]
            outputs.append(scale * (query @ state).flatten(0, 1))
        states.append(state)
    shape = (*q.shape[:3], v.shape[3])
    o = torch.stack(outputs).reshape(shape).to(v.dtype) if outputs else v.new_zeros(shape)
    final = torch.stack(states) if states else q.new_zeros(0, *k.shape[2:], v.shape[3], dtype=wide)
    return o, final if output_final_state else None


def gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Gated linear attention over whole sequences, by chunks, differentiable: S_t = diag(exp g_t) S_{t-1} + k_t v_tᵀ,
    o_t = scale · S_tᵀ q_t.

    Args:
        q: [B, T, H, K]. H may be a multiple of Hk: query head h reads key/value head h // (H // Hk).
        k, v: [B, T, Hk, K] and [B, T, Hk, V], of q's dtype: float32, bfloat16, float16 (K up to 512, V to 4096), or
            float64, which the reference backend serves. Sums and states are float32 (float64 there).
        g: natural logarithms of decays, ≤ 0: None (no decay), [B, T, Hk] (one per head) or [B, T, Hk, K] (one per key
            channel), float32 (best) or q's dtype. −inf resets the state. A gate above `GATE_ALLOWANCE` is an error on
            the CPU; a GPU does not look. A NaN gate makes NaN of what depends on it, as any NaN does.
        scale: default K^-1/2.
        initial_state: [N, Hk, K, V] float32, N = B or the number of packed sequences; default zeros.
        output_final_state: whether to return the state after the last token.
        cu_seqlens: [N + 1] int32 or int64, with B = 1: sequence n is tokens cu_seqlens[n] to cu_seqlens[n + 1] - 1.
            Sequences may be empty. Its values are checked on the CPU. On a GPU, where reading them would make the host
            wait, Triton clamps values out of order or range into 0 to T: nothing outside is read or written, and tokens
            of no sequence get undefined outputs.
        backend: "auto", "cpu", "triton" or "reference".

    Returns:
        o [B, T, H, V] in the inputs' dtype, and the final state [N, Hk, K, V] float32 or None.

    There is a first derivative in reverse mode; a second one, forward mode and torch.func's derivatives are
    refused (backend="reference" has them). No output depends on a later token, to the bit (but on a GPU a NaN or
    infinity in v may reach up to 63 rows before it, in its own column). Inputs that are not contiguous are copied.
    Autocast does not cast this op's inputs: pass the dtypes you mean. Only inputs are saved for backward, which
    recomputes states.

    Raises:
        ValueError: for shapes, dtypes, devices or values other than these, naming the argument.
    """
    return OP((q, k, v, g), scale, initial_state, output_final_state, cu_seqlens, backend)


def gla_step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor, scale: float | None = None, backend: str = "auto"
) -> Tensor:
    """One token of `gla`: updates `state` in place and returns o [B, H, V]. No gradient.

    Args:
        q, k, v: [B, H, K], [B, Hk, K], [B, Hk, V], of one dtype: float32, bfloat16 or float16.
        g: None, [B, Hk] or [B, Hk, K], as for `gla`.
        state: [B, Hk, K, V] float32, contiguous; changed in place.
        scale: default K^-1/2.
        backend: "auto", "cpu", "triton" or "reference".

    Raises:
        ValueError: as `gla`, and where an input requires a gradient while gradients are on. When a gate is refused the
            state has changed all the same.
    """
    return OP.step(backend, q, k, v, g, state, scale)


OP = Op(
    "gla",
    reference=gla_reference,
    tokens={"q": "B T H K", "k": "B T Hk K", "v": "B T Hk V", "g": "B T Hk | B T Hk K ?"},
    states={"state": "N Hk K V"},
    output="B T H V",
    gates=("g",),
    heads=("q", "k"),
    c_sizes="N H Hk K V",
    c_dtypes="q g",
)
