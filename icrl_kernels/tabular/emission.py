"""The C++ entry that draws observation tokens by counter."""

from __future__ import annotations

import torch
from torch import Tensor

from icrl_kernels import _C, _checks


def draw_tokens(emission: Tensor, task: Tensor, state: Tensor, key: Tensor) -> Tensor:
    """Token k of observation m ~ emission[task[m], k, state[m], :], by uniform k of key[m]; -1 where state[m] is -1.

    Uniforms are `icrl.worlds.counter.uniforms(key, 0, K)`; sums are in float64, in order.

    Args:
        emission: [N,K,S,O] float32, O at least 1; rows that are read must sum to about 1. task, state, key: [M] int64,
            0 ≤ task < N, -1 ≤ state < S. All on the CPU.
    Returns:
        [M,K] int64.
    """
    _checks.shape("emission", emission, ["N", "K", "S", "O"])
    n, k, s, o = emission.shape
    _checks.dtype("emission", emission, [torch.float32])
    _checks.shape("state", state, ["M"])
    m = len(state)
    for name, tensor in (("task", task), ("state", state), ("key", key)):
        _checks.shape(name, tensor, ["M"], M=m)
        _checks.dtype(name, tensor, [torch.int64])
    if _checks.same_device(emission=emission, task=task, state=state, key=key).type != "cpu":
        raise ValueError(f"emission: wanted a CPU tensor, got one on {emission.device}")
    out = torch.empty(m, k, dtype=torch.int64)
    if m:
        if not o:
            raise ValueError("emission: wanted at least one observed id, got shape " + str(list(emission.shape)))
        for name, tensor, least, most in (("task", task, 0, n), ("state", state, -1, s)):
            if int(tensor.min()) < least or int(tensor.max()) >= most:
                raise ValueError(
                    f"{name}: wanted {least} to {most - 1}, got {int(tensor.min())} to {int(tensor.max())}"
                )
        given = [t.contiguous() for t in (emission, task, state, key)]
        _C.draw_tokens(*(t.data_ptr() for t in given), out.data_ptr(), m, k, s, o, torch.get_num_threads())
    return out
