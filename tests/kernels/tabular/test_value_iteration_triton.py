"""value_iteration's Triton kernels, on a GPU or in Triton's interpreter."""

import numpy as np
import pytest
import torch
from test_value_iteration import banded, garnet, gym_tables, long_double_q, normalised

from icrl_kernels import _C, PackedTransition, _registry, pack_transition, value_iteration

pytest.importorskip("triton")
from icrl_kernels.tabular import value_iteration_reference as specification

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Few sweeps a policy: the interpreter is slow, and there are more policies then."""
    monkeypatch.setattr(specification, "INNER_SWEEPS", 5)


def solve(t, r, gammas, **options):
    t = PackedTransition(*(x.to(DEVICE) for x in t)) if isinstance(t, PackedTransition) else t.to(DEVICE)
    options = {k: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for k, x in options.items()}
    gammas = gammas if isinstance(gammas, float) else torch.tensor(gammas, dtype=torch.float64).to(DEVICE)
    out = value_iteration(t, r.to(DEVICE), gammas, **options, backend="triton")
    return type(out)(*(x.cpu() for x in out))


def check(t, r, gammas, tol=1e-6, **options):
    want = value_iteration(t, r, torch.tensor(gammas, dtype=torch.float64), backend="reference", **options)
    got = solve(t, r, gammas, tol=tol, **options)
    slack = got.error_bound + want.error_bound
    assert (got.error_bound <= tol).all()
    assert ((got.q - want.q).abs().amax((2, 3)) <= slack).all()
    assert ((got.v - want.v).abs().amax(2) <= slack).all()
    assert torch.equal(got.v, got.q.amax(-1))
    assert torch.equal(got.policy, got.q.argmax(-1))
    return got


@pytest.mark.parametrize("s", [1, 2, 9, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("packed", [False, True])
def test_banded(s, dtype, packed):
    t, r = banded(2, s, seed=s, dtype=dtype)
    gammas = [0.0, 0.6]
    if not packed:
        check(t, r, gammas)
        return
    want, got = solve(t, r, gammas), solve(*pack_transition(t, r), gammas)
    assert torch.equal(want.policy, got.policy)
    assert ((want.q - got.q).abs().amax((2, 3)) <= want.error_bound + got.error_bound).all()


@pytest.mark.parametrize(("s", "a", "branches"), [(5, 1, 2), (12, 9, 3), (20, 3, 20)])
def test_garnet(s, a, branches):
    check(*garnet(1, s, a, branches), [0.7])


def test_gymnasium_tables():
    t, r, terminal = gym_tables("FrozenLake-v1")
    check(t, r, [0.8], terminal=terminal)


def test_ragged_and_padding():
    t, r = banded(3, 12, dtype=torch.float64, ends=0)
    sizes = torch.tensor([12, 7, 1])
    for i, s in enumerate(sizes.tolist()):
        t[i, :s, :, :s] = normalised(t[i, :s, :, :s] + 1e-3)
        t[i, :, :, s:] = 0
        t[i, s:] = torch.nan
        r[i, s:] = torch.nan
    got = check(t, r, [0.6], num_states=sizes)
    for i, s in enumerate(sizes.tolist()):
        assert not got.q[i, :, s:].any()
        assert not got.v[i, :, s:].any()
        assert not got.policy[i, :, s:].any()


def test_what_is_not_read():
    t, r = banded(2, 12)
    want = solve(t, r, [0.6])
    assert torch.equal(solve(t, torch.where(t == 0, torch.nan, r), [0.6]).q, want.q)
    mean = (t * r).sum(-1)
    mean[:, -1] = torch.nan  # of a terminal state
    check(t, mean, [0.6], terminal=torch.arange(12).expand(2, 12) == 11)
    assert not solve(torch.zeros(1, 3, 2, 3), torch.ones(1, 3, 2), [0.6]).q.any()
    assert solve(torch.zeros(0, 3, 2, 3), torch.ones(0, 3, 2), [0.6, 0.5]).q.shape == (0, 2, 3, 2)


@pytest.mark.parametrize("method", ["auto", "value_iteration"])
def test_stops_at_tol_or_at_rounding(method):
    t, r = banded(1, 8)
    loose = check(t, r, [0.6], tol=1e-2, method=method)
    tight = check(t, r, [0.6], tol=1e-7, method=method)
    assert (loose.iterations < tight.iterations).all()
    assert (loose.error_bound > 1e-7).all()
    floor = solve(t, r, [0.6], tol=1e-30, method=method)
    assert ((floor.error_bound > 1e-30) & (floor.error_bound < 1e-11)).all()
    if method == "auto":
        assert (tight.iterations < solve(t, r, [0.6], tol=1e-7, method="value_iteration").iterations).all()


def test_float_discount_and_ties():
    equal = torch.full((1, 3, 4, 3), 1 / 3, dtype=torch.float64)
    out = solve(equal, torch.ones(1, 3, 4, dtype=torch.float64), 0.5)
    assert out.q.shape == (1, 3, 4)
    assert not out.policy.any()
    assert ((out.v - 2).abs() <= out.error_bound[:, None]).all()


@pytest.mark.parametrize("seed", range(4))
def test_certificate(seed):
    scale = 10.0 ** (seed * 3 - 6)
    t, r = garnet(1, 6, 3, 3, seed, torch.float32 if seed % 2 else torch.float64)
    exact = long_double_q(t[0], r[0] * scale, 0.6)
    for tol in (1e-3 * scale, 1e-30):
        out = solve(t, r * scale, 0.6, tol=tol)
        assert float(abs(out.q[0].numpy().astype(np.longdouble) - exact).max()) <= out.error_bound[0]


def test_refuses_values_that_overflow():
    t, _ = banded(1, 6, dtype=torch.float64, ends=0)
    with pytest.raises(ValueError, match=r"^discount.*range"):
        solve(t, torch.full((1, 6, 5), 1.7e308, dtype=torch.float64), 0.99)


def test_refuses_what_sweeps_cannot_solve():
    t, r = banded(1, 6)
    with pytest.raises(ValueError, match=r"^method.*triton"):
        solve(t, r, 0.9, method="policy_iteration")
    for tables in ((t, r), (t.double() * (1 - 5e-5), r.double())):  # rows may be off by 1e-4: a contraction even then
        with pytest.raises(ValueError, match=r"^discount.*triton"):
            solve(*tables, 1.0)


def test_ends_after_so_many_sweeps(monkeypatch):
    monkeypatch.setattr(specification, "MOST_SWEEPS", 20)
    t, r = banded(1, 6)
    exact = value_iteration(t, r, 0.99)
    out = solve(t, r, 0.99)
    assert out.iterations[0] == 4  # backups, each but the last with 5 sweeps more
    assert 1e-6 < out.error_bound[0] < torch.inf
    assert ((out.q - exact.q).abs().amax() <= out.error_bound + exact.error_bound).all()


def test_refusals():
    t, r = banded(3, 10)
    for at, value, message in [(9, torch.nan, "NaN"), (0, torch.inf, "NaN"), (0, -0.5, "negative"), (0, 2.0, "sum")]:
        bad = t.clone()
        bad[1, 2, 3, at] = bad[1, 2, 4, at] = bad[2, 1, 1, at] = value
        with pytest.raises(ValueError, match=rf"transition.*{message}.*\[1, 2, 3\]"):
            solve(bad, r, 0.9)
    bad = r.clone()
    bad[1, 2, 3] = torch.inf
    with pytest.raises(ValueError, match=r"reward.*\[1, 2, 3\]"):
        solve(t, bad, 0.9)
    with pytest.raises(ValueError, match=r"transition.*terminal.*\[0, 0, 0\]"):
        solve(t, r, 0.9, terminal=torch.ones(3, 10, dtype=torch.bool))
    packed, gain = pack_transition(t, r)
    for name, value in [("first", -1), ("length", -1), ("first", 10), ("offset", -1), ("offset", 2**63 - 1)]:
        windows = PackedTransition(*(x.clone() for x in packed))
        getattr(windows, name)[1, 2, 3] = value
        with pytest.raises(ValueError, match=r"transition.*windows.*\[1, 2, 3\]"):
            solve(windows, gain, 0.9)


def test_the_choice_on_a_gpu():
    assert _registry.resolve("value_iteration", "cuda")[0] == ("cuda" if _C.with_cuda else "triton")


@pytest.mark.gpu
@pytest.mark.parametrize("s", [16, 64, 128, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gpu(s, dtype, monkeypatch):
    monkeypatch.undo()
    t, r = banded(300, s, dtype=dtype)
    out = check(t, r, [0.994, 0.5])
    again = solve(t, r, [0.994, 0.5], tol=1e-6)
    assert all(torch.equal(x, y) for x, y in zip(out, again, strict=True))
