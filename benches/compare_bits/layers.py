"""Calls of the layers, and of other people's models with our ops in them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from calls import (
    add,
    quietly,
)


def layer_calls() -> None:
    import torch
    from torch.utils import _pytree as pytree

    from icrl_kernels import layers

    D = 48
    kinds: dict[str, Callable[[], Any]] = {
        "linear": lambda: layers.LinearAttention(D, num_heads=2),
        "linear normalized": lambda: layers.LinearAttention(
            D, num_heads=4, num_kv_heads=2, feature_map="elu", do_feature_map_norm=True, norm_q=True, norm_k=True
        ),
        "linear hedgehog": lambda: layers.LinearAttention(
            D, num_heads=2, feature_map="hedgehog", output_norm="identity"
        ),
        "linear t2r": lambda: layers.LinearAttention(D, num_heads=2, feature_map="t2r", tie_feature_map_qk=True),
        "gla": lambda: layers.GLA(D, num_heads=4, num_kv_heads=2, gate_low_rank_dim=8),
        "gla conv": lambda: layers.GLA(
            D, num_heads=2, use_short_conv=True, conv_size=3, conv_bias=True, use_output_gate=False, clamp_min=-2.0
        ),
        "gated delta net": lambda: layers.GatedDeltaNet(D, head_dim=16, num_heads=2, expand_v=1.5),
        "gated delta net wide": lambda: layers.GatedDeltaNet(
            D, head_dim=8, num_heads=1, num_v_heads=2, expand_v=33, use_gate=False, allow_neg_eigval=True
        ),
        "gated delta net plain": lambda: layers.GatedDeltaNet(D, head_dim=16, num_heads=2, use_short_conv=False),
        "kda": lambda: layers.KDA(D, head_dim=16, num_heads=2, num_v_heads=4, conv_bias=True),
        "kda plain": lambda: layers.KDA(
            D, head_dim=16, num_heads=2, use_short_conv=False, lower_bound=-5.0, allow_neg_eigval=True
        ),
        "gsa": lambda: layers.GSA(D, num_heads=4, num_kv_heads=2, num_slots=6),
        "gsa conv": lambda: layers.GSA(D, num_heads=2, use_short_conv=True, feature_map="t2r", scale=None),
        "rwkv7": lambda: layers.RWKV7(D, head_dim=16, value_dim=48),
        "rwkv7 fused": lambda: layers.RWKV7(D, head_dim=16, fuse_norm=True, elementwise_affine=False),
    }

    def make(kind: str, dtype: torch.dtype = torch.float32) -> Any:
        torch.manual_seed(3)
        mixer = kinds[kind]()
        for p in mixer.parameters():  # RWKV-7 begins with zeros that hide most of it
            if p.dim() == 2 and not p.any():
                torch.nn.init.normal_(p, std=p.shape[1] ** -0.5)
        return mixer.to(dtype)

    def forward(kind: str, dtype: torch.dtype = torch.float32, cu: bool = False, given: bool = True) -> Any:
        mixer = make(kind, dtype)
        x = torch.randn(1 if cu else 2, 66, D).to(dtype).requires_grad_()
        bounds = torch.tensor([0, 0, 17, 18, 66]) if cu else None
        state = pytree.tree_map(torch.rand_like, mixer.initial_state(4 if cu else 2)) if given else None
        y, final = mixer(x, state, bounds)
        outputs = [y, *pytree.tree_leaves(final)]
        leaves = {"x": x, **dict(mixer.named_parameters())}
        weights = [torch.randn(t.shape).to(t.dtype) for t in outputs]
        grads = torch.autograd.grad(outputs, list(leaves.values()), weights, allow_unused=True)
        return y, final, dict(zip(leaves, grads, strict=True))

    def steps(kind: str, dtype: torch.dtype = torch.float32) -> Any:
        mixer = make(kind, dtype)
        x = torch.randn(3, 5, D).to(dtype)
        state = mixer.initial_state(3)
        with torch.no_grad():
            ys = [mixer.step(x[:, t], state)[0] for t in range(5)]
        return ys, state

    for kind in kinds:
        add(f"layers/{kind}/weights", lambda k=kind: dict(make(k).state_dict()))
        add(f"layers/{kind}/forward", lambda k=kind: forward(k))
        add(f"layers/{kind}/forward bfloat16", lambda k=kind: forward(k, torch.bfloat16))
        add(f"layers/{kind}/forward float64", lambda k=kind: forward(k, torch.float64))
        add(f"layers/{kind}/forward fresh", lambda k=kind: forward(k, given=False))
        add(f"layers/{kind}/forward packed", lambda k=kind: forward(k, cu=True))
        add(f"layers/{kind}/step", lambda k=kind: steps(k))
        add(f"layers/{kind}/step bfloat16", lambda k=kind: steps(k, torch.bfloat16))

    def two_rwkv7() -> Any:
        torch.manual_seed(4)
        first, second = (layers.RWKV7(D, head_dim=16, layer_idx=i, num_layers=2) for i in (0, 1))
        torch.nn.init.normal_(first.o_proj.weight)
        torch.nn.init.normal_(second.o_proj.weight)
        x = torch.randn(2, 20, D)
        y, _, v = first(x, output_v_first=True)
        return second(y, v_first=v)

    add("layers/rwkv7/two", two_rwkv7)
    add("names/layers", lambda: sorted(layers.__all__))


def swap_calls() -> None:
    """Ours in other libraries, where those are installed; both builds are of one environment."""
    import torch

    from icrl_kernels import swap

    common = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "full_attention"],
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    delta = {
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 24,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "num_attention_heads": 2,
    }
    experts = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "num_key_value_heads": 1,
        "head_dim": 16,
    }
    kimi = {
        "num_attention_heads": 2,
        "linear_num_heads": 2,
        "linear_head_dim": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
        "num_key_value_heads": 2,
        "num_experts_per_tok": 2,
        "num_local_experts": 4,
        "moe_intermediate_size": 16,
        "n_group": 1,
        "topk_group": 1,
    }
    models = {"Qwen3Next": {**delta, **experts}, "KimiLinear": kimi, "OlmoHybrid": delta}

    def model(kind: str) -> Any:
        import transformers

        torch.manual_seed(0)
        config = getattr(transformers, f"{kind}Config")(**common, **models[kind])
        net = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
        tokens = torch.randint(61, (2, 70))
        with swap.install("transformers") as installed:
            logits = net(tokens, use_cache=False).logits
            (logits * torch.randn(logits.shape)).sum().backward()
            with torch.no_grad():
                more = net.generate(tokens[:1, :9], max_new_tokens=5, do_sample=False)
        return logits, more, {name: p.grad for name, p in net.named_parameters()}, sorted(installed.names)

    for kind in models:
        add(f"swap/transformers/{kind}", lambda k=kind: quietly(lambda: model(k)))

    def fla(name: str) -> Any:
        module, function = name.split(".")
        found = importlib.import_module(f"fla.ops.{module}")
        n = torch.randn
        q, k, v = n(1, 70, 2, 16), torch.nn.functional.normalize(n(1, 70, 2, 16), dim=-1), n(1, 70, 2, 24)
        state = n(1, 2, 16, 24)
        scalar, channel = -torch.rand(1, 70, 2), -torch.rand(1, 70, 2, 16)
        with swap.install("fla"):
            call = getattr(found, function)
            if module == "gla":
                return call(q, k, v, channel, initial_state=state, output_final_state=True)
            if module == "simple_gla":
                return call(q, k, v, scalar, initial_state=state, output_final_state=True)
            if module == "gsa":
                s, states = torch.rand(1, 70, 2, 6), (n(1, 2, 16, 6), n(1, 2, 6, 24))
                return call(q, k, v, s, -torch.rand(1, 70, 2, 6), initial_state=states, output_final_state=True)
            if module == "rwkv7":
                return call(q, 0.6 * channel, k, v, -k, k * torch.rand(1, 70, 2, 16), initial_state=state,
                            output_final_state=True)  # fmt: skip
            beta = torch.rand(1, 70, 2)
            if module == "delta_rule":
                return call(q, k, v, beta, initial_state=state, output_final_state=True)
            gate = channel if module == "kda" else scalar
            return call(q, k, v, g=gate, beta=beta, initial_state=state, output_final_state=True)

    for name in ("gla.chunk_gla", "gla.fused_recurrent_gla", "simple_gla.chunk_simple_gla", "gsa.chunk_gsa",
                 "delta_rule.chunk_delta_rule", "gated_delta_rule.chunk_gated_delta_rule",
                 "gated_delta_rule.fused_recurrent_gated_delta_rule", "kda.chunk_kda", "rwkv7.chunk_rwkv7"):  # fmt: skip
        add(f"swap/fla/{name}", lambda n=name: quietly(lambda: fla(n)))
    add("names/swap", lambda: sorted(swap.__all__))
