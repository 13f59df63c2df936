"""The value-iteration network: linear-attention memories that count transitions, and learned Bellman backups over them.

It learns a Markov decision process from its context, as OmniRL does (`icrl.omnirl.model`), by another architecture: where
OmniRL is a plain stack of token mixers, this network's memories have keys that are of use for a table.

One token an environment step: the observation and the transition that led to it. Every memory is a gated linear attention
(`icrl_kernels.gla`), so training runs in parallel over the sequence, acting is recurrent with a state of constant size, and
a sequence of any length is trained by segments.

- *Transition memory* (one layer, a head an action): key = the previous observation, in the head of the previous action;
  value = (1, reward, termination, observation, behaviour tag). Its read at the current observation gives, for each action,
  how often it was tried, its mean reward and where it led: sums that attention forms exactly, because observations enter as
  orthonormal vectors.
- *Value memories* (`layers` of them): key = the current observation, value = what the layer below thinks of it, with a decay
  on the addressed slot alone (an average that forgets stale estimates). The query is the transition memory's distribution
  of next states, so that the read is an expectation of values over next states: one layer is one learned Bellman backup.
  The first stores the mean reward so far: backups from a value that is learned, and optimistic in tasks that are new, make
  far states look better than near ones, and what was learned is unlearned (tests/icrl/omnirl/test_unlearning.py).
- *Blocks* between them: per-action streams `z [B,T,A,d]` whose weights are shared by all actions, and a state stream
  `x [B,T,D]` that pools over them. Observations have no other embedding, so a checkpoint serves any number of states.

Readouts after every block (trained on all, used from the last): logits and Q-values of five policies, by their tags in
decoupled policy distillation: 0-3, the optimal one at a discount; 4, the optimistic model-based learner, which says what to
do under uncertainty. The prompt tag chooses the one that acts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icrl.omnirl.labels import LABELS_VERSION, version_of
from icrl.omnirl.tags import START, TAGS, Policies
from icrl.omnirl.tokens import Tokens
from icrl.reading import shown
from icrl.training import checkpoint
from icrl.training.config import configured
from icrl_kernels import gla, gla_step, layers
from icrl_kernels.arguments import integer, integer_fields, number

KIND = "value_iteration_network"
"""What its files say that they hold."""

KINDS = (KIND, "omnirl")
"""And what those from before it had a name of its own say."""

BEFORE = {"tied": False, "fading": False}
"""Of models from before these were settings."""


@dataclass(frozen=True)
class ValueIterationNetworkConfig(Policies):
    actions: int = 5
    layers: int = 8
    action_width: int = 32
    state_width: int = 64
    value_width: int = 24
    action_hidden: int = 48
    state_hidden: int = 96
    pool_heads: int = 4
    write_rate: float = 0.3
    tied: bool = True
    """Whether all layers share their weights: then there may be as many as a state has memories."""
    fading: bool = True
    """Whether what the blocks add to a backup's value fades with visits n to the action, as 1/(1 + n²)."""
    discounts: tuple[float, ...] = (0.0, 0.5, 0.93, 0.994)
    explorer_discount: float = 0.97

    def __post_init__(self) -> None:
        one = ("actions", "action_width", "state_width", "value_width", "action_hidden", "state_hidden", "pool_heads")
        integer_fields(self, layers=(0, 1024), **dict.fromkeys(one, 1))
        if not 0 < number("write_rate", self.write_rate) < 1:
            raise ValueError(f"write_rate: wanted a number in (0, 1), got {self.write_rate}")
        self.check_discounts()

    @property
    def own_layers(self) -> int:
        """How many layers have weights of their own."""
        return min(self.layers, 1) if self.tied else self.layers


class Readout(NamedTuple):
    logits: Tensor  # [B,T,A,G] of each policy
    q: Tensor  # [B,T,A,G] (1-discount)·Q, in units of the rewards' mean and deviation seen so far


class Output(NamedTuple):
    readouts: list[Readout]  # one a block; the last is the model's
    reward_mean: Tensor  # [B,T] causal statistics that the q readouts are relative to
    reward_scale: Tensor


class Rewards(NamedTuple):
    """The rewards so far, `[B,T]` each: what they are measured against."""

    mean: Tensor
    scale: Tensor  # mean absolute deviation
    rms: Tensor
    most: Tensor
    count: Tensor


class State(NamedTuple):
    """All that the model keeps of its context; float32 (under autocast too), constant in size, on the model's device."""

    transition: Tensor  # [B,A,S,3+TAGS+S]
    values: list[Tensor]  # each [B,1,S,1+value_width+G]
    reward_sum: Tensor  # [B]
    reward_deviation: Tensor  # [B]
    reward_square: Tensor  # [B]
    reward_max: Tensor  # [B], 0 before the first
    count: Tensor  # [B]

    def detach(self) -> State:
        rest = (self.reward_sum, self.reward_deviation, self.reward_square, self.reward_max, self.count)
        return State(self.transition.detach(), [x.detach() for x in self.values], *(x.detach() for x in rest))


torch.serialization.add_safe_globals([State])  # torch.load with weights_only makes it


def whole(config: Any) -> Any:
    """A file's configuration with the settings that were none when it was written."""
    return {**BEFORE, **config} if isinstance(config, dict) else config


Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor], tuple[Tensor, Tensor]]  # q, k, v, g, state


def _normed(x: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt()


def _normal(layer: nn.Linear, std: float) -> None:
    nn.init.normal_(layer.weight, std=std)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def _linear(inputs: int, outputs: int, std: float, bias: bool = False) -> layers.Linear:
    return layers.Linear(inputs, outputs, bias=bias).start(partial(_normal, std=std))


def _compared(x: Tensor, known: Tensor) -> Tensor:
    """`x [B,T,A,F]` of each action against the mean of the known ones, at three resolutions; zero for unknown actions."""
    n = known.sum(2, keepdim=True) + 0.1
    centred = (x - (x * known).sum(2, keepdim=True) / n) * known
    deviation = ((centred * centred).sum(2, keepdim=True) / n + 1e-5).sqrt()
    return torch.cat([centred / deviation, torch.tanh(5 * centred), torch.tanh(30 * centred)], -1)


class Block(nn.Module):
    """Pools the actions' streams into the state's and sends it back, each through a gated MLP."""

    def __init__(self, c: ValueIterationNetworkConfig) -> None:
        super().__init__()
        d, width, pooled = c.action_width, c.state_width, 8 * c.pool_heads
        self.score = _linear(d, c.pool_heads, d**-0.5)
        self.value = _linear(d, 2 * pooled, d**-0.5)
        self.pool_out = _linear(2 * pooled, width, 0.3 * (2 * pooled) ** -0.5)
        self.state_in = _linear(width, 2 * c.state_hidden, width**-0.5)
        self.state_out = _linear(c.state_hidden, width, 0.3 * c.state_hidden**-0.5)
        self.action_in = _linear(d, 2 * c.action_hidden, d**-0.5)
        self.action_state_in = _linear(width, 2 * c.action_hidden, width**-0.5)
        self.action_out = _linear(c.action_hidden, d, 0.3 * c.action_hidden**-0.5)

    def forward(self, z: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        zn = _normed(z)
        weight = F.softmax(2 * self.score(zn), dim=2)  # over actions
        mean, best = self.value(zn).unflatten(-1, (2, weight.shape[-1], 8)).unbind(3)
        pooled = torch.cat([(weight[..., None] * mean).sum(2).flatten(-2), best.amax(2).flatten(-2)], -1)
        x = x + self.pool_out(pooled)
        a, b = self.state_in(_normed(x)).chunk(2, -1)
        x = x + self.state_out(F.silu(a) * b)
        a, b = (self.action_in(zn) + self.action_state_in(_normed(x))[:, :, None]).chunk(2, -1)
        return z + self.action_out(F.silu(a) * b), x


class ValueIterationNetwork(nn.Module):
    """`model(tokens, state) -> (output, state)`; see the module's docstring for what it is."""

    title = "value-iteration network"
    """In tables and pictures."""

    def __init__(self, config: ValueIterationNetworkConfig | None = None) -> None:
        super().__init__()
        c = self.config = config or ValueIterationNetworkConfig()
        self.labels = LABELS_VERSION
        """Of the labels that the weights have learned: see icrl.omnirl.labels."""
        self.labels_named = False
        """Whether it has been said that they are not today's."""
        d, width, G = c.action_width, c.state_width, c.policies
        self.discounts: Tensor
        self.register_buffer("discounts", torch.empty(G, dtype=torch.float32), persistent=False)
        self.action_features = _linear(12 + TAGS, d, 0.5, bias=True)
        self.state_features = _linear(7, width, 0.5, bias=True)
        self.write_rate = nn.Parameter(torch.empty(c.own_layers))
        self.bonus = nn.Parameter(torch.empty(G))  # of rarely tried actions, a policy
        self.reset_parameters()
        own = c.own_layers
        self.write = nn.ModuleList(_linear(width, c.value_width, width**-0.5) for _ in range(own))
        self.read = nn.ModuleList(_linear(c.value_width + 1 + 4 * G, d, 0.7 * c.value_width**-0.5) for _ in range(own))
        self.blocks = nn.ModuleList(Block(c) for _ in range(own + 1))
        self.policy_heads = nn.ModuleList(_linear(d, G, 0.02, bias=True) for _ in range(own + 1))
        self.q_heads = nn.ModuleList(_linear(d, G, 0.02, bias=True) for _ in range(own + 1))
        self.q_state_heads = nn.ModuleList(_linear(width, G, 0.02, bias=True) for _ in range(own + 1))
        self.float()  # as its memories are, whatever torch's default dtype

    def reset_parameters(self) -> None:
        """Give first values to the parameters and buffers that are no submodule's."""
        c = self.config
        nn.init.constant_(self.write_rate, math.log(c.write_rate / (1 - c.write_rate)))
        for tensor, values in ((self.bonus, (*(0.0 for _ in c.discounts), 0.2)), (self.discounts, c.policy_discounts)):
            layers.fill(tensor, torch.tensor(values, dtype=tensor.dtype, device=tensor.device))

    @property
    def actions(self) -> int:
        return self.config.actions

    @property
    def prompts(self) -> int:
        """How many policies a prompt may ask for: its tag is one of 0 to prompts-1."""
        return self.config.policies

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.write_rate.device

    def initial_state(self, batch: int, states: int, layers: int | None = None) -> State:
        """An empty context for `batch` sequences of tasks with up to `states` observations, on the model's device.

        `layers`: of value memories, as many as are wanted where the layers are tied; default the configuration's.
        """
        c = self.config
        batch, states = integer("batch", batch, 0), integer("states", states, 1)
        layers = c.layers if layers is None else integer("layers", layers, 0)
        if not c.tied and layers != c.layers:
            raise ValueError(f"layers: wanted the model's {c.layers}, as they have weights of their own, got {layers}")

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float32, device=self.device)

        values = [zeros(batch, 1, states, 1 + c.value_width + c.policies) for _ in range(layers)]
        memory = zeros(batch, c.actions, states, 3 + TAGS + states)
        return State(memory, values, *(zeros(batch) for _ in range(5)))

    def forward(self, tokens: Tokens, state: State) -> tuple[Output, State]:
        """Tokens `[B,T]` after the context in `state` -> readouts `[B,T,...]` and the state after them.

        `state` is left as it is; `step` changes it. All tensors are on the model's device. Under torch.autocast the layers
        compute in its dtype; memories and rewards' statistics stay float32.
        """
        return self._run(tokens, state, self._attend)

    @torch.no_grad()
    def step(self, tokens: Tokens, state: State) -> tuple[Output, State]:
        """One token `[B,1]` after the context in `state`, which is CHANGED IN PLACE and returned; no gradient.

        What `forward` gives for one token, without a second copy of the memories.

        Raises:
            ValueError: more than one token, or none.
        """
        if tokens.observation.shape[1] != 1:
            raise ValueError(f"tokens: wanted one a sequence, [B,1], got {list(tokens.observation.shape)}")
        output, new = self._run(tokens, state, self._attend_in_place)
        for old, now in zip(state[2:], new[2:], strict=True):  # the rewards' statistics; memories are changed already
            old.copy_(now)
        return output, state

    @torch.no_grad()
    def decide(self, tokens: Tokens, prompt: int, state: State) -> Tensor:
        """The logits `[B,A]` of the policy that `prompt` names, after one token; `state` is CHANGED IN PLACE, as in `step`."""
        output, _ = self.step(tokens, state)
        return output.readouts[-1].logits[:, 0, :, prompt]

    @torch.no_grad()
    def follow(self, tokens: Tokens, prompt: int, state: State) -> State:
        """The state after tokens `[B,T]`, whatever the prompt; `state` is left as it is."""
        return self(tokens, state)[1]

    def _run(self, tokens: Tokens, state: State, attend: Attend) -> tuple[Output, State]:
        c = self.config
        states = state.transition.shape[2]
        here = F.one_hot(tokens.observation, states).float()
        rewards, statistics = self._reward_statistics(tokens.previous_reward, state)
        mean, scale = rewards.mean, rewards.scale
        seen, new_transition = self._read_transitions(tokens, here, state.transition, attend)
        z, x, next_state, mean_reward, known, mass, visits = self._features(tokens, here, seen, rewards)
        unknown = 1 / (1 + visits.square()) if c.fading else torch.ones_like(visits)
        gain = mean_reward[..., None] + self.bonus * rewards.rms[..., None, None] * known
        z, x = first = self.blocks[0](z, x)
        readouts = [self._readout(0, z, x, z.new_zeros(()), unknown)]
        new_values = []
        units = (mean[..., None, None], scale[..., None, None])
        for i, memory in enumerate(state.values):
            own = 0 if c.tied else i
            if i:
                best = readouts[-1].q.amax(2) * units[1][..., 0] + units[0][..., 0]
            else:
                best = mean[..., None].expand_as(readouts[0].q[:, :, 0])
            value = torch.cat([torch.ones_like(best[..., :1]), self.write[own](_normed(x)), best], -1)[:, :, None]
            rate = torch.sigmoid(self.write_rate[own]).clamp(max=0.8)
            key = here[:, :, None]
            read, new = attend(next_state, key * rate, value, key * torch.log1p(-rate), memory)
            new_values.append(new)
            weight = read[..., :1]
            average = read[..., 1:] / (weight + 1e-2)
            # one Bellman backup at each discount, in raw reward units, then in the units of the readouts
            backup = (1 - self.discounts) * gain + self.discounts * mass[..., None] * average[..., c.value_width :]
            backup = ((backup - units[0]) / units[1]).clamp(-8, 8) * (mass[..., None] > 0.02)
            compared = _compared(backup, (mass[..., None] > 0.02).float())
            if c.tied:  # what a layer knows of those before it comes through its memory: depth dilutes nothing
                z, x = first
            z = z + self.read[own](torch.cat([average[..., : c.value_width], backup, compared, weight], -1))
            z, x = self.blocks[own + 1](z, x)
            readouts.append(self._readout(own + 1, z, x, backup, unknown))
        output = Output(readouts, mean, scale)
        return output, State(new_transition, new_values, *statistics)

    # What a memory is asked, in float32 whatever autocast made of it: counts beyond 256 are no bfloat16 numbers.

    @staticmethod
    def _attend(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
        if q.shape[1] == 1 and not torch.is_grad_enabled():  # the bits of `step`
            return ValueIterationNetwork._attend_in_place(q, k, v, g, state.clone())
        gate = None if g is None else g.float()
        o, new = gla(q.float(), k.float(), v.float(), gate, scale=1.0, initial_state=state, output_final_state=True)
        assert new is not None
        return o, new

    @staticmethod
    def _attend_in_place(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
        gate = None if g is None else g[:, 0].float()
        return gla_step(q[:, 0].float(), k[:, 0].float(), v[:, 0].float(), gate, state, scale=1.0)[:, None], state

    def _reward_statistics(self, reward: Tensor, state: State) -> tuple[Rewards, tuple[Tensor, ...]]:
        """What is known of the rewards' scale at each token, and the state that continues it."""
        steps = torch.arange(reward.shape[1], device=reward.device, dtype=torch.float32)
        count = state.count[:, None] + steps  # rewards seen; the first token of a context brings none
        n = count.clamp(min=1)
        total = state.reward_sum[:, None] + reward.cumsum(1)
        mean = total / n
        deviation = state.reward_deviation[:, None] + (reward - mean).abs().cumsum(1)
        square = state.reward_square[:, None] + reward.square().cumsum(1)
        unseen = torch.full_like(state.reward_max, -math.inf)
        most = torch.where(count > 0, reward, unseen[:, None]).cummax(1).values
        most = torch.maximum(most, torch.where(state.count > 1, state.reward_max, unseen)[:, None]).nan_to_num(
            neginf=0.0
        )
        found = Rewards(mean, deviation / n + 1e-2, (square / n).sqrt(), most, count)
        last = (total[:, -1], deviation[:, -1], square[:, -1], most[:, -1], count[:, -1] + 1)
        return found, tuple(x.contiguous() for x in last)

    def _read_transitions(self, t: Tokens, here: Tensor, memory: Tensor, attend: Attend) -> tuple[Tensor, Tensor]:
        A, done = self.config.actions, t.previous_done
        head = (
            F.one_hot(t.previous_action, A + 1)[..., :A] * (done != START)[..., None]
        )  # head a is written when a was taken
        key = F.one_hot(t.previous_observation, here.shape[-1]).float()[:, :, None] * head[..., None]
        value = torch.cat(
            [
                torch.ones_like(here[..., :1]),
                t.previous_reward[..., None],
                (done == 1).float()[..., None],
                F.one_hot(t.previous_tag, TAGS).float(),
                (done == 0).float()[..., None] * here,  # where an episode ended, the observation is no next state
            ],
            -1,
        )
        query = here[:, :, None].expand(-1, -1, A, -1)
        return attend(query, key, value[:, :, None].expand(-1, -1, A, -1), None, memory)

    def _features(self, t: Tokens, here: Tensor, seen: Tensor, rewards: Rewards) -> tuple[Tensor, ...]:
        """What the transition memory knows of each action here.

        Streams z and x; then, of each action: frequencies of next states, mean reward, 1/√visits (0 where untried), the
        share of its outcomes that went on, and visits.
        """
        n = seen[..., :1].clamp(min=0)
        average = seen[..., 1:] / (n + 1e-2)
        reward, end, tags, next_state = average.split([1, 1, TAGS, here.shape[-1]], -1)
        mean, scale = rewards.mean, rewards.scale
        known = n / (n + 0.1)
        r = (reward - mean[..., None, None]) / scale[..., None, None] * known
        stays, spread = (next_state * here[:, :, None]).sum(-1, keepdim=True), (next_state**2).sum(-1, keepdim=True)
        visits = [known, 0.5 * torch.log1p(n), 1 / (1 + n)]
        gains = [0.5 * r.clamp(-8, 8), torch.tanh(r), torch.tanh(4 * r), _compared(r, known)]
        z = self.action_features(torch.cat([*visits, *gains, end, stays, spread, tags], -1))
        parts = [
            0.3 * torch.log1p(rewards.count),
            0.3 * torch.log(scale),
            (mean / scale).clamp(-5, 5),
            (t.previous_done == 1).float(),
            (t.previous_done == 2).float(),
            0.5 * (rewards.rms / scale).clamp(max=8),
            0.3 * ((rewards.most - mean) / scale).clamp(-8, 8),
        ]
        x = self.state_features(torch.stack(parts, -1))
        return z, x, next_state, reward[..., 0], known * (n + 1e-2).rsqrt(), (known * (1 - end))[..., 0], n

    def _readout(self, i: int, z: Tensor, x: Tensor, backup: Tensor, unknown: Tensor) -> Readout:
        zn = _normed(z)
        guess = self.q_heads[i](zn) + self.q_state_heads[i](_normed(x))[:, :, None]
        return Readout(self.policy_heads[i](zn), backup + guess * unknown)

    def save(self, path: Path | str, **facts: object) -> None:
        made = {"model": KIND, "config": asdict(self.config), "labels": self.labels}
        checkpoint.save(path, self.state_dict(), {**made, **facts})

    @classmethod
    def load(cls, path: Path | str, device: torch.device | str = "cpu") -> ValueIterationNetwork:
        """A model from a checkpoint written by `save`, on a device. Raises ValueError where the file is not one."""
        return cls.loaded(path, *checkpoint.load(path), device)

    @classmethod
    def loaded(
        cls, path: Path | str, tensors: dict[str, Tensor], facts: dict[str, Any], device: torch.device | str
    ) -> ValueIterationNetwork:
        if facts.get("model") not in KINDS:
            other = "; load it by OmniRL.load" if facts.get("model") == "omnirl_sequence" else ""
            raise ValueError(f"checkpoint: {path} holds a {shown(facts.get('model'))}, wanted {KIND!r}{other}")
        try:
            config = configured(ValueIterationNetworkConfig, whole(facts["config"]), "config")
            with torch.device("cpu"):
                model = checkpoint.fitted(tensors, config.own_layers, lambda _: cls(config))
            model.labels = version_of(facts)
        except checkpoint.MALFORMED as e:
            raise ValueError(f"checkpoint: {path} does not fit its own configuration ({checkpoint.why(e)})") from e
        if not all(bool(t.isfinite().all()) for t in tensors.values()):
            raise ValueError(f"checkpoint: {path} holds weights that are not finite")
        return model.to(device).eval()
