"""Tabular learners in environments that may have no table, a context each and all together; and the loop that runs any agent.

They are the simulator's learners (`icrl_kernels.Behaviours`), which act in tables alone, for what has none. They are told where a
step led before any reset, as those are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from icrl.omnirl.evaluate import Context
from icrl.worlds.vector_world import Step, VectorWorld
from icrl_kernels.arguments import integer


class Actor(Protocol):
    """What acts in a VectorWorld."""

    def act(self, observation: Tensor) -> Tensor:
        """Observations `[N]` int64 -> actions `[N]` int64."""
        ...

    def learn(self, step: Step) -> None:
        """What the last actions brought."""
        ...


def run_world(world: VectorWorld, actor: Actor, steps: int, progress: str | None = None) -> Context:
    """`steps` steps of an actor in a world from where it stands: rewards and ends `[N,steps]`, where the world is."""
    steps, observation = integer("steps", steps, 0), world.observation
    shape = world.num_contexts, steps
    rewards = torch.zeros(shape, dtype=torch.float32, device=observation.device)
    dones = torch.zeros(shape, dtype=torch.uint8, device=observation.device)
    for t in tqdm(range(steps), desc=progress, unit="step", disable=progress is None):
        step = world.step(actor.act(world.observation).to(observation.device))
        actor.learn(step)
        rewards[:, t], dones[:, t] = step.reward, step.done
    return Context(rewards, dones)


class Fixed:
    """An actor that learns nothing: a function of the observations."""

    def __init__(self, choose: Callable[[Tensor], Tensor]) -> None:
        self.choose = choose

    def act(self, observation: Tensor) -> Tensor:
        return self.choose(observation)

    def learn(self, step: Step) -> None:
        """Nothing."""


def uniform_actor(actions: int, seed: int) -> Fixed:
    """Uniform actions, drawn on the CPU by a generator of this seed."""
    generator = torch.Generator().manual_seed(seed)
    return Fixed(
        lambda seen: torch.randint(actions, seen.shape, generator=generator, dtype=torch.int64, device="cpu").to(
            seen.device
        )
    )


class _Learner:
    """Counts of visits, the rewards' size, and the choice of one of the best actions at random."""

    def __init__(self, contexts: int, states: int, actions: int, seed: int, device: torch.device) -> None:
        self.each = torch.arange(contexts, dtype=torch.int64, device=device)
        shape = contexts, states, actions
        self.visits = torch.zeros(shape, dtype=torch.float32, device=device)
        self.square = torch.zeros(contexts, dtype=torch.float64, device=device)
        self.steps = 0
        self.generator = torch.Generator().manual_seed(seed)
        self.at = (self.each, self.each, self.each)  # context, state, action of the last step

    def size(self) -> Tensor:
        """`[N]` float32: the root mean square of the rewards so far."""
        return (self.square / max(1, self.steps)).sqrt().float()

    def choose(self, observation: Tensor, score: Tensor) -> Tensor:
        """One of the actions of the highest score `[N,A]`, each as likely."""
        draw = torch.rand(score.shape, generator=self.generator, dtype=torch.float32, device="cpu").to(score.device)
        best = score == score.amax(1, keepdim=True)
        action = draw.masked_fill(~best, -1.0).argmax(1)
        self.at = (self.each, observation, action)
        return action

    def count(self, reward: Tensor) -> None:
        self.visits[self.at] += 1
        self.square += reward.double().square()
        self.steps += 1


class UCBQLearner(_Learner):
    """Q-learning of rate (H+1)/(H+n), H = 1/(1-discount) (Jin et al. 2018), that takes argmax Q + bonus·σ·sqrt(log(1+Σn)/n).

    σ is the root mean square of the rewards so far; an action that was not tried yet comes first.
    """

    def __init__(
        self,
        contexts: int,
        states: int,
        actions: int,
        *,
        bonus: float,
        discount: float,
        seed: int,
        device: torch.device,
    ) -> None:
        super().__init__(contexts, states, actions, seed, device)
        self.bonus, self.discount, self.horizon = bonus, discount, 1 / (1 - discount)
        self.q = torch.zeros_like(self.visits)

    def act(self, observation: Tensor) -> Tensor:
        n = self.visits[self.each, observation]
        width = self.bonus * self.size() * (1 + n.sum(1)).log().sqrt()
        score = self.q[self.each, observation] + width[:, None] / n.sqrt()
        return self.choose(observation, score.masked_fill(n == 0, math.inf))

    def learn(self, step: Step) -> None:
        self.count(step.reward)
        rate = (self.horizon + 1) / (self.horizon + self.visits[self.at])
        best = self.q[self.each, step.following].amax(1) * (step.done != 1)
        self.q[self.at] += rate * (step.reward + self.discount * best - self.q[self.at])


class ModelBasedLearner(_Learner):
    """Counts transitions, and plans on them by one sweep of optimistic value iteration a step, from the last one's values.

    A tried action is worth its mean reward + bonus·σ/sqrt(n) + discount·the mean value of where it led; an untried one
    (the best mean reward + σ)/(1-discount).
    """

    def __init__(
        self,
        contexts: int,
        states: int,
        actions: int,
        *,
        bonus: float,
        discount: float,
        seed: int,
        device: torch.device,
    ) -> None:
        super().__init__(contexts, states, actions, seed, device)
        self.bonus, self.discount = bonus, discount
        self.rewards = torch.zeros_like(self.visits)
        self.successors = torch.zeros(contexts, states, actions, states, dtype=torch.float32, device=device)
        self.values = torch.zeros(contexts, states, dtype=torch.float32, device=device)

    def act(self, observation: Tensor) -> Tensor:
        q = self._sweep()
        self.values = q.amax(2)
        return self.choose(observation, q[self.each, observation])

    def _sweep(self) -> Tensor:
        n, tried, size = self.visits.clamp(min=1), self.visits > 0, self.size()
        mean = self.rewards / n
        best = mean.masked_fill(~tried, -math.inf).amax((1, 2))
        untried = (torch.where(best.isfinite(), best, 0.0) + size) / (1 - self.discount)
        after = torch.bmm(self.successors.flatten(1, 2), self.values[:, :, None])[..., 0].view_as(n)
        q = mean + self.bonus * size[:, None, None] * n.rsqrt() + self.discount * after / n
        return torch.where(tried, q, untried[:, None, None])

    def learn(self, step: Step) -> None:
        self.count(step.reward)
        self.rewards[self.at] += step.reward
        self.successors[(*self.at, step.following)] += (step.done != 1).float()
