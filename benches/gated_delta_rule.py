"""The gated delta rule beside its chunkwise (WY) form in torch, its best chunk.

flops counts the multiply-adds that chunks of 16 need; the floor is their time at the rate of torch.bmm on 64 x 64
matrices in cache, measured in the same run.
"""

from __future__ import annotations

from typing import Any

import torch

from benches import common
from benches.gla import CHUNK, SHAPES, STEPS, SWEEP, matmul_rate, row, train
from icrl_kernels import gated_delta_rule, gated_delta_rule_reference, gated_delta_rule_step
from icrl_kernels.testing import assert_as_good_as_torch, gated_delta_rule_chunkwise_torch

OP = "gated_delta_rule"


def inputs(B: int, T: int, H: int, D: int, gate: str, device: str) -> Any:
    q, k, v = (torch.randn(B, T, H, D, device=device) for _ in range(3))
    k = torch.nn.functional.normalize(k, dim=-1)
    shape = {"none": None, "scalar": (B, T, H), "channel": (B, T, H, D)}[gate]
    g = None if shape is None else torch.nn.functional.logsigmoid(torch.randn(shape, device=device)) / 16
    return [q, k, v, g, torch.rand(B, T, H, device=device)]


def flops(tokens: int, D: int) -> tuple[float, float]:
    """Forward; forward and backward, recomputed states and errors included."""
    triangles = 4 * CHUNK * D + 2 * (CHUNK + 1) * D  # two kinds of scores; the solve and the scores' use
    forward = tokens * (6 * D * D + triangles)
    return forward, forward + tokens * (20 * D * D + 2 * triangles + 4 * (CHUNK + 1) * D)


def check(gate: str, device: str) -> None:
    tensors = inputs(2, 200, 2, 32, gate, device)
    wide: Any = [None if t is None else t.double() for t in tensors]
    both = [(gated_delta_rule, tensors), (gated_delta_rule_reference, tensors), (gated_delta_rule_reference, wide)]
    results: Any = [f(*x, output_final_state=True) for f, x in both]
    for actual, plain, exact in zip(*results, strict=True):
        assert_as_good_as_torch(actual, plain, exact)


def best_chunk(tensors: Any) -> int:
    times = common.interleaved(
        {str(c): lambda c=c: gated_delta_rule_chunkwise_torch(*tensors, chunk=c) for c in (16, 32, 64)}, 2, 1
    )
    return int(min(times, key=lambda c: min(times[c])))


def run(args) -> list[dict[str, Any]]:
    device = "cpu"  # there is no GPU kernel yet
    peers = args.peer.split(",")
    rate = matmul_rate()
    rows = []
    for gate in ("none", "scalar", "channel"):
        check(gate, device)
    for shape in SHAPES:
        B, T, H, D = shape
        for gate in ("none", "scalar", "channel"):
            tensors = inputs(*shape, gate, device)
            forward, both = flops(B * T * H, D)
            with torch.no_grad():
                runs: dict[str, Any] = {OP: lambda t=tensors: gated_delta_rule(*t)}
                if "torch" in peers:
                    chunk = best_chunk(tensors)
                    runs["torch"] = lambda t=tensors, c=chunk: gated_delta_rule_chunkwise_torch(*t, chunk=c)
                rows.append(row("forward", shape, gate, common.interleaved(runs, args.repeats), forward, rate, OP))
            runs = {OP: train(gated_delta_rule, tensors)}
            if "torch" in peers:
                runs["torch"] = train(lambda *t, c=chunk: gated_delta_rule_chunkwise_torch(*t, chunk=c), tensors)
            rows.append(row("fwd+bwd", shape, gate, common.interleaved(runs, args.repeats), both, rate, OP))
    rows += steps(args, device)
    if args.sweep:
        rows += sweep(args, device)
    return rows


def steps(args, device: str) -> list[dict[str, Any]]:
    rows = []
    for B, H, D in STEPS:
        q, k, v, g, beta = (t[:, 0] for t in inputs(B, 1, H, D, "channel", device))
        state = torch.zeros(B, H, D, D, device=device)

        def ours(q=q, k=k, v=v, g=g, beta=beta, state=state):
            for _ in range(100):
                gated_delta_rule_step(q, k, v, g, beta, state)

        def torch_step(q=q, k=k, v=v, g=g, beta=beta, state=state):
            for _ in range(100):
                state.mul_(g.exp()[..., None])
                u = beta[..., None] * (v - (k[..., None, :] @ state).squeeze(-2))
                state.add_(k[..., None] * u[..., None, :])
                _ = (q[..., None, :] @ state).squeeze(-2) * q.shape[-1] ** -0.5

        runs = {OP: ours, "torch": torch_step} if "torch" in args.peer.split(",") else {OP: ours}
        with torch.no_grad():
            rows.append(row("100 steps", (B, H, D), "channel", common.interleaved(runs, args.repeats), None, None, OP))
    return rows


def sweep(args, device: str) -> list[dict[str, Any]]:
    rows = []
    for T in SWEEP:
        tensors = inputs(1, T, 2, 64, "channel", device)
        both = ("forward", lambda t=tensors: gated_delta_rule(*t)), ("fwd+bwd", train(gated_delta_rule, tensors))
        for what, f in both:
            times = common.interleaved({OP: f}, args.repeats)
            result = row(what, (1, T, 2, 64), "channel", times, None, None, OP)
            rows.append({**result, "ns/token-head": result["ms"] * 1e6 / (2 * T)})
    return rows
