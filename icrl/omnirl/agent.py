"""A model acting: the model and its state in a batch of environments."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from icrl.omnirl import sequence_step, value_iteration_step
from icrl.omnirl.labels import name_others
from icrl.omnirl.model import OmniRL
from icrl.omnirl.sequence_step import SequenceStep
from icrl.omnirl.tags import EXPLORER, START, TAGS, UNKNOWN
from icrl.omnirl.tokens import Tokens
from icrl.omnirl.value_iteration_step import ValueIterationStep
from icrl_kernels import threads_here
from icrl_kernels.arguments import dense, integer, number
from icrl_kernels.fused import plain_integers, plain_outcome, watched

# Up to so many contexts a step's operators are too short for a second thread: it brings nothing on a quiet machine, and
# beside busy processes each of them waits for it (benches/NOTES.md, "Threads").
ONE_THREAD = 64
MOST_REWARD = 1e15  # the model sums squares of rewards in float32
AHEAD = 64  # the fused step draws the noise of so many steps at once, and looks so often whether weights have changed
MOST_AHEAD = 1 << 16  # numbers that are drawn at once, at most
SEGMENT = 512  # steps that are read at once
LOOK = 4096  # and it looks so often whether the model is still one that it serves


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

    def follow(self, tokens: Tokens, prompt: int, state: Any) -> Any: ...


class _Place:
    """Where the agents were, and what they did there: `[B]` int64 each."""

    def __init__(self, observation: Tensor, action: Tensor) -> None:
        self.observation, self.action = observation, action
        self.at = observation.data_ptr(), action.data_ptr()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Place, (self.observation, self.action)  # a copy has addresses of its own


class _Outcome:
    """What that brought: float32 and uint8 (off the CPU int64), `[B]` each, at these addresses, and the tag of who acted."""

    __slots__ = ("done", "given", "reward", "tag")

    def __init__(self, reward: Tensor, done: Tensor, tag: int, at: tuple[int, int] | None = None) -> None:
        self.reward, self.done, self.tag = reward, done, tag
        self.given = (*(at or (reward.data_ptr(), done.data_ptr())), tag)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Outcome, (self.reward, self.done, self.tag)


class _Noise:
    """Gumbel noise of the next steps, drawn for some of them at once: the same numbers however many those are."""

    def __init__(self, generator: torch.Generator, batch: int, actions: int) -> None:
        self.generator, self.size, self.next, self.steps = generator, (batch, actions), 0, 0
        self.bytes = 4 * batch * actions  # of a step

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "actions": ()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self.steps:
            self.at = self.values.data_ptr()

    def need(self, steps: int) -> int:
        """The number of the next step's noise in `values`; where there is none left, that of `steps` steps is drawn first."""
        if self.next == self.steps:
            uniform = torch.rand(steps, *self.size, generator=self.generator, device="cpu", dtype=torch.float32)
            self.values = -torch.log(-torch.log(uniform.clamp_(1e-9, 1 - 1e-7)))
            self.at, self.steps, self.next, self.actions = self.values.data_ptr(), steps, 0, ()
        return self.next

    def action(self, i: int) -> Tensor:
        """A new tensor for the actions of the step whose noise is number i: made for all steps at once."""
        if not self.actions:
            self.actions = torch.empty(self.steps, self.size[0], dtype=torch.int64, device="cpu").unbind()
        return self.actions[i]


class Agent:
    """Acts in a batch of tasks with one context each, learning from nothing but that context.

    It warns, once for each model, where that has learned other labels than are made today (icrl.omnirl.labels).

    It lives on its model's device: actions come from there, and what it is given is brought there. A seed's draws are made
    on the CPU and are the same for every device.

    A step is the model's module, or one call of C++ over a copy of its weights (icrl_kernels.fused): the same actions within
    rounding, up to some hundred times faster. That is taken where it serves: a ValueIterationNetwork, or an OmniRL whose
    observations are numbers, of float32 weights on the CPU, without hooks, which nothing replaces (`run`) or watches
    (autocast, a dispatch mode). Weights that change (but through `parameter.data`, which torch does not count), and tensors of
    the state that are put in others' places, are seen within 64 steps, and hooks within 4,096; noise is drawn for 64 steps at
    once.

    Args:
        model: what acts. batch: how many tasks. states: capacity for observations (at least the largest task's).
        prompt: which policy to imitate, by its tag: 0..3, the optimal one at `model.config.discounts[prompt]`; 4, the
            optimistic model-based learner, which explores.
        temperature: of sampling. seed: of sampling.
        num_actions: `[batch]` or int, where a task has fewer actions than the model; actions beyond wrap around.
        fused: whether a step is one call of C++: None, where that serves; False, never; True, always.
    Raises:
        ValueError: naming the argument that is of another type, shape or range; with fused=True also, here and by `act`, what
            keeps the fused step from serving. Values of what `act` and `observe` are given are looked at on a CPU alone: on
            a GPU the host would have to wait.
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
        fused: bool | None = None,
    ) -> None:
        self.batch, self.states = integer("batch", batch, 1), integer("states", states, 1)
        if not model.labels_named:  # once for a model, however many agents it has
            name_others("the model", model.labels)
            model.labels_named = True
        self.device, self.model = model.device, model
        self.run: Callable[[Tokens, int, Any], Tensor] = model.decide
        """What runs the model's module: (tokens, prompt, state) -> logits; it changes the state in place. Replace it by
        `torch.compile(model.decide)` for a faster one, where the fused step does not serve."""
        self._decide = self.run
        if fused is not None and not isinstance(fused, bool):
            raise ValueError(f"fused: wanted None, True or False, got {fused!r}")
        self.fused = fused
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
        self._on_cpu = self.device.type == "cpu"
        self._alone = self._on_cpu and self.batch <= ONE_THREAD
        self._actions = model.actions
        self.step = 0
        # of the last step that has been observed, and of the one that was acted since
        self._last, self._now = self._place(0, model.actions), self._place(0, 0)
        self._acted = self._turned = False
        reward = torch.zeros(self.batch, dtype=torch.float32, device=self.device)
        self._outcome = _Outcome(reward, torch.full_like(reward, START, dtype=torch.uint8), UNKNOWN)
        self._noise = _Noise(self.generator, self.batch, model.actions)
        self.state = model.initial_state(self.batch, self.states)
        if fused:
            self._look()

    def _place(self, observation: int, action: int) -> _Place:
        size = (self.batch,)
        filled = [torch.full(size, value, dtype=torch.int64, device=self.device) for value in (observation, action)]
        return _Place(*filled)

    def __getstate__(self) -> dict[str, Any]:
        """All but the fused step, which a copy makes for itself."""
        return {**vars(self), "_fused": None, "_look_at": 0}

    @property
    def state(self) -> Any:
        """All that the model keeps of the contexts; `act` changes it in place. One that replaces it goes on from there."""
        return self._state

    @state.setter
    def state(self, state: Any) -> None:
        self._state: Any = state
        self._fused: ValueIterationStep | SequenceStep | None = None
        self._look_at = self._renew_at = 0

    @property
    def _previous(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What `Tokens` says of the last step."""
        last, outcome = self._last, self._outcome
        return (
            last.observation,
            last.action,
            outcome.reward,
            outcome.done.long(),
            torch.full_like(last.action, outcome.tag),
        )

    def serving(self) -> ValueIterationStep | SequenceStep | None:
        """The fused step, if it serves a call that is made now; None: the module does. ValueError where `fused` is True."""
        if self.step >= self._look_at:
            self._look()
        fused = self._fused
        if fused is None:
            return None
        if self.step >= self._renew_at or self.prompt != fused.prompt or self.num_actions is not fused.own:
            self._renew_at = self.step + AHEAD
            if fused.stale or self.prompt != fused.prompt or self.num_actions is not fused.own:
                self._fused = None
                self._look()
                fused = self._fused
        if self.run is self._decide and not watched():
            return fused
        if self.fused:
            raise ValueError(
                "fused: wanted a call that the fused step serves: `run` is replaced, or autocast or a mode is on"
            )
        return None

    def _look(self) -> None:
        """Have a fused step of the weights as they are, where it serves the model; ValueError where it is to and does not."""
        self._look_at, self._renew_at = self.step + LOOK, self.step + AHEAD
        kind = sequence_step if isinstance(self.model, OmniRL) else value_iteration_step
        why = "it is switched off" if self.fused is False else kind.why_not(self.model)
        old = self._fused
        if why is None and (old is None or old.stale or old.step.replaced):
            try:
                model: Any = self.model
                step = SequenceStep if kind is sequence_step else ValueIterationStep
                self._fused = step(model, self._state, self.batch, self.states, self.prompt, self.num_actions)
            except ValueError as error:
                why = str(error)
        if why is None:
            return
        self._fused = None
        if self.fused:
            raise ValueError(f"fused: wanted a model that the fused step serves, but {why}")

    def _check(self, name: str, tensor: Tensor, of_integers: bool = True) -> None:
        dense(name, tensor)
        if tensor.shape != (self.batch,):
            raise ValueError(f"{name}: wanted shape [{self.batch}], one a task, got {list(tensor.shape)}")
        wrong = tensor.is_floating_point() or tensor.dtype == torch.bool if of_integers else False
        if wrong or tensor.is_complex():
            raise ValueError(f"{name}: wanted {'integers' if of_integers else 'real numbers'}, got {tensor.dtype}")

    def act(self, observation: Tensor, action_mask: Tensor | None = None) -> Tensor:
        """Observations `[batch]` of integers, on any device -> actions of the tasks `[batch]` int64, on the model's.

        With an `action_mask` `[batch, A]` bool, A at most the model's number of actions, they are among those that it marks:
        one at least for each task, and of the task's own.
        """
        fused = self.serving()
        if fused is None:
            action = self._act_by_module(observation, action_mask)
        else:
            action = self._act_fused(fused, observation, action_mask)
        self._acted, self._turned = True, False
        self._noise.next += 1
        self.step += 1
        return action

    def _act_fused(
        self, fused: ValueIterationStep | SequenceStep, observation: Tensor, action_mask: Tensor | None
    ) -> Tensor:
        at = plain_integers(observation, self.batch)
        if not at:
            self._check("observation", observation)
            observation = observation.to("cpu", torch.int64).contiguous()
            at = observation.data_ptr()
        own = None if action_mask is None else self._own(action_mask).contiguous()
        noise = self._noise
        i = noise.need(max(1, min(AHEAD, MOST_AHEAD // (self.batch * self._actions))))
        action = noise.action(i)
        fused.run(
            1 if self._alone else torch.get_num_threads(),
            at,
            *self._outcome.given,
            noise.at + i * noise.bytes,
            self.temperature.at(self.step),
            0 if own is None else own.data_ptr(),
            action.data_ptr(),
            0,
            *self._last.at,
            *self._now.at,
        )
        fused.told()
        return action

    # --- for a closed loop, which runs the fused step itself

    def ahead(self, steps: int) -> int:
        """How many of the next `steps` steps have their noise, which is drawn where none has."""
        i = self._noise.need(steps)
        return min(steps, self._noise.steps - i)

    def outcome(self) -> tuple[int, Tensor, Tensor]:
        """The tag and copies of the reward and the end that the next step reads."""
        return self._outcome.tag, self._outcome.reward.clone(), self._outcome.done.clone()

    def noise(self, steps: int) -> Tensor:
        """The noise `[steps,B,A]` of the next steps, which must be there."""
        return self._noise.values[self._noise.next : self._noise.next + steps]

    def places(self) -> tuple[int, int, int, int]:
        """Addresses of the last observation and action, and of those of the next step."""
        return *self._last.at, *self._now.at

    def went(self, steps: int, reward: Tensor, done: Tensor) -> None:
        """So many steps were made, the last of which brought this."""
        self._outcome = _Outcome(reward, done, UNKNOWN)
        if steps % 2:
            self._last, self._now = self._now, self._last
        self._acted = self._turned = True
        self._noise.next += steps
        self.step += steps

    @torch.no_grad()
    def _act_by_module(self, observation: Tensor, action_mask: Tensor | None) -> Tensor:
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
            i = self._noise.need(1)
            noise = self._noise.values[i].to(self.device)
            # times the temperature, not logits by it: at 0 and next to it the best action is taken
            action = (logits + self.temperature.at(self.step) * noise).argmax(-1)
        self._now.observation.copy_(observation)
        self._now.action.copy_(action)
        return action % self.num_actions

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
        if not self._acted:
            raise RuntimeError("observe: there is no action yet that brought this, call act first")
        at = plain_outcome(reward, done, self.batch, MOST_REWARD) if self._on_cpu else None
        if at is None:
            reward, done = self._judged(reward, done)
        self._outcome = _Outcome(reward, done, integer("tag", tag, 0, TAGS - 1), at)
        if not self._turned:
            self._last, self._now, self._turned = self._now, self._last, True

    @torch.no_grad()
    def read(self, observation: Tensor, action: Tensor, reward: Tensor, done: Tensor, tag: int = UNKNOWN) -> None:
        """Take what others did in these tasks into the contexts, as if it had been done here: offline data of any quality, or
        demonstrations. The next `act` begins from there; the temperature does not count steps that are read.

        Args:
            observation, action, reward, done: `[batch,T]` each, T at least 1, as `act` and `observe` take them, on any device;
                actions are the model's, from 0. tag: of who acted (icrl.omnirl.tags): 3 says that it was an expert.
        Raises:
            ValueError: naming the argument of another type, shape or range; nothing is read then. RuntimeError: there is an
                action whose outcome has not been observed.
        """
        if self._acted and not self._turned:
            raise RuntimeError("read: there is an action whose outcome is not known yet, call observe first")
        tag = integer("tag", tag, 0, TAGS - 1)
        given = {"observation": observation, "action": action, "done": done, "reward": reward}
        for name, tensor in given.items():
            dense(name, tensor)
            if (
                tensor.dim() != 2
                or len(tensor) != self.batch
                or not tensor.shape[1]
                or tensor.shape != observation.shape
            ):
                raise ValueError(f"{name}: wanted [{self.batch},T] with T of at least 1, got {list(tensor.shape)}")
            if tensor.is_complex() or (name != "reward" and (tensor.is_floating_point() or tensor.dtype == torch.bool)):
                raise ValueError(
                    f"{name}: wanted {'real numbers' if name == 'reward' else 'integers'}, got {tensor.dtype}"
                )
        observation, action, done = (x.to(self.device, torch.int64) for x in (observation, action, done))
        reward = reward.to(self.device, torch.float32)
        wanted = (
            ("observation", observation, self.states),
            ("action", action, self._actions),
            ("done", done, START),
        )
        for name, tensor, below in wanted:
            low, high = (int(x) for x in tensor.aminmax())
            if low < 0 or high >= below:
                raise ValueError(f"{name}: wanted 0 to {below - 1}, got {low} to {high}")
        if not bool((reward.abs() <= MOST_REWARD).all()):
            raise ValueError(f"reward: wanted finite numbers of at most {MOST_REWARD:g} in size, got others")
        steps = (observation, action, reward, done, torch.full_like(action, tag))
        before = (torch.cat([last[:, None], x[:, :-1]], 1) for last, x in zip(self._previous, steps, strict=True))
        tokens, state = Tokens(observation, *before), self._state
        with threads_here(1) if self._alone else nullcontext():
            for begin in range(0, observation.shape[1], SEGMENT):
                segment = Tokens(*(x[:, begin : begin + SEGMENT] for x in tokens))
                state = self.model.follow(segment, self.prompt, state)
        self.state = state
        last = [x[:, -1].contiguous() for x in steps]
        self._last, self._now = _Place(last[0], last[1]), self._place(0, 0)
        self._outcome = _Outcome(*self._judged(last[2], last[3]), tag)
        self._acted = self._turned = True

    def _judged(self, reward: Tensor, done: Tensor) -> tuple[Tensor, Tensor]:
        """Any real rewards and ends, as an outcome keeps them; ValueError for those that no step brings."""
        self._check("reward", reward, of_integers=False)
        self._check("done", done, of_integers=False)
        reward = reward.to(torch.float32)
        if reward.device.type == "cpu" and not bool((reward.abs() <= MOST_REWARD).all()):
            raise ValueError(
                f"reward: wanted finite numbers of at most {MOST_REWARD:g} in size, got {reward.tolist()!s:.80}"
            )
        if done.device.type == "cpu" and not bool(((done == 0) | (done == 1) | (done == 2)).all()):
            raise ValueError(f"done: wanted 0, 1 or 2, got {done.tolist()!s:.80}")
        kept = torch.uint8 if self._on_cpu else torch.int64
        return reward.to(self.device).resolve_neg().contiguous(), done.to(self.device, kept).contiguous()
