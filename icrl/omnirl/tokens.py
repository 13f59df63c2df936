"""What the models read: one token an environment step."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Tokens(NamedTuple):
    """One token a step, all `[B,T]`: where the agent is, and what brought it there."""

    observation: Tensor  # int64 in [0, states)
    previous_observation: Tensor  # int64; anything where done is START
    previous_action: Tensor  # int64; `actions` where done is START
    previous_reward: Tensor  # float32
    previous_done: Tensor  # int64: 0 no, 1 terminated, 2 truncated, 3 START
    previous_tag: Tensor  # int64 in [0, TAGS): the behaviour that chose previous_action
