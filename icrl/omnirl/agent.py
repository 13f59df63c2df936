"""OmniRL acting: a model and its state in a batch of environments."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from icrl.omnirl.model import OmniRL, Output, State, Tokens
from icrl.omnirl.tags import EXPLORER, START, UNKNOWN


class Temperature(NamedTuple):
    """Of the sampling of actions: from `start` to `end`, linearly over the first `steps` steps of a context."""

    start: float = 0.5
    end: float = 0.1
    steps: int = 300

    def at(self, step: int) -> float:
        return self.start + (self.end - self.start) * min(1.0, step / max(1, self.steps))


class Agent:
    """Acts in a batch of tasks with one context each, learning from nothing but that context.

    Args:
        model: an OmniRL. batch: how many tasks. states: capacity for observations (at least the largest task's).
        prompt: which policy to imitate, by its tag: 0..3, the optimal one at `model.config.discounts[prompt]`; 4, the
            optimistic model-based learner, which explores.
        temperature: of sampling. seed: of sampling.
        num_actions: `[batch]` or int, where a task has fewer actions than the model; actions beyond wrap around.
    """

    def __init__(
        self,
        model: OmniRL,
        batch: int,
        states: int,
        *,
        prompt: int = EXPLORER,
        temperature: Temperature | None = None,
        seed: int = 0,
        num_actions: Tensor | int | None = None,
    ) -> None:
        c = model.config
        if not 0 <= prompt < c.policies:
            raise ValueError(f"prompt: wanted a tag in 0..{c.policies - 1}, got {prompt}")
        self.model: Callable[[Tokens, State], tuple[Output, State]] = model
        self.prompt, self.temperature = prompt, temperature or Temperature()
        self.num_actions = c.actions if num_actions is None else num_actions
        largest = int(torch.as_tensor(self.num_actions).max())
        least = int(torch.as_tensor(self.num_actions).min())
        if least < 1 or largest > c.actions:
            raise ValueError(f"num_actions: wanted 1 to {c.actions}, the model's, got {least} to {largest}")
        self.generator = torch.Generator().manual_seed(seed)
        self.state = model.initial_state(batch, states)
        zeros = torch.zeros(batch, dtype=torch.int64)
        self.step = 0
        self._observation = zeros
        self._previous = (zeros, zeros + c.actions, torch.zeros(batch), zeros + START, zeros + UNKNOWN)

    @torch.no_grad()
    def act(self, observation: Tensor) -> Tensor:
        """Observations `[batch]` int64 -> actions of the tasks `[batch]`."""
        tokens = Tokens(*(x[:, None] for x in (observation, *self._previous)))
        output, self.state = self.model(tokens, self.state)
        logits = output.readouts[-1].logits[:, 0, :, self.prompt]
        noise = -torch.log(-torch.log(torch.rand(logits.shape, generator=self.generator).clamp_(1e-9, 1 - 1e-7)))
        self._observation = observation
        self._action = (logits / self.temperature.at(self.step) + noise).argmax(-1)
        self.step += 1
        return self._action % self.num_actions

    def observe(self, reward: Tensor, done: Tensor, tag: int = UNKNOWN) -> None:
        """What the last action brought: reward `[batch]`, done `[batch]` (0 no, 1 terminated, 2 truncated)."""
        tags = torch.full_like(self._action, tag)
        self._previous = (self._observation, self._action, reward.float(), done.long(), tags)
