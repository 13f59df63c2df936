"""S-ICQL's world model (arXiv 2506.01299): a window of the last k transitions -> what task this is.

The encoder makes z of a window; two decoders predict, from z, the reward and the next state of the transition that comes
after the window, and, where `others` says so, of transitions from anywhere in the same task: then z has to hold all that
its window says of the task, not only what matters for the next step. Trained on all tasks at once it is frozen, and the
prompt of a trajectory is β = [z_1, ..., z_h], z_t of the window that ends with step t. (The window does not hold what comes
after it. In the public code windows end before the current step in training and at it in prompts; here both end with the
last complete transition.)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icrl.models.mixers import MIXERS, make_mixer
from icrl.offline.method import Metrics, numbers
from icrl.offline.provenance import goes_on
from icrl.offline.trajectories import Trajectories
from icrl.reading import shown
from icrl.training import checkpoint
from icrl.training.config import LoopConfig, configured
from icrl.training.process import autocast
from icrl_kernels.arguments import integer, integer_fields


@dataclass(frozen=True)
class WorldModelConfig:
    window: int = 4
    """k, transitions a window; an episode's first windows hold fewer."""
    size: int = 16
    """Of z, and of what a state, an action and a reward are each embedded in."""
    hidden: int = 128
    encoder: str = "gru"
    """"gru", or a token mixer: see icrl.models.mixers.MIXERS."""
    others: int = 0
    """Transitions of the same task that each z must predict beside the one after its window; none as published."""

    def __post_init__(self) -> None:
        integer_fields(self, window=1, size=1, hidden=1, others=0)
        if self.encoder not in ("gru", *MIXERS):
            raise ValueError(f"encoder: wanted 'gru' or one of {', '.join(MIXERS)}, got {self.encoder!r}")


class WindowBatch(NamedTuple):
    """Of a world model, on the data's device."""

    index: Tensor  # [B,k] int64, the windows' steps
    seen: Tensor  # [B,k] bool, False where the episode had not begun
    targets: Tensor  # [B] or [B,1+others] int64, the steps to predict


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Two hidden layers."""
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, outputs)
    )


class WorldModel(nn.Module):
    """Encoder and decoders for one environment's spaces.

    Args:
        config: sizes. environment, state_size, action_size: of the data. mean, std: [S], of its states.
    """

    def __init__(
        self,
        config: WorldModelConfig,
        environment: str,
        state_size: int,
        action_size: int,
        mean: Tensor | None = None,
        std: Tensor | None = None,
    ) -> None:
        super().__init__()
        c = self.config = config
        state_size, action_size = integer("state_size", state_size, 1), integer("action_size", action_size, 1)
        self.environment, self.state_size, self.action_size = environment, state_size, action_size
        self.mean: Tensor
        self.std: Tensor
        self._moments = mean, std
        self.register_buffer("mean", torch.empty(state_size) if mean is None else mean.clone())
        self.register_buffer("std", torch.empty(state_size) if std is None else std.clone())
        self.reset_parameters()
        self.embed_state, self.embed_action = nn.Linear(state_size, c.size), nn.Linear(action_size, c.size)
        self.embed_reward = nn.Linear(1, c.size)
        if c.encoder == "gru":
            self.gru = nn.GRU(3 * c.size, c.hidden, batch_first=True)
        else:
            self.widen = nn.Linear(3 * c.size, c.hidden)
            self.mixer = make_mixer(c.encoder, c.hidden, 1)
        self.to_z = nn.Linear(c.hidden, c.size)
        self.decode_state, self.decode_action = nn.Linear(state_size, c.size), nn.Linear(action_size, c.size)
        self.reward_decoder = mlp(4 * c.size, c.hidden, 1)
        self.state_decoder = mlp(3 * c.size, c.hidden, state_size)

    def reset_parameters(self) -> None:
        """Give first values to the buffers; the parameters are submodules'."""
        for buffer, given, otherwise in zip((self.mean, self.std), self._moments, (0.0, 1.0), strict=True):
            if given is None:
                buffer.fill_(otherwise)
            else:
                buffer.copy_(given)

    @classmethod
    def of(cls, config: WorldModelConfig, data: Trajectories) -> WorldModel:
        """A fresh one for this data, on the CPU."""
        mean, std = (x.cpu() for x in data.moments())
        with torch.device("cpu"):
            return cls(config, data.environment, data.state_size, data.action_size, mean, std).float()

    def check(self, data: Trajectories) -> None:
        """ValueError where this world model is not of the data's environment."""
        for name in ("environment", "state_size", "action_size"):
            if getattr(self, name) != getattr(data, name):
                raise ValueError(
                    f"world_model: was trained for {name} {getattr(self, name)!r}, the data has {getattr(data, name)!r}"
                )

    def encode(self, states: Tensor, actions: Tensor, rewards: Tensor, seen: Tensor) -> Tensor:
        """z [...,size] of windows: states [...,k,S], action features [...,k,A], rewards [...,k], and seen [...,k] bool:
        False, first, where the episode had not begun; those inputs are zero."""
        x = torch.cat(
            [
                F.relu(self.embed_state((states - self.mean) / self.std)),
                F.relu(self.embed_action(actions)),
                F.relu(self.embed_reward(rewards[..., None])),
            ],
            -1,
        )
        x = (x * seen[..., None]).flatten(0, -3)
        if self.config.encoder == "gru":
            y = self.gru(x)[0][:, -1]
        else:
            h = self.widen(x)
            y = F.relu(h + self.mixer(h)[0])[:, -1]
        return self.to_z(y).view(*states.shape[:-2], -1)

    def predict(self, z: Tensor, state: Tensor, action: Tensor, next_state: Tensor) -> tuple[Tensor, Tensor]:
        """The reward [...], and the change of the state in the data's deviations [...,S], of a transition; the reward's
        decoder is given the next state, the state's is not."""
        s, n = (F.relu(self.decode_state((x - self.mean) / self.std)) for x in (state, next_state))
        a = F.relu(self.decode_action(action))
        return self.reward_decoder(torch.cat([s, a, n, z], -1))[..., 0], self.state_decoder(torch.cat([s, a, z], -1))

    def draw(self, data: Trajectories, steps: Tensor) -> WindowBatch:
        """The windows before `steps` [B], int64 on the CPU, and what they must predict: the transitions at `steps`, and
        `others` of the same tasks, with discrete actions half of them drawn by state: see `Trajectories.draw_steps`."""
        index, seen = data.windows(steps, self.config.window + 1)
        targets = steps
        if others := self.config.others:
            tasks = data.tasks[data.episode_of(steps)]
            more = data.draw_steps(tasks, others, balanced=0.5 if data.num_actions else 0.0)
            targets = torch.cat([steps[:, None], more], 1)
        return WindowBatch(*(x.to(data.device) for x in (index[:, :-1], seen[:, :-1], targets)))

    def loss(self, data: Trajectories, steps: Tensor) -> tuple[Tensor, Metrics]:
        """The errors of what `draw` draws for `steps` [B], int64 on the CPU: see `objective`."""
        return self.objective(data, self.draw(data, steps))

    def objective(self, data: Trajectories, batch: WindowBatch) -> tuple[Tensor, Metrics]:
        """Squared errors of a batch; the metrics, 0-dimensional tensors, are means over all of its transitions."""
        index, seen, steps = batch
        z = self.encode(data.states[index], data.action_features(data.actions[index]), data.rewards[index], seen)
        if others := self.config.others:
            z = z[:, None].expand(-1, 1 + others, -1)
        state, following = data.states[steps], data.next_states[steps]
        reward, change = self.predict(z, state, data.action_features(data.actions[steps]), following)
        reward_loss = F.mse_loss(reward, data.rewards[steps])
        state_loss = F.mse_loss(change, (following - state) / self.std)
        loss = reward_loss + state_loss
        parts = {"loss": loss, "reward": reward_loss, "state": state_loss}
        return loss, {name: x.detach() for name, x in parts.items()}

    @torch.no_grad()
    def prompts(self, data: Trajectories, block: int = 1 << 14) -> Tensor:
        """z of the window that ends with each step of the data, [T,size] on the data's device, which is this one's."""
        self.check(data)
        out = []
        for steps in torch.arange(len(data.states), device="cpu").split(block):
            index, seen = (x.to(data.device) for x in data.windows(steps, self.config.window))
            out.append(
                self.encode(data.states[index], data.action_features(data.actions[index]), data.rewards[index], seen)
            )
        return torch.cat(out)

    @torch.no_grad()
    def prompt_of(self, states: Tensor, actions: Tensor, rewards: Tensor) -> Tensor:
        """β [B,h,size] of B episodes: states [B,h,S], action features [B,h,A], rewards [B,h]."""
        k, h = self.config.window, states.shape[1]

        def windows(x: Tensor) -> Tensor:  # [B,h,...] -> [B,h,k,...]
            return torch.cat([x.new_zeros(x.shape[0], k - 1, *x.shape[2:]), x], 1).unfold(1, k, 1).movedim(-1, 2)

        seen = windows(rewards.new_ones(states.shape[0], h)) > 0
        return self.encode(windows(states), windows(actions), windows(rewards), seen)

    def freeze(self) -> WorldModel:
        return self.requires_grad_(False).eval()

    def facts(self) -> dict[str, Any]:
        """What, with the weights, makes the same world model again: see `from_facts`."""
        sizes = {name: getattr(self, name) for name in ("environment", "state_size", "action_size")}
        return {"config": asdict(self.config), **sizes}

    @classmethod
    def from_facts(cls, facts: dict[str, Any], device: str = "cpu") -> WorldModel:
        """Of what `facts` returned, with weights of its own, in float32. Raises ValueError where they are something else."""
        sizes = {"environment": str, "state_size": int, "action_size": int}
        if not isinstance(facts, dict) or facts.keys() != {"config", *sizes}:
            raise ValueError(f"world_model: wanted config, {', '.join(sizes)}")
        for name, kind in sizes.items():
            if type(facts[name]) is not kind:
                raise ValueError(f"world_model: {name}: wanted {kind.__name__}, got {type(facts[name]).__name__}")
        config = configured(WorldModelConfig, facts["config"], "world_model")
        with torch.device(device):
            return cls(**{**facts, "config": config}).float()

    def save(self, path: Path | str, **facts: object) -> None:
        checkpoint.save(path, self.state_dict(), {"model": "world_model", "made": self.facts(), **facts})

    @classmethod
    def load(cls, path: Path | str) -> WorldModel:
        """A frozen world model. Raises ValueError where the file holds none."""
        tensors, facts = checkpoint.load(path)
        if facts.get("model") != "world_model":
            raise ValueError(f"world_model: {path} holds a {shown(facts.get('model'))}")
        try:
            model = checkpoint.fitted(tensors, 1, lambda device: cls.from_facts(facts["made"], device))
        except checkpoint.MALFORMED as e:
            raise ValueError(f"world_model: {path} does not fit its own facts ({checkpoint.why(e)})") from e
        return model.freeze()


class WorldModelLearner:
    """What `icrl.training.loop.train` drives.

    Args:
        config: of a fresh world model. data: is moved to `device`. batch: steps a batch.
        loop: whose seed, `compile` and `autocast` are heeded.
        facts: what, beside the world model's own, a run in the same folder must share to be continued.
        device: where it is trained.
        record: what config.json also holds and may be another when the run goes on, see `goes_on`.
    Raises:
        ValueError: the batch is less than 1, or episodes are shorter than a window.
    """

    def __init__(
        self,
        config: WorldModelConfig,
        data: Trajectories,
        batch: int,
        loop: LoopConfig,
        facts: dict[str, Any],
        device: torch.device | str = "cpu",
        record: dict[str, Any] | None = None,
    ) -> None:
        batch = integer("batch", batch, 1)
        data.check_length("window", config.window)
        torch.manual_seed(loop.seed)
        self.model: WorldModel = WorldModel.of(config, data).to(device)
        self.data, self.batch, self.loop, self.facts = data.to(device), batch, loop, facts
        self.record = record or {}
        self.objective = torch.compile(self.model.objective, dynamic=False) if loop.compile else self.model.objective

    def config(self) -> dict[str, Any]:
        return {"world_model": self.model.facts(), "batch": self.batch, **self.facts, **self.record}

    def upgraded(self, config: dict[str, Any]) -> dict[str, Any]:
        return goes_on(config, self.record)

    def hidden_matrices(self) -> list[nn.Parameter]:
        return []

    def _draw(self, batch: int) -> WindowBatch:
        return self.model.draw(self.data, torch.randint(len(self.data.states), (batch,), device="cpu"))

    def losses(self, update: int) -> Iterable[tuple[Tensor, Metrics]]:
        batch = self._draw(self.batch)
        with autocast(self.loop, self.data.device):
            loss, errors = self.objective(self.data, batch)
        yield loss, errors

    def evaluate(self) -> dict[str, float]:
        with torch.no_grad(), torch.random.fork_rng([]):
            torch.default_generator.manual_seed(7)
            batch = self._draw(4096)
            errors = numbers(self.model.objective(self.data, batch)[1])
        return {f"{name}_error": errors[name] for name in ("reward", "state")}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass

    def save_model(self, path: Path, **facts: Any) -> None:
        self.model.save(path, **facts)
