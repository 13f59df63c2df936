"""Stacks of blocks: a token mixer and an MLP each, between them norms."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icrl.models.mixers import Recurrent, Softmax, WindowedSoftmax
from icrl_kernels import layers


def normal(layer: nn.Linear, std: float) -> None:
    nn.init.normal_(layer.weight, std=std)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


class Block(nn.Module):
    """x + mixer(norm x), then x + mlp(norm x).

    Args:
        hidden: the MLP's width. gated: W_2 (silu(a) ⊙ b), (a, b) = W_1 x, without biases; else W_2 gelu(W_1 x + b) + c.
        rms: norms divide by the root mean square alone; else they are LayerNorms.
    """

    def __init__(
        self,
        width: int,
        mixer: Softmax | WindowedSoftmax | Recurrent,
        hidden: int,
        *,
        gated: bool = False,
        rms: bool = False,
    ) -> None:
        super().__init__()
        self.mix_norm, self.mlp_norm = norm(width, rms), norm(width, rms)
        self.mixer, self.gated = mixer, gated
        self.mlp_in = layers.Linear(width, 2 * hidden if gated else hidden, bias=not gated)
        self.mlp_out = layers.Linear(hidden, width, bias=not gated)

    def mlp(self, x: Tensor) -> Tensor:
        y = self.mlp_in(self.mlp_norm(x))
        if self.gated:
            a, b = y.chunk(2, -1)
            return x + self.mlp_out(F.silu(a) * b)
        return x + self.mlp_out(F.gelu(y, approximate="tanh"))

    def forward(self, x: Tensor, state: Any = None, first: Tensor | None = None) -> tuple[Tensor, Any, Tensor | None]:
        """Tokens [B,T,D] after `state`; `first` [B,T,V]: the values of RWKV-7's first layer, for those that mix them in."""
        x, y, state, first = self._mixed(x, state, first, step=False)
        return self.mlp(x + y), state, first

    def step(self, x: Tensor, state: Any, first: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """One token [B,D]; `state` is CHANGED IN PLACE."""
        x, y, _, first = self._mixed(x, state, first, step=True)
        return self.mlp(x + y), first

    def _mixed(self, x: Tensor, state: Any, first: Tensor | None, step: bool) -> tuple[Any, ...]:
        mixer: Any = self.mixer.mixer if isinstance(self.mixer, Recurrent) else self.mixer
        run = mixer.step if step else mixer
        if isinstance(mixer, layers.RWKV7):
            own = None if mixer.layer_idx == 0 else first
            y, state, first = run(self.mix_norm(x), state, v_first=own, output_v_first=True)
        else:
            y, state = run(self.mix_norm(x), state)
        return x, y, state, first

    def read(self, x: Tensor, memory: Any) -> Tensor:
        assert not isinstance(self.mixer, WindowedSoftmax)
        return self.mlp(x + self.mixer.read(self.mix_norm(x), memory))


def norm(width: int, rms: bool) -> nn.Module:
    return nn.RMSNorm(width, eps=1e-5) if rms else nn.LayerNorm(width)


class Stack(nn.Module):
    """Blocks one after another, and a norm."""

    def __init__(self, width: int, blocks: Iterable[Block], rms: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm(width, rms)

    def start_projections(self, branch: float = 1.0) -> None:
        """Give the projections of attention and MLPs first weights, normal with deviation 1/√inputs; those that end a branch
        are less by branch/√(2 · blocks), so that the stream does not grow with depth."""
        depth = branch * (2 * len(self.blocks)) ** -0.5
        gains = {"qkv_proj": 1.0, "o_proj": depth, "mlp_in": 1.0, "mlp_out": depth}
        for name, layer in self.named_modules():
            gain = gains.get(name.rpartition(".")[2])
            if gain is not None and isinstance(layer, layers.Linear):
                layer.start(partial(normal, std=layer.in_features**-0.5 * gain))

    def run(self, x: Tensor, states: list[Any] | None) -> tuple[Tensor, list[Any]]:
        """Tokens [B,T,D] after the layers' `states`, which are left as they are -> outputs, and the states after them."""
        after, first = [], None
        for i, block in enumerate(self.blocks):
            x, state, first = block(x, None if states is None else states[i], first)
            after.append(state)
        return self.norm(x), after

    @torch.no_grad()
    def step(self, x: Tensor, states: list[Any]) -> Tensor:
        """One token of each sequence, [B,D]; `states` are CHANGED IN PLACE."""
        first = None
        for block, state in zip(self.blocks, states, strict=True):
            assert isinstance(block, Block)
            x, first = block.step(x, state, first)
        return self.norm(x)
