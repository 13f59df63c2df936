"""`python -m benches.plots`: draw results/ops_cpu.png and results/time_per_token_cpu.png from the result files."""

from __future__ import annotations

from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benches.common import RESULTS
from icrl.files import write_figure
from icrl.reading import read_json

OPS = ("gla", "gsa", "gated_delta_rule", "rwkv7")
BLUE, GREY, INK = "#3b6fb6", "#b8bec9", "#333333"


def result(name: str) -> dict[str, Any]:
    return read_json(RESULTS / f"{name}.json")


def machine(record: dict[str, Any]) -> str:
    m = record["machine"]
    return f"{m['cpu']}, {m['threads']} threads, torch {m['torch']}, float32"


def bare(axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK, labelsize=9)


def bars() -> None:
    """ms of each op beside torch's best chunkwise form, forward and forward + backward, on a log scale."""
    records = {op: result(f"{op}_cpu") for op in OPS}
    shape = "4x4096x4x64"
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="constrained")
    for axes, what in zip(panels, ("forward", "fwd+bwd"), strict=True):
        rows = [
            (op if x["gate"] in ("slot", "channel") and op in ("gsa", "rwkv7") else f"{op}, gate {x['gate']}", x)
            for op in OPS
            for x in records[op]["rows"]
            if x["what"] == what and x["shape"] == shape
        ]
        for y, (_, x) in enumerate(rows):
            axes.barh(y - 0.2, x["ms"], 0.38, color=BLUE, label="icrl_kernels" if y == 0 else None)
            axes.barh(y + 0.2, x["torch ms"], 0.38, color=GREY, label="torch, best chunk" if y == 0 else None)
            axes.text(x["torch ms"] * 1.06, y + 0.2, f"{x['torch x']:.1f}×", va="center", fontsize=9, color=INK)
        axes.set_xscale("log")
        axes.set_xlim(left=min(x["ms"] for _, x in rows) / 2, right=max(x["torch ms"] for _, x in rows) * 2)
        axes.set_yticks(range(len(rows)), [name for name, _ in rows])
        axes.set_xlabel("ms, log scale (shorter is better)", fontsize=9)
        axes.set_title("forward" if what == "forward" else "forward + backward", fontsize=11, loc="left")
        bare(axes)
    panels[0].invert_yaxis()
    figure.legend(
        *panels[0].get_legend_handles_labels(), frameon=False, fontsize=9, ncols=2, loc="outside lower center"
    )
    figure.suptitle(f"B=4 T=4096 H=4 D=64 ({machine(records['gla'])})", fontsize=11, x=0.01, ha="left")
    write_figure(RESULTS / "ops_cpu.png", figure, dpi=130)


def time_per_token() -> None:
    figure, panels = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for axes, what in zip(panels, ("forward", "fwd+bwd"), strict=True):
        for op, colour in zip(OPS, ("#3b6fb6", "#c8553d", "#4d9a6a", "#8a63b0"), strict=True):
            record = result(f"{op}_sweep_cpu")
            rows = [x for x in record["rows"] if x["what"] == what]
            xs, ys = [x["T"] for x in rows], [x["ns per token and head"] for x in rows]
            axes.plot(xs, ys, marker="o", markersize=4, color=colour, label=op)
        axes.set_xscale("log")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("tokens in one call", fontsize=9)
        axes.set_title("forward" if what == "forward" else "forward + backward", fontsize=11, loc="left")
        bare(axes)
    panels[0].set_ylabel("ns per token and head", fontsize=9)
    figure.legend(
        *panels[0].get_legend_handles_labels(), frameon=False, fontsize=9, ncols=4, loc="outside lower center"
    )
    figure.suptitle(f"Time per token, B=1 H=2 D=64 ({machine(record)})", fontsize=11, x=0.01, ha="left")
    write_figure(RESULTS / "time_per_token_cpu.png", figure, dpi=130)


if __name__ == "__main__":
    bars()
    time_per_token()
