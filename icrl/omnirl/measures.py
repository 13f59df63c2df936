"""What the evaluation suite reads off contexts: curves by windows of steps, performance, steps and episodes to there, falls.

A curve is normalised by task, 0 as random and 1 as the oracle, by either of two measures: return per episode, of the episodes
that end in a window; or reward per step. Means are over tasks, with half of a normal 95 % interval; a task in which no episode
ends in a window has no part in that window's mean.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from icrl.omnirl.evaluate import Context, Reference

NEAR = 0.02
"""A curve has reached its best where it is within this of it."""
SMOOTH = 3
"""Windows of a running mean: what counts as reached stays so for as many."""
FALL = 0.03
"""Unlearned: an interval that lies wholly more than this under the best earlier window's mean."""


@dataclass
class Windows:
    """Sums over windows of a learner's steps, by task, `[N,W]` float64."""

    width: int  # steps of a window
    returns: Tensor  # of the episodes that end in it, of a team the mean over its agents
    episodes: Tensor  # that end in it
    reward: Tensor  # mean reward per step

    def coarser(self, times: int) -> Windows:
        """Windows of `times` these; what is left at the end is no window."""
        whole = self.reward.shape[1] // times * times

        def sums(x: Tensor) -> Tensor:
            return x[:, :whole].unflatten(1, (-1, times)).sum(-1)

        return Windows(self.width * times, sums(self.returns), sums(self.episodes), sums(self.reward) / times)

    @staticmethod
    def joined(parts: list[Windows]) -> Windows:
        """Those of several groups of tasks, of one width."""
        fields = ("returns", "episodes", "reward")
        return Windows(parts[0].width, *(torch.cat([getattr(p, name) for p in parts]) for name in fields))


def episodes_of(context: Context) -> tuple[Tensor, Tensor, Tensor]:
    """The episodes that end in a context `[N,T]`: of which record, at which step, and their returns (float64)."""
    total = torch.nn.functional.pad(context.reward.double().cumsum(1), (1, 0))
    record, step = context.done.nonzero(as_tuple=True)
    until = total[record, step + 1]
    first = torch.ones_like(record, dtype=torch.bool)
    first[1:] = record[1:] != record[:-1]
    before = until.roll(1).masked_fill(first, 0.0)
    return record, step, until - before


def windows(context: Context, width: int, group: int = 1, stride: int = 1) -> Windows:
    """Sums over windows of `width` steps; what is left at the end is no window.

    Args:
        group: as many records in a row are one task: a team's agents, or a learner's environments.
        stride: steps of the learner that a column stands for: `group` where its environments are stepped side by side,
            else 1. ValueError where width is no multiple of it, or longer than the context.
    """
    n, columns = context.reward.shape
    across = width // stride
    count = columns // max(1, across)
    if across * stride != width or not count:
        raise ValueError(f"width: wanted a multiple of {stride} of at most {columns * stride} steps, got {width}")
    tasks = n // group
    record, step, returns = episodes_of(context)
    inside = step < count * across
    index = record[inside] // group * count + step[inside] // across
    sums = torch.zeros(2, tasks * count, dtype=torch.float64, device=returns.device)
    sums[0].index_add_(0, index, returns[inside])
    sums[1].index_add_(0, index, torch.ones_like(returns[inside]))
    sums /= group / stride  # agents of a team share its episodes; environments side by side have each their own
    reward = context.reward[:, : count * across].double().view(tasks, group, count, across).mean((1, 3))
    return Windows(width, sums[0].view(tasks, count), sums[1].view(tasks, count), reward)


def normalised(found: Windows, reference: Reference, measure: str = "episode") -> Tensor:
    """`[N,W]` scores, NaN where the measure is not defined. `measure`: "episode" or "reward"."""
    if measure == "episode":
        value, low, high = found.returns / found.episodes, reference.random_episode, reference.oracle_episode
    elif measure == "reward":
        value, low, high = found.reward, reference.random_reward, reference.oracle_reward
    else:
        raise ValueError(f"measure: wanted 'episode' or 'reward', got {measure!r}")
    return (value - low[:, None]) / (high - low)[:, None]


def mean_interval(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Means over the tasks of `[N,...]` and half of their 95 % intervals, NaNs left out; NaN where there are too few."""
    count = (~scores.isnan()).sum(0)
    mean = scores.nanmean(0)
    variance = (scores - mean).square().nansum(0) / (count - 1).clamp(min=1)
    half = 1.96 * (variance / count).sqrt()
    return mean, half.masked_fill(count < 2, math.nan)


def ahead(scores: Tensor) -> Tensor:
    """`[...,W]` -> at each window the mean of it and the next two, of fewer at the end; NaNs left out."""
    padded = torch.nn.functional.pad(scores, (0, SMOOTH - 1), value=math.nan)
    return padded.unfold(-1, SMOOTH, 1).nanmean(-1)


def reached(curve: Tensor, level: float) -> int | None:
    """The first window at which a curve `[W]` is at a level or above; None where it never is."""
    found = (curve >= level).nonzero()
    return int(found[0, 0]) if len(found) else None


def summary(found: Windows, reference: Reference, levels: tuple[float, ...] = (0.8,)) -> dict[str, Any]:
    """The numbers of a learner in a row of the table.

    Its curve is smoothed by a mean of each window and the next two. `performance` is the best of that, with the interval over
    tasks at that place; `steps`, to the end of the first window at which it is within .02 of the best, so that it stays there
    for three; `episodes`, that end until then, the mean over tasks; `last`, its mean over the last quarter of the windows;
    `steps_to`, of each level. By return per episode; `reward` has the same by reward per step.
    """
    scores = normalised(found, reference)
    out = _of_curve(found.width, scores, levels)
    at = out["steps"] // found.width if out["steps"] else 0
    out["episodes"] = float(found.episodes[:, :at].sum(1).mean()) if at else None
    return out | {"reward": _of_curve(found.width, normalised(found, reference, "reward"), levels)}


def _of_curve(width: int, scores: Tensor, levels: tuple[float, ...]) -> dict[str, Any]:
    mean, half = mean_interval(scores)
    smooth, smooth_half = mean_interval(ahead(scores))
    quarter = scores[:, -max(1, scores.shape[1] // 4) :].nanmean(1)
    last, last_half = mean_interval(quarter)
    out: dict[str, Any] = {"window": width, "mean": mean.tolist(), "ci95": half.tolist()}
    out |= {"last": float(last), "last_ci95": float(last_half)}
    if smooth.isnan().all():
        return out | {"performance": math.nan, "performance_ci95": math.nan, "steps": None, "steps_to": {}}
    best = int(smooth.nan_to_num(nan=-math.inf).argmax())

    def steps_to(level: float) -> int | None:
        at = reached(smooth, level)
        return None if at is None else (at + 1) * width

    out |= {"performance": float(smooth[best]), "performance_ci95": float(smooth_half[best])}
    out |= {"steps": steps_to(float(smooth[best]) - NEAR), "steps_to": {str(x): steps_to(x) for x in levels}}
    return out


def unlearning(found: Windows, reference: Reference) -> dict[str, Any]:
    """The largest fall of a window's mean under the best earlier window's, by return per episode.

    Returns:
        fall: 0 where there is none; best, ci95 and best_steps, of the earlier window; mean, low_ci95 and steps, of the
        fallen one; unlearned: whether any window's 95 % interval lies wholly more than .03 under the best earlier mean.
    """
    mean, half = mean_interval(normalised(found, reference))
    out: dict[str, Any] = {"window": found.width, "fall": 0.0, "unlearned": False}
    best = None
    for i, (m, h) in enumerate(zip(mean.tolist(), half.tolist(), strict=True)):
        if math.isnan(m):
            continue
        if best is not None:
            top = float(mean[best])
            out["unlearned"] |= m + h < top - FALL
            if top - m > out["fall"]:
                out |= {"fall": top - m, "best": top, "ci95": float(half[best]), "best_steps": (best + 1) * found.width}
                out |= {"mean": m, "low_ci95": h, "steps": (i + 1) * found.width}
        if best is None or m > float(mean[best]):
            best = i
    return out
