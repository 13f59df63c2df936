"""`python -m icrl_kernels.info`: versions, instruction set, CUDA, and which backend serves which op."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

import icrl_kernels
from icrl_kernels import _C, _registry, _torch_private


def _newer() -> str:
    """A note where torch is newer than the newest that the tests have run under."""
    numbers = [tuple(int(n) for n in v.split("+")[0].split(".")[:2]) for v in (torch.__version__, _torch_private.TRIED)]
    return f" (newer than {_torch_private.TRIED}, the newest that was tried)" if numbers[0] > numbers[1] else ""


def info() -> dict[str, str]:
    """What this installation is and can do, as printed."""

    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    facts = {
        "icrl_kernels": icrl_kernels.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__ + _newer(),
        "triton": version("triton"),
        "CPU kernels": _C.isa(),
        "threads": str(torch.get_num_threads()),
        "CUDA C++": "compiled" if _C.with_cuda else "not compiled (no nvcc when this was built)",
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }
    for op in _registry.BACKENDS:
        served = []
        for device in ("cpu", "cuda"):
            try:
                served.append(f"{device}: {_registry.resolve(op, device)[0]}")
            except ValueError:
                served.append(f"{device}: none")
        facts[f"icrl::{op}"] = ", ".join(served)
    return facts


if __name__ == "__main__":
    for name, value in info().items():
        print(f"{name:34}{value}")
