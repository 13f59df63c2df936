"""The tolerance policy, public so that a port can be held to it.

A kernel may err, against a float64 reference, by at most `factor` times what plain torch errs in the kernel's dtype,
plus a floor of a few roundings of the largest entry. Errors are Frobenius norms of the whole tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor


def error(a: Tensor, reference: Tensor) -> float:
    """‖a − reference‖ in float64; NaN where either holds one that the other does not."""
    if a.shape != reference.shape:
        raise AssertionError(f"shape {list(a.shape)}, wanted {list(reference.shape)}")
    return float(torch.linalg.vector_norm(a.double() - reference.double()))


def assert_as_good_as_torch(
    actual: Tensor,
    same_dtype: Tensor,
    reference: Tensor,
    *,
    factor: float = 2.0,
    roundings: float = 4.0,
    name: str = "",
) -> None:
    """Assert ‖actual − reference‖ ≤ factor·‖same_dtype − reference‖ + roundings·eps·‖reference‖.

    Args:
        actual: the kernel's result. same_dtype: plain torch's, in the kernel's dtype. reference: float64.
    """
    eps = torch.finfo(actual.dtype).eps
    mine, theirs = error(actual, reference), error(same_dtype, reference)
    bound = factor * theirs + roundings * eps * float(torch.linalg.vector_norm(reference.double())) + 1e-30
    if not mine <= bound:  # a NaN fails
        raise AssertionError(f"{name} error {mine:.3e} > bound {bound:.3e} (torch in {actual.dtype} errs {theirs:.3e})")


def gla_chunkwise_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    *,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """Gated linear attention composed of batched matmuls, as one would write it in torch: the benches' peer.

    Within a chunk scores are (q e^b)(k e^-b)ᵀ, b the cumulative gates from the chunk's start, so that gates whose sum
    is less than about -80 over a chunk overflow: use it with mild gates. T must be a multiple of `chunk`, H = Hk.
    """
    B, T, H, K = q.shape
    V, n = v.shape[-1], T // chunk
    scale = float(K**-0.5) if scale is None else scale
    q = q * scale
    q, k, v = (x.float().transpose(1, 2).reshape(B * H, n, chunk, x.shape[-1]) for x in (q, k, v))
    if g is None:
        b = q.new_zeros(B * H, n, chunk, 1)
    else:
        g = (g if g.dim() == 4 else g[..., None]).float()
        b = g.transpose(1, 2).reshape(B * H, n, chunk, g.shape[-1]).cumsum(2)
    total = b[:, :, -1:]
    queries = q * b.exp()
    scores = (queries @ (k * (-b).exp()).transpose(-1, -2)).tril()
    o = scores @ v
    updates = (k * (total - b).exp()).transpose(-1, -2) @ v  # [B*H, n, K, V]
    decay = total.exp().transpose(-1, -2)
    state = q.new_zeros(B * H, K, V) if initial_state is None else initial_state.float().reshape(B * H, K, V)
    states = []
    for factor, update in zip(decay.unbind(1), updates.unbind(1), strict=True):  # whose gradients are linear in T
        states.append(state)
        state = factor * state + update
    o = o + queries @ torch.stack(states, 1)
    return o.reshape(B, H, T, V).transpose(1, 2), state.reshape(B, H, K, V)


def gated_delta_rule_chunkwise_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    *,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """The gated delta rule composed of batched matmuls and one triangular solve per chunk (its WY form): the benches' peer.

    Mild gates, T a multiple of `chunk` and equal heads, as for `gla_chunkwise_torch`; keys of norm about 1.
    """
    B, T, H, K = q.shape
    V, n = v.shape[-1], T // chunk
    q = q * (float(K**-0.5) if scale is None else scale)
    q, k, v = (x.float().transpose(1, 2).reshape(B * H, n, chunk, x.shape[-1]) for x in (q, k, v))
    if g is None:
        b = q.new_zeros(B * H, n, chunk, 1)
    else:
        g = (g if g.dim() == 4 else g[..., None]).float()
        b = g.transpose(1, 2).reshape(B * H, n, chunk, g.shape[-1]).cumsum(2)
    weight = q.new_ones(B, T, H) if beta is None else beta.float()
    weight = weight.transpose(1, 2).reshape(B * H, n, chunk, 1)
    total = b[:, :, -1:]
    queries, keys, inverse = q * b.exp(), k * b.exp(), (k * (-b).exp()).transpose(-1, -2)
    scores = (queries @ inverse).tril()
    system = torch.eye(chunk, dtype=q.dtype, device=q.device) + (weight * (keys @ inverse)).tril(-1)
    solved = torch.linalg.solve_triangular(system, weight * torch.cat([v, keys], -1), upper=False, unitriangular=True)
    values, readers = solved.split([V, K], -1)  # u = values − readers @ state
    last = (k * (total - b).exp()).transpose(-1, -2)
    decay = total.exp().transpose(-1, -2)
    state = q.new_zeros(B * H, K, V) if initial_state is None else initial_state.float().reshape(B * H, K, V)
    outputs = []
    chunks = zip(*(x.unbind(1) for x in (values, readers, queries, scores, decay, last)), strict=True)
    for value, reader, query, score, factor, key in chunks:
        u = value - reader @ state
        outputs.append(query @ state + score @ u)
        state = factor * state + key @ u
    return torch.stack(outputs, 1).reshape(B, H, T, V).transpose(1, 2), state.reshape(B, H, K, V)


def gsa_chunkwise_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    g: Tensor | None = None,
    scale: float | None = None,
    initial_state: tuple[Tensor, Tensor] | None = None,
    *,
    chunk: int = 64,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Gated slot attention composed of batched matmuls, its second pass `gla_chunkwise_torch`: the benches' peer.

    The same limits: gates whose sum is less than about -80 over a chunk overflow, T a multiple of `chunk`, H = Hk.
    """
    B, T, H, K = q.shape
    M, n = s.shape[-1], T // chunk
    scale = float(K**-0.5) if scale is None else scale

    def heads(x: Tensor) -> Tensor:
        return x.float().transpose(1, 2).reshape(B * H, n, chunk, x.shape[-1])

    queries, keys, writes = heads(q) * scale, heads(k), heads(s)
    b = writes.new_zeros(B * H, n, chunk, 1) if g is None else heads(g).cumsum(2)
    total = b[:, :, -1:]
    scores = (queries @ keys.transpose(-1, -2)).tril()
    updates = keys.transpose(-1, -2) @ (writes * (total - b).exp())  # [B*H, n, K, M]
    decay = total.exp()
    state = q.new_zeros(B * H, K, M).float() if initial_state is None else initial_state[0].float().reshape(B * H, K, M)
    states = []
    for d, u in zip(decay.unbind(1), updates.unbind(1), strict=True):
        states.append(state)
        state = state * d + u
    p = (b.exp() * (scores @ (writes * (-b).exp()) + queries @ torch.stack(states, 1))).softmax(-1)
    p = p.reshape(B, H, T, M).transpose(1, 2)
    values = None if initial_state is None else initial_state[1]
    o, values = gla_chunkwise_torch(p, s, v, g, 1.0, values, chunk=chunk)
    return o, (state.reshape(B, H, K, M), values)


def rwkv7_chunkwise_torch(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    *,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """RWKV-7's rule composed of batched matmuls and one triangular solve per chunk: the benches' peer.

    Mild gates and T a multiple of `chunk`, as for `gla_chunkwise_torch`.
    """
    B, T, H, K = r.shape
    V, n = v.shape[-1], T // chunk
    r, w, k, v, a, b = (
        x.float().transpose(1, 2).reshape(B * H, n, chunk, x.shape[-1]) for x in (r * scale, w, k, v, a, b)
    )
    decays = w.cumsum(2)
    total = decays[:, :, -1:]
    queries = torch.cat([r * decays.exp(), a * (decays - w).exp()], 2)  # a reads what stood before its token's decay
    keys = torch.cat([k, b], 2)
    scores = queries @ (keys * (-decays).exp().repeat(1, 1, 2, 1)).transpose(-1, -2)
    of_r, of_a = scores.split(chunk, 2)
    of_r = of_r.unflatten(3, (2, chunk)).transpose(2, 3).tril().transpose(2, 3).flatten(3)
    with_k, with_b = of_a.split(chunk, 3)
    system = torch.eye(chunk, dtype=r.dtype, device=r.device) - with_b.tril(-1)
    right = torch.cat([with_k.tril(-1) @ v, queries[:, :, chunk:]], -1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    values, readers = solved.split([V, K], -1)  # u = values + readers @ state
    last = (keys * (total - decays).exp().repeat(1, 1, 2, 1)).transpose(-1, -2)
    decay = total.exp().transpose(-1, -2)
    state = r.new_zeros(B * H, K, V) if initial_state is None else initial_state.float().reshape(B * H, K, V)
    outputs = []
    chunks = zip(*(x.unbind(1) for x in (v, values, readers, queries[:, :, :chunk], of_r, decay, last)), strict=True)
    for value, u, reader, query, score, factor, key in chunks:
        written = torch.cat([value, u + reader @ state], 1)
        outputs.append(query @ state + score @ written)
        state = factor * state + key @ written
    return torch.stack(outputs, 1).reshape(B, H, T, V).transpose(1, 2), state.reshape(B, H, K, V)
