"""What AnyMDP's filters measure, for any tasks: how much there is to gain, and how far the optimal policy roams."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from icrl.worlds.tasks import TabularTasks
from icrl_kernels.tabular.packed import dense_blocks

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
    parts = [_quality(tasks[block].dense()) for block in dense_blocks(*tasks.shape)]
    return (
        Quality(*(torch.cat(x) for x in zip(*parts, strict=True)))
        if parts
        else Quality(*torch.zeros(3, 0, dtype=torch.float64, device=tasks.device))
    )


def _quality(tasks: TabularTasks) -> Quality:
    ns = tasks.num_states.double()
    gamma = torch.exp2(-1 / ns)
    best = tasks.solve(gamma[:, None])
    t, start = tasks.dense_tables()[0].double(), tasks.start.double()
    has = tasks.available_actions()
    share = has.double() / has.sum(-1, keepdim=True).clamp_min(1)
    mean_reward = tasks.expected_reward().double()
    discounted = gamma[:, None, None] * torch.einsum("nsap,nsa->nsp", t, share)
    eye = torch.eye(t.shape[1], dtype=torch.float64, device=tasks.device)
    random_v = torch.linalg.solve(eye - discounted, torch.einsum("nsa,nsa->ns", mean_reward, share))
    random_q = mean_reward + gamma[:, None, None] * torch.einsum("nsap,np->nsa", t, random_v)
    random_best = random_q.masked_fill(~has, -torch.inf).amax(-1)
    advantage = (best.v[:, 0] - random_best) * (1 - gamma[:, None]) * tasks.max_steps[:, None]

    states = t.shape[1]
    chain = t.gather(2, best.policy[:, 0, :, None, None].expand(-1, -1, 1, states))[:, :, 0]
    chain = torch.where(tasks.terminal[:, :, None], start[:, None], chain)
    power = torch.frexp(tasks.max_steps.double()).exponent  # ⌊log2⌋ + 1
    for k in range(int(power.max())):
        chain = torch.where((k < power)[:, None, None], chain @ chain, chain)
    p = (chain + 1e-12) * tasks.state_mask()[:, None]
    gini, entropy = 1 - (p * p).sum(-1), -torch.xlogy(p, p).sum(-1) / ns.log()[:, None]
    return Quality(*(x.masked_fill(start == 0, torch.inf).amin(-1) for x in (advantage, gini, entropy)))
