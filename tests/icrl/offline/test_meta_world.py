"""Reach and Push: the goal hidden, grades of data, splits, determinism, collection that survives a kill, few-shot runs."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from icrl.cli import main
from icrl.offline import suite
from icrl.offline.environments.meta_world import GOALS, OBJECT, STARTS, MetaWorld, PushData, ReachData, scripted_return
from icrl.offline.experiment import Experiment, OfflineRun
from icrl.offline.few_shot import few_shot
from icrl.offline.learner import make_method
from icrl.offline.method import Spaces
from icrl.offline.trajectories import Trajectories
from icrl.offline.trajectory_shards import read_trajectories

KINDS = pytest.mark.parametrize("kind", [ReachData, PushData], ids=lambda k: k.name)


def returns(data: Trajectories) -> torch.Tensor:
    return torch.stack([r.sum() for r in data.rewards.split(data.lengths.tolist())])


def episode(env: MetaWorld, actions: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, list[float]]:
    """States, actions and rewards of these actions, or of the scripted policy's."""
    states, taken, rewards = [env.reset()[0]], [], []
    for t in range(env.horizon):
        taken.append(env.scripted_action() if actions is None else actions[t])
        state, reward, terminated, truncated, _ = env.step(taken[-1])
        states.append(state)
        rewards.append(reward)
        assert not terminated
        assert truncated == (t + 1 == env.horizon)
    return np.stack(states), np.stack(taken), rewards


@pytest.mark.parametrize("name", GOALS)
def test_rewards_alone_tell_the_goal(name):
    one, other = (MetaWorld(name, goal, 80) for goal in ((-0.1, 0.8, 0.1), (0.1, 0.9, 0.1)))
    states, actions, rewards = episode(one, None)
    assert states.shape == (81, *one.observation_space.shape)
    there, _, others = episode(other, actions)
    np.testing.assert_array_equal(states, there)
    assert sum(rewards) > 1.5 * sum(others)
    assert one.scripted_action().tolist() != other.scripted_action().tolist()  # it sees the goal


@KINDS
def test_what_is_left_out_tells_nothing(kind):
    """Of Meta-World's numbers that learners are not shown, none moves under the scripted policy with noise."""
    env = MetaWorld(kind.name, kind().goals()[0][0].tolist())
    random = np.random.default_rng(1)
    env.reset()
    seen = []
    for _ in range(100):
        env.step(env.scripted_action() if random.random() < 0.7 else random.uniform(-1, 1, 4))
        seen.append(env._seen)
    spread = np.ptp(np.stack(seen), 0)
    hidden = np.setdiff1d(np.arange(39), env._shown)
    if kind is ReachData:  # the object trembles in contact with the table, by far less than a millimetre
        assert spread[[4, 5, 6]].max() < 5e-4
        hidden = np.setdiff1d(hidden, [*range(4, 11), *range(22, 29)])
    assert spread[hidden].max() == 0
    assert np.stack(seen)[:, -3:].max() == 0
    assert spread[env._shown].min() > 1e-3


def test_goals_are_drawn_where_meta_world_draws_them():
    metaworld = pytest.importorskip("metaworld")
    for name, (low, high) in GOALS.items():
        simulator = metaworld.ALL_V3_ENVIRONMENTS[f"{name}-v3"]()
        np.testing.assert_array_equal(simulator.goal_space.low, low)
        np.testing.assert_array_equal(simulator.goal_space.high, high)
        np.testing.assert_array_equal(simulator.init_config["obj_init_pos"], OBJECT)
        if name == "reach":
            np.testing.assert_array_equal(simulator.init_config["hand_init_pos"], STARTS[name])


@KINDS
def test_splits(kind):
    train, test = kind().goals()
    assert (len(train), len(test)) == (45, 5)
    assert len({tuple(g) for g in torch.cat([train, test]).tolist()}) == 50
    assert torch.equal(kind().goals()[0], train)
    assert not torch.equal(kind(seed=1).goals()[0], train)
    start = torch.tensor(STARTS[kind.name], dtype=torch.float64)
    near, far = ((g - start).norm(dim=1) for g in kind(split="far").goals())
    assert far.min() > near.max()
    assert {tuple(g) for g in torch.cat(kind(split="far").goals()).tolist()} == {
        tuple(g) for g in torch.cat([train, test]).tolist()
    }


@KINDS
def test_grades_are_ordered_in_return(kind):
    base = kind(tasks=10, episodes=3, history=3)
    mean = {}
    for quality in ("mixed", "medium", "expert"):
        data = replace(base, quality=quality).task_by_task().tasks_slice(0, 2)
        assert data.states.shape == (2 * 3 * 100, len(data.states[0]))
        assert not data.terminated.any()
        assert torch.equal(data.next_states[:99], data.states[1:100])
        mean[quality] = returns(data).view(2, 3).mean(0)
    assert mean["medium"].mean() < mean["expert"].mean()
    assert mean["mixed"][0] < mean["mixed"][-1]
    best = sum(scripted_return(kind.name, tuple(g), 100) for g in base.goals()[0][:2].tolist()) / 2
    assert mean["expert"].mean() > 0.5 * best
    assert mean["medium"].mean() < 0.9 * best  # as a learner must be able to do better than such data


@KINDS
def test_a_task_is_the_same_in_any_company(kind):
    source = kind(horizon=20, tasks=10, episodes=2, history=2).task_by_task()
    both, alone = source.tasks_slice(3, 2), source.tasks_slice(4, 1)
    second = both.tasks_slice(1, 1)
    for name in ("states", "actions", "rewards", "next_states"):
        assert torch.equal(getattr(second, name), getattr(alone, name)), name
    assert not torch.equal(both.tasks_slice(0, 1).actions, alone.actions)
    assert alone.num_tasks == 1
    assert not torch.equal(
        replace(kind(horizon=20, tasks=10, episodes=2, history=2), seed=1).task_by_task().tasks_slice(4, 1).actions,
        alone.actions,
    )


def test_the_environment_of_a_test_repeats_itself():
    """Its second episode is its first again, through Gymnasium's own resets."""
    env = ReachData(horizon=10, tasks=10).environments()
    actions = np.random.default_rng(0).uniform(-1, 1, (10, 1, 4)).astype(np.float32)
    runs = []
    for _ in range(2):
        env.reset(seed=3)
        runs.append([env.step(a)[1].item() for a in actions])
    assert runs[0] == runs[1]
    assert len(set(runs[0])) > 5


SMALL = {"horizon": 50, "tasks": 10, "episodes": 4, "history": 4}


def test_a_killed_collection_goes_on_to_the_same_bytes(tmp_path, capsys):
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"data": SMALL}))
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    args = ["--environment", "reach", "--config", str(config)]
    process = subprocess.Popen([sys.executable, "-m", "icrl.cli", "collect", str(killed), *args])
    deadline = time.monotonic() + 60
    while len(list(killed.glob("shard-*.safetensors"))) < 2:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {p.name: p.stat().st_mtime_ns for p in killed.glob("shard-*.safetensors")}
    assert 2 <= len(before) < 9
    numbers = tmp_path / "n.json"
    assert main(["collect", str(killed), *args, "--json", str(numbers)]) == 0
    assert json.loads(numbers.read_text())["made"] <= 9 - len(before)
    assert {n: (killed / n).stat().st_mtime_ns for n in before} == before
    assert main(["collect", str(whole), *args]) == 0
    assert "9 shards" in capsys.readouterr().out
    files = sorted(p.name for p in whole.iterdir() if p.suffix in (".safetensors", ".json"))
    assert len(files) == 10
    for name in files:
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
    data = read_trajectories(killed)
    assert data.history == 4
    assert torch.equal(data.tasks_slice(4, 1).states, ReachData(**SMALL).task_by_task().tasks_slice(4, 1).states)


def test_methods_train_and_act(tmp_path, capsys):
    config = {
        "data": {"horizon": 12, "tasks": 10, "episodes": 8, "history": 8},
        "settings": {"batch": 4, "trunk": {"width": 16, "layers": 1, "heads": 1}},
        "world_loop": {"updates": 3, "checkpoint_every": 3, "evaluate_every": 3},
        "loop": {"updates": 3, "checkpoint_every": 3, "evaluate_every": 3},
        "judged_episodes": 2,
    }
    path, data = tmp_path / "tiny.json", tmp_path / "data"
    path.write_text(json.dumps(config))
    assert main(["collect", str(data), "--environment", "reach", "--config", str(path)]) == 0
    path.write_text(json.dumps({**config, "records": str(data)}))
    train = ["train", "offline", "--method", "sicql", "--environment", "reach", "--out", str(tmp_path / "run")]
    assert main([*train, "--config", str(path), "--evaluate", "2"]) == 0
    numbers = json.loads((tmp_path / "run" / "few_shot.json").read_text())
    assert numbers["best"] == pytest.approx(float(ReachData(**config["data"]).best_returns().mean()))
    assert f"the scripted policy earns {numbers['best']:.2f}" in capsys.readouterr().out
    args = ["eval", "sicql", "--environment", "reach", "--methods", "sicql", "dpt", "--seeds", "1", "--jobs", "1"]
    args += ["--episodes", "2", "--config", str(path), "--out", str(tmp_path / "suite")]
    (tmp_path / "suite").mkdir()
    (tmp_path / "run").rename(
        tmp_path / "suite" / "sicql-0"
    )  # a suite does not make again what is there: one process less
    (tmp_path / "run-world_model").rename(tmp_path / "suite" / "world_model-0")
    capsys.readouterr()
    assert main(args) == 0
    table = capsys.readouterr().out
    assert f"the scripted policy earns {numbers['best']:.2f}" in table
    assert "of scripted" in table
    assert "goal" not in table  # every step there pays something
    assert "806.97" not in table  # shorter episodes than the published ones


@pytest.mark.parametrize("name", ["ad", "idt", "dicp", "dit", "ic_iql"])
def test_rivals_act_in_reach(name, reach_data):
    """Every rival that the command above leaves out: a loss that can be followed, and two episodes."""
    run = OfflineRun(
        method=name,
        environment="reach",
        data={"horizon": 10, "tasks": 10},
        settings={"batch": 4, "trunk": {"width": 16, "layers": 1, "heads": 1}},
    )
    experiment = Experiment(run)
    torch.manual_seed(0)
    method = make_method(name, experiment.config, Spaces.of(reach_data))
    method.prepare(reach_data)
    loss, _ = method.loss(reach_data)
    loss.backward()
    assert loss.isfinite()
    got = few_shot(method, experiment.environments, 2)
    assert got.shape == (1, 2)
    assert bool((got > 0).all())


@pytest.fixture(scope="module")
def reach_data():
    return ReachData(horizon=10, tasks=10, episodes=8, history=8).task_by_task().tasks_slice(0, 3)


@pytest.mark.parametrize("environment", ["reach", "push"])
@pytest.mark.parametrize("name", suite.titles())
def test_presets_are_configurations(name, environment):
    experiment = Experiment(OfflineRun(method=name, environment=environment))
    assert experiment.config.horizon == experiment.source.horizon == 100


def test_other_data_is_not_put_beside_published_figures(tmp_path, capsys):
    (tmp_path / "sicql-0").mkdir()
    numbers = {"returns": [1.0], "reached": [1.0], "best": 2.0, "best_of": "scripted"}
    (tmp_path / "sicql-0" / "few_shot.json").write_text(json.dumps(numbers))
    for data, shown in (({}, True), ({"quality": "expert"}, False), ({"split": "far"}, False)):
        run = OfflineRun(environment="push", data=data)
        suite.print_table(suite.collect(tmp_path, run, ["sicql"], 1), "push")
        assert ("653.04" in capsys.readouterr().out) == shown


def test_without_meta_world_one_line_names_the_extra(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "metaworld", None)
    monkeypatch.setitem(sys.modules, "metaworld.policies", None)
    assert main(["collect", str(tmp_path / "data"), "--environment", "push"]) == 2
    err = capsys.readouterr().err
    assert "pip install 'icrl-kernels[metaworld]'" in err
    assert err.count("\n") == 1
    assert len(ReachData().goals()[0]) == 45  # needs no simulator


def test_importing_the_suite_does_not_import_meta_world():
    code = "import sys, icrl.offline.suite; sys.exit('metaworld' in sys.modules or 'mujoco' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"horizon": 0}, "horizon, tasks: wanted 1 to 500"),
        ({"horizon": 501}, "horizon, tasks: wanted 1 to 500"),
        ({"tasks": 9}, "got 100, 9"),
        ({"split": "near"}, "split: wanted 'random' or 'far', got 'near'"),
        ({"quality": "q_learning"}, "quality: wanted 'mixed', 'medium' or 'expert'"),
        ({"episodes": 30}, "episodes: wanted a multiple of history=20, got 30"),
        ({"history": 0}, "episodes"),
    ],
    ids=lambda x: "-".join(f"{k}={v}" for k, v in x.items()) if isinstance(x, dict) else "",
)
def test_bad_arguments(given, message):
    with pytest.raises(ValueError, match=message):
        ReachData(**given)


def test_bad_environments():
    with pytest.raises(ValueError, match="name: wanted one of reach, push, got 'door'"):
        MetaWorld("door", (0.0, 0.8, 0.1))
    with pytest.raises(ValueError, match="horizon: wanted 1 to 500, got 0"):
        MetaWorld("reach", (0.0, 0.8, 0.1), 0)
