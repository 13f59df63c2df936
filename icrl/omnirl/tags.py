"""The ids that OmniRL's tokens carry beside observations: policies' tags and ends of episodes."""

from __future__ import annotations

from icrl_kernels.arguments import number

# Behaviours of decoupled policy distillation: 0-3 optimal at a discount, 4 model-based, 5 Q-learning, 6 random, 7 unknown.
TAGS = 8
EXPERTS = (2, 3)
"""Those that plan far enough to be worth imitating."""
EXPLORER = 4
UNKNOWN = 7

START = 3  # `done` of the token before the first: 0 no, 1 terminated, 2 truncated


class Policies:
    """What the models' configurations have in common: the policies that a prompt may ask for, by their discounts."""

    discounts: tuple[float, ...]
    explorer_discount: float

    @property
    def policies(self) -> int:
        """How many policies are read out: the optimal one at each discount, and the explorer (tags 0..4)."""
        return len(self.policy_discounts)

    @property
    def policy_discounts(self) -> tuple[float, ...]:
        """Each policy's discount, by its tag."""
        return (*self.discounts, self.explorer_discount)

    def check_discounts(self) -> None:
        """ValueError for a discount that is no number in [0, 1]."""
        for name in ("discounts", "explorer_discount"):
            given = getattr(self, name)
            for discount in given if isinstance(given, (tuple, list)) else (given,):
                if not 0 <= number(name, discount) <= 1:
                    raise ValueError(f"{name}: wanted numbers in [0, 1], got {discount}")
