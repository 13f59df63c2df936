"""What the pictures of tasks show: the likeliest way, and visits of a random policy by value."""

import itertools
import json

import numpy as np
import pytest
import torch

from icrl.cli import main
from icrl.worlds import TabularTasks, sample_anymdp, sample_garnet
from icrl.worlds.difficulty import _at, difficulty
from icrl.worlds.draw import draw_task, likeliest_path, optimal_way


def test_the_likeliest_path_by_trying_all():
    rng = np.random.default_rng(0)
    for _ in range(30):
        p = rng.random((5, 5)) * (rng.random((5, 5)) < 0.5)
        p /= np.maximum(p.sum(1, keepdims=True), 1e-9)

        def chance(path, p=p):
            return np.prod([p[a, b] for a, b in itertools.pairwise(path)])

        every = [(0, *mid, 4) for n in range(4) for mid in itertools.permutations((1, 2, 3), n)]
        best = max(every, key=chance)
        found = likeliest_path(p, 0, 4)
        if chance(best) == 0:
            assert found == [0]
        else:
            assert chance(found) == pytest.approx(chance(best), rel=1e-12)
            assert (found[0], found[-1]) == (0, 4)


def test_the_way_leads_to_where_most_is_earned():
    p = np.zeros((4, 4))
    p[0, 1], p[0, 2], p[1, 3], p[2, 2] = 0.9, 0.1, 1.0, 1.0
    terminal, start = np.array([False, False, False, True]), np.array([1.0, 0, 0, 0])
    r = np.zeros((4, 4))
    r[1, 3] = 5.0
    assert optimal_way(p, r, start, np.array([0, 0, 0, 1], bool)) in ([0, 1, 3], [0, 2])
    p[2] = 0, 0, 0, 1  # without the trap, an episode always ends in 3
    assert optimal_way(p, r, start, terminal) == [0, 1, 3]
    assert len(optimal_way(p, 0 * r, start, terminal)) == 1  # nothing is earned: the start is visited most


def test_visits_are_those_of_an_episode_of_geometric_length():
    tasks = TabularTasks.concatenate([sample_anymdp(3, (8, 10), 4, seed=1), sample_garnet(3, 9, 4, seed=1)])
    found = difficulty(tasks)
    p = tasks.dense_tables()[0].double().mean(2)
    here, visits = tasks.start.double(), torch.zeros(6, tasks.shape[1], dtype=torch.float64)
    for _ in range(30 * int(tasks.max_steps.max())):
        visits += here
        here = (1 - 1 / tasks.max_steps[:, None].double()) * (here[:, None] @ p)[:, 0]
    visits *= tasks.num_states[:, None] / visits.sum(1, keepdim=True)
    valued = ~found.visits.isnan()
    assert torch.equal(valued, tasks.state_mask() & ~tasks.terminal & (visits > 0))
    torch.testing.assert_close(found.visits[valued], visits[valued], rtol=1e-10, atol=0)  # e^-30 of it is left out
    v = tasks.solve(0.994).v
    for i in range(6):
        own = valued[i]
        order = v[i, own].argsort()
        assert found.rank[i, own][order].tolist() == pytest.approx(np.linspace(0, 1, int(own.sum())))
        assert [float(x) for x in found.value[i, own].aminmax()] == [0, 1]


def test_curves_pass_through_the_states():
    found = difficulty(sample_anymdp(4, (8, 12), 5, seed=4))
    for i in range(4):
        known = ~found.rank[i].isnan()
        x, y = found.rank[i, known], found.visits[i, known].log10()
        order = x.argsort()
        wanted = np.interp([0, 0.3, 0.5, 1], x[order], y[order])
        got = _at(found, torch.tensor([0, 0.3, 0.5, 1], dtype=torch.float64))[i]
        np.testing.assert_allclose(got, wanted, rtol=1e-12)


def test_slopes_by_least_squares():
    tasks = sample_anymdp(5, 12, 5, seed=2)
    found = difficulty(tasks)
    for x in ("rank", "value"):
        for i, slope in enumerate(found.slopes(x).tolist()):
            known = ~found.rank[i].isnan()
            fit = np.polyfit(getattr(found, x)[i, known], found.visits[i, known].log10(), 1)
            assert slope == pytest.approx(fit[0], rel=1e-9)


def test_good_states_are_far_in_anymdp_alone():
    """The papers' claim, and what the picture shows."""
    anymdp, garnet = (difficulty(t).slopes() for t in (sample_anymdp(40, 32, 5, seed=0), sample_garnet(40, 32, seed=0)))
    assert float(anymdp.median()) < -2
    assert float((anymdp < 0).double().mean()) > 0.9
    assert abs(float(garnet.median())) < 0.1


def test_packed_tasks_are_the_same():
    tasks = sample_anymdp(4, (8, 16), 5, seed=3)
    for a, b in zip(difficulty(tasks), difficulty(tasks.pack()), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("size", [8, 64, 128])
def test_a_picture_of_any_size(size):
    figure = draw_task(sample_anymdp(1, size, 5, seed=1), current=2)
    legend = figure.axes[0].get_legend()
    assert legend is not None
    assert "likeliest way to state" in legend.get_texts()[-1].get_text()


def test_command(tmp_path, capsys):
    args = ["worlds", "difficulty", str(tmp_path / "d.png"), "--num-tasks", "8", "--num-states", "8", "16"]
    assert main([*args, "--json", str(tmp_path / "d.json")]) == 0
    assert (tmp_path / "d.png").stat().st_size > 5000
    rows = json.loads((tmp_path / "d.json").read_text())["rows"]
    assert [(r["kind"], r["num_states"]) for r in rows] == [
        ("anymdp", 8),
        ("garnet", 8),
        ("anymdp", 16),
        ("garnet", 16),
    ]
    assert all(len(r["log10_visits"]) == 17 for r in rows)
    assert main([*args, "--num-tasks", "1"]) == 2
    assert "num_tasks: wanted at least 2" in capsys.readouterr().err
