"""Learners in environments without tables are the simulator's learners, and learn where those are the judges."""

import pytest
import torch

from icrl.omnirl.evaluate import EPISODE_DISCOUNT, SETTINGS, run_baseline
from icrl.omnirl.learners import Fixed, ModelBasedLearner, UCBQLearner, run_world, uniform_actor
from icrl.omnirl.measures import mean_interval, normalised, windows
from icrl.omnirl.ppo import ENVIRONMENTS, train_ppo
from icrl.omnirl.references import measured, measured_in_world
from icrl.worlds import sample_bandit, sample_garnet
from icrl.worlds.pendulum import DiscretePendulum
from icrl.worlds.switch2 import Switch2
from icrl.worlds.vector_world import Step, TabularWorld
from icrl_kernels import constant_behaviours, rollout


@pytest.fixture(scope="module")
def tasks():
    return sample_garnet(24, 16, 5, 2, seed=7)


def learner(kind, world, bonus, discount):
    sizes = world.num_contexts, world.num_observations, world.num_actions
    return kind(*sizes, bonus=bonus, discount=discount, seed=0, device=torch.device("cpu"))


def test_q_learning_has_the_simulators_values(tasks):
    settings = {"q_bonus": 5.0, "q_discount": 0.9}
    out = rollout(
        tasks.tables(),
        steps=300,
        seed=3,
        behaviours=constant_behaviours(24, 0, {"q_learning": 1.0}, **settings),
    )
    ours = learner(UCBQLearner, TabularWorld(tasks, 0), 5.0, 0.9)
    each = torch.arange(24)
    for t in range(300):
        state, action = out.state[:, t].long(), out.action[:, t].long()
        n = ours.visits[each, state]
        width = 5.0 * ours.size() * (1 + n.sum(1)).log().sqrt()
        score = (ours.q[each, state] + width[:, None] / n.sqrt()).masked_fill(n == 0, torch.inf)
        taken, best = score[each, action], score.amax(1)
        assert ((taken == best) | ((best - taken) < 1e-4 * best.abs())).all()
        ours.at = (each, state, action)
        ours.learn(Step(out.reward[:, t], out.done[:, t], out.next_state[:, t].long()))
    assert torch.allclose(ours.q, out.final.q, rtol=1e-4, atol=1e-5)
    assert torch.equal(ours.visits.int(), out.final.visits)


@pytest.mark.parametrize(
    ("kind", "name"), [(UCBQLearner, "Q-learning (UCB)"), (ModelBasedLearner, "tabular model-based")]
)
def test_they_learn_as_the_simulators_do(tasks, kind, name):
    prefix = "q" if kind is UCBQLearner else "model"
    bonus, discount = SETTINGS[f"{prefix}_bonus"], SETTINGS[f"{prefix}_discount"]
    world, reference = TabularWorld(tasks, 1), measured(tasks, 20_000).reference
    ours = windows(run_world(world, learner(kind, world, bonus, discount), 3000), 1000)
    theirs = windows(run_baseline(tasks, name, 3000, 2), 1000)
    mine, _ = mean_interval(normalised(ours, reference))
    wanted, half = mean_interval(normalised(theirs, reference))
    assert ((mine - wanted).abs() < 2 * half + 0.05).all()


def test_references_of_tables():
    bandits = sample_bandit(64, seed=5)
    found = measured(bandits, 4000)
    gap = found.reference.oracle_episode - found.reference.random_episode
    assert (gap[found.kept] > 0).all()
    means = bandits.expected_reward()[:, 0].double()
    assert torch.allclose(found.reference.random_episode, means.mean(1), atol=0.05)
    variance = (bandits.noise_action[:, 0].double().gather(1, means.argmax(1, True))[:, 0] / gap).square()
    clear = (variance - 0.3).abs() > 0.1
    assert torch.equal(found.kept[clear], (variance < 0.3)[clear])
    assert found.kept.any()
    assert not found.kept.all()
    alike = measured(bandits[[3] * 8], 500, same=True)
    assert alike.kept.all()
    assert len(alike.reference.random_episode.unique()) == 1


def test_references_of_a_world_are_those_of_random_and_of_the_oracle():
    found = measured_in_world(Switch2(4), Switch2(1), 1200, contexts=3)
    assert found.oracle_episode.tolist() == pytest.approx([8.3 / 2] * 3, abs=1e-4)
    assert (found.random_episode < 1).all()


def test_the_oracle_of_tables_acts_by_its_policies(tasks):
    policies = tasks.solve(EPISODE_DISCOUNT).policy
    world = TabularWorld(tasks, 0, policies.long())
    run = run_world(world, Fixed(lambda _: world.oracle_action()), 4000)
    reference = measured(tasks, 20_000).reference
    assert float(normalised(windows(run, 4000), reference).mean()) == pytest.approx(1.0, abs=0.05)
    with pytest.raises(ValueError, match="policies"):
        TabularWorld(tasks, 0).oracle_action()


def test_random_actions_are_a_function_of_the_seed():
    runs = [run_world(DiscretePendulum(3, 5.0, seed=0), uniform_actor(5, seed), 50).reward for seed in (1, 1, 2)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_ppo_learns_a_bandit():
    pytest.importorskip("stable_baselines3")
    tasks = sample_bandit(40, seed=5)
    kept = measured(tasks, 2000).kept.nonzero()[:2, 0]
    tasks = tasks[kept]
    state = torch.get_rng_state()
    run = train_ppo(lambda i: TabularWorld(tasks[[i] * ENVIRONMENTS], i), 2, 4096, 0, None)
    assert torch.equal(torch.get_rng_state(), state)
    assert run.reward.shape == (2 * ENVIRONMENTS, 4096 // ENVIRONMENTS)
    assert (run.done == 2).all()
    curve = normalised(windows(run, 1024, ENVIRONMENTS, ENVIRONMENTS), measured(tasks, 2000).reference)
    assert (curve[:, -1] > curve[:, 0] + 0.1).all()
    assert float(curve[:, -1].mean()) > 0.5
