"""How hard tasks are to explore: the value of a state against the chance that a random policy visits it."""

from __future__ import annotations

from itertools import cycle
from typing import Any, NamedTuple

import torch
from torch import Tensor

from icrl.figures import Figure, FigureCanvasAgg
from icrl.worlds.samplers import sample_anymdp, sample_garnet
from icrl.worlds.tasks import TabularTasks
from icrl_kernels.arguments import integer

QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
NAMES = {"anymdp": "AnyMDP", "garnet": "Garnet"}
COLOURS = ("#e9a23b", "#cf4f4f", "#7b3f8c", "#1f3a68")


class Difficulty(NamedTuple):
    """Of N tasks of S states, [N,S] float64 each; NaN at terminal states, which have no value, and at unreachable ones."""

    rank: Tensor
    """Of the state among its task's by optimal value: 0 the least, 1 the largest."""
    value: Tensor
    """(V* − min)/(max − min) over the same states."""
    visits: Tensor
    """How often the random policy is there, over 1/ns: 1 is the share that every state would have."""

    def slopes(self, x: str = "rank") -> Tensor:
        """[N]: decades of visits from the state of least value to that of the largest: log10 visits on x, least squares."""
        given = self.rank if x == "rank" else self.value
        known = ~given.isnan()
        count = known.sum(1)

        def mean(t: Tensor) -> Tensor:
            return torch.where(known, t, 0).sum(1, keepdim=True) / count[:, None]

        dx, dy = given - mean(given), self.visits.log10() - mean(self.visits.log10())
        return torch.where(known, dx * dy, 0).sum(1) / torch.where(known, dx * dx, 0).sum(1)


def difficulty(tasks: TabularTasks, discount: float = 0.994) -> Difficulty:
    """Value rank and random visits of every state.

    With P the chain of uniformly random actions, s₀ the start distribution and h the horizon, the expected visits of one
    episode are d = s₀ + (1 − 1/h)·dP, an episode ending in a terminal state and otherwise after h steps in the mean;
    `visits` is ns·d/Σd. Values are optimal at `discount`.
    """
    _, states, actions = tasks.shape
    block = max(1, (1 << 22) // (states * actions * states))  # float64 copies of at most 32 MB
    parts = [_difficulty(tasks[i : i + block], discount) for i in range(0, len(tasks), block)]
    return Difficulty(*(torch.cat(x) for x in zip(*parts, strict=True)))


def _difficulty(tasks: TabularTasks, discount: float) -> Difficulty:
    states = tasks.state_mask()
    has = tasks.available_actions()
    share = has.double() / has.sum(-1, keepdim=True).clamp_min(1)
    v = tasks.solve(discount).v
    p = (
        torch.einsum("nsap,nsa->nsp", tasks.dense_tables()[0].double(), share)
        * (1 - 1 / tasks.max_steps.double())[:, None, None]
    )
    start = tasks.start.double()
    eye = torch.eye(p.shape[1], dtype=torch.float64, device=tasks.device)
    d = torch.linalg.solve(eye - p.mT, start).clamp(min=0)
    for _ in range(64):  # sums without cancellation: they carry accuracy from the large entries to the tiny ones
        d = start + (d[:, None] @ p)[:, 0]
    valued = states & ~tasks.terminal & _reached(p, start)
    visits = d / d.sum(1, keepdim=True) * tasks.num_states[:, None]
    order = torch.where(valued, v, torch.inf).argsort(1).argsort(1).double()
    low = torch.where(valued, v, torch.inf).amin(1, keepdim=True)
    high = torch.where(valued, v, -torch.inf).amax(1, keepdim=True)
    found = order / (valued.sum(1, keepdim=True) - 1), (v - low) / (high - low), visits
    return Difficulty(*(x.masked_fill(~valued, torch.nan) for x in found))


def _reached(p: Tensor, start: Tensor) -> Tensor:
    """[N,S] bool: states that some policy reaches."""
    steps = (p > 0).double() + torch.eye(p.shape[1], dtype=p.dtype, device=p.device)
    for _ in range(p.shape[1].bit_length()):
        steps = ((steps @ steps) > 0).double()
    return ((start[:, None] @ steps) > 0)[:, 0]


def compare(num_tasks: int, sizes: tuple[int, ...], num_actions: int, branching: int, seed: int) -> dict[str, Any]:
    """Numbers of AnyMDP beside Garnet at each size: slopes, and quantiles of visits by rank of value."""
    num_tasks, seed = integer("num_tasks", num_tasks, 2), integer("seed", seed)
    sizes = tuple(integer("num_states", size, 8) for size in sizes)
    if not sizes:
        raise ValueError("num_states: wanted at least one, got none")
    num_actions, branching = integer("num_actions", num_actions, 2), integer("branching", branching, 1)
    rows = []
    for size in sizes:
        families = {
            "anymdp": sample_anymdp(num_tasks, size, num_actions, seed=seed),
            "garnet": sample_garnet(num_tasks, size, num_actions, branching, seed=seed),
        }
        for kind, tasks in families.items():
            d = difficulty(tasks)
            slopes, by_value = (d.slopes(x) for x in ("rank", "value"))
            row: dict[str, Any] = {"kind": kind, "num_states": size, "tasks": num_tasks}
            row["decades_from_least_to_most_valued"] = _quantiles(slopes)
            row["decades_by_scaled_value"] = _quantiles(by_value)
            row["tasks_where_visits_fall"] = float((slopes < 0).double().mean())
            row["rank"] = torch.linspace(0, 1, 17, dtype=torch.float32, device="cpu").tolist()
            row["log10_visits"] = [
                _quantiles(x) for x in _at(d, torch.linspace(0, 1, 17, dtype=torch.float64, device="cpu")).T
            ]
            rows.append(row)
    return {"actions": num_actions, "branching": branching, "seed": seed, "quantiles": list(QUANTILES), "rows": rows}


def _at(d: Difficulty, rank: Tensor) -> Tensor:
    """[N,R]: log10 visits of each task at these ranks, linear between states."""
    last = (~d.rank.isnan()).sum(1, keepdim=True) - 1
    ordered = d.visits.log10().gather(1, d.rank.nan_to_num(torch.inf).argsort(1))
    place = rank * last
    below = place.long().clamp(max=last)
    above, part = torch.minimum(below + 1, last), place - below
    return ordered.gather(1, below) * (1 - part) + ordered.gather(1, above) * part


def _quantiles(x: Tensor) -> list[float]:
    return [round(float(q), 4) for q in x.quantile(x.new_tensor(QUANTILES))]


def draw_difficulty(numbers: dict[str, Any]) -> Figure:
    """Both families side by side: median and quartiles, over tasks, of visits by rank of value."""
    figure = Figure(figsize=(10, 4.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    rows = numbers["rows"]
    for axis, kind in zip(panels, NAMES, strict=True):
        own = [row for row in rows if row["kind"] == kind]
        for row, colour in zip(own, cycle(COLOURS)):
            low, middle, high = ([b[i] for b in row["log10_visits"]] for i in (1, 2, 3))
            axis.fill_between(row["rank"], low, high, color=colour, alpha=0.13, lw=0)
            slope = row["decades_from_least_to_most_valued"]
            label = f"{row['num_states']} states: {slope[2]:+.2f} decades ({slope[1]:+.2f} to {slope[3]:+.2f})"
            axis.plot(row["rank"], middle, color=colour, lw=2, label=label.replace("-", "−"))
        axis.axhline(0, color="#9aa3ad", lw=0.7, zorder=0)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_title(NAMES[kind], loc="left", fontsize=11)
        axis.set_xlabel("rank of the state by optimal value (0 least, 1 largest)")
        axis.legend(frameon=False, fontsize=8.5, loc="lower left", title="fitted slope of a task: median (quartiles)",
                    title_fontsize=8.5, alignment="left")  # fmt: skip
    panels[0].yaxis.set_major_formatter(lambda y, _: f"$10^{{{y:g}}}$")
    panels[0].set_ylabel("visits of a random policy, over 1/ns")
    return figure
