"""Every op's Triton launches without a GPU: the launchers run on meta tensors, a recorder in the place of each kernel.

An op adds a function to OPS that yields its Calls at a shape; aot_report.py compiles what is launched, traffic.py counts
its bytes.
"""

from __future__ import annotations

import contextlib
import os

os.environ["TRITON_INTERPRET"] = "0"

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).parents[1]))
from icrl_kernels.linear_attention.triton import gated_delta_rule, gla, gsa, rwkv7


class Launch(NamedTuple):
    kernel: JITFunction
    grid: tuple[int, ...]
    values: dict[str, Any]  # every argument of the kernel by name
    constants: dict[str, Any]  # those given by keyword, which are compile-time constants
    options: dict[str, int]  # num_warps, num_stages


@dataclass(frozen=True)
class Call:
    op: str
    kind: str  # forward, backward, step
    label: dict[str, Any]  # the case: dtype, sizes, gate
    module: ModuleType  # whose kernels are recorded
    function: Callable
    args: tuple
    tokens: int
    updated: frozenset[tuple[str, str]] = field(default=frozenset())  # (kernel, argument) read and written in place
    idle: Callable[[Launch], bool] = lambda launch: False  # launches that return at once on ordinary inputs


@contextlib.contextmanager
def _recording(module: ModuleType, launches: list[Launch]) -> Iterator[None]:
    class Recorder:
        def __init__(self, kernel: JITFunction):
            self.kernel = kernel

        def __getitem__(self, grid):
            def launch(*args, num_warps: int = 4, num_stages: int = 3, **constants):
                values = dict(zip(self.kernel.arg_names, args, strict=False))
                twice, missing = (
                    values.keys() & constants,
                    set(self.kernel.arg_names) - values.keys() - constants.keys(),
                )
                if twice or missing or len(args) > len(self.kernel.arg_names):
                    raise TypeError(f"{self.kernel.__name__}: given twice {twice}, missing {missing}")
                values |= constants
                options = {"num_warps": num_warps, "num_stages": num_stages}
                launches.append(Launch(self.kernel, grid, values, constants, options))

            return launch

    kernels = {name: x for name, x in vars(module).items() if isinstance(x, JITFunction)}
    for name, kernel in kernels.items():
        setattr(module, name, Recorder(kernel))
    try:
        yield
    finally:
        for name, kernel in kernels.items():
            setattr(module, name, kernel)


def record(call: Call) -> tuple[list[Launch], Any]:
    """The launches of a call, in order, and what it returns."""
    launches: list[Launch] = []
    with _recording(call.module, launches):
        result = call.function(*call.args)
    return launches, result


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def gla_calls(B: int, T: int, H: int, size: int, dtype: torch.dtype) -> Iterator[Call]:
    for gate, name in enumerate(("none", "head", "channel")):
        label = {"dtype": str(dtype)[6:], "K": size, "V": size, "gate": name}
        q, k, v, do = (meta(B, T, H, size, dtype=dtype) for _ in range(4))
        g = None if gate == 0 else meta(*(B, T, H, size)[: gate + 2])
        state = meta(B, H, size, size)
        token = (q[:, 0], k[:, 0], v[:, 0], None if g is None else g[:, 0], state, 0.1)
        updated = {("_scan", "states"), ("_step", "state")} | ({("_grad_kv", "z")} if gate == 2 else set())
        more = {
            "updated": frozenset(updated),
            "idle": lambda launch: launch.values.get("ANY", False),
        }
        inputs = (q, k, v, g, 0.1, state, None)
        yield Call("gla", "forward", label, gla, gla.forward, inputs, B * T, **more)
        yield Call("gla", "backward", label, gla, gla.backward, (do, state, *inputs), B * T, **more)
        yield Call("gla", "step", label, gla, gla.step, token, B, **more)


def gsa_calls(B: int, T: int, H: int, size: int, dtype: torch.dtype) -> Iterator[Call]:
    M = 64
    for gate in ("none", "slot"):
        label = {"dtype": str(dtype)[6:], "K": size, "V": size, "M": M, "gate": gate}
        q, k, v, do = (meta(B, T, H, size, dtype=dtype) for _ in range(4))
        s = meta(B, T, H, M, dtype=dtype)
        g = None if gate == "none" else meta(B, T, H, M)
        states = meta(B, H, size, M), meta(B, H, M, size)
        token = (*(None if x is None else x[:, 0] for x in (q, k, v, s, g)), *states, 0.1)
        more = {
            "updated": frozenset(
                [("_scan", "states1"), ("_scan", "states2"), ("_step", "keys"), ("_step", "values"), ("_grad_kv", "dg")]
            ),
            "idle": lambda launch: launch.values.get("ANY", False),
        }
        inputs = (q, k, v, s, g, 0.1, *states, None)
        yield Call("gsa", "forward", label, gsa, gsa.forward, inputs, B * T, **more)
        yield Call("gsa", "backward", label, gsa, gsa.backward, (do, *states, *inputs), B * T, **more)
        yield Call("gsa", "step", label, gsa, gsa.step, token, B, **more)


def gated_delta_rule_calls(B: int, T: int, H: int, size: int, dtype: torch.dtype) -> Iterator[Call]:
    for gate, name in enumerate(("none", "head", "channel")):
        label = {"dtype": str(dtype)[6:], "K": size, "V": size, "gate": name}
        q, k, v, do = (meta(B, T, H, size, dtype=dtype) for _ in range(4))
        g = None if gate == 0 else meta(*(B, T, H, size)[: gate + 2])
        beta, state = meta(B, T, H), meta(B, H, size, size)
        token = (*(None if x is None else x[:, 0] for x in (q, k, v, g, beta)), state, 0.1, False)
        more = {
            "updated": frozenset({("_step", "state")}),
            "idle": lambda launch: launch.values.get("ANY", False),
        }
        inputs = (q, k, v, g, beta, 0.1, state, None, False)
        module = gated_delta_rule
        yield Call("gated_delta_rule", "forward", label, module, module.forward, inputs, B * T, **more)
        yield Call("gated_delta_rule", "backward", label, module, module.backward, (do, state, *inputs), B * T, **more)
        yield Call("gated_delta_rule", "step", label, module, module.step, token, B, **more)


def rwkv7_calls(B: int, T: int, H: int, size: int, dtype: torch.dtype) -> Iterator[Call]:
    label = {"dtype": str(dtype)[6:], "K": size, "V": size, "gate": "channel"}
    r, k, v, a, b, do = (meta(B, T, H, size, dtype=dtype) for _ in range(6))
    w, state = meta(B, T, H, size), meta(B, H, size, size)
    more = {
        "updated": frozenset({("_step", "state")}),
        "idle": lambda launch: launch.values.get("ANY", False),
    }
    inputs = (r, w, k, v, a, b, 0.1, state, None)
    token = (*(x[:, 0] for x in (r, w, k, v, a, b)), state, 0.1)
    yield Call("rwkv7", "forward", label, rwkv7, rwkv7.forward, inputs, B * T, **more)
    yield Call("rwkv7", "backward", label, rwkv7, rwkv7.backward, (do, state, *inputs), B * T, **more)
    yield Call("rwkv7", "step", label, rwkv7, rwkv7.step, token, B, **more)


OPS: dict[str, Callable[[int, int, int, int, torch.dtype], Iterator[Call]]] = {
    "gla": gla_calls,
    "gsa": gsa_calls,
    "gated_delta_rule": gated_delta_rule_calls,
    "rwkv7": rwkv7_calls,
}
