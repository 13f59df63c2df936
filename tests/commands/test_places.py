"""Where commands write: refused before the work, through links and into pipes, and saved before anything is printed."""

import inspect
import io
import json
import os
import stat
import sys
import threading

import pytest
import torch

from icrl.cli import COMMANDS, main
from icrl.omnirl.value_iteration_network import ValueIterationNetwork, ValueIterationNetworkConfig
from icrl.worlds import TabularTasks, sample_anymdp

ROOT = os.geteuid() == 0


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    path = tmp_path_factory.mktemp("tasks") / "t.safetensors"
    sample_anymdp(2, 8, seed=0).save(path)
    return path


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


def call(*args):
    return main([str(a) for a in args])


# ---- refused before the work ---------------------------------------------------------------------------------------------


def needed(name, folder):
    """Arguments that a command cannot do without."""
    given = inspect.signature(COMMANDS[name]).parameters.values()
    return [folder / p.name for p in given if p.default is inspect.Parameter.empty]


def refused(capsys, tmp_path, *args):
    before = sorted(tmp_path.rglob("*"))
    assert call(*args) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    assert sorted(tmp_path.rglob("*")) == before
    return err


@pytest.mark.parametrize("name", COMMANDS)
def test_numbers_that_cannot_be_written_are_refused(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("old")
    for place in (tmp_path / "file" / "n.json", tmp_path, tmp_path / "absent" / "n.json"):
        err = refused(capsys, tmp_path, *name.split(), *needed(name, tmp_path), "--json", place)
        assert err.startswith(f"icrl: json: cannot write {place} (")


FOLDERS = [
    "train value-iteration-network",
    "train offline",
    "train world-model",
    "collect",
    "distill",
    "worlds shards",
    "eval sicql",
    "eval omnirl",
]


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_that_cannot_be_written_is_refused(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("old")
    out = [] if needed(name, tmp_path) else ["--out"]
    for place in (tmp_path / "file", tmp_path / "file" / "run"):
        assert str(place) in refused(capsys, tmp_path, *name.split(), *out, place)


@pytest.mark.parametrize("name", ["demo", "worlds draw", "worlds difficulty", "worlds sample", "worlds filter"])
def test_a_file_that_cannot_be_written_is_refused(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("old")
    place = tmp_path / "file" / "x.png"
    given = [place if p.name == "out" else p for p in needed(name, tmp_path)]
    given += [] if place in given else ["--out", place]
    assert f"out: cannot write {place} (" in refused(capsys, tmp_path, *name.split(), *given)


# ---- links, pipes, devices -----------------------------------------------------------------------------------------------


def test_numbers_go_through_links_and_into_pipes(tasks, tmp_path, capsys):
    link, target, pipe, got = tmp_path / "link", tmp_path / "target", tmp_path / "pipe", []
    link.symlink_to(target)
    os.mkfifo(pipe)
    assert call("worlds", "inspect", tasks, "--json", link) == 0
    assert link.is_symlink()
    numbers = json.loads(target.read_text())
    assert numbers["tasks"] == 2
    reader = threading.Thread(target=lambda: got.append(pipe.read_text()))
    reader.start()
    assert call("worlds", "inspect", tasks, "--json", pipe) == 0
    reader.join(20)
    assert json.loads(got[0]) == numbers
    read, write = os.pipe()
    assert call("worlds", "inspect", tasks, "--json", f"/dev/fd/{write}") == 0
    os.close(write)
    with open(read) as file:
        assert json.load(file) == numbers


def test_tasks_and_pictures_go_through_links(tasks, tmp_path, capsys):
    link, target = tmp_path / "link", tmp_path / "target"
    target.write_text("old")
    link.symlink_to(target)
    assert call("worlds", "sample", link, "--num-tasks", 3, "--num-states", 8) == 2
    assert target.read_text() == "old"
    assert call("worlds", "sample", link, "--num-tasks", 3, "--num-states", 8, "--overwrite") == 0
    assert link.is_symlink()
    assert len(TabularTasks.load(target)) == 3
    picture, drawn = tmp_path / "t.svg", tmp_path / "drawn"
    picture.symlink_to(drawn)
    assert call("worlds", "draw", tasks, "--out", picture) == 0
    assert picture.is_symlink()
    assert b"<svg" in drawn.read_bytes()


@pytest.mark.skipif(not ROOT, reason="making a device needs root")
def test_a_device_stays_a_device(tasks, tmp_path, capsys):
    device = tmp_path / "null"
    try:
        os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        device.open("rb").close()
    except PermissionError:
        pytest.skip("no devices here")
    assert call("worlds", "inspect", tasks, "--json", device) == 0
    assert call("worlds", "sample", device, "--num-tasks", 1, "--num-states", 8, "--overwrite") == 0
    assert call("worlds", "filter", tasks, device, "--min-advantage", 0) == 0
    assert stat.S_ISCHR(device.stat().st_mode)
    assert [p.name for p in tmp_path.iterdir()] == ["null"]


# ---- saved before it is printed ------------------------------------------------------------------------------------------


class Deaf(io.StringIO):
    """A terminal that is gone."""

    def write(self, text):
        raise OSError("the terminal is gone")


def results(small, tasks, tmp_path):
    shards = tmp_path / "shards"
    tiny = ["--num-tasks", 1, "--num-states", 8]
    return {
        "worlds inspect": [tasks],
        "worlds sample": [tmp_path / "s", *tiny],
        "worlds filter": [tasks, tmp_path / "k", "--min-advantage", 0],
        "worlds draw": [tasks, "--out", tmp_path / "d.png"],
        "worlds difficulty": [tmp_path / "w.png", "--num-tasks", 2, "--num-states", 16],
        "worlds shards": [shards, "--num-tasks", 2, "--num-states", 8, 8, "--workers", 1],
        "dataset": [shards],
        "distill": [tmp_path / "r", "--tasks", 1, "--steps", 1, "--batch", 1, "--workers", 1],
        "eval": ["--tasks", tasks, "--checkpoint", small, "--steps", 20],
        "context": ["--steps", 100, "--num-states", 8, "--checkpoint", small],
    }


@pytest.mark.parametrize("stdout", ["ascii", "gone"])
def test_results_are_saved_before_they_are_printed(stdout, small, tasks, tmp_path, monkeypatch):
    for name, args in results(small, tasks, tmp_path).items():
        stream = Deaf() if stdout == "gone" else io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        numbers = tmp_path / f"{name}.json"
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stream)
            call(*name.split(), *args, "--json", numbers)
        assert json.loads(numbers.read_text(), parse_constant=pytest.fail), name
    for picture in ("d.png", "w.png"):
        assert (tmp_path / picture).read_bytes()[:4] == b"\x89PNG"


def test_one_task_is_sampled_inspected_drawn_filtered_and_judged(small, tmp_path):
    for kind in ("anymdp", "garnet", "bandit", "pomdp"):
        file, numbers = tmp_path / kind, tmp_path / f"{kind}.json"
        assert call("worlds", "sample", file, "--kind", kind, "--num-tasks", 1, "--num-states", 8) == 0
        for command in (["worlds", "inspect"], ["worlds", "draw"], ["eval", "--steps", 20, "--checkpoint", small]):
            out = ["--out", tmp_path / "d.png"] if "draw" in command else []
            given = ["--tasks", file] if "eval" in command else [file]
            assert call(*command, *given, *out, "--json", numbers) == 0
            assert json.loads(numbers.read_text(), parse_constant=pytest.fail)
        filtered = ["worlds", "filter", file, tmp_path / f"{kind}-kept", "--min-advantage", -100, "--min-gini", -1]
        assert call(*filtered, "--min-entropy", -1) == (2 if kind == "bandit" else 0)


@pytest.mark.parametrize(
    "command", ["inspect TASKS", "sample OUT --num-tasks 1", "filter TASKS OUT", "draw TASKS --out OUT"]
)
def test_numbers_do_not_replace_another_file_of_the_command(command, tasks, tmp_path, capsys):
    """Not the tasks that it reads, nor what it writes; by whatever name."""
    given, out = tmp_path / "t.safetensors", tmp_path / "out.png"
    given.write_bytes(tasks.read_bytes())
    (tmp_path / "link").symlink_to(out if "OUT" in command else given)
    words = [{"TASKS": given, "OUT": out}.get(word, word) for word in command.split()]
    assert call("worlds", *words, "--json", tmp_path / "link") == 2
    assert "json: wanted a file of its own" in capsys.readouterr().err
    assert given.read_bytes() == tasks.read_bytes()
    assert not out.exists()
