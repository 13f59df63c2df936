"""python -m benches.modes [--checkpoint FILE]: one set of weights learns by itself, from data, and from demonstrations.

In 64 kept AnyMDP tasks of 16 states, a model acts for 1000 steps after it has read nothing, 500 steps of random actions, of a
noisy expert (half of its actions random), or of an expert (optimal at discount .994); told who acted (tags 6, 3) or not
(7); by the explorer's prompt and by prompt 3. Reward per step, 0 = random, 1 = oracle, over the first 50 steps and over steps
500 to 1000, with half of the 95 % interval over tasks: results/modes.json, and the curves in results/modes.png.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benches import common
from icrl import load, plots
from icrl.figures import Figure
from icrl.files import write_figure
from icrl.omnirl import Agent
from icrl.omnirl.checkpoints import shipped
from icrl.omnirl.closed_loop import ClosedLoop
from icrl.omnirl.evaluate import EPISODE_DISCOUNT, TEMPERATURE, UNSEEN, curve, greedy, mean_ci, normalized
from icrl.omnirl.references import measured
from icrl.worlds import sample_anymdp
from icrl_kernels import constant_behaviours, rollout

READ, ACT, TASKS = 500, 1000, 64
DATA = {
    "nothing": None,
    "random": (1.0, 6),
    "noisy expert": (0.5, 3),
    "expert": (0.0, 3),
}  # share of random actions, tag


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=None)
    parser.add_argument("--name", default="modes", help="of the result file and the picture")
    given = parser.parse_args()
    torch.set_num_threads(1)
    model = load(given.checkpoint or shipped())
    drawn = sample_anymdp(3 * TASKS, 16, seed=UNSEEN + 5)
    found = measured(drawn, 20_000)
    kept = found.kept.nonzero()[:TASKS, 0]
    tasks = drawn[kept]
    reference = type(found.reference)(*(x[kept] for x in vars(found.reference).values()))
    best = greedy(tasks.solve(EPISODE_DISCOUNT).q, tasks.num_actions)[:, None]
    rows, curves = [], {}
    for data, settings in DATA.items():
        for prompt in (4, 3):
            for told in (False, True) if settings else (False,):
                agent = Agent(model, len(tasks), 16, prompt=prompt, temperature=TEMPERATURE, seed=3)
                if settings:
                    noise, tag = settings
                    behaviours = constant_behaviours(len(tasks), 1, {0: 1.0}, epsilon=noise)
                    run = rollout(tasks.tables(), steps=READ, seed=7, policies=best, behaviours=behaviours)
                    seen = tasks.emit(run.state, seed=7, step=torch.arange(READ))[..., 0]
                    agent.read(seen, run.action, run.reward, run.done, tag if told else 7)
                went = ClosedLoop(agent, tasks, seed=3).run(ACT)
                row = {"read": data, "told": told, "prompt": prompt}
                for name, begin, end in (("first_50", 0, 50), ("last_500", ACT - 500, ACT)):
                    row[name], row[f"{name}_ci95"] = mean_ci(normalized(went, reference, begin, end))
                rows.append(row)
                if prompt == 4 and not told:
                    curves[data] = curve(went, reference, 50)
                print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    common.write(given.name, rows, model=model.title, tasks=len(tasks), read_steps=READ)
    picture = Figure(figsize=(6.5, 4), layout="constrained")
    axes = picture.subplots()
    plots.draw_curves(axes, curves, f"{model.title}: after reading 500 steps, prompt 4", "reward per step, normalised")
    axes.legend(frameon=False)
    write_figure(Path(__file__).parent / "results" / f"{given.name}.png", picture, dpi=110)


if __name__ == "__main__":
    main()
