"""flash-linear-attention with our ops in it, on a CPU: the same outputs, states and gradients as with its own naive torch.

Its layers run here with the Triton kernels around the sequence mixing (convolutions, norms, RWKV-7's element-wise ones)
put into torch by `triton_free`. On a GPU none of this has been run.
"""

from __future__ import annotations

import importlib
import inspect

import pytest
import torch
import torch.nn.functional as F
from wide import Wide

from icrl_kernels import swap
from icrl_kernels.swap import _fla
from icrl_kernels.testing import assert_as_good_as_torch

pytest.importorskip("fla", minversion="0.6")
pytestmark = pytest.mark.filterwarnings("ignore")  # its own, of platforms and of sequences shorter than heads


@pytest.fixture(autouse=True)
def clean():
    yield
    swap.uninstall()


# Their naive functions under the arguments of those that the layers call


def naive(name):
    package = next(p for p, functions in _fla.FUNCTIONS.items() if name in functions)
    path = {"generalized_delta_rule": "generalized_delta_rule.dplr", "rwkv7": "generalized_delta_rule.dplr"}
    module = importlib.import_module(f"fla.ops.{path.get(package, package)}.naive")
    compute = {
        "delta_rule": delta_rule,
        "gated_delta_rule": gated,
        "generalized_delta_rule": dplr,
        "gla": gla,
        "gsa": gsa,
        "kda": gated,
        "rwkv7": rwkv7,
        "simple_gla": simple_gla,
    }[package]

    def function(*args, initial_state=None, output_final_state=False, state_v_first=False, **options):
        assert not args
        options.pop("cu_seqlens", None)
        if initial_state is not None and state_v_first:
            initial_state = initial_state.transpose(-1, -2)
        o, state = compute(module, initial_state=initial_state, output_final_state=True, **options)
        if not output_final_state:
            state = None
        return o, state.transpose(-1, -2) if state_v_first and state is not None else state

    return function


def first(tensors):
    return [t.transpose(1, 2) for t in tensors]  # heads before tokens


def gla(module, *, q, k, v, g=None, gk=None, **states):
    return module.naive_recurrent_gla(q, k, v, g if gk is None else gk, **states)


def simple_gla(module, *, q, k, v, g=None, g_gamma=None, **states):
    if g is None:
        g = torch.zeros_like(q[..., 0]) if g_gamma is None else g_gamma.expand(q.shape[:3])
    return module.naive_recurrent_simple_gla(q, k, v, g, **states)


def gsa(module, *, q, k, v, s, g, scale=None, **states):
    return module.naive_recurrent_gsa(q, k, v, s, g, scale, **states)


def l2norm(x):
    return x.float() * (x.float().square().sum(-1, keepdim=True) + 1e-6).rsqrt()


def delta_rule(module, *, q, k, v, beta, use_qk_l2norm_in_kernel=False, **states):
    dtype = q.dtype
    if use_qk_l2norm_in_kernel:
        q, k = l2norm(q), l2norm(k)
    o, state = module.delta_rule_recurrence(*first((q, k, v, beta)), **states)
    return o.transpose(1, 2).to(dtype), state


def gated(module, *, q, k, v, g, beta, use_gate_in_kernel=False, A_log=None, dt_bias=None, lower_bound=None, **options):
    dtype = q.dtype
    kda = g.dim() == 4
    gates = importlib.import_module(module.__name__.replace("naive", "gate"))
    if use_gate_in_kernel and lower_bound is not None:
        g = gates.naive_kda_lowerbound_gate(g, A_log, dt_bias, lower_bound)
    elif use_gate_in_kernel:
        g = (gates.naive_kda_gate if kda else gates.naive_gdn_gate)(g, A_log, dt_bias)
    if options.pop("use_beta_sigmoid_in_kernel", False):
        beta = beta.float().sigmoid() * (2 if options.pop("allow_neg_eigval", False) else 1)
    if options.pop("use_qk_l2norm_in_kernel", False):
        q, k = l2norm(q), l2norm(k)
    options = {name: x for name, x in options.items() if name in ("scale", "initial_state", "output_final_state")}
    if kda:
        o, state = module.naive_recurrent_kda(q, k, v, g, beta, **options)
    else:
        q, k = (t.repeat_interleave(v.shape[2] // t.shape[2], 2) for t in (q, k))
        o, state = module.naive_recurrent_gated_delta_rule(q, k, v, beta, g, **options)
    return o.to(dtype), state


def dplr(module, *, q, k, v, a, b, gk, **states):
    o, state = module.dplr_recurrence(*first((q, k, v)), *first((a, b)), gk.transpose(1, 2), **states)
    return o.transpose(1, 2), state


def rwkv7(module, *, r, w, k, v, a, b=None, kk=None, scale=1.0, initial_state, output_final_state, **hints):
    if kk is not None:
        a, b = -kk.float(), kk.float() * a.float()
    o, state = dplr(
        module,
        q=r.float() * scale * r.shape[-1] ** 0.5,
        **dict(k=k, v=v, a=a.float(), b=b, gk=w, initial_state=initial_state, output_final_state=output_final_state),
    )
    return o.to(r.dtype), state


# Functions

B, H, K, V, M = 2, 4, 16, 24, 8


def tensors(names, T, dtype, heads=H):
    torch.manual_seed(T)
    sizes = {"v": V, "s": M, "beta": None}
    made = {}
    for name in names:
        size = () if name in ("beta", "g1") else (sizes.get(name, K),)
        shape = (B, T, heads if name in ("q", "k") else H, *size)
        made[name] = torch.randn(shape) if name != "beta" else torch.rand(shape)
        if name in ("g", "gk", "w"):
            made[name] = F.logsigmoid(made[name])  # gates stay float32
        elif name == "g1":
            made["g"] = F.logsigmoid(made.pop("g1"))
        else:
            made[name] = made[name].to(dtype)
    return made


CASES = {  # functions; inputs; what else is asked for
    "gla": (("chunk_gla",), "q k v g", {}),
    "gla recurrent": (("fused_recurrent_gla",), "q k v gk", {}),
    "simple gla": (
        ("chunk_simple_gla", "fused_chunk_simple_gla", "fused_recurrent_simple_gla"),
        "q k v g1",
        {"scale": 0.3},
    ),
    "gamma": (("chunk_simple_gla", "fused_recurrent_simple_gla"), "q k v", {"g_gamma": -torch.arange(1, H + 1) / 8}),
    "no gate": (("chunk_simple_gla", "fused_recurrent_simple_gla"), "q k v", {}),
    "delta rule": (("chunk_delta_rule", "fused_recurrent_delta_rule"), "q k v beta", {"use_qk_l2norm_in_kernel": True}),
    "gated delta rule": (
        ("chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"),
        "q k v g1 beta",
        {"use_qk_l2norm_in_kernel": True, "scale": 0.3},
    ),
    "kda": (("chunk_kda", "fused_recurrent_kda"), "q k v g beta", {"use_qk_l2norm_in_kernel": True}),
    "gsa": (("chunk_gsa", "fused_recurrent_gsa"), "q k v s gs", {"scale": 0.3}),
    "rwkv7": (("chunk_rwkv7", "fused_recurrent_rwkv7"), "r w k v a b", {"scale": 1.0}),
    "dplr": (("chunk_dplr_delta_rule", "fused_recurrent_dplr_delta_rule"), "q k v a b gk", {}),
}


def make(case, T, dtype):
    names = CASES[case][1].split()
    grouped = H // 2 if case in ("gated delta rule", "kda") else H
    inputs = tensors([n for n in names if n != "gs"], T, dtype, grouped)
    if case == "gsa":
        inputs |= {"g": F.logsigmoid(torch.randn(B, T, H, M)), "s": inputs["s"].sigmoid()}
        state = torch.randn(B, H, K, M), torch.randn(B, H, M, V)
    else:
        state = torch.randn(B, H, K, V)
    if "a" in inputs:  # a contraction
        norm = F.normalize(inputs["a"].float(), dim=-1)
        inputs |= {"a": -norm.to(dtype), "b": (norm * torch.rand(B, T, H, K)).to(dtype)}
    if case == "delta rule":
        inputs["k"] = F.normalize(inputs["k"].float(), dim=-1).to(dtype)
    return inputs, state


def flat(result):
    o, state = result
    return [o, *(state if isinstance(state, (tuple, list)) else [state])]


def run(function, inputs, state, grad, **options):
    """Outputs, states and, where asked for, the gradients of all of the inputs."""
    inputs = {name: t.detach().clone().requires_grad_(grad) for name, t in inputs.items()}
    states = [t.detach().clone().requires_grad_(grad) for t in (state if isinstance(state, tuple) else [state])]
    state = tuple(states) if isinstance(state, tuple) else states[0]
    results = flat(function(**inputs, initial_state=state, output_final_state=True, **options))
    if grad:
        sum((t.float() * torch.linspace(-1, 1, t.numel()).view(t.shape)).sum() for t in results).backward()
    return [t.detach() for t in results] + ([t.grad for t in (*inputs.values(), *states)] if grad else [])


def module_of(name):
    package = next(p for p, functions in _fla.FUNCTIONS.items() if name in functions)
    return importlib.import_module(f"fla.ops.{package}")


def compare_functions(case, T, dtype, roundings):
    names, _, options = CASES[case]
    inputs, state = make(case, T, dtype)
    double = {name: t.double() for name, t in inputs.items()}
    wide_state = tuple(t.double() for t in state) if isinstance(state, tuple) else state.double()
    swap.install("fla")
    for grad in (True, False):
        for name in names:
            plain = run(naive(name), inputs, state, grad, **options)
            with Wide():
                exact = run(naive(name), double, wide_state, grad, **options)
            function = getattr(module_of(name), name)
            ours = run(function, inputs, state, grad, **options)
            if not isinstance(state, tuple) and "state_v_first" in function.__wrapped__.__code__.co_varnames:
                turned = run(function, inputs, state.mT.contiguous(), False, state_v_first=True, **options)
                assert torch.equal(turned[1].mT, run(function, inputs, state, False, **options)[1])
            for i, (a, b, c) in enumerate(zip(ours, plain, exact, strict=True)):
                assert a.dtype == b.dtype
                assert_as_good_as_torch(a, b, c, name=f"{name} {i}", roundings=roundings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T", [1, 37])
@pytest.mark.parametrize("case", CASES)
def test_functions_compute_the_same(case, T, dtype):
    compare_functions(case, T, dtype, 4.0)


CONFIGURATIONS = {  # and the case of the functions that its layers call
    "GLAConfig": "gla",
    "GSAConfig": "gsa",
    "RetNetConfig": "simple gla",
    "LinearAttentionConfig": "no gate",
    "DeltaNetConfig": "delta rule",
    "GatedDeltaNetConfig": "gated delta rule",
    "KDAConfig": "kda",
    "RWKV7Config": "rwkv7",
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_heads_of_their_default_configurations(name, monkeypatch):
    config = getattr(importlib.import_module("fla.models"), name)()
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_heads
    keys, values = int(head * getattr(config, "expand_k", 1)), int(head * getattr(config, "expand_v", 1))
    sizes = {"B": 1, "H": 2, "K": keys, "V": values, "M": getattr(config, "num_slots", M)}
    for symbol, size in sizes.items():
        monkeypatch.setitem(globals(), symbol, size)
    compare_functions(CONFIGURATIONS[name], 3, torch.float32, 8.0)  # sums over up to 512 channels


@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("case", ["gated delta rule", "kda"])
def test_gates_computed_within(case, bounded):
    """use_gate_in_kernel and use_beta_sigmoid_in_kernel, gradients of A_log and dt_bias included."""
    names = CASES[case][0]
    if bounded and case != "kda":
        names = ()
    inputs, state = make(case, 20, torch.float32)
    inputs |= {"A_log": torch.randn(H), "dt_bias": torch.randn(inputs["g"].shape[2:]).flatten()}
    flags = ("use_gate_in_kernel", "use_qk_l2norm_in_kernel", "use_beta_sigmoid_in_kernel", "allow_neg_eigval")
    options = dict.fromkeys(flags, True) | ({"lower_bound": -5.0} if bounded else {})
    for name in names:
        plain = run(naive(name), inputs, state, True, **options)
        with Wide():
            exact = run(naive(name), {n: t.double() for n, t in inputs.items()}, state.double(), True, **options)
        with swap.install("fla"):
            ours = run(getattr(module_of(name), name), inputs, state, True, **options)
        for i, (a, b, c) in enumerate(zip(ours, plain, exact, strict=True)):
            assert_as_good_as_torch(a, b, c, name=f"{name} {i}")


def test_what_is_made_of_simple_gla_is_served():
    retention = importlib.import_module("fla.ops.retention")
    lightning = importlib.import_module("fla.ops.lightning_attn")
    linear = importlib.import_module("fla.ops.linear_attn")
    inputs, _ = make("no gate", 20, torch.float32)
    log = (1 - 2.0 ** (-5.0 - torch.arange(H))).log()
    slopes = -(8 / H * (1 - 1 / 4)) * torch.arange(H)
    expected = {gamma: naive("chunk_simple_gla")(**inputs, g_gamma=g)[0] for gamma, g in (("r", log), ("l", slopes))}
    with swap.install("fla"):
        for f in (retention.chunk_retention, retention.fused_recurrent_retention, retention.parallel_retention):
            torch.testing.assert_close(f(**inputs)[0], expected["r"], rtol=1e-4, atol=1e-5)
        for f in (lightning.chunk_lightning_attn, lightning.fused_recurrent_lightning_attn):
            torch.testing.assert_close(f(**inputs, layer_idx=1, num_layers=4)[0], expected["l"], rtol=1e-4, atol=1e-5)
        for f in (linear.chunk_linear_attn, linear.fused_recurrent_linear_attn):
            o = f(**inputs, normalize=False)[0]
            torch.testing.assert_close(o, naive("chunk_simple_gla")(**inputs)[0], rtol=1e-4, atol=1e-5)


# Layers


@pytest.fixture
def triton_free(monkeypatch):
    """What the layers call besides the sequence mixing, in torch: their own references where there are some."""
    conv = importlib.import_module("fla.modules.causal_conv1d.ops")
    layernorm = importlib.import_module("fla.modules.norm.layernorm")
    gated_norm = importlib.import_module("fla.modules.norm.fused_norm_gate")
    layer_gsa = importlib.import_module("fla.layers.gsa")
    layer_rwkv7 = importlib.import_module("fla.layers.rwkv7")
    layer_delta = importlib.import_module("fla.layers.gated_deltanet")

    def convolution(self, x, cache=None, output_final_state=False, **options):
        T, W = x.shape[1], self.kernel_size[0]
        x = x.transpose(1, 2)
        x = torch.cat([x.new_zeros(*x.shape[:2], W) if cache is None else cache, x], -1)
        y = F.silu(F.conv1d(x, self.weight, self.bias, groups=self.groups)[..., -T:]).transpose(1, 2)
        return y, x[..., -W:].clone() if output_final_state else None

    def rms_norm(self, x):
        return self.weight * (x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt())

    def rms_norm_gated(self, x, g):
        return rms_norm(self, x) * (F.silu(g) if self.activation in ("swish", "silu") else g.sigmoid())

    def rms_norm_linear(x, norm_weight, norm_bias, weight, bias):
        return F.linear(norm_weight * (x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt()), weight, bias)

    def token_shift(x, cu_seqlens, output_cache, cache):
        before = torch.zeros_like(x[:, :1]) if cache is None else cache
        return torch.cat([before, x[:, :-1]], 1) - x, x[:, -1:]

    monkeypatch.setattr(conv.ShortConvolution, "forward", convolution)
    monkeypatch.setattr(layer_delta.GatedDeltaNet, "_use_fused_qkv_conv", lambda self, **options: False)
    monkeypatch.setattr(layernorm.RMSNorm, "forward", rms_norm)
    monkeypatch.setattr(gated_norm.FusedRMSNormGated, "forward", rms_norm_gated)
    monkeypatch.setattr(importlib.import_module("fla.modules.feature_map"), "swish", F.silu)
    monkeypatch.setattr(layer_gsa, "rms_norm_linear", rms_norm_linear)
    monkeypatch.setattr(layer_rwkv7, "token_shift", token_shift)
    ops = (
        importlib.import_module("fla.ops.rwkv7.fused_addcmul"),
        importlib.import_module("fla.ops.rwkv7.fused_k_update"),
    )
    gate = importlib.import_module("fla.ops.rwkv7.gate_output_correction")
    monkeypatch.setattr(layer_rwkv7, "fused_addcmul_rwkv7", ops[0].torch_addcmul_rwkv7)
    monkeypatch.setattr(layer_rwkv7, "fused_k_rwkv7", ops[1].k_update_ref)
    monkeypatch.setattr(layer_rwkv7, "gate_output_correction", gate.gate_output_correction_ref)


LAYERS = {  # class; module; its arguments; the functions that it calls
    "gla": (
        "GatedLinearAttention",
        "gla",
        dict(num_heads=2, use_short_conv=True),
        ("chunk_gla", "fused_recurrent_gla"),
    ),
    "simple gla": (
        "SimpleGatedLinearAttention",
        "simple_gla",
        dict(num_heads=2),
        ("chunk_simple_gla", "fused_recurrent_simple_gla"),
    ),
    "delta net": ("DeltaNet", "delta_net", dict(num_heads=2), ("chunk_delta_rule", "fused_recurrent_delta_rule")),
    "gated delta net": (
        "GatedDeltaNet",
        "gated_deltanet",
        dict(num_heads=2, num_v_heads=4, head_dim=16, expand_v=1, allow_neg_eigval=True),
        ("chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"),
    ),
    "kda": (
        "KimiDeltaAttention",
        "kda",
        dict(num_heads=2, num_v_heads=4, head_dim=16),
        ("chunk_kda", "fused_recurrent_kda"),
    ),
    "gsa": (
        "GatedSlotAttention",
        "gsa",
        dict(num_heads=4, num_kv_heads=2, num_slots=8, use_short_conv=True),
        ("chunk_gsa", "fused_recurrent_gsa"),
    ),
    "rwkv7": (
        "RWKV7Attention",
        "rwkv7",
        dict(head_dim=16, decay_low_rank_dim=8, gate_low_rank_dim=8, a_low_rank_dim=8, num_hidden_layers=2),
        ("chunk_rwkv7", "fused_mul_recurrent_rwkv7"),
    ),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_layers_compute_the_same(kind, triton_free, monkeypatch):
    cache = importlib.import_module("fla.models.utils").Cache
    name, module, sizes, functions = LAYERS[kind]
    module = importlib.import_module(f"fla.layers.{module}")
    torch.manual_seed(0)
    layer = getattr(module, name)(hidden_size=64, layer_idx=0, **sizes)
    for p in layer.parameters():  # some begin as zeros or ones
        p.data += 0.1 * torch.randn_like(p)
    x = torch.randn(2, 70, 64)

    def train(layer, x):
        layer.zero_grad()
        x = x.clone().requires_grad_()
        o = layer(x)[0]
        (o * torch.linspace(-1, 1, o.numel()).view(o.shape)).sum().backward()
        gradients = {n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None}
        return {"o": o.detach(), "x": x.grad, **gradients}

    @torch.no_grad()
    def decode(layer, x):
        """The first 9 tokens, then one at a time."""
        kept = cache()
        parts = [x[:, :9], *x[:, 9:14].split(1, 1)]
        return torch.cat([layer(part, past_key_values=kept, use_cache=True)[0] for part in parts], 1)

    with monkeypatch.context() as m:
        for function in functions:
            m.setattr(module, function, naive(function))
        theirs, decoded = train(layer, x), decode(layer.eval(), x)
        with Wide():
            exact = train(layer.train().double(), x.double())
            exact_decoded = decode(layer.eval(), x.double())
    layer = layer.float().train()
    with swap.install("fla") as installed:
        assert {f"{module.__name__}.{f}" for f in functions} <= set(installed.names)
        ours = train(layer, x)
        our_decoded = decode(layer.eval(), x)
    assert ours.keys() == exact.keys()
    for n, reference in exact.items():
        assert_as_good_as_torch(ours[n], theirs[n], reference, name=n)
    assert_as_good_as_torch(our_decoded, decoded, exact_decoded, name="decoded")


@pytest.mark.parametrize(
    "kind", [kind if kind == "gla" else pytest.param(kind, marks=pytest.mark.slow) for kind in LAYERS]
)
def test_packed_sequences_are_separate_ones(kind, fla):
    """Its layers keep their short convolutions and token shifts apart themselves, in Triton kernels; our ops do with them."""
    name, module, sizes, _ = LAYERS[kind]
    module = importlib.import_module(f"fla.layers.{module}")
    torch.manual_seed(0)
    layer = getattr(module, name)(hidden_size=64, layer_idx=0, **sizes)
    for p in layer.parameters():
        p.data += 0.1 * torch.randn_like(p)
    lengths = [5, 1, 3, 9]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    x = torch.randn(1, sum(lengths), 64)
    with swap.install("fla"):
        packed = layer(x, cu_seqlens=cu_seqlens)[0]
        alone = torch.cat([layer(piece)[0] for piece in x.split(lengths, 1)], 1)
        torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)
        weight = torch.randn_like(packed)
        gradients = [
            torch.autograd.grad((o * weight).sum(), list(layer.parameters()), allow_unused=True)
            for o in (packed, alone)
        ]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_uninstall_restores_exactly():
    modules = [importlib.import_module(f"fla.layers.{m}") for m in ("gla", "gated_deltanet", "rwkv7", "raven", "yoco")]
    before = [dict(vars(m)) for m in modules]
    with swap.install("fla") as installed:
        assert len({n.rsplit(".", 1)[1] for n in installed.names} - {"chunk_gdn", "fused_recurrent_gdn"}) == 19
        assert all(any(vars(m)[n] is not x for n, x in b.items()) for m, b in zip(modules, before, strict=True))
        assert not any("transformers" in n for n in installed.names)
        swap.uninstall("transformers")
        assert swap._installed("fla")
    assert [dict(vars(m)) for m in modules] == before


TAKES = [
    (p, n, inspect.signature(getattr(importlib.import_module(f"fla.ops.{p}"), n)))
    for p, fs in _fla.FUNCTIONS.items()
    for n in fs
]


def call_of(package, name, signature, dtypes=None, heads=H):
    """Their function as it stands now, and inputs that it takes."""
    inputs = {
        n: torch.randn(B, 5, heads, K)
        for n in ("q", "k", "v", "r", "w", "a", "b", "kk", "gk")
        if n in signature.parameters
    }
    if "s" in signature.parameters:
        inputs["s"] = torch.rand(B, 5, heads, M)
    if "beta" in signature.parameters:
        inputs["beta"] = torch.rand(B, 5, heads)
    if "g" in signature.parameters:
        wide = {"gla": (K,), "kda": (K,), "gsa": (M,)}.get(package, ())
        inputs["g"] = -torch.rand(B, 5, heads, *wide)
    for n in ("gk", "w"):
        if n in inputs and (n == "w" or "gv" not in signature.parameters or package == "gla"):
            inputs[n] = -inputs[n].abs()
    if package == "gated_delta_rule":
        inputs.pop("gk", None)
    inputs |= {n: inputs[n].to(dtype) for n, dtype in (dtypes or {}).items() if n in inputs}
    return getattr(importlib.import_module(f"fla.ops.{package}"), name), inputs


@pytest.mark.parametrize(("package", "name", "signature"), TAKES)
def test_arguments_of_every_function(package, name, signature):
    """What a function does not read is refused by name, or is a TypeError where it takes no **kwargs; nothing is swallowed."""
    takes_more = any(p.kind == p.VAR_KEYWORD for p in signature.parameters.values())
    with swap.install("fla"):
        f, inputs = call_of(package, name, signature)
        o = f(**inputs)[0]
        served = {"A_log", "dt_bias", "use_gate_in_kernel", *_fla._HINTS, *signature.parameters}
        for unknown in ("window", "g", "gk", "gv", "g_gamma", "lower_bound", "state_v_first", "transpose_state_layout"):
            if unknown in served or (unknown == "transpose_state_layout" and "state_v_first" in signature.parameters):
                continue
            with pytest.raises(ValueError if takes_more else TypeError, match=unknown):
                f(**inputs, **{unknown: torch.zeros(1) if unknown != "state_v_first" else True})
        for option in ("reverse", "use_graph", "cp_context", "return_intermediate_states", "output_attentions", "gv"):
            if option in signature.parameters:
                with pytest.raises(ValueError, match=f"{option}: {name} as served|{option}: .* as served"):
                    f(**inputs, **{option: torch.zeros(1) if option == "gv" else True})
        for needed, parameter in signature.parameters.items():
            if parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD:
                with pytest.raises(TypeError, match=needed):
                    f(**{n: t for n, t in inputs.items() if n != needed})
        if takes_more:
            assert torch.equal(f(**inputs, window=None)[0], o)


@pytest.mark.parametrize(("package", "name", "signature"), TAKES)
def test_the_old_name_of_state_v_first(package, name, signature):
    if "state_v_first" not in signature.parameters:
        return
    with swap.install("fla"):
        f, inputs = call_of(package, name, signature)
        inputs |= {"initial_state": torch.randn(B, H, K, K), "output_final_state": True}
        if not any(p.kind == p.VAR_KEYWORD for p in signature.parameters.values()):
            with pytest.raises(TypeError, match="transpose_state_layout"):
                f(**inputs, transpose_state_layout=True)
            return
        wanted = f(**inputs, state_v_first=True)
        with pytest.warns(DeprecationWarning, match="renamed to `state_v_first`") as warned:
            got = f(**inputs, transpose_state_layout=True)
        assert warned[0].filename == __file__
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
        with pytest.warns(DeprecationWarning, match="renamed"):
            assert torch.equal(f(**inputs, transpose_state_layout=False)[1], f(**inputs)[1])
        for old in (True, False):
            with pytest.raises(ValueError, match="transpose_state_layout: wanted state_v_first, its new name, alone"):
                f(**inputs, state_v_first=True, transpose_state_layout=old)


OF_Q = {  # by their sources: o.to(q.dtype) at the end, where the others leave empty_like(v)
    *("chunk_delta_rule", "chunk_dplr_delta_rule", "chunk_gated_delta_rule", "chunk_kda", "chunk_rwkv7"),
    *("chunk_simple_gla", "fused_chunk_simple_gla", "fused_recurrent_delta_rule", "fused_recurrent_gla"),
    *("fused_recurrent_gsa", "fused_recurrent_simple_gla", "parallel_simple_gla"),
}


@pytest.mark.parametrize(("package", "name", "signature"), TAKES)
def test_mixed_dtypes(package, name, signature):
    with swap.install("fla"):
        for of_q, of_v in ((torch.bfloat16, torch.float32), (torch.float32, torch.float16)):
            f, inputs = call_of(package, name, signature, {"q": of_q, "r": of_q, "v": of_v})
            same = {n: t.float() for n, t in inputs.items()}
            o, wanted = f(**inputs)[0], f(**same)[0]
            assert o.dtype == (of_q if name in OF_Q else of_v)
            assert_as_good_as_torch(o, wanted.to(o.dtype), wanted.double())
            if name == "fused_recurrent_gsa":
                assert f(**{n: t[:, :1] for n, t in inputs.items()})[0].dtype == of_v


def test_refusals():
    ops = importlib.import_module("fla.ops")
    inputs, state = make("gla recurrent", 5, torch.float32)
    with swap.install("fla"):
        recurrent, chunk = ops.gla.fused_recurrent_gla, ops.simple_gla.chunk_simple_gla
        with pytest.raises(ValueError, match="reverse: "):
            recurrent(**inputs, reverse=True)
        with pytest.raises(ValueError, match="gv: "):
            recurrent(**inputs, gv=inputs["v"])
        del inputs["gk"]
        with pytest.raises(ValueError, match="g: wanted at most one"):
            chunk(**inputs, g=torch.zeros(B, 5, H), g_gamma=torch.zeros(H))
        with pytest.raises(ValueError, match="output_attentions"):
            ops.simple_gla.parallel_simple_gla(**inputs, output_attentions=True)
        gates = dict(g=torch.zeros(B, 5, H), beta=torch.ones(B, 5, H), use_gate_in_kernel=True)
        with pytest.raises(ValueError, match="A_log: wanted"):
            ops.gated_delta_rule.chunk_gated_delta_rule(**inputs, **gates)
        with pytest.raises(ValueError, match="g: without it"):
            ops.gsa.chunk_gsa(**inputs, s=torch.zeros(B, 5, H, M))
        with pytest.raises(ValueError, match="initial_state"):
            chunk(**inputs, initial_state=state[:1])
        positional = chunk(inputs["q"], inputs["k"], inputs["v"], None, None, 0.5)[0]
        assert torch.equal(positional, chunk(**inputs, scale=0.5)[0])
        with pytest.raises(TypeError):
            chunk(inputs["q"], **inputs)
