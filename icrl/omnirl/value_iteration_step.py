"""The value-iteration network's step as one call: its weights packed into a program of fused ops (icrl_kernels.fused).

What is computed is what `ValueIterationNetwork.decide` and the choice of an action compute, one token for every context, over
the same state. Only what acting reads is: the logits of one policy in the last readout, and the values that memories store.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from icrl.omnirl.step_inputs import step_inputs
from icrl.omnirl.tags import TAGS
from icrl.omnirl.value_iteration_network import Block, State, ValueIterationNetwork
from icrl_kernels import layers
from icrl_kernels.fused import Program, Rows, Step, hooked

EPS = 1e-5  # of the norms


def why_not(model: object) -> str | None:
    """Why the program would not compute what this model does; None where it does."""
    if type(model) is not ValueIterationNetwork:
        return f"the model is a {type(model).__name__}, not a ValueIterationNetwork"
    kinds = (ValueIterationNetwork, Block, layers.Linear, nn.ModuleList)
    for name, module in model.named_modules():
        if type(module) not in kinds or vars(module).keys() & {"forward", "decide", "step"}:
            return f"its module {name!r} is not the network's own"
    if hooked(model):
        return "it has hooks"
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device.type != "cpu" or tensor.dtype != torch.float32 or type(tensor) not in (Tensor, nn.Parameter):
            return f"its {name} is not a float32 tensor on the CPU"
        if tensor.is_inference():
            return f"its {name} was made in inference mode, so that no change of it is seen"
    return None


def program(model: ValueIterationNetwork, states: int, memories: int, prompt: int, observed: int) -> Program:
    """The step of contexts with room for `states` observations, of which `observed` may come, and so many value memories,
    acting by the prompt's policy.

    What is given with each call is said in icrl.omnirl.step_inputs.
    """
    c, p = model.config, Program()
    A, G, D, S = c.actions, c.policies, c.value_width, states
    width, seen_width = 1 + D + G, 3 + TAGS + S
    numbers = {name: p.tensor(name) for name in ("sum", "deviation", "square", "largest", "count")}
    memory = p.tensor("transition", A, S, seen_width)
    stored = [p.tensor(f"values{i}", S, width) for i in range(memories)]
    inputs = step_inputs(p, A, observed)
    observation, reward, done, tag = inputs.observation, inputs.reward, inputs.done, inputs.tag
    previous, action = inputs.previous, inputs.action

    rewards, seen = p.rows(5), p.rows(seen_width, A)
    p.op("reward_statistics", out=rewards, tensors=[reward, *numbers.values()])
    tokens = [memory, observation, previous, action, reward, done, tag]
    p.op("transition_memory", out=seen, tensors=tokens, sizes=[TAGS])
    described, context, found = p.rows(12 + TAGS + 4, A), p.rows(7), p.rows(1 + S * (1 + A))
    features, facts = described.part(0, 12 + TAGS), described.part(12 + TAGS, 4)
    p.op("action_features", input=seen, side=rewards, out=described, tensors=[observation], sizes=[TAGS])
    p.op("context_features", input=rewards, out=context, tensors=[done])
    p.op("successors", input=seen, out=found, sizes=[TAGS])
    z, x = p.rows(c.action_width, A), p.rows(c.state_width)
    p.linear_into(z, features, model.action_features)
    p.linear_into(x, context, model.state_features)
    discounts, bonus = p.weights(model.discounts, (model, "discounts")), p.weights(model.bonus, (model, "bonus"))
    decays = [_rate(model, i) for i in range(c.own_layers)]
    p.sources.append((model, "write_rate"))
    backup = known = None
    first = z, x
    for i in range(memories + 1):
        layer = 0 if c.tied else i  # whose memory is next
        at = min(i, 1) if c.tied else i  # of this block
        heads = [] if i == memories else [model.write[layer], model.q_state_heads[at]]
        if known is not None and c.tied:  # every layer begins with the first block's streams
            z, x = p.rows(c.action_width, A), p.rows(c.state_width)
            p.op("copy", input=first[0], out=z)
            p.op("copy", input=first[1], out=x)
            p.linear_into(z, known, model.read[0], add=True)  # type: ignore[arg-type]
        more = _block(p, model.blocks[at], z, x, heads)  # type: ignore[arg-type]
        zn = p.rms_norm(z, EPS)
        if i == memories:
            (out,) = p.linear(zn, [model.policy_heads[at]])  # type: ignore[list-item]
            p.op("choose_action", input=out.part(prompt, 1), tensors=inputs.choice())
            return p
        written, q_state = more
        value, read = p.rows(width), p.rows(width, A)
        if i == 0:
            p.op("state_value", out=value, side=written, more=[rewards])
        else:
            (q,) = p.linear(zn, [model.q_heads[at]])  # type: ignore[list-item]
            assert backup is not None
            fading = [facts] if c.fading else []
            p.op("state_value", input=q, out=value, side=written, more=[rewards, backup, q_state, *fading])
        p.op("value_memory", input=value, side=found, out=read, tensors=[stored[i], observation], numbers=decays[layer])
        known = p.rows(D + 4 * G + 1, A)
        p.op("bellman_backup", input=read, side=rewards, out=known, more=[facts], weights=[discounts, bonus])
        backup = known.part(D, G)
        if not c.tied:
            p.linear_into(z, known, model.read[layer], add=True)  # type: ignore[arg-type]
    raise AssertionError("the last block returns")


def _rate(model: ValueIterationNetwork, layer: int) -> tuple[float, float]:
    """How much of a new value a memory takes, and of the old one it keeps."""
    rate = torch.sigmoid(model.write_rate[layer].detach()).clamp(max=0.8)
    return float(rate), float(torch.log1p(-rate).exp())


def _block(p: Program, block: Block, z: Rows, x: Rows, heads: list[nn.Module]) -> list[Rows]:
    """A block's changes of the streams, and outputs of layers that read the state's stream after it."""
    score, y, hidden = p.linear(p.rms_norm(z, EPS), [block.score, block.value, block.action_in])
    pooled = p.rows(y.width)
    p.op("pool", input=y, out=pooled, more=[score], numbers=[2.0])
    p.linear_into(x, pooled, block.pool_out, add=True)
    (h,) = p.linear(p.rms_norm(x, EPS), [block.state_in])
    p.linear_into(x, p.gated(h), block.state_out, add=True)
    side, *more = p.linear(p.rms_norm(x, EPS), [block.action_state_in, *heads])  # type: ignore[list-item]
    p.linear_into(z, p.gated(hidden, side), block.action_out, add=True)
    return more


class ValueIterationStep:
    """The step of a batch of contexts, bound to their state, which every call changes in place.

    `run` is one token: see `program` for what it is given. Weights are copies: see `stale`. Raises ValueError where the state is not what the network's `initial_state` gives, or where
    the program cannot be made.
    """

    def __init__(
        self,
        model: ValueIterationNetwork,
        state: State,
        batch: int,
        observed: int,
        prompt: int,
        num_actions: Tensor | int,
    ) -> None:
        c = model.config
        if not isinstance(state, State) or not (c.tied or len(state.values) == c.layers):
            raise ValueError(f"state: wanted a State with the value memories of {c.layers} layers, got another")
        self.prompt, self.own = prompt, num_actions
        self.state = state
        self._changed = [t for t in (state.transition, *state.values, *state[2:]) if not t.is_inference()]
        self._layout = self._addresses()
        self.step: Step = program(model, state.transition.shape[2], len(state.values), prompt, observed).step(batch)
        names = ("sum", "deviation", "square", "largest", "count")
        own = torch.as_tensor(num_actions, dtype=torch.int64, device="cpu").expand(batch).contiguous()
        self.step.bind(transition=state.transition, num_actions=own)
        self.step.bind(**dict(zip(names, state[2:], strict=True)))
        self.step.bind(**{f"values{i}": memory[:, 0] for i, memory in enumerate(state.values)})
        self.run = self.step.program.run

    def _addresses(self) -> list[int]:
        return [t.data_ptr() for t in (self.state.transition, *self.state.values, *self.state[2:])]

    def told(self) -> None:
        """Let autograd know that the state has changed, as an operator that changes it would."""
        increment_version(self._changed)

    @property
    def stale(self) -> bool:
        """Whether a weight has changed since it was copied, or a tensor of the state is another."""
        return self.step.stale or self._addresses() != self._layout
