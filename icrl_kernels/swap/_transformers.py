"""What transformers calls, of our ops: the gated delta rule and Kimi Delta Attention under its names and arguments.

Its short convolution stays its own. It is called so that packed sequences do not reach into each other.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Iterator
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor

from icrl_kernels import _checks
from icrl_kernels.layers._base import history
from icrl_kernels.linear_attention.common import DTYPES, bounds, check_packing
from icrl_kernels.swap import _fla
from icrl_kernels.swap._ops import Function, delta_rule, refuse

MODELS = (
    "bailing_hybrid",
    "glm5_next",
    "kimi_linear",
    "olmo_hybrid",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_next",
    "qwen4_exp",
)

# What other implementations of these functions take and their torch code ignores: ignoring it here would be a guess.
_FOREIGN = (
    *("A_log", "allow_neg_eigval", "cp_context", "dt_bias", "gk", "gv", "head_first", "lower_bound", "reverse"),
    *("return_intermediate_states", "safe_gate", "scale", "state_v_first", "transpose_state_layout"),
    *("use_beta_sigmoid_in_kernel", "use_gate_in_kernel"),
)


def _delta(
    *,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,  # the models' name: Kimi's hand it on as it is
    seq_idx: Tensor | None = None,
    **kwargs: Any,  # a model hands on all that it was given; theirs drops what it does not know
) -> tuple[Tensor, Tensor | None]:
    refuse("the gated delta rule", {name: kwargs[name] for name in _FOREIGN if name in kwargs})
    if cu_seqlens is None:
        cu_seqlens = cu_seq_lens_q
    elif cu_seq_lens_q is not None:
        raise ValueError("cu_seq_lens_q: wanted one of cu_seqlens and cu_seq_lens_q, got both")
    if cu_seqlens is None:
        refuse("the gated delta rule without cu_seqlens", {"seq_idx": seq_idx})
    dtype = query.dtype
    if dtype not in DTYPES or not dtype == key.dtype == value.dtype:  # they cast everything to float32
        query, key, value = query.float(), key.float(), value.float()
    g, beta = (t if t.dtype in (torch.float32, query.dtype) else t.float() for t in (g, beta))
    state = None if initial_state is None else initial_state.float()
    o, final_state = delta_rule(
        query, key, value, g, beta, None, state, output_final_state, cu_seqlens, use_qk_l2norm_in_kernel
    )
    return o.to(dtype), final_state


def _convolution(
    theirs: Function,
    *,
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cu_seq_lens_q: Tensor | None = None,
    seq_idx: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """Theirs over x [B, C, T], with as many zeros before each packed sequence as the convolution reaches back."""
    if cu_seq_lens_q is None:
        refuse("the short convolution without cu_seq_lens_q", {"seq_idx": seq_idx})
        return theirs(hidden_states, weight, bias, activation=activation, **kwargs)
    x, W = hidden_states.transpose(1, 2), weight.shape[-1] - 1
    N = check_packing(x, cu_seq_lens_q)
    if x.device.type == "cpu" and not _checks.compiling():
        bounds(1, x.shape[1], cu_seq_lens_q)
    tokens, places, _ = history(x, x.new_zeros(N, W, x.shape[2]), cu_seq_lens_q)
    assert places is not None
    return theirs(tokens.transpose(1, 2), weight, bias, activation=activation, **kwargs)[..., places]


def _unpacked(mixes: str, function: Function, /, **arguments: Any) -> tuple[Tensor, Tensor | None]:
    for name in ("cu_seqlens", "cu_seq_lens_q", "seq_idx"):
        if arguments.get(name) is not None:
            raise ValueError(f"{name}: wanted None, because {mixes} does not keep packed sequences apart, got a tensor")
    return function(**arguments)


# What reads across packed sequences in a model, besides what is replaced here
_MIXES = {"glm5_next": "glm5_next's indexed attention", "qwen4_exp": "qwen4_exp's embedding of n-grams"}
_OLD = "the convolution of this version of transformers"

_FUNCTIONS: dict[str, Function] = {
    "chunk_kimi_delta_attention": _delta,
    "recurrent_kimi_delta_attention": _delta,
    "torch_chunk_gated_delta_rule": _delta,
    "torch_recurrent_gated_delta_rule": _delta,
}

_FLA = ("chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule")
"""What was flash-linear-attention's own until 5.14, where it served."""


def find() -> Iterator[tuple[ModuleType, str, Function]]:
    importlib.import_module("transformers")
    for model in MODELS:
        package = f"transformers.models.{model}"
        if importlib.util.find_spec(package) is not None:  # versions differ in the models they have
            module = importlib.import_module(f"{package}.modeling_{model}")
            convolution = vars(module).get("causal_conv1d_fn")
            old = hasattr(module, "is_fast_path_available")  # until 5.14: chosen when a model is built
            mixes = _OLD if old else _MIXES.get(model)
            functions = dict(_FUNCTIONS)
            for name in _FLA:
                if (theirs := vars(module).get(name)) is not None:
                    functions[name] = _fla.adapted(name, theirs, _fla.delta)
            for name, function in functions.items():
                yield module, name, function if mixes is None else functools.partial(_unpacked, mixes, function)
            if mixes is None and isinstance(convolution, FunctionType):
                yield module, "causal_conv1d_fn", functools.partial(_convolution, convolution)
