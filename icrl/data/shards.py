"""Data sets on disk: a folder of safetensors shards beside an index that says what they hold (see docs/DATA.md).

Row i of a data set is a function of (configuration, seed, i's shard) alone, so shards can be made in any order, by any
number of threads and processes, and made again. A shard is written under a partial name that its writer holds locked,
synced and renamed: a kill at any moment costs the shards in hand. Nothing here knows what the tensors mean.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from icrl.data.index import (
    FORMAT,
    INDEX,
    VERSION,
    DataSet,
    Field,
    Shard,
    damaged_index,
    dtype_name,
    entry,
    facts_crc,
    read_index,
    shard_path,
)
from icrl.data.seeds import hash_seed
from icrl.extras import versions
from icrl.files import LOCK, checksum, claimed, locked, write_text
from icrl.reading import TensorFile, memory_of, named, parse_json, read_json
from icrl_kernels import set_threads_here
from icrl_kernels.arguments import MOST_THREADS, integer

__all__ = [
    "INDEX",
    "SHARD_BYTES",
    "DataSet",
    "Field",
    "ForeignShard",
    "Shard",
    "ShardReader",
    "Written",
    "batch_rows",
    "check_shard",
    "read_index",
    "shard_path",
    "write_shards",
]

SHARD_BYTES = 64 << 20  # about as many as a shard should have
Maker = Callable[[int, int], dict[str, Tensor]]


class Written(NamedTuple):
    made: int
    found: int
    left: int
    """Not finished: outside the range asked for, or in another process's hands."""
    remade: list[str]
    """What was wrong with the shards that were there and had to be made again."""
    bytes: int


# --- one shard --------------------------------------------------------------------------------------------------------


class ForeignShard(ValueError):
    """A sound shard of another data set, which is not to be overwritten."""


def check_shard(folder: Path, dataset: DataSet, shard: int, *, full: bool = False) -> Shard:
    """Facts of a whole shard. `full` reads every byte against its checksum; else header, names, shapes and length.

    Raises:
        ValueError: what is wrong with the file; ForeignShard: it is sound, but belongs to another data set.
    """
    path = shard_path(folder, shard)
    try:
        with TensorFile(path) as file:
            return _checked(file, dataset, shard, full)
    except FileNotFoundError as e:
        raise ValueError(f"{path}: is missing") from e


def _checked(file: TensorFile, dataset: DataSet, shard: int, full: bool) -> Shard:
    """`check_shard` of an open file."""
    path, rows = file.path, len(dataset.rows_of(shard))
    try:
        about = parse_json(file.metadata.get("icrl", "{}"))
        if not isinstance(about, dict) or about.pop("facts_crc32", None) != facts_crc(about):
            raise ValueError("its header's facts are not those that were written")
        found = {name: entry(about, name, int) for name in ("shard", "rows", "crc32")}
    except ValueError as e:
        raise ValueError(f"{path}: damaged ({e})") from e
    if about.get("format") != FORMAT or about.get("identity") != dataset.identity():
        raise ForeignShard(f"{path}: belongs to another data set")
    if (found["shard"], found["rows"]) != (shard, rows):
        got = f"shard {found['shard']} of {found['rows']} rows"
        raise ValueError(f"{path}: holds {got}, wanted shard {shard} of {rows}")
    shapes = {name: (dtype_name(place.dtype), list(place.shape)) for name, place in file.places.items()}
    _check_shapes(str(path), dataset, rows, shapes)
    if full and checksum(file.tensors()) != found["crc32"]:
        raise ValueError(f"{path}: damaged (its bytes are not those that were written)")
    return Shard(path.name, rows, file.size, found["crc32"], about.get("labels", 0))


def _check_shapes(what: str, dataset: DataSet, rows: int, found: dict[str, tuple[str, list[int]]]) -> None:
    if found.keys() != dataset.fields.keys():
        raise ValueError(f"{what}: wanted tensors {', '.join(sorted(dataset.fields))}, got {', '.join(sorted(found))}")
    sizes = {**dataset.sizes, "N": rows}
    for name, (dtype, shape) in found.items():
        field = dataset.fields[name]
        wanted = [sizes.get(symbol, symbol) for symbol in field.shape]
        if len(shape) == len(wanted):
            for symbol, size in zip(field.shape, shape, strict=True):
                sizes.setdefault(symbol, size)  # a shard's own
            wanted = [sizes[symbol] for symbol in field.shape]
        if dtype != field.dtype or list(shape) != wanted:
            got = f"{dtype} {list(shape)}"
            raise ValueError(f"{what}: {name}: wanted {field.dtype} {list(field.shape)} = {wanted}, got {got}")


def _bytes_of(dataset: DataSet, shard: int, tensors: dict[str, Tensor]) -> bytes:
    rows = len(dataset.rows_of(shard))
    found = {name: (dtype_name(t.dtype), list(t.shape)) for name, t in tensors.items()}
    _check_shapes(f"shard {shard}", dataset, rows, found)
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    about = {"format": FORMAT, "version": VERSION, "kind": dataset.kind, "identity": dataset.identity()}
    about |= {"shard": shard, "first_row": dataset.rows_of(shard).start, "rows": rows, "crc32": checksum(tensors)}
    if dataset.labels:
        about["labels"] = dataset.labels
    about["facts_crc32"] = facts_crc(about)
    return save(tensors, {"icrl": json.dumps(about)})  # one key: the order of several is not the same in every process


def _write_shard(folder: Path, dataset: DataSet, shard: int, make: Maker, full: bool) -> Shard | None:
    """Make and write one shard, whole or not at all; None where another process is at it or has just done it."""
    with claimed(shard_path(folder, shard), wait=False) as put:
        # it may have been finished between the caller's look and the claim
        if put is None or isinstance(_state(folder, dataset, shard, full), Shard):
            return None
        rows = dataset.rows_of(shard)
        put(_bytes_of(dataset, shard, make(rows.start, len(rows))))
    return check_shard(folder, dataset, shard)


def _state(folder: Path, dataset: DataSet, shard: int, full: bool) -> Shard | str | None:
    """The shard where it is whole, what is wrong with it where it is not; None where there is none."""
    if not shard_path(folder, shard).exists():
        return None
    try:
        return check_shard(folder, dataset, shard, full=full)
    except ForeignShard:
        raise
    except ValueError as e:
        return str(e)


# --- the folder -------------------------------------------------------------------------------------------------------


def _write_index(folder: Path, dataset: DataSet) -> list[Shard]:
    """List what is whole now, and the versions of the writers there were; the caller holds the lock."""
    if (folder / INDEX).exists():  # another writer may have asked for more rows since
        dataset = replace(dataset, rows=max(dataset.rows, read_index(folder)[0].rows))
    whole = []
    for shard in range(dataset.num_shards):
        if shard_path(folder, shard).exists():
            try:
                whole.append(check_shard(folder, dataset, shard))
            except ForeignShard:
                raise
            except ValueError:
                continue  # a damaged one is not finished
    facts = {"format": FORMAT, "version": VERSION, "identity": dataset.identity(), **dataset.facts()}
    facts |= {"rows": dataset.rows, "num_shards": dataset.num_shards, "complete": len(whole) == dataset.num_shards}
    now = versions()
    facts["versions"] = [*(v for v in _versions_in(folder) if v != now), now]
    write_text(folder / INDEX, _index_text({**facts, "shards": [_listed(s) for s in whole]}))
    return whole


def _listed(shard: Shard) -> dict[str, Any]:
    """As index.json has it: labels of version 0, or none, are left out."""
    return {name: value for name, value in shard._asdict().items() if name != "labels" or value}


def _versions_in(folder: Path) -> list[dict[str, str]]:
    """The versions that wrote here, the last one last; none are known of what was written before they were kept."""
    path = folder / INDEX
    if not path.exists():
        return []
    found = read_json(path).get("versions", [])
    if not isinstance(found, list) or not all(isinstance(v, dict) for v in found):
        raise damaged_index(path, ValueError("versions: wanted a list of objects"))
    return found


def _index_text(index: dict[str, Any]) -> str:
    """Indented, a shard a line."""
    shards = index.pop("shards")
    text = json.dumps({**index, "shards": []}, indent=1)
    lines = ",\n".join(f"  {json.dumps(s)}" for s in shards)
    return text[: text.rindex("[]")] + (f"[\n{lines}\n ]" if shards else "[]") + "\n}\n"


def _enter(folder: Path, dataset: DataSet) -> DataSet:
    """Begin the folder, or join it; the data set with as many rows as any writer has asked for."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out: {folder} is not a folder")
    if folder.is_dir() and not (folder / INDEX).exists():
        others = [p.name for p in folder.iterdir() if p.name != LOCK and not p.name.startswith(("shard-", INDEX))]
        if others:
            raise ValueError(f"out: {folder} is not empty and holds no data set ({min(others)}); choose another")
    with locked(folder):
        if (folder / INDEX).exists():
            old, _ = read_index(folder)
            dataset = _begun_by(old, dataset)
            changed = _differences(old.facts(), dataset.facts())
            if changed:
                more = f"; and {len(changed) - 4} more" if len(changed) > 4 else ""
                what = "; ".join(changed[:4]) + more
                raise ValueError(f"out: {folder} holds another data set ({what}); choose another folder")
            if dataset.rows < old.rows:
                raise ValueError(f"out: {folder} holds a data set of {old.rows} rows, more than {dataset.rows}")
            _say_version(folder)
            if dataset.rows == old.rows:
                return dataset
        _write_index(folder, dataset)
    return dataset


def _begun_by(old: DataSet, new: DataSet) -> DataSet:
    """The new data set as of the version of icrl_kernels that began the old one: data sets go on with later versions."""
    name = "icrl_kernels"
    if old.config.get(name) in (None, new.config.get(name)) or name not in new.config:
        return new
    return replace(new, config={**new.config, name: old.config[name]})


def _say_version(folder: Path) -> None:
    """A line where the last version that wrote here is not this one."""
    written, now = _versions_in(folder), versions()
    if written and (last := written[-1]) != now:
        found = [n for n in {**last, **now} if last.get(n) != now.get(n)]
        what = ", ".join(f"{n}: {last.get(n)} there, {now.get(n)} now" for n in found)
        tqdm.write(f"{folder} goes on with another version: {what}")


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    found: list[str] = []
    for name in sorted(old.keys() | new.keys()):
        a, b = old.get(name), new.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            found += _differences(a, b, f"{prefix}{name}.")
        elif a != b:
            found.append(f"{prefix}{name}: there {json.dumps(a)}, asked for {json.dumps(b)}")
    return found


def write_shards(
    folder: Path,
    dataset: DataSet,
    make: Maker,
    *,
    workers: int = 1,
    threads: int = 1,
    shards: range | None = None,
    full: bool = False,
    progress: bool = False,
    unit: str = "row",
) -> Written:
    """Make the shards that are not there yet. Call it again after a kill, or at the same time elsewhere, to go on.

    A finished shard that is cut short or damaged is made again, the others are kept. A data set may grow: `rows` may be
    more than before.

    Args:
        make: (first row, number of rows) -> tensors as `dataset.fields` has them; a function of these numbers alone, called
            from several threads.
        workers: shards made at once. threads: of each.
        shards: only these, where processes cannot see one another's file locks. full: read what is there against its
            checksums, instead of headers and lengths alone.
        progress: show a bar of rows, where it takes over two seconds.
    Raises:
        ValueError: the folder holds something else, or another configuration's data (what differs is named).
    """
    workers, threads = integer("workers", workers, 1, MOST_THREADS), integer("threads", threads, 1, MOST_THREADS)
    shards = range(dataset.num_shards) if shards is None else shards
    if not shards or not 0 <= min(shards) <= max(shards) < dataset.num_shards:
        got = f"{min(shards)} to {max(shards)}" if shards else f"none ({shards.start} to {shards.stop}, exclusive)"
        raise ValueError(f"shards: wanted some of 0 to {dataset.num_shards - 1}, got {got}")
    dataset = _enter(folder, dataset)
    states = {shard: _state(folder, dataset, shard, full) for shard in shards}
    found = [shard for shard, state in states.items() if isinstance(state, Shard)]
    remade = [state for state in states.values() if isinstance(state, str)]
    for wrong in remade:
        tqdm.write(f"{wrong}: it is made again")
    todo = iter(left := [shard for shard in states if shard not in found])
    others = {state.labels for state in states.values() if isinstance(state, Shard)} - {dataset.labels}
    if left and others:
        raise ValueError(
            f"out: {folder} holds labels of version {min(others)}, and {dataset.labels} would be added; choose another folder"
        )
    rows_found = sum(len(dataset.rows_of(s)) for s in found)
    total = sum(len(dataset.rows_of(s)) for s in shards)
    made: list[Shard] = []
    failed: list[BaseException] = []
    lock, stop = threading.Lock(), threading.Event()
    with tqdm(total=total, initial=rows_found, unit=unit, disable=not progress, delay=2.0, smoothing=0.05) as bar:

        def work() -> None:
            while not stop.is_set():
                with lock:
                    shard = next(todo, None)
                if shard is None:
                    return
                try:
                    set_threads_here(threads)
                    done = _write_shard(folder, dataset, shard, make, full)
                except BaseException as e:  # goes to the caller, once the others have stopped
                    failed.append(e)
                    stop.set()
                    return
                if done is not None:
                    with lock:
                        made.append(done)
                        bar.update(done.rows)

        crew = [threading.Thread(target=work, name=f"shards-{i}") for i in range(workers)]
        for thread in crew:
            thread.start()
        try:
            for thread in crew:
                thread.join()
        except KeyboardInterrupt:
            stop.set()
            tqdm.write("stopping after the shards in hand")
            for thread in crew:
                thread.join()
            raise
    with locked(folder):
        whole = _write_index(folder, dataset)
        if failed and not any(folder.glob("shard-*")):
            (folder / INDEX).unlink()  # nothing could be made of it: the folder is free for a better configuration
    if failed:
        raise failed[0]
    return Written(len(made), len(found), dataset.num_shards - len(whole), remade, sum(s.bytes for s in whole))


# --- reading ----------------------------------------------------------------------------------------------------------


class ShardReader:
    """Rows of a finished data set, read from its shards, each of which is checked, every byte, before its first row is read.

    Args:
        kind: what the folder should hold. full: check every shard first.
        open_files: how many shards stay open.
    Raises:
        ValueError: there is no data set, it is another kind, it is not finished, a shard is missing, cut short or damaged, or
            shards hold labels of different versions; the file is named. Reading raises it for a shard that has become so.
    """

    labels: int
    """Version of the labels in all of the shards."""

    def __init__(
        self, folder: Path | str, *, kind: str | None = None, full: bool = False, open_files: int = 256
    ) -> None:
        self.folder, self.open_files = Path(folder), open_files
        self.dataset, self._shards = read_index(self.folder)
        if kind is not None and self.dataset.kind != kind:
            raise ValueError(f"{self.folder}: holds {named(self.dataset.kind)}, wanted {kind}")
        if len(self._shards) != self.dataset.num_shards:
            left = self.dataset.num_shards - len(self._shards)
            raise ValueError(
                f"{self.folder}: {left} of {self.dataset.num_shards} shards are not finished; run its command again"
            )
        self.labels = self._shards[0].labels
        for i, shard in enumerate(self._shards):
            path = shard_path(self.folder, i)
            size = path.stat().st_size if path.exists() else -1
            if size != shard.bytes or path.name != shard.file:
                what = "is missing" if size < 0 else f"is cut short or changed: {size} bytes, wanted {shard.bytes}"
                raise ValueError(f"{path}: {what}; run the data set's command again")
            if shard.labels != self.labels:
                raise ValueError(
                    f"{path}: holds labels of version {shard.labels}, {self._shards[0].file} of {self.labels}; they are not mixed"
                )
        if full:
            self.check_all()
        self._lock = threading.Lock()
        self._open: OrderedDict[int, TensorFile] = OrderedDict()
        self._states: dict[int, tuple[int, int, int]] = {}  # of the files that were checked

    def __len__(self) -> int:
        return self.dataset.rows

    def require(self, fields: dict[str, Field], sizes: str) -> None:
        """ValueError where the data set lacks one of these tensors, or a size that has one of these symbols."""
        for name, field in fields.items():
            found = self.dataset.fields.get(name)
            if found is None or (found.dtype, found.shape) != (field.dtype, field.shape):
                raise ValueError(
                    f"{self.folder / INDEX}: damaged (it has no {name}, {field.dtype} {list(field.shape)})"
                )
        if lacking := set(sizes) - self.dataset.sizes.keys():
            raise ValueError(f"{self.folder / INDEX}: damaged (it has no size {min(lacking)})")

    def check_all(self) -> None:
        """Read every byte against the checksums; ValueError names the first file that differs."""
        for shard in range(self.dataset.num_shards):
            check_shard(self.folder, self.dataset, shard, full=True)

    def read(self, rows: Tensor, names: Sequence[str] | None = None) -> dict[str, Tensor]:
        """These rows `[n]` of the named tensors (by default all that have rows), in the order asked for, as copies."""
        fields = self.dataset.fields
        by_row = [
            n for n, f in fields.items() if f.shape[:1] == ("N",) and set(f.shape[1:]) <= self.dataset.sizes.keys()
        ]
        names = by_row if names is None else names
        if others := set(names) - set(by_row):
            raise ValueError(
                f"names: wanted some of {', '.join(by_row)}, which have rows, got {', '.join(sorted(others))}"
            )
        rows = torch.as_tensor(rows, dtype=torch.int64, device="cpu")
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(self):
            raise ValueError(f"rows: wanted some of 0 to {len(self) - 1}, got {int(rows.min())} to {int(rows.max())}")
        if len(rows):
            with self._lock:
                self._file(int(rows[0]) // self.dataset.rows_per_shard)  # the sizes are those of a shard
        out: dict[str, Tensor] = {}
        for name in names:
            shape = [self.dataset.sizes[symbol] for symbol in fields[name].shape[1:]]
            out[name] = torch.zeros(len(rows), *shape, dtype=getattr(torch, fields[name].dtype), device="cpu")
        memories = {name: memory_of(t) for name, t in out.items()}
        for begin, shard, first, count in self._runs(rows.tolist()):
            with self._lock:
                file = self._file(shard)
                for name, memory in memories.items():
                    row = len(memory) // len(rows)
                    file.read(memory[begin * row : (begin + count) * row], file.places[name].begin + first * row)
        return out

    def shard(self, shard: int) -> dict[str, Tensor]:
        """All tensors of one shard."""
        with self._lock:
            return self._file(shard).tensors()

    def _runs(self, rows: list[int]) -> Iterator[tuple[int, int, int, int]]:
        """(position, shard, first row in it, how many) of each stretch of neighbours within one shard."""
        size, begin = self.dataset.rows_per_shard, 0
        for i in range(1, len(rows) + 1):
            if i == len(rows) or rows[i] != rows[i - 1] + 1 or rows[i] % size == 0:
                yield begin, rows[begin] // size, rows[begin] % size, i - begin
                begin = i

    def _file(self, shard: int) -> TensorFile:
        """The open shard, which is as it was when it was checked; the caller holds the lock."""
        file = self._open.pop(shard, None) or TensorFile(shard_path(self.folder, shard))
        if (state := file.state()) != self._states.get(shard):  # the first time, or it was written to
            try:
                if _checked(file, self.dataset, shard, full=True) != self._shards[shard]:
                    raise ValueError(
                        f"{file.path}: is not the shard that {INDEX} lists; run the data set's command again"
                    )
            except ValueError:
                file.close()
                raise
            self._states[shard] = state
        self._open[shard] = file
        if len(self._open) > self.open_files:
            self._open.popitem(last=False)[1].close()
        return file


def batch_rows(
    rows: int, batch: int, index: int, *, seed: int, shuffle: bool = True, rank: int = 0, world: int = 1
) -> Tensor:
    """Rows of batch `index` of process `rank` of `world`: a function of these numbers alone.

    Every epoch goes through all rows in a new order drawn from the seed (or in theirs), `world` batches side by side; the
    last rows that do not fill one for every process are left out.
    """
    numbers = {"rows": rows, "batch": batch, "index": index, "seed": seed, "rank": rank, "world": world}
    rows, batch, index, seed, rank, world = (integer(name, value) for name, value in numbers.items())
    if not 0 <= rank < world:
        raise ValueError(f"rank, world: wanted 0 <= rank < world, got {rank}, {world}")
    if not 1 <= batch * world <= rows:
        raise ValueError(f"batch: wanted 1 to {rows // world}, {rows} rows among {world} processes, got {batch}")
    epoch, step = divmod(index, rows // (batch * world))
    first = (step * world + rank) * batch
    if not shuffle:
        return torch.arange(first, first + batch, device="cpu")
    return _order(rows, seed, epoch)[first : first + batch]


@lru_cache(maxsize=2)
def _order(rows: int, seed: int, epoch: int) -> Tensor:
    generator = torch.Generator().manual_seed(hash_seed(seed, epoch))
    return torch.randperm(rows, generator=generator, device="cpu")
