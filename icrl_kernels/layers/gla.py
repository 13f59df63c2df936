"""The token mixer of gated linear attention."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from icrl_kernels.layers._base import ConvolvedMixer, RMSNorm, at_least_one, fla_conv, fla_norm, head_dims, refuse, wide
from icrl_kernels.linear_attention.gla import gla, gla_step


class GLA(ConvolvedMixer):
    """Gated linear attention (Yang et al. 2023, "Gated Linear Attention Transformers with Hardware-Efficient Training",
    eq. 3-4 and section 4.4).

    q, k, v = W_q x, W_k x, W_v x; the log-decay of each key channel is g = log σ(W_2 W_1 x + b) / gate_logit_normalizer,
    of low rank; o_t = K^-1/2 · S_tᵀ q_t with S_t = diag(exp g_t) S_{t-1} + k_t v_tᵀ; y = W_o (RMSNorm(o) ⊙ silu(W_g x)),
    the norm over each head's channels.

    Args:
        hidden_size: D, of the tokens.
        expand_k, expand_v: all query heads' key (value) channels, as a multiple of D.
        num_heads: query heads. num_kv_heads: heads of k, v, g and the state; a divisor of num_heads, default the same.
        use_short_conv: a causal convolution of `conv_size` taps and a silu after each of W_q, W_k, W_v.
        use_output_gate: whether there is W_g.
        elementwise_affine: whether the norm has a weight. norm_eps: what it adds to the mean square.
        gate_logit_normalizer: 16 makes decays start near 1. gate_low_rank_dim: the rank of W_2 W_1.
        clamp_min: the least g, where one is wanted.

    Parameters are named as in flash-linear-attention's `GatedLinearAttention` (with its fused norm): its state_dict
    loads, and `from_fla` copies its options too.
    """

    def __init__(
        self,
        hidden_size: int = 1024,
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        num_heads: int = 4,
        num_kv_heads: int | None = None,
        use_short_conv: bool = False,
        conv_size: int = 4,
        conv_bias: bool = False,
        use_output_gate: bool = True,
        elementwise_affine: bool = True,
        norm_eps: float = 1e-5,
        gate_logit_normalizer: float = 16,
        gate_low_rank_dim: int = 16,
        clamp_min: float | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        hidden_size, num_heads, num_kv_heads = at_least_one(
            hidden_size=hidden_size, num_heads=num_heads, num_kv_heads=num_kv_heads
        )
        K, V = head_dims(hidden_size, num_heads, num_kv_heads, expand_k, expand_v)
        (gate_low_rank_dim,) = at_least_one(gate_low_rank_dim=gate_low_rank_dim)
        if not gate_logit_normalizer > 0:
            raise ValueError(f"gate_logit_normalizer: wanted a number above 0, got {gate_logit_normalizer}")
        if clamp_min is not None and not clamp_min <= 0:
            raise ValueError(f"clamp_min: wanted a log-decay, at most 0, got {clamp_min}")
        self.hidden_size, self.num_heads, self.num_kv_heads = hidden_size, num_heads, num_kv_heads
        self.head_k_dim, self.head_v_dim = K, V
        self.use_output_gate, self.gate_logit_normalizer, self.clamp_min = (
            use_output_gate,
            gate_logit_normalizer,
            clamp_min,
        )
        self._make_qkv(num_heads * K, num_kv_heads * K, num_kv_heads * V, use_short_conv, conv_size, conv_bias)
        self.gk_proj = nn.Sequential(
            nn.Linear(hidden_size, gate_low_rank_dim, bias=False), nn.Linear(gate_low_rank_dim, num_kv_heads * K)
        )
        if use_output_gate:
            self.g_proj = nn.Linear(hidden_size, num_heads * V, bias=False)
            self.g_norm_swish_gate = RMSNorm(V, norm_eps, F.silu, elementwise_affine)
        else:
            self.g_norm = RMSNorm(V, norm_eps, None, elementwise_affine)
        self.o_proj = nn.Linear(num_heads * V, hidden_size, bias=False)

    @classmethod
    def _fla_name(cls) -> str:
        return "GatedLinearAttention"

    @classmethod
    def _fla_options(cls, layer: Any) -> tuple[dict[str, Any], dict[str, str]]:
        if layer.feature_map_fn is not None:
            raise refuse(layer, "feature_map", layer.feature_map_fn)
        if layer.use_output_gate and not layer.fuse_norm_and_gate:
            gate = getattr(layer.gate_fn, "__self__", None)  # the autograd function that it is the `apply` of
            if getattr(gate, "__name__", None) != "SwishFunction":
                raise refuse(layer, "gate_fn", gate or layer.gate_fn)
        norm = layer.g_norm_swish_gate if layer.fuse_norm_and_gate else layer.g_norm
        options = {
            "hidden_size": layer.hidden_size,
            "expand_k": layer.expand_k,
            "expand_v": layer.expand_v,
            "num_heads": layer.num_heads,
            "num_kv_heads": layer.num_kv_heads,
            "use_output_gate": layer.use_output_gate,
            "gate_logit_normalizer": layer.gate_logit_normalizer,
            "gate_low_rank_dim": layer.gk_proj[0].out_features,
            "clamp_min": layer.clamp_min,
        }
        renamed = {"g_norm": "g_norm_swish_gate"} if layer.use_output_gate else {}
        return options | fla_conv(layer) | fla_norm(norm), renamed

    def _state_shapes(self) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
        return self._window_shapes(), [(self.num_kv_heads, self.head_k_dim, self.head_v_dim)]

    def _inputs(self, x: Tensor, windows: tuple[Tensor, ...], cu_seqlens: Tensor | None) -> tuple[Any, Any]:
        (q, k, v), after = self._qkv(x, windows, cu_seqlens)
        K, V = self.head_k_dim, self.head_v_dim
        logits = self.gk_proj(x)
        g = F.logsigmoid(logits.to(wide(logits.dtype))) / self.gate_logit_normalizer
        if self.clamp_min is not None:
            g = g.clamp_min(self.clamp_min)
        return (
            q.unflatten(-1, (-1, K)),
            k.unflatten(-1, (-1, K)),
            v.unflatten(-1, (-1, V)),
            g.unflatten(-1, (-1, K)),
        ), after

    def _chunk(self, q, k, v, g, recurrent, cu_seqlens) -> tuple[Tensor, tuple[Tensor, ...]]:
        o, final = gla(q, k, v, g, initial_state=recurrent[0], output_final_state=True, cu_seqlens=cu_seqlens)
        assert final is not None
        return o, (final,)

    def _one(self, q, k, v, g, recurrent) -> Tensor:
        return gla_step(q, k, v, g, recurrent[0])

    def _output(self, o: Tensor, x: Tensor) -> Tensor:
        if self.use_output_gate:
            o = self.g_norm_swish_gate(o, self.g_proj(x).unflatten(-1, (-1, self.head_v_dim)))
        else:
            o = self.g_norm(o)
        return self.o_proj(o.flatten(-2))
