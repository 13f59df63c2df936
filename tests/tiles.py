"""Which blocks the launchers of Triton kernels choose, found without running a kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import pytest
from triton.runtime.jit import KernelInterface

BLOCKS = (16, 32, 64, 128, 256, 512)  # of K, of M, and of V, of which wider heads are taken in blocks of 256
SIZES = ("BK", "BV", "BM", "BN", "C")
CASES = ("GATE", "ANY", "SINGLE", "DK", "DV", "SECOND", "REVERSE", "GROUP")

Choice = tuple[str, tuple[tuple[str, Any], ...], str, int]


class _Noted:
    def __init__(self, name: str, found: set[Choice]) -> None:
        self.name, self.found = name, found

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(*args: Any, **constants: Any) -> None:
            case = tuple((n, constants[n]) for n in CASES if n in constants)
            self.found.update((self.name, case, n, constants[n]) for n in SIZES if n in constants)

        return launch


def chosen(modules: Iterable[ModuleType], calls: Iterable[Callable[[], Any]]) -> set[Choice]:
    """Of the launches in these calls on meta tensors: kernel, gate and the like, block's name, its size."""
    found: set[Choice] = set()
    with pytest.MonkeyPatch.context() as patch:
        for module in modules:
            for name, kernel in list(vars(module).items()):
                if isinstance(kernel, KernelInterface):
                    patch.setattr(module, name, _Noted(f"{module.__name__.rpartition('.')[2]}.{name}", found))
        for call in calls:
            call()
    return found
