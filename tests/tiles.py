"""Which blocks the launchers of Triton kernels choose, found without running a kernel.

A test of an op runs a list of shapes and asserts that these choose every block that any shape can choose; a slow test runs
every combination of BLOCKS.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import pytest
import torch
from triton.runtime.jit import KernelInterface

from icrl_kernels.linear_attention.triton.plan import chunk_length

BLOCKS = (16, 32, 64, 128, 256, 512)  # of K, of M and of V, of which the backward takes wider heads in blocks of 256
WIDE = (*BLOCKS, 1024, 2048, 4096)  # of V in a step
SIZES = ("BK", "BV", "BM", "BN", "C")
CASES = ("GATE", "ANY", "SINGLE", "DK", "DV", "SECOND", "REVERSE")

Choice = tuple[str, tuple[tuple[str, Any], ...], str, int]


class _Noted:
    def __init__(self, name: str, found: set[Choice]) -> None:
        self.name, self.found = name, found

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(*args: Any, **constants: Any) -> None:
            case = tuple((n, constants[n]) for n in CASES if n in constants)
            self.found.update((self.name, case, n, constants[n]) for n in SIZES if n in constants)

        return launch


def chosen(module: ModuleType, calls: Iterable[Callable[[], Any]], *called: ModuleType) -> set[Choice]:
    """Of this module's launches in these calls on meta tensors: kernel, gate and the like, block's name, its size."""
    found: set[Choice] = set()
    with pytest.MonkeyPatch.context() as patch:
        for m in (module, *called):  # those that it calls launch nothing either
            for name, kernel in list(vars(m).items()):
                if isinstance(kernel, KernelInterface):
                    patch.setattr(m, name, _Noted(name, found if m is module else set()))
        for call in calls:
            call()
    assert found
    return found


def meta(tensors: Iterable[torch.Tensor | None]) -> list[torch.Tensor | None]:
    return [None if x is None else x.to("meta") for x in tensors]


def tokens(*channels: int) -> int:
    """A chunk of float32 and a few more."""
    return chunk_length(torch.float32, max(channels), 1) + 6
