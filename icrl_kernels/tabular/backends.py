"""Which backends this installation lacks, and what is to be done about it."""

from __future__ import annotations

import importlib.util

from icrl_kernels import _C


def no_cuda() -> str | None:
    return None if _C.with_cuda else "this build has no CUDA; build with ICRL_CUDA=1"


def no_triton() -> str | None:
    return None if importlib.util.find_spec("triton") else "Triton is not installed"
