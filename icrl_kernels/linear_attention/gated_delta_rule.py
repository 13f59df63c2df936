"""The gated delta rule: S' = diag(exp g_t) S_{t-1}, u_t = beta_t (v_t − S'ᵀ k_t), S_t = S' + k_t u_tᵀ, o_t = scale · S_tᵀ q_t.

The delta rule (Schlag et al. 2021; by chunks, Yang et al. 2024, g=None), Gated DeltaNet (Yang, Kautz and Hatamizadeh
2024, eq. 10, g [B, T, H]) and Kimi Delta Attention (Kimi Team 2025, eq. 1, g [B, T, H, K]).
"""

from __future__ import annotations

import torch
from torch import Tensor

from icrl_kernels.linear_attention import common
from icrl_kernels.linear_attention.op import Op

L2_EPSILON = 1e-6
"""qk_l2norm divides by sqrt(sum of squares + this). As kNormEpsilon in csrc/linear_attention/gated_delta_rule.inl."""


def _l2norm(x: Tensor) -> Tensor:
    return x * (x.square().sum(-1, keepdim=True) + L2_EPSILON).rsqrt()


def gated_delta_rule_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    qk_l2norm: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The specification of `gated_delta_rule`: the recurrence token by token in plain torch, differentiable, any dtype.

    It computes and keeps the state in the widest of float32 and the inputs' dtypes, so float64 in gives float64 states.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    for t in (g, beta):
        wide = wide if t is None else torch.promote_types(wide, t.dtype)
    H, group = v.shape[2], v.shape[2] // k.shape[2]
    scale = float(q.shape[-1] ** -0.5) if scale is None else scale
    outputs, states = [], []
    for n, (batch, first, last) in enumerate(common.spans(q, cu_seqlens)):
        state = q.new_zeros(H, k.shape[3], v.shape[3], dtype=wide)
        if initial_state is not None:
            state = initial_state[n].to(wide)
        for t in range(first, last):
            query, key = q[batch, t].to(wide).squeeze(0), k[batch, t].to(wide).squeeze(0)  # [Hk, K]
            if qk_l2norm:
                query, key = _l2norm(query), _l2norm(key)
            query, key = query.repeat_interleave(group, 0), key.repeat_interleave(group, 0)  # [H, K]
            if g is not None:
                decay = g[batch, t].to(wide).exp().squeeze(0)  # [H] or [H, K]
                state = decay.reshape(*decay.shape, *[1] * (3 - decay.dim())) * state
            update = v[batch, t].to(wide).squeeze(0) - (key[:, None] @ state).squeeze(1)  # [H, V]
            if beta is not None:
                update = beta[batch, t].to(wide).squeeze(0)[:, None] * update
            state = state + key[:, :, None] * update[:, None, :]
            outputs.append(scale * (query[:, None] @ state).squeeze(1))
        states.append(state)
    o = torch.stack(outputs).reshape(v.shape).to(v.dtype) if outputs else v.new_zeros(v.shape)
    final = torch.stack(states) if states else q.new_zeros(0, H, k.shape[3], v.shape[3], dtype=wide)
    return o, final if output_final_state else None


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    qk_l2norm: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """The gated delta rule over whole sequences, by chunks, differentiable: S' = diag(exp g_t) S_{t-1},
    u_t = beta_t (v_t − S'ᵀ k_t), S_t = S' + k_t u_tᵀ, o_t = scale · S_tᵀ q_t.

    The state is a memory: what it returns for k_t moves towards v_t by the share beta_t (all the way at 1, past it at 2,
    for keys of norm 1). The recurrence is stable while 0 ≤ beta ‖k‖² ≤ 2; beyond that it grows, here as by definition.

    Args:
        q, k: [B, T, Hk, K], of one dtype with v: float32, bfloat16, float16 (K up to 512, V to 4096), or float64, which
            the reference backend serves. Sums and states are float32 (float64 there).
        v: [B, T, H, V]. H may be a multiple of Hk: value head h has its own state, gates and beta and reads q and k of
            head h // (H // Hk), as the published hybrid models have it (Qwen3-Next: 16 heads of q and k, 32 of v).
            `gla` groups the other way round, several queries of one state, as softmax attention does.
        g: natural logarithms of decays, ≤ 0: None (no decay), [B, T, H] (one per head) or [B, T, H, K] (one per key
            channel), float32 (best) or q's dtype. −inf resets the state. A gate above `GATE_ALLOWANCE` is an error on
            the CPU; a GPU does not look. A NaN gate makes NaN of what depends on it, as any NaN does.
        beta: [B, T, H], float32 or q's dtype, of any value; None is 1.
        scale: default K^-1/2.
        initial_state: [N, H, K, V] float32, N = B or the number of packed sequences; default zeros.
        output_final_state: whether to return the state after the last token.
        cu_seqlens: [N + 1] int32 or int64, with B = 1: sequence n is tokens cu_seqlens[n] to cu_seqlens[n + 1] - 1.
            Sequences may be empty. Its values are checked on the CPU. On a GPU, where reading them would make the host
            wait, Triton clamps values out of order or range into 0 to T: nothing outside is read or written, and tokens
            of no sequence get undefined outputs.
        qk_l2norm: divide q and k by sqrt(‖·‖² + 1e-6) per token and head first, with gradients through it.
        backend: "auto", "cpu", "triton" or "reference".

    Returns:
        o [B, T, H, V] in the inputs' dtype, and the final state [N, H, K, V] float32 or None.

    No output depends on a later token, to the bit. Inputs that are not contiguous are copied. Autocast does not cast
    this op's inputs: pass the dtypes you mean. Only inputs are saved for backward, which recomputes states.

    Raises:
        ValueError: for shapes, dtypes, devices or values other than these, naming the argument.
    """
    return OP((q, k, v, g, beta), scale, initial_state, output_final_state, cu_seqlens, backend, qk_l2norm)


def gated_delta_rule_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    state: Tensor,
    scale: float | None = None,
    qk_l2norm: bool = False,
    backend: str = "auto",
) -> Tensor:
    """One token of `gated_delta_rule`: updates `state` in place and returns o [B, H, V]. No gradient.

    Args:
        q, k, v: [B, Hk, K], [B, Hk, K], [B, H, V], of one dtype: float32, bfloat16 or float16.
        g: None, [B, H] or [B, H, K]. beta: None or [B, H]. Both as for `gated_delta_rule`.
        state: [B, H, K, V] float32, contiguous; changed in place.
        scale: default K^-1/2.

    Raises:
        ValueError: as `gated_delta_rule`, and where an input requires a gradient while gradients are on. When a gate is
            refused the state has changed all the same.
    """
    return OP.step(backend, q, k, v, g, beta, state, qk_l2norm, scale)


OP = Op(
    "gated_delta_rule",
    reference=gated_delta_rule_reference,
    tokens={"q": "B T Hk K", "k": "B T Hk K", "v": "B T H V", "g": "B T H | B T H K ?", "beta": "B T H ?"},
    states={"state": "N H K V"},
    output="B T H V",
    gates=("g", "beta"),
    heads=("v", "k"),
    c_sizes="N H Hk K V",
    c_dtypes="q g beta",
    kernel="delta",
    flags=("qk_l2norm",),
    per_head=("q", "k"),
)
