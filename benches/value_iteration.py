"""Tasks solved per second on one CPU core and on two threads: value_iteration against quantecon and batched torch.

Tables are dense float32, as an AnyMDP task stores them, made here: banded (each row one window near its state, density
as AnyMDP's) and Garnet (scattered successors). Each answer is checked against the float64 reference before it is timed.
quantecon is given its problem object ready-made; value_iteration packs and checks the tables within its time.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

from benches import common
from icrl_kernels import value_iteration

DISCOUNTS = (0.5, 0.93, 0.994)
DENSITY = {16: 0.315, 32: 0.235, 64: 0.161, 128: 0.111}  # of AnyMDP's tables


def banded(n: int, s: int, a: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    width = DENSITY.get(s, 14 / s) * s
    place = torch.arange(s)
    centre = (place[:, None, None] + torch.randn(n, s, a, 1, generator=g) * width * 0.5).clamp(0, s - 1)
    near = (place - centre).abs() <= torch.rand(n, s, a, 1, generator=g) * width * 0.4 + width * 0.3
    t = torch.where(near, torch.rand(n, s, a, s, generator=g) + 0.01, 0.0)
    t = t / t.sum(-1, keepdim=True)
    t[:, -1] = 0  # one terminal state
    return t, torch.randn(n, s, a, s, generator=g)


def garnet(n: int, s: int, a: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    successors = torch.rand(n, s, a, s, generator=g).argsort(-1)[..., :4]
    t = torch.zeros(n, s, a, s).scatter_(-1, successors, torch.rand(n, s, a, 4, generator=g) + 0.01)
    return t / t.sum(-1, keepdim=True), torch.randn(n, s, a, s, generator=g)


def torch_value_iteration(transition: Tensor, reward: Tensor, gamma: float, tol: float) -> Tensor:
    v = torch.zeros(transition.shape[:2], dtype=transition.dtype)
    while True:
        q = reward + gamma * torch.einsum("nsaj,nj->nsa", transition, v)
        new = q.amax(-1)
        if (new - v).abs().max() * gamma / (1 - gamma) <= tol:
            return new
        v = new


def rivals(t: Tensor, r: Tensor, gamma: float, single: bool) -> dict[str, Any]:
    """Functions that return V [N,S]; what they need prepared is prepared here."""
    t64 = t.double()
    mean = (t64 * r).sum(-1)
    functions: dict[str, Any] = {"icrl": lambda: value_iteration(t, r, gamma).v}
    if not single:
        return functions
    if gamma <= 0.95:  # thousands of sweeps of dense tables otherwise
        functions["torch value iteration float64"] = lambda: torch_value_iteration(t64, mean, gamma, 1e-6)
    try:
        import numpy as np
        from quantecon.markov import DiscreteDP
    except ImportError:
        return functions
    closed = t64.clone()  # quantecon wants stochastic rows: a terminal state stays where it is and earns nothing
    done = (closed == 0).all(-1).all(-1)
    closed[done] += torch.eye(t.shape[1], dtype=torch.float64)[:, None, :].expand(-1, t.shape[2], -1)[
        done.nonzero()[:, 1]
    ]
    closed /= closed.sum(-1, keepdim=True)
    problems = [DiscreteDP(mean[i].numpy(), closed[i].numpy(), gamma) for i in range(len(t))]
    functions["quantecon policy iteration"] = lambda: torch.from_numpy(
        np.stack([p.solve(method="policy_iteration").v for p in problems])
    )
    return functions


def run(args: argparse.Namespace | None = None) -> list[dict[str, Any]]:
    quick = bool(getattr(args, "quick", False))
    before, rows = torch.get_num_threads(), []
    sizes = (16, 64) if quick else (16, 32, 64, 128)
    try:
        for kind, make in (("banded", banded), ("garnet", garnet)):
            for s in sizes:
                n = {16: 256, 32: 128, 64: 64, 128: 32}[s]
                t, r = make(n, s)
                for gamma in DISCOUNTS:
                    reference = value_iteration(t, r, gamma, backend="reference")
                    row: dict[str, Any] = {"tables": kind, "states": s, "actions": 5, "discount": gamma, "tasks": n}
                    for threads in (1, 2):
                        torch.set_num_threads(threads)
                        functions = rivals(t, r, gamma, threads == 1)
                        for name, f in functions.items():
                            error = float((f() - reference.v).abs().max())
                            limit = 1e-6 + float(reference.error_bound.max())
                            # quantecon's rows are renormalised, which moves values by about 1e-7 relative
                            if name.startswith("quantecon"):
                                limit += 1e-6 * float(reference.v.abs().max()) / (1 - gamma)
                            if not error <= limit:
                                raise AssertionError(f"{name}: error {error:.2e} on {kind} {s} {gamma}")
                            row[f"{name} error"] = error
                        times = common.interleaved(functions, repeats=3 if quick else 15, warmup=1)
                        for name, seconds in times.items():
                            median = common.summary(seconds)["median_ms"] / 1e3
                            row[f"{name}, {threads} thread{'s' * (threads > 1)}: tasks/s"] = n / median
                    for name in rivals(t[:1], r[:1], gamma, True):
                        if name != "icrl":
                            row[f"speed-up over {name}"] = (
                                row["icrl, 1 thread: tasks/s"] / row[f"{name}, 1 thread: tasks/s"]
                            )
                    rows.append(row)
    finally:
        torch.set_num_threads(before)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two sizes, few repeats, nothing written")
    args = parser.parse_args()
    rows = run(args)
    for row in rows:
        print({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()})
    if not args.quick:
        print(common.write("value_iteration_cpu", rows))


if __name__ == "__main__":
    main()
