"""What a model's fused step is given with each call: one order for every model, which Agent and the closed loop keep to."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch

from icrl_kernels.fused import Program
from icrl_kernels.fused.program import Slot


class StepInputs(NamedTuple):
    own: Slot
    """How many actions each task has: bound once. All others are given with each call, in this order."""
    observation: Slot
    reward: Slot
    done: Slot
    tag: Slot
    noise: Slot
    temperature: Slot
    mask: Slot
    task_action: Slot
    """Where to write the tasks' actions, and, or 0, the logits."""
    logits: Slot
    previous: Slot
    """Where the agents were and what they did there, as the step before wrote it."""
    action: Slot
    kept: Slot
    """Where to write that of this step."""
    chosen: Slot

    def choice(self) -> list[Slot]:
        """The tensors of the op "choose_action"."""
        return [
            self.noise,
            self.temperature,
            self.mask,
            self.own,
            self.observation,
            self.chosen,
            self.task_action,
            self.kept,
            self.logits,
        ]


def step_inputs(p: Program, actions: int, observations: int) -> StepInputs:
    """The tensors of a program for a model of so many actions, of contexts where so many observations may come."""
    own, given = p.tensor("num_actions", dtype=torch.int64), partial(p.tensor, each_call=True)
    return StepInputs(
        own,
        given("observation", dtype=torch.int64, below=observations),
        given("reward"),
        given("done", dtype=torch.uint8),
        given("tag", shared=True),
        given("noise", actions),
        given("temperature", shared=True),
        given("mask", actions, dtype=torch.bool, optional=True),
        given("task_action", dtype=torch.int64),
        given("logits", actions, optional=True),
        given("previous", dtype=torch.int64, below=observations),
        given("action", dtype=torch.int64, below=actions + 1),
        given("kept", dtype=torch.int64),
        given("chosen", dtype=torch.int64),
    )
