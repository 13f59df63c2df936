"""The causal transformer that all offline in-context learners share: a prompt encoded once, and queries that read it.

trunk = Trunk(TrunkConfig(), positions=200)
y, state = trunk(tokens)                                # [B,T,D], causal; `state` goes on with the next tokens
memory = trunk.remember(prompt, lengths=[0, 50, 100])   # the prompt as it is after 0, 50 and 100 tokens
y = trunk.read(queries, memory)                         # [B,3,J,D]: J queries at each of those lengths

A query is a token appended to the prompt's first n tokens: it reads them and itself, and neither the prompt nor any other
query sees it. So `read` is the last output of a full pass over [prompt[:n], query], for every mixer, at the cost of one token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from icrl.models.mixers import MIXERS, WindowedSoftmax, make_mixer
from icrl.models.stack import Block, Stack
from icrl_kernels.arguments import integer_fields


@dataclass(frozen=True)
class TrunkConfig:
    width: int = 128
    layers: int = 4
    heads: int = 1
    mixer: str = "softmax"
    """What mixes tokens: softmax attention, or one of icrl_kernels.layers."""

    def __post_init__(self) -> None:
        integer_fields(self, width=1, layers=(1, 1024), heads=1)
        if self.mixer not in MIXERS:
            raise ValueError(f"mixer: wanted one of {', '.join(MIXERS)}, got {self.mixer!r}")
        if self.width % self.heads:
            raise ValueError(f"width: wanted a multiple of heads={self.heads}, got {self.width}")


class TrunkState(NamedTuple):
    layers: list[Any]
    length: int  # tokens so far


torch.serialization.add_safe_globals([TrunkState])  # torch.load with weights_only makes it


class Trunk(Stack):
    """Blocks with learned positions: 1.. for tokens, 0 for queries (only softmax needs positions; recurrences have none).

    Args:
        config: sizes and the mixer. positions: the longest sequence, for softmax.
    """

    def __init__(self, config: TrunkConfig, positions: int) -> None:
        c = config
        super().__init__(
            c.width, (Block(c.width, make_mixer(c.mixer, c.width, c.heads), 4 * c.width) for _ in range(c.layers))
        )
        self.config = config
        self.positions = None
        if config.mixer == "softmax":
            self.positions = nn.Parameter(torch.empty(positions + 1, config.width))
        self.reset_parameters()
        self.start_projections()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Give first values to the parameters that are no submodule's: the positions."""
        if self.positions is not None:
            self.positions.normal_().mul_(0.02)

    def _placed(self, x: Tensor, begin: int) -> Tensor:
        if self.positions is None:
            return x
        end = begin + x.shape[1]
        if end > len(self.positions):
            raise ValueError(f"tokens: this trunk takes {len(self.positions) - 1}, got {end - 1}")
        return x + self.positions[begin:end]

    def forward(self, x: Tensor, state: TrunkState | None = None, first: int = 1) -> tuple[Tensor, TrunkState]:
        """Tokens x [B,T,D] after those in `state` -> outputs [B,T,D], and the state after them.

        `first`: the position of the very first token: 0 where a query comes before its prompt.
        """
        length = 0 if state is None else state.length
        x, after = self.run(self._placed(x, first + length), None if state is None else state.layers)
        return x, TrunkState(after, length + x.shape[1])

    def remember(self, x: Tensor, lengths: list[int]) -> list[Any]:
        """What queries read of the prompt x [B,T,D] after each of `lengths` tokens (ascending, 0 to T), layer by layer."""
        if any(a > b for a, b in zip([0, *lengths], [*lengths, x.shape[1]], strict=True)):
            raise ValueError(f"lengths: wanted ascending lengths of 0 to {x.shape[1]}, got {lengths}")
        x = self._placed(x, 1)
        memory = []
        for i, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            assert not isinstance(block.mixer, WindowedSoftmax)
            y, m = block.mixer.remember(block.mix_norm(x), lengths)
            memory.append(m)
            if i + 1 < len(self.blocks):  # nothing reads what the last block makes of the prompt
                x = block.mlp(x + y)
        return memory

    def read(self, x: Tensor, memory: list[Any]) -> Tensor:
        """Queries x [B,m,J,D], J at each of the m remembered lengths -> outputs of the same shape."""
        if self.positions is not None:
            x = x + self.positions[0]
        for block, m in zip(self.blocks, memory, strict=True):
            assert isinstance(block, Block)
            x = block.read(x, m)
        return self.norm(x)
