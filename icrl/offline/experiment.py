"""One experiment from offline data: its source, data, method and training, and the evaluation of what was trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import gymnasium
import torch
from torch import Tensor

from icrl.data.shards import INDEX, read_index
from icrl.extras import versions
from icrl.offline.environments import source_class
from icrl.offline.environments.source import DataSource
from icrl.offline.few_shot import few_shot
from icrl.offline.learner import METHODS, OfflineLearner, load_method, make_method
from icrl.offline.method import Method, MethodConfig, Spaces
from icrl.offline.presets import ABLATIONS, ENVIRONMENT_SETTINGS, LOOP, WORLD_LOOP, settings_of, titles
from icrl.offline.provenance import check_versions
from icrl.offline.trajectories import Trajectories
from icrl.offline.trajectory_shards import read_trajectories, write_trajectories
from icrl.offline.world_model import WorldModel, WorldModelConfig, WorldModelLearner
from icrl.training.config import LoopConfig, configured, merged
from icrl.training.loop import train
from icrl.training.process import machine, resolve
from icrl_kernels.arguments import integer_fields


@dataclass(frozen=True)
class OfflineRun:
    """All that a run is made of. `method` is a method's name, or an ablation's; `settings` are its configuration's."""

    method: str = "sicql"
    environment: str = "darkroom"
    data: dict[str, Any] = field(default_factory=dict)
    records: str = ""
    """A folder written by `icrl collect` with the same environment and data, to read instead of gathering anew."""
    settings: dict[str, Any] = field(default_factory=dict)
    world_model: WorldModelConfig = field(default_factory=lambda: WorldModelConfig(window=8, size=32, others=8))
    world_loop: LoopConfig = WORLD_LOOP
    """Of the world model's training. Its seed is `loop`'s; so are its device and threads, unless it has its own."""
    world_batch: int = 256
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(**LOOP))
    judged_episodes: int = 10
    """Of each test task, at every evaluation during training."""

    def __post_init__(self) -> None:
        if self.method not in titles():
            raise ValueError(f"method: wanted one of {', '.join(titles())}, got {self.method!r}")
        source_class(self.environment)
        integer_fields(self, world_batch=1, judged_episodes=1)

    @property
    def training_of_world_model(self) -> LoopConfig:
        """`world_loop` with the run's seed, and the run's device and threads where it has none of its own. Raises ValueError
        where it has another seed."""
        if self.world_loop.seed not in (0, self.loop.seed):
            raise ValueError(
                f"world_loop.seed: wanted none of its own, the run's is loop.seed={self.loop.seed}, "
                f"got {self.world_loop.seed}"
            )
        own, loop = self.world_loop, self.loop
        device = loop.device if own.device == "auto" else own.device
        return replace(own, seed=loop.seed, device=device, threads=own.threads or loop.threads)


def offline_run(given: dict[str, Any]) -> OfflineRun:
    """A run from a JSON object of its fields, or from the record (config.json) of one. Raises ValueError naming the field."""
    if "world_size" in given and isinstance(given.get("run"), dict):
        given = given["run"]
    return configured(OfflineRun, given, "config")


class Experiment:
    """A run's source, data, environments and best returns, each made once, when it is first asked for."""

    def __init__(self, run: OfflineRun) -> None:
        self.run = run

    @cached_property
    def source(self) -> DataSource:
        return configured(source_class(self.run.environment), self.run.data, "data")

    @property
    def method(self) -> type[Method]:
        return METHODS[self.run.method.split()[0]]

    @cached_property
    def config(self) -> MethodConfig:
        """The suite's settings of the method, those of the environment and this run's own over them, and what its ablation
        leaves out over all."""
        run, horizon = self.run, self.source.horizon
        kind = self.method.config_class
        known = {f.name for f in fields(kind)}
        here = {k: v for k, v in ENVIRONMENT_SETTINGS.get(run.environment, {}).items() if k in known}
        given = merged(merged({**settings_of(self.method.name), "horizon": horizon}, here), run.settings)
        config = configured(kind, {**given, **ABLATIONS.get(run.method, {})}, f"{run.method}'s settings")
        if config.horizon != horizon:
            raise ValueError(f"settings: horizon: wanted {run.environment}'s {horizon}, got {config.horizon}")
        self.method.check_window(config, run.world_model.window)
        return config

    @property
    def needs_world_model(self) -> bool:
        return self.method.needs_world_model(self.config)

    @cached_property
    def device(self) -> torch.device:
        """Where the method is trained and judged. Raises ValueError where there is no such device."""
        return resolve(self.run.loop.device)

    @cached_property
    def data(self) -> Trajectories:
        """The training data on the CPU, gathered or read from `records`. Raises ValueError where those were gathered otherwise."""
        if not self.run.records:
            return self.source.train_data()
        folder = Path(self.run.records)
        check_records(folder, self.run.environment, self.source, "records", self.source.simulators)
        return read_trajectories(folder)

    @cached_property
    def environments(self) -> gymnasium.vector.VectorEnv:
        """Of the test tasks, one each."""
        return self.source.environments()

    @cached_property
    def best_returns(self) -> Tensor | None:
        """[N] the best known return of each test task, or None."""
        return self.source.best_returns()

    @cached_property
    def prompts(self) -> Trajectories | None:
        """An episode of each test task that agents are given to begin with, or None."""
        return self.source.prompts()

    @cached_property
    def best_return(self) -> float | None:
        """Of the test tasks, in the mean: the best known, or the teacher's that gathered `records`, or unknown."""
        if self.best_returns is not None:
            return float(self.best_returns.mean())
        return read_index(Path(self.run.records))[0].config.get("test_return") if self.run.records else None

    @cached_property
    def versions(self) -> dict[str, str]:
        """Of this package, of torch, and of what the environment's numbers depend on."""
        return versions(*self.source.simulators, *self.source.tools)

    @property
    def simulators(self) -> dict[str, str]:
        """Versions of the source's simulators and tools, as far as they are installed."""
        return {k: v for k, v in self.versions.items() if k in (*self.source.simulators, *self.source.tools)}

    def facts(self) -> dict[str, Any]:
        """What a run's config.json says of its data: what made it, and where it was read, that data set's identity."""
        made: dict[str, Any] = {"environment": self.run.environment, "data": settings(self.source)}
        if self.run.records:
            made["records"] = read_index(Path(self.run.records))[0].identity()
        return made

    def record(self) -> dict[str, Any]:
        """What stands in config.json besides, and may differ when a run goes on: the run as it was given, and versions of
        simulators."""
        return {"run": asdict(self.run), "simulators": self.simulators}

    def check(self) -> None:
        """ValueError for all that can be refused before data are gathered: settings, the device, `compile`."""
        config = self.config
        if self.run.loop.compile:
            self.method.check_compile(config)
        resolve(self.run.loop.device)
        world_loop = self.run.training_of_world_model
        if self.needs_world_model:
            resolve(world_loop.device)


def settings(source: Any) -> dict[str, Any]:
    """A source's fields as JSON has them."""
    return asdict(source)


def train_method(experiment: Experiment, out: Path, world_model: Path | None = None, init: Path | None = None) -> Path:
    """Train as the experiment's run says, into `out`; the world model, where the method needs one, first, into
    `out`-world_model.

    Args:
        world_model: one that is trained already, in the same environment.
        init: a method's file to begin from: its weights, its world model, and the moments of its data.
    Returns:
        the method's file.
    Raises:
        ValueError: what does not fit, named; also where both `world_model` and `init` would bring a world model.
    """
    experiment.check()
    run, config = experiment.run, experiment.config
    if world_model is not None and not experiment.needs_world_model:
        raise ValueError(f"world_model: {run.method} uses none, got {world_model}")
    if world_model is not None and init is not None:
        raise ValueError(f"world_model: init={init} brings its own, got {world_model}")
    initial = None if init is None else load_method(init)
    data, made = experiment.data, None
    if experiment.needs_world_model:
        if initial is not None:
            made = deepcopy(getattr(initial, "world_model", None))
            if made is None:
                raise ValueError(f"init: wanted a {run.method} with a world model, {init} has none")
        else:
            if world_model is None:
                world_model = train_world_model(experiment, out.with_name(out.name + "-world_model"))
            made = WorldModel.load(world_model)
        made.check(data)
    environments, prompts, best = experiment.environments, experiment.prompts, experiment.best_returns
    optimal = 0.0 if best is None else float(best.mean())

    def judge(m: Method) -> dict[str, float]:
        returns = few_shot(m, environments, run.judged_episodes, seed=2**20, prompts=prompts)
        half = returns[:, run.judged_episodes // 2 :]
        return {"return": float(half.mean()), **({"score": float(half.mean()) / optimal} if optimal > 0 else {})}

    torch.manual_seed(run.loop.seed)
    method = make_method(experiment.method.name, config, Spaces.of(data), made).to(experiment.device)
    facts = {**experiment.facts(), **({} if init is None else {"init": str(init)})}
    learner = OfflineLearner(method, data, facts, judge, run.loop, initial, experiment.record())
    return train(learner, run.loop, out)


def train_world_model(experiment: Experiment, out: Path) -> Path:
    """Train the world model alone, into `out`; its file. Raises ValueError for what does not fit."""
    run, loop = experiment.run, experiment.run.training_of_world_model
    device = resolve(loop.device)
    with threads(loop.threads):
        learner = WorldModelLearner(
            run.world_model, experiment.data, run.world_batch, loop, experiment.facts(), device, experiment.record()
        )
        return train(learner, loop, out)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """torch's threads within the block; 0 leaves them as they are."""
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def collect_data(experiment: Experiment, out: Path, teacher: Path | None = None) -> dict[str, Any]:
    """Gather the experiment's training data into shards in `out`, or go on there; what was written, and what is known of
    its teacher.

    The data set's configuration names the versions of simulators; this package's and torch's stand beside it.

    Args:
        teacher: the folder of the teacher, where the environment has one; `out`-teacher unless given.
    Raises:
        ValueError: `out` holds data of another configuration or another simulator's, or there is no teacher.
    """
    source, run = experiment.source, experiment.run
    if teacher is not None and not source.has_teacher:
        raise ValueError(f"teacher: {run.environment} has none, got {teacher}")
    simulators = experiment.simulators
    if (out / INDEX).exists():
        check_records(out, run.environment, source, "out", (*source.simulators, *source.tools))
        simulators = read_index(out)[0].config.get("simulators", {})  # none of data from before they were kept
    data, facts = source.collect(teacher or out.with_name(out.name + "-teacher"))
    made = {"source": run.environment, **settings(source), **facts}
    if simulators:
        made["simulators"] = simulators
    written = write_trajectories(out, data, made, source.seed, progress=True)
    numbers = {"shards": written.made + written.found, "made": written.made, "bytes": written.bytes, **facts}
    return {**numbers, "versions": experiment.versions}


def check_records(folder: Path, environment: str, source: DataSource, name: str, packages: tuple[str, ...]) -> None:
    """ValueError, about the argument `name`, where the data set in `folder` was gathered otherwise, or with another version
    of one of `packages`."""
    made = read_index(folder)[0].config
    defaults = {f.name: f.default for f in fields(source)}  # pyright: ignore[reportArgumentType] (a dataclass)
    for key, value in {"source": environment, **settings(source)}.items():
        if made.get(key, defaults.get(key)) != value:
            raise ValueError(f"{name}: {folder} has {key} {made.get(key)!r}, the configuration {value!r}")
    check_versions(f"{name}: {folder}", made.get("simulators"), packages, say=False)


def evaluate_method(path: Path, experiment: Experiment, episodes: int, seed: int) -> dict[str, Any]:
    """Few-shot returns of a trained method in the experiment's test tasks: every episode's, averaged over tasks; the best
    known return, the policy that earned it ("optimal", "teacher", "scripted"), or None; and versions and the machine."""
    method = load_method(path).to(experiment.device)
    returns = few_shot(method, experiment.environments, episodes, seed, prompts=experiment.prompts)
    return {
        "returns": returns.mean(0).tolist(),
        "reached": (returns > 0).float().mean(0).tolist(),
        "best": experiment.best_return,
        "best_of": experiment.source.best_of,
        "versions": experiment.versions,
        **machine(experiment.device),
    }
