"""What the agents of every method are given: values that no step can bring are refused by name, and change nothing."""

import math

import numpy as np
import pytest
import torch
from test_rivals import ROOM, make

from icrl.offline.learner import METHODS
from icrl.offline.method import Episode, Spaces

B = 3
NAMES = [name for name in METHODS if name != "sicql"]


@pytest.fixture(scope="module", params=NAMES)
def method(request):
    return make(request.param, ROOM.train_data()).eval()


def outcome(**changes):
    given = {"state": torch.zeros(B, 2), "action": torch.zeros(B, dtype=torch.int64)}
    return {**given, "reward": torch.zeros(B), "next_state": torch.ones(B, 2), **changes}


WRONG = [
    ("reward", torch.tensor([0.0, math.nan, 0.0])),
    ("reward", torch.tensor([0.0, math.inf, 0.0])),
    ("reward", torch.zeros(B + 1)),
    ("reward", torch.zeros(B, 1)),
    ("reward", torch.zeros(B).double()),
    ("reward", np.zeros(B, np.float32)),
    ("reward", 0.0),
    ("action", torch.full((B,), 5)),
    ("action", torch.full((B,), -1)),
    ("action", torch.zeros(B)),
    ("action", torch.zeros(B, 2, dtype=torch.int64)),
    ("state", torch.zeros(B, 3)),
    ("state", torch.full((B, 2), math.nan)),
    ("next_state", torch.zeros(2)),
    ("next_state", torch.full((B, 2), -math.inf)),
    ("next_state", None),
]


def test_outcomes_are_judged(method):
    agent = method.agent(B)
    agent.begin()
    agent.act(torch.zeros(B, 2))
    for name, value in WRONG:
        with pytest.raises(ValueError, match=rf"^{name}: wanted"):
            agent.observe(**outcome(**{name: value}))
    assert not agent.episode.steps
    agent.observe(**outcome())
    assert len(agent.episode.steps) == 1


@pytest.mark.parametrize(
    "state", [torch.zeros(B), torch.zeros(B + 1, 2), torch.zeros(B, 2).double(), np.zeros((B, 2), np.float32), None]
)
def test_states_are_judged(method, state):
    agent = method.agent(B)
    agent.begin()
    with pytest.raises(ValueError, match=r"^state: wanted"):
        agent.act(state)


def test_the_order_is_kept(method):
    agent = method.agent(B)
    with pytest.raises(RuntimeError, match=r"^act: no episode has begun, call begin first$"):
        agent.act(torch.zeros(B, 2))
    with pytest.raises(RuntimeError, match=r"^observe: .* call act first$"):
        agent.observe(**outcome())
    agent.begin()
    with pytest.raises(RuntimeError, match=r"^observe: .* call act first$"):
        agent.observe(**outcome())
    agent.act(torch.zeros(B, 2))
    agent.observe(**outcome())
    with pytest.raises(RuntimeError, match=r"^observe: .* call act first$"):
        agent.observe(**outcome())


@pytest.mark.parametrize("batch", [0, -1, 2.0, None, True])
def test_batches_are_judged(method, batch):
    with pytest.raises(ValueError, match=r"^batch: wanted"):
        method.agent(batch)


def test_actions_that_are_vectors():
    episode = Episode(B, Spaces("a", 2, 0, 2))
    episode.see(torch.zeros(B, 2))
    for action in (torch.zeros(B), torch.zeros(B, 3), torch.full((B, 2), math.nan), torch.zeros(B, 2).long()):
        with pytest.raises(ValueError, match=r"^action: wanted"):
            episode.add(**outcome(action=action))
    episode.add(**outcome(action=torch.zeros(B, 2)))
    assert len(episode.steps) == 1
