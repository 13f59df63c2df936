"""Our ops in other people's code: `install` puts them where another library looks up its own, `uninstall` takes them out.

A swap changes which function a module's global name, or an attribute of a model that was built before it, stands for and
nothing else. It is undone exactly.

    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM
    from icrl_kernels import swap

    layers = ["linear_attention", "full_attention"]
    config = Qwen3NextConfig(vocab_size=64, hidden_size=64, num_hidden_layers=2, layer_types=layers, num_experts=16)
    model = Qwen3NextForCausalLM(config)
    prompt = torch.randint(64, (1, 20))
    swap.install("transformers")
    model.generate(prompt, max_new_tokens=5, do_sample=False)
    swap.uninstall()

or for a while:

    import fla.ops.gla
    from icrl_kernels import swap

    q, k, v, g = (torch.randn(1, 100, 4, 32) for _ in range(4))
    with swap.install("fla"):
        o, state = fla.ops.gla.chunk_gla(q, k, v, torch.nn.functional.logsigmoid(g), output_final_state=True)
"""

from __future__ import annotations

import functools
import gc
import inspect
import sys
from collections.abc import Iterator
from types import FunctionType, ModuleType
from typing import Any

from torch import nn

from icrl_kernels.swap import _fla, _transformers
from icrl_kernels.swap._ops import Function

__all__ = ["Installed", "install", "uninstall"]

_PACKAGES = {"fla": _fla.find, "transformers": _transformers.find}

_originals: dict[FunctionType, tuple[str, FunctionType]] = {}
"""Ours → the package and theirs, of what is installed."""


class Installed:
    """What one `install` replaced: `names`, as "module.function". A context manager that undoes it at its end."""

    def __init__(self, ours: list[FunctionType], names: list[str]):
        self._ours = ours
        self._ended = False
        self.names = names

    def __enter__(self) -> Installed:
        if self._ended:
            raise RuntimeError("this swap has ended: call install again")
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended = True
        _restore(self._ours)


def install(package: str) -> Installed:
    """Let `package` compute with our ops, until `uninstall` or the end of a `with` block.

    Args:
        package: "transformers" or "fla".

    "transformers" (tested with 4.57, 5.10, 5.17, 5.23 and 5.24): every model that computes the gated delta rule or Kimi
    Delta Attention (Qwen3-Next, Qwen3.5, OLMo Hybrid, Kimi Linear, ...): prefill, decoding and training. As with its own
    functions the recurrence is computed in float32 whatever the inputs' dtype, states are float32, outputs have the
    query's dtype and `chunk_size` changes nothing. Packed sequences (`cu_seq_lens_q`, with or without `seq_idx`), which
    its torch functions refuse or mix, are kept apart, in the short convolution too. They are refused where another part
    of a model reads across them: in GLM-5-Next, in Qwen4-Exp, and in transformers 5.10 to 5.14 (older ones tell their
    functions nothing of packing, with the swap or without).

    "fla" (flash-linear-attention, tested with 0.6.0): the sequence-mixing functions of its layers and models: GLA and
    simple GLA (and what is made of it: linear attention, retention, lightning attention), the delta rule, gated or not,
    KDA, GSA and RWKV-7, chunked and recurrent. Gates and betas that its kernels compute themselves
    (`use_gate_in_kernel`, `use_beta_sigmoid_in_kernel`) are computed in torch.

    Nothing else is computed otherwise: convolutions, norms and feature maps stay what they are, in "fla" Triton kernels,
    which want a GPU. In "transformers" they are torch, so that its models run on a CPU with flash-linear-attention
    installed, whose kernels it would choose otherwise. Which backend of ours serves is "auto"'s choice: see each op's
    docstring for what a GPU gets.

    Models are served that were built before as well as after. Installing what is installed changes nothing; modules
    imported since are not missed. A function that a program imported by name into a module of its own is not replaced
    there.

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
    names = _replace(ours, package)
    _originals.update({new: (package, old) for old, new in ours.items()})
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
    return [f for f, (p, _) in _originals.items() if p == package]


def _restore(ours: list[FunctionType]) -> None:
    _replace({f: _originals.pop(f)[1] for f in ours if f in _originals})


def _replace(new: dict[FunctionType, FunctionType], package: str | None = None) -> list[str]:
    """Rebind what is a key of `new`: of one package or everywhere. Returns the names of the globals."""
    names = []
    for where, variables in _namespaces(package):
        for name, value in list(variables.items()):
            if type(value) is FunctionType and value in new:  # isinstance would ask lazy objects for their class
                variables[name] = new[value]
                if where is not None:
                    names.append(f"{where}.{name}")
    return names


def _namespaces(package: str | None) -> Iterator[tuple[str | None, dict[str, Any]]]:
    """The globals of loaded modules, with the module's name, and the attributes of torch modules, with None.

    A function imported by name is a global too. Until 5.14, transformers' layers kept their functions as attributes.
    """
    for name, module in list(sys.modules.items()):
        if isinstance(module, ModuleType) and package in (None, name.split(".")[0]):
            yield name, vars(module)
    kinds, more = {nn.Module}, [nn.Module]
    while more:
        more = [kind for parent in more for kind in type.__subclasses__(parent) if kind not in kinds]
        kinds.update(more)
    if package is not None:
        kinds = {kind for kind in kinds if any(c.__module__.split(".")[0] == package for c in kind.__mro__)}
    for layer in [x for x in gc.get_objects() if type(x) in kinds]:
        yield None, vars(layer)


def _adaptor(theirs: FunctionType, function: Function) -> FunctionType:
    """A function of its own for each one replaced, so that the way back is known.

    `function` gets every argument by name, their defaults included: orders and defaults are those of their version.
    """
    parameters = inspect.signature(theirs).parameters.values()
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}

    @functools.wraps(theirs)
    def ours(*args, **kwargs):
        given = dict(zip(positional, args, strict=False))
        if len(args) > len(positional) or given.keys() & kwargs.keys():
            return theirs(*args, **kwargs)  # raises what Python raises
        return function(**{**defaults, **given, **kwargs})

    return ours  # type: ignore[return-value]
