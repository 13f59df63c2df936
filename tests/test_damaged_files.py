"""Thousands of damaged files, of every kind that icrl reads: each is refused in a line that names it, or is what was saved.

They are read in a process of their own, which may take a gigabyte beside what it has.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from icrl_kernels import _C

HERE = Path(__file__).parent


def judged(folder, count, seed):
    where = str(Path(_C.__file__).parents[1])  # of the package under test, which may be an installed one
    command = [sys.executable, str(HERE / "damaged_files.py"), str(folder), str(count), str(seed)]
    environment = {**os.environ, "PYTHONPATH": where, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["count"] == count
    assert found["faults"] == []
    return found["outcomes"]


def refused(outcomes):
    return sum(kind.get("refused", 0) for kind in outcomes.values())


def test_hundreds_of_damaged_files(tmp_path):
    outcomes = judged(tmp_path, 351, 0)  # each way to damage a file, of each kind
    assert all(sum(kind.values()) == 13 for kind in outcomes.values())
    assert all(kind.get("refused", 0) for kind in outcomes.values())
    assert refused(outcomes) > 250


@pytest.mark.slow
def test_thousands_of_damaged_files(tmp_path):
    outcomes = judged(tmp_path, 3510, 1)
    print(outcomes)
    assert refused(outcomes) > 2000
