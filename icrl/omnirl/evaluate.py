"""Evaluation: agents and baselines in batches of unseen tasks, normalised between random and oracle, with intervals.

Two measures, both (x - random)/(oracle - random) per task:

- `reward`: reward per step, resets included, over a span of a context's steps. Its oracle is the policy that is optimal
  for just that: for the task with each end led back to the start, at a discount near 1. (A policy that is optimal for
  discounted return is not: where every step costs, it puts off the end that a good one seeks. Some tasks are such that
  it earns less per step than random actions.) Averaged over tasks.
- `episode`: return per episode, over the episodes that end within the span, as the seeds measure it. Its oracle is the
  optimal policy at discount .994. Gaps to random can be tiny beside what a learner may lose, so that single tasks rule
  the mean: interquartile means over tasks (Agarwal et al. 2021, arXiv 2108.13264), bootstrapped intervals.

`random` acts uniformly. References are measured in long rollouts of the same tasks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm import tqdm

from icrl.omnirl.agent import Agent, Model, Temperature
from icrl.omnirl.closed_loop import ClosedLoop, Context, Trajectory
from icrl.omnirl.tags import EXPLORER
from icrl.worlds.tasks import TabularTasks
from icrl_kernels import RolloutTables, constant_behaviours, rollout
from icrl_kernels.arguments import integer
from icrl_kernels.tabular.packed import dense_blocks

EPISODE_DISCOUNT = 0.994
REWARD_DISCOUNT = 0.999
BASELINES: dict[str, dict[int | str, float]] = {
    "random": {"uniform": 1.0},
    "Q-learning (UCB)": {"q_learning": 1.0},
    "tabular model-based": {"model_based": 1.0},
    "oracle": {0: 1.0},
    "oracle, episode": {0: 1.0},
}
TEMPERATURE = Temperature(0.5, 0.1, 300)
UNSEEN = 2**42
"""Seeds of tasks from here on are for evaluation. (Training hashes its seeds to 63 bits: that one of these came up there has a
chance of about 1e-13.)"""
SETTINGS = {"q_bonus": 2.0, "q_discount": 0.8, "model_bonus": 0.2, "model_discount": 0.97}
"""The tabular learners' constants, by a search over other tasks (benches/tabular_constants.py)."""
LONG = 100_000
LONG_SETTINGS = {"q_bonus": 5.0, "q_discount": 0.9}
"""Of Q-learning that is given more than LONG steps, by the same search."""


def greedy(q: Tensor, num_actions: Tensor) -> Tensor:
    """`[N,...,S,A]` values -> one-hot policies over each task's own actions, float32; ties go to the lowest index."""
    own = torch.arange(q.shape[-1], device=q.device) < num_actions.view(-1, *[1] * (q.dim() - 1))
    best = q.masked_fill(~own, -math.inf).argmax(-1)
    return torch.nn.functional.one_hot(best, q.shape[-1]).float()


@dataclass
class Reference:
    """Per task `[N]`: what random and oracle earn per step and per episode."""

    random_reward: Tensor
    oracle_reward: Tensor
    random_episode: Tensor
    oracle_episode: Tensor


@dataclass
class Curve:
    """A normalised score over a context: the middle step of each window, the mean over tasks, half a 95% interval."""

    steps: list[int]
    mean: list[float]
    ci95: list[float]


def run_baseline(
    tasks: TabularTasks, name: str, steps: int, seed: int, tables: RolloutTables | None = None, **settings: float
) -> Context:
    """One of `BASELINES` in every task, its learning (if any) starting from nothing; it runs where the tasks are.

    `settings`: constants of the learners over `SETTINGS`."""
    tables = tables or tasks.tables()
    policies = None
    if name.startswith("oracle"):
        q = best_reward_q(tasks) if name == "oracle" else tasks.solve(EPISODE_DISCOUNT).q
        policies = greedy(q, tasks.num_actions)[:, None]
    behaviours = constant_behaviours(
        len(tasks), 0 if policies is None else 1, BASELINES[name], **{**SETTINGS, **settings}
    )
    out = rollout(tables, steps=steps, seed=seed, policies=policies, behaviours=behaviours)
    return Context(out.reward, out.done)


def best_reward_q(tasks: TabularTasks) -> Tensor:
    """`[N,S,A]` values, at discount .999, of the task that starts anew at each end: its policy earns most per step."""
    parts = [_best_reward_q(tasks[block]) for block in dense_blocks(*tasks.shape)]
    return torch.cat(parts) if parts else torch.zeros(tasks.shape, dtype=torch.float64, device=tasks.device)


def _best_reward_q(tasks: TabularTasks) -> Tensor:
    transition = tasks.dense_tables()[0]
    ends = tasks.terminal[:, None, None, :]
    restarts = (transition * ends).sum(-1, keepdim=True) * tasks.start[:, None, None, :]
    endless = transition.masked_fill(ends, 0.0) + restarts
    reward = tasks.expected_reward()[..., None].expand_as(endless)
    return replace(tasks, transition=endless, reward=reward).solve(REWARD_DISCOUNT).q


def references(tasks: TabularTasks, steps: int = 20_000, seed: int = 2**33 + 1) -> Reference:
    """What random and the oracles earn, by rollouts whose seed no evaluation uses; they run where the tasks are."""
    steps = integer("steps", steps, 1)
    tables = tasks.tables()
    runs = {name: run_baseline(tasks, name, steps, seed, tables) for name in ("random", "oracle", "oracle, episode")}
    return Reference(
        runs["random"].reward.double().mean(1),
        runs["oracle"].reward.double().mean(1),
        episode_means(runs["random"], 0, steps),
        episode_means(runs["oracle, episode"], 0, steps),
    )


def episode_means(context: Context, begin: int, end: int) -> Tensor:
    """`[N]` mean return of the episodes that end in steps begin..end-1; NaN where none does."""
    total = torch.nn.functional.pad(context.reward.double().cumsum(1), (1, 0))
    ends = context.done != 0
    means = torch.full((len(ends),), math.nan, dtype=torch.float64, device=ends.device)
    for n in range(len(ends)):
        at = ends[n].nonzero()[:, 0] + 1
        inside = at[(at > begin) & (at <= end)]
        if len(inside):
            before = at[at < inside[0]]
            first = int(before[-1]) if len(before) else 0
            means[n] = (total[n, inside[-1]] - total[n, first]) / len(inside)
    return means


def normalized(context: Context, reference: Reference, begin: int, end: int, measure: str = "reward") -> Tensor:
    """`[N]` scores of steps begin..end-1, 0 as random, 1 as oracle; NaN where the measure is not defined."""
    if measure == "reward":
        value, low, high = (
            context.reward[:, begin:end].double().mean(1),
            reference.random_reward,
            reference.oracle_reward,
        )
    elif measure == "episode":
        value, low, high = episode_means(context, begin, end), reference.random_episode, reference.oracle_episode
    else:
        raise ValueError(f"measure: wanted 'reward' or 'episode', got {measure!r}")
    return (value - low) / (high - low)


def mean_ci(scores: Tensor) -> tuple[float, float]:
    """Mean and half a 95% normal interval over tasks, NaNs left out."""
    scores = scores[~scores.isnan()]
    if len(scores) < 2:
        return float(scores.mean()) if len(scores) else math.nan, math.nan
    return float(scores.mean()), float(1.96 * scores.std() / math.sqrt(len(scores)))


def interquartile_mean_ci(scores: Tensor, resamples: int = 2000) -> tuple[float, float]:
    """Interquartile mean over tasks and half its bootstrapped 95% interval (by a fixed seed), NaNs left out."""
    scores = scores[~scores.isnan()]
    n = len(scores)
    if n < 4:
        return mean_ci(scores)
    chosen = torch.randint(n, (resamples, n), generator=torch.Generator().manual_seed(0), device="cpu").to(
        scores.device
    )

    def middle(x: Tensor) -> Tensor:
        return x.sort(-1).values[..., n // 4 : n - n // 4].mean(-1)

    spread = middle(scores[chosen]).quantile(torch.tensor([0.025, 0.975], dtype=scores.dtype, device=scores.device))
    return float(middle(scores)), float((spread[1] - spread[0]) / 2)


def scores(context: Context, reference: Reference, begin: int, end: int) -> dict[str, float]:
    """Both measures over steps begin..end-1, each with half its 95% interval."""
    reward = mean_ci(normalized(context, reference, begin, end))
    episode = interquartile_mean_ci(normalized(context, reference, begin, end, "episode"))
    return {"normalized": reward[0], "ci95": reward[1], "episode": episode[0], "episode_ci95": episode[1]}


def curve(context: Context, reference: Reference, window: int = 100) -> Curve:
    """The `reward` measure over a context."""
    T = context.reward.shape[1]
    spans = [(b, min(b + window, T)) for b in range(0, T, window)]
    points = [mean_ci(normalized(context, reference, b, e)) for b, e in spans]
    return Curve([(b + e) // 2 for b, e in spans], [m for m, _ in points], [c for _, c in points])


def run_agent(
    model: Model,
    tasks: TabularTasks,
    steps: int,
    *,
    prompt: int = EXPLORER,
    temperature: Temperature | None = None,
    seed: int = 0,
    progress: str | None = None,
    fused: bool | None = None,
) -> Trajectory:
    """The model in every task, one context each, from nothing.

    The model acts on its device, and the tasks run where they are: observations and actions go there and back. Where both are
    on the CPU, this may be one call of C++ for many steps: see ClosedLoop.

    Returns:
        what happened `[N,steps]`, where the tasks are.
    """
    steps = integer("steps", steps, 0)
    agent = Agent(
        model,
        len(tasks),
        tasks.num_observations,
        prompt=prompt,
        temperature=temperature,
        seed=seed,
        num_actions=tasks.num_actions,
        fused=fused,
    )
    loop = ClosedLoop(agent, tasks, seed)
    with tqdm(total=steps, desc=progress, unit="step", disable=progress is None) as bar:
        return loop.run(steps, bar.update)
