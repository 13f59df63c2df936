"""The background stream: in a forked child, and when its thread cannot begin."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from forks import in_child

from icrl.data.prefetch import Stream


class Numbers(Stream[int]):
    def _maker(self) -> Callable[[int], int]:
        return lambda index: index


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*")
def test_a_forked_child_goes_on_where_its_parent_was() -> None:
    stream = Numbers(0, prefetch=2)
    assert [next(stream) for _ in range(3)] == [0, 1, 2]

    def goes_on() -> bool:
        right = [next(stream) for _ in range(6)] == [3, 4, 5, 6, 7, 8]
        stream.close()  # its own thread, not its parent's
        return right and next(stream) == 9

    in_child(goes_on)
    assert [next(stream) for _ in range(3)] == [3, 4, 5]  # the parent's is its own
    stream.close()


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*")
def test_closing_in_a_forked_child_does_not_wait_for_the_parents_thread() -> None:
    stream = Numbers(0)
    next(stream)
    in_child(lambda: stream.close() is None)
    stream.close()


def test_what_stops_the_thread_at_its_start_comes_out_of_next(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(threads: int) -> None:
        raise RuntimeError(f"no {threads} threads")

    monkeypatch.setattr("icrl.data.prefetch.set_threads_here", refuse)
    with pytest.raises(RuntimeError, match="no 1 threads"):
        next(Numbers(0))
