"""What an agent is given: values that no step can bring are refused by name, and leave the agent as it was."""

import copy
import math

import numpy as np
import pytest
import torch

from icrl.omnirl import Agent, Temperature, ValueIterationNetwork, ValueIterationNetworkConfig
from icrl.omnirl.tokens import Tokens

B, S = 3, 8


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return ValueIterationNetwork(ValueIterationNetworkConfig(layers=2)).eval()


def seen():
    return torch.tensor([0, 3, 7])


def best(agent):
    """Runs the agent's model as before, and keeps its best actions."""
    inner = agent.run

    def run(tokens, prompt, state):
        logits = inner(tokens, prompt, state)
        agent.best = logits.argmax(-1)
        return logits

    agent.run = run
    return agent


@pytest.mark.parametrize("temperature", [0.0, 5e-324, 1e-45, 1e-30])
def test_no_temperature_takes_the_best_action(model, temperature):
    agent = best(Agent(model, 64, S, temperature=Temperature(temperature, temperature, 1)))
    for t in range(8):
        action = agent.act(torch.arange(64) % S)
        assert torch.equal(action, agent.best)
        agent.observe(torch.randn(64), torch.full((64,), int(t == 4)))


def test_temperature_falls_to_the_best_action(model):
    agent = best(Agent(model, 64, S, temperature=Temperature(5.0, 0.0, 3)))
    same = []
    for _ in range(6):
        same.append(bool((agent.act(torch.arange(64) % S) == agent.best).all()))
        agent.observe(torch.randn(64), torch.zeros(64))
    assert same == [False, False, False, True, True, True]


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ((-0.1, 0.1), "start"),
        ((0.5, -1e-9), "end"),
        ((math.nan, 0.1), "start"),
        ((0.5, math.inf), "end"),
        (("warm", 0.1), "start"),
        ((None, 0.1), "start"),
        ((True, 0.1), "start"),
        ((0.5, 0.1, -1), "steps"),
        ((0.5, 0.1, 2.5), "steps"),
    ],
)
def test_temperatures_are_judged(given, named):
    with pytest.raises(ValueError, match=f"^{named}: wanted"):
        Temperature(*given)


NAN, INF = math.nan, math.inf
REWARD, DONE = torch.zeros(B), torch.zeros(B, dtype=torch.int64)
WRONG = [
    ("reward", torch.tensor([0.0, NAN, 0.0]), DONE),
    ("reward", torch.tensor([0.0, 0.0, INF]), DONE),
    ("reward", torch.tensor([0.0, 1e300, 0.0], dtype=torch.float64), DONE),
    ("reward", torch.tensor([0.0, -3e19, 0.0]), DONE),  # its square is beyond float32
    ("reward", torch.zeros(B + 1), DONE),
    ("reward", torch.zeros(B, 1), DONE),
    ("reward", torch.zeros(()), DONE),
    ("reward", torch.zeros(B, dtype=torch.complex64), DONE),
    ("reward", np.zeros(B), DONE),
    ("reward", [0.0] * B, DONE),
    ("reward", None, DONE),
    ("reward", torch.zeros(B).to_sparse(), DONE),
    ("done", REWARD, torch.full((B,), 7)),
    ("done", REWARD, torch.tensor([0, 1, 3])),
    ("done", REWARD, torch.tensor([0, -1, 0])),
    ("done", REWARD, torch.tensor([0.0, 0.5, 0.0])),
    ("done", REWARD, torch.tensor([0.0, NAN, 0.0])),
    ("done", REWARD, torch.zeros(B - 1)),
    ("done", REWARD, False),
    ("done", REWARD, np.zeros(B, np.int64)),
]


def tensors(agent):
    return [*agent.state[2:], *agent.state.values, agent.state.transition, *agent._previous]


@pytest.mark.parametrize(("name", "reward", "done"), WRONG)
def test_outcomes_are_judged(model, name, reward, done):
    agent = Agent(model, B, S)
    agent.act(seen())
    before = [x.clone() for x in tensors(agent)]
    with pytest.raises(ValueError, match=f"^{name}: wanted"):
        agent.observe(reward, done)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors(agent), strict=True))
    agent.observe(REWARD, DONE)
    agent.act(seen())
    assert all(bool(x.isfinite().all()) for x in tensors(agent))


def test_outcomes_of_any_real_type(model):
    actions = []
    for reward, done in (
        (REWARD, DONE),
        (REWARD.double(), DONE.bool()),
        (DONE, DONE.to(torch.uint8)),
        (REWARD, REWARD),
    ):
        agent = Agent(model, B, S)
        agent.act(seen())
        agent.observe(reward, done)
        actions.append(agent.act(seen()).tolist())
    assert actions == actions[:1] * 4


@pytest.mark.parametrize("tag", [-1, 8, 1.5, None, True])
def test_tags_are_judged(model, tag):
    agent = Agent(model, B, S)
    agent.act(seen())
    with pytest.raises(ValueError, match=r"^tag: wanted"):
        agent.observe(REWARD, DONE, tag)


@pytest.mark.parametrize(
    "observation",
    [
        torch.tensor([0, 3, S]),
        torch.tensor([-1, 3, 0]),
        torch.zeros(B + 1, dtype=torch.int64),
        torch.zeros(B, 1, dtype=torch.int64),
        torch.zeros(B),
        torch.zeros(B, dtype=torch.bool),
        np.zeros(B, np.int64),
        [0] * B,
        0,
        None,
    ],
)
def test_observations_are_judged(model, observation):
    agent = Agent(model, B, S)
    before = [x.clone() for x in tensors(agent)]
    with pytest.raises(ValueError, match=r"^observation: wanted"):
        agent.act(observation)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors(agent), strict=True))


def test_an_outcome_needs_an_action(model):
    with pytest.raises(RuntimeError, match=r"^observe: .* call act first"):
        Agent(model, B, S).observe(REWARD, DONE)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prompt", 5),
        ("prompt", -1),
        ("prompt", 2.0),
        ("temperature", 0.5),
        ("temperature", (0.5, 0.1, 300)),
        ("seed", None),
        ("seed", 2**64),
        ("num_actions", 0),
        ("num_actions", 6),
        ("num_actions", 2.5),
        ("num_actions", torch.tensor([2, 3])),
        ("num_actions", torch.tensor([2, 3, 9])),
        ("num_actions", torch.tensor([2.0, 3.0, 4.0])),
    ],
)
def test_settings_are_judged(model, name, value):
    with pytest.raises(ValueError, match=f"^{name}: wanted"):
        Agent(model, B, S, **{name: value})


@pytest.mark.parametrize(
    ("mask", "wanted"),
    [
        (torch.tensor([[1, 0], [0, 0], [1, 1]], dtype=torch.bool), "none for task 1"),
        (torch.ones(B, 9, dtype=torch.bool), "at most 5 actions"),
        (torch.ones(B, 2), "of bool"),
        (torch.ones(B + 1, 2, dtype=torch.bool), "of bool"),
        ([[True]], "action_mask"),
    ],
)
def test_action_masks_are_judged(model, mask, wanted):
    agent, other = Agent(model, B, S), Agent(model, B, S)
    with pytest.raises(ValueError, match=rf"^action_mask: .*{wanted}|^{wanted}"):
        agent.act(seen(), mask)
    assert torch.equal(agent.act(seen()), other.act(seen()))
    assert all(
        torch.equal(x, y) for x, y in zip(tensors_of(agent.state), tensors_of(other.state), strict=True)
    )  # the refusal has changed nothing


def test_actions_are_of_the_mask(model):
    agent = Agent(model, 64, S, temperature=Temperature(100.0, 100.0, 1))
    mask = torch.rand(64, 5) < 0.4
    mask[torch.arange(64), torch.arange(64) % 5] = True
    for _ in range(10):
        action = agent.act(torch.arange(64) % S, mask)
        assert mask[torch.arange(64), action].all()
        agent.observe(torch.randn(64), torch.zeros(64))


def tensors_of(state):
    return [x for field in state for x in (field if isinstance(field, list) else [field])]


def trajectory(steps):
    g = torch.Generator().manual_seed(3)
    observation = torch.randint(S, (3, steps), generator=g)
    action = torch.randint(5, (3, steps), generator=g)
    done = (torch.rand(3, steps, generator=g) < 0.1).long()
    return observation, action, torch.randn(3, steps, generator=g), done


@pytest.mark.parametrize("steps", [1, 40, 600])
def test_what_is_read_is_as_if_it_had_been_done(model, steps):
    observation, action, reward, done = trajectory(steps)
    tokens = [torch.zeros(3, 1, dtype=torch.int64) for _ in range(2)] + [torch.zeros(3, 1)]
    tokens[1] += 5
    previous = [*tokens, torch.full((3, 1), 3), torch.full((3, 1), 7)]
    state = model.initial_state(3, S)
    for t in range(steps):
        model.step(Tokens(observation[:, t : t + 1], *previous), state)
        previous = [x[:, t : t + 1] for x in (observation, action, reward, done)] + [torch.full((3, 1), 3)]
    for fused in (True, False):
        agent = Agent(model, 3, S, seed=2, fused=fused, temperature=Temperature(0, 0, 1))
        agent.read(*(x[:, : steps // 2] for x in trajectory(steps)), tag=3) if steps > 1 else None
        agent.read(*(x[:, steps // 2 :] for x in trajectory(steps)), tag=3)
        for found, wanted in zip(
            [agent.state.transition, *agent.state.values], [state.transition, *state.values], strict=True
        ):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        here = seen()
        logits = model.decide(Tokens(here[:, None], *previous), agent.prompt, copy.deepcopy(state))
        assert torch.equal(agent.act(here), logits.argmax(-1))
        agent.observe(torch.zeros(3), torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint64, torch.bool])
def test_numbers_of_any_dtype_are_read(model, dtype):
    observation, action, reward, done = trajectory(5)
    reward = (reward > 0).to(dtype)
    integers = torch.int32 if dtype == torch.bool else dtype
    agents = [Agent(model, 3, S, seed=2) for _ in range(2)]
    agents[0].read(observation.to(integers), action.to(integers), reward, done.to(integers))
    agents[1].read(observation, action, reward.float(), done)
    assert torch.equal(agents[0].state.transition, agents[1].state.transition)


def test_what_cannot_be_read(model):
    agent = Agent(model, 3, S, seed=2)
    good = dict(zip(("observation", "action", "reward", "done"), trajectory(4), strict=True))
    wrong = {
        "observation": (good["observation"] + S, "wanted 0 to"),
        "action": (good["action"] + 5, "wanted 0 to 4"),
        "reward": (good["reward"] / 0, "wanted finite numbers"),
        "done": (good["done"] + 3, "wanted 0 to 2"),
    }
    for name, (value, what) in wrong.items():
        with pytest.raises(ValueError, match=f"{name}: {what}"):
            agent.read(**{**good, name: value})
        with pytest.raises(ValueError, match=f"{name}: wanted .3,T."):
            agent.read(**{**good, name: good[name][:, :0] if name == "observation" else good[name][:2]})
    with pytest.raises(ValueError, match="action: wanted integers"):
        agent.read(**{**good, "action": good["reward"]})
    with pytest.raises(ValueError, match="tag: wanted"):
        agent.read(**good, tag=8)
    assert not agent.state.transition.any()
    agent.act(seen())
    with pytest.raises(RuntimeError, match="read: there is an action"):
        agent.read(**good)
