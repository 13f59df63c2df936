"""Every private name of torch that this package uses, each with what stands in for it where a torch has it no longer.

A stand-in may be slower or refuse less, but gives the same numbers. `tests/kernels/test_torch_private.py` makes each name
vanish in turn.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

TRIED = "2.13"  # the newest torch that the tests have run under


def _find(path: str, otherwise: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.<path>`; `otherwise` where this torch has no such name."""
    try:
        return attrgetter(path)(torch)
    except AttributeError:
        return otherwise


# Whether something wants to see a call that skips torch's dispatcher. Where one cannot be asked, the answer is yes: the step
# then takes the dispatcher's way.
dispatch_modes = _find("_C._len_torch_dispatch_stack", lambda: 1)
function_modes = _find("_C._len_torch_function_stack", lambda: 1)
tracing = _find("_C._get_tracing_state", lambda: True)
profiling = _find("autograd._profiler_enabled", lambda: True)
# Of torch.func's transforms, the innermost; None: there is none.
transform = _find("_C._functorch.peek_interpreter_stack", lambda: None)


# Level of forward-mode differentiation, -1 outside; 0 (perhaps inside) where this torch does not say.
forward_level = partial(getattr, forward_ad, "_current_level", 0)


def watched() -> bool:
    """Whether a mode, tracer, profiler or forward-mode level wants to see a call that skips torch's dispatcher."""
    return bool(dispatch_modes() or function_modes() or tracing() is not None or profiling() or forward_level() >= 0)


def tangent(x: Tensor) -> Tensor | None:
    """x's tangent in forward mode; None outside."""
    try:
        return forward_ad.unpack_dual(x).tangent
    except RuntimeError:  # outside every level, which a torch without `_current_level` does not say before
        return None


# Hooks of all modules, and the names of a module's own; where they cannot be asked for, there may be some.
_hooks_of_all = _find("nn.modules.module._global_forward_hooks", lambda: True)
_pre_hooks_of_all = _find("nn.modules.module._global_forward_pre_hooks", lambda: True)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def hooked(module: torch.nn.Module) -> bool:
    """Whether hooks, its own, its submodules' or those of all modules, want to see its forward pass."""
    own = (getattr(m, name, True) for m in module.modules() for name in _HOOKS)
    return any(map(bool, (_hooks_of_all, _pre_hooks_of_all, *own)))
