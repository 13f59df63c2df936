"""Every shape, dtype, device and value error of the library. Each message names the argument, what was given, what is wanted."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

MOST_THREADS = 4096
INT64 = -(2**63), 2**63 - 1


def integer(name: str, value: Any, least: int | None = None, most: int | None = None) -> int:
    """`value` as an int: Python's, numpy's, or a 0-dimensional tensor of integers; ValueError for all else, bools too."""
    number = value
    if type(value) is not int:
        of_bools = isinstance(value, (bool, np.bool_)) or getattr(value, "dtype", None) in (torch.bool, np.bool_)
        if of_bools or (isinstance(value, (Tensor, np.ndarray)) and value.ndim):
            raise _no_integer(name, value)
        try:
            number = operator.index(value)
        except (TypeError, RuntimeError) as error:
            raise _no_integer(name, value) from error
    if (least is not None and number < least) or (most is not None and number > most):
        wanted = f"at least {least}" if most is None else f"at most {most}" if least is None else f"{least} to {most}"
        raise ValueError(f"{name}: wanted {wanted}, got {number}")
    return number


def _no_integer(name: str, value: Any) -> ValueError:
    return ValueError(f"{name}: wanted an integer, got {_said(value)}")


def number(name: str, value: Any) -> float:
    """`value` as a float: Python's, numpy's, or a 0-dimensional tensor of real numbers; ValueError for all else, bools too."""
    if isinstance(value, (Tensor, np.ndarray)) and not value.ndim and value.dtype not in (torch.bool, np.bool_):
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{name}: wanted a number, got {_said(value)}")
    try:
        return float(value)
    except OverflowError as error:
        raise ValueError(f"{name}: wanted a finite number, got {_said(value)}") from error


def backend(value: Any) -> None:
    """ValueError where it cannot be a backend's name; which there are is the op's business."""
    if not isinstance(value, str):
        raise ValueError(f"backend: wanted a name or 'auto', got {_said(value)}")


def _said(value: Any) -> str:
    """A value as a message shows it."""
    if isinstance(value, (Tensor, np.ndarray)):
        return f"{type(value).__name__} of shape {list(value.shape)} and dtype {value.dtype}"
    shown = repr(value)
    return shown if len(shown) <= 80 else type(value).__name__


def not_a_tensor(name: str, value: object) -> ValueError:
    return ValueError(f"{name}: wanted a tensor, got {type(value).__name__}")


def dense(name: str, tensor: object) -> None:
    """ValueError unless it is a tensor whose elements lie in memory as its shape and strides say."""
    if not isinstance(tensor, Tensor):
        raise not_a_tensor(name, tensor)
    kind = "nested" if tensor.is_nested else "quantised" if tensor.is_quantized else ""
    if kind or tensor.layout is not torch.strided:
        kind = kind or str(tensor.layout).removeprefix("torch.").replace("_", " ").strip()
        raise ValueError(f"{name}: wanted a dense tensor, got a {kind} one")


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
