"""A command's process: closed streams, readers that leave, terminals of any width, Ctrl-C, other people's environments."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from icrl import cli
from icrl.cli import COMMANDS, main

ROOT = Path(cli.__file__).parents[1]  # of the package under test, which may be an installed one
ICRL = [sys.executable, "-m", "icrl.cli"]
SAMPLE = ["worlds", "sample", "t.safetensors", "--num-tasks", "2", "--num-states", "8", "--json", "t.json"]


def icrl(*args: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    given = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([*ICRL, *args], cwd=cwd, env=given, capture_output=True, text=True, timeout=60)


def shell(line: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    line = line.replace("icrl", " ".join(ICRL)).replace("SAMPLE", " ".join([*ICRL, *SAMPLE]))
    given = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(["bash", "-c", line], cwd=cwd, env=given, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("columns", ["0", "1", "2", "7", "39", "1000000000", "9" * 30, "-5", "abc"])
@pytest.mark.parametrize("lines", ["0", "abc"])
def test_help_ends_in_any_terminal(columns, lines, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("LINES", lines)
    with pytest.raises(SystemExit) as end:
        main(["worlds", "sample", "--help"])
    assert end.value.code == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) < 200
    assert os.environ["COLUMNS"] == columns


@pytest.mark.parametrize("command", list(COMMANDS))
def test_help_of_every_command_in_a_narrow_terminal(command, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "1")
    with pytest.raises(SystemExit) as end:
        main([*command.split(), "--help"])
    assert end.value.code == 0
    assert "--json" in capsys.readouterr().out


@pytest.mark.parametrize(
    "line", ["icrl train value-iteration-network --help | true", "SAMPLE | true", "SAMPLE 2>&1 | true"]
)
def test_a_reader_that_leaves_is_no_error(line, tmp_path):
    done = shell(f"{line}; exit ${{PIPESTATUS[0]}}", tmp_path)
    assert done.returncode == 128 + signal.SIGPIPE
    assert "icrl:" not in done.stderr
    assert "Broken pipe" not in done.stderr
    assert (tmp_path / "t.json").exists() == ("SAMPLE" in line)


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", "<&- >&- 2>&-"])
def test_closed_streams(closed, tmp_path):
    done = shell(f"SAMPLE {closed}", tmp_path)
    assert done.returncode == 0
    assert "Error" not in done.stderr
    assert (tmp_path / "t.json").read_text().startswith("{\n")
    assert (tmp_path / "t.safetensors").stat().st_size > 1000


def test_a_full_disk_behind_stdout(tmp_path):
    done = shell("SAMPLE > /dev/full", tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "icrl: not all could be printed: No space left on device"
    assert (tmp_path / "t.json").exists()


def test_an_encoding_that_lacks_a_character(tmp_path):
    assert icrl(*SAMPLE, cwd=tmp_path).returncode == 0
    done = icrl("worlds", "inspect", "t.safetensors", cwd=tmp_path, PYTHONIOENCODING="ascii", LC_ALL="C")
    assert done.returncode == 0
    assert "?=0.994" in done.stdout


@pytest.mark.parametrize(
    "environment",
    [
        {"MPLBACKEND": "module://matplotlib_inline.backend_inline"},
        {"MPLBACKEND": "no such backend", "TERM": "dumb", "NO_COLOR": "1"},
        {"PYTHONOPTIMIZE": "2", "PYTHONHASHSEED": "7"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"HOME": "/proc/none", "XDG_CACHE_HOME": "/proc/none", "XDG_CONFIG_HOME": "/proc/none", "TMPDIR": "/proc/none"},
    ],
    ids=lambda e: "+".join(e),
)
def test_other_peoples_environments(environment, tmp_path):
    assert icrl(*SAMPLE, cwd=tmp_path, **environment).returncode == 0
    done = icrl("worlds", "draw", "t.safetensors", "--out", "t.svg", cwd=tmp_path, **environment)
    assert (done.returncode, done.stdout) == (0, "picture: t.svg\n"), done.stderr
    assert "<svg" in (tmp_path / "t.svg").read_text()


def test_help_without_docstrings(tmp_path):
    assert icrl("train", "value-iteration-network", "--help", cwd=tmp_path, PYTHONOPTIMIZE="2").returncode == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("at_work", [False, True], ids=["importing torch", "at work"])
def test_a_signal_is_no_error(number, at_work, tmp_path):
    """Ctrl-C is one line and 130; SIGTERM ends the process in silence."""
    given = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([*ICRL, "context"], cwd=tmp_path, env=given, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        if at_work:
            process.stderr.read(10)  # of the progress bar
        else:
            while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
                time.sleep(0.01)
        process.send_signal(number)
        err = process.communicate(timeout=60)[1].replace("\r", "\n")
    assert "Traceback" not in err
    if number == signal.SIGINT:
        assert (process.returncode, err.splitlines()[-1]) == (130, "icrl: interrupted")
    else:
        assert process.returncode == -signal.SIGTERM
        assert "icrl:" not in err


def test_a_command_in_the_background_is_not_interrupted(tmp_path):
    """A shell has such a process ignore SIGINT."""
    done = shell("trap '' INT; SAMPLE & p=$!; sleep 0.8; kill -INT $p; sleep 0.4; kill -INT $p; wait $p", tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "t.json").exists()
