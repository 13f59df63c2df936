"""Every shape, dtype, device and value error of the library. Each message names the argument, what was given, what is wanted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from icrl_kernels.arguments import INT64, MOST_THREADS, dense, integer, not_a_tensor, number, said

__all__ = ["INT64", "MOST_THREADS", "backend", "compiling", "dense", "dtype", "from_numpy", "integer", "not_a_tensor"]
__all__ += ["number", "same_device", "same_dtype", "shape"]


def backend(value: Any) -> None:
    """ValueError where it cannot be a backend's name; which there are is the op's business."""
    if not isinstance(value, str):
        raise ValueError(f"backend: wanted a name or 'auto', got {said(value)}")


def from_numpy(name: str, value: Any) -> Any:
    """A numpy array as a tensor on the CPU, of its memory where torch can read that; what is none stays as it is."""
    if not isinstance(value, np.ndarray):
        return value
    try:
        return torch.from_numpy(np.require(value, requirements=["C", "W"]))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: wanted numbers that torch has, got an array of {value.dtype}") from error


def shape(name: str, tensor: Tensor, wanted: Sequence[int | str | None], **sizes: int) -> None:
    """`wanted` holds an int, a symbol ("T", looked up in `sizes`, free when absent) or None (free) for each dimension."""
    dense(name, tensor)
    names = "[" + ", ".join("?" if w is None else str(w) for w in wanted) + "]"
    values = [sizes.get(w) if isinstance(w, str) else w for w in wanted]
    fits = tensor.dim() == len(values) and all(w is None or s == w for s, w in zip(tensor.shape, values, strict=True))
    if not fits:
        known = ", ".join(f"{k}={v}" for k, v in sizes.items())
        raise ValueError(
            f"{name}: wanted shape {names}" + (f" with {known}" if known else "") + f", got {list(tensor.shape)}"
        )


def dtype(name: str, tensor: Tensor, allowed: Sequence[torch.dtype], more: str = "") -> None:
    if tensor.dtype not in allowed:
        raise ValueError(f"{name}: wanted dtype {' or '.join(map(str, allowed))}, got {tensor.dtype}{more}")


def same_device(**tensors: Tensor | None) -> torch.device:
    first_name, first = next((n, t) for n, t in tensors.items() if t is not None)
    for name, t in tensors.items():
        if t is not None and t.device != first.device:
            raise ValueError(f"{name}: is on {t.device}, but {first_name} is on {first.device}")
    return first.device


def same_dtype(**tensors: Tensor | None) -> torch.dtype:
    first_name, first = next((n, t) for n, t in tensors.items() if t is not None)
    for name, t in tensors.items():
        if t is not None and t.dtype != first.dtype:
            raise ValueError(f"{name}: has dtype {t.dtype}, but {first_name} has {first.dtype}")
    return first.dtype


def compiling() -> bool:
    """True under torch.compile and export, where values cannot be looked at."""
    return torch.compiler.is_compiling()
