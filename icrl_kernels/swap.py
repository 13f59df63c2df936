"""Our ops in other people's code: `install` puts them where another library looks its own up, `uninstall` takes them out.

Served, found by name: every model of `transformers` that computes the gated delta rule or Kimi Delta Attention. A swap
changes which function a module's global name stands for and nothing else, so it serves models built before it as well as
after, and is undone exactly.

    from icrl_kernels import swap

    swap.install("transformers")
    model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-Next-80B-A3B-Instruct")
    ...
    swap.uninstall()

    with swap.install("transformers"):  # the same for a while
        model.generate(...)
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor

from icrl_kernels._attention import DTYPES
from icrl_kernels.gated_delta_rule import gated_delta_rule, gated_delta_rule_step

Function = Callable[..., Any]

_originals: dict[FunctionType, FunctionType] = {}
"""Ours → theirs, of what is installed."""


class Installed:
    """What one `install` replaced: `names`, as "module.function". A context manager that undoes it at its end."""

    def __init__(self, ours: list[FunctionType], names: list[str]):
        self._ours = ours
        self.names = names

    def __enter__(self) -> Installed:
        return self

    def __exit__(self, *exception: object) -> None:
        _restore(self._ours)


def install(package: str) -> Installed:
    """Let `package` compute with our ops, until `uninstall` or the end of a `with` block.

    Args:
        package: "transformers": the models in `TRANSFORMERS_MODELS` (Qwen3-Next, Qwen3.5, OLMo Hybrid, Kimi Linear, ...),
            prefill, decoding and training, with packed sequences too where the rest of the model takes them. As with
            their own functions the recurrence is computed in float32 whatever the inputs' dtype, states are float32 and
            outputs have the query's dtype; `chunk_size` changes nothing. The convolutions before it and all else are
            left alone. Where flash-linear-attention is installed this takes the place of its Triton kernels, so that
            these models run on a CPU; on a GPU the ops' "auto" backend serves (see `gated_delta_rule`).

    Installing what is installed changes nothing; modules imported since are not missed.

    Raises:
        ImportError: where the package is not there. ValueError: for a package not named above, or a version of it that
            has none of the functions; and, when a replaced function is called, for an argument that our op cannot
            honour, naming it.
    """
    if package not in _PACKAGES:
        raise ValueError(f"package: wanted one of {', '.join(_PACKAGES)}, got {package!r}")
    ours: dict[FunctionType, FunctionType] = {}  # theirs → ours
    for module, name, function in _PACKAGES[package]():
        theirs = vars(module).get(name)
        if isinstance(theirs, FunctionType) and theirs not in _originals and theirs not in ours:
            ours[theirs] = _adaptor(theirs, function)
    names = _replace(package, ours)
    _originals.update({new: old for old, new in ours.items()})
    if not names and not _installed(package):
        version = getattr(sys.modules[package], "__version__", "of unknown version")
        raise ValueError(f"package: {package} {version} has none of the functions that are known here")
    return Installed(list(ours.values()), names)


def uninstall(package: str | None = None) -> None:
    """Undo every `install`, or those of one package: each name stands for the function that it stood for before."""
    if package is not None and package not in _PACKAGES:
        raise ValueError(f"package: wanted one of {', '.join(_PACKAGES)} or None, got {package!r}")
    _restore([f for p in _PACKAGES if package in (None, p) for f in _installed(p)])


def _installed(package: str) -> list[FunctionType]:
    return [f for f in _originals if f.__module__.split(".")[0] == package]


def _restore(ours: list[FunctionType]) -> None:
    undo = {f: _originals.pop(f) for f in ours if f in _originals}
    for package in {f.__module__.split(".")[0] for f in undo}:
        _replace(package, undo)


def _replace(package: str, new: dict[FunctionType, FunctionType]) -> list[str]:
    """Rebind every global of the package's loaded modules that is a key of `new`: a function imported by name is one too."""
    names = []
    for module_name, module in list(sys.modules.items()):
        if module_name.split(".")[0] == package and isinstance(module, ModuleType):
            for name, value in list(vars(module).items()):
                if isinstance(value, FunctionType) and value in new:
                    setattr(module, name, new[value])
                    names.append(f"{module_name}.{name}")
    return names


def _adaptor(theirs: FunctionType, function: Function) -> FunctionType:
    """A function of its own for each one replaced, so that the way back is known."""

    @functools.wraps(theirs)  # its name and module too, which tell what is installed where
    def ours(*args, **kwargs):
        return function(*args, **kwargs)

    return ours  # type: ignore[return-value]


def refuse(function: str, arguments: dict[str, Any]) -> None:
    """Raise for the first of the arguments that asks for something; None and False ask for nothing."""
    for name, value in arguments.items():
        if value is not None and value is not False:
            raise ValueError(f"{name}: {function} as served by icrl_kernels.swap cannot honour it, got {value!r:.80}")


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
    qk_l2norm: bool,
) -> tuple[Tensor, Tensor | None]:
    """`gated_delta_rule`; where it is one token and no gradient is wanted, by its step, without touching initial_state."""
    if one_token(q, cu_seqlens, k, v, g, beta, initial_state):
        shape = (q.shape[0], v.shape[2], q.shape[3], v.shape[3])
        state = q.new_zeros(shape, dtype=torch.float32) if initial_state is None else initial_state.clone()
        g, beta = (None if t is None else t[:, 0] for t in (g, beta))
        o = gated_delta_rule_step(q[:, 0], k[:, 0], v[:, 0], g, beta, state, scale, qk_l2norm)
        return o[:, None], state if output_final_state else None
    return gated_delta_rule(q, k, v, g, beta, scale, initial_state, output_final_state, cu_seqlens, qk_l2norm)


def one_token(q: Tensor, cu_seqlens: Tensor | None, *others: Tensor | None) -> bool:
    if q.dim() != 4 or q.shape[1] != 1 or cu_seqlens is not None or q.dtype not in DTYPES:
        return False
    return not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, *others)))


# transformers

TRANSFORMERS_MODELS = (
    "bailing_hybrid",
    "glm5_next",
    "kimi_linear",
    "olmo_hybrid",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_next",
    "qwen4_exp",
)

# What other implementations of these functions take and their torch code ignores: ignoring it here would be a guess.
_FOREIGN = (
    *("A_log", "allow_neg_eigval", "cp_context", "dt_bias", "gk", "gv", "head_first", "lower_bound", "reverse"),
    *("return_intermediate_states", "safe_gate", "scale", "state_v_first", "transpose_state_layout"),
    *("use_beta_sigmoid_in_kernel", "use_gate_in_kernel"),
)


def _transformers_recurrent(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    *,
    cu_seqlens: Tensor | None = None,
    seq_idx: Tensor | None = None,
    **kwargs: Any,  # a model hands on all that it was given; theirs drops what it does not know
) -> tuple[Tensor, Tensor | None]:
    refuse("the gated delta rule", {name: kwargs[name] for name in _FOREIGN if name in kwargs})
    if cu_seqlens is None:
        refuse("the gated delta rule without cu_seqlens", {"seq_idx": seq_idx})
    dtype = query.dtype
    if dtype not in DTYPES or not dtype == key.dtype == value.dtype:  # they cast everything to float32
        query, key, value = query.float(), key.float(), value.float()
    g, beta = (t if t.dtype in (torch.float32, query.dtype) else t.float() for t in (g, beta))
    state = None if initial_state is None else initial_state.float()
    o, final_state = delta_rule(
        query, key, value, g, beta, None, state, output_final_state, cu_seqlens, use_qk_l2norm_in_kernel
    )
    return o.to(dtype), final_state


def _transformers_chunk(
    query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, chunk_size: int = 64, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    return _transformers_recurrent(query, key, value, g, beta, *args, **kwargs)


_TRANSFORMERS: dict[str, Function] = {
    "chunk_kimi_delta_attention": _transformers_chunk,
    "recurrent_kimi_delta_attention": _transformers_recurrent,
    "torch_chunk_gated_delta_rule": _transformers_chunk,
    "torch_recurrent_gated_delta_rule": _transformers_recurrent,
}


def _find_transformers() -> Iterator[tuple[ModuleType, str, Function]]:
    importlib.import_module("transformers")
    for model in TRANSFORMERS_MODELS:
        package = f"transformers.models.{model}"
        if importlib.util.find_spec(package) is not None:  # versions differ in the models they have
            module = importlib.import_module(f"{package}.modeling_{model}")
            for name, function in _TRANSFORMERS.items():
                yield module, name, function


_PACKAGES: dict[str, Callable[[], Iterator[tuple[ModuleType, str, Function]]]] = {
    "transformers": _find_transformers,
}
