"""RWKV-7's generalized delta rule beside its chunkwise form in torch, its best chunk.

flops counts the multiply-adds that chunks of 16 need; the floor is their time at the rate of torch.bmm on 64 x 64
matrices in cache, measured in the same run.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from benches import common
from benches.gla import CHUNK, SHAPES, STEPS, SWEEP, matmul_rate, row, train
from icrl_kernels import rwkv7, rwkv7_reference, rwkv7_step
from icrl_kernels.testing import assert_as_good_as_torch, rwkv7_chunkwise_torch

OP = "rwkv7"


def inputs(B: int, T: int, H: int, D: int, device: str) -> list[torch.Tensor]:
    """r, w, k, v, a, b as RWKV-7's layer makes them: decays between exp(-exp(-1/2)) and 1, a = -kk, b = kk * rate."""
    r, w, k, v, kk, rate = (torch.randn(B, T, H, D, device=device) for _ in range(6))
    kk = torch.nn.functional.normalize(kk, dim=-1)
    return [r, -math.exp(-0.5) * w.sigmoid(), k, v, -kk, kk * rate.sigmoid()]


def flops(tokens: int, D: int) -> tuple[float, float]:
    """Forward; forward and backward, recomputed states and reads of a included."""
    forward = tokens * (8 * D * D + 8 * CHUNK * D + 4 * (CHUNK + 1) * D)
    backward = 24 * D * D + 24 * CHUNK * D + 16 * (CHUNK + 1) * D
    return forward, forward + tokens * backward


def check(device: str) -> None:
    tensors = inputs(2, 200, 2, 32, device)
    wide = [t.double() for t in tensors]
    both = [(rwkv7, tensors), (rwkv7_reference, tensors), (rwkv7_reference, wide)]
    results: Any = [f(*x, output_final_state=True) for f, x in both]
    for actual, plain, exact in zip(*results, strict=True):
        assert_as_good_as_torch(actual, plain, exact)


def best_chunk(tensors: list[torch.Tensor]) -> int:
    times = common.interleaved(
        {str(c): lambda c=c: rwkv7_chunkwise_torch(*tensors, chunk=c) for c in (16, 32, 64)}, 2, 1
    )
    return int(min(times, key=lambda c: min(times[c])))


def run(args) -> list[dict[str, Any]]:
    device = "cpu"  # there is no GPU kernel yet
    peers = args.peer.split(",")
    rate = matmul_rate()
    rows = []
    check(device)
    for shape in SHAPES:
        B, T, H, D = shape
        tensors = inputs(*shape, device)
        forward, both = flops(B * T * H, D)
        chunk = best_chunk(tensors) if "torch" in peers else 0
        with torch.no_grad():
            runs: dict[str, Any] = {OP: lambda t=tensors: rwkv7(*t)}
            if "torch" in peers:
                runs["torch"] = lambda t=tensors, c=chunk: rwkv7_chunkwise_torch(*t, chunk=c)
            rows.append(row("forward", shape, "channel", common.interleaved(runs, args.repeats), forward, rate, OP))
        runs = {OP: train(rwkv7, tensors)}
        if "torch" in peers:
            runs["torch"] = train(lambda *t, c=chunk: rwkv7_chunkwise_torch(*t, chunk=c), tensors)
        rows.append(row("fwd+bwd", shape, "channel", common.interleaved(runs, args.repeats), both, rate, OP))
    rows += steps(args, device)
    if args.sweep:
        rows += sweep(args, device)
    return rows


def steps(args, device: str) -> list[dict[str, Any]]:
    rows = []
    for B, H, D in STEPS:
        r, w, k, v, a, b = (t[:, 0] for t in inputs(B, 1, H, D, device))
        state = torch.zeros(B, H, D, D, device=device)

        def ours(r=r, w=w, k=k, v=v, a=a, b=b, state=state):
            for _ in range(100):
                rwkv7_step(r, w, k, v, a, b, state)

        def torch_step(r=r, w=w, k=k, v=v, a=a, b=b, state=state):
            for _ in range(100):
                u = a[..., None, :] @ state
                state.mul_(w.exp()[..., None]).add_(b[..., None] * u).add_(k[..., None] * v[..., None, :])
                _ = (r[..., None, :] @ state).squeeze(-2)

        runs = {OP: ours, "torch": torch_step} if "torch" in args.peer.split(",") else {OP: ours}
        with torch.no_grad():
            rows.append(row("100 steps", (B, H, D), "channel", common.interleaved(runs, args.repeats), None, None, OP))
    return rows


def sweep(args, device: str) -> list[dict[str, Any]]:
    rows = []
    for T in SWEEP:
        tensors = inputs(1, T, 2, 64, device)
        for what, f in (("forward", lambda t=tensors: rwkv7(*t)), ("fwd+bwd", train(rwkv7, tensors))):
            times = common.interleaved({OP: f}, args.repeats)
            result = row(what, (1, T, 2, 64), "channel", times, None, None, OP)
            rows.append({**result, "ns/token-head": result["ms"] * 1e6 / (2 * T)})
    return rows
