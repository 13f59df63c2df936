"""The sequence model's step as one call: its weights packed into a program of fused ops (icrl_kernels.fused).

What is computed is what `OmniRL.decide` and the choice of an action compute, one step for every context, over the same state,
where observations are numbers: all that the embeddings make of observation, action, end and tag stands in tables. World-model
heads are left out.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from icrl.models.mixers import Recurrent, WindowedSoftmax, WindowState
from icrl.models.stack import Block
from icrl.models.step import add_stack
from icrl.models.tokenizers import DiscreteObservations
from icrl.omnirl.layouts import FusedTokens, InterleavedTokens
from icrl.omnirl.model import OmniRL, OmniRLState
from icrl.omnirl.step_inputs import step_inputs
from icrl.omnirl.tags import TAGS
from icrl_kernels import layers
from icrl_kernels.fused import Matrix, Program, Slot, Step, bind_state, require_plain


def why_not(model: object) -> str | None:
    """Why the program would not compute what this model does; None where it does."""
    if type(model) is not OmniRL:
        return f"the model is a {type(model).__name__}, not an OmniRL"
    if type(model.layout) not in (FusedTokens, InterleavedTokens):
        return f"its layout is a {type(model.layout).__name__}"
    if type(model.tokenizer) is not DiscreteObservations:
        return f"its observations are read by a {type(model.tokenizer).__name__}, not by number"
    for name, module in model.named_modules():
        if vars(module).keys() & {"forward", "decide", "step"}:
            return f"its module {name!r} is not the model's own"
    try:
        require_plain(model)
    except ValueError as error:
        return str(error)
    return None


class _Tables:
    """What tokens are the sums of, as tables of the embeddings' outputs, float64."""

    def __init__(self, model: OmniRL, prompt: int) -> None:
        assert isinstance(model.tokenizer, DiscreteObservations)
        self.codes, self.prompt = self.weight(model.tokenizer.codes), prompt

    @staticmethod
    def weight(table: nn.Module) -> Tensor:
        return table.weight.detach().double()  # type: ignore[union-attr, operator]

    def of(self, layer: nn.Linear) -> Tensor:
        """[S+1,...] of each observation's code, and of none."""
        y = self.codes @ self.weight(layer).t()
        return y if layer.bias is None else y + layer.bias.detach().double()

    def transitions(self, t: FusedTokens) -> Tensor:
        """[S+1,A+1,D] of the previous observation and action."""
        actions = self.weight(t.action)
        joint = nn.functional.pad(self.of(t.joint).unflatten(1, (len(actions), -1)), (t.begin, 0))
        return self.of(t.previous_observation)[:, None] + actions + joint

    def ends(self, done: nn.Module | None, tag: nn.Module | None, prompt: nn.Module | None) -> Tensor:
        """[4,T,D] of a step's end, its tag and the prompt, as far as they are there."""
        parts = [] if done is None else [self.weight(done)[:, None]]
        parts += [] if tag is None else [self.weight(tag)[None]]
        parts += [] if prompt is None else [self.weight(prompt)[self.prompt].expand(1, 1, -1)]
        return sum(parts[1:], parts[0]).expand(4, TAGS, -1)


def program(model: OmniRL, states: int, prompt: int) -> Program:
    """The step of contexts with `states` observations at most, acting by the prompt's policy; what is given with each call is
    said in icrl.omnirl.step_inputs."""
    c, p, t = model.config, Program(), model.layout
    A, D, S = c.actions, c.width, c.states
    if states > S:
        raise ValueError(f"states: wanted at most the model's {S} observations, got {states}")
    square, count = p.tensor("reward_square"), p.tensor("count")
    inputs = step_inputs(p, A, states)
    observation, reward, done, tag = inputs.observation, inputs.reward, inputs.done, inputs.tag
    previous, action = inputs.previous, inputs.action

    features = p.rows(4)
    p.op("reward_features", out=features, tensors=[reward, done, square, count])
    p.sources += [(module, name) for part in (t, model.tokenizer) for module in part.modules() for name in _own(module)]
    y = x = p.rows(D)

    def row(kind: str, table: Tensor, tensors: list[Slot], sizes: list[int]) -> None:
        p.op(kind, out=x, tensors=tensors, weights=[p.weights(nn.functional.pad(table, (0, -D % 16)))], sizes=sizes)

    parts = _Tables(model, prompt)
    if isinstance(t, FusedTokens):
        row("table_row", parts.of(t.observation)[:S], [observation], [S, 0])
        row("transition_row", parts.transitions(t), [previous, action, done], [S, A + 1])
        row("end_row", parts.ends(t.done, t.tag, t.prompt), [done, tag], [TAGS, 1])
        p.linear_into(x, features, t.reward, add=True)
        y = add_stack(p, model.stack, x, "layer")
    else:
        assert isinstance(t, InterleavedTokens)
        for letter in t.letters:  # the decision is read at the last
            if letter == "o":
                row("table_row", parts.of(t.observation)[:S], [observation], [S, 0])
            elif letter == "a":
                row("table_row", parts.weight(t.action), [action], [A + 1, 0])
            else:
                tables = {"r": (t.done, None, None), "t": (None, t.tag, None), "p": (None, None, t.prompt)}[letter]
                row("end_row", parts.ends(*tables), [done, tag], [TAGS, 0])
            if letter == "r":
                p.linear_into(x, features, t.reward, add=True)
            y = add_stack(p, model.stack, x, "layer")
    chooses = model.policy_head
    if model.policies > 1:
        weight, bias = (of.detach()[prompt :: model.policies].double() for of in (chooses.weight, chooses.bias))
        chooses = Matrix(weight, bias, [(model.policy_head, "weight"), (model.policy_head, "bias")])
    (out,) = p.linear(y, [chooses], norm=model.stack.norm)
    p.op("choose_action", input=out, tensors=inputs.choice())
    return p


def _own(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_parameters(recurse=False)]


class SequenceStep:
    """The step of a batch of contexts, bound to their state, which every call changes in place.

    `run` is one step: see the value-iteration network's `program` for what it is given. Weights are copies: see `stale`. Raises ValueError where the state is not what the model's `initial_state` gives, or where the
    program cannot be made.
    """

    def __init__(
        self, model: OmniRL, state: OmniRLState, batch: int, observed: int, prompt: int, num_actions: Tensor | int
    ) -> None:
        if not isinstance(state, OmniRLState) or len(state.layers) != len(model.stack.blocks):
            raise ValueError(f"state: wanted an OmniRLState of {len(model.stack.blocks)} layers, got another")
        self.prompt, self.own = prompt, num_actions
        self.state = state
        self._changed = [t for t in self._tensors() if not t.is_inference()]
        self._layout = self._addresses()
        self.step: Step = program(model, observed, prompt).step(batch, group=32)
        own = torch.as_tensor(num_actions, dtype=torch.int64, device="cpu").expand(batch).contiguous()
        self.step.bind(num_actions=own, reward_square=state.reward_square, count=state.count)
        for i, (block, layer) in enumerate(zip(model.stack.blocks, state.layers, strict=True)):
            assert isinstance(block, Block)
            if isinstance(block.mixer, WindowedSoftmax):
                if not isinstance(layer, WindowState):
                    raise ValueError(f"state.layers[{i}]: wanted a WindowState, got {type(layer).__name__}")
                self.step.bind(**{f"layer{i}.{name}": tensor for name, tensor in layer._asdict().items()})
            else:
                assert isinstance(block.mixer, Recurrent)
                if not isinstance(layer, layers.State):
                    raise ValueError(f"state.layers[{i}]: wanted a State, got {type(layer).__name__}")
                bind_state(self.step, f"layer{i}", layer)
        self.run = self.step.program.run

    def _tensors(self) -> list[Tensor]:
        found: list[Tensor] = []
        for part in (self.state.reward_square, self.state.count, *self.state.layers):
            for tensor in (part,) if isinstance(part, Tensor) else part:
                found += (tensor,) if isinstance(tensor, Tensor) else tensor
        return found

    def _addresses(self) -> list[int]:
        return [t.data_ptr() for t in self._tensors()]

    def told(self) -> None:
        """Let autograd know that the state has changed, as an operator that changes it would."""
        increment_version(self._changed)

    @property
    def stale(self) -> bool:
        """Whether a weight has changed since it was copied, or a tensor of the state is another."""
        return self.step.stale or self._addresses() != self._layout
