"""Transition tables whose rows are windows: what a banded table of probabilities costs without its zeros."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, NoReturn, overload

import torch
from torch import Tensor

from icrl_kernels import _C, _checks


class PackedTransition(NamedTuple):
    """N tables of S states and A actions; row (n, s, a) is zero outside one window of successors.

    T[n, s, a, first + j] = probability[offset + j] for 0 ≤ j < length, with offset, first and length read at (n, s, a).
    A length of 0 is an all-zero row, which ends the episode. Windows may lie in any order, and zeros may be inside them.
    A reward of each transition, where one is given, is a tensor [M] laid out as `probability`.
    """

    probability: Tensor  # [M] float32 or float64
    offset: Tensor  # [N,S,A] int64
    first: Tensor  # [N,S,A] int32
    length: Tensor  # [N,S,A] int32

    def check_shapes(self) -> PackedTransition:
        """Return self; ValueError if shapes, dtypes or devices are not as above. Reads no values."""
        _checks.shape("probability", self.probability, ["M"])
        _checks.dtype("probability", self.probability, [torch.float32, torch.float64])
        for name in ("offset", "first", "length"):
            _checks.dense(name, getattr(self, name))
        sized = "first" if self.first.shape == self.length.shape else "offset"  # two that agree say the sizes
        _checks.shape(sized, getattr(self, sized), ["N", "S", "A"])
        n, s, a = getattr(self, sized).shape
        for name, tensor, dtype in (
            ("offset", self.offset, torch.int64),
            ("first", self.first, torch.int32),
            ("length", self.length, torch.int32),
        ):
            _checks.shape(name, tensor, ["N", "S", "A"], N=n, S=s, A=a)
            _checks.dtype(name, tensor, [dtype])
        _checks.same_device(**self._asdict())
        return self

    def check(self) -> PackedTransition:
        """Return self; ValueError if shapes, dtypes, devices are not as above or a window leaves its table."""
        s = self.check_shapes().offset.shape[1]
        first, length = self.first.long(), self.length.long()
        m = self.probability.numel()
        wrong = (first < 0) | (length < 0) | (first + length > s)
        wrong |= (length > 0) & ((self.offset < 0) | (self.offset > m - length))
        if wrong.any():
            refuse_window(self, *wrong.nonzero()[0].tolist())
        return self

    def unpack(self, values: Tensor | None = None) -> Tensor:
        """[N,S,A,S]: the table of `probability`, or of other `values` [M] in the same windows; zero elsewhere.

        ValueError as in `check`; on a GPU windows are not looked at before, and there is zero where one leaves its table.
        """
        on_cpu = self.offset.device.type == "cpu" and not _checks.compiling()
        _ = self.check() if on_cpu else self.check_shapes()
        return self._unpack(self.probability if values is None else values)

    def _unpack(self, values: Tensor) -> Tensor:
        """`unpack` of windows that are checked, or are to give zeros."""
        _checks.shape("values", values, ["M"], M=len(self.probability))
        _checks.same_device(values=values, offset=self.offset)
        s = self.offset.shape[1]
        j = torch.arange(s, dtype=torch.int64, device=values.device)
        at = j - self.first[..., None].long()
        place = self.offset[..., None] + at
        inside = (at >= 0) & (at < self.length[..., None]) & (place >= 0) & (place < len(values))
        if not values.numel():
            return values.new_zeros(inside.shape)
        return torch.where(inside, values[torch.where(inside, place, 0)], 0)


def refuse_window(packed: PackedTransition, n: int, s: int, a: int) -> NoReturn:
    """Raise the ValueError for a window that leaves its table."""
    offset, first, length = (int(x[n, s, a]) for x in packed[1:])
    raise ValueError(
        f"transition: wanted windows within {packed.offset.shape[1]} states and {packed.probability.numel()} "
        f"probabilities, got offset {offset}, first {first}, length {length} in row [{n}, {s}, {a}]"
    )


@overload
def pack_transition(transition: Tensor) -> PackedTransition: ...
@overload
def pack_transition(transition: Tensor, reward: Tensor) -> tuple[PackedTransition, Tensor]: ...
def pack_transition(
    transition: Tensor, reward: Tensor | None = None
) -> PackedTransition | tuple[PackedTransition, Tensor]:
    """Windows of a dense table [N,S,A,S]: from the first to the last entry of each row that is not zero.

    A reward [N,S,A,S] is packed into the same windows and returned beside them, [M].

    Raises:
        ValueError: a shape, dtype or device is not as above.
    """
    _checks.shape("transition", transition, ["N", "S", "A", "S"])
    n, s, a, _ = transition.shape
    _checks.shape("transition", transition, ["N", "S", "A", "S"], N=n, S=s, A=a)
    _checks.dtype("transition", transition, [torch.float32, torch.float64])
    if reward is not None:
        _checks.shape("reward", reward, ["N", "S", "A", "S"], N=n, S=s, A=a)
        _checks.same_dtype(transition=transition, reward=reward)
        _checks.same_device(transition=transition, reward=reward)
    tables = [transition] if reward is None else [transition, reward]
    plain = all(type(x) is Tensor and not x.requires_grad for x in tables) and not _checks.compiling()
    if transition.device.type == "cpu" and plain:
        windows, packed = _pack_on_cpu([x.contiguous() for x in tables])
    else:
        windows, packed = _pack(tables)
    result = PackedTransition(packed[0], *windows)
    return result if reward is None else (result, packed[1])


def _pack_on_cpu(tables: list[Tensor]) -> tuple[tuple[Tensor, Tensor, Tensor], list[Tensor]]:
    size, s = tables[0].shape[:3], tables[0].shape[3]
    rows, threads, double = size.numel(), torch.get_num_threads(), tables[0].dtype == torch.float64
    first, length = (torch.empty(size, dtype=torch.int32, device=tables[0].device) for _ in range(2))
    _C.find_windows(tables[0].data_ptr(), double, rows, s, first.data_ptr(), length.data_ptr(), threads)
    ends = length.flatten().cumsum(0)
    offset = ends.view_as(length) - length
    packed = [x.new_empty(int(ends[-1]) if rows else 0) for x in tables]
    for x, out in zip(tables, packed, strict=True):
        windows = offset.data_ptr(), first.data_ptr(), length.data_ptr()
        _C.copy_windows(x.data_ptr(), double, rows, s, *windows, out.data_ptr(), threads)
    return (offset, first, length), packed


def _pack(tables: list[Tensor]) -> tuple[tuple[Tensor, Tensor, Tensor], list[Tensor]]:
    filled = tables[0] != 0
    s, some = filled.shape[-1], filled.any(-1)
    if s:
        first = torch.where(some, filled.to(torch.int8).argmax(-1), 0)
        length = torch.where(some, s - filled.flip(-1).to(torch.int8).argmax(-1) - first, 0)
    else:
        first = length = torch.zeros_like(some, dtype=torch.int64)
    ends = length.flatten().cumsum(0)
    j = torch.arange(s, dtype=torch.int64, device=filled.device)
    inside = (j >= first[..., None]) & (j < (first + length)[..., None])
    windows = ends.view_as(length) - length, first.to(torch.int32), length.to(torch.int32)
    return windows, [x[inside] for x in tables]


ENTRIES = 1 << 22  # of a table or a list of entries at a time: temporaries of tens of megabytes


def dense_blocks(tasks: int, states: int, actions: int) -> Iterator[slice]:
    """Runs of tasks whose dense tables have about ENTRIES entries."""
    block = max(1, ENTRIES // max(1, states * actions * states))
    return (slice(i, min(i + block, tasks)) for i in range(0, tasks, block))


def blocks(p: PackedTransition) -> Iterator[tuple[slice, Tensor]]:
    """Runs of tasks of about ENTRIES entries, each with the positions [m] of these entries, row after row."""
    ends = p.length.sum((1, 2), dtype=torch.int64).cumsum(0)
    i, done = 0, 0
    while i < len(ends):
        j = max(i + 1, int(torch.searchsorted(ends, done + ENTRIES, right=True)))
        lengths = p.length[i:j].flatten().long()
        shift = p.offset[i:j].flatten() - (lengths.cumsum(0) - lengths)
        index = torch.repeat_interleave(shift, lengths)
        yield slice(i, j), index.add_(torch.arange(len(index), dtype=torch.int64, device=index.device))
        i, done = j, int(ends[j - 1])


def row_sums(p: PackedTransition, *factors: Tensor) -> Tensor:
    """[N,S,A] float64: Σ over each window of the product of `factors`, each [M], multiplied and summed in float64."""
    out = torch.zeros(p.offset.shape, dtype=torch.float64, device=p.offset.device)
    for tasks, index in blocks(p):
        lengths = p.length[tasks].flatten().long()
        terms = factors[0][index].double()
        for factor in factors[1:]:
            terms = terms * factor[index].double()
        rows = torch.repeat_interleave(torch.arange(len(lengths), dtype=torch.int64, device=lengths.device), lengths)
        out[tasks].view(-1).scatter_add_(0, rows, terms)
    return out


def compact(p: PackedTransition, reward: Tensor) -> tuple[PackedTransition, Tensor]:
    """The same table with the entries of its windows alone, row after row, in memory of its own."""
    lengths = p.length.flatten().long()
    ends = lengths.cumsum(0)
    offset, total = ends - lengths, int(ends[-1]) if len(ends) else 0
    shift = (p.offset.flatten() - offset)[lengths > 0]
    first = int(shift[0]) if len(shift) else 0
    if bool((shift == first).all()):  # already in order, perhaps amid the entries of others
        values = [v[first : first + total].clone() for v in (p.probability, reward)]
    else:
        values, filled = [v.new_empty(total) for v in (p.probability, reward)], 0
        for _, index in blocks(p):
            for out, v in zip(values, (p.probability, reward), strict=True):
                torch.index_select(v, 0, index, out=out[filled : filled + len(index)])
            filled += len(index)
    rows = PackedTransition(values[0], offset.view_as(p.length), p.first.clone(), p.length.clone())
    return rows, values[1]


def take(p: PackedTransition, reward: Tensor, index: Tensor) -> tuple[PackedTransition, Tensor]:
    """The tasks at `index` [n]; entries that none of them uses are left behind, those used twice are shared."""
    kept, where = index.unique(return_inverse=True)
    if len(kept) < len(p.offset):
        rows = PackedTransition(p.probability, *(x[kept] for x in p[1:]))
        p, reward = compact(rows, reward)
        if torch.equal(where, torch.arange(len(kept), dtype=torch.int64, device=where.device)):
            return p, reward
        index = where
    return PackedTransition(p.probability, *(x[index] for x in p[1:])), reward


def pad(p: PackedTransition, states: int, actions: int) -> PackedTransition:
    grown = [x.new_zeros(x.shape[0], states, actions) for x in p[1:]]
    for out, x in zip(grown, p[1:], strict=True):
        out[:, : x.shape[1], : x.shape[2]] = x
    return PackedTransition(p.probability, *grown)


def concatenate(parts: Sequence[PackedTransition]) -> PackedTransition:
    """All tasks of tables of one S and A."""
    before = [0]
    for p in parts:
        before.append(before[-1] + len(p.probability))
    offset = torch.cat([p.offset + k for p, k in zip(parts, before, strict=False)])
    rest = (torch.cat([p[i] for p in parts]) for i in (2, 3))
    return PackedTransition(torch.cat([p.probability for p in parts]), offset, *rest)


def unpack(p: PackedTransition, reward: Tensor) -> tuple[Tensor, Tensor]:
    """Dense transition and reward [N,S,A,S]."""
    n, s, a = p.check().offset.shape
    tables = [v.new_empty(n, s, a, s) for v in (p.probability, reward)]
    for tasks in dense_blocks(n, s, a):
        rows = PackedTransition(p.probability, *(x[tasks] for x in p[1:]))
        for table, values in zip(tables, (p.probability, reward), strict=True):
            table[tasks] = rows._unpack(values)
    return tables[0], tables[1]
