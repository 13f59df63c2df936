"""Evaluation: agents and baselines in batches of unseen tasks, normalised between random and oracle, with intervals.

Two scores, both (x - random)/(oracle - random) per task, then averaged over tasks:

- `reward`: reward per step, resets included, in windows of a context's steps;
- `episode`: return per episode, over the episodes that end within the window (the seeds' measure).

`random` acts uniformly; `oracle` follows the exact optimal policy at discount .994. Both references are measured in long
rollouts of the same tasks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from icrl.omnirl import EXPLORER, Agent, OmniRL, Temperature
from icrl.worlds.tables import TabularTasks
from icrl_kernels import RolloutTables, constant_behaviours, rollout, rollout_start, rollout_step, rollout_tables

ORACLE_DISCOUNT = 0.994
BASELINES = {
    "random": {"uniform": 1.0},
    "Q-learning (UCB)": {"q_learning": 1.0},
    "tabular model-based": {"model_based": 1.0},
    "oracle": {0: 1.0},
}
SETTINGS = {"q_bonus": 0.2, "q_discount": 0.9, "model_bonus": 0.2, "model_discount": 0.9}


def tables_of(tasks: TabularTasks) -> RolloutTables:
    """The simulator's form of a batch of tasks."""
    return rollout_tables(
        tasks.transition,
        tasks.reward,
        tasks.noise_state,
        tasks.noise_action,
        tasks.start,
        tasks.terminal,
        tasks.max_steps,
        tasks.num_states,
        tasks.num_actions,
    )


def greedy(q: Tensor, num_actions: Tensor) -> Tensor:
    """`[N,...,S,A]` values -> one-hot policies over each task's own actions, float32; ties go to the lowest index."""
    own = torch.arange(q.shape[-1]) < num_actions.view(-1, *[1] * (q.dim() - 1))
    best = q.masked_fill(~own, -math.inf).argmax(-1)
    return torch.nn.functional.one_hot(best, q.shape[-1]).float()


@dataclass
class Context:
    """What happened in `[N,T]` steps of one context a task."""

    reward: Tensor  # float32
    done: Tensor  # 0 no, 1 terminated, 2 truncated


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


def run_baseline(tasks: TabularTasks, name: str, steps: int, seed: int, tables: RolloutTables | None = None) -> Context:
    """One of `BASELINES` in every task, its learning (if any) starting from nothing."""
    tables = tables or tables_of(tasks)
    policies = None
    if name == "oracle":
        policies = greedy(tasks.solve(ORACLE_DISCOUNT).q, tasks.num_actions)[:, None]
    behaviours = constant_behaviours(len(tasks), 0 if policies is None else 1, BASELINES[name], **SETTINGS)
    out = rollout(tables, steps=steps, seed=seed, policies=policies, behaviours=behaviours)
    return Context(out.reward, out.done)


def references(tasks: TabularTasks, steps: int = 20_000, seed: int = 1) -> Reference:
    tables = tables_of(tasks)
    found = []
    for name in ("random", "oracle"):
        c = run_baseline(tasks, name, steps, seed, tables)
        found.append((c.reward.double().mean(1), episode_means(c, 0, steps)))
    (random_reward, random_episode), (oracle_reward, oracle_episode) = found
    return Reference(random_reward, oracle_reward, random_episode, oracle_episode)


def episode_means(context: Context, begin: int, end: int) -> Tensor:
    """`[N]` mean return of the episodes that end in steps begin..end-1; NaN where none does."""
    total = torch.nn.functional.pad(context.reward.double().cumsum(1), (1, 0))
    ends = context.done != 0
    means = torch.full((len(ends),), math.nan, dtype=torch.float64)
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


def curve(context: Context, reference: Reference, window: int = 100, measure: str = "reward") -> Curve:
    T = context.reward.shape[1]
    spans = [(b, min(b + window, T)) for b in range(0, T, window)]
    points = [mean_ci(normalized(context, reference, b, e, measure)) for b, e in spans]
    return Curve([(b + e) // 2 for b, e in spans], [m for m, _ in points], [c for _, c in points])


def run_agent(
    model: OmniRL,
    tasks: TabularTasks,
    steps: int,
    *,
    prompt: int = EXPLORER,
    temperature: Temperature | None = None,
    seed: int = 0,
    progress: str | None = None,
    record: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None] | None = None,
) -> Context:
    """The model in every task, one context each, from nothing. `record` is given (state, observation, action, reward, done) a step."""
    tables = tables_of(tasks)
    agent = Agent(
        model,
        len(tasks),
        tasks.num_observations,
        prompt=prompt,
        temperature=temperature,
        seed=seed,
        num_actions=tasks.num_actions,
    )
    simulator = rollout_start(tables, seed=seed)
    rewards, dones = torch.zeros(len(tasks), steps), torch.zeros(len(tasks), steps, dtype=torch.uint8)
    for t in tqdm(range(steps), desc=progress, unit="step", disable=progress is None):
        state = simulator.state.clone()
        observation = tasks.state_mapping.gather(1, state[:, None])[:, 0]
        action = agent.act(observation)
        reward, done, _ = rollout_step(tables, simulator, action)
        agent.observe(reward, done)
        rewards[:, t], dones[:, t] = reward, done
        if record is not None:
            record(state, observation, action, reward, done)
    return Context(rewards, dones)
