"""On another device than the CPU: every method, the world model and their agents make no tensor anywhere else."""

from copy import copy

import pytest
import torch
from devices import ExplicitDevices, faked
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from icrl.models.trunk import TrunkConfig
from icrl.offline.environments.darkroom import DarkRoomData
from icrl.offline.environments.point_robot import PointRobotData
from icrl.offline.few_shot import few_shot
from icrl.offline.learner import METHODS, OfflineLearner, make_method
from icrl.offline.method import Spaces
from icrl.offline.methods.sicql import SICQL
from icrl.offline.trajectories import STEPS
from icrl.offline.world_model import WorldModel, WorldModelConfig, WorldModelLearner
from icrl.training.config import LoopConfig
from icrl_kernels.layers import TokenMixer

SOURCES = {
    "discrete": DarkRoomData(size=4, horizon=12, train_goals=12, episodes=6, history=6),
    "vectors": PointRobotData(horizon=12, tasks=10, episodes=6, history=6),
}


@pytest.fixture(scope="module", params=SOURCES)
def data(request):
    return SOURCES[request.param].train_data()


def make(name, data, mixer="softmax", **changes):
    settings = {"trunk": TrunkConfig(width=16, layers=2, heads=2, mixer=mixer), "horizon": 12, "batch": 4}
    settings |= {"idt": {"span": 4}, "sicql": {"stride": 2}}.get(name, {}) | changes
    world_model = WorldModel.of(WorldModelConfig(size=4, hidden=8), data) if name == "sicql" else None
    torch.manual_seed(1)
    return make_method(name, METHODS[name].config_class(**settings), Spaces.of(data), world_model)


def layouts(name):
    return [{"layout": "query_first"}, {"layout": "branch"}] if name in ("sicql", "dpt", "dit") else [{}]


CASES = [(n, m, c) for n in METHODS for m in ("softmax", "gla") for c in layouts(n) if (m, c.get("layout")) != ("gla", "query_first")]  # fmt: skip


@pytest.fixture
def device(monkeypatch):
    """A device on which tensors have no values and cannot be mixed with others. (A torch without CUDA indexes no CUDA
    tensors, not even these.) What code makes there itself counts as made there."""
    monkeypatch.setattr(TokenMixer, "_check_dtype", lambda *_: None)  # asks for autocast, which this device has not
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield torch.device("meta")


def on(device, value):
    """The same tensors without values, on a device of `fake_device`."""

    def empty(t):
        return torch.zeros(t.shape, dtype=t.dtype, device=device) if isinstance(t, torch.Tensor) else t

    return tree_map(empty, value)


def moved(data, device):
    other = copy(data)
    for name in STEPS:
        if (t := getattr(data, name)) is not None:
            setattr(other, name, on(device, t))
    return other


@pytest.mark.parametrize(("name", "mixer", "changes"), CASES, ids=str)
def test_a_loss_stays_on_its_device_and_so_does_its_gradient(name, mixer, changes, data, request):
    method = make(name, data, mixer, **changes)
    method.prepare(data)
    batch = method.draw(data)
    prepared = {k: v for k in ("_prompts", "_returns") if (v := getattr(method, k, None)) is not None}
    device = request.getfixturevalue("device")
    method = faked(method, device)
    for attribute, value in prepared.items():
        setattr(method, attribute, on(device, value))
    loss, metrics = method.objective(moved(data, device), on(device, batch))
    assert {x.device for x in (loss, *metrics.values())} == {device}
    loss.backward()
    missing = [n for n, p in method.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing


@pytest.mark.parametrize("encoder", ["gru", "softmax", "gla"])
def test_a_world_models_loss_and_prompts_stay_on_their_device(encoder, data, request):
    config = WorldModelConfig(size=4, hidden=8, encoder=encoder, others=2)
    learner = WorldModelLearner(config, data, 6, LoopConfig(), {})
    batch = learner._draw(6)
    device = request.getfixturevalue("device")
    model = faked(learner.model, device)
    loss, metrics = model.objective(moved(data, device), on(device, batch))
    assert {x.device for x in (loss, *metrics.values())} == {device}
    loss.backward()
    states, actions = (torch.zeros(2, 12, size, device=device) for size in (data.state_size, data.action_size))
    z = model.prompt_of(states, actions, torch.zeros(2, 12, device=device))
    assert (z.device, z.shape) == (device, (2, 12, 4))


@pytest.mark.parametrize(("name", "mixer", "changes"), CASES, ids=str)
def test_agents_act_where_their_weights_are(name, mixer, changes, request):
    """With vectors for actions no value of an agent is read: it acts and observes on a device without values."""
    data = SOURCES["vectors"].train_data()
    method = make(name, data, mixer, **changes, **({} if changes else {"episodes": 2}))
    device = request.getfixturevalue("device")
    with torch.no_grad():
        agent = faked(method.eval(), device).agent(3)
        for _ in range(3):
            agent.begin()
            for _ in range(12):
                state = torch.zeros(3, data.state_size, device=device)
                action = agent.act(state)
                assert (action.device, action.shape) == (device, (3, data.action_size))
                agent.observe(state, action, torch.zeros(3, device=device), state)


@pytest.mark.parametrize("name", METHODS)
def test_nothing_is_made_without_a_device(name, data):
    source = SOURCES["discrete" if data.num_actions else "vectors"]
    with ExplicitDevices():
        method = make(name, data)
        learner = OfflineLearner(method, data, {}, lambda m: {"return": float(few_shot(m, environments, 3).mean())})
        environments = source.environments()
        for loss, _ in learner.losses(0):
            loss.backward()
        assert learner.evaluate().keys() == {"return"}
        loop = LoopConfig()
        world = WorldModelLearner(WorldModelConfig(size=4, hidden=8, others=2), data, 6, loop, {}, "cpu")
        next(iter(world.losses(0)))[0].backward()
        world.evaluate()
        again = source.train_data()
        source.best_returns()
    assert torch.equal(again.states, data.states)


def test_what_is_drawn_does_not_depend_on_the_device(data):
    elsewhere = data.to("meta")
    assert (elsewhere.states.device.type, data.states.device.type) == ("meta", "cpu")
    assert data.to("cpu") is data

    def drawn(d):
        torch.manual_seed(5)
        tasks = d.draw_tasks(4)
        steps = d.draw_steps(tasks, 3)
        return tasks, d.draw_episodes(tasks, 2), d.draw_distinct_episodes(tasks, 3), steps, *d.windows(steps, 4)

    for a, b in zip(drawn(data), drawn(elsewhere), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("name", "mixer", "changes"), CASES, ids=str)
def test_batches_lie_on_the_datas_device(name, mixer, changes, data):
    batch = make(name, data, mixer, **changes).draw(data.to("meta"))
    assert {t.device.type for t in batch if isinstance(t, torch.Tensor)} == {"meta"}


def test_a_hosts_default_device_moves_nothing(data):
    source = SOURCES["discrete" if data.num_actions else "vectors"]
    with torch.device("meta"):
        method = make("sicql", data)
        learner = OfflineLearner(method, source.train_data(), {}, lambda m: {})
        loss, _ = next(iter(learner.losses(0)))
        returns = few_shot(method, source.environments(), 2)
    assert isinstance(method, SICQL)
    assert {loss.device.type, returns.device.type, next(method.parameters()).device.type} == {"cpu"}
    assert torch.equal(learner.data.states, data.states)


def test_data_on_two_devices_are_refused(data):
    from dataclasses import replace

    with pytest.raises(ValueError, match="rewards: wanted the states' device, cpu, got meta"):
        replace(data, rewards=data.rewards.to("meta"))
