"""The gated delta rule: S' = diag(exp g_t) S_{t-1}, u_t = beta_t (v_t − S'ᵀ k_t), S_t = S' + k_t u_tᵀ, o_t = scale · S_tᵀ q_t.

The delta rule (Schlag et al. 2021; by chunks, Yang et al. 2024, g=None), Gated DeltaNet (Yang, Kautz and Hatamizadeh
2024, eq. 10, g [B, T, H]) and Kimi Delta Attention (Kimi Team 2025, eq. 1, g [B, T, H, K]).
"""

from __future__ import annotations

import torch
from torch import Tensor

from icrl_kernels import _C, _attention, _checks, _registry
from icrl_kernels._attention import DTYPES, GATE_ALLOWANCE, MAX_HEAD_DIM

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
    for n, (batch, first, last) in enumerate(_attention.spans(q, cu_seqlens)):
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
        q, k: [B, T, Hk, K], of one dtype with v: float32, bfloat16, float16 (K, V up to 256), or float64, which the
            reference backend serves. Sums and states are float32 (float64 there).
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
            Sequences may be empty. Its values are checked on the CPU, and trusted on a GPU, where reading them
            would make the host wait.
        qk_l2norm: divide q and k by sqrt(‖·‖² + 1e-6) per token and head first, with gradients through it.
        backend: "auto", "cpu", "triton" or "reference".

    Returns:
        o [B, T, H, V] in the inputs' dtype, and the final state [N, H, K, V] float32 or None.

    No output depends on a later token, to the bit. Inputs that are not contiguous are copied. Autocast does not cast
    this op's inputs: pass the dtypes you mean. Only inputs are saved for backward, which recomputes states.

    Raises:
        ValueError: for shapes, dtypes, devices or values other than these, naming the argument.
    """
    _check(q, k, v, g, beta, initial_state, cu_seqlens)
    scale = _attention.default_scale(scale, q)
    if backend == "reference" or (backend == "auto" and q.dtype == torch.float64):
        if q.device.type == "cpu" and not _checks.compiling():  # the kernels check as they read
            _attention.check_values(q, g, cu_seqlens)
        return gated_delta_rule_reference(
            q, k, v, g, beta, scale, initial_state, output_final_state, cu_seqlens, qk_l2norm
        )
    _attention.refuse_transforms("gated_delta_rule", q, k, v, g, beta, initial_state)
    o, final_state = torch.ops.icrl.gated_delta_rule(
        q, k, v, g, beta, scale, initial_state, cu_seqlens, qk_l2norm, backend
    )
    return o, final_state if output_final_state else None


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
    o = _attention.plain_step(_C.delta_step_plain, backend, q, k, v, g, beta, state, qk_l2norm, scale)
    if o is not None:
        return o
    if q.dim() != 3:
        _checks.shape("q", q, ("B", "Hk", "K"))
    scale = _attention.default_scale(scale, q)
    _attention.refuse_transforms("gated_delta_rule_step", q, k, v, g, beta, state)
    _checks.same_device(q=q, k=k, v=v, g=g, beta=beta, state=state)
    return torch.ops.icrl.gated_delta_rule_step(q, k, v, g, beta, state, scale, qk_l2norm, backend)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    _checks.shape("q", q, ("B", "T", "Hk", "K"))
    B, T, Hk, K = q.shape
    _checks.shape("k", k, ("B", "T", "Hk", "K"), B=B, T=T, Hk=Hk, K=K)
    _checks.shape("v", v, ("B", "T", "H", "V"), B=B, T=T)
    H, V = v.shape[2:]
    _attention.check_heads("v", "k", H, Hk, K, V)
    _checks.same_device(q=q, k=k, v=v, g=g, beta=beta, initial_state=initial_state, cu_seqlens=cu_seqlens)
    _checks.dtype("q", q, (*DTYPES, torch.float64))
    _checks.same_dtype(q=q, k=k, v=v)
    if g is not None:
        _checks.shape("g", g, ("B", "T", "H") if g.dim() == 3 else ("B", "T", "H", "K"), B=B, T=T, H=H, K=K)
        _checks.dtype("g", g, tuple({q.dtype: 0, torch.float32: 0}))
    if beta is not None:
        _checks.shape("beta", beta, ("B", "T", "H"), B=B, T=T, H=H)
        _checks.dtype("beta", beta, tuple({q.dtype: 0, torch.float32: 0}))
    _attention.check_sequences(q, initial_state, cu_seqlens, H=H, K=K, V=V)


# CPU backend


def _shape(
    q: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None, scale: float, bounds: Tensor, l2norm: bool, keys: int
) -> tuple:
    """What csrc/linear_attention/gated_delta_rule.cpp calls a Shape; `keys` is the code of dq's and dk's dtype."""
    gate, gate_dtype = (0, 0) if g is None else (g.dim() - 2, DTYPES[g.dtype])
    sizes = (bounds.numel() - 1, v.shape[2], q.shape[2], q.shape[3], v.shape[3], bounds.data_ptr())
    dtypes = (DTYPES[q.dtype], gate_dtype, 0 if beta is None else DTYPES[beta.dtype], keys)
    return (*sizes, *dtypes, gate, l2norm, scale, GATE_ALLOWANCE, torch.get_num_threads())


def _cpu_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    qk_l2norm: bool,
) -> tuple[Tensor, Tensor]:
    _attention.native("gated_delta_rule", q)
    _check(q, k, v, g, beta, initial_state, cu_seqlens)
    bounds = _attention.bounds(q, cu_seqlens)
    o, final = _outputs(q, v, cu_seqlens)
    shape = _shape(q, v, g, beta, scale, bounds, qk_l2norm, 0)
    inputs = [_attention.contiguous(t) for t in (q, k, v, g, beta, initial_state)]
    if not _C.delta_forward(shape, *map(_attention.pointer, (*inputs, o, final))):
        raise _attention.gate_error()
    return o, final


def _cpu_backward(
    do: Tensor,
    dfinal_state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    qk_l2norm: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    code = _attention.native("gated_delta_rule", q)
    _check(q, k, v, g, beta, initial_state, cu_seqlens)
    group = v.shape[2] // q.shape[2]
    bounds = _attention.bounds(q, cu_seqlens)
    N, (H, V) = bounds.numel() - 1, v.shape[2:]
    _attention.check_output_gradients(q, do, v.shape, dfinal_state=(dfinal_state, (N, H, q.shape[3], V)))
    dq, dk, dv, dg, dbeta, dinitial = _attention.gradients_like(q, k, v, g, beta, initial_state)
    if group > 1:  # each value head writes its own, and these are summed in their order
        dq, dk = (q.new_empty((*v.shape[:3], q.shape[3]), dtype=torch.float32) for _ in range(2))
    shape = _shape(q, v, g, beta, scale, bounds, qk_l2norm, code if group == 1 else 0)
    inputs = [_attention.contiguous(t) for t in (do, dfinal_state, q, k, v, g, beta, initial_state)]
    optional = (None if t is None else d for t, d in ((g, dg), (beta, dbeta), (initial_state, dinitial)))
    _C.delta_backward(shape, *map(_attention.pointer, (*inputs, dq, dk, dv, *optional)))
    if group > 1:
        dq, dk = (t.unflatten(2, (-1, group)).sum(3).to(q.dtype) for t in (dq, dk))
    return dq, dk, dv, dg, dbeta, dinitial


def _cpu_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    state: Tensor,
    scale: float,
    qk_l2norm: bool,
) -> Tensor:
    B, Hk, H, K, V = _check_step(q, k, v, g, beta, state)
    q, k, v, g, beta = q.contiguous(), k.contiguous(), v.contiguous(), *map(_attention.contiguous, (g, beta))
    o = torch.empty((B, H, V), dtype=q.dtype)
    gate, gate_dtype = (0, 0) if g is None else (g.dim() - 1, DTYPES[g.dtype])
    dtypes = (DTYPES[q.dtype], gate_dtype, 0 if beta is None else DTYPES[beta.dtype], 0)
    shape = (B, H, Hk, K, V, 0, *dtypes, gate, qk_l2norm, scale, GATE_ALLOWANCE, torch.get_num_threads())
    if not _C.delta_step(shape, *map(_attention.pointer, (q, k, v, g, beta, state, o))):
        raise _attention.gate_error()
    return o


def _check_step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None, state: Tensor
) -> tuple[int, int, int, int, int]:
    """Returns B, Hk, H, K, V. As cheap as can be where all is well: a step takes microseconds."""
    if torch.is_grad_enabled():
        for name, t in (("q", q), ("k", k), ("v", v), ("g", g), ("beta", beta), ("state", state)):
            if t is not None and t.requires_grad:
                raise ValueError(
                    f"{name}: gated_delta_rule_step has no gradient; use gated_delta_rule, or torch.no_grad() around it"
                )
    dtype, device, q_shape, v_shape = q.dtype, q.device, tuple(q.shape), tuple(v.shape)
    if len(q_shape) == len(v_shape) == 3:
        (B, Hk, K), (_, H, V) = q_shape, v_shape
        if (
            k.shape == q_shape
            and v_shape[0] == B
            and state.shape == (B, H, K, V)
            and Hk
            and H
            and H % Hk == 0
            and 0 < K <= MAX_HEAD_DIM
            and 0 < V <= MAX_HEAD_DIM
            and dtype in DTYPES
            and dtype == k.dtype == v.dtype
            and state.dtype == torch.float32
            and device == k.device == v.device == state.device
            and state.is_contiguous()
            and (
                g is None
                or (g.shape in ((B, H, K), (B, H)) and g.dtype in (torch.float32, dtype) and g.device == device)
            )
            and (
                beta is None
                or (beta.shape == (B, H) and beta.dtype in (torch.float32, dtype) and beta.device == device)
            )
        ):
            return B, Hk, H, K, V
    _checks.shape("q", q, ("B", "Hk", "K"))
    B, Hk, K = q.shape
    _checks.shape("k", k, ("B", "Hk", "K"), B=B, Hk=Hk, K=K)
    _checks.shape("v", v, ("B", "H", "V"), B=B)
    H, V = v.shape[1:]
    _attention.check_heads("v", "k", H, Hk, K, V)
    _checks.shape("state", state, ("B", "H", "K", "V"), B=B, H=H, K=K, V=V)
    _checks.same_device(q=q, k=k, v=v, g=g, beta=beta, state=state)
    _checks.dtype("q", q, tuple(DTYPES))
    _checks.same_dtype(q=q, k=k, v=v)
    _checks.dtype("state", state, (torch.float32,))
    if not state.is_contiguous():
        raise ValueError("state: wanted a contiguous tensor, because it is changed in place")
    if g is not None:
        _checks.shape("g", g, ("B", "H") if g.dim() == 2 else ("B", "H", "K"), B=B, H=H, K=K)
        _checks.dtype("g", g, (torch.float32, q.dtype))
    if beta is not None:
        _checks.shape("beta", beta, ("B", "H"), B=B, H=H)
        _checks.dtype("beta", beta, (torch.float32, q.dtype))
    raise AssertionError("gated_delta_rule_step's two checks disagree")


# Triton backend, imported when first called: torch without triton has all the rest.


def _triton_forward(q: Tensor, *args):
    _attention.native("gated_delta_rule", q)
    from icrl_kernels._triton import gated_delta_rule as kernels

    return kernels.forward(q, *args)


def _triton_backward(do: Tensor, *args):
    from icrl_kernels._triton import gated_delta_rule as kernels

    # where there is no input: an empty tensor, as the schema wants one
    return tuple(do.new_empty(0, dtype=torch.float32) if x is None else x for x in kernels.backward(do, *args))


def _triton_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    state: Tensor,
    scale: float,
    qk_l2norm: bool,
) -> Tensor:
    from icrl_kernels._triton import gated_delta_rule as kernels

    _check_step(q, k, v, g, beta, state)
    return kernels.step(q, k, v, g, beta, state, scale, qk_l2norm)


# Reference backend, of the step: `gated_delta_rule` calls the reference itself.


def _reference_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    state: Tensor,
    scale: float,
    qk_l2norm: bool,
) -> Tensor:
    _check_step(q, k, v, g, beta, state)
    _attention.check_gates(g)
    tokens = [None if t is None else t[:, None] for t in (q, k, v, g, beta)]
    q, k, v, g, beta = tokens  # pyright: ignore[reportAssignmentType]
    o, final = gated_delta_rule_reference(q, k, v, g, beta, scale, state, True, None, qk_l2norm)
    assert final is not None
    state.copy_(final)
    return o[:, 0]


# Registration


def _outputs(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    o = torch.empty(v.shape, dtype=q.dtype, device=q.device)
    return o, torch.empty((sequences, v.shape[2], q.shape[3], v.shape[3]), dtype=torch.float32, device=q.device)


_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? g, Tensor? beta, float scale, Tensor? initial_state, Tensor? cu_seqlens,"
    " bool qk_l2norm"
)

_registry.define(
    f"gated_delta_rule({_INPUTS}, str backend) -> (Tensor o, Tensor final_state)",
    {"cpu": (("cpu",), _cpu_forward), "triton": (("cuda",), _triton_forward)},
    lambda q, k, v, g, beta, scale, initial_state, cu_seqlens, qk_l2norm, backend: _outputs(q, v, cu_seqlens),
)
_registry.define(
    f"gated_delta_rule_backward(Tensor do, Tensor dfinal_state, {_INPUTS}, str backend)"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dg, Tensor dbeta, Tensor dinitial_state)",
    {"cpu": (("cpu",), _cpu_backward), "triton": (("cuda",), _triton_backward)},
    lambda do, dfinal_state, q, k, v, g, beta, scale, initial_state, *rest: _attention.gradients_like(
        q, k, v, g, beta, initial_state
    ),
)
_registry.define(
    "gated_delta_rule_step(Tensor q, Tensor k, Tensor v, Tensor? g, Tensor? beta, Tensor(a!) state, float scale,"
    " bool qk_l2norm, str backend) -> Tensor",
    {
        "cpu": (("cpu",), _cpu_step),
        "triton": (("cuda",), _triton_step),
        "reference": (("cpu", "cuda"), _reference_step),
    },
    lambda q, k, v, g, beta, state, scale, qk_l2norm, backend: q.new_empty(v.shape),
)


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, g, beta, scale, initial_state, cu_seqlens, qk_l2norm, backend = inputs
    ctx.save_for_backward(q, k, v, g, beta, initial_state, cu_seqlens)
    ctx.scale, ctx.qk_l2norm, ctx.backend = scale, qk_l2norm, backend


def _backward(ctx, do: Tensor, dfinal_state: Tensor):
    q, k, v, g, beta, initial_state, cu_seqlens = ctx.saved_tensors
    dq, dk, dv, dg, dbeta, dinitial_state = torch.ops.icrl.gated_delta_rule_backward(
        do, dfinal_state, q, k, v, g, beta, ctx.scale, initial_state, cu_seqlens, ctx.qk_l2norm, ctx.backend
    )
    dg, dbeta, dinitial_state = (
        None if t is None else d for t, d in ((g, dg), (beta, dbeta), (initial_state, dinitial_state))
    )
    return dq, dk, dv, dg, dbeta, None, dinitial_state, None, None, None


torch.library.register_autograd(
    "icrl::gated_delta_rule", _backward, setup_context=_setup_context, lib=_registry.LIBRARY
)

_attention.refuse_second_derivative("gated_delta_rule")
