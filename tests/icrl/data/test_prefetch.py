"""The background stream: in a forked child, and when its thread cannot begin."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import pytest

from icrl.data.prefetch import Stream


class Numbers(Stream[int]):
    def _maker(self) -> Callable[[int], int]:
        return lambda index: index


def ended(child: int, seconds: float = 20) -> int:
    """The child's exit status; a failure where it does not end in time."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return status
        time.sleep(0.02)
    os.kill(child, 9)
    os.waitpid(child, 0)
    pytest.fail(f"the child did not end within {seconds} s")


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*")
def test_a_forked_child_goes_on_where_its_parent_was() -> None:
    stream = Numbers(0, prefetch=2)
    assert [next(stream) for _ in range(3)] == [0, 1, 2]
    child = os.fork()
    if not child:
        right = [next(stream) for _ in range(6)] == [3, 4, 5, 6, 7, 8]
        stream.close()  # its own thread, not its parent's
        right &= next(stream) == 9
        os._exit(0 if right else 1)
    assert ended(child) == 0
    assert [next(stream) for _ in range(3)] == [3, 4, 5]  # the parent's is its own
    stream.close()


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*")
def test_closing_in_a_forked_child_does_not_wait_for_the_parents_thread() -> None:
    stream = Numbers(0)
    next(stream)
    child = os.fork()
    if not child:
        stream.close()
        os._exit(0)
    assert ended(child) == 0
    stream.close()


def test_what_stops_the_thread_at_its_start_comes_out_of_next(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(threads: int) -> None:
        raise RuntimeError(f"no {threads} threads")

    monkeypatch.setattr("icrl.data.prefetch.set_threads_here", refuse)
    with pytest.raises(RuntimeError, match="no 1 threads"):
        next(Numbers(0))
