"""python -m benches.instruction_sets: the CPU kernels of each instruction set that this machine has, beside each other.

One thread. Each instruction set is a process of its own that lives on; they are asked in turn, so that all see the same
machine. Times are per task, token or step, the least of many runs. A set that is slower than the one below it by more than 3 %
is named at the end. quantecon's policy iteration, of the same tasks in a process like the others, is the peer of value_iteration's rows.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from itertools import cycle, pairwise
from typing import Any

SETS = ("generic", "avx2", "avx512")
ROUNDS = 15
NOISE = 1.03


def value_iteration_cases(peer: bool) -> dict[str, tuple[Callable[[], Any], int]]:
    """Name: (a call, tasks in it). Six batches take turns, so that each finds its tables evicted by the others."""
    import torch

    from icrl.worlds import sample_anymdp
    from icrl_kernels import pack_transition, value_iteration

    cases: dict[str, tuple[Callable[[], Any], int]] = {}
    for states in (16, 32, 64, 128):
        tasks = sample_anymdp(48, num_states=states, num_actions=5, seed=0)
        transition, reward = tasks.dense_tables()
        discount = torch.tensor([0.994], dtype=torch.float64)
        for form in ("float32, dense", "float32, packed", "float64, dense"):
            dtype = getattr(torch, form.partition(",")[0])
            t, r = transition.to(dtype), reward.to(dtype)
            batches = [(t[i : i + 8], r[i : i + 8]) for i in range(0, 48, 8)]
            if peer:
                from benches.value_iteration import quantecon

                solvers = [quantecon(*batch, discount) for batch in batches]
            else:
                given = [pack_transition(*batch) if "packed" in form else batch for batch in batches]
                solvers = [lambda b=batch, d=discount: value_iteration(*b, d) for batch in given]
            turn = cycle(solvers)
            cases[f"value_iteration, {states} states, {form}"] = (lambda turn=turn: next(turn)(), 8)
    return cases


def other_cases() -> dict[str, tuple[Callable[[], Any], int]]:
    import torch

    import icrl_kernels as ik
    from icrl.worlds import sample_anymdp

    draw = torch.randn
    tokens, shape = 2 * 1024, (2, 1024, 4, 64)
    q, v, g = draw(shape), draw(shape), -draw(shape).abs()
    k, s = torch.nn.functional.normalize(draw(shape), dim=-1), torch.softmax(draw(shape), -1)
    inputs = {
        "gla": (q, k, v, g),
        "gsa": (q, k, v, s, g),
        "gated_delta_rule": (q, k, v, g),
        "rwkv7": (q, g, k, v, -k, k * 0.5),
    }
    cases: dict[str, tuple[Callable[[], Any], int]] = {}
    for name, given in inputs.items():
        op = getattr(ik, name)
        leaves = [x.clone().requires_grad_() for x in given]

        def forward(op: Callable = op, given: tuple = given) -> None:
            with torch.no_grad():
                op(*given)

        def train(op: Callable = op, leaves: list = leaves) -> None:
            o = op(*leaves)[0]
            torch.autograd.grad(o, leaves, o.detach())

        cases[f"{name}, forward"], cases[f"{name}, forward and backward"] = (forward, tokens), (train, tokens)
    state, one = torch.zeros(64, 4, 64, 64), draw(64, 4, 64)
    cases["gla_step, 64 contexts"] = (lambda: ik.gla_step(one, one, one, None, state), 64)
    tables = sample_anymdp(64, 16, seed=0).tables()
    cases["rollout, 16 states"] = (lambda: ik.rollout(tables, steps=256, seed=0), 64 * 256)
    cases["sample_anymdp, 64 states, packed"] = (lambda: sample_anymdp(8, 64, seed=0, packed=True), 8)
    return cases


def worker(name: str) -> None:
    import torch

    cases = value_iteration_cases(peer=True) if name == "quantecon" else value_iteration_cases(False) | other_cases()
    torch.set_num_threads(1)
    for call, _ in cases.values():
        call()
    print(json.dumps(list(cases)), flush=True)
    for line in sys.stdin:
        call, count = cases[line.strip()]
        best, until = float("inf"), time.perf_counter() + 0.05
        while time.perf_counter() < until:
            begin = time.perf_counter()
            call()
            best = min(best, time.perf_counter() - begin)
        print(best / count * 1e6, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worker")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    args = parser.parse_args()
    if args.worker:
        return worker(args.worker)

    from benches import common
    from icrl_kernels import _C

    sets = SETS[: SETS.index(_C.isa()) + 1]
    workers = {
        name: common.Worker(
            "-m",
            "benches.instruction_sets",
            "--worker",
            name,
            env=dict(os.environ) if name == "quantecon" else {**os.environ, "ICRL_ISA": name},
        )
        for name in (*sets, "quantecon")
    }
    cases = {name: json.loads(w.ready) for name, w in workers.items()}
    rows, slower = [], []
    for case in cases[sets[0]]:
        best: dict[str, float] = {}
        for _ in range(args.rounds):
            for name, w in workers.items():
                if case in cases[name]:
                    best[name] = min(best.get(name, float("inf")), float(w.ask(case)))
        rows.append({"case": case, **{f"{name}: us": best[name] for name in best}})
        print(f"{case:50}" + "".join(f"{name} {us:9.3f}   " for name, us in best.items()))
        for a, b in pairwise(sets):
            if best[b] > NOISE * best[a]:
                slower.append(f"{case}: {b} {best[b] / best[a]:.2f} x {a}")
    for w in workers.values():
        w.close()
    print("slower than the set below:", "; ".join(slower) or "none")
    print(common.write("instruction_sets", rows, rounds=args.rounds, slower=slower))


if __name__ == "__main__":
    main()
