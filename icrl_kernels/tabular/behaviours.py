"""The policies that act in a simulated record: tables, and those that need none."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from icrl_kernels import _checks

BUILTIN = ("uniform", "random_policy", "q_learning", "model_based")
"""Behaviours that need no table; with P policy tables they have the indices P, P+1, P+2, P+3."""


class Behaviours(NamedTuple):
    """The policies that act in each of R records, all float32. M = P + 4 behaviours: P policy tables, then `BUILTIN`.

    A record's first behaviour is drawn by `initial`; at the end of an episode, with probability `switch`, another is
    drawn by `later`. Under all of them the action is uniform with probability max(0, epsilon - epsilon_decay·step).

    `random_policy` is a softmax of policy_scale·N(0,1) logits, one policy a record. `q_learning` has the rate
    (H+1)/(H+n), H = 1/(1-q_discount) (Jin et al., 2018) and takes argmax Q + q_bonus·σ·sqrt(log(1+Σn)/n).
    `model_based` counts, and sweeps optimistic value iteration once over the states a step, with the bonus
    model_bonus·σ/sqrt(n); an untried action is worth (the best mean reward + bonus seen + σ)/(1-model_discount). σ is
    the root mean square of the record's rewards. Both learners observe every step, also those of other behaviours.

    None of them takes an action that the state lacks: uniform actions and the softmax are over those that the state has,
    and so are the learners' maxima.
    """

    initial: Tensor  # [R,M] weights
    later: Tensor  # [R,M] weights
    switch: Tensor  # [R]
    epsilon: Tensor  # [R]
    epsilon_decay: Tensor  # [R], per step
    policy_scale: Tensor  # [R]
    q_bonus: Tensor  # [R]
    q_discount: Tensor  # [R]
    model_bonus: Tensor  # [R]
    model_discount: Tensor  # [R]


def constant_behaviours(
    num_records: int, num_policies: int, weights: dict[int | str, float], **settings: float
) -> Behaviours:
    """The same `Behaviours` for every record: weights by policy index or `BUILTIN` name, the rest by field name."""
    return same_behaviours(num_records, num_policies, weights, torch.device("cpu"), **settings)


def same_behaviours(
    num_records: int, num_policies: int, weights: dict[int | str, float], device: torch.device, **settings: float
) -> Behaviours:
    """As `constant_behaviours`, on any device."""
    num_records = _checks.integer("num_records", num_records, 0)
    num_policies = _checks.integer("num_policies", num_policies, 0)
    if not isinstance(weights, dict):
        raise ValueError(f"weights: wanted a dict of numbers by policy, got {type(weights).__name__}")
    names = {**{i: i for i in range(num_policies)}, **{name: num_policies + i for i, name in enumerate(BUILTIN)}}
    row = torch.zeros(num_policies + len(BUILTIN), dtype=torch.float32, device=device)
    for name, weight in weights.items():
        if name not in names:
            raise ValueError(f"weights: wanted a policy below {num_policies} or one of {BUILTIN}, got {name!r}")
        row[names[name]] = _checks.number(f"weights[{name!r}]", weight)
    values = {"switch": 0.0, "epsilon": 0.0, "epsilon_decay": 0.0, "policy_scale": 1.0}
    values |= {"q_bonus": 0.2, "q_discount": 0.9, "model_bonus": 0.3, "model_discount": 0.9}
    if unknown := set(settings) - set(values):
        raise ValueError(f"settings: wanted {', '.join(values)}, got {', '.join(sorted(unknown))}")
    values |= settings
    rows = row.expand(num_records, -1).contiguous()
    full = {name: row.new_full((num_records,), _checks.number(name, v)) for name, v in values.items()}
    return Behaviours(rows, rows, **full)


def check_shapes(behaviours: Behaviours, R: int, P: int) -> None:
    """ValueError if shapes, dtypes or layouts are not `Behaviours`'. Reads no values."""
    for name, tensor in behaviours._asdict().items():
        wanted = (R, P + len(BUILTIN)) if name in ("initial", "later") else (R,)
        if tensor.shape != wanted or tensor.dtype != torch.float32:
            _checks.shape(name, tensor, wanted)
            _checks.dtype(name, tensor, [torch.float32])
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: wanted contiguous")


def check_values(behaviours: Behaviours) -> None:
    for name, tensor in behaviours._asdict().items():
        if name in ("q_discount", "model_discount"):
            ok, wanted = (tensor >= 0) & (tensor < 1), "values in [0, 1)"
        elif name in ("switch", "epsilon"):
            ok, wanted = (tensor >= 0) & (tensor <= 1), "values in [0, 1]"
        else:
            ok, wanted = (tensor >= 0) & tensor.isfinite(), "finite values >= 0"
        if not bool(ok.all()):
            raise ValueError(f"{name}: wanted {wanted}")
    if not bool((behaviours.initial.sum(1) > 0).all()):
        raise ValueError("initial: wanted a positive weight in every record")
    if not bool(((behaviours.later.sum(1) > 0) | (behaviours.switch == 0)).all()):
        raise ValueError("later: wanted a positive weight in every record that switches")
