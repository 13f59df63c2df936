"""`icrl context`: one context of half a million steps, acting all the way, in constant memory and at a constant pace."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from tqdm import tqdm

from icrl.extras import versions
from icrl.files import save_numbers
from icrl.omnirl import evaluate
from icrl.omnirl.agent import Agent
from icrl.omnirl.checkpoints import load, shipped
from icrl.omnirl.closed_loop import ClosedLoop, Context
from icrl.omnirl.evaluate import TEMPERATURE, UNSEEN
from icrl.training.process import machine, resolve
from icrl.worlds import sample_anymdp

BLOCK = 100  # steps that are timed together


def context(
    steps: int = 500_000,
    num_states: int = 16,
    seed: int = 0,
    checkpoint: Path | None = None,
    compile: bool = False,
    device: str = "auto",
    json: Path | None = None,
) -> dict[str, Any]:
    """Act `steps` steps in one unseen AnyMDP task: the numbers, which go to `json` too, and then a report, printed.

    The model acts on `device`; the task is simulated on the CPU.
    """
    if steps < 100:
        raise ValueError(f"steps: wanted at least 100, got {steps}")
    model = load(checkpoint or shipped(), resolve(device))
    task = sample_anymdp(1, num_states, seed=UNSEEN + seed)
    reference = evaluate.references(task)
    agent = Agent(model, 1, num_states, temperature=TEMPERATURE, seed=seed)
    if compile:
        agent.run = torch.compile(model.decide, dynamic=False)
        print("compiling the model's step takes half a minute ...")
    loop = ClosedLoop(agent, task, seed)
    block = min(BLOCK, steps // 100)
    reward = torch.zeros(1, steps, dtype=torch.float32, device="cpu")
    done = torch.zeros(1, steps, dtype=torch.uint8, device="cpu")
    seconds = torch.zeros(steps, dtype=torch.float64, device="cpu")
    process = psutil.Process()
    memory: list[int] = []
    began = time.perf_counter()
    bar = tqdm(total=steps, unit="step", unit_scale=True, desc=f"context, {num_states} states", mininterval=0.5)
    try:
        for t in range(0, steps, block):
            start, size = time.perf_counter(), min(block, steps - t)
            went = loop.run(size)
            reward[0, t : t + size], done[0, t : t + size] = went.reward[0], went.done[0]
            seconds[t : t + size] = (time.perf_counter() - start) / size
            if t // 1000 != (t - block) // 1000:
                memory.append(process.memory_info().rss)
                bar.set_postfix_str(f"{memory[-1] / 2**20:.0f} MB")
            bar.update(size)
    finally:
        bar.close()
    memory.append(process.memory_info().rss)
    total = time.perf_counter() - began

    run = Context(reward, done)
    tenth = max(1, steps // 10)
    first, last = seconds[:tenth], seconds[-tenth:]
    warm = min(len(memory) - 1, 2)  # the first steps allocate what the loop keeps
    scores = {
        f"{b}-{b + tenth}": float(evaluate.normalized(run, reference, b, b + tenth))
        for b in range(0, steps - tenth + 1, tenth)
    }
    state_bytes = _bytes(agent.state)
    report = {
        "steps": steps,
        "num_states": num_states,
        "seconds": round(total, 1),
        "steps_per_s": round(steps / total, 1),
        "step_time_ratio": float(last.median() / first.median()),
        "step_time_ratio_10k": float(seconds[-10_000:].median() / seconds[:10_000].median()),
        "step_us_median": round(statistics.median(seconds.tolist()) * 1e6, 1),
        "rss_growth_mb": round((memory[-1] - memory[warm]) / 2**20, 2),
        "rss_mb": round(memory[-1] / 2**20, 1),
        "state_bytes": state_bytes,
        "normalized_by_tenth": scores,
        "reward_per_step": float(reward.double().mean()),
        "oracle_reward_per_step": float(reference.oracle_reward[0]),
        "random_reward_per_step": float(reference.random_reward[0]),
        "versions": versions(),
        **machine(model.device),
    }
    save_numbers(json, report)
    print(
        f"\n{steps:,} steps in one context: {report['steps_per_s']:,.0f} steps/s, {report['step_us_median']:.0f} µs a step"
    )
    print(
        f"time per step, last tenth over first: {report['step_time_ratio']:.3f}   (last 10K over first: {report['step_time_ratio_10k']:.3f})"
    )
    print(
        f"memory: {report['rss_mb']:.0f} MB, grown by {report['rss_growth_mb']:.1f} MB; the context itself is {state_bytes:,} bytes"
    )
    print("normalised reward by tenth: " + " ".join(f"{s:.2f}" for s in scores.values()))
    return report


def _bytes(state: Any) -> int:
    """Of all tensors in nested tuples and lists."""
    if isinstance(state, torch.Tensor):
        return state.numel() * state.element_size()
    return sum(_bytes(x) for x in state)
