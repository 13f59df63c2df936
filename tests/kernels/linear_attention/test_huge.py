"""More than 2³¹ elements in one tensor: every offset is 64 bits wide. One real run of each op on a CPU, in bfloat16.

Gates of −inf reset the state every so often, so that any window between two resets has a short float64 reference.
"""

import psutil
import pytest
import torch

from icrl_kernels import (
    gated_delta_rule,
    gated_delta_rule_reference,
    gla,
    gla_reference,
    gsa,
    gsa_reference,
    rwkv7,
    rwkv7_reference,
)
from icrl_kernels.testing import assert_as_good_as_torch

H, K, V, M = 8, 256, 16, 16
T = 2**31 // (H * K) + 1000
RESET = (
    1003  # tokens from one reset to the next; no power of two, or an address that wrapped might meet the same number
)
PERIOD = 7 * RESET

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(psutil.virtual_memory().available < 16 * 2**30, reason="needs 16 GiB of free memory"),
]


def periodic(*shape: int, make=torch.randn) -> torch.Tensor:
    return make(1, PERIOD, *shape).bfloat16().repeat(1, T // PERIOD + 1, *[1] * len(shape))[:, :T]


def check(op, reference, tensors: list, size: int) -> None:
    """Windows at the start, across the element 2³¹ of the widest tensor, and at the end."""
    assert tensors[0].numel() > 2**31
    o, _ = op(*tensors)
    last = T - RESET - (T - RESET) % RESET
    for at in (0, 2**30 // size // RESET * RESET, last - RESET, last):
        window = [None if t is None else t[:, at : at + RESET] for t in tensors]
        plain, _ = reference(*window)
        exact, _ = reference(*[None if t is None else t.double() for t in window])
        assert_as_good_as_torch(o[:, at : at + RESET], plain, exact, name=f"tokens from {at}")


def resets(*shape: int) -> torch.Tensor:
    g = -0.1 * torch.rand(1, PERIOD, *shape)
    g[:, ::RESET] = -torch.inf
    return g.repeat(1, T // PERIOD + 1, *[1] * len(shape))[:, :T]


def test_gla():
    q = periodic(H, K)
    check(gla, gla_reference, [q, q, periodic(H, V), resets(H)], H * K)


def test_gsa():
    q = periodic(H, K)
    check(gsa, gsa_reference, [q, q, periodic(H, V), periodic(H, M, make=torch.rand), resets(H, M)], H * K)


def test_gated_delta_rule():
    q = periodic(H, K)
    beta = torch.rand(1, T, H)
    check(
        lambda *x: gated_delta_rule(*x, qk_l2norm=True),
        lambda *x: gated_delta_rule_reference(*x, qk_l2norm=True),
        [q, q, periodic(H, V), resets(H), beta],
        H * K,
    )


def test_rwkv7():
    q = 0.1 * periodic(H, K) / K**0.5  # small: a and b are the same, and S (1 + a bᵀ) must not blow up
    w = resets(1, 1).bfloat16().expand(1, T, H, K)  # made contiguous by the op: as large as q
    check(rwkv7, rwkv7_reference, [q, w, q, periodic(H, V), q, q], H * K)
