"""How many threads work for one Python thread."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from icrl_kernels import _C, _checks


def set_threads_here(threads: int) -> None:
    """Set how many threads torch's operators and these kernels use when called from this Python thread.

    Other threads keep theirs, unlike with torch.set_num_threads, which also sets MKL's for the whole process. MKL's number
    for this thread then stays as set here, whatever torch.set_num_threads says later.
    """
    _set(threads)


@contextmanager
def threads_here(threads: int) -> Iterator[None]:
    """As `set_threads_here`, for the length of a `with` block, which must not be left by another Python thread.

    A generator that is suspended within the block leaves its caller with this number. A forked child keeps one thread.
    """
    before, process = torch.get_num_threads(), os.getpid()
    mkl = _set(threads)
    try:
        yield
    finally:
        if os.getpid() == process:
            _set(before, mkl)


def _set(threads: int, mkl: int | None = None) -> int:
    """Both libraries' numbers, MKL's the same unless given. Returns MKL's before; 0 is the process's."""
    threads = _checks.integer("threads", threads, 1, _checks.MOST_THREADS)
    torch.get_num_threads()  # torch sets a new thread's number at its first use: let it, then overrule
    return _C.set_torch_threads(threads, threads if mkl is None else mkl)
