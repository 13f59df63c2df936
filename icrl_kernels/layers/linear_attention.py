"""The token mixer of linear attention, with its feature maps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from icrl_kernels.layers._base import Linear, RMSNorm, TokenMixer, at_least_one, fill, fla_norm, head_dims, refuse, wide
from icrl_kernels.linear_attention.common import MAX_HEAD_DIM, MAX_VALUE_DIM
from icrl_kernels.linear_attention.gla import gla, gla_step

NORMALIZER_EPSILON = 1e-10


class ElementwiseProduct(nn.Module):
    """φ(x) = (W_1 x + b_1) ⊙ (W_2 x + b_2): what two learned projections agree on."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.layer1, self.layer2 = nn.Linear(size, size), nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer1(x) * self.layer2(x)


def _identity(layer: nn.Linear) -> None:
    fill(layer.weight, torch.eye(layer.in_features, dtype=layer.weight.dtype, device=layer.weight.device))
    nn.init.zeros_(layer.bias)


class Hedgehog(nn.Module):
    """φ(x) = softmax([2z, −2z]), z = W x + b, W the identity at first (Zhang et al. 2024). Twice as many features."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.layer = Linear(size, size).start(_identity)

    def forward(self, x: Tensor) -> Tensor:
        z = 2 * self.layer(x)
        return torch.cat([z, -z], -1).softmax(-1)


class T2R(nn.Module):
    """φ(x) = relu(W x) (Kasai et al. 2021)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.layer = nn.Linear(size, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.layer(x))


def elu_plus_one(x: Tensor) -> Tensor:
    """φ(x) = elu(x) + 1, always positive, without the cancellation of adding 1 to exp(x) − 1 (Katharopoulos et al. 2020)."""
    return torch.where(x > 0, x + 1, x.clamp_max(0).exp())


LEARNED = {"elementwise_product": ElementwiseProduct, "hedgehog": Hedgehog, "t2r": T2R}


def identity(x: Tensor) -> Tensor:
    return x


FIXED: dict[str, Callable[[Tensor], Tensor]] = {"elu": elu_plus_one, "relu": F.relu, "identity": identity}
FLA_MAPS = {
    "HadamardFeatureMap": "elementwise_product",
    "HedgehogFeatureMap": "hedgehog",
    "T2RFeatureMap": "t2r",
    "elu_p1": "elu",
    "ReLU": "relu",
    "Identity": "identity",
}


class LinearAttention(TokenMixer):
    """Linear attention (Katharopoulos et al. 2020, "Transformers are RNNs", eq. 8-12).

    q = φ_q(W_q x), k = φ_k(W_k x), v = W_v x; S_t = S_{t-1} + k_t v_tᵀ, o_t = K^-1/2 · S_tᵀ q_t, divided by
    K^-1/2 · q_t · Σ_{s≤t} k_s when do_feature_map_norm; y = W_o RMSNorm(o), the norm over each head's channels.

    Args:
        hidden_size: D, of the tokens.
        expand_k, expand_v: all query heads' key (value) channels, as a multiple of D.
        num_heads: query heads. num_kv_heads: heads of k, v and the state; a divisor of num_heads, default the same.
        feature_map: φ: "elementwise_product" (default), "hedgehog", "t2r", "elu" (the paper's elu + 1), "relu" or
            "identity".
        tie_feature_map_qk: whether φ_q and φ_k share their weights, where they have some.
        output_norm: "rmsnorm" or "identity".
        norm_q, norm_k: divide q (k) by its sum over channels, plus 1e-4.
        do_feature_map_norm: divide o as above (the paper's eq. 9). It is one more channel of v, of ones, and so V is at
            most 255; the state is [K, V + 1].
        elementwise_affine: whether the norm has a weight. norm_eps: what it adds to the mean square.

    Parameters are named as in flash-linear-attention's `LinearAttention`: its state_dict loads, and `from_fla` copies
    its options too (all but feature_map="dpfp").
    """

    def __init__(
        self,
        hidden_size: int = 1024,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        num_heads: int = 8,
        num_kv_heads: int | None = None,
        feature_map: str = "elementwise_product",
        tie_feature_map_qk: bool = False,
        output_norm: str = "rmsnorm",
        norm_q: bool = False,
        norm_k: bool = False,
        do_feature_map_norm: bool = False,
        elementwise_affine: bool = True,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        hidden_size, num_heads, num_kv_heads = at_least_one(
            hidden_size=hidden_size, num_heads=num_heads, num_kv_heads=num_kv_heads
        )
        K, V = head_dims(hidden_size, num_heads, num_kv_heads, expand_k, expand_v)
        self.feature_dim = 2 * K if feature_map == "hedgehog" else K
        for name, size, most in (
            ("feature_map", self.feature_dim, MAX_HEAD_DIM),
            ("do_feature_map_norm", V + do_feature_map_norm, MAX_VALUE_DIM),
        ):
            if size > most:
                raise ValueError(f"{name}: wanted at most {most} channels per head, got {size} with it")
        self.hidden_size, self.num_heads, self.num_kv_heads = hidden_size, num_heads, num_kv_heads
        self.head_k_dim, self.head_v_dim = K, V
        self.norm_q, self.norm_k, self.do_feature_map_norm = norm_q, norm_k, do_feature_map_norm
        if feature_map in LEARNED:
            self.feature_map_q = LEARNED[feature_map](K)
            self.feature_map_k = self.feature_map_q if tie_feature_map_qk else LEARNED[feature_map](K)
        elif feature_map in FIXED:
            self.feature_map_q = self.feature_map_k = FIXED[feature_map]
        else:
            raise ValueError(f"feature_map: wanted one of {', '.join((*LEARNED, *FIXED))}, got {feature_map!r}")
        if output_norm not in ("rmsnorm", "identity"):
            raise ValueError(f"output_norm: wanted 'rmsnorm' or 'identity', got {output_norm!r}")
        self.q_proj = nn.Linear(hidden_size, num_heads * K, bias=False)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * K, bias=False)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * V, bias=False)
        self.norm = RMSNorm(V, norm_eps, None, elementwise_affine) if output_norm == "rmsnorm" else nn.Identity()
        self.o_proj = Linear(num_heads * V, hidden_size, bias=False)

    @classmethod
    def _fla_options(cls, layer: Any) -> tuple[dict[str, Any], dict[str, str]]:
        feature_map = layer.feature_map_q
        name = FLA_MAPS.get(getattr(feature_map, "__name__", type(feature_map).__name__))
        if name is None:
            raise refuse(layer, "feature_map", feature_map)
        normed = hasattr(layer.norm, "eps")
        options = {
            "hidden_size": layer.hidden_size,
            "expand_k": layer.key_dim / layer.hidden_size,
            "expand_v": layer.value_dim / layer.hidden_size,
            "num_heads": layer.num_heads,
            "num_kv_heads": layer.num_kv_heads,
            "feature_map": name,
            "tie_feature_map_qk": name in LEARNED and layer.feature_map_k is feature_map,
            "output_norm": "rmsnorm" if normed else "identity",
            "norm_q": layer.norm_q,
            "norm_k": layer.norm_k,
            "do_feature_map_norm": layer.do_feature_map_norm,
        }
        return options | (fla_norm(layer.norm) if normed else {}), {}

    def _state_shapes(self) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
        return [], [(self.num_kv_heads, self.feature_dim, self.head_v_dim + self.do_feature_map_norm)]

    def _inputs(self, x: Tensor, windows: tuple[Tensor, ...], cu_seqlens: Tensor | None) -> tuple[Any, Any]:
        q = self.feature_map_q(self.q_proj(x).unflatten(-1, (-1, self.head_k_dim)))
        k = self.feature_map_k(self.k_proj(x).unflatten(-1, (-1, self.head_k_dim)))
        v = self.v_proj(x).unflatten(-1, (-1, self.head_v_dim))
        if self.norm_q:
            q = q / (q.sum(-1, keepdim=True) + 1e-4)
        if self.norm_k:
            k = k / (k.sum(-1, keepdim=True) + 1e-4)
        if self.do_feature_map_norm:
            v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
        # autocast makes some feature maps float32; a sum over a long sequence does not fit float16
        dtype = wide(v.dtype) if self.do_feature_map_norm else v.dtype
        return (q.to(dtype), k.to(dtype), v.to(dtype)), ()

    def _chunk(self, q, k, v, recurrent, cu_seqlens) -> tuple[Tensor, tuple[Tensor, ...]]:
        o, final = gla(q, k, v, None, initial_state=recurrent[0], output_final_state=True, cu_seqlens=cu_seqlens)
        assert final is not None
        return o, (final,)

    def _one(self, q, k, v, recurrent) -> Tensor:
        return gla_step(q, k, v, None, recurrent[0])

    def _output(self, o: Tensor, x: Tensor) -> Tensor:
        if self.do_feature_map_norm:
            o = (o[..., :-1] / (o[..., -1:] + NORMALIZER_EPSILON)).to(x.dtype)
        return self.o_proj(self.norm(o).flatten(-2))
