"""Reading files, whatever they hold: one that is cut short, damaged or something else is a ValueError that names it."""

from __future__ import annotations

import json
import math
import os
import stat
import warnings
import weakref
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from icrl.files import checksum

LONGEST = 80  # of a value in a message
HEADER = "header_crc32"
"""In a safetensors file's metadata: the checksum of its header, which files of earlier versions lack."""


def named(key: Any) -> str:
    """A name from a file in a message: cut where it is long, in quotes where it would not be one line."""
    text = str(key) if str(key).isprintable() else repr(key)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def shown(value: Any) -> str:
    """A value from a file in a message: cut where it is long."""
    return named(repr(value))


def sealed(tensors: dict[str, Tensor], metadata: dict[str, str]) -> dict[str, str]:
    """Metadata for a safetensors file that cover all of it: with checksums of the tensors' bytes, and of the header, which
    is the tensors' names, dtypes and shapes and the metadata, the other checksum among them."""
    metadata = {**metadata, "crc32": str(checksum(tensors))}
    return {**metadata, HEADER: str(_header_checksum(tensors, metadata))}


def check_seal(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str], known: set[str]) -> None:
    """ValueError where a file is not what `sealed` was given. One of an earlier version has the `known` metadata alone, and a
    warning says that its header is not covered."""
    rest = {name: value for name, value in metadata.items() if name != HEADER}
    whole = (
        metadata[HEADER] == str(_header_checksum(tensors, rest))
        if HEADER in metadata
        else rest.keys() <= {*known, "crc32"}
    )
    if not whole or metadata.get("crc32") != str(checksum(tensors)):
        raise ValueError(f"{path}: damaged (its tensors or facts are not those that were saved)")
    if HEADER not in metadata:
        warnings.warn(
            f"{path}: its checksum is an earlier version's and covers its tensors' bytes, not its header and facts",
            stacklevel=4,
        )


def _header_checksum(tensors: dict[str, Tensor], metadata: dict[str, str]) -> int:
    """CRC-32 of what is not the tensors' bytes, in whatever order it lies in the file."""
    header = [[name, str(t.dtype), list(t.shape)] for name, t in sorted(tensors.items())]
    return zlib.crc32(json.dumps([header, metadata], sort_keys=True).encode())


# --- reading JSON -----------------------------------------------------------------------------------------------------

MOST_BYTES = 1 << 28  # of a JSON file
MOST_LEVELS = 100  # of objects and lists within one another


def parse_json(text: str | bytes) -> Any:
    """A JSON value. ValueError says what is wrong: no JSON, no UTF-8, a key that comes twice, numbers of more than 64 bits,
    or values nested too deep for what reads them."""
    try:
        text = text.decode() if isinstance(text, bytes) else text
        value = json.loads(text, object_pairs_hook=_object, parse_int=_integer)
    except RecursionError:
        raise ValueError(f"nested more than {MOST_LEVELS} deep") from None
    level = [value]
    for _ in range(MOST_LEVELS):
        level = [x for v in level for x in (v.values() if isinstance(v, dict) else v if isinstance(v, list) else ())]
        if not level:
            return value
    raise ValueError(f"nested more than {MOST_LEVELS} deep")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{shown(name)} is there twice")
        found[name] = value
    return found


def _integer(text: str) -> int:
    if len(text) > 20:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def read_json(path: Path, kind: type = dict, wrong: str = "{path} is damaged ({why})") -> Any:
    """The JSON value in a file, of this kind. Raises FileNotFoundError, or the ValueError `wrong` for all else."""
    try:
        if path.is_dir():
            raise ValueError("it is a folder")
        with open(path, "rb") as file:
            text = file.read(MOST_BYTES + 1)
        if len(text) > MOST_BYTES:
            raise ValueError(f"it is longer than {MOST_BYTES >> 20} MB")
        value = parse_json(text)
        if not isinstance(value, kind):
            raise ValueError(f"it holds {type(value).__name__}, wanted {kind.__name__}")
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as e:
        raise ValueError(wrong.format(path=path, why=e)) from e
    return value


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a log, one a line: numbers, or null, by name, "update" an integer. A last line that a kill cut short is left out.

    Raises FileNotFoundError, or a ValueError that names the file and the line.
    """
    rows: list[dict[str, Any]] = []
    try:
        if path.is_dir():
            raise ValueError("it is a folder")
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    row = parse_json(line)
                    if not isinstance(row, dict) or type(row.get("update")) is not int:
                        raise ValueError("wanted an object with an integer 'update'")
                    if other := [n for n, x in row.items() if type(x) not in (int, float, type(None))]:
                        raise ValueError(f"{shown(other[0])}: wanted a number")
                except ValueError as e:
                    if line.endswith(b"\n"):
                        raise ValueError(f"line {number}: {e}") from e
                else:
                    rows.append(row)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as e:
        raise ValueError(f"{path} is damaged ({e})") from e
    return rows


# --- reading safetensors ----------------------------------------------------------------------------------------------

DTYPES = {"BOOL": torch.bool, "U8": torch.uint8, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
DTYPES |= {f"I{bits}": getattr(torch, f"int{bits}") for bits in (8, 16, 32, 64)}
DTYPES |= {"F64": torch.float64, "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64}
MOST_HEADER = 100 << 20  # bytes of a safetensors file's header, as the format has it


class Place(NamedTuple):
    """A tensor in a safetensors file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int  # of its bytes in the file
    end: int


class TensorFile:
    """An open safetensors file: `places` of its tensors by name, its `metadata`, and copies of what they hold.

    Nothing is mapped: a file that is written over or cut short while it is read is an error, or has the bytes of that
    moment; it changes no tensor that was read, and ends no process.

    Raises (here and when it is read):
        ValueError: the file is cut short, damaged, no safetensors file or no file. FileNotFoundError: there is none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would be waited for
                raise self._damaged("it is no regular file")
            file = open(path, "rb", buffering=0)  # noqa: SIM115 (`close` closes it)
        except FileNotFoundError:
            raise
        except OSError as e:
            raise self._damaged(e.strerror) from e
        self._fd = file.fileno()
        self.close = weakref.finalize(self, file.close)
        try:
            self.size = os.fstat(self._fd).st_size
            self.places, self.metadata = self._header()
        except (ValueError, OSError) as e:
            self.close()
            raise self._damaged(e) from e

    def _damaged(self, why: object) -> ValueError:
        return ValueError(f"{self.path}: cut short or damaged ({why})")

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def state(self) -> tuple[int, int, int]:
        """Which file it is, and what changes where it is written to."""
        found = os.fstat(self._fd)
        return found.st_ino, found.st_size, found.st_mtime_ns

    def _header(self) -> tuple[dict[str, Place], dict[str, str]]:
        first = os.pread(self._fd, 8, 0)
        length = int.from_bytes(first, "little")
        if len(first) < 8 or length > min(self.size - 8, MOST_HEADER):
            raise ValueError("no safetensors file, or a part of one")
        header = parse_json(os.pread(self._fd, length, 8))
        if not isinstance(header, dict):
            raise ValueError("its header is no object")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise ValueError("its metadata are no texts by name")
        places = {name: _place(name, entry, 8 + length) for name, entry in header.items()}
        at = 8 + length
        for place in sorted(places.values(), key=lambda p: (p.begin, p.end)):  # end to end, from the header to the end
            if place.begin != at:
                raise ValueError("its tensors do not lie end to end")
            at = place.end
        if at != self.size:
            raise ValueError(f"{self.size} bytes, its header wants {at}")
        return places, metadata

    def tensor(self, name: str) -> Tensor:
        """A copy of a tensor."""
        place = self.places[name]
        try:
            tensor = torch.empty(place.shape, dtype=place.dtype, device="cpu")
        except (RuntimeError, MemoryError) as e:  # as long as the file, which may be sparse
            raise self._damaged(f"{name}: {e}") from e
        self.read(memory_of(tensor), place.begin)
        return tensor

    def tensors(self) -> dict[str, Tensor]:
        """Copies of all tensors by name."""
        return {name: self.tensor(name) for name in self.places}

    def read(self, into: memoryview, begin: int) -> None:
        """Fill memory with the file's bytes from `begin` on."""
        try:
            while into:
                count = os.preadv(self._fd, [into[: 1 << 30]], begin)
                if not count:
                    raise ValueError("it was cut short while it was read")
                into, begin = into[count:], begin + count
        except (OSError, ValueError) as e:
            raise self._damaged(e) from e


def memory_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def _place(name: str, entry: Any, data: int) -> Place:
    """A tensor's place from its entry in a header; `data` is where tensors begin."""
    wrong = ValueError(f"its header's {shown(name)} is malformed")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise wrong
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
            raise wrong
    if not isinstance(dtype, str) or dtype not in DTYPES or len(offsets) != 2:
        raise wrong
    if offsets[1] - offsets[0] != math.prod(shape) * DTYPES[dtype].itemsize:
        raise wrong
    return Place(DTYPES[dtype], tuple(shape), data + offsets[0], data + offsets[1])
