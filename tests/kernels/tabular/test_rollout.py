import os
import subprocess
import sys

import pytest
import torch
from tabular import moved, random_tasks

from icrl.worlds import sample_anymdp
from icrl_kernels import (
    _C,
    PackedTransition,
    RolloutState,
    constant_behaviours,
    pack_transition,
    rollout,
    rollout_reference,
    rollout_start,
    rollout_step,
    rollout_tables,
)
from icrl_kernels.tabular.behaviours import BUILTIN, Behaviours
from icrl_kernels.tabular.rollout_reference import _normal, philox

MIXED = {0: 1.0, 1: 1.0, **dict.fromkeys(BUILTIN, 1.0)}


def random_policies(tasks, num, seed=3):
    g = torch.Generator().manual_seed(seed)
    N, S, A, _ = tasks.reward.shape
    p = torch.randn(N, num, S, A, generator=g).exp() * (torch.arange(A) < tasks.num_actions[:, None])[:, None, None]
    return p / p.sum(3, keepdim=True)


def mixed_run(tasks, steps=200, **more):
    N = len(tasks.num_states)
    b = constant_behaviours(N, 2, MIXED, switch=0.5, epsilon=0.3, epsilon_decay=0.001)
    return rollout(rollout_tables(**tasks.raw()), steps=steps, policies=random_policies(tasks, 2), behaviours=b, **more)


def assert_same(a, b):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


def select(b, records):
    return Behaviours(*(t[records].contiguous() for t in b))


@pytest.fixture
def served(device):
    """A device that this build simulates on."""
    if device.type == "cuda" and not _C.with_cuda:
        tables = random_tasks(2, 4, 2).tables().to(device)
        with pytest.raises(ValueError, match=r"backend: rollout has none.*ICRL_CUDA=1"):
            rollout(tables, steps=1, seed=0)
        pytest.skip("this build has no CUDA, and says so")
    return device


@pytest.mark.gpu
@pytest.mark.skipif(not _C.with_cuda, reason="built without CUDA")
@pytest.mark.parametrize("field", ["window", "offset", "num_states", "task", "state", "policies", "behaviour"])
def test_gpu_values_out_of_range(field):
    """The host is not waited for: the record is spoilt, the others are as ever."""
    tables = random_tasks(4, 8, 3, ragged=False).tables().to("cuda")
    policies = torch.zeros(4, 1, 8, dtype=torch.int16, device="cuda")
    state = rollout_start(tables, seed=0)
    good = rollout(tables, steps=20, state=state, policies=policies)
    if field == "policies":
        policies[2] = 3
    else:
        getattr(tables if hasattr(tables, field) else state, field)[2] = 32767
    run = rollout(tables, steps=20, state=state, policies=policies)
    others = torch.arange(4) != 2
    assert run.reward[2].isnan().all()
    assert (run.next_state[2] == -1).all()
    assert torch.equal(run.final.step[2], state.step[2])
    assert_same([x[others] for x in moved(run[:-1], "cpu")], [x[others] for x in moved(good[:-1], "cpu")])


def test_philox_known_answers():
    """The vectors of the Random123 distribution (kat_vectors, philox4x32 10)."""
    zero = torch.tensor(0)
    assert [int(x) for x in philox(zero, zero, zero, 0)] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    minus = torch.tensor(-1)
    full = philox(minus, minus, torch.tensor(2**56 - 1), 255)
    assert [int(x) for x in full] == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


def test_normal_quantile():
    x = torch.cat([torch.arange(4096), 2**32 - 1 - torch.arange(4096), torch.randint(2**32, (100_000,))])
    exact = torch.special.ndtri((x.double() + 0.5) / 2**32)
    assert float(((_normal(x) - exact).abs() / exact.abs().clamp_min(1e-3)).max()) < 3e-7


@pytest.mark.parametrize(("states", "width"), [(2, None), (7, 3), (40, None), (64, 5)])
def test_same_bits_as_reference(states, width, served):
    tasks = random_tasks(3, states, 4, width=width, seed=states)
    task_index = torch.tensor([0, 1, 2, 2, 1, 0, 0, 1])
    policies = random_policies(tasks, 2)
    b = constant_behaviours(8, 2, {0: 1, 1: 1, "uniform": 0.5}, switch=0.5, epsilon=0.5, epsilon_decay=0.004)
    there = moved([rollout_tables(**tasks.raw()), task_index, policies, b], served)
    run = rollout(there[0], steps=300, seed=-5, task_index=there[1], policies=there[2], behaviours=there[3])
    run = moved(run, "cpu")
    keys = {"seed": torch.full((8,), -5), "record": torch.arange(8), "task_index": task_index}
    assert_same(run[:-2], rollout_reference(**tasks.raw(), **keys, steps=300, policies=policies, behaviours=b))
    assert bool((run.done == (2 if states == 64 else 1)).any())

    tables = there[0]
    state = rollout_start(tables, **{name: x.to(served) for name, x in keys.items()})
    actions = run.action.long().to(served)
    columns = [(state.state.clone(), *rollout_step(tables, state, actions[:, t])) for t in range(50)]
    by_step = [torch.stack(c, 1).cpu() for c in zip(*columns, strict=True)]
    wanted = rollout_reference(**tasks.raw(), **keys, steps=50, actions=run.action.long())
    assert_same([by_step[0].short(), *by_step[1:]], [wanted[0], wanted[2], wanted[3], wanted[5]])


def test_policy_equals_loop_of_steps(served):
    tasks = random_tasks(6, 9, 4, seed=1)
    tables = rollout_tables(**tasks.raw()).to(served)
    greedy = (tasks.solve([0.9]).q[:, 0].argmax(2) % tasks.num_actions[:, None]).to(served)
    run = rollout(tables, steps=120, seed=7, policies=torch.nn.functional.one_hot(greedy, 4).float()[:, None])
    state = rollout_start(tables, seed=7)
    for t in range(120):
        assert_same([state.state.short()], [run.state[:, t]])
        stepped = rollout_step(tables, state, greedy.gather(1, state.state[:, None])[:, 0])
        assert_same(stepped, [run.reward[:, t], run.done[:, t], run.next_state[:, t]])
    assert_same(state[:6], run.final[:6])


def test_threads_splits_and_resumption_change_nothing():
    tasks = random_tasks(10, 12, 5, seed=2)
    whole = mixed_run(tasks, seed=11)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = mixed_run(tasks, seed=11)
    finally:
        torch.set_num_threads(before)
    assert_same(whole[:-1], one[:-1])
    assert_same(whole.final, one.final)

    tables, policies = rollout_tables(**tasks.raw()), random_policies(tasks, 2)
    b = constant_behaviours(10, 2, MIXED, switch=0.5, epsilon=0.3, epsilon_decay=0.001)
    rows = torch.tensor([8, 1, 5])
    start = rollout_start(tables, seed=11, task_index=rows, record=rows, behaviours=select(b, rows))
    part = rollout(tables, steps=200, state=start, policies=policies, behaviours=select(b, rows))
    assert_same(part[:-1], [x[rows] for x in whole[:-1]])

    first = rollout(tables, steps=73, seed=11, policies=policies, behaviours=b)
    kept = [t.clone() for t in first.final]
    second = rollout(tables, steps=127, state=first.final, policies=policies, behaviours=b)
    assert_same(first.final, kept)  # not changed by continuing
    assert_same([torch.cat(x, 1) for x in zip(first[:-1], second[:-1], strict=True)], whole[:-1])
    assert_same(second.final, whole.final)


def everything(tasks, b, records, backend, steps=150, seed=6, device="cpu"):
    N, S, _ = tasks.noise_action.shape
    g = torch.Generator().manual_seed(1)
    references = torch.randint(3, (N, 3, S), generator=g, dtype=torch.int16)
    there = moved([tasks.tables(), records, random_policies(tasks, 2), b, references], device)
    run = rollout(
        there[0], steps=steps, seed=seed, task_index=there[1], policies=there[2], behaviours=there[3],
        references=there[4], backend=backend
    )  # fmt: skip
    return moved(run, "cpu"), references


SIZES = [(2, 2, None), (13, 9, 4), (40, 5, 37), (70, 3, 70), (9, 17, None)]


@pytest.mark.parametrize(("states", "actions", "width"), SIZES)
def test_vectors_and_records_in_step_change_nothing(states, actions, width, served):
    """`plain` is the code of the GPU, one record after another; 21 records make whole and broken groups of eight."""
    tasks = random_tasks(4, states, actions, width=width, seed=states, max_steps=25)
    tasks.noise_state[0], tasks.noise_action[0] = 0, 0  # a task without noise
    records = torch.arange(21) % 4
    tables_only = {0: 1.0, 1: 1.0, "uniform": 1.0, "random_policy": 1.0}
    for weights in (tables_only, {**tables_only, "q_learning": 1.0}, MIXED):
        b = constant_behaviours(21, 2, weights, switch=0.4, epsilon=0.3, epsilon_decay=0.001)
        b.initial[3, -2:] = b.later[3, -2:] = 0  # one record of them all learns nothing
        plain, references = everything(tasks, b, records, "plain")
        fast, _ = everything(tasks, b, records, "auto", device=served)
        assert_same(fast[:-1], plain[:-1])
        assert_same(fast.final, plain.final)
        assert_same([fast.labels], [references[records[:, None], :, fast.state.long()]])


def test_steps_beyond_32_bits():
    tables = random_tasks(1, 8, 4).tables()
    b = constant_behaviours(1, 0, {"uniform": 1})
    state = rollout_start(tables, seed=0)._replace(step=torch.tensor([2**32 - 13]))
    runs = [rollout(tables, steps=40, state=state, behaviours=b, backend=x)[:-1] for x in ("auto", "plain")]
    assert_same(*runs)


def test_actions_are_policies_of_ones_and_zeros():
    tasks = random_tasks(5, 9, 4, seed=1)
    tables = tasks.tables()
    actions = torch.randint(2, (5, 3, 9), generator=torch.Generator().manual_seed(0))
    b = constant_behaviours(5, 3, {0: 1, 1: 1, 2: 1, "uniform": 1}, switch=0.5, epsilon=0.2)
    one_hot = torch.nn.functional.one_hot(actions, 4).float()
    wanted = rollout(tables, steps=90, seed=2, policies=one_hot, behaviours=b)
    for dtype in (torch.uint8, torch.int16, torch.int64):
        run = rollout(tables, steps=90, seed=2, policies=actions.to(dtype), behaviours=b)
        assert_same(run[:-1], wanted[:-1])
        assert_same(run.final, wanted.final)


def test_every_instruction_set_gives_the_same_bits(tmp_path):
    if _C.isa() == "generic":
        pytest.skip("this processor has no other")
    code = (
        "import torch, sys; from test_rollout import *; torch.set_num_threads(1); h = [];\n"
        "tasks = sample_anymdp(5, 40, seed=6); r = torch.arange(11) % 5\n"
        "b = constant_behaviours(11, 2, MIXED, switch=0.4, epsilon=0.3, epsilon_decay=0.001)\n"
        "for i in (0, 4): b.initial[i, -2:] = b.later[i, -2:] = 0\n"
        "a = everything(tasks, b, r, 'auto', 400)[0]\n"
        "c = everything(random_tasks(4, 33, 9, width=33), b, r % 4, 'auto', 400)[0]\n"
        "torch.save([*a[:-1], *a.final, *c[:-1], *c.final], sys.argv[1])"
    )
    found = []
    for isa in ("generic", "avx2", "avx512")[: 2 + (_C.isa() == "avx512")]:
        path = str(tmp_path / isa)
        env = {**os.environ, "ICRL_ISA": isa, "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])}
        where = os.path.dirname(
            os.path.dirname(_C.__file__)
        )  # of the package under test, which may be an installed one
        command = [sys.executable, "-c", code, path]
        done = subprocess.run(command, env=env, cwd=where, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found.append(torch.load(path))
    for other in found[1:]:
        assert_same(other, found[0])


def test_seed_and_record_matter():
    tasks = random_tasks(1, 8, 4)
    tables = rollout_tables(**tasks.raw())
    runs = [
        rollout(tables, steps=50, state=rollout_start(tables, seed=s, record=torch.tensor([r]))).reward
        for s, r in ((0, 0), (1, 0), (0, 1), (2**32, 0), (0, 2**32))
    ]
    assert not any(torch.equal(runs[i], runs[j]) for i in range(5) for j in range(i))


def test_statistics_are_the_tables():
    """Chi-square of transitions, starts and a policy's actions; mean and spread of rewards."""
    tasks = random_tasks(1, 6, 3, seed=4, ragged=False, max_steps=10)
    R, T = 200, 1000
    policy = random_policies(tasks, 1)
    index = torch.zeros(R, dtype=torch.long)
    run = rollout(rollout_tables(**tasks.raw()), steps=T, seed=3, task_index=index, policies=policy)
    s, a, j = run.state.long().flatten(), run.action.long().flatten(), run.next_state.long().flatten()
    counts = torch.zeros(6, 3, 6).index_put_((s, a, j), torch.ones(R * T), accumulate=True)

    def chi_square(seen, p):  # (x − df)/sqrt(2 df) is about N(0,1)
        expected = seen.sum(-1, keepdim=True) * p
        x, df = ((seen - expected) ** 2 / expected)[expected > 5], int((expected > 5).sum())
        assert df > 3
        return float((x.sum() - df) / (2 * df) ** 0.5)

    assert chi_square(counts[:5], tasks.transition[0, :5]) < 3
    assert chi_square(counts[:5].sum(2), policy[0, 0, :5]) < 3
    after = run.state[:, 1:][run.done[:, :-1] > 0].long().bincount(minlength=6).float()
    assert abs(float(after[0] / after.sum()) - 0.7) < 4 * (0.21 / float(after.sum())) ** 0.5
    std = (tasks.noise_state[0, j] + tasks.noise_action[0, s, a]).double()
    off = run.reward.flatten().double() - tasks.reward[0, s, a, j]
    assert bool((off[std == 0] == 0).all())
    z = off[std > 0] / std[std > 0]
    assert abs(float(z.mean())) < 4 / len(z) ** 0.5
    assert abs(float(z.var()) - 1) < 4 * (2 / len(z)) ** 0.5
    assert int(run.done.max()) == 2  # ten steps do truncate
    elapsed = torch.diff(run.done[0].nonzero()[:, 0], prepend=torch.tensor([-1]))
    assert int(elapsed.max()) == 10


def tables_of(tasks):
    return tasks.tables()


def mean_reward(tasks, steps, weights, policies=None, window=500, **settings):
    N = len(tasks.num_states)
    b = constant_behaviours(N, 0 if policies is None else 1, weights, **settings)
    run = rollout(tables_of(tasks), steps=steps, seed=5, policies=policies, behaviours=b)
    return run.reward[:, -window:].double().mean(1)


def test_learners_rank_between_random_and_optimal():
    tasks = sample_anymdp(64, 16, seed=6)
    greedy = torch.nn.functional.one_hot(tasks.solve(0.95).q.argmax(2), 5).float()[:, None]
    best = mean_reward(tasks, 20_000, {0: 1.0}, greedy, window=20_000)
    chance = mean_reward(tasks, 20_000, {"uniform": 1.0}, window=20_000)

    def score(*args, **kwargs):
        return float(((mean_reward(tasks, 2000, *args, **kwargs) - chance) / (best - chance)).mean())

    q_learner, model = score({"q_learning": 1.0}), score({"model_based": 1.0})
    assert 0.4 < q_learner < 0.8
    assert 0.8 < model < 1.05
    assert abs(score({"random_policy": 1.0})) < 0.2


def test_behaviours_switch_and_explore():
    tasks = random_tasks(64, 6, 4, seed=7, max_steps=5)
    N = 64
    fixed = constant_behaviours(N, 2, {0: 1, "uniform": 3})
    policies = torch.nn.functional.one_hot(torch.zeros(N, 2, 6, dtype=torch.long), 4).float()
    tables = rollout_tables(**tasks.raw())
    run = rollout(tables, steps=100, seed=1, policies=policies, behaviours=fixed)
    assert bool((run.behaviour == run.behaviour[:, :1]).all())
    assert 0.5 < float((run.behaviour[:, 0] == 2).float().mean()) < 0.95
    assert bool((run.action[run.behaviour == 0] == 0).all())

    to_one = fixed._replace(later=torch.nn.functional.one_hot(torch.ones(N, dtype=torch.long), 6).float())
    to_one = to_one._replace(switch=torch.ones(N))
    run = rollout(tables, steps=100, seed=1, policies=policies, behaviours=to_one)
    second = run.done.ne(0).cumsum(1) - run.done.ne(0).long() > 0
    assert bool((run.behaviour[second] == 1).all())
    assert not bool((run.behaviour[~second] == 1).any())

    noisy = constant_behaviours(N, 2, {0: 1}, epsilon=0.8, epsilon_decay=0.8 / 200)
    run = rollout(tables, steps=400, seed=1, policies=policies, behaviours=noisy)
    moved = (run.action != 0).float().mean(0) / float((1 - 1 / tasks.num_actions).mean())
    assert abs(float(moved[:50].mean()) - 0.7) < 0.1
    assert abs(float(moved[150:200].mean()) - 0.1) < 0.05
    assert float(moved[201:].sum()) == 0


def test_random_policy_is_stationary():
    tasks = random_tasks(1, 4, 4, seed=8, ragged=False)
    index = torch.zeros(16, dtype=torch.long)
    b = constant_behaviours(16, 0, {"random_policy": 1}, policy_scale=50.0)
    run = rollout(rollout_tables(**tasks.raw()), steps=300, seed=2, task_index=index, behaviours=b)
    agree, differ = 0.0, set()
    for r in range(16):
        counts = run.action[r][run.state[r] == 0].long().bincount(minlength=4)
        agree += float(counts.max() / counts.sum()) / 16
        differ.add(int(counts.argmax()))
    assert agree > 0.9
    assert len(differ) > 1


def test_learner_counts_are_the_record():
    tasks = random_tasks(3, 7, 3, seed=9)
    run = rollout(
        rollout_tables(**tasks.raw()), steps=400, seed=1, behaviours=constant_behaviours(3, 0, {"model_based": 1})
    )
    for r in range(3):
        s, a, j = run.state[r].long(), run.action[r].long(), run.next_state[r].long()
        visits = torch.zeros(7, 3, dtype=torch.int32).index_put_(
            (s, a), torch.ones(400, dtype=torch.int32), accumulate=True
        )
        follows = (run.done[r] != 1).float()
        counts = torch.zeros(7, 7, 3).index_put_((s, j, a), follows, accumulate=True)
        assert_same([run.final.visits[r], run.final.successors[r]], [visits, counts])
        total = torch.zeros(7, 3).index_put_((s, a), run.reward[r], accumulate=True)
        torch.testing.assert_close(run.final.reward_sum[r], total)


def test_zero_records_and_steps():
    tables = rollout_tables(**random_tasks(2, 5, 3).raw())
    run = rollout(tables, steps=0, seed=0)
    assert run.state.shape == (2, 0)
    run = rollout(tables, steps=3, seed=0, task_index=torch.zeros(0, dtype=torch.long))
    assert run.reward.shape == (0, 3)
    assert run.final.state.shape == (0,)


def test_manual_reset():
    tables = rollout_tables(**random_tasks(4, 9, 3, max_steps=10**6).raw())
    state = rollout_start(tables, seed=0)
    for _ in range(3):
        rollout_step(tables, state, torch.zeros(4, dtype=torch.long))
    state.state[1] = -1
    rollout_step(tables, state, torch.zeros(4, dtype=torch.long))
    assert int(state.elapsed[1]) <= 1


BAD_TASKS = {
    "row sum": ("transition", lambda t: t.transition[0, 0, 0].mul_(0.99), r"transition\[0, 0, 0\].*sum 0.99"),
    "negative": ("transition", lambda t: t.transition[0, 0, 1, :2].copy_(torch.tensor([-1.0, 1.0])), "transition"),
    "nan": ("transition", lambda t: t.transition[1, 0, 0].fill_(torch.nan), r"transition\[1, 0, 0\]"),
    "reward": ("reward", lambda t: t.reward[0, 1, 1].fill_(torch.inf), r"reward\[0, 1, 1\]"),
    "noise": ("noise_state", lambda t: t.noise_state.sub_(1), "noise_state: wanted finite values >= 0"),
    "start": ("start", lambda t: t.start.mul_(0.5), r"start\[0\]"),
    "terminal start": ("terminal", lambda t: t.terminal[1, 0].fill_(True), r"start\[1\]"),
    "horizon": ("max_steps", lambda t: t.max_steps[0].fill_(0), "max_steps: wanted 1"),
    "num_states": ("num_states", lambda t: t.num_states[0].fill_(9), "num_states: wanted 1 to 8"),
    "num_actions": ("num_actions", lambda t: t.num_actions[0].fill_(9), "num_actions: wanted 1 to 4"),
}


@pytest.mark.parametrize("case", BAD_TASKS)
def test_refuses_bad_tasks(case):
    tasks = random_tasks(2, 8, 4)
    BAD_TASKS[case][1](tasks)
    with pytest.raises(ValueError, match=BAD_TASKS[case][2]):
        rollout_tables(**tasks.raw())


def test_packed_and_dense_tasks_give_the_same_tables():
    tasks = random_tasks(5, 40, 3, width=6, seed=3)
    tasks.transition[0, 1, 0, 7:10] = 0  # zeros inside a window
    tasks.transition[0, 1, 0] /= tasks.transition[0, 1, 0].sum()
    dense = rollout_tables(**tasks.raw())
    packed = pack_transition(tasks.transition)
    reward = tasks.reward[packed.unpack(torch.ones_like(packed.probability)) > 0]
    same = rollout_tables(**{**tasks.raw(), "transition": packed, "reward": reward})
    assert_same(same, dense)
    assert same.reward.data_ptr() == reward.data_ptr()

    # the rows shuffled, with zeros about each window and gaps between
    n, s, a = packed.offset.shape
    order = torch.randperm(n * s * a, generator=torch.Generator().manual_seed(0))
    first = (packed.first - 2).clamp_min(0)
    lead = packed.first - first
    length = torch.where(packed.length > 0, (packed.length + lead + 3).minimum(s - first), 0)
    room = torch.zeros(n * s * a, dtype=torch.int64)
    room[order] = (length.flatten()[order] + 1).cumsum(0) - length.flatten()[order] - 1
    offset = room.view(n, s, a)
    wide = PackedTransition(torch.full((int(length.sum()) + n * s * a,), torch.nan), offset, first, length)
    full_reward = torch.full_like(wide.probability, torch.nan)
    for i, j, k in torch.cartesian_prod(torch.arange(n), torch.arange(s), torch.arange(a)).tolist():
        f, l, o = int(first[i, j, k]), int(length[i, j, k]), int(offset[i, j, k])
        wide.probability[o : o + l] = tasks.transition[i, j, k, f : f + l]
        full_reward[o : o + l] = tasks.reward[i, j, k, f : f + l]
    assert_same(rollout_tables(**{**tasks.raw(), "transition": wide, "reward": full_reward}), dense)


def test_refuses_bad_packed_tasks():
    tasks = random_tasks(2, 8, 4)
    packed = pack_transition(tasks.transition)
    reward = torch.ones_like(packed.probability)
    last = int(packed.offset.flatten()[packed.length.flatten() > 0][-1])
    for match, changes in {
        "transition: wanted windows within": {"transition": packed._replace(first=packed.first + 8)},
        r"transition\[0, 0, 0\]: wanted probabilities.*sum 0": {
            "transition": packed._replace(length=packed.length.clone().index_fill_(2, torch.tensor([0]), 0))
        },
        "past the task's own": {"num_states": tasks.num_states - 2, "terminal": tasks.terminal.roll(-2, 1)},
        "transition: wanted dtype": {"transition": packed._replace(probability=packed.probability.double())},
        r"^reward: wanted shape": {"reward": tasks.reward},
        r"^reward\[1, ": {"reward": reward.clone().index_fill_(0, torch.tensor([last]), torch.nan)},
    }.items():
        with pytest.raises(ValueError, match=match):
            rollout_tables(**{**tasks.raw(), "transition": packed, "reward": reward, **changes})


def test_refuses_wrong_tensors():
    tasks = random_tasks(2, 8, 4).raw()
    for name in tasks:
        with pytest.raises(ValueError, match=f"^{name}: wanted shape"):
            rollout_tables(**{**tasks, name: tasks[name][:, None]})
        with pytest.raises(ValueError, match=f"^{name}: wanted dtype"):
            rollout_tables(**{**tasks, name: tasks[name].to(torch.float64)})


def test_refuses_bad_calls():
    tasks = random_tasks(2, 8, 4, ragged=False)
    tables, policies = rollout_tables(**tasks.raw()), random_policies(tasks, 1)
    state = rollout_start(tables, seed=0)
    b = constant_behaviours(2, 1, {0: 1})
    x = torch.arange(5)
    for match, call in {
        r"task_index\[0\] is 2": lambda: rollout(tables, steps=1, seed=0, task_index=torch.tensor([2])),
        r"task_index\[1\] is -1": lambda: rollout(tables, steps=1, seed=0, task_index=torch.tensor([0, -1])),
        "seed, state": lambda: rollout(tables, steps=1),
        "task_index: the state": lambda: rollout(tables, steps=1, state=state, task_index=torch.tensor([0, 1])),
        "steps: wanted an int >= 0": lambda: rollout(tables, steps=-1, seed=0),
        r"policies\[0, 0, 0\]": lambda: rollout(tables, steps=1, seed=0, policies=policies * 0.9),
        "policies: wanted dtype": lambda: rollout(tables, steps=1, seed=0, policies=policies.double()),
        "policies: wanted shape": lambda: rollout(tables, steps=1, seed=0, policies=policies[:, 0]),
        r"policies\[1, 0, 2\]: wanted one of.*got 4": lambda: rollout(
            tables, steps=1, seed=0, policies=torch.zeros(2, 1, 8).long().index_put((x[1], x[0], x[2]), x[4])
        ),
        "references: wanted shape": lambda: rollout(tables, steps=1, seed=0, references=torch.zeros(2, 8).long()),
        "references: wanted dtype": lambda: rollout(tables, steps=1, seed=0, references=torch.zeros(2, 1, 8)),
        "references: wanted actions that fit": lambda: rollout(
            tables, steps=1, seed=0, references=torch.full((2, 1, 8), 2**20)
        ),
        "backend: rollout has": lambda: rollout(tables, steps=1, seed=0, backend="gpu"),
        "initial: wanted shape": lambda: rollout(tables, steps=1, seed=0, behaviours=b),
        "action of record 1 is 4": lambda: rollout_step(tables, state, torch.tensor([0, 4])),
        "action of record 0 is -1": lambda: rollout_step(tables, state, torch.tensor([-1, 0])),
        "action: wanted dtype": lambda: rollout_step(tables, state, torch.tensor([0.0, 1.0])),
        "started without q_learning": lambda: rollout(
            tables, steps=1, state=state, behaviours=constant_behaviours(2, 0, {"q_learning": 1})
        ),
        "model_discount: wanted": lambda: rollout(
            tables, steps=1, seed=0, behaviours=constant_behaviours(2, 0, {"uniform": 1}, model_discount=1.0)
        ),
        "epsilon: wanted": lambda: rollout(
            tables, steps=1, seed=0, behaviours=constant_behaviours(2, 0, {"uniform": 1}, epsilon=float("nan"))
        ),
        "settings: wanted": lambda: constant_behaviours(2, 0, {"uniform": 1}, epsilom=1.0),
        "weights: wanted": lambda: constant_behaviours(2, 0, {"unifrom": 1}),
        "policies: wanted at most 251": lambda: rollout(
            tables, steps=1, seed=0, policies=torch.zeros(2, 252, 8, dtype=torch.int64)
        ),
        r"state.state\[0\] is 7": lambda: rollout_step(
            tables, state._replace(state=torch.tensor([7, 0])), torch.tensor([0, 0])
        ),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()


def test_refuses_other_devices():
    tasks = {name: t.to("meta") for name, t in random_tasks(2, 8, 4).raw().items()}
    with pytest.raises(ValueError, match="made on the CPU"):
        rollout_tables(**tasks)
    tables = rollout_tables(**random_tasks(2, 8, 4).raw())
    state, action = rollout_start(tables, seed=0), torch.zeros(2, dtype=torch.int64)
    for arguments in (
        (tables, state, action.to("meta")),
        (tables.to("meta"), state, action),
        (tables._replace(reward=tables.reward.to("meta")), state, action),
    ):
        with pytest.raises(ValueError, match=" on meta"):
            rollout_step(*arguments)
    with pytest.raises(ValueError, match=r"tables.terminal: wanted a contiguous"):
        rollout(tables._replace(terminal=tables.terminal.t().contiguous().t()), steps=1, seed=0)


def test_the_highest_behaviour_is_recorded():
    tables = rollout_tables(**random_tasks(2, 6, 3).raw())
    policies = torch.zeros(2, 251, 6, dtype=torch.int64)
    for name, index in ((250, 250), ("model_based", 254)):
        b = constant_behaviours(2, 251, {name: 1})
        assert (rollout(tables, steps=3, seed=0, policies=policies, behaviours=b).behaviour == index).all()


def test_states_that_no_simulation_left():
    tables = rollout_tables(**random_tasks(2, 8, 4).raw())
    b = constant_behaviours(2, 0, {"model_based": 1})
    state = rollout_start(tables, seed=0, behaviours=b)
    for span in (-1, 9):
        bad = state._replace(span=torch.full_like(state.span, span))
        for backend in ("cpu", "plain"):
            with pytest.raises(ValueError, match=r"state\.span"):
                rollout(tables, steps=1, state=bad, behaviours=b, backend=backend)
    late = rollout_start(tables, seed=0)._replace(elapsed=torch.full((2,), 2**40 + 5))
    fast, plain = (rollout(tables, steps=50, state=late, backend=backend) for backend in ("cpu", "plain"))
    assert_same(fast[:7], plain[:7])
    assert fast.done[:, 0].all()


def op_arguments():
    tasks = random_tasks(2, 6, 3, ragged=False)
    tables = rollout_tables(**tasks.raw())
    b = constant_behaviours(2, 0, {"uniform": 1, "model_based": 1, "q_learning": 1})
    state = rollout_start(tables, seed=0, behaviours=b)
    return (*tables, None, None, list(b), None, list(state), 5, "auto")


def test_opcheck():
    torch.library.opcheck(torch.ops.icrl.rollout.default, op_arguments())


def test_compiles():
    arguments = op_arguments()
    eager = torch.ops.icrl.rollout(*op_arguments())

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(*args):
        return torch.ops.icrl.rollout(*args)

    assert_same(run(*arguments), eager)
    assert isinstance(RolloutState(*arguments[-3]), RolloutState)


def test_step_refuses_a_state_of_another_size():
    tables = rollout_tables(**random_tasks(2, 4, 2).raw())
    state = rollout_start(tables, seed=0, task_index=torch.zeros(50, dtype=torch.int64))
    action = torch.zeros(50, dtype=torch.int64)
    for bad in ({"elapsed": torch.zeros(2, dtype=torch.int64)}, {"state": state.state.int()}, {"seed": state.seed[:1]}):
        with pytest.raises(ValueError, match="state"):
            rollout_step(tables, state._replace(**bad), action)
    rollout_step(tables, state, action)
