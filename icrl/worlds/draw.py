"""A picture of one tabular task: its states in a row by rank, and what the optimal policy does among them."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize, SymLogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.patheffects import Normal, Stroke

from icrl.worlds.tasks import TabularTasks

INK, FAINT, START, HERE = "#222831", "#9aa3ad", "#e8871e", "#d6006c"
REWARDS = LinearSegmentedColormap.from_list("rewards", ["#a50f15", "#e34a33", "#a3a8ae", "#3182bd", "#08306b"])


def draw_task(
    tasks: TabularTasks, i: int = 0, *, discount: float | None = None, current: int | None = None, least: float = 0.02
) -> Figure:
    """Draw task i under its optimal policy.

    Above: states by rank, coloured by optimal value; an arc for each transition of probability ≥ `least`, as wide as it
    is probable, forward ones above the row and backward ones below, coloured by mean reward; and, in black, the likeliest
    way from the start to the state that it earns most by entering (by how often it does so). Below: how often the optimal policy visits each state (bars) and what a
    step from it earns (dots).

    Args:
        discount: 2^(−1/ns) unless given. current: a state to ring.
    Returns:
        a matplotlib Figure (`.savefig(path)`), tied to no window system.
    """
    task = tasks[i].to("cpu")
    ns = int(task.num_states[0])
    gamma = 2.0 ** (-1.0 / ns) if discount is None else discount
    best = task.solve(float(gamma))
    value, policy = best.v[0, :ns].numpy(), best.policy[0, :ns]
    every = torch.arange(ns, device="cpu")
    transition, reward = task.dense_tables()
    p = transition[0, every, policy, :ns].double().numpy()
    r = reward[0, every, policy, :ns].double().numpy()
    start, terminal = task.start[0, :ns].double().numpy(), task.terminal[0, :ns].numpy()

    figure = Figure(figsize=(11, 6.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, height_ratios=(3.4, 1), sharex=True)
    for axis in (top, bottom):
        axis.spines[["top", "right", "left"]].set_visible(False)

    largest = max(1e-9, float(np.abs(r[p >= least]).max(initial=0)))
    # one goal reward may dwarf all others, and their signs still matter
    colours = ScalarMappable(SymLogNorm(largest / 30, vmin=-largest, vmax=largest), REWARDS)
    decades = [10.0**k for k in range(-9, 10) if largest / 20 <= 10.0**k <= largest]
    strength = 1.0 if ns <= 40 else 0.6  # of the many arcs of a large task
    heights = [
        _arc(top, s, s2, p[s, s2], colours.to_rgba(r[s, s2]), terminal[s2], strength) for s, s2 in _edges(p, least)
    ]
    visits, way = _visits(p, start, terminal), optimal_way(p, r, start, terminal)
    heights += [_highlight(top, s, s2) for s, s2 in pairwise(way)]
    size = float(np.clip((550 / ns) ** 2, 16, 420))  # a row of them is about 640 points long
    values = ScalarMappable(Normalize(value[~terminal].min(), value[~terminal].max() + 1e-9), "viridis")
    for mark, chosen in (("o", ~terminal), ("s", terminal)):
        face = values.to_rgba(value[chosen])
        face[terminal[chosen]] = (1, 1, 1, 1)
        line = 1.2 if ns <= 40 else 0.5
        x = every[chosen]
        top.scatter(x, 0 * x, size, face, marker=mark, edgecolors=INK, linewidths=line, zorder=4)
    rings = [(int(s), 2.1, START, 1 + 2 * start[s], 3) for s in np.flatnonzero(start)]
    rings += [] if current is None else [(current, 3.4, HERE, 2.5, 5)]
    for s, scale, colour, line, z in rings:
        top.scatter(s, 0, max(size, 45) * scale, facecolors="none", edgecolors=colour, linewidths=line, zorder=z)
    if ns <= 40:
        lightness = values.to_rgba(value)[:, :3] @ (0.3, 0.59, 0.11)
        for s in range(ns):
            colour = INK if terminal[s] or lightness[s] > 0.5 else "white"
            top.text(s, 0, str(s), ha="center", va="center_baseline", fontsize=8, color=colour, zorder=6)
    up, down = max([1.0, *heights]), max([1.0, *(-h for h in heights)])
    top.set(ylim=(-1.05 * down, 1.22 * up), xlim=(-0.5 - ns / 50, ns - 0.5 + ns / 50), yticks=[])
    top.spines["bottom"].set_visible(False)
    top.tick_params(bottom=False, labelbottom=False)
    figure.colorbar(values, ax=top, pad=0.01, aspect=30, label=f"optimal value, discount {gamma:.3f}")
    figure.colorbar(
        colours,
        ax=top,
        pad=0.01,
        aspect=30,
        label="mean reward of the transition",
        ticks=[-x for x in decades[::-1]] + [0.0] + decades,
    )
    legend = [
        Line2D([], [], ls="", marker="o", ms=11, mfc="none", mec=START, mew=2.2, label="start"),
        Line2D([], [], ls="", marker="s", ms=9, mfc="white", mec=INK, label="terminal"),
        Line2D([], [], color=FAINT, lw=2.5, label="forward above, backward below"),
        Line2D([], [], color=INK, lw=1.6, label=f"likeliest way to state {way[-1]}: {len(way) - 1} steps"),
    ]
    top.legend(handles=legend, loc="upper left", frameon=False, fontsize=9, ncols=4)
    na, steps = int(task.num_actions[0]), int(task.max_steps[0])
    title = (
        f"{ns} states ({task.num_observations} observed ids), {na} actions, at most {steps} steps: the optimal policy"
    )
    top.set_title(title, loc="left", fontsize=11, color=INK)

    bottom.bar(every, visits, 0.7, color=["#d7dbe0" if t else "#6c8ebf" for t in terminal])
    bottom.set_ylabel("visits", color="#4a6a99")
    bottom.set_xlabel("state, by rank")
    earned = bottom.twinx()
    earned.spines[["top", "left", "bottom"]].set_visible(False)
    earned.axhline(0, color=FAINT, lw=0.7)
    live = ~terminal
    earned.plot(every[live], (p * r).sum(-1)[live], "o", ms=4.5, color="#b8336a")
    earned.set_ylabel("mean reward", color="#b8336a")
    if ns <= 40:
        bottom.set_xticks(every)
    return figure


def to_rgb(figure: Figure) -> np.ndarray:
    """The figure as [height, width, 3] uint8."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def optimal_way(p: np.ndarray, r: np.ndarray, start: np.ndarray, terminal: np.ndarray) -> list[int]:
    """The likeliest path through chain p `[S,S]` with rewards r, from the likeliest start to the state whose entries earn
    most in the long run; to the most visited one where nothing is earned."""
    visits = _visits(p, start, terminal)
    earned = visits @ (p * r)
    return likeliest_path(p, int(start.argmax()), int((earned if earned.max() > 0 else visits).argmax()))


def likeliest_path(p: np.ndarray, start: int, end: int) -> list[int]:
    """The path from start to end of largest Π p along it; [start] where there is none."""
    with np.errstate(divide="ignore"):
        cost = -np.log(p)
    best = np.full(len(p), np.inf)
    best[start], before = 0, np.full(len(p), -1)
    for _ in range(len(p)):  # Bellman-Ford: costs are no less than 0, so a shortest path repeats no state
        through = best[:, None] + cost
        shorter = through.min(0) < best
        if not shorter.any():
            break
        before[shorter] = through.argmin(0)[shorter]
        best = np.minimum(best, through.min(0))
    path = [end]
    while path[-1] != start and before[path[-1]] >= 0:
        path.append(int(before[path[-1]]))
    return path[::-1] if path[-1] == start else [start]


def _visits(p: np.ndarray, start: np.ndarray, terminal: np.ndarray) -> np.ndarray:
    """Share of time in each state, episodes starting anew where they end."""
    chain = np.where(terminal[:, None], start, p)
    return start @ np.linalg.matrix_power((np.eye(len(p)) + chain) / 2, 1 << 14)  # lazy: same limit, no oscillation


def _edges(p: np.ndarray, least: float) -> list[tuple[int, int]]:
    pairs = np.argwhere(p >= least)
    return sorted(((int(s), int(s2)) for s, s2 in pairs), key=lambda e: p[e])  # the likeliest on top


def _half_ellipse(s: int, s2: int) -> tuple[Path, float]:
    height = float(np.sign(s2 - s)) * (0.45 + abs(s2 - s) ** 0.85)
    points = [(s, 0), (s + 0.1 * (s2 - s), height * 4 / 3), (s + 0.9 * (s2 - s), height * 4 / 3), (s2, 0)]
    return Path(points, [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4]), height


def _arc(axis, s: int, s2: int, p: float, colour, into_end: bool, strength: float) -> float:
    """Draw s → s2 and return its height: half an ellipse, or a loop for s = s2."""
    if s == s2:
        points = [(s, 0), (s - 0.75, 1.5), (s + 0.75, 1.5), (s, 0)]
        path, height = Path(points, [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4]), 1.1
    else:
        path, height = _half_ellipse(s, s2)
    style = (0, (3, 1.2)) if into_end else "solid"
    alpha = strength * (0.3 + 0.6 * p)
    axis.add_patch(PathPatch(path, fc="none", ec=colour, lw=0.4 + 5 * p, alpha=alpha, ls=style, zorder=1 + p))
    return height


def _highlight(axis, s: int, s2: int) -> float:
    path, height = _half_ellipse(s, s2)
    casing = [Stroke(linewidth=2.8, foreground="white"), Normal()]
    axis.add_patch(PathPatch(path, fc="none", ec=INK, lw=1.4, path_effects=casing, zorder=3))
    return height
