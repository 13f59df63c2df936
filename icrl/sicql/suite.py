"""S-ICQL and its rivals trained and judged alike: one configuration a method, runs in folders, tables and pictures.

A suite's folder holds a run for each method and seed (`<method>-<seed>/`, resumable, see icrl.train) and what few-shot
evaluation made of it (`few_shot.json`); what is there already is not made again.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

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
from icrl.worlds.point_robot import PointRobotData
from icrl.worlds.stitching import StitchingData

Data = DarkRoomData | StitchingData | PointRobotData
DATA: dict[str, type[Any]] = {"darkroom": DarkRoomData, "stitching": StitchingData, "point-robot": PointRobotData}
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
PUBLISHED = {"dpt": 22.12, "ad": 42.72, "idt": 40.70, "dicp": 59.76, "dit": 30.90, "ic_iql": 60.12, "sicql": 66.05}
"""Few-shot returns in DarkRoom, mixed data (arXiv 2506.01299, table 1)."""

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
    world_model: WorldModelConfig = field(default_factory=WorldModelConfig)
    world_loop: LoopConfig = WORLD_LOOP
    world_batch: int = 512
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(**LOOP))
    judged_episodes: int = 10
    """Of each test task, at every evaluation during training."""

    def __post_init__(self) -> None:
        if self.method not in TITLES:
            raise ValueError(f"method: wanted one of {', '.join(TITLES)}, got {self.method!r}")
        if self.environment not in DATA:
            raise ValueError(f"environment: wanted one of {', '.join(DATA)}, got {self.environment!r}")

    def make_data(self) -> Data:
        return configured(DATA[self.environment], self.data, "data")

    def train_data(self) -> Trajectories:
        """Gathered, or read from `records`. Raises ValueError where those were gathered otherwise."""
        source = self.make_data()
        if not self.records:
            return source.train_data()
        made = read_index(Path(self.records))[0].config
        for name, value in {"source": self.environment, **asdict(source)}.items():
            if made.get(name) != value:
                raise ValueError(f"records: {self.records} has {name} {made.get(name)!r}, the configuration {value!r}")
        return read_trajectories(Path(self.records))

    def make_config(self) -> MethodConfig:
        """The suite's settings of the method, this run's own over them, and what its ablation leaves out over both."""
        name, horizon = self.method.split()[0], self.make_data().horizon
        given = merged({**SETTINGS[name], "horizon": horizon}, self.settings)
        config = configured(METHODS[name][1], {**given, **ABLATIONS.get(self.method, {})}, "settings")
        if config.horizon != horizon:
            raise ValueError(f"settings: horizon: wanted {self.environment}'s {horizon}, got {config.horizon}")
        return config


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
    torch.manual_seed(run.loop.seed)
    method = make_method(run.method.split()[0], config, Spaces.of(data), made)
    environments, best = source.environments(), float(source.best_returns().mean())

    def judge(m: Method) -> dict[str, float]:
        returns = few_shot(m, environments, run.judged_episodes, seed=2**20)
        half = returns[:, run.judged_episodes // 2 :]
        return {"return": float(half.mean()), **({"score": float(half.mean()) / best} if best > 0 else {})}

    facts = {"environment": run.environment, "data": asdict(source)}
    return train(OfflineLearner(method, data, facts, judge), run.loop, out)


def collect_data(run: OfflineRun, out: Path) -> dict[str, Any]:
    """Gather the run's training data into shards in `out`; what was written."""
    source = run.make_data()
    written = write_trajectories(out, source.train_data(), {"source": run.environment, **asdict(source)}, source.seed)
    return {"shards": written.made + written.found, "made": written.made, "bytes": written.bytes}


def train_world_model(run: OfflineRun, out: Path) -> Path:
    """Train the world model alone, into `out`; its file."""
    loop = replace(run.world_loop, seed=run.loop.seed)
    learner = WorldModelLearner(run.world_model, run.train_data(), run.world_batch, loop)
    return train(learner, loop, out)


def evaluate_method(path: Path, data: Data, episodes: int, seed: int) -> dict[str, Any]:
    """Few-shot returns of a trained method in the test tasks: every episode's, averaged over tasks."""
    prompts = data.prompts() if isinstance(data, StitchingData) else None
    returns = few_shot(load_method(path), data.environments(), episodes, seed, prompts=prompts)
    return {
        "returns": returns.mean(0).tolist(),
        "reached": (returns > 0).float().mean(0).tolist(),
        "best": float(data.best_returns().mean()),
    }


def mean_sem(values: list[float]) -> tuple[float, float]:
    """Mean, and standard error of the mean; NaN for a single value's."""
    x = torch.tensor(values, dtype=torch.float64)
    return float(x.mean()), float(x.std() / math.sqrt(len(x))) if len(x) > 1 else math.nan


def run_suite(
    out: Path, run: OfflineRun, methods: list[str], seeds: int, episodes: int, jobs: int
) -> dict[str, dict[str, Any]]:
    """Train and evaluate every method with every seed, `jobs` processes at a time; numbers by method.

    Raises RuntimeError where a process failed; what others finished stays, and the next call goes on from it.
    """
    out.mkdir(parents=True, exist_ok=True)
    config = out / "run.json"
    wanted = json.dumps(asdict(run), indent=1) + "\n"
    if config.exists() and config.read_text() != wanted:
        raise ValueError(f"out: {out} holds a suite with another configuration; choose another")
    config.write_text(wanted)
    threads = str(max(1, (os.cpu_count() or 1) // jobs))

    def command(*args: object) -> None:
        line = [sys.executable, "-m", "icrl.cli", *map(str, args)]
        done = subprocess.run(
            line, env={**os.environ, "OMP_NUM_THREADS": threads}, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(line)}: {done.stderr.strip()[-2000:]}")

    def one(method: str, seed: int) -> None:
        folder = out / f"{method.replace(' ', '_').replace('/', '')}-{seed}"
        if (folder / "few_shot.json").exists():
            return
        shared = ["--config", config, "--method", method, "--seed", seed, "--out", folder]
        if uses_world_model(run, method):
            shared += ["--world-model", out / f"world_model-{seed}" / "model.safetensors"]
        command("train", "offline", *shared, "--evaluate", episodes)

    with ThreadPoolExecutor(jobs) as pool:
        if any(uses_world_model(run, m) for m in methods):
            list(
                pool.map(
                    lambda s: command(
                        "train", "world-model", "--config", config, "--seed", s, "--out", out / f"world_model-{s}"
                    ),
                    [s for s in range(seeds) if not (out / f"world_model-{s}" / "model.safetensors").exists()],
                )
            )
        list(pool.map(lambda ms: one(*ms), [(m, s) for s in range(seeds) for m in methods]))
    return collect(out, methods, seeds)


def uses_world_model(run: OfflineRun, method: str) -> bool:
    config = replace(run, method=method).make_config()
    return isinstance(config, SICQLConfig) and config.world_model


def collect(out: Path, methods: list[str], seeds: int) -> dict[str, dict[str, Any]]:
    """The finished evaluations of a suite: by method, mean ± s.e.m. over seeds, and the curve over episodes."""
    numbers = {}
    for method in methods:
        name = method.replace(" ", "_").replace("/", "")
        files = [out / f"{name}-{s}" / "few_shot.json" for s in range(seeds)]
        found = [json.loads(f.read_text()) for f in files if f.exists()]
        if not found:
            continue
        last = max(1, len(found[0]["returns"]) // 4)
        curves = torch.tensor([f["returns"] for f in found], dtype=torch.float64)
        summary = {"seeds": len(found), "best": found[0]["best"], "curve": curves.mean(0).tolist()}
        summary["curve_sem"] = (curves.std(0, correction=1) / math.sqrt(len(found))).tolist() if len(found) > 1 else []
        for key, values in {
            "all": [sum(f["returns"]) / len(f["returns"]) for f in found],
            "last": [sum(f["returns"][-last:]) / last for f in found],
            "reached": [sum(f["reached"][-last:]) / last for f in found],
        }.items():
            summary[key], summary[f"{key}_sem"] = mean_sem(values)
        numbers[method] = summary
    return numbers


def print_table(numbers: dict[str, dict[str, Any]], environment: str) -> None:
    """Ours beside the published figures."""
    if not numbers:
        return
    some = next(iter(numbers.values()))
    episodes = len(some["curve"])
    print(
        f"\n{environment}: return of {episodes} episodes in unseen tasks, mean ± s.e.m. over {some['seeds']} seeds; "
        f"optimal is {some['best']:.1f}"
    )
    print(f"  {'':10}{'all episodes':>18}{'last quarter':>18}{'of optimal':>12}{'reach goal':>12}{'published':>12}")
    for method, n in sorted(numbers.items(), key=lambda kv: kv[1]["last"]):
        published = f"{PUBLISHED[method]:.2f}" if environment == "darkroom" and method in PUBLISHED else ""
        shares = f"{n['last'] / n['best']:12.2f}{n['reached']:12.2f}" if n["best"] > 0 else " " * 24
        print(
            f"  {TITLES[method]:10}{n['all']:11.2f} ±{n['all_sem']:5.2f}{n['last']:11.2f} ±{n['last_sem']:5.2f}"
            f"{shares}{published:>12}"
        )


def suite(
    out: Path, environment: str, methods: list[str], seeds: int, episodes: int, jobs: int, overrides: dict[str, Any]
) -> dict[str, Any]:
    """Run, print and draw a suite; its numbers."""
    if unknown := set(methods) - set(TITLES):
        raise ValueError(f"methods: wanted some of {', '.join(TITLES)}, got {', '.join(sorted(unknown))}")
    for name, value in {"seeds": seeds, "episodes": episodes, "jobs": jobs}.items():
        if value < 1:
            raise ValueError(f"{name}: wanted at least 1, got {value}")
    run = configured(OfflineRun, {**overrides, "environment": environment}, "config")
    numbers = run_suite(out, run, methods, seeds, episodes, jobs)
    print_table(numbers, environment)
    few_shot_picture(out / "few_shot.png", {TITLES[m]: n for m, n in numbers.items()}, environment)
    print(f"picture: {out / 'few_shot.png'}")
    return {"environment": environment, "methods": numbers}
