"""An experiment: what it makes once, which settings it heeds or refuses, what it begins from, and what it says of versions."""

import collections
import json
from dataclasses import replace

import pytest
import torch

from icrl.cli import main
from icrl.offline import experiment as experiments
from icrl.offline import provenance
from icrl.offline.environments import SOURCES, source_class
from icrl.offline.environments import teacher as teaching
from icrl.offline.environments.darkroom import DarkRoomData
from icrl.offline.environments.mujoco import CheetahVelData
from icrl.offline.environments.source import DataSource
from icrl.offline.experiment import Experiment, OfflineRun, collect_data, offline_run
from icrl.offline.learner import METHODS, OfflineLearner, begin_from, load_method, make_method
from icrl.offline.method import Method, Spaces
from icrl.offline.presets import ABLATIONS, PUBLISHED, titles
from icrl.offline.world_model import WorldModel, WorldModelConfig
from icrl.training import checkpoint
from icrl.training import loop as training
from icrl.training.config import LoopConfig, configured

LOOP = {"updates": 2, "checkpoint_every": 1, "evaluate_every": 2, "log_every": 1}
SMALL = {
    "data": {"size": 4, "horizon": 12, "train_goals": 12, "episodes": 8, "history": 8},
    "settings": {"batch": 4, "trunk": {"width": 16, "layers": 1, "heads": 1}},
    "world_model": {"window": 4, "size": 4, "hidden": 8},
    "world_batch": 4,
    "world_loop": LOOP,
    "loop": LOOP,
    "judged_episodes": 1,
}


@pytest.fixture
def command(tmp_path, capsys):
    """Runs a command on a configuration over SMALL; its exit code and what it said on stderr."""

    def call(*args, **changes):
        path = tmp_path / "c.json"
        path.write_text(json.dumps({**SMALL, **changes}))
        code = main([str(a) for a in (*args, "--config", path)])
        return code, capsys.readouterr().err

    return call


def refused(result, message):
    code, said = result
    assert code == 2
    assert message in said
    assert said.count("\n") == 1


# --- made once -------------------------------------------------------------------------------------------------------------


def test_a_command_gathers_once_and_makes_its_environments_once(command, tmp_path, monkeypatch):
    count = collections.Counter()
    for name in ("__post_init__", "train_data", "environments", "best_returns"):
        real = getattr(DarkRoomData, name)
        monkeypatch.setattr(DarkRoomData, name, lambda self, *a, r=real, n=name: (count.update([n]), r(self, *a))[1])
    code, _ = command("train", "offline", "--method", "sicql", "--out", tmp_path / "run", "--evaluate", 1)
    assert code == 0
    count["__post_init__"] -= 1  # the defaults, over which the configuration's values go
    assert count == {"__post_init__": 1, "train_data": 1, "environments": 1, "best_returns": 1}


# --- registries ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_is_found_by_its_name_and_refuses_other_tasks(name):
    source = source_class(name)()
    assert DataSource in type(source).__mro__
    assert (source.name, source.split, source.best_of) == (name, "random", source.best_of)
    for ask in (source.environments, source.best_returns):
        with pytest.raises(ValueError, match="which: wanted 'train' or 'test', got 'trian'"):
            ask("trian")


def test_a_new_source_and_a_new_method_are_trained_and_judged_without_a_word_of_it_elsewhere(
    command, tmp_path, monkeypatch
):
    class Corridor(DarkRoomData):
        name = "corridor"

    class Copycat(METHODS["dpt"]):
        name, title = "copycat", "Copycat"

    monkeypatch.setitem(SOURCES, "corridor", Corridor)
    monkeypatch.setitem(METHODS, "copycat", Copycat)
    args = ["train", "offline", "--method", "copycat", "--environment", "corridor", "--out", tmp_path / "run"]
    assert command(*args, "--evaluate", 1)[0] == 0
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (record["environment"], record["method"]) == ("corridor", "copycat")
    assert record["config"]["layout"] == "branch"  # the suite's, of methods with a prompt


def test_published_figures_are_kept_by_name():
    assert PUBLISHED["darkroom", "random"] == {
        "sicql": 66.05, "dpt": 22.12, "ad": 42.72, "idt": 40.70, "dicp": 59.76, "dit": 30.90, "ic_iql": 60.12,
    }  # fmt: skip
    assert PUBLISHED["reach", "random"] == {
        "sicql": 806.97, "dpt": 736.72, "ad": 738.96, "idt": 790.68, "dicp": 706.46, "dit": 758.92, "ic_iql": 773.33,
        "sicql w/o cq": 736.72, "sicql w/o c": 792.09, "sicql w/o q": 752.41,
    }  # fmt: skip
    assert {m for figures in PUBLISHED.values() for m in figures} == set(METHODS) | set(ABLATIONS) == set(titles())


def test_a_method_says_what_it_is():
    for name, kind in METHODS.items():
        assert (kind.name, titles()[name]) == (name, kind.title)
        assert issubclass(kind, Method)
        assert kind.config_class()
    with pytest.raises(ValueError, match="method: wanted one of ad, dicp"):
        make_method("bc", METHODS["ad"].config_class(), Spaces("x", 1, 2, 2))


# --- settings --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("config", "options", "wanted"),
    [
        ({}, ["--threads", "3"], (3, 3)),
        ({"loop": {**LOOP, "threads": 2}}, [], (2, 2)),
        ({"loop": {**LOOP, "threads": 2}, "world_loop": {**LOOP, "threads": 3}}, [], (3, 2)),
    ],
    ids=["option", "configuration", "world model's own"],
)
def test_threads_are_heeded(config, options, wanted, command, tmp_path, monkeypatch, one_thread):
    seen = []
    rate = training.rate
    monkeypatch.setattr(training, "rate", lambda *a: (seen.append(torch.get_num_threads()), rate(*a))[1])
    assert command("train", "offline", "--out", tmp_path / "run", "--evaluate", 1, *options, **config)[0] == 0
    assert (seen[0], seen[-1]) == wanted


def test_what_cannot_be_heeded_is_refused_before_data_are_gathered(command, tmp_path, monkeypatch):
    monkeypatch.setattr(DarkRoomData, "train_data", lambda self: pytest.fail("gathered"))
    train = ["train", "offline", "--out", tmp_path / "run"]
    refused(command(*train, "--compile", "True", "--method", "dpt"), "loop.compile: wanted false with layout 'branch'")
    refused(command(*train, "--device", "tpu9"), "device: wanted auto or a device")
    refused(command(*train, world_loop={**LOOP, "device": "tpu9"}), "device: wanted auto or a device")
    other = {**LOOP, "seed": 5}
    refused(
        command(*train, "--seed", 3, world_loop=other),
        "world_loop.seed: wanted none of its own, the run's is loop.seed=3, got 5",
    )
    refused(command("train", "world-model", "--device", "tpu9", "--out", tmp_path / "run"), "device: wanted auto")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "changes"),
    [("ad", {}), ("idt", {"span": 4}), ("ic_iql", {}), ("dicp", {}), ("sicql", {}), ("dpt", {}), ("dit", {})],
)
def test_compiled_objectives_are_the_same_one_graph(name, changes, monkeypatch):
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **_: compiled(f, backend="eager", fullgraph=True, dynamic=False))
    source = DarkRoomData(**SMALL["data"])
    data = source.train_data()
    kind = METHODS[name].config_class
    world_model = WorldModel.of(WorldModelConfig(size=4, hidden=8), data) if name == "sicql" else None
    changes = {"trunk": {"width": 8, "layers": 1}, "horizon": 12, "batch": 2, **changes}
    method = make_method(name, configured(kind, changes, "settings"), Spaces.of(data), world_model)
    losses = {}
    for compile in (False, True):
        learner = OfflineLearner(method, data, {}, lambda m: {}, LoopConfig(compile=compile))
        torch.manual_seed(0)
        losses[compile] = [float(next(iter(learner.losses(i)))[0].detach()) for i in range(2)]
    assert losses[True] == pytest.approx(losses[False])


def test_autocast_is_heeded(command, tmp_path):
    args = ["train", "offline", "--method", "ad", "--evaluate", 1]
    logged = {}
    for name, options in (("plain", []), ("half", ["--autocast", "True"])):
        assert command(*args, *options, "--out", tmp_path / name)[0] == 0
        rows = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        logged[name] = next(rows)["loss"]
    assert logged["half"] != logged["plain"]
    assert logged["half"] == pytest.approx(logged["plain"], rel=0.02)


@pytest.mark.parametrize("line", ["train offline", "train world-model", "collect data", "eval sicql"])
def test_several_processes_are_refused(line, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(line.split()) == 2
    assert "runs in one process, got 2" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# --- beginning and going on ------------------------------------------------------------------------------------------------


def test_init_begins_from_a_methods_weights(command, tmp_path):
    train = ["train", "offline", "--evaluate", 1]
    assert command(*train, "--out", tmp_path / "first")[0] == 0
    still = {**LOOP, "learning_rate": 1e-30, "muon_learning_rate": 0.0}  # what is trained no further
    init = ["--init", tmp_path / "first" / "model.safetensors"]
    other = {**SMALL["data"], "seed": 1}
    assert command(*train, *init, "--out", tmp_path / "second", loop=still, data=other)[0] == 0
    assert not (tmp_path / "second-world_model").exists()  # it has its own
    first, second = (load_method(tmp_path / n / "model.safetensors").state_dict() for n in ("first", "second"))
    for name, tensor in first.items():
        if "target_q" not in name:  # it follows
            assert torch.allclose(second[name], tensor, rtol=0, atol=1e-20), name
    assert json.loads((tmp_path / "second" / "config.json").read_text())["init"] == str(init[1])
    refused(command(*train, *init, "--method", "ad", "--out", tmp_path / "x"), "init: wanted a ad, got a sicql")
    wider = {**SMALL["settings"], "trunk": {"width": 32, "layers": 1, "heads": 1}}
    refused(
        command(*train, *init, "--out", tmp_path / "x", settings=wider), "init: settings.trunk.width: 16, wanted 32"
    )
    refused(
        command(*train, *init, "--out", tmp_path / "x", "--world-model", tmp_path / "wm"),
        "brings its own",
    )
    refused(command(*train, *init, "--out", tmp_path / "x", "--method", "sicql w/o c"), "init: another network, its")


def test_begin_from_takes_everything():
    data = DarkRoomData(**SMALL["data"]).train_data()
    kind = METHODS["idt"].config_class
    config = configured(kind, {"horizon": 12, "span": 4, "trunk": {"width": 8, "layers": 1}}, "settings")
    one, other = (make_method("idt", config, Spaces.of(data)) for _ in range(2))
    one.prepare(data)
    begin_from(other, one)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_a_runs_own_record_is_a_configuration(command, tmp_path, capsys):
    assert command("train", "offline", "--method", "dpt", "--seed", 4, "--out", tmp_path / "a", "--evaluate", 1)[0] == 0
    args = ["train", "offline", "--config", tmp_path / "a" / "config.json", "--out", tmp_path / "b", "--evaluate", 1]
    assert main([str(a) for a in args]) == 0
    a, b = (checkpoint.load(tmp_path / name / "model.safetensors")[0] for name in ("a", "b"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    run = offline_run(json.loads((tmp_path / "a" / "config.json").read_text()))
    assert (run.method, run.loop.seed) == ("dpt", 4)


def test_a_run_from_before_there_was_a_device_goes_on(command, tmp_path):
    """Its record has neither the run nor settings that came later."""
    train = ["train", "offline", "--method", "dpt", "--out", tmp_path / "run", "--evaluate", 1]
    assert command(*train)[0] == 0
    path = tmp_path / "run" / "config.json"
    record = json.loads(path.read_text())
    for name in ("run", "simulators"):
        del record[name]
    for name in ("device", "autocast"):
        del record["loop"][name]
    path.write_text(json.dumps(record))
    assert command(*train)[0] == 0
    assert "run" in json.loads(path.read_text())
    code, said = command(*train, settings={**SMALL["settings"], "batch": 5})
    assert (code, "config.batch: 4 in the run, 5 given" in said) == (2, True)


def test_numbers_go_to_json(command, tmp_path):
    file = tmp_path / "n.json"
    args = ["train", "offline", "--method", "ad", "--out", tmp_path / "run", "--evaluate", 2, "--json", file]
    assert command(*args)[0] == 0
    numbers = json.loads(file.read_text())
    assert numbers == json.loads((tmp_path / "run" / "few_shot.json").read_text())
    assert numbers["versions"]["torch"] == torch.__version__
    assert {"device", "processor", "returns", "best"} <= numbers.keys()
    assert command("train", "world-model", "--out", tmp_path / "wm", "--json", file)[0] == 0
    assert {"model", "reward_error", "state_error", "versions", "device"} <= json.loads(file.read_text()).keys()


# --- versions --------------------------------------------------------------------------------------------------------------

ROBOT = {"horizon": 5, "tasks": 10, "episodes": 6, "checkpoints": 3, "teacher_steps": 180}


def other_version(monkeypatch, **changed):
    """What is installed from now on: other versions of some packages."""
    for module in (experiments, provenance, teaching):
        real = module.versions
        monkeypatch.setattr(module, "versions", lambda *p, r=real: {k: changed.get(k, v) for k, v in r(*p).items()})


def test_data_and_teachers_of_another_simulator_are_refused(tmp_path, monkeypatch, capsys):
    run = configured(
        OfflineRun, {"environment": "cheetah-vel", "data": ROBOT, "records": str(tmp_path / "d")}, "config"
    )
    made = collect_data(Experiment(run), tmp_path / "d")
    assert {"mujoco", "gymnasium", "stable-baselines3", "torch", "icrl_kernels"} == set(made["versions"])
    index = json.loads((tmp_path / "d" / "index.json").read_text())
    assert set(index["config"]["simulators"]) == {"mujoco", "gymnasium", "stable-baselines3"}
    facts = checkpoint.load(tmp_path / "d-teacher" / "newest.safetensors")[1]
    assert facts["versions"] == made["versions"]
    assert Experiment(run).data.num_tasks == 9

    other_version(monkeypatch, torch="9.9")
    capsys.readouterr()
    collect_data(Experiment(run), tmp_path / "d")
    said = [line for line in capsys.readouterr().out.splitlines() if "9.9" in line]
    assert len(said) == 1
    assert "newest.safetensors goes on with other versions: torch 9.9, not" in said[0]

    other_version(monkeypatch, **{"stable-baselines3": "9.9"})
    _ = Experiment(run).data  # what gathered them is not needed any more
    with pytest.raises(ValueError, match=r"out: .* was made with stable-baselines3 .*, here is 9.9"):
        collect_data(Experiment(run), tmp_path / "d")

    other_version(monkeypatch, mujoco="9.9")
    with pytest.raises(ValueError, match=r"records: .*d was made with mujoco .*, here is 9.9"):
        _ = Experiment(run).data
    with pytest.raises(ValueError, match=r"teacher: .*newest.safetensors was made with mujoco .*, here is 9.9"):
        CheetahVelData(**ROBOT).collect(tmp_path / "d-teacher")


def test_data_and_teachers_without_versions_are_read(tmp_path, monkeypatch):
    run = configured(
        OfflineRun, {"environment": "cheetah-vel", "data": ROBOT, "records": str(tmp_path / "d")}, "config"
    )
    monkeypatch.setattr(teaching, "versions_of", lambda source: None)
    monkeypatch.setattr(Experiment, "simulators", {})
    collect_data(Experiment(run), tmp_path / "d")
    monkeypatch.undo()
    before = (tmp_path / "d" / "shard-00000.safetensors").read_bytes()
    assert collect_data(Experiment(run), tmp_path / "d")["made"] == 0
    (tmp_path / "d" / "shard-00000.safetensors").unlink()
    assert collect_data(Experiment(run), tmp_path / "d")["made"] == 1  # of the same data set
    assert (tmp_path / "d" / "shard-00000.safetensors").read_bytes() == before
    assert Experiment(run).data.num_tasks == 9


def test_a_run_names_another_simulator_and_goes_on(tmp_path, monkeypatch, capsys):
    data = {"horizon": 6, "tasks": 10, "episodes": 4, "history": 4}
    run = replace(configured(OfflineRun, {**SMALL, "data": {}}, "config"), environment="reach", data=data, method="dpt")
    experiments.train_method(Experiment(run), tmp_path / "run")
    found = json.loads((tmp_path / "run" / "config.json").read_text())["simulators"]
    assert set(found) == {"mujoco", "gymnasium", "metaworld"}
    other_version(monkeypatch, mujoco="9.9")
    capsys.readouterr()
    longer = replace(run, loop=replace(run.loop, updates=3))
    experiments.train_method(Experiment(longer), tmp_path / "run")
    assert f"goes on with other versions: mujoco 9.9, not {found['mujoco']}" in capsys.readouterr().out
