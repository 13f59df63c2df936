"""python -m benches.contention: acting and training beside busy processes, one thread against two, to results/contention.json.

Acting: ValueIterationNetwork in 64 AnyMDP tasks of 16 states, model, simulator and all (what `icrl demo` does). Training: forward and
backward over one segment of 512 steps of 12 tasks. Kernels: gla forward and backward, B=8 T=1024 H=4 K=V=64.
Each variant is a process of its own that lives on; they are asked in turn, so that all see the same machine. Busy processes
loop in Python. `--old PATH`: another build's folder (one that holds `icrl` and `icrl_kernels`), measured beside this one.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent.parent
BUSY = (0, 1, 4)
UNITS = {"acting": 20, "training": 1, "kernels": 10}  # in a turn


def unit(what: str) -> Callable[[], Any]:
    import torch

    from icrl.omnirl.agent import Agent
    from icrl.omnirl.checkpoints import shipped
    from icrl.omnirl.distill import make_batch
    from icrl.omnirl.targets import targets_of, tokens_of
    from icrl.omnirl.tokens import Tokens
    from icrl.omnirl.value_iteration_network import ValueIterationNetwork
    from icrl.omnirl.value_iteration_training import ValueIterationTraining, loss_of
    from icrl.worlds import sample_anymdp
    from icrl_kernels import gla, rollout_start, rollout_step

    if what == "acting":
        model, tasks = ValueIterationNetwork.load(shipped()), sample_anymdp(64, 16, seed=2**42)
        tables = tasks.tables()
        simulator, agent = rollout_start(tables, seed=0), Agent(model, 64, 16)

        def act() -> None:
            reward, done, _ = rollout_step(tables, simulator, agent.act(tasks.observe(simulator.state)))
            agent.observe(reward, done)

        return act
    if what == "training":
        config = ValueIterationTraining()
        model = ValueIterationNetwork(config.model)
        torch.set_flush_denormal(True)
        records = make_batch(config.data, 1, 0)
        tokens = Tokens(*(x[:, :512] for x in tokens_of(records)))
        targets = targets_of(records, config)
        targets = type(targets)(*(x[:, :512] for x in targets))
        state = model.initial_state(len(tokens[0]), config.data.states)

        def train() -> None:
            output, _ = model(tokens, state)
            loss_of(output, targets, config)[0].backward()
            model.zero_grad()

        return train
    q, k, v = (torch.randn(8, 1024, 4, 64, requires_grad=True) for _ in range(3))
    g = torch.nn.functional.logsigmoid(torch.randn(8, 1024, 4)).requires_grad_()
    gradient = torch.ones(8, 1024, 4, 64)
    return lambda: torch.autograd.grad(gla(q, k, v, g)[0], (q, k, v, g), gradient)


def worker(what: str, threads: int) -> None:
    if "--as-the-command" in sys.argv:
        from icrl.commands.sharing import share_the_machine

        share_the_machine()
    import torch

    torch.set_num_threads(threads)
    once = unit(what)
    once()
    once()
    print("ready", flush=True)
    for line in sys.stdin:
        begin = time.perf_counter()
        for _ in range(int(line)):
            once()
        print((time.perf_counter() - begin) / int(line) * 1e3, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worker", nargs=2)
    parser.add_argument("--as-the-command", action="store_true")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--busy", type=int, nargs="*", default=BUSY)
    parser.add_argument("--only", choices=list(UNITS))
    parser.add_argument("--old", type=Path)
    args = parser.parse_args()
    if args.worker:
        return worker(args.worker[0], int(args.worker[1]))

    from benches import common

    rows = []
    for what in [args.only] if args.only else UNITS:
        variants: dict[str, tuple[int, Path, list[str]]] = {
            "1 thread": (1, HERE, []),
            "2 threads": (2, HERE, []),
            "2 threads, the command": (2, HERE, ["--as-the-command"]),
        }
        if args.old:
            variants |= {"old, 1 thread": (1, args.old, []), "old, 2 threads": (2, args.old, [])}
        plain = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "MKL_"))}
        workers = {
            name: common.Worker(__file__, "--worker", what, str(n), *options, env={**plain, "PYTHONPATH": str(site)})
            for name, (n, site, options) in variants.items()
        }
        for count in args.busy:
            busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
            times: dict[str, list[float]] = {name: [] for name in workers}
            try:
                for _ in range(args.rounds):
                    for name, w in workers.items():
                        times[name].append(float(w.ask(str(UNITS[what]))))
            finally:
                for p in busy:
                    p.kill()
                    p.wait()
            alone = statistics.median(times["1 thread"])
            for name, t in times.items():
                row = {
                    "what": what,
                    "busy_processes": count,
                    "variant": name,
                    "median_ms": statistics.median(t),
                    "best_ms": min(t),
                    "worst_ms": max(t),
                    "ratio_to_one_thread": statistics.median(t) / alone,
                }
                rows.append(row)
                print(
                    f"{what:9} busy {count}  {name:24} {row['median_ms']:9.2f} ms"
                    f" ({row['best_ms']:.2f} to {row['worst_ms']:.2f})  {row['ratio_to_one_thread']:.2f} x one thread"
                )
        for w in workers.values():
            w.close()
    print(common.write("contention", rows, rounds=args.rounds))


if __name__ == "__main__":
    main()
