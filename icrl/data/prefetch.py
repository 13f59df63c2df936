"""Batches 0, 1, 2, ... of a seed, made in a background thread a few ahead of their use."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from icrl_kernels import set_threads_here
from icrl_kernels.arguments import MOST_THREADS, integer

T = TypeVar("T")


class Stream(Iterator[T], Generic[T]):
    """An endless iterator whose items depend on (seed, number) alone, so that it resumes exactly.

    A subclass says how a batch is made (`_maker`).

    Args:
        prefetch: how many batches may wait; 0 makes each when it is asked for, in the caller's thread.
        threads: of the background thread's own work. More than one would contend with training's at every operator.
        name: of the thread.

    Raises (from next): whatever making the batch raised.
    """

    def __init__(self, seed: int, *, prefetch: int = 2, threads: int = 1, name: str = "stream") -> None:
        self.seed, self.prefetch = integer("seed", seed), integer("prefetch", prefetch, 0)
        self.threads, self.name = integer("threads", threads, 1, MOST_THREADS), name
        self._next = 0
        self._ready: queue.Queue[T | BaseException] | None = None
        self._close: weakref.finalize[..., Any] | None = None

    def _maker(self) -> Callable[[int], T]:
        """number -> batch. It must not hold self: the thread has it, and a forgotten stream would run for ever."""
        raise NotImplementedError

    def batch(self, index: int) -> T:
        """Batch number `index`, whatever the stream has given so far."""
        return self._maker()(integer("index", index, 0))

    def __next__(self) -> T:
        if self.prefetch == 0:
            batch = self.batch(self._next)
        else:
            if self._ready is None:
                self._start()
            assert self._ready is not None
            got = self._ready.get()
            if isinstance(got, BaseException):
                self.close()  # the next call begins anew at the same batch
                raise got
            batch = got
        self._next += 1
        return batch

    def state_dict(self) -> dict[str, int]:
        """The number of the batch that comes next, and the seed."""
        return {"seed": self.seed, "next_batch": self._next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.close()
        self.seed, self._next = state["seed"], state["next_batch"]

    def close(self) -> None:
        """Stop the thread; the next call of next starts another."""
        if self._close is not None:
            self._close()
        self._ready = self._close = None

    def _start(self) -> None:
        ready: queue.Queue[T | BaseException] = queue.Queue(self.prefetch)
        stop = threading.Event()
        args = (self._maker(), self._next, ready, stop, self.threads)
        thread = threading.Thread(target=_produce, args=args, name=self.name, daemon=True)
        thread.start()
        self._ready, self._close = ready, weakref.finalize(self, _stop, stop, thread)


def _produce(
    make: Callable[[int], T], index: int, ready: queue.Queue[T | BaseException], stop: threading.Event, threads: int
) -> None:
    set_threads_here(threads)
    while not stop.is_set():
        try:
            item: T | BaseException = make(index)
        except BaseException as error:  # goes to the consumer, which raises it
            item = error
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.1)
                break
            except queue.Full:
                continue
        if isinstance(item, BaseException):
            return
        index += 1


def _stop(stop: threading.Event, thread: threading.Thread) -> None:
    stop.set()
    thread.join()
