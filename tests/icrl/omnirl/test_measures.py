"""The suite's measures on hand-made contexts and curves."""

import math

import pytest
import torch

from icrl.omnirl import measures
from icrl.omnirl.evaluate import Context, Reference, episode_means
from icrl.omnirl.measures import Windows, ahead, episodes_of, normalised, summary, unlearning, windows


def context(rewards, dones):
    return Context(torch.tensor(rewards), torch.tensor(dones, dtype=torch.uint8))


def reference(n, low=0.0, high=1.0):
    zeros = torch.zeros(n, dtype=torch.float64)
    return Reference(zeros + low, zeros + high, zeros + low, zeros + high)


def curve(*means, width=100):
    """Two tasks, one a tenth above the mean and one a tenth under it, with one episode a window."""
    returns = torch.tensor([[m + d for m in means] for d in (0.1, -0.1)], dtype=torch.float64)
    return Windows(width, returns, torch.ones_like(returns), returns / width)


def test_episodes_by_hand():
    made = context([[1.0, 2.0, 3.0, 4.0, 5.0], [1.0] * 5, [7.0] * 5], [[0, 1, 0, 2, 0], [0] * 5, [0, 0, 0, 0, 1]])
    record, step, returns = episodes_of(made)
    assert record.tolist() == [0, 0, 2]
    assert step.tolist() == [1, 3, 4]
    assert returns.tolist() == [3, 7, 35]


def test_windows_by_hand():
    made = context([[1.0, 2.0, 3.0, 4.0, 5.0]], [[0, 1, 1, 2, 0]])
    found = windows(made, 2)
    assert found.returns.tolist() == [[3, 7]]  # the second has the episodes of returns 3 and 4
    assert found.episodes.tolist() == [[1, 2]]
    assert found.reward.tolist() == [[1.5, 3.5]]
    whole = found.coarser(2)
    assert (whole.width, whole.returns.tolist(), whole.episodes.tolist(), whole.reward.tolist()) == (
        4,
        [[10]],
        [[3]],
        [[2.5]],
    )
    with pytest.raises(ValueError, match="width: wanted a multiple of 1 of at most 5 steps, got 6"):
        windows(made, 6)


def test_windows_agree_with_episode_means():
    generator = torch.Generator().manual_seed(0)
    made = Context(
        torch.randn(7, 300, generator=generator), (torch.rand(7, 300, generator=generator) < 0.05).to(torch.uint8)
    )
    found = windows(made, 60)
    for i in range(5):
        wanted = episode_means(made, 60 * i, 60 * i + 60)
        assert torch.allclose(found.returns[:, i] / found.episodes[:, i], wanted, equal_nan=True)


def test_a_teams_agents_and_a_learners_environments_are_one_task():
    made = context([[1.0, 2.0], [3.0, 4.0]], [[0, 1], [0, 1]])
    team = windows(made, 2, group=2)
    assert (team.returns.tolist(), team.episodes.tolist(), team.reward.tolist()) == ([[5]], [[1]], [[2.5]])
    side_by_side = windows(made, 4, group=2, stride=2)  # a column is two steps of the learner
    assert (side_by_side.returns.tolist(), side_by_side.episodes.tolist()) == ([[10]], [[2]])
    with pytest.raises(ValueError, match="width: wanted a multiple of 2"):
        windows(made, 3, group=2, stride=2)


def test_scores_are_between_random_and_the_oracle():
    found = Windows(10, torch.tensor([[4.0, 0.0]]), torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 3.0]]))
    scale = reference(1, 1.0, 3.0)
    assert normalised(found, scale)[0, 0] == 0.5
    assert math.isnan(normalised(found, scale)[0, 1])  # no episode ends there
    assert normalised(found, scale, "reward").tolist() == [[0, 1]]
    with pytest.raises(ValueError, match="measure"):
        normalised(found, scale, "regret")


def test_a_running_mean_looks_ahead():
    nan = math.nan
    given = torch.tensor([[0.0, 3.0, 6.0, nan, nan]], dtype=torch.float64)
    assert ahead(given)[0].tolist()[:3] == [3, 4.5, 6]
    assert math.isnan(ahead(given)[0, 3])


def test_performance_and_the_steps_to_it():
    found = curve(0.0, 0.3, 0.9, 0.9, 0.9, 0.89)
    out = summary(found, reference(2), (0.5, 0.8, 0.95))
    assert out["performance"] == pytest.approx(0.9)
    assert out["performance_ci95"] == pytest.approx(1.96 * 0.1)  # of two tasks, a tenth to each side
    assert out["steps"] == 300
    assert out["episodes"] == 3
    assert out["steps_to"] == {"0.5": 200, "0.8": 300, "0.95": None}
    assert out["mean"] == pytest.approx([0.0, 0.3, 0.9, 0.9, 0.9, 0.89])
    assert out["last"] == pytest.approx(0.89)


def test_one_good_window_is_no_performance():
    out = summary(curve(0.0, 0.9, 0.0, 0.0, 0.6, 0.6, 0.6), reference(2))
    assert out["performance"] == pytest.approx(0.6)
    assert out["steps"] == 500


def test_a_curve_of_no_episodes_has_no_performance():
    none = torch.zeros(2, 4, dtype=torch.float64)
    out = summary(Windows(10, none, none, none), reference(2))
    assert math.isnan(out["performance"])
    assert out["steps"] is None
    assert out["episodes"] is None


def test_the_largest_fall():
    spread = 1.96 * 0.1
    out = unlearning(curve(0.2, 0.9, 0.8, 0.5, 0.95, 0.9), reference(2))
    assert out["fall"] == pytest.approx(0.4)
    assert (out["best_steps"], out["steps"]) == (200, 400)
    assert (out["best"], out["mean"]) == (pytest.approx(0.9), pytest.approx(0.5))
    assert out["unlearned"] == (0.5 + spread < 0.9 - measures.FALL)
    assert out["unlearned"]
    assert not unlearning(curve(0.2, 0.9, 0.7), reference(2))["unlearned"]  # within the interval
    assert unlearning(curve(0.1, 0.2, 0.3), reference(2))["fall"] == 0
