"""Writing files: whole or not at all, and checksums of tensors. What else in icrl writes, writes through this module."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor


def checksum(tensors: dict[str, Tensor]) -> int:
    """CRC-32 of all bytes of CPU tensors of any dtype, by name."""
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(tensors[name].contiguous().view(-1).view(torch.uint8).numpy().data, value)
    return value


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A partial file to write, which takes `path`'s name at the block's end: a kill leaves the old file or the new one.

    `with replacing(path) as part: part.write_text(...)`. What the block wrote reaches the disk before the name changes.
    Where the block raises, the partial file is removed and `path` is what it was.
    """
    part = path.with_name(path.name + ".part")
    try:
        yield part
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def json_text(value: Any) -> str:
    """A value as icrl writes it: JSON indented by one, with a newline at its end."""
    return json.dumps(value, indent=1) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, whole or not at all."""
    write_text(path, json_text(value))


def append_text(path: Path, text: str) -> None:
    """Add to the end of a file, which is made where there is none."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(text)


def open_to_readers(path: Path) -> None:
    """Give a file the permissions that a new file of this process has (some libraries write files for their owner alone)."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def sync(file: IO[bytes]) -> None:
    """Bring what was written to an open file to the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Bring a folder's names to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
