"""Observation tokens drawn by counter: in C++ on the CPU, in torch on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from icrl_kernels import _C, _checks
from icrl_kernels.tabular import counter_rng, packed


def draw_tokens(emission: Tensor, task: Tensor, state: Tensor, key: Tensor) -> Tensor:
    """Token k of observation m ~ emission[task[m], k, state[m], :], by uniform k of key[m]; -1 where state[m] is -1.

    Uniforms are `counter_rng.uniforms(key, 0, K)`; sums are in float64, in order.

    Args:
        emission: [N,K,S,O] float32, O at least 1; rows that are read must sum to about 1. task, state, key: [M] int64,
            0 ≤ task < N, -1 ≤ state < S. All on one device.
    Returns:
        [M,K] int64.
    Raises:
        ValueError: a shape, dtype, device or index is not as above; on a GPU the host waits for the indices.
    """
    _checks.shape("emission", emission, ["N", "K", "S", "O"])
    n, k, s, o = emission.shape
    _checks.dtype("emission", emission, [torch.float32])
    _checks.shape("state", state, ["M"])
    m = len(state)
    for name, tensor in (("task", task), ("state", state), ("key", key)):
        _checks.shape(name, tensor, ["M"], M=m)
        _checks.dtype(name, tensor, [torch.int64])
    device = _checks.same_device(emission=emission, task=task, state=state, key=key)
    out = torch.empty(m, k, dtype=torch.int64, device=device)
    if m:
        if not o:
            raise ValueError("emission: wanted at least one observed id, got shape " + str(list(emission.shape)))
        for name, tensor, least, most in (("task", task, 0, n), ("state", state, -1, s)):
            if int(tensor.min()) < least or int(tensor.max()) >= most:
                raise ValueError(
                    f"{name}: wanted {least} to {most - 1}, got {int(tensor.min())} to {int(tensor.max())}"
                )
        if device.type != "cpu":
            return draw_tokens_reference(emission, task, state, key)
        given = [t.contiguous() for t in (emission, task, state, key)]
        _C.draw_tokens(*(t.data_ptr() for t in given), out.data_ptr(), m, k, s, o, torch.get_num_threads())
    return out


def draw_tokens_reference(emission: Tensor, task: Tensor, state: Tensor, key: Tensor) -> Tensor:
    """The specification of `draw_tokens`, in torch on any device."""
    _, tokens, _, ids = emission.shape
    out = torch.empty(len(state), tokens, dtype=torch.int64, device=state.device)
    records = torch.arange(len(state), dtype=torch.int64, device=state.device)
    for some in records.split(max(1, packed.ENTRIES // max(1, tokens * ids))):
        total = emission[task[some], :, state[some]].double().cumsum(-1)
        u = counter_rng.uniforms(key[some], 0, tokens) * (1 - 2.0**-52)  # so that rounding cannot reach the total
        out[some] = (total <= (u * total[..., -1])[..., None]).sum(-1).clamp(max=ids - 1)
    return torch.where(state[:, None] < 0, -1, out)
