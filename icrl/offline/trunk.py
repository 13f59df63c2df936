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
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icrl_kernels import layers
from icrl_kernels.arguments import integer_fields

MIXERS = ("softmax", "gla", "gated_delta_net", "kda", "gsa", "linear", "rwkv7")


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


class Softmax(nn.Module):
    """Causal softmax attention; its state is the keys and values so far, [B,H,T,K] each."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv_proj = layers.Linear(width, 3 * width)
        self.o_proj = layers.Linear(width, width)

    def _qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv_proj(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        q, k, v = self._qkv(x)
        if state is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            k, v = torch.cat([state[0], k], 2), torch.cat([state[1], v], 2)
            T, S = q.shape[2], k.shape[2]
            seen = torch.ones(T, S, dtype=torch.bool, device=x.device).tril(S - T)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return self.o_proj(y.transpose(1, 2).flatten(2)), (k, v)

    def remember(self, x: Tensor, lengths: list[int]) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        y, (k, v) = self(x)
        seen = (
            torch.arange(x.shape[1], device=x.device)
            < torch.tensor(lengths, device=x.device, dtype=torch.int64)[:, None]
        )
        return y, (k, v, seen)

    def read(self, x: Tensor, memory: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """x [B,m,J,D]."""
        _, m, J, _ = x.shape
        keys, values, seen = memory
        q, k, v = self._qkv(x.flatten(1, 2))
        q = q * q.shape[-1] ** -0.5
        scores = (q @ keys.transpose(-1, -2)).masked_fill(~seen.repeat_interleave(J, 0), -torch.inf)
        p = torch.cat([scores, (q * k).sum(-1, keepdim=True)], -1).softmax(-1)
        y = p[..., :-1] @ values + p[..., -1:] * v
        return self.o_proj(y.transpose(1, 2).flatten(2)).unflatten(1, (m, J))


class Recurrent(nn.Module):
    """A mixer of icrl_kernels.layers; its state is that layer's."""

    def __init__(self, mixer: layers.TokenMixer) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, x: Tensor, state: layers.State | None = None) -> tuple[Tensor, layers.State]:
        return self.mixer(x, state)

    def remember(self, x: Tensor, lengths: list[int]) -> tuple[Tensor, layers.State]:
        state, begin = self.mixer.initial_state(x.shape[0], x.device), 0
        states, outputs = [], []
        for n in (*lengths, x.shape[1]):
            if n > begin:
                y, state = self.mixer(x[:, begin:n], state)
                outputs.append(y)
            states.append(state)
            begin = n
        del states[-1]
        kept = (tuple(torch.stack(t, 1) for t in zip(*part, strict=True)) for part in zip(*states, strict=True))
        return torch.cat(outputs, 1) if outputs else x, layers.State(*kept)  # each [B,m,...]

    def read(self, x: Tensor, memory: layers.State) -> Tensor:
        B, m, J, D = x.shape
        state = layers.State(*(tuple(t.flatten(0, 1).repeat_interleave(J, 0) for t in part) for part in memory))
        return self.mixer(x.reshape(B * m * J, 1, D), state)[0].view(B, m, J, D)


def make_mixer(c: TrunkConfig) -> Softmax | Recurrent:
    size = c.width // c.heads
    if c.mixer == "softmax":
        return Softmax(c.width, c.heads)
    made: dict[str, Any] = {
        "gla": lambda: layers.GLA(c.width, num_heads=c.heads),
        "gated_delta_net": lambda: layers.GatedDeltaNet(
            c.width, expand_v=1.0, head_dim=size, num_heads=c.heads, use_short_conv=False
        ),
        "kda": lambda: layers.KDA(c.width, head_dim=size, num_heads=c.heads, use_short_conv=False),
        "gsa": lambda: layers.GSA(c.width, num_heads=c.heads),
        "linear": lambda: layers.LinearAttention(c.width, num_heads=c.heads),
        "rwkv7": lambda: layers.RWKV7(c.width, head_dim=size),
    }
    return Recurrent(made[c.mixer]())


class Block(nn.Module):
    """x + mixer(norm x), then x + mlp(norm x)."""

    def __init__(self, c: TrunkConfig) -> None:
        super().__init__()
        self.mix_norm, self.mlp_norm = nn.LayerNorm(c.width), nn.LayerNorm(c.width)
        self.mixer = make_mixer(c)
        self.mlp_in, self.mlp_out = layers.Linear(c.width, 4 * c.width), layers.Linear(4 * c.width, c.width)

    def mlp(self, x: Tensor) -> Tensor:
        return x + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x)), approximate="tanh"))

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        y, state = self.mixer(self.mix_norm(x), state)
        return self.mlp(x + y), state

    def read(self, x: Tensor, memory: Any) -> Tensor:
        return self.mlp(x + self.mixer.read(self.mix_norm(x), memory))


class TrunkState(NamedTuple):
    layers: list[Any]
    length: int  # tokens so far


torch.serialization.add_safe_globals([TrunkState])  # torch.load with weights_only makes it


def _normal(layer: nn.Linear, std: float) -> None:
    nn.init.normal_(layer.weight, std=std)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


class Trunk(nn.Module):
    """Blocks with learned positions: 1.. for tokens, 0 for queries (only softmax needs positions; recurrences have none).

    Args:
        config: sizes and the mixer. positions: the longest sequence, for softmax.
    """

    def __init__(self, config: TrunkConfig, positions: int) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.positions = None
        if config.mixer == "softmax":
            self.positions = nn.Parameter(torch.empty(positions + 1, config.width))
        self.reset_parameters()
        depth = (2 * config.layers) ** -0.5
        gains = {"qkv_proj": 1.0, "o_proj": depth, "mlp_in": 1.0, "mlp_out": depth}
        for name, layer in self.named_modules():
            gain = gains.get(name.rpartition(".")[2])
            if gain is not None and isinstance(layer, layers.Linear):
                layer.start(partial(_normal, std=layer.in_features**-0.5 * gain))

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
        x = self._placed(x, first + length)
        new = []
        for i, block in enumerate(self.blocks):
            x, s = block(x, None if state is None else state.layers[i])
            new.append(s)
        return self.norm(x), TrunkState(new, length + x.shape[1])

    def remember(self, x: Tensor, lengths: list[int]) -> list[Any]:
        """What queries read of the prompt x [B,T,D] after each of `lengths` tokens (ascending, 0 to T), layer by layer."""
        if any(a > b for a, b in zip([0, *lengths], [*lengths, x.shape[1]], strict=True)):
            raise ValueError(f"lengths: wanted ascending lengths of 0 to {x.shape[1]}, got {lengths}")
        x = self._placed(x, 1)
        memory = []
        for i, block in enumerate(self.blocks):
            assert isinstance(block, Block)
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
