"""The suite: rows that can be made, columns in them, resume, refusals, and a tiny one through the command line."""

import json
from dataclasses import replace

import pytest
import torch

from icrl.cli import main
from icrl.omnirl import suite as module
from icrl.omnirl.suite import SuiteConfig, run_suite
from icrl.omnirl.suite_columns import baseline_columns, budget, model_column, ppo_column
from icrl.omnirl.suite_rows import PAPER, ROWS
from icrl.omnirl.value_iteration_network import ValueIterationNetwork, ValueIterationNetworkConfig
from icrl.worlds.tasks import TabularTasks

SMALL = {"layers": 1, "action_width": 8, "state_width": 12, "value_width": 4, "action_hidden": 8, "state_hidden": 12}
CONFIG = SuiteConfig(contexts=6, steps=300, learner_steps=600, seed=1)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "small.safetensors"
    ValueIterationNetwork(ValueIterationNetworkConfig(**SMALL)).save(path)
    return path


def call(*args):
    return main(["eval", "--suite", "omnirl", *map(str, args)])


@pytest.mark.parametrize("name", ROWS)
def test_rows_are_what_they_say(name):
    row = ROWS[name]
    world = row.make(3, 5)
    if isinstance(world, TabularTasks):
        world.validate()
        assert len(world) == 3
        assert (world.num_observations, world.shape[2]) == (row.states, row.actions)
        assert row.same == torch.equal(world.reward[0], world.reward[1])
    else:
        assert world.num_contexts == 3 * world.agents
        assert (world.num_observations, world.num_actions) == (row.states, row.actions)
        assert row.same
    assert len(row.paper) == len(PAPER)
    assert row.steps % row.window == 0
    assert row.steps >= 4 * row.window


def test_budgets():
    assert budget(4000, None, 250) == (4000, 250)
    assert budget(4000, 300, 250) == (250, 250)
    assert budget(4000, 100, 250) == (100, 100)
    assert budget(300_000, None, 250) == (299_250, 4_750)
    assert budget(300_000, None, 250, most=600) == (500, 250)


def test_a_tiny_suite_through_the_command_line(small, tmp_path, capsys):
    out = tmp_path / "suite"
    args = ["--checkpoint", small, "--contexts", 6, "--steps", 300, "--learner-steps", 600, "--out", out]
    assert call(*args, "--rows", "lake", "switch2", "--json", tmp_path / "n.json") == 0
    printed = capsys.readouterr().out
    assert "| FrozenLake | 6 |" in printed
    assert "| Switch2, two agents | 6 |" in printed
    results = json.loads((out / "results.json").read_text())
    assert results == json.loads((tmp_path / "n.json").read_text())
    assert results["rows"].keys() == {"lake", "switch2"}
    cells = results["rows"]["lake"]["cells"]
    assert cells.keys() == {"model-small", "q-ucb", "model-based", "random", "oracle"}
    assert abs(cells["random"]["last"]) < 0.1
    assert cells["oracle"]["performance"] == 1
    assert len(cells["model-small"]["mean"]) == 3
    assert results["rows"]["lake"]["paper"]["OmniRL (AnyMDP)"] == {"performance": 0.998, "steps": 300, "episodes": 35}
    assert (out / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert "FrozenLake" in (out / "table.md").read_text()

    # what is there is not made again, more rows are added
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/*.json")}
    assert call(*args, "--rows", "lake", "switch2", "bandit") == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert list(rows) == ["bandit", "lake", "switch2"]  # in the table's order

    # a folder of other settings, another model, other constants
    assert call(*args, "--rows", "lake", "--seed", 2) == 2
    assert "holds a suite of other settings (seed: 1, wanted 2)" in capsys.readouterr().err
    other = tmp_path / "other" / "small.safetensors"
    other.parent.mkdir()
    ValueIterationNetwork(ValueIterationNetworkConfig(**SMALL)).save(other)
    args[1] = other
    assert call(*args, "--rows", "lake") == 2
    assert "is of other settings (checkpoint: " in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_killed_suite_goes_on(small, tmp_path, monkeypatch):
    columns = [model_column(small, torch.device("cpu"), 4, True), *baseline_columns()]
    failing = [columns[0], replace(columns[1], run=lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)), *columns[2:]]
    with pytest.raises(KeyboardInterrupt):
        run_suite(tmp_path, CONFIG, ["bandit"], failing, False)
    assert [path.stem for path in (tmp_path / "bandit").iterdir()] == ["model-small"]
    never = replace(columns[0], run=lambda *_: pytest.fail("made again"))
    run_suite(tmp_path, CONFIG, ["bandit"], [never, *columns[1:]], False)
    apart = tmp_path / "apart"
    run_suite(apart, CONFIG, ["bandit"], columns, False)
    for name in ("model-small", "q-ucb", "model-based", "random", "oracle"):
        one, two = (json.loads((folder / "bandit" / f"{name}.json").read_text()) for folder in (tmp_path, apart))
        assert one | {"seconds": 0} == two | {"seconds": 0}


def test_a_row_that_has_changed_is_not_gone_on_with(small, tmp_path, monkeypatch):
    columns = baseline_columns()[2:]
    run_suite(tmp_path, CONFIG, ["bandit"], columns, False)
    monkeypatch.setitem(module.ROWS, "bandit", replace(ROWS["bandit"], window=20))
    with pytest.raises(ValueError, match=r"random\.json is of other settings \(row\.window: 10, wanted 20\)"):
        run_suite(tmp_path, CONFIG, ["bandit"], columns, False)


def test_damaged_files_are_named(small, tmp_path, capsys):
    args = ["--checkpoint", small, "--contexts", 4, "--steps", 100, "--learner-steps", 100, "--out", tmp_path]
    assert call(*args, "--rows", "bandit") == 0
    path = tmp_path / "bandit" / "oracle.json"
    whole = path.read_text()
    changes = [{"performance": "high"}, {"mean": [0.5]}, {"unlearning": {}}, {"steps_to": {"0.8": []}}]
    for text in (whole[:100], "[]", *(json.dumps(json.loads(whole) | change) for change in changes)):
        path.write_text(text)
        assert call(*args, "--rows", "bandit") == 2
        err = capsys.readouterr().err
        assert str(path) in err
        assert "damaged" in err
    path.write_text(whole)
    (tmp_path / "suite.json").write_text("{")
    assert call(*args, "--rows", "bandit") == 2
    assert "suite.json is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--rows", "lakes"], "rows: wanted some of bandit, "),
        (["--rows", "lake", "lake"], "each once, got lake, lake"),
        (["--contexts", 1], "contexts: wanted at least 2, got 1"),
        (["--steps", 10], "steps: wanted at least 100, got 10"),
        (["--seed", -1], "seed: wanted 0 to"),
        (["--prompt", 9, "--rows", "lake"], "cannot act in FrozenLake (prompt: wanted 0 to 4, got 9)"),
        (["--threads", 0], "threads: wanted at least 1, got 0"),
        (["--ppo", "--ppo-tasks", -1], "ppo_tasks: wanted at least 0, got -1"),
    ],
)
def test_refusals(args, said, small, tmp_path, capsys):
    assert call("--checkpoint", small, "--out", tmp_path / "s", *args) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
    assert not (tmp_path / "s").exists()


def test_checkpoints_are_judged(small, tmp_path, capsys):
    few = tmp_path / "few.safetensors"
    ValueIterationNetwork(ValueIterationNetworkConfig(actions=4, **SMALL)).save(few)
    assert call("--checkpoint", few, "--out", tmp_path / "s", "--rows", "lake", "bandit") == 2
    assert "few.safetensors cannot act in Bandits, T(1, 5) (num_actions: wanted 1 to 4" in capsys.readouterr().err
    same = tmp_path / "small.safetensors"
    same.write_bytes(small.read_bytes())
    assert call("--checkpoint", small, same, "--out", tmp_path / "s") == 2
    assert "checkpoint: wanted files of different names, got small, small" in capsys.readouterr().err
    assert call("--checkpoint", tmp_path / "absent", "--out", tmp_path / "s") == 2
    assert "checkpoint: no file" in capsys.readouterr().err


def test_two_models_have_two_columns(small, tmp_path):
    torch.manual_seed(1)
    second = tmp_path / "second.safetensors"
    ValueIterationNetwork(ValueIterationNetworkConfig(**SMALL)).save(second)
    columns = [model_column(path, torch.device("cpu"), 4, False) for path in (small, second)]
    run_suite(tmp_path / "s", CONFIG, ["bandit"], columns, False)
    cells = json.loads((tmp_path / "s" / "results.json").read_text())["rows"]["bandit"]["cells"]
    assert [c["title"] for c in cells.values()] == ["value-iteration network, second", "value-iteration network, small"]
    assert cells["model-small"]["mean"] != cells["model-second"]["mean"]


def test_ppo_is_trained_in_tasks_that_are_kept(tmp_path, monkeypatch):
    pytest.importorskip("stable_baselines3")
    row = replace(ROWS["bandit"], ppo_steps=1024)
    monkeypatch.setitem(module.ROWS, "bandit", row)
    run_suite(tmp_path, CONFIG, ["bandit", "switch2"], [ppo_column(2)], False)
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert rows.keys() == {"bandit"}  # PPO is not for teams
    cell = rows["bandit"]["cells"]["ppo"]
    assert cell["tasks"] == 2
    assert len(cell["mean"]) == 600 // 80


def test_columns_of_one_title_are_told_apart():
    cells = [{"model-a": {"title": "network"}, "random": {"title": "random"}}, {"model-b": {"title": "network"}}]
    rows = {str(i): {"cells": row} for i, row in enumerate(cells)}
    module._name_apart(rows)
    assert [[cell["title"] for cell in row.values()] for row in cells] == [["network, a", "random"], ["network, b"]]
