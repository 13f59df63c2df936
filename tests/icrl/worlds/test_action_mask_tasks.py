"""Tasks whose states lack actions: batches, files, solutions, simulations and environments."""

import json
from dataclasses import replace

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.envs.toy_text.taxi import TaxiEnv
from gymnasium.vector import AutoresetMode

from icrl.commands.worlds import inspect
from icrl.omnirl import evaluate
from icrl.omnirl.agent import Agent
from icrl.omnirl.distill import DPDConfig, make_records
from icrl.omnirl.value_iteration_network import ValueIterationNetwork, ValueIterationNetworkConfig
from icrl.omnirl.value_iteration_training import ValueIterationTraining, targets_of
from icrl.worlds import TabularEnv, TabularTasks, TabularVectorEnv, quality, sample_anymdp, sample_garnet
from icrl.worlds.difficulty import difficulty
from icrl_kernels import rollout, value_iteration

N, S, A = 5, 10, 4


def mask_of(tasks, seed=0):
    g = torch.Generator().manual_seed(seed)
    n, s, a = tasks.shape
    mask = torch.rand(n, s, a, generator=g) < 0.5
    own = torch.randint(2**30, (n, s), generator=g) % tasks.num_actions[:, None]
    mask |= torch.nn.functional.one_hot(own, a).bool()
    return mask & ~(tasks.terminal[..., None])


def masked(n=N, seed=0, **more):
    tasks = sample_anymdp(n, (8, S), A, seed=seed, packed=False, **more)
    return replace(tasks, action_mask=mask_of(tasks, seed)).validate()


@pytest.fixture(scope="module")
def tasks():
    return masked()


def same(a, b):
    one, two = a.tensors(), b.tensors()
    return one.keys() == two.keys() and all(torch.equal(x, two[name]) for name, x in one.items())


def test_batches(tasks):
    assert torch.equal(tasks[2].action_mask[0], tasks.action_mask[2])
    assert torch.equal(tasks[torch.tensor([3, 1])].action_mask, tasks.action_mask[[3, 1]])
    assert torch.equal(tasks.pack().action_mask, tasks.action_mask)
    assert tasks.to("meta").action_mask.is_meta
    wide = tasks.pad(S + 3, A + 2).validate()
    assert torch.equal(wide.action_mask[:, : tasks.shape[1], :A], tasks.action_mask)
    assert not wide.action_mask[:, :, A:].any()
    plain = sample_garnet(3, 12, 2, 2, seed=1)
    joined = TabularTasks.concatenate([plain, tasks]).validate()
    assert torch.equal(joined.available_actions()[3:, : tasks.shape[1], :A], tasks.available_actions())
    assert torch.equal(joined.available_actions()[:3], TabularTasks.concatenate([plain, tasks]).available_actions()[:3])
    assert joined.available_actions()[:3, :, :2].all()
    assert TabularTasks.concatenate([plain, plain]).action_mask is None
    for x in (tasks, tasks.pack()):
        assert same(TabularTasks.concatenate([x[i] for i in range(N)]), x)


def test_files(tasks, tmp_path):
    for i, x in enumerate((tasks, tasks.pack(), tasks[:1])):
        x.save(tmp_path / f"{i}.safetensors")
        assert same(TabularTasks.load(tmp_path / f"{i}.safetensors"), x)
    plain = replace(tasks, action_mask=None)
    plain.save(tmp_path / "plain.safetensors")
    assert TabularTasks.load(tmp_path / "plain.safetensors").action_mask is None
    content = (tmp_path / "plain.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert "action_mask" not in header


def test_what_is_missing_has_no_say(tasks):
    """Other tables at the missing actions give the same values, simulations and measures."""
    missing = ~tasks.action_mask & (tasks.state_mask() & ~tasks.terminal)[..., None]
    other = replace(
        tasks,
        transition=tasks.transition.masked_fill(missing[..., None], 0.0),
        reward=tasks.reward.masked_fill(missing[..., None], 9.0),
    ).validate()
    found = [x.solve([0.5, 0.99]) for x in (tasks, other, other.pack())]
    assert torch.equal(found[0].q, found[1].q)
    torch.testing.assert_close(found[0].v, found[2].v, rtol=0, atol=1e-7)
    has = tasks.available_actions()
    want = value_iteration(
        tasks.transition, tasks.reward, 0.5, terminal=tasks.terminal, num_states=tasks.num_states, action_mask=has
    )
    assert torch.equal(found[0].q[:, 0], want.q)
    assert all(torch.equal(x, y) for x, y in zip(tasks.tables(), other.tables(), strict=True))
    assert all(torch.equal(x, y) for x, y in zip(quality(tasks), quality(other), strict=True))
    assert torch.allclose(difficulty(tasks).visits, difficulty(other).visits, equal_nan=True)
    assert not torch.allclose(found[0].v[:, 1], replace(tasks, action_mask=None).solve(0.99).v)


def test_inspect_reads_no_missing_action(tasks, tmp_path):
    other = replace(tasks, reward=tasks.reward.masked_fill(~tasks.action_mask[..., None], 1e5))
    found = []
    for name, of in (("a", tasks), ("b", other)):
        of.save(tmp_path / name)
        found.append(inspect(tmp_path / name))
    assert found[0] == found[1]


def test_several_action_tokens_are_refused(tasks):
    with pytest.raises(ValueError, match=r"^action_mask: wanted tasks of one action token"):
        replace(tasks, action_tokens=2).validate()


def test_refusals(tasks):
    bare = tasks.action_mask.clone()
    bare[3, 0] = False
    with pytest.raises(ValueError, match=r"^action_mask: wanted an action in .* none in state 0 of task 3$"):
        replace(tasks, action_mask=bare).validate()
    for wrong in (bare[0], bare.int(), bare[:, :, :-1], bare.to("meta")):
        with pytest.raises(ValueError, match=r"^action_mask"):
            replace(tasks, action_mask=wrong).validate()
    broken = tasks.transition.clone()
    task, state, action = tasks.action_mask.nonzero()[0].tolist()
    broken[task, state, action] = 0
    with pytest.raises(ValueError, match=r"^transition: row"):
        replace(tasks, transition=broken).validate()
    with pytest.raises(ValueError, match=r"^action_mask: xenoverse"):
        tasks.to_xenoverse(0)
    assert replace(tasks, action_mask=None).to_xenoverse(0)["na"] == A


class Corridor(gymnasium.Env):
    """Six cells; every step costs 1, the last cell ends it. Left is not there in cell 0; what is lacking in cell 2 is empty."""

    observation_space, action_space = gymnasium.spaces.Discrete(6), gymnasium.spaces.Discrete(3)

    def __init__(self, full=False):
        self.initial_state_distrib = np.eye(6)[0]
        self.P = {s: {1: [(1.0, min(s + 1, 5), -1.0, s >= 4)]} for s in range(6)}
        for s in range(1, 5):
            self.P[s][0] = [(1.0, s - 1, -1.0, False)]
        self.P[2][2] = []
        self.P[4][2] = [(1.0, 0, -0.5, False)]
        if full:
            self.P = {s: {a: self.P[s].get(a) or self.P[s][1] for a in range(3)} for s in range(6)}


def test_gymnasium_tables():
    task = TabularTasks.from_gymnasium(Corridor(), max_steps=50)
    assert task.num_actions.tolist() == [3]
    want = torch.tensor([[0, 1, 0], [1, 1, 0], [1, 1, 0], [1, 1, 0], [1, 1, 1]]).bool()
    assert torch.equal(task.action_mask[0, :5], want)
    found = task.solve(1.0)
    assert found.v[0, :6].tolist() == [-5, -4, -3, -2, -1, 0]
    assert found.error_bound.item() < 1e-9
    trap = replace(task, action_mask=None)  # a zero row would end the episode after a reward of 0
    with pytest.raises(ValueError, match=r"^transition: row"):
        trap.validate()
    assert TabularTasks.from_gymnasium(Corridor(full=True), max_steps=50).action_mask is None
    for env in (gymnasium.make("FrozenLake-v1"), gymnasium.make("CliffWalking-v1"), TaxiEnv()):
        assert TabularTasks.from_gymnasium(env, max_steps=100).action_mask is None


def test_environment():
    env = TabularEnv(TabularTasks.from_gymnasium(Corridor(), max_steps=50))
    _, info = env.reset(seed=0)
    assert info["action_mask"].dtype == np.int8
    assert info["action_mask"].tolist() == [0, 1, 0]
    with pytest.raises(ValueError, match=r"^action: state 0 does not have action 0"):
        env.step(0)
    for _ in range(300):
        action = env.action_space.sample(info["action_mask"])
        _, _, terminated, truncated, info = env.step(action)
        assert info["action_mask"].tolist() == env.task.available_actions()[0, info["state"]].tolist()
        if terminated or truncated:
            _, info = env.reset()
    assert "action_mask" not in TabularEnv(0).reset(seed=0)[1]


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
def test_vector_environment(tasks, mode):
    env = TabularVectorEnv(tasks, mode)
    _, info = env.reset(seed=3)
    has, rng, each = tasks.available_actions().numpy(), np.random.default_rng(0), np.arange(N)
    ended, ends = np.zeros(N, dtype=bool), 0
    for _ in range(600):
        mask = info["action_mask"]
        assert mask.dtype == np.int8
        assert np.array_equal(mask, has[each, info["state"]])
        action = np.array([rng.choice(np.flatnonzero(row)) if row.any() else rng.integers(A) for row in mask])
        if mode == AutoresetMode.NEXT_STEP:  # that of a step that resets is not heeded
            action = np.where(ended, rng.integers(A, size=N), action)
        missing = (mask == 0) & ~(ended & (mode == AutoresetMode.NEXT_STEP))[:, None]
        if missing.any() and rng.random() < 0.1:
            i, a = (int(x) for x in np.argwhere(missing)[0])
            wrong = action.copy()
            wrong[i] = a
            with pytest.raises(ValueError, match=rf"^actions: state \d+ of environment {i} does not have action {a}"):
                env.step(wrong)
        _, _, terminated, truncated, info = env.step(action)
        ended = terminated | truncated
        ends += ended.sum()
    assert ends > 5
    assert "action_mask" not in TabularVectorEnv(replace(tasks, action_mask=None), mode).reset(seed=0)[1]


def test_baselines_and_oracle(tasks):
    tables, each = tasks.tables(), torch.arange(N)[:, None]
    run = rollout(tables, steps=500, seed=1)
    assert tasks.action_mask[each, run.state.long(), run.action.long()].all()
    reference = evaluate.references(tasks, steps=3000)
    assert (reference.oracle_reward >= reference.random_reward).all()
    for name in evaluate.BASELINES:
        assert evaluate.run_baseline(tasks, name, 400, seed=2, tables=tables).reward.isfinite().all()


def small_model():
    torch.manual_seed(0)
    return ValueIterationNetwork(ValueIterationNetworkConfig(actions=A, layers=1)).eval()


def test_agent(tasks):
    model = small_model()
    for fused in (True, False):
        went = evaluate.run_agent(model, tasks, 60, seed=1, fused=fused)
        assert tasks.action_mask[torch.arange(N)[:, None], went.state, went.action].all()
    agent = Agent(model, 2, S, num_actions=torch.tensor([A, 2]))
    there = torch.zeros(2, A, dtype=torch.bool)
    there[0, 3] = there[1, 1] = True
    for _ in range(20):
        assert agent.act(torch.zeros(2, dtype=torch.int64), there).tolist() == [3, 1]
        agent.observe(torch.zeros(2), torch.zeros(2))
    only = torch.tensor([[True, False, False, False], [False, False, True, True]])  # beyond the second task's own two
    for wrong in (only, there[:1], there.int(), there[0], torch.ones(2, A + 9, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"^action_mask"):
            agent.act(torch.zeros(2, dtype=torch.int64), wrong)


def test_records(tasks):
    config = DPDConfig(steps=80, states=S, actions=A, batch=N)
    records = make_records(config, tasks, seed=0)
    state = tasks.state_of().gather(1, records.observation)
    there = tasks.action_mask[torch.arange(N)[:, None], state]
    assert there.gather(2, records.action[..., None]).all()
    assert torch.equal(records.q == -torch.inf, ~there[:, :, None].expand_as(records.q))
    wanted = targets_of(
        records, ValueIterationTraining(model=ValueIterationNetworkConfig(actions=A), data=config)
    ).policy
    assert (wanted.sum(2) - 1).abs().max() < 1e-6
    assert (wanted[~there] == 0).all()  # no policy is to imitate what is missing, the explorer neither
