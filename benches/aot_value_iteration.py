"""What the compilers make of value_iteration's GPU kernels for Hopper, with no GPU: `python -m benches.aot_value_iteration`.

results/value_iteration_cuda_aot.json: registers, spills and instructions of the CUDA C++ kernels (nvcc), and how many
sampled AnyMDP tasks fit the shared memory of so many blocks a processor, as counted on the host.
results/value_iteration_triton_aot.json: as aot_report.py, for the Triton kernels.
"""

from __future__ import annotations

import collections
import importlib
import re
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import pybind11
import torch
import triton

from benches import common
from benches.aot_report import TOOLS, TYPES, compiled
from benches.launches import Call, meta, record
from icrl.worlds import sample_anymdp
from icrl_kernels import _C, pack_transition
from icrl_kernels.tabular import value_iteration_triton as kernels

CSRC = Path(__file__).parents[1] / "csrc"
OPCODES = ("DFMA", "DADD", "DMUL", "F2F", "LDS", "LDG", "LD", "LDL", "STL", "SHFL", "BAR", "MUFU")
PROCESSOR, RESERVED, OWN = 228 << 10, 1 << 10, 512  # bytes of shared memory: a processor's, a block's, the kernel's


def triton_rows() -> list[dict]:
    TYPES[torch.float64] = "*fp64"
    rows, seen = [], set()
    for states in (16, 128, 1024):
        for packed in (True, False):
            n, a, g = 64, 5, 3
            table = meta(10**6) if packed else meta(n, states, a, states)
            windows = [meta(n, states, a, dtype=x) for x in (torch.int64, torch.int32, torch.int32)] if packed else []
            args = (table, table, windows, None, n, states, a)
            label = {"states": states, "packed": packed}
            launches, made = record(Call("value_iteration", "prepare", label, kernels, kernels.prepare, args, n))
            start, low, count, mean = made[:4]
            out = (
                *(meta(n, g, states, a, dtype=torch.float64), meta(n, g, states, dtype=torch.float64)),
                *(
                    meta(n, g, states, dtype=torch.int64),
                    meta(n, g, dtype=torch.float64),
                    meta(n, g, dtype=torch.int64),
                ),
            )
            widest = int(1.6 * states**0.5) if packed else states
            facts = meta(n, g, 6, dtype=torch.float64)
            args = (table, start, low, count, mean, facts, widest, 20, 100_000, out)
            launches += record(Call("value_iteration", "solve", label, kernels, kernels.solve, args, n))[0]
            for launch in launches:
                row = {"kernel": launch.kernel.__name__, **launch.constants, **launch.options}
                if str(row) in seen:
                    continue
                seen.add(str(row))
                rows.append({**label, **row, **compiled(launch)})
                print(rows[-1])
    return rows


def cuda_rows() -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        cubin = f"{folder}/value_iteration.cubin"
        include = [f"-I{x}" for x in (CSRC, pybind11.get_include(), sysconfig.get_paths()["include"])]
        source = str(CSRC / "tabular/value_iteration.cu")
        command = ["nvcc", "-cubin", "-arch=sm_90a", "-O3", "-std=c++17", "-Xptxas=-v", *include, source, "-o", cubin]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        sass = subprocess.run([TOOLS / "cuobjdump", "-sass", cubin], capture_output=True, text=True, check=True).stdout
    code = {}
    for part in sass.split("Function : ")[1:]:
        ops = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z0-9]+)", part, re.MULTILINE)
        code[part.split(None, 1)[0]] = collections.Counter(ops)
    rows = []
    for name, spills, used in re.findall(
        r"Compiling entry function '(\w+)'.*?\n(.*spill.*)\n.*Used (\d+) registers",
        log.replace("\nptxas info    : Func", "; Func"),
    ):
        kind = re.search(r"solve_kernelI([fd])Li(\d+)ELb([01])", name)
        if kind is None:
            raise RuntimeError(f"an unknown kernel: {name}")
        stores, loads = map(int, re.findall(r"(\d+) bytes spill", spills))
        rows.append(
            {
                "table": {"f": "float32", "d": "float64"}[kind[1]],
                "threads": int(kind[2]),
                "resident": kind[3] == "1",
                "registers": int(used),
                "spill_store_bytes": stores,
                "spill_load_bytes": loads,
                "instructions": sum(code[name].values()),
                **{x: code[name][x] for x in OPCODES},
            }
        )
        print(rows[-1])
    return rows


def memory_rows(tasks: int = 12) -> list[dict]:
    """The share of sampled AnyMDP tasks that is solved in the shared memory of a block, so many blocks a processor."""
    solver = importlib.import_module("icrl_kernels.tabular.value_iteration")
    discounts = torch.tensor([0.5, 0.93, 0.994], dtype=torch.float64)
    rows: list[dict[str, Any]] = []
    for states in (16, 32, 64, 128):
        batch = sample_anymdp(tasks, states, 5, seed=1)
        table, reward = pack_transition(batch.transition, batch.reward)
        for blocks in {16: (32,), 32: (20, 16, 14), 64: (8, 7, 6), 128: (4, 3, 2)}[states]:
            room = (PROCESSOR // blocks - RESERVED) // 16 * 16 - OWN
            unfit = []
            solver._compiled(
                lambda *x, room=room, unfit=unfit: unfit.append(_C.value_iteration_cuda_host_check(*x, room, 32, 0)),
                *(table[0], reward, list(table[1:]), discounts, batch.terminal, None, 1e-6, "auto"),
                ascending=True,
            )
            rows.append({"states": states, "blocks_per_processor": blocks, "bytes": room, "fit": 1 - unfit[0] / tasks})
            print(rows[-1])
            if not unfit[0]:
                break
    return rows


if __name__ == "__main__":
    note = "not measured on a GPU yet"
    common.write("value_iteration_triton_aot", triton_rows(), triton=triton.__version__, target="sm_90", note=note)
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout.split()[-1]
    memory = memory_rows()
    common.write("value_iteration_cuda_aot", cuda_rows(), memory=memory, nvcc=version, target="sm_90a", note=note)
