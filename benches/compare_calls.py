"""`python -m benches.compare_calls OLD_SITE NEW_SITE`: what small calls of two builds cost, in turns in one run.

Each site is a folder to put on PYTHONPATH. `gla` forward and backward on tensors of 64 floats, and `gla_step` for one
sequence of four heads, with each gate, on one thread: all of it is the way to C++ and back. Then the project's own functions
that one forward, and one backward, call. Results go to benches/results/calls.json.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

ROUNDS = 25


def worker(site: str) -> None:
    """Time every call whenever a line comes in; a line of JSON goes out. The first has the counts."""
    sys.path.insert(0, site)
    import torch

    import icrl_kernels

    torch.set_num_threads(1)
    calls: dict[str, tuple[Callable[[], Any], int]] = {}
    for gate, shape in (("none", None), ("head", (1, 1, 1)), ("channel", (1, 1, 1, 64))):
        q, k, v = (torch.randn(1, 1, 1, 64, requires_grad=True) for _ in range(3))
        g = None if shape is None else (-torch.rand(shape)).requires_grad_()

        def both(q: Any = q, k: Any = k, v: Any = v, g: Any = g) -> None:
            icrl_kernels.gla(q, k, v, g)[0].sum().backward()

        token = [torch.randn(1, 4, 64) for _ in range(3)]
        gates = None if shape is None else -torch.rand((1, 4, 64)[: len(shape) - 1])
        state = torch.zeros(1, 4, 64, 64)
        calls[f"gla forward + backward, gate {gate}"] = both, 300
        calls[f"gla_step, gate {gate}"] = lambda t=token, g=gates, s=state: icrl_kernels.gla_step(*t, g, s), 3000
    for call, _ in calls.values():
        call()

    def counted(call: Callable[[], Any]) -> tuple[int, Any]:
        seen = []

        def profile(frame: Any, event: str, arg: Any) -> None:
            if event == "call" and "/icrl_kernels/" in frame.f_code.co_filename:
                seen.append(frame.f_code.co_name)

        sys.setprofile(profile)
        result = call()
        sys.setprofile(None)
        return len(seen), result

    x = [torch.randn(1, 32, 2, 16, requires_grad=True) for _ in range(3)]
    forward, (o, _) = counted(lambda: icrl_kernels.gla(*x, -torch.rand(1, 32, 2, 16)))
    print(json.dumps({"forward": forward, "backward": counted(o.sum().backward)[0]}), flush=True)
    for _ in sys.stdin:
        times = {}
        for name, (call, count) in calls.items():
            begin = time.perf_counter()
            for _ in range(count):
                call()
            times[name] = (time.perf_counter() - begin) / count * 1e6
        print(json.dumps(times), flush=True)


def main(old: str, new: str) -> None:
    from benches.common import write

    line = [sys.executable, "-P", __file__, "--worker"]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    builds = [subprocess.Popen([*line, site], **pipes) for site in (old, new)]
    counts = [json.loads(b.stdout.readline()) for b in builds]  # pyright: ignore[reportOptionalMemberAccess]
    rounds: list[list[dict[str, float]]] = [[], []]
    for _ in range(ROUNDS):
        for b, found in zip(builds, rounds, strict=True):
            b.stdin.write("\n")  # pyright: ignore[reportOptionalMemberAccess]
            b.stdin.flush()  # pyright: ignore[reportOptionalMemberAccess]
            found.append(json.loads(b.stdout.readline()))  # pyright: ignore[reportOptionalMemberAccess]
    for b in builds:
        b.stdin.close()  # pyright: ignore[reportOptionalMemberAccess]
        b.wait()
    rows: list[dict[str, Any]] = []
    for name in rounds[0][0]:
        before, after = (statistics.median(r[name] for r in found) for found in rounds)
        rows.append({"call": name, "old_us": before, "new_us": after, "new_over_old": after / before})
        print(f"{name:40} {before:8.2f} -> {after:8.2f} us  {after / before:.3f}")
    for what in counts[0]:
        rows.append({"call": f"functions called by one gla {what}", "old": counts[0][what], "new": counts[1][what]})
        print(f"functions called by one gla {what:12} {counts[0][what]:8} -> {counts[1][what]:8}")
    print(write("calls", rows, command="python -m benches.compare_calls OLD_SITE NEW_SITE", worker_threads=1))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2])
    else:
        main(*sys.argv[1:])
