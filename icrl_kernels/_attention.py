"""What the linear-attention ops share: their limits, the checks of their common arguments, and tensors made ready for C++."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad

from icrl_kernels import _checks, _registry

GATE_ALLOWANCE = 1e-4
"""Gates are logarithms of decays in [0, 1]. What rounding may put above 0 passes; a gate above this is refused."""

MAX_HEAD_DIM = 256
MOST = torch.finfo(torch.float32).max
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # the codes of csrc/common/vec.h


def check_heads(many: str, few: str, H: int, Hk: int, K: int, V: int) -> None:
    """`many` names the argument with H heads, a multiple of the Hk heads of the one that `few` names."""
    if Hk < 1 or H < 1 or H % Hk:
        raise ValueError(f"{many}: wanted a number of heads that is a multiple of {few}'s, got H={H} and Hk={Hk}")
    for name, size in (("K", K), ("V", V)):
        if not 1 <= size <= MAX_HEAD_DIM:
            raise ValueError(f"{name}: wanted 1 to {MAX_HEAD_DIM} channels per head, got {size}")


def check_sequences(q: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None, **sizes: int) -> None:
    """The packing of q's [B, T] tokens, and initial_state, [N, *sizes]."""
    check_states(q, {"initial_state": (initial_state, tuple(sizes))}, cu_seqlens, **sizes)


def check_states(
    q: Tensor, states: dict[str, tuple[Tensor | None, tuple[str, ...]]], cu_seqlens: Tensor | None, **sizes: int
) -> None:
    """The packing of q's [B, T] tokens, and states, [N, *names of sizes]."""
    N = q.shape[0]
    if cu_seqlens is not None:
        _checks.shape("cu_seqlens", cu_seqlens, ("N+1",))
        _checks.dtype("cu_seqlens", cu_seqlens, (torch.int32, torch.int64))
        if q.shape[0] != 1:
            raise ValueError(f"cu_seqlens: packed sequences want a batch of B=1, got B={q.shape[0]}")
        N = cu_seqlens.shape[0] - 1
        if N < 0:
            raise ValueError("cu_seqlens: wanted N + 1 ≥ 1 entries, got 0")
        if N == 0 and q.shape[1]:
            raise ValueError(f"cu_seqlens: holds no sequence for {q.shape[1]} tokens")
    for name, (state, names) in states.items():
        if state is not None:
            _checks.shape(name, state, ("N", *names), N=N, **sizes)
            _checks.dtype(name, state, (torch.promote_types(q.dtype, torch.float32),))


def check_values(q: Tensor, g: Tensor | None, cu_seqlens: Tensor | None, name: str = "g") -> None:
    """What the CPU kernels refuse as they read, for the reference, which reads no values."""
    bounds(q, cu_seqlens)
    check_gates(g, name)


def check_gates(g: Tensor | None, name: str = "g") -> None:
    """On a CPU; to look at a GPU's values its host would have to wait."""
    if g is not None and g.device.type == "cpu" and bool((g > GATE_ALLOWANCE).any()):
        raise gate_error(name)


def default_scale(scale: float | None, q: Tensor) -> float:
    if scale is None:
        return max(1, q.shape[-1]) ** -0.5
    most = MOST if q.dtype != torch.float64 else 1e308
    if not -most <= scale <= most:  # math.isfinite cannot be traced where torch.compile makes floats symbolic
        raise ValueError(f"scale: wanted a finite number, got {scale}")
    return float(scale)


def refuse_second_derivative(op: str) -> None:
    """Register what differentiating `<op>_backward` raises; without it the second derivative would be zero in silence."""

    def refuse(ctx, *grads):
        raise RuntimeError(f'{op} has no second derivative; backend="reference" has')

    torch.library.register_autograd(f"icrl::{op}_backward", refuse, lib=_registry.LIBRARY)


def refuse_transforms(op: str, *tensors: Tensor | None) -> None:
    """torch.func's derivatives and forward mode, for which torch.library has no place: they would be zero in silence."""
    if torch.compiler.is_compiling():
        return
    given = [t for t in tensors if t is not None]
    reverse = peek_interpreter_stack() is not None and torch.is_grad_enabled()
    if (reverse and any(t.requires_grad for t in given)) or (
        forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in given)
    ):
        raise NotImplementedError(
            f"{op} has no derivative in forward mode, nor by torch.func; its reference, in plain torch, has"
        )


def plain_step(kernel: Callable[..., Any], backend: str, *args: Any) -> Any:
    """What `torch.ops.icrl.<op>_step` would return, in a fraction of the time; None where that is to be asked.

    `kernel` is `_C.<op>_step_plain`, which returns None unless all tensors are dense CPU tensors that fit each other and
    need no gradient. And nothing may want to see the call: no compiler, tracer, mode, forward-mode level or profiler.
    """
    if (
        torch.compiler.is_compiling()
        or (backend != "auto" and backend != "cpu")
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
        or forward_ad._current_level >= 0
    ):
        return None
    return kernel(*args, GATE_ALLOWANCE, torch.get_num_threads(), torch.is_grad_enabled())


def native(op: str, q: Tensor, name: str = "q") -> int:
    code = DTYPES.get(q.dtype)
    if code is None:
        raise ValueError(
            f"{name}: this backend serves float32, bfloat16 and float16, got {q.dtype}; {op} has backend='reference'"
        )
    return code


def pointer(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def bounds(q: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Where each sequence's tokens begin, int64 [N + 1]."""
    B, T = q.shape[:2]
    if cu_seqlens is None:
        return torch.arange(0, (B + 1) * T, T, dtype=torch.int64) if T else torch.zeros(B + 1, dtype=torch.int64)
    result = cu_seqlens.to(torch.int64).contiguous()
    values = result.tolist()
    if not values or values[0] != 0 or values[-1] != T or any(a > b for a, b in pairwise(values)):
        raise ValueError(f"cu_seqlens: wanted a non-decreasing sequence from 0 to T={T}, got {values}")
    return result


def gradients_like(*inputs: Tensor | None) -> tuple[Tensor, ...]:
    """A tensor for each input's gradient; where there is no input an empty one, as the schemas want one."""
    first = next(t for t in inputs if t is not None)
    return tuple(
        torch.empty(0, dtype=torch.float32, device=first.device)
        if t is None
        else torch.empty(t.shape, dtype=t.dtype, device=t.device)
        for t in inputs
    )


def check_output_gradients(q: Tensor, do: Tensor, o: tuple[int, ...], **states: tuple[Tensor, tuple[int, ...]]) -> None:
    """do against o's shape and q's dtype, states' gradients against their shapes. Autograd keeps to these; who calls the
    op itself may not."""
    _checks.shape("do", do, o)
    _checks.dtype("do", do, (q.dtype,))
    for name, (gradient, shape) in states.items():
        _checks.shape(name, gradient, shape)
        _checks.dtype(name, gradient, (torch.float32,))


def gate_error(name: str = "g") -> ValueError:
    return ValueError(
        f"{name}: wanted natural logarithms of decays, at most 0 (to within {GATE_ALLOWANCE}), got a larger one"
    )


def spans(q: Tensor, cu_seqlens: Tensor | None) -> list[tuple[slice, int, int]]:
    """For each sequence: its row of the batch, its first token and the one after its last."""
    if cu_seqlens is None:
        return [(slice(b, b + 1), 0, q.shape[1]) for b in range(q.shape[0])]
    return [(slice(0, 1), a, b) for a, b in pairwise(cu_seqlens.tolist())]
