"""What `icrl train offline`, `train world-model` and `collect` do and print; `eval sicql` is icrl.offline.suite's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from icrl.files import save_numbers, write_json
from icrl.offline import experiment as offline
from icrl.offline.experiment import Experiment, offline_run
from icrl.offline.suite import describe_best
from icrl.reading import read_rows
from icrl.training.process import machine, prepare

Options = dict[str, Any]
"""By the name of a configuration's field; one that is None was not given."""


def experiment_of(given: dict[str, Any], over: Options, loop: Options, world_loop: Options | None = None) -> Experiment:
    """The experiment of a configuration with options over it: over its fields, those of its loop and of its world loop.

    Raises ValueError naming the field that is wrong.
    """

    def chosen(options: Options) -> Options:
        return {name: value for name, value in options.items() if value is not None}

    run = offline_run(given)
    loops = {
        "loop": replace(run.loop, **chosen(loop)),
        "world_loop": replace(run.world_loop, **chosen(world_loop or {})),
    }
    return Experiment(replace(run, **chosen(over), **loops))


def train_offline(
    experiment: Experiment,
    out: Path,
    world_model: Path | None,
    init: Path | None,
    episodes: int,
    to: Path | None = None,
) -> dict[str, Any]:
    """Train a method and evaluate it few-shot; the evaluation, which is also written to `out`/few_shot.json and to `to`."""
    if episodes < 1:
        raise ValueError(f"evaluate: wanted at least 1 episode, got {episodes}")
    prepare(experiment.run.loop)
    path = offline.train_method(experiment, out, world_model, init)
    numbers = offline.evaluate_method(path, experiment, episodes, experiment.run.loop.seed)
    best = "" if numbers["best"] is None else f"; {describe_best(numbers)}"
    write_json(out / "few_shot.json", numbers)
    save_numbers(to, numbers)
    print(f"model: {path}\nnumbers: {out / 'few_shot.json'}")
    print(f"return {numbers['returns'][-1]:.2f} in the last of {episodes} episodes{best}")
    return numbers


def train_world_model(experiment: Experiment, out: Path, to: Path | None = None) -> dict[str, Any]:
    """Train a world model alone; where it is, what its run logged last, versions and the machine, also written to `to`."""
    device = prepare(experiment.run.training_of_world_model)
    path = offline.train_world_model(experiment, out)
    logged: dict[str, float] = {}
    for row in read_rows(out / "metrics.jsonl"):
        logged |= row
    numbers = {"model": str(path), **logged, "versions": experiment.versions, **machine(device)}
    save_numbers(to, numbers)
    print(f"world model: {path}")
    return numbers


def collect(experiment: Experiment, out: Path, teacher: Path | None, to: Path | None = None) -> dict[str, Any]:
    """Gather a data set on the CPU, where the simulators are; what was written, and what is known of the teacher, also
    written to `to`."""
    prepare(replace(experiment.run.loop, device="cpu"))
    numbers = offline.collect_data(experiment, out, teacher)
    save_numbers(to, numbers)
    print(f"{out}: {numbers['shards']} shards, {numbers['bytes'] / 1e6:.1f} MB")
    if "train_return" in numbers:
        print(f"teacher: {numbers['train_return']:.2f} in training tasks, {numbers['test_return']:.2f} in test tasks")
    return numbers
