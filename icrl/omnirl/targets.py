"""What the learners of both models make of records: tokens, labels of every policy, and what each action brought."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from icrl.omnirl.distill import DPDConfig, Records
from icrl.omnirl.tags import EXPERTS, EXPLORER, START, UNKNOWN
from icrl.omnirl.tokens import Tokens
from icrl_kernels import model_based_q


class Labelled(Protocol):
    """What a configuration says of labels."""

    @property
    def model(self) -> Any:
        """Its `actions`, `policy_discounts` and `explorer_discount`."""
        ...

    @property
    def data(self) -> DPDConfig: ...

    @property
    def explorer_bonus(self) -> float:
        """Of the model-based learner that the explorer imitates: see icrl_kernels.model_based_q."""
        ...


def tokens_of(records: Records) -> Tokens:
    """The model's tokens of whole records `[B,T]`: each step beside the transition that led to it."""

    def shift(x: Tensor, first: float) -> Tensor:
        return torch.cat([torch.full_like(x[:, :1], first), x[:, :-1]], 1)

    return Tokens(
        records.observation,
        shift(records.observation, 0),
        shift(records.action, 0),
        shift(records.reward, 0.0),
        shift(records.done, START),
        shift(records.tag, UNKNOWN),
    )


class Targets(NamedTuple):
    """What a loss asks for, `[B,T,A,G]`: policies, and values (1-discount)·Q in raw reward units."""

    policy: Tensor
    value: Tensor


def targets_of(records: Records, config: Labelled) -> Targets:
    """The references' labels: optimal at each discount, and the model-based learner that watched the same history.

    They lie where the records do; the model-based learner runs on the CPU.
    """
    c = config.model
    explorer = model_based_q(
        records.observation.cpu(),
        records.action.cpu(),
        records.reward.cpu(),
        records.done.cpu(),
        config.data.states,
        c.actions,
        bonus=config.explorer_bonus,
        discount=c.explorer_discount,
        action_mask=_action_mask(records, config.data.states),
    ).to(records.q.device)
    q = torch.cat([records.q, explorer[:, :, None]], 2).transpose(-1, -2)
    best = q.amax(2, keepdim=True)
    ties = (q >= best - 1e-6 * (1 + best.abs())).float()
    known = _expert_seen(records, config.data.states)[..., None]
    ties[..., EXPLORER] = torch.where(known, ties[..., EXPERTS[-1]], ties[..., EXPLORER])
    discounts = torch.tensor(c.policy_discounts, dtype=torch.float32, device=q.device)
    return Targets(ties / ties.sum(2, keepdim=True), q * (1 - discounts))


def _expert_seen(records: Records, states: int) -> Tensor:
    """[B,T] bool: whether an expert was seen to act earlier where the agent is: then the explorer does what is optimal."""
    expert = torch.isin(records.tag, torch.tensor(EXPERTS, dtype=torch.int64, device=records.tag.device))
    here = F.one_hot(records.observation, states).bool()
    seen = (here & expert[..., None]).cumsum(1, dtype=torch.int32) > 0
    before = F.pad(seen[:, :-1], (0, 0, 1, 0))
    return (before & here).any(-1)


def _action_mask(records: Records, states: int) -> Tensor | None:
    """[B,states,A] bool on the CPU: what was seen lacks the actions whose value is −inf; None where nothing is lacking."""
    lacks = records.q[:, :, 0].isneginf().cpu()
    if not lacks.any():
        return None
    mask = torch.ones(len(lacks), states, lacks.shape[2], dtype=torch.bool, device="cpu")
    return mask.scatter_(1, records.observation.cpu()[..., None].expand_as(lacks), ~lacks)


class Transitions(NamedTuple):
    """What a world model is asked, `[B,T]` each: what actions brought."""

    action: Tensor  # int64
    reward: Tensor  # float32
    done: Tensor  # int64: 0 no, 1 terminated, 2 truncated; START where there was none
    observation: Tensor  # int64, after the action
    happened: Tensor  # bool: action, reward and done are of the record
    seen: Tensor  # bool: so is the observation, and it is where the action led, not where a new episode began


def previous_transitions(tokens: Tokens) -> Transitions:
    """At each step of whole records, the transition that led to it."""
    t = tokens
    happened = t.previous_done != START
    return Transitions(
        t.previous_action, t.previous_reward, t.previous_done, t.observation, happened, t.previous_done == 0
    )


def next_transitions(records: Records) -> Transitions:
    """At each step of whole records, the transition that follows. Where the last one led is not on record."""
    r = records
    last = torch.zeros_like(r.done[:, :1], dtype=torch.bool)
    seen = torch.cat([r.done[:, :-1] == 0, last], 1)
    following = torch.cat([r.observation[:, 1:], r.observation[:, -1:]], 1)
    return Transitions(r.action, r.reward, r.done, following, torch.ones_like(seen), seen)
