"""What ptxas makes of the Triton kernels of gla for Hopper, with no GPU: registers, spills, shared memory, products.

The launchers run on meta tensors, and a recorder in place of each kernel compiles it with the arguments it is given:
what is reported is what would be launched. `python -m benches.aot_report [K ...]` writes results/gla_triton_aot.json.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "0"

import collections
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).parents[1]))
from benches import common
from icrl_kernels._triton import gla

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
KERNELS = ("_local_states", "_scan", "_outputs", "_grad_q", "_grad_kv", "_step")
TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
SHARED_LIMIT = 232448  # bytes a block of compute capability 9.0 can have


class Recorder:
    """Stands for a kernel: `recorder[grid](...)` compiles for sm_90 and appends a row."""

    def __init__(self, kernel, rows: list[dict], label: dict):
        self.kernel, self.rows, self.label = kernel, rows, label

    def __getitem__(self, grid):
        return self.compile

    def compile(self, *args, num_warps: int = 4, num_stages: int = 3, **constants):
        names = self.kernel.arg_names
        values = dict(zip(names, args, strict=False)) | constants
        signature, fixed, attributes = {}, {}, {}
        for i, name in enumerate(names):
            x = values[name]
            if isinstance(x, torch.Tensor):
                signature[name], attributes[(i,)] = TYPES[x.dtype], [["tt.divisibility", 16]]
            elif x is None or name in constants:
                signature[name], fixed[(i,)] = "constexpr", x
            else:
                signature[name] = "fp32" if isinstance(x, float) else "i32"
        source = ASTSource(self.kernel, signature, fixed, attributes)
        options = {"num_warps": num_warps, "num_stages": num_stages}
        built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        tile = {k: constants[k] for k in ("BK", "BV", "REVERSE", "DK", "DV", "ANY") if k in constants}
        self.rows.append({**self.label, "kernel": self.kernel.__name__, **tile, **options, **report(built)})


def report(built) -> dict:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(built.asm["cubin"])
        f.flush()
        usage = subprocess.check_output(
            [TOOLS / "cuobjdump", "-res-usage", f.name], text=True, stderr=subprocess.STDOUT
        )
        sass = subprocess.check_output([TOOLS / "cuobjdump", "-sass", f.name], text=True)
    ops = collections.Counter(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z0-9]+)", sass, re.MULTILINE))
    registers = re.search(r"REG:(\d+)", usage)
    if registers is None:
        raise RuntimeError(f"cuobjdump printed no register count: {usage}")
    return {
        "registers": int(registers[1]),
        "spill_stores": ops["STL"],
        "spill_loads": ops["LDL"],
        "shared_bytes": built.metadata.shared,
        "fits": built.metadata.shared <= SHARED_LIMIT,
        "HGMMA": ops["HGMMA"],
        "HMMA": ops["HMMA"],
        "instructions": sum(ops.values()),
    }


def cases(sizes: list[int], dtypes: tuple[torch.dtype, ...]) -> list[dict]:
    rows: list[dict] = []
    kernels = {name: getattr(gla, name) for name in KERNELS}
    for dtype in dtypes:
        for size in sizes:
            for gate in (0, 1, 2):
                for name, kernel in kernels.items():
                    label = {"dtype": str(dtype)[6:], "K": size, "V": size, "gate": ("none", "head", "channel")[gate]}
                    setattr(gla, name, Recorder(kernel, rows, label))
                shape = (2, 4096, 4, size)
                q, k, v, do = (torch.empty(shape, dtype=dtype, device="meta") for _ in range(4))
                g = None if gate == 0 else torch.empty(shape[: gate + 2], device="meta")
                state = torch.empty(2, 4, size, size, device="meta")
                gla.forward(q, k, v, g, 0.1, state, None)
                gla.backward(do, state, q, k, v, g, 0.1, state, None)
                gla.step(q[:, 0], k[:, 0], v[:, 0], None if g is None else g[:, 0], state, 0.1)
    for name, kernel in kernels.items():
        setattr(gla, name, kernel)
    return [dict(x) for x in dict.fromkeys(tuple(r.items()) for r in rows)]


if __name__ == "__main__":
    rows = cases([int(x) for x in sys.argv[1:]] or [64, 128], (torch.bfloat16,))
    for r in rows:
        print(*(f"{v}" if isinstance(v, str) else f"{k}={v}" for k, v in r.items()))
    print(common.write("gla_triton_aot", rows, triton=triton.__version__, target="sm_90"))
