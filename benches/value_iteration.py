"""Tasks solved per second on one CPU core and on two threads: value_iteration against quantecon and xenoverse.

AnyMDP tasks are `icrl.worlds.sample_anymdp`'s, as dense float32 tables and packed into windows; Garnet tasks are dense.
Rewards are of each transition; checks, expected rewards, the certificate and, from dense tables, the search for windows are
within the time. The runs take turns, so each finds its tables evicted by the others: they come from memory. quantecon is
given problem objects ready-made, rows renormalised as it wants them, and solves each discount from its own start; xenoverse's
solver (numba, stopped by its own rule) runs a few tasks only. Each answer is checked against the float64 reference.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benches import common
from icrl.worlds import sample_anymdp
from icrl_kernels import pack_transition, value_iteration

DISCOUNTS = (0.5, 0.93, 0.994)
ERROR = 1e-6  # allowed, relative to the largest value of the batch
TASKS = {16: 1024, 32: 512, 64: 256, 128: 128}


def garnet(n: int, s: int, a: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    successors = torch.rand(n, s, a, s, generator=g).argsort(-1)[..., :4]
    t = torch.zeros(n, s, a, s).scatter_(-1, successors, torch.rand(n, s, a, 4, generator=g) + 0.01)
    return t / t.sum(-1, keepdim=True), torch.randn(n, s, a, s, generator=g)


def quantecon(t: Tensor, r: Tensor, discounts: Tensor) -> Callable[[], Tensor]:
    from quantecon.markov import DiscreteDP

    closed, mean = t.double(), (t.double() * r).sum(-1)
    stay = torch.eye(t.shape[1], dtype=torch.float64)[:, None, :].expand(t.shape)
    closed = torch.where((closed == 0).all(-1, keepdim=True), stay, closed)  # a terminal state stays and earns nothing
    closed = closed / closed.sum(-1, keepdim=True)
    problems = [
        DiscreteDP(mean[i].numpy(), closed[i].numpy(), gamma) for i in range(len(t)) for gamma in discounts.tolist()
    ]
    return lambda: torch.from_numpy(np.stack([p.solve(method="policy_iteration").v for p in problems])).view(
        len(t), len(discounts), -1
    )


def xenoverse_tasks_per_second(t: Tensor, r: Tensor, discounts: Tensor) -> float:
    from xenoverse.anymdp.solver import update_value_matrix

    seconds = 0.0
    for task, reward in zip(t.double().numpy(), r.double().numpy(), strict=True):
        for gamma in discounts.tolist():
            start = time.perf_counter()
            update_value_matrix(task, reward, gamma, np.zeros(task.shape[:2]))
            seconds += time.perf_counter() - start
    return len(t) / seconds


def rows_of(kind: str, t: Tensor, r: Tensor, discounts: Tensor, repeats: int) -> list[dict[str, Any]]:
    """One row for each form of the tables."""
    n, s, a, _ = t.shape
    packed, reward = pack_transition(t, r)
    want = value_iteration(t, r, discounts, backend="reference")
    solvers: dict[str, Callable[[], Tensor]] = {"dense": lambda: value_iteration(t, r, discounts).v}
    if kind == "anymdp":
        solvers["packed"] = lambda: value_iteration(packed, reward, discounts).v
    errors, largest = {}, float(want.v.abs().max())
    for name, f in {**solvers, "quantecon": quantecon(t, r, discounts)}.items():
        errors[name] = float((f() - want.v).abs().max()) / largest
        # the renormalised rows of quantecon's problems differ by float32's rounding, which 1 / (1 - discount) amplifies
        if not errors[name] <= ERROR + float(want.error_bound.max()) / largest + 2e-5 * (name == "quantecon"):
            raise AssertionError(f"{name}: error {errors[name]:.2e} of the largest value, {kind} {s} {discounts}")
    rates: dict[tuple[str, int], float] = {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        rivals: dict[str, Callable[[], Any]] = {}
        if threads == 1:
            rivals = {"quantecon": quantecon(t, r, discounts), "pack_transition": lambda: pack_transition(t, r)}
        for name, seconds in common.interleaved({**solvers, **rivals}, repeats=repeats, warmup=1).items():
            rates[name, threads] = n / (common.summary(seconds)["median_ms"] / 1e3)
    torch.set_num_threads(1)
    few = 2 if s > 64 else 4
    xenoverse_tasks_per_second(t[:1, :8, :, :8], r[:1, :8, :, :8], discounts[:1])  # compiles
    slow = xenoverse_tasks_per_second(t[:few], r[:few], discounts)
    return [
        {
            "tables": kind,
            "input": form,
            "states": s,
            "actions": a,
            "discount": discounts[0].item() if len(discounts) == 1 else discounts.tolist(),
            "tasks": n,
            "icrl, 1 thread: tasks/s": rates[form, 1],
            "icrl, 2 threads: tasks/s": rates[form, 2],
            "icrl error": errors[form],
            "quantecon policy iteration, 1 thread: tasks/s": rates["quantecon", 1],
            "quantecon policy iteration error": errors["quantecon"],
            "xenoverse, 1 thread: tasks/s": slow,
            "pack_transition, 1 thread: tasks/s": rates["pack_transition", 1],
            "speed-up over quantecon policy iteration": rates[form, 1] / rates["quantecon", 1],
            "speed-up over xenoverse": rates[form, 1] / slow,
        }
        for form in solvers
    ]


def run(args: argparse.Namespace | None = None) -> list[dict[str, Any]]:
    quick = bool(getattr(args, "quick", False))
    before, rows = torch.get_num_threads(), []
    torch.set_num_threads(1)
    try:
        for s in (16, 64) if quick else (16, 32, 64, 128):
            tasks = sample_anymdp(TASKS[s] // (8 if quick else 1), num_states=s, num_actions=5, seed=0)
            transition, reward = tasks.dense_tables()
            for kind, (t, r) in (("anymdp", (transition, reward)), ("garnet", garnet(len(tasks), s))):
                for discounts in ((0.994,),) if quick else ((0.994,), DISCOUNTS):
                    gammas = torch.tensor(discounts, dtype=torch.float64)
                    rows += rows_of(kind, t, r, gammas, 3 if quick else 15)
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
