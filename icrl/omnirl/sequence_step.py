"""The sequence model's step as one call: its weights packed into a program of fused ops (icrl_kernels.fused).

What is computed is what `OmniRL.decide` and the choice of an action compute, one token for every context, over the same state:
the layout "fused" with numbered observations, of which all that the embeddings make of observation, action, end and tag stands
in tables. World-model heads are left out.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from icrl.models.mixers import Recurrent, WindowedSoftmax, WindowState
from icrl.models.stack import Block
from icrl.models.step import add_stack
from icrl.models.tokenizers import DiscreteObservations
from icrl.omnirl.layouts import FusedTokens
from icrl.omnirl.model import OmniRL, OmniRLState
from icrl.omnirl.tags import TAGS
from icrl_kernels import layers
from icrl_kernels.fused import Matrix, Program, Step, bind_state, require_plain


def why_not(model: object) -> str | None:
    """Why the program would not compute what this model does; None where it does."""
    if type(model) is not OmniRL:
        return f"the model is a {type(model).__name__}, not an OmniRL"
    if type(model.layout) is not FusedTokens:
        return f"its layout is {model.config.layout!r}, not 'fused'"
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


def _tables(model: OmniRL, prompt: int) -> tuple[Tensor, Tensor, Tensor]:
    """What a token is the sum of, float64: [S,D] by observation, [S+1,A+1,D] by the previous one (S: none) and action, and
    [4,T,D] by end and tag, with the prompt in it."""
    t, tokenizer = model.layout, model.tokenizer
    assert isinstance(t, FusedTokens)
    assert isinstance(tokenizer, DiscreteObservations)
    codes, actions = tokenizer.codes.weight.detach().double(), t.action.weight.detach().double()

    def of(layer: nn.Linear) -> Tensor:
        y = codes @ layer.weight.detach().double().t()
        return y if layer.bias is None else y + layer.bias.detach().double()

    joint = nn.functional.pad(of(t.joint).unflatten(1, (len(actions), -1)), (t.begin, 0))
    ends = t.done.weight.detach().double()[:, None] + t.tag.weight.detach().double()
    if t.prompt is not None:
        ends = ends + t.prompt.weight.detach().double()[prompt]
    return of(t.observation)[: tokenizer.states], of(t.previous_observation)[:, None] + actions + joint, ends


def program(model: OmniRL, states: int, prompt: int) -> Program:
    """The step of contexts with up to `states` observations, acting by the prompt's policy; what is given with each call is
    what the value-iteration network's program is given."""
    c, p, t = model.config, Program(), model.layout
    A, D, S = c.actions, c.width, c.states
    if states > S:
        raise ValueError(f"states: wanted at most the model's {S} observations, got {states}")
    square, count = p.tensor("reward_square"), p.tensor("count")
    own = p.tensor("num_actions", dtype=torch.int64)
    given = partial(p.tensor, each_call=True)
    observation = given("observation", dtype=torch.int64, below=states)
    reward, done, tag = given("reward"), given("done", dtype=torch.uint8), given("tag", shared=True)
    noise, temperature = given("noise", A), given("temperature", shared=True)
    mask = given("mask", A, dtype=torch.bool, optional=True)
    task_action, logits = given("task_action", dtype=torch.int64), given("logits", A, optional=True)
    previous = given("previous", dtype=torch.int64, below=states)
    action = given("action", dtype=torch.int64, below=A + 1)
    kept, chosen = given("kept", dtype=torch.int64), given("chosen", dtype=torch.int64)

    x, features = p.rows(D), p.rows(4)
    tables = [nn.functional.pad(table, (0, -D % 16)) for table in _tables(model, prompt)]
    p.op(
        "step_rows",
        out=x,
        tensors=[observation, previous, action, done, tag],
        weights=[p.weights(table) for table in tables],
        sizes=[S, A + 1, TAGS],
    )
    p.sources += [(module, name) for part in (t, model.tokenizer) for module in part.modules() for name in _own(module)]
    p.op("reward_features", out=features, tensors=[reward, done, square, count])
    p.linear_into(x, features, t.reward, add=True)  # type: ignore[arg-type]
    y = add_stack(p, model.stack, x, "layer")
    chooses = model.policy_head
    if model.policies > 1:
        weight, bias = (of.detach()[prompt :: model.policies].double() for of in (chooses.weight, chooses.bias))
        chooses = Matrix(weight, bias, [(model.policy_head, "weight"), (model.policy_head, "bias")])
    (out,) = p.linear(y, [chooses], norm=model.stack.norm)
    choice = [noise, temperature, mask, own, observation, chosen, task_action, kept, logits]
    p.op("choose_action", input=out, tensors=choice)
    return p


def _own(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_parameters(recurse=False)]


class SequenceStep:
    """The step of a batch of contexts, bound to their state, which every call changes in place.

    Weights are copies: see `stale`. Raises ValueError where the state is not what the model's `initial_state` gives, or where the
    program cannot be made.
    """

    def __init__(self, model: OmniRL, state: OmniRLState, prompt: int, num_actions: Tensor, states: int) -> None:
        self.state = state
        self._layout = self._addresses()
        self.step: Step = program(model, states, prompt).step(len(state.count), group=16)
        self.step.bind(num_actions=num_actions, reward_square=state.reward_square, count=state.count)
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

    def _addresses(self) -> list[int]:
        found: list[int] = []
        for part in (self.state.reward_square, self.state.count, *self.state.layers):
            for tensor in (part,) if isinstance(part, Tensor) else part:
                found += [t.data_ptr() for t in ((tensor,) if isinstance(tensor, Tensor) else tensor)]
        return found

    @property
    def stale(self) -> bool:
        """Whether a weight has changed since it was copied, or a tensor of the state is another."""
        return self.step.stale or self._addresses() != self._layout
