"""Every kind of file that version 0.1.0.dev wrote is still read, and says what it said: tests/data/written_by_0.1.0.dev.

Made by, in that folder (the folders' tensorboard, pictures, locks and last checkpoints left out):
    icrl worlds sample tasks.safetensors --num-tasks 2 --num-states 8 --seed 1
    icrl worlds sample pomdp.safetensors --kind pomdp --num-tasks 2 --num-states 8 --num-observations 5 \
        --observation-tokens 2 --action-tokens 2 --seed 1
    icrl worlds shards tasks --num-tasks 2 --num-states 8 8 --discounts 0.9 --seed 1 --workers 1
    icrl distill records --tasks 4 --config records.json --labels --seed 1 --workers 1
    icrl collect trajectories --config offline.json
    icrl train omnirl --config omnirl.json --out omnirl
    icrl train offline --config offline.json --out offline --evaluate 2
    icrl eval --tasks tasks.safetensors --checkpoint omnirl/model.safetensors --steps 20 --json eval.json
and packed.safetensors by sample_anymdp(2, 8, 3, seed=2, packed=True).save.
"""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from icrl.cli import main
from icrl.offline.environments.darkroom import DarkRoomData
from icrl.offline.few_shot import few_shot
from icrl.offline.learner import load_method
from icrl.offline.trajectory_shards import read_trajectories
from icrl.offline.world_model import WorldModel
from icrl.omnirl.agent import Agent
from icrl.omnirl.distill import DPDConfig, make_batch
from icrl.omnirl.record_shards import RecordStream
from icrl.omnirl.value_iteration_network import ValueIterationNetwork
from icrl.worlds import TabularTasks, sample_anymdp, sample_pomdp
from icrl.worlds.task_shards import TaskShards
from icrl_kernels import __version__

OLD = Path(__file__).parent / "data" / "written_by_0.1.0.dev"


@pytest.fixture(autouse=True)
def keep_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def old(tmp_path):
    """A copy to work in."""
    return shutil.copytree(OLD, tmp_path / "old")


def icrl(*args):
    assert main([str(a) for a in args]) == 0


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name, t in a.items():
        assert torch.equal(t, b[name]), name


def test_task_files():
    assert_same(TabularTasks.load(OLD / "tasks.safetensors").tensors(), sample_anymdp(2, 8, 5, seed=1).tensors())
    packed = TabularTasks.load(OLD / "packed.safetensors")
    assert_same(packed.tensors(), sample_anymdp(2, 8, 3, seed=2, packed=True).tensors())
    seen = TabularTasks.load(OLD / "pomdp.safetensors")
    tokens = {"num_observations": 5, "observation_tokens": 2, "action_tokens": 2}
    assert_same(seen.tensors(), sample_pomdp(2, 8, 5, seed=1, **tokens).tensors())
    assert (seen.num_observations, seen.action_tokens) == (5, 2)


def test_task_shards():
    shards = TaskShards(OLD / "tasks", full=True)
    tasks = sample_anymdp(2, 8, 5, seed=1)
    assert_same(shards.shard(0).dense().tensors(), tasks.tensors())
    found, solved = shards.reader.shard(0), tasks.solve([0.9])
    assert torch.equal(found["policy"].long(), solved.policy)
    torch.testing.assert_close(found["value"].double(), solved.v, rtol=1e-5, atol=1e-6)


def test_records():
    stream = RecordStream(OLD / "records", 2, 1, shuffle=False, prefetch=0)
    config = DPDConfig(**json.loads((OLD / "records.json").read_text()))
    stream.check(config)
    for i in range(2):
        read, made = next(stream), make_batch(config, 1, i)
        for name in ("observation", "action", "reward", "done", "tag"):
            assert torch.equal(getattr(read, name), getattr(made, name)), name
        torch.testing.assert_close(read.q, made.q)


def test_trajectories():
    read = read_trajectories(OLD / "trajectories")
    made = DarkRoomData(**json.loads((OLD / "offline.json").read_text())["data"]).train_data()
    for name in ("states", "actions", "rewards", "next_states", "terminated", "ends", "tasks", "optimal"):
        assert torch.equal(getattr(read, name), getattr(made, name)), name
    assert (read.environment, read.num_actions, read.history) == (made.environment, made.num_actions, made.history)


@pytest.mark.parametrize("folder", ["tasks", "records", "trajectories"])
def test_shards_are_whole(folder, tmp_path):
    icrl("dataset", OLD / folder, "--full", "--json", tmp_path / "n.json")
    assert json.loads((tmp_path / "n.json").read_text())["wrong"] == []


def test_the_same_commands_find_their_shards(old, tmp_path):
    if json.loads((old / "records" / "index.json").read_text())["config"]["icrl_kernels"] != __version__:
        pytest.skip("another version makes data sets of its own")
    before = {p: p.read_bytes() for p in old.rglob("shard-*")}
    sizes = ["--num-tasks", 2, "--num-states", 8, 8, "--discounts", 0.9]
    icrl("worlds", "shards", old / "tasks", *sizes, "--seed", 1, "--workers", 1)
    distill = ["--tasks", 4, "--config", old / "records.json", "--labels"]
    icrl("distill", old / "records", *distill, "--seed", 1, "--workers", 1)
    icrl("collect", old / "trajectories", "--config", old / "offline.json", "--json", tmp_path / "n.json")
    assert json.loads((tmp_path / "n.json").read_text())["made"] == 0
    assert {p: p.read_bytes() for p in old.rglob("shard-*")} == before


def assert_close_to_the_old(path, old):
    """One more update, on whatever processor: its smallest differences may decide where a step's sign does."""
    found, wanted = load_file(path), load_file(old)
    assert found.keys() == wanted.keys()
    apart = torch.cat([(t.double() - wanted[name].double()).abs().flatten() for name, t in found.items()])
    assert (apart < 2e-4).double().mean() > 0.9
    assert apart.max() < 0.05


def goes_on(capsys, folder, command, close=True):
    """The run in `folder`, stopped after two updates of three, makes the third."""
    (folder / "model.safetensors").unlink()
    capsys.readouterr()
    icrl(*command, "--out", folder)
    assert f"resuming {folder} at update 2 of 3" in capsys.readouterr().out
    if close:
        assert_close_to_the_old(folder / "model.safetensors", OLD / folder.name / "model.safetensors")
    lines, wanted = ((f / "metrics.jsonl").read_text().splitlines() for f in (folder, OLD / folder.name))
    assert lines[:2] == wanted[:2]
    assert [json.loads(x).keys() for x in lines] == [json.loads(x).keys() for x in wanted]


def test_a_run_of_the_value_iteration_network_goes_on_from_its_own_configuration(old, capsys):
    """Not from a part of it, as defaults have changed; to other weights, as its first memory stores the mean reward now."""
    assert (
        main(["train", "value-iteration-network", "--config", str(old / "omnirl.json"), "--out", str(old / "omnirl")])
        == 2
    )
    assert "another configuration (training.depths: [] in the run" in capsys.readouterr().err
    command = ["train", "value-iteration-network", "--config", old / "omnirl" / "config.json"]
    goes_on(capsys, old / "omnirl", command, close=False)


def test_offline_run_goes_on(old, capsys):
    world = ["--world-model", old / "offline-world_model" / "model.safetensors"]
    goes_on(capsys, old / "offline", ["train", "offline", "--config", old / "offline.json", "--evaluate", 2, *world])
    assert (old / "offline" / "few_shot.json").is_file()


def test_world_model_run_goes_on(old, capsys):
    goes_on(capsys, old / "offline-world_model", ["train", "world-model", "--config", old / "offline.json"])


def test_models_act():
    model = ValueIterationNetwork.load(OLD / "omnirl" / "model.safetensors")
    assert Agent(model, 2, 8, seed=1).act(torch.tensor([0, 7])).shape == (2,)
    data = DarkRoomData(**json.loads((OLD / "offline.json").read_text())["data"])
    method = load_method(OLD / "offline" / "model.safetensors")
    assert few_shot(method, data.environments(), 2).shape == (12, 2)
    world = WorldModel.load(OLD / "offline-world_model" / "model.safetensors")
    world.check(data.train_data())


def test_evaluation_says_the_same(tmp_path):
    model = OLD / "omnirl" / "model.safetensors"
    args = ["--tasks", OLD / "tasks.safetensors", "--checkpoint", model, "--steps", 20]
    icrl("eval", *args, "--json", tmp_path / "e.json")
    found, wanted = (json.loads(p.read_text()) for p in (tmp_path / "e.json", OLD / "eval.json"))
    assert wanted.keys() <= found.keys()  # fields may be added
    wanted["methods"]["value-iteration network"] = wanted["methods"].pop("OmniRL (in context)")  # its name since 0.2
    assert found["methods"].keys() == wanted["methods"].keys()
    for name, numbers in wanted["methods"].items():
        assert found["methods"][name].keys() == numbers.keys()
        if name in (
            "random",
            "oracle",
            "oracle, episode",
        ):  # learners have other constants since, the model another memory
            given = {
                k: math.nan if v is None else v for k, v in found["methods"][name].items()
            }  # null is what JSON has
            assert given == pytest.approx(numbers, rel=1e-4, nan_ok=True)


def test_training_reads_the_old_records(old, tmp_path):
    loop = {"updates": 1, "warmup": 1, "threads": 1}
    config = json.loads((old / "omnirl.json").read_text())
    (tmp_path / "c.json").write_text(json.dumps({**config, "loop": loop}))
    args = ["--config", tmp_path / "c.json", "--out", tmp_path / "run", "--records", old / "records"]
    icrl("train", "value-iteration-network", *args)
    config = json.loads((old / "offline.json").read_text())
    config |= {"loop": loop, "records": str(old / "trajectories"), "method": "sicql w/o c"}
    (tmp_path / "o.json").write_text(json.dumps(config))
    icrl("train", "offline", "--config", tmp_path / "o.json", "--out", tmp_path / "offline", "--evaluate", 1)
