"""The losses of implicit Q-learning (arXiv 2110.06169), shared by S-ICQL and IC-IQL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


@dataclass(frozen=True)
class IQL:
    """Settings of the losses, shared with IC-IQL."""

    expectile: float = 0.7
    """ω."""
    discount: float = 0.99
    inverse_temperature: float = 1000.0
    """1/λ, of advantages."""
    max_weight: float = 1000.0
    target_rate: float = 0.005
    """Of the moving averages."""
    reward_scale: float = 1.0
    """Rewards times this are what values add up."""

    def __post_init__(self) -> None:
        if not 0 < self.expectile < 1:
            raise ValueError(f"expectile: wanted a number in (0, 1), got {self.expectile}")
        if not 0 <= self.discount < 1:
            raise ValueError(f"discount: wanted a number in [0, 1), got {self.discount}")
        if not 0 < self.target_rate <= 1:
            raise ValueError(f"target_rate: wanted a number in (0, 1], got {self.target_rate}")
        for name in ("inverse_temperature", "max_weight", "reward_scale"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: wanted a positive number, got {getattr(self, name)}")


class Losses(NamedTuple):
    policy: Tensor
    q: Tensor
    v: Tensor


def iql_losses(
    imitation: Tensor,
    v: Tensor,
    q: Tensor,
    target_q: Tensor,
    next_v: Tensor,
    reward: Tensor,
    terminated: Tensor,
    c: IQL,
) -> Losses:
    """The three losses above, averaged over all elements.

    Args:
        imitation: [...] −log π(a|s) or the squared error. v: [...]. q, target_q: [...,2]. next_v: [...], reward: [...].
        terminated: [...] bool. c: the settings.
    """
    advantage = target_q.detach().amin(-1) - v
    v_loss = (c.expectile - (advantage < 0).float()).abs() * advantage.square()
    target = c.reward_scale * reward + c.discount * next_v.detach() * ~terminated
    q_loss = (q - target[..., None]).square().mean(-1)
    weight = (c.inverse_temperature * advantage.detach()).exp().clamp(max=c.max_weight)
    return Losses((weight * imitation).mean(), q_loss.mean(), v_loss.mean())
