"""The torch.library handle, and how a backend is chosen for an op.

Every op has a schema `torch.ops.icrl.<op>` with a `str backend` argument ("auto" or a name). An explicit name that cannot
serve the device raises: nothing falls back in silence.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

LIBRARY = torch.library.Library("icrl", "FRAGMENT")

# op -> backend name -> (device types it serves, function). The first listed that serves a device is its "auto".
BACKENDS: dict[str, dict[str, tuple[tuple[str, ...], Callable[..., Any]]]] = {}


def define(
    schema: str, backends: dict[str, tuple[tuple[str, ...], Callable[..., Any]]], fake: Callable[..., Any]
) -> None:
    """Define `icrl::<schema>`; its last argument must be `str backend`. Backend functions take the other arguments."""
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    BACKENDS[name] = backends
    arguments = torch._C.parse_schema(schema).arguments
    written = [i for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write]

    def run(*args: Any) -> Any:
        device = next(a.device for a in args if isinstance(a, torch.Tensor))
        result = resolve(name, device.type, args[-1])[1](*args[:-1])
        if written:  # so that a graph that saved the tensor before refuses to use it
            torch.autograd.graph.increment_version([args[i] for i in written if isinstance(args[i], torch.Tensor)])
        return result

    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, run, key)
    torch.library.register_fake(f"icrl::{name}", fake, lib=LIBRARY)


def resolve(op: str, device_type: str, backend: str = "auto") -> tuple[str, Callable[..., Any]]:
    """The backend (name, function) that serves `op` on this device type; ValueError names what there is.

    Under TRITON_INTERPRET=1 an explicit backend="triton" serves the CPU too, by Triton's interpreter.
    """
    table = BACKENDS[op]
    if backend != "auto" and backend not in table:
        raise ValueError(f"backend: {op} has {', '.join(table)} (or 'auto'), got {backend!r}")
    for name, (devices, function) in table.items():
        interpreted = name == "triton" == backend and device_type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
        if (device_type in devices or interpreted) and backend in ("auto", name):
            return name, function
    if backend == "auto":
        raise ValueError(f"{op} has no backend for device type {device_type!r}")
    raise ValueError(
        f"backend={backend!r} serves {op} on {', '.join(table[backend][0])}, but the tensors are on {device_type!r}"
    )
