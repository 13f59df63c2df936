"""Task tables, samplers, environments: promises of the fields, determinism, round trips, refusals."""

import dataclasses

import gymnasium
import numpy as np
import pytest
import torch

from icrl.worlds import TabularTasks, sample_anymdp, sample_bandit, sample_garnet

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
    path.write_bytes(whole.replace(b'"version":"1"', b'"version":"9"'))
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
        (lambda: sample_anymdp(2, 16, 1, seed=0), "num_actions"),
        (lambda: sample_anymdp(-1, 16, seed=0), "n, first"),
        (lambda: sample_anymdp(2, 16, seed=0, num_observations=8), "num_observations"),
        (lambda: sample_garnet(2, 4, 5, 6, seed=0), "num_states"),
        (lambda: sample_garnet(2, 8, 5, 0, seed=0), "branching"),
        (lambda: sample_garnet(2, 8, 5, 2, seed=0, sigma=-1.0), "branching, num_actions, sigma"),
        (lambda: sample_bandit(2, 1, seed=0), "num_actions"),
        (lambda: TabularTasks.from_gymnasium(gymnasium.make("CartPole-v1")), "env"),
        (lambda: TabularTasks.from_xenoverse({"task_type": "POMDP"}), "task_type"),
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
