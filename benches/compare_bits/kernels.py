"""Calls of the linear-attention ops."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from calls import (
    REFUSED,
    add,
)


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
                given, states = inputs(op, (1, 2, 1, 1, 128, 4097), about["gates"][-1])
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
