"""Tokenizers: observations as vectors for a model, and a model's vectors as predictions of observations.

A tokenizer is a module with `size`, `encode`, `read` and `loss`, as these two have them; one of your own (a CNN over images,
say) goes into a model in their place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icrl_kernels import layers
from icrl_kernels.arguments import integer


class Table(nn.Embedding):
    """nn.Embedding whose first rows are those of `begin`, where `start` was given one, after `reset_parameters` too."""

    begin: Callable[[Tensor], object] | None = None

    def start(self, begin: Callable[[Tensor], object]) -> Self:
        self.begin = begin
        self.reset_parameters()
        return self

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.begin is not None:
            self.begin(self.weight)


class Tokenizer(nn.Module):
    """What a model asks of a tokenizer."""

    size: int
    """Channels D of a code."""

    def encode(self, observation: Tensor, missing: Tensor | None = None) -> Tensor:
        """Observations `[B,T,...]` -> codes `[B,T,D]`. Where `missing` `[B,T]` bool is true, that of no observation."""
        raise NotImplementedError

    def read(self, z: Tensor) -> Tensor:
        """Vectors `[...,D]` -> predictions of an observation `[...,P]`, which `loss` compares."""
        raise NotImplementedError

    def loss(self, prediction: Tensor, observation: Tensor) -> Tensor:
        """`[B,T]` float32 of predictions `[B,T,P]` for observations `[B,T,...]`."""
        raise NotImplementedError


class DiscreteObservations(Tokenizer):
    """Numbers 0 to states-1, int64 `[B,T]`: a code each, drawn from N(0,1) at first. A prediction is logits `[...,states]`,
    inner products with the codes; its loss is the cross-entropy."""

    def __init__(self, states: int, size: int) -> None:
        super().__init__()
        self.states, self.size = integer("states", states, 1), integer("size", size, 1)
        self.codes = Table(states + 1, size)  # the last: of no observation

    def encode(self, observation: Tensor, missing: Tensor | None = None) -> Tensor:
        if missing is not None:
            observation = observation.masked_fill(missing, self.states)
        return self.codes(observation)

    def read(self, z: Tensor) -> Tensor:
        return z @ self.codes.weight[: self.states].t() * self.size**-0.5

    def loss(self, prediction: Tensor, observation: Tensor) -> Tensor:
        return F.cross_entropy(prediction.float().transpose(1, -1), observation.transpose(1, -1), reduction="none")


class ContinuousObservations(Tokenizer):
    """Vectors, float32 `[B,T,channels]`, of about unit size. A prediction is a vector; its loss half the squared distance."""

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.channels, self.size = integer("channels", channels, 1), integer("size", size, 1)
        self.inner, self.outer = layers.Linear(channels, size), layers.Linear(size, size)
        self.none = Table(1, size)
        self.reader = layers.Linear(size, channels)

    def encode(self, observation: Tensor, missing: Tensor | None = None) -> Tensor:
        code = self.outer(F.silu(self.inner(observation)))
        if missing is None:
            return code
        return torch.where(missing[..., None], self.none.weight[0].to(code.dtype), code)

    def read(self, z: Tensor) -> Tensor:
        return self.reader(z)

    def loss(self, prediction: Tensor, observation: Tensor) -> Tensor:
        return 0.5 * (prediction.float() - observation).square().sum(-1)
