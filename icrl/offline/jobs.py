"""Training runs in processes of their own, some at a time, under one progress bar."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from icrl.files import appending
from icrl.reading import read_rows


@dataclass(frozen=True, eq=False)
class Job:
    """A training run in a process of its own."""

    folder: Path
    updates: int
    arguments: list[object]
    """Of the `icrl` command."""
    needs: Path | None = None
    """A file that another job makes first."""

    def done(self) -> int:
        """Updates, as the run's log has it."""
        try:
            return read_rows(self.folder / "metrics.jsonl")[-1]["update"]
        except (OSError, IndexError, ValueError):  # no log or no whole line yet; a damaged log is the run's to refuse
            return 0

    def start(self, log: Path, threads: int) -> subprocess.Popen[bytes]:
        line = [sys.executable, "-P", "-m", "icrl.cli", *map(str, self.arguments)]
        # this very package, whatever lies in the working directory: a source tree has no extension before it is built
        path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
        with appending(log) as out:
            return subprocess.Popen(
                line,
                env={**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": path},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                preexec_fn=_end_with_parent if sys.platform == "linux" else None,
            )


_libc = ctypes.CDLL(None)


def _end_with_parent() -> None:
    """A child of a process that is killed would go on in a folder that the next call takes over."""
    _libc.prctl(1, signal.SIGTERM)  # 1: PR_SET_PDEATHSIG


def run_jobs(jobs: list[Job], at_once: int, title: str) -> None:
    """Run them in this order, `at_once` at a time, under one bar; when this ends, however it ends, so have they.

    Raises ChildProcessError with the last line of the first that failed; all that a job printed is in `<folder>.log`.
    """
    waiting, running = list(jobs), dict[Job, subprocess.Popen[bytes]]()
    done = {job.folder: job.done() for job in jobs}
    threads = max(1, (os.cpu_count() or 1) // at_once)
    bar = tqdm(
        total=sum(job.updates for job in jobs), initial=sum(done.values()), desc=title, unit="update", smoothing=0
    )

    def log(job: Job) -> Path:
        return job.folder.with_name(job.folder.name + ".log")

    try:
        while waiting or running:
            ready = [job for job in waiting if job.needs is None or job.needs.exists()]
            for job in ready[: at_once - len(running)]:
                waiting.remove(job)
                running[job] = job.start(log(job), threads)
            time.sleep(0.2)
            for job, process in list(running.items()):
                if (code := process.poll()) is None:
                    done[job.folder] = max(done[job.folder], job.done())
                    continue
                del running[job]
                done[job.folder] = job.updates
                said = [x for x in log(job).read_text(errors="replace").replace("\r", "\n").split("\n") if x.strip()]
                if code:
                    why = said[-1].removeprefix("icrl: ") if said and code > 0 else f"killed by signal {-code}"
                    raise ChildProcessError(f"{job.folder.name} failed: {why} (see {log(job)})")
                bar.write(f"{job.folder.name}: {said[-1] if said else 'done'}")
            bar.set_postfix_str(", ".join(f"{job.folder.name} {done[job.folder]}" for job in running), refresh=False)
            bar.update(sum(done.values()) - bar.n)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
        bar.close()
