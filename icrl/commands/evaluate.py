"""`icrl eval`: a model and the baselines on a set of tasks, normalised, beside what OmniRL's authors published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from icrl.extras import versions
from icrl.files import save_numbers
from icrl.omnirl import evaluate
from icrl.omnirl.checkpoints import load, shipped
from icrl.omnirl.evaluate import TEMPERATURE, UNSEEN
from icrl.training.process import machine, resolve
from icrl.worlds.kinds import draw_tasks
from icrl.worlds.task_shards import load_tasks

# OmniRL (AnyMDP) of arXiv 2502.02869: performance and steps taken, by kind and number of states, 5 actions.
PUBLISHED = {
    ("anymdp", 16): (0.953, 2_000),
    ("anymdp", 32): (0.903, 6_500),
    ("anymdp", 64): (0.913, 7_700),
    ("anymdp", 128): (0.802, 36_300),
    ("garnet", 16): (0.859, 8_200),
    ("garnet", 64): (0.804, 8_000),
    ("bandit", 1): (0.825, 103),
}


def evaluation_table(
    path: Path | None,
    checkpoint: Path | None,
    kind: str,
    num_tasks: int,
    num_states: int,
    steps: int,
    seed: int,
    prompt: int,
    device: str = "auto",
    json: Path | None = None,
) -> dict[str, Any]:
    """Score every method on the tasks of `path`, or on fresh ones: numbers, which go to `json` too, and a table, printed.

    The model acts on `device`; the tasks are simulated on the CPU.
    """
    if num_tasks < 2 or steps < 20 or seed < 0:
        raise ValueError(f"num_tasks, steps, seed: wanted at least 2, 20 and 0, got {num_tasks}, {steps} and {seed}")
    tasks = load_tasks(path) if path else draw_tasks(kind, num_tasks, num_states, 5, 2, UNSEEN + seed)
    model = load(checkpoint or shipped(), resolve(device))
    # first, as it refuses tasks that the model cannot act in
    ours = evaluate.run_agent(
        model, tasks, steps, prompt=prompt, temperature=TEMPERATURE, seed=seed, progress=model.title
    )
    reference = evaluate.references(tasks)
    runs = {name: evaluate.run_baseline(tasks, name, steps, seed) for name in evaluate.BASELINES}
    runs[model.title] = ours
    last = steps - max(1, steps // 4), steps
    rows = {name: evaluate.scores(run, reference, *last) for name, run in runs.items()}
    published = PUBLISHED.get((kind, 1 if kind == "bandit" else num_states)) if path is None else None
    numbers = {
        "tasks": len(tasks),
        "steps": steps,
        "measured_over": list(last),
        "methods": rows,
        "published": published,
        "versions": versions(),
        **machine(model.device),
    }
    save_numbers(json, numbers)
    print(
        f"\n{len(tasks)} tasks; score over steps {last[0]}-{last[1]} of a context, 0 = random, 1 = oracle, ± half a 95% interval over tasks"
    )
    print(f"  {'':24}{'reward per step':>18}{'return per episode (IQM)':>28}")
    for name in sorted(rows, key=lambda n: rows[n]["normalized"]):
        r = rows[name]
        print(f"  {name:24}{r['normalized']:10.3f} ±{r['ci95']:.3f}{r['episode']:20.3f} ±{r['episode_ci95']:.3f}")
    if published:
        print(
            f"  {'published OmniRL, a mean':24}{'':16}{published[0]:22.3f}  after {published[1]:,} steps, on its authors' tasks"
        )
    return numbers
