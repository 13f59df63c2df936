"""Simulation of tasks whose states lack actions."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tabular import random_tasks
from test_action_mask import random_mask

from icrl_kernels import (
    _C,
    constant_behaviours,
    pack_transition,
    rollout,
    rollout_reference,
    rollout_start,
    rollout_step,
    rollout_tables,
)
from icrl_kernels.tabular.behaviours import BUILTIN

module = importlib.import_module("icrl_kernels.tabular.rollout")
N, S, A = 6, 9, 5
EVERYONE = dict.fromkeys(BUILTIN, 1.0)


def masked(n=N, s=S, a=A, seed=0, **more):
    """Tasks whose tables hold NaN where a state lacks the action, and the mask; no rows at the terminal state."""
    tasks = random_tasks(n, s, a, seed=seed, **more)
    mask = random_mask(n, s, a, seed=seed)
    mask[..., 0] |= ~(mask & (torch.arange(a) < tasks.num_actions[:, None])[:, None]).any(-1)
    mask[tasks.terminal] = False
    tasks.transition = tasks.transition.masked_fill(~mask[..., None], torch.nan)
    tasks.reward = tasks.reward.masked_fill(~mask[..., None], torch.nan)
    return tasks, mask


def taken(mask, run):
    """Whether the states had the actions that were taken in them, [R,T]."""
    task = torch.arange(len(run.state))[:, None]
    return mask[task, run.state.long(), run.action.long()]


def same(one, other):
    return all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


@pytest.mark.parametrize("packed", [False, True])
def test_tables(packed):
    tasks, mask = masked()
    raw = tasks.raw()
    if packed:
        raw["transition"], raw["reward"] = pack_transition(raw["transition"], raw["reward"])
    tables = rollout_tables(**raw, action_mask=mask)
    own = (torch.arange(A) < tasks.num_actions[:, None])[:, None]
    own = own & ((torch.arange(S) < tasks.num_states[:, None]) & ~tasks.terminal)[..., None]
    assert torch.equal(tables.action_mask, mask & own)
    assert tables.cumulative.isfinite().all()
    assert tables.reward.isfinite().all()
    assert torch.equal(rollout_tables(**random_tasks(N, S, A).raw()).action_mask, own)


@pytest.mark.parametrize("name", [*BUILTIN, "all"])
@pytest.mark.parametrize("epsilon", [0.0, 0.4])
def test_no_behaviour_takes_what_is_missing(name, epsilon):
    tasks, mask = masked(seed=1)
    tables = rollout_tables(**tasks.raw(), action_mask=mask)
    b = constant_behaviours(N, 0, EVERYONE if name == "all" else {name: 1.0}, switch=0.5, epsilon=epsilon)
    runs = [rollout(tables, steps=700, seed=3, behaviours=b, backend=x) for x in ("cpu", "plain")]
    assert same(runs[0][:-1], runs[1][:-1])
    assert same(runs[0].final, runs[1].final)
    assert taken(mask, runs[0]).all()
    assert runs[0].reward.isfinite().all()
    more = rollout(tables, steps=350, seed=3, behaviours=b)
    more = rollout(tables, steps=350, state=more.final, behaviours=b)
    assert same(more.final, runs[0].final)


def test_random_actions_are_uniform_over_those_that_are_there():
    tasks, mask = masked(1, 4, 5, seed=2, ragged=False)
    tables = rollout_tables(**tasks.raw(), action_mask=mask)
    run = rollout(tables, steps=40_000, seed=0, task_index=torch.zeros(4, dtype=torch.int64))
    state, action = run.state.long().flatten(), run.action.long().flatten()
    for s in state.unique().tolist():
        counts = torch.bincount(action[state == s], minlength=5).double()
        there = mask[0, s]
        assert (counts[~there] == 0).all()
        expected = counts.sum() / there.sum()
        chi2 = ((counts[there] - expected) ** 2 / expected).sum()
        assert chi2 < 25  # at most 4 degrees of freedom: chance 5e-5


@pytest.mark.parametrize("weights", [{"uniform": 1.0}, {0: 1.0}, {0: 1.0, "uniform": 1.0}])
def test_the_specification(weights):
    tasks, mask = masked(seed=4)
    g = torch.Generator().manual_seed(0)
    p = (
        torch.rand(N, 1, S, A, generator=g, dtype=torch.float32)
        * mask[:, None]
        * (torch.arange(A) < tasks.num_actions.view(N, 1, 1, 1))
    )
    p = p / p.sum(-1, keepdim=True).clamp_min(1e-30)
    p[p.sum(-1) == 0] = torch.nn.functional.one_hot(torch.tensor(0), A).float()
    b = constant_behaviours(N, 1, weights, switch=0.3, epsilon=0.2)
    each = torch.arange(N)
    arguments = {"seed": each + 5, "record": each, "task_index": each}
    want = rollout_reference(**tasks.raw(), **arguments, steps=120, policies=p, behaviours=b, action_mask=mask)
    tables = rollout_tables(**tasks.raw(), action_mask=mask)
    got = rollout(tables, steps=120, policies=p, behaviours=b, seed=each + 5)
    for x, y in zip(got[:6], want, strict=True):
        assert torch.equal(x, y)
    assert taken(mask, got).all()
    acted = rollout_reference(**tasks.raw(), **arguments, steps=120, actions=got.action.long(), action_mask=mask)
    state = rollout_start(tables, seed=each + 5)
    rewards = [rollout_step(tables, state, action)[0] for action in acted[1].long().unbind(1)]
    assert torch.equal(torch.stack(rewards, 1), acted[2])


def test_a_mask_of_a_call_is_that_of_tables():
    tasks, mask = masked(seed=5)
    whole = random_tasks(N, S, A, seed=5)
    b = constant_behaviours(N, 0, EVERYONE, switch=0.5)
    want = rollout(rollout_tables(**tasks.raw(), action_mask=mask), steps=200, seed=0, behaviours=b)
    got = rollout(whole.tables(), steps=200, seed=0, behaviours=b, action_mask=mask)
    assert same(want[:-1], got[:-1])
    assert same(want.final, got.final)
    every = torch.ones_like(mask)
    for given in (rollout_tables(**whole.raw(), action_mask=every), whole.tables()):
        assert same(given, whole.tables())
        runs = [rollout(given, steps=99, seed=0, behaviours=b, **x) for x in ({}, {"action_mask": every})]
        assert same(runs[0][:-1], runs[1][:-1])


def test_learners_count_on_no_missing_action():
    """A state that lacks the better of two actions is worth what the other brings."""
    t, r, quiet, still = (torch.zeros(1, *x, dtype=torch.float32) for x in ((3, 2, 3), (3, 2, 3), (3,), (3, 2)))
    t[0, 0, 0, 1], t[0, 0, 1, 0], t[0, 1, :, 2] = 1, 1, 1
    r[0, 0, 0, 1], r[0, 0, 1, 0], r[0, 1, 0, 2], r[0, 1, 1, 2] = 0.0, 0.2, -1.0, 1.0
    mask = torch.tensor([[[True, True], [True, False], [False, False]]])
    size = {"max_steps": 20, "num_states": 3, "num_actions": 2}
    rest = {name: torch.tensor([x]) for name, x in size.items()}
    terminal, start = torch.tensor([[False, False, True]]), torch.eye(3, dtype=torch.float32)[:1]
    tables = rollout_tables(t, r, quiet, still, start, terminal, **rest, action_mask=mask)
    for name in ("q_learning", "model_based"):
        b = constant_behaviours(1, 0, {name: 1.0})
        run = rollout(tables, steps=3000, seed=0, behaviours=b)
        assert taken(mask, run).all()
        assert run.final.visits[0, 1, 1] == 0
        late = run.state[0, 2000:] == 0
        assert (run.action[0, 2000:][late] == 1).double().mean() > 0.9  # action 0 leads to a cost of 1
        if name == "model_based":
            assert run.final.value[0].isfinite().all()
            assert run.final.value[0, 1] < 0.5


def test_outside_actions():
    tasks, mask = masked(seed=6, ragged=False)
    tables = rollout_tables(**tasks.raw(), action_mask=mask)
    state = rollout_start(tables, seed=0)
    at = state.state
    there, missing = (x[torch.arange(N), at].to(torch.int8).argmax(-1) for x in (mask, ~mask))
    bad = int((~mask[torch.arange(N), at]).any(-1).nonzero()[0])
    action = there.clone()
    action[bad] = missing[bad]
    before = [x.clone() for x in state]
    words = f"^action of record {bad}: state {int(at[bad])} of task {bad} does not have action {int(missing[bad])}"
    with pytest.raises(ValueError, match=words):
        rollout_step(tables, state, action)
    assert same(before, state)
    assert rollout_step(tables, state, there)[0].isfinite().all()
    with pytest.raises(ValueError, match=r"^action of record"):
        torch.ops.icrl.rollout(
            *tables, None, None, [], action[:, None].repeat(1, 30), list(rollout_start(tables, seed=0)), 30, "auto"
        )


@pytest.mark.parametrize("kind", ["actions", "probabilities"])
def test_policies(kind):
    tasks, mask = masked(seed=7, ragged=False)
    tables = rollout_tables(**tasks.raw(), action_mask=mask)
    good = mask.to(torch.int8).argmax(-1)
    wrong = good.clone()
    wrong[2] = torch.where((~mask[2]).any(-1), (~mask[2]).to(torch.int8).argmax(-1), wrong[2])
    form = (lambda x: torch.nn.functional.one_hot(x, A).float()) if kind == "probabilities" else (lambda x: x)
    assert taken(mask, rollout(tables, steps=100, seed=0, policies=form(good)[:, None])).all()
    for backend in ("cpu", "plain"):
        with pytest.raises(ValueError, match=r"policies of record 2: state \d of task 2 does not have action"):
            rollout(tables, steps=100, seed=0, policies=form(wrong)[:, None], backend=backend)


def test_what_a_gpu_gives_where_it_cannot_refuse():
    tasks, mask = masked(seed=8, ragged=False)
    tables = rollout_tables(**tasks.raw(), action_mask=mask)
    state = rollout_start(tables, seed=0)
    action = mask[torch.arange(N), state.state].to(torch.int8).argmax(-1)
    bad = int((~mask[torch.arange(N), state.state]).any(-1).nonzero()[0])
    action[bad] = (~mask[bad, state.state[bad]]).to(torch.int8).argmax()
    before = state.state.clone()
    arguments = [*tables, None, None, [], action[:, None], list(state), 1]
    out = module._host(module.SPOIL)(module._check(*arguments), *arguments)
    others = torch.arange(N) != bad
    assert out[2][bad].isnan().all()
    assert (out[1][bad] == -1).all()
    assert state.state[bad] == before[bad]
    assert out[2][others].isfinite().all()


def test_refusals():
    tasks, mask = masked(seed=9)
    bare = mask.clone()
    bare[3, 0] = False
    calls = [
        lambda m: rollout_tables(**tasks.raw(), action_mask=m),
        lambda m: rollout(random_tasks(N, S, A, seed=9).tables(), steps=2, seed=0, action_mask=m),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"^action_mask: wanted an action in .* none in state 0 of task 3$"):
            call(bare)
        beyond = mask.clone()  # an action that is not the task's own does not count
        task = int((tasks.num_actions < A).nonzero()[0])
        beyond[task, 0] = torch.arange(A) >= tasks.num_actions[task]
        with pytest.raises(ValueError, match=f"^action_mask: .* in state 0 of task {task}$"):
            call(beyond)
        for wrong in (mask[0], mask[:, :-1], mask.int(), mask.to("meta"), mask[..., :2], mask.tolist()):
            with pytest.raises(ValueError, match=r"^action_mask"):
                call(wrong)


@pytest.mark.parametrize("isa", ["generic", "avx2"])
def test_other_instruction_sets(isa):
    code = (
        "from icrl_kernels import _C\n"
        "try: print(_C.isa())\nexcept ValueError: raise SystemExit(77)\n"
        "from test_action_mask_rollout import *\n"
        "test_no_behaviour_takes_what_is_missing('all', 0.4)\ntest_the_specification({0: 1.0, 'uniform': 1.0})"
    )
    folder = Path(__file__).parent
    path = os.pathsep.join([str(folder), str(folder.parents[1]), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "ICRL_ISA": isa, "PYTHONPATH": path},
        cwd=Path(_C.__file__).parents[1],
        capture_output=True,
        text=True,
    )
    if done.returncode == 77:
        pytest.skip(f"this processor has no {isa}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == isa
