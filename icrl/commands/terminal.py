"""The process of a command: its standard streams, its terminal, and how it ends."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import FrameType
from typing import Any, TextIO

READER_LEFT = 128 + 13  # what a shell says of a program that SIGPIPE ended
INTERRUPTED = 128 + 2  # and of one that SIGINT ended
INTERRUPTED_LINE = "\nicrl: interrupted"  # below a progress bar
NARROWEST, WIDEST = 40, 1000  # columns; help in fewer never ends, and a progress bar fills all that there are


def interrupt(number: int, frame: FrameType | None) -> None:
    """SIGINT's handler: KeyboardInterrupt, but where a module is being imported the end, as C++ that is cut short there
    may abort the process or forget the interrupt."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            with suppress(OSError):  # of a stderr that is closed
                os.write(2, f"{INTERRUPTED_LINE}\n".encode())
            os._exit(INTERRUPTED)
        frame = frame.f_back
    raise KeyboardInterrupt


class Stream:
    """A standard stream that stops no work: what can no longer be written, as its reader left (`| head`) or its disk is
    full, is dropped. A character that its encoding lacks is written as "?".
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.error: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        text = text.encode(encoding, "replace").decode(encoding)
        try:
            return self._stream.write(text)
        except OSError as e:
            self._drop(e)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as e:
            self._drop(e)

    def _drop(self, error: OSError) -> None:
        """Lead the stream nowhere from here on, with what waits in it."""
        self.error = error
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._stream.fileno())
        os.close(null)
        self._stream.flush()


@contextmanager
def streams() -> Iterator[tuple[Stream, ...]]:
    """stdout and stderr as `Stream`s within the block. One that was closed (`>&-`) leads nowhere, and no file that is
    opened later takes its number."""
    before = sys.stdout, sys.stderr
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number: this one
    with ExitStack() as opened:
        found = tuple(Stream(s or opened.enter_context(open(os.devnull, "w"))) for s in before)
        sys.stdout, sys.stderr = found
        try:
            yield found
        finally:
            sys.stdout, sys.stderr = before


@contextmanager
def environment() -> Iterator[None]:
    """Environment variables that a command of this process cannot follow are others within the block: COLUMNS of a terminal
    too narrow or too wide, colours where NO_COLOR is set, and MPLBACKEND, as pictures go to files."""
    before = dict(os.environ)
    columns = shutil.get_terminal_size().columns
    if not NARROWEST <= columns <= WIDEST:
        os.environ["COLUMNS"] = str(min(max(columns, NARROWEST), WIDEST))
    if before.get("NO_COLOR"):
        os.environ["TERM"] = "dumb"
    os.environ.pop("MPLBACKEND", None)
    try:
        yield
    finally:
        for name in ("COLUMNS", "TERM", "MPLBACKEND"):
            if name in before:
                os.environ[name] = before[name]
            else:
                os.environ.pop(name, None)


def check_folder() -> None:
    """ValueError where the working directory was deleted: torch would end the process at its import."""
    try:
        os.getcwd()
    except FileNotFoundError as e:
        raise ValueError("the working directory was deleted; change to one that exists") from e
