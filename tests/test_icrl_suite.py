"""S-ICQL's commands end to end on a tiny room: training, the suite, its table and picture, and refusals."""

import json
from dataclasses import replace

import pytest
import torch

from icrl.cli import main
from icrl.sicql.suite import TITLES, OfflineRun, collect, mean_sem
from icrl.sicql.world_model import WorldModel, WorldModelConfig
from icrl.train import configured

TINY = {
    "data": {"size": 4, "horizon": 12, "train_goals": 12, "episodes": 8, "history": 8},
    "settings": {"batch": 4, "trunk": {"width": 16, "layers": 1, "heads": 1}},
    "world_loop": {"updates": 3, "checkpoint_every": 3, "evaluate_every": 3},
    "loop": {"updates": 3, "checkpoint_every": 3, "evaluate_every": 3},
    "judged_episodes": 2,
}


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(TINY))
    return path


def test_suite_trains_evaluates_prints_and_draws(config, tmp_path, capsys):
    args = ["eval", "sicql", "--out", tmp_path / "suite", "--methods", "sicql", "ad", "--seeds", 1, "--jobs", 1]
    args += ["--episodes", 4, "--config", config, "--json", tmp_path / "n.json"]
    assert main([str(a) for a in args]) == 0
    out = capsys.readouterr().out
    assert "S-ICQL" in out
    assert "66.05" in out
    numbers = json.loads((tmp_path / "n.json").read_text())["methods"]
    assert set(numbers) == {"sicql", "ad"}
    assert len(numbers["ad"]["curve"]) == 4
    assert (tmp_path / "suite" / "few_shot.png").stat().st_size > 1000
    before = (tmp_path / "suite" / "ad-0" / "model.safetensors").stat().st_mtime_ns
    assert main([str(a) for a in args]) == 0  # nothing is made again
    assert (tmp_path / "suite" / "ad-0" / "model.safetensors").stat().st_mtime_ns == before
    assert main([str(a) for a in [*args, "--environment", "stitching"]]) == 2


def test_train_offline_trains_its_own_world_model(config, tmp_path, capsys):
    args = ["train", "offline", "--out", tmp_path / "run", "--config", config, "--evaluate", 2]
    assert main([str(a) for a in args]) == 0
    assert (tmp_path / "run-world_model" / "model.safetensors").exists()
    assert len(json.loads((tmp_path / "run" / "few_shot.json").read_text())["returns"]) == 2
    assert "return" in capsys.readouterr().out


def test_training_reads_collected_data(config, tmp_path, capsys):
    assert main(["collect", str(tmp_path / "data"), "--config", str(config)]) == 0
    assert "shards" in capsys.readouterr().out
    run = configured(OfflineRun, {**TINY, "records": str(tmp_path / "data")}, "config")
    assert torch.equal(run.train_data().actions, replace(run, records="").train_data().actions)
    other = replace(run, data={**TINY["data"], "seed": 1})
    with pytest.raises(ValueError, match="has seed 0, the configuration 1"):
        other.train_data()


def test_a_world_model_of_another_environment_is_refused(config, tmp_path, capsys):
    torch.manual_seed(0)
    WorldModel(WorldModelConfig(), "Stitching", 2, 5).save(tmp_path / "wm")
    args = ["train", "offline", "--out", tmp_path / "run", "--config", config, "--world-model", tmp_path / "wm"]
    assert main([str(a) for a in args]) == 2
    assert "world_model: was trained for environment 'Stitching', the data has 'DarkRoom'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["train", "offline", "--method", "bc"], "method"),
        (["train", "offline", "--environment", "ant"], "environment"),
        (["train", "offline", "--evaluate", "0"], "evaluate"),
        (["eval", "sicql", "--seeds", "0"], "seeds"),
        (["eval", "sicql", "--methods", "bc"], "methods"),
    ],
    ids=lambda a: a[-1] if isinstance(a, list) else "",
)
def test_refusals_are_one_line(args, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(args) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("name", TITLES)
@pytest.mark.parametrize("environment", ["darkroom", "stitching", "point-robot"])
def test_every_preset_is_a_configuration(name, environment):
    run = OfflineRun(method=name, environment=environment)
    assert run.make_config().horizon == run.make_data().horizon


def test_settings_go_over_the_suites_own_and_leave_ablations_alone():
    plain = OfflineRun(method="sicql").make_config()
    settings = {"trunk": {"width": 32}, "iql": {"expectile": 0.8}, "stride": 2, "world_model": True}
    changed = OfflineRun(method="sicql", settings=settings).make_config()
    assert changed == replace(
        plain,
        trunk=replace(plain.trunk, width=32),
        iql=replace(plain.iql, expectile=0.8),
        stride=2,
    )
    without = OfflineRun(method="sicql w/o c", settings=settings).make_config()
    assert (without.world_model, without.stride, without.iql.expectile) == (False, 1, 0.8)
    with pytest.raises(ValueError, match="horizon: wanted darkroom's 100, got 50"):
        OfflineRun(settings={"horizon": 50}).make_config()


def test_means_over_seeds(tmp_path):
    for s, returns in enumerate([[0.0, 2.0], [2.0, 4.0]]):
        (tmp_path / f"ad-{s}").mkdir()
        numbers = {"returns": returns, "reached": [0.5, 1.0], "best": 5.0}
        (tmp_path / f"ad-{s}" / "few_shot.json").write_text(json.dumps(numbers))
    n = collect(tmp_path, ["ad", "dpt"], 2)
    assert set(n) == {"ad"}
    assert (n["ad"]["all"], n["ad"]["all_sem"], n["ad"]["last"]) == (2.0, 1.0, 3.0)
    assert n["ad"]["curve"] == [1.0, 3.0]
    assert mean_sem([1.0, 3.0, 5.0]) == (3.0, pytest.approx(2 / 3**0.5))
