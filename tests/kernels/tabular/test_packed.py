import pytest
import torch
from tabular import moved
from test_value_iteration import banded, garnet, normalised
from torch.library import opcheck

from icrl_kernels import _C, PackedTransition, pack_transition, value_iteration
from icrl_kernels.tabular.packed import _pack

BACKENDS = ["cpu", "reference"]


def agree(got, want):
    assert ((got.q - want.q).abs().amax((-2, -1)) <= got.error_bound + want.error_bound).all()
    assert ((got.v - want.v).abs().amax(-1) <= got.error_bound + want.error_bound).all()


@pytest.mark.parametrize("s", [1, 2, 9, 24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_there_and_back(s, dtype, device):
    t, r = moved(banded(3, s, dtype=dtype), device)
    packed, reward = pack_transition(t, r)
    packed.check()
    assert torch.equal(packed.unpack(), t)
    inside = packed.unpack(torch.ones_like(reward)) != 0
    assert torch.equal(packed.unpack(reward), torch.where(inside, r, 0))
    some = t != 0
    assert torch.equal(inside, some.cumsum(-1).bool() & some.flip(-1).cumsum(-1).flip(-1).bool())
    assert not packed.length[:, -1].any()
    alone = pack_transition(t)
    assert all(torch.equal(x, y) for x, y in zip(alone, packed, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_compiled_packing_is_the_same(dtype):
    g = torch.Generator().manual_seed(0)
    for s in (1, 3, 8, 15, 32, 70):
        t = torch.rand(2, s, 3, s, generator=g, dtype=dtype)
        t = torch.where(torch.rand(t.shape, generator=g) < 2 / s, t, 0)
        t[0, 0, 0] = -0.0
        t[0, 0, 1] = torch.nan
        t[0, 0, 2] = 1e-45 if dtype == torch.float32 else 5e-324
        r = torch.randn(t.shape, generator=g, dtype=dtype)
        for x, y in ((t, r), (t.transpose(1, 3), r.transpose(1, 3)) if s == 3 else (t, r)):
            windows, packed = _pack([x, y])
            got, reward = pack_transition(x, y)
            assert all(torch.equal(i, j) for i, j in zip(got[1:], windows, strict=True))
            assert torch.equal(got.probability.nan_to_num(7), packed[0].nan_to_num(7))
            assert torch.equal(reward, packed[1])
    assert not got.length[0, 0, 0]
    assert (got.length[0, 0, 1:] == s).all()


def test_nothing():
    packed = pack_transition(torch.zeros(0, 3, 2, 3))
    assert packed.unpack().shape == (0, 3, 2, 3)
    assert value_iteration(packed, torch.zeros(0), 0.9).q.shape == (0, 3, 2)
    ends = pack_transition(torch.zeros(2, 3, 2, 3))
    assert ends.probability.shape == (0,)
    for backend in BACKENDS:
        assert not value_iteration(ends, torch.zeros(0), 0.9, backend=backend).v.any()


@pytest.mark.parametrize("s", [1, 7, 8, 9, 33, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_solves_as_dense(s, dtype, device):
    t, r = moved(banded(3, s, seed=s, dtype=dtype), device)
    packed, reward = pack_transition(t, r)
    gammas = torch.tensor([0.994, 0.5], device=device)
    want = value_iteration(t, r, gammas)
    got = value_iteration(packed, reward, gammas)
    if device.type == "cpu" or _C.with_cuda:
        assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))  # the same blocks, in the same order
    agree(got, want)
    agree(value_iteration(packed, reward, gammas, backend="reference"), want)
    mean = (t * r).sum(-1)
    mean[:, -1] = torch.nan  # of a terminal state: not read
    ends = torch.arange(s, device=device).expand(3, s) == s - 1
    agree(value_iteration(packed, mean, 0.9, terminal=ends), value_iteration(t, mean, 0.9, terminal=ends))


@pytest.mark.parametrize("backend", BACKENDS)
def test_windows_in_any_order(backend):
    # probabilities before, between and behind rows are not read; rows may share their window; zeros may be at its edges
    t, r = garnet(2, 11, 3, 2)
    t[:, 4] = t[:, 3, :1]
    packed = pack_transition(torch.ones_like(t))
    order = torch.randperm(packed.offset.numel(), generator=torch.Generator().manual_seed(0))
    offset = 5 + 13 * order.view_as(packed.offset)
    values = torch.full((5 + 13 * len(order),), torch.nan, dtype=torch.float64)
    values[offset[..., None] + torch.arange(11)] = t
    offset[:, 4] = offset[:, 3, :1]
    mixed = PackedTransition(values, offset, packed.first, packed.length)
    assert torch.equal(mixed.unpack(), t)
    agree(value_iteration(mixed, r, 0.95, backend=backend), value_iteration(t, r, 0.95))


@pytest.mark.parametrize("backend", BACKENDS)
def test_zeros_in_a_window_end_the_episode(backend):
    t, r = banded(2, 12)
    full = PackedTransition(
        t.flatten(),
        12 * torch.arange(2 * 12 * 5).view(2, 12, 5),
        torch.zeros(2, 12, 5, dtype=torch.int32),
        torch.full((2, 12, 5), 12, dtype=torch.int32),
    )
    for gamma in (0.9, 1.0):
        want = value_iteration(t, -r.abs(), gamma)
        agree(value_iteration(full, -r.abs().flatten(), gamma, backend=backend), want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_is_not_read(backend):
    t, r = banded(3, 16, dtype=torch.float64, ends=0)
    sizes = torch.tensor([16, 5, 9])
    for i, s in enumerate(sizes.tolist()):
        t[i, :s, :, :s] = normalised(t[i, :s, :, :s] + 1e-3)
    whole, reward = pack_transition(t, r)
    past = whole.unpack() > 0
    for i, s in enumerate(sizes.tolist()):
        past[i, :, :, :s] = False
        whole.length[i, s:] = -7
    # the same windows; what lies beyond is made negative
    held = pack_transition(torch.where(past, -1.0, t)).probability
    want = value_iteration(torch.where(past, 0.0, t), r, 0.9, num_states=sizes)
    agree(value_iteration(whole._replace(probability=held), reward, 0.9, num_states=sizes, backend=backend), want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.first[1, 2, 3].fill_(-1), r"windows.*first -1.*\[1, 2, 3\]"),
        (lambda p: p.length[1, 2, 3].fill_(-1), r"windows.*length -1.*\[1, 2, 3\]"),
        (lambda p: p.first[1, 2, 3].fill_(10), r"windows.*first 10.*\[1, 2, 3\]"),
        (lambda p: p.first[1, 2, 3].fill_(2**31 - 1), r"windows.*\[1, 2, 3\]"),
        (lambda p: p.offset[1, 2, 3].fill_(-1), r"windows.*offset -1.*\[1, 2, 3\]"),
        (lambda p: p.offset[1, 2, 3].fill_(len(p.probability)), r"windows.*\[1, 2, 3\]"),
        (lambda p: p.offset[1, 2, 3].fill_(2**63 - 1), r"windows.*\[1, 2, 3\]"),
        (lambda p: p.probability[p.offset[1, 2, 3]].fill_(torch.nan), r"NaN.*\[1, 2, 3\]"),
        (lambda p: p.probability[p.offset[1, 2, 3]].sub_(2), r"negative.*\[1, 2, 3\]"),
        (lambda p: p.probability[p.offset[1, 2, 3]].add_(2), r"sum.*got the sum [23].*\[1, 2, 3\]"),
    ],
)
def test_refuses_bad_windows(backend, change, message):
    packed, reward = pack_transition(*banded(3, 10))
    change(packed)
    with pytest.raises(ValueError, match=f"^transition.*{message}"):
        value_iteration(packed, reward, 0.9, backend=backend)


def test_refuses_bad_arguments():
    t, r = banded(2, 6)
    packed, reward = pack_transition(t, r)
    cases = [
        ("reward", packed, r),
        ("reward", packed, reward[:-1]),
        ("reward", packed, reward.double()),
        ("reward", packed, reward.to("meta")),
        ("probability", packed._replace(probability=t), reward),
        ("probability", packed._replace(probability=packed.probability.half()), reward.half()),
        ("offset", packed._replace(offset=packed.offset.int()), reward),
        ("offset", packed._replace(offset=packed.offset[0]), reward),
        ("first", packed._replace(first=packed.first.long()), reward),
        ("length", packed._replace(length=packed.length[:1]), reward),
        ("length", packed._replace(length=packed.length.to("meta")), reward),
        ("transition", packed._replace(probability=packed.probability.clone().requires_grad_()), reward),
    ]
    for name, p, given in cases:
        with pytest.raises(ValueError, match=f"^{name}"):
            value_iteration(p, given, 0.9)
    for values in (reward[:-1], torch.cat([reward, reward]), r):
        with pytest.raises(ValueError, match=r"^values: wanted shape"):
            packed.unpack(values)
    for name, arguments in (("transition", (t.half(),)), ("reward", (t, r[..., :2])), ("reward", (t, r.double()))):
        with pytest.raises(ValueError, match=f"^{name}"):
            pack_transition(*arguments)


def test_opcheck_and_compile():
    packed, reward = pack_transition(*banded(2, 6))
    for backend in BACKENDS:
        arguments = (packed[0], reward, list(packed[1:]), torch.tensor([0.9]), None, None, 1e-6, "auto", backend)
        opcheck(torch.ops.icrl.value_iteration.default, arguments)
    f = torch.compile(lambda p, r: value_iteration(p, r, 0.9).q * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(f(packed, reward), value_iteration(packed, reward, 0.9).q * 2)
