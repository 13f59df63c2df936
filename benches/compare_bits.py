"""Do two builds compute the same bits? A list of named calls, run in both, compared hash by hash.

    python benches/compare_bits.py OLD_SITE NEW_SITE [--isa avx2] [--only gla] [--json out.json]

Each site is a folder to put on PYTHONPATH. For each instruction set that the machine has, one process a build runs every
call; a call's result is the dtype, the shape and the SHA-256 of each tensor that it returns, or the error that it raises.
The exit status is 1 where a call differs, or raises what nobody asked for. `--list` prints the names.

This file is run by both builds, so it imports public names, and what has moved by its new place or else its old one.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import importlib
import io
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

ISAS = ("avx512", "avx2", "generic")

# What has moved: where it is now, where it was before.
MOVED: dict[str, tuple[str, ...]] = {
    "hash_seed": ("icrl.data.seeds", "icrl.stream"),
    "batch_rows": ("icrl.data.shards", "icrl.shards"),
    "DPDConfig": ("icrl.omnirl.distill", "icrl.distill"),
    "DPDStream": ("icrl.omnirl.distill", "icrl.distill"),
    "PUBLISHED_BEHAVIOURS": ("icrl.omnirl.distill", "icrl.distill"),
    "draw_references": ("icrl.omnirl.distill", "icrl.distill"),
    "make_batch": ("icrl.omnirl.distill", "icrl.distill"),
    "sample_tasks": ("icrl.omnirl.distill", "icrl.distill"),
    "simulate": ("icrl.omnirl.distill", "icrl.distill"),
    "RecordStream": ("icrl.omnirl.record_shards", "icrl.datasets"),
    "OmniRLLearner": ("icrl.omnirl.training", "icrl.omnirl_training"),
    "OmniRLTraining": ("icrl.omnirl.training", "icrl.omnirl_training"),
    "loss_of": ("icrl.omnirl.training", "icrl.omnirl_training"),
    "targets_of": ("icrl.omnirl.training", "icrl.omnirl_training"),
    "tokens_of": ("icrl.omnirl.training", "icrl.omnirl_training"),
    "BASELINES": ("icrl.omnirl.evaluate", "icrl.evaluate"),
    "references": ("icrl.omnirl.evaluate", "icrl.evaluate"),
    "run_agent": ("icrl.omnirl.evaluate", "icrl.evaluate"),
    "run_baseline": ("icrl.omnirl.evaluate", "icrl.evaluate"),
    "scores": ("icrl.omnirl.evaluate", "icrl.evaluate"),
    "Agent": ("icrl.omnirl",),
    "OmniRL": ("icrl.omnirl",),
    "OmniRLConfig": ("icrl.omnirl",),
    "Temperature": ("icrl.omnirl",),
    "shipped": ("icrl.omnirl", "icrl.demo"),
    "LoopConfig": ("icrl.training.loop", "icrl.train"),
    "train": ("icrl.training.loop", "icrl.train"),
    "TaskSet": ("icrl.worlds.task_shards", "icrl.worlds.shards"),
    "TaskShards": ("icrl.worlds.task_shards", "icrl.worlds.shards"),
    "difficulty": ("icrl.worlds.difficulty",),
    "Spaces": ("icrl.offline.method", "icrl.methods"),
    "METHODS": ("icrl.offline.learner", "icrl.offline_training"),
    "OfflineLearner": ("icrl.offline.learner", "icrl.offline_training"),
    "load_method": ("icrl.offline.learner", "icrl.offline_training"),
    "make_method": ("icrl.offline.learner", "icrl.offline_training"),
    "MIXERS": ("icrl.offline.trunk", "icrl.sicql.trunk"),
    "Trunk": ("icrl.offline.trunk", "icrl.sicql.trunk"),
    "TrunkConfig": ("icrl.offline.trunk", "icrl.sicql.trunk"),
    "WorldModel": ("icrl.offline.world_model", "icrl.sicql.world_model"),
    "WorldModelConfig": ("icrl.offline.world_model", "icrl.sicql.world_model"),
    "WorldModelLearner": ("icrl.offline.world_model", "icrl.sicql.world_model"),
    "few_shot": ("icrl.offline.few_shot", "icrl.few_shot"),
    "read_trajectories": ("icrl.offline.trajectory_shards", "icrl.offline_data"),
    "DarkRoomData": ("icrl.offline.environments.darkroom", "icrl.worlds.darkroom"),
    "PointRobotData": ("icrl.offline.environments.point_robot", "icrl.worlds.point_robot"),
    "StitchingData": ("icrl.offline.environments.stitching", "icrl.worlds.stitching"),
    "main": ("icrl.cli",),
}


class Moved:
    """The names of MOVED as attributes. ImportError, for all that are in none of their places, from the start."""

    def __init__(self) -> None:
        missing = []
        for name, places in MOVED.items():
            reasons = []
            for place in places:
                try:
                    setattr(self, name, getattr(importlib.import_module(place), name))
                    break
                except (ImportError, AttributeError) as error:
                    reasons.append(f"{place}: {error}")
            else:
                missing.append(f"{name} ({'; '.join(reasons)})")
        if missing:
            raise ImportError("not found: " + ", ".join(missing))

    def __getattr__(self, name: str) -> Any:  # for type checkers: all is set above
        raise AttributeError(name)


# ---- hashes --------------------------------------------------------------------------------------------------------


def numbers(logged: dict[str, Any]) -> dict[str, float]:
    """What a loss logs, as floats: it may be tensors, so that nothing waits for a GPU."""
    return {name: float(value) for name, value in logged.items()}


def flatten(name: str, value: Any, out: dict[str, str]) -> None:
    """Every tensor in `value`, and every plain value, by a dotted name."""
    import numpy as np
    import torch

    if isinstance(value, torch.Tensor):
        t = value.detach().contiguous()
        data = t.reshape(-1).view(torch.uint8).numpy().tobytes() if t.numel() else b""
        out[name] = f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)} {hashlib.sha256(data).hexdigest()}"
    elif isinstance(value, (np.ndarray, np.generic)):
        out[name] = f"numpy {value.dtype}{list(value.shape)} {hashlib.sha256(value.tobytes()).hexdigest()}"
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            flatten(f"{name}.{field.name}", getattr(value, field.name), out)
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        for field, x in zip(value._fields, value, strict=True):
            flatten(f"{name}.{field}", x, out)
    elif isinstance(value, dict):
        for key, x in value.items():
            flatten(f"{name}.{key}", x, out)
    elif isinstance(value, (list, tuple)):
        out[f"{name}.len"] = str(len(value))
        for i, x in enumerate(value):
            flatten(f"{name}.{i}", x, out)
    elif isinstance(value, bytes):
        out[name] = f"bytes[{len(value)}] {hashlib.sha256(value).hexdigest()}"
    elif value is None or isinstance(value, (bool, int, float, str)):
        out[name] = repr(value)
    else:
        raise TypeError(f"{name}: no hash of a {type(value).__name__}")


def file_facts(path: Path, metadata: bool = False) -> dict[str, Any]:
    """A safetensors file: its tensors' places and bytes. The header's order is left to chance by the library, and is sorted."""
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    facts = header.pop("__metadata__", {})
    found = {"header": json.dumps(header, sort_keys=True), "data": raw[8 + size :]}
    return {**found, "metadata": json.dumps(facts, sort_keys=True)} if metadata else found


# ---- the list of calls ---------------------------------------------------------------------------------------------

CALLS: dict[str, Callable[[], Any]] = {}
REFUSED = "refused/"


def add(name: str, call: Callable[[], Any], threads: int = 1) -> None:
    def run() -> Any:
        import torch

        torch.set_num_threads(threads)
        torch.manual_seed(zlib.crc32(name.encode()))
        try:
            return call()
        finally:
            torch.set_num_threads(1)

    assert name not in CALLS, name
    CALLS[name] = run


def kernel_calls() -> None:
    import torch
    from torch import Tensor

    import icrl_kernels as ik

    f32, bf16, f16, f64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
    ops: dict[str, dict[str, Any]] = {
        "gla": {"gates": ("none", "scalar", "channel"), "first": "q"},
        "gsa": {"gates": ("none", "slot"), "first": "q"},
        "gated_delta_rule": {"gates": ("none", "scalar", "channel"), "first": "q"},
        "rwkv7": {"gates": ("channel",), "first": "r"},
    }
    # B, T, H, Hk, K, V
    sizes = [
        (2, 0, 2, 1, 16, 24),
        (2, 1, 2, 2, 16, 16),
        (1, 63, 2, 1, 24, 60),
        (1, 64, 2, 2, 64, 64),
        (2, 65, 4, 2, 60, 24),
        (1, 200, 2, 1, 128, 64),
        (1, 200, 1, 1, 64, 128),
        (3, 17, 1, 1, 5, 7),
    ]
    packed = [0, 0, 17, 18, 18, 82, 130, 130]  # where sequences begin; three are empty

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape)

    def unit(x: Tensor) -> Tensor:
        return torch.nn.functional.normalize(x, dim=-1)

    def inputs(
        op: str,
        size: tuple[int, ...],
        gate: str,
        dtype: torch.dtype = f32,
        gate_dtype: torch.dtype | None = None,
        beta: bool = True,
        sequences: int | None = None,
    ) -> tuple[dict[str, Tensor | None], list[Tensor]]:
        B, T, H, Hk, K, V = size
        N, n = sequences or B, torch.randn
        given: dict[str, Tensor | None]
        if op == "gla":
            shape = {"none": None, "scalar": (B, T, Hk), "channel": (B, T, Hk, K)}[gate]
            given = {"q": n(B, T, H, K), "k": unit(n(B, T, Hk, K)), "v": n(B, T, Hk, V)}
            given["g"] = None if shape is None else -uniform(*shape)
            states = [n(N, Hk, K, V)]
        elif op == "gsa":
            M = {5: 3, 16: 16, 24: 64, 60: 24, 64: 60, 128: 32}[K]
            given = {"q": n(B, T, H, K), "k": n(B, T, Hk, K), "v": n(B, T, Hk, V)}
            g = -uniform(B, T, Hk, M)
            given |= {"s": 1 - g.exp(), "g": None if gate == "none" else g}
            states = [n(N, Hk, K, M), n(N, Hk, M, V)]
        elif op == "gated_delta_rule":
            shape = {"none": None, "scalar": (B, T, H), "channel": (B, T, H, K)}[gate]
            given = {"q": n(B, T, Hk, K), "k": unit(n(B, T, Hk, K)), "v": n(B, T, H, V)}
            given |= {"g": None if shape is None else -uniform(*shape), "beta": uniform(B, T, H) if beta else None}
            states = [n(N, H, K, V)]
        else:
            away = unit(n(B, T, H, K))
            given = {"r": n(B, T, H, K), "w": -0.6 * uniform(B, T, H, K), "k": n(B, T, H, K), "v": n(B, T, H, V)}
            given |= {"a": -away, "b": away * uniform(B, T, H, K)}
            states = [n(N, H, K, V)]
        for name, t in given.items():
            wide = name in ("g", "w", "beta") and gate_dtype is None
            given[name] = None if t is None else t.to(f32 if wide and dtype != f64 else (gate_dtype or dtype))
        return given, [t.to(torch.promote_types(dtype, f32)) for t in states]

    def pair(states: list[Tensor] | None) -> Any:
        return None if not states else states[0] if len(states) == 1 else tuple(states)

    def whole(op: str, given: dict[str, Any], states: list[Tensor] | None, final: bool = True, **options: Any) -> Any:
        """Outputs and the gradients of all inputs."""
        leaves = {name: t.detach().requires_grad_() for name, t in given.items() if t is not None}
        states = None if states is None else [t.requires_grad_() for t in states]
        o, last = getattr(ik, op)(
            **{**given, **leaves}, initial_state=pair(states), output_final_state=final, **options
        )
        out = {"o": o} | {f"final{i}": t for i, t in enumerate([last] if isinstance(last, Tensor) else last or ())}
        wanted = {**leaves, **{f"state{i}": t for i, t in enumerate(states or ())}}
        weights = [torch.randn(t.shape).to(t.dtype) for t in out.values()]
        grads = torch.autograd.grad(list(out.values()), list(wanted.values()), weights, allow_unused=True)
        return out | {f"d{name}": g for name, g in zip(wanted, grads, strict=True)}

    def named(*parts: object) -> str:
        return "/".join(str(p).removeprefix("torch.") for p in parts)

    for op, about in ops.items():
        rwkv = op == "rwkv7"
        delta = op == "gated_delta_rule"
        ours = [(B, T, H, H if rwkv else Hk, K, V) for B, T, H, Hk, K, V in sizes]
        for gate, dtype, size in itertools.product(about["gates"], (f32, bf16, f16), ours):
            name = named(op, "whole", gate, dtype, "x".join(map(str, size)))
            add(name, lambda op=op, s=size, g=gate, d=dtype: whole(op, *inputs(op, s, g, d)))
        for gate in about["gates"]:
            middle = (2, 70, 2, 2 if rwkv else 1, 24, 16)
            row = (1, 130, 2, 2 if rwkv else 1, 24, 16)

            def made(op: str = op, gate: str = gate, size: tuple[int, ...] = middle, **more: Any) -> Any:
                return inputs(op, size, gate, **more)

            variants: dict[str, Callable[[], Any]] = {
                "no state": lambda made=made, op=op: whole(op, made()[0], None),
                "no final": lambda made=made, op=op: whole(op, *made(), final=False),
                "nothing": lambda made=made, op=op: whole(op, made()[0], None, final=False),
                "scale": lambda made=made, op=op: whole(op, *made(), scale=0.3),
                "scale None": lambda made=made, op=op: whole(op, *made(), scale=None),
                "backend cpu": lambda made=made, op=op: whole(op, *made(), backend="cpu"),
                "gate bfloat16": lambda made=made, op=op: whole(op, *made(dtype=bf16, gate_dtype=bf16)),
                "gate float16": lambda made=made, op=op: whole(op, *made(dtype=f16, gate_dtype=f16)),
                "reference float64": lambda made=made, op=op: whole(op, *made(dtype=f64), backend="reference"),
                "auto float64": lambda made=made, op=op: whole(op, *made(dtype=f64)),
                "reference float32": lambda made=made, op=op: whole(op, *made(), backend="reference"),
                "packed": lambda made=made, op=op, row=row: whole(
                    op, *made(size=row, sequences=7), cu_seqlens=torch.tensor(packed)
                ),
                "packed int32 float16": lambda made=made, op=op, row=row: whole(
                    op, *made(size=row, sequences=7, dtype=f16), cu_seqlens=torch.tensor(packed, dtype=torch.int32)
                ),
                "packed no state": lambda made=made, op=op, row=row: whole(
                    op, made(size=row)[0], None, cu_seqlens=torch.tensor(packed)
                ),
                "packed reference": lambda made=made, op=op, row=row: whole(
                    op, *made(size=row, sequences=7), cu_seqlens=torch.tensor(packed), backend="reference"
                ),
            }

            def turned(made: Any = made, op: str = op) -> Any:
                given, states = made()
                given = {
                    name: None if t is None else t.transpose(0, -1).contiguous().transpose(0, -1)
                    for name, t in given.items()
                }
                return whole(op, given, [t.transpose(1, -1).contiguous().transpose(1, -1) for t in states])

            def no_batch(made: Any = made, op: str = op, size: tuple[int, ...] = middle) -> Any:
                return whole(op, *made(size=(0, *size[1:])))

            def strong(made: Any = made, op: str = op) -> Any:
                given, states = made()
                at = "w" if op == "rwkv7" else "g"
                g = given[at]
                if g is not None:
                    g *= 30
                    g[:, [0, 7, 16, 31, 32, 45]] = -torch.inf
                    g[:, 20] = -200.0
                return whole(op, given, states)

            def partly(made: Any = made, op: str = op) -> Any:
                """Not every input wants a gradient."""
                given, _ = made()
                value = given["v"].requires_grad_()
                o, last = getattr(ik, op)(**given, output_final_state=True)
                return o, last, torch.autograd.grad(o, value, torch.randn(o.shape))

            def segments(made: Any = made, op: str = op) -> Any:
                given, states = made()
                outputs, state = [], pair(states)
                for part in (slice(0, 13), slice(13, 14), slice(14, 70)):
                    some = {name: None if t is None else t[:, part] for name, t in given.items()}
                    o, state = getattr(ik, op)(**some, initial_state=state, output_final_state=True)
                    outputs.append(o)
                return outputs, state

            variants |= {"turned": turned, "no batch": no_batch, "strong gates": strong, "one gradient": partly}
            variants |= {"segments": segments}
            if delta:
                variants |= {
                    "no beta": lambda made=made, op=op: whole(op, *made(beta=False)),
                    "l2norm": lambda made=made, op=op: whole(op, *made(), qk_l2norm=True),
                    "l2norm no beta": lambda made=made, op=op: whole(op, *made(beta=False), qk_l2norm=True),
                    "l2norm bfloat16": lambda made=made, op=op: whole(op, *made(dtype=bf16), qk_l2norm=True),
                    "l2norm reference": lambda made=made, op=op: whole(
                        op, *made(dtype=f64), qk_l2norm=True, backend="reference"
                    ),
                }
            for name, call in variants.items():
                add(named(op, name, gate), call)
            wide = (2, 200, 4, 4 if rwkv else 2, 64, 64)
            for threads in (1, 2):
                call = lambda op=op, g=gate, s=wide: whole(op, *inputs(op, s, g))  # noqa: E731
                add(named(op, "threads", gate, threads), call, threads)
            add(
                named(op, "threads packed", gate, 2),
                lambda made=made, op=op, row=row: whole(
                    op, *made(size=row, sequences=7), cu_seqlens=torch.tensor(packed)
                ),
                2,
            )

            def raw(
                backend: str, with_state: bool, cu: bool, op: str = op, gate: str = gate, rows: Any = (middle, row)
            ) -> Any:
                """The torch ops themselves, forward and backward."""
                given, states = inputs(op, rows[cu], gate, sequences=7 if cu else None)
                bounds = torch.tensor(packed) if cu else None
                kept = states if with_state else [None] * len(states)
                tail = [False, backend] if op == "gated_delta_rule" else [backend]
                args = [*given.values(), 0.25, *kept, bounds, *tail]
                out = getattr(torch.ops.icrl, op)(*args)
                again = [torch.randn(t.shape) for t in out]
                return out, getattr(torch.ops.icrl, f"{op}_backward")(*again, *args)

            for backend, with_state, cu in (("auto", True, False), ("cpu", False, False), ("auto", True, True)):
                add(
                    named(op, "torch.ops", gate, backend, "state" if with_state else "-", "packed" if cu else "-"),
                    lambda raw=raw, a=(backend, with_state, cu): raw(*a),
                )

            def steps(
                batch: int,
                dtype: torch.dtype = f32,
                op: str = op,
                gate: str = gate,
                k: int = 24,
                v: int = 60,
                raw: bool = False,
                state: bool = True,
                spread: bool = False,
                **options: Any,
            ) -> Any:
                heads = (4, 4 if op == "rwkv7" else 2)
                more = {"gate_dtype": options.pop("gate_dtype", None), "beta": options.pop("beta", True)}
                given, states = inputs(op, (batch, 3, *heads, k, v), gate, dtype, **more)
                out = []
                for t in range(3):
                    one = {name: None if x is None else x[:, t] for name, x in given.items()}
                    if not spread:
                        one = {name: None if x is None else x.contiguous() for name, x in one.items()}
                    if raw:
                        tail = [False, "auto"] if op == "gated_delta_rule" else ["auto"]
                        out.append(getattr(torch.ops.icrl, f"{op}_step")(*one.values(), *states, 0.25, *tail))
                    else:
                        out.append(getattr(ik, f"{op}_step")(**one, state=pair(states), **options))
                return out, states

            for batch, dtype, k, v in (
                (1, f32, 64, 64),
                (1, f32, 24, 60),
                (16, f32, 24, 60),
                (16, bf16, 64, 128),
                (1, f16, 128, 16),
                (16, f16, 5, 7),
                (0, f32, 16, 16),
            ):
                add(
                    named(op, "step", gate, dtype, batch, f"{k}x{v}"),
                    lambda steps=steps, b=batch, d=dtype, k=k, v=v: steps(b, d, k=k, v=v),
                )
            add(named(op, "step", gate, "scale"), lambda steps=steps: steps(2, scale=0.3))
            add(named(op, "step", gate, "scale None"), lambda steps=steps: steps(2, scale=None))
            add(named(op, "step", gate, "spread"), lambda steps=steps: steps(3, spread=True))
            add(named(op, "step", gate, "cpu"), lambda steps=steps: steps(2, backend="cpu"))
            add(named(op, "step", gate, "reference"), lambda steps=steps: steps(2, backend="reference"))
            add(named(op, "step", gate, "same dtype"), lambda steps=steps: steps(2, bf16, gate_dtype=bf16))
            add(named(op, "step", gate, "torch.ops"), lambda steps=steps: steps(2, raw=True))
            add(named(op, "step", gate, "threads"), lambda steps=steps: steps(64, k=64, v=64), 2)
            if delta:
                add(named(op, "step", gate, "no beta"), lambda steps=steps: steps(3, beta=False))
                add(named(op, "step", gate, "l2norm"), lambda steps=steps: steps(3, qk_l2norm=True))

        def fake(op: str = op, about: dict[str, Any] = about) -> Any:
            """What tracing sees: shapes and dtypes."""
            from torch._subclasses.fake_tensor import FakeTensorMode

            with FakeTensorMode():
                size = (2, 9, 2, 2, 16, 24)
                given, states = inputs(op, size, about["gates"][-1], bf16)
                tail = [False, "auto"] if op == "gated_delta_rule" else ["auto"]
                args = [*given.values(), 0.25, *states, None, *tail]
                out = getattr(torch.ops.icrl, op)(*args)
                back = getattr(torch.ops.icrl, f"{op}_backward")(*out, *args)
                return [f"{t.dtype} {list(t.shape)} {list(t.stride())}" for t in (*out, *back)]

        add(named(op, "fake"), fake)
        for kind in ("", "_backward", "_step"):
            add(named(op, "schema" + kind), lambda o=op + kind: str(getattr(torch.ops.icrl, o).default._schema))

        # what is refused, and how
        def wrong(change: str, op: str = op, about: dict[str, Any] = about) -> Any:
            given, states = inputs(op, (2, 9, 2, 2, 16, 24), about["gates"][-1])
            options: dict[str, Any] = {"initial_state": pair(states), "output_final_state": True}
            first, gate = about["first"], "w" if op == "rwkv7" else "g"
            if change == "gate":
                given[gate][1, 3] = 0.5
            elif change == "dtype":
                given["v"] = given["v"].half()
            elif change == "shape":
                given["k"] = given["k"][..., :-1]
            elif change == "heads":
                given["v"] = given["v"][:, :, :1]
            elif change == "dims":
                given[first] = given[first][0]
            elif change == "state":
                options["initial_state"] = pair([t[:1] for t in states])
            elif change == "state dtype":
                options["initial_state"] = pair([t.half() for t in states])
            elif change == "bounds":
                options["cu_seqlens"] = torch.tensor([0, 4, 9])
            elif change == "bounds fall":
                given = {name: None if t is None else t[:1] for name, t in given.items()}
                options |= {"cu_seqlens": torch.tensor([0, 7, 3, 9]), "initial_state": None}
            elif change == "scale":
                options["scale"] = float("nan")
            elif change == "backend":
                options["backend"] = "tpu"
            elif change == "triton":
                options["backend"] = "triton"
            elif change == "float64 cpu":
                given = {name: None if t is None else t.double() for name, t in given.items()}
                options |= {"initial_state": None, "backend": "cpu"}
            elif change == "wide":
                given, states = inputs(op, (1, 2, 1, 1, 128, 257), about["gates"][-1])
                options["initial_state"] = None
            elif change == "second derivative":
                given["v"].requires_grad_()
                o, _ = getattr(ik, op)(**given, **options)
                (dv,) = torch.autograd.grad(o.square().sum(), given["v"], create_graph=True)
                return torch.autograd.grad(dv.sum(), given["v"])
            elif change == "torch.func":
                rest = {name: t for name, t in given.items() if name != "v"}
                f = lambda x, r=rest, o=options: getattr(ik, op)(v=x, **r, **o)[0].sum()  # noqa: E731
                return torch.func.grad(f)(given["v"])
            return getattr(ik, op)(**given, **options)

        changes = ["dtype", "shape", "heads", "dims", "state", "state dtype", "bounds", "bounds fall", "scale"]
        changes += ["backend", "triton", "float64 cpu", "wide", "second derivative", "torch.func", "gate"]
        for change in changes:
            add(named(REFUSED + op, change), lambda wrong=wrong, c=change: wrong(c))

        def wrong_step(change: str, op: str = op, about: dict[str, Any] = about) -> Any:
            given, states = inputs(op, (2, 1, 2, 2, 16, 24), about["gates"][-1])
            one = {name: None if x is None else x[:, 0] for name, x in given.items()}
            options: dict[str, Any] = {}
            if change == "gate":
                one["w" if op == "rwkv7" else "g"][1] = 0.5
            elif change == "gradient":
                one["v"].requires_grad_()
            elif change == "dims":
                one[about["first"]] = one[about["first"]][0]
            elif change == "dtype":
                one["k"] = one["k"].half()
            elif change == "float64":
                one = {name: None if x is None else x.double() for name, x in one.items()}
            elif change == "spread state":
                states = [t.transpose(2, 3).contiguous().transpose(2, 3) for t in states]
            elif change == "state":
                states = [t[:1] for t in states]
            elif change == "backend":
                options["backend"] = "tpu"
            return getattr(ik, f"{op}_step")(**one, state=pair(states), **options)

        for change in ("gate", "gradient", "dims", "dtype", "float64", "spread state", "state", "backend"):
            add(named(REFUSED + op, "step", change), lambda wrong=wrong_step, c=change: wrong(c))

    from icrl_kernels import testing

    def peers() -> Any:
        given, states = inputs("gla", (1, 128, 2, 2, 16, 24), "channel")
        rule, more = inputs("gated_delta_rule", (1, 128, 2, 2, 16, 24), "scalar")
        return (
            testing.gla_chunkwise_torch(*given.values(), initial_state=states[0]),
            testing.gated_delta_rule_chunkwise_torch(*rule.values(), initial_state=more[0]),
        )

    add("testing/chunkwise torch", peers)
    add("names/icrl_kernels", lambda: sorted(ik.__all__))
    add("names/testing", lambda: [hasattr(testing, n) for n in ("error", "assert_as_good_as_torch")])


def tabular_calls() -> None:
    import torch
    from torch import Tensor

    import icrl_kernels as ik

    f32, f64 = torch.float32, torch.float64

    def tables(n: int, s: int, a: int, dtype: torch.dtype = f32, width: int | None = None, seed: int = 0) -> Any:
        """Random tasks: windows of `width` successors, the last state terminal, unequal sizes."""
        g = torch.Generator().manual_seed(seed + 1000 * s)
        width = width or s
        states = torch.randint(max(2, s - 3), s + 1, (n,), generator=g)
        actions = torch.randint(2, a + 1, (n,), generator=g)
        index = torch.arange(s)
        own = index < states[:, None]
        terminal = index == states[:, None] - 1
        room = (states.view(n, 1, 1, 1) - width + 1).clamp_min(1)
        first = (torch.rand(n, s, a, 1, generator=g, dtype=f64) * room).long()
        inside = (index >= first) & (index < first + width) & own[:, None, None]
        p = (0.1 + torch.rand(n, s, a, s, generator=g, dtype=f64)) * inside
        p = (
            p.masked_fill((terminal | ~own)[:, :, None, None], 0.0)
            * (torch.arange(a) < actions[:, None])[:, None, :, None]
        )
        p = p / p.sum(3, keepdim=True).clamp_min(1e-30)
        start = torch.zeros(n, s)
        start[:, 0] = 1.0
        return {
            "transition": p.to(dtype),
            "reward": torch.randn(n, s, a, s, generator=g).to(dtype),
            "noise_state": torch.rand(n, s, generator=g),
            "noise_action": torch.rand(n, s, a, generator=g) * (torch.rand(n, s, a, generator=g) < 0.5),
            "start": start,
            "terminal": terminal,
            "max_steps": torch.randint(5, 40, (n,), generator=g),
            "num_states": states,
            "num_actions": actions,
        }

    several = torch.tensor([0.0, 0.5, 0.93, 0.994])
    methods = ("auto", "policy_iteration", "value_iteration", "modified_policy_iteration")

    def solve(
        s: int,
        dtype: torch.dtype = f32,
        discount: float | Tensor = 0.93,
        form: str = "dense",
        n: int = 3,
        a: int = 5,
        width: int | None = None,
        sizes: bool = True,
        ends: bool = True,
        costs: bool = False,
        **options: Any,
    ) -> Any:
        t = tables(n, s, a, dtype, width)
        p, r = t["transition"], t["reward"]
        if costs:  # so that no policy that never ends earns
            r = -r.abs() - 0.1
        if form == "packed":
            p, r = ik.pack_transition(p, r)
        elif form == "packed mean":
            r = (p * r).sum(-1)
            p = ik.pack_transition(p)
        elif form == "mean":
            r = (p * r).sum(-1)
        options |= {"terminal": t["terminal"]} if ends else {}
        options |= {"num_states": t["num_states"]} if sizes else {}
        return ik.value_iteration(p, r, discount, **options)

    for s in (3, 16, 64, 100, 128):
        for dtype, form in itertools.product((f32, f64), ("dense", "packed", "mean", "packed mean")):
            short = str(dtype).removeprefix("torch.")
            add(
                f"value_iteration/{s}/{short}/{form}",
                lambda s=s, d=dtype, f=form: solve(s, d, several, f, width=max(3, s // 4)),
            )
        for method in methods:
            for form in ("dense", "packed"):
                add(
                    f"value_iteration/{s}/{method}/{form}",
                    lambda s=s, m=method, f=form: solve(s, method=m, form=f, width=max(3, s // 4)),
                )
        add(f"value_iteration/{s}/full rows", lambda s=s: solve(s, sizes=False))
        add(f"value_iteration/{s}/zero rows end", lambda s=s: solve(s, ends=False))
        add(f"value_iteration/{s}/undiscounted", lambda s=s: solve(s, discount=1.0, width=max(3, s // 2), costs=True))
        add(f"value_iteration/{s}/threads", lambda s=s: solve(s, discount=several, n=8, width=max(3, s // 4)), 2)
        if s <= 16:
            for method in methods:
                add(
                    f"value_iteration/{s}/reference/{method}",
                    lambda s=s, m=method: solve(s, discount=several, method=m, backend="reference"),
                )
    each = torch.tensor([[0.1, 0.9], [0.5, 0.99], [0.99, 0.0]], dtype=f64)
    add("value_iteration/discount a task", lambda: solve(16, discount=each))
    add("value_iteration/discount 0", lambda: solve(16, discount=0.0))
    add("value_iteration/near 1", lambda: solve(16, discount=0.9999, width=4))
    add("value_iteration/coarse", lambda: solve(64, method="value_iteration", tol=1e-2))
    add("value_iteration/one action", lambda: solve(16, a=2, n=1))
    add("value_iteration/none", lambda: ik.value_iteration(torch.zeros(0, 4, 2, 4), torch.zeros(0, 4, 2), 0.9))
    add("value_iteration/schema", lambda: str(torch.ops.icrl.value_iteration.default._schema))

    def wrong_solve(change: str) -> Any:
        t = tables(3, 6, 3)
        p, r, g, options = t["transition"], t["reward"], 0.9, {"terminal": t["terminal"]}
        if change == "negative":
            p[1, 0, 1, 2] = -0.25
        elif change == "sum":
            p[2, 0, 0] *= 1.5
        elif change == "infinite":
            r[0, 0, 0] = torch.inf
        elif change == "discount":
            g = torch.tensor([0.5, 1.5])
        elif change == "endless":
            g, options, p = 1.0, {}, torch.full((1, 2, 2, 2), 0.5)
            r = torch.ones(1, 2, 2)
        elif change == "earns for ever":
            g, r = 1.0, r + 5
            p[0, 0] = torch.eye(6)[0]
        elif change == "method":
            options["method"] = "guess"
        elif change == "backend":
            options["backend"] = "tpu"
        elif change == "gradient":
            r.requires_grad_()
        elif change == "shape":
            r = r[:, :, :2]
        elif change == "window":
            q = ik.pack_transition(p)
            p, r = q._replace(first=q.first + 6), (p * r).sum(-1)
        return ik.value_iteration(p, r, g, **options)

    for change in (
        "negative", "sum", "infinite", "discount", "earns for ever", "endless", "method", "backend", "gradient", "shape", "window",
    ):  # fmt: skip
        add(f"{REFUSED}value_iteration/{change}", lambda c=change: wrong_solve(c))

    for s, dtype in itertools.product((3, 16, 100), (f32, f64)):
        short = str(dtype).removeprefix("torch.")

        def pack(s: int = s, dtype: torch.dtype = dtype) -> Any:
            t = tables(4, s, 4, dtype, width=3)
            found, r = ik.pack_transition(t["transition"], t["reward"])
            return found, r, found.unpack(), found.unpack(r), ik.pack_transition(t["transition"]), found.check()

        add(f"pack_transition/{s}/{short}", pack)
    add("pack_transition/none", lambda: ik.pack_transition(torch.zeros(0, 4, 2, 4)))

    # rollouts
    def random_policies(t: Any, num: int) -> Tensor:
        n, s, a, _ = t["reward"].shape
        g = torch.Generator().manual_seed(5)
        p = (0.1 + torch.rand(n, num, s, a, generator=g)) * (torch.arange(a) < t["num_actions"][:, None])[:, None, None]
        return p / p.sum(3, keepdim=True)

    def actions_of(t: Any, num: int) -> Tensor:
        n, s, _, _ = t["reward"].shape
        g = torch.Generator().manual_seed(6)
        return (torch.rand(n, num, s, generator=g) * t["num_actions"][:, None, None]).long()

    def made(form: str, s: int = 16, n: int = 5, width: int | None = 5) -> tuple[Any, Any]:
        t = tables(n, s, 4, width=width)
        if form == "dense":
            return t, ik.rollout_tables(**t)
        p, r = ik.pack_transition(t["transition"], t["reward"])
        return t, ik.rollout_tables(**{**t, "transition": p, "reward": r})

    for form, s in itertools.product(("dense", "packed"), (3, 16, 100)):
        add(f"rollout_tables/{form}/{s}", lambda f=form, s=s: made(f, s)[1])

    builtin = ("uniform", "random_policy", "q_learning", "model_based")
    mixtures: dict[str, tuple[int, dict[int | str, float]]] = {name: (0, {name: 1.0}) for name in builtin}
    mixtures |= {
        "policy": (1, {0: 1.0}),
        "policies": (2, {0: 1.0, 1: 2.0}),
        "q, model": (0, dict.fromkeys(builtin[2:], 1.0)),
    }
    mixtures["all"] = 2, {0: 1.0, 1: 1.0, **dict.fromkeys(builtin, 1.0)}

    def act(
        form: str = "dense",
        mixture: str = "all",
        s: int = 16,
        steps: int = 120,
        seed: Any = 11,
        as_actions: torch.dtype | None = None,
        labels: bool = False,
        backend: str = "auto",
        task_index: Tensor | None = None,
        again: bool = False,
    ) -> Any:
        t, ready = made(form, s)
        num, weights = mixtures[mixture]
        records = len(t["num_states"]) if task_index is None else len(task_index)
        who = ik.constant_behaviours(records, num, weights, switch=0.5, epsilon=0.3, epsilon_decay=0.002)
        policies = None
        if num:
            policies = random_policies(t, num) if as_actions is None else actions_of(t, num).to(as_actions)
        options: dict[str, Any] = {"policies": policies, "behaviours": who, "backend": backend}
        if labels:
            options["references"] = actions_of(t, 3)
        run = ik.rollout(ready, steps=steps, seed=seed, task_index=task_index, **options)
        return (run, ik.rollout(ready, steps=31, state=run.final, **options)) if again else run

    for mixture, form, backend in itertools.product(mixtures, ("dense", "packed"), ("auto", "plain")):
        add(f"rollout/{mixture}/{form}/{backend}", lambda m=mixture, f=form, b=backend: act(f, m, backend=b))
    for s in (3, 64, 100):
        add(f"rollout/states {s}", lambda s=s: act(s=s, labels=True))
    for dtype in (torch.int64, torch.int16, torch.uint8):
        add(f"rollout/actions {str(dtype)[6:]}", lambda d=dtype: act(as_actions=d, labels=True))
    add("rollout/actions plain", lambda: act(as_actions=torch.int64, labels=True, backend="plain"))
    add("rollout/labels", lambda: act(labels=True))
    add("rollout/goes on", lambda: act(labels=True, again=True))
    add("rollout/goes on plain", lambda: act(labels=True, again=True, backend="plain"))
    add("rollout/seeds", lambda: act(seed=torch.arange(5) * 2**40 - 3))
    add("rollout/task_index", lambda: act(task_index=torch.tensor([0, 1, 2, 2, 4, 0, 3])))
    add("rollout/no steps", lambda: act(steps=0))
    add("rollout/alone", lambda: ik.rollout(made("dense")[1], steps=50, seed=-1))
    add("rollout/threads", lambda: act(labels=True, task_index=torch.arange(64) % 5), 2)
    add("rollout/schema", lambda: str(torch.ops.icrl.rollout.default._schema))

    def by_steps() -> Any:
        t, ready = made("dense")
        state = ik.rollout_start(ready, seed=7, task_index=torch.tensor([0, 1, 2, 2, 4, 0, 3]))
        given = torch.rand(7, 60, generator=torch.Generator().manual_seed(2))
        out = []
        for k in range(60):
            action = (given[:, k] * t["num_actions"][state.task]).long()
            out.append((state.state.clone(), *ik.rollout_step(ready, state, action)))
        return out, state

    def by_op() -> Any:
        """The torch op with the actions given."""
        t, ready = made("packed")
        state = ik.rollout_start(ready, seed=7)
        action = (torch.rand(5, 60, generator=torch.Generator().manual_seed(2)) * t["num_actions"][:, None]).long()
        return torch.ops.icrl.rollout(*ready, None, None, [], action, list(state), 60, "auto"), state

    def by_reference() -> Any:
        t = tables(3, 9, 4, width=4)
        keys = {"seed": torch.full((3,), 4), "record": torch.arange(3), "task_index": torch.arange(3)}
        who = ik.constant_behaviours(3, 2, {0: 1, 1: 1, "uniform": 0.5}, switch=0.5, epsilon=0.5)
        return ik.rollout_reference(**t, **keys, steps=40, policies=random_policies(t, 2), behaviours=who)

    add("rollout/step by step", by_steps)
    add("rollout/torch.ops", by_op)
    add("rollout/reference", by_reference)
    for mixture in ("uniform", "q_learning", "model_based", "all"):

        def begin(mixture: str = mixture) -> Any:
            num, weights = mixtures[mixture]
            who = ik.constant_behaviours(5, num, weights)
            return ik.rollout_start(made("dense")[1], seed=3, behaviours=who)

        add(f"rollout_start/{mixture}", begin)

    def wrong_rollout(change: str) -> Any:
        t, ready = made("dense")
        options: dict[str, Any] = {"steps": 5, "seed": 1}
        if change == "policies":
            options["policies"] = random_policies(t, 2) * 0.5
        elif change == "actions":
            options["policies"] = actions_of(t, 2) + 9
        elif change == "seed":
            options["seed"] = None
        elif change == "steps":
            options["steps"] = -1
        elif change == "task_index":
            options["task_index"] = torch.tensor([7])
        elif change == "backend":
            options["backend"] = "tpu"
        elif change == "step":
            state = ik.rollout_start(ready, seed=1)
            return ik.rollout_step(ready, state, torch.full((5,), 99))
        elif change == "behaviours":
            options["behaviours"] = ik.constant_behaviours(5, 0, {"uniform": 1.0}, epsilon=2.0)
        elif change == "names":
            return ik.constant_behaviours(5, 0, {"nobody": 1.0})
        elif change == "tables":
            t["transition"][0, 0, 0] *= 2
            return ik.rollout_tables(**t)
        return ik.rollout(ready, **options)

    for change in (
        "policies", "actions", "seed", "steps", "task_index", "backend", "step", "behaviours", "names", "tables",
    ):  # fmt: skip
        add(f"{REFUSED}rollout/{change}", lambda c=change: wrong_rollout(c))

    def learn(s: int, nexts: bool, **options: Any) -> Any:
        run = act(s=s, mixture="uniform", steps=150)
        given = [run.state.long(), run.action.long(), run.reward, run.done.long()]
        more = {"next_state": run.next_state.long()} if nexts else {}
        return ik.model_based_q(*given, s, 4, **more, **options)

    for s, nexts in itertools.product((3, 16, 40), (False, True)):
        for backend in ("auto", "plain", "reference"):
            add(f"model_based_q/{s}/{backend}/{nexts}", lambda s=s, n=nexts, b=backend: learn(s, n, backend=b))
    add("model_based_q/settings", lambda: learn(16, True, bonus=0.05, discount=0.99, sweeps=3))
    add("model_based_q/threads", lambda: learn(16, False), 2)
    add("model_based_q/schema", lambda: str(torch.ops.icrl.model_based_q.default._schema))

    def here() -> Any:
        before = torch.get_num_threads()
        ik.set_threads_here(2)
        inside = torch.get_num_threads()
        ik.set_threads_here(before)
        return inside, torch.get_num_threads()

    add("set_threads_here", here)


def layer_calls() -> None:
    import torch
    from torch.utils import _pytree as pytree

    from icrl_kernels import layers

    D = 48
    kinds: dict[str, Callable[[], Any]] = {
        "linear": lambda: layers.LinearAttention(D, num_heads=2),
        "linear normalized": lambda: layers.LinearAttention(
            D, num_heads=4, num_kv_heads=2, feature_map="elu", do_feature_map_norm=True, norm_q=True, norm_k=True
        ),
        "linear hedgehog": lambda: layers.LinearAttention(
            D, num_heads=2, feature_map="hedgehog", output_norm="identity"
        ),
        "linear t2r": lambda: layers.LinearAttention(D, num_heads=2, feature_map="t2r", tie_feature_map_qk=True),
        "gla": lambda: layers.GLA(D, num_heads=4, num_kv_heads=2, gate_low_rank_dim=8),
        "gla conv": lambda: layers.GLA(
            D, num_heads=2, use_short_conv=True, conv_size=3, conv_bias=True, use_output_gate=False, clamp_min=-2.0
        ),
        "gated delta net": lambda: layers.GatedDeltaNet(D, head_dim=16, num_heads=2, expand_v=1.5),
        "gated delta net wide": lambda: layers.GatedDeltaNet(
            D, head_dim=8, num_heads=1, num_v_heads=2, expand_v=33, use_gate=False, allow_neg_eigval=True
        ),
        "gated delta net plain": lambda: layers.GatedDeltaNet(D, head_dim=16, num_heads=2, use_short_conv=False),
        "kda": lambda: layers.KDA(D, head_dim=16, num_heads=2, num_v_heads=4, conv_bias=True),
        "kda plain": lambda: layers.KDA(
            D, head_dim=16, num_heads=2, use_short_conv=False, lower_bound=-5.0, allow_neg_eigval=True
        ),
        "gsa": lambda: layers.GSA(D, num_heads=4, num_kv_heads=2, num_slots=6),
        "gsa conv": lambda: layers.GSA(D, num_heads=2, use_short_conv=True, feature_map="t2r", scale=None),
        "rwkv7": lambda: layers.RWKV7(D, head_dim=16, value_dim=48),
        "rwkv7 fused": lambda: layers.RWKV7(D, head_dim=16, fuse_norm=True, elementwise_affine=False),
    }

    def make(kind: str, dtype: torch.dtype = torch.float32) -> Any:
        torch.manual_seed(3)
        mixer = kinds[kind]()
        for p in mixer.parameters():  # RWKV-7 begins with zeros that hide most of it
            if p.dim() == 2 and not p.any():
                torch.nn.init.normal_(p, std=p.shape[1] ** -0.5)
        return mixer.to(dtype)

    def forward(kind: str, dtype: torch.dtype = torch.float32, cu: bool = False, given: bool = True) -> Any:
        mixer = make(kind, dtype)
        x = torch.randn(1 if cu else 2, 66, D).to(dtype).requires_grad_()
        bounds = torch.tensor([0, 0, 17, 18, 66]) if cu else None
        state = pytree.tree_map(torch.rand_like, mixer.initial_state(4 if cu else 2)) if given else None
        y, final = mixer(x, state, bounds)
        outputs = [y, *pytree.tree_leaves(final)]
        leaves = {"x": x, **dict(mixer.named_parameters())}
        weights = [torch.randn(t.shape).to(t.dtype) for t in outputs]
        grads = torch.autograd.grad(outputs, list(leaves.values()), weights, allow_unused=True)
        return y, final, dict(zip(leaves, grads, strict=True))

    def steps(kind: str, dtype: torch.dtype = torch.float32) -> Any:
        mixer = make(kind, dtype)
        x = torch.randn(3, 5, D).to(dtype)
        state = mixer.initial_state(3)
        with torch.no_grad():
            ys = [mixer.step(x[:, t], state)[0] for t in range(5)]
        return ys, state

    for kind in kinds:
        add(f"layers/{kind}/weights", lambda k=kind: dict(make(k).state_dict()))
        add(f"layers/{kind}/forward", lambda k=kind: forward(k))
        add(f"layers/{kind}/forward bfloat16", lambda k=kind: forward(k, torch.bfloat16))
        add(f"layers/{kind}/forward float64", lambda k=kind: forward(k, torch.float64))
        add(f"layers/{kind}/forward fresh", lambda k=kind: forward(k, given=False))
        add(f"layers/{kind}/forward packed", lambda k=kind: forward(k, cu=True))
        add(f"layers/{kind}/step", lambda k=kind: steps(k))
        add(f"layers/{kind}/step bfloat16", lambda k=kind: steps(k, torch.bfloat16))

    def two_rwkv7() -> Any:
        torch.manual_seed(4)
        first, second = (layers.RWKV7(D, head_dim=16, layer_idx=i, num_layers=2) for i in (0, 1))
        torch.nn.init.normal_(first.o_proj.weight)
        torch.nn.init.normal_(second.o_proj.weight)
        x = torch.randn(2, 20, D)
        y, _, v = first(x, output_v_first=True)
        return second(y, v_first=v)

    add("layers/rwkv7/two", two_rwkv7)
    add("names/layers", lambda: sorted(layers.__all__))


def world_calls() -> None:
    import numpy as np
    import torch

    from icrl import worlds
    from icrl_kernels import rollout

    moved = Moved()
    kinds: dict[str, Callable[..., Any]] = {
        "anymdp": lambda n=4, **o: worlds.sample_anymdp(n, 16, 5, seed=3, **o),
        "anymdp sizes": lambda n=4, **o: worlds.sample_anymdp(n, (8, 24), 3, seed=4, num_observations=30, **o),
        "anymdp 64": lambda n=2, **o: worlds.sample_anymdp(n, 64, 5, seed=5, **o),
        "garnet": lambda n=4, **o: worlds.sample_garnet(n, (8, 20), 4, 3, seed=6, num_observations=20, **o),
        "bandit": lambda n=4, packed=False, **o: (
            worlds.sample_bandit(n, 6, seed=7, num_observations=9, **o).pack()
            if packed
            else worlds.sample_bandit(n, 6, seed=7, num_observations=9, **o)
        ),
        "pomdp": lambda n=4, **o: worlds.sample_pomdp(n, 12, 4, seed=8, num_observations=20, **o),
        "pomdp tokens": lambda n=3, **o: worlds.sample_pomdp(
            n, (8, 12), 4, seed=9, num_observations=7, observation_tokens=3, action_tokens=2, **o
        ),
    }
    for kind, sample in kinds.items():
        add(f"worlds/sample/{kind}", lambda f=sample: f().tensors())
        add(f"worlds/sample/{kind}/packed", lambda f=sample: f(packed=True).tensors())
        add(f"worlds/sample/{kind}/first", lambda f=sample: f(2, first=5).tensors())
        for packed in (False, True):
            form = "packed" if packed else "dense"

            def about(sample: Any = sample, packed: bool = packed) -> Any:
                tasks = sample(packed=packed)
                solved = tasks.solve([0.0, 0.9, 0.994])
                few = tasks[[2, 0]] if len(tasks) > 2 else tasks[0]
                wide = tasks.pad(tasks.shape[1] + 3, tasks.shape[2] + 1)
                both = type(tasks).concatenate([few, wide])
                seen = tasks.emit(torch.zeros(len(tasks), 4, dtype=torch.int64), seed=3, step=torch.arange(4))
                return {
                    "solved": solved,
                    "quality": worlds.quality(tasks),
                    "accepted": worlds.quality(tasks).accepted(),
                    "mean": tasks.expected_reward(),
                    "successors": tasks.num_successors(),
                    "behind": tasks.state_of() if tasks.emission is None else None,
                    "masks": (tasks.state_mask(), tasks.action_mask()),
                    "few": few.tensors(),
                    "wide": wide.tensors(),
                    "both": both.tensors(),
                    "seen": seen,
                    "other form": (tasks.dense() if packed else tasks.pack()).tensors(),
                    "valid": tasks.validate().tensors(),
                    "tables": tasks.tables(),
                    "repr": repr(tasks),
                }

            add(f"worlds/about/{kind}/{form}", about)

            def file(sample: Any = sample, packed: bool = packed) -> Any:
                path = Path("tasks.safetensors")
                sample(packed=packed).save(path)
                return file_facts(path, metadata=True), type(sample(1)).load(path).tensors()

            add(f"worlds/file/{kind}/{form}", file)

        def run(sample: Any = sample) -> Any:
            tasks = sample()
            out = rollout(tasks.tables(), steps=90, seed=12)
            seen = tasks.emit(out.state, seed=12, step=torch.arange(90))
            return out, seen, worlds.regroup(out, tasks.action_tokens)

        add(f"worlds/rollout/{kind}", run)
        add(f"worlds/threads/{kind}", lambda f=sample: f(6).tensors(), 2)
        for mode in ("NEXT_STEP", "SAME_STEP"):

            def vector(sample: Any = sample, mode: str = mode) -> Any:
                from gymnasium.vector import AutoresetMode

                tasks = sample()
                env = worlds.TabularVectorEnv(tasks, AutoresetMode[mode])
                rng = np.random.default_rng(1)
                out: list[Any] = [env.reset(seed=5)]
                for t in range(60):
                    action = rng.integers(0, env.action_space.nvec)
                    out.append(env.step(action))
                    if t == 40:
                        out.append(env.reset())
                return out

            add(f"worlds/vector/{kind}/{mode}", vector)

        def single(sample: Any = sample) -> Any:
            env = worlds.TabularEnv(sample(1), render_mode="ansi")
            rng = np.random.default_rng(2)
            out: list[Any] = [env.reset(seed=6), env.render()]
            for _ in range(60):
                size = env.action_space.nvec if hasattr(env.action_space, "nvec") else env.action_space.n
                step = env.step(rng.integers(0, size))
                out += [step, env.render()]
                if step[2] or step[3]:
                    out.append(env.reset())
            return out

        add(f"worlds/environment/{kind}", single)

    def registered() -> Any:
        import gymnasium

        import icrl  # noqa: F401 (registers)

        env = gymnasium.make("icrl/AnyMDP-v0", task=3, num_states=10)
        many = gymnasium.make_vec("icrl/AnyMDP-v0", num_envs=3, task=3, num_states=10)
        return env.reset(seed=1), env.step(2), many.reset(seed=1), many.step(np.array([1, 2, 0]))

    def exchanged() -> Any:
        import gymnasium

        tasks = kinds["anymdp"]()
        table = worlds.TabularTasks.from_gymnasium(gymnasium.make("FrozenLake-v1"))
        given = [tasks.to_xenoverse(i) for i in range(2)]
        plain = [{k: v for k, v in x.items() if isinstance(v, (np.ndarray, int, float, str))} for x in given]
        return plain, sorted(map(str, given[0])), worlds.TabularTasks.from_xenoverse(given).tensors(), table.tensors()

    def drawn() -> Any:
        env = worlds.TabularEnv(kinds["anymdp"](1), render_mode="rgb_array")
        env.reset(seed=1)
        return env.metadata, env.render()

    def by_torch() -> Any:
        return worlds.sample_anymdp(3, 12, 4, seed=3, backend="torch").tensors()

    def slopes() -> Any:
        found = moved.difficulty(kinds["garnet"]())
        return found, found.slopes()

    add("worlds/registered", registered)
    add("worlds/exchange", exchanged)
    add("worlds/drawn", drawn)
    add("worlds/torch sampler", by_torch)
    add("worlds/difficulty", slopes)
    add("worlds/names", lambda: sorted(worlds.__all__))
    for kind in ("anymdp", "garnet", "bandit", "pomdp"):

        def shards(kind: str = kind) -> Any:
            more = ["--num-observations", 9, "--observation-tokens", 2, "--action-tokens", 2] if kind == "pomdp" else []
            args = ["worlds", "shards", "s", "--kind", kind, "--num-tasks", 5, "--num-states", 8, 10, "--seed", 3]
            icrl(moved, *args, "--discounts", 0.9, 0.99, "--workers", 1, *more)
            read = moved.TaskShards(Path("s"), full=True)
            return folder_facts(Path("s")), [t.tensors() for t in read], read.task(3).tensors()

        add(f"worlds/shards/{kind}", shards)

        def command(kind: str = kind) -> Any:
            sample = ["worlds", "sample", "t.safetensors", "--kind", kind, "--num-tasks", 6, "--num-states", 8]
            icrl(moved, *sample, "--seed", 4, "--json", "s.json")
            icrl(moved, "worlds", "inspect", "t.safetensors", "--json", "i.json")
            if kind != "bandit":  # whose one state the filters refuse
                least = ["--min-advantage", 0, "--min-gini", 0.0, "--min-entropy", -1]
                icrl(moved, "worlds", "filter", "t.safetensors", "k.safetensors", *least, "--json", "f.json")
            files = {p.name: file_facts(p, metadata=True) for p in sorted(Path().glob("*.safetensors"))}
            return files, {p.name: untimed(p) for p in sorted(Path().glob("*.json"))}

        add(f"worlds/commands/{kind}", command)


def icrl(moved: Any, *args: object) -> None:
    """One command of the command line. RuntimeError where it ends with another status than 0."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = moved.main([str(a) for a in args])
    if status:
        raise RuntimeError(f"icrl {args[0]}: status {status}: {said.getvalue().strip().splitlines()[-1:]}")


def untimed(path: Path) -> Any:
    """A JSON file, or one of JSON lines, without what depends on the clock."""

    def clean(x: Any) -> Any:
        if isinstance(x, dict):
            return {
                k: clean(v)
                for k, v in x.items()
                if not any(
                    w in k for w in ("second", "per_s", "_ms", "time", "step_us", "icrl_kernels", "rss", "bytes")
                )
            }
        return [clean(v) for v in x] if isinstance(x, list) else x

    if path.suffix == ".jsonl":
        return [clean(json.loads(line)) for line in path.read_text().splitlines()]
    return clean(json.loads(path.read_text()))


def folder_facts(folder: Path) -> dict[str, Any]:
    """The tensors of every safetensors file below a folder."""
    return {str(p.relative_to(folder)): file_facts(p) for p in sorted(folder.rglob("*.safetensors"))}


def run_facts(folder: Path) -> dict[str, Any]:
    """A training run: all tensors of its checkpoints and of its model, and its log."""
    return {**folder_facts(folder), "log": untimed(folder / "metrics.jsonl")}


def learning_calls() -> None:
    import torch

    moved = Moved()
    data = {"batch": 4, "steps": 48, "states": 10}
    model = {
        "layers": 2,
        "action_width": 8,
        "state_width": 12,
        "value_width": 4,
        "action_hidden": 8,
        "state_hidden": 12,
    }

    def config(**changes: Any) -> Any:
        return moved.DPDConfig(**{**data, **changes})

    def batches(prefetch: int, **changes: Any) -> Any:
        stream = moved.DPDStream(config(**changes), 3, prefetch=prefetch)
        try:
            return [next(stream) for _ in range(3)], stream.state_dict(), stream.batch(7)
        finally:
            stream.close()

    add("icrl/stream", lambda: batches(0))
    add("icrl/stream/prefetch", lambda: batches(2))
    add("icrl/stream/threads", lambda: batches(0, batch=16), 2)
    add("icrl/stream/published", lambda: batches(0, batch=24, behaviours=moved.PUBLISHED_BEHAVIOURS))
    add("icrl/stream/garnet", lambda: batches(0, tasks={"garnet": 1.0}))
    add("icrl/stream/bandit", lambda: batches(0, tasks={"bandit": 1.0}))

    def labelled() -> Any:
        tasks = moved.sample_tasks(config(), 6, 5)
        records = moved.make_batch(config(), 2, 1)
        references = moved.draw_references(config(), records, seed=4)
        return tasks.tensors(), moved.simulate(config(), tasks, seed=9, labels=True), records, references

    add("icrl/distill", labelled)
    add("icrl/hash_seed", lambda: [moved.hash_seed(i, 3 * i, -i) for i in range(20)])
    add("icrl/batch_rows", lambda: [moved.batch_rows(20, 4, i, seed=2, rank=i % 2, world=2) for i in range(12)])

    def fixed_context() -> Any:
        records = moved.make_batch(config(batch=3, steps=80, states=16), 5, 0)
        return records, moved.tokens_of(records)

    def logits(segment: int) -> Any:
        net = moved.OmniRL.load(moved.shipped())
        _, tokens = fixed_context()
        state, out = net.initial_state(3, 16), []
        with torch.no_grad():
            for begin in range(0, 80, segment):
                found, state = net(type(tokens)(*(x[:, begin : begin + segment] for x in tokens)), state)
                out.append(found)
        return out, state

    add("icrl/omnirl/logits", lambda: logits(80))
    add("icrl/omnirl/logits segments", lambda: logits(20))
    add("icrl/omnirl/logits one by one", lambda: logits(1))
    add("icrl/omnirl/logits threads", lambda: logits(40), 2)

    def acting(**options: Any) -> Any:
        from icrl import worlds
        from icrl_kernels import rollout_start, rollout_step

        net = moved.OmniRL.load(moved.shipped())
        tasks = worlds.sample_anymdp(4, (8, 16), 5, seed=2)
        agent = moved.Agent(net, 4, 16, seed=3, num_actions=tasks.num_actions, **options)
        ready, out = tasks.tables(), []
        state = rollout_start(ready, seed=1)
        for _ in range(40):
            action = agent.act(tasks.observe(state.state))
            reward, done, _ = rollout_step(ready, state, action)
            agent.observe(reward, done)
            out.append((action, reward, done))
        return out, agent.state

    add("icrl/omnirl/agent", lambda: acting())
    add("icrl/omnirl/agent prompt", lambda: acting(prompt=3, temperature=moved.Temperature(1.0, 0.2, 20)))

    def evaluated() -> Any:
        from icrl import worlds

        tasks = worlds.sample_anymdp(4, 10, 5, seed=2)
        known = moved.references(tasks, 2000)
        runs = {name: moved.run_baseline(tasks, name, 100, 3) for name in moved.BASELINES}
        runs["ours"] = moved.run_agent(moved.OmniRL.load(moved.shipped()), tasks, 100, seed=2)
        return known, runs, {name: moved.scores(run, known, 50, 100) for name, run in runs.items()}

    add("icrl/evaluate", evaluated)

    def training(**changes: Any) -> Any:
        given = {"model": moved.OmniRLConfig(**model), "data": config(), "segment": 24, "seed": 2, **changes}
        known = {f.name for f in dataclasses.fields(moved.OmniRLTraining)}  # the seed is the loop's now
        return moved.OmniRLTraining(**{k: v for k, v in given.items() if k in known})

    def loss() -> Any:
        torch.manual_seed(2)
        net, c = moved.OmniRL(moved.OmniRLConfig(**model)), training()
        records = moved.make_batch(c.data, 5, 0)
        targets = moved.targets_of(records, c)
        output, state = net(moved.tokens_of(records), net.initial_state(4, 10))
        total, logged = moved.loss_of(output, targets, c)
        total.backward()
        return total, numbers(logged), targets, {name: p.grad for name, p in net.named_parameters()}, state

    add("icrl/omnirl/loss", loss)
    add("icrl/omnirl/loss threads", loss, 2)

    def learner() -> Any:
        """With the model's own records mixed in."""
        c = training(dagger=0.5, dagger_from=0, dagger_records=4, evaluation_tasks=2, evaluation_steps=20)
        made = moved.OmniRLLearner(c, moved.LoopConfig(updates=2, threads=1, seed=2))
        try:
            found = [(total, numbers(logged)) for u in range(2) for total, logged in made.losses(u)]
            return found, made.own, made.collections, made.evaluate(), [p.shape for p in made.hidden_matrices()]
        finally:
            made.stream.close()

    add("icrl/omnirl/learner", learner)

    tiny = {
        "training": {
            "model": model,
            "data": data,
            "segment": 24,
            "dagger": 0.5,
            "dagger_from": 1,
            "dagger_records": 3,
            "evaluation_tasks": 2,
            "evaluation_steps": 20,
        },
        "loop": {"updates": 3, "warmup": 1, "log_every": 1, "checkpoint_every": 2, "threads": 1},
    }

    def command() -> Any:
        """A run of three updates, in two goes, with momentum and the model's own records in its checkpoint."""
        Path("c.json").write_text(json.dumps(tiny))
        args = ["train", "omnirl", "--config", "c.json", "--out", "run"]
        icrl(moved, *args, "--json", "scores.json")
        return run_facts(Path("run")), untimed(Path("scores.json")), untimed(Path("run/config.json"))

    def resumed() -> Any:
        Path("c.json").write_text(json.dumps(tiny))
        args = ["train", "omnirl", "--config", "c.json", "--out", "run"]
        icrl(moved, *args)
        folder = Path("run/checkpoints/00000003")
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
        icrl(moved, *args)
        return run_facts(Path("run"))

    def from_records() -> Any:
        given = {**data, "discounts": [0.0, 0.5, 0.93, 0.994]}
        Path("d.json").write_text(json.dumps(given))
        icrl(moved, "distill", "records", "--tasks", 12, "--config", "d.json", "--workers", 1, "--labels", "--seed", 3)
        icrl(moved, "dataset", "records", "--full", "--json", "about.json")
        stream = moved.RecordStream("records", 4, 3, shuffle=False, prefetch=0)
        shuffled = moved.RecordStream("records", 4, 3, prefetch=0)
        batches = [next(stream) for _ in range(3)], [next(shuffled) for _ in range(4)]
        Path("c.json").write_text(json.dumps({**tiny, "loop": {**tiny["loop"], "updates": 2}}))
        icrl(moved, "train", "omnirl", "--config", "c.json", "--out", "run", "--records", "records")
        return folder_facts(Path("records")), untimed(Path("about.json")), batches, run_facts(Path("run"))

    def eval_command() -> Any:
        icrl(moved, "eval", "--num-tasks", 3, "--num-states", 8, "--steps", 60, "--json", "e.json")
        return untimed(Path("e.json"))

    def demo() -> Any:
        icrl(moved, "demo", "--tasks", 2, "--num-states", 8, "--steps", 500, "--out", "d.png", "--json", "d.json")
        return untimed(Path("d.json"))

    def context() -> Any:
        icrl(moved, "context", "--steps", 300, "--num-states", 8, "--json", "c.json")
        return untimed(Path("c.json"))

    add("icrl/command/context", context)
    add("icrl/command/train omnirl", command)
    add("icrl/command/train omnirl resumed", resumed)
    add("icrl/command/distill", from_records)
    add("icrl/command/eval", eval_command)
    add("icrl/command/demo", demo)


def offline_calls() -> None:
    import torch

    moved = Moved()
    room = moved.DarkRoomData(size=4, horizon=12, train_goals=12, episodes=6, history=6)
    robot = moved.PointRobotData(horizon=12, tasks=10, episodes=6, history=6)
    sources = {
        "darkroom": room,
        "darkroom far": moved.DarkRoomData(size=4, horizon=12, train_goals=12, episodes=6, history=3, split="far"),
        "darkroom corner": moved.DarkRoomData(
            size=4, horizon=12, train_goals=12, episodes=6, history=6, start="corner", quality="q_learning"
        ),
        "point robot": robot,
        "point robot far": moved.PointRobotData(
            horizon=12, tasks=10, episodes=6, history=3, split="far", quality="medium"
        ),
        "stitching": moved.StitchingData(size=4, horizon=12, train_goals=4, episodes=6, targets=2),
    }
    for name, source in sources.items():

        def collected(source: Any = source) -> Any:
            data = source.train_data()
            best = [source.best_returns("train"), source.best_returns()]
            prompts = source.prompts() if hasattr(source, "prompts") else None
            return data, data.moments(), data.returns_to_go(0.9), best, source.goals(), prompts, repr(data)

        add(f"offline/data/{name}", collected)

        def walked(source: Any = source) -> Any:
            env = source.environments()
            env.action_space.seed(3)
            out: list[Any] = [env.reset(seed=4)[0]]
            return out + [env.step(env.action_space.sample())[:4] for _ in range(20)]

        add(f"offline/environments/{name}", walked)

    def trunk(mixer: str) -> Any:
        torch.manual_seed(1)
        net = moved.Trunk(moved.TrunkConfig(width=16, layers=2, heads=2, mixer=mixer), 20)
        x, queries = torch.randn(2, 12, 16).requires_grad_(), torch.randn(2, 3, 4, 16)
        y, state = net(x)
        more, _ = net(torch.randn(2, 1, 16), state)
        read = net.read(queries, net.remember(x, [0, 5, 12]))
        (y.sum() + more.square().sum() + read.square().sum()).backward()
        return y, more, read, x.grad, {name: p.grad for name, p in net.named_parameters()}

    for mixer in ("softmax", "gla", "gated_delta_net", "kda", "gsa", "linear", "rwkv7"):
        add(f"offline/trunk/{mixer}", lambda m=mixer: trunk(m))
    add("offline/trunk/mixers", lambda: list(moved.MIXERS))

    def world_model(data: Any, **changes: Any) -> Any:
        torch.manual_seed(0)
        return moved.WorldModel.of(moved.WorldModelConfig(size=4, hidden=8, **changes), data)

    def make(name: str, data: Any, mixer: str = "gla", **changes: Any) -> Any:
        settings: dict[str, Any] = {"trunk": moved.TrunkConfig(width=16, layers=2, heads=2, mixer=mixer)}
        settings |= {"horizon": 12, "batch": 4}
        settings |= {"idt": {"span": 4}, "ad": {}, "dicp": {}, "ic_iql": {}}.get(name, {"layout": "branch"})
        known = world_model(data) if name == "sicql" and changes.get("world_model", True) else None
        torch.manual_seed(1)
        found = moved.METHODS[name]
        kind = found[1] if isinstance(found, tuple) else found.config_class
        made = moved.make_method(name, kind(**{**settings, **changes}), moved.Spaces.of(data), known)
        made.prepare(data)
        return made

    def batch(name: str, source: Any, mixer: str = "gla", **changes: Any) -> Any:
        data = source.train_data()
        method = make(name, data, mixer, **changes)
        torch.manual_seed(5)
        method.before_update()
        total, logged = method.loss(data)
        total.backward()
        grads = {n: p.grad for n, p in method.named_parameters()}
        scores = moved.few_shot(method, source.environments(), 3, seed=2)
        return total, numbers(logged), grads, dict(method.state_dict()), scores

    for name in ("sicql", "dpt", "ad", "idt", "dicp", "dit", "ic_iql"):
        for mixer in ("softmax", "gla"):
            add(f"offline/{name}/darkroom/{mixer}", lambda n=name, m=mixer: batch(n, room, m))
        if name != "dicp":
            add(f"offline/{name}/point robot", lambda n=name: batch(n, robot))
    add("offline/dicp/point robot", lambda: batch("dicp", robot))
    add("offline/sicql/w o c", lambda: batch("sicql", room, world_model=False))
    add("offline/sicql/w o q", lambda: batch("sicql", room, q_learning=False))
    add("offline/sicql/w o cq", lambda: batch("sicql", room, world_model=False, q_learning=False))
    add("offline/sicql/stride", lambda: batch("sicql", room, stride=3))
    add("offline/dpt/query first", lambda: batch("dpt", room, "softmax", layout="query_first", balanced=1.0))

    def models(encoder: str, others: int) -> Any:
        data = room.train_data()
        net = world_model(data, encoder=encoder, others=others)
        loop = moved.LoopConfig(updates=3, muon_learning_rate=0.0, warmup=1, log_every=1, checkpoint_every=2)
        made = moved.WorldModelLearner(net.config, data, 16, loop, {})
        moved.train(made, loop, Path("world"))
        return run_facts(Path("world")), made.model.prompts(data)

    for encoder, others in (("gru", 0), ("gru", 2), ("gla", 2), ("softmax", 0)):
        add(f"offline/world model/{encoder}/{others}", lambda e=encoder, o=others: quietly(lambda: models(e, o)))

    run = {
        "data": {"size": 4, "horizon": 12, "train_goals": 12, "episodes": 6, "history": 6},
        "settings": {"trunk": {"width": 16, "layers": 2, "heads": 2}, "batch": 4},
        "world_model": {"window": 4, "size": 4, "hidden": 8, "others": 2},
        "world_loop": {"updates": 3, "warmup": 1, "log_every": 1},
        "world_batch": 16,
        "loop": {"updates": 3, "warmup": 1, "log_every": 1, "checkpoint_every": 2, "evaluate_every": 2, "threads": 1},
        "judged_episodes": 2,
    }

    def command(method: str) -> Any:
        Path("c.json").write_text(json.dumps(run))
        icrl(moved, "train", "offline", "--out", "run", "--method", method, "--config", "c.json", "--evaluate", 3)
        found = [run_facts(f) for f in (Path("run"), Path("run-world_model")) if f.exists()]
        again = moved.few_shot(moved.load_method(Path("run/model.safetensors")), room.environments(), 2, seed=1)
        return found, untimed(Path("run/few_shot.json")), untimed(Path("run/config.json")), again

    for method in ("sicql", "ad", "dpt", "sicql w/o c"):
        add(f"offline/command/train/{method.replace('/', ' ')}", lambda m=method: command(m))

    def gathered(environment: str, data: dict[str, Any]) -> Any:
        Path("c.json").write_text(json.dumps({"environment": environment, "data": data}))
        icrl(moved, "collect", "t", "--config", "c.json", "--json", "n.json")
        icrl(moved, "dataset", "t", "--full", "--json", "about.json")
        read = moved.read_trajectories(Path("t"))
        return folder_facts(Path("t")), untimed(Path("n.json")), untimed(Path("about.json")), read

    add("offline/command/collect darkroom", lambda: gathered("darkroom", run["data"]))
    add(
        "offline/command/collect point robot",
        lambda: gathered("point-robot", {"horizon": 12, "tasks": 10, "episodes": 6, "history": 6}),
    )

    def suite() -> Any:
        Path("c.json").write_text(json.dumps(run))
        args = ["eval", "sicql", "--out", "suite", "--methods", "sicql", "--seeds", 1, "--episodes", 3]
        icrl(moved, *args, "--jobs", 1, "--config", "c.json", "--json", "n.json")
        return folder_facts(Path("suite")), untimed(Path("n.json"))

    add("offline/command/suite", suite)


def swap_calls() -> None:
    """Ours in other libraries, where those are installed; both builds are of one environment."""
    import torch

    from icrl_kernels import swap

    common = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "full_attention"],
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    delta = {
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 24,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "num_attention_heads": 2,
    }
    experts = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "num_key_value_heads": 1,
        "head_dim": 16,
    }
    kimi = {
        "num_attention_heads": 2,
        "linear_num_heads": 2,
        "linear_head_dim": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
        "num_key_value_heads": 2,
        "num_experts_per_tok": 2,
        "num_local_experts": 4,
        "moe_intermediate_size": 16,
        "n_group": 1,
        "topk_group": 1,
    }
    models = {"Qwen3Next": {**delta, **experts}, "KimiLinear": kimi, "OlmoHybrid": delta}

    def model(kind: str) -> Any:
        import transformers

        torch.manual_seed(0)
        config = getattr(transformers, f"{kind}Config")(**common, **models[kind])
        net = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
        tokens = torch.randint(61, (2, 70))
        with swap.install("transformers") as installed:
            logits = net(tokens, use_cache=False).logits
            (logits * torch.randn(logits.shape)).sum().backward()
            with torch.no_grad():
                more = net.generate(tokens[:1, :9], max_new_tokens=5, do_sample=False)
        return logits, more, {name: p.grad for name, p in net.named_parameters()}, sorted(installed.names)

    for kind in models:
        add(f"swap/transformers/{kind}", lambda k=kind: quietly(lambda: model(k)))

    def fla(name: str) -> Any:
        module, function = name.split(".")
        found = importlib.import_module(f"fla.ops.{module}")
        n = torch.randn
        q, k, v = n(1, 70, 2, 16), torch.nn.functional.normalize(n(1, 70, 2, 16), dim=-1), n(1, 70, 2, 24)
        state = n(1, 2, 16, 24)
        scalar, channel = -torch.rand(1, 70, 2), -torch.rand(1, 70, 2, 16)
        with swap.install("fla"):
            call = getattr(found, function)
            if module == "gla":
                return call(q, k, v, channel, initial_state=state, output_final_state=True)
            if module == "simple_gla":
                return call(q, k, v, scalar, initial_state=state, output_final_state=True)
            if module == "gsa":
                s, states = torch.rand(1, 70, 2, 6), (n(1, 2, 16, 6), n(1, 2, 6, 24))
                return call(q, k, v, s, -torch.rand(1, 70, 2, 6), initial_state=states, output_final_state=True)
            if module == "rwkv7":
                return call(q, 0.6 * channel, k, v, -k, k * torch.rand(1, 70, 2, 16), initial_state=state,
                            output_final_state=True)  # fmt: skip
            beta = torch.rand(1, 70, 2)
            if module == "delta_rule":
                return call(q, k, v, beta, initial_state=state, output_final_state=True)
            gate = channel if module == "kda" else scalar
            return call(q, k, v, g=gate, beta=beta, initial_state=state, output_final_state=True)

    for name in ("gla.chunk_gla", "gla.fused_recurrent_gla", "simple_gla.chunk_simple_gla", "gsa.chunk_gsa",
                 "delta_rule.chunk_delta_rule", "gated_delta_rule.chunk_gated_delta_rule",
                 "gated_delta_rule.fused_recurrent_gated_delta_rule", "kda.chunk_kda", "rwkv7.chunk_rwkv7"):  # fmt: skip
        add(f"swap/fla/{name}", lambda n=name: quietly(lambda: fla(n)))
    add("names/swap", lambda: sorted(swap.__all__))


def quietly(call: Callable[[], Any]) -> Any:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return call()


PARTS = (kernel_calls, tabular_calls, layer_calls, world_calls, learning_calls, offline_calls, swap_calls)


# ---- one build -----------------------------------------------------------------------------------------------------


def chosen(name: str, only: list[str]) -> bool:
    return not only or any(name.startswith(o) or name.startswith(REFUSED + o) for o in only)


def run_calls(out: Path, only: list[str]) -> None:
    """In a build's own process: one JSON line a call, the name of each written before it begins."""
    import torch

    import icrl_kernels
    from icrl_kernels.info import info

    torch.set_num_threads(1)
    for part in PARTS:
        part()
    site = str(Path(icrl_kernels.__file__).parents[1])
    with open(out, "w") as f:
        facts = {"file": icrl_kernels.__file__, "isa": info()["CPU kernels"], "torch": torch.__version__}
        print(json.dumps({"facts": facts}), file=f, flush=True)
        for name in [n for n in CALLS if chosen(n, only)]:
            print(json.dumps({"begins": name}), file=f, flush=True)
            found: dict[str, str] = {}
            begin = time.perf_counter()
            with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
                try:
                    flatten("", CALLS[name](), found)
                except ModuleNotFoundError as error:
                    theirs = str(error.name).split(".")[0] not in ("icrl", "icrl_kernels")
                    found = {"skipped" if theirs else "raises": f"{type(error).__name__}: {error}"}
                except Exception as error:
                    found = {"raises": f"{type(error).__name__}: {error}".replace(folder, "").replace(site, "")}
            seconds = round(time.perf_counter() - begin, 3)
            print(json.dumps({"call": name, "found": found, "seconds": seconds}), file=f, flush=True)


# ---- both builds ---------------------------------------------------------------------------------------------------


class Build:
    """A build's process for one instruction set, and what it has found."""

    def __init__(self, site: Path, isa: str, only: list[str], folder: Path, name: str) -> None:
        self.site, self.name = site, name
        self.out, self.log = folder / f"{name}.jsonl", folder / f"{name}.log"
        empty = folder / f"{name}.cwd"
        empty.mkdir()
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "2")
        env = {**os.environ, **threads, "ICRL_ISA": isa, "PYTHONPATH": str(site), "PYTHONHASHSEED": "0"}
        env |= {
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_WAIT_POLICY": "passive",
            "CUDA_VISIBLE_DEVICES": "",
            "TMPDIR": str(folder),
        }
        command = [sys.executable, "-P", str(Path(__file__).resolve()), "--calls", str(self.out)]
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [*command, *itertools.chain(*(("--only", o) for o in only))],
                env=env, cwd=empty, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def result(self) -> tuple[dict[str, Any], dict[str, dict[str, str]], dict[str, float]]:
        """Facts, hashes by call, and seconds. RuntimeError where the process ran no call, or another package."""
        status = self.process.wait()
        lines = [json.loads(x) for x in self.out.read_text().splitlines()] if self.out.exists() else []
        if not lines:
            raise RuntimeError(f"{self.site}: no call was made:\n{self.log.read_text()[-3000:]}")
        facts = lines[0]["facts"]
        if not Path(facts["file"]).resolve().is_relative_to(self.site.resolve()):
            raise RuntimeError(f"{self.site}: ran {facts['file']}")
        found = {x["call"]: x["found"] for x in lines if "call" in x}
        seconds = {x["call"]: x["seconds"] for x in lines if "call" in x}
        if status:  # e.g. killed by a signal within a call
            began = [x["begins"] for x in lines if "begins" in x and x["begins"] not in found]
            for name in began:
                found[name] = {"ended": f"the process ended with status {status}"}
            print(f"{self.site}: ended with status {status} in {began}\n{self.log.read_text()[-1000:]}")
        return facts, found, seconds


def isas_here() -> list[str]:
    """Those that this processor has."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return list(ISAS)
    has = {"avx512": "avx512f" in flags and "avx512bw" in flags, "avx2": "avx2" in flags and "fma" in flags}
    return [isa for isa in ISAS if has.get(isa, True)]


def differences(old: dict[str, str] | None, new: dict[str, str] | None) -> list[str]:
    if old is None or new is None:
        return [f"was not called in the {'old' if old is None else 'new'} build"]
    # fields may be added, and the count of fields with them
    names = [n for n in dict.fromkeys([*old, *new]) if n in old or n == "raises"]
    return [f"{n}: {old.get(n, 'absent')} -> {new.get(n, 'absent')}" for n in names if old.get(n) != new.get(n)]


def compare(old: Path, new: Path, isas: list[str], only: list[str], path: Path | None, slowest: int) -> int:
    report: dict[str, Any] = {"old": str(old), "new": str(new), "isas": {}}
    wrong = 0
    for isa in isas:
        begin = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            both = []
            try:
                both += [Build(site, isa, only, Path(folder), name) for site, name in ((old, "old"), (new, "new"))]
                (facts, before, seconds), (other, after, _) = (b.result() for b in both)
            finally:
                for b in both:
                    if b.process.poll() is None:
                        b.process.kill()
        calls = list(dict.fromkeys([*before, *after]))
        differ = {c: d for c in calls if (d := differences(before.get(c), after.get(c)))}
        raised = {c: before[c]["raises"] for c in calls if "raises" in before.get(c, {}) and c not in differ}
        unasked = {c: e for c, e in raised.items() if not c.startswith(REFUSED)}
        passed = [c for c in calls if c.startswith(REFUSED) and c not in raised and c not in differ]
        took = time.perf_counter() - begin
        same = len(calls) - len(differ)
        tensors = sum(len(f) for f in before.values())
        print(
            f"{isa} (kernels {facts['isa']}, {other['isa']}): {same} of {len(calls)} calls equal, {tensors} values, {took:.0f} s"
        )
        for call, d in differ.items():
            print(f"  DIFFERS {call}")
            for line in d[:6]:
                print(f"    {line[:300]}")
            if len(d) > 6:
                print(f"    and {len(d) - 6} more")
        if skipped := [c for c in calls if "skipped" in before.get(c, {})]:
            print(f"  {len(skipped)} calls skipped, as libraries are missing: {', '.join(skipped)}")
        for call, e in unasked.items():
            print(f"  RAISES in both {call}: {e[:300]}")
        for call in passed:
            print(f"  IS NOT REFUSED in both {call}")
        if slowest:
            for call in sorted(seconds, key=lambda c: -seconds[c])[:slowest]:
                print(f"  {seconds[call]:7.2f} s {call}")
        wrong += len(differ) + len(unasked) + len(passed) + (not calls)
        report["isas"][isa] = {
            "calls": len(calls), "equal": same, "differ": differ, "raise": unasked, "not refused": passed,
            "seconds": round(took, 1), "kernels": facts["isa"], "hashes": before,
        }  # fmt: skip
    if path is not None:
        path.write_text(json.dumps(report, indent=1) + "\n")
    return int(wrong > 0)


def arguments() -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sites", nargs="*", type=Path, metavar="SITE", help="the old one and the new one")
    parser.add_argument("--isa", action="append", choices=ISAS, help="all that the machine has unless given")
    parser.add_argument("--only", action="append", default=[], metavar="PREFIX", help="of the calls' names")
    parser.add_argument("--json", type=Path, help="write all hashes and differences here")
    parser.add_argument("--slowest", type=int, default=0, metavar="N", help="print the N slowest calls")
    parser.add_argument("--list", action="store_true", help="print the calls' names, of the package that is found here")
    parser.add_argument("--calls", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if not given.calls and not given.list and len(given.sites) != 2:
        parser.error("wanted two sites")
    return given


def main() -> int:
    given = arguments()
    if given.calls:
        run_calls(given.calls, given.only)
        return 0
    if given.list:
        for part in PARTS:
            part()
        print("\n".join(n for n in CALLS if chosen(n, given.only)))
        return 0
    old, new = (site.resolve() for site in given.sites)
    try:
        return compare(old, new, given.isa or isas_here(), given.only, given.json, given.slowest)
    except RuntimeError as error:
        print(error)
        return 1


if __name__ == "__main__":
    sys.exit(main())
