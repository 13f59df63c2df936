"""Commands killed at random moments and started again: weights, data and logs are those of an uninterrupted run."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import icrl
from icrl.training import checkpoint

LOOP = {"checkpoint_every": 2, "log_every": 1, "warmup": 2, "device": "cpu"}
MODEL = {"layers": 1, "action_width": 8, "state_width": 12, "value_width": 4, "action_hidden": 8, "state_hidden": 12}
OMNIRL = {
    "training": {
        "model": {**MODEL, "pool_heads": 1},
        "data": {"batch": 4, "steps": 24},
        "segment": 12,
        "dagger": 0.5,
        "dagger_from": 2,
        "dagger_every": 2,
        "dagger_records": 4,
        "evaluation_tasks": 2,
        "evaluation_steps": 20,
    },
    "loop": {**LOOP, "updates": 12, "evaluate_every": 5},
}
OFFLINE = {
    "data": {"size": 4, "horizon": 12, "train_goals": 12, "episodes": 8, "history": 8},
    "settings": {"batch": 4, "trunk": {"width": 16, "layers": 1, "heads": 1}},
    "world_loop": {**LOOP, "updates": 12, "evaluate_every": 5},
    "loop": {**LOOP, "updates": 12, "evaluate_every": 5},
    "judged_episodes": 2,
}


class Worker:
    """Starts of commands, each a fork of one process (kills_worker.py)."""

    def __init__(self, log: Path) -> None:
        self.log = log
        script, where = Path(__file__).with_name("kills_worker.py"), Path(icrl.__file__).parents[1]
        path = os.pathsep.join(filter(None, [str(where), os.environ.get("PYTHONPATH")]))
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            cwd=log.parent, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert self.process.stdout.readline() == "ready\n"

    def run(self, args, seconds=None):
        """The exit status, and how long it took."""
        self.process.stdin.write(json.dumps([[str(a) for a in args], seconds, str(self.log)]) + "\n")
        self.process.stdin.flush()
        status, took = json.loads(self.process.stdout.readline())
        assert status in (0, -9), self.log.read_text()[-3000:]
        return status, took


@pytest.fixture
def worker(tmp_path):
    worker = Worker(tmp_path / "log")
    yield worker
    worker.process.stdin.close()
    worker.process.wait(60)


def without_times(value):
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k != "seconds"}
    return [without_times(v) for v in value] if isinstance(value, list) else value


def contents(folder):
    """What is in a folder, by name, without times: all but locks, what was printed, and TensorBoard's files."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = str(path.relative_to(folder))
        if path.name == ".lock" or path.suffix == ".log" or "tensorboard" in path.parts:
            continue
        if path.suffix == ".jsonl":
            found[name] = [without_times(json.loads(line)) for line in path.read_text().split("\n")[:-1]]
        elif path.suffix == ".json":
            found[name] = without_times(json.loads(path.read_text()))
        elif path.suffix == ".safetensors" and not path.name.startswith("shard-"):
            tensors, facts = checkpoint.load(path)
            found[name] = {n: (t.dtype, t.shape, t.flatten().view(torch.uint8).tolist()) for n, t in tensors.items()}
            found[name]["facts"] = {k: v for k, v in without_times(facts).items() if k != "run.seconds"}
        else:
            found[name] = path.read_bytes()
    return found


def config(tmp_path, value):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(value))
    return path


def same(found, wanted):
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert found[name] == wanted[name], name


KINDS = {
    "train value-iteration-network": (
        36,
        lambda p: ["train", "value-iteration-network", "--config", config(p, OMNIRL), "--out", "out/run"],
    ),
    "train offline": (
        36,
        lambda p: ["train", "offline", "--config", config(p, OFFLINE), "--out", "out/run", "--evaluate", 2],
    ),
    "distill": (16, lambda p: ["distill", "out", "--tasks", 96, "--steps", 64, "--batch", 8, "--workers", 2]),
    "worlds shards": (
        10,
        lambda p: (
            [
                "worlds",
                "shards",
                "out",
                "--num-tasks",
                9000,
                "--num-states",
                8,
                16,
                "--discounts",
                0.5,
                0.9,
                "--workers",
                1,
            ]
        ),
    ),
    "collect": (6, lambda p: ["collect", "out", "--config", config(p, OFFLINE)]),
    "eval sicql": (
        6,
        lambda p: (
            [
                "eval",
                "sicql",
                "--config",
                config(p, OFFLINE),
                "--out",
                "out",
                "--methods",
                "sicql",
                "--seeds",
                1,
                "--episodes",
                2,
            ]
        ),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_random_moments(kind, worker, tmp_path):
    wanted_kills, command = KINDS[kind]
    args, out, draw = command(tmp_path), tmp_path / "out", random.Random(kind)
    _, length = worker.run(args)
    wanted = contents(out)
    out.rename(tmp_path / "whole")
    kills = runs = 0
    while kills < wanted_kills:
        status, taken = -9, 0.0
        while status:
            status, took = worker.run(args, draw.uniform(0, length) if kills < wanted_kills else None)
            kills, taken = kills + (status != 0), taken + took
        same(contents(out), wanted)
        runs, length = runs + 1, min(length, taken)  # the first one may have begun cold, or on a busy machine
        out.rename(tmp_path / f"killed-{runs}")
    print(f"{kind}: {kills} kills of {runs} runs; an uninterrupted one takes {length:.1f} s")
