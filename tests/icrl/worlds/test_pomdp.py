"""Partially observed tasks and steps of several actions: distributions, the batched path against the environments."""

import dataclasses

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode

from icrl.omnirl.distill import DPDConfig, make_records
from icrl.worlds import TabularEnv, TabularTasks, TabularVectorEnv, regroup, sample_anymdp, sample_bandit, sample_pomdp
from icrl_kernels import rollout, rollout_start, rollout_step
from icrl_kernels.tabular import counter_rng
from icrl_kernels.tabular.emission import draw_tokens, draw_tokens_reference

KINDS = {"pomdp": (1, 1), "tokens": (3, 1), "actions": (1, 2), "tokens and actions": (2, 3)}


@pytest.fixture(scope="module", params=KINDS)
def tasks(request) -> TabularTasks:
    k, d = KINDS[request.param]
    return sample_pomdp(
        10, (12, 20), 3, seed=1, num_observations=11, observation_tokens=k, action_tokens=d, density=0.4
    )


def same(a: TabularTasks, b: TabularTasks) -> bool:
    one, two = a.dense().tensors(), b.dense().tensors()
    return (
        (a.num_observations, a.action_tokens) == (b.num_observations, b.action_tokens)
        and one.keys() == two.keys()
        and all(torch.equal(x, two[name]) for name, x in one.items())
    )


# --- sampler ----------------------------------------------------------------------------------------------------------


def test_a_task_is_a_function_of_seed_and_index(tasks):
    settings = {
        "num_observations": 11,
        "observation_tokens": tasks.observation_tokens,
        "action_tokens": tasks.action_tokens,
        "density": 0.4,
    }
    states = tasks.shape[1]
    assert same(tasks.validate(), sample_pomdp(10, (12, 20), 3, seed=1, **settings))
    part = sample_pomdp(3, (12, 20), 3, seed=1, first=6, **settings)
    assert same(tasks[6:9], part.pad(states, 3))
    assert not same(tasks, sample_pomdp(10, (12, 20), 3, seed=2, **settings))
    plain = sample_anymdp(10, (12, 20), 3, seed=1, num_observations=20)
    seen = dataclasses.replace(tasks, emission=None, action_tokens=1, num_observations=20)
    assert same(seen, plain)  # the dynamics are AnyMDP's
    windows = sample_pomdp(10, (12, 20), 3, seed=1, packed=True, **settings)
    assert windows.packed
    assert same(windows, tasks)
    assert len(sample_pomdp(0, 12, 3, seed=0).validate()) == 0


def emissions(n: int, ns: int, ids: int, tokens: int = 1, **settings) -> np.ndarray:
    tasks = sample_pomdp(n, ns, 2, seed=0, num_observations=ids, observation_tokens=tokens, **settings)
    assert tasks.emission is not None
    return tasks.emission.flatten(0, 1).double().numpy()


def theirs(n: int, ns: int, ids: int, density: float) -> np.ndarray:
    """As the definition reads, by scipy."""
    sparse = pytest.importorskip("scipy.sparse")
    rng = np.random.default_rng(0)
    out = np.stack([sparse.random(ns, ids, density=density, rng=rng).toarray() for _ in range(n)])
    for i, s in np.argwhere(out.sum(-1) == 0):
        out[i, s, rng.integers(ids)] = 1
    return out / out.sum(-1, keepdims=True)


@pytest.mark.parametrize(
    ("ns", "ids", "density", "most"), [(8, 64, 0.2, 4), (8, 5, 0.2, 4), (9, 7, 1.0, 9), (8, 40, 0.01, 4)]
)
def test_emissions_are_scipys_in_distribution(ns, ids, density, most):
    """Two-sample Kolmogorov-Smirnov on four statistics of 150 matrices' rows, none below p = .01/4 (Bonferroni)."""
    stats = pytest.importorskip("scipy.stats")
    ours = emissions(50, ns, ids, 3, density=density, most=most)
    used = min(density, most / ids)
    other = theirs(150, ns, ids, used)
    # the number of entries is certain but for rows that had none, which gets one more
    filled = (ours > 0).sum((1, 2))
    assert (filled >= round(used * ns * ids)).all()
    if (ours.max(-1) < 1).all():
        assert (filled == round(used * ns * ids)).all()
    columns = np.arange(ids)
    for name, f in {
        "support": lambda e: (e > 0).sum(-1),
        "largest": lambda e: e.max(-1),
        "place": lambda e: (e * columns).sum(-1),
        "entropy": lambda e: -np.where(e > 0, e * np.log(np.where(e > 0, e, 1)), 0).sum(-1),
    }.items():
        p = stats.ks_2samp(f(ours).ravel(), f(other).ravel()).pvalue
        assert p > 0.01 / 4, (name, p)


def test_tokens_have_matrices_of_their_own():
    e = emissions(20, 8, 30, 2).reshape(20, 2, 8, 30)
    overlap = ((e[:, 0] > 0) & (e[:, 1] > 0)).mean() / (e[:, 0] > 0).mean()
    assert overlap < 0.25  # independent: 4/30, a standard deviation of .02


# --- observations -----------------------------------------------------------------------------------------------------


def tiny() -> TabularTasks:
    emission = torch.zeros(1, 2, 8, 4)
    emission[0, 0, :] = torch.tensor([0.5, 0.25, 0.0, 0.25])
    emission[0, 1, :, 3] = 1
    emission[0, 1, 3] = torch.tensor([0.1, 0.2, 0.3, 0.4])
    base = sample_anymdp(1, 8, 2, seed=0)
    return dataclasses.replace(base, emission=emission, num_observations=4).validate()


def test_observation_frequencies():
    n = 20_000
    seen = tiny().emit(torch.full((1, n), 3), seed=5, step=torch.arange(n))[0]
    for token, p in enumerate((np.array([0.5, 0.25, 0, 0.25]), np.array([0.1, 0.2, 0.3, 0.4]))):
        count = np.bincount(seen[:, token].numpy(), minlength=4)
        assert (count[p == 0] == 0).all()
        deviation = (count - n * p) / np.sqrt(n * np.maximum(p * (1 - p), 1e-9))
        assert np.abs(deviation).max() < 4.5
    joint = np.histogram2d(*seen.T.numpy(), bins=4)[0] / n  # independent tokens
    assert np.abs(joint - np.outer([0.5, 0.25, 0, 0.25], [0.1, 0.2, 0.3, 0.4])).max() < 4.5 * 0.5 / np.sqrt(n)
    lag = seen[1:, 1].double(), seen[:-1, 1].double()
    assert abs(np.corrcoef(*lag)[0, 1]) < 4.5 / np.sqrt(n)


def test_observations_depend_on_seed_record_and_step_alone(tasks):
    states = torch.arange(8).expand(10, 8)
    steps = torch.arange(100, 108)
    whole = tasks.emit(states, seed=3, step=steps)
    assert whole.shape == (10, 8, tasks.observation_tokens)
    assert whole.dtype == torch.int64
    assert torch.equal(whole[4:7], tasks[4:7].emit(states[4:7], seed=3, step=steps, record=torch.arange(4, 7)))
    order = torch.tensor([7, 7, 2])
    record = torch.tensor([7, 20, 2])
    some = tasks.emit(states[:3], seed=3, step=steps, record=record, task_index=order)
    assert torch.equal(some[[0, 2]], whole[[7, 2]])
    assert not torch.equal(some[0], some[1])
    assert torch.equal(tasks.emit(states[:, 5], seed=torch.full((10,), 3), step=105), whole[:, 5])
    for other in (tasks.emit(states, seed=4, step=steps), tasks.emit(states, seed=3, step=steps + 1)):
        assert not torch.equal(other, whole)
    none = torch.where(states == 3, -1, states).to(torch.int16)
    blanked = tasks.emit(none, seed=3, step=steps)
    assert (blanked[:, 3] == -1).all()
    assert torch.equal(blanked[:, 4:], whole[:, 4:])


def test_the_compiled_draw_is_torchs(tasks):
    """Bit for bit, rows far from sum 1, spikes and zeros included."""
    emission = tasks.emission.clone()
    emission[0] *= 1 + 9e-5
    emission[1, 0, 2] = torch.nn.functional.one_hot(torch.tensor(10), 11)
    m = 20_000
    key = counter_rng.keys_of(0, torch.arange(m))
    task, state = counter_rng.integers(key, 1, 1, 10)[:, 0], counter_rng.integers(key, 2, 1, 12)[:, 0]
    state[::50] = -1
    compiled = draw_tokens(emission, task, state, key)
    assert torch.equal(compiled, draw_tokens_reference(emission, task, state, key))
    assert (compiled[(task == 1) & (state == 2), 0] == 10).all()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 - threads % 2)
        assert torch.equal(compiled, draw_tokens(emission, task, state, key))
    finally:
        torch.set_num_threads(threads)
    for name, arguments in (
        ("task", (emission, task + 1, state, key)),
        ("state", (emission, task, state - 1, key)),
        ("key", (emission, task, state, key[1:])),
        ("emission", (emission.double(), task, state, key)),
        ("emission", (emission[..., :0], task, state, key)),
    ):
        with pytest.raises(ValueError, match=f"^{name}"):
            draw_tokens(*arguments)
    assert draw_tokens(emission[..., :0], task[:0], state[:0], key[:0]).shape == (0, tasks.observation_tokens)


def test_full_observation_is_a_token_too():
    tasks = sample_anymdp(3, 12, 2, seed=0)
    states = torch.tensor([[0, 1, -1]] * 3)
    seen = tasks.emit(states, seed=0, step=0)[..., 0]
    assert torch.equal(seen[:, :2], tasks.observe(states[:, :2]))
    assert (seen[:, 2] == -1).all()


def test_records_for_distillation_hold_what_is_seen(tasks):
    config = DPDConfig(steps=50)
    if tasks.multi_token:
        with pytest.raises(ValueError, match=r"^tasks: a record has one observation and one action"):
            make_records(config, tasks, seed=0)
        return
    records = make_records(config, tasks, seed=0)
    plain = make_records(config, dataclasses.replace(tasks, emission=None, num_observations=20), seed=0)
    assert torch.equal(records.action, plain.action)
    state = (tasks.state_mapping[:, None] == plain.observation[..., None]).int().argmax(-1)
    seen = tasks.emission[torch.arange(10)[:, None], 0, state].gather(2, records.observation[..., None])
    assert (seen > 0).all()
    assert not torch.equal(records.observation, make_records(config, tasks, seed=1).observation)


# --- batches ----------------------------------------------------------------------------------------------------------


def test_batches_keep_emissions_and_tokens(tasks, tmp_path):
    packed = tasks.pack()
    for whole in (tasks, packed):
        assert same(TabularTasks.concatenate([whole[:4], whole[4:]]).validate(), whole)
        whole.save(tmp_path / "tasks")
        assert same(TabularTasks.load(tmp_path / "tasks"), whole)
        assert whole.pad(30, 4).validate().emission.shape[2] == 30
    assert same(packed.dense(), tasks)
    wide = dataclasses.replace(tasks, emission=torch.nn.functional.pad(tasks.emission, (0, 5)), num_observations=16)
    joined = TabularTasks.concatenate([tasks, wide]).validate()
    assert joined.num_observations == 16
    assert torch.equal(joined.tables().max_steps, torch.cat([tasks.max_steps] * 2) * tasks.action_tokens)
    if tasks.multi_token:
        assert f"{tasks.observation_tokens} observation and {tasks.action_tokens} action tokens" in repr(tasks)


def test_round_trip_through_xenoverse(tasks):
    dicts = [tasks.to_xenoverse(i) for i in range(len(tasks))]
    kind = "MTPOMDP" if tasks.multi_token else "POMDP"
    assert {d["task_type"] for d in dicts} == {kind}
    again = TabularTasks.from_xenoverse(dicts)
    assert (again.action_tokens, again.num_observations) == (tasks.action_tokens, 11)
    assert torch.equal(again.state_mapping, tasks.state_mapping)
    torch.testing.assert_close(again.emission, tasks.emission, rtol=2e-6, atol=0)
    seen = dataclasses.replace(sample_anymdp(1, 12, 2, seed=0), action_tokens=2)
    certain = TabularTasks.from_xenoverse(seen.to_xenoverse(0))
    states = torch.arange(12)[None]
    assert torch.equal(certain.emit(states, seed=0, step=0), seen.emit(states, seed=0, step=0))


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: sample_pomdp(2, 12, seed=0, num_observations=0), "num_observations"),
        (lambda: sample_pomdp(2, 12, seed=0, observation_tokens=0), "observation_tokens"),
        (lambda: sample_pomdp(2, 12, seed=0, action_tokens=0), "action_tokens"),
        (lambda: sample_pomdp(2, 12, seed=0, density=0.0), "density"),
        (lambda: sample_pomdp(2, 12, seed=0, most=0), "density, most"),
        (lambda: sample_pomdp(2, 7, seed=0), "num_states"),
        (lambda: dataclasses.replace(tiny(), action_tokens=0).validate(), "action_tokens"),
        (lambda: dataclasses.replace(tiny(), num_observations=5).validate(), "emission: wanted shape"),
        (lambda: dataclasses.replace(tiny(), emission=torch.zeros(1, 0, 8, 4)).validate(), "emission: wanted shape"),
        (lambda: dataclasses.replace(tiny(), emission=torch.zeros(1, 8, 4)).validate(), "emission: wanted shape"),
        (lambda: dataclasses.replace(tiny(), emission=torch.ones(1, 1, 7, 4) / 4).validate(), "emission: wanted shape"),
        (
            lambda: dataclasses.replace(tiny(), emission=torch.ones(1, 2, 8, 4) / 4.1).validate(),
            "emission: wanted rows",
        ),
        (lambda: dataclasses.replace(tiny(), emission=torch.zeros(1, 2, 8, 4)).validate(), "emission: wanted rows"),
        (
            lambda: dataclasses.replace(tiny(), emission=torch.ones(1, 2, 8, 4).double()).validate(),
            "emission: wanted dt",
        ),
        (lambda: tiny().pad(9, 2).emit(torch.tensor([8]), seed=0, step=0), "states"),
        (lambda: tiny().emit(torch.tensor([0, 1]), seed=0, step=0), "task_index"),
        (lambda: tiny().emit(torch.tensor([0]), seed=torch.tensor([0, 1]), step=0), "seed"),
        (lambda: tiny().emit(torch.tensor([0]), seed=0, step=0, record=torch.zeros(1)), "record"),
        (lambda: tiny().observe(torch.tensor([[0]])), "observe"),
        (lambda: tiny().state_of(), "state_of"),
        (lambda: TabularTasks.concatenate([tiny(), sample_anymdp(1, 8, 2, seed=0)]), "batches"),
        (lambda: regroup(rollout(tiny().tables(), steps=3, seed=0), 0), "action_tokens"),
        (lambda: regroup(rollout(tiny().tables(), steps=3, seed=0), 2, torch.zeros(2)), "elapsed"),
        (lambda: TabularTasks.from_xenoverse(tiny().to_xenoverse(0) | {"do": 3}), "observation_transition"),
    ],
)
def test_refusals(call, named):
    with pytest.raises(ValueError, match=f"^{named}"):
        call()


# --- steps of several actions -----------------------------------------------------------------------------------------


def by_hand(run, r: int, tokens: int, elapsed: int) -> list[tuple]:
    """The environment steps of one record: a loop over its single actions."""
    out, open_step, inner = [], None, elapsed
    for t in range(run.done.shape[1]):
        if inner % tokens == 0:
            open_step = [int(run.state[r, t]), [], 0.0, t]
        if open_step is not None:
            open_step[1].append(int(run.action[r, t]))
            open_step[2] += float(run.reward[r, t])
        inner += 1
        if run.done[r, t] or inner % tokens == 0:
            if open_step is not None:
                out.append((*open_step, int(run.done[r, t]), int(run.next_state[r, t])))
            open_step = None
        inner = 0 if run.done[r, t] else inner
    return out


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_regroup_is_the_loop_over_single_actions(tokens):
    tasks = dataclasses.replace(sample_anymdp(12, 12, 3, seed=4), action_tokens=tokens, max_steps=torch.full((12,), 9))
    first = rollout(tasks.tables(), steps=50, seed=0)
    second = rollout(tasks.tables(), steps=64, state=first.final)
    for run, elapsed in ((first, None), (second, first.final.elapsed)):
        steps = regroup(run, tokens, elapsed)
        assert (run.done == 1).any()
        assert (run.done == 2).any()
        for r in range(12):
            want = by_hand(run, r, tokens, 0 if elapsed is None else int(elapsed[r]))
            assert int(steps.count[r]) == len(want)
            for e, (state, actions, reward, t, done, following) in enumerate(want):
                got = steps.action[r, e].tolist()
                assert got == actions + [-1] * (tokens - len(actions))
                assert int(steps.state[r, e]) == state
                assert int(steps.step[r, e]) == t
                assert int(steps.done[r, e]) == done
                assert int(steps.next_state[r, e]) == following
                assert float(steps.reward[r, e]) == np.float32(reward)
            rest = slice(len(want), None)
            assert (steps.state[r, rest] == -1).all()
            assert (steps.action[r, rest] == -1).all()
            assert not steps.done[r, rest].any()
            assert not steps.reward[r, rest].any()
    assert (regroup(first, tokens).count.sum() * tokens > first.done.numel() * 0.8) or tokens == 1
    empty = regroup(rollout(tasks.tables(), steps=0, seed=0), tokens)
    assert empty.count.tolist() == [0] * 12


def test_truncation_counts_the_environments_steps():
    tasks = dataclasses.replace(sample_bandit(4, 3, seed=0), action_tokens=2, max_steps=torch.full((4,), 5))
    steps = regroup(rollout(tasks.tables(), steps=40, seed=0), 2)
    assert steps.count.tolist() == [20] * 4
    assert torch.equal(steps.done, (torch.arange(20) % 5 == 4).expand(4, 20) * 2)


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
def test_the_vector_environment_is_the_batched_path_bit_for_bit(tasks, mode):
    tasks = dataclasses.replace(tasks, max_steps=torch.full((10,), 7))
    n, d, rounds = len(tasks), tasks.action_tokens, 60
    env = TabularVectorEnv(tasks, mode)
    seen, _ = env.reset(seed=9)
    assert env.observation_space.contains(seen)
    rng = np.random.default_rng(0)
    observed, taken, rewards, dones, finals = (
        [[] for _ in range(n)],
        [[] for _ in range(n)],
        [],
        [],
        [[] for _ in range(n)],
    )
    asleep = np.zeros(n, dtype=bool)
    for _ in range(rounds):
        actions = rng.integers(0, 3, (n, d))
        before = seen
        seen, reward, terminated, truncated, info = env.step(actions if d > 1 else actions[:, 0])
        assert env.observation_space.contains(seen)
        over = terminated | truncated
        for i in np.flatnonzero(~asleep):
            observed[i].append(before[i])
            taken[i].append(actions[i])
            rewards.append((i, reward[i]))
            dones.append((i, terminated[i] + 2 * truncated[i]))
            if over[i]:
                finals[i].append((info["final_obs"] if mode == AutoresetMode.SAME_STEP else seen)[i])
        asleep = over if mode == AutoresetMode.NEXT_STEP else asleep

    keys = counter_rng.keys_of(0, torch.arange(9, 9 + n))
    zeros, tables = torch.zeros(n, dtype=torch.int64), tasks.tables()
    for i in range(n):  # each record on its own, since ends cut its actions where others go on
        state = rollout_start(tables, seed=keys[i : i + 1], record=zeros[:1], task_index=torch.tensor([i]))
        flat = []
        for actions in taken[i]:
            for a in actions:
                here = state.state.clone()
                flat.append((here, torch.tensor([a]), *rollout_step(tables, state, torch.tensor([a]))))
                if flat[-1][3]:
                    break
        columns = [torch.stack(x, 1) for x in zip(*flat, strict=True)]
        run = rollout(tables, steps=1, seed=0)._replace(
            state=columns[0], action=columns[1], reward=columns[2], done=columns[3], next_state=columns[4].long()
        )
        run = run._replace(behaviour=torch.zeros_like(run.done))
        steps = regroup(run, d)
        assert steps.count.item() == len(taken[i])
        where = {"seed": keys[i : i + 1], "record": zeros[:1], "task_index": torch.tensor([i])}
        tokens = tasks.emit(steps.state, step=steps.step, **where)[0]
        assert (tokens.squeeze(-1).numpy() == np.stack(observed[i])).all()
        assert steps.reward[0].tolist() == [x for k, x in rewards if k == i]
        assert steps.done[0].tolist() == [x for k, x in dones if k == i]
        last = (run.done[0] > 0).nonzero()[:, 0]
        final = tasks.emit(run.next_state[:, last], step=~last, **where)[0]
        assert (final.squeeze(-1).numpy() == np.stack(finals[i])).all()
        assert len(last) > 3


# --- environments -----------------------------------------------------------------------------------------------------


def test_the_environment_passes_the_checker(tasks):
    env = TabularEnv(tasks[0], render_mode="ansi")
    check_env(env, skip_render_check=True)
    k, d = tasks.observation_tokens, tasks.action_tokens
    assert env.observation_space == (
        gymnasium.spaces.Discrete(11) if k == 1 else gymnasium.spaces.MultiDiscrete([11] * k)
    )
    assert env.action_space == (gymnasium.spaces.Discrete(3) if d == 1 else gymnasium.spaces.MultiDiscrete([3] * d))
    seen, _ = env.reset(seed=3)
    assert env.render().endswith(f"observed as {seen}")
    env.reset(options={"task": tasks[1]})
    with pytest.raises(ValueError, match="action: wanted"):
        env.step([0] * (d + 1) if d > 1 else 7)
    with pytest.raises(ValueError, match=r"^task: has observed ids"):
        env.reset(options={"task": sample_anymdp(1, 12, 3, seed=0)})


def test_fractions_are_no_actions():
    env = TabularEnv(sample_pomdp(1, 8, 3, seed=0, action_tokens=2))
    env.reset(seed=0)
    with pytest.raises(ValueError, match="action: wanted 2 of 0 to 2"):
        env.step([0.5, 1.0])


def test_vector_environment_spaces_and_refusals(tasks):
    env = TabularVectorEnv(tasks)
    k, d = tasks.observation_tokens, tasks.action_tokens
    assert env.reset(seed=0)[0].shape == ((10, k) if k > 1 else (10,))
    assert env.action_space.shape == ((10, d) if d > 1 else (10,))
    with pytest.raises(ValueError, match="actions: wanted shape"):
        env.step(np.zeros((10, d + 1), dtype=int))
    with pytest.raises(ValueError, match=r"actions.*environment 0: wanted 0 to 2, got 3"):
        env.step(np.full(env.action_space.shape, 3))


def test_single_and_vector_environments_agree_in_distribution(tasks):
    """First steps from one state: observed tokens (each against the table) and summed rewards, five standard errors."""
    n, task = 4000, tasks[2]
    start = torch.nn.functional.one_hot(task.start.argmax(-1), task.shape[1]).float()
    task = dataclasses.replace(task, start=start)
    d, state = task.action_tokens, int(start.argmax())
    vector, single = TabularVectorEnv(task[[0] * n]), TabularEnv(task)
    first, _ = vector.reset(seed=0)
    after = vector.step(np.ones((n, d) if d > 1 else n, dtype=int))
    rows, single.np_random = [], np.random.default_rng(0)
    for _ in range(n):
        seen, _ = single.reset()
        rows.append((seen, *single.step([1] * d if d > 1 else 1)[:3]))
    mine = [np.array(x) for x in zip(*rows, strict=True)]
    for k in range(task.observation_tokens):
        p = task.emission[0, k, state].double().numpy()
        for seen in (first, mine[0]):
            share = np.bincount(seen.reshape(n, -1)[:, k], minlength=11) / n
            assert (np.abs(share - p) <= 5 * np.sqrt(p * (1 - p) / n)).all()
        one, two = (np.bincount(x.reshape(n, -1)[:, k], minlength=11) / n for x in (after[0], mine[1]))
        both = (one + two) / 2
        assert (np.abs(one - two) <= 5 * np.sqrt(2 * both * (1 - both) / n)).all()
    spread = np.sqrt((after[1].var() + mine[2].var()) / n)
    assert abs(after[1].mean() - mine[2].mean()) <= 5 * spread
    assert abs(after[2].mean() - mine[3].mean()) <= 5 * np.sqrt(0.5 / n)


# --- the other library ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_xenoverse_samples_the_same_emissions():
    """Rows' support and largest probability, two-sample Kolmogorov-Smirnov at p > .01/4."""
    peer = pytest.importorskip("xenoverse.anymdp", exc_type=ImportError)
    stats = pytest.importorskip("scipy.stats")
    one = [peer.AnyPOMDPTaskSampler(8, 2, observation_space=20, seed=i) for i in range(20)]
    many = [
        peer.MultiTokensAnyPOMDPTaskSampler(8, 2, observation_space=20, observation_tokens=2, action_tokens=2, seed=i)
        for i in range(20)
    ]
    for k, given in ((1, one), (2, many)):
        tasks = TabularTasks.from_xenoverse(given).validate()
        ours = emissions(200, 8, 20, k)
        assert tasks.emission is not None
        rows = tasks.emission.flatten(0, 1).double().numpy()
        for f in (lambda e: (e > 0).sum(-1).ravel(), lambda e: e.max(-1).ravel()):
            assert stats.ks_2samp(f(ours), f(rows)).pvalue > 0.01 / 4


@pytest.mark.slow
def test_xenoverse_environment_plays_our_tasks(tasks):
    """Under uniform actions, rewards of an environment step and shares of observed ids as ours, five standard errors."""
    peer = pytest.importorskip("xenoverse.anymdp", exc_type=ImportError)
    k, d, n = tasks.observation_tokens, tasks.action_tokens, 4000
    env = peer.AnyMDPEnv(max_steps=1)
    env.set_task(tasks.to_xenoverse(2))
    rng, rows = np.random.default_rng(0), []
    env.reset()
    while len(rows) < n:
        action = rng.integers(0, 3, d)
        seen, reward, terminated, truncated, _ = env.step(action if tasks.multi_token else int(action[0]))
        rows.append((seen, reward))
        if terminated or truncated:
            env.reset()
    vector = TabularVectorEnv(tasks[[2] * 400], AutoresetMode.SAME_STEP)
    vector.reset(seed=0)
    ours = []
    for _ in range(400):
        actions = rng.integers(0, 3, (400, d))
        _, reward, *_ = vector.step(actions if d > 1 else actions[:, 0])
        ours.append(reward)
    mine = np.concatenate(ours[50:])
    got = np.array([r for _, r in rows])
    # successive rewards are dependent: batch means of 100 steps
    error = got.reshape(-1, 100).mean(1).std() / np.sqrt(n / 100)
    assert abs(got.mean() - mine.mean()) < 5 * error + 5 * mine.std() / np.sqrt(len(mine))
    assert np.stack([np.atleast_1d(s) for s, _ in rows]).shape == (n, k)
