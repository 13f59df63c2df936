"""The Triton kernels of gla, on a GPU or in Triton's interpreter (in float32: its bfloat16 is wrong)."""

import itertools

import numpy as np
import pytest
import torch

from icrl_kernels.testing import assert_as_good_as_torch

pytest.importorskip("triton")
from tiles import BLOCKS, WIDE, chosen, meta, tokens

from icrl_kernels.linear_attention.triton import gla

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []


def recurrence(q, k, v, g, scale, initial_state, cu_seqlens):
    """Token by token, differentiable, in the inputs' dtype."""
    B, T, H, K = q.shape
    heads, V = v.shape[2:]
    if cu_seqlens is None:
        spans = [(b, 0, T) for b in range(B)]
    else:
        c = cu_seqlens.tolist()
        spans = [(0, *x) for x in itertools.pairwise(c)]
    rows, finals = [], []
    for n, (b, lo, hi) in enumerate(spans):
        S = q.new_zeros(heads, K, V) if initial_state is None else initial_state[n].to(q.dtype)
        for t in range(lo, hi):
            if g is not None:
                S = S * (g[b, t].exp()[:, None, None] if g.dim() == 3 else g[b, t].exp()[:, :, None])
            S = S + k[b, t][:, :, None] * v[b, t][:, None, :]
            rows.append(scale * (q[b, t][:, :, None] * S.repeat_interleave(H // heads, 0)).sum(1))
        finals.append(S)
    o = torch.stack(rows).view(B, T, H, V) if rows else q.new_zeros(B, T, H, V)
    return o, torch.stack(finals)


def inputs(B=1, T=100, H=2, Hk=2, K=16, V=16, gate=2, strength=0.1, init=True, lengths=None, seed=0):
    r = torch.Generator().manual_seed(seed)
    N = B if lengths is None else len(lengths)
    q, k = torch.randn(B, T, H, K, generator=r), torch.randn(B, T, Hk, K, generator=r)
    v = torch.randn(B, T, Hk, V, generator=r)
    g = [None, -torch.rand(B, T, Hk, generator=r), -torch.rand(B, T, Hk, K, generator=r)][gate]
    g = None if g is None else g * strength
    state = torch.randn(N, Hk, K, V, generator=r) if init else None
    cu = None if lengths is None else torch.tensor([0, *torch.tensor(lengths).cumsum(0)])
    return [None if x is None else x.to(DEVICE) for x in (q, k, v, g, state, cu)]


def check(q, k, v, g, state, cu, scale=0.25, roundings=4.0):
    """Outputs, final state and every gradient against the recurrence in float64, as good as it is in float32."""
    do, dfinal = torch.randn(*q.shape[:3], v.shape[-1]).to(DEVICE), None
    results = []
    for dtype in (torch.float64, torch.float32):
        x = [None if a is None else a.to(dtype).requires_grad_() for a in (q, k, v, g, state)]
        o, final = recurrence(*x[:4], scale, x[4], cu)
        dfinal = torch.randn_like(final, dtype=torch.float32) if dfinal is None else dfinal
        wanted = [a for a in x if a is not None]
        grads = torch.autograd.grad((o * do).sum() + (final * dfinal).sum(), wanted, allow_unused=True)
        results.append(
            [o, final, *(torch.zeros_like(a) if d is None else d for a, d in zip(wanted, grads, strict=True))]
        )
    o, final = gla.forward(q, k, v, g, scale, state, cu)
    mine = [o, final, *(d for d in gla.backward(do, dfinal, q, k, v, g, scale, state, cu) if d is not None)]
    names = ["o", "final", "dq", "dk", "dv"] + ["dg"] * (g is not None) + ["dstate"] * (state is not None)
    assert len(mine) == len(names)
    for name, a, same, ref in zip(names, mine, results[1], results[0], strict=True):
        # dg is a sum of q dq - k dk, whose terms' roundings stay where the terms cancel
        assert_as_good_as_torch(
            a, same.detach(), ref.detach(), name=name, roundings=64.0 if name == "dg" else roundings
        )


@pytest.fixture
def segments(monkeypatch):
    """Two chunks a segment, so that small tests have several, each a program."""
    monkeypatch.setattr(gla, "_segment_length", lambda tokens, heads: 128)
    monkeypatch.setattr(gla, "_single", lambda *args: False)


@pytest.fixture(params=["single", "segments"])
def both_modes(monkeypatch, request, segments):
    """As `segments`, or a program for the whole sequence, with a state saved after each 128 tokens."""
    monkeypatch.setattr(gla, "ANCHOR", 128)
    monkeypatch.setattr(gla, "_single", lambda *args: request.param == "single")


@pytest.mark.parametrize("gate", [0, 1, 2])
def test_matches_float64(gate, both_modes):
    check(*inputs(T=300, H=2, Hk=1, gate=gate))


@pytest.mark.parametrize("gate", [0, 1, 2])
@pytest.mark.parametrize(
    "sizes",
    [
        {"T": 1},
        {"T": 63, "K": 20, "V": 36, "H": 4, "Hk": 2},
        {"B": 2, "T": 65, "K": 16, "V": 5, "init": False},
        {"T": 129, "K": 1, "V": 33, "H": 3, "Hk": 1},
    ],
    ids=str,
)
def test_shapes(sizes, gate, both_modes):
    check(*inputs(**sizes, gate=gate))


@pytest.mark.parametrize("gate", [1, 2])
@pytest.mark.parametrize(("K", "V"), [(132, 65), (65, 132)])
def test_state_larger_than_a_tile(K, V, gate):
    check(*inputs(T=66, H=1, Hk=1, K=K, V=V, gate=gate))


def check_tile(K, V, gate, group):
    """In one row gates are mild, in the other the second launch does some or all."""
    q, k, v, g, state, _ = inputs(B=2, T=tokens(K, V), H=group, Hk=1, K=K, V=V, gate=gate)
    if gate == 2:
        g[1, 8:] *= 300.0
    check(q, k, v, g, state, None, roundings=32.0 if gate == 2 else 4.0)


STEPS = [(16, 16), (20, 130), (13, 256), (60, 256), (100, 30), (256, 40), (512, 20)]
TILES = [
    (16, 13),
    (30, 120),
    (64, 256),
    (100, 128),
    (128, 64),
    (128, 512),
    (250, 128),
    (256, 16),
    (300, 16),
    (512, 32),
    (512, 60),
]


@pytest.mark.parametrize("gate", [0, 1, 2])
@pytest.mark.parametrize(
    ("K", "V"), [pytest.param(*x, marks=[pytest.mark.slow] if max(x) > 256 else []) for x in TILES]
)
def test_every_tile_that_a_plan_can_choose(K, V, gate, both_modes):
    """Where dq's launch cuts K in two and the launch for dk and dg has all of it, dg needs both parts of q·z."""
    check_tile(K, V, gate, 2)


@pytest.mark.slow
@pytest.mark.parametrize("gate", [0, 1, 2])
@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize(("K", "V"), list(itertools.product(BLOCKS, BLOCKS)))
def test_every_pair_of_blocks(K, V, group, gate, both_modes):
    check_tile(K, V, gate, group)


def test_these_are_all_tiles(monkeypatch):
    def calls(shapes):
        for (K, V), gate, single in itertools.product(shapes, (0, 1, 2), (False, True)):
            monkeypatch.setattr(gla, "_single", lambda *args, single=single: single)
            q, k, v, g, state, _ = meta(inputs(T=70, H=2, Hk=1, K=K, V=V, gate=gate))
            do = torch.empty(*q.shape[:3], V, device="meta")
            yield lambda: gla.forward(q, k, v, g, 0.25, state, None)  # noqa: B023
            yield lambda: gla.backward(do, state, q, k, v, g, 0.25, state, None)  # noqa: B023

    assert chosen(gla, calls(TILES)) == chosen(gla, calls(itertools.product(BLOCKS, BLOCKS)))

    def steps(shapes):
        for K, V in shapes:
            q, k, v, _, state, _ = meta(inputs(T=1, H=2, Hk=1, K=K, V=V))
            yield lambda: gla.step(q[:, 0], k[:, 0], v[:, 0], None, state, 0.25)  # noqa: B023

    assert chosen(gla, steps(STEPS)) == chosen(gla, steps(itertools.product(BLOCKS, WIDE)))


@pytest.mark.parametrize("gate", [0, 1, 2])
def test_packed(gate, segments):
    check(*inputs(T=300, H=2, Hk=1, gate=gate, lengths=[0, 1, 130, 0, 0, 129, 40, 0]))


@pytest.mark.parametrize("gate", [0, 2])
def test_packed_equals_apart(gate, segments):
    q, k, v, g, state, cu = inputs(T=260, gate=gate, lengths=[131, 0, 129])
    o, final = gla.forward(q, k, v, g, 0.25, state, cu)
    for n, (lo, hi) in enumerate([(0, 131), (131, 131), (131, 260)]):
        part = [None if x is None else x[:, lo:hi] for x in (q, k, v, g)]
        o1, final1 = gla.forward(*part, 0.25, state[n : n + 1], None)
        assert torch.equal(o[:, lo:hi], o1)
        assert torch.equal(final[n : n + 1], final1)


@pytest.mark.parametrize("gate", [1, 2])
@pytest.mark.parametrize("strength", [5.0, 60.0, 1e6])
def test_strong_gates(gate, strength, both_modes):
    # exp2(g·log2 e) errs by |g| roundings, which shows where all that is left of a tensor is e^-30 of it
    check(*inputs(T=150, H=1, Hk=1, gate=gate, strength=strength), roundings=32.0)


@pytest.mark.parametrize("gate", [1, 2])
@pytest.mark.parametrize("reset", [-float("inf"), -1e4, -60.0])
def test_resets_among_mild_gates(gate, reset, both_modes):
    q, k, v, g, state, _ = inputs(T=200, H=1, Hk=1, gate=gate, strength=0.02)
    g[:, [0, 5, 37, 63, 64, 140, 199]] = reset
    if gate == 2:
        g[:, 80:90, :, ::2] = reset
    check(q, k, v, g, state, None)


@pytest.mark.parametrize("gate", [1, 2])
@pytest.mark.parametrize("at", [70, 140])
@pytest.mark.parametrize("later", [-float("inf"), -300.0, float("nan")])
def test_a_later_token_changes_no_bit(gate, at, later, both_modes):
    q, k, v, g, state, _ = inputs(T=300, gate=gate)
    before, _ = gla.forward(q, k, v, g, 0.25, state, None)
    for x in (q, k, g):
        x[:, at + 1 :] *= -2.0
        x[:, at + 1 :] = later
    v[:, at + 1 :] = 7.0
    after, _ = gla.forward(q, k, v, g, 0.25, state, None)
    assert torch.equal(before[:, : at + 1], after[:, : at + 1])


@pytest.mark.parametrize("name", ["q", "k", "g"])
@pytest.mark.parametrize("gate", [0, 1, 2])
def test_nan_goes_where_it_touches(name, gate, both_modes):
    x = dict(zip("qkvg", inputs(T=200, gate=gate)[:4], strict=True))
    if x[name] is None:
        return
    clean, _ = gla.forward(*x.values(), 0.25, None, None)
    x[name].view(1, 200, 2, -1)[0, 100, 1, 0] = float("nan")
    o, final = gla.forward(*x.values(), 0.25, None, None)
    touched = torch.zeros_like(o, dtype=torch.bool)
    touched[:, 100 : 101 if name == "q" else None, 1, 0 if name == "v" else slice(None)] = True
    assert torch.equal(o.isnan(), touched)
    assert torch.equal(o[~touched], clean[~touched])
    assert bool(final[0, 1].isnan().any()) == (name != "q")


def test_a_nan_gate_after_strong_ones_changes_nothing_before_it(both_modes):
    q, k, v, g = inputs(T=100, gate=2)[:4]
    g[:, 10:20] = -300.0
    clean, _ = gla.forward(q, k, v, g, 0.25, None, None)
    g[:, 30] = float("nan")
    o, _ = gla.forward(q, k, v, g, 0.25, None, None)
    assert torch.equal(o[:, :30], clean[:, :30])
    assert bool(o[:, 30:].isnan().all())


def test_no_tokens():
    q, k, v, g, state, _ = inputs(B=2, T=0)
    o, final = gla.forward(q, k, v, g, 0.25, state, None)
    assert o.shape == (2, 0, 2, 16)
    assert torch.equal(final, state)
    grads = gla.backward(o, state + 1, q, k, v, g, 0.25, state, None)
    assert [d.shape for d in grads[:4]] == [x.shape for x in (q, k, v, g)]
    assert torch.equal(grads[4], state + 1)


@pytest.mark.parametrize("gate", [0, 1, 2])
def test_same_bits_each_run(gate, both_modes):
    q, k, v, g, state, _ = inputs(T=200, H=2, Hk=1, gate=gate)
    do = torch.randn_like(q)
    first, second = (gla.backward(do, state, q, k, v, g, 0.25, state, None) for _ in range(2))
    assert all(a is b or torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("gate", [0, 1, 2])
@pytest.mark.parametrize(("K", "V"), STEPS)
def test_step(K, V, gate):
    H, Hk = (4, 2) if K < 50 else (3, 1) if K < 200 else (2, 2)
    q, k, v, g, state, _ = inputs(B=3, T=4, H=H, Hk=Hk, K=K, V=V, gate=gate)
    runs = [
        recurrence(*(None if x is None else x.to(dtype) for x in (q, k, v, g)), 0.25, state.to(dtype), None)
        for dtype in (torch.float64, torch.float32)
    ]
    carried = state.clone()
    o = torch.stack(
        [gla.step(q[:, t], k[:, t], v[:, t], None if g is None else g[:, t], carried, 0.25) for t in range(4)], 1
    )
    assert_as_good_as_torch(o, runs[1][0], runs[0][0], name="o")
    assert_as_good_as_torch(carried, runs[1][1], runs[0][1], name="state")


def test_the_shape_rule():
    assert gla._segment_length(1, 1) == 64
    assert gla._segment_length(8 * 16384, 4) == 1024
    assert [gla._single(B, T, H) for B, T, H in [(8, 16384, 32), (32, 2048, 4), (2, 60, 1)]] == [True] * 3
    # too few programs, or a second round of them that leaves most of the chip idle
    assert [gla._single(B, T, H) for B, T, H in [(8, 16384, 4), (1, 131072, 8), (35, 16384, 4)]] == [False] * 3


class Counted:
    """A kernel, and how often it was launched."""

    def __init__(self, kernel):
        self.kernel, self.launches = kernel, 0

    def __getitem__(self, grid):
        self.launches += 1
        return self.kernel[grid]


@pytest.mark.parametrize("gate", [0, 1, 2])
def test_modes_agree(gate, monkeypatch):
    q, k, v, g, state, _ = inputs(B=3, T=130, H=2, Hk=1, gate=gate)
    do = torch.randn(*q.shape[:3], v.shape[-1], generator=torch.Generator().manual_seed(1)).to(DEVICE)
    results, scans = [], Counted(gla._scan)
    monkeypatch.setattr(gla, "_scan", scans)
    for single in (True, False):
        assert scans.launches == 0
        monkeypatch.setattr(gla, "_single", lambda *args, single=single: single)
        results.append(
            [*gla.forward(q, k, v, g, 0.25, state, None), *gla.backward(do, state, q, k, v, g, 0.25, state, None)]
        )
    assert scans.launches == 3
    for a, b in zip(*results, strict=True):
        assert a is b or torch.linalg.vector_norm(a - b) <= 1e-5 * torch.linalg.vector_norm(b)


@pytest.mark.skipif(DEVICE != "cpu", reason="its tensors are pages never touched, which a GPU does not have")
def test_offsets_beyond_32_bits(monkeypatch):
    """The last 70 tokens of tensors with more than 2^31 entries, all else zero pages, against the 70 alone."""
    monkeypatch.setattr(gla, "_segment_length", lambda tokens, heads: 2**24)
    monkeypatch.setattr(gla, "ANCHOR", 2**24)

    def untouched(*shape, dtype=torch.float32, device="cpu"):  # torch.zeros would write them
        shape = shape if isinstance(shape[0], int) else shape[0]
        return torch.from_numpy(np.zeros(shape, str(dtype)[6:]))

    monkeypatch.setattr(torch, "empty", untouched)
    monkeypatch.setattr(torch, "empty_like", lambda x, dtype=None: untouched(x.shape, dtype=dtype or x.dtype))
    T, n, K = 2**31 // 256 + 70, 70, 256
    assert T * K > 2**31
    q, k, v, g, state, _ = inputs(T=n, H=1, Hk=1, K=K, V=3, gate=1)
    q, k, v, do = q.half(), k.half(), v.half(), torch.randn(1, n, 1, 3).half()
    large = []
    for x in (q, k, v, g, do):
        y = untouched(1, T, *x.shape[2:], dtype=x.dtype)
        y[:, T - n :] = x
        large.append(y)
    *large, large_do = large
    cu = torch.tensor([T - n, T])
    o, final = gla.forward(*large, 0.25, state, cu)
    grads = gla.backward(large_do, state, *large, 0.25, state, cu)
    cu = torch.tensor([0, n])
    o1, final1 = gla.forward(q, k, v, g, 0.25, state, cu)
    grads1 = gla.backward(do, state, q, k, v, g, 0.25, state, cu)
    assert torch.equal(o[:, T - n :], o1)
    assert torch.equal(final, final1)
    for a, b in zip(grads[:4], grads1[:4], strict=True):
        assert torch.equal(a[:, T - n :], b)
    assert torch.equal(grads[4], grads1[4])


class Noted:
    """In a kernel's place: notes its launches and does nothing."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def __getitem__(self, grid):
        assert len(grid) == 1  # a grid's other dimensions end at 65,535
        return lambda *args, **constants: self.log.append(self.name)


@pytest.mark.parametrize("packed", [False, True])
def test_nothing_waits_for_the_device(packed, monkeypatch):
    """Tensors without data: a launcher that asked for a value, which no CUDA graph can hold, would raise."""
    log = []
    for name in ("_local_states", "_scan", "_outputs", "_grad_q", "_grad_kv", "_step"):
        monkeypatch.setattr(gla, name, Noted(name, log))
    q, k, v, g, state, cu = (x.to("meta") for x in inputs(T=300, lengths=[100, 200]))
    cu, state = (cu, state) if packed else (None, state[:1])
    gla.forward(q, k, v, g, 0.25, state, cu)
    gla.backward(v, state, q, k, v, g, 0.25, state, cu)
    assert log
    log.clear()
    gla.step(q[:, 0], k[:, 0], v[:, 0], g[:, 0], state[:1], 0.25)
    assert log == ["_step"]


@pytest.mark.parametrize("gate", [0, 1, 2])
def test_nan_in_v_stays_in_its_column_and_chunk(gate, both_modes):
    q, k, v, g, state, _ = inputs(T=200, gate=gate)
    clean, _ = gla.forward(q, k, v, g, 0.25, state, None)
    v[0, 100, 1, 3] = float("nan")
    o, final = gla.forward(q, k, v, g, 0.25, state, None)
    assert o[:, 100:, 1, 3].isnan().all()
    assert final[0, 1, :, 3].isnan().all()
    may = torch.zeros_like(o, dtype=torch.bool)
    may[:, 64:, 1, 3] = True
    assert torch.equal(o[~may], clean[~may])
