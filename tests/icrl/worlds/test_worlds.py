"""Task tables, samplers, environments: promises of the fields, determinism, round trips, refusals."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from icrl.worlds import (
    TabularEnv,
    TabularTasks,
    TabularVectorEnv,
    quality,
    sample_anymdp,
    sample_bandit,
    sample_garnet,
)
from icrl.worlds.draw import draw_task, to_rgb
from icrl_kernels import _C

SAMPLERS = {
    "anymdp": lambda n, **k: sample_anymdp(n, 16, 5, **k),
    "anymdp ragged": lambda n, **k: sample_anymdp(n, (12, 40), 3, num_observations=48, **k),
    "garnet": lambda n, **k: sample_garnet(n, (8, 20), 4, 3, num_observations=32, **k),
    "bandit": lambda n, **k: sample_bandit(n, 5, num_observations=7, **k),
}


def same(a: TabularTasks, b: TabularTasks) -> bool:
    states = max(a.transition.shape[1], b.transition.shape[1])
    a, b = a.pad(states, a.transition.shape[2]), b.pad(states, b.transition.shape[2])
    return a.num_observations == b.num_observations and all(
        torch.equal(x, y) for x, y in zip(a.tensors().values(), b.tensors().values(), strict=True)
    )


@pytest.fixture(scope="module")
def tasks() -> TabularTasks:
    return sample_anymdp(64, (16, 32), 5, seed=3)


@pytest.mark.parametrize("name", SAMPLERS)
def test_sampled_tasks_are_valid_and_a_function_of_seed_and_index(name):
    sample = SAMPLERS[name]
    whole = sample(12, seed=5).validate()
    assert same(whole, sample(12, seed=5))
    assert same(whole[7:], sample(5, seed=5, first=7))
    assert not same(whole, sample(12, seed=6))
    assert not same(whole[:6], whole[6:])
    assert len(sample(0, seed=5).validate()) == 0


def test_threads_do_not_matter(tasks):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert same(tasks, sample_anymdp(64, (16, 32), 5, seed=3))
    finally:
        torch.set_num_threads(threads)


def test_anymdp_semantics(tasks):
    t, live = tasks.transition, tasks.state_mask() & ~tasks.terminal
    s = torch.arange(t.shape[1])
    reached = (t > 0).any(2)
    first, last = reached.double().argmax(-1), t.shape[1] - 1 - reached.flip(-1).double().argmax(-1)
    # one window a state, the self-loop apart where the last state has none
    inside = (s >= first[..., None]) & (s <= last[..., None])
    hole = torch.eye(len(s), dtype=torch.bool) & (s == tasks.num_states[:, None] - 1)[:, :, None]
    assert ((reached == inside) | hole)[live].all()
    assert (first <= s)[live].all()
    assert (first >= s - tasks.num_states[:, None] // 2 - 1)[live].all()
    assert (tasks.start[:, 3:] == 0).all()
    assert ((tasks.reward == 0) | (t > 0)).all()
    for name in ("terminal", "noise_state", "noise_action"):
        assert getattr(tasks, name).any(), name
    assert (tasks.max_steps >= (4 * tasks.num_states).clamp(min=100)).all()
    assert (tasks.noise_state[tasks.terminal] == 0).all()


def test_accepted_tasks_pass_the_filters_as_recomputed_from_their_tables(tasks):
    found = quality(tasks)
    assert (found.advantage >= 2 - 1e-3).all()
    assert (found.gini > 0.7 - 1e-5).all()
    assert (found.entropy > 0.35 - 1e-5).all()
    assert not quality(sample_garnet(50, 16, 5, seed=0)).accepted().all()
    for a, b in zip(quality(tasks[5]), found, strict=True):  # padding and neighbours do not matter
        torch.testing.assert_close(a, b[5:6], rtol=1e-9, atol=1e-9)
    assert quality(tasks[:0]).gini.shape == (0,)


def test_solve_satisfies_bellman_and_ignores_lacking_actions(tasks):
    mixed = TabularTasks.concatenate([tasks[:4], sample_garnet(3, 10, 2, seed=0), sample_bandit(2, 3, seed=0)])
    gammas = [0.0, 0.5, 0.994]
    found = mixed.solve(gammas)
    t, r = mixed.transition.double(), mixed.reward.double()
    lacking = ~mixed.available_actions()
    for k, gamma in enumerate(gammas):
        want = (t * (r + gamma * found.v[:, k, None, None, :])).sum(-1).masked_fill(lacking, -torch.inf)
        bound = 2 * found.error_bound[:, k, None, None] + 1e-10
        assert ((found.q[:, k] - want).nan_to_num(0).abs() <= bound).all()
        assert torch.equal(found.q[:, k].isinf(), lacking.expand_as(want))
    assert (found.policy < mixed.num_actions[:, None, None]).all()
    one = mixed.solve(0.994)
    assert torch.equal(one.q, found.q[:, 2])


def test_expected_reward(tasks):
    want = (tasks.transition.double() * tasks.reward.double()).sum(-1)
    torch.testing.assert_close(tasks.expected_reward(), want.float(), rtol=0, atol=0)


def test_garnet_semantics():
    g = sample_garnet(40, 16, 5, 3, seed=0)
    assert ((g.transition > 0).sum(-1) == 3).all()
    assert not g.terminal.any()
    assert (g.start[:, 0] == 1).all()
    drawn = g.reward[g.transition > 0]
    assert abs(drawn.std().item() - 0.1) < 0.1 * 5 / (2 * len(drawn)) ** 0.5
    # each successor equally likely, uniform spacings have mean 1/3 and variance 1/18
    count = (g.transition > 0).double().mean((0, 1, 2)) * 16 / 3
    assert (count - 1).abs().max() < 0.3
    weights = g.transition[g.transition > 0].double()
    assert abs(weights.var().item() * 18 - 1) < 0.1


def test_bandit_semantics():
    b = sample_bandit(500, 5, seed=0)
    means = b.reward[:, 0, :, 0]
    assert (b.max_steps == 1).all()
    assert (means.std(-1, correction=0) > 0.01).all()
    assert ((means > 0.024) & (means < 2)).all()
    assert 0.3 < (b.noise_action.amax((1, 2)) == 0).double().mean() < 0.7


@pytest.mark.parametrize("name", SAMPLERS)
def test_round_trips(name, tmp_path):
    tasks = SAMPLERS[name](9, seed=1)
    tasks.save(tmp_path / "tasks.safetensors")
    assert same(tasks, TabularTasks.load(tmp_path / "tasks.safetensors"))
    again = TabularTasks.from_xenoverse([tasks.to_xenoverse(i) for i in range(len(tasks))])
    for field, tensor in tasks.tensors().items():
        if not field.startswith("noise"):
            torch.testing.assert_close(getattr(again, field), tensor, rtol=2e-6, atol=1e-7)
    noise, back = (x.noise_state[:, None, None] + x.noise_action[..., None] for x in (tasks, again))
    real = tasks.state_mask()[:, :, None, None] & tasks.state_mask()[:, None, None]
    torch.testing.assert_close((noise * real), (back * real), rtol=1e-5, atol=1e-7)


def test_damaged_files(tasks, tmp_path):
    path = tmp_path / "t.safetensors"
    tasks[:2].save(path)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-1000] ^= 1
    for bad in (whole[: len(whole) // 2], whole[:4], b"", bytes(flipped), b"\0" * 100):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=r"t\.safetensors"):
            TabularTasks.load(path)
    path.write_bytes(whole.replace(b'"version":"2"', b'"version":"9"'))
    with pytest.raises(ValueError, match="version '9'"):
        TabularTasks.load(path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        TabularTasks.load(tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == [path]


def test_index_concatenate_pad(tasks):
    parts = [tasks[0], tasks[1:5], tasks[torch.arange(5, 9)], tasks[[9, 10]], tasks[-1]]
    joined = TabularTasks.concatenate(parts).validate()
    assert same(joined, tasks[[*range(11), 63]])
    bandits = sample_bandit(3, 7, seed=0)
    mixed = TabularTasks.concatenate([tasks[:2], bandits]).validate()
    assert mixed.transition.shape == (5, 32, 7, 32)
    assert mixed.num_actions.tolist() == [5, 5, 7, 7, 7]
    for three in (np.int64(3), torch.tensor(3)):
        assert same(tasks[three], tasks[3])
    assert len(tasks[[]]) == 0
    with pytest.raises(IndexError):
        tasks[64]
    with pytest.raises(ValueError, match="states, actions"):
        tasks.pad(8, 5)
    with pytest.raises(ValueError, match="batches"):
        TabularTasks.concatenate([])


def test_observations_invert(tasks):
    states = torch.zeros(len(tasks), 4, dtype=torch.int64) + torch.arange(4)
    seen = tasks.observe(states)
    assert torch.equal(tasks.state_of().gather(1, seen), states)
    assert torch.equal((tasks.state_of() >= 0).sum(1), tasks.num_states)


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("transition", lambda t: t * 0.9),
        ("transition", lambda t: t.index_fill(0, torch.tensor([1]), float("nan"))),
        ("transition", lambda t: -t),
        ("transition", lambda t: t.double()),
        ("transition", lambda t: t[..., :-1]),
        ("transition", lambda t: t.flatten()),
        ("transition", lambda t: t.flip(-1)),
        ("reward", lambda t: t / 0),
        ("reward", lambda t: t[:3]),
        ("noise_state", lambda t: t - 1),
        ("noise_action", lambda t: t[..., 0]),
        ("start", lambda t: t * 2),
        ("terminal", lambda t: t.float()),
        ("terminal", lambda t: ~t),
        ("max_steps", lambda t: t * 0),
        ("state_mapping", lambda t: t + 1),
        ("state_mapping", lambda t: t.clamp(max=3)),
        ("state_mapping", lambda t: t - 7),
        ("num_states", lambda t: t + 100),
        ("num_states", lambda t: t * 0),
        ("num_actions", lambda t: t - 9),
    ],
)
def test_validate_names_the_field(tasks, field, change):
    broken = dataclasses.replace(tasks, **{field: change(getattr(tasks, field))})
    # a wrong terminal mask or size shows first in the rows that it contradicts
    named = {"terminal": "terminal|transition", "num_states": "num_states"}.get(field, field)
    with pytest.raises(ValueError, match=rf"^({named}):"):
        broken.validate()


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: sample_anymdp(2, 7, seed=0), "num_states"),
        (lambda: sample_anymdp(2, (40, 20), seed=0), "num_states"),
        (lambda: sample_anymdp(2, torch.tensor([16, 3]), seed=0), "num_states"),
        (lambda: sample_anymdp(2, (8, 16.5), seed=0), "num_states: wanted an integer, got 16.5"),
        (lambda: sample_garnet(2, torch.tensor([8.7, 9.9]), seed=0), "num_states: wanted integers"),
        (lambda: sample_anymdp(2, 16, 1, seed=0), "num_actions"),
        (lambda: sample_anymdp(-1, 16, seed=0), "n: wanted at least 0, got -1"),
        (lambda: sample_anymdp(2, 16, seed=0, num_observations=8), "num_observations"),
        (lambda: sample_garnet(2, 4, 5, 6, seed=0), "num_states"),
        (lambda: sample_garnet(2, 8, 5, 0, seed=0), "branching"),
        (lambda: sample_garnet(2, 8, 5, 2, seed=0, sigma=-1.0), "sigma: wanted a finite number of at least 0, got -1"),
        (lambda: sample_bandit(2, 1, seed=0), "num_actions"),
        (lambda: TabularTasks.from_gymnasium(gymnasium.make("CartPole-v1")), "env"),
        (lambda: TabularTasks.from_xenoverse({"task_type": "PDP"}), "task_type"),
        (lambda: TabularTasks.from_xenoverse({"task_type": "POMDP", "no": 3}), "observation_transition"),
    ],
)
def test_refusals(call, named):
    with pytest.raises(ValueError, match=named):
        call()


def test_a_task_that_no_candidate_yields():
    with pytest.raises(RuntimeError, match="no candidate of 1 passed"):
        sample_anymdp(50, 8, seed=0, max_attempts=1)


def test_from_gymnasium():
    lake = TabularTasks.from_gymnasium(gymnasium.make("FrozenLake-v1", is_slippery=False))
    assert lake.max_steps.item() == 100
    assert lake.terminal[0].nonzero()[:, 0].tolist() == [5, 7, 11, 12, 15]
    assert lake.transition[0, 0, 1, 4] == 1
    assert lake.reward[0, 14, 2, 15] == 1
    cliff = TabularTasks.from_gymnasium(gymnasium.make("CliffWalking-v1"), max_steps=200)
    assert cliff.terminal[0].nonzero()[:, 0].tolist() == [47]
    assert cliff.reward[0, 36, 1, 36] == -100
    with pytest.raises(ValueError, match="max_steps"):
        TabularTasks.from_gymnasium(gymnasium.make("CliffWalking-v1"))
    taxi = gymnasium.make("Taxi-v4")
    tasks = TabularTasks.from_gymnasium(taxi)
    assert tasks.terminal.sum() == 4
    assert np.allclose(tasks.start[0], taxi.unwrapped.initial_state_distrib)


# --- environments -----------------------------------------------------------------------------------------------------


def rollout(env, seed: int, steps: int = 300) -> list:
    env.reset(seed=seed)
    actions = np.random.default_rng(seed)
    out = []
    for _ in range(steps):
        out.append(env.step(int(actions.integers(env.action_space.n)))[:4])
        if out[-1][2] or out[-1][3]:
            out.append(env.reset()[0])
    return out


def test_env_passes_the_checker_and_honours_seeds():
    env = gymnasium.make("icrl/AnyMDP-v0", num_states=8, num_actions=3, render_mode="ansi")
    check_env(env.unwrapped)
    assert rollout(env, 0) == rollout(env, 0)
    assert rollout(env, 0) != rollout(env, 1)
    assert env.render().startswith("step ")


def test_env_ends_as_the_task_says(tasks):
    env = TabularEnv(tasks[2])
    mapping, ns = tasks.state_mapping[2].tolist(), int(tasks.num_states[2])
    ends = {True: 0, False: 0}
    for episode in range(30):
        seen, info = env.reset(seed=episode)
        for k in range(int(tasks.max_steps[2])):
            assert mapping[info["state"]] == seen
            seen, _, terminated, truncated, info = env.step(k % 5)
            assert terminated == bool(tasks.terminal[2, info["state"]])
            assert truncated == (not terminated and bool(k + 1 == tasks.max_steps[2]))
            if terminated or truncated:
                ends[terminated] += 1
                break
        with pytest.raises(RuntimeError, match="reset"):
            env.step(0)
    assert sum(ends.values()) == 30
    assert env.observation_space.n >= ns


def test_env_changes_task_and_refuses_bad_ones(tasks):
    env = TabularEnv(tasks[0])
    env.reset(options={"task": tasks[1]})
    assert same(env.task, tasks[1])
    for options, named in (({"task": tasks}, "task"), ({"tsk": 1}, "options")):
        with pytest.raises(ValueError, match=named):
            env.reset(options=options)
    with pytest.raises(ValueError, match="observed ids"):
        env.reset(options={"task": sample_anymdp(1, 64, 5, seed=0)})
    env = TabularEnv(tasks[0])
    env.reset(seed=0)
    for action in (5, 1.7):
        with pytest.raises(ValueError, match="action"):
            env.step(action)
    with pytest.raises(ValueError, match="render_mode"):
        TabularEnv(tasks[0], render_mode="human")


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
def test_vector_env_ends_and_resets(mode):
    tasks = TabularTasks.concatenate([sample_anymdp(20, 16, 5, seed=0), sample_bandit(4, 5, seed=0)])
    env = TabularVectorEnv(tasks, mode)
    assert env.metadata["autoreset_mode"] is mode
    rng = np.random.default_rng(0)
    _, info = env.reset(seed=0)
    state, steps, over = info["state"], np.zeros(24, dtype=int), np.zeros(24, dtype=bool)
    arange, transition = np.arange(24), tasks.transition.numpy()
    for _ in range(250):
        actions = rng.integers(0, 5, 24)
        seen, reward, terminated, truncated, info = env.step(actions)
        assert env.observation_space.contains(seen)
        steps += 1
        if mode == AutoresetMode.NEXT_STEP:
            assert (reward[over] == 0).all()
            assert not (terminated | truncated)[over].any()
            steps[over] = 0
            landed = info["state"]
            assert (tasks.start.numpy()[arange, landed][over] > 0).all()
            moved = ~over
            over = terminated | truncated
        else:
            moved, over = np.ones(24, dtype=bool), terminated | truncated
            landed = info["state"].copy()
            if over.any():
                assert (info["_final_obs"] == over).all()
                inner = tasks.state_of().numpy()[arange[over], info["final_obs"][over].astype(int)]
                assert (tasks.start.numpy()[arange, landed][over] > 0).all()
                landed[over] = inner
        assert (transition[arange, state, actions, landed][moved] > 0).all()
        assert (tasks.terminal.numpy()[arange, landed][moved] == terminated[moved]).all()
        assert (((steps == tasks.max_steps.numpy()) & ~terminated)[moved] == truncated[moved]).all()
        state = info["state"]
        if mode == AutoresetMode.SAME_STEP:
            steps[over] = 0


def test_vector_trajectories_depend_on_their_own_seed_only(tasks):
    def run(env, seed, columns):
        env.reset(seed=seed)
        rng = np.random.default_rng(0)
        return [np.stack(env.step(rng.integers(0, 5, 64)[columns])[:2])[:] for _ in range(120)]

    whole = run(TabularVectorEnv(tasks), 7, slice(None))
    part = run(TabularVectorEnv(tasks[20:30]), 27, slice(20, 30))
    assert all((w[:, 20:30] == p).all() for w, p in zip(whole, part, strict=True))
    other = run(TabularVectorEnv(tasks), 8, slice(None))
    assert any((w != o).any() for w, o in zip(whole, other, strict=True))
    env = TabularVectorEnv(tasks)
    first = [env.reset()[0] for _ in range(40)]
    assert any((first[0] != f).any() for f in first)


def test_vector_env_equals_single_env_and_the_tables_in_distribution(tasks):
    """One state and action, many draws: next-state frequencies (χ²) and reward moments against the table, for both."""
    n, task, action = 4000, tasks[4], 2
    state = int(task.start.argmax())
    p = task.transition[0, state, action].double().numpy()
    mean = float(task.expected_reward()[0, state, action])
    one = dataclasses.replace(task, start=torch.nn.functional.one_hot(task.start.argmax(-1), p.size).float())
    vector, single = TabularVectorEnv(one[[0] * n]), TabularEnv(one)
    vector.reset(seed=0)
    _, rewards, _, _, info = vector.step(np.full(n, action))
    drawn = {"vector": (info["state"], rewards)}
    single.reset(seed=0)
    steps = []
    for _ in range(n):
        steps.append(single.step(action))
        single.reset()
    drawn["single"] = np.array([s[4]["state"] for s in steps]), np.array([s[1] for s in steps])
    r = task.reward[0, state, action].double().numpy()
    sigma = (task.noise_state[0] + task.noise_action[0, state, action]).double().numpy()
    deviation = np.sqrt((p * (r**2 + sigma**2)).sum() - mean**2)
    for name, (states, got) in drawn.items():
        count = np.bincount(states, minlength=p.size)
        assert (count[p == 0] == 0).all(), name
        often = n * p > 5
        chi2 = ((count - n * p)[often] ** 2 / (n * p)[often]).sum()
        assert chi2 < often.sum() + 5 * np.sqrt(2 * often.sum()), name
        assert abs(got.mean() - mean) < 5 * deviation / np.sqrt(n), name


def test_vector_env_refusals(tasks):
    env = TabularVectorEnv(tasks)
    with pytest.raises(RuntimeError, match="reset"):
        env.step(np.zeros(64, dtype=int))
    with pytest.raises(ValueError, match="seed"):
        env.reset(seed=[1, 2])
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"actions.*environment 0: wanted 0 to 4, got 5"):
        env.step(np.full(64, 5))
    with pytest.raises(ValueError, match="actions"):
        env.step(np.zeros(3, dtype=int))
    with pytest.raises(ValueError, match="actions: wanted integers"):
        env.step(np.full(64, 0.7))
    with pytest.raises(ValueError, match="options: wanted 'reset_mask' only"):
        env.reset(options={"task": tasks[0]})


def deterministic(n):
    """Tasks whose trajectories depend on actions alone, with short episodes that end in both ways."""
    tasks = sample_anymdp(n, 16, 5, seed=0)

    def certain(p):
        return torch.nn.functional.one_hot(p.argmax(-1), p.shape[-1]).to(p)

    start = certain(tasks.start)
    terminal = (torch.arange(16) % 3 == 0).expand(n, 16) & (start == 0)
    quiet = {"noise_state": torch.zeros_like(tasks.noise_state), "noise_action": torch.zeros_like(tasks.noise_action)}
    lengths = torch.arange(n) % 5 + 2
    # all actions lead somewhere else, to a state that its number and the action's give
    following = (torch.arange(16)[:, None] * 5 + torch.arange(5) * 7 + 1) % 16
    transition = torch.nn.functional.one_hot(following, 16).to(tasks.transition).expand(n, 16, 5, 16)
    transition = transition * ~terminal[:, :, None, None]
    return dataclasses.replace(
        tasks, transition=transition, start=start, terminal=terminal, max_steps=lengths.to(tasks.max_steps), **quiet
    )


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if isinstance(value, dict):
            assert_same(ours[name], value)
        else:
            assert ours[name].dtype == value.dtype, name
            assert ours[name].tolist() == value.tolist(), name


def without_mean(info):
    """TabularVectorEnv gives no mean rewards."""
    return {k: without_mean(v) if isinstance(v, dict) else v for k, v in info.items() if "mean_reward" not in k}


@pytest.mark.parametrize("mode", AutoresetMode)
def test_vector_env_is_as_gymnasiums(mode):
    """Step by step beside SyncVectorEnv: observations, rewards, ends, infos; resets of some environments among them."""
    n = 12
    tasks = deterministic(n)
    theirs = SyncVectorEnv([lambda i=i: TabularEnv(tasks[i]) for i in range(n)], autoreset_mode=mode)
    ours = TabularVectorEnv(tasks, mode)
    rng, ends, finals = np.random.default_rng(0), np.zeros(2, dtype=int), 0
    for step in range(200):
        if step % 50 == 0:
            ends_seen = np.zeros(n, dtype=bool)
            mine, other = ours.reset(seed=step), theirs.reset(seed=step)
        else:
            actions = rng.integers(0, 5, n)
            mine, other = ours.step(actions), theirs.step(actions)
            ends_seen = other[2] | other[3]
            ends += [other[2].sum(), other[3].sum()]
            finals += "final_info" in other[4]
            assert mine[1].tolist() == other[1].astype(np.float32).tolist()
            assert mine[2].tolist() == other[2].tolist()
            assert mine[3].tolist() == other[3].tolist()
        assert mine[0].tolist() == other[0].tolist()
        assert mine[0].dtype == other[0].dtype
        assert_same(mine[-1], without_mean(other[-1]))
        again = ends_seen | (rng.random(n) < 0.2) if mode == AutoresetMode.DISABLED else rng.random(n) < 0.05
        if again.any():
            if mode == AutoresetMode.DISABLED and ends_seen.any():
                with pytest.raises(RuntimeError, match=r"step: the episodes of environments \[.*have ended"):
                    ours.step(np.zeros(n, dtype=int))
            mine, other = (env.reset(options={"reset_mask": again.copy()}) for env in (ours, theirs))
            assert mine[0].tolist() == other[0].tolist()
            assert_same(mine[1], other[1])
    assert (ends > 50).all()
    assert (finals > 50) == (mode == AutoresetMode.SAME_STEP)


def test_resets_of_some_environments(tasks):
    """The others go on as they would have; those reset depend on their seeds alone."""
    one, other = TabularVectorEnv(tasks), TabularVectorEnv(tasks)
    for env in (one, other):
        env.reset(seed=3)
        env.step(np.ones(64, dtype=int))
    mask = np.arange(64) % 3 == 0
    seen, info = one.reset(seed=100, options={"reset_mask": mask})
    whole, _ = TabularVectorEnv(tasks).reset(seed=100)
    assert (seen[mask] == whole[mask]).all()
    assert info["_state"].tolist() == mask.tolist()
    for _ in range(40):
        a, b = one.step(np.ones(64, dtype=int)), other.step(np.ones(64, dtype=int))
        assert all((x[~mask] == y[~mask]).all() for x, y in zip(a[:4], b[:4], strict=True))
    fresh = TabularVectorEnv(tasks)
    for wrong, error, message in (
        (mask.tolist(), TypeError, "wanted a numpy array of bool, got list"),
        (mask.astype(int), TypeError, "wanted a numpy array of bool, got int64"),
        (mask[1:], ValueError, r"wanted shape \[64\] and at least one True, got \[63\]"),
        (np.zeros(64, dtype=bool), ValueError, "at least one True, got none"),
    ):
        with pytest.raises(error, match=message):
            one.reset(options={"reset_mask": wrong})
    with pytest.raises(RuntimeError, match="all environments before"):
        fresh.reset(options={"reset_mask": mask})
    fresh.reset(options={"reset_mask": np.ones(64, dtype=bool)})


def test_make_vec():
    env = gymnasium.make_vec("icrl/AnyMDP-v0", 3, vectorization_mode="vector_entry_point", num_states=8)
    assert isinstance(env.unwrapped, TabularVectorEnv)
    assert env.reset(seed=0)[0].shape == (3,)


def test_picture(tasks):
    picture = to_rgb(draw_task(tasks, 3, current=1))
    assert picture.dtype == np.uint8
    assert picture.ndim == 3
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 100
    assert (picture != to_rgb(draw_task(tasks, 3, current=2))).any()
    for other in (sample_bandit(1, 3, seed=0), sample_garnet(1, 70, 2, seed=0)):
        assert to_rgb(draw_task(other)).std() > 5
    env = TabularEnv(tasks[3], render_mode="rgb_array")
    env.reset(seed=0)
    before = env.render()
    env.step(0)
    assert env.render().shape == before.shape == picture.shape


# --- other machines, other samplers -----------------------------------------------------------------------------------

CHECKSUMS = """
from icrl.worlds import sample_anymdp
t = sample_anymdp(40, (16, 40), seed=3)
print(t.terminal.sum().item(), t.max_steps.sum().item(), *t.transition.double().square().sum((1, 2, 3)).tolist())
print(*t.reward.double().sum((1, 2, 3)).tolist())
"""


def test_every_instruction_set_samples_the_same_tasks():
    outputs = {}
    for isa in dict.fromkeys(["generic", "avx2", _C.isa()]):
        env = {**os.environ, "ICRL_ISA": isa}
        done = subprocess.run(
            [sys.executable, "-c", CHECKSUMS],
            env=env,
            cwd=Path(_C.__file__).parents[1],
            capture_output=True,
            text=True,
            check=False,
        )
        if "does not have it" not in done.stderr:
            assert done.returncode == 0, done.stderr
            outputs[isa] = [float(x.strip("[],")) for x in done.stdout.split()]
    first = outputs.pop("generic")
    for isa, other in outputs.items():
        np.testing.assert_allclose(other, first, rtol=1e-5, atol=1e-5, err_msg=isa)


@pytest.mark.slow
def test_xenoverse_environment_plays_our_tasks(tasks):
    """Its environment under uniform actions earns per step what the tables say, within five standard errors."""
    peer = pytest.importorskip("xenoverse.anymdp", exc_type=ImportError)
    env = peer.AnyMDPEnv(max_steps=1)
    env.set_task(tasks.to_xenoverse(2))
    rng, inner = np.random.default_rng(0), {int(o): s for s, o in enumerate(tasks.state_mapping[2].tolist())}
    mean, surprise = tasks.expected_reward()[2].numpy(), []
    seen, _ = env.reset()
    for _ in range(5000):
        action = int(rng.integers(5))
        state = inner[seen]
        seen, reward, terminated, truncated, _ = env.step(action)
        surprise.append(reward - mean[state, action])
        if terminated or truncated:
            seen, _ = env.reset()
    assert abs(np.mean(surprise)) < 5 * np.std(surprise) / np.sqrt(len(surprise))
