"""What random and the oracle earn in the suite's rows, and which tasks are kept for the means."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from icrl.omnirl.evaluate import Context, Reference, run_baseline
from icrl.omnirl.learners import Fixed, run_world, uniform_actor
from icrl.omnirl.measures import episodes_of, windows
from icrl.worlds.tasks import TabularTasks
from icrl.worlds.vector_world import VectorWorld

MOST_VARIANCE = 0.3
"""Of the oracle's normalised returns per episode, in a task that is kept."""
SEED = 2**33 + 1  # that no evaluation uses


@dataclass
class Measured:
    reference: Reference
    kept: Tensor  # [N] bool


def measured(tasks: TabularTasks, steps: int, same: bool = False) -> Measured:
    """References of tabular tasks, by `steps` steps of each in every task.

    A task is kept where the oracle beats random, and where the variance of the oracle's returns per episode, normalised, is
    under .3 (the rule of the public evaluation). `same`: all tasks are one and the same: what is earned is the mean over all,
    and all are kept.
    """
    tables = tasks.tables()
    runs = {name: run_baseline(tasks, name, steps, SEED, tables) for name in ("random", "oracle", "oracle, episode")}
    return _measured(runs["random"], runs["oracle"], runs["oracle, episode"], same)


def measured_in_world(for_random: VectorWorld, for_oracle: VectorWorld, steps: int, contexts: int) -> Reference:
    """References of an environment without a table, of which all contexts are one task: the means over those of two worlds, by
    `steps` steps in each; `[contexts]`, all alike."""
    random = run_world(for_random, uniform_actor(for_random.num_actions, SEED), steps)
    oracle = run_world(for_oracle, Fixed(lambda _: for_oracle.oracle_action()), steps)
    found = _measured(random, oracle, oracle, True, for_random.agents).reference
    return Reference(*(value[:1].expand(contexts) for value in vars(found).values()))


def _measured(random: Context, best_reward: Context, best_episode: Context, same: bool, group: int = 1) -> Measured:
    steps = random.reward.shape[1]
    low, rate, high = (windows(c, steps, group) for c in (random, best_reward, best_episode))
    values = [low.reward, rate.reward, low.returns / low.episodes, high.returns / high.episodes]
    if same:
        values = [v.nanmean(0, keepdim=True).expand_as(v) for v in values]
    reference = Reference(*(v[:, 0] for v in values))
    kept = torch.ones_like(reference.random_reward, dtype=torch.bool)
    if not same:
        record, _, returns = episodes_of(best_episode)
        deviation = (returns - reference.oracle_episode[record]).square()
        total = torch.zeros_like(reference.oracle_episode).index_add_(0, record, deviation)
        gap = reference.oracle_episode - reference.random_episode
        kept = (gap > 0) & (total / high.episodes[:, 0] / gap.square() < MOST_VARIANCE)
    return Measured(reference, kept)
