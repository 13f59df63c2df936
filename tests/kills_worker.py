"""A process that has imported all that commands need and computed nothing, so that a start of a command costs a fork.

It reads a line of JSON for each start, [arguments, seconds after which it is killed or null, file of its output], and answers
with one, [exit status, seconds]. A status of -9 is a kill.
"""

import json
import os
import signal
import sys
import time
import traceback

import torch
from torch.utils.tensorboard import SummaryWriter  # noqa: F401 (imported here, once)

from icrl.cli import COMMANDS, main
from icrl.commands import context, dataset, demo, evaluate, offline, train, worlds  # noqa: F401
from icrl.offline.jobs import _end_with_parent


def start(args: list[str], log: str) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        _end_with_parent()
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        torch.set_num_threads(1)
        code = main(args)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def ended(pid: int, seconds: float | None) -> int:
    end = None if seconds is None else time.monotonic() + seconds
    while end is None or time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG if end else 0)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


if __name__ == "__main__":
    assert COMMANDS
    print("ready", flush=True)
    for line in sys.stdin:
        args, seconds, log = json.loads(line)
        began = time.monotonic()
        status = ended(start(args, log), seconds)
        print(json.dumps([status, time.monotonic() - began]), flush=True)
