"""Gated linear attention: S_t = diag(exp g_t) S_{t-1} + k_t v_tᵀ, o_t = scale · S_tᵀ q_t.

Linear attention (Katharopoulos et al. 2020, g=None), retention and Mamba-2's scalar decay (Sun et al. 2023; Dao and Gu
2024, g [B, T, Hk]) and GLA (Yang et al. 2023, eq. 4, g [B, T, Hk, K]).
"""

from __future__ import annotations

import torch
from torch import Tensor

from icrl_kernels import _C, _checks, _registry
from icrl_kernels.linear_attention import common
from icrl_kernels.linear_attention.common import DTYPES, GATE_ALLOWANCE, MAX_HEAD_DIM


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
        k, v: [B, T, Hk, K] and [B, T, Hk, V], of q's dtype: float32, bfloat16, float16 (K, V up to 256), or float64,
            which the reference backend serves. Sums and states are float32 (float64 there).
        g: natural logarithms of decays, ≤ 0: None (no decay), [B, T, Hk] (one per head) or [B, T, Hk, K] (one per key
            channel), float32 (best) or q's dtype. −inf resets the state. A gate above `GATE_ALLOWANCE` is an error on
            the CPU; a GPU does not look. A NaN gate makes NaN of what depends on it, as any NaN does.
        scale: default K^-1/2.
        initial_state: [N, Hk, K, V] float32, N = B or the number of packed sequences; default zeros.
        output_final_state: whether to return the state after the last token.
        cu_seqlens: [N + 1] int32 or int64, with B = 1: sequence n is tokens cu_seqlens[n] to cu_seqlens[n + 1] - 1.
            Sequences may be empty. Its values are checked on the CPU, and trusted on a GPU, where reading them would
            make the host wait.
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
    _check(q, k, v, g, initial_state, cu_seqlens)
    scale = common.default_scale(scale, q)
    if backend == "reference" or (backend == "auto" and q.dtype == torch.float64):
        if q.device.type == "cpu" and not _checks.compiling():  # the kernels check as they read
            common.check_values(q, g, cu_seqlens)
        return gla_reference(q, k, v, g, scale, initial_state, output_final_state, cu_seqlens)
    common.refuse_transforms("gla", q, k, v, g, initial_state)
    o, final_state = torch.ops.icrl.gla(q, k, v, g, scale, initial_state, cu_seqlens, backend)
    return o, final_state if output_final_state else None


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
    o = common.plain_step(_C.gla_step_plain, backend, q, k, v, g, state, scale)
    if o is not None:
        return o
    if q.dim() != 3:
        _checks.shape("q", q, ("B", "H", "K"))
    common.refuse_transforms("gla_step", q, k, v, g, state)
    _checks.same_device(q=q, k=k, v=v, g=g, state=state)
    return torch.ops.icrl.gla_step(q, k, v, g, state, common.default_scale(scale, q), backend)


def _check(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> None:
    _checks.shape("q", q, ("B", "T", "H", "K"))
    B, T, H, K = q.shape
    _checks.shape("k", k, ("B", "T", "Hk", "K"), B=B, T=T, K=K)
    Hk = k.shape[2]
    _checks.shape("v", v, ("B", "T", "Hk", "V"), B=B, T=T, Hk=Hk)
    common.check_heads("q", "k", H, Hk, K, v.shape[3])
    _checks.same_device(q=q, k=k, v=v, g=g, initial_state=initial_state, cu_seqlens=cu_seqlens)
    _checks.dtype("q", q, (*DTYPES, torch.float64))
    _checks.same_dtype(q=q, k=k, v=v)
    if g is not None:
        wanted = ("B", "T", "Hk") if g.dim() == 3 else ("B", "T", "Hk", "K")
        _checks.shape("g", g, wanted, B=B, T=T, Hk=Hk, K=K)
        _checks.dtype("g", g, tuple({q.dtype: 0, torch.float32: 0}))
    common.check_sequences(q, initial_state, cu_seqlens, Hk=Hk, K=K, V=v.shape[3])


# CPU backend


def _shape(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, scale: float, bounds: Tensor) -> tuple:
    gate = 0 if g is None else g.dim() - 2
    gate_dtype = 0 if g is None else DTYPES[g.dtype]
    sizes = (bounds.numel() - 1, q.shape[-2], k.shape[-2], q.shape[-1], v.shape[-1])
    return (
        *sizes,
        bounds.data_ptr(),
        common.native("gla", q),
        gate_dtype,
        gate,
        scale,
        GATE_ALLOWANCE,
        torch.get_num_threads(),
    )


def _cpu_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    common.native("gla", q)
    _check(q, k, v, g, initial_state, cu_seqlens)
    q, k, v, g, initial_state = (
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        common.contiguous(g),
        common.contiguous(initial_state),
    )
    bounds = common.bounds(q, cu_seqlens)
    o, final = _outputs(q, k, v, cu_seqlens)
    shape = _shape(q, k, v, g, scale, bounds)
    pointers = map(common.pointer, (q, k, v, g, initial_state, o, final))
    if not _C.gla_forward(shape, *pointers):
        raise common.gate_error()
    return o, final


def _cpu_backward(
    do: Tensor,
    dfinal_state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, ...]:
    common.native("gla", q)
    _check(q, k, v, g, initial_state, cu_seqlens)
    q, k, v, g, initial_state = (
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        common.contiguous(g),
        common.contiguous(initial_state),
    )
    do, dfinal_state = do.contiguous(), dfinal_state.contiguous()
    bounds = common.bounds(q, cu_seqlens)
    N, V = bounds.numel() - 1, v.shape[3]
    common.check_output_gradients(q, do, (*q.shape[:3], V), dfinal_state=(dfinal_state, (N, *k.shape[2:], V)))
    grads = common.gradients_like(q, k, v, g, initial_state)
    dq, dk, dv, dg, dinitial = grads
    shape = _shape(q, k, v, g, scale, bounds)
    inputs = map(common.pointer, (do, dfinal_state, q, k, v, g, initial_state))
    wanted = (dq, dk, dv, None if g is None else dg, None if initial_state is None else dinitial)
    _C.gla_backward(shape, *inputs, *map(common.pointer, wanted))
    return grads


def _cpu_step(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor, scale: float) -> Tensor:
    B, H, Hk, K, V = _check_step(q, k, v, g, state)
    q, k, v, g = q.contiguous(), k.contiguous(), v.contiguous(), common.contiguous(g)
    o = torch.empty((B, H, V), dtype=q.dtype)
    gate, gate_dtype = (0, 0) if g is None else (g.dim() - 1, DTYPES[g.dtype])
    sizes = (B, H, Hk, K, V, 0, DTYPES[q.dtype], gate_dtype, gate, scale, GATE_ALLOWANCE, torch.get_num_threads())
    gates = 0 if g is None else g.data_ptr()
    if not _C.gla_step(sizes, q.data_ptr(), k.data_ptr(), v.data_ptr(), gates, state.data_ptr(), o.data_ptr()):
        raise common.gate_error()
    return o


def _check_step(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor) -> tuple[int, int, int, int, int]:
    """Returns B, H, Hk, K, V. As cheap as can be where all is well: a step takes microseconds."""
    if torch.is_grad_enabled():
        for name, t in (("q", q), ("k", k), ("v", v), ("g", g), ("state", state)):
            if t is not None and t.requires_grad:
                raise ValueError(f"{name}: gla_step has no gradient; use gla, or torch.no_grad() around the step")
    dtype, device, q_shape, k_shape, v_shape = q.dtype, q.device, tuple(q.shape), tuple(k.shape), tuple(v.shape)
    if len(q_shape) == len(k_shape) == len(v_shape) == 3:
        (B, H, K), (_, Hk, V) = q_shape, v_shape
        if (
            k_shape == (B, Hk, K)
            and v_shape[0] == B
            and state.shape == (B, Hk, K, V)
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
                or (g.shape in (k_shape, k_shape[:2]) and g.dtype in (torch.float32, dtype) and g.device == device)
            )
        ):
            return B, H, Hk, K, V
    _checks.shape("q", q, ("B", "H", "K"))
    B, H, K = q.shape
    _checks.shape("k", k, ("B", "Hk", "K"), B=B, K=K)
    _checks.shape("v", v, ("B", "Hk", "V"), B=B, Hk=k.shape[1])
    common.check_heads("q", "k", H, k.shape[1], K, v.shape[2])
    _checks.shape("state", state, ("B", "Hk", "K", "V"), B=B, Hk=k.shape[1], K=K, V=v.shape[2])
    _checks.same_device(q=q, k=k, v=v, g=g, state=state)
    _checks.dtype("q", q, tuple(DTYPES))
    _checks.same_dtype(q=q, k=k, v=v)
    _checks.dtype("state", state, (torch.float32,))
    if not state.is_contiguous():
        raise ValueError("state: wanted a contiguous tensor, because it is changed in place")
    if g is not None:
        _checks.shape("g", g, ("B", "Hk") if g.dim() == 2 else ("B", "Hk", "K"), B=B, Hk=k.shape[1], K=K)
        _checks.dtype("g", g, (torch.float32, q.dtype))
    raise AssertionError("gla_step's two checks disagree")


# Reference backend, of the step: `gla` calls the reference itself.


def _reference_step(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor, scale: float) -> Tensor:
    _check_step(q, k, v, g, state)
    common.check_gates(g)
    with torch.no_grad():
        tokens = [None if t is None else t[:, None] for t in (q, k, v, g)]
        q, k, v, g = tokens  # pyright: ignore[reportAssignmentType]
        o, final = gla_reference(q, k, v, g, scale, state, True)
        assert final is not None
        state.copy_(final)
    return o[:, 0].contiguous()


# Triton backend, imported when first called: torch without triton has all the rest.


def _triton_forward(q: Tensor, *args):
    common.native("gla", q)
    from icrl_kernels.linear_attention.triton import gla as kernels

    return kernels.forward(q, *args)


def _triton_backward(do: Tensor, *args):
    from icrl_kernels.linear_attention.triton import gla as kernels

    # where there is no input: an empty tensor, as the schema wants one
    return tuple(do.new_empty(0, dtype=torch.float32) if x is None else x for x in kernels.backward(do, *args))


def _triton_step(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor, scale: float) -> Tensor:
    from icrl_kernels.linear_attention.triton import gla as kernels

    _check_step(q, k, v, g, state)
    return kernels.step(q, k, v, g, state, scale)


# Registration


def _outputs(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    o = torch.empty((*q.shape[:3], v.shape[3]), dtype=q.dtype, device=q.device)
    return o, torch.empty((sequences, k.shape[2], k.shape[3], v.shape[3]), dtype=torch.float32, device=q.device)


_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? g, float scale, Tensor? initial_state, Tensor? cu_seqlens"

_registry.define(
    f"gla({_INPUTS}, str backend) -> (Tensor o, Tensor final_state)",
    {"cpu": (("cpu",), _cpu_forward), "triton": (("cuda",), _triton_forward)},
    lambda q, k, v, g, scale, initial_state, cu_seqlens, backend: _outputs(q, k, v, cu_seqlens),
)
_registry.define(
    f"gla_backward(Tensor do, Tensor dfinal_state, {_INPUTS}, str backend)"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dg, Tensor dinitial_state)",
    {"cpu": (("cpu",), _cpu_backward), "triton": (("cuda",), _triton_backward)},
    lambda do, dfinal_state, q, k, v, g, scale, initial_state, *rest: common.gradients_like(q, k, v, g, initial_state),
)
_registry.define(
    "gla_step(Tensor q, Tensor k, Tensor v, Tensor? g, Tensor(a!) state, float scale, str backend) -> Tensor",
    {
        "cpu": (("cpu",), _cpu_step),
        "triton": (("cuda",), _triton_step),
        "reference": (("cpu", "cuda"), _reference_step),
    },
    lambda q, k, v, g, state, scale, backend: q.new_empty((q.shape[0], q.shape[1], v.shape[2])),
)


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, g, scale, initial_state, cu_seqlens, backend = inputs
    ctx.save_for_backward(q, k, v, g, initial_state, cu_seqlens)
    ctx.scale, ctx.backend = scale, backend


def _backward(ctx, do: Tensor, dfinal_state: Tensor):
    q, k, v, g, initial_state, cu_seqlens = ctx.saved_tensors
    dq, dk, dv, dg, dinitial_state = torch.ops.icrl.gla_backward(
        do, dfinal_state, q, k, v, g, ctx.scale, initial_state, cu_seqlens, ctx.backend
    )
    dg = None if g is None else dg
    return dq, dk, dv, dg, None, None if initial_state is None else dinitial_state, None, None


torch.library.register_autograd("icrl::gla", _backward, setup_context=_setup_context, lib=_registry.LIBRARY)


common.refuse_second_derivative("gla")
