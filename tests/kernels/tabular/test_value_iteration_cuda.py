"""The CUDA planner: its algorithm on the host, run by coroutines for threads; and on a GPU where there is one."""

import importlib
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_value_iteration import banded, garnet, gym_tables, long_double_q, normalised

from icrl_kernels import _C, PackedTransition, pack_transition, value_iteration

vi = importlib.import_module("icrl_kernels.tabular.value_iteration")
PLENTY = 1 << 20  # bytes of fast memory for a team
GAMMAS = [0.9, 0.0, 0.994]
TEAMS = [(8, 0), (32, 0), (32, -1), (32, 7), (64, -1), (256, 3)]  # threads, and the order in which they run


def team(t, r, gamma, terminal=None, num_states=None, method="auto", tol=1e-6, threads=32, order=7, memory=PLENTY):
    """As value_iteration, with G, from a team of coroutines; and how many tasks did not fit their fast memory."""
    windows = []
    if isinstance(t, PackedTransition):
        t, *windows = t
    gamma = torch.as_tensor(gamma, dtype=torch.float64).reshape(-1)
    unfit = []
    arguments = (t, r, windows, gamma, terminal, num_states, tol, method)
    found = vi._check(*arguments)
    vi._values(found, *arguments)
    out = vi._compiled(
        lambda *x: unfit.append(_C.value_iteration_cuda_host_check(*x, memory, threads, order)),
        *(found, *arguments),
        ascending=True,
    )
    return vi.ValueIteration(*out), unfit[0]


def check(t, r, gammas=GAMMAS, **options):
    want = value_iteration(t, r, torch.tensor(gammas, dtype=torch.float64), backend="reference", **options)
    got, _ = team(t, r, gammas, **options)
    slack = got.error_bound + want.error_bound
    assert ((got.q - want.q).abs().amax((2, 3)) <= slack).all()
    assert ((got.v - want.v).abs().amax(2) <= slack).all()
    assert (got.error_bound <= 2 * want.error_bound + 1e-12).all()  # 1e-12: a bound may be 0
    assert torch.equal(got.v, got.q.amax(-1))
    assert torch.equal(got.policy, got.q.argmax(-1))
    return got


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("s", [1, 2, 3, 4, 5, 9, 31, 40, 65])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_banded(s, dtype):
    assert (check(*banded(2, s, seed=s, dtype=dtype)).error_bound <= 1e-6).all()


@pytest.mark.parametrize(("s", "a", "branches"), [(5, 1, 2), (20, 9, 3), (30, 3, 30), (12, 17, 4)])
def test_garnet(s, a, branches):
    assert (check(*garnet(2, s, a, branches)).error_bound <= 1e-6).all()


def test_gymnasium_tables():
    t, r, terminal = gym_tables("FrozenLake-v1")
    check(t, r, terminal=terminal)


@pytest.mark.parametrize(("threads", "order"), TEAMS)
def test_any_team_gives_the_same_bits(threads, order):
    # in any order between barriers, however many, in fast memory or not, from windows or not
    t, r = banded(2, 37)
    packed, gain = pack_transition(t, r)
    want, none = team(t, r, GAMMAS)
    assert none == 0
    for tables, memory in itertools.product(((t, r), (packed, gain)), (PLENTY, 0)):
        got, unfit = team(*tables, GAMMAS, threads=threads, order=order, memory=memory)
        assert unfit == (0 if memory else 2)
        assert same(got, want)
    undiscounted = t.double(), -(t.double() * r.abs()).sum(-1)
    assert same(team(*undiscounted, 1.0, threads=threads, order=order)[0], team(*undiscounted, 1.0)[0])
    for s in (1, 6):
        tables = banded(1, s, dtype=torch.float64)
        assert same(team(*tables, GAMMAS, threads=threads, order=order)[0], team(*tables, GAMMAS)[0])
    sweeps = {"method": "value_iteration", "tol": 1e-3}
    assert same(team(t, r, 0.5, threads=threads, order=order, **sweeps)[0], team(t, r, 0.5, **sweeps)[0])


def test_memory_that_some_tasks_fit():
    # the answer is the same wherever a task was solved; the team itself checks that it stays within its memory
    t, r = banded(6, 24, dtype=torch.float64)
    dense, gain = garnet(6, 24, 5, 24)
    t[3:], r = dense[3:], (t * r).sum(-1)
    r[3:] = gain[3:]
    want, _ = team(t, r, GAMMAS)
    counts = []
    for kilobytes in range(2, 40, 2):
        got, unfit = team(t, r, GAMMAS, memory=kilobytes << 10)
        counts.append(unfit)
        assert same(got, want)
    assert counts[0] == 6
    assert counts[-1] == 0
    assert 3 in counts
    assert counts == sorted(counts, reverse=True)


def test_ragged_and_padding():
    t, r = banded(3, 20, dtype=torch.float64, ends=0)
    sizes = torch.tensor([20, 7, 1])
    for i, s in enumerate(sizes.tolist()):
        t[i, :s, :, :s] = normalised(t[i, :s, :, :s] + 1e-3)
        t[i, :, :, s:] = 0
        t[i, s:] = torch.nan
        r[i, s:] = torch.nan
    got = check(t, r, num_states=sizes)
    for i, s in enumerate(sizes.tolist()):
        alone, _ = team(t[i : i + 1, :s, :, :s].contiguous(), r[i : i + 1, :s, :, :s].contiguous(), GAMMAS)
        assert torch.equal(alone.q[0], got.q[i, :, :s])
        assert not got.q[i, :, s:].any()
        assert not got.v[i, :, s:].any()
        assert not got.policy[i, :, s:].any()


def test_windows_in_any_order_with_zeros_and_rewards_that_are_not_read():
    t, r = banded(2, 12)
    packed, gain = pack_transition(t, r)
    want, _ = team(packed, gain, GAMMAS)
    back = torch.randperm(packed.offset.numel(), generator=torch.Generator().manual_seed(0))
    values, rewards, offset, first, length = [], [], packed.offset.clone(), packed.first.clone(), packed.length.clone()
    for row in back.tolist():
        at, n = int(packed.offset.view(-1)[row]), int(packed.length.view(-1)[row])
        low = int(packed.first.view(-1)[row])
        before, after = min(1, low), min(2, 12 - low - n) if n else 0
        pad = [torch.nan, *[0.0] * before], [0.0] * after
        offset.view(-1)[row] = sum(map(len, values)) + 1
        first.view(-1)[row], length.view(-1)[row] = low - before, before + n + after
        values.append(torch.cat([torch.tensor(pad[0]), packed.probability[at : at + n], torch.tensor(pad[1])]))
        rewards.append(
            torch.cat([torch.full((len(pad[0]),), torch.nan), gain[at : at + n], torch.full((after,), torch.nan)])
        )
    got, _ = team(PackedTransition(torch.cat(values), offset, first, length), torch.cat(rewards), GAMMAS)
    assert same(got, want)
    mean = (t * r).sum(-1)
    mean[:, -1] = torch.nan  # of a terminal state
    ends = torch.arange(12).expand(2, 12) == 11
    check(t, mean, terminal=ends)


def test_value_iteration_method():
    t, r = banded(2, 20)
    out, _ = team(t, r, [0.9, 0.5], method="value_iteration", tol=1e-8)
    exact = value_iteration(t, r, torch.tensor([0.9, 0.5], dtype=torch.float64))
    assert (out.error_bound <= 1e-8).all()
    assert ((out.q - exact.q).abs().amax((2, 3)) <= out.error_bound + exact.error_bound).all()
    floor, _ = team(t, r, 0.9, method="value_iteration", tol=1e-30)
    assert ((floor.error_bound > 1e-30) & (floor.error_bound < 1e-9)).all()


def test_undiscounted():
    t, r = banded(3, 20, dtype=torch.float64)
    assert (check(t, -r.abs(), [1.0, 0.9]).error_bound < 1e-8).all()
    with pytest.raises(ValueError, match=r"discount.*none does from state 0"):
        team(torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1), 1.0)
    stay = torch.tensor([[[[0, 1.0], [1, 0]], [[0, 0], [0, 0]]]], dtype=torch.float64)
    cost = torch.tensor([[[-3.0, -1.0], [0, 0]]], dtype=torch.float64)
    assert team(stay, cost, 1.0)[0].q.tolist() == [[[[-3.0, -4.0], [0.0, 0.0]]]]
    with pytest.raises(ValueError, match=r"discount.*earns without bound"):
        team(stay, -cost, 1.0)
    with pytest.raises(ValueError, match="method"):
        team(stay, cost, 1.0, method="value_iteration")


@pytest.mark.parametrize(("threads", "order"), TEAMS)
def test_any_team_finds_the_states_that_cannot_end(threads, order):
    t, r = banded(1, 18, dtype=torch.float64)
    both, gain = torch.zeros(2, 1, 36, 5, 36, dtype=torch.float64)
    both[:, :18, :, :18], gain[:, :18, :, :18] = t, -r.abs()
    both[:, 18:, :, 18:] = torch.eye(18, dtype=torch.float64)[None, :, None].roll(1, 1)  # round and round
    with pytest.raises(ValueError, match=r"discount.*none does from state 18"):
        team(both, gain, 1.0, threads=threads, order=order)


def test_rewards_of_all_sizes_and_ties():
    t, r = banded(1, 16, dtype=torch.float64, ends=0)
    both, gain = torch.zeros(2, 1, 32, 5, 32, dtype=torch.float64)
    both[:, :16, :, :16], both[:, 16:, :, 16:] = t, t
    gain[:, :16, :, :16], gain[:, 16:, :, 16:] = r * 1e8, r * 1e-8
    got = check(both, gain, [0.99])
    exact = long_double_q(t[0], r[0] * 1e-8, 0.99).astype(float)
    assert np.abs(got.q[0, 0, 16:].numpy() - exact).max() <= 1e-12 * np.abs(exact).max()  # 100 steps, 1e-16 each
    equal = torch.full((1, 3, 12, 3), 1 / 3, dtype=torch.float64)
    assert not check(equal, torch.ones(1, 3, 12, dtype=torch.float64)).policy.any()


def test_refuses_values_that_overflow():
    t, _ = banded(1, 6, dtype=torch.float64, ends=0)
    r = torch.full((1, 6, 5), 1.7e308, dtype=torch.float64)
    for method in ("auto", "value_iteration"):
        with pytest.raises(ValueError, match=r"^discount.*range"):
            team(t, r, 0.99, method=method)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.integers(1, 4), st.floats(0, 0.9999), st.integers(0, 10**6), st.floats(1e-6, 1e6))
def test_certificate(s, a, gamma, seed, scale):
    t, r = garnet(1, s, a, min(s, 3), seed)
    exact = long_double_q(t[0], r[0] * scale, gamma)
    out, _ = team(t, r * scale, gamma)
    assert float(abs(out.q[0, 0].numpy().astype(np.longdouble) - exact).max()) <= out.error_bound[0, 0]


@pytest.mark.parametrize("order", [0, -1])
def test_refusals(order):
    t, r = banded(3, 10)
    for at, value, message in [(9, torch.nan, "NaN"), (0, torch.inf, "NaN"), (0, -0.5, "negative"), (0, 2.0, "sum")]:
        bad = t.clone()
        bad[1, 2, 3, at] = bad[1, 2, 4, at] = bad[2, 1, 1, at] = value
        with pytest.raises(ValueError, match=rf"transition.*{message}.*\[1, 2, 3\]"):
            team(bad, r, 0.9, order=order)
    bad = r.clone()
    bad[1, 2, 3] = torch.inf
    with pytest.raises(ValueError, match=r"reward.*\[1, 2, 3\]"):
        team(t, bad, 0.9, order=order)
    with pytest.raises(ValueError, match=r"transition.*terminal.*\[0, 0, 0\]"):
        team(t, r, 0.9, terminal=torch.ones(3, 10, dtype=torch.bool), order=order)
    packed, gain = pack_transition(t, r)
    for name, value in [("first", -1), ("length", -1), ("first", 10), ("offset", -1), ("offset", 2**63 - 1)]:
        windows = PackedTransition(*(x.clone() for x in packed))
        getattr(windows, name)[1, 2, 3] = value
        with pytest.raises(ValueError, match=r"transition.*windows.*\[1, 2, 3\]"):
            team(windows, gain, 0.9, order=order)


@pytest.mark.skipif(_C.with_cuda, reason="built with CUDA")
def test_missing_cuda_is_said():
    with pytest.raises(ValueError, match=r"^backend: 'cuda' cannot serve value_iteration here: .*ICRL_CUDA=1"):
        value_iteration(*banded(1, 4), 0.9, backend="cuda")


def on_gpu(x):
    return PackedTransition(*(y.cuda() for y in x)) if isinstance(x, PackedTransition) else x.cuda()


@pytest.mark.gpu
@pytest.mark.skipif(not _C.with_cuda, reason="built without CUDA")
@pytest.mark.parametrize("s", [1, 16, 30, 64, 128, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("packed", [True, False])
def test_gpu(s, dtype, packed):
    t, r = banded(1000, s, dtype=dtype)
    t[::50] = garnet(20, s, 5, s)[0].to(dtype)  # some that need more memory than the others
    gammas = torch.tensor([0.994, 0.5], dtype=torch.float64)
    want = value_iteration(t, r, gammas)
    tables = [on_gpu(x) for x in (pack_transition(t, r) if packed else (t, r))]
    got = value_iteration(*tables, gammas.cuda(), backend="cuda")
    again = value_iteration(*tables, gammas.cuda(), backend="cuda")
    assert same(got, again)
    assert ((got.q.cpu() - want.q).abs().amax((2, 3)) <= got.error_bound.cpu() + want.error_bound).all()
    assert (got.error_bound <= 1e-6).all()
    on_host, _ = team(t[:60], r[:60], gammas)
    assert torch.equal(got.policy[:60].cpu(), on_host.policy)
