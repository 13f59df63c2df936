"""The doors of the tabular ops that take tables and histories: value_iteration, model_based_q, pack_transition, rollout_tables,
draw_tokens and sample_anymdp_tables."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import Any

import torch
from malformed import BACKENDS_THAT_ARE_NOT, Arg, Args, Door, Problem, Sizes, Variant, changed_list
from tabular import random_tasks
from torch import Tensor

import icrl_kernels as ik
from icrl_kernels.tabular.anymdp import sample_anymdp_tables
from icrl_kernels.tabular.emission import draw_tokens

F32, F64, I16, I32, I64, BOOL = torch.float32, torch.float64, torch.int16, torch.int32, torch.int64, torch.bool
NAN, INF = math.nan, math.inf
N, S, A = 2, 6, 3
PROBABILITIES = (NAN, INF, -0.5, 2.0, 0.25, 0.0)
WINDOW = ("windows", "transition")
SIZES = (0, -1, 1, 2, S + 1, A + 1, 2**31, 2**62)


def backend_arg(names: tuple[str, ...], optional: bool = False) -> Arg:
    wants = (*names, "auto")
    return Arg("backend", type=str, optional=optional, scalars=BACKENDS_THAT_ARE_NOT, wants=lambda x: x in wants)


def tasks(rng: random.Random, ragged: bool = False):
    return random_tasks(N, S, A, seed=rng.randrange(1000), ragged=ragged)


def unpacked(args: Args, values: str = "transition") -> Tensor | Problem:
    """[N,S,A,S] of packed tables, or why a window leaves its table. Rows of length 0 have no window."""
    probability = args[values]
    n, s, a = args["offset"].shape
    table = torch.zeros(n, s, a, s, dtype=probability.dtype)
    for i in range(n * s * a):
        at = (i // a // s, i // a % s, i % a)
        offset, first, length = (int(args[x][at]) for x in ("offset", "first", "length"))
        inside = first >= 0 and length >= 0 and first + length <= s
        inside &= length == 0 or 0 <= offset <= len(probability) - length
        if not inside:
            return Problem({"offset", "first", "length", *WINDOW})
        table[at][first : first + length] = probability[offset : offset + length]
    return table


# ---- value_iteration ----------------------------------------------------------------------------------------------------

METHODS = ("auto", "policy_iteration", "value_iteration", "modified_policy_iteration")


def _solver_rules(backend: str, dense: bool):
    def rules(args: Args, sizes: Sizes) -> Iterator[Problem]:
        discount, size = args["discount"], args["num_states"]
        if sizes["S"] < 1 or sizes["A"] < 1:
            yield Problem({"transition", "S", "A", *WINDOW, "offset"})
            return
        if backend == "triton" and args["method"] == "policy_iteration":
            yield Problem({"method"})
        if not bool(((discount >= 0) & (discount <= 1)).all()):
            yield Problem({"discount"})
        elif bool((discount == 1).any()):
            yield Problem({"discount"}, "unsaid")
        if size is not None and bool(((size < 1) | (size > sizes["S"])).any()):
            yield Problem({"num_states"})
            return
        if size is not None and bool((size != sizes["S"]).any()):
            yield Problem({"num_states", "transition"}, "unsaid")
        table = args["transition"] if dense else unpacked(args)
        if isinstance(table, Problem):
            yield table
            return
        total = table.double().sum(3)
        right = (table >= 0).all(3) & ((total == 0) | ((total - 1).abs() <= 1e-4))  # NaN is wrong
        if not bool(right.all()):
            yield Problem({"transition", "probability"})
        rows = (table == 0).all(3)
        done = rows.all(2) if args["terminal"] is None else args["terminal"]
        if bool((done[..., None] & ~rows).any()):
            yield Problem({"terminal", "transition"})
        reward = args["reward"]
        if reward.dim() == 3:
            bad = ~reward.isfinite().all(2) & ~done
        else:
            by_successor = reward if reward.dim() == 4 else unpacked(args, "reward")
            bad = (~by_successor.isfinite() & (table > 0)).any(3).any(2) & ~done
        if bool(bad.any()):
            yield Problem({"reward"})

    return rules


def _solver_variants(backends: tuple[str, ...], backend: str, public: bool) -> tuple[Variant, ...]:
    tail = (
        Arg("discount", ("G", "N G"), (F32, F64), values=(NAN, INF, -0.1, 1.5, 0.5), numpy=public),
        Arg("terminal", ("N S",), (BOOL,), optional=True, values=(True, False), numpy=public),
        Arg("num_states", ("N",), (I64,), optional=True, values=SIZES, numpy=public),
        Arg("tol", type=(float, int), scalars=(0.0, -1.0, NAN, -INF), wants=lambda x: x > 0),
        Arg("method", type=str, scalars=("nope", "", *METHODS), wants=lambda x: x in METHODS),
        backend_arg(backends, optional=public),
    )
    dense = (
        Arg("transition", ("N S A S",), (F32, F64), values=PROBABILITIES, numpy=public),
        Arg("reward", ("N S A S", "N S A"), "as transition", values=(NAN, INF, 0.5), numpy=public),
        *tail,
    )
    packed = (
        Arg("transition", ("M",), (F32, F64), also=("probability",), values=PROBABILITIES),
        Arg("reward", ("M", "N S A"), "as transition", values=(NAN, INF, 0.5), numpy=public),
        Arg(
            "offset",
            ("N S A",),
            (I64,),
            also=(*WINDOW, "windows.offset", "windows[0]"),
            values=(-1, 1, 1000, 2**31, 2**62),
        ),
        Arg("first", ("N S A",), (I32,), also=(*WINDOW, "windows.first", "windows[1]"), values=(-1, 1, S, 2**31 - 1)),
        Arg(
            "length",
            ("N S A",),
            (I32,),
            also=(*WINDOW, "windows.length", "windows[2]"),
            values=(-1, 0, S + 1, 2**31 - 1),
        ),
        *tail,
    )

    def build(rng: random.Random, windows: bool) -> Args:
        t = tasks(rng)
        dtype = rng.choice([F32, F64])
        transition, reward = t.transition.to(dtype), t.reward.to(dtype)
        args: Args = {"discount": torch.tensor([0.9, 0.5]), "tol": 1e-6, "method": rng.choice(METHODS[::3])}
        if rng.random() < 0.5:
            args["discount"] = torch.full((N, 1), 0.8, dtype=F64)
        args["terminal"] = t.terminal if rng.random() < 0.5 else None
        args["num_states"] = torch.full((N,), S) if rng.random() < 0.5 else None
        if windows:
            (args["transition"], args["offset"], args["first"], args["length"]), args["reward"] = ik.pack_transition(
                transition, reward
            )
        else:
            args["transition"], args["reward"] = transition, reward
        if rng.random() < 0.5:
            args["reward"] = (transition * reward).sum(3)
        return args

    return (
        Variant("dense", dense, lambda rng: build(rng, False), _solver_rules(backend, True)),
        Variant(
            "packed",
            packed,
            lambda rng: build(rng, True),
            _solver_rules(backend, False),
            lists={} if public else {"windows": ("transition", "reward", "probability")},
        ),
    )


def _solve_op(args: Args) -> Any:
    windows = [args[x] for x in ("offset", "first", "length")] if "offset" in args else []
    given = ("discount", "terminal", "num_states", "tol", "method", "backend")
    windows = changed_list(args, "windows", windows)
    return torch.ops.icrl.value_iteration(args["transition"], args["reward"], windows, *[args[n] for n in given])


def _solve(args: Args) -> Any:
    transition = args["transition"]
    if "offset" in args:
        transition = ik.PackedTransition(transition, args["offset"], args["first"], args["length"])
    more = {n: args[n] for n in ("terminal", "num_states", "tol", "method", "backend")}
    return ik.value_iteration(transition, args["reward"], args["discount"], **more)


# ---- model_based_q ------------------------------------------------------------------------------------------------------


def _history_rules(args: Args, sizes: Sizes) -> Iterator[Problem]:
    if not sizes["R"] * sizes["T"]:
        return
    indices = {"state": args["num_states"], "action": args["num_actions"], "done": 3, "next_state": args["num_states"]}
    for name, most in indices.items():
        x = args[name]
        if x is not None and bool(((x < 0) | (x >= most)).any()):
            yield Problem({name})
    if not bool(args["reward"].isfinite().all()):
        yield Problem({"reward"})


def _history_variant(backends: tuple[str, ...]) -> Variant:
    index = (-1, S, A, 2**31, 2**31 - 1, 2**62, 2**63 - 1, 0)
    count = (0, -1, 2**31, 2**40, 2**62, 2**63 - 1, -(2**63))
    shared = ("num_states", "num_actions", "discount", "bonus", "sweeps")
    args = (
        Arg("state", ("R T",), (I64,), values=index),
        Arg("action", ("R T",), (I64,), values=index),
        Arg("reward", ("R T",), (F32,), values=(NAN, INF, -INF, 0.5)),
        Arg("done", ("R T",), (I64,), values=(-1, 3, 2**31, 2**62, 1)),
        Arg("next_state", ("R T",), (I64,), optional=True, values=index),
        Arg("num_states", type=int, scalars=(*count, 32768), wants=lambda x: 1 <= x <= 32767),
        Arg("num_actions", type=int, scalars=count, wants=lambda x: 1 <= x < 2**31),
        Arg("bonus", type=(float, int), scalars=(NAN, INF, -0.1, 1e7), wants=lambda x: 0 <= x <= 1e6),
        Arg("discount", type=(float, int), scalars=(NAN, INF, -0.1, 1.0, 1.5), wants=lambda x: 0 <= x <= 0.9999),
        Arg("sweeps", type=int, scalars=(0, -1, -(2**63)), wants=lambda x: x >= 1),
        backend_arg(backends),
    )
    assert set(shared) <= {a.name for a in args}

    def build(rng: random.Random) -> Args:
        g = torch.Generator().manual_seed(rng.randrange(1000))
        R, T = 3, 7
        return {
            "state": torch.randint(S, (R, T), generator=g),
            "action": torch.randint(A, (R, T), generator=g),
            "reward": torch.randn(R, T, generator=g),
            "done": torch.randint(3, (R, T), generator=g),
            "next_state": torch.randint(S, (R, T), generator=g) if rng.random() < 0.5 else None,
            **{"num_states": S, "num_actions": A, "bonus": 0.2, "discount": 0.9, "sweeps": 2},
        }

    return Variant("histories", args, build, _history_rules)


HISTORY = (
    "state",
    "action",
    "reward",
    "done",
    "next_state",
    "num_states",
    "num_actions",
    "bonus",
    "discount",
    "sweeps",
)


def _q_op(args: Args) -> Any:
    return torch.ops.icrl.model_based_q(*[args[n] for n in HISTORY], args["backend"])


def _q(args: Args) -> Any:
    more = {n: args[n] for n in ("next_state", "bonus", "discount", "sweeps", "backend")}
    first = ("state", "action", "reward", "done", "num_states", "num_actions")
    return ik.model_based_q(*[args[n] for n in first], **more)


# ---- pack_transition, rollout_tables ------------------------------------------------------------------------------------


def _pack_variant() -> Variant:
    args = (
        Arg("transition", ("N S A S",), (F32, F64)),
        Arg("reward", ("N S A S",), "as transition", optional=True),
    )

    def build(rng: random.Random) -> Args:
        t = tasks(rng)
        return {"transition": t.transition, "reward": t.reward if rng.random() < 0.7 else None}

    return Variant("dense", args, build)


def _table_rules(dense: bool):
    def rules(args: Args, sizes: Sizes) -> Iterator[Problem]:
        s, a = sizes["S"], sizes["A"]
        for name, most in (("max_steps", 2**63 - 1), ("num_states", s), ("num_actions", a)):
            if bool(((args[name] < 1) | (args[name] > most)).any()):
                yield Problem({name})
                return
        for name in ("noise_state", "noise_action"):
            if not bool(((args[name] >= 0) & args[name].isfinite()).all()):
                yield Problem({name})
        table = args["transition"] if dense else unpacked(args)
        if isinstance(table, Problem):
            yield table
            return
        reward = args["reward"] if dense else unpacked(args, "reward")
        assert isinstance(reward, Tensor)
        states = torch.arange(s) < args["num_states"][:, None]
        acts = states & ~args["terminal"]
        read = acts[:, :, None] & (torch.arange(a) < args["num_actions"][:, None])[:, None]
        own = torch.where(states[:, None, None], table, 0.0).double()
        right = ((table == 0) | states[:, None, None]).all(3) & (own >= 0).all(3) & ((own.sum(3) - 1).abs() <= 1e-4)
        others = {"terminal", "num_states", "num_actions"}
        if bool((read & ~right).any()):
            yield Problem({"transition", "probability", *others})
        if bool((~reward.isfinite() & (table > 0)).any(3)[read].any()):
            yield Problem({"reward"})
        start = args["start"]
        right = (torch.where(acts, start.double(), 0.0).sum(1) - 1).abs() <= 1e-4
        right &= ((start >= 0) & (acts | (start == 0))).all(1)
        if not bool(right.all()):
            yield Problem({"start", *others})

    return rules


def _table_variants() -> tuple[Variant, ...]:
    packed = PACKED_TABLE
    tail = (
        Arg("noise_state", ("N S",), (F32,), values=(NAN, INF, -0.5, 0.5)),
        Arg("noise_action", ("N S A",), (F32,), values=(NAN, INF, -0.5, 0.5)),
        Arg("start", ("N S",), (F32,), values=PROBABILITIES),
        Arg("terminal", ("N S",), (BOOL,), values=(True, False)),
        Arg("max_steps", ("N",), (I64,), values=(0, -1, 2**62)),
        Arg("num_states", ("N",), (I64,), values=SIZES),
        Arg("num_actions", ("N",), (I64,), values=SIZES),
    )
    rewards = (NAN, INF, 0.5)
    dense = (
        Arg("transition", ("N S A S",), (F32,), values=PROBABILITIES),
        Arg("reward", ("N S A S",), (F32,), values=rewards),
        *tail,
    )

    def build(rng: random.Random, windows: bool) -> Args:
        args: Args = tasks(rng, ragged=True).raw()
        if windows:
            (args["transition"], args["offset"], args["first"], args["length"]), args["reward"] = ik.pack_transition(
                args["transition"], args["reward"]
            )
        return args

    windows = (packed[0], Arg("reward", ("M",), (F32,), values=rewards), *packed[1:], *tail)
    return (
        Variant("dense", dense, lambda rng: build(rng, False), _table_rules(True)),
        Variant("packed", windows, lambda rng: build(rng, True), _table_rules(False)),
    )


PACKED_TABLE = (
    Arg("transition", ("M",), (F32,), also=("probability",), values=PROBABILITIES),
    Arg("offset", ("N S A",), (I64,), also=WINDOW, values=(-1, 1, 1000, 2**31, 2**62)),
    Arg("first", ("N S A",), (I32,), also=WINDOW, values=(-1, 1, S, 2**31 - 1)),
    Arg("length", ("N S A",), (I32,), also=WINDOW, values=(-1, 0, S + 1, 2**31 - 1)),
)


def _make_tables(args: Args) -> Any:
    given = {n: x for n, x in args.items() if n not in ("offset", "first", "length", "changed lists")}
    if "offset" in args:
        given["transition"] = ik.PackedTransition(args["transition"], args["offset"], args["first"], args["length"])
    return ik.rollout_tables(**given)


# ---- draw_tokens, sample_anymdp_tables ----------------------------------------------------------------------------------


def _token_rules(args: Args, sizes: Sizes) -> Iterator[Problem]:
    if not sizes["M"]:
        return
    if sizes["O"] < 1:
        yield Problem({"emission"})
        return
    for name, least, most in (("task", 0, sizes["N"]), ("state", -1, sizes["S"])):
        if bool(((args[name] < least) | (args[name] >= most)).any()):
            yield Problem({name, "emission"})


def _token_variant() -> Variant:
    index = (-1, -2, 4, 2**31, 2**62, 0)
    args = (
        Arg("emission", ("N K S O",), (F32,)),
        *(Arg(name, ("M",), (I64,), values=index if name != "key" else ()) for name in ("task", "state", "key")),
    )

    def build(rng: random.Random) -> Args:
        g = torch.Generator().manual_seed(rng.randrange(1000))
        emission = torch.rand(3, 2, 4, 5, generator=g)
        return {
            "emission": emission / emission.sum(-1, keepdim=True),
            "task": torch.randint(3, (7,), generator=g),
            "state": torch.randint(-1, 4, (7,), generator=g),
            "key": torch.randint(2**60, (7,), generator=g),
        }

    return Variant("tokens", args, build, _token_rules)


SAMPLED = ("transition", "reward", "noise_state", "noise_action", "start", "terminal", "state_mapping", "max_steps")


def _sample_rules(args: Args, sizes: Sizes) -> Iterator[Problem]:
    size = args["num_states"]
    if bool(((size < 8) | (size > sizes["S"])).any()):
        yield Problem({"num_states"})
    if sizes["A"] < 2:
        yield Problem({"A", "noise_action", "transition", "reward"})
    if args["num_observations"] < sizes["S"]:
        yield Problem({"num_observations"})


def _sample_variant() -> Variant:
    layouts = {"transition": "N S A S", "reward": "N S A S", "noise_action": "N S A", "max_steps": "N"}
    dtypes = {"terminal": BOOL, "state_mapping": I64, "max_steps": I64}
    tables = tuple(
        Arg(name, (layouts.get(name, "N S"),), (dtypes.get(name, F32),), dense="refused") for name in SAMPLED
    )
    args = (
        Arg("keys", ("N",), (I64,), dense="refused"),
        Arg("num_states", ("N",), (I64,), dense="refused", values=(0, -1, 7, 9, 11, 2**31, 2**62)),
        *tables,
        Arg("num_observations", type=int, scalars=(0, -1, 9, -(2**63)), wants=lambda x: x >= 1),
        Arg("max_attempts", type=int, scalars=(0, -1, -(2**63)), wants=lambda x: x >= 1),
    )

    def build(rng: random.Random) -> Args:
        n, s, a = 2, 10, 3
        shapes = {"N": n, "S": s, "A": a}
        made = {
            name: torch.zeros([shapes[d] for d in layouts.get(name, "N S").split()], dtype=dtypes.get(name, F32))
            for name in SAMPLED
        }
        made["state_mapping"] -= 1
        keys = torch.tensor([rng.randrange(2**60) for _ in range(n)])
        more = {"num_observations": 20, "max_attempts": 10**6}
        return {"keys": keys, "num_states": torch.tensor([8, s]), **made, **more}

    return Variant("tasks", args, build, _sample_rules)


def _sample(args: Args) -> Any:
    more = {n: args[n] for n in ("num_observations", "max_attempts")}
    tables = [args[n] for n in SAMPLED]
    return [sample_anymdp_tables(args["keys"], args["num_states"], *tables, **more), *tables]


def doors(backends: dict[str, tuple[str, ...]]) -> list[Door]:
    found = []
    for op, call, op_call in (("value_iteration", _solve, _solve_op), ("model_based_q", _q, _q_op)):
        for backend in ("auto", *backends[op]):
            for entry in ("public", "op"):
                if op == "value_iteration":
                    variants = _solver_variants(backends[op], backend, entry == "public")
                else:
                    variants = (_history_variant(backends[op]),)
                found.append(Door(op, entry, backend, variants, call if entry == "public" else op_call))
    plain = [
        Door(
            "pack_transition",
            "public",
            "",
            (_pack_variant(),),
            lambda a: ik.pack_transition(a["transition"], a["reward"]),
        ),
        Door("rollout_tables", "public", "", _table_variants(), _make_tables),
        Door(
            "draw_tokens",
            "internal",
            "",
            (_token_variant(),),
            lambda a: draw_tokens(*[a[n] for n in ("emission", "task", "state", "key")]),
        ),
        Door("sample_anymdp_tables", "internal", "", (_sample_variant(),), _sample),
    ]
    return [*found, *plain]
