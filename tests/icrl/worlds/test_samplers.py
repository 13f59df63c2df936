"""Samplers in their forms: packed and dense, C++ and torch, any threads and any cut into batches: the same tasks."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from icrl.worlds import TabularTasks, sample_anymdp, sample_bandit, sample_garnet, samplers
from icrl_kernels import _C, pack_transition
from icrl_kernels.tabular import anymdp_reference
from icrl_kernels.tabular.anymdp import sample_anymdp_windows
from icrl_kernels.tabular.counter_rng import Stream, keys_of, uniforms


def same(a: TabularTasks, b: TabularTasks) -> bool:
    """All tensors equal, bit for bit; the offset of an empty window says nothing."""
    mine, other = a.tensors(), b.tensors()
    if "transition.offset" in mine:
        mine["transition.offset"] = mine["transition.offset"] * (mine["transition.length"] > 0)
        other["transition.offset"] = other["transition.offset"] * (other["transition.length"] > 0)
    return mine.keys() == other.keys() and all(torch.equal(mine[k], other[k]) for k in mine)


@pytest.mark.parametrize("sizes", [8, 33, 128, (12, 40)])
def test_windows_are_the_dense_tables_bit_for_bit(sizes):
    n = 10 if sizes == 128 else 60
    packed, dense = (sample_anymdp(n, sizes, 5, seed=4, packed=p) for p in (True, False))
    assert same(packed.validate(), dense.pack())
    wanted = pack_transition(dense.transition)
    assert all(torch.equal(x, y) for x, y in zip(packed.transition, wanted, strict=True))
    assert torch.equal(wanted.unpack(packed.reward), dense.reward)
    assert packed.transition.probability.numel() == packed.reward.numel() == int(packed.transition.length.sum())


def test_windows_do_not_depend_on_threads_or_cuts():
    whole = sample_anymdp(40, (12, 40), 3, seed=7, num_observations=50, packed=True)
    parts = [
        sample_anymdp(k, (12, 40), 3, seed=7, first=i, num_observations=50, packed=True) for i, k in ((0, 9), (9, 31))
    ]
    assert same(whole, TabularTasks.concatenate(parts))
    assert same(whole, sample_anymdp(40, (12, 40), 3, seed=7, num_observations=50, packed=True, progress=True))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 if threads == 1 else 1)
        assert same(whole, sample_anymdp(40, (12, 40), 3, seed=7, num_observations=50, packed=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_no_tasks_in_windows(backend):
    none = sample_anymdp(0, 16, seed=0, packed=True, backend=backend).validate()
    assert none.shape == (0, 16, 5)
    assert none.reward.shape == (0,)


def test_memory_of_windows_is_their_own():
    """No dense table on the way: 400 tasks of 128 states are 262 MB dense, and the process may grow by 60 MB."""
    script = """
import resource, torch
from icrl.worlds import sample_anymdp
sample_anymdp(2, 128, 5, seed=0, packed=True)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
tasks = sample_anymdp(400, 128, 5, seed=1, packed=True)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, 8 * tasks.reward.numel() // 1024)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=Path(_C.__file__).parents[1], capture_output=True, text=True, check=True
    )
    grown, own = map(int, done.stdout.split())
    assert own < 40_000
    assert grown < 60_000, (grown, own)


@pytest.mark.parametrize(
    ("sizes", "actions"), [(8, 5), (16, 5), (16, 2), (20, 17), (64, 5), (128, 5), (250, 3), ((12, 40), 9)]
)
def test_torch_and_cpp_sample_the_same_tasks(sizes, actions):
    """The same attempt of 99 % of the tasks at least; these in all fields, but for the last bits of sums and of exp.

    Terminal bonuses come from values of up to 1e3 and are solved to 1e-12 of that; rewards are float32 sums of them with
    terms of the other sign, so their error is of the largest reward's size.
    """
    n = {250: 4, 128: 16, 64: 60}.get(sizes, 200) if isinstance(sizes, int) else 100
    cpp, by_torch = (sample_anymdp(n, sizes, actions, seed=11, packed=True, backend=b) for b in ("cpu", "torch"))
    by_torch.validate()
    assert torch.equal(cpp.state_mapping, by_torch.state_mapping)
    assert torch.equal(cpp.max_steps, by_torch.max_steps)
    agree = (cpp.terminal == by_torch.terminal).all(1) & (cpp.start - by_torch.start == 0).all(1)
    assert agree.double().mean() >= 0.99
    a, b = cpp[agree].dense(), by_torch[agree].dense()
    for name, x in a.tensors().items():
        y = getattr(b, name)
        if not x.is_floating_point():
            assert torch.equal(x, y), name
        else:
            scale = x.abs().flatten(1).amax(1) if name == "reward" else 1.0
            error = (x - y).abs().flatten(1).amax(1) / scale
            assert error.max() <= 2.0**-22, (name, error.max())


def test_torch_samples_a_task_from_its_key_alone(monkeypatch):
    whole = sample_anymdp(24, (12, 20), 3, seed=7, num_observations=50, packed=True, backend="torch")
    part = sample_anymdp(10, (12, 20), 3, seed=7, first=14, num_observations=50, packed=True, backend="torch")
    dense = sample_anymdp(24, (12, 20), 3, seed=7, num_observations=50, backend="torch")
    monkeypatch.setattr(
        anymdp_reference, "_memory", lambda _: 7 * (40 * 20 * 3 * 20 + 80 * 20 * 20)
    )  # seven candidates at a time
    cut = sample_anymdp(24, (12, 20), 3, seed=7, num_observations=50, packed=True, backend="torch", progress=True)
    assert same(whole, cut)
    assert same(dense.pack(), whole)
    assert part.shape[1] <= whole.shape[1]
    assert torch.equal(part.transition.probability, whole[14:].transition.probability)
    assert torch.equal(part.reward, whole[14:].reward)
    with pytest.raises(RuntimeError, match="no candidate of 1 passed"):
        sample_anymdp(50, 8, seed=0, max_attempts=1, backend="torch")


def test_streams_are_uniforms_at_any_place():
    keys = keys_of(3, torch.arange(5))
    row = uniforms(keys, 9, 40)
    at = torch.randint(40, (5, 3, 4), generator=torch.Generator().manual_seed(0))
    assert torch.equal(Stream(keys, 9).uniform(at), row.gather(1, at.view(5, -1)).view(5, 3, 4))
    mixed = Stream(keys, torch.tensor([9, 1, 9, 2, 9]))
    assert torch.equal(mixed.uniform(at)[[0, 2, 4]], Stream(keys, 9)[torch.tensor([0, 2, 4])].uniform(at[[0, 2, 4]]))


def test_garnet_in_windows(monkeypatch):
    dense = sample_garnet(30, (8, 20), 4, 3, seed=2, num_observations=32)
    packed = sample_garnet(30, (8, 20), 4, 3, seed=2, num_observations=32, packed=True)
    monkeypatch.setattr(samplers, "_ENTRIES", 4 * 20 * 20 * 7)
    cut = sample_garnet(30, (8, 20), 4, 3, seed=2, num_observations=32, packed=True)
    assert same(packed.validate(), dense.pack())
    assert same(cut, packed)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: sample_anymdp(2, 16, seed=0, backend="cuda"), "backend"),
        (lambda: sample_anymdp(2, 16, seed=0, device="meta", backend="cpu"), "backend"),
        (
            lambda: sample_anymdp_windows(
                *(torch.zeros(2, dtype=torch.int64), torch.tensor([8, 9])),
                *(torch.zeros(2, 8), torch.zeros(2, 8, 2), torch.zeros(2, 8), torch.zeros(2, 8, dtype=torch.bool)),
                *(torch.zeros(2, 8, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)),
                num_observations=8,
                max_attempts=1,
            ),
            "num_states",
        ),
    ],
)
def test_refusals(call, named):
    with pytest.raises(ValueError, match=named):
        call()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    here, there = (sample_anymdp(200, 32, 5, seed=1, packed=True, device=d, backend="torch") for d in ("cpu", "cuda"))
    there = there.to("cpu")
    agree = (here.terminal == there.terminal).all(1) & (here.start - there.start).abs().amax(1).lt(1e-6)
    assert agree.double().mean() >= 0.99
    torch.testing.assert_close(here[agree].dense().transition, there[agree].dense().transition, rtol=1e-5, atol=1e-7)
    for sample in (sample_garnet, sample_bandit):
        a, b = sample(20, seed=1), sample(20, seed=1, device="cuda").to("cpu")
        torch.testing.assert_close(a.reward, b.reward, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(a.transition, b.transition, rtol=1e-5, atol=1e-7)
