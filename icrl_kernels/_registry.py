"""The torch.library handle, and how an op is defined and its backend chosen.

Every op has a schema `torch.ops.icrl.<op>` with `str backend` ("auto" or a name), after which only arguments with a default
stand. Its `check` runs once per call, before any backend, for the public function and for `torch.ops.icrl.<op>` alike. An
explicit backend that cannot serve raises: nothing falls back in silence.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from icrl_kernels import _C, _checks

LIBRARY = torch.library.Library("icrl", "FRAGMENT")
NOT_DENSE = [f"{kind}{device}" for kind in ("Sparse", "SparseCsr", "NestedTensor") for device in ("CPU", "CUDA")]
NOT_DENSE += [
    "SparseMeta",
    "QuantizedCPU",
    "QuantizedCUDA",
    "MkldnnCPU",
    "AutogradNestedTensor",
]  # torch's dispatch keys


@dataclass(frozen=True)
class Backend:
    """A way to compute an op.

    devices: the device types that it serves. run: `run(found, *arguments)` with what `check` returned and the op's
    arguments but `backend`. missing: says why this installation lacks the backend, None where it is there.
    """

    devices: tuple[str, ...]
    run: Callable[..., Any]
    missing: Callable[[], str | None] | None = None


def no_cuda() -> str | None:
    return None if _C.with_cuda else "this build has no CUDA; build with ICRL_CUDA=1"


@functools.cache
def no_triton() -> str | None:
    try:
        found = importlib.util.find_spec("triton")
    except ValueError:  # a module without a spec stands in for it
        found = None
    return None if found else "Triton is not installed (pip install triton)"


BACKENDS: dict[str, dict[str, Backend]] = {}  # by op; the first listed that serves a device is its "auto"


def define(
    schema: str,
    backends: dict[str, Backend],
    fake: Callable[..., Any],
    check: Callable[..., Any],
    values: Callable[..., None] | None = None,
) -> None:
    """Define `icrl::<schema>`, which must have `str backend`, last but for arguments with a default.

    Args:
        fake: `fake(found, *arguments)` returns empty outputs on the inputs' device.
        check: `check(*arguments)` raises ValueError, naming the argument, for shapes, dtypes, devices and layouts other
            than the op's; it reads no values. What it returns (sizes, say) is `found`.
        values: `values(found, *arguments)` raises for values, and is called for CPU tensors alone: on a GPU the host would
            have to wait, and a graph could not be captured.
    """
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    BACKENDS[name] = backends
    declared = [a.rsplit(" ", 1) for a in schema[len(name) + 1 : schema.rindex(") ->")].split(", ")]  # type and name
    place = declared.index(["str", "backend"])
    written = [i for i, (kind, _) in enumerate(declared) if "!" in kind]
    # the dispatcher takes None for a tensor that is not optional
    required = [
        (i, n) for i, (kind, n) in enumerate(declared) if kind.startswith("Tensor") and not kind.endswith(("?", "[]"))
    ]

    def checked(*arguments: Any) -> Any:
        for i, argument in required:
            if arguments[i] is None:
                raise ValueError(f"{argument}: wanted a tensor, got None")
        return check(*arguments)

    def run(device: str, *args: Any) -> Any:
        arguments = (*args[:place], *args[place + 1 :])
        found = checked(*arguments)
        backend = resolve(name, device, args[place])[1]
        if values is not None and device == "cpu":
            values(found, *arguments)
        result = backend.run(found, *arguments)
        if written:  # so that a graph that saved the tensor before refuses to use it
            changed = []
            for i in written:
                changed += args[i] if isinstance(args[i], (list, tuple)) else [args[i]]
            torch.autograd.graph.increment_version([t for t in changed if isinstance(t, torch.Tensor)])
        return result

    LIBRARY.impl(name, lambda *args: run("cpu", *args), "CPU")
    LIBRARY.impl(name, lambda *args: run("cuda", *args), "CUDA")

    def refuse(*args: Any) -> NoReturn:
        for (kind, named), x in zip(declared, args, strict=False):  # those left to their defaults are not among them
            argument = named.split("=")[0]
            if kind.startswith("Tensor"):
                many = isinstance(x, (list, tuple))
                for i, tensor in enumerate(x if many else [x]):
                    if tensor is not None:
                        _checks.dense(f"{argument}[{i}]" if many else argument, tensor)
        raise NotImplementedError(f"icrl::{name} serves CPU and CUDA tensors")

    for kind in NOT_DENSE:
        LIBRARY.impl(name, refuse, kind)

    def traced(*args: Any) -> Any:
        arguments = (*args[:place], *args[place + 1 :])
        return fake(checked(*arguments), *arguments)

    torch.library.register_fake(f"icrl::{name}", traced, lib=LIBRARY)


def resolve(op: str, device_type: str, backend: str = "auto") -> tuple[str, Backend]:
    """The backend and its name that serves `op` on this device type; ValueError says what there is.

    Under TRITON_INTERPRET=1 an explicit backend="triton" serves the CPU too, by Triton's interpreter.
    """
    table = BACKENDS[op]
    if backend == "auto":
        for name, entry in table.items():
            if device_type in entry.devices and (entry.missing is None or entry.missing() is None):
                return name, entry
        serving = {n: e.missing for n, e in table.items() if device_type in e.devices and e.missing is not None}
        why = "; ".join(f"{n}: {missing()}" for n, missing in serving.items())
        raise ValueError(f"backend: {op} has none for device type {device_type!r}" + (f" ({why})" if why else ""))
    entry = table.get(backend)
    if entry is None:
        raise ValueError(f"backend: {op} has {', '.join(table)} (or 'auto'), got {backend!r}")
    if entry.missing is not None and (why := entry.missing()) is not None:
        raise ValueError(f"backend: {backend!r} cannot serve {op} here: {why}")
    interpreted = backend == "triton" and device_type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    if device_type not in entry.devices and not interpreted:
        raise ValueError(
            f"backend={backend!r} serves {op} on {', '.join(entry.devices)}, but the tensors are on {device_type!r}"
        )
    return backend, entry
