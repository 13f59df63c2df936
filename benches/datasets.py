"""Data sets on disk: what a task and a step cost in seconds and bytes, and what the published sets would cost at that.

`python -m benches.datasets` measures units on small sets in a temporary folder and writes benches/results/datasets.json.
`python -m benches.datasets run FOLDER` makes the published large set for real (59 GB; with --minutes or --tasks its first tasks),
checks every byte, reads it back in shuffled batches, and writes benches/results/dataset_run.json. Kill it and run it again: it
goes on.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benches.common import write
from icrl.commands.dataset import distill
from icrl.data.shards import read_index
from icrl.omnirl.distill import PUBLISHED_BEHAVIOURS, DPDConfig, DPDStream
from icrl.omnirl.record_shards import RecordStream, records_dataset, write_records
from icrl.worlds.task_shards import TaskSet, write_tasks

WORKERS = 2
LARGE = DPDConfig(
    batch=32, steps=12_000, least_states=16, states=128, tasks={"anymdp": 1.0}, behaviours=PUBLISHED_BEHAVIOURS
)


def _with(**changes: Any) -> DPDConfig:
    return DPDConfig(**{**LARGE.__dict__, **changes})


# the published sets (arXiv 2502.02869), the first one's task count rounded as we speak of it; tasks measured here
SETS = {
    "large": (LARGE, 500_000, 256),
    "small": (_with(steps=8000, least_states=16, states=16), 128_000, 512),
    "long": (_with(batch=2, steps=512_000), 12_000, 8),
}
TASK_SETS = {"16": (16, 16), "32": (32, 32), "64": (64, 64), "128": (128, 128), "16-128": (16, 128)}
DISCOUNTS = (0.0, 0.5, 0.93, 0.994)
SEED = 0


def record_rows(folder: Path) -> list[dict[str, Any]]:
    """Each set in small; its time divided among tasks, its bytes among tasks and steps."""
    rows = []
    for name, (config, full, tasks) in SETS.items():
        write_records(folder / f"warm-{name}", config, config.batch, SEED + 1)
        begin = time.perf_counter()
        options = {"rows_per_shard": tasks // 4, "workers": WORKERS}
        written = write_records(folder / name, config, tasks, SEED, **options).bytes
        seconds = time.perf_counter() - begin
        row: dict[str, Any] = {"set": name, "states": [config.least_states, config.states], "steps": config.steps}
        row |= {"tasks_measured": tasks, "workers": WORKERS, "seconds_per_task": seconds / tasks}
        row |= {"steps_per_second": tasks * config.steps / seconds, "bytes_per_task": written / tasks}
        row |= {"bytes_per_step": written / tasks / config.steps, "tasks": full}
        row |= {"planned_hours": full * seconds / tasks / 3600, "planned_gigabytes": full * written / tasks / 1e9}
        rows.append(row)
        _print(row)
    return rows


def task_rows(folder: Path) -> list[dict[str, Any]]:
    rows = []
    for name, sizes in TASK_SETS.items():
        for discounts in ((), DISCOUNTS):
            config = TaskSet("anymdp", sizes, discounts=discounts)
            count = 4 * config.dataset(1, 0).rows_per_shard
            count = min(count, 2000)
            out = folder / f"tasks-{name}-{len(discounts)}"
            begin = time.perf_counter()
            written = write_tasks(out, config, count, SEED, workers=WORKERS)
            seconds = time.perf_counter() - begin
            row = {"tasks of states": name, "discounts": len(discounts), "tasks_measured": count, "workers": WORKERS}
            row |= {"tasks_per_second": count / seconds, "bytes_per_task": written.bytes / count}
            rows.append(row)
            _print(row)
    return rows


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Batches of training from disk (files in the page cache), one thread, beside the same made on the fly."""
    config = _with(steps=1024, least_states=8, states=16)
    write_records(folder / "read", config, 2048, SEED)
    rows = []
    streams = {
        "on the fly": DPDStream(config, SEED, prefetch=0),
        "from disk, in order": RecordStream(folder / "read", config.batch, SEED, shuffle=False, prefetch=0),
        "from disk, shuffled": RecordStream(folder / "read", config.batch, SEED, prefetch=0),
    }
    for name, stream in streams.items():
        for i in range(3):
            stream.batch(i)
        begin = time.perf_counter()
        for i in range(3, 33):
            stream.batch(i)
        seconds = (time.perf_counter() - begin) / 30
        rows.append({"batches": name, "steps_per_second": config.batch * config.steps / seconds})
        _print(rows[-1])
    return rows


def _print(row: dict[str, Any]) -> None:
    print("  ".join(f"{k}={v:,.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()))


def run(out: Path, tasks: int, minutes: float, workers: int) -> None:
    """The large set: as many of its first tasks as there is time, disk and wish for. It grows by 40 shards at a time."""
    begin, seconds, made = time.perf_counter(), 0.0, 0
    rows_per_shard = records_dataset(LARGE, 1, SEED).rows_per_shard
    step = 40 * rows_per_shard
    rows = read_index(out)[0].rows if out.exists() else 0
    numbers: dict[str, Any] = {}
    while not numbers or (rows < tasks and seconds < 60 * minutes):
        if numbers and shutil.disk_usage(out.parent).free < 8e9:
            print("less than 8 GB of disk are left: enough")
            break
        if numbers or not rows:
            rows = min(tasks, rows + step)
        numbers = distill(out, LARGE, rows, SEED, labels=False, workers=workers, shards=None, full=False)
        made += min(rows, numbers["shards_made"] * rows_per_shard)
        seconds = time.perf_counter() - begin
    found = {name: numbers[name] for name in ("bytes", "bytes_per_step", "index_crc32")}
    found |= {"tasks": rows, "steps": rows * LARGE.steps, "workers": workers, "tasks_made_in_this_run": made}
    found |= {"seconds": seconds, "steps_per_second": made * LARGE.steps / seconds}
    begin = time.perf_counter()
    stream = RecordStream(out, 32, SEED, prefetch=0)
    stream.reader.check_all()
    found["seconds_to_check_every_byte"] = time.perf_counter() - begin
    begin = time.perf_counter()
    for i in range(20):
        stream.batch(i)
    found["shuffled_steps_read_per_second"] = 20 * 32 * LARGE.steps / (time.perf_counter() - begin)
    print(write("dataset_run", [], **found))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benches.datasets")
    commands = parser.add_subparsers(dest="command")
    real = commands.add_parser("run")
    real.add_argument("folder", type=Path)
    real.add_argument("--tasks", type=int, default=500_000)
    real.add_argument("--minutes", type=float, default=60.0, help="start no more shards after these")
    real.add_argument(
        "--workers", type=int, default=4, help="more than cores, so that some compute while others wait to be on disk"
    )
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.command == "run":
        sys.argv = [given.folder.name if x == str(given.folder) else x for x in sys.argv]  # as the result file has it
        run(given.folder.absolute(), given.tasks, given.minutes, given.workers)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print(write("datasets", [*record_rows(folder), *task_rows(folder), *read_rows(folder)]))


if __name__ == "__main__":
    main()
