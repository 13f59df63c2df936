"""RWKV-7's generalized delta rule: S_t = diag(exp w_t) S_{t-1} + b_t (a_tᵀ S_{t-1}) + k_t v_tᵀ, o_t = scale · S_tᵀ r_t.

RWKV-7 "Goose" (Peng et al. 2025, arXiv 2503.14456, section 4: its state is the transpose of this one, its a is -κ̂, its b
κ̂ times the in-context learning rate). `gated_delta_rule` is the case a = -exp(w) k, b = beta k, with beta k for k.
"""

from __future__ import annotations

import torch
from torch import Tensor

from icrl_kernels.linear_attention import common
from icrl_kernels.linear_attention.op import Op


def rwkv7_reference(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float | None = 1.0,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The specification of `rwkv7`: the recurrence token by token in plain torch, differentiable, any dtype.

    It computes and keeps the state in the widest of float32 and the inputs' dtypes, so float64 in gives float64 states.
    """
    wide = torch.promote_types(torch.promote_types(r.dtype, torch.float32), w.dtype)
    H, K, V = *r.shape[2:], v.shape[3]
    scale = common.default_scale(scale, r)
    outputs, states = [], []
    for n, (batch, first, last) in enumerate(common.spans(r, cu_seqlens)):
        state = r.new_zeros(H, K, V, dtype=wide)
        if initial_state is not None:
            state = initial_state[n].to(wide)
        for t in range(first, last):
            query, gate, key, value, reader, writer = (x[batch, t].to(wide).squeeze(0) for x in (r, w, k, v, a, b))
            read = reader[:, None] @ state  # [H, 1, V]
            state = gate.exp()[:, :, None] * state + writer[:, :, None] * read + key[:, :, None] * value[:, None]
            outputs.append(scale * (query[:, None] @ state).squeeze(1))
        states.append(state)
    o = torch.stack(outputs).reshape(v.shape).to(v.dtype) if outputs else v.new_zeros(v.shape)
    final = torch.stack(states) if states else r.new_zeros(0, H, K, V, dtype=wide)
    return o, final if output_final_state else None


def rwkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float | None = 1.0,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """RWKV-7's generalized delta rule over whole sequences, by chunks, differentiable:
    S_t = diag(exp w_t) S_{t-1} + b_t (a_tᵀ S_{t-1}) + k_t v_tᵀ, o_t = scale · S_tᵀ r_t.

    `a_t` reads the state before it decays, `b_t` writes what was read. RWKV-7 passes a = -κ̂ and b = κ̂ ⊙ η with κ̂ of norm
    1 and rates η in [0, 1], for which the recurrence is stable; a and b of other kinds may make it grow, here as by
    definition. The arguments are those of flash-linear-attention's chunk_rwkv7, in its order.

    Args:
        r, k, a, b: [B, T, H, K], of one dtype with v: float32, bfloat16, float16 (K up to 512, V to 4096), or float64,
            which the reference backend serves. Sums and states are float32 (float64 there).
        w: [B, T, H, K], natural logarithms of decays, ≤ 0, float32 (best) or r's dtype. RWKV-7's lie between -exp(-1/2)
            and 0. −inf empties a channel of the state but for what b_t and k_t write. A gate above `GATE_ALLOWANCE` is
            an error on the CPU; a GPU does not look. A NaN gate makes NaN of what depends on it, as any NaN does.
        v: [B, T, H, V].
        scale: 1, as RWKV-7 has it; None is K^-1/2.
        initial_state: [N, H, K, V] float32, N = B or the number of packed sequences; default zeros.
        output_final_state: whether to return the state after the last token.
        cu_seqlens: [N + 1] int32 or int64, with B = 1: sequence n is tokens cu_seqlens[n] to cu_seqlens[n + 1] - 1.
            Sequences may be empty. Its values are checked on the CPU. On a GPU, where reading them would make the host
            wait, Triton clamps values out of order or range into 0 to T: nothing outside is read or written, and tokens
            of no sequence get undefined outputs.
        backend: "auto", "cpu", "triton" or "reference".

    Returns:
        o [B, T, H, V] in the inputs' dtype, and the final state [N, H, K, V] float32 or None.

    No output depends on a later token, to the bit. Inputs that are not contiguous are copied. Autocast does not cast
    this op's inputs: pass the dtypes you mean. Only inputs are saved for backward, which recomputes states.

    Raises:
        ValueError: for shapes, dtypes, devices or values other than these, naming the argument.
    """
    return OP((r, w, k, v, a, b), scale, initial_state, output_final_state, cu_seqlens, backend)


def rwkv7_step(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor,
    scale: float | None = 1.0,
    backend: str = "auto",
) -> Tensor:
    """One token of `rwkv7`: updates `state` in place and returns o [B, H, V]. No gradient.

    Args:
        r, k, a, b, v: [B, H, K] and v [B, H, V], of one dtype: float32, bfloat16 or float16.
        w: [B, H, K], float32 or r's dtype, natural logarithms of decays.
        state: [B, H, K, V] float32, contiguous; changed.
        scale, backend: as in `rwkv7`.

    Raises:
        ValueError: for shapes, dtypes, devices or gates other than these, naming the argument; and, unless
            torch.no_grad() is on, for an argument that requires a gradient. Where a gate is refused the state has
            changed all the same.
    """
    return OP.step(backend, r, w, k, v, a, b, state, scale)


OP = Op(
    "rwkv7",
    reference=rwkv7_reference,
    tokens={"r": "B T H K", "w": "B T H K", "k": "B T H K", "v": "B T H V", "a": "B T H K", "b": "B T H K"},
    states={"state": "N H K V"},
    output="B T H V",
    gates=("w",),
    heads=None,
    c_sizes="N H K V",
    c_dtypes="r w",
)
