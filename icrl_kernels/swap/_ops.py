"""What both libraries' adaptors share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from icrl_kernels.linear_attention.common import DTYPES
from icrl_kernels.linear_attention.gated_delta_rule import gated_delta_rule, gated_delta_rule_step

Function = Callable[..., Any]


def refuse(function: str, arguments: dict[str, Any]) -> None:
    """Raise for the first of the arguments that asks for something; None and False ask for nothing."""
    for name, value in arguments.items():
        if value is not None and value is not False:
            raise ValueError(f"{name}: {function} as served by icrl_kernels.swap cannot honour it, got {value!r:.80}")


def run(
    op: Function,
    step: Function,
    tensors: tuple[Tensor | None, ...],
    state_shape: tuple[int, ...],
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor | None]:
    """The op; where it is one token and no gradient is wanted, its step, on a copy of initial_state."""
    if one_token(cu_seqlens, initial_state, *tensors):
        q = tensors[0]
        assert q is not None
        state = q.new_zeros(state_shape, dtype=torch.float32) if initial_state is None else fresh(initial_state)
        o = step(*(None if t is None else t[:, 0] for t in tensors), state, scale, *options)
        return o[:, None], state if output_final_state else None
    return op(*tensors, scale, initial_state, output_final_state, cu_seqlens, *options)


def fresh(state: Tensor) -> Tensor:
    return state.clone(memory_format=torch.contiguous_format)


def one_token(cu_seqlens: Tensor | None, *tensors: Tensor | None) -> bool:
    q = next(t for t in tensors[1:] if t is not None)  # a state comes first
    if q.dim() != 4 or q.shape[1] != 1 or cu_seqlens is not None or q.dtype not in DTYPES:
        return False
    return not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors))


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
    qk_l2norm: bool,
) -> tuple[Tensor, Tensor | None]:
    shape = (q.shape[0], v.shape[-2], q.shape[-1], v.shape[-1])
    tensors, options = (q, k, v, g, beta), (scale, initial_state, output_final_state, cu_seqlens, qk_l2norm)
    return run(gated_delta_rule, gated_delta_rule_step, tensors, shape, *options)
