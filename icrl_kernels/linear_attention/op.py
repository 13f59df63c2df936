"""What the linear-attention ops share, written once: schema, check, fake, autograd, the calls of C++ and Triton, steps.

An op's file holds its reference, its public functions and one `Op`: the names and layouts of its tensors, from which
everything here follows. Layouts are written as "B T Hk K", a symbol a dimension; the symbols mean the same in all tensors
of a call.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from icrl_kernels import _C, _checks, _registry, _torch_private
from icrl_kernels.linear_attention import common
from icrl_kernels.linear_attention.common import DTYPES, GATE_ALLOWANCE, MAX_HEAD_DIM, MAX_VALUE_DIM

Sizes = dict[str, Any]  # by symbol; also "bounds", where each sequence's tokens begin, once values were checked


class Argument:
    """A tensor of an op. `layout`: its dimensions; "|" between alternatives, "?" at the end where it may be None.

    `kind`: "input" (all of one dtype), "gate" (the inputs' dtype or float32), "state" (float32) or "index".
    """

    def __init__(self, name: str, layout: str, kind: str, label: str = "", written: bool = False) -> None:
        self.name, self.kind, self.label, self.written = name, kind, label or name, written
        self.optional = layout.endswith("?")
        shapes = [tuple(part.split()) for part in layout.rstrip("?").split("|")]
        self.shapes = {len(shape): shape for shape in shapes}

    def schema(self) -> str:
        return f"Tensor{'(a!)' if self.written else ''}{'?' if self.optional else ''} {self.name}"

    def size(self, sizes: Sizes) -> list[int]:
        (shape,) = self.shapes.values()
        return [sizes[symbol] for symbol in shape]


def bind(
    arguments: Sequence[Argument], tensors: Sequence[Tensor | None], first: Tensor, label: str, sizes: Sizes
) -> None:
    """Check devices, shapes, dtypes and layouts of `tensors`, and add what their shapes say to `sizes`.

    first: the op's first tensor, called `label`, whose device and dtype are the inputs'.
    """
    device, dtype = first.device, first.dtype
    for a, t in zip(arguments, tensors, strict=True):
        if t is None and a.optional:
            continue
        if not isinstance(t, Tensor):
            raise _checks.not_a_tensor(a.label, t)
        if t.device != device:
            raise ValueError(f"{a.label}: is on {t.device}, but {label} is on {device}")
        shape = t.shape
        symbols = a.shapes.get(len(shape))
        fits = symbols is not None
        if symbols is not None:
            for symbol, n in zip(symbols, shape, strict=True):
                fits = fits and sizes.setdefault(symbol, n) == n
        if not fits:
            symbols = symbols or next(reversed(a.shapes.values()))
            _checks.shape(a.label, t, symbols, **{s: sizes[s] for s in symbols if s in sizes})
        if t.dtype != dtype or a.kind != "input":
            check_dtype(a, t, label, dtype)
        if a.written and not t.is_contiguous():
            raise ValueError(f"{a.label}: wanted a contiguous tensor, because it is changed in place")


def check_dtype(a: Argument, t: Tensor, first: str, dtype: torch.dtype) -> None:
    if a.kind == "input":
        raise ValueError(f"{a.label}: has dtype {t.dtype}, but {first} has {dtype}")
    wide = torch.promote_types(dtype, torch.float32)
    gates = (torch.float32, dtype) if dtype != torch.float32 else (dtype,)
    _checks.dtype(a.label, t, {"gate": gates, "state": (wide,), "index": (torch.int32, torch.int64)}[a.kind])


class Op:
    """One linear-attention op: `icrl::<name>`, `<name>_backward` and `<name>_step`.

    Args:
        name: of the op, of its Triton launchers' module, and of its C++ entry points unless `kernel` is given.
        reference: its specification, called as reference(*tokens, scale, states, output_final_state, cu_seqlens, *flags).
        tokens: layouts by name, without gates' dtypes; the first names the inputs' dtype. output: o's layout.
        states: layouts by name, without "initial_" and "final_".
        gates: names of tokens that may be float32 beside inputs of another dtype; the first holds log decays.
        heads: (many, few): names of the two arguments with H and with Hk heads.
        c_sizes, c_dtypes: the sizes in a C++ Shape, and the tokens whose dtypes it has: see `_shape`.
        flags: names of bools.
        per_head: names of inputs with Hk heads whose gradients C++ writes for each of H heads, to be summed.
    """

    def __init__(
        self,
        name: str,
        *,
        reference: Callable[..., Any],
        tokens: dict[str, str],
        states: dict[str, str],
        output: str,
        gates: tuple[str, ...],
        heads: tuple[str, str] | None,
        c_sizes: str,
        c_dtypes: str,
        kernel: str = "",
        flags: tuple[str, ...] = (),
        per_head: tuple[str, ...] = (),
    ) -> None:
        self.name, self.reference, self.gate, self.heads = name, reference, gates[0], heads
        self.first = next(iter(tokens))
        self.c_sizes, self.flags, self.per_head = c_sizes.split(), flags, per_head
        names = list(tokens)
        self.c_dtypes = [names.index(x) for x in c_dtypes.split()]
        self.gate_at = names.index(self.gate)
        kinds = {x: "gate" if x in gates else "input" for x in tokens}
        self.tokens = [Argument(x, layout, kinds[x]) for x, layout in tokens.items()]
        one = {x: layout.replace("T ", "") for x, layout in tokens.items()}
        self.token = [Argument(x, layout, kinds[x]) for x, layout in one.items()]

        def label(role: str, i: int) -> str:  # the public functions take two states as a pair
            return f"{role}[{i}]" if len(states) > 1 else ""

        each = list(enumerate(states.items()))
        self.initial = [Argument(f"initial_{s}", f"{x}?", "state", label("initial_state", i)) for i, (s, x) in each]
        self.state = [Argument(s, x.replace("N", "B"), "state", label("state", i), True) for i, (s, x) in each]
        self.cu_seqlens = Argument("cu_seqlens", "N+1?", "index")
        self.o, self.one_o = Argument("o", output, "input"), Argument("o", output.replace("T ", ""), "input")
        self.final = [Argument(f"final_{s}", x, "state") for s, x in states.items()]
        dfinal = [Argument(f"dfinal_{s}", x, "state") for s, x in states.items()]
        self.do = [Argument("do", output, "input"), *dfinal]
        self.compiled = {x: getattr(_C, f"{kernel or name}_{x}") for x in ("forward", "backward", "step")}
        self.plain = getattr(_C, f"{kernel or name}_step_plain")
        self._register()

    # Entry points: what the public functions call.

    def __call__(
        self,
        tokens: tuple[Tensor | None, ...],
        scale: float | None,
        initial: Any,
        output_final_state: bool,
        cu_seqlens: Tensor | None,
        backend: str,
        *flags: bool,
    ) -> tuple[Tensor, Any]:
        """o, and the state after the last token or None. A pair of states is given and returned as a pair."""
        first = self._first(tokens)
        states = (initial,) if len(self.initial) == 1 else pair("initial_state", initial, optional=True)
        _checks.backend(backend)
        require_dense((*self.tokens, *self.initial, self.cu_seqlens), (*tokens, *states, cu_seqlens))
        scale = common.default_scale(scale, first)
        if backend == "reference" or (backend == "auto" and first.dtype == torch.float64):
            sizes = self.check(*tokens, scale, *states, cu_seqlens, *flags)
            if not _checks.compiling():
                if cu_seqlens is not None:  # the reference reads it on any device
                    common.bounds(sizes["B"], sizes["T"], cu_seqlens)
                self._check_gate_on_cpu(tokens, self.tokens)
            return self.reference(*tokens, scale, initial, output_final_state, cu_seqlens, *flags)
        refuse_transforms(self.name, *tokens, *states)
        o, *final = self.op(*tokens, scale, *states, cu_seqlens, *flags, backend)
        if not output_final_state:
            return o, None
        return o, final[0] if len(final) == 1 else tuple(final)

    def step(self, backend: str, *args: Any) -> Tensor:
        """o of one token. args: tokens, states (changed in place), flags, scale.

        C++ is called at once, without torch's dispatcher, unless it finds that the tensors are not dense CPU tensors that
        fit each other and need no gradient (it returns None), or something wants to see the call: a compiler, tracer,
        mode, forward-mode level or profiler.
        """
        if args[-1] is not None and type(args[-1]) is not float:
            args = (*args[:-1], common.default_scale(args[-1], args[0]))
        if not (torch.compiler.is_compiling() or (backend != "auto" and backend != "cpu") or _torch_private.watched()):
            o = self.plain(*args, GATE_ALLOWANCE, torch.get_num_threads(), torch.is_grad_enabled())
            if o is not None:
                return o
        first, m = self._first(args), len(self.token) + len(self.state)
        _checks.backend(backend)
        require_dense((*self.token, *self.state), args[:m])
        refuse_transforms(f"{self.name}_step", *args[:m])
        return self.step_op(*args[:m], common.default_scale(args[-1], first), *args[m:-1], backend)

    def _first(self, tokens: Sequence[Any]) -> Tensor:
        if not isinstance(tokens[0], Tensor):
            raise _checks.not_a_tensor(self.first, tokens[0])
        return tokens[0]

    # Checks: of every call of an op, and of the reference.

    def split(self, args: Sequence[Any]) -> tuple[Sequence[Any], float, Sequence[Any], Tensor | None, Sequence[bool]]:
        """tokens, scale, initial states, cu_seqlens, flags."""
        n, m = len(self.tokens), len(self.tokens) + 1 + len(self.initial)
        return args[:n], args[n], args[n + 1 : m], args[m], args[m + 1 :]

    def check(self, *args: Any) -> Sizes:
        tokens, scale, states, cu_seqlens, _ = self.split(args)
        first, sizes = self._first(tokens), {}
        if first.dtype not in DTYPES and first.dtype != torch.float64:
            _checks.dtype(self.first, first, (*DTYPES, torch.float64))
        common.check_scale(scale, first)
        bind(self.tokens, tokens, first, self.first, sizes)
        self._check_widths(sizes)
        sizes["N"] = sizes["B"]
        if cu_seqlens is not None:
            bind([self.cu_seqlens], [cu_seqlens], first, self.first, sizes)
            sizes["N"] = common.check_packing(first, cu_seqlens)
        given = [t is not None for t in states]
        if any(given) and not all(given):
            a, b = self.initial[given.index(False)], self.initial[given.index(True)]
            raise ValueError(f"{a.label}: wanted a tensor, as {b.label} is one, got None")
        bind(self.initial, states, first, self.first, sizes)
        return sizes

    def check_native(self, *args: Any) -> Sizes:
        sizes = self.check(*args)
        if args[0].dtype not in DTYPES:
            _checks.dtype(self.first, args[0], tuple(DTYPES), f"; {self.name} has backend='reference'")
        return sizes

    def check_backward(self, *args: Any) -> Sizes:
        k = len(self.do)
        sizes = self.check_native(*args[k:])
        bind(self.do, args[:k], args[k], self.first, sizes)
        return sizes

    def check_step(self, *args: Any) -> Sizes:
        n, m = len(self.token), len(self.token) + len(self.state)
        first, sizes = self._first(args), {}
        common.check_scale(args[m], first)
        if torch.is_grad_enabled():
            for a, t in zip((*self.token, *self.state), args[:m], strict=True):
                if isinstance(t, Tensor) and t.requires_grad:
                    raise ValueError(
                        f"{a.label}: {self.name}_step has no gradient; use {self.name}, or torch.no_grad() around the step"
                    )
        if first.dtype not in DTYPES:
            _checks.dtype(self.first, first, tuple(DTYPES))
        bind(self.token, args[:n], first, self.first, sizes)
        self._check_widths(sizes)
        bind(self.state, args[n:m], first, self.first, sizes)
        return sizes

    def _check_widths(self, sizes: Sizes) -> None:
        if self.heads is not None and (sizes["Hk"] < 1 or sizes["H"] < 1 or sizes["H"] % sizes["Hk"]):
            many, few = self.heads
            raise ValueError(
                f"{many}: wanted a number of heads that is a multiple of {few}'s, got H={sizes['H']} and Hk={sizes['Hk']}"
            )
        if sizes["H"] < 1:
            raise ValueError(f"{self.first}: wanted at least one head, got H=0")
        for symbol in "KVM":
            most = MAX_VALUE_DIM if symbol == "V" else MAX_HEAD_DIM
            if symbol in sizes and not 1 <= sizes[symbol] <= most:
                owner = next(a.label for a in self.tokens for s in a.shapes.values() if symbol in s)
                raise ValueError(f"{owner}: wanted {symbol} of 1 to {most} per head, got {symbol}={sizes[symbol]}")

    def values(self, sizes: Sizes, *args: Any) -> None:
        """cu_seqlens' values; the C++ kernels refuse gates as they read them."""
        sizes["bounds"] = common.bounds(sizes["B"], sizes["T"], self.split(args)[3])

    def values_backward(self, sizes: Sizes, *args: Any) -> None:
        self.values(sizes, *args[len(self.do) :])

    def _check_gate_on_cpu(self, tokens: Sequence[Any], arguments: Sequence[Argument]) -> None:
        """To look at a GPU's values its host would have to wait."""
        for a, t in zip(arguments, tokens, strict=False):
            if a.name == self.gate and t is not None and t.device.type == "cpu" and bool((t > GATE_ALLOWANCE).any()):
                raise common.gate_error(a.label)

    # Outputs, and what a fake returns.

    def empty(self, sizes: Sizes, first: Tensor) -> list[Tensor]:
        o = torch.empty(self.o.size(sizes), dtype=first.dtype, device=first.device)
        return [o] + [torch.empty(a.size(sizes), dtype=torch.float32, device=first.device) for a in self.final]

    def gradients(self, inputs: Sequence[Tensor | None]) -> list[Tensor]:
        """A tensor for each input's gradient; where there is no input an empty one, as the schema wants one."""
        device = next(t.device for t in inputs if t is not None)
        return [
            torch.empty(0, dtype=torch.float32, device=device)
            if t is None
            else torch.empty(t.shape, dtype=t.dtype, device=t.device)
            for t in inputs
        ]

    # C++

    def _shape(self, sizes: Sizes, tokens: Sequence[Any], flags: Sequence[bool], scale: float, backward: bool) -> tuple:
        """What csrc/linear_attention/<op>.cpp calls a Shape: sizes, bounds, dtypes' codes (then dq's where gradients are written
        per head, then the gate's kind where a gate is optional), flags, scale, allowance, threads. Pointers follow it: tokens,
        states, outputs (in backward the outputs' gradients first). C++ returns False where it refused a gate.
        """
        bounds = sizes.get("bounds")  # none in a step
        codes = [0 if tokens[i] is None else DTYPES[tokens[i].dtype] for i in self.c_dtypes]
        if self.per_head:  # the dtype of dq and dk as C++ writes them
            codes.append(codes[0] if backward and sizes["H"] == sizes["Hk"] else 0)
        if self.tokens[self.gate_at].optional:  # csrc/linear_attention/gate.h: 0 none, 1 per head, 2 per channel
            g = tokens[self.gate_at]
            codes.append(0 if g is None else g.dim() - (3 if bounds is None else 4) + 2)
        of = [sizes[s] for s in self.c_sizes]
        limits = GATE_ALLOWANCE, torch.get_num_threads()
        return (*of, 0 if bounds is None else bounds.buffer_info()[0], *codes, *flags, scale, *limits)

    def _cpu_forward(self, sizes: Sizes, *args: Any) -> tuple[Tensor, ...]:
        tokens, scale, states, _, flags = self.split(args)
        out = self.empty(sizes, tokens[0])
        shape, given = self._shape(sizes, tokens, flags, scale, False), contiguous((*tokens, *states))
        if not self.compiled["forward"](shape, *pointers(given), *pointers(out)):
            raise common.gate_error(self.gate)
        return tuple(out)

    def _cpu_backward(self, sizes: Sizes, *args: Any) -> tuple[Tensor, ...]:
        k = len(self.do)
        tokens, scale, states, _, flags = self.split(args[k:])
        inputs = (*tokens, *states)
        out = self.gradients(inputs)
        wanted = [None if t is None else g for t, g in zip(inputs, out, strict=True)]
        if self.per_head and sizes["H"] > sizes["Hk"]:
            each = {**sizes, "Hk": sizes["H"]}
            for i, a in enumerate(self.tokens):
                if a.name in self.per_head:
                    wanted[i] = torch.empty(a.size(each), dtype=torch.float32, device=tokens[0].device)
        shape, given = self._shape(sizes, tokens, flags, scale, True), contiguous((*args[:k], *inputs))
        if not self.compiled["backward"](shape, *pointers(given), *pointers(wanted)):
            raise common.gate_error(self.gate)
        for i, (g, w) in enumerate(zip(out, wanted, strict=True)):
            if w is not None and w is not g:  # each head wrote its own: summed in their order
                out[i] = w.unflatten(2, (-1, sizes["H"] // sizes["Hk"])).sum(3).to(g.dtype)
        return tuple(out)

    def _cpu_step(self, sizes: Sizes, *args: Any) -> Tensor:
        n, m = len(self.token), len(self.token) + len(self.state)
        first = args[0]
        o = torch.empty(self.one_o.size(sizes), dtype=first.dtype, device=first.device)
        shape = self._shape({**sizes, "N": sizes["B"]}, args[:n], args[m + 1 :], args[m], False)
        given = contiguous(args[:m])
        if not self.compiled["step"](shape, *pointers(given), o.data_ptr()):
            raise common.gate_error(self.gate)
        return o

    # Triton, imported when first called: torch without Triton has all the rest.

    @functools.cached_property
    def launchers(self) -> Any:
        return importlib.import_module(f"icrl_kernels.linear_attention.triton.{self.name}")

    def _triton_forward(self, sizes: Sizes, *args: Any) -> tuple[Tensor, ...]:
        self._check_gate_on_cpu(args, self.tokens)
        return self.launchers.forward(*self._bounded(args, 0, sizes))

    def _triton_backward(self, sizes: Sizes, *args: Any) -> tuple[Tensor, ...]:
        none = functools.partial(torch.empty, 0, dtype=torch.float32, device=args[0].device)
        self._check_gate_on_cpu(args[len(self.do) :], self.tokens)
        found = self.launchers.backward(*self._bounded(args, len(self.do), sizes))
        return tuple(none() if g is None else g for g in found)

    def _bounded(self, args: tuple[Any, ...], skip: int, sizes: Sizes) -> tuple[Any, ...]:
        """The same arguments with cu_seqlens made a non-decreasing sequence within the T tokens, whatever it holds, so that
        kernels read and write nothing outside. On a CPU its values have been checked."""
        at = skip + len(self.tokens) + 1 + len(self.initial)
        if args[at] is None:
            return args
        on_cpu = args[at].device.type == "cpu"
        cu_seqlens = args[at].contiguous() if on_cpu else args[at].clamp(0, sizes["T"]).cummax(0).values
        return (*args[:at], cu_seqlens, *args[at + 1 :])

    def _triton_step(self, sizes: Sizes, *args: Any) -> Tensor:
        self._check_gate_on_cpu(args, self.token)
        return self.launchers.step(*args)

    # The reference's step; `__call__` calls the reference itself.

    @torch.no_grad()
    def _reference_step(self, sizes: Sizes, *args: Any) -> Tensor:
        n, m = len(self.token), len(self.token) + len(self.state)
        self._check_gate_on_cpu(args, self.token)
        tokens = [None if t is None else t[:, None] for t in args[:n]]
        states = args[n:m]
        o, final = self.reference(
            *tokens, args[m], states[0] if len(states) == 1 else states, True, None, *args[m + 1 :]
        )
        for state, new in zip(states, (final,) if len(states) == 1 else final, strict=True):
            state.copy_(new)
        return o[:, 0].contiguous()

    # Registration

    def _backends(self, part: str) -> dict[str, _registry.Backend]:
        triton = _registry.Backend(("cuda",), getattr(self, f"_triton_{part}"), _registry.no_triton)
        return {"cpu": _registry.Backend(("cpu",), getattr(self, f"_cpu_{part}")), "triton": triton}

    def _register(self) -> None:
        optional = [*self.initial, self.cu_seqlens]
        flags = [f"bool {flag}" for flag in self.flags]
        inputs = ", ".join(
            [*(a.schema() for a in self.tokens), "float scale", *(a.schema() for a in optional), *flags, "str backend"]
        )
        outputs = ", ".join(a.schema() for a in (self.o, *self.final))
        _registry.define(
            f"{self.name}({inputs}) -> ({outputs})",
            self._backends("forward"),
            lambda sizes, first, *_: tuple(self.empty(sizes, first)),
            self.check_native,
            self.values,
        )
        gradients = ", ".join(f"Tensor d{a.name}" for a in (*self.tokens, *self.initial))
        _registry.define(
            f"{self.name}_backward({', '.join(a.schema() for a in self.do)}, {inputs}) -> ({gradients})",
            self._backends("backward"),
            self._fake_backward,
            self.check_backward,
            self.values_backward,
        )
        marks = [
            a.schema().replace("a!", f"{mark}!") for mark, a in zip("ab"[: len(self.state)], self.state, strict=True)
        ]
        token = ", ".join([*(a.schema() for a in self.token), *marks, "float scale", *flags, "str backend"])
        _registry.define(
            f"{self.name}_step({token}) -> Tensor",
            {**self._backends("step"), "reference": _registry.Backend(("cpu", "cuda"), self._reference_step)},
            lambda sizes, first, *_: first.new_empty(self.one_o.size(sizes)),
            self.check_step,
        )
        self.op = getattr(torch.ops.icrl, self.name)
        self.backward_op = getattr(torch.ops.icrl, f"{self.name}_backward")
        self.step_op = getattr(torch.ops.icrl, f"{self.name}_step")
        name, lib = f"icrl::{self.name}", _registry.LIBRARY
        torch.library.register_autograd(name, self._derivative, setup_context=self._setup_context, lib=lib)
        torch.library.register_autograd(f"{name}_backward", self._refuse_second_derivative, lib=lib)

    def _fake_backward(self, sizes: Sizes, *args: Any) -> tuple[Tensor, ...]:
        tokens, _, states, _, _ = self.split(args[len(self.do) :])
        return tuple(self.gradients((*tokens, *states)))

    def _setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        tokens, scale, states, cu_seqlens, flags = self.split(inputs)
        ctx.save_for_backward(*tokens, *states, cu_seqlens)
        ctx.rest = scale, flags  # `flags` ends with the backend

    def _derivative(self, ctx: Any, *douts: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, cu_seqlens = ctx.saved_tensors
        scale, flags = ctx.rest
        n = len(self.tokens)
        found = self.backward_op(*douts, *inputs[:n], scale, *inputs[n:], cu_seqlens, *flags)
        d = [None if t is None else g for t, g in zip(inputs, found, strict=True)]
        return (*d[:n], None, *d[n:], None, *[None] * len(flags))

    def _refuse_second_derivative(self, ctx: Any, *grads: Tensor) -> None:
        """Without it the second derivative would be zero in silence."""
        raise RuntimeError(f'{self.name} has no second derivative; backend="reference" has')


def pair(name: str, state: Any, optional: bool = False) -> tuple[Tensor | None, Tensor | None]:
    if state is None and optional:
        return None, None
    if not isinstance(state, (tuple, list)) or len(state) != 2 or not all(isinstance(t, Tensor) for t in state):
        raise ValueError(f"{name}: wanted a pair of tensors, the slots' keys and values, got {type(state).__name__}")
    return state[0], state[1]


def require_dense(arguments: Sequence[Argument], tensors: Sequence[Any]) -> None:
    """What torch's dispatcher would refuse without the argument's name."""
    if torch.compiler.is_compiling():
        return
    for a, t in zip(arguments, tensors, strict=True):
        if t is not None or not a.optional:
            _checks.dense(a.label, t)


def refuse_transforms(op: str, *tensors: Tensor | None) -> None:
    """torch.func's derivatives and forward mode, for which torch.library has no place: they would be zero in silence."""
    if torch.compiler.is_compiling():
        return
    forward = _torch_private.forward_level() >= 0
    reverse = _torch_private.transform() is not None and torch.is_grad_enabled()
    if not forward and not reverse:
        return
    for t in tensors:
        if t is not None and ((reverse and t.requires_grad) or (forward and _torch_private.tangent(t) is not None)):
            raise NotImplementedError(
                f"{op} has no derivative in forward mode, nor by torch.func; its reference, in plain torch, has"
            )


def contiguous(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def pointers(tensors: Sequence[Tensor | None]) -> list[int]:
    return [0 if t is None else t.data_ptr() for t in tensors]
