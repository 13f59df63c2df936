"""Bytes that an op's Triton launches move, from the tensors they are given (launches.py): a lower bound on the time.

Each launch reads or writes each of its tensors once (twice where it is updated in place); a tile that is read again for
another tile of the state is taken to come from the L2 cache. The ideal reads each input of the whole call once and
writes each result once. `python -m benches.traffic` writes results/triton_traffic.json.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benches import common
from benches.launches import OPS, Call, Launch, record

BANDWIDTH = 4.3e12  # bytes per second, the copy ceiling of an H200
SHAPES = [(8, 16384, 4, 128), (8, 16384, 32, 128), (8, 16384, 32, 64), (1, 131072, 8, 128)]  # B, T, H, K = V


def _bytes(tensors) -> int:
    distinct = {id(x): x for x in tensors if isinstance(x, Tensor)}
    return sum(x.numel() * x.element_size() for x in distinct.values())


def launch_bytes(call: Call, launch: Launch) -> int:
    if call.idle(launch):
        return 0
    updated = [launch.values[a] for kernel, a in call.updated if kernel == launch.kernel.__name__]
    return _bytes(launch.values.values()) + _bytes(updated)


def row(call: Call, B: int, T: int, H: int) -> dict:
    launches, result = record(call)
    results = result if isinstance(result, tuple) else (result,)
    moved = sum(launch_bytes(call, x) for x in launches)
    ideal = _bytes([*call.args, *results])
    if call.kind == "step":
        ideal += _bytes([a for a in call.args if isinstance(a, Tensor) and a.dim() == 4])  # the state is read too
    working = [x for x in launches if not call.idle(x)]
    return {
        "op": call.op,
        "call": call.kind,
        **call.label,
        "B": B,
        "T": 1 if call.kind == "step" else T,
        "H": H,
        "launches": len(working),
        "idle_launches": len(launches) - len(working),
        "bytes_per_token": round(moved / call.tokens, 1),
        "ideal_bytes_per_token": round(ideal / call.tokens, 1),
        "floor_ms": round(moved / BANDWIDTH * 1e3, 4),
        "ideal_floor_ms": round(ideal / BANDWIDTH * 1e3, 4),
        "by_launch": [f"{x.kernel.__name__} {launch_bytes(call, x) / call.tokens:.0f}" for x in working],
    }


def rows(ops: list[str]) -> list[dict]:
    return [
        row(call, B, T, H) for op in ops for B, T, H, size in SHAPES for call in OPS[op](B, T, H, size, torch.bfloat16)
    ]


if __name__ == "__main__":
    table = rows(list(OPS))
    for r in table:
        print(*(f"{v}" if isinstance(v, str) else f"{k}={v}" for k, v in r.items()))
    print(common.write("triton_traffic", table, note="counted, not timed", bandwidth=BANDWIDTH))
