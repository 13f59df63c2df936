"""How the process of a command waits for its own threads, on a machine that others use too. Imports no torch."""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys

SPINS = "2000"  # of libgomp's threads, instead of 300,000
SLICE = 100_000  # nanoseconds, the least that the system takes
SETATTR = {"x86_64": 314, "aarch64": 274}  # numbers of the system call sched_setattr(2)


def share_the_machine() -> None:
    """Bound how long torch's threads spin for work, and have them woken soon, where the user has not said how they wait.

    Every parallel operator ends when all threads have come. Beside busy processes one that spins keeps another from its
    core, and one that sleeps gets a core when a time slice of the other process ends; those that ask for short slices get it
    earlier (Linux 6.12 and later). libgomp reads its variable when torch is first imported: here, before that.
    `python -m benches.contention` measures it.
    """
    if "torch" in sys.modules or {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        return
    os.environ["GOMP_SPINCOUNT"] = SPINS
    number = SETATTR.get(platform.machine())
    if sys.platform == "linux" and number is not None and os.sched_getscheduler(0) == os.SCHED_OTHER:
        # size, policy, flags, nice, priority, runtime, deadline, period; a system that knows no slices ignores this
        nice = os.getpriority(os.PRIO_PROCESS, 0)
        attributes = struct.pack("<IIQiIQQQ", 48, os.SCHED_OTHER, 0, nice, 0, SLICE, 0, 0)
        ctypes.CDLL(None).syscall(number, 0, attributes, 0)
