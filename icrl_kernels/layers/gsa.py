"""The token mixer of gated slot attention."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from icrl_kernels.layers._base import ConvolvedMixer, RMSNorm, at_least_one, fla_conv, head_dims, refuse, wide
from icrl_kernels.layers.linear_attention import T2R
from icrl_kernels.linear_attention.common import MAX_HEAD_DIM
from icrl_kernels.linear_attention.gsa import gsa, gsa_step

FEATURE_MAPS = {"swish": F.silu, "silu": F.silu, "relu": F.relu}
FLA_MAPS = {"SwishFeatureMap": "silu", "ReLUFeatureMap": "relu", "T2RFeatureMap": "t2r"}


class GSA(ConvolvedMixer):
    """Gated slot attention (Zhang et al. 2024, "Gated Slot Attention for Efficient Linear-Time Sequence Modeling",
    section 3).

    q, k = φ(W_q x), φ(W_k x), v = silu(W_v x); the log-decay of each of M slots is g = log σ(W_f x) / gate_logit_normalizer
    and what a token writes to it s = 1 − exp g. K̃_t = diag(exp g_t) K̃_{t-1} + s_t k_tᵀ and Ṽ alike with v,
    o_t = Ṽ_tᵀ softmax(scale · K̃_t q_t); y = W_o RMSNorm(silu(o)), the norm over all heads' channels at once.

    Args:
        hidden_size: D, of the tokens, and of the values of all query heads.
        expand_k: all query heads' key channels, as a multiple of D.
        num_heads: query heads. num_kv_heads: heads of k, v, g and the slots; a divisor of num_heads, default the same.
        use_short_conv: a causal convolution of `conv_size` taps and a silu after each of W_q, W_k, W_v.
        num_slots: M, of each head; default K.
        elementwise_affine: whether the norm has a weight. norm_eps: what it adds to the mean square.
        gate_logit_normalizer: 8 makes decays start near 1.
        feature_map: φ: "silu" ("swish"), "relu" or "t2r" (relu of a learned linear map).
        scale: of the slots' scores; None is K^-1/2.

    Parameters are named as in flash-linear-attention's `GatedSlotAttention`: its state_dict loads, and `from_fla` copies
    its options too. That layer's output ignores its norm_eps, use_norm and use_output_gate, and so do the copies.
    """

    def __init__(
        self,
        hidden_size: int = 1024,
        expand_k: float = 1.0,
        num_heads: int = 4,
        num_kv_heads: int | None = None,
        use_short_conv: bool = False,
        conv_size: int = 4,
        conv_bias: bool = False,
        num_slots: int | None = None,
        elementwise_affine: bool = True,
        norm_eps: float = 1e-5,
        gate_logit_normalizer: float = 8,
        feature_map: str = "silu",
        scale: float | None = 1.0,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        hidden_size, num_heads, num_kv_heads = at_least_one(
            hidden_size=hidden_size, num_heads=num_heads, num_kv_heads=num_kv_heads
        )
        K, V = head_dims(hidden_size, num_heads, num_kv_heads, expand_k, 1.0)
        M = K if num_slots is None else num_slots
        (M,) = at_least_one(num_slots=M)
        if M > MAX_HEAD_DIM:
            raise ValueError(f"num_slots: wanted at most {MAX_HEAD_DIM} slots per head, got {M}")
        if not gate_logit_normalizer > 0:
            raise ValueError(f"gate_logit_normalizer: wanted a number above 0, got {gate_logit_normalizer}")
        if feature_map != "t2r" and feature_map not in FEATURE_MAPS:
            raise ValueError(f"feature_map: wanted one of {', '.join(FEATURE_MAPS)}, t2r, got {feature_map!r}")
        self.hidden_size, self.num_heads, self.num_kv_heads = hidden_size, num_heads, num_kv_heads
        self.head_k_dim, self.head_v_dim, self.num_slots = K, V, M
        self.gate_logit_normalizer, self.scale = gate_logit_normalizer, scale
        self.feature_map = T2R(K) if feature_map == "t2r" else FEATURE_MAPS[feature_map]
        self._make_qkv(num_heads * K, num_kv_heads * K, num_kv_heads * V, use_short_conv, conv_size, conv_bias)
        self.f_proj = nn.Linear(hidden_size, num_kv_heads * M, bias=False)
        self.g_norm = RMSNorm(hidden_size, norm_eps, None, elementwise_affine)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    @classmethod
    def _fla_name(cls) -> str:
        return "GatedSlotAttention"

    @classmethod
    def _fla_options(cls, layer: Any) -> tuple[dict[str, Any], dict[str, str]]:
        if layer.value_dim != layer.hidden_size:
            raise refuse(layer, "expand_v", layer.expand_v)  # its own norm does not fit it either
        options = {
            "hidden_size": layer.hidden_size,
            "expand_k": layer.expand_k,
            "num_heads": layer.num_heads,
            "num_kv_heads": layer.num_kv_heads,
            "num_slots": layer.num_slots,
            "elementwise_affine": layer.g_norm.weight is not None,
            "gate_logit_normalizer": layer.gate_logit_normalizer,
            "feature_map": FLA_MAPS[type(layer.feature_map).__name__],
            "scale": layer.scale,
        }
        return options | fla_conv(layer), {}

    def _state_shapes(self) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
        H, K, V, M = self.num_kv_heads, self.head_k_dim, self.head_v_dim, self.num_slots
        return self._window_shapes(), [(H, K, M), (H, M, V)]

    def _inputs(self, x: Tensor, windows: tuple[Tensor, ...], cu_seqlens: Tensor | None) -> tuple[Any, Any]:
        (q, k, v), after = self._qkv(x, windows, cu_seqlens)
        q, k = (self.feature_map(t.unflatten(-1, (-1, self.head_k_dim))) for t in (q, k))
        v = F.silu(v).unflatten(-1, (-1, self.head_v_dim))
        logits = self.f_proj(x).unflatten(-1, (-1, self.num_slots))
        g = F.logsigmoid(logits.to(wide(logits.dtype))) / self.gate_logit_normalizer
        return (q.to(v.dtype), k.to(v.dtype), v, -g.expm1().to(v.dtype), g), after

    def _chunk(self, q, k, v, s, g, recurrent, cu_seqlens) -> tuple[Tensor, tuple[Tensor, ...]]:
        o, final = gsa(q, k, v, s, g, self.scale, recurrent, output_final_state=True, cu_seqlens=cu_seqlens)
        assert final is not None
        return o, final

    def _one(self, q, k, v, s, g, recurrent) -> Tensor:
        return gsa_step(q, k, v, s, g, recurrent, self.scale)

    def _output(self, o: Tensor, x: Tensor) -> Tensor:
        return self.o_proj(self.g_norm(F.silu(o.flatten(-2))))
