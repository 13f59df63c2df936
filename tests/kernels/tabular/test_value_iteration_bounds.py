"""error_bound is never below the true error: against exact rational policy iteration, and extended precision."""

from fractions import Fraction
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_value_iteration import banded, garnet, gym_tables, long_double_q, normalised

from icrl_kernels import pack_transition, value_iteration


def solve_exactly(m, right):
    """Gauss-Jordan elimination of rationals."""
    n = len(right)
    m = [[*row, x] for row, x in zip(m, right, strict=True)]
    for k in range(n):
        pivot = next(i for i in range(k, n) if m[i][k] != 0)
        m[k], m[pivot] = m[pivot], m[k]
        m[k] = [x / m[k][k] for x in m[k]]
        for i in range(n):
            if i != k and m[i][k] != 0:
                m[i] = [x - m[i][k] * y for x, y in zip(m[i], m[k], strict=True)]
    return [row[-1] for row in m]


def exact_q(t, r, gamma, policy):
    """Q* of one task in rationals, by policy iteration from `policy` (which must end where the discount is 1)."""
    s, a, _ = t.shape
    t = [[[Fraction(x) for x in row] for row in rows] for rows in t.double().tolist()]
    if r.dim() == 3:
        r = [
            [
                sum((p * Fraction(x) for p, x in zip(t[i][j], r[i, j].tolist(), strict=True) if p), Fraction(0))
                for j in range(a)
            ]
            for i in range(s)
        ]
    else:
        ends = [not any(any(row) for row in t[i]) for i in range(s)]
        r = [[Fraction(0) if ends[i] else Fraction(x) for x in row] for i, row in enumerate(r.double().tolist())]
    gamma, policy = Fraction(gamma), list(policy)
    while True:
        m = [[int(i == j) - gamma * t[i][policy[i]][j] for j in range(s)] for i in range(s)]
        v = solve_exactly(m, [r[i][policy[i]] for i in range(s)])
        q = [
            [r[i][j] + gamma * sum(p * x for p, x in zip(t[i][j], v, strict=True) if p) for j in range(a)]
            for i in range(s)
        ]
        new = [j if q[i][j] == max(q[i]) else q[i].index(max(q[i])) for i, j in enumerate(policy)]
        if new == policy:
            return q
        policy = new


def assert_proven(out, exact):
    """For one task without discounts' dimension."""
    bound = out.error_bound[0].item()
    assert bound == bound
    if bound == float("inf"):
        return
    for got, want in zip(out.q[0].tolist(), exact, strict=True):
        assert all(abs(Fraction(x) - y) <= Fraction(bound) for x, y in zip(got, want, strict=True))
    for got, want in zip(out.v[0].tolist(), exact, strict=True):
        assert abs(Fraction(got) - max(want)) <= Fraction(bound)


def tables(kind, rewards, s, a, seed, dtype):
    """[1,S,A,S] and [1,S,A] or [1,S,A,S] of the kind that the name says."""
    g = torch.Generator().manual_seed(seed)
    if kind == "dense":
        t = normalised(torch.rand(1, s, a, s, generator=g, dtype=torch.float64) + 1e-3)
    elif kind == "banded":
        t = banded(1, s, a, seed, torch.float64, ends=min(1, s - 1))[0]
    elif kind == "garnet":
        t = garnet(1, s, a, min(2, s), seed)[0]
    elif kind == "loops":  # states that lead to themselves, some surely
        stay = torch.rand(1, s, a, 1, generator=g, dtype=torch.float64).round(decimals=0)
        t = stay * torch.eye(s)[:, None] + (1 - stay) * garnet(1, s, a, 1, seed)[0].round()
    else:  # "denormal": probabilities of 1e-310 beside one of 1
        t = garnet(1, s, a, 1, seed)[0].round() + 1e-310
    r = torch.randn(1, s, a, s, generator=g, dtype=torch.float64)
    if rewards == "ties":
        t[:] = t[:, :, :1]
        r = torch.ones_like(r)
    elif rewards == "sizes":
        r = r * torch.where(torch.rand(1, s, a, 1, generator=g) < 0.5, 1e8, 1e-8)
    elif rewards == "denormal":
        r = r * 1e-310
    elif rewards == "expected":
        r = r[..., 0]
    elif rewards == "huge":
        r = r * 1e290
    return t.to(dtype), r.to(dtype)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(["dense", "banded", "garnet", "loops", "denormal"]),
    st.sampled_from(["normal", "ties", "sizes", "denormal", "expected", "huge"]),
    st.integers(1, 4),
    st.integers(1, 3),
    st.sampled_from([0.0, 0.5, 0.93, 0.994, 0.9999, 1 - 2.0**-40]) | st.floats(0, 0.99999),
    st.integers(0, 10**6),
    st.sampled_from([torch.float32, torch.float64]),
)
@example("garnet", "denormal", 3, 2, 0.994, 0, torch.float64)
@example("denormal", "denormal", 4, 2, 0.9999, 1, torch.float64)
@example("dense", "huge", 4, 2, 0.9999, 1, torch.float64)
def test_bound_against_rationals(kind, rewards, s, a, gamma, seed, dtype):
    if rewards == "huge" or gamma > 0.9999:  # float32 rows may sum to more than 1 / gamma
        dtype = torch.float64
    t, r = tables(kind, rewards, s, a, seed, dtype)
    exact, ways = None, ("policy_iteration", "value_iteration", "modified_policy_iteration")
    for method, backend in product(ways, ("cpu", "reference")):
        if method != "policy_iteration" and gamma > (0.96 if backend == "reference" else 0.9999):
            continue  # thousands of sweeps
        out = value_iteration(t, r, gamma, method=method, backend=backend)
        if exact is None:
            exact = exact_q(t[0], r[0], gamma, out.policy[0].tolist())
        assert_proven(out, exact)
    # among so many states that the CPU takes the task alone, not in a lane beside others
    alone, earned = torch.zeros(1, 64, a, 64, dtype=dtype), torch.zeros(1, 64, a, 64, dtype=dtype)
    alone[:, 60 : 60 + s, :, 60 : 60 + s] = t
    earned[:, 60 : 60 + s, :, 60 : 60 + s] = r if r.dim() == 4 else r[..., None]
    if r.dim() == 3:
        earned = earned[..., 60]
    out = value_iteration(alone, earned, gamma)
    assert not out.v[0, :60].any()
    assert_proven(out._replace(q=out.q[:, 60 : 60 + s], v=out.v[:, 60 : 60 + s]), exact)
    packed = pack_transition(t, r if r.dim() == 4 else torch.zeros_like(t))
    out = value_iteration(packed[0], packed[1] if r.dim() == 4 else r, gamma)
    assert_proven(out, exact)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 4),
    st.integers(1, 3),
    st.integers(0, 10**6),
    st.sampled_from([torch.float32, torch.float64]),
    st.sampled_from(["surely", "somehow"]),
)
def test_bound_undiscounted(s, a, seed, dtype, how):
    g = torch.Generator().manual_seed(seed)
    if how == "surely":  # every policy ends
        t = torch.rand(1, s, a, s, generator=g, dtype=torch.float64)
        t[..., -1] += 0.1
        t, r = normalised(t), torch.randn(1, s, a, s, generator=g, dtype=torch.float64)
    else:  # some never do, at a cost
        t = garnet(1, s, a, 1, seed)[0].round()
        t[:, :, 0] = torch.eye(s, dtype=torch.float64).roll(1, 1)  # action 0 goes from state to state towards the end
        r = -0.1 - torch.rand(1, s, a, s, generator=g, dtype=torch.float64)
    t[:, -1] = 0
    t, r = t.to(dtype), r.to(dtype)
    for backend in ("cpu", "reference"):
        out = value_iteration(t, r, 1.0, backend=backend)
        assert_proven(out, exact_q(t[0], r[0], 1.0, out.policy[0].tolist()))
        assert out.error_bound[0] < 1e-10  # and it is worth something


def assert_near(out, t, r, gamma, terminal=None):
    """Against extended precision."""
    for n in range(len(t)):
        ends = None if terminal is None else terminal[n]
        exact = long_double_q(t[n], r[n], gamma, ends, out.policy[n])
        error = abs(out.q[n].numpy().astype(np.longdouble) - exact).max()
        assert error <= out.error_bound[n]
        assert out.error_bound[n] <= 1e-6 * max(1, abs(exact).max())


@pytest.mark.parametrize("method", ["policy_iteration", "value_iteration", "modified_policy_iteration"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("kind", ["banded", "garnet", "dense"])
def test_methods_agree(method, backend, kind):
    if kind == "dense":
        t, r = normalised(torch.rand(2, 19, 4, 19) + 0.01), torch.randn(2, 19, 4, 19)
    else:
        t, r = banded(2, 19) if kind == "banded" else garnet(2, 19, dtype=torch.float32)
    for gamma in (0.0, 0.9, 0.994):
        out = value_iteration(t, r, gamma, method=method, backend=backend, tol=1e-7)
        assert_near(out, t, r, gamma)
        assert (out.error_bound <= 1e-7).all()


def test_sweeps_needed():
    """The span rule needs fewer sweeps than the plain one by far where tasks mix; improvements are fewer than sweeps."""
    t, r = garnet(1, 40, 4, 8)
    plain = np.log(1e-8) / np.log(0.994)
    for backend in ("cpu", "reference"):
        sweeps = value_iteration(t, r, 0.994, method="value_iteration", backend=backend)
        assert sweeps.iterations[0] < plain / 10
        modified = value_iteration(t, r, 0.994, method="modified_policy_iteration", backend=backend)
        assert modified.iterations[0] < sweeps.iterations[0] / 3


def test_sweeps_end():
    """A discount next to 1 with slow mixing: the sweeps end, and the bound says how far they came."""
    t = torch.zeros(1, 3, 1, 3, dtype=torch.float64)
    t[0, 0, 0, :2] = torch.tensor([1 - 2.0**-30, 2.0**-30], dtype=torch.float64)
    t[0, 1, 0, 0] = 1
    r = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)[None, :, None]
    gamma = 1 - 2.0**-35
    for method in ("value_iteration", "modified_policy_iteration"):
        out = value_iteration(t, r, gamma, method=method)
        assert out.error_bound[0] > 1
        assert_proven(out, exact_q(t[0], r[0], gamma, [0, 0, 0]))


def test_out_of_range():
    t, r = garnet(1, 5)
    for backend in ("cpu", "reference"):
        for method in ("policy_iteration", "value_iteration", "modified_policy_iteration"):
            with pytest.raises(ValueError, match=r"discount.*range|reward"):
                value_iteration(t, r.abs() * 1e307 + 1e307, 0.999, method=method, backend=backend)


def test_flushed_denormals():
    """The bound holds in a thread that was told to flush denormals: the planner does not."""
    t, r = garnet(1, 4)
    r = r * 1e-310
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        out = value_iteration(t, r, 0.9)
        bits = out.q.view(torch.int64).tolist(), out.error_bound.view(torch.int64).tolist()
    finally:
        torch.set_flush_denormal(False)
    want = value_iteration(t, r, 0.9)
    assert bits == (want.q.view(torch.int64).tolist(), want.error_bound.view(torch.int64).tolist())
    assert 0 < want.error_bound[0] < 1e-318
    assert_proven(want, exact_q(t[0], r[0], 0.9, want.policy[0].tolist()))


def test_dense_of_1024_states():
    g = torch.Generator().manual_seed(0)
    t = normalised(torch.rand(1, 1024, 2, 1024, generator=g) + 1e-3)
    r = torch.randn(1, 1024, 2, generator=g)
    assert_near(value_iteration(t, r, 0.994), t, r, 0.994)
    packed = pack_transition(t)
    assert_near(value_iteration(packed, r, 0.994, method="modified_policy_iteration", tol=1e-9), t, r, 0.994)


@pytest.mark.parametrize("name", ["FrozenLake-v1", "FrozenLake8x8-v1", "CliffWalking-v1", "Taxi-v4"])
def test_gymnasium_tables(name):
    t, r, terminal = gym_tables(name)
    for gamma in (0.9, 0.994):
        assert_near(value_iteration(t, r, gamma, terminal=terminal), t, r, gamma, terminal)
    packed = pack_transition(t)
    for method in ("value_iteration", "modified_policy_iteration"):
        assert_near(value_iteration(packed, r, 0.9, terminal=terminal, method=method), t, r, 0.9, terminal)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_rows_that_end_in_a_state_that_does_not(backend):
    """With `terminal` given, an all-zero row of another state ends the episode, and its reward counts."""
    t = torch.zeros(1, 2, 2, 2, dtype=torch.float64)
    t[0, 0, 1, 1] = 1
    r = torch.tensor([[[1.0, 0.5], [7.0, 7.0]]], dtype=torch.float64)
    terminal = torch.tensor([[False, True]])
    out = value_iteration(t, r, 0.9, terminal=terminal, backend=backend)
    assert out.q[0].tolist() == [[1.0, 0.5], [0.0, 0.0]]
    out = value_iteration(t, r, 0.9, terminal=torch.tensor([[False, False]]), backend=backend)
    assert out.q[0].tolist() == [[1.0, 0.5 + 0.9 * 7.0], [7.0, 7.0]]
