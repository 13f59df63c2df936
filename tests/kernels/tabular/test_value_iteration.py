import importlib
import os
import subprocess
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tabular import moved
from torch.library import opcheck

from icrl_kernels import _C, value_iteration
from icrl_kernels.testing import assert_as_good_as_torch

vi = importlib.import_module("icrl_kernels.tabular.value_iteration")  # the module: the package exports its function


def normalised(t):
    return t / t.sum(-1, keepdim=True).clamp_min(1e-30)


def banded(n, s, a=5, seed=0, dtype=torch.float32, ends=1, width=None):
    """Tasks like AnyMDP's: each row one window near the state's place, some states terminal."""
    g = torch.Generator().manual_seed(seed)
    width = width or max(3.0, s**0.6)
    place = torch.arange(s)
    centre = place[:, None, None] + torch.randn(n, s, a, 1, generator=g) * width * 0.4
    near = (place - centre).abs() < torch.rand(n, s, a, 1, generator=g) * width * 0.5 + 1
    t = torch.where(near, torch.rand(n, s, a, s, generator=g) + 0.01, 0.0)
    t = torch.where(near.any(-1, keepdim=True), t, torch.eye(s)[:, None, :]).to(dtype)
    t = normalised(t)
    if ends:
        t[:, -ends:] = 0
    return t, torch.randn(n, s, a, s, generator=g).to(dtype)


def garnet(n, s, a=3, branches=4, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    successors = torch.rand(n, s, a, s, generator=g).argsort(-1)[..., :branches]
    t = torch.zeros(n, s, a, s).scatter_(-1, successors, torch.rand(n, s, a, branches, generator=g) + 0.01)
    return normalised(t.to(dtype)), torch.randn(n, s, a, generator=g).to(dtype)


def gym_tables(name, **options):
    env = gymnasium.make(name, **options).unwrapped
    s, a = env.observation_space.n, env.action_space.n
    t, r, ends = np.zeros((s, a, s)), np.zeros((s, a)), set()
    for i in range(s):
        for j in range(a):
            for p, k, reward, done in env.P[i][j]:
                t[i, j, k] += p
                r[i, j] += p * reward
                if done:
                    ends.add(int(k))
    t[list(ends)] = 0
    terminal = torch.zeros(1, s, dtype=torch.bool)
    terminal[0, list(ends)] = True
    return torch.from_numpy(t)[None], torch.from_numpy(r)[None], terminal


def long_double_q(t, r, gamma, terminal=None, policy=None):
    """Q* of one task by policy iteration in extended precision, from a first guess where one is given."""
    t = t.numpy().astype(np.longdouble)
    r = r.numpy().astype(np.longdouble)
    if r.ndim == 3:
        r = (t * np.where(t != 0, r, 0)).sum(-1)
    done = (t == 0).all((1, 2)) if terminal is None else terminal.numpy()
    r = np.where(done[:, None], 0, r)
    s, gamma = len(t), np.longdouble(gamma)
    policy = r.argmax(-1) if policy is None else policy.numpy()
    for _ in range(200):
        # float64 solve, refined against the extended residual
        p, rp = t[np.arange(s), policy], r[np.arange(s), policy]
        m = np.eye(s, dtype=np.longdouble) - gamma * p
        v = np.zeros(s, np.longdouble)
        for _ in range(6):
            v = v + np.linalg.solve(m.astype(float), (rp - m @ v).astype(float))
        q = r + gamma * t @ v
        new = np.where(q.max(-1) > q[np.arange(s), policy] + 1e-17 * (1 + abs(q).max()), q.argmax(-1), policy)
        if (new == policy).all():
            break
        policy = new
    return r + gamma * t @ q.max(-1)


def on_triton(device):
    return torch.device(device).type == "cuda" and not _C.with_cuda


def check(t, r, gamma, device="cpu", **options):
    """Against the reference, which must be no better than c times; and the certificate against extended precision."""
    there = {name: moved(x, device) for name, x in options.items()}
    sweeps = on_triton(device)  # to tol, not to the last bits
    out = moved(value_iteration(t.to(device), r.to(device), gamma, **there), "cpu")
    ref = value_iteration(t, r, gamma, backend="reference", **options)
    terminal = options.get("terminal")
    for n in range(len(t)):
        states = t.shape[1] if "num_states" not in options else int(options["num_states"][n])
        cut = (slice(states),)
        args = (t[n, :states, :, :states], r[n, :states, :, :states] if r.dim() == 4 else r[n, :states])
        exact = long_double_q(*args, gamma, None if terminal is None else terminal[n, :states], out.policy[n, :states])
        for x in (out, ref):
            error = float(abs(x.q[n][cut].numpy().astype(np.longdouble) - exact).max())
            assert error <= x.error_bound[n]
            assert float(abs(x.v[n][cut].numpy().astype(np.longdouble) - exact.max(-1)).max()) <= x.error_bound[n]
        if not sweeps:
            assert_as_good_as_torch(out.q[n][cut], ref.q[n][cut], torch.from_numpy(exact.astype(float)), roundings=64)
        assert not out.q[n, states:].any()
        assert not out.v[n, states:].any()
        assert not out.policy[n, states:].any()
    assert torch.equal(out.v, out.q.amax(-1))
    assert torch.equal(out.policy, out.q.argmax(-1))
    return out


@pytest.mark.parametrize("s", [1, 2, 7, 8, 9, 16, 33, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_banded(s, dtype, device):
    for gamma in (0.0, 0.5, 0.994):
        out = check(*banded(3, s, seed=s, dtype=dtype), gamma, device)
        assert (out.error_bound <= 1e-6).all()


@pytest.mark.parametrize(("s", "a", "branches"), [(5, 1, 2), (20, 9, 3), (50, 3, 50), (100, 17, 4)])
def test_garnet(s, a, branches, device):
    t, r = garnet(2, s, a, branches)
    assert (check(t, r, 0.99, device).error_bound <= 1e-6).all()


def test_value_iteration_method():
    t, r = banded(3, 20)
    exact = value_iteration(t, r, 0.9)
    for backend in ("cpu", "reference"):
        out = value_iteration(t, r, 0.9, method="value_iteration", tol=1e-8, backend=backend)
        assert (out.error_bound <= 1e-8).all()
        assert ((out.q - exact.q).abs().amax((1, 2)) <= out.error_bound + exact.error_bound).all()
        # a bound that rounding forbids ends at the floor, and says so
        floor = value_iteration(t, r, 0.9, method="value_iteration", tol=1e-30, backend=backend)
        assert ((floor.error_bound > 1e-30) & (floor.error_bound < 1e-9)).all()


@pytest.mark.parametrize("name", ["FrozenLake-v1", "FrozenLake8x8-v1", "CliffWalking-v1"])
def test_gymnasium_tables(name, device):
    t, r, terminal = gym_tables(name)
    bound = 1e-6 if on_triton(device) else 1e-9
    assert (check(t, r, 0.95, device, terminal=terminal).error_bound <= bound).all()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_cliff_undiscounted(backend):
    t, r, terminal = gym_tables("CliffWalking-v1")
    out = value_iteration(t, r, 1.0, terminal=terminal, backend=backend)
    assert out.v[0, 36] == -13  # the known answer: 13 steps from the start
    assert out.error_bound[0] < 1e-9


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_undiscounted(backend):
    # from state 0: action 0 ends surely at cost 3, action 1 stays with probability 1/2 at cost 1 a step, else ends
    t = torch.tensor([[[[0, 1], [0.5, 0.5]], [[0, 0], [0, 0]]]], dtype=torch.float64)
    r = torch.tensor([[[-3.0, -1.0], [0, 0]]], dtype=torch.float64)
    out = value_iteration(t, r, 1.0, backend=backend)
    assert out.q[0].tolist() == [[-3.0, -2.0], [0.0, 0.0]]
    assert out.error_bound[0] < 1e-12
    stay = t.clone()
    stay[0, 0, 1] = torch.tensor([1.0, 0.0])
    with pytest.raises(ValueError, match=r"discount.*earns without bound"):
        value_iteration(stay, r.abs(), 1.0, backend=backend)
    with pytest.raises(ValueError, match=r"discount.*no policy|discount.*none does from state 0"):
        value_iteration(torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1), 1.0, backend=backend)
    # an improper policy that loses for ever is no obstacle
    t[0, 0, 1] = torch.tensor([1.0, 0.0])
    out = value_iteration(t, r, 1.0, backend=backend)
    assert out.q[0].tolist() == [[-3.0, -4.0], [0.0, 0.0]]
    assert out.error_bound[0] < 1e-12
    with pytest.raises(ValueError, match="method"):
        value_iteration(t, r, 1.0, backend=backend, method="value_iteration")


def test_undiscounted_random(device):
    if on_triton(device):
        pytest.skip("Triton only sweeps, which needs a discount below 1")
    t, r = banded(4, 30, dtype=torch.float64)
    out = check(t, -r.abs(), 1.0, device)
    assert (out.error_bound < 1e-8).all()


def test_undiscounted_some_at_a_time(monkeypatch):
    t, r = banded(5, 9, dtype=torch.float64)
    whole = value_iteration(t, -r.abs(), 1.0)
    monkeypatch.setattr(vi, "CERTIFIED_AT_ONCE", 1000)
    parts = value_iteration(t, -r.abs(), 1.0)
    assert torch.equal(parts.q, whole.q)
    # the proof's sums may be taken in another order in a smaller batch
    torch.testing.assert_close(parts.error_bound, whole.error_bound, rtol=0.5, atol=0)


def test_ragged_is_each_alone(device):
    t, r = banded(4, 24, dtype=torch.float64, ends=0)
    sizes = torch.tensor([24, 1, 9, 16])
    t = t.clone()
    for i, s in enumerate(sizes.tolist()):
        t[i, :s, :, :s] = normalised(t[i, :s, :, :s] + 1e-3)
        t[i, :, :, s:] = 0
        t[i, s:] = float("nan")
        r[i, s:] = float("nan")
    out = check(t, r, 0.97, device, num_states=sizes)
    for i, s in enumerate(sizes.tolist()):
        alone = value_iteration(t[i : i + 1, :s, :, :s].to(device), r[i : i + 1, :s, :, :s].to(device), 0.97)
        if on_triton(device):
            assert (alone.q[0].cpu() - out.q[i, :s]).abs().max() <= alone.error_bound.cpu() + out.error_bound[i]
        else:
            assert torch.equal(alone.q[0].cpu(), out.q[i, :s])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_several_discounts(backend):
    t, r = banded(3, 20)
    shared = torch.tensor([0.9, 0.0, 0.994])
    out = value_iteration(t, r, shared, backend=backend)
    assert out.q.shape == (3, 3, 20, 5)
    each = torch.stack([shared, shared.flip(0), torch.full((3,), 0.5)])
    own = value_iteration(t, r, each, backend=backend)
    for g in range(3):
        one = value_iteration(t, r, shared[g].item(), backend=backend)
        assert ((out.q[:, g] - one.q).abs().amax((1, 2)) <= out.error_bound[:, g] + one.error_bound).all()
        assert ((own.q[1, 2 - g] - one.q[1]).abs().max() <= own.error_bound[1, 2 - g] + one.error_bound[1]).all()


def test_rewards_of_all_sizes():
    # two chains that do not touch, one of rewards near 1e8, one near 1e-8: neither spoils the other
    t, r = banded(2, 20, dtype=torch.float64, ends=0)
    big = torch.zeros(2, 40, 5, 40, dtype=torch.float64)
    gain = torch.zeros_like(big)
    big[:, :20, :, :20], big[:, 20:, :, 20:] = t, t
    gain[:, :20, :, :20], gain[:, 20:, :, 20:] = r * 1e8, r * 1e-8
    out = check(big, gain, 0.99)
    small = value_iteration(t, r * 1e-8, 0.99)
    exact = torch.stack([torch.from_numpy(long_double_q(t[n], r[n] * 1e-8, 0.99).astype(float)) for n in range(2)])
    assert_as_good_as_torch(out.q[:, 20:], small.q, exact)


def test_no_transition_no_reward():
    # NaN rewards of impossible transitions count for nothing, terminal rewards are not read
    t, r = banded(2, 12)
    want = value_iteration(t, r, 0.9)
    holes = torch.where(t == 0, torch.nan, r)
    for backend in ("cpu", "reference"):
        got = value_iteration(t, holes, 0.9, backend=backend)
        assert ((got.q - want.q).abs().amax((1, 2)) <= got.error_bound + want.error_bound).all()
    mean = (t.double() * r).sum(-1)
    mean[:, -1] = 7
    for terminal in (None, torch.arange(12).expand(2, 12) == 11):
        got = value_iteration(t.double(), mean, 0.9, terminal=terminal)
        assert ((got.q - want.q).abs().amax((1, 2)) <= got.error_bound + want.error_bound).all()
        assert not got.q[:, -1].any()


def test_ties_take_the_lowest_action():
    t = torch.full((1, 3, 4, 3), 1 / 3, dtype=torch.float64)
    out = value_iteration(t, torch.ones(1, 3, 4, dtype=torch.float64), 0.9)
    assert not out.policy.any()


def test_empty_batch(device):
    out = value_iteration(torch.zeros(0, 3, 2, 3, device=device), torch.zeros(0, 3, 2, device=device), 0.9)
    assert out.q.shape == (0, 3, 2)
    assert out.error_bound.shape == (0,)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 12),
    st.integers(1, 4),
    st.floats(0, 0.9999),
    st.integers(0, 10**6),
    st.floats(1e-6, 1e6),
    st.booleans(),
)
def test_certificate(s, a, gamma, seed, scale, single):
    dtype = torch.float32 if single else torch.float64
    t, r = garnet(1, s, a, min(s, 3), seed, dtype)
    r = r * scale
    exact = long_double_q(t[0], r[0], gamma)
    for options in ({}, {"backend": "reference"}, {"method": "value_iteration", "tol": 1e-3 * scale}):
        if "tol" in options and gamma > 0.99:
            continue
        out = value_iteration(t, r, gamma, **options)
        assert float(abs(out.q[0].numpy().astype(np.longdouble) - exact).max()) <= out.error_bound[0]


def test_near_one_without_contraction():
    # float32 rows may sum to more than 1: then there is no contraction, and the bound comes from the time to the end
    t, r = banded(3, 20)
    out = check(t, -r.abs(), 1 - 1e-9)
    assert (out.error_bound < 1e-6).all()


def test_same_bits_for_any_threads():
    t, r = banded(9, 33)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = value_iteration(t, r, torch.tensor([0.5, 0.99]))
        torch.set_num_threads(2)
        two = value_iteration(t, r, torch.tensor([0.5, 0.99]))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, y) for x, y in zip(one, two, strict=True))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, r: t[1, 2, 3].mul_(1.01), r"transition.*sum.*\[1, 2, 3\]"),
        (
            lambda t, r: t[1, 2, 3].copy_(torch.eye(10)[0] * 1.5 - torch.eye(10)[1] * 0.5),
            r"transition.*negative.*\[1, 2, 3\]",
        ),
        (lambda t, r: t[1, 2, 3, 9].fill_(torch.nan), r"transition.*NaN.*\[1, 2, 3\]"),
        (lambda t, r: t[1, 2, 3, 0].fill_(torch.inf), r"transition.*NaN.*\[1, 2, 3\]"),
        (lambda t, r: r[1, 2, 3].fill_(torch.nan), r"reward.*\[1, 2, 3\]"),
        (lambda t, r: r[1, 2, 3].fill_(torch.inf), r"reward.*\[1, 2, 3\]"),
    ],
)
def test_refuses_bad_tables(backend, change, message, device):
    t, r = banded(3, 10)
    change(t, r)
    with pytest.raises(ValueError, match=message):
        value_iteration(t.to(device), r.to(device), 0.9, backend=backend)
    for name, value in (("discount", 1.1), ("num_states", torch.tensor([10, 11, 10], device=device))):
        with pytest.raises(ValueError, match=f"^{name}"):
            value_iteration(t.to(device), r.to(device), **{"discount": 0.9, name: value}, backend=backend)


def test_refuses_bad_arguments():
    t, r = banded(2, 6)
    for gamma in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="discount"):
            value_iteration(t, r, gamma)
    cases = [
        ("discount", {"discount": torch.rand(3, 2)}),
        ("reward", {"reward": r[:, :, :2]}),
        ("reward", {"reward": r.double()}),
        ("transition", {"transition": t[..., :5]}),
        ("transition", {"transition": t.half(), "reward": r.half()}),
        ("terminal", {"terminal": torch.zeros(2, 6)}),
        ("transition", {"terminal": torch.ones(2, 6, dtype=torch.bool)}),
        ("num_states", {"num_states": torch.tensor([6, 7])}),
        ("num_states", {"num_states": torch.tensor([6, 6], dtype=torch.int32)}),
        ("tol", {"tol": 0.0}),
        ("tol", {"tol": None}),
        ("discount", {"discount": [0.9, 0.5]}),
        ("discount", {"discount": "0.9x"}),
        ("method", {"method": "magic"}),
        ("backend", {"backend": "magic"}),
        ("transition", {"transition": t.clone().requires_grad_()}),
        ("reward", {"reward": r.to("meta")}),
    ]
    for name, change in cases:
        arguments = {"transition": t, "reward": r, "discount": 0.9, **change}
        with pytest.raises(ValueError, match=f"^{name}"):
            value_iteration(**arguments)


def test_opcheck():
    t, r = banded(2, 6)
    for backend in ("cpu", "reference"):
        arguments = (
            t,
            r,
            [],
            torch.tensor([0.9, 0.5]),
            t.sum((2, 3)) == 0,
            torch.tensor([6, 6]),
            1e-6,
            "auto",
            backend,
        )
        opcheck(torch.ops.icrl.value_iteration.default, arguments)


def test_compile():
    t, r = banded(2, 6)
    compiled = torch.compile(lambda t, r: value_iteration(t, r, 0.9).q * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(t, r), value_iteration(t, r, 0.9).q * 2)


@pytest.mark.parametrize("isa", ["generic", "avx2"])
def test_other_instruction_sets(isa):
    code = (
        "import torch\nfrom icrl_kernels import _C\nfrom test_value_iteration import banded, garnet, check\n"
        "try: print(_C.isa())\nexcept ValueError: raise SystemExit(77)\n"
        "check(*banded(2, 37), 0.99); check(*garnet(1, 20), 0.9); check(*banded(2, 30, dtype=torch.float64), 0.5)"
    )
    env = {**os.environ, "ICRL_ISA": isa, "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=Path(_C.__file__).parents[1], capture_output=True, text=True
    )
    if done.returncode == 77:
        pytest.skip(f"this processor has no {isa}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == isa
