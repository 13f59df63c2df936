"""Counter-based random numbers in torch: value k is a hash of (key, stream, k), on any device, in any order.

The hash is splitmix64 (Steele, Lea, Flood, 2014), whose wrapping 64-bit products int64 tensors give.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from icrl_kernels.arguments import integer

GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
FIRST = 0xBF58476D1CE4E5B9 - (1 << 64)
SECOND = 0x94D049BB133111EB - (1 << 64)


def mix(z: Tensor) -> Tensor:
    """splitmix64's finaliser on int64 tensors read as unsigned."""
    z = (z ^ ((z >> 30) & ((1 << 34) - 1))) * FIRST
    z = (z ^ ((z >> 27) & ((1 << 37) - 1))) * SECOND
    return z ^ ((z >> 31) & ((1 << 33) - 1))


def wrap(x: int) -> int:
    """Any Python integer as the int64 with the same low 64 bits."""
    return (x + (1 << 63)) % (1 << 64) - (1 << 63)


def keys_of(seed: int | Tensor, index: Tensor, stream: int = 0) -> Tensor:
    """One int64 key for each index under (seed, stream); a tensor of seeds goes along with the indices."""
    given = seed
    if not isinstance(seed, Tensor) or not seed.dim():
        given = torch.tensor(wrap(integer("seed", seed)), dtype=torch.int64, device=index.device)
    root = mix(mix(given) ^ torch.tensor(wrap(stream * GOLDEN), dtype=torch.int64, device=index.device))
    return mix(root + (index + 1) * GOLDEN)


def bits(keys: Tensor, stream: int, count: int) -> Tensor:
    """[N, count] int64 hashes for keys [N]."""
    inner = mix(keys ^ mix(torch.tensor(wrap((stream + 1) * GOLDEN), dtype=torch.int64, device=keys.device)))
    return mix(inner[:, None] + torch.arange(1, count + 1, dtype=torch.int64, device=keys.device) * GOLDEN)


class Stream:
    """The numbers of one stream for each of N keys, at any places."""

    key: Tensor  # [N] int64, hashed with the stream's number

    def __init__(self, keys: Tensor, stream: int | Tensor) -> None:
        number = torch.as_tensor(stream, dtype=torch.int64, device=keys.device)
        self.key = mix(keys ^ mix((number + 1) * GOLDEN))

    @classmethod
    def of(cls, key: Tensor) -> Stream:
        """The stream that has this key."""
        stream = object.__new__(cls)
        stream.key = key
        return stream

    def __getitem__(self, index: Tensor) -> Stream:
        return Stream.of(self.key[index])

    def uniform(self, n: Tensor) -> Tensor:
        """[N, ...] float64 in [0, 1) at places n [N, ...] int64: `uniforms` of the same keys and stream, at column n."""
        key = self.key.view(-1, *(1,) * (n.dim() - 1))
        return to_unit(mix(key + (n + 1) * GOLDEN))


def to_unit(hashes: Tensor) -> Tensor:
    return ((hashes >> 11) & ((1 << 53) - 1)).double() * 2.0**-53


def uniforms(keys: Tensor, stream: int, count: int) -> Tensor:
    """[N, count] float64 in [0, 1), multiples of 2⁻⁵³."""
    return to_unit(bits(keys, stream, count))


def integers(keys: Tensor, stream: int, count: int, high: int) -> Tensor:
    """[N, count] int64 in [0, high)."""
    return (uniforms(keys, stream, count) * high).long()


def exponential(keys: Tensor, stream: int, count: int) -> Tensor:
    """[N, count] float64, mean 1."""
    return -torch.log1p(-uniforms(keys, stream, count))


def normals(keys: Tensor, stream: int, count: int) -> Tensor:
    """[N, count] float64 standard normals, by Box and Muller's transform of two uniforms each."""
    u = uniforms(keys, stream, 2 * count).view(-1, count, 2)
    return torch.sqrt(-2 * torch.log1p(-u[..., 0])) * torch.cos(2 * math.pi * u[..., 1])
