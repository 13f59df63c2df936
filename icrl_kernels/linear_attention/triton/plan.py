"""What the launchers of the linear-attention ops decide alike, on the host: tiles, chunks, precision, the cut of packed batches."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 64
COLUMNS = 256  # most of V that a program's products take
STATE_TILE = 16384  # entries of the state that one program of 8 warps holds: 64 registers a thread
SMS = 132


def pow2(n: int) -> int:
    return max(16, triton.next_power_of_2(n))


def contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if x is None else x.contiguous() for x in tensors)


def levels(chunk: int) -> int:
    """Halvings of a chunk, for gates of any strength."""
    return chunk.bit_length() - 1


def chunk_length(dtype: torch.dtype, K: int, V: int) -> int:
    """float32 operands take two to four times the shared memory of bfloat16: shorter chunks there, as for wide heads."""
    width = max(K, min(V, COLUMNS)) * (1 if dtype == torch.bfloat16 else 4)
    return CHUNK if width <= 256 else CHUNK // 2 if width <= 512 else CHUNK // 4


def products(dtype: torch.dtype) -> dict:
    """The operands' type in products, and their precision."""
    return {
        "DT": tl.bfloat16 if dtype == torch.bfloat16 else tl.float32,
        "PREC": "tf32x3" if dtype == torch.float32 else "tf32",
    }


def limit(dtype: torch.dtype) -> float:
    """Bits of decay in a chunk that one anchor serves."""
    return 16.0 if dtype == torch.float32 else 100.0


def passes(g: Tensor | None) -> tuple[bool, ...]:
    """Values of ANY: gates per channel take a second launch, which works only where they are strong."""
    return (False, True) if g is not None and g.dim() == 4 else (False,)


def cut(q: Tensor, L: int, cu_seqlens: Tensor | None) -> tuple[int, int, int, Tensor | None, Tensor | None]:
    """Into pieces of L tokens: sequences, pieces, pieces per sequence (0 if packed), and of a packed batch each piece's
    sequence and each sequence's first piece, on the device throughout: there the number of pieces is an upper bound, so
    that no length has to come to the host."""
    B, T = q.shape[:2]
    if cu_seqlens is None:
        per = -(-T // L)
        return B, B * per, per, None, None
    N = cu_seqlens.numel() - 1
    pieces = T // L + N
    counts = (cu_seqlens.diff().long() + L - 1) // L
    first = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    owner = torch.searchsorted(first[1:], torch.arange(pieces, device=q.device), right=True).clamp_(max=N - 1)
    return N, pieces, 0, owner, first
