"""Gated linear attention beside its chunkwise form in torch (its best chunk) and causal softmax attention.

flops counts the multiply-adds that chunks of 16 need; the floor is their time at the rate of torch.bmm on 64 x 64
matrices in cache, measured in the same run.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import Tensor

from benches import common
from icrl_kernels import gla, gla_reference, gla_step
from icrl_kernels.testing import assert_as_good_as_torch, gla_chunkwise_torch

CHUNK = 16
SHAPES = [(4, 4096, 4, 64), (32, 512, 6, 32), (1, 16384, 4, 128)]  # B, T, H, K = V
STEPS = [(1, 4, 64), (16, 4, 64), (64, 6, 32)]
SWEEP = [1024, 4096, 16384, 65536, 262144]


def inputs(B: int, T: int, H: int, D: int, gate: str, device: str) -> Any:
    q, k, v = (torch.randn(B, T, H, D, device=device) for _ in range(3))
    shape = {"none": None, "scalar": (B, T, H), "channel": (B, T, H, D)}[gate]
    g = None if shape is None else torch.nn.functional.logsigmoid(torch.randn(shape, device=device)) / 16
    return [q, k, v, g]


def flops(tokens: int, D: int) -> tuple[float, float]:
    """Forward; forward and backward, recomputed states included."""
    forward = tokens * (4 * D * D + 2 * CHUNK * D + (CHUNK + 1) * D)
    return forward, forward + tokens * (10 * D * D + 4 * CHUNK * D + 3 * (CHUNK + 1) * D)


def matmul_rate() -> float:
    a = torch.randn(256, 64, 64)
    times = common.interleaved({"bmm": lambda: torch.bmm(a, a)}, repeats=20)["bmm"]
    return 2 * 256 * 64**3 / min(times)


def check(gate: str, device: str) -> None:
    tensors = inputs(2, 200, 2, 32, gate, device)
    wide: Any = [None if t is None else t.double() for t in tensors]
    results: Any = [
        f(*x, output_final_state=True) for f, x in [(gla, tensors), (gla_reference, tensors), (gla_reference, wide)]
    ]
    for actual, plain, exact in zip(*results, strict=True):
        assert_as_good_as_torch(actual, plain, exact)


def train(f, tensors: Any):
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    gradient = torch.ones_like(tensors[2])

    def once():
        torch.autograd.grad(f(*leaves)[0], [x for x in leaves if x is not None], gradient)

    return once


def sdpa(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None) -> Any:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return [torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)]


def best_chunk(tensors: Any) -> int:
    times = common.interleaved(
        {str(c): lambda c=c: gla_chunkwise_torch(*tensors, chunk=c) for c in (32, 64, 128)}, 2, 1
    )
    return int(min(times, key=lambda c: min(times[c])))


def row(
    what: str,
    shape: tuple,
    gate: str,
    times: dict[str, list[float]],
    work: float | None,
    rate: float | None,
    op: str = "gla",
) -> dict[str, Any]:
    median = {name: statistics.median(x) * 1e3 for name, x in times.items()}
    result: dict[str, Any] = {"what": what, "shape": "x".join(map(str, shape)), "gate": gate, "ms": median[op]}
    if work is not None and rate is not None:
        result["GFLOP/s"] = work / median[op] / 1e6
        result["of floor"] = median[op] / (work / rate * 1e3)
    for name, ms in median.items():
        if name != op:
            # each run's ratio, then their median: both runs of a pair met the same neighbours
            result[f"{name} x"] = statistics.median(b / a for a, b in zip(times[op], times[name], strict=True))
            result[f"{name} ms"] = ms
    return result


def run(args) -> list[dict[str, Any]]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    peers = args.peer.split(",")
    rate = matmul_rate() if device == "cpu" else None
    rows = []
    for gate in ("none", "scalar", "channel"):
        check(gate, device)
    for shape in SHAPES:
        B, T, H, D = shape
        for gate in ("none", "scalar", "channel"):
            tensors = inputs(*shape, gate, device)
            forward, both = flops(B * T * H, D)
            with torch.no_grad():
                runs: dict[str, Any] = {"gla": lambda t=tensors: gla(*t)}
                if "torch" in peers:
                    chunk = best_chunk(tensors)
                    runs["torch"] = lambda t=tensors, c=chunk: gla_chunkwise_torch(*t, chunk=c)
                if "sdpa" in peers and gate == "channel":
                    runs["sdpa"] = lambda t=tensors: sdpa(*t)
                rows.append(row("forward", shape, gate, common.interleaved(runs, args.repeats), forward, rate))
            runs = {"gla": train(gla, tensors)}
            if "torch" in peers:
                runs["torch"] = train(lambda *t, c=chunk: gla_chunkwise_torch(*t, chunk=c), tensors)
            rows.append(row("fwd+bwd", shape, gate, common.interleaved(runs, args.repeats), both, rate))
    rows += steps(args, device)
    if args.sweep:
        rows += sweep(args, device)
    return rows


def steps(args, device: str) -> list[dict[str, Any]]:
    rows = []
    for B, H, D in STEPS:
        q, k, v, g = (t[:, 0] for t in inputs(B, 1, H, D, "channel", device) if t is not None)
        state = torch.zeros(B, H, D, D, device=device)

        def ours(q=q, k=k, v=v, g=g, state=state):
            for _ in range(100):
                gla_step(q, k, v, g, state)

        def torch_step(q=q, k=k, v=v, g=g, state=state):
            for _ in range(100):
                state.mul_(g.exp()[..., None]).add_(k[..., None] * v[..., None, :])
                _ = (q[..., None, :] @ state).squeeze(-2) * q.shape[-1] ** -0.5

        runs = {"gla": ours, "torch": torch_step} if "torch" in args.peer.split(",") else {"gla": ours}
        with torch.no_grad():
            rows.append(row("100 steps", (B, H, D), "channel", common.interleaved(runs, args.repeats), None, None))
    return rows


def sweep(args, device: str) -> list[dict[str, Any]]:
    rows = []
    for T in SWEEP:
        tensors = inputs(1, T, 2, 64, "channel", device)
        for what, f in (("forward", lambda t=tensors: gla(*t)), ("fwd+bwd", train(gla, tensors))):
            result = row(what, (1, T, 2, 64), "channel", common.interleaved({"gla": f}, args.repeats), None, None)
            rows.append({**result, "ns/token-head": result["ms"] * 1e6 / (2 * T)})
    return rows
