"""Other people's models with our ops in them: the same logits, gradients and generated tokens as with their own torch code."""

from __future__ import annotations

import copy
import importlib
import re
import textwrap
from pathlib import Path
from unittest import mock

import pytest
import torch
from wide import Wide

from icrl_kernels import swap
from icrl_kernels.swap import _ops
from icrl_kernels.testing import assert_as_good_as_torch

pytestmark = pytest.mark.filterwarnings("ignore:Triton is not supported:UserWarning")


def delta_inputs(B=2, T=70, Hk=2, H=4, K=16, V=24, channel=False, dtype=torch.float32):
    torch.manual_seed(T + K)
    q, k = (torch.randn(B, T, Hk, K).to(dtype) for _ in range(2))
    v = torch.randn(B, T, H, V).to(dtype)
    g = -torch.rand(B, T, H, K) if channel else -torch.rand(B, T, H)
    return q, k, v, g, torch.rand(B, T, H).to(dtype), torch.randn(B, H, K, V)


# transformers

COMMON = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    layer_types=["linear_attention", "full_attention"],
    pad_token_id=0,
    bos_token_id=None,
    eos_token_id=None,
)
ATTENTION = dict(num_attention_heads=2, num_key_value_heads=1, head_dim=16)
GATED_DELTA = dict(linear_key_head_dim=16, linear_value_head_dim=24, linear_num_key_heads=2, linear_num_value_heads=4)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16)
LATENT = dict(kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16, num_key_value_heads=2)
KIMI_EXPERTS = dict(num_experts_per_tok=2, num_local_experts=4, moe_intermediate_size=16, n_group=1, topk_group=1)

INDEXER = dict(indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=16, indexer_budget=64, indexer_compress_ratio=4)
KIMI = dict(num_attention_heads=2, linear_num_heads=2, linear_head_dim=16, **LATENT)
GLM = dict(
    layer_types=["linear_attention", "indexed_attention"],
    q_lora_rank=16,
    hc_mult=2,
    index_head_dim=16,
    index_n_heads=2,
    index_topk=128,
    index_kpool=4,
    n_routed_experts=4,
)

MODELS = {  # configuration, model, sizes
    "bailing_hybrid": ("BailingHybridConfig", "BailingHybridForCausalLM", {**KIMI, "head_dim": 16, **KIMI_EXPERTS}),
    "glm5_next": ("Glm5NextTextConfig", "Glm5NextTextModel", {**KIMI, **KIMI_EXPERTS, **GLM, "qk_rope_head_dim": 0}),
    "kimi_linear": ("KimiLinearConfig", "KimiLinearForCausalLM", {**KIMI, **KIMI_EXPERTS}),
    "olmo_hybrid": ("OlmoHybridConfig", "OlmoHybridForCausalLM", {"num_attention_heads": 2, **GATED_DELTA}),
    "qwen3_5": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM", {**ATTENTION, **GATED_DELTA}),
    "qwen3_5_moe": ("Qwen3_5MoeTextConfig", "Qwen3_5MoeForCausalLM", {**ATTENTION, **GATED_DELTA, **EXPERTS}),
    "qwen3_next": ("Qwen3NextConfig", "Qwen3NextForCausalLM", {**ATTENTION, **GATED_DELTA, **EXPERTS}),
    "qwen4_exp": (
        "Qwen4ExpTextConfig",
        "Qwen4ExpForCausalLM",
        {**ATTENTION, **GATED_DELTA, **EXPERTS, **INDEXER, "hc_count": 2, "hc_lowrank": 8},
    ),
}


@pytest.fixture(autouse=True)
def clean():
    yield
    swap.uninstall()


@pytest.fixture
def transformers(monkeypatch):
    """The package, its functions their plain torch code, which flash-linear-attention takes the place of when installed."""
    package = pytest.importorskip("transformers", minversion="5.20")
    for module, name, _ in swap._transformers.find():
        if hasattr(module, name):
            monkeypatch.setattr(module, name, getattr(module, name).__wrapped__)
    return package


def build(model_type):
    config, model, sizes = MODELS[model_type]
    module = importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    config = getattr(module, config)(**{**COMMON, **sizes})
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    return getattr(module, model)(config).eval()


def logits_and_gradients(model, tokens):
    model.zero_grad()
    logits = model(tokens, use_cache=False)[0]
    logits.square().mean().backward()
    return {"logits": logits.detach(), **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}


def written(model, prompt):
    return model.generate(prompt, max_new_tokens=8, do_sample=False) if hasattr(model, "lm_head") else prompt


@pytest.mark.parametrize("model_type", MODELS)
def test_models_compute_the_same(transformers, model_type, monkeypatch):
    names = ("gated_delta_rule", "gated_delta_rule_step")
    ops = {name: mock.Mock(wraps=getattr(_ops, name)) for name in names}
    for name, op in ops.items():
        monkeypatch.setattr(_ops, name, op)
    model = build(model_type)
    tokens = torch.randint(1, 61, (2, 70))
    theirs, their_tokens = logits_and_gradients(model, tokens), written(model, tokens[:, :9])
    with swap.install("transformers"):  # after the model was built
        ours, our_tokens = logits_and_gradients(model, tokens), written(model, tokens[:, :9])
        built_after = build(model_type)(tokens, use_cache=False)[0]
    # one layer computes it: a forward of each model, a prompt, a token at a time
    assert [op.call_count for op in ops.values()] == ([3, 7] if hasattr(model, "lm_head") else [2, 0])
    with Wide():
        exact = logits_and_gradients(model.double(), tokens)
    assert any("A_log" in name for name in exact)
    for name, reference in exact.items():
        if (
            "_hc." in name
        ):  # a few numbers near 0, what large ones leave: theirs in float32 are right by luck or are not
            continue
        assert reference.dtype == torch.float64
        assert_as_good_as_torch(ours[name], theirs[name], reference, name=name)
    assert torch.equal(ours["logits"], built_after)
    assert torch.equal(our_tokens, their_tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T", [1, 70])
def test_functions_compute_the_same(transformers, T, dtype):
    """Each function of each model, with a state and a gradient through all that has one."""
    found = [(m, n, getattr(m, n)) for m, n, _ in swap._transformers.find() if hasattr(m, n) and "conv" not in n]
    assert len(found) == 16
    installed = swap.install("transformers")
    for module, name, theirs in found:
        kimi = "kimi" in name
        inputs = delta_inputs(T=T, Hk=4 if kimi else 2, channel=kimi, dtype=dtype)

        def run(function, tensors):
            tensors = [t.detach().clone().requires_grad_() for t in tensors]
            *most, state = tensors
            o, final = function(
                *most,
                initial_state=state,
                output_final_state=True,
                use_qk_l2norm_in_kernel=True,
                output_attentions=False,
            )
            (o.sin().sum() + final.cos().sum()).backward()
            return o.detach(), final.detach(), *(t.grad for t in tensors)

        assert f"{module.__name__}.{name}" in installed.names
        ours = run(getattr(module, name), inputs)
        with torch.no_grad():
            *most, state = inputs
            kept = state.clone()
            decoded = getattr(module, name)(
                *most, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True
            )
            assert torch.equal(state, kept)
            assert getattr(module, name)(*most, initial_state=state)[1] is None
        plain = run(theirs, inputs)
        with Wide():
            exact = run(theirs, [t.double() for t in inputs])
        for i, (a, b, c) in enumerate(zip(ours, plain, exact, strict=True)):
            assert a.dtype == b.dtype
            assert a.is_contiguous()
            assert_as_good_as_torch(a, b, c, name=f"{module.__name__}.{name} {i}")
        for a, b, c in zip(decoded, plain[:2], exact[:2], strict=True):
            assert a.dtype == b.dtype
            assert_as_good_as_torch(a, b, c, name=f"{module.__name__}.{name} without gradients")


def test_every_model_is_served(transformers):
    """A newer transformers may have more; this names them."""
    models = Path(transformers.__file__).parent / "models"
    functions = re.compile(r"^def (\w*(?:gated_delta_rule|kimi_delta_attention))\(", re.M)
    have = {(p.parent.name, f) for p in models.glob("*/modeling_*.py") for f in functions.findall(p.read_text())}
    served = {(m.__name__.split(".")[2], n) for m, n, _ in swap._transformers.find() if hasattr(m, n)}
    assert have == {(model, name) for model, name in served if "conv" not in name}
    assert len(served - have) == len(MODELS) - len(MIXED)


def test_uninstall_restores_exactly(transformers):
    before = {(m, n): getattr(m, n, None) for m, n, _ in swap._transformers.find()}
    module = importlib.import_module("transformers.models.qwen3_next.modeling_qwen3_next")
    first = swap.install("transformers")
    assert len(first.names) == 22
    ours = module.torch_chunk_gated_delta_rule
    assert swap.install("transformers").names == []  # twice is once
    assert module.torch_chunk_gated_delta_rule is ours
    module.later = ours  # as of a module that imports it by name after the swap
    try:
        swap.uninstall("transformers")
        assert module.later is before[module, "torch_chunk_gated_delta_rule"]
    finally:
        del module.later
    assert before == {(m, n): getattr(m, n, None) for m, n, _ in swap._transformers.find()}
    assert not swap._originals
    swap.uninstall()  # nothing to undo is no error
    with pytest.raises(RuntimeError, match="inside"), swap.install("transformers"):
        raise RuntimeError("inside")
    assert module.torch_chunk_gated_delta_rule is before[module, "torch_chunk_gated_delta_rule"]


def test_an_ended_swap_is_not_entered_again(transformers):
    with swap.install("transformers") as installed:
        pass
    with pytest.raises(RuntimeError, match="ended"), installed:
        pass


LENGTHS = [11, 1, 2, 16]
MIXED = ("glm5_next", "qwen4_exp")  # other parts of these models read across packed sequences


def packing(dtype=torch.int32):
    cu_seqlens = torch.tensor([0, *LENGTHS], dtype=dtype).cumsum(0, dtype=dtype)
    seq_idx = torch.arange(len(LENGTHS), dtype=torch.int32).repeat_interleave(torch.tensor(LENGTHS))[None]
    return cu_seqlens, seq_idx


@pytest.mark.parametrize("model_type", MODELS)
def test_packed_sequences_are_separate_ones(transformers, model_type):
    """In the recurrence and in the convolution before it: outputs and gradients."""
    model = build(model_type)
    tokens = torch.randint(1, 61, (1, sum(LENGTHS)))
    cu_seqlens, seq_idx = packing()
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    packed = dict(position_ids=positions, cu_seq_lens_q=cu_seqlens, cu_seq_lens_k=cu_seqlens, max_length_q=max(LENGTHS))

    def outputs_and_gradients(outputs):
        model.zero_grad()
        outputs.square().mean().backward()
        return {
            "outputs": outputs.detach(),
            **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None},
        }

    with swap.install("transformers"):
        if model_type in MIXED:
            with pytest.raises(ValueError, match=rf"(cu_seqlens|cu_seq_lens_q): .*{model_type}"):
                model(tokens, use_cache=False, **packed)
            return
        alone = torch.cat([model(piece, use_cache=False)[0] for piece in tokens.split(LENGTHS, 1)], 1)
        alone = outputs_and_gradients(alone)
        for extra in ({}, {"seq_idx": seq_idx}):
            together = outputs_and_gradients(model(tokens, use_cache=False, **packed, **extra)[0])
            assert together.keys() == alone.keys()
            for name, wanted in alone.items():
                torch.testing.assert_close(
                    together[name], wanted, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
                )


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_packed_functions(transformers, dtype):
    module = importlib.import_module("transformers.models.qwen3_next.modeling_qwen3_next")
    kimi = importlib.import_module("transformers.models.kimi_linear.modeling_kimi_linear")
    cu_seqlens, seq_idx = packing(dtype)
    spans = [slice(a, b) for a, b in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)]
    with swap.install("transformers"):
        for f, name in (
            (module.torch_chunk_gated_delta_rule, "cu_seqlens"),
            (kimi.chunk_kimi_delta_attention, "cu_seq_lens_q"),
        ):
            q, k, v, g, beta, _ = delta_inputs(B=1, T=30, Hk=4, channel=f is kimi.chunk_kimi_delta_attention)
            o, final = f(q, k, v, g=g, beta=beta, output_final_state=True, **{name: cu_seqlens})
            for n, part in enumerate(spans):
                one = {"g": g[:, part], "beta": beta[:, part], "output_final_state": True}
                alone, last = f(*(t[:, part] for t in (q, k, v)), **one)
                torch.testing.assert_close(o[:, part], alone)
                torch.testing.assert_close(final[n : n + 1], last)
        x, weight = torch.randn(1, 8, 30), torch.randn(8, 4)
        y = module.causal_conv1d_fn(x, weight, None, "silu", cu_seq_lens_q=cu_seqlens, seq_idx=seq_idx)
        for part in spans:
            torch.testing.assert_close(y[..., part], module.causal_conv1d_fn(x[..., part], weight, None, "silu"))
        for wrong, message in (
            (dict(cu_seq_lens_q=cu_seqlens[:-1]), "cu_seqlens: wanted a non-decreasing sequence from 0 to T=30"),
            (dict(seq_idx=seq_idx), "seq_idx: the short convolution without cu_seq_lens_q"),
        ):
            with pytest.raises(ValueError, match=message):
                module.causal_conv1d_fn(x, weight, **wrong)
        with pytest.raises(ValueError, match="cu_seqlens: packed sequences want a batch of B=1, got B=2"):
            module.causal_conv1d_fn(x.expand(2, -1, -1), weight, cu_seq_lens_q=cu_seqlens)


class Chosen(torch.nn.Module):
    """As transformers' layers were until 5.14: what they call is chosen when they are built."""

    def __init__(self, module):
        super().__init__()
        self.chunk_gated_delta_rule = module.torch_chunk_gated_delta_rule
        self.recurrent_gated_delta_rule = module.torch_recurrent_gated_delta_rule


def test_functions_chosen_when_a_model_was_built(transformers, monkeypatch):
    """Layers built before the swap get our functions, and layers built during it get theirs back."""
    module = importlib.import_module("transformers.models.qwen3_next.modeling_qwen3_next")
    theirs = module.torch_chunk_gated_delta_rule, module.torch_recurrent_gated_delta_rule
    monkeypatch.setattr(Chosen, "__module__", module.__name__)
    kind = type("Derived", (Chosen,), {})  # of a module of its own
    model = torch.nn.Sequential(Chosen(module), kind(module))
    monkeypatch.setattr(module, "is_fast_path_available", False, raising=False)

    def chosen(layer):
        return layer.chunk_gated_delta_rule, layer.recurrent_gated_delta_rule

    q, k, v, g, beta, _ = delta_inputs(B=1, T=30)
    plain = theirs[0](q, k, v, g=g, beta=beta)[0]
    with swap.install("transformers"):
        ours = module.torch_chunk_gated_delta_rule, module.torch_recurrent_gated_delta_rule
        assert not set(ours) & set(theirs)
        model.append(Chosen(module))
        model.append(copy.deepcopy(model[0]))
        assert [chosen(layer) for layer in model] == [ours] * 4
        swapped = model[0].chunk_gated_delta_rule(q, k, v, g=g, beta=beta)[0]
        torch.testing.assert_close(swapped, plain, rtol=1.3e-6, atol=2e-5)  # torch's own rounding is the processor's
        with pytest.raises(ValueError, match=r"cu_seqlens: .*this version of transformers does not keep packed"):
            model[0].chunk_gated_delta_rule(q, k, v, g=g, beta=beta, cu_seqlens=packing()[0])
    assert [chosen(layer) for layer in model] == [theirs] * 4


def test_functions_of_flash_linear_attention_in_transformers(transformers, monkeypatch):
    """Until 5.14, transformers' layers called them under their own names where they served."""
    fla = pytest.importorskip("fla.ops.gated_delta_rule")
    module = importlib.import_module("transformers.models.qwen3_next.modeling_qwen3_next")
    monkeypatch.setattr(module, "chunk_gated_delta_rule", fla.chunk_gated_delta_rule, raising=False)
    q, k, v, g, beta, _ = delta_inputs(B=1, T=30, Hk=4)
    theirs = fla.chunk_gated_delta_rule
    with swap.install("transformers"):
        assert fla.chunk_gated_delta_rule is theirs
        assert module.chunk_gated_delta_rule is not theirs
        o = module.chunk_gated_delta_rule(q, k, v, g=g, beta=beta, use_qk_l2norm_in_kernel=True)[0]
        swap.uninstall("fla")
        assert module.chunk_gated_delta_rule is not theirs
    torch.testing.assert_close(
        o, module.torch_chunk_gated_delta_rule(q, k, v, g=g, beta=beta, use_qk_l2norm_in_kernel=True)[0]
    )
    assert module.chunk_gated_delta_rule is theirs


def test_refusals(transformers):
    module = importlib.import_module("transformers.models.qwen3_next.modeling_qwen3_next")
    with pytest.raises(ValueError, match="package: wanted one of fla, transformers"):
        swap.install("torchvision")
    with pytest.raises(ValueError, match="package: wanted one of fla, transformers"):
        swap.uninstall("torchvision")
    q, k, v, g, beta, state = delta_inputs()
    with swap.install("transformers"):
        f = module.torch_chunk_gated_delta_rule
        for extra in (
            dict(scale=1.0),
            dict(use_gate_in_kernel=True),
            dict(cp_context=object()),
            dict(state_v_first=True),
        ):
            with pytest.raises(ValueError, match=f"{next(iter(extra))}: .*cannot honour"):
                f(q, k, v, g, beta, **extra)
        with pytest.raises(ValueError, match="seq_idx"):
            f(q, k, v, g, beta, seq_idx=torch.zeros(2, 70))
        with pytest.raises(ValueError, match="g: wanted natural logarithms"):
            f(q, k, v, -g, beta)
        with pytest.raises(ValueError, match="initial_state"):
            f(q, k, v, g, beta, initial_state=state[:1])
        f(q, k, v, g, beta, state_v_first=False, scale=None, position_ids=torch.arange(70))


@pytest.mark.parametrize("package", ["transformers", "fla"])
def test_documented_examples_run(package):
    pytest.importorskip(package)
    blocks = re.findall(r"(?:^ {4}.*\n|^\n(?= {4}))+", swap.__doc__, re.M)
    [block] = [b for b in blocks if f'install("{package}")' in b]
    names = {"torch": torch}
    exec(textwrap.dedent(block), names)
    assert swap._originals == {}
    if package == "fla":
        assert names["state"].shape == (1, 4, 32, 32)
