"""S-ICQL and its rivals trained and judged alike: one configuration a method, runs in folders, tables and pictures.

A suite's folder holds a run for each method and seed (`<method>-<seed>/`, resumable, see icrl.train) and what few-shot
evaluation made of it (`few_shot.json`); what is there already is not made again.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from icrl.few_shot import few_shot
from icrl.methods import Method, MethodConfig, Spaces
from icrl.offline import Trajectories
from icrl.offline_data import read_trajectories, write_trajectories
from icrl.offline_training import METHODS, OfflineLearner, load_method, make_method
from icrl.plots import few_shot_picture
from icrl.shards import read_index
from icrl.sicql.model import SICQLConfig
from icrl.sicql.world_model import WorldModel, WorldModelConfig, WorldModelLearner
from icrl.train import LoopConfig, configured, train
from icrl.worlds.darkroom import DarkRoomData
from icrl.worlds.meta_world import MetaWorldData, PushData, ReachData
from icrl.worlds.mujoco import AntDirData, CheetahVelData, MujocoData, WalkerParamData
from icrl.worlds.point_robot import PointRobotData
from icrl.worlds.stitching import StitchingData

Data = DarkRoomData | StitchingData | PointRobotData | MetaWorldData | MujocoData
DATA: dict[str, type[Any]] = {
    "darkroom": DarkRoomData,
    "stitching": StitchingData,
    "point-robot": PointRobotData,
    "reach": ReachData,
    "push": PushData,
    "cheetah-vel": CheetahVelData,
    "ant-dir": AntDirData,
    "walker-param": WalkerParamData,
}
TITLES = {
    "dpt": "DPT",
    "ad": "AD",
    "idt": "IDT",
    "dicp": "DICP",
    "dit": "DIT",
    "ic_iql": "IC-IQL",
    "sicql": "S-ICQL",
    "sicql w/o cq": "w/o_cq",
    "sicql w/o c": "w/o_c",
    "sicql w/o q": "w/o_q",
}
ABLATIONS: dict[str, dict[str, Any]] = {
    "sicql w/o cq": {"world_model": False, "q_learning": False, "stride": 1},
    "sicql w/o c": {"world_model": False, "stride": 1},
    "sicql w/o q": {"q_learning": False},
}
PUBLISHED: dict[tuple[str, str], dict[str, float]] = {
    where: dict(zip(METHODS | ABLATIONS, returns, strict=False))  # ablations were not published everywhere
    for where, returns in {
        ("darkroom", "random"): (66.05, 22.12, 42.72, 40.70, 59.76, 30.90, 60.12),
        ("push", "random"): (653.04, 362.74, 604.50, 621.58, 487.28, 633.58, 646.08),
        ("reach", "random"): (806.97, 736.72, 738.96, 790.68, 706.46, 758.92, 773.33, 736.72, 792.09, 752.41),
        ("cheetah-vel", "random"): (-35.48, -78.35, -67.37, -59.46, -66.53, -74.50, -56.53, -78.35, -56.19, -63.66),
        ("walker-param", "random"): (466.72, 257.11, 424.82, 343.01, 403.90, 253.94, 391.38),
        ("ant-dir", "random"): (813.34, 591.31, 215.01, 631.83, 745.05, 723.49, 713.26, 591.31, 693.87, 784.07),
    }.items()
} | {
    ("cheetah-vel", "far"): {"sicql": -83.45, "dpt": -137.26, "ic_iql": -101.89},
    ("ant-dir", "far"): {"sicql": 664.95, "dpt": 205.29, "ic_iql": 540.20},
}
"""Few-shot returns by environment and split of its tasks, from mixed data (arXiv 2506.01299: table 1, ablations, OOD)."""

LIKE_PUBLISHED = ("size", "horizon", "start", "train_goals", "tasks", "quality")
"""Fields of data sources that are as published where they have their defaults."""

# What suites train: one trunk for all, as many updates for all, and batches whose updates take about as long (80 to 110 ms
# of one core; S-ICQL's 80). Sized for two CPU cores; the methods' own defaults are the published sizes.
TRUNK = {"width": 64, "layers": 3, "heads": 2}
PROMPT = {"trunk": TRUNK, "layout": "branch", "queries": 16, "batch": 64, "balanced": 1.0}
HISTORY = {"trunk": TRUNK, "episodes": 4, "batch": 8}
IQL = {"iql": {"discount": 0.95, "inverse_temperature": 3.0, "max_weight": 100.0}}
SETTINGS: dict[str, dict[str, Any]] = {
    "sicql": {**PROMPT, **IQL, "stride": 4},
    "dpt": {**PROMPT, "batch": 40},
    "dit": {**PROMPT, "batch": 40, "discount": 0.95},
    "ad": HISTORY,
    "idt": {**HISTORY, "batch": 64},
    "dicp": {**HISTORY, "discount": 0.95},
    "ic_iql": {**HISTORY, **IQL},
}
CONTINUOUS = {"balanced": 0.0}  # no state is seen twice
ENVIRONMENT_SETTINGS: dict[str, dict[str, Any]] = {
    "stitching": {"iql": {"target_rate": 0.02}},  # values must come a long way: from the goal to the start
    "point-robot": CONTINUOUS,
    "reach": {**CONTINUOUS, "iql": {"reward_scale": 0.1}},  # up to 10 a step
    "push": {**CONTINUOUS, "iql": {"reward_scale": 0.1}},
    "cheetah-vel": CONTINUOUS,
    "ant-dir": CONTINUOUS,
    "walker-param": CONTINUOUS,
}
LOOP = {
    "updates": 2500,
    "learning_rate": 1e-3,
    "muon_learning_rate": 3e-3,
    "weight_decay": 1e-4,
    "evaluate_every": 1000,
    "checkpoint_every": 250,
}
WORLD_LOOP = LoopConfig(
    updates=3000, learning_rate=1e-3, muon_learning_rate=0.0, checkpoint_every=500, evaluate_every=1000
)


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
    world_batch: int = 256
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(**LOOP))
    judged_episodes: int = 10
    """Of each test task, at every evaluation during training."""

    def __post_init__(self) -> None:
        if self.method not in TITLES:
            raise ValueError(f"method: wanted one of {', '.join(TITLES)}, got {self.method!r}")
        if self.environment not in DATA:
            raise ValueError(f"environment: wanted one of {', '.join(DATA)}, got {self.environment!r}")
        for name in ("world_batch", "judged_episodes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: wanted at least 1, got {getattr(self, name)}")

    def make_data(self) -> Data:
        return configured(DATA[self.environment], self.data, "data")

    def train_data(self) -> Trajectories:
        """Gathered, or read from `records`. Raises ValueError where those were gathered otherwise."""
        source = self.make_data()
        if not self.records:
            return source.train_data()
        check_records(Path(self.records), self.environment, source, "records")
        return read_trajectories(Path(self.records))

    def facts(self) -> dict[str, Any]:
        """What a run's config.json says of its data: what made it, and where it was read, that data set's identity."""
        made = {"environment": self.environment, "data": asdict(self.make_data())}
        return {**made, "records": read_index(Path(self.records))[0].identity()} if self.records else made

    def make_config(self) -> MethodConfig:
        """The suite's settings of the method, those of the environment and this run's own over them, and what its ablation
        leaves out over all."""
        name, horizon = self.method.split()[0], self.make_data().horizon
        kind = METHODS[name][1]
        known = {f.name for f in fields(kind)}
        here = {k: v for k, v in ENVIRONMENT_SETTINGS.get(self.environment, {}).items() if k in known}
        given = merged(merged({**SETTINGS[name], "horizon": horizon}, here), self.settings)
        config = configured(kind, {**given, **ABLATIONS.get(self.method, {})}, f"{self.method}'s settings")
        if config.horizon != horizon:
            raise ValueError(f"settings: horizon: wanted {self.environment}'s {horizon}, got {config.horizon}")
        if isinstance(config, SICQLConfig) and config.world_model and config.stride > self.world_model.window:
            raise ValueError(
                f"settings: stride: wanted at most world_model.window={self.world_model.window}, got {config.stride}"
            )
        return config

    def first_prompts(self) -> Trajectories | None:
        """An episode of each test task that agents are given to begin with, in the stitching study."""
        data = self.make_data()
        return data.prompts() if isinstance(data, StitchingData) else None

    def best_return(self) -> float | None:
        """Of the test tasks, in the mean: the optimal policy's, or the teacher's that gathered `records`, or unknown."""
        known = self.make_data().best_returns()
        if known is not None:
            return float(known.mean())
        return read_index(Path(self.records))[0].config.get("test_return") if self.records else None


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over`, objects within objects too."""
    both = {
        k: merged(base[k], v) if isinstance(base.get(k), dict) and isinstance(v, dict) else v for k, v in over.items()
    }
    return {**base, **both}


def train_method(run: OfflineRun, out: Path, world_model: Path | None = None) -> Path:
    """Train as `run` says, into `out`; the world model, where the method needs one, first, into `out`/world_model.

    Args:
        world_model: one that is trained already, in the same environment.
    Returns:
        the method's file.
    """
    source, config = run.make_data(), run.make_config()
    data = run.train_data()
    made = None
    if isinstance(config, SICQLConfig) and config.world_model:
        if world_model is None:
            world_model = train_world_model(run, out.with_name(out.name + "-world_model"))
        made = WorldModel.load(world_model)
        made.check(data)
    elif world_model is not None:
        raise ValueError(f"world_model: {run.method} uses none")
    torch.manual_seed(run.loop.seed)
    method = make_method(run.method.split()[0], config, Spaces.of(data), made)
    environments, best, prompts = source.environments(), source.best_returns(), run.first_prompts()
    optimal = 0.0 if best is None else float(best.mean())

    def judge(m: Method) -> dict[str, float]:
        returns = few_shot(m, environments, run.judged_episodes, seed=2**20, prompts=prompts)
        half = returns[:, run.judged_episodes // 2 :]
        return {"return": float(half.mean()), **({"score": float(half.mean()) / optimal} if optimal > 0 else {})}

    return train(OfflineLearner(method, data, run.facts(), judge), run.loop, out)


def collect_data(run: OfflineRun, out: Path, teacher: Path | None = None) -> dict[str, Any]:
    """Gather the run's training data into shards in `out`; what was written, and what is known of its teacher.

    Args:
        teacher: the folder of the teacher, where the environment has one; `out`-teacher unless given.
    """
    source = run.make_data()
    facts: dict[str, Any] = {}
    if isinstance(source, MujocoData):
        if (out / "index.json").exists():
            check_records(out, run.environment, source, "out")
        data, facts = source.gather(teacher or out.with_name(out.name + "-teacher"))
    elif teacher is not None:
        raise ValueError(f"teacher: {run.environment} has none")
    else:
        data = source.task_by_task() if isinstance(source, MetaWorldData) else source.train_data()
    made = {"source": run.environment, **asdict(source), **facts}
    written = write_trajectories(out, data, made, source.seed, progress=True)
    return {"shards": written.made + written.found, "made": written.made, "bytes": written.bytes, **facts}


def check_records(folder: Path, environment: str, source: Data, name: str) -> None:
    """ValueError, about the argument `name`, where the data set in `folder` was gathered otherwise."""
    made = read_index(folder)[0].config
    for key, value in {"source": environment, **asdict(source)}.items():
        if made.get(key) != value:
            raise ValueError(f"{name}: {folder} has {key} {made.get(key)!r}, the configuration {value!r}")


def train_world_model(run: OfflineRun, out: Path) -> Path:
    """Train the world model alone, into `out`; its file."""
    loop = replace(run.world_loop, seed=run.loop.seed)
    learner = WorldModelLearner(run.world_model, run.train_data(), run.world_batch, loop, run.facts())
    return train(learner, loop, out)


def evaluate_method(path: Path, run: OfflineRun, episodes: int, seed: int) -> dict[str, Any]:
    """Few-shot returns of a trained method in the run's test tasks: every episode's, averaged over tasks; and the best known
    return, whose it is ("optimal" or "teacher"), or None."""
    data = run.make_data()
    returns = few_shot(load_method(path), data.environments(), episodes, seed, prompts=run.first_prompts())
    return {
        "returns": returns.mean(0).tolist(),
        "reached": (returns > 0).float().mean(0).tolist(),
        "best": run.best_return(),
        "best_of": getattr(data, "reference", "optimal"),
    }


def mean_sem(values: list[float]) -> tuple[float, float | None]:
    """Mean, and standard error of the mean: None for a single value's."""
    x = torch.tensor(values, dtype=torch.float64)
    return float(x.mean()), float(x.std() / math.sqrt(len(x))) if len(x) > 1 else None


@dataclass(frozen=True, eq=False)
class Job:
    """A training run in a process of its own."""

    folder: Path
    updates: int
    arguments: list[object]
    """Of the `icrl` command."""
    needs: Path | None = None
    """A file that another job makes first."""

    def done(self) -> int:
        """Updates, as the run's log has it."""
        try:
            return json.loads((self.folder / "metrics.jsonl").read_text().splitlines()[-1])["update"]
        except (OSError, IndexError, ValueError):  # no log yet, or a line that is being written
            return 0

    def start(self, log: Path, threads: int) -> subprocess.Popen[bytes]:
        line = [sys.executable, "-P", "-m", "icrl.cli", *map(str, self.arguments)]
        # this very package, whatever lies in the working directory: a source tree has no extension before it is built
        path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
        with open(log, "ab") as out:
            return subprocess.Popen(
                line,
                env={**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": path},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                preexec_fn=_end_with_parent if sys.platform == "linux" else None,
            )


_libc = ctypes.CDLL(None)


def _end_with_parent() -> None:
    """A child of a process that is killed would go on in a folder that the next call takes over."""
    _libc.prctl(1, signal.SIGTERM)  # 1: PR_SET_PDEATHSIG


def run_jobs(jobs: list[Job], at_once: int, title: str) -> None:
    """Run them in this order, `at_once` at a time, under one bar; when this ends, however it ends, so have they.

    Raises ChildProcessError with the last line of the first that failed; all that a job printed is in `<folder>.log`.
    """
    waiting, running = list(jobs), dict[Job, subprocess.Popen[bytes]]()
    done = {job.folder: job.done() for job in jobs}
    threads = max(1, (os.cpu_count() or 1) // at_once)
    bar = tqdm(
        total=sum(job.updates for job in jobs), initial=sum(done.values()), desc=title, unit="update", smoothing=0
    )

    def log(job: Job) -> Path:
        return job.folder.with_name(job.folder.name + ".log")

    try:
        while waiting or running:
            ready = [job for job in waiting if job.needs is None or job.needs.exists()]
            for job in ready[: at_once - len(running)]:
                waiting.remove(job)
                running[job] = job.start(log(job), threads)
            time.sleep(0.2)
            for job, process in list(running.items()):
                if (code := process.poll()) is None:
                    done[job.folder] = max(done[job.folder], job.done())
                    continue
                del running[job]
                done[job.folder] = job.updates
                said = [x for x in log(job).read_text(errors="replace").replace("\r", "\n").split("\n") if x.strip()]
                if code:
                    why = said[-1].removeprefix("icrl: ") if said and code > 0 else f"killed by signal {-code}"
                    raise ChildProcessError(f"{job.folder.name} failed: {why} (see {log(job)})")
                bar.write(f"{job.folder.name}: {said[-1] if said else 'done'}")
            bar.set_postfix_str(", ".join(f"{job.folder.name} {done[job.folder]}" for job in running), refresh=False)
            bar.update(sum(done.values()) - bar.n)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
        bar.close()


def run_suite(
    out: Path, run: OfflineRun, methods: list[str], seeds: int, episodes: int, jobs: int
) -> dict[str, dict[str, Any]]:
    """Train and evaluate every method with every seed, `jobs` processes at a time; numbers by method.

    Raises ValueError where `out` holds another suite or another process works there, ChildProcessError where a run
    failed: what is finished stays, and the next call goes on from it.
    """
    runs = {m: replace(run, method=m) for m in methods}
    with_world_model = [m for m in methods if uses_world_model(runs[m])]  # also refuses bad settings, before all work
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"out: another process is at work in {out}") from None
        config = out / "run.json"
        wanted = json.dumps({k: v for k, v in asdict(run).items() if k != "method"}, indent=1) + "\n"
        if config.exists() and config.read_text() != wanted:
            other = differences(json.loads(config.read_text()), json.loads(wanted))
            raise ValueError(f"out: {out} holds a suite with another configuration ({other}); choose another")
        part = config.with_name("run.json.part")
        part.write_text(wanted)
        part.replace(config)
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
                    check_settings(folder, asdict(runs[method].make_config()))
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


def check_settings(folder: Path, wanted: dict[str, Any]) -> None:
    """ValueError where the finished run in `folder` had other settings of its method than these."""
    found = json.loads((folder / "config.json").read_text())["config"]
    if other := differences(found, json.loads(json.dumps(wanted))):
        raise ValueError(f"{folder} was trained with other settings ({other}); delete it to have it made again")


def differences(found: Any, wanted: Any, name: str = "") -> str:
    """Where two JSON objects differ: "a.b: 1, wanted 2"; empty where they do not."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        both = (differences(found.get(k), wanted.get(k), f"{name}.{k}".lstrip(".")) for k in {**found, **wanted})
        return ", ".join(d for d in both if d)
    return "" if found == wanted else f"{name}: {found!r}, wanted {wanted!r}"


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


def uses_world_model(run: OfflineRun) -> bool:
    config = run.make_config()
    return isinstance(config, SICQLConfig) and config.world_model


def collect(out: Path, run: OfflineRun, methods: list[str], seeds: int) -> dict[str, dict[str, Any]]:
    """The finished evaluations of a suite: by method, mean ± s.e.m. over seeds, the curve over episodes, and the published
    figure where tasks and the data's quality are the environment's defaults."""
    source, published = run.make_data(), {}
    default = type(source)()
    if all(getattr(source, name, None) == getattr(default, name, None) for name in LIKE_PUBLISHED):
        published = PUBLISHED.get((run.environment, getattr(source, "split", "random")), {})
    numbers = {}
    for method in methods:
        found = [f for s in range(seeds) if (f := read_few_shot(folder_of(out, method, s))) is not None]
        if not found:
            continue
        last = max(1, len(found[0]["returns"]) // 4)
        curves = torch.tensor([f["returns"] for f in found], dtype=torch.float64)
        summary = {"title": TITLES[method], "published": published.get(method), "seeds": len(found)}
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
    """Ours beside the published figures. In the stitching study it is the first episode that counts: see its module."""
    some = next(iter(numbers.values()))
    best = "" if some["best"] is None else f"; {describe_best(some)}"
    share, goals = (some["best"] or 0.0) > 0, environment in ("darkroom", "stitching")
    first = environment == "stitching"
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
    who = {"optimal": "optimal is", "teacher": "the teacher reaches", "scripted": "the scripted policy earns"}
    return f"{who[numbers['best_of']]} {numbers['best']:.2f}"


def suite(
    out: Path,
    environment: str | None,
    methods: list[str],
    seeds: int,
    episodes: int,
    jobs: int,
    overrides: dict[str, Any],
) -> dict[str, Any]:
    """Run, print and draw a suite; its numbers. `overrides` are OfflineRun's fields, `environment` goes over them."""
    if set(methods) - set(TITLES) or len(set(methods)) < max(1, len(methods)):
        raise ValueError(f"methods: wanted some of {', '.join(TITLES)}, each once, got {', '.join(methods) or 'none'}")
    for name, value in {"seeds": seeds, "episodes": episodes, "jobs": jobs}.items():
        if value < 1:
            raise ValueError(f"{name}: wanted at least 1, got {value}")
    run: OfflineRun = configured(OfflineRun, overrides, "config")
    if "method" in overrides or run.loop.seed:
        raise ValueError(
            "config: a suite has its methods and seeds from --methods and --seeds, not from method, loop.seed"
        )
    if environment is not None:
        run = replace(run, environment=environment)
    numbers = run_suite(out, run, methods, seeds, episodes, jobs)
    print_table(numbers, run.environment)
    few_shot_picture(out / "few_shot.png", numbers, run.environment)
    print(f"picture: {out / 'few_shot.png'}")
    return {"environment": run.environment, "methods": numbers}
