"""A program of fused ops, written from modules, and the step that runs it.

    program = Program()
    x = program.read("x", 64)
    (h,) = program.linear(program.layer_norm(x, norm.eps), [mlp_in], norm=norm)
    program.linear_into(x, program.gelu_tanh(h), mlp_out, add=True)
    program.write("y", x)
    step = program.step(batch=8)
    step.bind(x=x, y=y)  # [8, 64]
    step.run()

A buffer has `rows` rows a context; `Rows` are columns of it. A linear layer's weights are packed once, however often the
program names them. Whatever an op could read or write wrongly is refused with a ValueError when the step is made, and
nothing is judged again when it runs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from icrl_kernels import _C, _checks

PANEL = 64  # outputs whose weights lie side by side, as csrc/fused/layers.inl wants them
SIXTEEN = 16  # columns and outputs are padded to a multiple of it


class Rows(NamedTuple):
    """Columns [column, column + width) of every row of a buffer."""

    buffer: int
    column: int
    width: int

    def part(self, start: int, width: int) -> Rows:
        """`width` of its columns, from `start` on."""
        if not (start >= 0 and 1 <= width <= self.width - start):
            raise ValueError(f"part: wanted columns within 0 to {self.width}, got {start} to {start + width}")
        return Rows(self.buffer, self.column + start, width)


NONE = Rows(-1, 0, 0)


class Slot(NamedTuple):
    """A tensor of the user's: what one context has of it, and when it is given."""

    name: str
    number: int
    shape: tuple[int, ...]  # of one context
    dtype: torch.dtype
    shared: bool  # by all contexts
    optional: bool
    each_call: bool
    below: int  # of indices: they are at least 0 and less than this; 0: no indices


@dataclass(eq=False)
class Matrix:
    """A linear layer made of others' parameters: weight [outputs, inputs], bias [outputs] or None, and what they come from."""

    weight: Tensor
    bias: Tensor | None
    made_of: list[tuple[nn.Module, str]]

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]


@dataclass
class Program:
    """Buffers, tensors, packed weights and ops, in the order in which they are added."""

    buffers: list[tuple[int, int]] = field(default_factory=list)
    slots: dict[str, Slot] = field(default_factory=dict)
    ops: list[tuple] = field(default_factory=list)
    packed: list[Tensor] = field(default_factory=list)
    sources: list[tuple[nn.Module, str]] = field(default_factory=list)
    """Whose parameters were copied, and their names in that module."""
    floats: int = 0

    def __post_init__(self) -> None:
        self._packed_of: dict[tuple, tuple[int, int]] = {}
        self._kept: list[object] = []  # what the keys above name by identity
        self._offsets: dict[bytes, int] = {}  # of weights, by what they are
        self._free: list[int] = []  # buffers
        self._made: list[int] = []  # since `passing`

    # --- what ops work on

    def rows(self, width: int, count: int = 1) -> Rows:
        """A buffer of `count` rows a context: a new one, or a free one of that shape."""
        shape = (_checks.integer("count", count, 1), _checks.integer("width", width, 1))
        number = next((i for i in self._free if self.buffers[i] == shape), len(self.buffers))
        if number < len(self.buffers):
            self._free.remove(number)
        else:
            self.buffers.append(shape)
        self._made.append(number)
        return Rows(number, 0, width)

    @contextmanager
    def passing(self) -> Iterator[list[Rows]]:
        """Buffers made inside are free for others afterwards, but those of the rows that the list is given."""
        outer, self._made, kept = self._made, [], []
        yield kept
        lasting = {rows.buffer for rows in kept}
        self._free += [number for number in self._made if number not in lasting]
        self._made = outer + [number for number in self._made if number in lasting]

    def count(self, rows: Rows) -> int:
        """Rows a context of a buffer."""
        return self.buffers[rows.buffer][0]

    def tensor(
        self,
        name: str,
        *shape: int,
        dtype: torch.dtype = torch.float32,
        shared: bool = False,
        optional: bool = False,
        each_call: bool = False,
        below: int = 0,
    ) -> Slot:
        """A tensor of the user's, `[batch, *shape]`, or `[*shape]` where all contexts share it.

        optional: its address may be 0. each_call: its address is given to `run`; otherwise it is bound once. A shared one is a
        number then, and has no shape. below: its numbers, int64 and one a context, are indices less than this, and every run
        refuses others by its name before anything has changed.
        """
        if shared and each_call and (shape or optional):
            raise ValueError(
                f"{name}: wanted no shape of what is shared and given with each call, a number, got {shape}"
            )
        if name in self.slots:
            raise ValueError(f"name: wanted one that no tensor of the program has, got {name!r}")
        slot = Slot(name, len(self.slots), shape, dtype, shared, optional, each_call, below)
        self.slots[name] = slot
        return slot

    def weights(self, values: Tensor, *sources: tuple[nn.Module, str]) -> int:
        """Keep numbers among the packed weights, once however often they come: their offset. sources: the modules and names of
        what they were made of."""
        flat = values.detach().to(torch.float32).flatten()
        flat = torch.nn.functional.pad(flat, (0, -flat.numel() % SIXTEEN))
        key = hashlib.blake2b(flat.numpy().tobytes()).digest()
        if key not in self._offsets:
            self._offsets[key] = self.floats
            self.packed.append(flat)
            self.floats += flat.numel()
        self.sources.extend(source for source in sources if source not in self.sources)
        return self._offsets[key]

    # --- ops

    def op(
        self,
        kind: str,
        *,
        input: Rows = NONE,
        out: Rows = NONE,
        side: Rows = NONE,
        more: Sequence[Rows] = (),
        tensors: Sequence[Slot | None] = (),
        weights: Sequence[int] = (),
        sizes: Sequence[int] = (),
        numbers: Sequence[float] = (),
    ) -> None:
        """Add an op of a kind that csrc/fused has; what its lists hold is said there."""
        slots = [-1 if slot is None else slot.number for slot in tensors]
        views = (tuple(input), tuple(out), tuple(side), [tuple(rows) for rows in more])
        self.ops.append((kind, *views, slots, list(weights), list(sizes), list(numbers)))

    def linear(
        self,
        input: Rows,
        layers: Sequence[nn.Linear | Matrix],
        *,
        norm: nn.Module | None = None,
        biases_of: Sequence[nn.Linear] = (),
    ) -> list[Rows]:
        """Linear layers of one input, side by side in a new buffer: their outputs, in order.

        norm: a norm whose weight and bias stand between the input and the layers; they become part of theirs. One over each
        head's channels is every head's. biases_of: layers as wide as each of these, whose biases are added to theirs.
        """
        columns = [-(-layer.out_features // SIXTEEN) * SIXTEEN for layer in layers]
        whole = self.rows(sum(columns), self.count(input))
        self._linear(whole, input, layers, norm, biases_of, add=False)
        starts = [sum(columns[:i]) for i in range(len(columns))]
        return [whole.part(start, layer.out_features) for start, layer in zip(starts, layers, strict=True)]

    def linear_into(
        self, out: Rows, input: Rows, layer: nn.Linear | Matrix, *, norm: nn.Module | None = None, add: bool = False
    ) -> None:
        """One linear layer's outputs into the columns of `out`, or added to them."""
        if out.width != layer.out_features:
            raise ValueError(f"out: wanted {layer.out_features} columns, the layer's outputs, got {out.width}")
        self._linear(out, input, [layer], norm, (), add)

    def _linear(
        self,
        out: Rows,
        input: Rows,
        layers: Sequence[nn.Linear | Matrix],
        norm: nn.Module | None,
        biases_of: Sequence[nn.Linear],
        add: bool,
    ) -> None:
        for layer in layers:
            if layer.in_features != input.width:
                raise ValueError(f"input: wanted {layer.in_features} columns, the layer's inputs, got {input.width}")
        weight, bias = self._packed_layers(layers, norm, biases_of)
        self.op("linear", input=input, out=out, weights=[weight, bias], sizes=[input.width, out.width, int(add)])

    def _packed_layers(
        self, layers: Sequence[nn.Linear | Matrix], norm: nn.Module | None, biases_of: Sequence[nn.Linear]
    ) -> tuple[int, int]:
        """The offsets of the layers' weights and bias (-1: none)."""
        key = (*map(id, layers), -1 if norm is None else id(norm), *map(id, biases_of))
        if key in self._packed_of:
            return self._packed_of[key]
        self._kept += [*layers, norm, *biases_of]
        parameters = [(layer, name) for layer in layers for name in ("weight", "bias")]
        parameters += [(layer, "bias") for layer in biases_of]
        parameters += [] if norm is None else [(norm, name) for name in ("weight", "bias")]
        there = {(id(m), name): getattr(m, name, None) for m, name in parameters}
        wide = {at: t.detach().double() for at, t in there.items() if t is not None}
        rows, shifts = [], []
        for layer in layers:
            weight, missing = wide[id(layer), "weight"], -layer.out_features % SIXTEEN
            bias = sum(wide[at] for at in ((id(other), "bias") for other in (layer, *biases_of)) if at in wide)
            if (shift := wide.get((id(norm), "bias"))) is not None:
                bias = bias + weight @ shift.repeat(layer.in_features // len(shift))
            if (scale := wide.get((id(norm), "weight"))) is not None:
                weight = weight * scale.repeat(layer.in_features // len(scale))
            rows.append(torch.nn.functional.pad(weight, (0, 0, 0, missing)))
            if not isinstance(bias, Tensor):
                bias = weight.new_zeros(layer.out_features)
            shifts.append(torch.nn.functional.pad(bias, (0, missing)))
        panels = [panel.flatten() for panel in torch.cat(rows).t().split(PANEL, 1)]
        biased = any(name == "bias" for _, name in wide)
        sources = []
        for m, name in parameters:
            if (id(m), name) in wide:
                sources += m.made_of if isinstance(m, Matrix) else [(m, name)]
        at = self.weights(torch.cat(panels), *sources), self.weights(torch.cat(shifts)) if biased else -1
        self._packed_of[key] = at
        return at

    def rms_norm(self, input: Rows, eps: float) -> Rows:
        """x / sqrt(mean x² + eps), without a weight."""
        return self._row_by_row("rms_norm", input, eps)

    def layer_norm(self, input: Rows, eps: float) -> Rows:
        """(x - mean) / sqrt(variance + eps), without weight and bias."""
        return self._row_by_row("layer_norm", input, eps)

    def gelu_tanh(self, input: Rows) -> Rows:
        """GELU by its approximation with tanh."""
        return self._row_by_row("gelu_tanh", input)

    def _row_by_row(self, kind: str, input: Rows, *numbers: float) -> Rows:
        out = self.rows(input.width, self.count(input))
        self.op(kind, input=input, out=out, numbers=numbers)
        return out

    def gated(self, input: Rows, side: Rows = NONE) -> Rows:
        """silu(a) b of the two halves (a, b) of x's columns; of x + z with a `side` z, one row for all rows of a context."""
        out = self.rows(input.width // 2, self.count(input))
        self.op("gated", input=input, out=out, side=side)
        return out

    def read(self, name: str, width: int, count: int = 1, *, each_call: bool = False) -> Rows:
        """Rows of a float32 tensor `[batch, count, width]` of the user's, of any shape of that many numbers."""
        out = self.rows(width, count)
        self.op("read", out=out, tensors=[self.tensor(name, count, width, each_call=each_call)])
        return out

    def write(self, name: str, rows: Rows, *, each_call: bool = False) -> None:
        """Rows into a float32 tensor `[batch, count, width]` of the user's."""
        slot = self.tensor(name, self.count(rows), rows.width, each_call=each_call)
        self.op("write", input=rows, tensors=[slot])

    def step(self, batch: int, *, group: int = 12) -> Step:
        """The program for `batch` contexts, which go through it in groups of at most `group`. Raises ValueError for what no op may do."""
        return Step(self, _checks.integer("batch", batch, 1), _checks.integer("group", group, 1))


class Step:
    """A program with its tensors: `run` is one token for every context.

    Weights are copies: `stale` and `replaced` say whether parameters are other ones since. Bound tensors are float32 (or what the program
    says), on the CPU, contiguous; they are kept, and written to where the program writes. Tensors of each call are addresses,
    which nothing judges: it is for the caller to give addresses of what the program wants.
    """

    def __init__(self, program: Program, batch: int, group: int) -> None:
        self.batch, self.slots, self.sources = batch, program.slots, program.sources
        self.weights = torch.cat([*program.packed, torch.zeros(SIXTEEN, dtype=torch.float32, device="cpu")])
        tensors = []
        for slot in program.slots.values():
            each = torch.Size(slot.shape).numel() * slot.dtype.itemsize
            tensors.append((slot.name, 0 if slot.shared else each, slot.optional, slot.each_call, slot.below))
        self.program = _C.FusedProgram(
            program.buffers, tensors, program.ops, self.weights.data_ptr(), program.floats, batch, group
        )
        self._copied = self._parameters()
        self._versions = self._now()
        self._bound: dict[str, tuple[Tensor, object]] = {}  # and its memory, which `tensor.data = other` would free

    def _parameters(self) -> list[Tensor]:
        return [getattr(module, name) for module, name in self.sources]

    def _now(self) -> list[tuple[int, int]]:
        return [(parameter._version, parameter.data_ptr()) for parameter in self._copied]

    @property
    def stale(self) -> bool:
        """Whether a parameter that was copied has changed in place, or is elsewhere (`parameter.data = other`). What is written
        through `parameter.data`, which torch does not count, is not seen."""
        return self._now() != self._versions

    @property
    def replaced(self) -> bool:
        """Whether a module has another parameter in the place of one that was copied; dearer to know than `stale`."""
        return any(a is not b for a, b in zip(self._parameters(), self._copied, strict=True))

    def bind(self, **tensors: Tensor) -> None:
        """Bind tensors by name. Raises ValueError, naming it, for one of another shape, dtype, device or layout."""
        for name, tensor in tensors.items():
            slot = self.slots.get(name)
            if slot is None or slot.each_call:
                raise ValueError(
                    f"{name}: wanted one of {', '.join(s.name for s in self.slots.values() if not s.each_call)}"
                )
            _checks.dense(name, tensor)
            wanted = torch.Size(slot.shape if slot.shared else (self.batch, *slot.shape))
            if tensor.numel() != wanted.numel() or (not slot.shared and tensor.shape[:1] != wanted[:1]):
                raise ValueError(f"{name}: wanted shape {list(wanted)}, got {list(tensor.shape)}")
            if tensor.dtype != slot.dtype or tensor.device.type != "cpu":
                raise ValueError(f"{name}: wanted {slot.dtype} on the CPU, got {tensor.dtype} on {tensor.device}")
            if not tensor.is_contiguous() or tensor.is_neg():
                raise ValueError(f"{name}: wanted a contiguous tensor, got strides {tensor.stride()}")
            self.program.bind(slot.number, tensor.data_ptr())
            self._bound[name] = tensor, tensor.untyped_storage()

    def run(self, *given: int | float, threads: int = 1) -> None:
        """One token. given: the address, or the number, of each tensor that is given with each call, in their order.

        Raises:
            ValueError: an index is out of range; nothing has changed then.
        """
        self.program.run(threads, *given)
