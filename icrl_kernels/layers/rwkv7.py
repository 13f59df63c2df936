"""The token mixer of RWKV-7."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from icrl_kernels import _checks
from icrl_kernels.layers._base import (
    Linear,
    State,
    TokenMixer,
    at_least_one,
    fill,
    history,
    multiple,
    orthogonal,
    wide,
    zeros,
)
from icrl_kernels.linear_attention.common import MAX_HEAD_DIM, MAX_VALUE_DIM
from icrl_kernels.linear_attention.rwkv7 import rwkv7, rwkv7_step

SHIFTS = "rwkvag"  # what each has its own mixture of the token and the one before it for


def _channels(size: int, device: torch.device) -> Tensor:
    return torch.arange(size, dtype=torch.float32, device=device)


def _zigzag(size: int, head_dim: int, device: torch.device) -> Tensor:
    """From −1 to 1 over each head's channels, flat in the middle."""
    z = (_channels(size, device) % head_dim - (head_dim - 1) / 2) / max(0.5, (head_dim - 1) / 2)
    return z * z.abs()


def _decay_bias(bias: Tensor, head_dim: int, depth: float) -> Tensor:
    ramp = _channels(len(bias), bias.device) / max(1, len(bias) - 1)
    return 6 * ramp ** (1 + depth**0.3) - 5.5 + 2.5 * _zigzag(len(bias), head_dim, bias.device)


def _rate_bias(bias: Tensor, head_dim: int) -> Tensor:
    ramp = _channels(len(bias), bias.device) / max(1, len(bias) - 1)
    return 0.3 * _zigzag(len(bias), head_dim, bias.device) + 0.4 * (ramp - 0.5) - 0.19


def _value_bias(bias: Tensor) -> Tensor:
    return 0.73 - 0.4 * (torch.linspace(0, 1, len(bias), dtype=torch.float32, device=bias.device) - 0.5)


def _start_outputs(layer: nn.Linear, gain: float, bias: Callable[[Tensor], Tensor] | None) -> None:
    orthogonal(layer, gain)
    if bias is not None:
        fill(layer.bias, bias(layer.bias))


class LowRank(nn.Module):
    """W_2 f(W_1 x) + b. At first W_1 is 0, and so the result is b, which `bias` gives."""

    def __init__(
        self, size: int, outputs: int, rank: int, activation: nn.Module, bias: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        super().__init__()
        first, last = Linear(size, rank, bias=False), Linear(rank, outputs, bias=bias is not None)
        self.lora = nn.Sequential(first.start(zeros), activation, last)
        gain = 0.1 * math.sqrt(max(1, rank / outputs))
        last.start(partial(_start_outputs, gain=gain, bias=bias))

    def forward(self, x: Tensor) -> Tensor:
        return self.lora(x)


class HeadNorm(nn.Module):
    """Each head's channels, of mean 0 and variance 1, times weight plus bias; float32 in and out. All weights are `weight` at first."""

    def __init__(self, size: int, eps: float, affine: bool, weight: float) -> None:
        super().__init__()
        self.eps, self.first_weight = eps, weight
        self.weight = nn.Parameter(torch.empty(size)) if affine else None
        self.bias = nn.Parameter(torch.empty(size)) if affine else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.weight is not None and self.bias is not None:
            nn.init.constant_(self.weight, self.first_weight)
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., H, V] to [..., H V]."""
        y = F.layer_norm(x, x.shape[-1:], eps=self.eps).flatten(-2)
        if self.weight is None or self.bias is None:
            return y
        return y * self.weight.to(y.dtype) + self.bias.to(y.dtype)


class RWKV7(TokenMixer):
    """RWKV-7's time mixing (Peng et al. 2025, "RWKV-7 Goose with Expressive Dynamic State Evolution", section 4).

    Six mixtures of each token and the one before it, x + (x' − x) ⊙ μ, give the receptance r = W_r x_r, the key
    k = W_k x_k, the value v = W_v x_v, the log-decay w = −e^-1/2 · σ(lora_w(x_w)), the in-context learning rate
    a = σ(lora_a(x_a)) and the output gate g = lora_g(x_g). With κ̂ = k ⊙ k_k of norm 1 in each head and
    k ← k ⊙ (1 + (a − 1) ⊙ k_a): S_t = diag(exp w_t) S_{t-1} − (κ̂_t ⊙ a_t)(κ̂_tᵀ S_{t-1}) + k_t v_tᵀ, o_t = S_tᵀ r_t, and
    y = W_o ((HeadNorm(o) + (r · (k ⊙ r_k)) v) ⊙ g).

    Layers after the first mix the first layer's values into theirs: v ← v + (v_first − v) ⊙ σ(lora_v(x_v)). They are made
    with layer_idx > 0, and called with the v_first that the first layer, called with output_v_first=True, returned.

    Args:
        hidden_size: D, of the tokens, and all heads' channels of r and k.
        head_dim: K. value_dim: all heads' channels of v, default D.
        decay_low_rank_dim, gate_low_rank_dim, a_low_rank_dim, v_low_rank_dim: ranks of the loras; default about
            2.5, 5, 2.5 and 1.7 times √D · head_dim / 64 (the gate's without head_dim / 64), in 32s.
        elementwise_affine: whether the norm has a weight and a bias. norm_eps: it adds head_dim times this.
        fuse_norm: κ̂ is divided by max(‖κ̂‖, 1e-12), as in RWKV's own code, when False, and by √(‖κ̂‖² + 1e-6), as in
            flash-linear-attention's fused kernel, when True.
        layer_idx, num_layers: where the layer stands in its model, for the initial weights (the output's are 0).

    Parameters are named as in flash-linear-attention's `RWKV7Attention`: its state_dict loads, and `from_fla` copies its
    options too.
    """

    def __init__(
        self,
        hidden_size: int = 1024,
        head_dim: int = 64,
        value_dim: int | None = None,
        decay_low_rank_dim: int | None = None,
        gate_low_rank_dim: int | None = None,
        a_low_rank_dim: int | None = None,
        v_low_rank_dim: int | None = None,
        elementwise_affine: bool = True,
        norm_eps: float = 1e-5,
        fuse_norm: bool = False,
        layer_idx: int = 0,
        num_layers: int = 1,
    ) -> None:
        super().__init__()
        value_dim = hidden_size if value_dim is None else value_dim
        hidden_size, head_dim, value_dim, num_layers = at_least_one(
            hidden_size=hidden_size, head_dim=head_dim, value_dim=value_dim, num_layers=num_layers
        )
        multiple("hidden_size", hidden_size, "head_dim", head_dim)
        H = hidden_size // head_dim
        multiple("value_dim", value_dim, "the number of heads", H)
        for name, size, most in (("head_dim", head_dim, MAX_HEAD_DIM), ("value_dim", value_dim // H, MAX_VALUE_DIM)):
            if size > most:
                raise ValueError(f"{name}: wanted at most {most} channels per head, got {size}")
        layer_idx = _checks.integer("layer_idx", layer_idx)
        if not 0 <= layer_idx < num_layers:
            raise ValueError(f"layer_idx: wanted 0 to num_layers - 1 = {num_layers - 1}, got {layer_idx}")
        self.hidden_size, self.value_dim, self.num_heads = hidden_size, value_dim, H
        self.head_k_dim, self.head_v_dim = head_dim, value_dim // H
        self.fuse_norm, self.layer_idx = fuse_norm, layer_idx

        def rank(given: int | None, times: float, name: str) -> int:
            if given is not None:
                return _checks.integer(name, given, 1)
            return max(32, 32 * round(times * hidden_size**0.5 / 32))

        factor, depth = head_dim / 64, layer_idx / max(1, num_layers - 1)
        self._rest = 1 - layer_idx / num_layers
        for name in SHIFTS:
            setattr(self, f"x_{name}", nn.Parameter(torch.empty(1, 1, hidden_size)))
        self.k_k = nn.Parameter(torch.empty(hidden_size))
        self.k_a = nn.Parameter(torch.empty(hidden_size))
        self.r_k = nn.Parameter(torch.empty(H, head_dim))
        self._start()
        self.r_proj = Linear(hidden_size, hidden_size, bias=False)
        self.k_proj = Linear(hidden_size, hidden_size, bias=False)
        self.v_proj = Linear(hidden_size, value_dim, bias=False)
        self.o_proj = Linear(value_dim, hidden_size, bias=False)
        decay = rank(decay_low_rank_dim, 2.5 * factor, "decay_low_rank_dim")
        self.w_lora = LowRank(
            hidden_size, hidden_size, decay, nn.Tanh(), partial(_decay_bias, head_dim=head_dim, depth=depth)
        )
        if layer_idx:
            values = rank(v_low_rank_dim, 1.7 * factor, "v_low_rank_dim")
            self.v_lora = LowRank(hidden_size, value_dim, values, nn.Identity(), _value_bias)
        rate = rank(a_low_rank_dim, 2.5 * factor, "a_low_rank_dim")
        self.a_lora = LowRank(hidden_size, hidden_size, rate, nn.Identity(), partial(_rate_bias, head_dim=head_dim))
        gate = rank(gate_low_rank_dim, 5, "gate_low_rank_dim")
        self.g_lora = LowRank(hidden_size, value_dim, gate, nn.Sigmoid())
        weight = ((layer_idx + 1) / num_layers) ** 0.7
        self.g_norm = HeadNorm(value_dim, head_dim * norm_eps, elementwise_affine, weight)
        for layer, gain in ((self.r_proj, 1.0), (self.k_proj, 0.1), (self.v_proj, 1.0)):
            layer.start(partial(orthogonal, gain=gain))
        self.o_proj.start(zeros)

    def _start(self) -> None:
        """RWKV-7's own first values, which depend on the channel and on the layer's depth, as its submodules' do."""
        D = self.hidden_size
        for name, power in zip(SHIFTS, (0.2, 0.9, 0.7, 0.7, 0.9, 0.2), strict=True):
            mixture = getattr(self, f"x_{name}")
            fill(mixture, (1 - (_channels(D, mixture.device) / D) ** (power * self._rest)).view(1, 1, D))
        fill(self.k_k, 0.71 - 0.1 * (_channels(D, self.k_k.device) / max(1, D - 1) - 0.5))
        nn.init.constant_(self.k_a, 1.02)
        nn.init.constant_(self.r_k, -0.04)

    @classmethod
    def _fla_name(cls) -> str:
        return "RWKV7Attention"

    @classmethod
    def _fla_options(cls, layer: Any) -> tuple[dict[str, Any], dict[str, str]]:
        first = layer.layer_idx == 0  # where it is not known, flash-linear-attention's layer is one of the later ones
        options = {
            "hidden_size": layer.hidden_size,
            "head_dim": layer.head_dim,
            "value_dim": layer.value_dim,
            "decay_low_rank_dim": layer.w_lora.low_rank_dim,
            "gate_low_rank_dim": layer.g_lora.low_rank_dim,
            "a_low_rank_dim": layer.a_lora.low_rank_dim,
            "v_low_rank_dim": None if first else layer.v_lora.low_rank_dim,
            "elementwise_affine": layer.g_norm.weight is not None,
            "norm_eps": layer.g_norm.eps / layer.head_dim,
            "fuse_norm": layer.fuse_norm,
            "layer_idx": 0 if first else layer.layer_idx or 1,
            "num_layers": layer.num_hidden_layers or (layer.layer_idx or 1) + 1,
        }
        return options, {}

    def _state_shapes(self) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
        return [(1, self.hidden_size)], [(self.num_heads, self.head_k_dim, self.head_v_dim)]

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        cu_seqlens: Tensor | None = None,
        v_first: Tensor | None = None,
        output_v_first: bool = False,
    ) -> tuple:
        """`TokenMixer.forward`, where state.conv holds the token before x.

        Args:
            v_first: [B, T, value_dim], of layers with layer_idx > 0 and of them only: the first layer's values.
            output_v_first: whether to return v_first too, as the third of three: the first layer's own, or what was given.
        """
        state = self._begin(x, state, cu_seqlens)
        tokens, places, last = history(x.to(state.conv[0].dtype), state.conv[0], cu_seqlens)
        before = tokens[:, : x.shape[1]] if places is None else tokens[:, places - 1]
        inputs, rest, v_first = self._inputs_of(x, before, v_first)
        o, final = rwkv7(*inputs, initial_state=state.recurrent[0], output_final_state=True, cu_seqlens=cu_seqlens)
        assert final is not None
        result = self._output_of(o, *rest), State((last,), (final,))
        return (*result, v_first) if output_v_first else result

    def step(self, x: Tensor, state: State, v_first: Tensor | None = None, output_v_first: bool = False) -> tuple:
        """`TokenMixer.step`; v_first is [B, value_dim]."""
        self._check_step(x, state)
        window = state.conv[0]
        inputs, rest, v_first = self._inputs_of(x, window[:, 0], v_first)
        window.copy_(x[:, None])
        o = rwkv7_step(*inputs, state=state.recurrent[0])
        result = self._output_of(o, *rest), state
        return (*result, v_first) if output_v_first else result

    def _inputs_of(
        self, x: Tensor, before: Tensor, v_first: Tensor | None
    ) -> tuple[Any, tuple[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """The op's r, w, k, v, a, b; what the output wants besides; v_first. The tokens are [..., D]."""
        delta = before.to(x.dtype) - x
        xr, xw, xk, xv, xa, xg = (torch.addcmul(x, delta, getattr(self, f"x_{n}")[0].to(x.dtype)) for n in SHIFTS)
        r, k, v, decay = self.r_proj(xr), self.k_proj(xk), self.v_proj(xv), self.w_lora(xw)
        w = -math.exp(-0.5) * decay.to(wide(decay.dtype)).sigmoid()
        rate = self.a_lora(xa).sigmoid()
        if self.layer_idx == 0:
            if v_first is not None:
                raise ValueError("v_first: the first layer (layer_idx=0) makes it, and takes none")
            first = v
        elif v_first is None:
            raise ValueError(f"v_first: wanted the first layer's values, because layer_idx={self.layer_idx}")
        else:
            _checks.shape("v_first", v_first, tuple(v.shape))
            first = v_first
            v = torch.lerp(v, first.to(v.dtype), self.v_lora(xv).sigmoid())
        removed = (k * self.k_k.to(k.dtype)).unflatten(-1, (-1, self.head_k_dim))
        if self.fuse_norm:
            squares = removed.to(w.dtype).square().sum(-1, keepdim=True)
            removed = (removed * (squares + 1e-6).rsqrt()).to(k.dtype)
        else:
            removed = F.normalize(removed, dim=-1)
        k = torch.addcmul(k, k * (rate - 1), self.k_a.to(k.dtype))
        r, w, k, rate = (t.unflatten(-1, (-1, self.head_k_dim)) for t in (r, w, k, rate))
        values = v.unflatten(-1, (-1, self.head_v_dim))
        inputs = (r, w, k, values, -removed, removed * rate)
        return tuple(t if t is w else t.to(v.dtype) for t in inputs), (r, k, values, self.g_lora(xg)), first

    def _output_of(self, o: Tensor, r: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        dtype = wide(o.dtype)
        bonus = (r.to(dtype) * k.to(dtype) * self.r_k.to(dtype)).sum(-1, keepdim=True) * v.to(dtype)
        y = (self.g_norm(o.to(dtype)) + bonus.flatten(-2)) * g.to(dtype)
        return self.o_proj(y.to(o.dtype))
