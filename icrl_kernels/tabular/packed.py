"""Transition tables whose rows are windows: what a banded table of probabilities costs without its zeros."""

from __future__ import annotations

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
        _checks.shape("offset", self.offset, ["N", "S", "A"])
        n, s, a = self.offset.shape
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
        """[N,S,A,S]: the table of `probability`, or of other `values` [M] in the same windows; zero elsewhere."""
        values = self.probability if values is None else values
        _checks.shape("values", values, ["M"], M=len(self.probability))
        s = self.offset.shape[1]
        j = torch.arange(s, device=values.device)
        at = j - self.first[..., None].long()
        inside = (at >= 0) & (at < self.length[..., None])
        if not values.numel():
            return values.new_zeros(inside.shape)
        return torch.where(inside, values[torch.where(inside, self.offset[..., None] + at, 0)], 0)


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
    if transition.device.type == "cpu" and not any(x.requires_grad for x in tables):
        windows, packed = _pack_on_cpu([x.contiguous() for x in tables])
    else:
        windows, packed = _pack(tables)
    result = PackedTransition(packed[0], *windows)
    return result if reward is None else (result, packed[1])


def _pack_on_cpu(tables: list[Tensor]) -> tuple[tuple[Tensor, Tensor, Tensor], list[Tensor]]:
    size, s = tables[0].shape[:3], tables[0].shape[3]
    rows, threads, double = size.numel(), torch.get_num_threads(), tables[0].dtype == torch.float64
    first, length = torch.empty(size, dtype=torch.int32), torch.empty(size, dtype=torch.int32)
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
    j = torch.arange(s, device=filled.device)
    inside = (j >= first[..., None]) & (j < (first + length)[..., None])
    windows = ends.view_as(length) - length, first.to(torch.int32), length.to(torch.int32)
    return windows, [x[inside] for x in tables]
