"""What a folder of shards holds, and its index.json: see icrl.data.shards."""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from icrl.reading import DTYPES, named, read_json, shown
from icrl_kernels.arguments import integer_fields

FORMAT, VERSION = "icrl.shards", 1
INDEX = "index.json"
MOST_SHARDS = 1 << 24


class Field(NamedTuple):
    """A tensor that every shard holds.

    Symbols of its shape: "N", the shard's rows; those in the data set's `sizes`; any other is a shard's own.
    """

    dtype: str  # torch's name
    shape: tuple[str, ...]
    meaning: str


@dataclass(frozen=True)
class DataSet:
    """What a folder holds: all of index.json but the list of finished shards."""

    kind: str
    fields: dict[str, Field]
    sizes: dict[str, int]
    config: dict[str, Any]
    """Plain JSON values: with the seed, what made the rows."""
    seed: int
    rows: int
    rows_per_shard: int
    labels: int = 0
    """Version of the labels among the rows' tensors that its writer makes; 0 where there are none."""

    def __post_init__(self) -> None:
        integer_fields(self, rows=1, rows_per_shard=1)

    @property
    def num_shards(self) -> int:
        return -(-self.rows // self.rows_per_shard)

    def rows_of(self, shard: int) -> range:
        first = shard * self.rows_per_shard
        return range(first, min(first + self.rows_per_shard, self.rows))

    def facts(self) -> dict[str, Any]:
        """What two writers of one data set must agree on: all but how many rows there are and the labels' version."""
        schema = {n: {"dtype": f.dtype, "shape": list(f.shape), "meaning": f.meaning} for n, f in self.fields.items()}
        facts = {"kind": self.kind, "schema": schema, "sizes": self.sizes, "config": self.config, "seed": self.seed}
        return json.loads(json.dumps({**facts, "rows_per_shard": self.rows_per_shard}))

    def identity(self) -> str:
        return f"{facts_crc(self.facts()):08x}"


class Shard(NamedTuple):
    """A finished shard, as index.json lists it."""

    file: str
    rows: int
    bytes: int
    crc32: int
    labels: int = 0


DTYPE_NAMES = {str(dtype).removeprefix("torch.") for dtype in DTYPES.values()}


def shard_path(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05d}.safetensors"


def read_index(folder: Path) -> tuple[DataSet, list[Shard]]:
    """The data set in a folder and its finished shards; ValueError where there is none, or its index is damaged."""
    path = folder / INDEX
    try:
        index = read_json(path, dict, "{why}")
    except FileNotFoundError as e:
        raise ValueError(f"{folder}: holds no data set (no {INDEX})") from e
    except ValueError as e:
        raise damaged_index(path, e) from e
    if index.get("format") != FORMAT or index.get("version") != VERSION:
        got = f"{shown(index.get('format'))} version {shown(index.get('version'))}"
        raise ValueError(f"{path}: wanted {FORMAT!r} version {VERSION}, got {got}")
    try:
        return _read_index(index)
    except ValueError as e:
        raise damaged_index(path, e) from e


def damaged_index(path: Path, error: ValueError) -> ValueError:
    """The error that says so."""
    return ValueError(f"{path}: damaged ({error}); delete it and run the command again, whole shards are kept")


def _read_index(index: dict[str, Any]) -> tuple[DataSet, list[Shard]]:
    """What an index says. ValueError where a value is of another type, or is not what the rest says."""
    found = {name: entry(index, name, kind) for name, kind in INDEX_TYPES.items()}
    fields = {}
    for name, about in found["schema"].items():
        dtype, shape, meaning = entry(about, "dtype", str), entry(about, "shape", list), entry(about, "meaning", str)
        if dtype not in DTYPE_NAMES or not all(type(symbol) is str for symbol in shape):
            raise ValueError(f"schema: {named(name)}: wanted a dtype and a shape of symbols")
        fields[name] = Field(dtype, tuple(shape), meaning)
    if not all(type(size) is int and 0 <= size < 2**63 for size in found["sizes"].values()):
        raise ValueError("sizes: wanted integers of at least 0")
    dataset = DataSet(
        fields=fields, **{name: found[name] for name in ("kind", "sizes", "config", "seed", "rows", "rows_per_shard")}
    )
    if dataset.num_shards > MOST_SHARDS:
        raise ValueError(f"num_shards: wanted at most {MOST_SHARDS}, got {shown(dataset.num_shards)}")
    shards = []
    for listed in found["shards"]:
        listed = {"labels": 0, **listed} if isinstance(listed, dict) else listed
        rows, size, crc32, labels = (entry(listed, name, int) for name in ("rows", "bytes", "crc32", "labels"))
        shards.append(Shard(entry(listed, "file", str), rows, size, crc32, labels))
    if found["identity"] != dataset.identity() or found["num_shards"] != dataset.num_shards:
        raise ValueError("its facts are not those that were written")
    names = [shard.file for shard in shards]
    if len(set(names)) < len(names):
        raise ValueError("shards: wanted each once")
    if found["complete"] != (len(shards) == dataset.num_shards):
        raise ValueError("complete: not as its shards are")
    return dataset, shards


INDEX_TYPES = {"kind": str, "schema": dict, "sizes": dict, "config": dict, "seed": int, "rows": int}
INDEX_TYPES |= {"rows_per_shard": int, "num_shards": int, "identity": str, "complete": bool, "shards": list}


def entry(of: Any, name: str, kind: type) -> Any:
    """The value of this type under a name. ValueError where there is none."""
    if not isinstance(of, dict) or type(of.get(name)) is not kind:
        got = "none" if not isinstance(of, dict) or name not in of else type(of[name]).__name__
        raise ValueError(f"{name}: wanted {kind.__name__}, got {got}")
    return of[name]


def facts_crc(facts: dict[str, Any]) -> int:
    """CRC-32 of JSON values."""
    return zlib.crc32(json.dumps(facts, sort_keys=True).encode())


def dtype_name(dtype: torch.dtype) -> str:
    """torch's name without "torch."."""
    return str(dtype).removeprefix("torch.")
