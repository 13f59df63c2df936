"""Fused steps of the token mixers against the modules: outputs and states over hundreds of tokens, and what is refused."""

import pytest
import torch
from instruction_sets import ISAS, check_with
from torch import nn

from icrl_kernels import layers
from icrl_kernels.fused import Program, add_mixer, add_window_attention, bind_state

D = 40
LINEAR, CONV = {"hidden_size": D, "num_heads": 4}, {"use_short_conv": True, "conv_bias": True}
DELTA = {"hidden_size": D, "head_dim": 16, "num_heads": 2}
MAPS = ("elementwise_product", "hedgehog", "t2r", "elu", "relu", "identity")
OPTIONS = [
    *((layers.LinearAttention, {**LINEAR, "feature_map": name}) for name in MAPS),
    (layers.LinearAttention, {**LINEAR, "num_kv_heads": 2, "tie_feature_map_qk": True, "output_norm": "identity"}),
    (
        layers.LinearAttention,
        {**LINEAR, "feature_map": "elu", "norm_q": True, "norm_k": True, "elementwise_affine": False},
    ),
    (layers.LinearAttention, {**LINEAR, "feature_map": "elu", "do_feature_map_norm": True, "num_kv_heads": 1}),
    (layers.LinearAttention, {**LINEAR, "feature_map": "hedgehog", "do_feature_map_norm": True, "expand_v": 2.0}),
    (layers.GLA, LINEAR),
    (layers.GLA, {"hidden_size": 64, "expand_k": 1.0, "num_heads": 1}),
    (layers.GLA, {**LINEAR, **CONV, "num_kv_heads": 2, "use_output_gate": False}),
    (layers.GLA, {**LINEAR, "clamp_min": -0.05, "gate_logit_normalizer": 1, "elementwise_affine": False}),
    (layers.GLA, {**LINEAR, "use_short_conv": True, "conv_size": 1, "expand_v": 2.0}),
    (layers.GSA, LINEAR),
    (layers.GSA, {**LINEAR, **CONV, "num_kv_heads": 2, "num_slots": 16, "scale": None}),
    (layers.GSA, {**LINEAR, "feature_map": "relu", "elementwise_affine": False, "gate_logit_normalizer": 1}),
    (layers.GSA, {**LINEAR, "feature_map": "t2r", "num_slots": 3}),
    (layers.GSA, {**LINEAR, **CONV, "feature_map": "t2r", "num_kv_heads": 1}),
    (layers.GatedDeltaNet, DELTA),
    (layers.GatedDeltaNet, {**DELTA, "use_short_conv": False, "num_v_heads": 6, "output_gate_activation": "sigmoid"}),
    (layers.GatedDeltaNet, {**DELTA, "allow_neg_eigval": True, "conv_bias": True, "conv_size": 3, "use_gate": False}),
    (layers.GatedDeltaNet, {**DELTA, "head_dim": 40, "expand_v": 7.0}),  # V = 280, which the state has as two heads
    (layers.GatedDeltaNet, {**DELTA, "head_dim": 5, "expand_v": 1.0}),
    (layers.KDA, DELTA),
    (layers.KDA, {**DELTA, "lower_bound": -2.0, "num_v_heads": 4, "use_short_conv": False}),
    (layers.KDA, {**DELTA, "allow_neg_eigval": True, "conv_bias": True, "expand_v": 20.0}),
    (layers.RWKV7, {"hidden_size": D, "head_dim": 10}),
    (layers.RWKV7, {"hidden_size": 64, "head_dim": 32, "fuse_norm": True, "elementwise_affine": False}),
    (layers.RWKV7, {"hidden_size": D, "head_dim": 20, "value_dim": 44, "layer_idx": 1, "num_layers": 2}),
]
NAMES = [f"{kind.__name__}-{i}" for i, (kind, _) in enumerate(OPTIONS)]


def made(kind, options, seed=0):
    torch.manual_seed(seed)
    mixer = kind(**options)
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(0.15 * torch.randn_like(p))
    return mixer, nn.LayerNorm(mixer.hidden_size, elementwise_affine=False)


def program(mixer, norm=None, add=False):
    p = Program()
    x, y = p.read("x", mixer.hidden_size), p.rows(mixer.hidden_size)
    if add:
        y = p.read("y0", mixer.hidden_size)
    later = getattr(mixer, "layer_idx", 0) > 0
    first = p.read("v_first", mixer.value_dim) if later else None
    values = add_mixer(p, mixer, x, y, "layer", norm=norm, add=add, v_first=first)
    p.write("y", y)
    if isinstance(mixer, layers.RWKV7):
        p.write("values", values)
    return p


class Fused:
    """`Fused(mixer, batch)(x)` steps on a state of its own."""

    def __init__(self, mixer, batch, group=8):
        self.step, self.mixer = program(mixer).step(batch, group=group), mixer
        self.x, self.y = torch.zeros(2, batch, mixer.hidden_size).unbind()
        self.step.bind(x=self.x, y=self.y)
        if isinstance(mixer, layers.RWKV7):
            self.values, self.first = torch.zeros(2, batch, mixer.value_dim).unbind()
            self.step.bind(values=self.values)
            if mixer.layer_idx:
                self.step.bind(v_first=self.first)
        self.bind(mixer.initial_state(batch))

    def bind(self, state):
        self.state = state
        bind_state(self.step, "layer", state)

    def __call__(self, x, first=None):
        self.x.copy_(x)
        if first is not None:
            self.first.copy_(first)
        self.step.run()
        return self.y.clone()


def differ(found, plain, exact, what):
    """Rounding errors of the size that the module's own step makes."""
    for f, p, e in zip(found, plain, exact, strict=True):
        assert (f - e).norm() <= 4 * (p - e).norm() + 2e-6 * e.norm(), what


@pytest.mark.parametrize(("kind", "options"), OPTIONS, ids=NAMES)
@pytest.mark.parametrize("batch", [1, 7])
def test_steps(kind, options, batch):
    follow(kind, options, batch, tokens=250)


@torch.no_grad()
def follow(kind, options, batch, tokens):
    mixer, _ = made(kind, options)
    later = getattr(mixer, "layer_idx", 0) > 0
    xs = torch.randn(tokens, batch, mixer.hidden_size)
    firsts = torch.randn(tokens, batch, mixer.value_dim) if later else [None] * tokens
    fused, state = Fused(mixer, batch), mixer.initial_state(batch)
    found, plain = [], []
    for x, first in zip(xs, firsts, strict=True):
        found.append(fused(x, first))
        plain.append(mixer.step(x, state, **({"v_first": first} if later else {}))[0])
    exactly = mixer.double()
    given = {"v_first": firsts.double().transpose(0, 1)} if later else {}
    exact, end = exactly(xs.double().transpose(0, 1), **given)
    differ([torch.stack(found)], [torch.stack(plain)], [exact.transpose(0, 1)], "outputs")
    for field in layers.State._fields:
        differ(getattr(fused.state, field), getattr(state, field), getattr(end, field), field)


@pytest.mark.parametrize(("kind", "options"), OPTIONS, ids=NAMES)
@torch.no_grad()
def test_same_bits_in_any_batch_and_group(kind, options):
    mixer, _ = made(kind, options)
    later = getattr(mixer, "layer_idx", 0) > 0
    xs = torch.randn(3, 64, mixer.hidden_size)
    first = torch.randn(64, mixer.value_dim) if later else None
    whole = Fused(mixer, 64)
    together = [whole(x, first) for x in xs]
    for each, group in ((1, 1), (7, 3), (64, 64)):
        parts = Fused(mixer, each, group)
        for begin in range(0, 64 - each + 1, 21):
            here = slice(begin, begin + each)
            parts.bind(mixer.initial_state(each))
            for x, y in zip(xs, together, strict=True):
                assert torch.equal(parts(x[here], None if first is None else first[here]), y[here])
            for field in layers.State._fields:
                for a, b in zip(getattr(parts.state, field), getattr(whole.state, field), strict=True):
                    assert torch.equal(a, b[here])


@pytest.mark.parametrize(("kind", "options"), OPTIONS[::3], ids=NAMES[::3])
@torch.no_grad()
def test_goes_on_from_a_state_that_replaces_its_own(kind, options):
    mixer, _ = made(kind, options)
    later = {"v_first": torch.randn(2, 9, mixer.value_dim)} if getattr(mixer, "layer_idx", 0) else {}
    xs = torch.randn(2, 9, mixer.hidden_size)
    whole, _ = mixer(xs, **later)
    _, state = mixer(xs[:, :8], **{k: v[:, :8] for k, v in later.items()})
    fused = Fused(mixer, 2)
    fused(xs[:, 0], *(v[:, 0] for v in later.values()))
    fused.bind(state.clone())
    torch.testing.assert_close(fused(xs[:, 8], *(v[:, 8] for v in later.values())), whole[:, 8], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "options"), [OPTIONS[10], OPTIONS[-3]])
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
@torch.no_grad()
def test_norm_before_and_sum_after(kind, options, norm):
    mixer, _ = made(kind, options)
    norm = norm(mixer.hidden_size)
    for p in norm.parameters():
        nn.init.normal_(p)
    step = program(mixer, norm, add=True).step(3)
    x, y0, y = torch.randn(3, 3, mixer.hidden_size).unbind()
    state = mixer.initial_state(3)
    step.bind(x=x, y0=y0, y=y)
    if isinstance(mixer, layers.RWKV7):
        step.bind(values=torch.zeros(3, mixer.value_dim))
    bind_state(step, "layer", state)
    step.run()
    normed = x * norm.weight + (norm.bias if hasattr(norm, "bias") else 0)
    wanted, _ = mixer(normed[:, None])
    torch.testing.assert_close(y, y0 + wanted[:, 0], rtol=1e-4, atol=1e-5)
    assert not step.stale
    norm.weight.add_(1)
    assert step.stale


@pytest.mark.parametrize(("kind", "options"), OPTIONS, ids=NAMES)
def test_every_changed_parameter_is_seen(kind, options):
    mixer, _ = made(kind, options)
    step = program(mixer).step(1)
    assert not step.stale
    for name, p in mixer.named_parameters():
        before = step._versions
        with torch.no_grad():
            p.mul_(1)
        assert step._now() != before, name
        step._versions = step._now()


def attend(q, keys, values, slopes):
    """q [H,K], keys and values [n,H,K], oldest first."""
    n = len(keys)
    scores = torch.einsum("hk,nhk->hn", q, keys) * q.shape[1] ** -0.5
    scores = scores - slopes[:, None] * torch.arange(n - 1, -1, -1, dtype=q.dtype)
    return torch.einsum("hn,nhk->hk", scores.softmax(-1), values).flatten()


@pytest.mark.parametrize(("H", "K", "window"), [(1, 16, 1), (3, 5, 4), (2, 32, 33), (4, 16, 100)])
@torch.no_grad()
def test_window_attention(H, K, window):
    torch.manual_seed(0)
    p, B = Program(), 3
    rows = [p.read(name, H * K) for name in "qkv"]
    slopes = torch.rand(H)
    p.write("y", add_window_attention(p, *rows, H, window, "a", slopes))
    step = p.step(B, group=2)
    x = {name: torch.zeros(B, H * K) for name in "qkvy"}
    keys, values = torch.zeros(2, B, H, window, K).unbind()
    length = torch.zeros(B, dtype=torch.int64)
    step.bind(**x, **{"a.keys": keys, "a.values": values, "a.length": length})
    seen = torch.randn(80, 3, B, H * K)
    for t in range(80):
        for name, value in zip("qkv", seen[t], strict=True):
            x[name].copy_(value)
        step.run()
        last = seen[max(0, t + 1 - window) : t + 1].double().unflatten(-1, (H, K))
        for b in range(B):
            wanted = attend(last[-1, 0, b], last[:, 1, b], last[:, 2, b], slopes.double())
            torch.testing.assert_close(x["y"][b].double(), wanted, rtol=1e-5, atol=1e-5)
    assert length.tolist() == [80] * B


def test_attention_that_grows_refuses_a_token_without_room():
    p = Program()
    rows = [p.read(name, 8) for name in "qkv"]
    p.write("y", add_window_attention(p, *rows, 2, 3, "a", grows=True))
    step = p.step(1)
    length = torch.tensor([2])
    step.bind(**{name: torch.zeros(1, 8) for name in "qkvy"}, **{"a.length": length})
    step.bind(**{f"a.{name}": torch.zeros(1, 2, 3, 4) for name in ("keys", "values")})
    step.run()
    with pytest.raises(ValueError, match=r"^a\.length: wanted 0 to 2, got 3"):
        step.run()
    assert length.item() == 3


@pytest.mark.parametrize("isa", ISAS)
def test_instruction_sets(isa):
    script = (
        "torch.set_num_threads(1)\n"
        "for kind, options in OPTIONS:\n"
        "    follow(kind, options, 2, tokens=60)\n"
        "test_window_attention(3, 5, 4), test_window_attention(2, 32, 33)\n"
    )
    check_with(isa, __file__, script)


# ---- what is refused


class Other(layers.GLA):
    def _output(self, o, x):
        return 2 * super()._output(o, x)


def replaced(mixer, name, value):
    setattr(mixer, name, value)
    return mixer


@pytest.mark.parametrize(
    ("mixer", "said"),
    [
        (nn.Linear(8, 8), "module: wanted one of LinearAttention, GLA"),
        (Other(16), "module: wanted GLA's own _output"),
        (layers.GLA(16).double(), "module: wanted float32 on the CPU, got q_proj.weight of torch.float64"),
        (layers.GLA(16).to("meta"), "module: wanted float32 on the CPU, got q_proj.weight of torch.float32 on meta"),
        (replaced(layers.GSA(16), "feature_map", torch.tanh), "feature_map: wanted one of"),
        (
            replaced(layers.LinearAttention(16, feature_map="elu"), "feature_map_k", torch.tanh),
            "feature_map: wanted one of",
        ),
        (layers.RWKV7(16, 8, layer_idx=1, num_layers=2), "v_first: wanted the first layer's"),
    ],
)
def test_mixers_without_a_fused_step(mixer, said):
    p = Program()
    width = getattr(mixer, "hidden_size", 8)
    with pytest.raises(ValueError, match=f"^{said}"):
        add_mixer(p, mixer, p.rows(width), p.rows(width), "layer")


def test_other_gates_and_hooks_are_refused():
    p, mixer = Program(), layers.GLA(16)
    mixer.g_norm_swish_gate.gate = torch.tanh
    with pytest.raises(ValueError, match=r"^gate: wanted silu, sigmoid or none, got tanh"):
        add_mixer(p, mixer, p.rows(16), p.rows(16), "layer")
    mixer = layers.GLA(16)
    mixer.q_proj.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"^module: wanted one without hooks"):
        add_mixer(p, mixer, p.rows(16), p.rows(16), "other")
    with pytest.raises(ValueError, match=r"^v_first: wanted it for RWKV7 alone"):
        add_mixer(p, layers.GLA(16), p.rows(16), p.rows(16), "third", v_first=p.rows(16))
    with pytest.raises(ValueError, match=r"^source, destination: wanted one row"):
        add_mixer(p, layers.GLA(16), p.rows(16, 2), p.rows(16), "fourth")


def test_states_are_judged():
    mixer, _ = made(*OPTIONS[12])
    fused = Fused(mixer, 2)
    for other, said in (
        (made(*OPTIONS[10])[0].initial_state(2), "state: wanted"),
        (mixer.initial_state(3), r"layer\.conv0: wanted shape"),
        (made(*OPTIONS[16])[0].initial_state(2), r"layer\.conv0: wanted shape"),
    ):
        with pytest.raises(ValueError, match=f"^{said}"):
            fused.bind(other)


# One op of each kind that is as it should be, and what may not be changed in it.
def ops_of(kind):
    for of, options in OPTIONS:
        p = program(made(of, options)[0])
        for i, op in enumerate(p.ops):
            if op[0] == kind:
                return p, i
    p = Program()
    rows = [p.read(name, 8) for name in "qkv"]
    add_window_attention(p, *rows, 2, 3, "a", torch.rand(2))
    index = p.tensor("i", dtype=torch.int64, below=4)
    p.op("table_row", out=p.rows(8), tensors=[index], weights=[p.weights(torch.zeros(4, 16))], sizes=[4, 0])
    return p, [op[0] for op in p.ops].index(kind)


KINDS = [
    "silu",
    "relu",
    "tanh",
    "elu_plus_one",
    "sigmoid",
    "multiply",
    "affine",
    "lerp",
    "decay",
    "hedgehog",
    "sum_norm",
    "divide_by_last",
    "head_norm",
    "short_conv",
    "token_shift",
    "gla_step",
    "gsa_step",
    "delta_step",
    "rwkv7_step",
    "rwkv7_keys",
    "rwkv7_output",
    "window_attention",
    "table_row",
]


@pytest.mark.parametrize("kind", KINDS)
def test_every_view_size_tensor_and_weight_is_judged(kind):
    if kind == "affine":
        p = Program()
        x, w = p.rows(8), p.weights(torch.ones(8))
        p.op("affine", input=x, out=p.rows(8), weights=[w, w])
        i = 0
    else:
        p, i = ops_of(kind)
    p.step(2)
    name, inp, out, side, more, tensors, weights, sizes, numbers = p.ops[i]
    narrow = lambda v: (v[0], v[1], v[2] - 1)  # noqa: E731
    two = p.rows(max(width for _, width in p.buffers), 2)
    changed = []
    for at, view in ((1, inp), (2, out), (3, side)):
        if view[0] >= 0:
            wrong = (
                [(two.buffer, 0, view[2])]
                + ([narrow(view)] if kind != "table_row" else [])
                + ([(-1, 0, 0)] if at != 3 or kind != "decay" else [])
            )
            changed += [(at, w) for w in wrong]
    for j, view in enumerate(more):
        changed += [(4, [*more[:j], w, *more[j + 1 :]]) for w in (narrow(view), (two.buffer, 0, view[2]))]
    if tensors:
        small = p.tensor("small", 1).number
        changed += [(5, [*tensors[:j], small, *tensors[j + 1 :]]) for j in range(len(tensors))]
        changed += [(5, [])]
    if weights:
        changed += [(6, [*weights[:j], p.floats - p.floats % 16, *weights[j + 1 :]]) for j in range(len(weights))]
    flags = {"decay": (0,), "rwkv7_keys": (1,), "table_row": (1,)}.get(kind, ())
    judged = [j for j in range(len(sizes)) if j not in flags]
    changed += [(7, [s * 1000 + 1 if j == k else s for k, s in enumerate(sizes)]) for j in judged]
    before = p.ops[i]
    for at, value in changed:
        op = list(before)
        op[at] = value
        if tuple(op) == before:
            continue
        p.ops[i] = tuple(op)
        with pytest.raises(ValueError, match=rf"^op {i} \({kind}\): "):
            p.step(2)
