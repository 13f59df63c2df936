"""Scores mean what they say."""

import math

import pytest
import torch

from icrl.omnirl import evaluate
from icrl.omnirl.evaluate import Context, Reference
from icrl.worlds import sample_anymdp


@pytest.fixture(scope="module")
def tasks():
    return sample_anymdp(24, 16, seed=5)


def test_episode_means_by_hand():
    reward = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]])
    done = torch.tensor([[0, 1, 0, 0, 2, 0], [0, 0, 0, 0, 0, 0]])
    assert evaluate.episode_means(Context(reward, done), 0, 6)[0] == (3 + 12) / 2
    assert evaluate.episode_means(Context(reward, done), 2, 6)[0] == 12
    assert evaluate.episode_means(Context(reward, done), 0, 4)[0] == 3
    assert math.isnan(evaluate.episode_means(Context(reward, done), 0, 6)[1])


def test_normalized_is_linear_between_the_references():
    one = torch.ones(1, dtype=torch.float64)
    reference = Reference(one, 3 * one, one, 3 * one)
    context = Context(torch.full((1, 10), 2.0), torch.zeros(1, 10))
    assert evaluate.normalized(context, reference, 0, 10)[0] == 0.5
    with pytest.raises(ValueError, match="measure"):
        evaluate.normalized(context, reference, 0, 10, "regret")


def test_random_scores_zero_and_oracle_one(tasks):
    reference = evaluate.references(tasks)
    for name, measure, wanted in (
        ("random", "reward", 0.0),
        ("oracle", "reward", 1.0),
        ("random", "episode", 0.0),
        ("oracle, episode", "episode", 1.0),
    ):
        run = evaluate.run_baseline(tasks, name, 20_000, seed=9)
        score = evaluate.normalized(run, reference, 0, 20_000, measure)
        assert abs(float(score.median()) - wanted) < 0.1, (name, measure)


def test_no_policy_earns_more_per_step_than_its_oracle(tasks):
    reference = evaluate.references(tasks)
    assert (reference.oracle_reward > reference.random_reward).all()
    for name in ("oracle, episode", "tabular model-based"):
        run = evaluate.run_baseline(tasks, name, 20_000, seed=4)
        assert (evaluate.normalized(run, reference, 0, 20_000) < 1.05).all(), name


def test_interquartile_mean_ignores_the_tails():
    x = torch.tensor([-1000.0, 0.0, 1.0, 2.0, 3.0, 1000.0, float("nan"), 1.0, 2.0], dtype=torch.float64)
    mean, half = evaluate.interquartile_mean_ci(x)
    assert mean == 1.5
    assert half > 0


def test_learners_learn():
    tasks = sample_anymdp(
        32, 16, seed=5
    )  # Q-learning's mean is .5, its spread over tasks .35: the bound is 3 errors off
    reference = evaluate.references(tasks)
    scores = {
        name: evaluate.mean_ci(
            evaluate.normalized(evaluate.run_baseline(tasks, name, 4000, seed=3), reference, 3000, 4000)
        )[0]
        for name in ("Q-learning (UCB)", "tabular model-based")
    }
    assert scores["tabular model-based"] > 0.7  # a baseline must be a strong one
    assert scores["Q-learning (UCB)"] > 0.3


def test_curve_covers_the_context(tasks):
    run = evaluate.run_baseline(tasks, "random", 250, seed=3)
    c = evaluate.curve(run, evaluate.references(tasks, steps=2000))
    assert c.steps == [50, 150, 225]
    assert len(c.mean) == len(c.ci95) == 3


def test_padding_changes_no_reference(tasks):
    mine, padded = evaluate.best_reward_q(tasks), evaluate.best_reward_q(tasks.pad(20, 7))
    assert torch.allclose(mine, padded[:, :16, :5], rtol=1e-9, atol=1e-9)
    assert (evaluate.greedy(padded, tasks.num_actions)[:, :16, :5] == evaluate.greedy(mine, tasks.num_actions)).all()
