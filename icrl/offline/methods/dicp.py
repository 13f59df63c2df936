"""DICP (Son et al. 2025, arXiv 2502.19009): algorithm distillation that also learns dynamics in context, and plans with it.

Beside the next action, heads predict from a step's features and its action the reward, the next state, and the discounted
return after it. To act, first actions sampled from the policy are followed in imagination for `depth` steps, later actions
being the policy's likeliest, and the one whose predicted return is best is taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icrl.models.trunk import TrunkState
from icrl.offline.history import History, HistoryAgent, HistoryConfig, HistoryMethod, HistoryTrunk
from icrl.offline.method import Metrics, Spaces, deviation, head
from icrl.offline.trajectories import Trajectories
from icrl_kernels.arguments import integer_fields


@dataclass(frozen=True)
class DICPConfig(HistoryConfig):
    discount: float = 0.99
    """Of the returns that are predicted."""
    depth: int = 3
    """Steps imagined, at least 1."""
    beam: int = 5
    """First actions sampled and compared."""

    def __post_init__(self) -> None:
        super().__post_init__()
        integer_fields(self, depth=1, beam=1)
        if not 0 <= self.discount < 1:
            raise ValueError(f"discount: wanted a number in [0, 1), got {self.discount}")


class DICP(HistoryMethod):
    name, title, config_class = "dicp", "DICP", DICPConfig
    decides_by_memory = True
    config: DICPConfig

    def __init__(self, config: DICPConfig, spaces: Spaces) -> None:
        super().__init__(config, spaces)
        width = config.trunk.width
        self.trunk = HistoryTrunk(config, spaces)
        self.pi = head(width, spaces.action_size)
        self.embed_action = nn.Linear(spaces.action_size, width)
        self.dynamics = head(width, 2 + spaces.state_size)  # reward, return after it, change of the normalised state
        self.return_scale: Tensor
        self.register_buffer("return_scale", torch.empty(()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.ones_(self.return_scale)

    def prepare(self, data: Trajectories) -> None:
        super().prepare(data)
        self._returns = data.returns_to_go(self.config.discount)
        self.return_scale.copy_(deviation(self._returns))

    def predict(self, features: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Reward [...], return after it in deviations [...], and change of the normalised state [...,S]."""
        out = self.dynamics(features + self.embed_action(self.spaces.features(action)))
        return out[..., 0], out[..., 1], out[..., 2:]

    def objective(self, data: Trajectories, batch: History) -> tuple[Tensor, Metrics]:
        h, features = batch, self.features(batch)
        reward, after, change = self.predict(features, h.action)
        left = (self._returns[h.steps] - h.reward) / self.return_scale
        parts = {
            "policy_loss": self.imitation(self.pi(features), h.action).mean(),
            "reward_loss": F.mse_loss(reward, h.reward),
            "return_loss": F.mse_loss(after, left),
            "state_loss": F.mse_loss(change, self.normal(h.next_state) - self.normal(h.state)),
        }
        loss = torch.stack(list(parts.values())).sum()
        return loss, {k: v.detach() for k, v in {"loss": loss, **parts}.items()}

    def decide(self, features: Tensor, memory: TrunkState | None, state: Tensor) -> Tensor:
        assert memory is not None
        c, B = self.config, len(features)
        output = self.pi(features)
        if self.spaces.num_actions:
            first = output.softmax(-1).multinomial(c.beam, replacement=True)  # [B,K]
        else:
            first = output[:, None] + 0.1 * torch.randn(
                B, c.beam, output.shape[-1], device=output.device, dtype=torch.float32
            )
        K = first.shape[1]
        action = first.flatten(0, 1)
        x, f, m = self.normal(state).repeat_interleave(K, 0), features.repeat_interleave(K, 0), spread(memory, K)
        total, weight = torch.zeros(B * K, device=output.device, dtype=torch.float32), 1.0
        depth = min(c.depth, c.horizon - (memory.length - 1) % c.horizon)  # nothing comes after the episode
        for i in range(depth):
            reward, after, change = self.predict(f, action)
            total = total + weight * reward
            if i + 1 == depth:
                total = total + weight * after * self.return_scale
                break
            weight *= c.discount
            x = x + change
            y, m = self.trunk(x[:, None], HistoryAgent.after(self, action, reward)[:, None], m)
            f = y[:, 0]
            output = self.pi(f)
            action = output.argmax(-1) if self.spaces.num_actions else output
        return first[torch.arange(B, device=output.device), total.view(B, K).argmax(1)]


def spread(state: TrunkState, times: int) -> TrunkState:
    """Each sequence's state `times` times over."""

    def repeated(x: Any) -> Any:  # a layer's state: tensors in (named) tuples
        if isinstance(x, Tensor):
            return x.repeat_interleave(times, 0)
        parts = [repeated(part) for part in x]
        return type(x)(*parts) if hasattr(x, "_fields") else type(x)(parts)

    return TrunkState([repeated(layer) for layer in state.layers], state.length)
