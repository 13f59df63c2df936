"""Gated slot attention (Zhang et al. 2024, arXiv 2409.07146, section 3): M slots of keys and values, each with its own
decay, read by a softmax over the slots: K̃_t = diag(exp g_t) K̃_{t-1} + s_t k_tᵀ, p_t = softmax(scale · K̃_t q_t),
Ṽ_t = diag(exp g_t) Ṽ_{t-1} + s_t v_tᵀ, o_t = Ṽ_tᵀ p_t. The paper's layer has s_t = 1 − exp g_t.
"""

from __future__ import annotations

import torch
from torch import Tensor

from icrl_kernels.linear_attention import common
from icrl_kernels.linear_attention.op import Op, pair

State = tuple[Tensor, Tensor]


def gsa_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    g: Tensor | None = None,
    scale: float | None = None,
    initial_state: State | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, State | None]:
    """The specification of `gsa`: the recurrence token by token in plain torch, differentiable, in any dtype.

    It computes and keeps the state in the widest of float32 and the inputs' dtypes, so float64 in gives float64 states.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    if g is not None:
        wide = torch.promote_types(wide, g.dtype)
    Hk, K, V, M = k.shape[2], k.shape[3], v.shape[3], s.shape[3]
    scale = float(q.shape[-1] ** -0.5) if scale is None else scale
    spans = common.spans(q, cu_seqlens)
    outputs, all_keys, all_values = [], [], []
    for n, (batch, first, last) in enumerate(spans):
        keys = q.new_zeros(Hk, K, M, dtype=wide)
        values = q.new_zeros(Hk, M, V, dtype=wide)
        if initial_state is not None:
            keys, values = initial_state[0][n].to(wide), initial_state[1][n].to(wide)
        for t in range(first, last):
            if g is not None:
                decay = g[batch, t].to(wide).exp().squeeze(0)  # [Hk, M]
                keys, values = decay[:, None, :] * keys, decay[:, :, None] * values
            write = s[batch, t].to(wide).squeeze(0)
            keys = keys + k[batch, t].to(wide).squeeze(0)[:, :, None] * write[:, None, :]
            values = values + write[:, :, None] * v[batch, t].to(wide).squeeze(0)[:, None, :]
            query = q[batch, t].to(wide).squeeze(0).unflatten(0, (Hk, q.shape[2] // Hk))  # [Hk, group, K]
            p = (scale * (query @ keys)).softmax(-1)
            outputs.append((p @ values).flatten(0, 1))
        all_keys.append(keys)
        all_values.append(values)
    shape = (*q.shape[:3], V)
    o = torch.stack(outputs).reshape(shape).to(v.dtype) if outputs else v.new_zeros(shape)
    if not output_final_state:
        return o, None
    if not spans:
        return o, (q.new_zeros(0, Hk, K, M, dtype=wide), q.new_zeros(0, Hk, M, V, dtype=wide))
    return o, (torch.stack(all_keys), torch.stack(all_values))


def gsa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    g: Tensor | None = None,
    scale: float | None = None,
    initial_state: State | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, State | None]:
    """Gated slot attention over whole sequences, by chunks, differentiable: K̃_t = diag(exp g_t) K̃_{t-1} + s_t k_tᵀ,
    p_t = softmax(scale · K̃_t q_t) over the M slots, Ṽ_t = diag(exp g_t) Ṽ_{t-1} + s_t v_tᵀ, o_t = Ṽ_tᵀ p_t.

    Args:
        q: [B, T, H, K]. H may be a multiple of Hk: query head h reads key/value head h // (H // Hk).
        k, v, s: [B, T, Hk, K], [B, T, Hk, V] and [B, T, Hk, M], of q's dtype: float32, bfloat16, float16 (K, M up to
            512, V to 4096), or float64, which the reference backend serves. s_t is what a token writes to each slot; it is
            taken as it is. Sums, the softmax and states are float32 (float64 there).
        g: natural logarithms of the slots' decays, ≤ 0: [B, T, Hk, M], float32 (best) or q's dtype, or None: no decay
            (flash-linear-attention's g=None is another thing: it makes g and s out of s's running logsumexp).
            −inf empties a slot. A gate above `GATE_ALLOWANCE` is an error on the CPU; a GPU does not look. A NaN gate makes
            NaN of what depends on it, as any NaN does.
        scale: default K^-1/2.
        initial_state: the pair (K̃ᵀ [N, Hk, K, M], Ṽ [N, Hk, M, V]) float32, laid out as flash-linear-attention's,
            N = B or the number of packed sequences; default zeros.
        output_final_state: whether to return the state after the last token.
        cu_seqlens: [N + 1] int32 or int64, with B = 1: sequence n is tokens cu_seqlens[n] to cu_seqlens[n + 1] - 1.
            Sequences may be empty. Its values are checked on the CPU. On a GPU, where reading them would make the host
            wait, Triton clamps values out of order or range into 0 to T: nothing outside is read or written, and tokens
            of no sequence get undefined outputs.
        backend: "auto", "cpu", "triton" or "reference".

    Returns:
        o [B, T, H, V] in the inputs' dtype, and the final state, a pair as `initial_state`, or None.

    No output depends on a later token, to the bit. Inputs that are not contiguous are copied. Autocast does not cast
    this op's inputs: pass the dtypes you mean. Only inputs are saved for backward, which recomputes states and p.

    Raises:
        ValueError: for shapes, dtypes, devices or values other than these, naming the argument.
    """
    return OP((q, k, v, s, g), scale, initial_state, output_final_state, cu_seqlens, backend)


def gsa_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    g: Tensor | None,
    state: State,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """One token of `gsa`: updates the two tensors of `state` in place and returns o [B, H, V]. No gradient.

    Args:
        q, k, v, s: [B, H, K], [B, Hk, K], [B, Hk, V], [B, Hk, M], of one dtype: float32, bfloat16 or float16.
        g: None or [B, Hk, M], as for `gsa`.
        state: the pair ([B, Hk, K, M], [B, Hk, M, V]) float32, contiguous; changed in place.
        scale: default K^-1/2.
        backend: "auto", "cpu", "triton" or "reference".

    Raises:
        ValueError: as `gsa`, and where an input requires a gradient while gradients are on. When a gate is refused the
            state has changed all the same.
    """
    return OP.step(backend, q, k, v, s, g, *pair("state", state), scale)


OP = Op(
    "gsa",
    reference=gsa_reference,
    tokens={"q": "B T H K", "k": "B T Hk K", "v": "B T Hk V", "s": "B T Hk M", "g": "B T Hk M ?"},
    states={"keys": "N Hk K M", "values": "N Hk M V"},
    output="B T H V",
    gates=("g",),
    heads=("q", "k"),
    c_sizes="N H Hk K V M",
    c_dtypes="q g",
)
