"""The doors of the simulator: rollout, rollout_start and rollout_step."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import Any

import torch
from malformed import Arg, Args, Door, Problem, Sizes, Variant, changed_list
from malformed_tabular import BOOL, F32, F64, I16, I32, I64, A, N, S, backend_arg, tasks
from torch import Tensor

import icrl_kernels as ik
from icrl_kernels.tabular.rollout_reference import thresholds

NAN, INF = math.nan, math.inf
R, P, G = 4, 2, 3
BUILTIN = 4  # behaviours that need no table
INDEX = (-1, -2, 0, 1, A, S, 2**31, 2**62, 2**63 - 1)
BAD = (NAN, INF, -0.5, 0.5)
INTEGERS = (I16, I32, I64, torch.int8, torch.uint8)

TABLES = {
    "cumulative": ("M+16", F32, BAD),
    "reward": ("W", F32, BAD),  # at least M: tasks may share what others use
    "offset": ("N S A", I64, (-1, 1, 1000, 2**31, 2**62, -(2**62))),
    "window": ("N S A 2", I16, (-1, 0, 1, S, S + 1, 32000, -5)),
    "noise_state": ("N S", F32, BAD),
    "noise_action": ("N S A", F32, BAD),
    "start": ("N S", F32, BAD),
    "terminal": ("N S", BOOL, (True, False)),
    "max_steps": ("N", I64, (0, -1, 1, 2**62)),
    "num_states": ("N", I64, (0, -1, 1, S + 1, 2**31, 2**62)),
    "num_actions": ("N", I64, (0, -1, 1, A + 1, 2**31, 2**62)),
}
BEHAVIOURS = {name: "R" for name in ik.Behaviours._fields} | {"initial": "R P+4", "later": "R P+4"}
STATE = {
    **dict.fromkeys(("seed", "record", "task", "step", "state", "elapsed", "behaviour"), ("R", I64)),
    "visits": ("R S A", I32),
    "q": ("R S A", F32),
    "reward_sum": ("R S A", F32),
    "successors": ("R S S A", F32),
    "span": ("R S 2", I16),
    "value": ("R S", F32),
    "reward_square": ("R", F64),
}
STATE_VALUES = {"task": INDEX, "state": INDEX, "behaviour": INDEX, "span": (-1, 1, S + 1, 32000)}
WRITTEN = "refused"


def _args(prefix: str, name: str, layouts: tuple[str, ...], dtypes, **more) -> Arg:
    return Arg(f"{prefix}.{name}", layouts, dtypes, also=(prefix, name), **more)


def _tables(dense: str) -> tuple[Arg, ...]:
    return tuple(_args("tables", n, (layout,), (d,), values=v, dense=dense) for n, (layout, d, v) in TABLES.items())


def _state(dense: str) -> tuple[Arg, ...]:
    return tuple(
        _args(
            "state",
            n,
            (layout,) if i < 7 else ("0", layout),
            (dtype,),
            values=STATE_VALUES.get(n, ()),
            dense=dense,
        )
        for i, (n, (layout, dtype)) in enumerate(STATE.items())
    )


def _behaviours() -> tuple[Arg, ...]:
    return tuple(
        _args("behaviours", n, (layout,), (F32,), values=(*BAD, 1.5, 1.0, 0.0), dense="unsaid")
        for n, layout in BEHAVIOURS.items()
    )


def _values(args: Args, sizes: Sizes) -> Iterator[Problem]:
    """Everything whose value is an index, a size, a chance or a discount."""
    t = {n: args[f"tables.{n}"] for n in TABLES}
    s, a, m = sizes["S"], sizes["A"], sizes["M"]
    for name, most in (("num_states", s), ("num_actions", a)):
        if bool(((t[name] < 1) | (t[name] > most)).any()):
            yield Problem({name, f"tables.{name}", "tables"})
            return
    if sizes["W"] < m:
        yield Problem({"M", "tables", "reward", "cumulative", "tables.reward", "tables.cumulative"})
        return
    own = torch.arange(s) < t["num_states"][:, None]
    acts = own & ~t["terminal"]
    read = acts[:, :, None] & (torch.arange(a) < t["num_actions"][:, None])[:, None]
    first, length = t["window"][..., 0].long(), t["window"][..., 1].long()
    names = {"tables", "offset", "window", "tables.offset", "tables.window", "num_states", "tables.num_states"}
    wrong = (first < 0) | (length < 0) | (first + length > t["num_states"][:, None, None])
    wrong |= (t["offset"] < 0) | (t["offset"] > m - length)
    if bool((wrong | (read & (length < 1))).any()):
        yield Problem(names, "unsaid")  # refused where a record reads it, and it may not come there
    floats = [t[n] for n in ("cumulative", "reward", "noise_state", "noise_action", "start")]
    if not all(bool(x.isfinite().all()) and bool((x >= 0).all()) for x in (floats[0], *floats[2:])):
        yield Problem({"tables"}, "unsaid")
    if args.get("state.task") is not None:
        yield from _record_values(args, t, acts)
    if args.get("behaviours.initial") is not None:
        yield from _behaviour_values(args)


def _record_values(args: Args, t: dict[str, Tensor], acts: Tensor) -> Iterator[Problem]:
    task, state, behaviour = (args[f"state.{n}"] for n in ("task", "state", "behaviour"))
    if bool(((task < 0) | (task >= len(acts))).any()):
        yield Problem({"state", "state.task", "task", "task_index"})
        return
    inside = (state >= 0) & (state < acts.shape[1])
    wrong = ~inside & (state != -1)
    wrong |= inside & ~acts[task, torch.where(inside, state, 0)]
    policies = args.get("policies")
    most = (0 if policies is None else policies.shape[1]) + BUILTIN - 1
    if args.get("behaviours.initial") is not None:
        wrong |= (behaviour < -1) | (behaviour > most)
    if bool(wrong.any()):
        yield Problem({"state", "state.state", "state.behaviour", "behaviour", "tables", "terminal", "num_states"})
    elif args.get("behaviours.initial") is None and bool(((behaviour < -1) | (behaviour > most)).any()):
        yield Problem({"state", "behaviour"}, "unsaid")
    span = args["state.span"]
    if bool(((span < 0) | (span > acts.shape[1])).any()):
        used = args.get("behaviours.initial") is not None and bool((args["behaviours.initial"][:, -1] > 0).any())
        yield Problem({"state", "state.span", "span"}, "value" if used else "unsaid")
    for name in ("action", "actions"):
        action = args.get(name)
        if action is None:
            continue
        own = t["num_actions"][task].reshape(-1, *[1] * (action.dim() - 1))
        wrong = (action < 0) | (action >= own)
        steps = args.get("steps", 1)
        if bool((wrong if action.dim() == 1 else wrong[:, :steps]).any()):
            yield Problem({"action", "actions", "tables", "num_actions", "tables.num_actions"})
        elif bool(wrong.any()):
            yield Problem({"action", "actions"}, "unsaid")


def _behaviour_values(args: Args) -> Iterator[Problem]:
    b = {n: args[f"behaviours.{n}"] for n in BEHAVIOURS}
    for name, x in b.items():
        right = (x >= 0) & x.isfinite()
        if name in ("switch", "epsilon"):
            right &= x <= 1
        elif name.endswith("discount"):
            right &= x < 1
        if not bool(right.all()):
            yield Problem({"behaviours", name, f"behaviours.{name}"})
    if not bool((b["initial"].sum(1) > 0).all()):
        yield Problem({"behaviours", "initial", "behaviours.initial"})
    if not bool(((b["later"].sum(1) > 0) | (b["switch"] == 0)).all()):
        yield Problem({"behaviours", "later", "behaviours.later"})
    if args.get("state.task") is None:
        return
    weights = b["initial"] + b["later"]
    for column, names in ((-2, ("visits", "q", "reward_square")), (-1, list(STATE)[9:])):
        if bool((weights[:, column] > 0).any()) and any(not args[f"state.{n}"].numel() for n in names):
            yield Problem({"state", "behaviours", *names, *(f"state.{n}" for n in names)})


def _policy_values(args: Args, sizes: Sizes, probabilities: bool) -> Iterator[Problem]:
    policies = args["policies"]
    if policies is None:
        return
    names = {"policies", "tables", "num_actions", "num_states", "terminal"}
    floats = policies.dtype == F32
    if floats != (policies.dim() == 4):
        yield Problem({"policies"})
        return
    t = {n: args[f"tables.{n}"] for n in TABLES}
    acts = (torch.arange(sizes["S"]) < t["num_states"][:, None]) & ~t["terminal"]
    most = t["num_actions"][:, None, None]
    if not floats:
        wrong = ((policies < 0) | (policies >= most)) & acts[:, None]
    elif probabilities:
        own = torch.arange(sizes["A"]) < t["num_actions"][:, None]
        right = ((policies >= 0) & (own[:, None, None] | (policies == 0))).all(3)
        wrong = ~(right & ((policies.double().sum(3) - 1).abs() <= 1e-4))
        if bool(wrong.any()) and not bool((wrong & acts[:, None]).any()):
            yield Problem(names, "unsaid")  # rows that no record acts by
        wrong &= acts[:, None]
    else:
        last = (most - 1).clamp(0, sizes["A"] - 1)[..., None].expand(*policies.shape[:3], 1)
        ends = policies.gather(3, last).squeeze(3) >= 2  # the threshold that no number passes
        if not bool((ends | ~acts[:, None]).all()):
            yield Problem(names)
        elif not bool(torch.equal(policies, policies.sort(-1).values)) or not bool((policies >= 0).all()):
            yield Problem(names, "unsaid")
        return
    if bool(wrong.any()):
        yield Problem(names)


def _base(rng: random.Random, learners: bool, policies: bool) -> tuple[Any, Any, Any, Tensor | None]:
    """Tables, behaviours, a state and, where wanted, policies as probabilities."""
    tables = tasks(rng, ragged=True).tables()
    chances = None
    if policies:
        own = torch.arange(A) < tables.num_actions[:, None]
        chances = (torch.ones(N, P, S, A) * own[:, None, None]) / own.sum(1)[:, None, None, None]
    count = P if policies else 0
    weights = {"q_learning": 1.0, "model_based": 1.0, "uniform": 1.0} if learners else {"uniform": 1.0}
    behaviours = ik.constant_behaviours(R, count, weights | ({0: 1.0} if policies else {}), switch=0.5)
    index = torch.arange(R) % N
    state = ik.rollout_start(tables, seed=rng.randrange(1000), task_index=index, behaviours=behaviours)
    return tables, behaviours, state, chances


def _spread(**groups: Any) -> Args:
    return {f"{group}.{n}": x for group, fields in groups.items() for n, x in fields._asdict().items()}


def _list(args: Args, group: str, names) -> list[Any]:
    return changed_list(args, group, [args[f"{group}.{n}"] for n in names])


STEPS = (-1, -(2**31), -(2**63), 2**62, 2**63 - 1)


def _op_variants(backends: tuple[str, ...]) -> tuple[Variant, ...]:
    steps = Arg("steps", type=int, scalars=STEPS, wants=lambda x: 0 <= x < 2**40)
    policies = Arg("policies", ("N P S A", "N P S"), (F32, I16), True, dense="unsaid", values=(-1, A, 1, 0, 300, 30000))
    references = Arg("references", ("N S G",), (I16,), True, dense="unsaid")
    actions = Arg("actions", ("R U",), (I64,), dense="unsaid", also=("action",), values=INDEX)
    ends = (steps, backend_arg(backends))
    behaved = (*_tables("unsaid"), policies, references, *_behaviours(), *_state(WRITTEN), *ends)
    acted = (*_tables("unsaid"), references, actions, *_state(WRITTEN), *ends)

    def by_behaviours(rng: random.Random) -> Args:
        tables, behaviours, state, chances = _base(rng, rng.random() < 0.5, rng.random() < 0.6)
        if chances is not None:
            chances = chances.argmax(3).to(I16) if rng.random() < 0.5 else thresholds(chances)
        references = torch.zeros(N, S, G, dtype=I16) if rng.random() < 0.5 else None
        args = _spread(tables=tables, behaviours=behaviours, state=state)
        return {**args, "policies": chances, "references": references, "steps": 5}

    def by_actions(rng: random.Random) -> Args:
        tables, _, state, _ = _base(rng, False, False)
        args = _spread(tables=tables, state=state)
        return {**args, "actions": torch.zeros(R, 5, dtype=I64), "references": None, "steps": 5}

    def no_policies(args: Args) -> Iterator[tuple[str, int, str] | Problem]:
        if args.get("policies") is None:
            yield "P", 0, "policies"

    def rules(args: Args, sizes: Sizes) -> Iterator[Problem]:
        problems = list(_values(args, sizes))
        yield from problems
        if any(p.kind == "value" for p in problems):
            return
        if "policies" in args:
            yield from _policy_values(args, sizes, False)
        if "actions" in args and sizes["U"] < args["steps"]:
            yield Problem({"actions", "action", "steps"})

    return (
        Variant(
            "behaviours", behaved, by_behaviours, rules, no_policies, {"behaviours": ("actions", "action"), "state": ()}
        ),
        Variant("actions", acted, by_actions, rules, lists={"state": ()}),
    )


def _op(args: Args) -> Any:
    behaviours = _list(args, "behaviours", BEHAVIOURS) if "behaviours.initial" in args else []
    tables = [args[f"tables.{n}"] for n in TABLES]
    middle = (args.get("policies"), args["references"], behaviours, args.get("actions"))
    state = _list(args, "state", STATE)
    out = torch.ops.icrl.rollout(*tables, *middle, state, args["steps"], args["backend"])
    return [*out, *state]


def _public_variants(backends: tuple[str, ...]) -> tuple[Variant, ...]:
    integers = (F32, *INTEGERS)
    arms = (
        Arg("policies", ("N P S A", "N P S"), integers, True, values=(-1, A, 0.25, 1, 300, NAN, 40000, 2**40)),
        Arg("references", ("N G S",), INTEGERS, True, values=(0, 32767, 32768, -32769, 2**40)),
    )
    steps = Arg("steps", type=int, scalars=STEPS, wants=lambda x: 0 <= x < 2**40)
    seed = Arg("seed", ("R",), (I64,), type=(int, Tensor), also=("state",), scalars=(2**64, -(2**63) - 1, 2**70, 5))
    seed = Arg(**{**seed.__dict__, "wants": lambda x: -(2**63) <= x < 2**64})
    index = Arg("task_index", ("R",), (I64,), also=("task", "state.task"), values=INDEX)
    ends = (steps, backend_arg(backends))
    new = (*_tables("unsaid"), *arms, *_behaviours(), seed, index, *ends)
    old = (*_tables("unsaid"), *arms, *_behaviours(), *_state("unsaid"), *ends)

    def begin(rng: random.Random, with_state: bool) -> Args:
        tables, behaviours, state, chances = _base(rng, rng.random() < 0.5, rng.random() < 0.6)
        if chances is not None and rng.random() < 0.5:
            chances = chances.argmax(3).to(rng.choice(INTEGERS))
        references = torch.zeros(N, G, S, dtype=rng.choice(INTEGERS)) if rng.random() < 0.5 else None
        args = _spread(tables=tables, behaviours=behaviours)
        args |= {"policies": chances, "references": references, "steps": 5}
        if with_state:
            return args | _spread(state=state)
        return args | {"seed": rng.choice([3, torch.arange(R)]), "task_index": torch.arange(R) % N}

    def no_policies(args: Args) -> Iterator[tuple[str, int, str] | Problem]:
        if args["policies"] is None:
            yield "P", 0, "policies"

    def rules(args: Args, sizes: Sizes) -> Iterator[Problem]:
        if "task_index" in args and bool(((args["task_index"] < 0) | (args["task_index"] >= sizes["N"])).any()):
            yield Problem({"task_index", "task", "state.task"})
            return
        problems = list(_values(args, sizes))
        yield from problems
        if any(p.kind == "value" for p in problems):
            return
        yield from _policy_values(args, sizes, True)
        references = args["references"]
        if references is not None and bool(((references.long() < -32768) | (references.long() > 32767)).any()):
            yield Problem({"references"})

    return (
        Variant("new records", new, lambda rng: begin(rng, False), rules, no_policies),
        Variant("further", old, lambda rng: begin(rng, True), rules, no_policies),
    )


def _of(kind: Any, args: Args, group: str) -> Any:
    return kind(*[args[f"{group}.{n}"] for n in kind._fields])


def _public(args: Args) -> Any:
    more = {n: args[n] for n in ("policies", "references", "steps", "backend")}
    if "seed" in args:
        more |= {"seed": args["seed"], "task_index": args["task_index"]}
    else:
        more["state"] = _of(ik.RolloutState, args, "state")
    return ik.rollout(_of(ik.RolloutTables, args, "tables"), behaviours=_of(ik.Behaviours, args, "behaviours"), **more)


def _start_variant() -> Variant:
    public = _public_variants(())[0].args
    seed, index = (next(a for a in public if a.name == n) for n in ("seed", "task_index"))
    index = Arg(**{**index.__dict__, "also": (*index.also, "record")})  # without it there is a record a task
    args = (*_tables("unsaid"), seed, index, Arg("record", ("R",), (I64,), True, also=("task_index",)))

    def build(rng: random.Random) -> Args:
        tables = tasks(rng, ragged=True).tables()
        seed = rng.choice([3, torch.arange(R)])
        return _spread(tables=tables) | {"seed": seed, "task_index": torch.arange(R) % N, "record": torch.arange(R)}

    def rules(args: Args, sizes: Sizes) -> Iterator[Problem]:
        if bool(((args["task_index"] < 0) | (args["task_index"] >= sizes["N"])).any()):
            yield Problem({"task_index", "task", "state.task"})
            return
        for problem in _values(args, sizes):  # a start reads no window
            problem.kind = "unsaid" if {"window", "offset"} & problem.names else problem.kind
            yield problem

    return Variant("start", args, build, rules)


def _start(args: Args) -> Any:
    more = {n: args[n] for n in ("seed", "task_index", "record")}
    return ik.rollout_start(_of(ik.RolloutTables, args, "tables"), **more)


def _step_variant() -> Variant:
    action = Arg("action", ("R",), (I64,), also=("actions",), values=INDEX)
    args = (*_tables("unsaid"), *_state(WRITTEN), action)

    def build(rng: random.Random) -> Args:
        tables, _, state, _ = _base(rng, False, False)
        return _spread(tables=tables, state=state) | {"action": torch.zeros(R, dtype=I64)}

    return Variant("step", args, build, _values)


def _step(args: Args) -> Any:
    state = _of(ik.RolloutState, args, "state")
    return [*ik.rollout_step(_of(ik.RolloutTables, args, "tables"), state, args["action"]), *state]


def doors(backends: dict[str, tuple[str, ...]]) -> list[Door]:
    found = []
    for backend in ("auto", *backends["rollout"]):
        found.append(Door("rollout", "op", backend, _op_variants(backends["rollout"]), _op))
        found.append(Door("rollout", "public", backend, _public_variants(backends["rollout"]), _public))
    found.append(Door("rollout_start", "public", "", (_start_variant(),), _start))
    # twice, as it is the fastest way in and has the fewest backends
    found += [Door("rollout_step", "public", "", (_step_variant(),), _step)] * 2
    return found
