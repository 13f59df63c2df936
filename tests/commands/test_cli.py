"""The command line: each command end to end on small sizes, and one line with exit code 2 for wrong input."""

import json

import numpy as np
import pytest
import torch

from icrl.cli import main
from icrl.commands.demo import success
from icrl.omnirl.checkpoints import shipped
from icrl.omnirl.evaluate import Context
from icrl.omnirl.value_iteration_network import ValueIterationNetwork, ValueIterationNetworkConfig
from icrl.worlds import TabularTasks
from icrl.worlds.gymnasium_tables import CLASSIC


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "m.safetensors"
    ValueIterationNetwork(
        ValueIterationNetworkConfig(
            layers=1, action_width=8, state_width=12, value_width=4, action_hidden=8, state_hidden=12
        )
    ).save(path)
    return path


def test_demo_writes_tables_a_picture_and_numbers(small, tmp_path, capsys):
    args = [
        "demo",
        "--checkpoint",
        small,
        "--tasks",
        3,
        "--steps",
        500,
        "--out",
        tmp_path / "d.png",
        "--json",
        tmp_path / "d.json",
    ]
    assert main([str(a) for a in args]) == 0
    numbers = json.loads((tmp_path / "d.json").read_text())
    assert {"normalized", "ci95", "seconds"} <= numbers["anymdp"].keys()
    assert set(numbers["gymnasium"]) == set(CLASSIC)
    assert (tmp_path / "d.png").read_bytes()[:4] == b"\x89PNG"
    out = capsys.readouterr().out
    assert "tabular model-based" in out
    assert "FrozenLake" in out


def test_context_reports_pace_and_memory(small, tmp_path):
    assert main(["context", "--steps", "300", "--checkpoint", str(small), "--json", str(tmp_path / "c.json")]) == 0
    numbers = json.loads((tmp_path / "c.json").read_text())
    assert numbers["steps"] == 300
    assert numbers["step_time_ratio"] > 0
    assert numbers["steps_per_s"] > 0
    assert "rss_growth_mb" in numbers


def test_worlds_sample_filter_inspect_draw_eval(small, tmp_path, capsys):
    file, kept = tmp_path / "t.safetensors", tmp_path / "k.safetensors"
    assert main(["worlds", "sample", str(file), "--num-tasks", "5", "--num-states", "8"]) == 0
    assert len(TabularTasks.load(file)) == 5
    assert main(["worlds", "filter", str(file), str(kept), "--min-advantage", "0"]) == 0
    assert len(TabularTasks.load(kept)) == 5  # sampled tasks pass their own filters
    assert main(["worlds", "inspect", str(file)]) == 0
    assert "Gini" in capsys.readouterr().out
    assert main(["worlds", "draw", str(file), "--out", str(tmp_path / "t.png")]) == 0
    assert (tmp_path / "t.png").stat().st_size > 5000
    args = [
        "eval",
        "--tasks",
        str(file),
        "--checkpoint",
        str(small),
        "--steps",
        "40",
        "--json",
        str(tmp_path / "e.json"),
    ]
    assert main(args) == 0
    assert json.loads((tmp_path / "e.json").read_text())["tasks"] == 5


def test_worlds_of_partial_observation(small, tmp_path, capsys):
    file = tmp_path / "t.safetensors"
    sample = ["worlds", "sample", str(file), "--kind", "pomdp", "--num-tasks", "3", "--num-states", "8"]
    assert main([*sample, "--num-observations", "9"]) == 0
    assert TabularTasks.load(file).emission.shape == (3, 1, 8, 9)
    assert main(["eval", "--tasks", str(file), "--checkpoint", str(small), "--steps", "40"]) == 0
    assert main([*sample, "--overwrite", "--observation-tokens", "2", "--action-tokens", "3"]) == 0
    tasks = TabularTasks.load(file)
    assert (tasks.observation_tokens, tasks.action_tokens, tasks.num_observations) == (2, 3, 64)
    for command in ("inspect", "draw"):
        args = [str(file), *(["--out", str(tmp_path / "t.png")] if command == "draw" else [])]
        assert main(["worlds", command, *args]) == 0
    capsys.readouterr()
    assert main(["eval", "--tasks", str(file), "--checkpoint", str(small), "--steps", "40"]) == 2
    assert "reads one token" in capsys.readouterr().err
    assert main([*sample, "--overwrite", "--action-tokens", "0"]) == 2


def test_train_then_demo_from_its_model(tmp_path):
    config = {
        "training": {
            "model": {"layers": 1, "action_width": 8, "state_width": 12, "value_width": 4},
            "data": {"batch": 2, "steps": 16},
            "segment": 16,
            "dagger": 0.0,
            "evaluation_tasks": 2,
            "evaluation_steps": 10,
        },
        "loop": {"updates": 2, "compile": False, "warmup": 1},
    }
    (tmp_path / "c.json").write_text(json.dumps(config))
    args = ["train", "value-iteration-network", "--config", str(tmp_path / "c.json"), "--out", str(tmp_path / "run")]
    threads = torch.get_num_threads()
    assert main([*args, "--threads", "1"]) == 0
    torch.set_num_threads(threads)
    model = ValueIterationNetwork.load(tmp_path / "run" / "model.safetensors")
    assert model.config.layers == 1


def refused(capsys, *args):
    capsys.readouterr()
    assert main([str(a) for a in args]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_wrong_input_is_one_line_and_exit_2(small, tmp_path, capsys):
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(small.read_bytes()[:500])
    assert "damaged" in refused(capsys, "demo", "--checkpoint", damaged)
    assert "no file" in refused(capsys, "demo", "--checkpoint", tmp_path / "absent")
    assert "out" in refused(capsys, "demo", "--checkpoint", small, "--out", tmp_path / "no" / "folder.png")
    assert "steps" in refused(capsys, "context", "--steps", 1, "--checkpoint", small)
    assert "prompt" in refused(capsys, "eval", "--checkpoint", small, "--num-tasks", 2, "--steps", 20, "--prompt", 9)
    tasks = tmp_path / "t.safetensors"
    tasks.write_text("precious")
    assert "--overwrite" in refused(capsys, "worlds", "sample", tasks, "--num-tasks", 1)
    assert tasks.read_text() == "precious"
    assert "safetensors" in refused(capsys, "worlds", "inspect", tasks)
    config = tmp_path / "c.json"
    config.write_text('{"loop": {"udpates": 3}}')
    assert "udpates" in refused(
        capsys, "train", "value-iteration-network", "--config", config, "--out", tmp_path / "run"
    )
    assert not (tmp_path / "run").exists()
    config.write_text("{")
    assert "JSON" in refused(capsys, "train", "value-iteration-network", "--config", config, "--out", tmp_path / "run")


def test_success_by_hand():
    reward = torch.tensor([[0.0, 1.0, 0.0, -1.0, 0.0, 1.0]])
    done = torch.tensor([[0, 1, 0, 1, 2, 0]])
    assert success(Context(reward, done), 0, 6)[0] == pytest.approx(1 / 3)
    assert success(Context(reward, done), 0, 1).isnan().all()


@pytest.mark.parametrize("name", list(CLASSIC))
def test_the_table_is_the_environment(name):
    """Every step of the real environment has, in the table, the probability and the shaped reward it should have."""
    task = CLASSIC[name]
    table, envs = task.table(), task.make_vec(4)
    observation, _ = envs.reset(seed=0)
    rng = np.random.default_rng(0)
    for _ in range(300):
        action = rng.integers(0, int(table.num_actions[0]), 4)
        before = observation
        observation, reward, terminated, truncated, info = envs.step(action)
        ended = terminated | truncated
        after = [info["final_obs"][i] if ended[i] else observation[i] for i in range(4)]
        shaped = task.shaped(reward, terminated)
        for i in range(4):
            s, a, s2 = int(before[i]), int(action[i]), int(after[i])
            assert table.transition[0, s, a, s2] > 0
            assert float(table.reward[0, s, a, s2]) == pytest.approx(float(shaped[i]))
            assert bool(table.terminal[0, s2]) == bool(terminated[i])
    envs.close()


def test_the_shipped_model_learns_in_context(tmp_path):
    """What the package promises, in small: unseen tasks are learned from context, far above random."""
    args = ["eval", "--num-tasks", "16", "--steps", "600", "--json", str(tmp_path / "e.json")]
    assert shipped().stat().st_size < 10e6
    assert main(args) == 0
    methods = json.loads((tmp_path / "e.json").read_text())["methods"]
    assert methods["value-iteration network"]["normalized"] > 0.6
    assert abs(methods["random"]["normalized"]) < 0.15
