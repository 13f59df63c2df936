"""OmniRL (arXiv 2502.02869): a causal sequence model that learns to act in an unknown task from its context alone.

A stack of token mixers - linear attention with a state of constant size, or softmax attention over a window - reads what was
observed, done and earned so far, and gives, at each step,

- a policy: with `heads` "each", logits of five policies by their tags in decoupled policy distillation (0-3: the optimal
  one at a discount; 4: the model-based learner that explores), of which the prompt chooses one; with "prompted", as published,
  of one policy, and the prompt is a token;
- a world model: the next observation, reward and end.

Two layouts: "interleaved", as published, has a token for the observation, the prompt, the tag, the action and the reward of
a step; "fused" has one token a step, the observation beside the transition that led to it, and is five times cheaper.

model = OmniRL(OmniRLConfig())
output, state = model(tokens, model.initial_state(batch, states))   # tokens [B,T]: a segment; state goes on with the next
logits = model.decide(token, prompt, state)                         # one step [B,1]; state is changed in place
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from icrl.models.mixers import MIXERS, AddressedDeltaNet, Addresses, Recurrent, Softmax, make_mixer
from icrl.models.stack import Block, Stack, normal
from icrl.models.tokenizers import ContinuousObservations, DiscreteObservations, Tokenizer
from icrl.omnirl import value_iteration_network
from icrl.omnirl.labels import LABELS_VERSION, version_of
from icrl.omnirl.layouts import FusedTokens, InterleavedTokens, Parts, check_arrangement, reward_features
from icrl.omnirl.tags import START, UNKNOWN, Policies
from icrl.omnirl.tokens import Tokens
from icrl.reading import shown
from icrl.training import checkpoint
from icrl.training.config import configured
from icrl_kernels import layers
from icrl_kernels.arguments import integer, integer_fields

KIND = "omnirl_sequence"
"""What its files say that they hold. ("omnirl" are older ones, of value-iteration networks.)"""

LAYOUTS = ("fused", "interleaved")
HEADS = ("each", "prompted")


@dataclass(frozen=True)
class OmniRLConfig(Policies):
    """The defaults are the recipe for a CPU: .85M parameters."""

    actions: int = 5
    states: int = 128
    """How many observations there are, by number."""
    channels: int = 0
    """Of observations that are vectors instead; 0: they are numbers."""
    layout: str = "fused"
    arrangement: str = "opdtawr"
    """Of the interleaved layout: the order of a step's observation, prompt, tag, action and reward; the decision is read at d,
    the world model at w."""
    mixer: str = "gated_delta_net"
    """One of icrl.models.mixers.MIXERS; "softmax" attends to `window` tokens."""
    width: int = 128
    layers: int = 4
    heads: int = 6
    head_dim: int = 32
    """Of gated_delta_net and kda; other mixers' heads share the width."""
    hidden: int = 192
    """Width of the MLPs."""
    gated: bool = True
    """Whether the MLPs are W_2 (silu(a) ⊙ b); else W_2 gelu(a)."""
    window: int = 512
    """Of softmax: how many tokens each attends to."""
    code: int = 32
    """Channels of an observation's code."""
    addressed: bool = True
    """Whether first weights make each layer a memory by observation, a head an action (AddressedDeltaNet); gated_delta_net in
    the fused layout alone."""
    policy: str = "each"
    """"each": logits of every policy; "prompted": of one, which the prompt says."""
    discounts: tuple[float, ...] = (0.0, 0.5, 0.93, 0.994)
    explorer_discount: float = 0.97

    def __post_init__(self) -> None:
        one = ("actions", "states", "width", "heads", "head_dim", "hidden", "window", "code")
        integer_fields(self, channels=0, layers=(1, 1024), **dict.fromkeys(one, 1))
        for name, known in (("layout", LAYOUTS), ("mixer", MIXERS), ("policy", HEADS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: wanted one of {', '.join(known)}, got {getattr(self, name)!r}")
        check_arrangement(self.arrangement)
        if self.mixer not in ("gated_delta_net", "kda") and self.width % self.heads:
            raise ValueError(f"width: wanted a multiple of heads={self.heads}, got {self.width}")
        if self.addressed and (self.mixer != "gated_delta_net" or self.layout != "fused"):
            given = f"{self.mixer} in the {self.layout} layout"
            raise ValueError(f"addressed: wanted gated_delta_net in the fused layout, got {given}")
        if self.addressed and self.head_dim != self.code:
            raise ValueError(
                f"code: wanted head_dim={self.head_dim} channels, as heads are addressed by it, got {self.code}"
            )
        if self.layout == "interleaved" and ("p" in self.arrangement) != (self.policy == "prompted"):
            raise ValueError(
                f"arrangement: wanted a prompt p with policy 'prompted' alone, got {self.arrangement!r} with {self.policy!r}"
            )
        self.check_discounts()

    @classmethod
    def published(cls, **changed: Any) -> OmniRLConfig:
        """The paper's: RWKV-7, 18 blocks of width 512 and MLP 1024, 8 heads, interleaved (43.6M parameters in the paper)."""
        own: dict[str, Any] = {"layout": "interleaved", "mixer": "rwkv7", "width": 512, "layers": 18, "heads": 8}
        own |= {"hidden": 1024, "gated": False, "code": 512, "addressed": False, "policy": "prompted"}
        return cls(**{**own, **changed})


class World(NamedTuple):
    """What the world model expects; with no action told, `[B,T,A,...]` of every action."""

    observation: Tensor  # [B,T,S] logits, or [B,T,C]: the next one, as the tokenizer reads it
    reward: Tensor  # [B,T] in units of `Output.reward_scale`
    done: Tensor  # [B,T] logit of a terminal state


class Output(NamedTuple):
    logits: Tensor  # [B,T,A,G] of each policy; G = 1 with policy "prompted"
    world: World
    reward_scale: Tensor
    """[B,T] float32: root mean square of the rewards so far - in the interleaved layout, of those before the transition that
    the world model tells of -, 1 before the first that is not 0."""


class OmniRLState(NamedTuple):
    """All that the model keeps of its context, constant in size, on the model's device."""

    layers: list[Any]  # each a State of icrl_kernels.layers, or a WindowState
    reward_square: Tensor  # [B] float32, the sum so far
    count: Tensor  # [B] float32, rewards so far

    def detach(self) -> OmniRLState:
        return OmniRLState([s.detach() for s in self.layers], self.reward_square.detach(), self.count.detach())

    def clone(self) -> OmniRLState:
        """A copy: `step` changes its state in place."""
        return OmniRLState([s.clone() for s in self.layers], self.reward_square.clone(), self.count.clone())


torch.serialization.add_safe_globals([OmniRLState])  # torch.load with weights_only makes it


def _head(inputs: int, outputs: int, std: float = 0.02) -> layers.Linear:
    return layers.Linear(inputs, outputs).start(partial(normal, std=std * inputs**-0.5))


@torch.no_grad()
def _reads(layer: nn.Linear, addresses: Addresses) -> None:
    """First weights that read what the first memory copies: the code of the last outcome of each action."""
    width, size = layer.in_features, layer.out_features // addresses.actions
    layers.fill(layer.weight, addresses.spread(width, size).t())
    nn.init.zeros_(layer.bias)


def _root_mean(square: Tensor, count: Tensor) -> Tensor:
    return torch.where(square > 0, (square / count.clamp(min=1)).sqrt(), 1.0)


class OmniRL(nn.Module):
    """`model(tokens, state) -> (output, state)`; see the module's docstring for what it is.

    Args:
        tokenizer: of observations, instead of the one that the configuration describes: see icrl.models.tokenizers. A
            file of such a model is loaded by giving one again.
    """

    title = "OmniRL"
    """In tables and pictures."""

    def __init__(self, config: OmniRLConfig | None = None, tokenizer: Tokenizer | None = None) -> None:
        super().__init__()
        c = self.config = config or OmniRLConfig()
        self.labels = LABELS_VERSION
        """Of the labels that the weights have learned: see icrl.omnirl.labels."""
        self.labels_named = False
        """Whether it has been said that they are not today's."""
        self.own_tokenizer = "" if tokenizer is None else type(tokenizer).__name__
        if tokenizer is None:
            kind, observations = (
                (ContinuousObservations, c.channels) if c.channels else (DiscreteObservations, c.states)
            )
            tokenizer = kind(observations, c.code)
        self.tokenizer, size = tokenizer, tokenizer.size
        if c.addressed and size != c.code:
            raise ValueError(
                f"tokenizer: wanted codes of {c.code} channels, as heads are addressed by them, got {size}"
            )
        if c.layout == "fused":
            self.layout = FusedTokens(c.width, size, c.actions, c.policy == "prompted", c.addressed)
            addresses = self.layout.addresses
        else:
            self.layout, addresses = InterleavedTokens(c.width, size, c.actions, c.arrangement), None
        options: dict[str, Any] = {"head_dim": c.head_dim, "window": c.window, "addresses": addresses}
        blocks = []
        for i in range(c.layers):
            mixer = make_mixer(c.mixer, c.width, c.heads, **options, layer=i, layers_in_all=c.layers)
            blocks.append(Block(c.width, mixer, c.hidden, gated=c.gated, rms=True))
        self.stack = Stack(c.width, blocks, rms=True)
        self.stack.start_projections(0.2 if c.addressed else 1.0)
        self.policies = 1 if c.policy == "prompted" else c.policies
        told = 1 if not self.layout.world_actions else c.actions
        self.policy_head = _head(c.width, c.actions * self.policies)
        self.observation_head = _head(c.width, told * size, 0.1)
        self.reward_head, self.done_head = _head(c.width, told), _head(c.width, told)
        if addresses is not None:
            for module in self.stack.modules():
                if isinstance(module, AddressedDeltaNet):
                    module.start_outputs()
            self.observation_head.start(partial(_reads, addresses=addresses))
        self.float()  # as the states are, whatever torch's default dtype

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
        return self.policy_head.weight.device

    def initial_state(self, batch: int, states: int | None = None) -> OmniRLState:
        """An empty context for `batch` sequences, on the model's device.

        `states`: of the tasks, which is refused with ValueError where the model has not so many; the state's size does not
        depend on it.
        """
        batch = integer("batch", batch, 0)
        if states is not None and integer("states", states, 1) > self.config.states and not self.config.channels:
            raise ValueError(f"states: wanted at most the model's {self.config.states} observations, got {states}")
        made = []
        for block in self.stack.blocks:
            assert isinstance(block, Block)
            assert not isinstance(block.mixer, Softmax)
            mixer = block.mixer.mixer if isinstance(block.mixer, Recurrent) else block.mixer
            made.append(mixer.initial_state(batch, self.device))
        zeros = torch.zeros(batch, dtype=torch.float32, device=self.device)
        return OmniRLState(made, zeros, zeros.clone())

    def forward(
        self,
        tokens: Tokens,
        state: OmniRLState,
        prompt: Tensor | None = None,
        action: Tensor | None = None,
        missing: Tensor | None = None,
    ) -> tuple[Output, OmniRLState]:
        """Tokens `[B,T]` after the context in `state` -> output and the state after them.

        `state` is left as it is; `step` changes it. All tensors are on the model's device. Under torch.autocast the layers
        compute in its dtype; states and the rewards' statistics stay float32.

        Args:
            prompt: `[B,T]` int64, for policy "prompted": tags of the policies that are asked for, 7 for unknown, the default.
            action: `[B,T]` int64, for the fused layout: what is done next, and the world model is asked for; None: of every
                action. In the interleaved layout its output is at the token of the *previous* action, and tells of the
                transition that led to this step's observation.
            missing: `[B,T]` bool: observations that are left out of the tokens.
        """
        parts, scale, statistics = self._parts(tokens, state, prompt, missing)
        y, after = self.stack.run(self.layout(parts), state.layers)
        y = y.unflatten(1, (-1, self.layout.per_step))
        output = self._output(y[:, :, self.layout.decision], y[:, :, self.layout.world], scale, action)
        return output, OmniRLState(after, *statistics)

    @torch.no_grad()
    def step(
        self, tokens: Tokens, state: OmniRLState, prompt: Tensor | None = None, action: Tensor | None = None
    ) -> tuple[Output, OmniRLState]:
        """One step `[B,1]` after the context in `state`, which is CHANGED IN PLACE and returned; no gradient.

        Raises:
            ValueError: more than one step, or none.
        """
        if tokens.previous_reward.shape[1] != 1:
            raise ValueError(f"tokens: wanted one a sequence, [B,1], got {list(tokens.previous_reward.shape)}")
        parts, scale, statistics = self._parts(tokens, state, prompt, None)
        ys = [self.stack.step(x, state.layers) for x in self.layout(parts).unbind(1)]
        state.reward_square.copy_(statistics[0])
        state.count.copy_(statistics[1])
        decision, world = ys[self.layout.decision], ys[self.layout.world]
        return self._output(decision[:, None], world[:, None], scale, action), state

    @torch.no_grad()
    def decide(self, tokens: Tokens, prompt: int, state: OmniRLState) -> Tensor:
        """The logits `[B,A]` of the policy that `prompt` names, after one token; `state` is CHANGED IN PLACE, as in `step`."""
        asked = torch.full_like(tokens.previous_tag, prompt)
        output, _ = self.step(tokens, state, asked)
        return output.logits[:, 0, :, prompt if self.policies > 1 else 0]

    @torch.no_grad()
    def follow(self, tokens: Tokens, prompt: int, state: OmniRLState) -> OmniRLState:
        """The state after tokens `[B,T]`, as `decide` by the same prompt leaves it token by token; `state` is left as it is."""
        return self(tokens, state, torch.full_like(tokens.previous_tag, prompt))[1]

    def _parts(
        self, tokens: Tokens, state: OmniRLState, prompt: Tensor | None, missing: Tensor | None
    ) -> tuple[Parts, Tensor, tuple[Tensor, Tensor]]:
        """The tokens' parts, the rewards' scale `[B,T]`, and the statistics after them."""
        first = tokens.previous_done == START
        reward = tokens.previous_reward.masked_fill(first, 0.0)
        square = state.reward_square[:, None] + reward.square().cumsum(1)
        count = state.count[:, None] + (~first).float().cumsum(1)
        scale = _root_mean(square, count)
        none = first if missing is None else first | torch.cat([first[:, :1] & False, missing[:, :-1]], 1)
        parts = Parts(
            tokens,
            self.tokenizer.encode(tokens.observation, missing),
            self.tokenizer.encode(tokens.previous_observation, none),
            reward_features(reward / scale),
            torch.full_like(tokens.previous_tag, UNKNOWN) if prompt is None else prompt,
        )
        after = (
            (square[:, -1].contiguous(), count[:, -1].contiguous())
            if square.shape[1]
            else (state.reward_square, state.count)
        )
        if not self.layout.world_actions:
            earlier = ((s[:, None], now[:, :-1]) for s, now in ((state.reward_square, square), (state.count, count)))
            scale = _root_mean(*(torch.cat(x, 1) for x in earlier))
        return parts, scale, after

    def _output(self, decision: Tensor, world: Tensor, scale: Tensor, action: Tensor | None) -> Output:
        logits = self.policy_head(decision).unflatten(-1, (self.actions, self.policies))
        z, reward, done = self.observation_head(world), self.reward_head(world), self.done_head(world)
        if not self.layout.world_actions:
            return Output(logits, World(self.tokenizer.read(z), reward[..., 0], done[..., 0]), scale)
        z = z.unflatten(-1, (self.actions, -1))
        if action is not None:
            z = z.gather(2, action[..., None, None].expand(-1, -1, 1, z.shape[3]))[:, :, 0]
            reward, done = (x.gather(2, action[..., None])[..., 0] for x in (reward, done))
        return Output(logits, World(self.tokenizer.read(z), reward, done), scale)

    def save(self, path: Path | str, **facts: object) -> None:
        made = {"model": KIND, "config": asdict(self.config), "labels": self.labels, "tokenizer": self.own_tokenizer}
        checkpoint.save(path, self.state_dict(), {**made, **facts})

    @classmethod
    def load(cls, path: Path | str, device: torch.device | str = "cpu", tokenizer: Tokenizer | None = None) -> OmniRL:
        """A model from a checkpoint written by `save`, on a device. Raises ValueError where the file is not one."""
        return cls.loaded(path, *checkpoint.load(path), device, tokenizer)

    @classmethod
    def loaded(
        cls,
        path: Path | str,
        tensors: dict[str, Tensor],
        facts: dict[str, Any],
        device: torch.device | str,
        tokenizer: Tokenizer | None = None,
    ) -> OmniRL:
        if (kind := facts.get("model")) != KIND:
            other = "; load it by ValueIterationNetwork.load" if kind in value_iteration_network.KINDS else ""
            raise ValueError(f"checkpoint: {path} holds a {shown(kind)}, wanted {KIND!r}{other}")
        wanted, given = facts.get("tokenizer", ""), "" if tokenizer is None else type(tokenizer).__name__
        if wanted != given:
            raise ValueError(
                f"tokenizer: {path} was saved with {shown(wanted or 'none of its own')}, got {given or None}"
            )
        try:
            config = configured(OmniRLConfig, facts["config"], "config")
            with torch.device("cpu"):
                model = checkpoint.fitted(tensors, config.layers, lambda _: cls(config, tokenizer))
            model.labels = version_of(facts)
        except checkpoint.MALFORMED as e:
            raise ValueError(f"checkpoint: {path} does not fit its own configuration ({checkpoint.why(e)})") from e
        if not all(bool(t.isfinite().all()) for t in tensors.values()):
            raise ValueError(f"checkpoint: {path} holds weights that are not finite")
        return model.to(device).eval()
