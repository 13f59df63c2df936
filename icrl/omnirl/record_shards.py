"""Records of decoupled policy distillation on disk, and training from them (docs/DATA.md has the format and its costs).

A data set of records holds the batches that `DPDStream` makes on the fly, end to end and in small dtypes: batch i of a
seed is rows i·batch to (i+1)·batch. The optimal values of a step depend on its observation alone, so they are kept once a
record, as a table, and looked up when a batch is read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import icrl_kernels
from icrl.data.prefetch import Stream
from icrl.data.shards import (
    SHARD_BYTES,
    DataSet,
    Field,
    ShardReader,
    Written,
    batch_rows,
    write_shards,
)
from icrl.omnirl.distill import DPDConfig, Records, batch_tasks, simulate
from icrl.omnirl.labels import LABELS_VERSION, RECORDED, difference
from icrl.reading import shown

RECORDS = "dpd records"
STEP = {
    "observation": Field("int16", ("N", "T"), "what the agent sees before it acts"),
    "action": Field("int8", ("N", "T"), "the behaviour's"),
    "reward": Field("float32", ("N", "T"), "of the action"),
    "done": Field("int8", ("N", "T"), "after the action: 0 no, 1 terminated, 2 truncated"),
    "tag": Field(
        "int8", ("N", "T"), "the behaviour's: 0.. optimal at that discount, 4 model-based, 5 Q, 6 random, 7 hidden"
    ),
}
VALUES = Field(
    "float32",
    ("N", "G", "O", "A"),
    "optimal value of each action where that is observed, at each discount; 0 of ids without a state",
)
LABELS = Field("int8", ("N", "T", "G"), "the optimal action at each discount: where its value is largest")


def records_dataset(
    config: DPDConfig, rows: int, seed: int, *, labels: bool = False, rows_per_shard: int | None = None
) -> DataSet:
    """The data set of `rows` records of `config.steps` steps, in shards of about 64 MB unless their rows are given.

    Raises:
        ValueError: ids that int16 or int8 cannot hold.
    """
    for name, most in (("states", 2**15), ("actions", 2**7)):
        if getattr(config, name) > most:
            raise ValueError(f"{name}: records hold at most {most}, got {getattr(config, name)}")
    sizes = {"T": config.steps, "G": len(config.discounts), "O": config.states, "A": config.actions}
    fields = {**STEP, "value": VALUES, **({"label": LABELS} if labels else {})}
    if rows_per_shard is None:
        row = sum(_row_bytes(field, sizes) for field in fields.values())
        rows_per_shard = max(1, SHARD_BYTES // (row * config.batch)) * config.batch
    made_by = {"icrl_kernels": icrl_kernels.__version__, **asdict(config)}
    return DataSet(RECORDS, fields, sizes, made_by, seed, rows, rows_per_shard, labels=LABELS_VERSION)


def _row_bytes(field: Field, sizes: dict[str, int]) -> int:
    count = 1
    for symbol in field.shape[1:]:
        count *= sizes[symbol]
    return count * getattr(torch, field.dtype).itemsize


def write_records(
    folder: Path,
    config: DPDConfig,
    rows: int,
    seed: int,
    *,
    labels: bool = False,
    rows_per_shard: int | None = None,
    **options: Any,
) -> Written:
    """Make the records that are not there yet: `icrl.data.shards.write_shards`, whose options these are."""
    dataset = records_dataset(config, rows, seed, labels=labels, rows_per_shard=rows_per_shard)
    return write_shards(folder, dataset, partial(_make, config, seed, labels), **options)


def _make(config: DPDConfig, seed: int, labels: bool, first: int, count: int) -> dict[str, Tensor]:
    begin, end = first // config.batch, -(-(first + count) // config.batch)
    parts = [_compact(config, seed, index, labels) for index in range(begin, end)]
    skip = first - begin * config.batch
    return {name: torch.cat([part[name] for part in parts])[skip : skip + count] for name in parts[0]}


def _compact(config: DPDConfig, seed: int, index: int, labels: bool) -> dict[str, Tensor]:
    tasks, own = batch_tasks(config, seed, index)
    run, observation, tag, q = simulate(config, tasks, seed=own, labels=labels)
    found = {"observation": observation.to(torch.int16), "reward": run.reward}
    found |= {"action": run.action, "done": run.done, "tag": tag}
    tensors = {name: found[name].to(getattr(torch, field.dtype)) for name, field in STEP.items()}
    behind = tasks.state_of()[:, None, :, None]  # the state behind each observation; -1 where there is none
    value = q.gather(2, behind.clamp(min=0).expand(-1, q.shape[1], -1, q.shape[3]))
    tensors["value"] = value.masked_fill(behind < 0, 0)
    if labels:
        tensors["label"] = run.labels.to(torch.int8)
    return tensors


class RecordStream(Stream[Records]):
    """Batches of a data set of records, as `DPDStream` gives them; the batch's number says which rows it holds.

    Args:
        folder: a finished data set of records.
        batch: how many records. shuffle: in a new order each epoch; else as they lie, which with the data set's own batch
            size, rank 0 of 1, are the batches made on the fly.
        rank, world: this process among those that train together: they share every epoch's rows.
        prefetch, threads: see `icrl.data.prefetch.Stream`.
    Raises:
        ValueError: no finished data set of records, a damaged shard, fewer rows than a batch for every process, or labels of
            several versions, or of one that training would mix with today's.
    """

    def __init__(
        self,
        folder: Path | str,
        batch: int,
        seed: int,
        *,
        shuffle: bool = True,
        rank: int = 0,
        world: int = 1,
        prefetch: int = 2,
        threads: int = 1,
    ) -> None:
        super().__init__(seed, prefetch=prefetch, threads=threads, name="records")
        self.reader = ShardReader(folder, kind=RECORDS)
        self.reader.require({**STEP, "value": VALUES}, "TGOA")
        if not RECORDED <= self.reader.labels <= LABELS_VERSION:
            version = self.reader.labels
            raise ValueError(f"records: {folder} has labels of version {version}: {difference(version)}")
        self.order = {"batch": batch, "shuffle": shuffle, "rank": rank, "world": world}
        batch_rows(len(self.reader), index=0, seed=seed, **self.order)  # refuses here rather than in the thread

    def _maker(self) -> Callable[[int], Records]:
        return partial(_read, self.reader, self.seed, self.order)

    def position_after(self, batches: int, processes: int) -> int:
        """The number of the next batch where `processes` processes have read `batches` each: no row of theirs comes again
        in their epoch. A batch that they had read in part is left out."""
        batch, world, rows = self.order["batch"], self.order["world"], len(self.reader)
        epoch, step = divmod(batches, max(1, rows // (batch * processes)))
        return epoch * (rows // (batch * world)) + min(-(-step * processes // world), rows // (batch * world))

    def check(self, config: DPDConfig) -> None:
        """ValueError where the data set's records are not what a learner of `config` takes; what differs is named."""
        there = self.reader.dataset.config
        for name in ("states", "actions", "steps", "discounts"):
            wanted, found = getattr(config, name), there.get(name)
            if (tuple(found) if isinstance(found, list) else found) != wanted:
                raise ValueError(f"records: {self.reader.folder} has {name} {shown(found)}, the configuration {wanted}")


def _read(reader: ShardReader, seed: int, order: dict[str, Any], index: int) -> Records:
    rows = batch_rows(len(reader), index=index, seed=seed, **order)
    found = reader.read(rows, [*STEP, "value"])
    observation = found["observation"].long()
    value = found["value"].transpose(1, 2).contiguous()  # [B,O,G,A]
    return Records(
        observation=observation,
        action=found["action"].long(),
        reward=found["reward"],
        done=found["done"].long(),
        tag=found["tag"].long(),
        q=value[torch.arange(len(rows), device=value.device)[:, None], observation],
    )
