"""Methods that read one episode as their prompt: S-ICQL, DPT and DIT build on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from icrl.models.step import TrunkStep, trunk_step
from icrl.models.trunk import Trunk
from icrl.offline.method import Episode, Method, MethodConfig, Spaces
from icrl.offline.trajectories import Trajectories
from icrl_kernels.arguments import integer_fields


@dataclass(frozen=True)
class PromptConfig(MethodConfig):
    """Of a method whose prompt is one episode of the task: any one in training, the one before in a test."""

    layout: str = "query_first"
    """"query_first", as published: [query, prompt] in full for each query, its loss after each prompt token; or
    "branch": the prompt once, and queries that branch from it after some of its lengths, each of its own transition."""
    queries: int = 8
    """Lengths, and transitions, that branch from one prompt."""
    balanced: float = 0.0
    """Share of the transitions asked about that are drawn by state, each that the task has seen as likely as another. Good
    data is mostly where its task's goal is; a policy that learns that from states alone does not look elsewhere."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layout not in ("query_first", "branch"):
            raise ValueError(f"layout: wanted 'query_first' or 'branch', got {self.layout!r}")
        if self.layout == "query_first" and self.trunk.mixer != "softmax":
            raise ValueError(
                f"layout: wanted 'branch' for the mixer {self.trunk.mixer!r}: its state forgets a first token"
            )
        integer_fields(self, queries=1)
        if not 0 <= self.balanced <= 1:
            raise ValueError(f"balanced: wanted a share in [0, 1], got {self.balanced}")

    @property
    def prompt_steps(self) -> range:
        """The steps of an episode that are the prompt's tokens."""
        return range(self.horizon)


class Batch(NamedTuple):
    """int64 on the data's device."""

    prompt: Tensor  # [B,h] the prompt's tokens, as steps of the data
    steps: Tensor  # [B,m] steps asked about; m = 1 where all lengths share a transition
    lengths: list[int]


class PromptTrunk(nn.Module):
    """The trunk, with embeddings of prompt tokens and of queries, in either layout."""

    def __init__(self, config: PromptConfig, spaces: Spaces, prompt_size: int) -> None:
        super().__init__()
        self.config = config
        width = config.trunk.width
        self.trunk = Trunk(config.trunk, len(config.prompt_steps))
        self.embed_prompt = nn.Linear(prompt_size, width)
        self.embed_state = nn.Linear(spaces.state_size, width)

    def remember(self, prompt: Tensor, lengths: Sequence[int]) -> Any:
        """Prompt tokens [B,h,P], to be read after each of `lengths` of them."""
        x = self.embed_prompt(prompt)
        if self.config.layout == "branch":
            return self.trunk.remember(x, list(lengths))
        return x, torch.tensor(lengths, device=x.device, dtype=torch.int64)

    def read(self, queries: Tensor, memory: Any) -> Tensor:
        """Queries [B,m or 1,J,D] -> features [B,m,J,D] after each of the m lengths."""
        if self.config.layout == "branch":
            return self.trunk.read(queries, memory)
        x, lengths = memory
        full = [self.trunk(torch.cat([q, x], 1), first=0)[0] for q in queries[:, 0, :, None].unbind(1)]
        return torch.stack(full, 2)[:, lengths]


class PromptMethod(Method):
    """A method that reads one episode as its prompt; `prompt_size` channels a step, raw transitions unless overridden."""

    config: PromptConfig
    trunk: PromptTrunk

    @staticmethod
    def check_compile(config: PromptConfig) -> None:
        if config.layout == "branch":
            raise ValueError(
                "loop.compile: wanted false with layout 'branch', which cuts prompts anew in every update, got true; "
                "'query_first' can be compiled"
            )

    def draw(self, data: Trajectories) -> Batch:
        """A batch: tasks, an episode of each as the prompt, and transitions of the same tasks."""
        c = self.config
        tasks = data.draw_tasks(c.batch)
        prompt = data.begins[data.draw_episodes(tasks)][:, None] + torch.tensor(
            c.prompt_steps, device="cpu", dtype=torch.int64
        )
        h, each = len(c.prompt_steps), 1
        lengths = list(range(h + 1))
        if c.layout == "branch":
            lengths = sorted([*torch.randint(h + 1, (c.queries - 1,), device="cpu").tolist(), h])
            each = c.queries
        steps = data.draw_steps(tasks, each, c.balanced)
        return Batch(prompt.to(data.device), steps.to(data.device), lengths)

    def at_lengths(self, x: Tensor, batch: Batch) -> Tensor:
        """What belongs to the steps of a batch, [B,1 or m,...], at each of its m lengths."""
        return x.expand(-1, len(batch.lengths), *x.shape[2:])

    def prompt_tokens(self, data: Trajectories, index: Tensor) -> Tensor:
        """[...,P] of the data's steps `index` [...]."""
        return self.transitions(data.states[index], data.actions[index], data.rewards[index], data.next_states[index])

    def prompt_of(self, states: Tensor, actions: Tensor, rewards: Tensor, next_states: Tensor) -> Tensor:
        """[B,h,P] of whole episodes."""
        return self.transitions(states, actions, rewards, next_states)

    def policy(self, features: Tensor) -> Tensor:
        """Logits or actions from a state query's features."""
        raise NotImplementedError

    def agent(self, batch: int) -> PromptAgent:
        return PromptAgent(self, batch)


class PromptAgent:
    """Acts with the episode before as its prompt; in the first one, with none.

    In the layout "branch" a query's features are one call of C++ where that serves (icrl.models.step), and else the module's.
    """

    def __init__(self, method: PromptMethod, batch: int) -> None:
        self.method, self.episode = method, Episode(batch, method.spaces, begun=False)
        self.batch = self.episode.batch
        self.memory: Any = None
        self.step: TrunkStep | None = None

    @torch.no_grad()
    def begin(self) -> None:
        m = self.method
        if self.episode.steps:
            prompt = m.prompt_of(*self.episode.stacked())
        else:
            prompt = torch.zeros(self.batch, 0, m.trunk.embed_prompt.in_features, device=m.device, dtype=torch.float32)
        self.step = self._made_step()
        if self.step is None:
            self.memory = m.trunk.remember(prompt, [prompt.shape[1]])
        else:
            x = m.trunk.embed_prompt(prompt)
            self.step.replace(m.trunk.trunk(x)[1] if x.shape[1] else None)
        self.episode = Episode(self.batch, self.method.spaces)

    @torch.no_grad()
    def act(self, state: Tensor) -> Tensor:
        m = self.method
        self.episode.see(state)
        if self.step is not None:
            return m.choose(m.policy(self.step(m.normal(state))))
        features = m.trunk.read(m.trunk.embed_state(m.normal(state))[:, None, None], self.memory)
        return m.choose(m.policy(features[:, 0, 0]))

    def _made_step(self) -> TrunkStep | None:
        t = self.method.trunk
        if t.config.layout != "branch" or (self.step is not None and not self.step.stale):
            return self.step
        return trunk_step(t.trunk, self.batch, [t.embed_state], stays=True)

    def observe(self, state: Tensor, action: Tensor, reward: Tensor, next_state: Tensor) -> None:
        self.episode.add(state, action, reward, next_state)
