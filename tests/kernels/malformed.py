"""Malformed calls of the kernels, made from valid ones, and a judge that knows which calls are malformed.

A door is one way to call an op: its public function, `torch.ops.icrl.<op>`, each by "auto" and by each backend. It declares
its arguments: their layouts, dtypes and values. `judge` decides by the declarations alone, never by trying a call. `mutations`
changes one thing of a valid call; what stays valid is judged valid.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

HALVES = (torch.float16, torch.bfloat16)
FLOATS = (torch.float32, *HALVES)
Args = dict[str, Any]
Sizes = dict[str, int]


@dataclass(frozen=True)
class Arg:
    """One argument.

    layouts: one or several, "B T G K" say. A letter is a size that all arguments share, "P+4" four more than the size P, and
        a number is itself.
    dtypes: the dtypes allowed, or "as q", "as q or float32", "q or wider" (float32 where q is a half).
    also: what else a message may call it. dense: a view that is not contiguous is "refused" or "unsaid".
    values: what to write into one random element. scalars: what to put in the place of a number or a string; `wants` says
        which of them are right.
    """

    name: str
    layouts: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] | str = ()
    optional: bool = False
    also: tuple[str, ...] = ()
    dense: str = ""
    values: tuple[float | int, ...] = ()
    scalars: tuple[Any, ...] = ()
    wants: Callable[[Any], bool] = lambda x: True
    type: type | tuple[type, ...] = Tensor
    numpy: bool = False
    """Whether an array is taken in the place of a tensor."""

    @property
    def names(self) -> set[str]:
        return {self.name, *self.also}


@dataclass
class Problem:
    """Why a call is malformed: any of `names` may be named. kind: "value", "type" (a wrong Python type) or "unsaid"."""

    names: set[str]
    kind: str = "value"


@dataclass
class Verdict:
    kind: str  # "refused", "valid", or "unsaid": no rule says, but the process must live
    names: set[str] = field(default_factory=set)
    type_error: bool = False


def no_rules(args: Args, sizes: Sizes) -> Iterator[Problem]:
    yield from ()


def no_links(args: Args) -> Iterator[tuple[str, int, str] | Problem]:
    yield from ()


@dataclass(frozen=True)
class Variant:
    """Valid calls of one kind. `links` yields sizes that are not in layouts, as (letter, size, name); `rules` what is left."""

    label: str
    args: tuple[Arg, ...]
    build: Callable[[random.Random], Args]
    rules: Callable[[Args, Sizes], Iterator[Problem]] = no_rules
    links: Callable[[Args], Iterator[tuple[str, int, str] | Problem]] = no_links
    lists: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Lists of tensors, whose elements are arguments "list.element", and what else a message may call them."""


@dataclass(frozen=True)
class Door:
    op: str
    entry: str  # "public", "op" or "internal"
    backend: str
    variants: tuple[Variant, ...]
    call: Callable[[Args], Any]

    def __str__(self) -> str:
        return f"{self.op}, {self.entry}, {self.backend or 'no backend'}"


# ---- the judge ----------------------------------------------------------------------------------------------------------


def plain(x: Any) -> bool:
    """Whether it is a tensor whose elements lie in memory as its strides say."""
    return isinstance(x, Tensor) and x.layout is torch.strided and not x.is_nested and not x.is_quantized


def as_taken(arg: Arg, x: Any) -> Any:
    if isinstance(x, np.integer):
        return int(x)
    return torch.from_numpy(x) if arg.numpy and isinstance(x, np.ndarray) else x


def judge(variant: Variant, args: Args) -> Verdict:
    args = args | {a.name: as_taken(a, args[a.name]) for a in variant.args}
    problems = list(_problems(variant, args))
    refused = [p for p in problems if p.kind != "unsaid"]
    names = set().union(*(p.names for p in problems)) if problems else set()
    if refused:
        return Verdict("refused", names, any(p.kind == "type" for p in refused))
    return Verdict("unsaid" if problems else "valid", names)


def _problems(variant: Variant, args: Args) -> Iterator[Problem]:
    found = [Problem({which, *variant.lists[which]}) for which in args.get("changed lists", {})]
    for arg in variant.args:
        x = args[arg.name]
        if x is None:
            if not arg.optional:
                found.append(Problem(arg.names, "unsaid" if arg.type is bool else "type"))
        elif not isinstance(x, arg.type) or (isinstance(x, bool) and arg.type is not bool):
            found.append(Problem(arg.names, "unsaid" if arg.type is bool else "type"))  # 1 and None may do for a flag
        elif (isinstance(x, Tensor) and not plain(x)) or (not isinstance(x, Tensor) and not arg.wants(x)):
            found.append(Problem(arg.names))
    tensors = {a: args[a.name] for a in variant.args if plain(args[a.name])}
    odd = any(isinstance(x, Tensor) and not plain(x) for x in args.values())
    unfit, sizes = _fit(variant, args, tensors, not odd and not any(p.kind == "type" for p in found))
    found += unfit
    for arg, x in tensors.items():
        if arg.dtypes and (problem := _dtype_problem(arg, x, args)):
            found.append(problem)
        if arg.dense and not x.is_contiguous():
            found.append(Problem(arg.names, "value" if arg.dense == "refused" else "unsaid"))
    devices = {x.device.type for x in tensors.values()}
    if devices and devices != {"cpu"}:
        found.append(Problem(set().union(*(a.names for a in tensors)), "value" if len(devices) > 1 else "unsaid"))
    yield from found
    if all(p.kind == "unsaid" for p in found) and devices == {"cpu"}:
        yield from variant.rules(args, sizes)


def _fit(variant: Variant, args: Args, tensors: dict[Arg, Tensor], linked: bool) -> tuple[list[Problem], Sizes]:
    """What does not fit together, and the sizes by letter."""
    found: list[Problem] = []
    votes: dict[str, dict[int, set[str]]] = {}
    for arg, x in tensors.items():
        if not arg.layouts:
            continue
        layout = next(
            (words for text in arg.layouts if len(words := text.split()) == x.dim() and _fixed(words, x)), None
        )
        if layout is None:
            found.append(Problem(arg.names))
            continue
        for word, size in zip(layout, x.shape, strict=True):
            letter, _, more = word.partition("+")
            if not word.isdigit():
                votes.setdefault(letter, {}).setdefault(size - int(more or 0), set()).update(arg.names)
    for link in variant.links(args) if linked else ():
        if isinstance(link, Problem):
            found.append(link)
        else:
            letter, size, name = link
            votes.setdefault(letter, {}).setdefault(size, set()).add(name)
    for letter, sizes in votes.items():
        if len(sizes) > 1 or min(sizes) < 0:
            found.append(Problem({letter}.union(*sizes.values())))
    return found, {letter: next(iter(sizes)) for letter, sizes in votes.items()}


def _fixed(words: list[str], x: Tensor) -> bool:
    return all(size == int(word) for word, size in zip(words, x.shape, strict=True) if word.isdigit())


def _dtype_problem(arg: Arg, x: Tensor, args: Args) -> Problem | None:
    if not isinstance(arg.dtypes, str):
        return None if x.dtype in arg.dtypes else Problem(arg.names)
    other = arg.dtypes.split()[0 if arg.dtypes.endswith("wider") else 1]
    if not plain(args[other]):
        return None
    dtype = args[other].dtype
    allowed = {dtype}
    if arg.dtypes.endswith("or float32"):
        allowed.add(torch.float32)
    elif arg.dtypes.endswith("wider"):
        allowed = {torch.promote_types(dtype, torch.float32)}
    return None if x.dtype in allowed else Problem({*arg.names, other})


def named(message: str) -> set[str]:
    """The arguments that an error's message names: before its first colon or equals sign, or as the dispatcher does."""
    found = set(re.findall(r"argument '([\w.]+)'", message))
    said = re.match(r"([A-Za-z_][\w.]*)(\[[^\]]*\])? (is|has|of) ", message)  # "state.task[1] is 7, but"
    head = said[1] if said else re.split(r"[:=]", message, maxsplit=1)[0]
    parts = re.split(r",\s*(?![^\[]*\])|\s+and\s+", head)
    if all(re.fullmatch(r"\s*[A-Za-z_][\w.]*(\[[^\]]*\])?\s*", part) for part in parts):
        for part in (p.strip() for p in parts):
            bare = re.sub(r"\[.*", "", part)
            found |= {part, bare, bare.rpartition(".")[2], bare.partition(".")[0]}
    return found


# ---- mutations ----------------------------------------------------------------------------------------------------------

BACKENDS_THAT_ARE_NOT = ("nope", "Triton", "cuda", "CPU", "auto ")
OTHER_TYPES = (3.5, "x", [1, 2], (), object)
ALL_DTYPES = (torch.float64, torch.int64, torch.bool, torch.complex64, *HALVES, torch.int32, torch.uint8, torch.float32)


def resized(x: Tensor, dim: int, size: int) -> Tensor:
    if not x.shape[dim]:
        shape = list(x.shape)
        shape[dim] = size
        return x.new_zeros(shape)
    return x.index_select(dim, torch.arange(size) % x.shape[dim])


def poked(rng: random.Random, x: Tensor, value: float | int) -> Tensor:
    x = x.clone(memory_format=torch.contiguous_format)
    if x.numel():
        x.view(-1)[rng.randrange(x.numel())] = value
    return x


def _dims(rng: random.Random, arg: Arg, x: Tensor) -> tuple[Tensor, str]:
    if x.dim() and rng.random() < 0.6:
        dim = rng.randrange(x.dim())
        if x.shape[dim] and rng.random() < 0.7:
            return x.select(dim, 0), f"without dimension {dim}"
        return x.flatten(), "flattened"
    dim = rng.randrange(x.dim() + 1)
    return x.unsqueeze(dim), f"with a dimension more at {dim}"


def _size(rng: random.Random, arg: Arg, x: Tensor) -> tuple[Tensor, str]:
    if not x.dim():
        return _dims(rng, arg, x)
    dim = rng.randrange(x.dim())
    n = x.shape[dim]
    size = rng.choice(sorted({n + 1, max(0, n - 1), 0, 2 * n, n // 2} - {n}) or [1])
    return resized(x, dim, size), f"of size {size} instead of {n} in dimension {dim}"


def _dtype(rng: random.Random, arg: Arg, x: Tensor) -> tuple[Tensor, str]:
    dtype = rng.choice([d for d in ALL_DTYPES if d != x.dtype])
    return x.to(dtype), f"as {dtype}"


def _device(rng: random.Random, arg: Arg, x: Tensor) -> tuple[Tensor, str]:
    return x.to("meta"), "on meta"


def _view(rng: random.Random, arg: Arg, x: Tensor) -> tuple[Tensor, str]:
    kind = rng.choice(["transposed", "expanded", "strided", "same shape, other strides", "one element seen everywhere"])
    if not x.dim() or not x.numel():
        return _dims(rng, arg, x)
    dim = rng.randrange(x.dim())
    if kind == "transposed" and x.dim() > 1:
        other = rng.choice([d for d in range(x.dim()) if d != dim])
        return x.transpose(dim, other), f"with dimensions {dim} and {other} exchanged"
    if kind == "expanded":
        shape = list(x.shape)
        shape[dim] = rng.choice([2 * shape[dim], shape[dim] + 1])
        return x.narrow(dim, 0, 1).expand(shape), f"expanded to {shape}"
    if kind == "strided":
        at = [slice(None)] * x.dim()
        at[dim] = slice(None, None, 2)
        return x[tuple(at)], f"every second along dimension {dim}"
    if kind == "one element seen everywhere":
        return x.flatten()[:1].as_strided(x.shape, [0] * x.dim()), kind
    twice = x.repeat_interleave(2, dim)
    at = [slice(None)] * x.dim()
    at[dim] = slice(None, None, 2)
    return twice[tuple(at)], "the same values in every second place"


def _empty(rng: random.Random, arg: Arg, x: Tensor) -> tuple[Tensor, str]:
    return x.new_empty(0), "an empty tensor"


def _kind(rng: random.Random, arg: Arg, x: Tensor) -> tuple[Any, str]:
    kinds = ["sparse", "quantised", "nested", "numpy", "numpy"]
    if not x.is_floating_point():
        kinds.remove("quantised")
    if not x.dim() or not x.numel() or x.device.type != "cpu":
        return _empty(rng, arg, x)
    kind = rng.choice(kinds)
    if kind == "sparse":
        return x.to_sparse(), "sparse"
    if kind == "quantised":
        return torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8), "quantised"
    if kind == "nested":
        return torch.nested.nested_tensor([x]), "nested"
    return x.numpy() if x.dtype != torch.bfloat16 else x.tolist(), "an array of numpy"


def _integer(rng: random.Random, arg: Arg, x: int) -> tuple[Any, str]:
    return np.int64(x), "an integer of numpy"


def _none(rng: random.Random, arg: Arg, x: Any) -> tuple[None, str]:
    return None, "None"


def _type(rng: random.Random, arg: Arg, x: Any) -> tuple[Any, str]:
    other = rng.choice(OTHER_TYPES)
    return other, f"{other!r}"


def _value(rng: random.Random, arg: Arg, x: Tensor) -> tuple[Tensor, str]:
    possible = [v for v in arg.values if x.dtype.is_floating_point or x.dtype == torch.bool or _holds(x.dtype, v)]
    value = rng.choice(possible or [1])
    return poked(rng, x, value), f"with an element {value}"


def _holds(dtype: torch.dtype, value: float | int) -> bool:
    return isinstance(value, int) and torch.iinfo(dtype).min <= value <= torch.iinfo(dtype).max


def _given(rng: random.Random, variant: Variant, arg: Arg) -> tuple[Any, str]:
    """Something where there was None."""
    if arg.type is not Tensor and not (isinstance(arg.type, tuple) and Tensor in arg.type):
        return _type(rng, arg, None)
    shape = [rng.choice([0, 1, 2, 3, 5, 8]) for _ in range(rng.randrange(6))]
    dtypes = arg.dtypes if isinstance(arg.dtypes, tuple) and arg.dtypes else (torch.float32,)
    return torch.zeros(shape, dtype=rng.choice(dtypes)), f"zeros {shape} instead of None"


TENSOR = (_dims, _size, _size, _dtype, _device, _view, _empty, _kind, _none, _type)


def mutate(rng: random.Random, variant: Variant, args: Args) -> str:
    """Change one thing of `args`, in place; returns what."""
    if variant.lists and rng.random() < 0.1:
        which = rng.choice(list(variant.lists))
        args["changed lists"] = {which: rng.choice(["one fewer", "one more", "none"])}
        return f"{which}: {args['changed lists'][which]}"
    arg = rng.choice(variant.args)
    x = args[arg.name]
    if isinstance(x, Tensor):
        change = rng.choice([*TENSOR, *[_value] * 4] if arg.values else TENSOR)
        args[arg.name], what = change(rng, arg, x)
    elif x is None:
        args[arg.name], what = _given(rng, variant, arg)
    elif arg.scalars and rng.random() < 0.7:
        args[arg.name] = rng.choice(arg.scalars)
        what = repr(args[arg.name])
    else:
        args[arg.name], what = rng.choice([_none, _type, *[_integer] * (type(x) is int)])(rng, arg, x)
    return f"{arg.name}: {what}"


def changed_list(args: Args, which: str, elements: list[Tensor]) -> list[Tensor]:
    """The list as the call passes it."""
    change = args.get("changed lists", {}).get(which)
    if change == "one fewer":
        return elements[:-1]
    if change == "one more":
        return [*elements, elements[-1]]
    return [] if change == "none" else elements
