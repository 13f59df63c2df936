"""A run's folder: held by one process, and its log after kills, full disks and power cuts."""

import json
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch

from icrl import files
from icrl.cli import main
from icrl.training import checkpoint, process
from icrl.training.config import LoopConfig
from icrl.training.loop import train
from icrl.training.run import Run

LOOP = LoopConfig(updates=6, checkpoint_every=2, evaluate_every=6, log_every=1, device="cpu")
HOLDER = "import fcntl, sys, time; f = open(sys.argv[1], 'ab'); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True); time.sleep(60)"


class Stopped(Exception):
    pass


class Counting:
    """A learner whose loss is the update's number, and which stops at an update."""

    def __init__(self, stop_at=None):
        self.model, self.stop_at = torch.nn.Linear(1, 1), stop_at

    def config(self):
        return {}

    def hidden_matrices(self):
        return []

    def losses(self, update):
        if update == self.stop_at:
            raise Stopped
        yield (self.model.weight * 0).sum(), {"loss": float(update)}

    def evaluate(self):
        return {"score": 1.0}

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass

    def save_model(self, path, **facts):
        checkpoint.save(path, self.model.state_dict(), facts)


def rows(folder):
    return [
        {k: v for k, v in json.loads(line).items() if k != "seconds"}
        for line in (folder / "metrics.jsonl").read_text().split("\n")[:-1]
    ]


# ---- one process -----------------------------------------------------------------------------------------------------------


def test_a_folder_in_use_is_refused_and_left_alone(tmp_path):
    folder = tmp_path / "run"
    for begun in (False, True):
        if begun:
            with pytest.raises(Stopped):
                train(Counting(stop_at=5), LOOP, folder)
            (folder / "checkpoints" / "00000006.part").mkdir()  # the other's, which is being written
        else:
            folder.mkdir()
        before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
        with subprocess.Popen([sys.executable, "-c", HOLDER, folder / ".lock"], stdout=subprocess.PIPE) as other:
            assert other.stdout.readline() == b"1\n"
            with pytest.raises(ValueError, match=f"^out: another process is at work in {folder}$"):
                train(Counting(), LOOP, folder)
            other.kill()  # its lock ends with it
        assert before.items() <= {p: p.stat().st_mtime_ns for p in folder.rglob("*")}.items()
    train(Counting(), LOOP, folder)
    assert [r["update"] for r in rows(folder)] == [1, 2, 3, 4, 5, 6, 6]


def test_a_folder_is_free_again_however_training_ends(tmp_path):
    with pytest.raises(Stopped) as kept:  # and with it all that its frames hold
        train(Counting(stop_at=3), LOOP, tmp_path / "run")
    with pytest.raises(ValueError, match="another configuration"):
        train(Counting(), replace(LOOP, clip=3.0), tmp_path / "run")
    train(Counting(), LOOP, tmp_path / "run")
    train(Counting(), LOOP, tmp_path / "run")
    assert kept.type is Stopped


@pytest.mark.parametrize("left", [[], [".lock"], [".lock", "config.json.part"]])
def test_what_a_kill_before_the_first_record_leaves_is_no_obstacle(left, tmp_path):
    for name in left:
        (tmp_path / name).write_text("")
    train(Counting(), LOOP, tmp_path)
    assert not list(tmp_path.rglob("*.part"))


def test_every_process_of_a_group_says_why_its_first_one_refuses(tmp_path, monkeypatch):
    """As in a process of rank 1: it takes no lock, and raises what rank 0 found."""
    monkeypatch.setattr("icrl.training.run.rank", lambda: 1)
    monkeypatch.setattr("icrl.training.run.of_the_first", lambda value: value or "out: another process is at work")
    with pytest.raises(ValueError, match="another process"):
        Run(tmp_path / "run", {"loop": asdict(LOOP)})
    assert not (tmp_path / "run").exists()
    assert process.of_the_first("alone") == "alone"


# ---- the log ---------------------------------------------------------------------------------------------------------------

TAILS = {
    "nothing": b"",
    "a torn row": b'{"update": 5, "lo',
    "a torn row and a newline": b'{"update": 5, "lo\n',
    "one byte": b"{",
    "an empty line": b"\n",
    "zeros of a power cut": bytes(4096),
    "zeros, then a row": bytes(100) + b'{"update": 5, "loss": 4.0}\n',
    "half a character": '{"update": 4, "név": 1}\n'.encode()[:15],
    "half a character and a newline": '{"update": 4, "név": 1}\n'.encode()[:15] + b"\n",
    "a row of a later update": b'{"update": 5, "loss": 4.0}\n',
    "a later row without its newline": b'{"update": 5, "loss": 4.0}',
    "no object": b"5\n[5]\nnull\n",
    "an update that is no number": b'{"update": "1"}\n{"update": null}\n{"update": true}\n{"update": 1.5}\n{}\n',
    "a deep row": b"[" * 100_000 + b"\n",
    "a long number": b'{"update": ' + b"9" * 5000 + b"}\n",
    "a separator within a line": '{"update": 5, "a\u2028{"update": 1}\n'.encode(),
}


@pytest.mark.parametrize("tail", TAILS)
def test_a_log_goes_on_without_what_was_torn(tail, tmp_path):
    train(Counting(), LOOP, tmp_path / "whole")
    with pytest.raises(Stopped):
        train(Counting(stop_at=4), LOOP, tmp_path / "run")
    log = tmp_path / "run" / "metrics.jsonl"
    log.write_bytes(log.read_bytes() + TAILS[tail])
    train(Counting(), LOOP, tmp_path / "run")
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")


def test_a_whole_row_whose_newline_is_torn_is_kept(tmp_path):
    train(Counting(), LOOP, tmp_path / "whole")
    with pytest.raises(Stopped):
        train(Counting(stop_at=4), LOOP, tmp_path / "run")
    log = tmp_path / "run" / "metrics.jsonl"
    log.write_bytes(log.read_bytes()[:-1])
    train(Counting(), LOOP, tmp_path / "run")
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")


def test_a_log_is_never_rewritten_in_place(tmp_path):
    """What reads the log, or holds it open, keeps what it has."""
    with pytest.raises(Stopped):
        train(Counting(stop_at=3), LOOP, tmp_path / "run")
    log = tmp_path / "run" / "metrics.jsonl"
    with open(log, "rb") as held:
        before = log.read_bytes()
        train(Counting(), LOOP, tmp_path / "run")
        assert held.read() == before
    assert [r["update"] for r in rows(tmp_path / "run")] == [1, 2, 3, 4, 5, 6, 6]


@pytest.mark.parametrize("room", [1, 20, 300])
def test_a_disk_that_fills_up_in_the_log_is_no_end(room, tmp_path, monkeypatch):
    """The row is written as far as there is room, the run ends in one line, and goes on once there is more."""
    train(Counting(), LOOP, tmp_path / "whole")
    written = files.append_text

    def full(path, text):
        nonlocal room
        written(path, text[:room])
        room -= len(text)
        if room < 0:
            raise OSError(f"cannot write {path} (No space left on device)")

    with monkeypatch.context() as patch:
        patch.setattr("icrl.training.run.append_text", full)
        with pytest.raises(OSError, match=r"cannot write .*metrics\.jsonl .No space left on device."):
            train(Counting(), LOOP, tmp_path / "run")
    train(Counting(), LOOP, tmp_path / "run")
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")


def test_one_update_of_one_record_of_one_step(tmp_path):
    model = {"layers": 1, "action_width": 8, "state_width": 12, "value_width": 4, "pool_heads": 1}
    training = {"model": model, "data": {"batch": 1, "steps": 1}, "segment": 1, "dagger": 0.0}
    training |= {"evaluation_tasks": 1, "evaluation_steps": 2}
    loop = {"updates": 1, "checkpoint_every": 1, "evaluate_every": 1, "log_every": 1, "warmup": 1, "device": "cpu"}
    (tmp_path / "c.json").write_text(json.dumps({"training": training, "loop": loop}))
    args = [
        "train",
        "value-iteration-network",
        "--config",
        tmp_path / "c.json",
        "--out",
        tmp_path / "run",
        "--json",
        tmp_path / "n.json",
    ]
    for _ in range(2):
        assert main([str(a) for a in args]) == 0
    assert [r["update"] for r in rows(tmp_path / "run")] == [1, 1]
    (tmp_path / "run" / "metrics.jsonl").unlink()  # the picture has nothing to show
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    assert main([str(a) for a in args]) == 0
