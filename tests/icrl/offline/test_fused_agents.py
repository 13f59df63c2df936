"""Offline agents whose trunk steps by one call of C++ do what they do by the module."""

import pytest
import torch
from test_rivals import ROOM, make

from icrl.models.mixers import MIXERS
from icrl.offline import history, prompt

B = 3


def acted(method, episodes=5, steps=12):
    """The features, or actions, of an agent over episodes whose steps do not depend on it."""
    g = torch.Generator().manual_seed(3)
    agent, seen, used = method.agent(B), [], []
    inner = method.pi.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    for _ in range(episodes):
        agent.begin()
        used.append(agent.step is not None)
        for _ in range(steps):
            state = torch.randint(4, (B, 2), generator=g).float()
            agent.act(state)
            action, reward = torch.randint(5, (B,), generator=g), torch.rand(B, generator=g)
            agent.observe(state, action, reward, torch.randint(4, (B, 2), generator=g).float())
    inner.remove()
    return torch.stack(seen), all(used), agent


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize(("name", "module"), [("ad", history), ("ic_iql", history), ("dpt", prompt), ("dit", prompt)])
def test_features(name, module, mixer, monkeypatch):
    method = make(name, ROOM.train_data(), mixer).eval()
    found, used, agent = acted(method)
    assert used
    monkeypatch.setattr(module, "trunk_step", lambda *_, **__: None)
    plain, used, _ = acted(method)
    assert not used
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)
    # weights that have changed are copied when the next episode begins, after what the context holds
    with torch.no_grad():
        method.trunk.embed_state.weight.mul_(1.5)
    monkeypatch.undo()
    before = agent.step
    agent.begin()
    assert agent.step is not before


def test_one_that_looks_at_the_memory_keeps_the_module():
    agent = make("dicp", ROOM.train_data()).eval().agent(B)
    agent.begin()
    assert agent.step is None
    agent.act(torch.zeros(B, 2))
    assert agent.memory.length == 1
