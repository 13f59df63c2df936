"""Another device than the CPU, where there is none: what code does with tensors' devices, without computing anything.

Two helpers, for two kinds of code:

- `fake_device(name)` for code that computes without reading values (a forward pass, a loss, an optimiser's step): tensors
  have shapes, dtypes and devices and no values, and an op on tensors of two devices raises. "meta" stands for any device
  that is not the CPU. "cuda" is among `FAKES` where torch was built with CUDA (without, it cannot index such a tensor), and
  among `DIFFERENTIABLE` where there is a GPU (without, autograd has no stream).
- `ExplicitDevices` for code that reads values (sampling, acting, evaluation): it runs on the CPU, and making a tensor
  without saying on which device raises.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

import icrl

PACKAGE = f"{Path(icrl.__file__).parent}{os.sep}"
FAKES = ["meta", *(["cuda"] if torch.backends.cuda.is_built() else [])]
DIFFERENTIABLE = ["meta", *(["cuda"] if torch.cuda.is_available() else [])]
MAKERS = {
    getattr(torch, name)
    for name in ["arange", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "ones", "rand", "randint", "randn", "randperm", "range", "tensor", "zeros", "as_tensor", "asarray", "bartlett_window", "hann_window", "tril_indices", "triu_indices"]
}  # fmt: skip
CONVERTERS = {torch.as_tensor, torch.asarray}  # of a tensor, they make none


class ExplicitDevices(TorchFunctionMode):
    """Fail where a module of `icrl` makes a tensor without a device.

    `with ExplicitDevices(): agent.act(observation)`. What icrl_kernels and other packages make is not looked at: a kernel
    allocates where it runs.
    """

    def __init__(self, folder: str = PACKAGE) -> None:
        super().__init__()
        self.folder = folder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in MAKERS and kwargs.get("device") is None:
            converts = func in CONVERTERS and isinstance(args[0] if args else kwargs.get("data"), torch.Tensor)
            frame = sys._getframe(1)
            if not converts and frame.f_code.co_filename.startswith(self.folder):
                where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
                raise AssertionError(f"{where}: torch.{func.__name__} makes a tensor without a device")
        return func(*args, **kwargs)


@contextmanager
def fake_device(name: str) -> Iterator[torch.device]:
    """Tensors without values; ops on tensors of two devices raise. Gives the device to make them on."""
    with FakeTensorMode(allow_non_fake_inputs=True):  # torch.tensor(..., device="meta") makes a real one
        yield torch.device(name)


def faked(module: nn.Module, device: torch.device) -> nn.Module:
    """The module with parameters and buffers on a device of `fake_device`, whose context is entered; changed in place."""
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None:
                made = torch.zeros(p.shape, dtype=p.dtype, device=device)
                part._parameters[name] = nn.Parameter(made, requires_grad=p.requires_grad)
        for name, b in part._buffers.items():
            if b is not None:
                part._buffers[name] = torch.zeros(b.shape, dtype=b.dtype, device=device)
    return module
