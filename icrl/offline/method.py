"""What in-context learners from offline data have in common: spaces, prompts, acting. S-ICQL and its rivals build on it.

A `Method` is trained on `Trajectories` by `icrl.offline.learner.OfflineLearner` and judged by `icrl.offline.few_shot`: it has a
loss, and makes agents that start with no experience of their tasks. All that it computes lies on its weights' device; batches
are drawn on the CPU, by torch's global generator there.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icrl.models.trunk import TrunkConfig
from icrl.offline.trajectories import Trajectories
from icrl_kernels import layers
from icrl_kernels.arguments import dense, integer, integer_fields

if TYPE_CHECKING:
    from icrl.offline.world_model import WorldModel

Metrics = dict[str, Tensor]
"""What to log of a loss: 0-dimensional tensors without a graph, on the model's device, so that none is waited for."""


class Spaces(NamedTuple):
    """Of an environment: what a method's networks are made for."""

    environment: str
    state_size: int
    num_actions: int  # 0: actions are vectors
    action_size: int  # channels of an action's features

    @classmethod
    def of(cls, data: Trajectories) -> Spaces:
        return cls(data.environment, data.state_size, data.num_actions, data.action_size)

    def features(self, actions: Tensor) -> Tensor:
        return F.one_hot(actions, self.num_actions).float() if self.num_actions else actions


@dataclass(frozen=True)
class MethodConfig:
    """Of every method."""

    trunk: TrunkConfig = field(default_factory=TrunkConfig)
    horizon: int = 100
    """Steps of an episode: what a prompt, or each episode of a history, holds."""
    batch: int = 128

    def __post_init__(self) -> None:
        integer_fields(self, horizon=1, batch=1)


class Agent(Protocol):
    """Acts in B tasks at once, from no experience on. Its tensors, given and returned, lie on its method's device."""

    def begin(self) -> None:
        """An episode begins, in every task."""
        ...

    def act(self, state: Tensor) -> Tensor:
        """States [B,S] -> actions, [B] int64 or [B,A] float32."""
        ...

    def observe(self, state: Tensor, action: Tensor, reward: Tensor, next_state: Tensor) -> None:
        """What the last action brought: rewards [B], states as in `act`."""
        ...


class Method(nn.Module):
    """An in-context learner. `mean` and `std` [S] of the data's states are kept with the weights.

    A file in `icrl.offline.methods` with a subclass that has a `name`, a `title` and a `config_class` is one more method.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    """In tables and pictures."""
    config_class: ClassVar[type[MethodConfig]]
    mean: Tensor
    std: Tensor

    def __init__(self, config: Any, spaces: Spaces) -> None:
        super().__init__()
        self.config, self.spaces = config, spaces
        self.register_buffer("mean", torch.empty(spaces.state_size))
        self.register_buffer("std", torch.empty(spaces.state_size))
        Method.reset_parameters(self)

    def reset_parameters(self) -> None:
        """Give first values to the parameters and buffers that are no submodule's; `prepare` then takes the data's."""
        nn.init.zeros_(self.mean)
        nn.init.ones_(self.std)

    @classmethod
    def make(cls, config: Any, spaces: Spaces, world_model: WorldModel | None = None) -> Method:
        """A fresh one on the CPU. Raises ValueError for a world model where none is used."""
        if world_model is not None:
            raise ValueError(f"world_model: {cls.name} uses none")
        return cls(config, spaces)

    @staticmethod
    def needs_world_model(config: Any) -> bool:
        """Whether a method of this configuration reads a world model, which is then trained first."""
        return False

    @staticmethod
    def check_window(config: Any, window: int) -> None:
        """ValueError where a world model of `window` steps does not suit the configuration."""

    @staticmethod
    def check_compile(config: Any) -> None:
        """ValueError where the objective of this configuration cannot be compiled once for all updates."""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.mean.device

    def prepare(self, data: Trajectories) -> None:
        """Once before training on this data, which lies on the method's device. Raises ValueError where it does not suit."""
        data.check_length("horizon", self.config.horizon)
        mean, std = data.moments()
        self.mean.copy_(mean)
        self.std.copy_(std)

    def draw(self, data: Trajectories) -> Any:
        """A batch: numbers drawn on the CPU, what they stand for on the data's device."""
        raise NotImplementedError

    def objective(self, data: Trajectories, batch: Any) -> tuple[Tensor, Metrics]:
        """The loss of a batch that `draw` returned, and what to log. A function of its arguments and the weights alone: it
        draws nothing, reads no value and changes nothing, so that it can be compiled."""
        raise NotImplementedError

    def loss(self, data: Trajectories) -> tuple[Tensor, Metrics]:
        """Of one batch drawn from the data, and what to log."""
        return self.objective(data, self.draw(data))

    def before_update(self) -> None:
        """Before each batch: moving averages and the like."""

    def agent(self, batch: int) -> Agent:
        raise NotImplementedError

    def normal(self, states: Tensor) -> Tensor:
        return (states - self.mean) / self.std

    def transitions(self, states: Tensor, actions: Tensor, rewards: Tensor, next_states: Tensor) -> Tensor:
        """[..., 2S+A+1] features of raw transitions."""
        a = self.spaces.features(actions)
        return torch.cat([self.normal(states), a, rewards[..., None], self.normal(next_states)], -1)

    def imitation(self, output: Tensor, actions: Tensor) -> Tensor:
        """How far a policy's output is from actions [...]: cross-entropy where discrete, squared error where not."""
        if self.spaces.num_actions:
            return F.cross_entropy(output.movedim(-1, 1), actions, reduction="none")
        return (output - actions).square().mean(-1)

    def choose(self, output: Tensor) -> Tensor:
        """The action of a policy's output: sampled where discrete, the mean where not."""
        if self.spaces.num_actions:
            return torch.distributions.Categorical(logits=output).sample()
        return output


def numbers(metrics: Metrics) -> dict[str, float]:
    """The values of 0-dimensional tensors, waited for once."""
    return dict(zip(metrics, torch.stack([x.float() for x in metrics.values()]).tolist(), strict=True))


def deviation(values: Tensor) -> Tensor:
    """The standard deviation of some values, at least 1e-6; 1 of a single one, which has none."""
    return values.std().clamp_min(1e-6) if values.numel() > 1 else torch.ones_like(values.sum())


class Head(nn.Sequential):
    """A readout; in float32 under autocast too, for small differences of values become weights."""

    def forward(self, input: Tensor) -> Tensor:
        kind = input.device.type
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False):
                return super().forward(input.float())
        return super().forward(input)


def head(width: int, outputs: int) -> Head:
    """A readout with two hidden layers; its last layer starts small."""
    first, second = layers.Linear(width, width), layers.Linear(width, width)
    return Head(first, nn.ReLU(), second, nn.ReLU(), layers.Linear(width, outputs).start(_small))


def target_of(net: nn.ModuleList) -> nn.ModuleList:
    """A copy to follow the net's weights, which its first weights are, after `reset_parameters` too; no gradients."""
    target = deepcopy(net).requires_grad_(False)
    for layer, online in zip(target.modules(), net.modules(), strict=True):
        if isinstance(layer, layers.Linear) and isinstance(online, nn.Linear):
            layer.start(partial(_as, online=online))
    return target


@torch.no_grad()
def _as(layer: nn.Linear, online: nn.Linear) -> None:
    layer.weight.copy_(online.weight)
    layer.bias.copy_(online.bias)


def _small(layer: nn.Linear) -> None:
    nn.init.normal_(layer.weight, std=0.02)
    nn.init.zeros_(layer.bias)


class Episode:
    """The steps of the current episode, in every task.

    What an agent is given goes through `see` and `add`, which raise ValueError, naming the argument, for another shape or
    type, and RuntimeError for an outcome without an action or an action without an episode. Values are looked at on a CPU alone: a GPU's host would wait.
    """

    def __init__(self, batch: int, spaces: Spaces, begun: bool = True) -> None:
        self.batch, self.spaces, self.begun, self.acts = integer("batch", batch, 1), spaces, begun, False
        self.steps: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def see(self, state: Tensor) -> None:
        """The states in which the agent is about to act."""
        if not self.begun:
            raise RuntimeError("act: no episode has begun, call begin first")
        self._check("state", state, self.spaces.state_size)
        self.acts = True

    def add(self, state: Tensor, action: Tensor, reward: Tensor, next_state: Tensor) -> None:
        """What the last action brought."""
        if not self.acts:
            raise RuntimeError("observe: there is no action that brought this, call act first")
        self._check("state", state, self.spaces.state_size)
        self._check("reward", reward)
        self._check("next_state", next_state, self.spaces.state_size)
        if not self.spaces.num_actions:
            self._check("action", action, self.spaces.action_size)
        else:
            dense("action", action)
            if action.shape != (self.batch,) or action.dtype != torch.int64:
                raise ValueError(
                    f"action: wanted [{self.batch}] of torch.int64, got {list(action.shape)} of {action.dtype}"
                )
            if action.device.type == "cpu" and bool(((action < 0) | (action >= self.spaces.num_actions)).any()):
                raise ValueError(f"action: wanted 0 to {self.spaces.num_actions - 1}, got {action.tolist()!s:.80}")
        self.steps.append((state, action, reward, next_state))
        self.acts = False

    def _check(self, name: str, x: Tensor, *size: int) -> None:
        dense(name, x)
        if x.shape != (self.batch, *size) or x.dtype != torch.float32:
            wanted = f"{[self.batch, *size]} of torch.float32"
            raise ValueError(f"{name}: wanted {wanted}, got {list(x.shape)} of {x.dtype}")
        if x.device.type == "cpu" and not bool(x.isfinite().all()):
            raise ValueError(f"{name}: wanted finite numbers, got NaN or infinity")

    def stacked(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """states [B,h,S], actions [B,h,...], rewards [B,h], next_states [B,h,S]."""
        s, a, r, n = (torch.stack(x, 1) for x in zip(*self.steps, strict=True))
        return s, a, r, n
