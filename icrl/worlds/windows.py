"""What task batches do with packed tables: their entries by blocks, row sums, compaction, joining, dense form."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from icrl_kernels.tabular.packed import PackedTransition

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
        yield slice(i, j), index.add_(torch.arange(len(index), device=index.device))
        i, done = j, int(ends[j - 1])


def row_sums(p: PackedTransition, *factors: Tensor) -> Tensor:
    """[N,S,A] float64: Σ over each window of the product of `factors`, each [M], multiplied and summed in float64."""
    out = torch.zeros(p.offset.shape, dtype=torch.float64, device=p.offset.device)
    for tasks, index in blocks(p):
        lengths = p.length[tasks].flatten().long()
        terms = factors[0][index].double()
        for factor in factors[1:]:
            terms = terms * factor[index].double()
        rows = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
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
        if torch.equal(where, torch.arange(len(kept), device=where.device)):
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
    n, s, a = p.offset.shape
    tables = [v.new_empty(n, s, a, s) for v in (p.probability, reward)]
    for tasks in dense_blocks(n, s, a):
        rows = PackedTransition(p.probability, *(x[tasks] for x in p[1:]))
        for table, values in zip(tables, (p.probability, reward), strict=True):
            table[tasks] = rows.unpack(values)
    return tables[0], tables[1]
