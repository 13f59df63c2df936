"""Worlds: AnyMDP tasks sampled a second and environment steps a second, beside xenoverse's in the same run.

`python -m benches.worlds` prints both tables and writes benches/results/worlds.json. Without xenoverse only ours is
measured. Before timing, the two samplers are held to the same distribution of what the filters measure.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from benches import common
from icrl.worlds import TabularEnv, TabularTasks, TabularVectorEnv, quality, sample_anymdp

PEER_TASKS = {16: 20, 32: 10, 64: 4, 128: 2}  # xenoverse makes a few tasks a second, and at 128 states one in five
OURS = {16: 8000, 32: 4000, 64: 2000, 128: 800}
STEPS = 20_000


def _peer() -> Any:
    try:
        import xenoverse.anymdp as peer
    except ImportError as error:
        print(f"xenoverse is not measured: {error}")
        return None
    return peer


def check(peer: Any, ns: int, count: int) -> None:
    """Refuse to time samplers that disagree: advantage, Gini and entropy, two-sample KS at p > 1e-4."""
    from scipy.stats import ks_2samp

    theirs = TabularTasks.from_xenoverse([peer.AnyMDPTaskSampler(ns, 5, seed=i) for i in range(count)])
    ours = sample_anymdp(400, ns, 5, seed=0).validate()
    for name, a, b in zip(("advantage", "gini", "entropy"), quality(theirs), quality(ours), strict=True):
        p = ks_2samp(a.numpy(), b.numpy()).pvalue
        if not p > 1e-4:
            raise AssertionError(f"{name} at ns={ns}: our distribution is not xenoverse's, KS p = {p:.2g}")


def sampling(peer: Any) -> list[dict[str, Any]]:
    """Tasks a second with all filters: in dense tables, in windows, by the torch sampler, and xenoverse's."""
    rows = []
    for ns, count in OURS.items():
        few = count // 8  # for the torch sampler, which is for GPUs
        sizes = {"dense": count, "packed": count, "torch": few}
        runs: dict[str, Any] = {
            "dense": lambda ns=ns, count=count: sample_anymdp(count, ns, 5, seed=1),
            "packed": lambda ns=ns, count=count: sample_anymdp(count, ns, 5, seed=1, packed=True),
            "torch": lambda ns=ns, few=few: sample_anymdp(few, ns, 5, seed=1, packed=True, backend="torch"),
        }
        times = common.interleaved(runs, repeats=5, warmup=1)
        if peer:
            seeds = iter(range(10_000))
            sizes["xenoverse"] = PEER_TASKS[ns]
            repeats = 1 if ns == 128 else 3  # ten seconds a run
            times |= common.interleaved(
                {"xenoverse": lambda ns=ns, seeds=seeds: _theirs(peer, ns, seeds)},
                repeats=repeats,
                warmup=int(ns < 128),
            )
        rate = {name: sizes[name] / np.median(seconds) for name, seconds in times.items()}
        for name in runs:
            row = {"what": f"sample_anymdp, {name}", "num_states": ns, "tasks_per_s": rate[name]}
            if "xenoverse" in rate:
                row |= {"xenoverse_tasks_per_s": rate["xenoverse"], "ratio": rate[name] / rate["xenoverse"]}
            rows.append(row)
            print(" ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()))
    return rows


def _theirs(peer: Any, ns: int, seeds: Iterator[int]) -> None:
    for _ in range(PEER_TASKS[ns]):
        peer.AnyMDPTaskSampler(ns, 5, seed=next(seeds))


def _single(env: Any, actions: np.ndarray) -> float:
    env.reset(seed=0)
    begin = time.perf_counter()
    for a in actions:
        _, _, terminated, truncated, _ = env.step(a)
        if terminated or truncated:
            env.reset()
    return len(actions) / (time.perf_counter() - begin)


def _vector(env: TabularVectorEnv, rounds: int) -> float:
    env.reset(seed=0)
    actions = np.random.default_rng(0).integers(0, 5, (rounds, env.num_envs))
    begin = time.perf_counter()
    for a in actions:
        env.step(a)
    return rounds * env.num_envs / (time.perf_counter() - begin)


def stepping(peer: Any) -> list[dict[str, Any]]:
    rows = []
    for ns in (16, 64):
        tasks = sample_anymdp(1024, ns, 5, seed=0)
        single, vector = TabularEnv(tasks[0]), TabularVectorEnv(tasks)
        actions = np.random.default_rng(0).integers(0, 5, STEPS)
        rates: dict[str, list[float]] = {"single": [], "vector of 1024": [], "xenoverse": []}
        for _ in range(5):
            rates["single"].append(_single(single, actions))
            rates["vector of 1024"].append(_vector(vector, 100))
            if peer:
                env = peer.AnyMDPEnv(max_steps=5000)
                env.set_task(tasks.to_xenoverse(0))
                rates["xenoverse"].append(_single(env, actions))
        middle = {name: float(np.median(r)) for name, r in rates.items() if r}
        for name in ("single", "vector of 1024"):
            row = {"what": f"env steps, {name}", "num_states": ns, "steps_per_s": middle[name]}
            if peer:
                row |= {"xenoverse_steps_per_s": middle["xenoverse"], "ratio": middle[name] / middle["xenoverse"]}
            rows.append(row)
            print(" ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()))
    return rows


def run() -> list[dict[str, Any]]:
    peer = _peer()
    if peer:
        check(peer, 16, 60)
    return sampling(peer) + stepping(peer)


def main() -> None:
    rows = run()
    peer = {}
    if any("ratio" in r for r in rows):
        from importlib.metadata import version

        peer = {"xenoverse": version("xenoverse")}
    print(common.write("worlds", rows, peers=peer, threads=torch.get_num_threads()))


if __name__ == "__main__":
    main()
