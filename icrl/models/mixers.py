"""Token mixers with explicit states: those of icrl_kernels.layers, softmax attention over all tokens or over a window."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icrl_kernels import layers
from icrl_kernels.arguments import integer

MIXERS = ("softmax", "gla", "gated_delta_net", "kda", "gsa", "linear", "rwkv7")


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


class WindowState(NamedTuple):
    """The last W keys and values, in rings: token n is in slot n mod W."""

    keys: Tensor  # [B,H,W,K] float32
    values: Tensor  # [B,H,W,K] float32
    length: Tensor  # [B] int64, tokens so far

    def detach(self) -> WindowState:
        return WindowState(*(t.detach() for t in self))

    def clone(self) -> WindowState:
        """A copy: `step` changes its state in place."""
        return WindowState(*(t.clone() for t in self))


torch.serialization.add_safe_globals([WindowState])  # torch.load with weights_only makes it


class WindowedSoftmax(nn.Module):
    """Softmax attention of each token to itself and the W - 1 before it; the state is of constant size.

    Scores fall linearly with distance, at a slope of 2^(-8h/H) in head h = 1..H (ALiBi, Press et al. 2022), so that places
    are known at any length. Heads have K = D/H channels.
    """

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads, self.window = heads, integer("window", window, 1)
        self.qkv_proj = layers.Linear(width, 3 * width)
        self.o_proj = layers.Linear(width, width)

    def slopes(self, device: torch.device) -> Tensor:
        """How much each head's scores fall with a token of distance, [H]."""
        return 2 ** (-8 / self.heads * torch.arange(1, self.heads + 1, dtype=torch.float32, device=device))

    def initial_state(self, batch: int, device: torch.device | str | None = None) -> WindowState:
        """The state before the first token of `batch` sequences."""
        weight, batch = self.o_proj.weight, integer("batch", batch, 0)
        device = weight.device if device is None else device
        shape = (batch, self.heads, self.window, weight.shape[0] // self.heads)
        keys, values = (torch.zeros(shape, dtype=torch.float32, device=device) for _ in range(2))
        return WindowState(keys, values, torch.zeros(batch, dtype=torch.int64, device=device))

    def forward(self, x: Tensor, state: WindowState | None = None) -> tuple[Tensor, WindowState]:
        """x [B,T,D] after the tokens in `state`, which is left as it is -> outputs [B,T,D] and the state after them."""
        state = self.initial_state(x.shape[0], x.device) if state is None else state
        q, k, v = self.qkv_proj(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        outputs = []
        for begin in range(0, x.shape[1], self.window):  # so that the scores of a block are T·2W at most
            block = slice(begin, begin + self.window)
            y, state = self._block(q[:, :, block], k[:, :, block], v[:, :, block], state)
            outputs.append(y)
        y = torch.cat(outputs, 2) if outputs else v
        return self.o_proj(y.transpose(1, 2).flatten(2)), state

    def _block(self, q: Tensor, k: Tensor, v: Tensor, state: WindowState) -> tuple[Tensor, WindowState]:
        """Up to W tokens [B,H,T,K]."""
        W, T, device = self.window, q.shape[2], q.device
        order = (state.length[:, None] + torch.arange(W, dtype=torch.int64, device=device)) % W  # oldest first
        index = order[:, None, :, None].expand(-1, self.heads, -1, q.shape[3])
        keys = torch.cat([state.keys.gather(2, index), k.float()], 2)
        values = torch.cat([state.values.gather(2, index), v.float()], 2)
        here = torch.arange(W, W + T, dtype=torch.int64, device=device)
        there = torch.arange(W + T, dtype=torch.int64, device=device)
        distance = here[:, None] - there
        first = W - state.length.clamp(max=W)  # of the places that hold a token
        seen = (distance >= 0) & (distance < W) & (there >= first[:, None, None])  # [B,T,W+T]
        bias = -self.slopes(device)[:, None, None] * distance
        mask = bias.masked_fill(~seen[:, None], -torch.inf)
        y = F.scaled_dot_product_attention(q.float(), keys, values, attn_mask=mask).to(q.dtype)
        places = (state.length[:, None] + torch.arange(T, dtype=torch.int64, device=device)) % W
        index = places[:, None, :, None].expand(-1, self.heads, -1, q.shape[3])
        after = WindowState(
            state.keys.scatter(2, index, k.float()), state.values.scatter(2, index, v.float()), state.length + T
        )
        return y, after

    def step(self, x: Tensor, state: WindowState) -> tuple[Tensor, WindowState]:
        """One token of each sequence, x [B,D]; `state` is CHANGED IN PLACE and returned. Call it under torch.no_grad()."""
        W, device = self.window, x.device
        q, k, v = self.qkv_proj(x).float().unflatten(-1, (3, self.heads, -1)).unbind(1)
        slot = state.length % W
        index = slot[:, None, None, None].expand(-1, self.heads, 1, q.shape[-1])
        state.keys.scatter_(2, index, k[:, :, None])
        state.values.scatter_(2, index, v[:, :, None])
        age = (slot[:, None] - torch.arange(W, dtype=torch.int64, device=device)) % W
        state.length.add_(1)
        bias = -self.slopes(device)[:, None] * age[:, None]
        bias = bias.masked_fill((age >= state.length[:, None])[:, None], -torch.inf)
        scores = (state.keys @ q[..., None])[..., 0] * q.shape[-1] ** -0.5 + bias
        y = (scores.softmax(-1)[:, :, None] @ state.values)[:, :, 0]
        return self.o_proj(y.flatten(1).to(x.dtype)), state


class Addresses(NamedTuple):
    """Where the tokens of an `AddressedDeltaNet` have what its first weights read."""

    query: int  # the first of head_dim channels: the code of where the agent is
    key: int  # likewise: the code of where it was
    gate: int  # the first of one channel an action: 2 where it was the last one, 0 elsewhere
    constant: int  # a channel that is always 1
    actions: int
    others: int  # the first of all other channels, to the last

    def spread(self, width: int, size: int) -> Tensor:
        """`[width, actions·size]` float32 on the CPU: random directions among the other channels, a block of about unit
        vectors an action; always the same ones, so that what is written by them can be read by them."""
        rows, columns = width - self.others, self.actions * size
        drawn = torch.randn(
            rows, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu"
        )
        return F.pad(drawn * rows**-0.5, (0, 0, self.others, 0))


class AddressedDeltaNet(layers.GatedDeltaNet):
    """Gated DeltaNet whose first weights make head h the memory of action h; all of them are trained like any others.

    A head's key is the code of the previous observation, its query that of the current one, by the same matrix, and it writes
    (beta .73) only after its own action (else beta .007): it reads what followed when the action was last taken here. These
    heads forget in `memory` steps; those beyond the actions begin as Gated DeltaNet's, and forget in 8 to 512 steps.

    Where it `copies`, what is written is, above all, the code of the current observation, and `start_outputs` spreads what
    the heads read, each action's by its own directions, over the channels that hold nothing else.
    """

    def __init__(
        self,
        hidden_size: int,
        head_dim: int,
        num_heads: int,
        addresses: Addresses,
        copies: bool,
        memory: float = 4000.0,
    ) -> None:
        if num_heads < addresses.actions:
            raise ValueError(f"heads: wanted at least one an action, {addresses.actions}, got {num_heads}")
        self.addresses, self.copies, self.memory = addresses, copies, memory
        super().__init__(hidden_size, expand_v=1.0, head_dim=head_dim, num_heads=num_heads, use_short_conv=False)
        starts = {"q_proj": self._queries, "k_proj": self._keys, "v_proj": self._values, "g_proj": self._gates}
        for name, begin in starts.items():
            setattr(self, name, layers.Linear(hidden_size, num_heads * head_dim, bias=False).start(begin))
        self.b_proj = layers.Linear(hidden_size, num_heads, bias=False).start(self._rates)

    def _drawn(self, layer: nn.Linear) -> tuple[Tensor, int, int]:
        """First weights as nn.Linear's; K; and how many rows are of the actions' heads."""
        weight = torch.empty(layer.weight.shape, dtype=torch.float32, device=layer.weight.device)
        weight.uniform_(-(weight.shape[1] ** -0.5), weight.shape[1] ** -0.5)
        return weight, self.head_k_dim, self.addresses.actions * self.head_k_dim

    def _codes(self, like: Tensor, first: int) -> Tensor:
        """Rows of the actions' heads that read the code from channel `first` on, each head the same."""
        K, n = self.head_k_dim, self.addresses.actions
        rows = torch.zeros(n * K, like.shape[1], dtype=like.dtype, device=like.device)
        rows[:, first : first + K] = torch.eye(K, dtype=like.dtype, device=like.device).repeat(n, 1)
        return rows

    @torch.no_grad()
    def _queries(self, layer: nn.Linear) -> None:
        weight, _, own = self._drawn(layer)
        weight[:own] = self._codes(weight, self.addresses.query)
        layers.fill(layer.weight, weight)

    @torch.no_grad()
    def _keys(self, layer: nn.Linear) -> None:
        weight, _, own = self._drawn(layer)
        weight[:own] = self._codes(weight, self.addresses.key)
        layers.fill(layer.weight, weight)

    @torch.no_grad()
    def _values(self, layer: nn.Linear) -> None:
        weight, _, own = self._drawn(layer)
        if self.copies:
            weight[:own] = 0.5 * weight[:own] + self._codes(weight, self.addresses.query)
        layers.fill(layer.weight, weight)

    @torch.no_grad()
    def _gates(self, layer: nn.Linear) -> None:
        weight, _, own = self._drawn(layer)
        if self.copies:
            weight[:own] = 0
        weight[:own, self.addresses.constant] = 2
        layers.fill(layer.weight, weight)

    @torch.no_grad()
    def _rates(self, layer: nn.Linear) -> None:
        weight = torch.zeros(layer.weight.shape, dtype=torch.float32, device=layer.weight.device)
        a = self.addresses
        weight[: a.actions, a.constant] = -5
        weight[: a.actions, a.gate : a.gate + a.actions] = 3 * torch.eye(
            a.actions, dtype=torch.float32, device=weight.device
        )
        layers.fill(layer.weight, weight)

    @torch.no_grad()
    def _outputs(self, layer: nn.Linear) -> None:
        weight = torch.zeros(layer.weight.shape, dtype=torch.float32, device=layer.weight.device)
        spread = self.addresses.spread(self.hidden_size, self.head_k_dim)
        weight[:, : spread.shape[1]] = 0.5 * spread.to(weight.device)
        layers.fill(layer.weight, weight)

    def start_outputs(self) -> None:
        """Give the output's projection its first weights, where this layer copies."""
        if self.copies:
            self.o_proj.start(self._outputs)

    def _start(self) -> None:
        spare = len(self.dt_bias) - self.addresses.actions
        steps = [self.memory] * self.addresses.actions + [8 * 64 ** (i / max(1, spare - 1)) for i in range(spare)]
        rates = 1 / torch.tensor(steps, dtype=torch.float32, device=self.dt_bias.device)
        nn.init.zeros_(self.A_log)
        layers.fill(self.dt_bias, rates + torch.log(-torch.expm1(-rates)))  # whose softplus they are


def make_mixer(
    mixer: str,
    width: int,
    heads: int,
    *,
    head_dim: int = 0,
    window: int = 0,
    addresses: Addresses | None = None,
    layer: int = 0,
    layers_in_all: int = 1,
) -> Softmax | WindowedSoftmax | Recurrent:
    """One of `MIXERS`.

    Args:
        head_dim: of gated_delta_net and kda, whose heads need not share the width; 0 is width / heads.
        window: of softmax; 0 attends to all tokens.
        addresses: for gated_delta_net: the first weights are those of `AddressedDeltaNet`.
        layer, layers_in_all: for rwkv7, whose layers after the first (0) mix the first one's values into theirs.
    """
    size = head_dim or width // heads
    if mixer == "softmax":
        return WindowedSoftmax(width, heads, window) if window else Softmax(width, heads)
    if addresses is not None:
        return Recurrent(AddressedDeltaNet(width, size, heads, addresses, copies=layer == 0))
    made: dict[str, Any] = {
        "gla": lambda: layers.GLA(width, num_heads=heads),
        "gated_delta_net": lambda: layers.GatedDeltaNet(
            width, expand_v=1.0, head_dim=size, num_heads=heads, use_short_conv=False
        ),
        "kda": lambda: layers.KDA(width, head_dim=size, num_heads=heads, use_short_conv=False),
        "gsa": lambda: layers.GSA(width, num_heads=heads),
        "linear": lambda: layers.LinearAttention(width, num_heads=heads),
        "rwkv7": lambda: layers.RWKV7(width, head_dim=width // heads, layer_idx=layer, num_layers=layers_in_all),
    }
    return Recurrent(made[mixer]())
