"""RWKV-7's generalized delta rule: S_t = diag(exp w_t) S_{t-1} + b_t (a_tᵀ S_{t-1}) + k_t v_tᵀ, o_t = scale · S_tᵀ r_t.

RWKV-7 "Goose" (Peng et al. 2025, arXiv 2503.14456, section 4: its state is the transpose of this one, its a is -κ̂, its b
κ̂ times the in-context learning rate). `gated_delta_rule` is the case a = -exp(w) k, b = beta k, with beta k for k.
"""

from __future__ import annotations

import torch
from torch import Tensor

from icrl_kernels import _C, _attention, _checks, _registry
from icrl_kernels._attention import DTYPES, GATE_ALLOWANCE, MAX_HEAD_DIM


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
    scale = _attention.default_scale(scale, r)
    outputs, states = [], []
    for n, (batch, first, last) in enumerate(_attention.spans(r, cu_seqlens)):
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
        r, k, a, b: [B, T, H, K], of one dtype with v: float32, bfloat16, float16 (K, V up to 256), or float64, which the
            reference backend serves. Sums and states are float32 (float64 there).
        w: [B, T, H, K], natural logarithms of decays, ≤ 0, float32 (best) or r's dtype. RWKV-7's lie between -exp(-1/2)
            and 0. −inf empties a channel of the state but for what b_t and k_t write. A gate above `GATE_ALLOWANCE` is
            an error on the CPU; a GPU does not look. A NaN gate makes NaN of what depends on it, as any NaN does.
        v: [B, T, H, V].
        scale: 1, as RWKV-7 has it; None is K^-1/2.
        initial_state: [N, H, K, V] float32, N = B or the number of packed sequences; default zeros.
        output_final_state: whether to return the state after the last token.
        cu_seqlens: [N + 1] int32 or int64, with B = 1: sequence n is tokens cu_seqlens[n] to cu_seqlens[n + 1] - 1.
            Sequences may be empty. Its values are checked on the CPU.
        backend: "auto", "cpu", "triton" or "reference".

    Returns:
        o [B, T, H, V] in the inputs' dtype, and the final state [N, H, K, V] float32 or None.

    No output depends on a later token, to the bit. Inputs that are not contiguous are copied. Autocast does not cast
    this op's inputs: pass the dtypes you mean. Only inputs are saved for backward, which recomputes states.

    Raises:
        ValueError: for shapes, dtypes, devices or values other than these, naming the argument.
    """
    _check(r, w, k, v, a, b, initial_state, cu_seqlens)
    scale = _attention.default_scale(scale, r)
    if backend == "reference" or (backend == "auto" and r.dtype == torch.float64):
        if r.device.type == "cpu" and not _checks.compiling():  # the kernels check as they read
            _attention.check_values(r, w, cu_seqlens, "w")
        return rwkv7_reference(r, w, k, v, a, b, scale, initial_state, output_final_state, cu_seqlens)
    _attention.refuse_transforms("rwkv7", r, w, k, v, a, b, initial_state)
    o, final_state = torch.ops.icrl.rwkv7(r, w, k, v, a, b, scale, initial_state, cu_seqlens, backend)
    return o, final_state if output_final_state else None


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
    o = _attention.plain_step(_C.rwkv7_step_plain, backend, r, w, k, v, a, b, state, scale)
    if o is not None:
        return o
    if r.dim() != 3:
        _checks.shape("r", r, ("B", "H", "K"))
    _attention.refuse_transforms("rwkv7_step", r, w, k, v, a, b, state)
    _checks.same_device(r=r, w=w, k=k, v=v, a=a, b=b, state=state)
    return torch.ops.icrl.rwkv7_step(r, w, k, v, a, b, state, _attention.default_scale(scale, r), backend)


def _check(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    _checks.shape("r", r, ("B", "T", "H", "K"))
    B, T, H, K = r.shape
    for name, x in (("w", w), ("k", k), ("a", a), ("b", b)):
        _checks.shape(name, x, ("B", "T", "H", "K"), B=B, T=T, H=H, K=K)
    _checks.shape("v", v, ("B", "T", "H", "V"), B=B, T=T, H=H)
    V = v.shape[3]
    _attention.check_heads("v", "r", H, H, K, V)
    _checks.same_device(r=r, w=w, k=k, v=v, a=a, b=b, initial_state=initial_state, cu_seqlens=cu_seqlens)
    _checks.dtype("r", r, (*DTYPES, torch.float64))
    _checks.same_dtype(r=r, k=k, v=v, a=a, b=b)
    _checks.dtype("w", w, tuple({r.dtype: 0, torch.float32: 0}))
    _attention.check_sequences(r, initial_state, cu_seqlens, H=H, K=K, V=V)


# CPU backend


def _shape(r: Tensor, w: Tensor, v: Tensor, scale: float, bounds: Tensor) -> tuple:
    """What csrc/linear_attention/rwkv7.cpp calls a Shape."""
    sizes = (bounds.numel() - 1, r.shape[2], r.shape[3], v.shape[3], bounds.data_ptr())
    return (*sizes, DTYPES[r.dtype], DTYPES[w.dtype], scale, GATE_ALLOWANCE, torch.get_num_threads())


def _cpu_forward(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    _attention.native("rwkv7", r, "r")
    _check(r, w, k, v, a, b, initial_state, cu_seqlens)
    bounds = _attention.bounds(r, cu_seqlens)
    o, final = _outputs(r, v, cu_seqlens)
    inputs = [_attention.contiguous(t) for t in (r, w, k, v, a, b, initial_state)]
    if not _C.rwkv7_forward(_shape(r, w, v, scale, bounds), *map(_attention.pointer, (*inputs, o, final))):
        raise _attention.gate_error("w")
    return o, final


def _cpu_backward(
    do: Tensor,
    dfinal_state: Tensor,
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, ...]:
    _attention.native("rwkv7", r, "r")
    _check(r, w, k, v, a, b, initial_state, cu_seqlens)
    bounds = _attention.bounds(r, cu_seqlens)
    finals = (bounds.numel() - 1, *r.shape[2:], v.shape[3])
    _attention.check_output_gradients(r, do, v.shape, dfinal_state=(dfinal_state, finals))
    gradients = _attention.gradients_like(r, w, k, v, a, b, initial_state)
    inputs = [_attention.contiguous(t) for t in (do, dfinal_state, r, w, k, v, a, b, initial_state)]
    wanted = gradients if initial_state is not None else (*gradients[:6], None)
    _C.rwkv7_backward(_shape(r, w, v, scale, bounds), *map(_attention.pointer, (*inputs, *wanted)))
    return gradients


def _cpu_step(r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor, scale: float) -> Tensor:
    B, H, K, V = _check_step(r, w, k, v, a, b, state)
    r, w, k, v, a, b = (t.contiguous() for t in (r, w, k, v, a, b))
    o = torch.empty((B, H, V), dtype=r.dtype)
    shape = (B, H, K, V, 0, DTYPES[r.dtype], DTYPES[w.dtype], scale, GATE_ALLOWANCE, torch.get_num_threads())
    if not _C.rwkv7_step(shape, *map(_attention.pointer, (r, w, k, v, a, b, state, o))):
        raise _attention.gate_error("w")
    return o


def _check_step(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor
) -> tuple[int, int, int, int]:
    """Returns B, H, K, V. As cheap as can be where all is well: a step takes microseconds."""
    if torch.is_grad_enabled():
        for name, t in (("r", r), ("w", w), ("k", k), ("v", v), ("a", a), ("b", b), ("state", state)):
            if t.requires_grad:
                raise ValueError(f"{name}: rwkv7_step has no gradient; use rwkv7, or torch.no_grad() around it")
    dtype, device, keys, v_shape = r.dtype, r.device, tuple(r.shape), tuple(v.shape)
    if len(keys) == len(v_shape) == 3:
        (B, H, K), V = keys, v_shape[2]
        if (
            w.shape == k.shape == a.shape == b.shape == keys
            and v_shape[:2] == (B, H)
            and state.shape == (B, H, K, V)
            and H
            and 0 < K <= MAX_HEAD_DIM
            and 0 < V <= MAX_HEAD_DIM
            and dtype in DTYPES
            and dtype == k.dtype == v.dtype == a.dtype == b.dtype
            and w.dtype in (torch.float32, dtype)
            and state.dtype == torch.float32
            and device == w.device == k.device == v.device == a.device == b.device == state.device
            and state.is_contiguous()
        ):
            return B, H, K, V
    _checks.shape("r", r, ("B", "H", "K"))
    B, H, K = r.shape
    for name, x in (("w", w), ("k", k), ("a", a), ("b", b)):
        _checks.shape(name, x, ("B", "H", "K"), B=B, H=H, K=K)
    _checks.shape("v", v, ("B", "H", "V"), B=B, H=H)
    V = v.shape[2]
    _attention.check_heads("v", "r", H, H, K, V)
    _checks.shape("state", state, ("B", "H", "K", "V"), B=B, H=H, K=K, V=V)
    _checks.same_device(r=r, w=w, k=k, v=v, a=a, b=b, state=state)
    _checks.dtype("r", r, tuple(DTYPES))
    _checks.same_dtype(r=r, k=k, v=v, a=a, b=b)
    _checks.dtype("w", w, (torch.float32, r.dtype))
    _checks.dtype("state", state, (torch.float32,))
    if not state.is_contiguous():
        raise ValueError("state: wanted a contiguous tensor, because it is changed in place")
    raise AssertionError("rwkv7_step's two checks disagree")


# Triton backend, imported when first called: torch without triton has all the rest.


def _triton_forward(r: Tensor, *args):
    _attention.native("rwkv7", r, "r")
    from icrl_kernels._triton import rwkv7 as kernels

    return kernels.forward(r, *args)


def _triton_backward(do: Tensor, *args):
    from icrl_kernels._triton import rwkv7 as kernels

    *gradients, dinitial_state = kernels.backward(do, *args)
    # where there is no initial state: an empty tensor, as the schema wants one
    return *gradients, do.new_empty(0, dtype=torch.float32) if dinitial_state is None else dinitial_state


def _triton_step(*args):
    _check_step(*args[:-1])
    from icrl_kernels._triton import rwkv7 as kernels

    return kernels.step(*args)


# Reference backend, of the step: `rwkv7` calls the reference itself.


def _reference_step(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor, scale: float
) -> Tensor:
    _check_step(r, w, k, v, a, b, state)
    _attention.check_gates(w, "w")
    r, w, k, v, a, b = (t[:, None] for t in (r, w, k, v, a, b))
    o, final = rwkv7_reference(r, w, k, v, a, b, scale, state, True)
    assert final is not None
    state.copy_(final)
    return o[:, 0]


# Registration


def _outputs(r: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    sequences = r.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    o = torch.empty(v.shape, dtype=r.dtype, device=r.device)
    return o, torch.empty((sequences, *r.shape[2:], v.shape[3]), dtype=torch.float32, device=r.device)


_INPUTS = (
    "Tensor r, Tensor w, Tensor k, Tensor v, Tensor a, Tensor b, float scale, Tensor? initial_state, Tensor? cu_seqlens"
)

_registry.define(
    f"rwkv7({_INPUTS}, str backend) -> (Tensor o, Tensor final_state)",
    {"cpu": (("cpu",), _cpu_forward), "triton": (("cuda",), _triton_forward)},
    lambda r, w, k, v, a, b, scale, initial_state, cu_seqlens, backend: _outputs(r, v, cu_seqlens),
)
_registry.define(
    f"rwkv7_backward(Tensor do, Tensor dfinal_state, {_INPUTS}, str backend)"
    " -> (Tensor dr, Tensor dw, Tensor dk, Tensor dv, Tensor da, Tensor db, Tensor dinitial_state)",
    {"cpu": (("cpu",), _cpu_backward), "triton": (("cuda",), _triton_backward)},
    lambda do, dfinal_state, r, w, k, v, a, b, scale, initial_state, *rest: _attention.gradients_like(
        r, w, k, v, a, b, initial_state
    ),
)
_registry.define(
    "rwkv7_step(Tensor r, Tensor w, Tensor k, Tensor v, Tensor a, Tensor b, Tensor(a!) state, float scale,"
    " str backend) -> Tensor",
    {
        "cpu": (("cpu",), _cpu_step),
        "triton": (("cuda",), _triton_step),
        "reference": (("cpu", "cuda"), _reference_step),
    },
    lambda r, w, k, v, a, b, state, scale, backend: r.new_empty(v.shape),
)


def _setup_context(ctx, inputs, output) -> None:
    *tokens, scale, initial_state, cu_seqlens, backend = inputs
    ctx.save_for_backward(*tokens, initial_state, cu_seqlens)
    ctx.scale, ctx.backend = scale, backend


def _backward(ctx, do: Tensor, dfinal_state: Tensor):
    *tokens, initial_state, cu_seqlens = ctx.saved_tensors
    *gradients, dinitial_state = torch.ops.icrl.rwkv7_backward(
        do, dfinal_state, *tokens, ctx.scale, initial_state, cu_seqlens, ctx.backend
    )
    return *gradients, None, None if initial_state is None else dinitial_state, None, None


torch.library.register_autograd("icrl::rwkv7", _backward, setup_context=_setup_context, lib=_registry.LIBRARY)

_attention.refuse_second_derivative("rwkv7")
