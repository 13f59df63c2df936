"""`icrl demo`: the shipped model learns unseen tasks from its context, beside honest baselines."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from icrl import plots
from icrl.extras import versions
from icrl.files import save_numbers, write_figure
from icrl.omnirl import evaluate
from icrl.omnirl.agent import Agent, Model
from icrl.omnirl.checkpoints import load, shipped
from icrl.omnirl.evaluate import TEMPERATURE, UNSEEN, Context, Curve
from icrl.training.process import machine, resolve
from icrl.worlds import sample_anymdp
from icrl.worlds.gymnasium_tables import CLASSIC, ClassicTask


def anymdp(model: Model, tasks: int, num_states: int, steps: int, seed: int) -> tuple[dict[str, Curve], dict[str, Any]]:
    """Curves by method, and the numbers of the demo's first table."""
    start = time.perf_counter()
    worlds = sample_anymdp(tasks, num_states, seed=UNSEEN + seed)
    # first, as it refuses tasks that the model cannot act in
    title = f"{tasks} unseen tasks"
    ours = evaluate.run_agent(model, worlds, steps, temperature=TEMPERATURE, seed=seed, progress=title)
    reference = evaluate.references(worlds)
    contexts = {name: evaluate.run_baseline(worlds, name, steps, seed) for name in evaluate.BASELINES}
    contexts[model.title] = ours
    curves = {name: evaluate.curve(c, reference) for name, c in contexts.items()}
    last = steps - steps // 4, steps
    rows = {name: evaluate.scores(c, reference, *last) for name, c in contexts.items()}
    numbers = {
        **rows[model.title],
        "seconds": round(time.perf_counter() - start, 1),
        "tasks": tasks,
        "num_states": num_states,
        "steps": steps,
        "measured_over": list(last),
        "methods": rows,
        "curves": {name: vars(c) for name, c in curves.items()},
    }
    return curves, numbers


def success(context: Context, begin: int, end: int) -> Tensor:
    """`[N]` share of the episodes ending in steps begin..end-1 that reached the goal; NaN where none ended."""
    ended = context.done[:, begin:end] != 0
    goal = (context.done[:, begin:end] == 1) & (context.reward[:, begin:end] > 0.5)
    return goal.sum(1).float() / ended.sum(1).float()  # 0/0 is NaN


def run_classic(model: Model, task: ClassicTask, contexts: int, steps: int, seed: int) -> Context:
    """The model in the Gymnasium environment itself."""
    envs = task.make_vec(contexts)
    spaces = envs.single_observation_space, envs.single_action_space
    agent = Agent(model, contexts, int(spaces[0].n), temperature=TEMPERATURE, seed=seed, num_actions=int(spaces[1].n))  # type: ignore[attr-defined]
    observation, _ = envs.reset(seed=seed)
    rewards = torch.zeros(contexts, steps, dtype=torch.float32, device="cpu")
    dones = torch.zeros(contexts, steps, dtype=torch.int64, device="cpu")
    for t in range(steps):
        action = agent.act(torch.as_tensor(observation, dtype=torch.int64, device="cpu"))
        observation, reward, terminated, truncated, _ = envs.step(action.cpu().numpy())
        rewards[:, t] = task.shaped(reward, terminated)
        dones[:, t] = torch.as_tensor(terminated + 2 * (truncated & ~terminated), dtype=torch.int64, device="cpu")
        agent.observe(rewards[:, t], dones[:, t])
    envs.close()
    return Context(rewards, dones)


def classic(model: Model, contexts: int, steps: int, seed: int) -> tuple[dict[str, dict[str, Curve]], dict[str, Any]]:
    """Success curves by task and method, and the numbers of the demo's second table."""
    curves: dict[str, dict[str, Curve]] = {}
    numbers: dict[str, Any] = {}
    for name, task in tqdm(CLASSIC.items(), desc="Gymnasium tasks", unit="task"):
        table = task.table()[[0] * contexts]
        runs = {b: evaluate.run_baseline(table, b, steps, seed) for b in evaluate.BASELINES if b != "oracle"}
        runs[model.title] = run_classic(model, task, contexts, steps, seed)
        window = max(100, task.max_steps)  # in which at least one episode ends
        curves[name], numbers[name] = {}, {}
        for method, run in runs.items():
            spans = [(b, b + window) for b in range(0, steps - window + 1, window)]
            points = [evaluate.mean_ci(success(run, *span)) for span in spans]
            curves[name][method] = Curve(
                [(b + e) // 2 for b, e in spans], [p[0] for p in points], [p[1] for p in points]
            )
            at = {}
            for label, span in (("by_500", (250, 500)), ("last_quarter", (steps - steps // 4, steps))):
                rate, ci = evaluate.mean_ci(success(run, *span))
                at[label] = {"success": rate, "ci95": ci}
            numbers[name][method] = at
    return curves, numbers


def demo(
    checkpoint: Path | None = None,
    tasks: int = 64,
    num_states: int = 16,
    steps: int = 2000,
    seed: int = 0,
    out: Path = Path("icrl-demo.png"),
    device: str = "auto",
    json: Path | None = None,
) -> dict[str, Any]:
    """Run the whole demo: the numbers, which go to `json` too, a picture, which goes to `out`, and then two tables, printed.

    The model acts on `device`; the tasks are simulated on the CPU.
    """
    if tasks < 2 or steps < 500 or seed < 0:
        raise ValueError(f"tasks, steps, seed: wanted at least 2, 500 and 0, got {tasks}, {steps} and {seed}")
    began = time.perf_counter()
    path = checkpoint or shipped()
    model = load(path, resolve(device))
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{path.name}: {parameters:,} parameters; no gradient step is taken from here on\n")
    curves, first = anymdp(model, tasks, num_states, steps, seed)
    classic_curves, second = classic(model, 32, steps, seed)
    seconds = time.perf_counter() - began
    numbers = {
        "anymdp": first,
        "gymnasium": second,
        "parameters": parameters,
        "seconds": round(seconds, 1),
        "picture": str(out),
        "versions": versions("gymnasium"),
        **machine(model.device),
    }
    save_numbers(json, numbers)
    title = f"{tasks} unseen AnyMDP tasks ({num_states} states, 5 actions)"
    write_figure(out, plots.demo_picture(curves, classic_curves, title), dpi=130)

    begin, end = first["measured_over"]
    print(
        f"\n{tasks} unseen AnyMDP tasks, {num_states} states, 5 actions. 0 = random, 1 = oracle; ± half a 95% interval over tasks"
    )
    checks = [i for i in range(len(curves[model.title].steps)) if (i + 1) * 100 in (100, 200, 500, 1000, 2000)]
    heads = [f"step {100 * (i + 1)}" for i in checks]
    print(
        f"  {'':24}{'reward per step, the 100 steps up to':>{11 * len(heads)}}{f'{begin}-{end}':>16}{'per episode':>16}"
    )
    print(f"  {'':24}" + "".join(f"{h:>11}" for h in heads) + f"{'(mean)':>16}{'(IQM)':>16}")
    for name in sorted(curves, key=lambda n: first["methods"][n]["normalized"]):
        row, c = first["methods"][name], curves[name]
        print(
            f"  {name:24}"
            + "".join(f"{c.mean[i]:11.2f}" for i in checks)
            + f"{row['normalized']:10.3f} ±{row['ci95']:.3f}{row['episode']:10.3f} ±{row['episode_ci95']:.3f}"
        )
    print("\nGymnasium tasks, 32 contexts each: share of episodes that reach the goal")
    print(f"  {'':24}" + "".join(f"{name:>26}" for name in second))
    print(f"  {'':24}" + f"{'steps 250-500':>14}{f'{begin}-{end}':>12}" * len(second))
    for name in sorted(second["CliffWalking"], key=lambda n: first["methods"][n]["normalized"]):
        cells = "".join(
            f"{t[name]['by_500']['success']:14.2f}{t[name]['last_quarter']['success']:12.2f}" for t in second.values()
        )
        print(f"  {name:24}{cells}")
    print(f"\npicture: {out}   ({seconds:.0f} s in all)")
    return numbers
