"""The tabular learners' constants: the best of a grid over several families of tasks, none of which a table uses.

    python -m benches.tabular_constants benches/results/tabular_constants.json

A setting's curve in a family is its return per episode (0 random, 1 oracle, kept tasks' mean) over sixteen windows of the budget.
Its score is the mean over families of the curve's mean and its end: how soon it learns, and how well.

Those in use stand in icrl/omnirl/evaluate.py. Model-based: discount .97; bonuses of .02 to .2 score alike, within .003, and of them
.2 explores most. Q-learning: discount .8 and bonus 2, the best here; discount .9 and bonus 5, the second, learns more in the end
where there are more steps than here, by the comparison at half a million ("long"). The Q-learner is not judged in bandits, whose
episodes are one step: a horizon of 1, where it is given the discount 0 (icrl/omnirl/suite_rows.py). Six minutes on a free core.
"""

from __future__ import annotations

import itertools
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from icrl.extras import versions
from icrl.files import save_numbers
from icrl.omnirl.evaluate import run_baseline
from icrl.omnirl.measures import mean_interval, normalised, windows
from icrl.omnirl.references import measured
from icrl.worlds import sample_anymdp, sample_bandit, sample_garnet
from icrl.worlds.grids import sample_grids

SEED = 2**43  # of tasks that no table and no training has
TASKS = 64
FAMILIES: dict[str, Any] = {
    "bandit": (lambda: sample_bandit(TASKS, seed=SEED), 200, 0),
    "anymdp 16": (lambda: sample_anymdp(TASKS, 16, seed=SEED), 4_000, 100_000),
    "anymdp 32": (lambda: sample_anymdp(TASKS, 32, seed=SEED), 8_000, 100_000),
    "anymdp 64": (lambda: sample_anymdp(TASKS, 64, seed=SEED), 8_000, 100_000),
    "garnet 16": (lambda: sample_garnet(TASKS, 16, seed=SEED), 4_000, 100_000),
    "grids": (lambda: sample_grids(TASKS, (16, 64), seed=SEED), 4_000, 50_000),
}
"""By name: tasks, and the budgets of the model-based and of the Q-learner, 0 where it is not judged."""
GRIDS = {
    "tabular model-based": {"model_discount": (0.9, 0.95, 0.97, 0.99), "model_bonus": (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)},
    "Q-learning (UCB)": {"q_discount": (0.8, 0.9, 0.95), "q_bonus": (1.0, 2.0, 5.0, 10.0)},
}
LONG: dict[str, Any] = {
    "families": ("anymdp 16", "anymdp 32", "anymdp 64"),
    "tasks": 32,
    "steps": 500_000,
    "windows": 8,
}
"""Where the two best settings of the Q-learner are compared with more steps."""


def long_curves() -> list[dict[str, Any]]:
    """Curves of the two best Q-learners over half a million steps."""
    rows = []
    for name in LONG["families"]:
        tasks = FAMILIES[name][0]()[: LONG["tasks"]]
        reference = measured(tasks, 20_000)
        for discount, bonus in ((0.8, 2.0), (0.9, 5.0)):
            settings = {"q_discount": discount, "q_bonus": bonus}
            run = run_baseline(tasks, "Q-learning (UCB)", LONG["steps"], 0, **settings)
            found = windows(run, LONG["steps"] // LONG["windows"])
            curve, half = mean_interval(normalised(found, reference.reference)[reference.kept])
            rows.append({"family": name, "settings": settings, "curve": curve.tolist(), "ci95": half.tolist()})
    return rows


def main(out: Path) -> None:
    torch.set_num_threads(1)
    begin, results = time.process_time(), {}
    families = {name: (make(), *budgets) for name, (make, *budgets) in FAMILIES.items()}
    references = {name: measured(tasks, 20_000) for name, (tasks, *_) in families.items()}
    for learner, grid in GRIDS.items():
        rows = []
        for values in tqdm(list(itertools.product(*grid.values())), desc=learner):
            settings, scores = dict(zip(grid, values, strict=True)), {}
            for name, (tasks, few, many) in families.items():
                steps = few if learner == "tabular model-based" else many
                if not steps:
                    continue
                reference = references[name]
                found = windows(run_baseline(tasks, learner, steps, 0, **settings), steps // 16)
                curve, _ = mean_interval(normalised(found, reference.reference)[reference.kept])
                scores[name] = {"curve": float(curve.nanmean()), "end": float(curve[-1])}
            mean = sum(s["curve"] + s["end"] for s in scores.values()) / (2 * len(scores))
            rows.append({"settings": settings, "score": mean, "families": scores})
        rows.sort(key=lambda row: -row["score"])
        results[learner] = rows
        print(learner, *(f"{r['settings']}: {r['score']:.3f}" for r in rows[:4]), sep="\n  ")
    kept = {name: int(r.kept.sum()) for name, r in references.items()}
    facts = {"tasks": TASKS, "kept": kept, "cpu_seconds": round(time.process_time() - begin), "versions": versions()}
    save_numbers(out, {**facts, "learners": results, "long": long_curves()})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
