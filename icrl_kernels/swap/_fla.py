"""What flash-linear-attention's layers call, of our ops, under its names and arguments (tensors are [B, T, H, D] in both)."""

from __future__ import annotations

import functools
import importlib
import inspect
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from icrl_kernels.linear_attention.gla import gla, gla_step
from icrl_kernels.linear_attention.gsa import gsa, gsa_step
from icrl_kernels.linear_attention.rwkv7 import rwkv7, rwkv7_step
from icrl_kernels.swap._ops import Function, delta_rule, fresh, one_token, refuse, run

# How to compute, or copies of what is given: they change no result.
_HINTS = {
    *("checkpoint_level", "chunk_indices", "chunk_size", "cu_seqlens_cpu", "disable_recompute"),
    *("max_num_seqs", "safe_gate"),
}


# What functions with **kwargs read of them; they swallow the rest, which is refused here
_READ = {"chunk_gated_delta_rule": ("A_log", "dt_bias", "use_gate_in_kernel"), "chunk_kda": ("A_log", "dt_bias")}

# Where inputs differ in dtype, the outputs of these have v's; the others' have q's (or r's)
_OF_V = {
    *("chunk_gla", "chunk_gsa", "fused_recurrent_dplr_delta_rule", "fused_recurrent_gated_delta_rule"),
    *("fused_mul_recurrent_rwkv7", "fused_recurrent_kda", "fused_recurrent_rwkv7"),
}


def adapted(name: str, theirs: Function, function: Function) -> Function:
    """`function` for the arguments that theirs reads, its outputs of the dtype that theirs have."""
    parameters = inspect.signature(theirs).parameters
    read = {*parameters, *_HINTS, *_READ.get(name, ())}
    needed = {p.name for p in parameters.values() if p.default is p.empty and p.kind is not p.VAR_KEYWORD}
    takes_more = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    turns = takes_more and "state_v_first" in parameters

    def adapter(**arguments: Any) -> tuple[Tensor, Any]:
        if needed - arguments.keys() or not (takes_more or arguments.keys() <= parameters.keys()):
            return theirs(**arguments)  # raises what Python raises
        if turns and "transpose_state_layout" in arguments:
            if arguments.get("state_v_first"):
                raise ValueError("transpose_state_layout: wanted state_v_first, its new name, alone, got both")
            arguments["state_v_first"] = arguments.pop("transpose_state_layout")
            warnings.warn(
                "`transpose_state_layout` is deprecated and renamed to `state_v_first`.",
                DeprecationWarning,
                stacklevel=3,
            )
        refuse(name, {n: value for n, value in arguments.items() if n not in read})
        first = arguments["r" if "r" in arguments else "q"]
        of_v = name in _OF_V
        if name == "fused_recurrent_gsa":  # its decoding kernel's
            of_v = one_token(arguments.get("cu_seqlens"), None, *(arguments[n] for n in ("q", "k", "v", "s")))
        o, *rest = function(**{n: value for n, value in arguments.items() if n in read})
        return o.to(arguments["v"].dtype if of_v else first.dtype), *rest

    return adapter


def _refuse(function: str, rest: dict[str, Any]) -> None:
    refuse(function, {name: value for name, value in rest.items() if name not in _HINTS})


def _widest(*tensors: Tensor) -> list[Tensor]:
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in tensors))
    return [t.to(dtype) for t in tensors]


def _wide(t: Tensor | None, q: Tensor) -> Tensor | None:
    """Gates, beta and states may be narrower than float32 there; a wider one than is served here is refused as such."""
    return t.float() if t is not None and t.dtype in (torch.bfloat16, torch.float16) and t.dtype != q.dtype else t


def _state(state: Tensor | None, v_first: bool) -> Tensor | None:
    if state is None:
        return None
    state = state.float() if state.dtype in (torch.bfloat16, torch.float16) else state
    return state.transpose(-1, -2).contiguous() if v_first else state


def _linear(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    gk: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    state_v_first: bool = False,
    **rest: Any,
) -> tuple[Tensor, Tensor | None]:
    """Linear attention with no gate, g [B, T, H] or [B, T, H, K] (which the recurrent form calls gk), or g_gamma [H]."""
    _refuse("linear attention", rest)
    if sum(t is not None for t in (g, gk, g_gamma)) > 1:
        raise ValueError("g: wanted at most one of g, gk and g_gamma")
    q, k, v = _widest(q, k, v)
    g = g if gk is None else gk
    if g_gamma is not None:
        g = g_gamma.float().expand(*k.shape[:3])
    shape = (k.shape[0], *k.shape[2:], v.shape[-1])
    tensors = (q, k, v, _wide(g, q))
    state = _state(initial_state, state_v_first)
    o, final = run(gla, gla_step, tensors, shape, scale, state, output_final_state, cu_seqlens)
    return o, _state(final, state_v_first)


def delta(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    gk: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    lower_bound: float | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    cu_seqlens: Tensor | None = None,
    state_v_first: bool = False,
    **rest: Any,
) -> tuple[Tensor, Tensor | None]:
    """The delta rule with no gate, g [B, T, H] or [B, T, H, K] (gk): given, or computed here as their kernels do."""
    _refuse("the delta rule", rest)
    q, k, v = _widest(q, k, v)
    if use_gate_in_kernel:
        g = _gate(g, A_log, dt_bias, lower_bound)
    if gk is not None:
        g = gk if g is None else g.float()[..., None] + gk.float()
    if use_beta_sigmoid_in_kernel:
        if beta is None:
            raise ValueError("beta: wanted its logits, because of use_beta_sigmoid_in_kernel, got None")
        beta = beta.float().sigmoid() * (2.0 if allow_neg_eigval else 1.0)
    elif allow_neg_eigval:
        raise ValueError("allow_neg_eigval: wanted use_beta_sigmoid_in_kernel=True with it")
    o, final = delta_rule(
        q,
        k,
        v,
        _wide(g, q),
        _wide(beta, q),
        scale,
        _state(initial_state, state_v_first),
        output_final_state,
        cu_seqlens,
        use_qk_l2norm_in_kernel,
    )
    return o, _state(final, state_v_first)


def _gate(g: Tensor | None, A_log: Tensor | None, dt_bias: Tensor | None, lower_bound: float | None) -> Tensor:
    """−exp(A) softplus(g + b), or where there is a bound bound · sigmoid(exp(A) (g + b)); A per head, b as g's heads."""
    if g is None or (A_log is None and lower_bound is None):
        raise ValueError(f"{'g' if g is None else 'A_log'}: wanted a tensor, because of use_gate_in_kernel, got None")
    g = g.float()
    if dt_bias is not None:
        g = g + dt_bias.float().view(g.shape[2:])
    rate = 1.0 if A_log is None else A_log.float().exp().view(-1, *[1] * (g.dim() - 3))
    return -rate * F.softplus(g) if lower_bound is None else lower_bound * torch.sigmoid(rate * g)


def _gsa(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    g: Tensor | None = None,
    scale: float | None = None,
    initial_state: Any = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    **rest: Any,
) -> tuple[Tensor, list[Tensor | None]]:
    _refuse("gated slot attention", rest)
    if g is None:
        raise ValueError("g: without it slots are gated by their own running sum, which is not served; pass s and g")
    q, k, v, s = _widest(q, k, v, s)
    pair = None
    if initial_state is not None and any(t is not None for t in initial_state):
        pair = tuple(_state(t, False) for t in initial_state)
    g = _wide(g, q)
    if one_token(cu_seqlens, None, q, k, v, s, g, *(pair or ())):
        shapes = (k.shape[0], *k.shape[2:], s.shape[-1]), (k.shape[0], k.shape[2], s.shape[-1], v.shape[-1])
        if pair is None:
            pair = tuple(torch.zeros(x, dtype=torch.float32, device=q.device) for x in shapes)
        else:
            pair = tuple(map(fresh, pair))  # type: ignore[union-attr]
        o = gsa_step(q[:, 0], k[:, 0], v[:, 0], s[:, 0], g[:, 0], pair, scale)[:, None]  # type: ignore[index, arg-type]
    else:
        o, pair = gsa(q, k, v, s, g, scale, pair, output_final_state, cu_seqlens)  # type: ignore[arg-type]
    return o, list(pair) if output_final_state and pair is not None else [None, None]


def _rwkv7(
    *,
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float | None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    lower_bound: float | None = None,  # a promise about w
    **rest: Any,
) -> tuple[Tensor, Tensor | None]:
    _refuse("RWKV-7's recurrence", rest)
    r, k, v, a, b = _widest(r, k, v, a, b)
    shape = (*r.shape[:1], *r.shape[2:], v.shape[-1])
    tensors = (r, _wide(w, r), k, v, a, b)
    o, final = run(
        rwkv7, rwkv7_step, tensors, shape, scale, _state(initial_state, False), output_final_state, cu_seqlens
    )
    return o, final


def _rwkv7_multiplied(*, r: Tensor, kk: Tensor, a: Tensor, **rest: Any) -> tuple[Tensor, Tensor | None]:
    """a = −kk and b = kk a, multiplied in float32."""
    reader = kk.float()
    return _rwkv7(r=r.float(), a=-reader, b=reader * a.float(), **rest)


def _dplr(*, q: Tensor, gk: Tensor, **rest: Any) -> tuple[Tensor, Tensor | None]:
    return _rwkv7(r=q, w=gk, **rest)


FUNCTIONS: dict[str, dict[str, Function]] = {
    "delta_rule": {"chunk_delta_rule": delta, "fused_recurrent_delta_rule": delta},
    "gated_delta_rule": {"chunk_gated_delta_rule": delta, "fused_recurrent_gated_delta_rule": delta},
    "generalized_delta_rule": {"chunk_dplr_delta_rule": _dplr, "fused_recurrent_dplr_delta_rule": _dplr},
    "gla": {"chunk_gla": _linear, "fused_recurrent_gla": _linear},
    "gsa": {"chunk_gsa": _gsa, "fused_recurrent_gsa": _gsa},
    "kda": {"chunk_kda": delta, "fused_recurrent_kda": delta},
    "rwkv7": {
        "chunk_rwkv7": _rwkv7,
        "fused_recurrent_rwkv7": _rwkv7,
        "fused_mul_recurrent_rwkv7": _rwkv7_multiplied,
    },
    "simple_gla": {
        "chunk_simple_gla": _linear,
        "fused_chunk_simple_gla": _linear,
        "fused_recurrent_simple_gla": _linear,
        "parallel_simple_gla": _linear,
    },
}


def find() -> Iterator[tuple[ModuleType, str, Function]]:
    importlib.import_module("fla")
    for package, functions in FUNCTIONS.items():
        module = importlib.import_module(f"fla.ops.{package}")
        for name, function in functions.items():
            theirs = vars(module).get(name)
            if theirs is not None:
                yield module, name, adapted(name, theirs, function)
