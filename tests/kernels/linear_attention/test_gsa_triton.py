"""The Triton kernels of gsa, on a GPU or in Triton's interpreter (in float32: its bfloat16 is wrong)."""

import itertools

import pytest
import torch

from icrl_kernels import gsa as public_gsa
from icrl_kernels import gsa_reference
from icrl_kernels import gsa_step as public_gsa_step
from icrl_kernels.testing import assert_as_good_as_torch

pytest.importorskip("triton")
from tiles import BLOCKS, WIDE, chosen, meta, tokens

from icrl_kernels.linear_attention.triton import gla, gsa

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
INPUTS = ["q", "k", "v", "s", "g", "keys", "values"]
NAMES = ["o", "final_keys", "final_values"] + ["d" + name for name in INPUTS]
GATED = [False, True]


def inputs(B=1, T=100, H=2, Hk=2, K=16, V=16, M=16, gated=True, strength=0.1, init=True, lengths=None):
    r = torch.Generator().manual_seed(0)
    N = B if lengths is None else len(lengths)
    q, k, v, s = (torch.randn(B, T, heads, D, generator=r) for heads, D in [(H, K), (Hk, K), (Hk, V), (Hk, M)])
    g = -strength * torch.rand(B, T, Hk, M, generator=r) if gated else None
    keys, values = torch.randn(N, Hk, K, M, generator=r), torch.randn(N, Hk, M, V, generator=r)
    cu = None if lengths is None else torch.tensor([0, *torch.tensor(lengths).cumsum(0)])
    if not init:
        keys = values = None
    return [None if x is None else x.to(DEVICE) for x in (q, k, v, s, g, keys, values, cu)]


def forward(q, k, v, s, g, keys, values, cu, scale=0.25):
    return gsa.forward(q, k, v, s, g, scale, keys, values, cu)


def expected(tensors, dtype, weights=None, scale=0.25):
    """Outputs and final states of the recurrence in `dtype`, and with weights for these, the gradients."""
    x = [None if a is None else a.to(dtype).requires_grad_(weights is not None) for a in tensors[:7]]
    init = None if x[5] is None else (x[5], x[6])
    o, final = gsa_reference(*x[:5], scale, init, True, tensors[7])
    results = [o, *final]
    if weights is None:
        return results
    wanted = [a for a in x if a is not None]
    loss = sum((a * w.to(dtype)).sum() for a, w in zip(results, weights, strict=True))
    grads = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
    return [a.detach() for a in results] + list(grads)


def backward(weights, q, k, v, s, g, keys, values, cu, scale=0.25):
    return gsa.backward(*weights, q, k, v, s, g, scale, keys, values, cu)


def weights_for(tensors):
    """Gradients of the outputs and of the final states."""
    *tokens, keys, values, cu = tensors
    q, k, v, s = tokens[:4]
    N = q.shape[0] if cu is None else len(cu) - 1
    shapes = (
        (*q.shape[:3], v.shape[3]),
        (N, k.shape[2], k.shape[3], s.shape[3]),
        (N, k.shape[2], s.shape[3], v.shape[3]),
    )
    return [torch.randn(shape).to(DEVICE) for shape in shapes]


def check(tensors, roundings=4.0):
    """Outputs, final states and every gradient against the recurrence in float64, as good as it is in float32."""
    weights = weights_for(tensors)
    exact, plain = expected(tensors, torch.float64, weights), expected(tensors, torch.float32, weights)
    mine = [*forward(*tensors), *(x for x in backward(weights, *tensors) if x is not None)]
    names = NAMES[:3] + [n for n, x in zip(NAMES[3:], tensors, strict=False) if x is not None]
    assert len(mine) == len(names) == len(exact)
    for name, a, same, ref in zip(names, mine, plain, exact, strict=True):
        # dg is a sum of terms whose roundings stay where the terms cancel
        assert_as_good_as_torch(a, same, ref, name=name, roundings=128.0 if name == "dg" else roundings)


@pytest.fixture
def short_segments(monkeypatch):
    """Two chunks a segment, so that small tests have several segments."""
    monkeypatch.setattr(gla, "_segment_length", lambda tokens, heads: 128)


@pytest.mark.parametrize("gated", GATED)
@pytest.mark.parametrize(
    "sizes",
    [
        {"T": 1},
        {"T": 300, "Hk": 1},
        {"T": 63, "K": 20, "V": 36, "M": 24, "H": 4},
        {"B": 2, "T": 65, "K": 16, "V": 5, "M": 3, "init": False},
        {"T": 129, "K": 1, "V": 33, "M": 17, "H": 3, "Hk": 1},
    ],
    ids=str,
)
def test_shapes(sizes, gated, short_segments):
    check(inputs(**sizes, gated=gated))


def check_tile(K, V, M, gated, group):
    """In one row gates are mild, in the other the second launch does some or all."""
    tensors = inputs(B=2, T=tokens(K, V, M), H=group, Hk=1, K=K, V=V, M=M, gated=gated)
    if gated:
        tensors[4][1, 8:] *= 300.0
    check(tensors, roundings=32.0)


STEPS = [
    (16, 16, 16),
    (30, 60, 32),
    (13, 120, 128),
    (13, 30, 128),
    (64, 30, 64),
    (128, 256, 20),
    (250, 512, 9),
    (512, 40, 30),
]
STEPS += [(16, 1000, 40), (16, 2048, 40), (16, 4096, 40), (512, 4096, 5), (16, 16, 512), (16, 16, 256)]
TILES = [(16, 16, 16), (30, 120, 32), (64, 32, 60), (256, 60, 13), (128, 250, 16), (16, 13, 128), (512, 16, 16)]
TILES += [(30, 300, 32), (64, 13, 128), (128, 16, 100), (256, 9, 64)]


@pytest.mark.parametrize("gated", GATED)
@pytest.mark.parametrize(("K", "V", "M"), TILES)
def test_every_tile_that_a_plan_can_choose(K, V, M, gated):
    check_tile(K, V, M, gated, 2)


@pytest.mark.slow
@pytest.mark.parametrize("gated", GATED)
@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize(("K", "V", "M"), list(itertools.product(BLOCKS[:5], BLOCKS[:5], BLOCKS[:4])))
def test_every_combination_of_blocks(K, V, M, group, gated):
    check_tile(K, V, M, gated, group)


def test_these_are_all_tiles():
    def calls(shapes):
        for (K, V, M), gated in itertools.product(shapes, GATED):
            q, k, v, s, g, *init, _ = meta(inputs(T=70, H=2, Hk=1, K=K, V=V, M=M, gated=gated))
            do = torch.empty(*q.shape[:3], V, device="meta")
            yield lambda: gsa.forward(q, k, v, s, g, 0.25, *init, None)  # noqa: B023
            yield lambda: gsa.backward(do, *init, q, k, v, s, g, 0.25, *init, None)  # noqa: B023

    assert chosen(gsa, calls(TILES), gla) == chosen(gsa, calls(itertools.product(BLOCKS, BLOCKS, BLOCKS)), gla)

    def steps(shapes):
        for K, V, M in shapes:
            q, k, v, s, _, *init, _ = meta(inputs(T=1, H=2, Hk=1, K=K, V=V, M=M, gated=False))
            yield lambda: gsa.step(q[:, 0], k[:, 0], v[:, 0], s[:, 0], None, *init, 0.25)  # noqa: B023

    assert chosen(gsa, steps(STEPS)) == chosen(gsa, steps(itertools.product(BLOCKS, WIDE, BLOCKS)))


@pytest.mark.parametrize("strength", [None, 30.0])
@pytest.mark.parametrize(("K", "V", "M"), [(132, 20, 65), (20, 33, 132), (17, 100, 65), (5, 132, 33)])
def test_states_larger_than_a_tile(K, V, M, strength):
    """In the slots and in keys and values; the third has only V in two tiles, forward."""
    check(inputs(T=40, H=2, Hk=1, K=K, V=V, M=M, gated=strength is not None, strength=strength or 0.0), roundings=32.0)


@pytest.mark.parametrize("gated", GATED)
def test_packed(gated, short_segments):
    check(inputs(T=300, Hk=1, gated=gated, lengths=[0, 1, 130, 0, 0, 129, 40, 0]))


@pytest.mark.parametrize("gated", GATED)
def test_packed_equals_apart(gated, short_segments):
    *tokens, keys, values, cu = inputs(T=260, gated=gated, lengths=[131, 0, 129])
    packed = forward(*tokens, keys, values, cu)
    for n, (lo, hi) in enumerate([(0, 131), (131, 131), (131, 260)]):
        one = slice(n, n + 1)
        apart = forward(*(None if x is None else x[:, lo:hi] for x in tokens), keys[one], values[one], None)
        assert torch.equal(packed[0][:, lo:hi], apart[0])
        assert torch.equal(packed[1][one], apart[1])
        assert torch.equal(packed[2][one], apart[2])


@pytest.mark.parametrize("strength", [1.0, 5.0, 30.0, 400.0, 1e6])
def test_strong_gates(strength, short_segments):
    # exp2(g·log2 e) errs by |g| roundings, which shows where all that is left of a tensor is e^-30 of it
    check(inputs(T=150, H=1, Hk=1, strength=strength), roundings=32.0)


@pytest.mark.parametrize("reset", [-float("inf"), -1e4, -60.0])
def test_resets_among_mild_gates(reset, short_segments):
    tensors = inputs(T=200, H=1, Hk=1, strength=0.02)
    g = tensors[4]
    g[:, [0, 5, 37, 63, 64, 140, 199]] = reset
    g[:, 80:90, :, ::2] = reset
    check(tensors)


@pytest.mark.parametrize("at", [70, 140])
@pytest.mark.parametrize("later", [-float("inf"), -300.0, float("nan")])
@pytest.mark.parametrize("before", [-0.1, -40.0])
def test_a_later_token_changes_no_bit(at, later, before, short_segments):
    tensors = inputs(T=200)
    tensors[4][:, 66:69] = before
    o = forward(*tensors)[0]
    for x in (tensors[0], tensors[1], tensors[4]):
        x[:, at + 1 :] = later
    for x in tensors[2:4]:
        x[:, at + 1 :] = 7.0
    assert torch.equal(forward(*tensors)[0][:, : at + 1], o[:, : at + 1])


@pytest.mark.parametrize("name", ["q", "k", "g"])
@pytest.mark.parametrize("gated", GATED)
def test_nan_goes_where_it_touches(name, gated, short_segments):
    tensors = inputs(T=200, gated=gated)
    x = dict(zip(INPUTS, tensors, strict=False))[name]
    if x is None:
        return
    clean = forward(*tensors)[0]
    x[0, 100, 1, 0] = float("nan")
    o, keys, values = forward(*tensors)
    touched = torch.zeros_like(o, dtype=torch.bool)
    touched[:, 100 : 101 if name == "q" else None, 1] = True
    assert torch.equal(o.isnan(), touched)
    assert torch.equal(o[~touched], clean[~touched])
    assert bool(keys[0, 1].isnan().any()) == (name != "q")
    assert bool(values[0, 1].isnan().any()) == (name == "g")


def test_no_tokens():
    tensors = inputs(B=2, T=0)
    o, keys, values = forward(*tensors)
    assert o.shape == (2, 0, 2, 16)
    assert torch.equal(keys, tensors[5])
    assert torch.equal(values, tensors[6])
    weights = weights_for(tensors)
    grads = backward(weights, *tensors)
    assert [d.shape for d in grads[:5]] == [x.shape for x in tensors[:5]]
    assert torch.equal(grads[5], weights[1])
    assert torch.equal(grads[6], weights[2])


@pytest.mark.parametrize("gated", GATED)
def test_same_bits_each_run(gated, short_segments):
    tensors = inputs(T=200, H=2, Hk=1, gated=gated)
    weights = weights_for(tensors)
    first, second = (backward(weights, *tensors) for _ in range(2))
    assert all(a is b or torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("gated", GATED)
@pytest.mark.parametrize(("K", "V", "M"), [(5, 9, 1), *STEPS])
def test_step(K, V, M, gated):
    H, Hk = (2, 2) if V < 100 else (3, 1)
    tensors = inputs(B=1 if V > 1000 else 3, T=2, H=H, Hk=Hk, K=K, V=V, M=M, gated=gated)
    exact, plain = expected(tensors, torch.float64), expected(tensors, torch.float32)
    *tokens, keys, values, _ = tensors
    o = [gsa.step(*(None if x is None else x[:, t] for x in tokens), keys, values, 0.25) for t in range(2)]
    for name, a, same, ref in zip(NAMES, (torch.stack(o, 1), keys, values), plain, exact, strict=False):
        assert_as_good_as_torch(a, same, ref, name=name)


def test_public_function():
    """The backend by its name, with gradients; on a GPU "auto" is the same."""
    tensors = inputs(T=70, Hk=1, init=False)
    leaves = [None if x is None else x.requires_grad_() for x in tensors[:5]]
    o, final = public_gsa(*leaves, 0.25, output_final_state=True, backend="triton")
    o.sum().backward()
    direct = gsa.forward(*(x.detach() for x in leaves), 0.25, None, None, None)
    assert all(torch.equal(a, b) for a, b in zip((o, *final), direct, strict=True))
    zeros = [torch.zeros_like(x) for x in final]
    grads = gsa.backward(torch.ones_like(o), *zeros, *(x.detach() for x in leaves), 0.25, None, None, None)
    assert all(torch.equal(x.grad, d) for x, d in zip(leaves, grads[:5], strict=True))
    token = [x.detach()[:, 0] for x in leaves]
    state = tuple(x.clone() for x in zeros)
    o = public_gsa_step(*token, state, 0.25, backend="triton")
    assert torch.equal(o, gsa.step(*token, *zeros, 0.25))
    assert all(torch.equal(a, b) for a, b in zip(state, zeros, strict=True))
