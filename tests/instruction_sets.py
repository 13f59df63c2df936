"""Checks by kernels of one instruction set: a process of its own, as a process keeps to the set that it began with."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from icrl_kernels import _C

ISAS = ("generic", "avx2", "avx512")


def check_with(isa: str, file: str, script: str) -> None:
    """Run `script`, which finds all names of the test file `file`, by kernels of an instruction set; skips where there is none."""
    if ISAS.index(isa) > ISAS.index(_C.isa()):
        pytest.skip(f"this processor, or ICRL_ISA, has {_C.isa()} at most")
    here, shared, package = Path(file), Path(__file__).parent, Path(_C.__file__).parents[1]
    lines = ["from icrl_kernels import _C", f"assert _C.isa() == {isa!r}", f"from {here.stem} import *", script]
    path = os.pathsep.join(map(str, (here.parent, shared, package)))
    env = {**os.environ, "ICRL_ISA": isa, "PYTHONPATH": path}
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True, env=env, cwd=here.parent)
