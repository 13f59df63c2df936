"""What ptxas makes of an op's Triton kernels for Hopper, with no GPU: registers, spills, shared memory, products.

Compiled is what the launchers would launch (launches.py). `python -m benches.aot_report [OP [K ...]]` writes
results/OP_triton_aot.json.
"""

from __future__ import annotations

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

from benches import common
from benches.launches import OPS, Launch, record

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
SHARED_LIMIT = 232448  # bytes a block of compute capability 9.0 can have
HIDDEN = {"K", "V", "M", "C", "DT", "PREC"}  # constants that the label holds or that follow from it


def compiled(launch: Launch) -> dict:
    signature, fixed, attributes = {}, {}, {}
    for i, name in enumerate(launch.kernel.arg_names):
        x = launch.values[name]
        if isinstance(x, torch.Tensor):
            signature[name], attributes[(i,)] = TYPES[x.dtype], [["tt.divisibility", 16]]
        elif x is None or name in launch.constants:
            signature[name], fixed[(i,)] = "constexpr", x
        else:
            signature[name] = "fp32" if isinstance(x, float) else "i32"
    source = ASTSource(launch.kernel, signature, fixed, attributes)
    return report(triton.compile(source, target=GPUTarget("cuda", 90, 32), options=launch.options))


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


def rows(op: str, sizes: list[int], dtype: torch.dtype) -> list[dict]:
    """A row for each distinct kernel of the op, at shapes that fill the chip with heads (B·H = 256) and that do not."""
    seen: dict[str, dict] = {}
    for size in sizes:
        for B in (1, 64):
            for call in OPS[op](B, 4096, 4, size, dtype):
                for launch in record(call)[0]:
                    tile = {k: v for k, v in launch.constants.items() if k not in HIDDEN}
                    absent = " ".join(k for k, v in launch.values.items() if v is None)  # compiled without
                    row = {**call.label, "kernel": launch.kernel.__name__, **tile, "absent": absent, **launch.options}
                    if str(row) not in seen:
                        seen[str(row)] = row | compiled(launch)
                        print(*(f"{v}" if isinstance(v, str) else f"{k}={v}" for k, v in seen[str(row)].items()))
    return list(seen.values())


if __name__ == "__main__":
    op, *sizes = sys.argv[1:] or ["gla"]
    table = rows(op, [int(x) for x in sizes] or [64, 128], torch.bfloat16)
    print(common.write(f"{op}_triton_aot", table, triton=triton.__version__, target="sm_90"))
