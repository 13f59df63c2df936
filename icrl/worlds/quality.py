"""What AnyMDP's filters measure, for any tasks: how much there is to gain, and how far the optimal policy roams."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from icrl.worlds.tables import TabularTasks

MIN_ADVANTAGE, MIN_GINI, MIN_ENTROPY = 2.0, 0.7, 0.35


class Quality(NamedTuple):
    """Per-task numbers [N] float64, each the least over the task's start states.

    advantage: (max_a Q*(s₀, a) − max_a Q_random(s₀, a))·(1 − γ)·max_steps at γ = 2^(−1/ns).
    gini: 1 − Σ p², entropy: −Σ p log p / log ns, where p is the optimal chain's distribution 2^K steps after s₀,
    K = ⌊log2 max_steps⌋ + 1, terminal states restarting from the start distribution.
    """

    advantage: Tensor
    gini: Tensor
    entropy: Tensor

    def accepted(self) -> Tensor:
        """[N] bool: what `sample_anymdp` accepts."""
        return (self.advantage >= MIN_ADVANTAGE) & (self.gini > MIN_GINI) & (self.entropy > MIN_ENTROPY)


def quality(tasks: TabularTasks) -> Quality:
    """AnyMDP's quality numbers (arXiv 2502.02869); entropy is NaN for one-state tasks."""
    parts = Quality(*(torch.empty(len(tasks), dtype=torch.float64, device=tasks.device) for _ in range(3)))
    for ns in tasks.num_states.unique().tolist():  # γ is a function of ns
        index = (tasks.num_states == ns).nonzero()[:, 0]
        block = max(1, (1 << 23) // tasks.transition[0].numel())
        for rows in index.split(block):
            for whole, part in zip(parts, _quality(tasks[rows], ns), strict=True):
                whole[rows] = part
    return parts


def _quality(tasks: TabularTasks, ns: int) -> Quality:
    gamma = 2.0 ** (-1.0 / ns)
    q = tasks.solve(gamma).q[:, :ns].double().masked_fill(~tasks.action_mask()[:, None], -torch.inf)
    t = tasks.transition[:, :ns, :, :ns].double()
    mean_reward = tasks.expected_reward()[:, :ns].double()
    share = (tasks.action_mask() / tasks.num_actions[:, None]).double()
    eye = torch.eye(ns, dtype=torch.float64, device=tasks.device)
    random_p = torch.einsum("nsap,na->nsp", t, share)
    random_v = torch.linalg.solve(eye - gamma * random_p, torch.einsum("nsa,na->ns", mean_reward, share))
    random_q = mean_reward + gamma * torch.einsum("nsap,np->nsa", t, random_v)
    random_q = random_q.masked_fill(~tasks.action_mask()[:, None], -torch.inf)
    start = tasks.start[:, :ns].double()
    advantage = (q.amax(-1) - random_q.amax(-1)) * (1 - gamma) * tasks.max_steps[:, None]

    chain = t.gather(2, q.argmax(-1)[:, :, None, None].expand(-1, -1, 1, ns))[:, :, 0]
    chain = torch.where(tasks.terminal[:, :ns, None], start[:, None], chain)
    power = torch.frexp(tasks.max_steps.double()).exponent  # ⌊log2⌋ + 1
    for k in range(int(power.max())):
        chain = torch.where((k < power)[:, None, None], chain @ chain, chain)
    p = chain + 1e-12
    gini, entropy = 1 - (p * p).sum(-1), -(p * p.log()).sum(-1) / torch.tensor(float(ns)).log()
    return Quality(*(x.masked_fill(start == 0, torch.inf).amin(-1) for x in (advantage, gini, entropy)))
