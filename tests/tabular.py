"""Small random tasks for tests, with what the tests need of icrl.worlds.TabularTasks."""

from dataclasses import dataclass, fields
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from icrl_kernels import RolloutTables, rollout_tables


def moved(x, device):
    """A tensor, or a NamedTuple or list of them, on this device; what is none stays."""
    if isinstance(x, Tensor):
        return x.to(device)
    if isinstance(x, (list, tuple)):
        parts = [moved(y, device) for y in x]
        return type(x)(*parts) if hasattr(x, "_fields") else parts
    return x


class Solution(NamedTuple):
    q: Tensor


@dataclass
class Tasks:
    transition: Tensor
    reward: Tensor
    noise_state: Tensor
    noise_action: Tensor
    start: Tensor
    terminal: Tensor
    max_steps: Tensor
    num_states: Tensor
    num_actions: Tensor
    state_mapping: Tensor
    observation_tokens: ClassVar[int] = 1
    action_tokens: ClassVar[int] = 1

    def emit(self, states: Tensor, **_: object) -> Tensor:
        """Ids, as fully observed tasks have them."""
        return self.state_mapping.gather(1, states.long())[..., None]

    def raw(self) -> dict[str, Tensor]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "state_mapping"}

    def tables(self) -> RolloutTables:
        return rollout_tables(**self.raw())

    def solve(self, discounts) -> Solution:
        """Value iteration in float64, to 1e-6 of the fixed point's scale."""
        expected = (self.transition.double() * self.reward).sum(3)
        every = []
        for discount in discounts:
            q = expected
            for _ in range(1 if discount == 0 else int(14 / (1 - discount)) + 1):
                q = expected + discount * torch.einsum("nsaj,nj->nsa", self.transition.double(), q.amax(2))
            every.append(q)
        return Solution(torch.stack(every, 1))


def random_tasks(n, states=8, actions=4, *, seed=0, width=None, max_steps=40, ragged=True) -> Tasks:
    """Rows of `width` neighbouring successors; the last state is terminal; tasks differ in size where `ragged`."""
    g = torch.Generator().manual_seed(seed)
    width = width or states
    num_states = (
        torch.randint(max(2, states - 3), states + 1, (n,), generator=g) if ragged else torch.full((n,), states)
    )
    num_actions = torch.randint(2, actions + 1, (n,), generator=g) if ragged else torch.full((n,), actions)
    index = torch.arange(states)
    own = index < num_states[:, None]
    terminal = index == num_states[:, None] - 1
    first = (
        torch.rand(n, states, actions, 1, generator=g) * (num_states.view(n, 1, 1, 1) - width + 1).clamp_min(1)
    ).long()
    inside = (index >= first) & (index < first + width) & own[:, None, None]
    transition = (torch.randn(n, states, actions, states, generator=g).exp() * inside).masked_fill(
        (terminal | ~own)[:, :, None, None], 0.0
    )
    transition *= (torch.arange(actions) < num_actions[:, None])[:, None, :, None]
    transition = transition / transition.sum(3, keepdim=True).clamp_min(1e-30)
    start = torch.zeros(n, states)
    start[:, :2] = torch.tensor([0.7, 0.3])
    start[terminal] = 0.0
    start /= start.sum(1, keepdim=True)
    return Tasks(
        transition,
        torch.randn(n, states, actions, states, generator=g) + torch.randn(n, states, actions, 1, generator=g),
        torch.rand(n, states, generator=g) * (torch.rand(n, states, generator=g) < 0.5),
        torch.rand(n, states, actions, generator=g) * (torch.rand(n, states, 1, generator=g) < 0.5),
        start,
        terminal,
        torch.full((n,), max_steps),
        num_states,
        num_actions,
        torch.argsort(torch.rand(n, states, generator=g), 1),
    )
