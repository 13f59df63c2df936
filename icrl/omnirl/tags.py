"""The ids that OmniRL's tokens carry beside observations: policies' tags and ends of episodes."""

from __future__ import annotations

# Behaviours of decoupled policy distillation: 0-3 optimal at a discount, 4 model-based, 5 Q-learning, 6 random, 7 unknown.
TAGS = 8
EXPERTS = (2, 3)
"""Those that plan far enough to be worth imitating."""
EXPLORER = 4
UNKNOWN = 7

START = 3  # `done` of the token before the first: 0 no, 1 terminated, 2 truncated
