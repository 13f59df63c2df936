"""S-ICQL and its rivals trained and judged alike: one configuration a method, runs in folders, tables and pictures.

A suite's folder holds a run for each method and seed (`<method>-<seed>/`, resumable, see icrl.training.loop) and what few-shot
evaluation made of it (`few_shot.json`); what is there already is not made again.
"""

from __future__ import annotations

import fcntl
import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from icrl.files import json_text, write_text
from icrl.offline.environments import source_class
from icrl.offline.experiment import Experiment, OfflineRun
from icrl.offline.jobs import Job, run_jobs
from icrl.offline.method import MethodConfig
from icrl.offline.presets import LIKE_PUBLISHED, PUBLISHED, titles
from icrl.plots import few_shot_picture
from icrl.training.config import changes, configured
from icrl_kernels.arguments import integer


def mean_sem(values: list[float]) -> tuple[float, float | None]:
    """Mean, and standard error of the mean: None for a single value's."""
    x = torch.tensor(values, dtype=torch.float64, device="cpu")
    return float(x.mean()), float(x.std() / math.sqrt(len(x))) if len(x) > 1 else None


def run_suite(
    out: Path, run: OfflineRun, methods: list[str], seeds: int, episodes: int, jobs: int
) -> dict[str, dict[str, Any]]:
    """Train and evaluate every method with every seed, `jobs` processes at a time; numbers by method.

    Raises ValueError where `out` holds another suite or another process works there, ChildProcessError where a run
    failed: what is finished stays, and the next call goes on from it.
    """
    experiments = {m: Experiment(replace(run, method=m)) for m in methods}
    for experiment in experiments.values():
        experiment.check()  # before all work
    with_world_model = [m for m, experiment in experiments.items() if experiment.needs_world_model]
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"out: another process is at work in {out}") from None
        config = out / "run.json"
        if config.exists():
            check_run(out, read_run(config), run)
        write_text(config, json_text(without_method(run)))
        todo: list[Job] = []
        for s in range(seeds):
            folder = out / f"world_model-{s}"
            if with_world_model and not (folder / "model.safetensors").exists():
                line = ["train", "world-model", "--config", config, "--seed", s, "--out", folder]
                todo.append(Job(folder, run.world_loop.updates, line))
        for s in range(seeds):
            for method in methods:
                folder = folder_of(out, method, s)
                found = read_few_shot(folder)
                if found is not None:
                    check_settings(folder, experiments[method].config)
                    if len(found["returns"]) == episodes:
                        continue
                line = ["train", "offline", "--config", config, "--method", method, "--seed", s, "--out", folder]
                needs = None
                if method in with_world_model:
                    needs = out / f"world_model-{s}" / "model.safetensors"
                    line += ["--world-model", needs]
                todo.append(Job(folder, run.loop.updates, [*line, "--evaluate", episodes], needs))
        if todo:
            run_jobs(todo, jobs, run.environment)
        return collect(out, run, methods, seeds)


FREE = {f"{loop}.{name}" for loop in ("loop", "world_loop") for name in ("device", "threads", "compile")}
"""What may differ when a suite goes on: settings that say on what its runs train."""


def without_method(run: OfflineRun) -> dict[str, Any]:
    return {k: v for k, v in asdict(run).items() if k != "method"}


def read_run(path: Path) -> OfflineRun:
    """What a suite's run.json says, with today's defaults for settings that it does not know. Raises ValueError where it is
    damaged."""
    try:
        return configured(OfflineRun, json.loads(path.read_text()), "run.json")
    except ValueError as e:
        raise ValueError(f"out: {path} is damaged ({e})") from e


def check_run(out: Path, found: OfflineRun, wanted: OfflineRun) -> None:
    """ValueError where the suite in `out` is another one."""
    if other := [c for c in changes(without_method(found), without_method(wanted)) if c[0] not in FREE]:
        said = named(other)
        raise ValueError(f"out: {out} holds a suite with another configuration ({said}); choose another")


def check_settings(folder: Path, wanted: MethodConfig) -> None:
    """ValueError where the finished run in `folder` had other settings of its method than these. A setting that the run does
    not know had what is its default today."""
    try:
        found = configured(type(wanted), json.loads((folder / "config.json").read_text())["config"], "config")
    except (ValueError, KeyError) as e:
        raise ValueError(f"{folder}/config.json is damaged ({e}); delete {folder} to have it made again") from e
    if other := changes(asdict(found), asdict(wanted)):
        raise ValueError(f"{folder} was trained with other settings ({named(other)}); delete it to have it made again")


def named(changed: list[tuple[str, Any, Any]]) -> str:
    return ", ".join(f"{name}: {old!r}, wanted {new!r}" for name, old, new in changed)


def folder_of(out: Path, method: str, seed: int) -> Path:
    return out / f"{method.replace(' ', '_').replace('/', '')}-{seed}"


def read_few_shot(folder: Path) -> dict[str, Any] | None:
    """A run's evaluation; None before it is made. Raises ValueError where it is damaged."""
    path = folder / "few_shot.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as e:
        raise ValueError(f"{path} is damaged ({e}); delete it to have it made again") from e


def collect(out: Path, run: OfflineRun, methods: list[str], seeds: int) -> dict[str, dict[str, Any]]:
    """The finished evaluations of a suite: by method, mean ± s.e.m. over seeds, the curve over episodes, and the published
    figure where tasks and the data's quality are the environment's defaults."""
    source, published = Experiment(run).source, {}
    default = type(source)()
    if all(getattr(source, name, None) == getattr(default, name, None) for name in LIKE_PUBLISHED):
        published = PUBLISHED.get((run.environment, source.split), {})
    numbers = {}
    for method in methods:
        found = [f for s in range(seeds) if (f := read_few_shot(folder_of(out, method, s))) is not None]
        if not found:
            continue
        last = max(1, len(found[0]["returns"]) // 4)
        curves = torch.tensor([f["returns"] for f in found], dtype=torch.float64, device="cpu")
        summary = {"title": titles()[method], "published": published.get(method), "seeds": len(found)}
        summary |= {"best": found[0]["best"], "best_of": found[0]["best_of"], "curve": curves.mean(0).tolist()}
        summary["curve_sem"] = (curves.std(0, correction=1) / math.sqrt(len(found))).tolist() if len(found) > 1 else []
        for key, values in {
            "first": [f["returns"][0] for f in found],
            "all": [sum(f["returns"]) / len(f["returns"]) for f in found],
            "last": [sum(f["returns"][-last:]) / last for f in found],
            "first_reached": [f["reached"][0] for f in found],
            "reached": [sum(f["reached"][-last:]) / last for f in found],
        }.items():
            summary[key], summary[f"{key}_sem"] = mean_sem(values)
        numbers[method] = summary
    return numbers


def print_table(numbers: dict[str, dict[str, Any]], environment: str) -> None:
    """Ours beside the published figures. Where the first episode counts, as in the stitching study, it has a column."""
    some, source = next(iter(numbers.values())), source_class(environment)
    best = "" if some["best"] is None else f"; {describe_best(some)}"
    share, goals, first = (some["best"] or 0.0) > 0, source.counts_goals, source.counts_first
    print(
        f"\n{environment}: return of {len(some['curve'])} episodes in unseen tasks, mean ± s.e.m. over "
        f"{some['seeds']} seeds{best}"
    )
    heads = "".join(f"{x:>18}" for x in ["first episode"] * first + ["all episodes", "last quarter"])
    heads += f"{'of ' + some['best_of']:>12}" * share + f"{'first: goal':>13}" * first + f"{'last: goal':>12}" * goals
    print(f"  {'':10}{heads}{'published':>12}")
    for n in sorted(numbers.values(), key=lambda n: n["first" if first else "last"]):
        cells = []
        for k in ["first"] * first + ["all", "last"]:
            sem = n[f"{k}_sem"]
            cells += [f"{n[k]:11.2f} " + ("      " if sem is None else f"±{sem:5.2f}")]
        cells += [f"{n['last'] / n['best']:12.2f}"] if share else []
        cells += [f"{n['first_reached']:13.2f}"] * first + [f"{n['reached']:12.2f}"] * goals
        cells += [f"{n['published']:12.2f}" if n["published"] is not None else ""]
        print(f"  {n['title']:10}{''.join(cells)}".rstrip())


def describe_best(numbers: dict[str, Any]) -> str:
    """The best known return, in words."""
    best_of = numbers["best_of"]
    said = {"optimal": "optimal is", "teacher": "the teacher reaches", "scripted": "the scripted policy earns"}
    return f"{said.get(best_of, f'{best_of}:')} {numbers['best']:.2f}"


def suite(
    out: Path,
    environment: str | None,
    methods: list[str],
    seeds: int,
    episodes: int,
    jobs: int,
    overrides: dict[str, Any],
    loop: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Run, print and draw a suite; its numbers. `overrides` are OfflineRun's fields; over them go `environment` and the
    fields of `loop`, as far as they are not None."""
    if set(methods) - set(titles()) or len(set(methods)) < max(1, len(methods)):
        raise ValueError(
            f"methods: wanted some of {', '.join(titles())}, each once, got {', '.join(methods) or 'none'}"
        )
    seeds, episodes, jobs = integer("seeds", seeds, 1), integer("episodes", episodes, 1), integer("jobs", jobs, 1)
    run: OfflineRun = configured(OfflineRun, overrides, "config")
    if "method" in overrides or run.loop.seed:
        raise ValueError(
            "config: a suite has its methods and seeds from --methods and --seeds, not from method, loop.seed"
        )
    run = replace(run, loop=replace(run.loop, **{k: v for k, v in (loop or {}).items() if v is not None}))
    if environment is not None:
        run = replace(run, environment=environment)
    numbers = run_suite(out, run, methods, seeds, episodes, jobs)
    print_table(numbers, run.environment)
    few_shot_picture(out / "few_shot.png", numbers, run.environment)
    print(f"picture: {out / 'few_shot.png'}")
    return {"environment": run.environment, "methods": numbers}
