"""Do two builds compute the same bits? A list of named calls, run in both, compared hash by hash.

    python benches/compare_bits OLD_SITE NEW_SITE [--isa avx2] [--only gla] [--json out.json]

Each site is a folder to put on PYTHONPATH. For each instruction set that the machine has, one process a build runs every
call; a call's result is the dtype, the shape and the SHA-256 of each tensor that it returns, or the error that it raises.
The exit status is 1 where a call differs, or raises what nobody asked for. `--list` prints the names.

This folder is run by both builds, so it imports public names, and what has moved by its new place or else its old one.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from calls import CALLS, REFUSED, flatten
from kernels import kernel_calls
from layers import layer_calls, swap_calls
from learning import learning_calls
from offline import offline_calls
from tabular import tabular_calls
from worlds import world_calls

ISAS = ("avx512", "avx2", "generic")
PARTS = (kernel_calls, tabular_calls, layer_calls, world_calls, learning_calls, offline_calls, swap_calls)


# ---- one build -----------------------------------------------------------------------------------------------------


def chosen(name: str, only: list[str]) -> bool:
    return not only or any(name.startswith(o) or name.startswith(REFUSED + o) for o in only)


def run_calls(out: Path, only: list[str]) -> None:
    """In a build's own process: one JSON line a call, the name of each written before it begins."""
    import torch

    import icrl_kernels
    from icrl_kernels.info import info

    torch.set_num_threads(1)
    for part in PARTS:
        part()
    site = str(Path(icrl_kernels.__file__).parents[1])
    with open(out, "w") as f:
        facts = {"file": icrl_kernels.__file__, "isa": info()["CPU kernels"], "torch": torch.__version__}
        print(json.dumps({"facts": facts}), file=f, flush=True)
        for name in [n for n in CALLS if chosen(n, only)]:
            print(json.dumps({"begins": name}), file=f, flush=True)
            found: dict[str, str] = {}
            begin = time.perf_counter()
            with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
                try:
                    flatten("", CALLS[name](), found)
                except ModuleNotFoundError as error:
                    theirs = str(error.name).split(".")[0] not in ("icrl", "icrl_kernels")
                    found = {"skipped" if theirs else "raises": f"{type(error).__name__}: {error}"}
                except Exception as error:
                    found = {"raises": f"{type(error).__name__}: {error}".replace(folder, "").replace(site, "")}
            seconds = round(time.perf_counter() - begin, 3)
            print(json.dumps({"call": name, "found": found, "seconds": seconds}), file=f, flush=True)


# ---- both builds ---------------------------------------------------------------------------------------------------


class Build:
    """A build's process for one instruction set, and what it has found."""

    def __init__(self, site: Path, isa: str, only: list[str], folder: Path, name: str) -> None:
        self.site, self.name = site, name
        self.out, self.log = folder / f"{name}.jsonl", folder / f"{name}.log"
        empty = folder / f"{name}.cwd"
        empty.mkdir()
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "2")
        env = {**os.environ, **threads, "ICRL_ISA": isa, "PYTHONPATH": str(site), "PYTHONHASHSEED": "0"}
        env |= {
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_WAIT_POLICY": "passive",
            "CUDA_VISIBLE_DEVICES": "",
            "TMPDIR": str(folder),
        }
        command = [sys.executable, "-P", str(Path(__file__).resolve().parent), "--calls", str(self.out)]
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [*command, *itertools.chain(*(("--only", o) for o in only))],
                env=env, cwd=empty, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def result(self) -> tuple[dict[str, Any], dict[str, dict[str, str]], dict[str, float]]:
        """Facts, hashes by call, and seconds. RuntimeError where the process ran no call, or another package."""
        status = self.process.wait()
        lines = [json.loads(x) for x in self.out.read_text().splitlines()] if self.out.exists() else []
        if not lines:
            raise RuntimeError(f"{self.site}: no call was made:\n{self.log.read_text()[-3000:]}")
        facts = lines[0]["facts"]
        if not Path(facts["file"]).resolve().is_relative_to(self.site.resolve()):
            raise RuntimeError(f"{self.site}: ran {facts['file']}")
        found = {x["call"]: x["found"] for x in lines if "call" in x}
        seconds = {x["call"]: x["seconds"] for x in lines if "call" in x}
        if status:  # e.g. killed by a signal within a call
            began = [x["begins"] for x in lines if "begins" in x and x["begins"] not in found]
            for name in began:
                found[name] = {"ended": f"the process ended with status {status}"}
            print(f"{self.site}: ended with status {status} in {began}\n{self.log.read_text()[-1000:]}")
        return facts, found, seconds


def isas_here() -> list[str]:
    """Those that this processor has."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return list(ISAS)
    has = {"avx512": "avx512f" in flags and "avx512bw" in flags, "avx2": "avx2" in flags and "fma" in flags}
    return [isa for isa in ISAS if has.get(isa, True)]


def differences(old: dict[str, str] | None, new: dict[str, str] | None) -> list[str]:
    if old is None or new is None:
        return [f"was not called in the {'old' if old is None else 'new'} build"]
    # fields may be added, and the count of fields with them
    names = [n for n in dict.fromkeys([*old, *new]) if n in old or n == "raises"]
    return [f"{n}: {old.get(n, 'absent')} -> {new.get(n, 'absent')}" for n in names if old.get(n) != new.get(n)]


def compare(old: Path, new: Path, isas: list[str], only: list[str], path: Path | None, slowest: int) -> int:
    report: dict[str, Any] = {"old": str(old), "new": str(new), "isas": {}}
    wrong = 0
    for isa in isas:
        begin = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            both = []
            try:
                both += [Build(site, isa, only, Path(folder), name) for site, name in ((old, "old"), (new, "new"))]
                (facts, before, seconds), (other, after, _) = (b.result() for b in both)
            finally:
                for b in both:
                    if b.process.poll() is None:
                        b.process.kill()
        calls = list(dict.fromkeys([*before, *after]))
        differ = {c: d for c in calls if (d := differences(before.get(c), after.get(c)))}
        raised = {c: before[c]["raises"] for c in calls if "raises" in before.get(c, {}) and c not in differ}
        unasked = {c: e for c, e in raised.items() if not c.startswith(REFUSED)}
        passed = [c for c in calls if c.startswith(REFUSED) and c not in raised and c not in differ]
        took = time.perf_counter() - begin
        same = len(calls) - len(differ)
        tensors = sum(len(f) for f in before.values())
        print(
            f"{isa} (kernels {facts['isa']}, {other['isa']}): {same} of {len(calls)} calls equal, {tensors} values, {took:.0f} s"
        )
        for call, d in differ.items():
            print(f"  DIFFERS {call}")
            for line in d[:6]:
                print(f"    {line[:300]}")
            if len(d) > 6:
                print(f"    and {len(d) - 6} more")
        if skipped := [c for c in calls if "skipped" in before.get(c, {})]:
            print(f"  {len(skipped)} calls skipped, as libraries are missing: {', '.join(skipped)}")
        for call, e in unasked.items():
            print(f"  RAISES in both {call}: {e[:300]}")
        for call in passed:
            print(f"  IS NOT REFUSED in both {call}")
        if slowest:
            for call in sorted(seconds, key=lambda c: -seconds[c])[:slowest]:
                print(f"  {seconds[call]:7.2f} s {call}")
        wrong += len(differ) + len(unasked) + len(passed) + (not calls)
        report["isas"][isa] = {
            "calls": len(calls), "equal": same, "differ": differ, "raise": unasked, "not refused": passed,
            "seconds": round(took, 1), "kernels": facts["isa"], "hashes": before,
        }  # fmt: skip
    if path is not None:
        path.write_text(json.dumps(report, indent=1) + "\n")
    return int(wrong > 0)


def arguments() -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sites", nargs="*", type=Path, metavar="SITE", help="the old one and the new one")
    parser.add_argument("--isa", action="append", choices=ISAS, help="all that the machine has unless given")
    parser.add_argument("--only", action="append", default=[], metavar="PREFIX", help="of the calls' names")
    parser.add_argument("--json", type=Path, help="write all hashes and differences here")
    parser.add_argument("--slowest", type=int, default=0, metavar="N", help="print the N slowest calls")
    parser.add_argument("--list", action="store_true", help="print the calls' names, of the package that is found here")
    parser.add_argument("--calls", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if not given.calls and not given.list and len(given.sites) != 2:
        parser.error("wanted two sites")
    return given


def main() -> int:
    given = arguments()
    if given.calls:
        run_calls(given.calls, given.only)
        return 0
    if given.list:
        for part in PARTS:
            part()
        print("\n".join(n for n in CALLS if chosen(n, given.only)))
        return 0
    old, new = (site.resolve() for site in given.sites)
    try:
        return compare(old, new, given.isa or isas_here(), given.only, given.json, given.slowest)
    except RuntimeError as error:
        print(error)
        return 1


if __name__ == "__main__":
    sys.exit(main())
