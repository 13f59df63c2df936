"""Every op, by whatever door, refuses a malformed call with an error that names the argument, and the process lives on.

`malformed.py` makes the calls and judges them; `malformed_worker.py` runs them in processes of their own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import malformed
import pytest
import torch
from malformed import Arg, Variant

HERE = Path(__file__).parent
WORKERS = 2
STILL = 180  # seconds without a call, after which a process hangs
MOST_DEATHS = 400


@dataclass
class Report:
    judged: Counter = field(default_factory=Counter)  # calls by verdict
    doors: Counter = field(default_factory=Counter)  # malformed calls by door
    failures: list[tuple[str, str]] = field(default_factory=list)  # (call, what is wrong)

    def read(self, path: Path) -> tuple[int, str]:
        """Add a worker's lines. Returns the index that it was at and the call that it did not end, "" if it ended all."""
        at, call = 0, ""
        for line in path.read_text().splitlines() if path.exists() else ():
            entry = json.loads(line)
            if "wrong" in entry:
                if entry["wrong"]:
                    self.failures.append((call, entry["wrong"]))
                call = ""
            else:
                at, call = entry["i"], entry["call"]
                self.judged[entry["kind"]] += 1
                if entry["kind"] == "refused":
                    self.doors[entry["door"]] += 1
        return at, call

    def text(self) -> str:
        kinds = defaultdict(list)
        for call, wrong in self.failures:
            kinds[wrong.split(":")[0].split(",")[0]].append(f"{call} -> {wrong}")
        lines = [f"{len(self.failures)} of {sum(self.judged.values())} calls went wrong"]
        for kind, calls in sorted(kinds.items(), key=lambda x: -len(x[1])):
            lines += [f"-- {kind} ({len(calls)})", *calls[:15], *(["..."] if len(calls) > 15 else [])]
        return "\n".join(lines)


def environment() -> dict[str, str]:
    """The package that this process tests is the one that its children test."""
    root = str(Path(malformed_package()).parent)
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    more = {"PYTHONPATH": os.pathsep.join(paths), "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, **more}


def malformed_package() -> str:
    import icrl_kernels

    return icrl_kernels.__path__[0]


def make_calls(count: int, seed: int, folder: Path) -> Report:
    """`count` malformed calls, in WORKERS processes at a time; a process that dies is followed by another."""
    report = Report()
    edges = [count * i // WORKERS for i in range(WORKERS + 1)]
    left = [(first, last) for first, last in pairwise(edges) if first < last]
    running: list[tuple[subprocess.Popen, Path, int, int]] = []
    started = deaths = 0
    try:
        while left or running:
            while left and len(running) < WORKERS:
                first, last = left.pop()
                path = folder / f"{started}.jsonl"
                path.touch()
                command = [
                    sys.executable,
                    str(HERE / "malformed_worker.py"),
                    str(seed),
                    str(first),
                    str(last),
                    str(path),
                ]
                with open(folder / f"{started}.txt", "w") as said:
                    child = subprocess.Popen(command, env=environment(), stdout=said, stderr=said)
                running.append((child, path, first, last))
                started += 1
            time.sleep(0.05)
            for entry in list(running):
                child, path, first, last = entry
                hangs = child.poll() is None and time.time() - path.stat().st_mtime > STILL
                if hangs:
                    child.kill()
                    child.wait()
                if child.poll() is None:
                    continue
                running.remove(entry)
                at, call = report.read(path)
                if child.returncode:
                    deaths += 1
                    said = path.with_suffix(".txt").read_text().strip().splitlines()[-1:]
                    wrong = f"hangs for {STILL} s" if hangs else f"the process ends with {child.returncode}: {said}"
                    report.failures.append((call or "between calls", wrong))
                    if (call and call.endswith("a valid call")) or not call:
                        left.clear()  # nothing works
                    elif at + 1 < last and deaths < MOST_DEATHS:
                        left.append((at + 1, last))
    finally:
        for child, *_ in running:
            child.kill()
            child.wait()
    return report


def check(report: Report, count: int, capsys) -> None:
    with capsys.disabled():
        by_entry = Counter(door.split(", ")[0] for door in report.doors.elements())
        print(f"\n{sum(report.doors.values())} malformed calls at {len(report.doors)} doors, {dict(report.judged)}")
        print(f"by op: {dict(by_entry)}")
    assert not report.failures, report.text()
    assert report.judged["refused"] >= count


def test_malformed_calls_are_refused_by_name(tmp_path, capsys):
    check(make_calls(2_000, 1, tmp_path), 2_000, capsys)


@pytest.mark.slow
def test_many_malformed_calls_are_refused_by_name(tmp_path, capsys):
    check(make_calls(12_000, 2, tmp_path), 12_000, capsys)


# ---- the judge ----------------------------------------------------------------------------------------------------------

PAIR = Variant(
    "pair",
    (
        Arg("q", ("B T K",), (torch.float32, torch.float16)),
        Arg("k", ("B T K",), "as q"),
        Arg("g", ("B T", "B T K"), "as q or float32", optional=True),
        Arg("state", ("B K 2",), "q or wider", dense="refused", also=("state[0]",)),
        Arg("n", type=int, wants=lambda n: n > 0),
    ),
    lambda rng: {},
)


def pair(**changes):
    q, state = torch.zeros(2, 5, 3), torch.zeros(2, 3, 2)
    return malformed.judge(PAIR, {"q": q, "k": q, "g": None, "state": state, "n": 1} | changes)


def test_judge_knows_valid_calls():
    assert pair().kind == "valid"
    assert pair(g=torch.zeros(2, 5)).kind == "valid"
    assert pair(g=torch.zeros(2, 5, 3)).kind == "valid"
    half = torch.zeros(2, 5, 3).half()
    assert pair(q=half, k=half, g=torch.zeros(2, 5)).kind == "valid"
    assert pair(k=torch.zeros(5, 2, 3).transpose(0, 1)).kind == "valid"


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"q": None}, {"q"}),
        ({"n": 1.5}, {"n"}),
        ({"n": 0}, {"n"}),
        ({"n": True}, {"n"}),
        ({"k": torch.zeros(2, 5)}, {"k"}),
        ({"k": torch.zeros(2, 6, 3)}, {"k", "q"}),
        ({"k": torch.zeros(2, 5, 3).double()}, {"k", "q"}),
        ({"g": torch.zeros(2, 5).half()}, {"g", "q"}),
        ({"state": torch.zeros(2, 3, 3)}, {"state", "state[0]"}),
        ({"state": torch.zeros(2, 2, 3).transpose(1, 2)}, {"state", "state[0]"}),
        ({"k": torch.zeros(2, 5, 3, device="meta")}, {"k", "q"}),
    ],
)
def test_judge_names_what_is_wrong(changes, names):
    verdict = pair(**changes)
    assert verdict.kind == "refused"
    assert names <= verdict.names
    assert verdict.type_error == (changes.keys() <= {"q", "n"} and changes.get("n") != 0)


@pytest.mark.parametrize(
    ("message", "names"),
    [
        ("q: wanted shape [B, T], got [2]", {"q"}),
        ("initial_state[0]: wanted", {"initial_state[0]", "initial_state"}),
        ("policies[0, 1, 2]: wanted one", {"policies"}),
        ("tables.offset: wanted", {"tables.offset", "offset", "tables"}),
        ("discount, bonus, sweeps: wanted", {"discount", "bonus", "sweeps"}),
        ("backend='triton' serves gla on cuda", {"backend"}),
        ("icrl::gla() Expected a value of type 'Tensor' for argument 'q' but instead found", {"q"}),
        ("state.task[1] is 7, but there are 2 tasks", {"state.task", "task"}),
        ("action of record 3 is -1, but its task has 3 actions", {"action"}),
        ("wanted a contiguous tensor of q", set()),
        ("tables are made on the CPU, got: q", set()),
    ],
)
def test_names_are_read_from_messages(message, names):
    found = malformed.named(message)
    assert names <= found
    assert bool(names) == bool(found)
