"""Gated slot attention beside its chunkwise form in torch (its best chunk) and causal softmax attention.

flops counts the multiply-adds that chunks of 16 need; the floor is their time at the rate of torch.bmm on 64 x 64
matrices in cache, measured in the same run.
"""

from __future__ import annotations

from typing import Any

import torch

from benches import common
from benches.gla import CHUNK, SWEEP, matmul_rate, row, sdpa, train
from icrl_kernels import gsa, gsa_reference, gsa_step
from icrl_kernels.testing import assert_as_good_as_torch, gsa_chunkwise_torch

OP = "gsa"
SHAPES = [(4, 4096, 4, 64, 64), (32, 512, 6, 32, 32), (1, 16384, 4, 128, 64)]  # B, T, H, K = V, M
STEPS = [(1, 4, 64, 64), (16, 4, 64, 64), (64, 6, 32, 32)]


def inputs(B: int, T: int, H: int, D: int, M: int, device: str) -> Any:
    """The paper's gates: s = 1 - exp g."""
    q, k, v = (torch.randn(B, T, H, D, device=device) for _ in range(3))
    g = torch.nn.functional.logsigmoid(torch.randn(B, T, H, M, device=device)) / 16
    return [q, k, v, 1 - g.exp(), g]


def flops(tokens: int, D: int, M: int) -> tuple[float, float]:
    """Forward; forward and backward, recomputed states and slots included."""
    forward = tokens * (8 * D * M + CHUNK * (2 * D + 2 * M) + (CHUNK + 1) * (D + M))
    again = tokens * (6 * D * M + CHUNK * (2 * D + M))
    return forward, forward + again + tokens * (16 * D * M + CHUNK * (4 * M + 2 * D) + (CHUNK + 1) * (3 * M + 3 * D))


def check(device: str) -> None:
    tensors = inputs(2, 200, 2, 32, 24, device)
    wide = [t.double() for t in tensors]
    results: Any = [
        f(*x, output_final_state=True) for f, x in [(gsa, tensors), (gsa_reference, tensors), (gsa_reference, wide)]
    ]
    for actual, plain, exact in zip(*((o, *state) for o, state in results), strict=True):
        assert_as_good_as_torch(actual, plain, exact)


def best_chunk(tensors: Any) -> int:
    times = common.interleaved(
        {str(c): lambda c=c: gsa_chunkwise_torch(*tensors, chunk=c) for c in (32, 64, 128)}, 2, 1
    )
    return int(min(times, key=lambda c: min(times[c])))


def run(args) -> list[dict[str, Any]]:
    device = "cpu"  # there is no GPU kernel yet
    peers = args.peer.split(",")
    rate = matmul_rate()
    rows = []
    check(device)
    for shape in SHAPES:
        B, T, H, D, M = shape
        tensors = inputs(*shape, device)
        forward, both = flops(B * T * H, D, M)
        runs: dict[str, Any] = {OP: lambda t=tensors: gsa(*t)}
        trains = {OP: train(gsa, tensors)}
        with torch.no_grad():
            if "torch" in peers:
                chunk = best_chunk(tensors)
                runs["torch"] = lambda t=tensors, c=chunk: gsa_chunkwise_torch(*t, chunk=c)
                trains["torch"] = train(lambda *t, c=chunk: gsa_chunkwise_torch(*t, chunk=c), tensors)
            if "sdpa" in peers:
                runs["sdpa"] = lambda t=tensors: sdpa(t[0], t[1], t[2], None)
            rows.append(row("forward", shape, "channel", common.interleaved(runs, args.repeats), forward, rate, OP))
        rows.append(row("fwd+bwd", shape, "channel", common.interleaved(trains, args.repeats), both, rate, OP))
    rows += steps(args, device)
    if args.sweep:
        rows += sweep(args, device)
    return rows


def steps(args, device: str) -> list[dict[str, Any]]:
    rows = []
    for B, H, D, M in STEPS:
        q, k, v, s, g = (t[:, 0] for t in inputs(B, 1, H, D, M, device))
        keys, values = torch.zeros(B, H, D, M, device=device), torch.zeros(B, H, M, D, device=device)

        def ours(q=q, k=k, v=v, s=s, g=g, state=(keys, values)):
            for _ in range(100):
                gsa_step(q, k, v, s, g, state)

        def torch_step(q=q, k=k, v=v, s=s, g=g, keys=keys, values=values):
            for _ in range(100):
                decay = g.exp()
                keys.mul_(decay[..., None, :]).add_(k[..., None] * s[..., None, :])
                values.mul_(decay[..., None]).add_(s[..., None] * v[..., None, :])
                p = (q[..., None, :] @ keys * q.shape[-1] ** -0.5).softmax(-1)
                _ = (p @ values).squeeze(-2)

        runs = {OP: ours, "torch": torch_step} if "torch" in args.peer.split(",") else {OP: ours}
        with torch.no_grad():
            rows.append(
                row("100 steps", (B, H, D, M), "channel", common.interleaved(runs, args.repeats), None, None, OP)
            )
    return rows


def sweep(args, device: str) -> list[dict[str, Any]]:
    rows = []
    for T in SWEEP:
        shape = (1, T, 2, 64, 64)
        tensors = inputs(*shape, device)
        for what, f in (("forward", lambda t=tensors: gsa(*t)), ("fwd+bwd", train(gsa, tensors))):
            result = row(what, shape, "channel", common.interleaved({OP: f}, args.repeats), None, None, OP)
            rows.append({**result, "ns/token-head": result["ms"] * 1e6 / (2 * T)})
    return rows
