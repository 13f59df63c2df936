"""The doors of the linear-attention ops: gla, gsa, gated_delta_rule and rwkv7, their backwards and steps."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
from malformed import BACKENDS_THAT_ARE_NOT, FLOATS, Arg, Args, Door, Problem, Sizes, Variant
from torch import Tensor

import icrl_kernels as ik

GATE_ALLOWANCE = 1e-4
MOST = {"K": 512, "V": 4096, "M": 512}  # channels or slots of a head
NAN, INF = math.nan, math.inf
DIMENSIONS = {"B": 2, "T": 5, "H": 4, "G": 2, "K": 8, "V": 12, "M": 6}  # G heads are those of which there may be fewer

# By op: the tokens' layouts ("?" where None will do), the states', the gate, heads (many, few) and other arguments.
GATES = (0.1, 2, INF, NAN, -INF, 1e-3)
OPS: dict[str, dict[str, Any]] = {
    "gla": {
        "tokens": {"q": "B T H K", "k": "B T G K", "v": "B T G V", "g?": "B T G K|B T G"},
        "states": {"initial_state": "N G K V"},
        "step": ["q", "k", "v", "g", "state", "scale"],
    },
    "gsa": {
        "tokens": {"q": "B T H K", "k": "B T G K", "v": "B T G V", "s": "B T G M", "g?": "B T G M"},
        "states": {"initial_keys": "N G K M", "initial_values": "N G M V"},
        "step": ["q", "k", "v", "s", "g", "keys", "values", "scale"],
    },
    "gated_delta_rule": {
        "tokens": {"q": "B T G K", "k": "B T G K", "v": "B T H V", "g?": "B T H K|B T H", "beta?": "B T H"},
        "states": {"initial_state": "N H K V"},
        "step": ["q", "k", "v", "g", "beta", "state", "scale", "qk_l2norm"],
    },
    "rwkv7": {
        "tokens": {x: "B T H V" if x == "v" else "B T H K" for x in "rwkvab"},
        "states": {"initial_state": "N H K V"},
        "step": ["r", "w", "k", "v", "a", "b", "state", "scale"],
    },
}
STATE_NAMES = {
    "initial_keys": ("initial_state", "initial_state[0]", "dfinal_keys"),
    "initial_values": ("initial_state", "initial_state[1]", "dfinal_values"),
    "initial_state": ("dfinal_state",),
    "keys": ("state", "state[0]"),
    "values": ("state", "state[1]"),
    "state": (),
}


def gate_of(op: str) -> str:
    return "w" if op == "rwkv7" else "g"


def finite(scale: float) -> bool:
    return abs(scale) <= torch.finfo(torch.float32).max


def _token_args(op: str, step: bool, wide: bool) -> list[Arg]:
    first = "r" if op == "rwkv7" else "q"
    args = []
    for key, text in OPS[op]["tokens"].items():
        name = key.rstrip("?")
        layouts = tuple(x.replace("B T", "B") if step else x for x in text.split("|"))
        floats: Any = (*FLOATS, torch.float64) if wide else FLOATS
        loose = name in (gate_of(op), "beta")
        args.append(
            Arg(
                name,
                layouts,
                floats if name == first else f"as {first} or float32" if loose else f"as {first}",
                optional=key.endswith("?"),
                values=GATES if name == gate_of(op) else (NAN, INF),
            )
        )
    return args


def _flags(op: str) -> list[Arg]:
    return [Arg("qk_l2norm", type=bool)] if op == "gated_delta_rule" else []


def _scale(public: bool) -> Arg:
    return Arg(
        "scale", optional=public, type=(float, int), scalars=(NAN, INF, -INF, 1e39, -1e39, 0.0, -2.0), wants=finite
    )


def _backend(names: tuple[str, ...]) -> Arg:
    return Arg("backend", type=str, scalars=BACKENDS_THAT_ARE_NOT, wants=lambda x: x in (*names, "auto"))


def _links(args: Args) -> Iterator[tuple[str, int, str] | Problem]:
    """How many sequences there are."""
    first = args.get("q", args.get("r"))
    cu = args["cu_seqlens"]
    if first.dim() != 4:
        return
    if cu is None:
        yield "N", first.shape[0], "cu_seqlens"
    elif cu.dim() == 1:
        if first.shape[0] != 1:
            yield Problem({"cu_seqlens", "q", "r"})
        if len(cu) < 1 or (len(cu) == 1 and first.shape[1]):
            yield Problem({"cu_seqlens"})
        yield "N", len(cu) - 1, "cu_seqlens"


def _rules(op: str, step: bool, public: bool) -> Callable[[Args, Sizes], Iterator[Problem]]:
    few = {"gated_delta_rule": "v", "rwkv7": "r"}.get(op, "q")

    def rules(args: Args, sizes: Sizes) -> Iterator[Problem]:
        H, G = sizes["H"], sizes.get("G", sizes["H"])
        if H < 1 or G < 1 or H % G:
            yield Problem({few, "q", "k", "v", "H", "Hk"})
        for letter, most in MOST.items():
            if not 1 <= sizes.get(letter, 1) <= most:
                yield Problem({letter, "q", "k", "v", "s", "r"})
        gate = args[gate_of(op)]
        if gate is not None and bool((gate > GATE_ALLOWANCE).any()):
            yield Problem({gate_of(op)})
        if not step:
            cu = args["cu_seqlens"]
            values = None if cu is None else cu.tolist()
            T = sizes["T"]
            if values and (values[0] != 0 or values[-1] != T or any(a > b for a, b in pairwise(values))):
                yield Problem({"cu_seqlens"})
        if op == "gsa" and not step and (args["initial_keys"] is None) != (args["initial_values"] is None):
            names = {"initial_keys", "initial_values", "initial_state"}
            yield Problem(names)

    return rules


def _tokens(op: str, rng: random.Random, step: bool, kind: str) -> Args:
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    dtype = torch.float32 if "float32" in kind or rng.random() < 0.6 else rng.choice(FLOATS)
    sizes = dict(DIMENSIONS)
    if "packed" in kind:
        sizes["B"] = 1
    args: Args = {}
    for key, text in OPS[op]["tokens"].items():
        name, layouts = key.rstrip("?"), text.split("|")
        shape = [sizes[d] for d in rng.choice(layouts).split() if not (step and d == "T")]
        x = torch.randn(shape, generator=generator)
        if name == gate_of(op):
            x = -x.abs()
        elif name == "beta":
            x = x.sigmoid()
        loose = name in (gate_of(op), "beta") and rng.random() < 0.5
        args[name] = None if key.endswith("?") and rng.random() < 0.25 else x if loose else x.to(dtype)
    return args


def _state(op: str, rng: random.Random, N: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    sizes = DIMENSIONS | {"N": N}
    return {
        name: torch.randn([sizes[d] for d in layout.split()], generator=generator)
        for name, layout in OPS[op]["states"].items()
    }


def _chunk_variant(op: str, kind: str, backends: tuple[str, ...], public: bool, wide: bool, backward: bool) -> Variant:
    first = "r" if op == "rwkv7" else "q"
    tokens = _token_args(op, False, wide)
    states = [
        Arg(name, (layout,), f"{first} or wider", optional=True, also=STATE_NAMES[name])
        for name, layout in OPS[op]["states"].items()
    ]
    cu = Arg("cu_seqlens", ("C",), (torch.int32, torch.int64), True, values=(-1, 1, 2, 4, 6, 2**31 - 1, 2**31, 2**62))
    order = [*tokens, _scale(public), *states, cu, *_flags(op), _backend(backends)]
    finals = {f"dfinal_{n.removeprefix('initial_')}": layout for n, layout in OPS[op]["states"].items()}
    if backward:
        gradients = [Arg(n, (layout,), (torch.float32,)) for n, layout in finals.items()]
        order = [Arg("do", ("B T H V",), f"as {first}"), *gradients, *order]

    def build(rng: random.Random) -> Args:
        args = _tokens(op, rng, False, kind)
        N = 3 if "packed" in kind else DIMENSIONS["B"]
        given = _state(op, rng, N)
        with_state = rng.random() < 0.6
        args["scale"] = 0.4
        args |= given if with_state else dict.fromkeys(given)
        dtype = rng.choice([torch.int32, torch.int64])
        args["cu_seqlens"] = torch.tensor([0, 2, 2, 5], dtype=dtype) if "packed" in kind else None
        if op == "gated_delta_rule":
            args["qk_l2norm"] = rng.random() < 0.5
        if backward:
            shape = (*args["v"].shape[:2], DIMENSIONS["H"], DIMENSIONS["V"])
            args["do"] = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(args[first].dtype)
            args |= {n: torch.ones_like(s) for n, s in zip(finals, given.values(), strict=True)}
        return args

    return Variant(kind, tuple(order), build, _rules(op, False, public), _links)


def _step_variant(op: str, backends: tuple[str, ...], public: bool) -> Variant:
    first = "r" if op == "rwkv7" else "q"
    layouts = list(OPS[op]["states"].values())
    names = ["keys", "values"] if op == "gsa" else ["state"]
    states = [
        Arg(name, (layout.replace("N", "B"),), (torch.float32,), also=STATE_NAMES[name], dense="refused")
        for name, layout in zip(names, layouts, strict=True)
    ]
    order = [*_token_args(op, True, False), *states, _scale(public), *_flags(op), _backend(backends)]

    def build(rng: random.Random) -> Args:
        args = _tokens(op, rng, True, "")
        args |= dict(zip(names, _state(op, rng, DIMENSIONS["B"]).values(), strict=True))
        args["scale"] = 0.4
        if op == "gated_delta_rule":
            args["qk_l2norm"] = rng.random() < 0.5
        assert first in args
        return args

    return Variant("step", tuple(order), build, _rules(op, True, public))


def _op_call(name: str, order: list[str]) -> Callable[[Args], Any]:
    return lambda args: getattr(torch.ops.icrl, name)(*[args[n] for n in order], args["backend"])


def _public_call(op: str) -> Callable[[Args], Any]:
    tokens = [key.rstrip("?") for key in OPS[op]["tokens"]]

    def call(args: Args) -> Any:
        if op == "gsa":
            pair = (args["initial_keys"], args["initial_values"])
            state = None if all(x is None for x in pair) else pair
        else:
            state = args["initial_state"]
        more = {"qk_l2norm": args["qk_l2norm"]} if op == "gated_delta_rule" else {}
        return getattr(ik, op)(
            *[args[n] for n in tokens],
            scale=args["scale"],
            initial_state=state,
            output_final_state=True,
            cu_seqlens=args["cu_seqlens"],
            backend=args["backend"],
            **more,
        )

    return call


def _public_step(op: str) -> Callable[[Args], Any]:
    def call(args: Args) -> Any:
        given: list[Any] = []
        for name in OPS[op]["step"]:
            if name == "values":
                given[-1] = (given[-1], args["values"])
            else:
                given.append(args[name])
        return getattr(ik, f"{op}_step")(*given, backend=args["backend"])

    return call


def doors(backends: dict[str, tuple[str, ...]]) -> list[Door]:
    """`backends`: those that run on a CPU, by op."""
    found = []
    for op in OPS:
        has = tuple(dict.fromkeys((*backends[op], "reference")))
        for backend in ("auto", *has):
            wide = backend in ("auto", "reference")
            variants = [_chunk_variant(op, kind, has, True, wide, False) for kind in ("whole", "packed")]
            found.append(Door(op, "public", backend, tuple(variants), _public_call(op)))
        for name, backward in ((op, False), (f"{op}_backward", True)):
            for backend in ("auto", *backends[name]):
                wide = backend in ("auto", "reference")
                variants = [
                    _chunk_variant(op, kind, backends[name], False, wide, backward) for kind in ("whole", "packed")
                ]
                order = [a.name for a in variants[0].args if a.name != "backend"]
                found.append(Door(name, "op", backend, tuple(variants), _op_call(name, order)))
        step = f"{op}_step"
        for backend in ("auto", *backends[step]):
            for entry in ("public", "op"):
                variants = (_step_variant(op, backends[step], entry == "public"),)
                call = _public_step(op) if entry == "public" else _op_call(step, OPS[op]["step"])
                found.append(Door(step, entry, backend, variants, call))
    return found
