"""Pictures: learning curves with intervals.

Figures are made without pyplot: the program's backend, and what it has open there, stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from icrl.figures import Figure

# isort: split
from matplotlib.axes import Axes


class Curve(Protocol):
    """A score over a context: steps, the mean over tasks at each, half a 95% interval."""

    steps: list[int]
    mean: list[float]
    ci95: list[float]


COLOURS = {
    "value-iteration network": "#d1495b",
    "tabular model-based": "#30638e",
    "Q-learning (UCB)": "#edae49",
    "random": "#9a9a9a",
    "oracle": "#3a7d44",
    "oracle, episode": "#3a7d44",
}


def draw_curves(ax: Axes, curves: Mapping[str, Curve], title: str, ylabel: str) -> None:
    """One line a method, its 95% interval shaded."""
    for name, c in curves.items():
        colour = COLOURS.get(name)
        dashed = name == "random" or name.startswith("oracle")
        ax.plot(c.steps, c.mean, color=colour, label=name, lw=1.2 if dashed else 2, ls="--" if dashed else "-")
        if not dashed:
            low = [m - i for m, i in zip(c.mean, c.ci95, strict=True)]
            high = [m + i for m, i in zip(c.mean, c.ci95, strict=True)]
            ax.fill_between(c.steps, low, high, color=colour, alpha=0.15, lw=0)
    ax.set(title=title, xlabel="steps in context", ylabel=ylabel)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.2)


def demo_picture(anymdp: Mapping[str, Curve], classic: Mapping[str, Mapping[str, Curve]], title: str) -> Figure:
    """The demo's picture: unseen AnyMDP tasks at the left, the Gymnasium tasks beside them."""
    n = len(classic)
    fig = Figure(figsize=(6 + 3.2 * n, 4))
    axes = fig.subplot_mosaic([["a", *map(str, range(n))]], width_ratios=[1.8, *[1] * n])
    shown = {name: c for name, c in anymdp.items() if name != "oracle, episode"}
    draw_curves(axes["a"], shown, title, "reward per step (0 random, 1 oracle)")
    axes["a"].set_ylim(-0.1, 1.15)
    axes["a"].legend(frameon=False, fontsize=8, loc="lower right")
    for i, (name, curves) in enumerate(classic.items()):
        draw_curves(axes[str(i)], curves, name, "episodes that reach the goal" if i == 0 else "")
        axes[str(i)].set_ylim(-0.03, 1.05)
    fig.tight_layout()
    return fig


def training_picture(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """The losses and the score of a training run, from the rows of its log."""
    losses = [r for r in rows if "loss" in r]
    scores = [r for r in rows if "score" in r]
    fig = Figure(figsize=(10, 3.6))
    left, right = fig.subplots(1, 2)
    for name in sorted({name for r in losses for name in r}):
        if name in ("explorer", "policy") or name.startswith("policy_"):
            label = "optimal at discount " + name.removeprefix("policy_") if "_" in name else name
            left.plot(*_line(losses, name), label=label, lw=1)
    left.set(title="cross-entropy of each policy", xlabel="updates", ylim=(0, None))
    if losses:
        left.legend(frameon=False, fontsize=8)
    spans = {"score": "second half of the context", "score_first_half": "first half", "score_bandits": "bandits"}
    for name, label in spans.items():
        if any(name in r for r in scores):
            right.plot(*_line(scores, name), "o-", label=label)
    right.set(title="score in unseen tasks (0 random, 1 oracle)", xlabel="updates", ylim=(0, 1.1))
    right.legend(frameon=False, fontsize=8)
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.2)
    fig.tight_layout()
    return fig


def _line(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """The updates and values of the rows that have this one."""
    found = [(r["update"], r[name]) for r in rows if name in r]
    return [x for x, _ in found], [y for _, y in found]


def few_shot_picture(methods: dict[str, dict[str, Any]], title: str) -> Figure:
    """Returns over the episodes of a few-shot evaluation, one line a method, shaded by its standard error over seeds."""
    fig = Figure(figsize=(7.6, 4.2))
    ax = fig.subplots()
    for n in sorted(methods.values(), key=lambda n: -n["last"]):
        episodes = range(1, len(n["curve"]) + 1)
        (line,) = ax.plot(episodes, n["curve"], label=n["title"], lw=2.2 if n["title"] == "S-ICQL" else 1.3)
        if n["curve_sem"]:
            low = [m - e for m, e in zip(n["curve"], n["curve_sem"], strict=True)]
            high = [m + e for m, e in zip(n["curve"], n["curve_sem"], strict=True)]
            ax.fill_between(episodes, low, high, color=line.get_color(), alpha=0.15, lw=0)
    ax.set(title=title, xlabel="episodes in the task", ylabel="return")
    some = next(iter(methods.values()))
    if some["best"] is not None:
        ax.axhline(some["best"], color="#3a7d44", ls="--", lw=1.2, label=some["best_of"])
    if min(min(n["curve"]) for n in methods.values()) >= 0:
        ax.set_ylim(bottom=0)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.2)
    ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    fig.tight_layout()
    return fig
