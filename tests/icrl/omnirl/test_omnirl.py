"""The model: one answer in parallel, by steps and by segments; causal; blind to the names of observations and actions."""

import pytest
import torch

from icrl.omnirl.agent import Agent, Temperature
from icrl.omnirl.tags import START, TAGS, UNKNOWN
from icrl.omnirl.tokens import Tokens
from icrl.omnirl.value_iteration_network import ValueIterationNetwork, ValueIterationNetworkConfig

SMALL = ValueIterationNetworkConfig(
    layers=2, action_width=16, state_width=24, value_width=8, action_hidden=16, state_hidden=24, pool_heads=2
)
B, T, S = 3, 50, 7


@pytest.fixture
def model():
    torch.manual_seed(1)
    m = ValueIterationNetwork(SMALL)
    with torch.no_grad():  # away from the initialisation, where heads are nearly zero
        for p in m.parameters():
            p += 0.1 * torch.randn_like(p)
    return m


def make_tokens(length=T, batch=B, states=S):
    g = torch.Generator().manual_seed(2)
    draw = lambda high: torch.randint(0, high, (batch, length), generator=g)  # noqa: E731
    done = draw(3)
    done[:, 0] = START
    return Tokens(draw(states), draw(states), draw(5), torch.randn(batch, length, generator=g), done, draw(TAGS))


def part(tokens, begin, end):
    return Tokens(*(x[:, begin:end] for x in tokens))


def outputs(model, tokens, state):
    out, state = model(tokens, state)
    last = out.readouts[-1]
    return torch.cat([last.logits, last.q], -1), state


def test_steps_and_segments_agree_with_parallel(model):
    tokens = make_tokens()
    whole, _ = outputs(model, tokens, model.initial_state(B, S))
    state, pieces = model.initial_state(B, S), []
    for begin, end in ((0, 1), (1, 18), (18, 18), (18, T)):
        if begin == end:
            continue
        piece, state = outputs(model, part(tokens, begin, end), state.detach())
        pieces.append(piece)
    scale = whole.abs().max()
    assert (torch.cat(pieces, 1) - whole).abs().max() < 1e-4 * scale
    state, steps = model.initial_state(B, S), []
    with torch.no_grad():
        for t in range(T):
            step, state = outputs(model, part(tokens, t, t + 1), state)
            steps.append(step)
    assert (torch.cat(steps, 1) - whole).abs().max() < 1e-4 * scale


def flat(state):
    return [state.transition, *state.values, *state[2:]]


@pytest.mark.parametrize("length", [1, 2])
@pytest.mark.parametrize("gradients", [False, True])
def test_forward_leaves_the_given_state_as_it_is(model, length, gradients):
    with torch.set_grad_enabled(gradients):
        _, state = model(make_tokens(5), model.initial_state(B, S))
        before = [x.clone() for x in flat(state)]
        first, new = outputs(model, make_tokens(length), state)
        again, _ = outputs(model, make_tokens(length), state)
    assert all(torch.equal(a, b) for a, b in zip(before, flat(state), strict=True))
    assert torch.equal(first, again)
    assert (new.count == state.count + length).all()


def test_step_changes_the_given_state_as_a_whole(model):
    with torch.no_grad():
        _, state = model(make_tokens(5), model.initial_state(B, S))
        wanted_output, wanted = outputs(model, make_tokens(1), state)
        output, new = model.step(make_tokens(1), state)
    assert new is state
    for a, b in zip(flat(wanted), flat(state), strict=True):
        assert (a - b).abs().max() < 1e-5 * (1 + a.abs().max())
    got = torch.cat([output.readouts[-1].logits, output.readouts[-1].q], -1)
    assert (got - wanted_output).abs().max() < 1e-4 * wanted_output.abs().max()
    with pytest.raises(ValueError, match="one a sequence"):
        model.step(make_tokens(2), state)


def test_a_later_token_changes_no_earlier_output(model):
    tokens = make_tokens()
    before, _ = outputs(model, tokens, model.initial_state(B, S))
    changed = Tokens(*(x.clone() for x in tokens))
    changed.observation[:, 30:] = (changed.observation[:, 30:] + 1) % S
    changed.previous_reward[:, 30:] += 5.0
    after, _ = outputs(model, changed, model.initial_state(B, S))
    assert torch.equal(before[:, :30], after[:, :30])
    assert not torch.allclose(before[:, 30:], after[:, 30:])


def test_renaming_observations_changes_nothing_and_actions_are_permuted(model):
    tokens = make_tokens()
    before, _ = outputs(model, tokens, model.initial_state(B, S))
    names, actions = torch.tensor([3, 0, 6, 1, 5, 2, 4]), torch.tensor([2, 0, 4, 1, 3])
    renamed = tokens._replace(
        observation=names[tokens.observation],
        previous_observation=names[tokens.previous_observation],
        previous_action=actions[tokens.previous_action],
    )
    after, _ = outputs(model, renamed, model.initial_state(B, S))
    assert (after[:, :, actions] - before).abs().max() < 1e-4 * before.abs().max()


def test_capacity_for_more_states_changes_nothing(model):
    tokens = make_tokens()
    before, _ = outputs(model, tokens, model.initial_state(B, S))
    after, _ = outputs(model, tokens, model.initial_state(B, S + 5))
    assert (after - before).abs().max() < 1e-4 * before.abs().max()


def test_every_parameter_gets_a_gradient(model):
    out, _ = model(make_tokens(), model.initial_state(B, S))
    sum((r.logits.square().sum() + r.q.square().sum()) for r in out.readouts).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().sum() > 0, name


def test_state_is_constant_in_size(model):
    state = model.initial_state(B, S)
    sizes = [x.shape for x in (state.transition, *state.values, state.count)]
    with torch.no_grad():
        _, state = model(make_tokens(), state)
    assert [x.shape for x in (state.transition, *state.values, state.count)] == sizes


def test_agent_is_seeded_and_wraps_actions(model):
    def run(seed):
        agent = Agent(model, B, S, seed=seed, temperature=Temperature(1.0, 1.0, 1), num_actions=3)
        actions = []
        for t in range(20):
            a = agent.act(torch.full((B,), t % S))
            agent.observe(a.float(), torch.zeros(B))
            actions.append(a)
        return torch.stack(actions)

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))
    assert int(run(0).max()) < 3


def test_agent_refuses(model):
    with pytest.raises(ValueError, match="prompt"):
        Agent(model, B, S, prompt=99)
    with pytest.raises(ValueError, match="num_actions"):
        Agent(model, B, S, num_actions=6)


def test_checkpoint_round_trip_and_damage(model, tmp_path):
    path = tmp_path / "m.safetensors"
    model.save(path, seed=3)
    again = ValueIterationNetwork.load(path)
    assert again.config == model.config
    tokens = make_tokens()
    with torch.no_grad():
        a, _ = outputs(model, tokens, model.initial_state(B, S))
        b, _ = outputs(again, tokens, again.initial_state(B, S))
    assert torch.equal(a, b)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="damaged"):
        ValueIterationNetwork.load(path)
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="damaged"):
        ValueIterationNetwork.load(path)
    flipped = bytearray(whole)
    flipped[-5] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(ValueError, match="damaged"):
        ValueIterationNetwork.load(path)
    with torch.no_grad():
        model.bonus[0] = float("nan")
    model.save(path)
    with pytest.raises(ValueError, match="not finite"):
        ValueIterationNetwork.load(path)
    with pytest.raises(ValueError, match="no file"):
        ValueIterationNetwork.load(tmp_path / "absent.safetensors")


def test_unknown_tag_constant():
    assert UNKNOWN == TAGS - 1
