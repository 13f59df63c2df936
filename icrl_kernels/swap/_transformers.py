"""What transformers calls, of our ops: the gated delta rule and Kimi Delta Attention under its names and arguments."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from icrl_kernels.linear_attention.common import DTYPES
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
    seq_idx: Tensor | None = None,
    **kwargs: Any,  # a model hands on all that it was given; theirs drops what it does not know
) -> tuple[Tensor, Tensor | None]:
    refuse("the gated delta rule", {name: kwargs[name] for name in _FOREIGN if name in kwargs})
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


_FUNCTIONS: dict[str, Function] = {
    "chunk_kimi_delta_attention": _delta,
    "recurrent_kimi_delta_attention": _delta,
    "torch_chunk_gated_delta_rule": _delta,
    "torch_recurrent_gated_delta_rule": _delta,
}


def find() -> Iterator[tuple[ModuleType, str, Function]]:
    importlib.import_module("transformers")
    for model in MODELS:
        package = f"transformers.models.{model}"
        if importlib.util.find_spec(package) is not None:  # versions differ in the models they have
            module = importlib.import_module(f"{package}.modeling_{model}")
            for name, function in _FUNCTIONS.items():
                yield module, name, function
