"""Offline data: trajectories and their refusals, DarkRoom as environment and as tables, the stitching study's promise."""

from dataclasses import replace

import gymnasium.utils.env_checker
import numpy as np
import pytest
import torch

from icrl.offline.environments.darkroom import MOVES, DarkRoom, DarkRoomData, darkroom_tasks
from icrl.offline.environments.point_robot import PointRobot, PointRobotData
from icrl.offline.environments.stitching import StitchingData
from icrl.offline.trajectories import Trajectories
from icrl.offline.trajectory_shards import read_trajectories, write_trajectories


def small(**changes):
    """Two tasks with episodes of 3, 2 and 4 steps."""
    n = 9
    fields = {
        "environment": "toy",
        "num_actions": 2,
        "states": torch.arange(n).float()[:, None],
        "actions": torch.arange(n) % 2,
        "rewards": torch.arange(n).float(),
        "next_states": torch.arange(1, n + 1).float()[:, None],
        "terminated": torch.zeros(n, dtype=torch.bool),
        "ends": torch.tensor([3, 5, 9]),
        "tasks": torch.tensor([0, 0, 1]),
    }
    return Trajectories(**{**fields, **changes})


def test_index_windows_and_returns():
    data = small()
    assert data.num_tasks == 2
    assert data.lengths.tolist() == [3, 2, 4]
    assert data.steps.tolist() == [[0, 5], [5, 9]]
    index, seen = data.windows(torch.tensor([2, 3, 8]), 3)
    assert seen.tolist() == [[True, True, True], [False, False, True], [True, True, True]]
    assert index[seen].tolist() == [0, 1, 2, 3, 6, 7, 8]
    expected = [0 + 0.5 * (1 + 0.5 * 2), 1 + 0.5 * 2, 2, 3 + 0.5 * 4, 4, 5 + 0.5 * (6 + 0.5 * (7 + 0.5 * 8))]
    assert data.returns_to_go(0.5)[:6].tolist() == pytest.approx(expected)


def test_samples_stay_in_their_task():
    data = small()
    torch.manual_seed(0)
    tasks = data.draw_tasks(2000)
    steps = data.draw_steps(tasks, 3)
    assert ((steps < 5) == (tasks == 0)[:, None]).all()
    assert sorted(set(steps.flatten().tolist())) == list(range(9))
    episodes = data.draw_episodes(tasks)
    assert torch.equal(data.tasks[episodes], tasks)
    assert set(episodes.tolist()) == {0, 1, 2}
    with pytest.raises(ValueError, match="wanted 2 in a row"):
        data.draw_episodes(tasks, 2)


def test_runs_of_episodes_stay_in_one_history(tmp_path):
    ends = torch.arange(1, 13)
    n = torch.arange(12.0)
    data = Trajectories(
        "toy", 2, n[:, None], torch.zeros(12, dtype=torch.int64), n, n[:, None], torch.zeros(12, dtype=torch.bool),
        ends, torch.tensor([0] * 3 + [1] * 9), history=3,
    )  # fmt: skip
    torch.manual_seed(0)
    tasks = data.draw_tasks(2000)
    first = data.draw_episodes(tasks, 2)
    assert torch.equal(data.tasks[first], tasks)
    assert set(first.tolist()) == {0, 1, 3, 4, 6, 7, 9, 10}
    assert set(data.draw_episodes(tasks).tolist()) == set(range(12))
    write_trajectories(tmp_path, data, {}, seed=0)
    assert read_trajectories(tmp_path).history == 3
    with pytest.raises(ValueError, match="wanted 4 in a row, a history has 3"):
        data.draw_episodes(tasks, 4)
    with pytest.raises(ValueError, match="history: wanted a divisor of every task's number of episodes, got 2"):
        replace(data, history=2)
    with pytest.raises(ValueError, match="history"):
        replace(data, history=-1)
    with pytest.raises(ValueError, match="history: tasks of one data set must share it"):
        Trajectories.concatenate([data, replace(data, history=1)])
    assert DarkRoomData(size=3, horizon=6, train_goals=5, episodes=4, history=2).train_data().history == 2
    assert PointRobotData(horizon=5, tasks=10, episodes=4, history=2).train_data().history == 2


def test_balanced_samples_take_each_state_of_a_task_alike():
    states = torch.tensor([0, 0, 0, 1, 0, 2, 2, 2, 0]).float()[:, None]  # the tasks' steps: 0-4 and 5-8
    data = small(states=states)
    torch.manual_seed(0)
    tasks = torch.tensor([0, 1]).repeat(6000)
    steps = data.draw_steps(tasks, 2, balanced=1.0)
    assert ((steps < 5) == (tasks == 0)[:, None]).all()
    share = torch.bincount(steps.flatten(), minlength=9) / 12000
    expected = torch.tensor([1 / 8, 1 / 8, 1 / 8, 1 / 2, 1 / 8, 1 / 6, 1 / 6, 1 / 6, 1 / 2])
    assert (share - expected).abs().max() < 0.02  # four standard errors of 12000 draws


def test_shards_give_back_what_was_written(tmp_path):
    data = Trajectories.concatenate([small(), small(rewards=-torch.arange(9.0)), small()])
    written = write_trajectories(tmp_path, data, {"made": "by hand"}, seed=0, rows_per_shard=4)
    assert (written.made, written.left) == (2, 0)
    again = read_trajectories(tmp_path)
    for name in ("states", "actions", "rewards", "next_states", "terminated", "ends", "tasks"):
        assert torch.equal(getattr(again, name), getattr(data, name)), name
    assert (again.environment, again.num_actions, again.optimal) == ("toy", 2, None)
    assert write_trajectories(tmp_path, data, {"made": "by hand"}, seed=0, rows_per_shard=4).found == 2
    with pytest.raises(ValueError, match="holds another data set"):
        write_trajectories(tmp_path, data, {"made": "otherwise"}, seed=0, rows_per_shard=4)
    (tmp_path / "shard-00001.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match="shard-00001"):
        read_trajectories(tmp_path)
    room = DarkRoomData(size=3, horizon=6, train_goals=5, episodes=4, history=2).train_data()
    write_trajectories(tmp_path / "room", room, {}, seed=0)
    assert torch.equal(read_trajectories(tmp_path / "room").optimal, room.optimal)


def test_joining():
    data = small()
    both = Trajectories.concatenate([data, small()])
    assert both.num_tasks == 4
    assert both.steps.tolist() == [[0, 5], [5, 9], [9, 14], [14, 18]]
    swapped = data.reorder(torch.tensor([2, 0]), torch.tensor([0, 1]))
    assert swapped.rewards.tolist() == [5, 6, 7, 8, 0, 1, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewards": torch.full((9,), float("nan"))}, "rewards: wanted finite"),
        ({"states": torch.zeros(9, 1, dtype=torch.float64)}, "states: wanted"),
        ({"actions": torch.full((9,), 2)}, "actions: wanted 0 to 1"),
        ({"actions": torch.zeros(9, 2)}, "actions: wanted"),
        ({"ends": torch.tensor([3, 3, 9])}, "an empty episode 1"),
        ({"ends": torch.tensor([3, 5, 8])}, "ends"),
        ({"ends": torch.tensor([], dtype=torch.int64), "tasks": torch.tensor([], dtype=torch.int64)}, "ends"),
        ({"tasks": torch.tensor([0, 1, 0])}, "tasks"),
        ({"tasks": torch.tensor([0, 2, 2])}, "tasks"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)


def test_refuses_spaces_that_differ_and_episodes_that_are_short():
    other = small(states=torch.zeros(9, 2), next_states=torch.zeros(9, 2))
    with pytest.raises(ValueError, match="state_size: tasks of one data set must share it"):
        Trajectories.concatenate([small(), other])
    with pytest.raises(ValueError, match="num_actions"):
        Trajectories.concatenate([small(), small(num_actions=3)])
    with pytest.raises(ValueError, match="horizon: wanted at most the shortest episode's 2 steps, got 3"):
        small().check_length("horizon", 3)


def test_darkroom_is_a_gymnasium_environment_and_its_table_the_same():
    gymnasium.utils.env_checker.check_env(DarkRoom(), skip_render_check=True)
    gymnasium.utils.env_checker.check_env(DarkRoom(start="corner"), skip_render_check=True)
    env = DarkRoom(goal=(2, 1), size=4, horizon=200)
    table = darkroom_tasks(torch.tensor([[2, 1]]), 4, 200).validate()
    assert len({tuple(env.reset(seed=i)[0]) for i in range(200)}) == 16
    assert (table.start == 1 / 16).all()
    rng = np.random.default_rng(0)
    at, _ = env.reset()
    for t in range(200):
        s, a = int(at[0] * 4 + at[1]), rng.integers(len(MOVES))
        at, reward, terminated, truncated, _ = env.step(a)
        s2 = int(at[0] * 4 + at[1])
        assert table.transition[0, s, a, s2] == 1
        assert table.reward[0, s, a, s2] == reward == float(tuple(at) == (2, 1))
        assert not terminated
        assert truncated == (t == 199)
    with pytest.raises(ValueError, match="action"):
        env.step(7)


def test_darkroom_data():
    source = DarkRoomData(size=5, horizon=20, train_goals=20, episodes=20, history=10)
    train, test = source.goals()
    assert len({tuple(g) for g in [*train.tolist(), *test.tolist()]}) == 25
    data = source.train_data()
    steps = data.next_states - data.states
    assert data.num_tasks == 20
    assert steps.abs().sum(1).max() == 1
    assert torch.equal(data.rewards, (data.next_states == train.repeat_interleave(400, 0)).all(1).float())
    returns = data.rewards.view(20, 2, 10, 20).sum(-1).mean((0, 1))
    best = source.best_returns("train").mean()
    assert returns[0] < 0.35 * best  # nearly uniform actions at first, nearly optimal ones at last
    assert returns[-1] > 0.9 * best
    assert data.optimal is not None
    far = DarkRoomData(split="far").goals()
    assert far[0].sum(1).max() <= far[1].sum(1).min()


@pytest.mark.parametrize("start", ["corner", "random"])
def test_the_optimal_policy_earns_the_best_return(start):
    source = DarkRoomData(size=3, horizon=20, train_goals=8, episodes=10, history=10, start=start)
    best = darkroom_tasks(source.goals()[0], 3, 20).solve(0.99).q.argmax(-1)
    envs = source.environments("train")
    total = {}
    for seed in range(0, 2000, 8):  # enough for each task to start anywhere
        at, _ = envs.reset(seed=seed)
        first, returns = at.copy(), np.zeros(8)
        for _ in range(20):
            index = torch.as_tensor(at[:, 0] * 3 + at[:, 1]).long()
            at, reward, *_ = envs.step(best[torch.arange(8), index].numpy())
            returns += reward
        for i in range(8):
            total[i, *first[i]] = returns[i]
    assert len(total) == 8 * (9 if start == "random" else 1)
    means = [np.mean([v for k, v in total.items() if k[0] == i]) for i in range(8)]
    assert means == pytest.approx(source.best_returns("train").tolist())


def test_no_stitching_trajectory_leads_from_the_start_to_a_goal():
    source = StitchingData(size=6, horizon=24, train_goals=9, episodes=8)
    data = source.train_data()
    assert (source.goals()[0][:, 0] >= 3).all()
    first = data.states[data.begins]
    leave = (first == 0).all(1)
    assert (leave.view(9, 8).sum(1) == 4).all()
    assert not torch.equal(leave.view(9, 8)[0], leave.view(9, 8)[1])  # in any order
    reward = torch.stack([data.rewards[b:e].sum() for b, e in zip(data.begins, data.ends, strict=True)])
    assert reward[leave].max() == 0
    assert data.next_states[leave.repeat_interleave(24)][:, 0].max() == 2
    assert (first[~leave][:, 0] == 2).all()
    assert (reward[~leave] > 0).float().mean() > 0.5
    prompts = source.prompts()
    assert len(prompts.ends) == prompts.num_tasks == 9
    at_goal = (prompts.next_states.view(9, 24, 2) == source.goals()[1][:, None]).all(-1)
    assert torch.equal(prompts.rewards.view(9, 24), at_goal.float())  # of the test's goals, in their order
    assert (prompts.states[prompts.begins][:, 0] == 2).all()


@pytest.mark.parametrize(
    ("kind", "changes", "name"),
    [
        (DarkRoomData, {"quality": "best"}, "quality"),
        (DarkRoomData, {"train_goals": 100}, "train_goals"),
        (DarkRoomData, {"episodes": 30}, "episodes"),
        (DarkRoomData, {"split": "near"}, "split"),
        (StitchingData, {"size": 5}, "size"),
        (StitchingData, {"noise": 1.0}, "noise"),
    ],
)
def test_configurations_refuse(kind, changes, name):
    with pytest.raises(ValueError, match=name):
        replace(kind(), **changes)


@pytest.mark.parametrize("split", ["random", "far"])
def test_point_robot_data_is_what_its_environment_does(split):
    gymnasium.utils.env_checker.check_env(PointRobot(), skip_render_check=True)
    source = PointRobotData(horizon=15, tasks=20, episodes=4, history=4, split=split)
    train, test = source.angles()
    assert len(train) == 18
    if split == "far":
        assert test.min() > train.max()
    data = source.train_data()
    assert data.num_tasks == 18
    for task in (0, 7):
        env = PointRobot(float(train[task]), 15)
        for e in range(4 * task, 4 * task + 4):
            at, _ = env.reset()
            for t in range(15 * e, 15 * e + 15):
                assert at == pytest.approx(data.states[t].numpy(), abs=1e-6)
                at, reward, terminated, truncated, _ = env.step(data.actions[t].numpy())
                assert reward == pytest.approx(float(data.rewards[t]), abs=1e-6)  # float32 of numbers near 1
                assert not terminated
            assert truncated
    returns = data.rewards.view(18, 4, 15).sum(-1)
    assert (returns.mean(0).diff() > 0).all()  # a history improves
    assert returns[:, -1].tolist() == pytest.approx(source.best_returns("train").tolist(), abs=1e-4)
