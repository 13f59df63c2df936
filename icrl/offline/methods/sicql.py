"""S-ICQL (arXiv 2506.01299): a transformer whose heads read policy and values off a prompt, trained by in-context IQL.

With β the prompt, s, a, r, s' a transition of the same task and d whether it terminated, the heads are π(·|s;β), V(s;β) and
two Q(s,a;β), and the loss, 1:1:1 and averaged over prompt lengths, is

    L_V = |ω − 1(u < 0)| u²,  u = min_i Q̂_i(s,a;β) − V(s;β)                expectile regression
    L_Q = ½ Σ_i (r + γ (1 − d) V(s';β) − Q_i(s,a;β))²                       V(s') without gradient
    L_π = min(exp(u / λ), w_max) · (− log π(a|s;β), or the squared error)    u without gradient

Q̂ are moving averages of the Q heads, on the shared features. (The public code averages a copy of the whole network, and
spends another pass on it.) Ablations: `world_model=False` has raw transitions as the prompt, `q_learning=False` imitates;
without both it is DPT trained on the data's own actions.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from icrl.offline.iql import IQL, iql_losses
from icrl.offline.method import Metrics, Spaces, head, target_of
from icrl.offline.prompt import Batch, PromptConfig, PromptMethod, PromptTrunk
from icrl.offline.trajectories import Trajectories
from icrl.offline.world_model import WorldModel


@dataclass(frozen=True)
class SICQLConfig(PromptConfig):
    iql: IQL = field(default_factory=IQL)
    world_model: bool = True
    stride: int = 1
    """Steps between two windows of a prompt, at most the window's k: 1 as published; with k each step is in one window."""
    q_learning: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.stride <= (self.horizon if self.world_model else 1):
            raise ValueError(
                f"stride: wanted 1 to horizon={self.horizon}, and 1 without a world model, got {self.stride}"
            )

    @property
    def prompt_steps(self) -> range:
        return range(self.stride - 1, self.horizon, self.stride)


class SICQL(PromptMethod):
    """See the module's docstring. `world_model` is the frozen one that makes prompts, None without."""

    name, title, config_class = "sicql", "S-ICQL", SICQLConfig
    config: SICQLConfig

    def __init__(self, config: SICQLConfig, spaces: Spaces, world_model: WorldModel | None = None) -> None:
        super().__init__(config, spaces)
        if (world_model is None) == config.world_model:
            raise ValueError(f"world_model: wanted {'one' if config.world_model else 'none'}, as configured")
        if world_model is not None and config.stride > world_model.config.window:
            raise ValueError(f"stride: wanted at most the window {world_model.config.window}, got {config.stride}")
        self.world_model = None if world_model is None else world_model.freeze()
        raw = 2 * spaces.state_size + spaces.action_size + 1
        self.trunk = PromptTrunk(config, spaces, raw if world_model is None else world_model.config.size)
        width = config.trunk.width
        self.pi = head(width, spaces.action_size)
        if config.q_learning:
            self.embed_action = torch.nn.Linear(spaces.action_size, width)
            self.v = head(width, 1)
            self.q = torch.nn.ModuleList([head(width, 1), head(width, 1)])
            self.target_q = target_of(self.q)
        self._prompts: Tensor | None = None

    @classmethod
    def make(cls, config: SICQLConfig, spaces: Spaces, world_model: WorldModel | None = None) -> SICQL:
        return cls(config, spaces, world_model)

    @staticmethod
    def needs_world_model(config: SICQLConfig) -> bool:
        return config.world_model

    @staticmethod
    def check_window(config: SICQLConfig, window: int) -> None:
        if config.world_model and config.stride > window:
            raise ValueError(f"settings: stride: wanted at most world_model.window={window}, got {config.stride}")

    def prepare(self, data: Trajectories) -> None:
        super().prepare(data)
        if self.world_model is not None:
            data.check_length("window", self.world_model.config.window)
            self._prompts = self.world_model.prompts(data)

    def prompt_tokens(self, data: Trajectories, index: Tensor) -> Tensor:
        return super().prompt_tokens(data, index) if self._prompts is None else self._prompts[index]

    def prompt_of(self, states: Tensor, actions: Tensor, rewards: Tensor, next_states: Tensor) -> Tensor:
        if self.world_model is None:
            return super().prompt_of(states, actions, rewards, next_states)
        z = self.world_model.prompt_of(states, self.spaces.features(actions), rewards)
        return z[:, self.config.stride - 1 :: self.config.stride]

    def policy(self, features: Tensor) -> Tensor:
        return self.pi(features)

    def before_update(self) -> None:
        if self.config.q_learning:
            for target, online in zip(self.target_q.parameters(), self.q.parameters(), strict=True):
                target.data.lerp_(online.data, self.config.iql.target_rate)

    def objective(self, data: Trajectories, batch: Batch) -> tuple[Tensor, Metrics]:
        c, steps = self.config, batch.steps
        memory = self.trunk.remember(self.prompt_tokens(data, batch.prompt), batch.lengths)
        action, state = data.actions[steps], self.normal(data.states[steps])
        at_state, taken = self.trunk.embed_state(state), self.at_lengths(action, batch)
        if not c.q_learning:
            imitation = self.imitation(self.pi(self.trunk.read(at_state[:, :, None], memory)[:, :, 0]), taken).mean()
            return imitation, {"loss": imitation.detach()}
        at_pair = at_state + self.embed_action(self.spaces.features(action))
        features, paired = self.trunk.read(torch.stack([at_state, at_pair], 2), memory).unbind(2)
        with torch.no_grad():
            following = self.trunk.embed_state(self.normal(data.next_states[steps]))[:, :, None]
            next_v = self.v(self.trunk.read(following, memory)[:, :, 0])[..., 0]
            target_q = torch.cat([q(paired) for q in self.target_q], -1)
        v = self.v(features)[..., 0]
        losses = iql_losses(
            self.imitation(self.pi(features), taken),
            v,
            torch.cat([q(paired) for q in self.q], -1),
            target_q,
            next_v,
            data.rewards[steps],
            data.terminated[steps],
            c.iql,
        )
        total = losses.policy + losses.q + losses.v
        metrics = {f"{name}_loss": x.detach() for name, x in losses._asdict().items()}
        return total, {"loss": total.detach(), **metrics, "value": v.detach().mean()}
