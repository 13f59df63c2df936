"""A model acting: the model and its state in a batch of environments."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from icrl.omnirl.labels import name_others
from icrl.omnirl.tags import EXPLORER, START, TAGS, UNKNOWN
from icrl.omnirl.tokens import Tokens
from icrl_kernels import threads_here
from icrl_kernels.arguments import dense, integer, number

# Up to so many contexts a step's operators are too short for a second thread: it brings nothing on a quiet machine, and
# beside busy processes each of them waits for it (benches/NOTES.md, "Threads").
ONE_THREAD = 64
MOST_REWARD = 1e15  # the model sums squares of rewards in float32


@dataclass(frozen=True)
class Temperature:
    """Of the sampling of actions: from `start` to `end`, linearly over the first `steps` steps of a context. 0 takes the best.

    Raises ValueError for a temperature below 0 or not finite.
    """

    start: float = 0.5
    end: float = 0.1
    steps: int = 300

    def __post_init__(self) -> None:
        for name in ("start", "end"):
            value = number(name, getattr(self, name))
            if not 0 <= value < math.inf:
                raise ValueError(f"{name}: wanted a finite temperature of at least 0, got {value}")
            object.__setattr__(self, name, value)
        object.__setattr__(self, "steps", integer("steps", self.steps, 0))

    def at(self, step: int) -> float:
        return self.start + (self.end - self.start) * min(1.0, step / max(1, self.steps))


class Model(Protocol):
    """What an agent asks of a model: see ValueIterationNetwork."""

    title: str
    labels: int
    labels_named: bool

    @property
    def actions(self) -> int: ...

    @property
    def prompts(self) -> int:
        """How many policies a prompt may ask for: tags 0 to prompts-1."""
        ...

    @property
    def device(self) -> torch.device: ...

    def initial_state(self, batch: int, states: int) -> Any: ...

    def decide(self, tokens: Tokens, prompt: int, state: Any) -> Tensor: ...


class Agent:
    """Acts in a batch of tasks with one context each, learning from nothing but that context.

    It warns, once for each model, where that has learned other labels than are made today (icrl.omnirl.labels).

    It lives on its model's device: actions come from there, and what it is given is brought there. A seed's draws are made
    on the CPU and are the same for every device.

    Args:
        model: what acts. batch: how many tasks. states: capacity for observations (at least the largest task's).
        prompt: which policy to imitate, by its tag: 0..3, the optimal one at `model.config.discounts[prompt]`; 4, the
            optimistic model-based learner, which explores.
        temperature: of sampling. seed: of sampling.
        num_actions: `[batch]` or int, where a task has fewer actions than the model; actions beyond wrap around.
    Raises:
        ValueError: naming the argument that is of another type, shape or range. Values of what `act` and `observe` are given
            are looked at on a CPU alone: on a GPU the host would have to wait.
    """

    def __init__(
        self,
        model: Model,
        batch: int,
        states: int,
        *,
        prompt: int = EXPLORER,
        temperature: Temperature | None = None,
        seed: int = 0,
        num_actions: Tensor | int | None = None,
    ) -> None:
        self.batch, self.states = integer("batch", batch, 1), integer("states", states, 1)
        if not model.labels_named:  # once for a model, however many agents it has
            name_others("the model", model.labels)
            model.labels_named = True
        self.device = model.device
        self.run: Callable[[Tokens, int, Any], Tensor] = model.decide
        """What runs the model: (tokens, prompt, state) -> logits; it changes the state in place. Replace it by
        `torch.compile(model.decide)` for a faster one."""
        self.prompt = integer("prompt", prompt, 0, model.prompts - 1)
        self.temperature = Temperature() if temperature is None else temperature
        if not isinstance(self.temperature, Temperature):
            raise ValueError(f"temperature: wanted a Temperature, got {temperature!r}")
        if isinstance(num_actions, Tensor) and num_actions.dim():
            self._check("num_actions", num_actions)
            least, largest = int(num_actions.min()), int(num_actions.max())
            self.num_actions: Tensor | int = num_actions.to(self.device)
        else:
            self.num_actions = model.actions if num_actions is None else integer("num_actions", num_actions)
            least = largest = self.num_actions
        if least < 1 or largest > model.actions:
            raise ValueError(f"num_actions: wanted 1 to {model.actions}, the model's, got {least} to {largest}")
        self.generator = torch.Generator().manual_seed(integer("seed", seed, -(2**63), 2**64 - 1))
        self.state = model.initial_state(self.batch, self.states)
        self._alone = self.device.type == "cpu" and self.batch <= ONE_THREAD
        zeros = torch.zeros(self.batch, dtype=torch.int64, device=self.device)
        self.step = 0
        self._actions = model.actions
        self._observation = zeros
        self._action: Tensor | None = None
        self._previous = (zeros, zeros + model.actions, zeros.float(), zeros + START, zeros + UNKNOWN)

    def _check(self, name: str, tensor: Tensor, of_integers: bool = True) -> None:
        dense(name, tensor)
        if tensor.shape != (self.batch,):
            raise ValueError(f"{name}: wanted shape [{self.batch}], one a task, got {list(tensor.shape)}")
        wrong = tensor.is_floating_point() or tensor.dtype == torch.bool if of_integers else False
        if wrong or tensor.is_complex():
            raise ValueError(f"{name}: wanted {'integers' if of_integers else 'real numbers'}, got {tensor.dtype}")

    @torch.no_grad()
    def act(self, observation: Tensor, action_mask: Tensor | None = None) -> Tensor:
        """Observations `[batch]` of integers, on any device -> actions of the tasks `[batch]` int64, on the model's.

        With an `action_mask` `[batch, A]` bool, A at most the model's number of actions, they are among those that it marks:
        one at least for each task, and of the task's own.
        """
        self._check("observation", observation)
        if observation.device.type == "cpu":
            low, high = (int(x) for x in observation.aminmax())
            if low < 0 or high >= self.states:
                raise ValueError(f"observation: wanted 0 to {self.states - 1}, got {low} to {high}")
        observation = observation.to(self.device, torch.int64)
        own = None if action_mask is None else self._own(action_mask)
        tokens = Tokens(*(x[:, None] for x in (observation, *self._previous)))
        with threads_here(1) if self._alone else nullcontext():
            logits = self.run(tokens, self.prompt, self.state)
            if own is not None:
                logits = logits.masked_fill(~own, -torch.inf)
            uniform = torch.rand(logits.shape, generator=self.generator, device="cpu", dtype=torch.float32)
            noise = -torch.log(-torch.log(uniform.clamp_(1e-9, 1 - 1e-7))).to(self.device)
            self._observation = observation
            # times the temperature, not logits by it: at 0 and next to it the best action is taken
            self._action = (logits + self.temperature.at(self.step) * noise).argmax(-1)
        self.step += 1
        return self._action % self.num_actions

    def _own(self, action_mask: Tensor) -> Tensor:
        """The mask over all of the model's actions."""
        dense("action_mask", action_mask)
        if action_mask.dtype != torch.bool or action_mask.dim() != 2 or len(action_mask) != self.batch:
            given = f"{list(action_mask.shape)} of {action_mask.dtype}"
            raise ValueError(f"action_mask: wanted [{self.batch}, A] of bool, got {given}")
        given = action_mask.shape[1]
        if given > self._actions:
            raise ValueError(f"action_mask: wanted at most {self._actions} actions, the model's, got {given}")
        most = self.num_actions if isinstance(self.num_actions, int) else self.num_actions[:, None]
        own = torch.arange(given, dtype=torch.int64, device=self.device) < most
        own = own & action_mask.to(self.device)
        if own.device.type == "cpu" and not bool(own.any(1).all()):
            task = int((~own.any(1)).nonzero()[0])
            raise ValueError(f"action_mask: wanted an action or more of each task's own, got none for task {task}")
        return torch.nn.functional.pad(own, (0, self._actions - given))

    def observe(self, reward: Tensor, done: Tensor, tag: int = UNKNOWN) -> None:
        """What the last action brought: reward `[batch]`, done `[batch]` (0 no, 1 terminated, 2 truncated), on any device.

        Raises RuntimeError before the first action.
        """
        if self._action is None:
            raise RuntimeError("observe: there is no action yet that brought this, call act first")
        self._check("reward", reward, of_integers=False)
        self._check("done", done, of_integers=False)
        reward = reward.to(torch.float32)
        if reward.device.type == "cpu" and not bool((reward.abs() <= MOST_REWARD).all()):
            raise ValueError(
                f"reward: wanted finite numbers of at most {MOST_REWARD:g} in size, got {reward.tolist()!s:.80}"
            )
        if done.device.type == "cpu" and not bool(((done == 0) | (done == 1) | (done == 2)).all()):
            raise ValueError(f"done: wanted 0, 1 or 2, got {done.tolist()!s:.80}")
        self._previous = (
            self._observation,
            self._action,
            reward.to(self.device),
            done.to(self.device, torch.int64),
            torch.full_like(self._action, integer("tag", tag, 0, TAGS - 1)),
        )
