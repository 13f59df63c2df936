"""Threads: the same bits from any number, from both teams, from many Python threads at once, and after a fork."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from forks import in_child
from torch import Tensor

import icrl_kernels as ik
from icrl.worlds import sample_anymdp
from icrl_kernels import _C

LONG = 10**12  # nanoseconds


@pytest.fixture(params=["OpenMP's team", "our helpers"])
def team(request: pytest.FixtureRequest) -> Iterator[str]:
    _C.use_own_helpers(LONG if request.param == "our helpers" else -LONG)
    yield request.param
    _C.use_own_helpers(-LONG)


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def calls() -> dict[str, Callable[[], list[Tensor]]]:
    """Each kernel with enough work for several threads (kGrain in csrc/common/parallel.h)."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    shape = 2, 600, 4, 64
    q, k, v, g = draw(*shape), draw(*shape), draw(*shape), -draw(*shape).abs()
    k = torch.nn.functional.normalize(k, dim=-1)
    s = torch.softmax(draw(*shape), -1)
    state = draw(128, 4, 64, 64)
    tasks = sample_anymdp(64, 16, seed=0)
    tables = tasks.tables()
    behaviours = ik.constant_behaviours(64, 0, {"model_based": 1.0, "q_learning": 1.0}, switch=0.5)

    def gradients(op: Callable[..., tuple], *inputs: Tensor) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in inputs]
        o = op(*leaves)[0]
        return [o.detach(), *torch.autograd.grad(o, leaves, o.detach())]

    def steps() -> list[Tensor]:
        mine = state.clone()
        outputs = [ik.gla_step(q[0, i : i + 128], k[0, i : i + 128], v[0, i : i + 128], None, mine) for i in (0, 99)]
        return [*outputs, mine]

    return {
        "gla": lambda: gradients(ik.gla, q, k, v, g),
        "gsa": lambda: gradients(ik.gsa, q, k, v, s, g),
        "gated_delta_rule": lambda: gradients(ik.gated_delta_rule, q, k, v, g),
        "rwkv7": lambda: gradients(ik.rwkv7, q, g, k, v, -k, k * 0.5),
        "gla_step": steps,
        "value_iteration": lambda: list(ik.value_iteration(tasks.transition, tasks.reward, torch.tensor([0.5, 0.99]))),
        "rollout": lambda: [
            x for x in ik.rollout(tables, steps=200, seed=1, behaviours=behaviours)[:7] if x is not None
        ],
        "sample_anymdp": lambda: list(sample_anymdp(16, 16, seed=3, packed=True).tensors().values()),
        "tables": lambda: [x for x in tasks.tables() if isinstance(x, Tensor)],
    }


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    """By numpy: in a forked child torch's own operators may wait for threads that are not there."""
    return len(a) == len(b) and all(x.numpy().tobytes() == y.numpy().tobytes() for x, y in zip(a, b, strict=True))


def test_any_number_of_threads_gives_the_same_bits(team: str) -> None:
    fs = calls()
    with ik.threads_here(1):
        want = {name: f() for name, f in fs.items()}
    for threads in (2, 3, 8, 1, 64, 300):
        with ik.threads_here(threads):
            assert [name for name, f in fs.items() if not same(f(), want[name])] == []


def test_eight_python_threads_at_once(team: str) -> None:
    fs = calls()
    want = {name: f() for name, f in fs.items()}
    wrong: list[str] = []

    def work(first: int) -> None:
        names = list(fs)[first:] + list(fs)[:first]
        wrong.extend(name for name in names if not same(fs[name](), want[name]))

    workers = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*")
def test_a_forked_child_computes_the_same(team: str) -> None:
    fs = calls()
    want = {name: f() for name, f in fs.items()}  # the team's threads are there now
    in_child(lambda: all(same(f(), want[name]) for name, f in fs.items()))


def test_flushed_denormals_hold_in_every_thread(team: str) -> None:
    """The caller's setting is its team's: else the bits would depend on which thread had which item."""
    q, k = torch.ones(1, 512, 4, 64), torch.full((1, 512, 4, 64), 1e-20)
    v = torch.full((1, 512, 4, 64), 1e-21)  # products of 1e-41: denormal
    ik.gla(q, k, v)  # the threads are there before the setting
    torch.set_flush_denormal(True)
    try:
        _, flushed = ik.gla(q, k, v, output_final_state=True)
    finally:
        torch.set_flush_denormal(False)
    _, kept = ik.gla(q, k, v, output_final_state=True)
    assert (flushed.numpy() == 0).all()
    assert np.count_nonzero(kept.numpy()) == kept.numel()


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*")
def test_a_forked_child_that_leaves_the_block_keeps_one_thread() -> None:
    block = ik.threads_here(1)
    block.__enter__()
    in_child(lambda: (block.__exit__(None, None, None), torch.get_num_threads() == 1)[1])
    block.__exit__(None, None, None)
    assert torch.get_num_threads() == 2


def test_threads_here_gives_back_what_was() -> None:
    with ik.threads_here(1):
        assert torch.get_num_threads() == 1
        with ik.threads_here(2):
            assert torch.get_num_threads() == 2
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    with pytest.raises(ZeroDivisionError), ik.threads_here(1):
        _ = 1 / 0
    assert torch.get_num_threads() == 2
    with pytest.raises(ValueError, match="threads"), ik.threads_here(0):
        pass
