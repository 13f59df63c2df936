"""Checks in a forked child."""

import os
import time

import pytest


def in_child(check, seconds=60):
    """Run check in a forked child, which must end in time and find it true."""
    child = os.fork()
    if not child:
        os._exit(0 if check() else 1)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            assert status == 0, "the child found it wrong, or raised"
            return
        time.sleep(0.02)
    os.kill(child, 9)
    os.waitpid(child, 0)
    pytest.fail(f"the forked child did not end within {seconds} s")
