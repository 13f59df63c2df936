"""How a step's observation, prompt, tag, action and reward become tokens of a sequence: one a step, or one each."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icrl.models.mixers import Addresses
from icrl.models.tokenizers import Table
from icrl.omnirl.tags import TAGS
from icrl.omnirl.tokens import Tokens
from icrl_kernels import layers

REWARD_FEATURES = 4


def reward_features(reward: Tensor) -> Tensor:
    """`[...]` -> `[...,4]`: rewards, in units of their root mean square, at four scales."""
    return torch.stack([(reward / 5).clamp(-6, 6), *(torch.tanh(c * reward) for c in (1, 5, 25))], -1)


class Parts(NamedTuple):
    """What the tokens of `[B,T]` steps are made of."""

    tokens: Tokens
    here: Tensor  # [B,T,K] code of the observation
    before: Tensor  # [B,T,K] code of the previous one
    reward: Tensor  # [B,T,4] features of the previous reward
    prompt: Tensor  # [B,T] int64


def check_arrangement(arrangement: str) -> None:
    """ValueError unless it is an order of a step's letters that a model can act by."""

    def refused(why: str) -> ValueError:
        return ValueError(f"arrangement: wanted an order as 'opdtawr', {why}, got {arrangement!r}")

    if not isinstance(arrangement, str) or set(arrangement) - set("opdtawr"):
        raise refused("of the letters o, p, d, t, a, w and r")
    for letter in "opdtawr":
        if (n := arrangement.count(letter)) > 1 or (n == 0 and letter not in "pt"):
            raise refused(f"with one {letter}")
    place = {letter: i for i, letter in enumerate(arrangement)}
    for earlier, later in ("od", "pd", "da", "dt", "aw", "wr"):
        if earlier in place and later in place and place[earlier] > place[later]:
            raise refused(f"with {earlier} before {later}")


def _scattered(weight: Tensor, std: float, begin: int) -> None:
    """Normal from channel `begin` on, rows `[...,D]`; 0 before."""
    weight.normal_().mul_(std)
    weight[..., :begin] = 0


def _identity(layer: nn.Linear, begin: int) -> None:
    with torch.no_grad():
        K = layer.in_features
        weight = torch.zeros(layer.weight.shape, dtype=torch.float32, device=layer.weight.device)
        weight[begin : begin + K] = torch.eye(K, dtype=torch.float32, device=weight.device)
        layers.fill(layer.weight, weight)


def _one_hot(weight: Tensor, begin: int) -> None:
    rows = len(weight)
    weight.zero_()
    weight[:, begin : begin + rows] = 2 * torch.eye(rows, dtype=weight.dtype, device=weight.device)


def _with_constant(weight: Tensor, std: float, begin: int, constant: int) -> None:
    _scattered(weight, std, begin)
    weight[:, constant] = 1


def _columns(layer: nn.Linear, std: float, begin: int) -> None:
    """As `_scattered`, of a layer's outputs."""
    with torch.no_grad():
        layer.weight.normal_().mul_(std)
        layer.weight[:begin] = 0
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


class FusedTokens(nn.Module):
    """One token a step: the sum of what the observation, the previous one, the previous action, both of them together, the
    previous reward, end and tag, and the prompt are embedded in.

    With `addressed` first weights, the observation's code, the previous one's, the previous action and a constant have channels
    of their own, where `AddressedDeltaNet` reads them.
    """

    per_step = 1
    decision = world = 0
    """Of the tokens of a step: where the decision is read, and the world model."""
    world_actions: bool = True
    """Whether the world model is asked for an action that no token has told."""

    def __init__(self, width: int, size: int, actions: int, prompted: bool, addressed: bool) -> None:
        super().__init__()
        begin = 2 * size + actions + 2 if addressed else 0
        if width < begin + 8:
            raise ValueError(f"width: wanted at least {begin + 8}, for addresses of {size} channels, got {width}")
        self.begin = begin
        self.addresses = Addresses(0, size, 2 * size, 2 * size + actions + 1, actions, begin) if addressed else None
        self.observation = layers.Linear(size, width, bias=False)
        self.previous_observation = layers.Linear(size, width, bias=False)
        self.joint = layers.Linear(size, (actions + 1) * (width - begin), bias=False)
        self.joint.start(partial(_columns, std=0.4 * size**-0.5, begin=0))
        self.action, self.done, self.tag = Table(actions + 1, width), Table(4, width), Table(TAGS, width)
        self.reward = layers.Linear(REWARD_FEATURES, width).start(partial(_columns, std=0.5, begin=begin))
        if self.addresses is not None:
            self.observation.start(partial(_identity, begin=0))
            self.previous_observation.start(partial(_identity, begin=size))
            self.action.start(partial(_one_hot, begin=2 * size))
            self.done.start(partial(_with_constant, std=0.4, begin=begin, constant=self.addresses.constant))
        else:
            for layer in (self.observation, self.previous_observation):
                layer.start(partial(_columns, std=size**-0.5, begin=0))
            for table in (self.action, self.done):
                table.start(partial(_scattered, std=0.4, begin=0))
        self.tag.start(partial(_scattered, std=0.4, begin=begin))
        self.prompt = Table(TAGS, width).start(partial(_scattered, std=0.4, begin=begin)) if prompted else None

    def forward(self, parts: Parts) -> Tensor:
        """`[B,T]` steps -> tokens `[B,T,D]`."""
        t = parts.tokens
        joint = self.joint(parts.before).unflatten(-1, (self.action.num_embeddings, -1))
        joint = joint.gather(2, t.previous_action[..., None, None].expand(-1, -1, 1, joint.shape[3]))[:, :, 0]
        x = self.observation(parts.here) + self.previous_observation(parts.before) + F.pad(joint, (self.begin, 0))
        x = x + self.action(t.previous_action) + self.done(t.previous_done) + self.tag(t.previous_tag)
        x = x + self.reward(parts.reward)
        return x if self.prompt is None else x + self.prompt(parts.prompt)


class InterleavedTokens(nn.Module):
    """A token for each letter of the arrangement: o observation, p prompt, t tag, a action, r reward (with the step's end).

    The decision is read after the letter before d, the world model after that before w. The letters after d are known only
    once the step was taken: those of a step's group here are the previous step's, and the decision is read at its last.
    """

    world_actions = False

    def __init__(self, width: int, size: int, actions: int, arrangement: str) -> None:
        super().__init__()
        check_arrangement(arrangement)
        first, rest = arrangement.split("d")
        self.letters = rest.replace("w", "") + first
        self.per_step, self.decision = len(self.letters), len(self.letters) - 1
        self.world = rest.index("w") - 1
        scattered: Callable[[Tensor], object] = partial(_scattered, std=1.0, begin=0)
        self.observation = layers.Linear(size, width, bias=False).start(partial(_columns, std=size**-0.5, begin=0))
        self.action = Table(actions + 1, width).start(scattered)
        self.reward = layers.Linear(REWARD_FEATURES, width).start(partial(_columns, std=0.5, begin=0))
        self.done = Table(4, width).start(scattered)
        self.tag = Table(TAGS, width).start(scattered) if "t" in arrangement else None
        self.prompt = Table(TAGS, width).start(scattered) if "p" in arrangement else None

    def forward(self, parts: Parts) -> Tensor:
        """`[B,T]` steps -> tokens `[B,n·T,D]`, n = `per_step`."""
        t = parts.tokens
        made = {
            "o": self.observation(parts.here),
            "a": self.action(t.previous_action),
            "r": self.reward(parts.reward) + self.done(t.previous_done),
        }
        if self.tag is not None:
            made["t"] = self.tag(t.previous_tag)
        if self.prompt is not None:
            made["p"] = self.prompt(parts.prompt)
        return torch.stack([made[letter] for letter in self.letters], 2).flatten(1, 2)
