"""The list of calls: how one is added, where names are in either build, and what is kept of a result."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib
import io
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

# What has moved: where it is now, where it was before.
MOVED: dict[str, tuple[str, ...]] = {
    "hash_seed": ("icrl.data.seeds", "icrl.stream"),
    "batch_rows": ("icrl.data.shards", "icrl.shards"),
    "DPDConfig": ("icrl.omnirl.distill", "icrl.distill"),
    "DPDStream": ("icrl.omnirl.distill", "icrl.distill"),
    "PUBLISHED_BEHAVIOURS": ("icrl.omnirl.distill", "icrl.distill"),
    "draw_references": ("icrl.omnirl.distill", "icrl.distill"),
    "make_batch": ("icrl.omnirl.distill", "icrl.distill"),
    "sample_tasks": ("icrl.omnirl.distill", "icrl.distill"),
    "simulate": ("icrl.omnirl.distill", "icrl.distill"),
    "RecordStream": ("icrl.omnirl.record_shards", "icrl.datasets"),
    "ValueIterationLearner": ("icrl.omnirl.value_iteration_training", "icrl.omnirl.training", "icrl.omnirl_training"),
    "ValueIterationTraining": ("icrl.omnirl.value_iteration_training", "icrl.omnirl.training", "icrl.omnirl_training"),
    "loss_of": ("icrl.omnirl.value_iteration_training", "icrl.omnirl.training", "icrl.omnirl_training"),
    "targets_of": ("icrl.omnirl.value_iteration_training", "icrl.omnirl.training", "icrl.omnirl_training"),
    "tokens_of": ("icrl.omnirl.value_iteration_training", "icrl.omnirl.training", "icrl.omnirl_training"),
    "BASELINES": ("icrl.omnirl.evaluate", "icrl.evaluate"),
    "references": ("icrl.omnirl.evaluate", "icrl.evaluate"),
    "run_agent": ("icrl.omnirl.evaluate", "icrl.evaluate"),
    "run_baseline": ("icrl.omnirl.evaluate", "icrl.evaluate"),
    "scores": ("icrl.omnirl.evaluate", "icrl.evaluate"),
    "Agent": ("icrl.omnirl",),
    "ValueIterationNetwork": ("icrl.omnirl",),
    "ValueIterationNetworkConfig": ("icrl.omnirl",),
    "Temperature": ("icrl.omnirl",),
    "shipped": ("icrl.omnirl", "icrl.demo"),
    "LoopConfig": ("icrl.training.loop", "icrl.train"),
    "train": ("icrl.training.loop", "icrl.train"),
    "TaskSet": ("icrl.worlds.task_shards", "icrl.worlds.shards"),
    "TaskShards": ("icrl.worlds.task_shards", "icrl.worlds.shards"),
    "difficulty": ("icrl.worlds.difficulty",),
    "Spaces": ("icrl.offline.method", "icrl.methods"),
    "METHODS": ("icrl.offline.learner", "icrl.offline_training"),
    "OfflineLearner": ("icrl.offline.learner", "icrl.offline_training"),
    "load_method": ("icrl.offline.learner", "icrl.offline_training"),
    "make_method": ("icrl.offline.learner", "icrl.offline_training"),
    "MIXERS": ("icrl.models.trunk", "icrl.offline.trunk", "icrl.sicql.trunk"),
    "Trunk": ("icrl.models.trunk", "icrl.offline.trunk", "icrl.sicql.trunk"),
    "TrunkConfig": ("icrl.models.trunk", "icrl.offline.trunk", "icrl.sicql.trunk"),
    "WorldModel": ("icrl.offline.world_model", "icrl.sicql.world_model"),
    "WorldModelConfig": ("icrl.offline.world_model", "icrl.sicql.world_model"),
    "WorldModelLearner": ("icrl.offline.world_model", "icrl.sicql.world_model"),
    "few_shot": ("icrl.offline.few_shot", "icrl.few_shot"),
    "read_trajectories": ("icrl.offline.trajectory_shards", "icrl.offline_data"),
    "DarkRoomData": ("icrl.offline.environments.darkroom", "icrl.worlds.darkroom"),
    "PointRobotData": ("icrl.offline.environments.point_robot", "icrl.worlds.point_robot"),
    "StitchingData": ("icrl.offline.environments.stitching", "icrl.worlds.stitching"),
    "main": ("icrl.cli",),
}

# What had another name before.
RENAMED = {
    "ValueIterationNetwork": "OmniRL",
    "ValueIterationNetworkConfig": "OmniRLConfig",
    "ValueIterationLearner": "OmniRLLearner",
    "ValueIterationTraining": "OmniRLTraining",
}


class Moved:
    """The names of MOVED as attributes, or those of RENAMED. ImportError, for all that are in none of their places, at once."""

    def __init__(self) -> None:
        missing = []
        for name, places in MOVED.items():
            reasons = []
            for place in places:
                try:
                    module = importlib.import_module(place)
                    there = name if hasattr(module, name) else RENAMED.get(name, name)
                    setattr(self, name, getattr(module, there))
                    break
                except (ImportError, AttributeError) as error:
                    reasons.append(f"{place}: {error}")
            else:
                missing.append(f"{name} ({'; '.join(reasons)})")
        if missing:
            raise ImportError("not found: " + ", ".join(missing))

    def __getattr__(self, name: str) -> Any:  # for type checkers: all is set above
        raise AttributeError(name)


# ---- hashes --------------------------------------------------------------------------------------------------------


def numbers(logged: dict[str, Any]) -> dict[str, float]:
    """What a loss logs, as floats: it may be tensors, so that nothing waits for a GPU."""
    return {name: float(value) for name, value in logged.items()}


def flatten(name: str, value: Any, out: dict[str, str]) -> None:
    """Every tensor in `value`, and every plain value, by a dotted name."""
    import numpy as np
    import torch

    if isinstance(value, torch.Tensor):
        t = value.detach().contiguous()
        data = t.reshape(-1).view(torch.uint8).numpy().tobytes() if t.numel() else b""
        out[name] = f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)} {hashlib.sha256(data).hexdigest()}"
    elif isinstance(value, (np.ndarray, np.generic)):
        out[name] = f"numpy {value.dtype}{list(value.shape)} {hashlib.sha256(value.tobytes()).hexdigest()}"
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            flatten(f"{name}.{field.name}", getattr(value, field.name), out)
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        for field, x in zip(value._fields, value, strict=True):
            flatten(f"{name}.{field}", x, out)
    elif isinstance(value, dict):
        for key, x in value.items():
            flatten(f"{name}.{key}", x, out)
    elif isinstance(value, (list, tuple)):
        out[f"{name}.len"] = str(len(value))
        for i, x in enumerate(value):
            flatten(f"{name}.{i}", x, out)
    elif isinstance(value, bytes):
        out[name] = f"bytes[{len(value)}] {hashlib.sha256(value).hexdigest()}"
    elif value is None or isinstance(value, (bool, int, float, str)):
        out[name] = repr(value)
    else:
        raise TypeError(f"{name}: no hash of a {type(value).__name__}")


def file_facts(path: Path, metadata: bool = False) -> dict[str, Any]:
    """A safetensors file: its tensors' places and bytes. The header's order is left to chance by the library, and is sorted."""
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    facts = header.pop("__metadata__", {})
    found = {"header": json.dumps(header, sort_keys=True), "data": raw[8 + size :]}
    return {**found, "metadata": json.dumps(facts, sort_keys=True)} if metadata else found


# ---- the list of calls ---------------------------------------------------------------------------------------------

CALLS: dict[str, Callable[[], Any]] = {}
REFUSED = "refused/"


def add(name: str, call: Callable[[], Any], threads: int = 1) -> None:
    def run() -> Any:
        import torch

        torch.set_num_threads(threads)
        torch.manual_seed(zlib.crc32(name.encode()))
        try:
            return call()
        finally:
            torch.set_num_threads(1)

    assert name not in CALLS, name
    CALLS[name] = run


def icrl(moved: Any, *args: object) -> None:
    """One command of the command line. RuntimeError where it ends with another status than 0."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = moved.main([str(a) for a in args])
    if status:
        raise RuntimeError(f"icrl {args[0]}: status {status}: {said.getvalue().strip().splitlines()[-1:]}")


def untimed(path: Path) -> Any:
    """A JSON file, or one of JSON lines, without what depends on the clock."""

    def clean(x: Any) -> Any:
        if isinstance(x, dict):
            return {
                k: clean(v)
                for k, v in x.items()
                if not any(
                    w in k for w in ("second", "per_s", "_ms", "time", "step_us", "icrl_kernels", "rss", "bytes")
                )
            }
        return [clean(v) for v in x] if isinstance(x, list) else x

    if path.suffix == ".jsonl":
        return [clean(json.loads(line)) for line in path.read_text().splitlines()]
    return clean(json.loads(path.read_text()))


def folder_facts(folder: Path) -> dict[str, Any]:
    """The tensors of every safetensors file below a folder."""
    return {str(p.relative_to(folder)): file_facts(p) for p in sorted(folder.rglob("*.safetensors"))}


def run_facts(folder: Path) -> dict[str, Any]:
    """A training run: all tensors of its checkpoints and of its model, and its log."""
    return {**folder_facts(folder), "log": untimed(folder / "metrics.jsonl")}


def quietly(call: Callable[[], Any]) -> Any:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return call()
