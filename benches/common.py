"""Timing, machine facts and result files shared by every bench."""

from __future__ import annotations

import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def interleaved(functions: dict[str, Callable[[], Any]], repeats: int = 9, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of each run; the functions take turns, so that a slow spell of the machine hits all of them."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    cuda = torch.cuda.is_available()
    for i in range(warmup + repeats):
        for name, f in functions.items():
            if cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            f()
            if cuda:
                torch.cuda.synchronize()
            if i >= warmup:
                times[name].append(time.perf_counter() - start)
    return times


class Worker:
    """A process that lives on and answers each line with a line, so that several can be asked in turn on one machine.

    `ready` is the line that it prints first.
    """

    def __init__(self, *command: str, env: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        )
        self.ready = self._line()

    def ask(self, line: str) -> str:
        assert self.process.stdin
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        return self._line()

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()

    def _line(self) -> str:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a worker died: {self.process.args}")
        return line.strip()


def summary(seconds: list[float]) -> dict[str, float]:
    return {"median_ms": statistics.median(seconds) * 1e3, "best_ms": min(seconds) * 1e3, "runs": len(seconds)}


def machine() -> dict[str, Any]:
    from icrl_kernels import _C

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), platform.processor())
    return {
        "cpu": cpu,
        "kernels": _C.isa(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def write(name: str, rows: list[dict[str, Any]], **more: Any) -> Path:
    """Write benches/results/<name>.json: rows with the machine, versions, commit and command that made them."""
    import icrl_kernels
    from icrl.files import write_json

    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=RESULTS.parent
    ).stdout
    record = {
        "command": " ".join(["python -m benches." + Path(sys.argv[0]).stem, *sys.argv[1:]]),
        "icrl_kernels": icrl_kernels.__version__,
        "commit": commit.strip(),
        "machine": machine(),
        **more,
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    write_json(path, record)
    return path
