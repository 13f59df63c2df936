"""Which tensors are plain, and what a closed loop refuses before it begins."""

import math

import pytest
import torch
from torch import nn

from icrl_kernels import rollout_start, rollout_tables
from icrl_kernels.fused import Program, closed_loop, hooked, plain_integers, plain_outcome, watched


@pytest.mark.parametrize(
    ("tensor", "plain"),
    [
        (torch.arange(3), True),
        (torch.arange(1)[:0], False),
        (torch.arange(4), False),
        (torch.arange(3)[:, None], False),
        (torch.arange(6)[::2], False),
        (torch.arange(3, dtype=torch.int32), False),
        (torch.arange(3.0), False),
        (torch.arange(3, device="meta"), False),
        (torch.arange(3).to_sparse(), False),
        (nn.Buffer(torch.arange(3)), True),
        ([0, 1, 2], False),
        (None, False),
    ],
)
def test_plain_integers(tensor, plain):
    assert plain_integers(tensor, 3) == (tensor.data_ptr() if plain else 0)


def test_plain_outcomes():
    reward, done = torch.zeros(2), torch.zeros(2, dtype=torch.uint8)
    assert plain_outcome(reward, done, 2, 5.0) == (reward.data_ptr(), done.data_ptr())
    opposite = torch.view_as_complex(torch.zeros(1, 2)).conj().imag
    assert opposite.is_neg()
    assert plain_outcome(opposite, done[:1], 1, 5.0) is None
    for strange in (math.nan, math.inf, -5.1, 5.1):
        assert plain_outcome(torch.tensor([0.0, strange]), done, 2, 5.0) is None
    assert plain_outcome(torch.tensor([-5.0, 5.0]), done + 2, 2, 5.0) is not None
    for other in (done + 3, done.long(), done.bool(), done[:1]):
        assert plain_outcome(reward, other, 2, 5.0) is None


def test_what_watches():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    assert not hooked(model)
    handle = model[1].register_forward_hook(lambda *x: None)
    assert hooked(model)
    handle.remove()
    assert not watched()
    with torch.autocast("cpu"):
        assert watched()


def loop(**changed):
    """A program that is given what an acting one is, in two tasks of three states and two actions."""
    N, S, A = 2, 3, 2
    transition = torch.full((N, S, A, S), 1 / S)
    ones = torch.ones(N, dtype=torch.int64)
    start, terminal = torch.full((N, S), 1 / S), torch.zeros(N, S, dtype=torch.bool)
    tables = rollout_tables(
        transition,
        torch.zeros(N, S, A, S),
        noise_state=torch.zeros(N, S),
        noise_action=torch.zeros(N, S, A),
        start=start,
        terminal=terminal,
        max_steps=9 * ones,
        num_states=S * ones,
        num_actions=A * ones,
    )
    p = Program()
    integer = {"dtype": torch.int64, "each_call": True}
    p.tensor("observation", below=S, **integer)
    p.tensor("reward", each_call=True)
    p.tensor("done", dtype=torch.uint8, each_call=True)
    p.tensor("tag", shared=True, each_call=True)
    p.tensor("noise", A, each_call=True)
    p.tensor("temperature", shared=True, each_call=True)
    p.tensor("mask", A, dtype=torch.bool, optional=True, each_call=True)
    p.tensor("task_action", **integer)
    p.tensor("logits", changed.pop("actions", A), optional=True, each_call=True)
    for name in ("previous", "action", "kept", "chosen"):
        p.tensor(name, **integer)
    step = p.step(changed.pop("batch", N))
    kept = [torch.zeros(2, dtype=torch.int64) for _ in range(6)]
    reward, done = torch.zeros(2), torch.zeros(2, dtype=torch.uint8)
    at = [t.data_ptr() for t in kept]
    given = [at[0], reward.data_ptr(), done.data_ptr(), 7.0, 0, 0.0, 0, at[1], 0, *at[2:]]
    T = 4
    out = [torch.full((N, 6), 9, dtype=d) for d in (torch.int64,) * 3 + (torch.float32, torch.uint8)]
    arguments = {
        "step": step,
        "given": given,
        "tables": tables,
        "state": rollout_start(tables, seed=0),
        "observations": torch.arange(S).expand(N, S).contiguous(),
        "noise": torch.zeros(T, N, A),
        "temperature": torch.zeros(T),
        "out": out,
        "begin": 1,
        "most_reward": 1.0,
    }
    closed_loop(**(arguments | changed))
    return out


def test_a_loop_writes_its_steps():
    state, observation, action, reward, done = loop()  # no op: the actions stay 0
    assert torch.equal(state, observation)
    for written, most in ((state, 2), (action, 0), (reward, 0), (done, 0)):
        assert (written[:, [0, 5]] == 9).all()
        assert (written[:, 1:5] <= most).all()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"batch": 3}, "tables, state: wanted 3 records"),
        ({"observations": torch.zeros(2, 4, dtype=torch.int64)}, "observations: wanted shape"),
        ({"observations": torch.zeros(2, 3)}, "observations: wanted dtype"),
        ({"observations": torch.full((2, 3), 3)}, "observation: wanted 0 to 2, got 3 to 3"),
        ({"noise": torch.zeros(5, 2, 2)}, "noise: wanted shape"),
        ({"noise": torch.zeros(4, 2, 3)}, "step: wanted one that acts, of 3 actions"),
        ({"noise": torch.zeros(4, 2, 2, device="meta")}, "noise: wanted a contiguous tensor on the CPU"),
        ({"temperature": torch.zeros(4, dtype=torch.float64)}, "temperature: wanted dtype"),
        ({"open": torch.ones(2, 3, 3, dtype=torch.bool)}, "open: wanted shape"),
        ({"begin": 3}, "out: wanted contiguous tensors of 7 steps"),
        ({"begin": -1}, "out: wanted contiguous tensors"),
        ({"given": [0] * 12}, "step: wanted one that acts"),
        ({"given": [0] * 13}, "observation: is not bound"),
        ({"actions": 5}, "step: wanted one that acts"),
    ],
)
def test_what_a_loop_refuses(changed, said):
    with pytest.raises(ValueError, match=f"^{said}"):
        loop(**changed)
