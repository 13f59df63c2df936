"""S-ICQL's commands end to end on a tiny room: training, the suite, its table and picture, and refusals."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from icrl.cli import main
from icrl.files import locked
from icrl.offline.environments.darkroom import DarkRoomData
from icrl.offline.experiment import Experiment, OfflineRun
from icrl.offline.jobs import Job, _end_with_parent, run_jobs
from icrl.offline.presets import titles
from icrl.offline.suite import collect, mean_sem
from icrl.offline.world_model import WorldModel, WorldModelConfig
from icrl.training.config import configured

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
    args = ["eval", "--suite", "sicql", "--out", tmp_path / "suite", "--methods", "sicql", "ad", "--seeds", 1]
    args += ["--episodes", 4, "--config", config, "--json", tmp_path / "n.json"]
    assert main([str(a) for a in args]) == 0
    out = capsys.readouterr().out
    assert "S-ICQL" in out
    assert "66.05" not in out  # another room than the published one
    numbers = json.loads((tmp_path / "n.json").read_text())["methods"]
    assert set(numbers) == {"sicql", "ad"}
    assert len(numbers["ad"]["curve"]) == 4
    assert (tmp_path / "suite" / "few_shot.png").stat().st_size > 1000
    before = (tmp_path / "suite" / "ad-0" / "model.safetensors").stat().st_mtime_ns
    assert main([str(a) for a in args]) == 0  # nothing is made again
    assert (tmp_path / "suite" / "ad-0" / "model.safetensors").stat().st_mtime_ns == before
    assert "update 3" in (tmp_path / "suite" / "ad-0.log").read_text()
    made = tmp_path / "suite" / "ad-0" / "config.json"
    found = json.loads(made.read_text())
    made.write_text(json.dumps({**found, "config": {**found["config"], "batch": 5}}))
    assert main([str(a) for a in args]) == 2
    assert "ad-0 was trained with other settings (batch: 5, wanted 4)" in capsys.readouterr().err
    made.write_text(json.dumps(found))
    (tmp_path / "suite" / "ad-0" / "few_shot.json").write_text("cut")
    assert main([str(a) for a in args]) == 2
    config.write_text(json.dumps({**TINY, "judged_episodes": 3}))
    assert main([str(a) for a in args]) == 2
    err = capsys.readouterr().err.splitlines()
    assert "ad-0/few_shot.json is damaged" in err[-2]
    assert "holds a suite with another configuration (judged_episodes: 2, wanted 3)" in err[-1]


def jobs(tmp_path, *scripts):
    """Runs whose commands are Python scripts."""

    class Script(Job):
        def start(self, log, threads):
            with open(log, "ab") as out:
                return subprocess.Popen(
                    [sys.executable, "-c", self.arguments[0], str(self.folder)],
                    stdout=out, stderr=out, preexec_fn=_end_with_parent,
                )  # fmt: skip

    return [Script(tmp_path / f"run-{i}", 10, [script]) for i, script in enumerate(scripts)]


def test_jobs_wait_for_what_they_need_and_report(tmp_path, capsys):
    first, second, third = jobs(
        tmp_path, "import time; time.sleep(1); open('%s', 'w')", "print('good')", "print('fine')"
    )
    file = tmp_path / "made"
    first = replace(first, arguments=[first.arguments[0] % file])
    second = replace(second, arguments=[f"import os; print('good' if os.path.exists('{file}') else 'bad')"], needs=file)
    run_jobs([first, second, third], 2, "test")
    assert (tmp_path / "run-1.log").read_text() == "good\n"
    assert (tmp_path / "run-2.log").read_text() == "fine\n"
    assert "30/30" in capsys.readouterr().err


def test_a_job_that_fails_ends_the_others(tmp_path):
    pid = tmp_path / "pid"
    both = jobs(
        tmp_path,
        f"import os, time; open('{pid}', 'w').write(str(os.getpid())); time.sleep(60)",
        f"import os, time\nwhile not os.path.exists('{pid}') or not open('{pid}').read(): time.sleep(0.05)\n"
        "raise SystemExit('icrl: too bad')",
    )
    began = time.monotonic()
    with pytest.raises(ChildProcessError, match="run-1 failed: too bad"):
        run_jobs(both, 2, "test")
    assert time.monotonic() - began < 50
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=lambda s: s.name)
def test_a_suite_that_is_killed_leaves_no_process_and_its_folder_free(config, tmp_path, how):
    """`how` reaches the suite alone, not its children."""
    slow = tmp_path / "slow.json"
    slow.write_text(json.dumps({**TINY, "loop": {"updates": 100_000, "checkpoint_every": 5}}))
    out = tmp_path / "suite"
    line = [sys.executable, "-m", "icrl.cli", "eval", "sicql", "--out", out, "--methods", "ad", "--seeds", "1"]

    def heed_interrupts() -> None:  # a shell's background jobs, and what they start, ignore them
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    suite = subprocess.Popen(
        [*map(str, line), "--config", str(slow)], stderr=subprocess.PIPE, text=True, preexec_fn=heed_interrupts
    )
    deadline = time.monotonic() + 60
    while not list(out.glob("ad-0/checkpoints/*[0-9]")):
        assert suite.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    children = Path(f"/proc/{suite.pid}/task/{suite.pid}/children").read_text().split()
    assert children
    suite.send_signal(how)
    said = suite.communicate(timeout=30)[1]
    assert suite.returncode == {signal.SIGINT: 130, signal.SIGKILL: -signal.SIGKILL}[how]
    assert ("icrl: interrupted" in said) == (how == signal.SIGINT)
    while any(Path(f"/proc/{child}/cmdline").exists() for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    with locked(out, wait=False):
        pass


def test_a_suite_is_not_for_two_processes(config, tmp_path, capsys):
    out = tmp_path / "suite"
    out.mkdir()
    with locked(out):
        assert main(["eval", "sicql", "--out", str(out), "--config", str(config), "--methods", "ad"]) == 2
    assert "another process is at work" in capsys.readouterr().err


def test_what_fails_in_a_run_is_one_line_of_the_suite(tmp_path, capsys, monkeypatch):
    """Also in a folder that holds another `icrl`, as a clone does whose extension is not built."""
    (tmp_path / "icrl").mkdir()
    (tmp_path / "icrl" / "__init__.py").write_text("raise ImportError('a source tree')")
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "wild.json"
    path.write_text(json.dumps({**TINY, "loop": {**TINY["loop"], "learning_rate": 1e30, "warmup": 0}}))
    args = ["eval", "sicql", "--out", tmp_path / "suite", "--methods", "ad", "--seeds", 1, "--config", path]
    assert main([str(a) for a in args]) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("icrl: ad-0 failed: the gradient is not finite")


def test_train_offline_trains_its_own_world_model(config, tmp_path, capsys):
    args = ["train", "offline", "--out", tmp_path / "run", "--config", config, "--evaluate", 2]
    assert main([str(a) for a in args]) == 0
    assert (tmp_path / "run-world_model" / "model.safetensors").exists()
    assert len(json.loads((tmp_path / "run" / "few_shot.json").read_text())["returns"]) == 2
    assert "return" in capsys.readouterr().out


def test_a_world_model_that_cannot_be_written_is_refused_before_data_are_gathered(
    config, tmp_path, capsys, monkeypatch
):
    (tmp_path / "run-world_model").write_text("old")
    monkeypatch.setattr(DarkRoomData, "train_data", lambda self: pytest.fail("gathered"))
    assert main(["train", "offline", "--out", str(tmp_path / "run"), "--config", str(config)]) == 2
    assert f"cannot write {tmp_path / 'run-world_model'} (Not a directory)" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_training_reads_collected_data(config, tmp_path, capsys):
    assert main(["collect", str(tmp_path / "data"), "--config", str(config)]) == 0
    assert "shards" in capsys.readouterr().out
    run = configured(OfflineRun, {**TINY, "records": str(tmp_path / "data")}, "config")
    assert torch.equal(Experiment(run).data.actions, Experiment(replace(run, records="")).data.actions)
    other = replace(run, data={**TINY["data"], "seed": 1})
    with pytest.raises(ValueError, match="has seed 0, the configuration 1"):
        _ = Experiment(other).data


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
        (["eval", "sicql", "--methods", "ad", "ad"], "each once, got ad, ad"),
        (["eval", "sicql", "--methods"], "each once, got none"),
        (["eval", "--suite", "omni"], "suite: wanted one of sicql, omnirl, got 'omni'"),
        (["eval", "--suite"], "suite: wanted one of sicql"),
        (["train", "offline", "--method", "ad", "--world-model", "wm"], "world_model: ad uses none"),
    ],
    ids=lambda a: a[-1] if isinstance(a, list) else "",
)
def test_refusals_are_one_line(args, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(args) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"judged_episodes": 0}, "judged_episodes: wanted at least 1"),
        ({"world_batch": 0}, "world_batch: wanted at least 1"),
        ({"data": 5}, "data: wanted dict"),
        ({"data": {"size": "large"}}, "data.size: wanted int"),
        ({"settings": {"trunk": None}}, "ad's settings.trunk: wanted an object"),
        ({"settings": {"stride": 2}}, "ad's settings has no stride"),
        ({"settings": {"episodes": 9}}, "episodes: wanted 9 in a row, a history has 8"),
        ({"loop": {"seed": -1}}, "seed: wanted 0 to"),
        ({"records": "nowhere"}, "nowhere: holds no data set"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_bad_configurations_are_one_line(changes, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("bad.json").write_text(json.dumps({**TINY, **changes}))
    assert main(["train", "offline", "--method", "ad", "--out", "run", "--config", "bad.json"]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("name", titles())
@pytest.mark.parametrize("environment", ["darkroom", "stitching", "point-robot"])
def test_every_preset_is_a_configuration(name, environment):
    experiment = Experiment(OfflineRun(method=name, environment=environment))
    assert experiment.config.horizon == experiment.source.horizon


def test_settings_go_over_the_suites_own_and_leave_ablations_alone():
    def config(**fields):
        return Experiment(OfflineRun(**fields)).config

    plain = config(method="sicql")
    settings = {"trunk": {"width": 32}, "iql": {"expectile": 0.8}, "stride": 2, "world_model": True}
    changed = config(method="sicql", settings=settings)
    assert changed == replace(
        plain,
        trunk=replace(plain.trunk, width=32),
        iql=replace(plain.iql, expectile=0.8),
        stride=2,
    )
    without = config(method="sicql w/o c", settings=settings)
    assert (without.world_model, without.stride, without.iql.expectile) == (False, 1, 0.8)
    narrow = OfflineRun(world_model=WorldModelConfig(window=2))
    with pytest.raises(ValueError, match=r"stride: wanted at most world_model.window=2, got 4"):
        _ = Experiment(narrow).config
    assert Experiment(replace(narrow, method="sicql w/o c")).config.stride == 1
    reach, stitching = (config(environment=e) for e in ("reach", "stitching"))
    assert (reach.iql.reward_scale, reach.iql.discount, stitching.iql.target_rate) == (0.1, 0.95, 0.02)
    with pytest.raises(ValueError, match="horizon: wanted darkroom's 100, got 50"):
        config(settings={"horizon": 50})


def test_means_over_seeds(tmp_path):
    for s, returns in enumerate([[0.0, 2.0], [2.0, 4.0]]):
        (tmp_path / f"ad-{s}").mkdir()
        numbers = {"returns": returns, "reached": [0.5 * s, 1.0], "best": 5.0, "best_of": "optimal"}
        (tmp_path / f"ad-{s}" / "few_shot.json").write_text(json.dumps(numbers))
    n = collect(tmp_path, OfflineRun(), ["ad", "dpt"], 2)
    assert set(n) == {"ad"}
    assert (n["ad"]["first"], n["ad"]["first_reached"], n["ad"]["published"]) == (1.0, 0.25, 42.72)
    assert (n["ad"]["all"], n["ad"]["all_sem"], n["ad"]["last"]) == (2.0, 1.0, 3.0)
    assert n["ad"]["curve"] == [1.0, 3.0]
    alone = collect(tmp_path, OfflineRun(), ["ad"], 1)["ad"]
    assert (alone["all_sem"], alone["curve_sem"]) == (None, [])
    json.dumps(alone, allow_nan=False)
    assert mean_sem([1.0, 3.0, 5.0]) == (3.0, pytest.approx(2 / 3**0.5))


def test_a_suite_from_before_a_setting_existed_goes_on(config, tmp_path, capsys):
    """In its own record and in those of its runs; and settings that say on what it trains may change."""
    args = [
        "eval",
        "sicql",
        "--out",
        tmp_path / "suite",
        "--methods",
        "ad",
        "--seeds",
        1,
        "--episodes",
        2,
        "--config",
        config,
    ]
    assert main([str(a) for a in args]) == 0
    path, made = tmp_path / "suite" / "run.json", tmp_path / "suite" / "ad-0" / "config.json"
    run, record = json.loads(path.read_text()), json.loads(made.read_text())
    for name in ("device", "autocast"):
        del run["loop"][name], run["world_loop"][name]
    del record["config"]["episodes"]  # its default is what the run had
    path.write_text(json.dumps(run))
    made.write_text(json.dumps(record))
    before = (tmp_path / "suite" / "ad-0" / "model.safetensors").stat().st_mtime_ns
    assert main([str(a) for a in [*args, "--threads", 1, "--device", "cpu"]]) == 0
    assert (tmp_path / "suite" / "ad-0" / "model.safetensors").stat().st_mtime_ns == before
    loop = json.loads(path.read_text())["loop"]
    assert (loop["threads"], loop["device"], loop["autocast"]) == (1, "cpu", False)
    path.write_text("cut")
    assert main([str(a) for a in args]) == 2
    assert "run.json is damaged" in capsys.readouterr().err
