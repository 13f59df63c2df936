"""Gated slot attention (Zhang et al. 2024, arXiv 2409.07146, section 3): M slots of keys and values, each with its own
decay, read by a softmax over the slots: K̃_t = diag(exp g_t) K̃_{t-1} + s_t k_tᵀ, p_t = softmax(scale · K̃_t q_t),
Ṽ_t = diag(exp g_t) Ṽ_{t-1} + s_t v_tᵀ, o_t = Ṽ_tᵀ p_t. The paper's layer has s_t = 1 − exp g_t.
"""

from __future__ import annotations

import torch
from torch import Tensor

from icrl_kernels import _C, _attention, _checks, _registry
from icrl_kernels._attention import DTYPES, GATE_ALLOWANCE, MAX_HEAD_DIM

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
    spans = _attention.spans(q, cu_seqlens)
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
        k, v, s: [B, T, Hk, K], [B, T, Hk, V] and [B, T, Hk, M], of q's dtype: float32, bfloat16, float16 (K, V, M up
            to 256), or float64, which the reference backend serves. s_t is what a token writes to each slot; it is
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
            Sequences may be empty. Its values are checked on the CPU, and trusted on a GPU, where reading them would
            make the host wait.
        backend: "auto", "cpu", "triton" or "reference".

    Returns:
        o [B, T, H, V] in the inputs' dtype, and the final state, a pair as `initial_state`, or None.

    No output depends on a later token, to the bit. Inputs that are not contiguous are copied. Autocast does not cast
    this op's inputs: pass the dtypes you mean. Only inputs are saved for backward, which recomputes states and p.

    Raises:
        ValueError: for shapes, dtypes, devices or values other than these, naming the argument.
    """
    keys, values = _pair("initial_state", initial_state)
    _check(q, k, v, s, g, keys, values, cu_seqlens)
    scale = _attention.default_scale(scale, q)
    if backend == "reference" or (backend == "auto" and q.dtype == torch.float64):
        if q.device.type == "cpu" and not _checks.compiling():  # the kernels check as they read
            _attention.check_values(q, g, cu_seqlens)
        return gsa_reference(q, k, v, s, g, scale, initial_state, output_final_state, cu_seqlens)
    _attention.refuse_transforms("gsa", q, k, v, s, g, keys, values)
    o, keys, values = torch.ops.icrl.gsa(q, k, v, s, g, scale, keys, values, cu_seqlens, backend)
    return o, (keys, values) if output_final_state else None


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
    keys, values = _pair("state", state)
    o = _attention.plain_step(_C.gsa_step_plain, backend, q, k, v, s, g, keys, values, scale)
    if o is not None:
        return o
    if q.dim() != 3:
        _checks.shape("q", q, ("B", "H", "K"))
    scale = _attention.default_scale(scale, q)
    _attention.refuse_transforms("gsa_step", q, k, v, s, g, keys, values)
    _checks.same_device(q=q, k=k, v=v, s=s, g=g, **{"state[0]": keys, "state[1]": values})
    return torch.ops.icrl.gsa_step(q, k, v, s, g, keys, values, scale, backend)


def _pair(name: str, state: State | None) -> tuple[Tensor | None, Tensor | None]:
    if state is None and name == "initial_state":
        return None, None
    if not isinstance(state, (tuple, list)) or len(state) != 2 or not all(isinstance(t, Tensor) for t in state):
        raise ValueError(f"{name}: wanted a pair of tensors, the slots' keys and values, got {type(state).__name__}")
    return state[0], state[1]


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    g: Tensor | None,
    keys: Tensor | None,
    values: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    _checks.shape("q", q, ("B", "T", "H", "K"))
    B, T, H, K = q.shape
    _checks.shape("k", k, ("B", "T", "Hk", "K"), B=B, T=T, K=K)
    Hk = k.shape[2]
    _checks.shape("v", v, ("B", "T", "Hk", "V"), B=B, T=T, Hk=Hk)
    _checks.shape("s", s, ("B", "T", "Hk", "M"), B=B, T=T, Hk=Hk)
    V, M = v.shape[3], s.shape[3]
    _attention.check_heads("q", "k", H, Hk, K, V)
    _slots(M)
    states = {"initial_state[0]": keys, "initial_state[1]": values}
    _checks.same_device(q=q, k=k, v=v, s=s, g=g, cu_seqlens=cu_seqlens, **states)
    _checks.dtype("q", q, (*DTYPES, torch.float64))
    _checks.same_dtype(q=q, k=k, v=v, s=s)
    if g is not None:
        _checks.shape("g", g, ("B", "T", "Hk", "M"), B=B, T=T, Hk=Hk, M=M)
        _checks.dtype("g", g, tuple({q.dtype: 0, torch.float32: 0}))
    wanted = {"initial_state[0]": (keys, ("Hk", "K", "M")), "initial_state[1]": (values, ("Hk", "M", "V"))}
    _attention.check_states(q, wanted, cu_seqlens, Hk=Hk, K=K, V=V, M=M)


def _slots(M: int) -> None:
    if not 1 <= M <= MAX_HEAD_DIM:
        raise ValueError(f"M: wanted 1 to {MAX_HEAD_DIM} slots per head, got {M}")


# CPU backend


def _shape(q: Tensor, k: Tensor, v: Tensor, s: Tensor, g: Tensor | None, scale: float, n: int, bounds: int) -> tuple:
    gate, gate_dtype = (0, 0) if g is None else (2, DTYPES[g.dtype])  # the codes of csrc/linear_attention/gate.h
    sizes = (n, q.shape[-2], k.shape[-2], q.shape[-1], v.shape[-1], s.shape[-1])
    dtypes = (_attention.native("gsa", q), gate_dtype)
    return (*sizes, bounds, *dtypes, gate, scale, GATE_ALLOWANCE, torch.get_num_threads())


def _cpu_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    g: Tensor | None,
    scale: float,
    initial_keys: Tensor | None,
    initial_values: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    _attention.native("gsa", q)
    _check(q, k, v, s, g, initial_keys, initial_values, cu_seqlens)
    inputs = [_attention.contiguous(t) for t in (q, k, v, s, g, initial_keys, initial_values)]
    bounds = _attention.bounds(q, cu_seqlens)
    outputs = _outputs(q, k, v, s, cu_seqlens)
    shape = _shape(q, k, v, s, g, scale, bounds.numel() - 1, bounds.data_ptr())
    if not _C.gsa_forward(shape, *map(_attention.pointer, (*inputs, *outputs))):
        raise _attention.gate_error()
    return outputs


def _cpu_backward(
    do: Tensor,
    dfinal_keys: Tensor,
    dfinal_values: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    g: Tensor | None,
    scale: float,
    initial_keys: Tensor | None,
    initial_values: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, ...]:
    _attention.native("gsa", q)
    _check(q, k, v, s, g, initial_keys, initial_values, cu_seqlens)
    states = (initial_keys, initial_values)
    inputs = [_attention.contiguous(t) for t in (do, dfinal_keys, dfinal_values, q, k, v, s, g, *states)]
    bounds = _attention.bounds(q, cu_seqlens)
    N, Hk, K, V, M = bounds.numel() - 1, *k.shape[2:], v.shape[3], s.shape[3]
    finals = {"dfinal_keys": (dfinal_keys, (N, Hk, K, M)), "dfinal_values": (dfinal_values, (N, Hk, M, V))}
    _attention.check_output_gradients(q, do, (*q.shape[:3], V), **finals)
    shape = _shape(q, k, v, s, g, scale, bounds.numel() - 1, bounds.data_ptr())
    grads = _attention.gradients_like(q, k, v, s, g, *states)
    wanted = [None if t is None else grad for t, grad in zip((q, k, v, s, g, *states), grads, strict=True)]
    _C.gsa_backward(shape, *map(_attention.pointer, (*inputs, *wanted)))
    return grads


def _cpu_step(
    q: Tensor, k: Tensor, v: Tensor, s: Tensor, g: Tensor | None, keys: Tensor, values: Tensor, scale: float
) -> Tensor:
    _check_step(q, k, v, s, g, keys, values)
    o = torch.empty((*q.shape[:2], v.shape[2]), dtype=q.dtype)
    inputs = [_attention.contiguous(t) for t in (q, k, v, s, g)]
    shape = _shape(q, k, v, s, g, scale, q.shape[0], 0)
    if not _C.gsa_step(shape, *map(_attention.pointer, (*inputs, keys, values, o))):
        raise _attention.gate_error()
    return o


def _check_step(q: Tensor, k: Tensor, v: Tensor, s: Tensor, g: Tensor | None, keys: Tensor, values: Tensor) -> None:
    """As cheap as can be where all is well: a step takes microseconds."""
    if torch.is_grad_enabled():
        named = (("q", q), ("k", k), ("v", v), ("s", s), ("g", g), ("state", keys), ("state", values))
        for name, t in named:
            if t is not None and t.requires_grad:
                raise ValueError(f"{name}: gsa_step has no gradient; use gsa, or torch.no_grad() around the step")
    dtype, device, q_shape, v_shape, s_shape = q.dtype, q.device, tuple(q.shape), tuple(v.shape), tuple(s.shape)
    if len(q_shape) == len(v_shape) == len(s_shape) == 3:
        (B, H, K), (_, Hk, V), M = q_shape, v_shape, s_shape[2]
        if (
            k.shape == (B, Hk, K)
            and v_shape[0] == B
            and s_shape == (B, Hk, M)
            and keys.shape == (B, Hk, K, M)
            and values.shape == (B, Hk, M, V)
            and Hk
            and H
            and H % Hk == 0
            and 0 < K <= MAX_HEAD_DIM
            and 0 < V <= MAX_HEAD_DIM
            and 0 < M <= MAX_HEAD_DIM
            and dtype in DTYPES
            and dtype == k.dtype == v.dtype == s.dtype
            and keys.dtype == values.dtype == torch.float32
            and device == k.device == v.device == s.device == keys.device == values.device
            and keys.is_contiguous()
            and values.is_contiguous()
            and (g is None or (g.shape == s_shape and g.dtype in (torch.float32, dtype) and g.device == device))
        ):
            return
    _checks.shape("q", q, ("B", "H", "K"))
    B, H, K = q.shape
    _checks.shape("k", k, ("B", "Hk", "K"), B=B, K=K)
    Hk = k.shape[1]
    _checks.shape("v", v, ("B", "Hk", "V"), B=B, Hk=Hk)
    _checks.shape("s", s, ("B", "Hk", "M"), B=B, Hk=Hk)
    V, M = v.shape[2], s.shape[2]
    _attention.check_heads("q", "k", H, Hk, K, V)
    _slots(M)
    states = {"state[0]": keys, "state[1]": values}
    _checks.shape("state[0]", keys, ("B", "Hk", "K", "M"), B=B, Hk=Hk, K=K, M=M)
    _checks.shape("state[1]", values, ("B", "Hk", "M", "V"), B=B, Hk=Hk, M=M, V=V)
    _checks.same_device(q=q, k=k, v=v, s=s, g=g, **states)
    _checks.dtype("q", q, tuple(DTYPES))
    _checks.same_dtype(q=q, k=k, v=v, s=s)
    for name, t in states.items():
        _checks.dtype(name, t, (torch.float32,))
        if not t.is_contiguous():
            raise ValueError(f"{name}: wanted a contiguous tensor, because it is changed in place")
    if g is not None:
        _checks.shape("g", g, ("B", "Hk", "M"), B=B, Hk=Hk, M=M)
        _checks.dtype("g", g, (torch.float32, q.dtype))
    raise AssertionError("gsa_step's two checks disagree")


# Triton backend, imported when first called: torch without triton has all the rest.


def _triton_forward(q: Tensor, *args):
    _attention.native("gsa", q)
    from icrl_kernels._triton import gsa as kernels

    return kernels.forward(q, *args)


def _triton_backward(do: Tensor, *args):
    from icrl_kernels._triton import gsa as kernels

    # where there is no input: an empty tensor, as the schema wants one
    return tuple(do.new_empty(0, dtype=torch.float32) if x is None else x for x in kernels.backward(do, *args))


def _triton_step(
    q: Tensor, k: Tensor, v: Tensor, s: Tensor, g: Tensor | None, keys: Tensor, values: Tensor, scale: float
) -> Tensor:
    from icrl_kernels._triton import gsa as kernels

    _check_step(q, k, v, s, g, keys, values)
    return kernels.step(q, k, v, s, g, keys, values, scale)


# Reference backend of the step


def _reference_step(
    q: Tensor, k: Tensor, v: Tensor, s: Tensor, g: Tensor | None, keys: Tensor, values: Tensor, scale: float
) -> Tensor:
    _check_step(q, k, v, s, g, keys, values)
    _attention.check_gates(g)
    with torch.no_grad():
        tokens = [None if t is None else t[:, None] for t in (q, k, v, s, g)]
        q, k, v, s, g = tokens  # pyright: ignore[reportAssignmentType]
        o, final = gsa_reference(q, k, v, s, g, scale, (keys, values), True)
        assert final is not None
        keys.copy_(final[0])
        values.copy_(final[1])
    return o[:, 0].contiguous()


# Registration


def _outputs(q: Tensor, k: Tensor, v: Tensor, s: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    N, Hk, M = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1, k.shape[2], s.shape[3]
    return (
        torch.empty((*q.shape[:3], v.shape[3]), dtype=q.dtype, device=q.device),
        torch.empty((N, Hk, k.shape[3], M), dtype=torch.float32, device=q.device),
        torch.empty((N, Hk, M, v.shape[3]), dtype=torch.float32, device=q.device),
    )


_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor s, Tensor? g, float scale, Tensor? initial_keys, Tensor? initial_values, "
    "Tensor? cu_seqlens"
)

_registry.define(
    f"gsa({_INPUTS}, str backend) -> (Tensor o, Tensor final_keys, Tensor final_values)",
    {"cpu": (("cpu",), _cpu_forward), "triton": (("cuda",), _triton_forward)},
    lambda q, k, v, s, g, scale, initial_keys, initial_values, cu_seqlens, backend: _outputs(q, k, v, s, cu_seqlens),
)
_registry.define(
    f"gsa_backward(Tensor do, Tensor dfinal_keys, Tensor dfinal_values, {_INPUTS}, str backend) -> (Tensor dq, "
    "Tensor dk, Tensor dv, Tensor ds, Tensor dg, Tensor dinitial_keys, Tensor dinitial_values)",
    {"cpu": (("cpu",), _cpu_backward), "triton": (("cuda",), _triton_backward)},
    lambda do, dfinal_keys, dfinal_values, q, k, v, s, g, scale, initial_keys, initial_values, *rest: (
        _attention.gradients_like(q, k, v, s, g, initial_keys, initial_values)
    ),
)
_registry.define(
    "gsa_step(Tensor q, Tensor k, Tensor v, Tensor s, Tensor? g, Tensor(a!) keys, Tensor(b!) values, float scale, "
    "str backend) -> Tensor",
    {
        "cpu": (("cpu",), _cpu_step),
        "triton": (("cuda",), _triton_step),
        "reference": (("cpu", "cuda"), _reference_step),
    },
    lambda q, k, v, s, g, keys, values, scale, backend: q.new_empty((q.shape[0], q.shape[1], v.shape[2])),
)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, scale, initial_keys, initial_values, cu_seqlens, backend = inputs
    ctx.save_for_backward(*tensors, initial_keys, initial_values, cu_seqlens)
    ctx.scale, ctx.backend = scale, backend


def _backward(ctx, do: Tensor, dfinal_keys: Tensor, dfinal_values: Tensor):
    *tensors, initial_keys, initial_values, cu_seqlens = ctx.saved_tensors
    states = (initial_keys, initial_values)
    grads = torch.ops.icrl.gsa_backward(
        do, dfinal_keys, dfinal_values, *tensors, ctx.scale, *states, cu_seqlens, ctx.backend
    )
    wanted = [None if t is None else grad for t, grad in zip((*tensors, *states), grads, strict=True)]
    return *wanted[:5], None, *wanted[5:], None, None


torch.library.register_autograd("icrl::gsa", _backward, setup_context=_setup_context, lib=_registry.LIBRARY)

_attention.refuse_second_derivative("gsa")
