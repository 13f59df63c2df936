"""The Triton kernels of rwkv7, on a GPU or in Triton's interpreter (in float32: its bfloat16 is wrong)."""

import itertools

import pytest
import torch

from icrl_kernels import rwkv7, rwkv7_reference, rwkv7_step
from icrl_kernels.testing import assert_as_good_as_torch

pytest.importorskip("triton")
from tiles import BLOCKS, WIDE, chosen, meta, tokens

from icrl_kernels.linear_attention.triton import rwkv7 as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
NAMES = ["o", "final_state", "dr", "dw", "dk", "dv", "da", "db", "dinitial_state"]


def inputs(T=100, B=1, H=1, K=16, V=16, strength=0.5, sequences=None, seed=0):
    """a = -kk and b = kk * rate with kk of norm 1, as RWKV-7's layer makes them: a stable recurrence."""
    random = torch.Generator().manual_seed(seed)
    r, k, kk = (torch.randn(B, T, H, K, generator=random) for _ in range(3))
    kk = kk / kk.norm(dim=-1, keepdim=True)
    w, rate = (torch.rand(B, T, H, K, generator=random) for _ in range(2))
    v = torch.randn(B, T, H, V, generator=random)
    state = torch.randn(sequences or B, H, K, V, generator=random)
    return [t.to(DEVICE) for t in (r, -strength * w, k, v, -kk, kk * rate, state)]


def run(f, tensors, weights=None, **options):
    """Output, final state and, with weights for the two, the gradients of all inputs."""
    leaves = [None if t is None else t.detach().clone().requires_grad_(weights is not None) for t in tensors]
    o, final = f(*leaves[:6], initial_state=leaves[6], output_final_state=True, **options)
    if weights is not None:
        ((o * weights[0].to(o.dtype)).sum() + (final * weights[1].to(final.dtype)).sum()).backward()
    return [o.detach(), final.detach()] + [None if x is None or weights is None else x.grad for x in leaves]


def triton(*args, **options):
    return rwkv7(*args, **options, backend="triton")


def compare(tensors, roundings=4.0, **options):
    r, v, state = tensors[0], tensors[3], tensors[6]
    shape = (r.shape[0], *r.shape[2:], v.shape[3]) if state is None else state.shape
    weights = [torch.randn(s).to(DEVICE) for s in (v.shape, shape)]
    double = [None if t is None else t.double() for t in tensors]
    exact = run(rwkv7_reference, double, weights, **options)
    plain = run(rwkv7_reference, tensors, weights, **options)
    result = run(triton, tensors, weights, **options)
    for name, a, s, e in zip(NAMES, result, plain, exact, strict=True):
        assert (a is None) == (e is None), name
        if e is not None:
            assert a.dtype == s.dtype, name
            # dw is in part a difference of sums over the chunk, whose terms' roundings stay where they cancel
            assert_as_good_as_torch(a, s, e, name=name, roundings=64.0 if name == "dw" else roundings)


@pytest.mark.parametrize(
    "sizes",
    [{"T": 1}, {"T": 100, "H": 2}, {"T": 63, "B": 2, "K": 20, "V": 36}, {"T": 129, "K": 5, "V": 70}],
    ids=str,
)
def test_values_and_gradients(sizes):
    compare(inputs(**sizes))


def compare_tile(K, V, H):
    """Gates are mild in the first chunk; in the second they are left to the second launch."""
    T = tokens(K, V)
    tensors = inputs(T=T, H=H, K=K, V=V)
    tensors[1][:, T - 6 :] *= 60.0
    compare(tensors, roundings=32.0)


STEPS = [(16, 16), (20, 130), (13, 256), (60, 256), (100, 30), (256, 40), (512, 20)]
TILES = [(13, 16), (32, 128), (20, 140), (60, 16), (130, 20), (128, 13), (256, 32), (300, 16)]


@pytest.mark.parametrize(("K", "V"), TILES)
def test_every_tile_that_a_plan_can_choose(K, V):
    compare_tile(K, V, 1)


@pytest.mark.slow
@pytest.mark.parametrize(("K", "V"), list(itertools.product(BLOCKS, BLOCKS)))
def test_every_pair_of_blocks(K, V):
    compare_tile(K, V, 1)


def test_these_are_all_tiles():
    def calls(shapes):
        for K, V in shapes:
            *x, state = meta(inputs(T=70, K=K, V=V))
            yield lambda: kernels.forward(*x, 0.25, state, None)  # noqa: B023
            yield lambda: kernels.backward(x[3], state, *x, 0.25, state, None)  # noqa: B023

    assert chosen(kernels, calls(TILES)) == chosen(kernels, calls(itertools.product(BLOCKS, BLOCKS)))

    def steps(shapes):
        for K, V in shapes:
            *x, state = meta(inputs(T=1, K=K, V=V))
            yield lambda: kernels.step(*(t[:, 0] for t in x), state, 0.25)  # noqa: B023

    assert chosen(kernels, steps(STEPS)) == chosen(kernels, steps(itertools.product(BLOCKS, WIDE)))


def test_scale_and_no_state():
    compare([*inputs(T=70, B=2)[:6], None], scale=0.3)


def test_no_tokens():
    tensors = inputs(T=0, H=2)
    o, final = run(triton, tensors)[:2]
    assert o.shape == tensors[3].shape
    assert torch.equal(final, tensors[6])


def test_packed():
    lengths = [0, 1, 70, 0, 64, 0]
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], device=DEVICE)
    tensors = inputs(T=sum(lengths), H=2, sequences=len(lengths))
    compare(tensors, cu_seqlens=cu)
    o, final = run(triton, tensors, cu_seqlens=cu.int())[:2]
    for n in range(len(lengths)):
        span = slice(int(cu[n]), int(cu[n + 1]))
        apart = run(triton, [*(x[:, span] for x in tensors[:6]), tensors[6][n : n + 1]])
        assert torch.equal(o[:, span], apart[0])
        assert torch.equal(final[n : n + 1], apart[1])


@pytest.mark.parametrize("strength", [1e-3, 5.0, 30.0, 400.0])
def test_strength_of_gates(strength):
    # exp2(w·log2 e) errs by |w| roundings, which shows where all that is left of a tensor is e^-30 of it
    compare(inputs(T=130, strength=strength), roundings=32.0)


@pytest.mark.parametrize("reset", [-float("inf"), -60.0])
def test_resets_among_mild_gates(reset):
    tensors = inputs(T=150, strength=0.02)
    tensors[1][:, [0, 5, 37, 63, 64, 140, 149]] = reset
    tensors[1][:, 80:90, :, ::2] = reset
    compare(tensors, roundings=16.0)


def test_no_output_depends_on_the_future():
    tensors = inputs(T=130, H=2)
    o = run(triton, tensors)[0]
    for at, gate in ((1, -2.0), (40, -1e3), (64, -50.0), (129, -0.1)):
        changed = [x.clone() for x in tensors]
        for x in changed[:6]:
            x[:, at:] = torch.randn_like(x[:, at:])
        changed[1][:, at:] = gate
        assert torch.equal(run(triton, changed)[0][:, :at], o[:, :at])


@pytest.mark.parametrize(("K", "V"), STEPS)
def test_steps_equal_the_sequence(K, V):
    tensors = inputs(T=5, B=2, H=2, K=K, V=V)
    state = tensors[6].clone()
    steps = [rwkv7_step(*(x[:, t].contiguous() for x in tensors[:6]), state, backend="triton") for t in range(5)]
    exact, last = rwkv7_reference(*(x.double() for x in tensors[:6]), 1.0, tensors[6].double(), True)
    plain, plain_last = rwkv7_reference(*tensors[:6], 1.0, tensors[6], True)
    assert_as_good_as_torch(torch.stack(steps, 1), plain, exact)
    assert_as_good_as_torch(state, plain_last, last)


def test_the_same_bits_each_run():
    tensors = inputs(T=100, H=2)
    weights = [torch.randn(tensors[3].shape).to(DEVICE), torch.randn(tensors[6].shape).to(DEVICE)]
    for a, b in zip(run(triton, tensors, weights), run(triton, tensors, weights), strict=True):
        assert torch.equal(a, b)


def test_rows_after_a_strong_gate_that_is_then_less_strong():
    """A gate may be a little above 0 by rounding, so that the sum of gates comes back within what one anchor serves."""
    tensors = inputs(T=24, strength=0.0)
    tensors[1][:, 4, :, 0] = -16.00004 * 0.6931471805599453
    tensors[1][:, 5, :, 0] = 9e-5
    compare(tensors, roundings=16.0)
