"""Writing files: the one module of icrl that writes any.

A file is written whole or not at all: beside its place, under a partial name that its writer holds locked, brought to the
disk and renamed. A kill at any moment leaves the old file or the new one. A link is followed and stays. What is no regular
file (a device, a pipe, an open descriptor such as /dev/stdout) is written into and never replaced. A new file has the
permissions that the user's umask leaves it; one that is replaced keeps its own.
"""

from __future__ import annotations

import errno
import fcntl
import io
import json
import math
import os
import stat
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

LOCK = ".lock"
"""The file of a folder that its holder has locked."""
BLOCK = bytes(4096)
"""What a probe writes: a full disk may still have room for an empty file."""
NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS}
"""How a file system says that it has no locks."""
NO_SYNC = {errno.EINVAL, errno.EOPNOTSUPP, errno.EACCES, errno.EPERM}
"""How a system says that a folder cannot be synced, or not by this user."""


def checksum(tensors: dict[str, Tensor]) -> int:
    """CRC-32 of all bytes of CPU tensors of any dtype, by name."""
    value = 0
    for name in sorted(tensors):
        t = tensors[name].contiguous()
        flat = t.as_strided((t.numel(),), (1,))  # a single element counts as contiguous whatever its stride
        value = zlib.crc32(flat.view(torch.uint8).numpy().data, value)
    return value


# --- where a path leads -----------------------------------------------------------------------------------------------


class _Place(NamedTuple):
    path: Path
    """Behind all links."""
    replaced: bool
    """A regular file, or none yet. All else is written into."""
    descriptor: int | None = None
    """Of this process, where the path names one."""


def _place(path: Path) -> _Place:
    descriptor = _descriptor(path)
    if descriptor is not None:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "it is open for reading alone")
        return _Place(path, False, descriptor)
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return _Place(Path(os.path.realpath(path)), True)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if stat.S_ISSOCK(mode):
        raise OSError(errno.ENXIO, "it is a socket")
    return _Place(Path(os.path.realpath(path)), True) if stat.S_ISREG(mode) else _Place(path, False)


def _descriptor(path: Path) -> int | None:
    """The number of the open descriptor that a path names, as /dev/stdout and /dev/fd/3 do; None where it names none."""
    own = {f"/proc/{os.getpid()}/fd", os.path.realpath("/dev/fd")}
    for _ in range(40):  # as many links as the system follows
        folder = os.path.realpath(path.parent)
        if folder in own and path.name.isdecimal():
            return int(path.name)
        if not path.is_symlink():
            return None
        path = Path(folder, os.readlink(path))
    return None


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """What the system refuses, in a sentence that names the file."""
    try:
        yield
    except OSError as e:
        refused = OSError(f"cannot write {path} ({e.strerror or e})")
        refused.errno = e.errno
        raise refused from e


# --- before the work --------------------------------------------------------------------------------------------------


def probe(path: Path) -> None:
    """Refuse a place where no file can be written, before work is spent on what goes there.

    It is found out by writing the partial file and taking it away again; what is at `path` stays as it is.

    Raises:
        OSError: one sentence with the path and the system's reason.
    """
    with _named(path):
        place = _place(path)
        if not place.replaced:
            # opening it is no test: a pipe's reader would see one that was opened and closed
            if place.descriptor is None and not os.access(path, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            return
        if place.path.exists():
            os.close(os.open(place.path, os.O_WRONLY))
        part, file = _claim(place.path)
        assert file is not None
        with file:
            try:
                _write_all(file, BLOCK)
                sync(file)
            finally:
                part.unlink()


def probe_folder(folder: Path) -> None:
    """Refuse a folder in which no file can be written, or which cannot be made, as `probe` does; nothing stays behind."""
    with _named(folder):
        at = folder.absolute()
        while not at.exists():
            if at.is_symlink():
                raise FileNotFoundError(errno.ENOENT, f"{at} is a link to nothing")
            at = at.parent
        with tempfile.TemporaryFile(dir=at, buffering=0) as file:
            _write_all(file, BLOCK)
            sync(file)


# --- writing ----------------------------------------------------------------------------------------------------------


def write_bytes(path: Path, data: bytes | memoryview) -> None:
    """Write a file, whole or not at all; into what is no regular file. OSError in a sentence that names it."""
    with _named(path):
        place = _place(path)
        if not place.replaced:
            _write_into(place, data)
            return
    with claimed(path) as put:
        assert put is not None
        put(data)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


def save_numbers(path: Path | None, numbers: dict[str, Any]) -> None:
    """Write a command's numbers, if they were asked for: before they are printed, so that no terminal can lose them.

    One that is not finite, as the interval of a single task, is null: JSON has no other word for it.
    """
    if path is not None:
        write_json(path, _finite(numbers))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_figure(path: Path, figure: Any, dpi: int) -> None:
    """Write a matplotlib figure, in the format that the path's ending names."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format=path.suffix.removeprefix(".").lower(), dpi=dpi)
    write_bytes(path, drawn.getbuffer())


def append_text(path: Path, text: str) -> None:
    """Add to the end of a file, which is made where there is none."""
    with _named(path), appending(path) as file:
        file.write(text.encode())


def appending(path: Path) -> IO[bytes]:
    """A file opened to add to its end, which is made where there is none."""
    return open(path, "ab")


@contextmanager
def claimed(path: Path, wait: bool = True) -> Iterator[Callable[[bytes | memoryview], None] | None]:
    """The right to write a file that is regular or not there yet, for the block: a function that puts bytes in its place,
    whole or not at all. Where another process has the right, it is waited for, or without `wait` None is given."""
    with _named(path):
        place = _place(path).path
        part, file = _claim(place, wait)
    if file is None:
        yield None
        return
    named = False

    def put(data: bytes | memoryview) -> None:
        nonlocal named
        with _named(path):
            if place.exists() and (mode := place.stat().st_mode) != os.fstat(file.fileno()).st_mode:
                os.fchmod(file.fileno(), stat.S_IMODE(mode))
            _write_all(file, data)
            sync(file)
            try:
                os.replace(part, place)
                named = True
            except OSError as e:
                if e.errno != errno.EBUSY:
                    raise
                with open(place, "wb", buffering=0) as mounted:  # which has to keep its place
                    _write_all(mounted, data)
                    sync(mounted)
            sync_folder(place.parent)

    with file:
        try:
            yield put
        finally:
            if not named:
                part.unlink(missing_ok=True)


def _claim(path: Path, wait: bool = True) -> tuple[Path, FileIO | None]:
    """The new partial file of a file, empty and locked; None for it where another process writes it and `wait` is False.

    The lock ends with its holder, however that ends: one that a kill left behind is taken away.
    """
    part = path.with_name(path.name + ".part")
    while True:
        left = part.is_symlink() or part.exists()
        flags = os.O_RDWR | os.O_CLOEXEC | (os.O_NOFOLLOW if left else os.O_CREAT | os.O_EXCL)
        try:
            file = open(os.open(part, flags, 0o666), "r+b", buffering=0)  # noqa: SIM115 (the caller's)
        except FileExistsError:  # another writer came in between
            continue
        except FileNotFoundError:
            if left:  # another writer went in between
                continue
            raise
        try:
            if not _lock(file, wait):
                file.close()
                return part, None
            mine = os.path.samestat(os.fstat(file.fileno()), os.lstat(part))  # not renamed since it was opened
        except FileNotFoundError:
            mine = False
        except BaseException:
            file.close()
            raise
        if mine and not left:
            return part, file
        if mine:
            part.unlink()
        file.close()


def _write_into(place: _Place, data: bytes | memoryview) -> None:
    if place.descriptor is None:
        descriptor = os.open(place.path, os.O_WRONLY | os.O_NOCTTY)
    else:
        for stream in (sys.stdout, sys.stderr):  # what was printed before comes before
            if stream is not None:
                stream.flush()
        descriptor = os.dup(place.descriptor)
    with open(descriptor, "wb", buffering=0) as file:
        _write_all(file, data)


def _write_all(file: Any, data: bytes | memoryview) -> None:
    """All of the bytes into a file without a buffer, whose end would fail once more where the writing failed."""
    left = memoryview(data)
    while left:
        left = left[file.write(left) :]


def sync(file: IO[bytes] | FileIO) -> None:
    """Bring what was written to an open file to the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_file(path: Path) -> None:
    """Bring what was written to a file to the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Bring a folder's names to the disk, where the system lets this user do so."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(descriptor)
    except OSError as e:
        if e.errno not in NO_SYNC:
            raise
    finally:
        os.close(descriptor)


def name_folder(part: Path, final: Path) -> None:
    """Give a folder whose files are whole the name by which it is found."""
    with _named(final):
        sync_folder(part)
        os.replace(part, final)
        sync_folder(final.parent)


# --- locks ------------------------------------------------------------------------------------------------------------


def _lock(file: IO[bytes] | FileIO, wait: bool) -> bool:
    """Whether the file is locked now. On a file system without locks it always is."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as e:
        if e.errno not in NO_LOCKS:
            raise
    return True


@contextmanager
def locked(folder: Path, wait: bool = True) -> Iterator[None]:
    """Hold a folder, which is made where there is none, for the block; the lock ends with its process, too.

    Raises:
        ValueError: another process holds it, and `wait` is False. OSError: no file can be written there.
    """
    with _named(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = appending(folder / LOCK)
    with file:
        if not _lock(file, wait):
            raise ValueError(f"out: another process is at work in {folder}")
        yield
