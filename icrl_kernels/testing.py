"""The tolerance policy, public so that a port can be held to it.

A kernel may err, against a float64 reference, by at most `factor` times what plain torch errs in the kernel's own dtype,
plus a floor of a few roundings of the largest entry. Errors are Frobenius norms of the whole tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor


def error(a: Tensor, reference: Tensor) -> float:
    """‖a − reference‖ in float64; NaN where either holds one that the other does not."""
    if a.shape != reference.shape:
        raise AssertionError(f"shape {list(a.shape)}, wanted {list(reference.shape)}")
    return float(torch.linalg.vector_norm(a.double() - reference.double()))


def assert_as_good_as_torch(
    actual: Tensor,
    same_dtype: Tensor,
    reference: Tensor,
    *,
    factor: float = 2.0,
    roundings: float = 4.0,
    name: str = "",
) -> None:
    """Assert ‖actual − reference‖ ≤ factor·‖same_dtype − reference‖ + roundings·eps·‖reference‖.

    Args:
        actual: the kernel's result. same_dtype: plain torch's, in the kernel's dtype. reference: float64.
    """
    eps = torch.finfo(actual.dtype).eps
    mine, theirs = error(actual, reference), error(same_dtype, reference)
    bound = factor * theirs + roundings * eps * float(torch.linalg.vector_norm(reference.double())) + 1e-30
    if not mine <= bound:  # a NaN fails
        raise AssertionError(f"{name} error {mine:.3e} > bound {bound:.3e} (torch in {actual.dtype} errs {theirs:.3e})")
