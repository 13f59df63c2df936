"""Makes malformed calls in a process that may die of one: python malformed_worker.py SEED FIRST LAST FILE.

FILE gets a line before each call, which describes it, and one after it.
"""

from __future__ import annotations

import json
import os
import random
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ.setdefault("TRITON_INTERPRET", "1")
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import malformed
import malformed_linear_attention
import malformed_rollout
import malformed_tabular
import torch
from malformed import Args, Door, Variant
from torch import Tensor

from icrl_kernels import _registry

ON_CPU = ("cpu", "plain", "reference", "triton")
ATTEMPTS = 200  # mutations that leave a call valid, one after another
MEMORY = 24 * 2**30  # of address space: an absurd size is refused, and does not fill the machine


def all_doors() -> list[Door]:
    backends = {op: tuple(b for b in table if b in ON_CPU) for op, table in _registry.BACKENDS.items()}
    rooms = (malformed_linear_attention, malformed_tabular, malformed_rollout)
    return [door for room in rooms for door in room.doors(backends)]


def tensors(x: Any) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, dict):
        for y in x.values():
            yield from tensors(y)
    elif isinstance(x, (list, tuple)):
        for y in x:
            yield from tensors(y)


def same(a: Any, b: Any) -> bool:
    """The same bits."""
    a, b = list(tensors(a)), list(tensors(b))

    def bits(x: Tensor) -> Tensor:
        return x.detach().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)

    return len(a) == len(b) and all(
        x.shape == y.shape and x.dtype == y.dtype and torch.equal(bits(x), bits(y)) for x, y in zip(a, b, strict=True)
    )


def copied(args: Args) -> Args:
    return {n: x.contiguous().clone() if malformed.plain(x) else x for n, x in args.items()}


def begin(door: Door, rng: random.Random) -> tuple[Variant, Args]:
    variant = rng.choice(door.variants)
    args = variant.build(rng)
    if any(a.name == "backend" for a in variant.args):
        args["backend"] = door.backend
    return variant, args


class Canary:
    """A valid call of an op, which must give the same bits whatever was refused before."""

    def __init__(self, doors: list[Door]):
        self.doors: dict[str, Door] = {}
        for door in doors:
            if door.backend in ("auto", "") and door.op not in self.doors:
                self.doors[door.op] = door
        self.known: dict[str, Any] = {}

    def result(self, op: str) -> Any:
        door = self.doors[op]
        args = begin(door, random.Random(0))[1]
        return [*tensors(door.call(args)), *tensors(args)]

    def sings(self, op: str) -> bool:
        result = self.result(op)
        return same(result, self.known.setdefault(op, result))


def outcome(door: Door, args: Args, verdict: malformed.Verdict, what: str) -> str:
    """ "" where all is well, or what is wrong."""
    given = {n: x for n, x in args.items() if malformed.plain(x) and x.device.type == "cpu"}
    before = {n: x.detach().clone() for n, x in given.items()}
    try:
        result = door.call(args)
    except Exception as error:
        kind, message = type(error).__name__, str(error)
        short = f"{kind}: {' '.join(message.split())[:160]}"
        if verdict.kind == "valid":
            return f"refused though valid: {short}"
        if verdict.kind == "unsaid":
            return ""
        if door.op.endswith("_step") and ("g: with an element" in what or "w: with an element" in what):
            before = {n: x for n, x in before.items() if n not in ("state", "keys", "values")}  # as its docstring says
        if (
            door.op.startswith("rollout") and "tables." in what
        ):  # other records may have made their steps, as is documented
            before = {n: x for n, x in before.items() if not n.startswith("state.")}
        changed = [n for n, x in before.items() if not same(x, given[n])]
        if changed:
            return f"refused, but {', '.join(changed)} has changed: {short}"
        told = {
            part.split(":")[0].strip() for part in what.split(";")
        }  # of two things that are wrong either may be named
        told |= {name.rpartition(".")[2] for name in told} | {"initial_state" for name in told if "initial_" in name}
        if not malformed.named(message) & (verdict.names | told):
            return f"the wrong argument is named, wanted one of {sorted(verdict.names)}: {short}"
        dispatcher = verdict.type_error or "Expected a value of type" in message
        right = (ValueError, TypeError, RuntimeError) if dispatcher else (ValueError,)
        return "" if isinstance(error, right) else f"an error of the wrong kind: {short}"
    if verdict.kind == "refused":
        return f"accepted, wanted an error that names one of {sorted(verdict.names)}"
    if any(not x.is_contiguous() for x in given.values()):  # other strides, the same values
        again = door.call(copied({**args, **before}))
        if not same(result, again):
            return "another result than of contiguous tensors"
    return ""


def calls(doors: list[Door], seed: int, i: int) -> Iterator[tuple[Door, Variant, Args, malformed.Verdict, str]]:
    """Mutated calls of door i (they go round), until one of them is malformed."""
    door = doors[i % len(doors)]
    for attempt in range(ATTEMPTS):
        rng = random.Random(f"{seed} {i} {attempt}")
        variant, args = begin(door, rng)
        what = malformed.mutate(rng, variant, args)
        if rng.random() < 0.15:
            what += f"; {malformed.mutate(rng, variant, args)}"
        verdict = malformed.judge(variant, args)
        if verdict.kind == "valid" and "tables." in what and "with an element" in what:
            verdict.kind = "unsaid"  # tables are made by rollout_tables, and no rule speaks of others
        if verdict.kind == "refused" or door.backend != "triton":  # its interpreter is slow
            yield door, variant, args, verdict, what
        if verdict.kind == "refused":
            return
    raise AssertionError(f"{door}: no malformed call in {ATTEMPTS} mutations")


def main() -> None:
    seed, first, last = (int(x) for x in sys.argv[1:4])
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    doors = all_doors()
    canary = Canary(doors)
    with open(sys.argv[4], "a") as file:

        def say(**line: Any) -> None:
            file.write(json.dumps(line) + "\n")
            file.flush()

        for op in canary.doors:
            say(i=first, call=f"{op}: a valid call", kind="valid")
            canary.sings(op)
            say(wrong="" if canary.sings(op) else "two valid calls differ")
        for i in range(first, last):
            for door, variant, args, verdict, what in calls(doors, seed, i):
                say(i=i, call=f"{door}, {variant.label}: {what}", door=str(door), kind=verdict.kind)
                wrong = outcome(door, args, verdict, what)
                if not wrong and not canary.sings(door.op):
                    wrong = "a valid call after it gives another result"
                say(wrong=wrong)


if __name__ == "__main__":
    main()
