"""The `icrl` command: demo, context, train, eval, distill, dataset, worlds. Wrong input ends in one line and exit code 2."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from inspect import signature
from pathlib import Path
from typing import Any, Literal, NoReturn

import tyro

from icrl.commands import terminal
from icrl.commands.sharing import share_the_machine

PICTURES = (".png", ".svg", ".pdf", ".jpg")
GROUPS = ("train", "eval", "worlds")
SUITES = ("sicql", "omnirl")
DISTRIBUTED = ("train omnirl", "train value-iteration-network")  # the commands that torchrun may start
Positional = tyro.conf.Positional


def _say(json: Path | None) -> None:
    """Where the numbers are, which the command has saved before it printed anything of them."""
    if json is not None:
        print(f"numbers: {json}")


def _new_file(name: str, path: Path | None, suffixes: tuple[str, ...] = ()) -> None:
    """Refuse a place that cannot be written before hours are spent on what goes there."""
    from icrl.files import probe

    if path is None:
        return
    if suffixes and path.suffix not in suffixes:
        raise ValueError(f"{name}: wanted a file ending in {' or '.join(suffixes)}, got {path}")
    try:
        probe(path)
    except OSError as e:
        raise ValueError(f"{name}: {e}") from e


def _new_folder(name: str, path: Path) -> None:
    """Refuse a folder that cannot be written in, likewise."""
    from icrl.files import probe_folder

    try:
        probe_folder(path)
    except OSError as e:
        raise ValueError(f"{name}: {e}") from e


OF_KIND = {"branching": "garnet"} | dict.fromkeys(("num_observations", "observation_tokens", "action_tokens"), "pomdp")


def _of_kind(kind: str, name: str, given: int | None, default: int) -> int:
    """An option of tasks, or its default; one that this kind of tasks does not have is refused."""
    if given is not None and kind != OF_KIND[name]:
        raise ValueError(f"{name}: an option of {OF_KIND[name]} tasks, got {given} for {kind}")
    return default if given is None else given


def _states(kind: str, given: int | None) -> int:
    if given is None:
        return 1 if kind == "bandit" else 16
    return given


def _workers(given: int | None) -> int:
    return given if given is not None else os.cpu_count() or 1


def demo(
    checkpoint: Path | None = None,
    tasks: int = 64,
    num_states: int = 16,
    steps: int = 2000,
    seed: int = 0,
    out: Path = Path("icrl-demo.png"),
    device: str = "auto",
    json: Path | None = None,
) -> None:
    """The shipped model learns unseen tasks from its context, beside honest baselines: two tables and a picture.

    Args:
        checkpoint: a model of your own instead of the shipped one.
        tasks: how many unseen AnyMDP tasks.
        num_states: of each task.
        steps: of each context.
        seed: of tasks and actions.
        out: the picture.
        device: of the model, as torch names it; auto is CUDA where there is one, else the CPU.
        json: also write the numbers here.
    """
    from icrl.commands.demo import demo as run

    _new_file("out", out, PICTURES)
    _new_file("json", json)
    run(checkpoint, tasks, num_states, steps, seed, out, device, json)
    _say(json)


def context(
    steps: int = 500_000,
    num_states: int = 16,
    seed: int = 0,
    checkpoint: Path | None = None,
    compile: bool = False,
    device: str = "auto",
    json: Path | None = None,
) -> None:
    """One context of many steps, acting all the way: pace, memory and score as it goes.

    Args:
        steps: of the context.
        num_states: of the task.
        seed: of the task and of actions.
        checkpoint: a model of your own instead of the shipped one.
        compile: compile the model's step first, which about doubles the pace.
        device: of the model, as torch names it; auto is CUDA where there is one, else the CPU.
        json: also write the numbers here.
    """
    from icrl.commands.context import context as run

    _new_file("json", json)
    run(steps, num_states, seed, checkpoint, compile, device, json)
    _say(json)


def _said(**settings: Any) -> dict[str, Any]:
    """The settings that the command line gives: fields of the loop's configuration."""
    return {name: value for name, value in settings.items() if value is not None}


def train_omnirl(
    out: Path = Path("runs/omnirl"),
    preset: Literal["cpu", "published"] = "cpu",
    config: Path | None = None,
    seed: int | None = None,
    updates: int | None = None,
    threads: int | None = None,
    compile: bool | None = None,
    device: str | None = None,
    autocast: bool | None = None,
    init: Path | None = None,
    json: Path | None = None,
) -> None:
    """Meta-train OmniRL, the sequence model. Kill it whenever you like: the same command continues from its last checkpoint.

    A run may go on to more updates (from there on its rates and stages are those of a run of the new total) and with another
    number of processes. Several are started by `torchrun --nproc-per-node 2 -m icrl.cli train omnirl ...`; each makes batches
    of the configured size.

    Args:
        out: the run's folder.
        preset: what the configuration is over: the recipe for a CPU, or the paper's model, data and losses.
        config: a JSON file {"training": {...}, "loop": {...}} over the preset; a run's own config.json is one.
        seed: over the configuration.
        updates: over the configuration.
        threads: over the configuration.
        compile: True or False, over the configuration.
        device: over the configuration; auto is CUDA where there is one, else the CPU.
        autocast: True or False, over the configuration; layers compute in bfloat16, weights and states stay float32.
        init: a model's file to begin from, its weights alone, instead of from random weights.
        json: write the last evaluation here.
    """
    from icrl.commands.train import train_omnirl as run
    from icrl.omnirl.training import read_config

    _new_file("json", json)
    over = _said(seed=seed, updates=updates, threads=threads, compile=compile, device=device, autocast=autocast)
    given = _given(config)
    with _read_from(config):
        read_config(given, preset)
    _new_folder("out", out)
    if run(out, given, preset, over, init, json) is not None:
        _say(json)


def train_value_iteration_network(
    out: Path = Path("runs/value_iteration_network"),
    config: Path | None = None,
    records: Path | None = None,
    seed: int | None = None,
    updates: int | None = None,
    threads: int | None = None,
    compile: bool | None = None,
    device: str | None = None,
    autocast: bool | None = None,
    init: Path | None = None,
    json: Path | None = None,
) -> None:
    """Meta-train the value-iteration network. Kill it whenever you like: the same command continues from its last checkpoint.

    A run may go on to more updates (from there on its rates are those of a run of the new total) and with another number of
    processes. Several are started by `torchrun --nproc-per-node 2 -m icrl.cli train value-iteration-network ...`; each
    makes batches of the configured size.

    Args:
        out: the run's folder.
        config: a JSON file {"training": {...}, "loop": {...}} over the defaults; a run's own config.json is one.
        records: a folder written by `icrl distill` to train from; over the configuration, whose default makes them on
            the fly.
        seed: over the configuration.
        updates: over the configuration.
        threads: over the configuration.
        compile: True or False, over the configuration.
        device: over the configuration; auto is CUDA where there is one, else the CPU.
        autocast: True or False, over the configuration; layers compute in bfloat16, weights and states stay float32.
        init: a model's file to begin from, its weights alone, instead of from random weights.
        json: write the last evaluation here.
    """
    from icrl.commands.train import train_value_iteration_network as run
    from icrl.omnirl.value_iteration_training import read_config

    _new_file("json", json)
    over = _said(seed=seed, updates=updates, threads=threads, compile=compile, device=device, autocast=autocast)
    given = _given(config)
    with _read_from(config):
        read_config(given)
    _new_folder("out", out)
    if run(out, given, records, over, init, json) is not None:
        _say(json)


def distill(
    out: Positional[Path],
    tasks: int = 1000,
    steps: int | None = None,
    states: tuple[int, int] | None = None,
    batch: int | None = None,
    published: bool = False,
    config: Path | None = None,
    labels: bool = False,
    seed: int = 0,
    workers: int | None = None,
    shard_range: tuple[int, int] | None = None,
    full: bool = False,
    json: Path | None = None,
) -> None:
    """Write training records as shards. Kill it whenever you like: the same command goes on, in as many processes as you start.

    Args:
        out: the data set's folder.
        tasks: how many records, each in a task of its own. More than the folder has makes it grow.
        steps: of each record; over the configuration, 12000 without one.
        states: the fewest and the most states of a task; over the configuration.
        batch: how many tasks are made together; over the configuration. A training run of this batch size reads what it
            would have made.
        published: the public record generator's mixture, over the configuration: AnyMDP tasks alone, twelve behaviours.
        config: a JSON file of DPDConfig's fields, over the defaults.
        labels: also store the optimal actions, 4 bytes a step; training looks them up in the table of values.
        seed: of tasks and actions.
        workers: shards made at once, one thread each; one a core unless given.
        shard_range: only shards LOW to HIGH - 1, for machines that share a file system without locks.
        full: read finished shards against their checksums, instead of their headers and lengths alone.
        json: also write what was printed here.
    """
    from icrl.commands.dataset import distill as run
    from icrl.omnirl.distill import PUBLISHED_BEHAVIOURS, DPDConfig
    from icrl.training.config import configured

    _new_file("json", json)
    given: dict[str, Any] = {"steps": 12_000} if config is None else _given(config)
    given |= {name: n for name, n in (("steps", steps), ("batch", batch)) if n is not None}
    if published:
        given |= {"tasks": {"anymdp": 1.0}, "behaviours": PUBLISHED_BEHAVIOURS}
    if states is not None:
        given |= {"least_states": states[0], "states": states[1]}
    with _read_from(config):
        data = configured(DPDConfig, given, "config")
    chosen = None if shard_range is None else range(*shard_range)
    options: dict[str, Any] = {"labels": labels, "workers": _workers(workers), "shards": chosen, "full": full}
    run(out, data, tasks, seed, **options, json=json)
    _say(json)


def dataset(folder: Positional[Path], full: bool = False, json: Path | None = None) -> None:
    """What a folder of shards holds, and whether it is whole.

    Args:
        folder: written by `icrl distill`, `icrl worlds shards` or `icrl collect`.
        full: read every byte against the checksums.
        json: also write what was printed here.
    """
    from icrl.commands.dataset import describe

    _new_file("json", json)
    numbers = describe(folder, full, json)
    _say(json)
    if numbers["wrong"]:
        raise ValueError(f"{folder}: {len(numbers['wrong'])} of {numbers['shards']} shards are not whole")


def train_world_model(
    out: Path = Path("runs/world_model"),
    config: Path | None = None,
    seed: int | None = None,
    environment: str | None = None,
    records: Path | None = None,
    updates: int | None = None,
    threads: int | None = None,
    device: str | None = None,
    compile: bool | None = None,
    autocast: bool | None = None,
    json: Path | None = None,
) -> None:
    """Train S-ICQL's world model alone. Kill it whenever you like: the same command continues from its last checkpoint.

    Args:
        out: the run's folder.
        config: a JSON file of OfflineRun's fields, over the defaults; a run's own config.json is one.
        seed: over the configuration.
        environment: of docs/SICQL.md's table, as darkroom or reach; over the configuration.
        records: a folder written by `icrl collect` to train from; over the configuration.
        updates: over the configuration's world_loop.
        threads: over the configuration; 0 leaves torch's choice.
        device: over the configuration; auto is CUDA where there is one, else the CPU.
        compile: True or False, over the configuration's world_loop; compile the loss, minutes before the first update.
        autocast: True or False, over the configuration's world_loop; layers compute in bfloat16, weights stay float32.
        json: write where the model is, and the errors that its run logged last, here.
    """
    from icrl.commands import offline

    _new_file("json", json)
    where = {"threads": threads, "device": device}
    own = {**where, "updates": updates, "compile": compile, "autocast": autocast}
    over = {"environment": environment, "records": None if records is None else str(records)}
    given = _given(config)
    with _read_from(config):
        experiment = offline.experiment_of(given, over, {**where, "seed": seed}, own)
        _ = experiment.source
    _new_folder("out", out)
    offline.train_world_model(experiment, out, json)
    _say(json)


def train_offline(
    out: Path = Path("runs/sicql"),
    method: str | None = None,
    environment: str | None = None,
    config: Path | None = None,
    world_model: Path | None = None,
    seed: int | None = None,
    updates: int | None = None,
    evaluate: int = 40,
    records: Path | None = None,
    init: Path | None = None,
    threads: int | None = None,
    device: str | None = None,
    compile: bool | None = None,
    autocast: bool | None = None,
    json: Path | None = None,
) -> None:
    """Train S-ICQL or one of its rivals from offline data, and evaluate it few-shot in unseen tasks. Kill it whenever you
    like: the same command continues from its last checkpoint.

    Args:
        out: the run's folder; the evaluation goes to few_shot.json there.
        method: sicql, dpt, ad, idt, dicp, dit, ic_iql, or an ablation: "sicql w/o q", "sicql w/o c", "sicql w/o cq".
        environment: of docs/SICQL.md's table, as darkroom or reach; over the configuration.
        config: a JSON file of OfflineRun's fields, over the defaults; a run's own config.json is one.
        world_model: one that is trained already; otherwise S-ICQL trains its own first.
        seed: over the configuration.
        updates: over the configuration.
        evaluate: episodes in each test task, after training.
        records: a folder written by `icrl collect` to train from; over the configuration.
        init: a method's file to begin from: its weights, with its world model and its data's moments.
        threads: over the configuration; 0 leaves torch's choice.
        device: over the configuration; auto is CUDA where there is one, else the CPU.
        compile: True or False, over the configuration; compile the loss, minutes before the first update. Not for layout "branch".
        autocast: True or False, over the configuration; layers compute in bfloat16, weights stay float32.
        json: also write the evaluation here.
    """
    from icrl.commands import offline
    from icrl.training.config import init_of

    _new_file("json", json)
    loop = {"updates": updates, "threads": threads, "device": device, "compile": compile, "autocast": autocast}
    over = {"method": method, "environment": environment, "records": None if records is None else str(records)}
    given = _given(config)
    with _read_from(config):
        experiment = offline.experiment_of(given, over, {**loop, "seed": seed})
        experiment.check()
        if world_model is None:
            init = init_of(init, given)
    _new_folder("out", out)
    offline.train_offline(experiment, out, world_model, init, evaluate, json)
    _say(json)


def collect(
    out: Positional[Path],
    environment: str | None = None,
    config: Path | None = None,
    teacher: Path | None = None,
    threads: int | None = None,
    json: Path | None = None,
) -> None:
    """Gather offline trajectories into a folder of shards, for `"records"` in the configuration of training runs.

    Kill it whenever you like: the same command goes on, with robots from their teacher's last iteration. It uses the CPU.

    Args:
        out: the data set's folder.
        environment: of docs/SICQL.md's table, as darkroom or reach; over the configuration.
        config: a JSON file of OfflineRun's fields, whose "environment", "data" and "loop.threads" count.
        teacher: the teacher's folder, OUT-teacher unless given; one teacher serves data of each quality.
        threads: over the configuration; 0 leaves torch's choice.
        json: also write what was printed here.
    """
    from icrl.commands import offline

    _new_file("json", json)
    given = _given(config)
    with _read_from(config):
        experiment = offline.experiment_of(given, {"environment": environment}, {"threads": threads})
        _ = experiment.source
    _new_folder("out", out)
    offline.collect(experiment, out, teacher, json)
    _say(json)


def _given(config: Path | None) -> dict[str, Any]:
    """The object in a configuration file; without one, none of its fields."""
    from icrl.reading import read_json

    if config is None:
        return {}
    try:
        return read_json(config, dict, "config: {path} is not a readable JSON file ({why})")
    except FileNotFoundError as e:
        raise ValueError(f"config: {config} is not a readable JSON file ({e.strerror})") from e


@contextmanager
def _read_from(config: Path | None) -> Iterator[None]:
    """A block that reads what a configuration file holds: its errors name the file."""
    try:
        yield
    except ValueError as e:
        raise ValueError(f"{e} (configuration: {config})" if config else str(e)) from e


def evaluate_sicql(
    out: Path = Path("runs/suite"),
    environment: str | None = None,
    methods: tuple[str, ...] = ("sicql", "ic_iql", "dicp", "ad", "idt", "dit", "dpt"),
    seeds: int = 3,
    episodes: int = 40,
    jobs: int = 2,
    config: Path | None = None,
    threads: int | None = None,
    device: str | None = None,
    json: Path | None = None,
) -> None:
    """S-ICQL's table: train every method with every seed, evaluate few-shot in unseen tasks, print, draw. Also `icrl eval
    --suite sicql`. What `out` holds already is not made again. What each run prints is in <run>.log.

    Args:
        out: the suite's folder.
        environment: of docs/SICQL.md's table, as darkroom or reach; over the configuration.
        methods: of icrl train offline.
        seeds: of each method, 0, 1, ...; of weights, batches and evaluation.
        episodes: in a row in each test task, the one before being the prompt.
        jobs: processes at a time.
        config: a JSON file of OfflineRun's fields (icrl.offline.experiment), over the defaults.
        threads: of each process; over the configuration, whose 0 shares the cores among the jobs.
        device: of each process; over the configuration.
        json: also write the numbers here.
    """
    from icrl.offline.experiment import OfflineRun
    from icrl.offline.suite import suite
    from icrl.training.config import configured

    _new_file("json", json)
    loop, given = {"threads": threads, "device": device}, _given(config)
    with _read_from(config):
        configured(OfflineRun, given, "config")
    suite(out, environment, list(methods), seeds, episodes, jobs, given, loop, json)
    _say(json)


def evaluate_omnirl(
    out: Path = Path("runs/omnirl-suite"),
    checkpoint: tuple[Path, ...] = (),
    rows: tuple[str, ...] = (),
    contexts: int = 64,
    steps: int | None = None,
    learner_steps: int | None = None,
    ppo: bool = False,
    ppo_tasks: int = 8,
    seed: int = 1,
    prompt: int = 4,
    threads: int | None = None,
    device: str = "auto",
    json: Path | None = None,
) -> None:
    """OmniRL's table: models and baselines in each of its environments, beside the paper's figures; tables and a picture. Also
    `icrl eval --suite omnirl`. Kill it whenever you like: what `out` holds already is not made again, and more rows, models and
    PPO may be added to it.

    Args:
        out: the suite's folder.
        checkpoint: one model or several, a column each, instead of the shipped one.
        rows: some of the table's rows, as anymdp-16 or cliff; all unless given.
        contexts: tasks of a row, or contexts of its one task.
        steps: of each context, instead of each row's own.
        learner_steps: the most that Q-learning and PPO are given in a row; each row's own unless given.
        ppo: train PPO too, in `ppo-tasks` tasks a row: hours.
        ppo_tasks: of a row.
        seed: of tasks and actions.
        prompt: the tag of the policy to imitate: 0-3, optimal at discount 0, .5, .93, .994; 4, the explorer.
        threads: of torch; torch's choice unless given.
        device: of the models, as torch names it; auto is CUDA where there is one, else the CPU.
        json: also write the numbers here.
    """
    import torch

    from icrl.files import save_numbers
    from icrl.omnirl.checkpoints import shipped
    from icrl.omnirl.suite import SuiteConfig, suite
    from icrl.training.process import resolve
    from icrl_kernels.arguments import integer

    _new_file("json", json)
    config = SuiteConfig(contexts, steps, learner_steps, seed)
    if threads is not None:
        torch.set_num_threads(integer("threads", threads, 1))
    _new_folder("out", out)
    numbers = suite(out, checkpoint or (shipped(),), rows, config, prompt, ppo_tasks if ppo else 0, resolve(device))
    save_numbers(json, numbers)
    _say(json)


def evaluate(
    tasks: Path | None = None,
    checkpoint: Path | None = None,
    kind: Literal["anymdp", "garnet", "bandit"] | None = None,
    num_tasks: int | None = None,
    num_states: int | None = None,
    steps: int = 2000,
    seed: int = 1,
    prompt: int = 4,
    device: str = "auto",
    json: Path | None = None,
) -> None:
    """Normalised scores of a model and the baselines on a file of tasks, or on fresh ones; `eval --suite sicql`
    and `eval --suite omnirl` are others.

    Args:
        tasks: written by `icrl worlds sample` or `shards`; fresh tasks otherwise.
        checkpoint: a model of your own instead of the shipped one.
        kind: of fresh tasks; anymdp unless given.
        num_tasks: how many fresh tasks; 64 unless given.
        num_states: of fresh tasks, 16 unless given; of bandits, ids that their one state may have, 1 unless given.
        steps: of each context.
        seed: of tasks and actions.
        device: of the model, as torch names it; auto is CUDA where there is one, else the CPU.
        json: also write the numbers here.
        prompt: the tag of the policy to imitate: 0-3, optimal at discount 0, .5, .93, .994; 4, the explorer.
    """
    for name, value in {"kind": kind, "num_tasks": num_tasks, "num_states": num_states}.items():
        if tasks is not None and value is not None:
            raise ValueError(f"{name}: an option of fresh tasks, got {value} beside tasks={tasks}")
    kind, num_tasks = kind or "anymdp", 64 if num_tasks is None else num_tasks
    num_states = _states(kind, num_states)
    from icrl.commands.evaluate import evaluation_table

    _new_file("json", json)
    evaluation_table(tasks, checkpoint, kind, num_tasks, num_states, steps, seed, prompt, device, json)
    _say(json)


def worlds_sample(
    out: Positional[Path],
    kind: Literal["anymdp", "garnet", "bandit", "pomdp"] = "anymdp",
    num_tasks: int = 1000,
    num_states: int | None = None,
    num_actions: int = 5,
    branching: int | None = None,
    num_observations: int | None = None,
    observation_tokens: int | None = None,
    action_tokens: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
    json: Path | None = None,
) -> None:
    """Sample tasks into a safetensors file.

    Args:
        out: the file to write.
        num_states: of a task, 16 unless given; of a bandit, ids that its one state may have, 1 unless given.
        branching: successors of each state and action (Garnet); 2 unless given.
        num_observations: ids that a token may have (POMDP); 64 unless given.
        observation_tokens: tokens seen in a state (POMDP); 1 unless given.
        action_tokens: actions in a step of the environment (POMDP); 1 unless given.
        overwrite: replace an existing file.
        json: also write what was printed here.
    """
    num_states = _states(kind, num_states)
    branching = _of_kind(kind, "branching", branching, 2)
    num_observations = _of_kind(kind, "num_observations", num_observations, 64)
    observation_tokens = _of_kind(kind, "observation_tokens", observation_tokens, 1)
    action_tokens = _of_kind(kind, "action_tokens", action_tokens, 1)
    from icrl.commands import worlds

    _new_file("json", json)
    sizes = num_tasks, num_states, num_actions, branching
    tokens = {
        "num_observations": num_observations,
        "observation_tokens": observation_tokens,
        "action_tokens": action_tokens,
    }
    worlds.sample(out, kind, *sizes, seed, overwrite, json, **tokens)
    _say(json)


def worlds_filter(
    tasks: Positional[Path],
    out: Positional[Path],
    min_advantage: float = 2.0,
    min_gini: float = 0.7,
    min_entropy: float = 0.35,
    overwrite: bool = False,
    json: Path | None = None,
) -> None:
    """Keep the tasks that pass AnyMDP's quality filters, at thresholds of your own.

    Args:
        tasks: a file written by `icrl worlds sample`.
        out: the file to write.
        min_advantage: how much more than random the optimal policy must earn in an episode.
        min_gini: of the states that the optimal policy visits.
        min_entropy: of the same, normalised.
        overwrite: replace an existing file.
        json: also write what was printed here.
    """
    from icrl.commands import worlds

    _new_file("json", json)
    worlds.filter_tasks(tasks, out, min_advantage, min_gini, min_entropy, overwrite, json)
    _say(json)


def worlds_inspect(tasks: Positional[Path], json: Path | None = None) -> None:
    """Sizes, rewards, terminals and values of the tasks in a file."""
    from icrl.commands import worlds

    _new_file("json", json)
    worlds.inspect(tasks, json)
    _say(json)


def worlds_draw(
    tasks: Positional[Path], out: Path = Path("icrl-task.png"), index: int = 0, json: Path | None = None
) -> None:
    """Draw one task: its transitions under the optimal policy, the likeliest way, rewards, values, terminals.

    Args:
        tasks: a file or a folder of tasks.
        out: the picture.
        index: of the task.
        json: also write what was printed here.
    """
    from icrl.commands import worlds

    _new_file("json", json)
    _new_file("out", out, PICTURES)
    worlds.draw(tasks, out, index, json)
    _say(json)


def worlds_shards(
    out: Positional[Path],
    kind: Literal["anymdp", "garnet", "bandit", "pomdp"] = "anymdp",
    num_tasks: int = 10_000,
    num_states: tuple[int, int] = (16, 16),
    num_actions: int = 5,
    branching: int | None = None,
    discounts: tuple[float, ...] = (),
    num_observations: int | None = None,
    observation_tokens: int | None = None,
    action_tokens: int | None = None,
    seed: int = 0,
    workers: int | None = None,
    shard_range: tuple[int, int] | None = None,
    full: bool = False,
    json: Path | None = None,
) -> None:
    """Sample tasks into a folder of shards. Kill it whenever you like: the same command goes on, in as many processes as you start.

    Args:
        out: the data set's folder.
        num_tasks: more than the folder has makes it grow.
        num_states: the fewest and the most of a task; the most is how many ids there are to observe, for bandits too.
        branching: successors of each state and action (Garnet); 2 unless given.
        discounts: also store optimal policies and values at each of these.
        num_observations: how many ids each token has (POMDP); 64 unless given.
        observation_tokens: an agent sees at a step (POMDP); 1 unless given.
        action_tokens: an agent gives at a step (POMDP); 1 unless given.
        workers: shards made at once, one thread each; one a core unless given.
        shard_range: only shards LOW to HIGH - 1, for machines that share a file system without locks.
        full: read finished shards against their checksums, instead of their headers and lengths alone.
        json: also write what was printed here.
    """
    branching = _of_kind(kind, "branching", branching, 2)
    num_observations = _of_kind(kind, "num_observations", num_observations, 64)
    observation_tokens = _of_kind(kind, "observation_tokens", observation_tokens, 1)
    action_tokens = _of_kind(kind, "action_tokens", action_tokens, 1)
    from icrl.commands import worlds
    from icrl.worlds.task_shards import TaskSet

    _new_file("json", json)
    tokens = (num_observations, observation_tokens, action_tokens)
    config = TaskSet(kind, num_states, num_actions, branching, discounts, *tokens)
    options = {"workers": _workers(workers), "full": full}
    options["shards"] = None if shard_range is None else range(*shard_range)
    worlds.shards(out, config, num_tasks, seed, json, **options)
    _say(json)


def worlds_difficulty(
    out: Positional[Path],
    num_tasks: int = 500,
    num_states: tuple[int, ...] = (16, 32, 64, 128),
    num_actions: int = 5,
    branching: int = 2,
    seed: int = 0,
    json: Path | None = None,
) -> None:
    """Draw how likely a random policy visits a state against the state's value, for AnyMDP beside Garnet.

    Args:
        out: the picture.
        num_tasks: of each family and size.
        num_states: sizes of the tasks.
        branching: successors of each state and action (Garnet).
        json: also write the numbers here.
    """
    from icrl.commands import worlds

    _new_file("json", json)
    _new_file("out", out, PICTURES)
    worlds.difficulty(out, num_tasks, num_states, num_actions, branching, seed, json)
    _say(json)


def _apart(command: Callable[..., None]) -> Callable[..., None]:
    """The command, which refuses to write its numbers over another file that it reads or writes."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        given = signature(command).bind(*args, **kwargs).arguments
        json = given.pop("json", None)
        for name, path in given.items():
            if not isinstance(path, Path) or not isinstance(json, Path) or path.resolve() != json.resolve():
                continue
            if path.is_file() or not path.exists():  # devices may be written by both
                raise ValueError(f"json: wanted a file of its own, got {json}, which is {name} too")
        command(*args, **kwargs)

    return run


COMMANDS = {
    "demo": demo,
    "context": context,
    "train omnirl": train_omnirl,
    "train value-iteration-network": train_value_iteration_network,
    "collect": collect,
    "train offline": train_offline,
    "train world-model": train_world_model,
    "eval": evaluate,
    "eval sicql": evaluate_sicql,
    "eval omnirl": evaluate_omnirl,
    "distill": distill,
    "dataset": dataset,
    "worlds sample": worlds_sample,
    "worlds filter": worlds_filter,
    "worlds inspect": worlds_inspect,
    "worlds draw": worlds_draw,
    "worlds shards": worlds_shards,
    "worlds difficulty": worlds_difficulty,
}
COMMANDS = {name: _apart(command) for name, command in COMMANDS.items()}


def main(argv: list[str] | None = None) -> int:
    """Run one command; 0, or 2 with one line on what was wrong with the input.

    130 where it was interrupted. 141 where the reader of its output left before its end: its work is done all the same.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    with terminal.environment(), terminal.streams() as streams:
        exits: SystemExit | None = None
        try:
            code: Any = _run(args)
        except SystemExit as e:  # help, or options that cannot be read
            exits, code = e, e.code
        except KeyboardInterrupt:
            print(terminal.INTERRUPTED_LINE, file=sys.stderr)
            code = terminal.INTERRUPTED
        for stream in streams:
            stream.flush()
        errors = [stream.error for stream in streams if stream.error is not None]
        for error in errors:
            if not isinstance(error, BrokenPipeError):
                print(f"icrl: not all could be printed: {error.strerror}", file=sys.stderr)
                code = code or 2
        code = code or (terminal.READER_LEFT if errors else 0)
    if exits is not None:
        raise SystemExit(code) from exits
    return code


def _run(args: list[str]) -> int:
    try:
        terminal.check_folder()
        if args[:1] == ["eval"]:
            args = [part for arg in args for part in (arg.split("=", 1) if arg.startswith("--suite=") else [arg])]
        if args[:1] == ["eval"] and "--suite" in args:  # `eval --suite sicql` is `eval sicql`
            at = args.index("--suite")
            if args[at + 1 : at + 2] not in [[name] for name in SUITES]:
                raise ValueError(f"suite: wanted one of {', '.join(SUITES)}, got {' '.join(args[at + 1 : at + 2])!r}")
            args = ["eval", args[at + 1], *args[1:at], *args[at + 2 :]]
        if len(args) > 1 and args[0] in GROUPS and not args[1].startswith("-"):
            args = [f"{args[0]} {args[1]}", *args[2:]]
        if "WORLD_SIZE" in os.environ and (not args or args[0] not in DISTRIBUTED):
            from icrl.training.process import refuse_torchrun

            refuse_torchrun(args[0] if args else "")
        tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="icrl", args=args)
    except (ValueError, OSError, FloatingPointError) as e:
        print(f"icrl: {e}".replace("\n", " "), file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as e:  # torch's and numpy's
        wanted = re.search(r"allocate ([\d.]+ \w+)", str(e))
        if wanted is None and not isinstance(e, MemoryError):
            raise
        print(f"icrl: not enough memory{f' for {wanted[1]}' if wanted else ''}", file=sys.stderr)
        return 2
    return 0


def script() -> NoReturn:
    """The process of `icrl`."""
    share_the_machine()
    if (
        signal.getsignal(signal.SIGINT) is signal.default_int_handler
    ):  # a shell ignores it for what runs in the background
        signal.signal(signal.SIGINT, terminal.interrupt)
    try:
        code = main()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the work is done
    except KeyboardInterrupt:  # in the moment before it began, or after
        print(terminal.INTERRUPTED_LINE, file=sys.stderr)
        code = terminal.INTERRUPTED
    if code == terminal.INTERRUPTED:
        os._exit(code)  # without waiting for threads that are at work: what they leave is what a kill leaves
    sys.exit(code)


if __name__ == "__main__":
    script()
