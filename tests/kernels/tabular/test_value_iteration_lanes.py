"""Small tasks solved side by side in the lanes of vectors: as good as the reference, and blind to their company."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_value_iteration import banded, check, garnet

from icrl.worlds import sample_anymdp
from icrl_kernels import _C, PackedTransition, pack_transition, value_iteration

GAMMAS = torch.tensor([0.93, 0.0, 0.994, 0.5], dtype=torch.float64)
CROSSOVER = 96  # kMostLaneStates of csrc/tabular/value_iteration.cpp
PADDED = CROSSOVER + 8


def mixed(dtype=torch.float32):
    """Tasks that need different numbers of rounds: banded, scattered, dense, of zeros, of ties; [12,20,4,20]."""
    t, r = banded(6, 20, 4, seed=3, dtype=dtype)
    t2, _ = garnet(5, 20, 4, 20, seed=4, dtype=dtype)
    t = torch.cat([t, t2, torch.zeros(1, 20, 4, 20, dtype=dtype)])
    r = torch.cat([(t[:6] * r).sum(-1), torch.randn(6, 20, 4, generator=torch.Generator().manual_seed(5)).to(dtype)])
    r[7] = 1.0
    return t, r


def same(x, y):
    return all(torch.equal(a, b) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("s", [1, 3, 4, 5, 31, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_against_extended_precision(s, dtype):
    for n in (1, 19):
        t, r = banded(n, s, seed=s, dtype=dtype)
        assert (check(t[:5], r[:5], 0.994).error_bound <= 1e-6).all()
        out = value_iteration(t, r, GAMMAS)
        reference = value_iteration(t, r, GAMMAS, backend="reference")
        assert ((out.q - reference.q).abs().amax((2, 3)) <= out.error_bound + reference.error_bound).all()


def test_against_one_by_one():
    # the same tasks padded to more states than go into lanes: their own states decide, so only tasks of that many differ
    t, r = banded(11, CROSSOVER, seed=1)
    wide = torch.zeros(11, PADDED, 5, PADDED)
    wide[:, :CROSSOVER, :, :CROSSOVER] = t
    gains = torch.zeros_like(wide)
    gains[:, :CROSSOVER, :, :CROSSOVER] = r
    narrow = value_iteration(t, r, GAMMAS)
    ragged = value_iteration(wide, gains, GAMMAS, num_states=torch.full((11,), CROSSOVER))
    assert torch.equal(ragged.q[:, :, :CROSSOVER], narrow.q)
    assert torch.equal(ragged.error_bound, narrow.error_bound)
    assert torch.equal(ragged.iterations, narrow.iterations)
    assert not ragged.q[:, :, CROSSOVER:].any()
    alone = value_iteration(wide, gains, GAMMAS)  # states without rows, which change no value
    assert ((alone.q[:, :, :CROSSOVER] - narrow.q).abs().amax((2, 3)) <= alone.error_bound + narrow.error_bound).all()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_company_changes_no_bit(packed, dtype):
    t, r = mixed(dtype)
    solve = (
        (lambda t, r: value_iteration(pack_transition(t), r, GAMMAS))
        if packed
        else (lambda t, r: value_iteration(t, r, GAMMAS))
    )
    whole = solve(t, r)
    order = torch.randperm(len(t), generator=torch.Generator().manual_seed(0))
    assert same([x[order] for x in whole], solve(t[order], r[order]))
    for size in (1, 5):
        parts = [solve(t[i : i + size], r[i : i + size]) for i in range(0, len(t), size)]
        assert same(whole, [torch.cat(x) for x in zip(*parts, strict=True)])
    many = solve(t.repeat(9, 1, 1, 1), r.repeat(9, 1, 1))
    assert same([x.repeat(9, *[1] * (x.dim() - 1)) for x in whole], many)
    assert same(whole, value_iteration(t, r, GAMMAS))  # packed or not


def test_threads_change_no_bit():
    t, r = mixed()
    t, r = t.repeat(7, 1, 1, 1), r.repeat(7, 1, 1)
    before, outs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outs.append(value_iteration(t, r, GAMMAS))
    finally:
        torch.set_num_threads(before)
    assert same(outs[0], outs[1])
    assert same(outs[0], outs[2])


def test_each_task_has_its_own_size_and_discounts():
    sizes = torch.tensor([20, 1, 9, 16, 20, 3, 13, 8, 20, 2, 5, 17])
    t, r = mixed(torch.float64)
    for i, s in enumerate(sizes.tolist()):
        t[i, :s, :, :s] += 0.01
        t[i, :s, :, :s] /= t[i, :s, :, :s].sum(-1, keepdim=True)
        t[i, s:] = t[i, :, :, s:] = torch.nan
        r[i, s:] = torch.nan
    discount = torch.rand(12, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    out = value_iteration(t, r, discount, num_states=sizes)
    for i, s in enumerate(sizes.tolist()):
        alone = value_iteration(t[i : i + 1, :s, :, :s], r[i : i + 1, :s], discount[i : i + 1])
        assert torch.equal(alone.q[0], out.q[i, :, :s])
        assert torch.equal(alone.error_bound[0], out.error_bound[i])
        assert not out.q[i, :, s:].any()
        assert not out.policy[i, :, s:].any()
        for g in range(3):
            one = value_iteration(t[i : i + 1, :s, :, :s], r[i : i + 1, :s], discount[i, g].item())
            assert (one.q[0] - out.q[i, g, :s]).abs().max() <= one.error_bound[0] + out.error_bound[i, g]


def test_the_unusual_among_the_usual():
    # undiscounted and hardly discounted tasks leave the lanes; what shares them gets the same bits as ever
    t, r = banded(12, 20, seed=2)
    r = -r.abs()
    usual = value_iteration(t, r, GAMMAS)
    discount = GAMMAS.repeat(12, 1)
    discount[3, 1], discount[7, 2], discount[8] = 1.0, 1 - 1e-9, 1.0
    out = value_iteration(t, r, discount)
    rest = torch.tensor([i for i in range(12) if i not in (3, 7, 8)])
    assert same([x[rest] for x in usual], [x[rest] for x in out])
    reference = value_iteration(t, r, discount, backend="reference")
    assert ((out.q - reference.q).abs().amax((2, 3)) <= out.error_bound + reference.error_bound).all()
    big = (t * r).sum(-1).double()
    big[5, 0, 0] = -1e308  # its value is infinite: no other's is
    tables = t.double()
    with pytest.raises(ValueError, match="task 5"):
        value_iteration(tables, torch.where(big == -1e308, 1.7e308, big), 0.994)


@pytest.mark.parametrize("packed", [False, True])
def test_refusals_name_the_first_bad_task(packed):
    def solve(t, r):
        return value_iteration(pack_transition(t) if packed else t, r, 0.9)

    t, r = banded(19, 10)
    r = (t * r).sum(-1)
    for value, message in ((torch.nan, "NaN"), (-0.5, "negative"), (2.0, "sum")):
        for bad in (0, 7, 18):
            broken = t.clone()
            broken[bad, 2, 3, 9] = value
            broken[18, 4, 0, 1] = value
            with pytest.raises(ValueError, match=rf"transition.*{message}.*\[{bad}, "):
                solve(broken, r)
    broken = r.clone()
    broken[11, 4, 2] = torch.inf
    with pytest.raises(ValueError, match=r"reward.*\[11, 4, 2\]"):
        solve(t, broken)


def test_windows_with_zeros_and_out_of_order():
    # one window over each whole row, the rows' windows in falling order: values as of the tight ones
    t, r = mixed(torch.float64)
    n, s, a, _ = t.shape
    offset = torch.arange(n * s * a).flip(0).view(n, s, a) * s
    loose = PackedTransition(
        t.view(-1, s).flip(0).flatten(), offset, torch.zeros(n, s, a).int(), torch.full((n, s, a), s).int()
    )
    got, want = value_iteration(loose, r, GAMMAS), value_iteration(pack_transition(t), r, GAMMAS)
    assert ((got.q - want.q).abs().amax((2, 3)) <= got.error_bound + want.error_bound).all()
    gains = torch.where(t != 0, torch.randn(t.shape, dtype=t.dtype), torch.nan)
    both = (value_iteration(loose, gains.view(-1, s).flip(0).flatten(), 0.9), value_iteration(t, gains, 0.9))
    assert ((both[0].q - both[1].q).abs().amax((1, 2)) <= both[0].error_bound + both[1].error_bound).all()


def test_anymdp():
    tasks = sample_anymdp(40, (8, 40), 5, seed=0)
    t, r, sizes = tasks.transition, tasks.reward, tasks.num_states
    out = value_iteration(t, r, GAMMAS, num_states=sizes)
    reference = value_iteration(t, r, GAMMAS, num_states=sizes, backend="reference")
    assert ((out.q - reference.q).abs().amax((2, 3)) <= out.error_bound + reference.error_bound).all()
    assert (out.error_bound <= 1e-7).all()


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 20),
    st.integers(1, 12),
    st.integers(1, 13),
    st.floats(0, 0.9999),
    st.integers(0, 10**6),
    st.booleans(),
)
def test_certificates_hold(n, s, a, gamma, seed, single):
    t, r = garnet(n, s, a, min(s, 3), seed, torch.float32 if single else torch.float64)
    out, reference = value_iteration(t, r, gamma), value_iteration(t, r, gamma, backend="reference")
    assert ((out.q - reference.q).abs().amax((1, 2)) <= out.error_bound + reference.error_bound).all()
    # a backup's rounding, s + 16 roundings at most of |v| and of |r|, over 1 - gamma: and no looser than that
    scale = out.q.abs().amax((1, 2)) + r.double().abs().flatten(1).amax(1)
    assert (out.error_bound <= 4 * (s + 16) * 2.0**-52 * scale / (1 - gamma * (1 + 1e-6)) + 1e-300).all()


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_every_instruction_set(isa):
    code = (
        "import torch\nfrom icrl_kernels import _C\n"
        "try: print(_C.isa())\nexcept ValueError: raise SystemExit(77)\n"
        "import test_value_iteration_lanes as x\n"
        "for d in (torch.float32, torch.float64): x.test_company_changes_no_bit(True, d)\n"
        "x.test_each_task_has_its_own_size_and_discounts(); x.test_anymdp()\n"
        "for s in (5, 31): x.test_against_extended_precision(s, torch.float32)"
    )
    root = Path(_C.__file__).parents[1]
    env = {**os.environ, "ICRL_ISA": isa, "PYTHONPATH": os.pathsep.join([str(root / "tests"), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=root, capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip(f"this processor has no {isa}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == isa
