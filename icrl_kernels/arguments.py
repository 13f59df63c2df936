"""What a function takes for an integer or a number: Python's and numpy's, and 0-dimensional tensors; and for a tensor."""

from __future__ import annotations

import operator
from dataclasses import fields
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

MOST_OF_A_FIELD = 2**31 - 1
MOST_THREADS = 4096
INT64 = -(2**63), 2**63 - 1


def integer(name: str, value: Any, least: int | None = None, most: int | None = None) -> int:
    """`value` as an int: Python's, numpy's, or a 0-dimensional tensor of integers; ValueError for all else, bools too."""
    number = value
    if type(value) is not int and not isinstance(value, torch.SymInt):  # which a tracer means
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
    return ValueError(f"{name}: wanted an integer, got {said(value)}")


def number(name: str, value: Any) -> float:
    """`value` as a float: Python's, numpy's, or a 0-dimensional tensor of real numbers; ValueError for all else, bools too."""
    if isinstance(value, (Tensor, np.ndarray)) and not value.ndim and value.dtype not in (torch.bool, np.bool_):
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{name}: wanted a number, got {said(value)}")
    try:
        return float(value)
    except OverflowError as error:
        raise ValueError(f"{name}: wanted a finite number, got {said(value)}") from error


def said(value: Any) -> str:
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


def every_state_acts(stuck: Tensor) -> None:
    """ValueError where a mask leaves states that are not terminal without an action: those that `stuck` [N,S] marks."""
    if stuck.any():
        n, s = stuck.nonzero()[0].tolist()
        raise ValueError(
            f"action_mask: wanted an action in every state that is not terminal, got none in state {s} of task {n}"
        )


def integer_fields(config: Any, **bounds: int | tuple[int, int]) -> None:
    """Make an int, by `integer`, of each field of a dataclass that is declared as one.

    `bounds`: how small it may be, or how small and how large, by name. All but seeds are below 2^31.
    """
    for field in fields(config):
        if field.type in ("int", int):
            bound, name = bounds.get(field.name), field.name
            most = None if name.endswith("seed") else MOST_OF_A_FIELD
            least, most = bound if isinstance(bound, tuple) else (bound, most)
            value = integer(name, getattr(config, name), least)
            if most is not None and value > most:
                raise ValueError(f"{name}: wanted at most {most}, got {value}")
            object.__setattr__(config, name, value)
