"""The token mixers of the gated delta rule: Gated DeltaNet and Kimi Delta Attention."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from icrl_kernels.layers._base import (
    ConvolvedMixer,
    Linear,
    RMSNorm,
    at_least_one,
    expanded,
    fill,
    fla_conv,
    multiple,
    wide,
)
from icrl_kernels.linear_attention.common import MAX_HEAD_DIM
from icrl_kernels.linear_attention.gated_delta_rule import gated_delta_rule, gated_delta_rule_step

GATES = {"silu": F.silu, "swish": F.silu, "sigmoid": torch.sigmoid}


def _rand(parameter: Tensor) -> Tensor:
    return torch.rand(parameter.shape, dtype=wide(parameter.dtype), device=parameter.device)


def _time_steps(parameter: Tensor) -> Tensor:
    """Biases whose softplus is log-uniform between 0.001 and 0.1, as Mamba's."""
    steps = torch.exp(_rand(parameter) * math.log(100)) * 1e-3
    return steps + torch.log(-torch.expm1(-steps))


class _DeltaRule(ConvolvedMixer):
    """What the two have in common: heads, q, k and v, beta, and the op. Subclasses give `_gate`."""

    def _make(
        self,
        hidden_size: int,
        expand_v: float,
        head_dim: int,
        num_heads: int,
        num_v_heads: int | None,
        use_short_conv: bool,
        conv_size: int,
        conv_bias: bool,
        allow_neg_eigval: bool,
    ) -> None:
        num_v_heads = num_heads if num_v_heads is None else num_v_heads
        hidden_size, head_dim, num_heads, num_v_heads = at_least_one(
            hidden_size=hidden_size, head_dim=head_dim, num_heads=num_heads, num_v_heads=num_v_heads
        )
        multiple("num_v_heads", num_v_heads, "num_heads", num_heads)
        if head_dim > MAX_HEAD_DIM:
            raise ValueError(f"head_dim: wanted at most {MAX_HEAD_DIM}, got {head_dim}")
        self.hidden_size, self.num_heads, self.num_v_heads = hidden_size, num_heads, num_v_heads
        self.head_k_dim, self.head_v_dim = head_dim, expanded("expand_v", head_dim, expand_v)
        # Value channels do not touch one another but through beta and g: a head of too many is several heads to the op.
        self._parts = -(-self.head_v_dim // 256)
        if self.head_v_dim % self._parts:
            self._parts = 1
        self.allow_neg_eigval = allow_neg_eigval
        K, V = num_heads * head_dim, num_v_heads * self.head_v_dim
        self._make_qkv(K, K, V, use_short_conv, conv_size, conv_bias)
        self.b_proj = nn.Linear(hidden_size, num_v_heads, bias=False)
        self.o_proj = Linear(V, hidden_size, bias=False)

    @classmethod
    def _fla_options(cls, layer: Any) -> tuple[dict[str, Any], dict[str, str]]:
        options = {
            "hidden_size": layer.hidden_size,
            "expand_v": layer.expand_v,
            "head_dim": layer.head_dim,
            "num_heads": layer.num_heads,
            "num_v_heads": layer.num_v_heads,
            "allow_neg_eigval": layer.allow_neg_eigval,
            "norm_eps": layer.o_norm.eps,
        }
        return options | fla_conv(layer), {}

    def _state_shapes(self) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
        heads, V = self.num_v_heads * self._parts, self.head_v_dim // self._parts
        return self._window_shapes(), [(heads, self.head_k_dim, V)]

    o_norm: RMSNorm

    def _gate(self, x: Tensor) -> Tensor:
        """Log-decays [..., num_v_heads] or [..., num_v_heads, K]."""
        raise NotImplementedError

    def _inputs(self, x: Tensor, windows: tuple[Tensor, ...], cu_seqlens: Tensor | None) -> tuple[Any, Any]:
        (q, k, v), after = self._qkv(x, windows, cu_seqlens)
        if not self.use_short_conv:
            q, k, v = F.silu(q), F.silu(k), F.silu(v)
        logits = self.b_proj(x)
        beta = logits.to(wide(logits.dtype)).sigmoid()
        if self.allow_neg_eigval:
            beta = 2 * beta
        g = self._gate(x)
        if self._parts > 1:
            dim = x.dim() - 1
            beta, g = beta.repeat_interleave(self._parts, dim), g.repeat_interleave(self._parts, dim)
        q, k = q.unflatten(-1, (-1, self.head_k_dim)), k.unflatten(-1, (-1, self.head_k_dim))
        return (q, k, v.unflatten(-1, (-1, self.head_v_dim // self._parts)), g, beta), after

    def _chunk(self, q, k, v, g, beta, recurrent, cu_seqlens) -> tuple[Tensor, tuple[Tensor, ...]]:
        o, final = gated_delta_rule(
            q,
            k,
            v,
            g,
            beta,
            initial_state=recurrent[0],
            output_final_state=True,
            cu_seqlens=cu_seqlens,
            qk_l2norm=True,
        )
        assert final is not None
        return o, (final,)

    def _one(self, q, k, v, g, beta, recurrent) -> Tensor:
        return gated_delta_rule_step(q, k, v, g, beta, recurrent[0], qk_l2norm=True)

    def _output(self, o: Tensor, x: Tensor) -> Tensor:
        o = o.flatten(-2).unflatten(-1, (-1, self.head_v_dim))
        z = self._output_gate(x)
        o = self.o_norm(o, None if z is None else z.unflatten(-1, (-1, self.head_v_dim)))
        return self.o_proj(o.flatten(-2))

    def _output_gate(self, x: Tensor) -> Tensor | None:
        raise NotImplementedError


class GatedDeltaNet(_DeltaRule):
    """Gated DeltaNet (Yang, Kautz and Hatamizadeh 2024, "Gated Delta Networks: Improving Mamba2 with Delta Rule",
    eq. 10 and section 3.4).

    q, k, v = silu(conv(W x)), one convolution each; the log-decay of a head is g = −exp(A) · softplus(W_a x + b), its
    rate of writing β = σ(W_b x), twice that when allow_neg_eigval (Grazzi et al. 2024). With q and k divided by their
    norms: S' = exp(g_t) S_{t-1}, S_t = S' + β_t k_t (v_t − S'ᵀ k_t)ᵀ, o_t = K^-1/2 · S_tᵀ q_t;
    y = W_o (RMSNorm(o) ⊙ silu(W_g x)), the norm over each head's channels.

    Args:
        hidden_size: D, of the tokens.
        expand_v: V = expand_v · head_dim channels of a value head.
        head_dim: K, of q and k.
        num_heads: heads of q and k. num_v_heads: heads of v, g, beta and the state; a multiple of num_heads, default
            the same. With V above 256 the state has each as several heads, of equal shares of V.
        use_gate: whether there is W_g. output_gate_activation: "silu" ("swish") or "sigmoid".
        use_short_conv: whether there are the convolutions, of `conv_size` taps, with a bias if conv_bias.
        allow_neg_eigval: beta up to 2, so that the state's transition may have negative eigenvalues.
        norm_eps: what the norm adds to the mean square.

    Parameters are named as in flash-linear-attention's `GatedDeltaNet`: its state_dict loads, and `from_fla` copies its
    options too.
    """

    def __init__(
        self,
        hidden_size: int = 2048,
        expand_v: float = 2.0,
        head_dim: int = 256,
        num_heads: int = 6,
        num_v_heads: int | None = None,
        use_gate: bool = True,
        use_short_conv: bool = True,
        allow_neg_eigval: bool = False,
        conv_size: int = 4,
        conv_bias: bool = False,
        norm_eps: float = 1e-5,
        output_gate_activation: str = "silu",
    ) -> None:
        super().__init__()
        if output_gate_activation not in GATES:
            raise ValueError(
                f"output_gate_activation: wanted one of {', '.join(GATES)}, got {output_gate_activation!r}"
            )
        self._make(
            hidden_size,
            expand_v,
            head_dim,
            num_heads,
            num_v_heads,
            use_short_conv,
            conv_size,
            conv_bias,
            allow_neg_eigval,
        )
        self.use_gate = use_gate
        self.a_proj = nn.Linear(hidden_size, self.num_v_heads, bias=False)
        self.A_log = nn.Parameter(torch.empty(self.num_v_heads))
        self.dt_bias = nn.Parameter(torch.empty(self.num_v_heads))
        self._start()
        if use_gate:
            self.g_proj = nn.Linear(hidden_size, self.num_v_heads * self.head_v_dim, bias=False)
        self.o_norm = RMSNorm(self.head_v_dim, norm_eps, GATES[output_gate_activation] if use_gate else None)

    def _start(self) -> None:
        fill(self.A_log, (16 * (1 - _rand(self.A_log))).log())
        fill(self.dt_bias, _time_steps(self.dt_bias))

    @classmethod
    def _fla_options(cls, layer: Any) -> tuple[dict[str, Any], dict[str, str]]:
        options, renamed = super()._fla_options(layer)
        options["use_gate"] = layer.use_gate
        if layer.use_gate:
            options["output_gate_activation"] = layer.o_norm.activation
        return options, renamed

    def _gate(self, x: Tensor) -> Tensor:
        logits = self.a_proj(x)
        dtype = wide(logits.dtype)
        return -self.A_log.to(dtype).exp() * F.softplus(logits.to(dtype) + self.dt_bias.to(dtype))

    def _output_gate(self, x: Tensor) -> Tensor | None:
        return self.g_proj(x) if self.use_gate else None


class KDA(_DeltaRule):
    """Kimi Delta Attention (Kimi Team 2025, "Kimi Linear: An Expressive, Efficient Attention Architecture", eq. 1 and 10).

    As `GatedDeltaNet`, with a decay for each key channel from a projection of low rank, and a sigmoid output gate of low
    rank: q, k, v = silu(conv(W x)); g = −exp(A) · softplus(W_2 W_1 x + b), or lower_bound · σ(exp(A) · (W_2 W_1 x + b))
    with a lower bound; β = σ(W_b x), twice that when allow_neg_eigval. With q and k divided by their norms:
    S' = diag(exp g_t) S_{t-1}, S_t = S' + β_t k_t (v_t − S'ᵀ k_t)ᵀ, o_t = K^-1/2 · S_tᵀ q_t;
    y = W_o (RMSNorm(o) ⊙ σ(W_4 W_3 x + c)), the norm over each head's channels.

    Args:
        hidden_size, expand_v, head_dim, num_heads, num_v_heads, use_short_conv, conv_size, conv_bias,
            allow_neg_eigval, norm_eps: as for `GatedDeltaNet`. The low ranks are V.
        lower_bound: the least g that can be, below 0, or None.

    Parameters are named as in flash-linear-attention's `KimiDeltaAttention`: its state_dict loads, and `from_fla`
    copies its options too.
    """

    def __init__(
        self,
        hidden_size: int = 2048,
        expand_v: float = 1.0,
        head_dim: int = 128,
        num_heads: int = 16,
        num_v_heads: int | None = None,
        use_short_conv: bool = True,
        allow_neg_eigval: bool = False,
        lower_bound: float | None = None,
        conv_size: int = 4,
        conv_bias: bool = False,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if lower_bound is not None and not lower_bound < 0:
            raise ValueError(f"lower_bound: wanted a log-decay below 0, got {lower_bound}")
        self._make(
            hidden_size,
            expand_v,
            head_dim,
            num_heads,
            num_v_heads,
            use_short_conv,
            conv_size,
            conv_bias,
            allow_neg_eigval,
        )
        self.lower_bound = lower_bound
        H, K, V = self.num_v_heads, self.head_k_dim, self.head_v_dim
        self.f_proj = nn.Sequential(nn.Linear(hidden_size, V, bias=False), nn.Linear(V, H * K, bias=False))
        self.g_proj = nn.Sequential(nn.Linear(hidden_size, V, bias=False), nn.Linear(V, H * V))
        self.A_log, self.dt_bias = nn.Parameter(torch.empty(H)), nn.Parameter(torch.empty(H * K))
        self._start()
        self.o_norm = RMSNorm(V, norm_eps, torch.sigmoid)

    def _start(self) -> None:
        if self.lower_bound is None:
            fill(self.A_log, (1 + 15 * _rand(self.A_log)).log())
        else:
            nn.init.zeros_(self.A_log)
        fill(self.dt_bias, _time_steps(self.dt_bias))

    @classmethod
    def _fla_name(cls) -> str:
        return "KimiDeltaAttention"

    @classmethod
    def _fla_options(cls, layer: Any) -> tuple[dict[str, Any], dict[str, str]]:
        options, renamed = super()._fla_options(layer)
        options["lower_bound"] = layer.lower_bound
        return options, renamed

    def _gate(self, x: Tensor) -> Tensor:
        logits = self.f_proj(x)
        dtype = wide(logits.dtype)
        logits = (logits.to(dtype) + self.dt_bias.to(dtype)).unflatten(-1, (-1, self.head_k_dim))
        rate = self.A_log.to(dtype).exp()[:, None]
        if self.lower_bound is not None:
            return self.lower_bound * torch.sigmoid(rate * logits)
        return -rate * F.softplus(logits)

    def _output_gate(self, x: Tensor) -> Tensor | None:
        return self.g_proj(x)
