"""`python -m benches.first_call`: seconds from a fresh process to an op's first result, import and first call apart.

Nothing may be compiled or tuned at the first call: the limit is two seconds on a CPU. torch's own import is timed apart.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys

from benches.common import RESULTS, write
from benches.run import table

LIMIT = 2.0  # seconds, of a first call

CHILD = """
import json, sys, time
start = time.perf_counter()
import torch
torch_there = time.perf_counter()
import icrl_kernels
there = time.perf_counter()
x = torch.randn(1, 64, 4, 64)
g, beta, token = -x.abs(), torch.rand(1, 64, 4), x[:, 0].contiguous()
state = torch.zeros(1, 4, 64, 64)
P = torch.softmax(torch.randn(1, 8, 2, 8), -1)
calls = {
    "gla": lambda: icrl_kernels.gla(x, x, x, g),
    "gla_step": lambda: icrl_kernels.gla_step(token, token, token, g[:, 0], state),
    "gated_delta_rule": lambda: icrl_kernels.gated_delta_rule(x, x, x, g, beta),
    "gated_delta_rule_step": lambda: icrl_kernels.gated_delta_rule_step(token, token, token, g[:, 0], beta[:, 0], state),
    "gsa": lambda: icrl_kernels.gsa(x, x, x, x, g),
    "gsa_step": lambda: icrl_kernels.gsa_step(token, token, token, token, g[:, 0], (state, state.clone())),
    "rwkv7": lambda: icrl_kernels.rwkv7(x, g, x, x, x, x),
    "rwkv7_step": lambda: icrl_kernels.rwkv7_step(token, g[:, 0], token, token, token, token, state),
    "value_iteration": lambda: icrl_kernels.value_iteration(P, torch.randn(1, 8, 2), 0.9),
}
if sys.argv[1] == "names":
    print(json.dumps(list(calls)))
else:
    called = time.perf_counter()
    with torch.no_grad():
        calls[sys.argv[1]]()
    done = time.perf_counter()
    print(json.dumps({"torch s": torch_there - start, "import s": there - torch_there, "first call s": done - called}))
"""


def child(argument: str):
    done = subprocess.run([sys.executable, "-c", CHILD, argument], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def main() -> int:
    rows = []
    for op in child("names"):
        runs = [child(op) for _ in range(3)]
        rows.append({"op": op, **{name: statistics.median(run[name] for run in runs) for name in runs[0]}})
    print(table(rows))
    print(write("first_call", rows).relative_to(RESULTS.parent))
    late = [row["op"] for row in rows if row["first call s"] > LIMIT]
    if late:
        print(f"first call over {LIMIT} s: {', '.join(late)}", file=sys.stderr)
    return bool(late)


if __name__ == "__main__":
    sys.exit(main())
