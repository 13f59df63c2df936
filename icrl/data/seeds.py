"""Seeds derived from seeds."""

from __future__ import annotations

from icrl_kernels.arguments import integer


def hash_seed(*parts: int) -> int:
    """SplitMix64 over the parts, 63 bits: close-by seeds and counters give unrelated ones."""
    mask, x = 2**64 - 1, 0
    for part in (integer("seed", x) for x in parts):
        x = (x ^ (part & mask)) + 0x9E3779B97F4A7C15 & mask
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
        x ^= x >> 31
    return x >> 1
