"""Every shape, dtype, device and value error of the library. Each message names the argument, what was given, what is wanted."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def not_a_tensor(name: str, value: object) -> ValueError:
    return ValueError(f"{name}: wanted a tensor, got {type(value).__name__}")


def shape(name: str, tensor: Tensor, wanted: Sequence[int | str | None], **sizes: int) -> None:
    """`wanted` holds an int, a symbol ("T", looked up in `sizes`, free when absent) or None (free) for each dimension."""
    if not isinstance(tensor, Tensor):
        raise not_a_tensor(name, tensor)
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
