"""One experiment from offline data: its source, data, method and training, and the evaluation of what was trained."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from icrl.data.shards import read_index
from icrl.offline.environments.darkroom import DarkRoomData
from icrl.offline.environments.meta_world import MetaWorldData, PushData, ReachData
from icrl.offline.environments.mujoco import AntDirData, CheetahVelData, MujocoData, WalkerParamData
from icrl.offline.environments.point_robot import PointRobotData
from icrl.offline.environments.stitching import StitchingData
from icrl.offline.few_shot import few_shot
from icrl.offline.learner import METHODS, OfflineLearner, load_method, make_method
from icrl.offline.method import Method, MethodConfig, Spaces
from icrl.offline.methods.sicql import SICQLConfig
from icrl.offline.presets import ABLATIONS, ENVIRONMENT_SETTINGS, LOOP, SETTINGS, TITLES, WORLD_LOOP
from icrl.offline.trajectories import Trajectories
from icrl.offline.trajectory_shards import read_trajectories, write_trajectories
from icrl.offline.world_model import WorldModel, WorldModelConfig, WorldModelLearner
from icrl.training.config import LoopConfig, configured, merged
from icrl.training.loop import train

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
