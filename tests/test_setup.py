"""The build beside an nvcc that cannot serve: stand-ins answer for the compilers, so that nothing is compiled."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pybind11")
pytest.importorskip("setuptools")
ROOT = Path(__file__).parents[1]
CXX = """#!/bin/bash
case " $* " in *" -dM "*) echo '#define __GNUC__ 13'; echo '#define __VERSION__ "13.0"'; exit;; esac
case " $* " in *" -lcudart_static "*) [ -z "$NO_CUDART" ] || { echo "ld: cannot find -lcudart_static" >&2; exit 1; };; esac
while [ $# -gt 0 ]; do case "$1" in -o) mkdir -p "$(dirname "$2")"; : > "$2";; esac; shift; done
"""
OLD = "nvcc fatal   : Unsupported gpu architecture 'compute_90a'"
HOST = "host_config.h:164:2: error: #error -- unsupported GNU version! gcc versions later than 11 are not supported!"
NVCC = """#!/bin/bash
case " $* " in *" --dryrun "*) echo '#$ LIBRARIES=  "-L/cuda/lib64"' >&2; exit;; esac
REFUSES
echo "$*" >> compiled
while [ $# -gt 0 ]; do case "$1" in -o) mkdir -p "$(dirname "$2")"; : > "$2";; esac; shift; done
"""


def build(folder: Path, nvcc: str, **environment: str) -> tuple[int, str]:
    tools = folder / "tools"
    tools.mkdir()
    for name, text in (("cxx", CXX), ("nvcc", nvcc)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    shutil.copytree(ROOT / "csrc", folder / "csrc", ignore=shutil.ignore_patterns("*.o"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "icrl_kernels/_version.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    given = {k: v for k, v in os.environ.items() if k not in ("ICRL_CUDA", "PYTHONPATH")}
    given |= {"PATH": f"{tools}:{os.environ['PATH']}", "CC": "cxx", "CXX": "cxx", **environment}
    line = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(line, cwd=folder, env=given, stdout=-1, stderr=subprocess.STDOUT, text=True)
    return done.returncode, done.stdout


REFUSALS = {
    "too old": (NVCC.replace("REFUSES", f'echo "{OLD}" >&2; exit 1'), {}, OLD),
    "host compiler": (NVCC.replace("REFUSES", f'echo "In file included from"; echo "{HOST}" >&2; exit 1'), {}, HOST),
    "no runtime library": (NVCC.replace("REFUSES", ""), {"NO_CUDART": "1"}, "ld: cannot find -lcudart_static"),
    "silent": (NVCC.replace("REFUSES", "exit 3"), {}, "ends with 3"),
    "no program": ("\x7fELF", {}, "it does not start"),
}


@pytest.mark.parametrize("case", list(REFUSALS))
@pytest.mark.parametrize("wanted", ["auto", "1"])
def test_an_nvcc_that_cannot_serve(case, wanted, tmp_path):
    nvcc, environment, why = REFUSALS[case]
    code, said = build(tmp_path, nvcc, **environment, ICRL_CUDA=wanted)
    (line,) = [line for line in said.splitlines() if why in line]
    assert f"{tmp_path}/tools/nvcc cannot build the kernels: " in line
    if wanted == "1":
        assert code != 0
        assert line.startswith("ICRL_CUDA=1, but ")
    else:
        assert code == 0, said
        assert line.startswith("icrl_kernels is built without CUDA: ")
        assert list((tmp_path / "icrl_kernels").glob("_C*.so"))
        assert not list(tmp_path.rglob("*.cu.o"))


def test_an_nvcc_that_serves(tmp_path):
    code, said = build(tmp_path, NVCC.replace("REFUSES", ""))
    assert code == 0, said
    assert "without CUDA" not in said
    assert "csrc/tabular/rollout.cu" in (tmp_path / "compiled").read_text()
    assert list(tmp_path.rglob("*.cu.o"))


def test_a_value_that_icrl_cuda_does_not_have(tmp_path):
    code, said = build(tmp_path, NVCC.replace("REFUSES", ""), ICRL_CUDA="yes")
    assert code != 0
    assert "ICRL_CUDA must be 0, 1 or auto, got 'yes'" in said
