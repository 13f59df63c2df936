"""Damages files of every kind that icrl reads and judges what reading them says; test_damaged_files.py runs it.

    python tests/damaged_files.py FOLDER COUNT [SEED]

makes sound files in FOLDER, reads COUNT damaged copies, and prints a JSON object: how many of each kind were refused, were
read as what was saved or, where nothing covers a file's contents, were read as something else; and the faults: no line that
names the file, another error, other contents in silence, a long time, memory beyond a limit.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from icrl.cli import _given, _read_from
from icrl.data.index import facts_crc
from icrl.files import checksum
from icrl.offline.experiment import OfflineRun, offline_run
from icrl.offline.learner import load_method, save_method
from icrl.offline.suite import check_settings, read_few_shot, read_run, without_method
from icrl.offline.trajectory_shards import read_trajectories, write_trajectories
from icrl.offline.world_model import WorldModel
from icrl.omnirl.distill import DPDConfig
from icrl.omnirl.record_shards import RecordStream, write_records
from icrl.omnirl.value_iteration_network import ValueIterationNetwork, ValueIterationNetworkConfig
from icrl.omnirl.value_iteration_training import ValueIterationLearner, ValueIterationTraining, read_config
from icrl.reading import TensorFile, read_rows, sealed
from icrl.training import checkpoint
from icrl.training.config import LoopConfig, configured
from icrl.training.loop import train
from icrl.worlds import TabularTasks, sample_anymdp, sample_pomdp
from icrl.worlds.task_shards import TaskSet, TaskShards, write_tasks

OLD = Path(__file__).parent / "data" / "written_by_0.1.0.dev"
MEMORY = 1 << 30  # that reading may take beside what the process has
SECONDS = 20
TINY = ValueIterationNetworkConfig(actions=3, layers=1, action_width=4, state_width=6, value_width=4, pool_heads=1)
RECORDS = DPDConfig(batch=2, steps=16, states=8, actions=3)
TRAINING = ValueIterationTraining(
    model=TINY, data=RECORDS, segment=16, dagger_from=1, dagger_records=2, evaluation_tasks=2, evaluation_steps=4
)
LOOP = LoopConfig(updates=2, warmup=1, checkpoint_every=2, evaluate_every=2, log_every=1, device="cpu")

# what a value in a JSON file is replaced by
NESTED = [50, 200, 100_000]
VALUES = ["null", "true", "false", "0", "-1", "1", "2147483648", "9223372036854775808", "1" * 30, "7" * 5000, "1.5"]
VALUES += [
    "1e308",
    "1e999",
    "NaN",
    "-Infinity",
    '""',
    '"x"',
    '"\\ud800"',
    '"' + "long" * 5000 + '"',
    "[]",
    "[1]",
    "[[]]",
]
VALUES += ['[null, "x"]', "{}", '{"a": 1}', '{"a": 1, "a": 2}', *("[" * n + "]" * n for n in NESTED)]
VALUES += ['{"a":' * n + "1" + "}" * n for n in NESTED] + ["1 2", "nul", "'x'", ""]


def contents(tensors: dict[str, torch.Tensor], facts: Any = None) -> str:
    header = [[name, str(t.dtype), list(t.shape)] for name, t in sorted(tensors.items())]
    return json.dumps([header, checksum({n: t.cpu() for n, t in tensors.items()}), facts], sort_keys=True, default=str)


@dataclass(frozen=True)
class Kind:
    """A kind of file: the one to damage in a folder, what reads it, and whether checksums cover what it says."""

    file: str
    read: Callable[[Path], Any]
    covered: bool = True


def tasks(folder: Path) -> str:
    found = TabularTasks.load(folder / "tasks.safetensors")
    return contents(found.tensors(), [found.num_observations, found.action_tokens])


def task_shards(folder: Path) -> str:
    return contents(TabularTasks.concatenate(list(TaskShards(folder))).tensors())


def records(folder: Path) -> str:
    stream = RecordStream(folder, 2, 1, shuffle=False, prefetch=0)
    stream.check(RECORDS)
    return "".join(contents(next(stream)._asdict()) for _ in range(2))


def trajectories(folder: Path) -> str:
    found = read_trajectories(folder)
    tensors = {name: getattr(found, name) for name in ("states", "actions", "rewards", "next_states", "ends", "tasks")}
    return contents(tensors, [found.environment, found.num_actions, found.history])


def model(folder: Path) -> str:
    found = ValueIterationNetwork.load(folder / "model.safetensors")
    return contents(found.state_dict(), [asdict(found.config), found.labels])


def method(folder: Path) -> str:
    found = load_method(folder / "model.safetensors")
    return contents(found.state_dict(), [asdict(found.config), found.spaces])


def world_model(folder: Path) -> str:
    found = WorldModel.load(folder / "model.safetensors")
    return contents(found.state_dict(), found.facts())


def run(folder: Path) -> str:
    """Goes on with a finished run, which writes its model."""
    learner = ValueIterationLearner(TRAINING, LOOP)
    train(learner, LOOP, folder)
    return contents(learner.model.state_dict(), read_rows(folder / "metrics.jsonl"))


def old_checkpoint(folder: Path) -> str:
    tensors, facts = checkpoint.load(folder / "rank0.safetensors")
    return contents(tensors, facts)


def of_command(read: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    def reader(folder: Path) -> None:
        given = _given(folder / "config.json")
        with _read_from(folder / "config.json"):
            read(given)

    return reader


METHOD = load_method(OLD / "offline" / "model.safetensors").config
CHECKPOINT = "checkpoints/00000002/rank0.safetensors"
KINDS = {
    "task file": Kind("tasks.safetensors", tasks),
    "task file, packed": Kind("tasks.safetensors", tasks),
    "task file, pomdp": Kind("tasks.safetensors", tasks),
    "shard of tasks": Kind("shard-00000.safetensors", task_shards),
    "index of tasks": Kind("index.json", task_shards),
    "shard of records": Kind("shard-00001.safetensors", records),
    "index of records": Kind("index.json", records),
    "shard of trajectories": Kind("shard-00001.safetensors", trajectories),
    "index of trajectories": Kind("index.json", trajectories),
    "OmniRL's weights": Kind("model.safetensors", model),
    "offline weights": Kind("model.safetensors", method),
    "world model": Kind("model.safetensors", world_model),
    "checkpoint": Kind(CHECKPOINT, run),
    "run's configuration": Kind("config.json", run, False),
    "run's versions": Kind("versions.json", run, False),
    "run's log": Kind("metrics.jsonl", run, False),
    "suite's run": Kind("run.json", lambda folder: read_run(folder / "run.json"), False),
    "suite's results": Kind("few_shot.json", read_few_shot, False),
    "suite's settings": Kind("config.json", lambda folder: check_settings(folder, METHOD), False),
    "configuration, omnirl": Kind("config.json", of_command(read_config), False),
    "configuration, offline": Kind("config.json", of_command(offline_run), False),
    "configuration, records": Kind("config.json", of_command(lambda x: configured(DPDConfig, x, "config")), False),
    "old task file": Kind("tasks.safetensors", tasks, False),
    "old checkpoint": Kind("rank0.safetensors", old_checkpoint, False),
    "old OmniRL's weights": Kind("model.safetensors", model, False),
    "old offline weights": Kind("model.safetensors", method, False),
    "old world model": Kind("model.safetensors", world_model, False),
}


def make(folder: Path) -> None:
    """A sound file of each kind, in a folder of its name."""

    def place(name: str, old: str = "") -> Path:
        path = folder / name / KINDS[name].file
        path.parent.mkdir(parents=True, exist_ok=True)
        if old:
            shutil.copyfile(OLD / old, path)
        return path

    sampled = sample_anymdp(2, 8, 3, seed=2)
    sampled.save(place("task file"))
    sampled.pack().save(place("task file, packed"))
    sample_pomdp(2, 8, 3, seed=1, num_observations=5, observation_tokens=2).save(place("task file, pomdp"))
    old_method = load_method(OLD / "offline" / "model.safetensors")
    save_method(old_method, place("offline weights"))
    WorldModel.load(OLD / "offline-world_model" / "model.safetensors").save(place("world model"))
    ValueIterationNetwork(TINY).save(place("OmniRL's weights"))
    data = read_trajectories(OLD / "trajectories")
    for which in ("shard", "index"):
        write_tasks(folder / f"{which} of tasks", TaskSet(num_states=(8, 8), num_actions=3, discounts=(0.9,)), 3, 1)
        write_records(folder / f"{which} of records", RECORDS, 4, 1, labels=True, rows_per_shard=2)
        write_trajectories(folder / f"{which} of trajectories", data, {}, 0, rows_per_shard=2)
    train(ValueIterationLearner(TRAINING, LOOP), LOOP, folder / "checkpoint")
    for name in ("run's configuration", "run's versions", "run's log"):
        shutil.copytree(folder / "checkpoint", folder / name)
    place("suite's run").write_text(json.dumps(without_method(OfflineRun())))
    place("suite's results", "offline/few_shot.json")
    place("suite's settings", "offline/config.json")
    place("configuration, omnirl", "omnirl/config.json")
    place("configuration, offline", "offline.json")
    place("configuration, records", "records.json")
    place("old task file", "tasks.safetensors")
    place("old checkpoint", f"omnirl/{CHECKPOINT}")
    place("old OmniRL's weights", "omnirl/model.safetensors")
    place("old offline weights", "offline/model.safetensors")
    place("old world model", "offline-world_model/model.safetensors")


# --- damages: each takes (path of a sound file, a generator) and leaves a damaged one ---------------------------------


def cut(path: Path, chance: random.Random) -> None:
    raw = path.read_bytes()
    path.write_bytes(
        raw[: chance.choice([0, 1, 7, 8, 9, len(raw) - 1, *(chance.randrange(len(raw)) for _ in range(6))])]
    )


def flip(path: Path, chance: random.Random) -> None:
    raw = bytearray(path.read_bytes())
    raw[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)
    path.write_bytes(raw)


def flip_header(path: Path, chance: random.Random) -> None:
    raw = bytearray(path.read_bytes())
    end = 8 + struct.unpack("<Q", raw[:8])[0] if path.suffix == ".safetensors" else len(raw)
    raw[chance.randrange(end)] ^= 1 << chance.randrange(8)
    path.write_bytes(raw)


def overwrite(path: Path, chance: random.Random) -> None:
    raw = bytearray(path.read_bytes())
    at, length = chance.randrange(len(raw)), chance.choice([1, 4, 100, 4096])
    junk = chance.choice([bytes(length), b"\xff" * length, chance.randbytes(length)])
    raw[at : at + length] = junk[: len(raw) - at]
    path.write_bytes(raw)


def become(path: Path, chance: random.Random) -> None:
    raw = path.read_bytes()
    junk = [
        gzip.compress(raw),
        b"PK\x03\x04" + raw,
        raw + b"x",
        raw + raw,
        b"\xef\xbb\xbf" + raw,
        chance.randbytes(500),
    ]
    junk += [
        b"\xff\xfe" + raw,
        b"\n" * 100,
        b"\0" * 100,
        struct.pack("<Q", 2**63) + raw[8:],
        raw.decode("latin1").encode("utf-16"),
    ]
    junk += [struct.pack("<Q", len(raw) - 8) + raw[8:], struct.pack("<Q", 2) + b"{}", struct.pack("<Q", 4) + b"null"]
    path.write_bytes(chance.choice([*junk, *(v.encode("utf8") for v in VALUES)]))


def vanish(path: Path, chance: random.Random) -> None:
    path.unlink()
    kind = chance.randrange(4)
    if kind == 0:
        path.mkdir()
    elif kind == 1:
        path.symlink_to("nowhere")
    elif kind == 2 and path.suffix == ".safetensors":
        os.mkfifo(path)


def swap(path: Path, chance: random.Random) -> None:
    """Another kind's file."""
    sound = path.parents[len(Path(KINDS[path_kind(path)].file).parts)].with_name("sound")
    other = chance.choice([k for k in KINDS if k != path_kind(path)])
    shutil.copyfile(sound / other / KINDS[other].file, path)


def path_kind(path: Path) -> str:
    return next(part for part in reversed(path.parts) if part in KINDS)


def places(value: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """(container, key) of every value in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found.append((value, key))
        places(item, found)
    return found


def changed(value: Any, chance: random.Random) -> str:
    """JSON text with one value replaced, taken away, named anew or there twice."""
    value = json.loads(json.dumps(value))
    if not (there := places(value, [])):
        return chance.choice(VALUES)
    of, key = chance.choice(there)
    how = chance.randrange(8)
    if how == 0:
        del of[key]
        return json.dumps(value)
    if how == 1 and isinstance(of, dict):
        of[chance.choice([f"{key} ", "new", key.upper(), "\ud800"])] = of.pop(key)
        return json.dumps(value)
    if how == 2 and isinstance(of, dict):
        of[f"{key}@again"] = of[key]
        return json.dumps(value).replace(f"{key}@again", key)
    of[key] = "@here"
    return json.dumps(value).replace('"@here"', chance.choice(VALUES))


def change_json(path: Path, chance: random.Random) -> None:
    raw = path.read_text()
    if path.suffix == ".jsonl":
        lines = raw.splitlines()
        at = chance.randrange(len(lines))
        lines[at] = changed(json.loads(lines[at]), chance)
        path.write_text("\n".join(lines) + "\n" * chance.randrange(2))
        return
    path.write_text(changed(json.loads(raw), chance))
    if path.name == "index.json" and chance.randrange(2):  # as consistent as it can be made
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
            index = json.loads(path.read_text())
            names = ("kind", "schema", "sizes", "config", "seed", "rows_per_shard")
            index["identity"] = f"{facts_crc({name: index[name] for name in names}):08x}"
            path.write_text(json.dumps(index))


def change_header(path: Path, chance: random.Random) -> None:
    raw = path.read_bytes()
    end = 8 + struct.unpack("<Q", raw[:8])[0]
    text = changed(json.loads(raw[8:end]), chance).encode("utf8", "surrogatepass")
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[end:])


def change_facts(path: Path, chance: random.Random) -> None:
    """Facts of another kind under right checksums."""
    with TensorFile(path) as file:
        tensors, metadata = file.tensors(), dict(file.metadata)
    for name in ("crc32", "header_crc32"):
        metadata.pop(name, None)
    name = chance.choice(sorted(metadata))
    if name in ("facts", "icrl"):
        facts = json.loads(metadata[name])
        if name == "icrl":
            del facts["facts_crc32"]
        metadata[name] = changed(facts, chance)
        with contextlib.suppress(ValueError, RecursionError, TypeError):
            if name == "icrl":
                facts = json.loads(metadata[name])
                metadata[name] = json.dumps({**facts, "facts_crc32": facts_crc(facts)})
    else:
        metadata[name] = chance.choice([v for v in VALUES if len(v) < 10**5])
    rewrite(path, tensors, metadata)


def change_tensors(path: Path, chance: random.Random) -> None:
    """Other tensors under right checksums."""
    with TensorFile(path) as file:
        tensors, metadata = file.tensors(), dict(file.metadata)
    name = chance.choice(sorted(tensors))
    t = tensors.pop(name)
    how = chance.randrange(6)
    if how == 0:
        tensors[f"{name}x"] = t
    elif how == 1:
        tensors[name] = t.flatten()
    elif how == 2:
        tensors[name] = t.double() if t.dtype == torch.float32 else t.float()
    elif how == 3:
        tensors[name] = torch.zeros(2 * t.numel() + 1, dtype=t.dtype)
    elif how == 4:
        tensors[name] = t[:0] if t.dim() else t[None]
    if "icrl" in metadata:
        facts = json.loads(metadata["icrl"])
        del facts["facts_crc32"]
        facts["crc32"] = checksum(tensors)
        metadata["icrl"] = json.dumps({**facts, "facts_crc32": facts_crc(facts)})
    rewrite(path, tensors, metadata)


def rewrite(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    covered = "header_crc32" in metadata or "icrl" not in metadata
    rest = {name: value for name, value in metadata.items() if name not in ("crc32", "header_crc32")}
    found = sealed(tensors, rest) if covered else rest
    if path_kind(path).startswith("old"):
        found.pop("header_crc32")
    path.write_bytes(save(tensors, {name: value.encode("utf8", "replace").decode() for name, value in found.items()}))


ANY = [cut, flip, overwrite, become, vanish, swap]
OF = {
    ".safetensors": [
        *ANY,
        flip_header,
        flip_header,
        change_header,
        change_header,
        change_facts,
        change_facts,
        change_tensors,
    ],
    ".json": [*ANY, *[change_json] * 12],
    ".jsonl": [*ANY, *[change_json] * 4],
}
ANOTHER = (change_facts, change_tensors, change_json)  # whose file is sound, and says something else
ANOTHER_FILE = (swap, become)  # which may be a sound one of its kind


# --- judging ----------------------------------------------------------------------------------------------------------


def judge(
    folder: Path, kind: str, damage: Callable[[Path, random.Random], None], seed: str, sound: Any
) -> tuple[str, str]:
    """What came of one damage ("refused", "same", "other" or "fault"), and a line on it."""
    here = folder / "damaged" / kind
    shutil.rmtree(here, ignore_errors=True)
    shutil.copytree(folder / "sound" / kind, here)
    path = here / KINDS[kind].file
    damage(path, random.Random(seed))
    began = time.monotonic()
    signal.alarm(SECONDS)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            found = KINDS[kind].read(here)
    except (ValueError, FileNotFoundError) as e:
        said = str(e)
        if "\n" in said or len(said) > 3000:
            return "fault", f"not a line: {said[:300]!r}"
        if str(path) not in said and str(here) not in said:
            return "fault", f"names no file: {said[:300]}"
        if "allocate" in said:
            return "fault", f"allocates: {said[:300]}"
        return "refused", said[:300]
    except BaseException:
        return "fault", " | ".join(traceback.format_exc().splitlines()[-5:])[:900]
    finally:
        signal.alarm(0)
        if (seconds := time.monotonic() - began) > SECONDS / 2:
            print(f"{kind}, {seed}: {seconds:.0f} s", file=sys.stderr)
    if found == sound:
        return "same", ""
    if KINDS[kind].covered and damage not in (*ANOTHER, *ANOTHER_FILE):
        return "fault", "other contents in silence"
    return "other", ""


def judge_all(folder: Path, count: int, seed: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with contextlib.redirect_stdout(io.StringIO()):
        make(folder / "sound")
        sound = {}
        for kind in KINDS:
            shutil.copytree(folder / "sound" / kind, folder / "damaged" / kind)
            sound[kind] = KINDS[kind].read(folder / "damaged" / kind)
    status = Path("/proc/self/status").read_text()
    size = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmSize"))
    resource.setrlimit(resource.RLIMIT_AS, (size * 1024 + MEMORY, resource.RLIM_INFINITY))

    def late(*_: object) -> None:
        raise TimeoutError(f"not read in {SECONDS} s")

    signal.signal(signal.SIGALRM, late)
    outcomes: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    faults = []
    for i in range(count):
        kind = list(KINDS)[i % len(KINDS)]
        damages = OF[Path(KINDS[kind].file).suffix]
        damage = damages[(i // len(KINDS)) % len(damages)]
        outcome, said = judge(folder, kind, damage, f"{seed}-{i}", sound[kind])
        outcomes[kind][outcome] += 1
        if outcome == "fault":
            faults.append(f"{kind}, {damage.__name__}, {seed}-{i}: {said}")
    return {"count": count, "outcomes": outcomes, "faults": faults}


if __name__ == "__main__":
    print(json.dumps(judge_all(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]) if sys.argv[3:] else 0)))
