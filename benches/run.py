"""python -m benches.run --op gla --peer torch,sdpa: check an op, time it beside its peers, write results/<op>_<cpu|gpu>.json.

`--sweep`: time per token from 1K to 2.5M tokens instead, to results/<op>_sweep_<cpu|gpu>.json. On a CPU in float32, with
the matmul floor: the op's multiply-adds at the rate of torch.bmm on 64 x 64 matrices in cache, measured in the same run.
On a GPU in bfloat16 with float32 gates, K = V = 128; the peer `fla` is flash-linear-attention's best mode.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benches import common
from benches.ops import OPS, Op
from icrl_kernels.testing import assert_as_good_as_torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
SHAPES = {"cpu": [(4, 4096, 4, 64), (32, 512, 6, 32), (1, 16384, 4, 128)], "cuda": [(8, 16384, 4, 128)]}  # B, T, H, D
STEPS = {"cpu": [(1, 4, 64), (16, 4, 64), (64, 4, 64)], "cuda": [(64, 4, 128)]}  # B, H, D
SWEEP = {"cpu": (1, 2, 64), "cuda": (1, 4, 128)}  # B, H, D
LENGTHS = [1024, 4096, 16384, 65536, 262144, 1048576, 2500000]


def flatten(result: Any) -> list[Tensor]:
    return [x for r in result for x in (flatten(r) if isinstance(r, tuple) else [r])]


def check(op: Op, gate: str) -> None:
    """Values against float64 before any timing."""
    tensors = op.inputs(2, 200, 2, 32, gate, DEVICE, DTYPE)
    wide = [None if t is None else t.double() for t in tensors]
    runs = [(op.run, tensors), (op.reference, tensors), (op.reference, wide)]
    for actual, plain, exact in zip(*(flatten(f(*x, output_final_state=True)) for f, x in runs), strict=True):
        assert_as_good_as_torch(actual, plain, exact)


def matmul_rate() -> float:
    a = torch.randn(256, 64, 64)
    return 2 * 256 * 64**3 / min(common.interleaved({"bmm": lambda: torch.bmm(a, a)}, repeats=20)["bmm"])


def forward(f: Callable, tensors: list) -> Callable[[], None]:
    def once() -> None:
        with torch.no_grad():
            f(*tensors)

    return once


def train(f: Callable, tensors: list) -> Callable[[], None]:
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    gradient = torch.ones_like(tensors[2])

    def once() -> None:
        torch.autograd.grad(f(*leaves)[0], [x for x in leaves if x is not None], gradient)

    return once


def best_torch(op: Op, how: Callable, tensors: list) -> Callable[[], None]:
    """The chunkwise form in torch at the chunk length that suits it best, for this use of it."""
    tried = {str(c): how(lambda *x, c=c: op.torch(*x, chunk=c), tensors) for c in op.chunks}
    times = common.interleaved(tried, 2, 1)
    return tried[min(times, key=lambda c: min(times[c]))]


def sdpa(*tensors: Tensor) -> tuple[Tensor]:
    q, k, v = (x.transpose(1, 2) for x in (tensors[:3] if len(tensors) < 6 else (tensors[0], *tensors[2:4])))  # rwkv7's
    return (torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2),)


def fla(name: str, gate: str) -> Callable:
    """flash-linear-attention's chunk op of the same meaning, its arguments in our order."""
    if DEVICE != "cuda":
        raise SystemExit("--peer fla: its kernels need a GPU; on a CPU the peers are torch and sdpa")
    from fla import ops

    if name == "gated_delta_rule" and gate == "none":
        return lambda q, k, v, g, beta: ops.chunk_delta_rule(q, k, v, beta)
    return {
        ("gla", "none"): lambda q, k, v, g: ops.chunk_linear_attn(q, k, v, normalize=False),
        ("gla", "scalar"): lambda q, k, v, g: ops.chunk_simple_gla(q, k, v, g),
        ("gla", "channel"): lambda q, k, v, g: ops.chunk_gla(q, k, v, g),
        ("gsa", "slot"): lambda q, k, v, s, g: ops.chunk_gsa(q, k, v, s, g),
        ("gated_delta_rule", "scalar"): lambda q, k, v, g, beta: ops.chunk_gated_delta_rule(q, k, v, g, beta),
        ("gated_delta_rule", "channel"): lambda q, k, v, g, beta: ops.chunk_kda(q, k, v, g, beta),
        ("rwkv7", "channel"): lambda r, w, k, v, a, b: ops.chunk_rwkv7(r, w, k, v, a, b),
    }[name, gate]


def row(times: dict[str, list[float]], **label: Any) -> dict[str, Any]:
    """Medians in ms; each peer's ratio is the median of the runs' ratios: both runs of a pair met the same neighbours."""
    mine = times["icrl"]
    result = {**label, "ms": statistics.median(mine) * 1e3}
    for name in (n for n in times if n != "icrl"):
        result[f"{name} x"] = statistics.median(b / a for a, b in zip(mine, times[name], strict=True))
        result[f"{name} ms"] = statistics.median(times[name]) * 1e3
    return result


def sequences(name: str, op: Op, peers: list[str], repeats: int) -> list[dict[str, Any]]:
    rows, rate = [], matmul_rate() if DEVICE == "cpu" else None
    for shape in SHAPES[DEVICE]:
        B, T, H, D = shape
        for gate in op.gates:
            tensors = op.inputs(*shape, gate, DEVICE, DTYPE)
            for what, how, work in zip(("forward", "fwd+bwd"), (forward, train), op.flops(D), strict=True):
                runs = {"icrl": how(op.run, tensors)}
                if "torch" in peers:
                    runs["torch"] = best_torch(op, how, tensors)
                if "fla" in peers:
                    runs["fla"] = how(fla(name, gate), tensors)
                if "sdpa" in peers and what == "forward" and gate in ("channel", "slot"):
                    runs["sdpa"] = how(sdpa, tensors)
                result = row(common.interleaved(runs, repeats), what=what, shape="x".join(map(str, shape)), gate=gate)
                if rate:
                    result["of floor"] = result["ms"] / (B * T * H * work / rate * 1e3)
                rows.append(result)
    return rows


def steps(op: Op, peers: list[str], repeats: int) -> list[dict[str, Any]]:
    rows = []
    for B, H, D in STEPS[DEVICE]:
        for gate in op.gates:
            tokens = [None if t is None else t[:, 0] for t in op.inputs(B, 1, H, D, gate, DEVICE, DTYPE)]
            state = op.states(B, H, D, DEVICE)

            def hundred(f, tokens=tokens, state=state):
                with torch.no_grad():
                    for _ in range(100):
                        f(tokens, state)

            runs = {"icrl": lambda f=hundred: f(op.step)}
            if "torch" in peers:
                runs["torch"] = lambda f=hundred: f(op.torch_step)
            rows.append(row(common.interleaved(runs, repeats), what="100 steps", shape=f"{B}x{H}x{D}", gate=gate))
    return rows


def sweep(op: Op, repeats: int) -> list[dict[str, Any]]:
    rows = []
    B, H, D = SWEEP[DEVICE]
    for T in LENGTHS:
        tensors = op.inputs(B, T, H, D, op.gates[-1], DEVICE, DTYPE)
        for what, how in (("forward", forward), ("fwd+bwd", train)):
            times = common.interleaved({"icrl": how(op.run, tensors)}, max(3, repeats if T < 1 << 17 else 3), 1)
            result = row(times, what=what, shape=f"{B}x{T}x{H}x{D}", gate=op.gates[-1], T=T)
            rows.append({**result, "ns per token and head": result["ms"] * 1e6 / (B * T * H)})
    return rows


def table(rows: list[dict]) -> str:
    columns = list(dict.fromkeys(name for r in rows for name in r))
    cells = [[f"{x:.3g}" if isinstance(x, float) else str(x) for x in (r.get(c, "") for c in columns)] for r in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    return "\n".join("  ".join(x.rjust(w) for x, w in zip(line, widths, strict=True)) for line in [columns, *cells])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", required=True, choices=OPS)
    parser.add_argument("--peer", default="torch,sdpa", help="comma-separated: torch, sdpa, fla")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--sweep", action="store_true", help="time per token over T, and nothing else")
    args = parser.parse_args()
    op, peers = OPS[args.op], args.peer.split(",")
    if unknown := set(peers) - {"torch", "sdpa", "fla"}:
        parser.error(f"--peer: wanted torch, sdpa or fla, got {', '.join(unknown)}")
    for gate in op.gates:
        check(op, gate)
    rows = sweep(op, args.repeats) if args.sweep else sequences(args.op, op, peers, args.repeats)
    if not args.sweep:
        rows += steps(op, peers, args.repeats)
    print(table(rows))
    kind = "gpu" if DEVICE == "cuda" else "cpu"
    print(common.write(f"{args.op}_{'sweep_' if args.sweep else ''}{kind}", rows))


if __name__ == "__main__":
    main()
