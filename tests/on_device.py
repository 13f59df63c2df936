"""What tests that run on the CPU and on a GPU share: inputs are made on the CPU, with the same seeds, and moved.

On a GPU the kernels are Triton's: they work on tensor cores and in other chunks, read no values of gates and cu_seqlens, and
may carry a NaN to the rows before it in its chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from icrl_kernels.testing import assert_as_good_as_torch

OF_HALVES = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-9}  # of the norm, for tensor cores that read halves
GATES_GRADIENT = 2.0**-5  # a sum of terms that cancel


def move(x: Any, device: torch.device) -> Any:
    """Tensors of a tree, but those on meta, on this device."""
    return pytree.tree_map(lambda t: t.to(device) if isinstance(t, Tensor) and t.device.type == "cpu" else t, x)


def assert_good(
    actual: Tensor,
    plain: Tensor,
    exact: Tensor,
    *,
    factor: float = 2.0,
    name: str = "",
    dtype: torch.dtype = torch.float32,
) -> None:
    """`assert_as_good_as_torch`, on a GPU with the tolerance of its kernels for inputs of this dtype."""
    roundings = 4.0
    if actual.device.type == "cuda":
        gate = name in ("dg", "dw")
        roundings = 128.0 if gate else 64.0
        if dtype in OF_HALVES:
            share = GATES_GRADIENT if gate else OF_HALVES[dtype]
            roundings = max(roundings, share / torch.finfo(actual.dtype).eps)
    assert_as_good_as_torch(actual, plain, exact, factor=factor, name=name, roundings=roundings)


def assert_same_bits(a: Tensor, b: Tensor, name: str = "") -> None:
    """On a GPU, where a kernel may cut a sequence elsewhere, close."""
    if a.device.type == "cpu":
        assert torch.equal(a, b), name
    else:
        assert torch.linalg.vector_norm(a - b) <= 1e-5 * torch.linalg.vector_norm(b), name


def assert_nan(x: Tensor, wanted: Tensor, rows: int = 1) -> None:
    """NaN where `wanted`, and nowhere else; on a GPU perhaps also before it in time, dimension `rows`."""
    found = x.isnan()
    if x.device.type == "cpu":
        assert torch.equal(found, wanted)
    else:
        assert bool(found[wanted].all())
        assert not bool((found & ~wanted.any(rows, keepdim=True)).any())


def assert_close_gradients(a: Tensor, b: Tensor, name: str = "") -> None:
    """Gradients of a whole and of its joined halves, whose sums are cut elsewhere."""
    share = 1e-6 if a.device.type == "cpu" else 1e-5
    assert torch.linalg.vector_norm(a - b) <= share * torch.linalg.vector_norm(a), name


def compiled_backend(device: torch.device) -> str:
    """The backend of compiled kernels, by its name."""
    return "cpu" if device.type == "cpu" else "triton"


def poisons(device: torch.device, gates: tuple[float, ...]) -> list[tuple[float, float]]:
    """What later tokens may hold, and their gates: none of it may change a bit before it. On a GPU a NaN or infinity in a token
    may reach back within its chunk, so that only `gates` are poison."""
    nan, inf = float("nan"), float("inf")
    if device.type == "cpu":
        return [(-inf, -inf), (-20.0, -20.0), (3.0, -0.5), (nan, nan)]
    return [(7.0, gate) for gate in gates]
