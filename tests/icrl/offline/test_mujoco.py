"""Cheetah-Vel, Ant-Dir, Walker-Param and the teacher that gathers data in them."""

import json
import math
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

from icrl import plots
from icrl.cli import main
from icrl.offline import suite
from icrl.offline.environments import teacher as teaching
from icrl.offline.environments.mujoco import (
    WALKER_PARAMETERS,
    AntDir,
    AntDirData,
    CheetahVel,
    CheetahVelData,
    WalkerParam,
    WalkerParamData,
)
from icrl.offline.experiment import Experiment, OfflineRun, collect_data
from icrl.offline.trajectory_shards import read_trajectories
from icrl.training import checkpoint
from icrl.training.config import configured

ENVIRONMENTS = (CheetahVel, AntDir, WalkerParam)
SOURCES = (CheetahVelData, AntDirData, WalkerParamData)
TINY = {"horizon": 5, "tasks": 10, "episodes": 6, "checkpoints": 3, "teacher_steps": 180}


def play(env, steps, seed=3, scale=1.0):
    env.reset(seed=seed)
    random = np.random.default_rng(seed)
    return [env.step(scale * random.uniform(-1, 1, env.action_space.shape)) for _ in range(steps)]


# --- rewards, against what the simulator's state says ----------------------------------------------------------------------


def test_cheetah_vel_reward():
    env = CheetahVel(1.2)
    env.reset(seed=0)
    for t in range(5):
        before = env.simulator.data.qpos[0]
        action = np.full(6, 0.1 * t)
        reward = env.step(action)[1]
        velocity = (env.simulator.data.qpos[0] - before) / 0.05  # 5 frames of .01 s
        assert reward == pytest.approx(-abs(velocity - 1.2) - 0.05 * 6 * (0.1 * t) ** 2)


def test_ant_dir_reward():
    env = AntDir(2.0)
    env.reset(seed=0)
    touched = 0.0
    for _ in range(20):
        data = env.simulator.data
        before = data.body("torso").xpos[:2].copy()
        reward = env.step(np.full(8, 0.5))[1]
        moved = (data.body("torso").xpos[:2] - before) / 0.05
        contact = np.square(np.clip(data.cfrc_ext, -1, 1)).sum()
        touched = max(touched, contact)
        along = moved[0] * math.cos(2.0) + moved[1] * math.sin(2.0)
        assert reward == pytest.approx(along - 0.5 * 8 * 0.25 - 5e-4 * contact + 1)
    assert touched > 0


def test_walker_param_reward_pays_for_being_upright():
    env = WalkerParam(horizon=400)
    env.reset(seed=0)
    upright = []
    for _ in range(300):
        before = env.simulator.data.qpos[0]
        reward = env.step(np.full(6, 1.0))[1]
        x, z, angle = env.simulator.data.qpos[:3]
        upright.append(0.8 < z < 2.0 and -1 < angle < 1)
        assert reward == pytest.approx((x - before) / 0.008 + upright[-1] - 1e-3 * 6)
    assert upright[0]
    assert not upright[-1]  # it fell, and the episode went on


@pytest.mark.parametrize("kind", ENVIRONMENTS)
def test_actions_are_clipped(kind):
    inside, beyond = kind(), kind()
    inside.reset(seed=0)
    beyond.reset(seed=0)
    corner = np.where(np.arange(inside.action_space.shape[0]) % 2, 1.0, -1.0)
    for _ in range(3):
        a, b = inside.step(corner), beyond.step(7 * corner)
        assert np.array_equal(a[0], b[0])
        assert a[1] == b[1]


# --- environments ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ENVIRONMENTS)
@pytest.mark.filterwarnings("ignore:.*Box.*infinity")
def test_gymnasiums_checker_is_content(kind):
    check_env(kind(horizon=20), skip_render_check=True)


@pytest.mark.parametrize("kind", ENVIRONMENTS)
def test_episodes_are_deterministic_and_of_one_length(kind):
    env = kind(horizon=30)
    first, again, other = play(env, 30), play(kind(horizon=30), 30), play(env, 30, seed=4)
    for a, b in zip(first, again, strict=True):
        assert np.array_equal(a[0], b[0])
        assert a[1] == b[1]
    assert not np.array_equal(first[0][0], other[0][0])
    assert [s[3] for s in first] == [False] * 29 + [True]
    assert not any(s[2] for s in first)
    with pytest.raises(RuntimeError, match="call reset"):
        env.step(env.action_space.sample())


def test_the_observation_does_not_hold_the_task():
    a, b = (CheetahVel(v) for v in (0.5, 2.5))
    for x, y in zip(play(a, 10), play(b, 10), strict=True):
        assert np.array_equal(x[0], y[0])
        assert x[1] != y[1]


def test_walker_params_change_the_model():
    plain = WalkerParam().simulator.model
    u = np.random.default_rng(0).uniform(-3, 3, WalkerParam.num_parameters)
    other = WalkerParam(u).simulator.model
    at = 0
    for name, (rows, shape, base) in WALKER_PARAMETERS.items():
        n = math.prod(shape)
        ratio = getattr(other, name)[rows] / getattr(plain, name)[rows]
        assert ratio.shape == shape
        assert ratio == pytest.approx(base ** u[at : at + n].reshape(shape))
        at += n
    assert at == WalkerParam.num_parameters
    assert plain.body_mass[0] == other.body_mass[0] == 0
    assert other.body_subtreemass[0] == pytest.approx(other.body_mass.sum())  # derived, and derived anew
    assert not np.array_equal(play(WalkerParam(u), 5)[-1][0], play(WalkerParam(), 5)[-1][0])


# --- task splits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("split", ["random", "far"])
def test_splits_are_disjoint_and_deterministic(kind, split):
    source = kind(split=split)
    train, test = source.goals()
    assert (len(train), len(test)) == (45, 5)
    assert not {tuple(t) for t in train.tolist()} & {tuple(t) for t in test.tolist()}
    assert all(torch.equal(a, b) for a, b in zip(source.goals(), kind(split=split).goals(), strict=True))


def test_far_tasks_are_beyond_training():
    train, test = CheetahVelData(split="far").goals()
    assert test.min() > train.max()
    assert CheetahVelData().goals()[0].max() == 3.0
    train, test = AntDirData(split="far").goals()
    assert test.min() > train.max()  # a sector: the last tenth of the circle
    assert test.max() < 2 * math.pi
    train, test = WalkerParamData(split="far").goals()
    assert train.abs().max() <= 3 < test.abs().min()
    assert test.abs().max() <= 4
    assert torch.equal(train[:5], WalkerParamData().goals()[0][:5])
    assert not torch.equal(train, WalkerParamData(split="far", seed=1).goals()[0])


@pytest.mark.parametrize("kind", SOURCES)
def test_environments_are_those_of_the_split(kind):
    source = kind(**TINY)
    for which, goals in zip(("train", "test"), source.goals(), strict=True):
        envs = source.environments(which)
        assert torch.equal(torch.tensor(np.stack([e.task for e in envs.envs])), goals)
        envs.reset(seed=0)
        for _ in range(5):
            *_, truncated, info = envs.step(envs.action_space.sample())
        assert truncated.all()
        assert "final_obs" in info


# --- the teacher and its data ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SOURCES)
def test_collected_data(kind, tmp_path):
    source = kind(**TINY)
    data, facts = source.collect(tmp_path)
    env = source.make("train")[0]
    assert (data.num_tasks, data.num_actions, set(data.lengths.tolist())) == (9, 0, {5})
    assert data.states.shape == (9 * 6 * 5, *env.observation_space.shape)
    assert data.actions.abs().max() <= 1
    assert not data.terminated.any()
    assert torch.equal(data.states[1:5], data.next_states[:4])
    assert len(facts["checkpoint_returns"]) == 3
    assert all(math.isfinite(facts[f"{which}_return"]) for which in ("train", "test"))
    by_episode = data.rewards.view(9, 6, 5)
    assert by_episode.sum(-1)[:, 2:4].mean() == pytest.approx(facts["checkpoint_returns"][1], abs=1e-3)  # 3 decimals


def test_episodes_replay_from_their_seeds(tmp_path):
    source = CheetahVelData(**TINY)
    teacher = teaching.Teacher(source)
    goals = source.goals()[0].numpy()
    part = teaching.episodes(teacher, source.make("train"), goals, 2, seed=11)
    env = CheetahVel(goals[4], horizon=5)
    state, _ = env.reset(seed=11 * 1009 + 1 * 9 + 4)
    for t in range(5):
        assert np.array_equal(part["states"][4, 1, t], state)
        state, reward, *_ = env.step(part["actions"][4, 1, t].numpy())
        assert part["rewards"][4, 1, t] == pytest.approx(reward)
        assert np.array_equal(part["next_states"][4, 1, t], state)


def weights(path):
    return checkpoint.load(path)[0]


@pytest.mark.parametrize("stage", ["checkpoint", "newest", "episodes"])
def test_a_killed_command_goes_on_to_the_same_data(stage, tmp_path, monkeypatch):
    source = CheetahVelData(**TINY)
    whole, _ = source.collect(tmp_path / "whole")

    written = checkpoint.save

    seen = []

    def save(path, *args):  # the kill: instead of the second file of this stage, of the fourth newest state
        if path.name.startswith(stage):
            seen.append(path)
            if len(seen) == (4 if stage == "newest" else 2):
                raise KeyboardInterrupt
        written(path, *args)

    monkeypatch.setattr(checkpoint, "save", save)
    with pytest.raises(KeyboardInterrupt):
        source.collect(tmp_path / "killed")
    monkeypatch.setattr(checkpoint, "save", written)
    np.random.seed(5)  # noqa: NPY002 (another process has other global generators)
    torch.manual_seed(5)
    rest, _ = source.collect(tmp_path / "killed")
    for name in ("states", "actions", "rewards", "next_states"):
        assert torch.equal(getattr(whole, name), getattr(rest, name)), name
    a, b = (weights(tmp_path / k / "newest.safetensors") for k in ("whole", "killed"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_training_changes_the_teacher_and_leaves_the_generators_alone(tmp_path):
    source = CheetahVelData(**TINY)
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    teacher = teaching.train_teacher(source, tmp_path)
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002
    assert (teacher.iteration, len(teacher.returns)) == (4, 4)
    kept = [weights(teaching.checkpoint_path(tmp_path, c)) for c in range(3)]
    name = "policy.action_net.weight"
    assert not torch.equal(kept[0][name], kept[1][name])
    assert not torch.equal(kept[1][name], kept[2][name])
    assert not list(tmp_path.glob("*.zip"))


def test_returns_are_of_the_raw_rewards(monkeypatch):
    source = CheetahVelData(**TINY)
    teacher = teaching.Teacher(source)
    monkeypatch.setattr(CheetahVel, "_reward", lambda *_: 2.0)
    teacher.improve()
    assert teacher.returns == [pytest.approx(10.0)]


def test_one_teacher_serves_each_quality(tmp_path, monkeypatch):
    mixed = CheetahVelData(**TINY)
    data, facts = mixed.collect(tmp_path)
    monkeypatch.setattr(teaching.Teacher, "improve", lambda _: pytest.fail("trained again"))
    expert, f = replace(mixed, quality="expert", episodes=2).collect(tmp_path)
    assert torch.equal(expert.actions.view(9, 2, 5, 6), data.actions.view(9, 6, 5, 6)[:, 4:])
    assert f["checkpoint_returns"] == facts["checkpoint_returns"][2:]
    medium, _ = replace(mixed, quality="medium", episodes=2).collect(tmp_path)
    assert torch.equal(medium.actions.view(9, 2, 5, 6), data.actions.view(9, 6, 5, 6)[:, 2:4])


def test_another_teachers_folder_is_refused(tmp_path):
    teaching.train_teacher(CheetahVelData(**TINY), tmp_path)
    with pytest.raises(ValueError, match=r"another teacher's: seed 0, not 1"):
        CheetahVelData(**TINY, seed=1).collect(tmp_path)
    newest = tmp_path / "newest.safetensors"
    newest.write_bytes(newest.read_bytes()[:-9])
    with pytest.raises(ValueError, match="damaged"):
        CheetahVelData(**TINY).collect(tmp_path)


# --- commands --------------------------------------------------------------------------------------------------------------


RUN = {
    "environment": "cheetah-vel",
    "data": TINY,
    "settings": {"trunk": {"width": 8, "layers": 1, "heads": 1}, "batch": 2},
    "world_model": {"window": 4, "hidden": 8},
    "world_batch": 8,
    "world_loop": {"updates": 2, "checkpoint_every": 2, "evaluate_every": 2},
    "loop": {"updates": 2, "checkpoint_every": 2, "evaluate_every": 2},
    "judged_episodes": 2,
}


def test_from_teacher_to_few_shot_evaluation(tmp_path, capsys):
    config = tmp_path / "c.json"
    config.write_text(json.dumps(RUN))
    collect = ["collect", tmp_path / "data", "--config", config, "--json", tmp_path / "n.json"]
    assert main([str(a) for a in collect]) == 0
    assert "teacher: -" in capsys.readouterr().out
    numbers = json.loads((tmp_path / "n.json").read_text())
    assert len(numbers["checkpoint_returns"]) == 3
    assert read_trajectories(tmp_path / "data").rewards.shape == (9 * 6 * 5,)
    assert main([str(a) for a in collect]) == 0  # again: nothing to do
    assert main([str(a) for a in [*collect, "--environment", "darkroom"]]) == 2
    config.write_text(json.dumps({**RUN, "records": str(tmp_path / "data")}))
    train = ["train", "offline", "--out", tmp_path / "run", "--config", config, "--evaluate", 2]
    capsys.readouterr()
    assert main([str(a) for a in train]) == 0
    assert f"the teacher reaches {numbers['test_return']:.2f}" in capsys.readouterr().out
    few_shot = json.loads((tmp_path / "run" / "few_shot.json").read_text())
    assert (few_shot["best"], few_shot["best_of"]) == (numbers["test_return"], "teacher")


@pytest.mark.parametrize(
    ("best", "best_of"), [(-40.0, "teacher"), (None, "teacher"), (-40.0, "optimal"), (9.0, "optimal")]
)
def test_tables_and_pictures_of_negative_returns(best, best_of, tmp_path, capsys):
    numbers = {"returns": [-60.0, -50.0], "reached": [0.0, 0.0], "best": best, "best_of": best_of}
    (tmp_path / "ad-0").mkdir()
    (tmp_path / "ad-0" / "few_shot.json").write_text(json.dumps(numbers))
    summaries = suite.collect(tmp_path, suite.OfflineRun(environment="cheetah-vel"), ["ad"], 1)
    suite.print_table(summaries, "cheetah-vel")
    out = capsys.readouterr().out
    assert ("teacher reaches -40.00" in out) == (best is not None and best_of == "teacher")
    assert ("optimal is" in out) == (best_of == "optimal")
    (ax,) = plots.few_shot_picture(summaries, "cheetah-vel").axes
    low, high = ax.get_ylim()
    assert low < -60
    assert high > max(-50, best or -50)
    assert [line.get_label() for line in ax.lines] == ["AD"] + [best_of] * (best is not None)


def test_data_of_another_configuration_is_refused_before_a_teacher_is_trained(tmp_path, monkeypatch):
    run = configured(OfflineRun, RUN, "config")
    collect_data(Experiment(run), tmp_path / "data")
    monkeypatch.setattr(teaching, "train_teacher", lambda *_: pytest.fail("trained"))
    with pytest.raises(ValueError, match=r"out: .* has seed 0, the configuration 1"):
        collect_data(Experiment(replace(run, data={**TINY, "seed": 1})), tmp_path / "data")


def test_training_without_records_says_what_to_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "offline", "--environment", "ant-dir"]) == 2
    err = capsys.readouterr().err
    assert "icrl collect data/ant-dir --environment ant-dir" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(("missing", "name"), [("mujoco", "ant-dir"), ("stable_baselines3", "ant-dir's teacher")])
def test_without_the_extra_one_line_says_what_to_install(missing, name, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, missing, None)
    assert main(["collect", str(tmp_path / "d"), "--environment", "ant-dir"]) == 2
    assert capsys.readouterr().err == f"icrl: {name} needs {missing}: pip install 'icrl-kernels[mujoco]'\n"
    assert not (tmp_path / "d").exists()


def test_best_returns_are_the_teachers_or_unknown(tmp_path):
    run = configured(OfflineRun, RUN, "config")
    assert Experiment(run).best_return is None
    facts = collect_data(Experiment(run), tmp_path / "d")
    assert Experiment(replace(run, records=str(tmp_path / "d"))).best_return == facts["test_return"]
    assert Experiment(OfflineRun(environment="point-robot")).best_return < 0
    with pytest.raises(ValueError, match="teacher: darkroom has none"):
        collect_data(Experiment(OfflineRun()), tmp_path / "x", tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"horizon": 1}, "horizon, tasks"),
        ({"tasks": 9}, "horizon, tasks"),
        ({"split": "near"}, "split"),
        ({"quality": "good"}, "quality"),
        ({"episodes": 15}, "episodes: wanted a multiple of 10"),
        ({"episodes": 0}, "episodes"),
        ({"checkpoints": 1, "episodes": 1}, "checkpoints"),
        ({"teacher_steps": 8 * 9000}, "checkpoints, teacher_steps"),
    ],
)
def test_bad_data_sources(change, message):
    with pytest.raises(ValueError, match=message):
        CheetahVelData(**{**asdict(CheetahVelData()), **change})


@pytest.mark.parametrize("kind", ENVIRONMENTS)
def test_bad_tasks_and_actions(kind):
    with pytest.raises(ValueError, match="task: wanted"):
        kind(np.zeros(kind.num_parameters + 1))
    with pytest.raises(ValueError, match="task: wanted"):
        kind(np.full(kind.num_parameters, np.nan))
    with pytest.raises(ValueError, match="horizon"):
        kind(horizon=0)
    env = kind()
    env.reset(seed=0)
    with pytest.raises(ValueError, match="action: wanted finite"):
        env.step(np.full(env.action_space.shape, np.nan))
