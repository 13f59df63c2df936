"""`icrl distill` and `icrl dataset`: write records, and say what a folder of shards holds."""

from __future__ import annotations

import json
import time
import zlib
from pathlib import Path
from typing import Any

from icrl.data.shards import (
    INDEX,
    Written,
    check_shard,
    read_index,
    shard_path,
)
from icrl.files import save_numbers
from icrl.omnirl.distill import DPDConfig
from icrl.omnirl.record_shards import write_records


def distill(
    out: Path,
    config: DPDConfig,
    tasks: int,
    seed: int,
    *,
    labels: bool,
    workers: int,
    shards: range | None,
    full: bool,
    json: Path | None = None,
) -> dict[str, Any]:
    """What `icrl distill` does: write records, say what they cost."""
    begin = time.perf_counter()
    written = write_records(
        out, config, tasks, seed, labels=labels, workers=workers, shards=shards, full=full, progress=True, unit="task"
    )
    seconds = time.perf_counter() - begin
    return report(out, written, seconds, {"step": config.steps}, json)


def report(
    out: Path, written: Written, seconds: float, per_row: dict[str, int], json: Path | None = None
) -> dict[str, Any]:
    """Write to `json`, print and return what a writer did, and what a row and its parts cost in bytes."""
    dataset, shards = read_index(out)
    rows = sum(s.rows for s in shards)
    numbers: dict[str, Any] = {"out": str(out), "kind": dataset.kind, "rows": rows, "of": dataset.rows}
    numbers |= {"shards_made": written.made, "shards_found": written.found, "shards_left": written.left}
    numbers |= {"made_again": written.remade, "bytes": written.bytes, "seconds": seconds}
    numbers |= {f"bytes_per_{name}": written.bytes / max(rows, 1) / count for name, count in per_row.items()}
    numbers["index_crc32"] = zlib.crc32((out / INDEX).read_bytes())
    save_numbers(json, numbers)
    print(
        f"{out}: {rows:,} of {dataset.rows:,} rows in {len(shards)} shards, {written.bytes / 1e9:.3f} GB; "
        f"{written.made} shards made and {written.found} found in {seconds:.1f} s"
    )
    if written.left:
        print(f"{written.left} shards are not finished; run the same command again")
    return numbers


def describe(folder: Path, full: bool, out: Path | None = None) -> dict[str, Any]:
    """What `icrl dataset` writes to `out` and prints: what a folder of shards holds, and what is wrong with it."""
    dataset, shards = read_index(folder)
    wrong = []
    for shard in range(dataset.num_shards):
        try:
            if shard_path(folder, shard).exists():
                check_shard(folder, dataset, shard, full=full)
            else:
                wrong.append(f"{shard_path(folder, shard)}: is missing")
        except ValueError as e:
            wrong.append(str(e))
    size = sum(s.bytes for s in shards)
    rows, count = dataset.rows, dataset.num_shards
    numbers = {"kind": dataset.kind, "rows": rows, "shards": count, "bytes": size, "wrong": wrong}
    save_numbers(out, numbers)
    print(
        f"{folder}: {dataset.kind}, {dataset.rows:,} rows, seed {dataset.seed}, in shards of {dataset.rows_per_shard:,}"
    )
    for name, field in dataset.fields.items():
        shape = ", ".join(f"{s}={dataset.sizes[s]}" if s in dataset.sizes else s for s in field.shape)
        print(f"  {name:20} {field.dtype:8} [{shape}]  {field.meaning}")
    print(f"  made by {json.dumps(dataset.config)}")
    checked = "every byte checked" if full else "headers and lengths checked"
    print(f"  {count - len(wrong)} of {count} shards are whole, {size / 1e9:.3f} GB ({checked})")
    for line in wrong[:10]:
        print(f"  {line}")
    return numbers
