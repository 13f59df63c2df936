"""The fused step does what the module does: the same actions and states within rounding, the same refusals."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from instruction_sets import ISAS, check_with
from torch import nn

from icrl.omnirl import EXPLORER, Agent, Temperature, ValueIterationNetwork, ValueIterationNetworkConfig, shipped
from icrl.omnirl.agent import AHEAD
from icrl.omnirl.closed_loop import ClosedLoop
from icrl.omnirl.evaluate import run_agent
from icrl.worlds import sample_anymdp

pytestmark = pytest.mark.filterwarnings("ignore:.*has learned labels")


def random_model(seed=0, **config):
    """A network whose parameters are all of a size that matters."""
    torch.manual_seed(seed)
    model = ValueIterationNetwork(ValueIterationNetworkConfig(**config)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
        for head in (*model.policy_heads, *model.q_heads, *model.q_state_heads):
            nn.init.normal_(head.weight, std=0.3)
    return model


def tensors(state):
    return [state.transition, *state.values, *state[2:]]


def world(states, actions, seed):
    g = torch.Generator().manual_seed(seed)
    transition = torch.rand(states, actions, states, generator=g).pow(12)
    return transition / transition.sum(-1, keepdim=True), torch.randn(states, actions, generator=g), g


def compare(model, batch, states, steps, *, prompt=EXPLORER, num_actions=None, masks=False, tags=False, layers=None):
    """Steps of a fused agent and of a module's in the same world: logits of both, how far apart, relative to the largest."""
    options = {"prompt": prompt, "num_actions": num_actions, "temperature": Temperature(1.0, 0.2, 100), "seed": 5}
    fused, plain = (
        Agent(model, batch, states, fused=True, **options),
        Agent(model, batch, states, fused=False, **options),
    )
    if layers is not None:
        fused.state, plain.state = (model.initial_state(batch, states, layers) for _ in range(2))
    inner, seen = plain.run, []

    def run(*arguments):
        seen.append(inner(*arguments))
        return seen[-1]

    plain.run = run
    transition, reward, g = world(states, model.actions, 7)
    at, worst = torch.randint(states, (batch,), generator=g), 0.0
    logits = torch.zeros(batch, model.actions)
    for t in range(steps):
        mask = None
        if masks:
            mask = torch.rand(batch, model.actions, generator=g) < 0.5
            own = torch.as_tensor(fused.num_actions).expand(batch)
            mask[torch.arange(batch), torch.randint(99, (batch,), generator=g) % own] = True
        step = fused.serving()
        call = step.step.program.run
        step.run = lambda *given, call=call: call(*given[:9], logits.data_ptr(), *given[10:])
        a, b = fused.act(at, mask), plain.act(at, mask)
        assert torch.equal(a, b), t
        assert mask is None or mask[torch.arange(batch), a].all()
        finite = logits.isfinite()
        apart = (logits - seen[-1])[finite].abs().max() / seen[-1].abs().max()
        worst = max(worst, float(apart))
        gain = reward[at, a] + 0.1 * torch.randn(batch, generator=g)
        done = (torch.rand(batch, generator=g) < 0.1).long() * torch.randint(1, 3, (batch,), generator=g)
        tag = t % 8 if tags else 7
        for agent in (fused, plain):
            agent.observe(gain, done if t % 2 else done.to(torch.uint8), tag)
        at = torch.multinomial(transition[at, a], 1, generator=g)[:, 0]
        at = torch.where(done > 0, torch.randint(states, (batch,), generator=g), at)
    for x, y in zip(tensors(fused.state), tensors(plain.state), strict=True):
        assert (x - y).abs().max() <= 1e-4 * y.abs().max()
    return worst


def test_shipped_weights_over_2000_steps():
    assert compare(ValueIterationNetwork.load(shipped()), 2, 16, 2000) <= 1e-4


@pytest.mark.parametrize(
    ("config", "batch", "states", "options"),
    [
        ({}, 1, 1, {}),
        ({"actions": 1}, 2, 3, {}),
        ({"actions": 2}, 7, 9, {"num_actions": 1}),
        ({"actions": 9}, 7, 64, {"masks": True, "tags": True}),
        ({"actions": 16, "layers": 2}, 3, 33, {"num_actions": torch.tensor([16, 7, 2]), "prompt": 0}),
        ({"layers": 3}, 64, 16, {"prompt": 2, "tags": True}),
        ({"layers": 3, "tied": True}, 3, 8, {}),
        ({"layers": 3, "fading": False}, 3, 8, {}),
        ({"layers": 3, "tied": False}, 3, 8, {}),
        ({"layers": 3, "tied": False, "fading": False}, 3, 8, {}),
        ({"layers": 3, "tied": True}, 3, 8, {"layers": 7}),
        ({"layers": 3, "tied": True}, 3, 8, {"layers": 0}),
        ({"layers": 0}, 3, 8, {}),
        ({"layers": 2, "discounts": (0.9,), "value_width": 3, "pool_heads": 3}, 5, 12, {"prompt": 1, "masks": True}),
        ({"layers": 2, "discounts": (), "action_width": 5, "state_width": 7}, 5, 12, {"prompt": 0}),
        ({"layers": 2, "action_hidden": 1, "state_hidden": 3, "pool_heads": 1, "value_width": 70}, 5, 12, {}),
        ({"layers": 2, "discounts": tuple(i / 20 for i in range(20))}, 3, 12, {"prompt": 20}),
    ],
)
def test_any_network(config, batch, states, options):
    assert compare(random_model(**config), batch, states, 120, **options) <= 1e-4


@pytest.mark.parametrize("isa", ISAS)
def test_instruction_sets(isa):
    script = (
        "assert compare(random_model(actions=9), 7, 33, 70, masks=True, tags=True) <= 1e-4\n"
        "assert compare(random_model(layers=3, tied=True), 1, 16, 70) <= 1e-4\n"
        "test_same_bits_in_any_batch()\n"
    )
    check_with(isa, __file__, script)


def test_same_bits_in_any_batch():
    """A context's state after some steps, alone and among others."""
    model, batch, states = random_model(layers=3), 21, 9
    options = {"temperature": Temperature(0.0, 0.0, 1), "fused": True}
    together = Agent(model, batch, states, **options)
    alone = [Agent(model, 1, states, **options) for _ in range(batch)]
    g = torch.Generator().manual_seed(3)
    for _ in range(30):
        at, gain = torch.randint(states, (batch,), generator=g), torch.randn(batch, generator=g)
        done = (torch.rand(batch, generator=g) < 0.2).to(torch.uint8)
        actions = torch.cat([one.act(at[i : i + 1]) for i, one in enumerate(alone)])
        assert torch.equal(together.act(at), actions)
        together.observe(gain, done)
        for i, one in enumerate(alone):
            one.observe(gain[i : i + 1], done[i : i + 1])
    for name, whole in zip("tvsdrmc", tensors(together.state), strict=False):
        parts = [tensors(one.state)["tvsdrmc".index(name)] for one in alone]
        assert torch.equal(whole, torch.cat(parts))


# ---- when the fused step serves


def lived(agent, steps, seed=0):
    """Actions of some steps in a world of random observations and rewards."""
    g, actions = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        actions.append(agent.act(torch.randint(agent.states, (agent.batch,), generator=g)))
        agent.observe(torch.randn(agent.batch, generator=g), torch.zeros(agent.batch, dtype=torch.uint8))
    return torch.stack(actions)


def test_it_serves_by_itself():
    model = random_model(layers=2)
    agent, plain = Agent(model, 3, 8), Agent(model, 3, 8, fused=False)
    calls = []
    inner = plain.run
    plain.run = lambda *x: (calls.append(0), inner(*x))[1]
    assert torch.equal(lived(agent, 10), lived(plain, 10))
    assert agent.serving() is not None
    assert plain.serving() is None
    assert len(calls) == 10


def test_changed_weights_are_packed_anew():
    model = random_model(layers=2)
    agent, plain = Agent(model, 3, 8, fused=True), Agent(model, 3, 8, fused=False)
    assert torch.equal(lived(agent, AHEAD), lived(plain, AHEAD))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(-1)
    for _ in range(AHEAD):
        agent.serving()
    assert torch.equal(lived(agent, 50, seed=1), lived(plain, 50, seed=1))


def test_parameters_given_other_memory_are_packed_anew():
    agents = [Agent(random_model(), 2, 8, seed=3, fused=fused) for fused in (True, False)]
    for t in range(3 * AHEAD):
        if t == AHEAD:  # when the weights are next looked at
            for agent in agents:
                parameters = list(agent.model.parameters())
                nn.utils.vector_to_parameters(-nn.utils.parameters_to_vector(parameters), parameters)
        seen = torch.tensor([t % 8, t % 5])
        fused, plain = (agent.act(seen) for agent in agents)
        assert torch.equal(fused, plain)
        for agent in agents:
            agent.observe(torch.tensor([1.0, t % 3]), torch.tensor([0, 0], dtype=torch.uint8))


def test_hooks_and_strange_modules_keep_it_from_serving():
    def hook(module, args):
        return None

    model = random_model(layers=2)
    handle = model.blocks[0].register_forward_pre_hook(hook)
    assert Agent(model, 3, 8).serving() is None
    with pytest.raises(ValueError, match=r"^fused: wanted .* has hooks"):
        Agent(model, 3, 8, fused=True)
    handle.remove()
    handle = nn.modules.module.register_module_forward_hook(lambda *x: None)
    assert Agent(model, 3, 8).serving() is None
    handle.remove()
    assert Agent(model, 3, 8).serving() is not None
    changes = (
        lambda m: nn.utils.parametrize.register_parametrization(m.read[0], "weight", nn.Identity()),
        lambda m: m.double(),
        lambda m: m.blocks[1].__setattr__("score", nn.Linear(32, 4)),
        lambda m: m.__setattr__("decide", m.decide),
        lambda m: m.__setattr__("__class__", type("Other", (ValueIterationNetwork,), {})),
    )
    for change in changes:
        model = random_model(layers=2)
        change(model)
        assert Agent(model, 3, 8).serving() is None
        with pytest.raises(ValueError, match=r"^fused: wanted a model that the fused step serves, but"):
            Agent(model, 3, 8, fused=True)


def test_a_replaced_run_and_autocast_keep_it_from_serving():
    model = random_model(layers=2)
    agent = Agent(model, 3, 8)
    assert agent.serving() is not None
    with torch.autocast("cpu"):
        assert agent.serving() is None
    agent.run = lambda *x: model.decide(*x)
    assert agent.serving() is None
    agent = Agent(model, 3, 8, fused=True)
    agent.run = lambda *x: model.decide(*x)
    with pytest.raises(ValueError, match=r"^fused: wanted a call"):
        agent.act(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"^fused: wanted None, True or False"):
        Agent(model, 3, 8, fused=1)


def test_it_gives_way_and_comes_back_in_one_context():
    model = random_model(layers=2)
    agent, plain = Agent(model, 3, 8), Agent(model, 3, 8, fused=False)
    actions = [lived(agent, 5)]
    agent.run = lambda *x: model.decide(*x)
    actions.append(lived(agent, 5, seed=1))
    agent.run = agent._decide
    actions.append(lived(agent, 5, seed=2))
    others = [lived(plain, 5, seed=i) for i in range(3)]
    assert torch.equal(torch.cat(actions), torch.cat(others))


def test_states_are_replaced():
    model = random_model(layers=2, tied=False)
    agent, plain = Agent(model, 3, 8, fused=True), Agent(model, 3, 8, fused=False)
    for x in (agent, plain):
        lived(x, 5)
        x.state = model.initial_state(3, 8)
    assert torch.equal(lived(agent, 20, seed=1), lived(plain, 20, seed=1))
    assert float(agent.state.count[0]) == 20
    agent.state = agent.state._replace(count=agent.state.count.double())
    with pytest.raises(ValueError, match=r"^fused: wanted .* count: wanted torch.float32"):
        lived(agent, 1)
    for state in (
        model.initial_state(4, 8),
        model.initial_state(3, 7),
        random_model(layers=3, tied=False).initial_state(3, 8),
    ):
        agent = Agent(model, 3, 8, fused=True)
        agent.state = state
        with pytest.raises(ValueError, match=r"^fused: wanted"):
            lived(agent, 1)
    agents = [Agent(model, 3, 8, fused=fused) for fused in (True, False)]
    for agent in agents:
        agent.state = model.initial_state(3, 11)  # room for more
        with pytest.raises(ValueError, match=r"^observation: wanted 0 to 7, got 2 to 8"):
            agent.act(torch.tensor([2, 8, 3]))
    assert torch.equal(*(lived(agent, 20) for agent in agents))


def test_a_states_tensors_may_be_given_other_memory():
    agents = [Agent(random_model(), 4, 40, seed=3, fused=fused) for fused in (True, False)]
    for t in range(3 * AHEAD):
        if t in (AHEAD, AHEAD + 7):  # the second time they go on in what they had, up to the next look
            for agent in agents:
                for tensor in tensors(agent.state):
                    tensor.data = tensor.data.clone()
        actions = [agent.act(torch.full((4,), t % 40)) for agent in agents]
        assert t > AHEAD + 6 or torch.equal(*actions)
        for agent in agents:
            agent.observe(torch.full((4,), float(t % 3)), torch.zeros(4, dtype=torch.uint8))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda agent: pickle.loads(pickle.dumps(agent))])
@pytest.mark.parametrize("steps", [0, 1, 30, AHEAD])
@pytest.mark.parametrize("fused", [True, False])
def test_a_copy_is_an_agent_of_its_own(copied, steps, fused):
    def go(agent, steps, reward):
        actions = []
        for t in range(steps):
            actions.append(agent.act(torch.tensor([t % 8, t % 5])))
            agent.observe(torch.full((2,), reward * (t % 3)), torch.zeros(2, dtype=torch.uint8))
        return torch.stack(actions)

    agent, other = (Agent(random_model(), 2, 8, seed=3, fused=fused) for _ in range(2))
    for each in (agent, other) if steps else ():
        go(each, steps, 1.0)
    twin = copied(agent)
    go(agent, 20, -1.0)  # of which the copy knows nothing
    del agent
    assert torch.equal(go(twin, 2 * AHEAD, 0.5), go(other, 2 * AHEAD, 0.5))
    for a, b in zip(tensors(twin.state), tensors(other.state), strict=True):
        assert torch.equal(a, b)


def test_settings_are_changed():
    model = random_model(layers=2)
    agent, plain = Agent(model, 3, 8, fused=True), Agent(model, 3, 8, fused=False)
    actions = []
    for x in (agent, plain):
        went = [lived(x, 5)]
        x.prompt = 1
        went.append(lived(x, 10, seed=1))
        x.num_actions = 2
        went.append(lived(x, 10, seed=2))
        x.temperature = Temperature(0.0, 0.0, 0)
        actions.append(torch.cat([*went, lived(x, 10, seed=3)]))
    assert torch.equal(*actions)
    assert int(actions[0][15:].max()) == 1


def test_tensors_of_any_layout():
    """Strided observations, masks, rewards and ends; rewards whose memory holds the opposite."""
    model = random_model(layers=2)
    agent, plain = Agent(model, 3, 8, fused=True), Agent(model, 3, 8, fused=False)
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        at = torch.randint(8, (3, 2), generator=g)[:, 1]
        mask = torch.rand(5, 3, generator=g).ge(0.5).t()
        mask[:, 0] = True
        assert torch.equal(agent.act(at, mask), plain.act(at, mask))
        reward = torch.randn(3, 2, generator=g)
        reward = torch.view_as_complex(reward).conj().imag
        done = torch.randint(3, (3, 2), generator=g)[:, 0]
        agent.observe(reward, done)
        plain.observe(reward.resolve_neg().contiguous(), done.contiguous())
    assert torch.allclose(agent.state.transition, plain.state.transition)


def test_inference_mode():
    """Versions of its tensors are not kept: weights that were made in it are the module's, a state is not in the way."""
    with torch.inference_mode():
        model = random_model(layers=2)
        assert Agent(model, 3, 8).serving() is None
    model = random_model(layers=2)
    with torch.inference_mode():
        agents = [Agent(model, 3, 8, fused=fused) for fused in (True, False)]
        assert torch.equal(*(lived(agent, AHEAD + 5) for agent in agents))


def test_autograd_sees_that_the_state_changes():
    model = random_model(layers=2)
    for fused in (True, False):
        agent = Agent(model, 3, 8, fused=fused)
        loss = (agent.state.transition * torch.ones(1, requires_grad=True)).sum()
        lived(agent, 1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_an_act_without_an_outcome_is_forgotten():
    model = random_model(layers=2)
    agents = [Agent(model, 3, 8, fused=fused) for fused in (True, False)]
    for agent in agents:
        lived(agent, 3)
        agent.act(torch.tensor([1, 2, 3]))
        agent.act(torch.tensor([3, 2, 1]))
        agent.observe(torch.ones(3), torch.zeros(3))
        agent.observe(torch.zeros(3), torch.ones(3))
    assert torch.equal(*(lived(agent, 20, seed=1) for agent in agents))
    assert torch.equal(*(agent.state.transition for agent in agents))


def test_large_batches_on_threads():
    model = random_model(layers=2)
    agent, plain = Agent(model, 130, 8, fused=True), Agent(model, 130, 8, fused=False)
    assert torch.equal(lived(agent, 10), lived(plain, 10))


# ---- the closed loop


def same(a, b):
    return all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("state", "observation", "action", "reward", "done"))


@pytest.mark.parametrize(("count", "states", "steps"), [(1, 16, 300), (9, 12, 100), (20, 9, 40), (3, 8, 0), (2, 8, 1)])
def test_the_loop_is_the_steps(count, states, steps):
    model = ValueIterationNetwork.load(shipped())
    tasks = sample_anymdp(count, states, seed=3)
    options = {"temperature": Temperature(1.0, 0.2, 50), "seed": 4}
    fused, plain = (run_agent(model, tasks, steps, fused=f, **options) for f in (True, False))
    assert same(fused, plain)
    assert fused.reward.shape == (count, steps)


def test_the_loop_goes_on_where_it_stopped():
    model, tasks = random_model(layers=2), sample_anymdp(5, 9, seed=3)
    whole = run_agent(model, tasks, 90, seed=2, fused=True)
    agent = Agent(model, 5, tasks.num_observations, seed=2, num_actions=tasks.num_actions)
    loop = ClosedLoop(agent, tasks, 2)
    parts = []
    for i, size in enumerate((1, 7, 0, 30, 13, 39)):
        if i == 3:
            agent.run = lambda *x: model.decide(*x)  # steps between
        parts.append(loop.run(size))
        agent.run = agent._decide
    for name in ("state", "action", "reward", "done"):
        assert torch.equal(torch.cat([getattr(p, name) for p in parts], 1), getattr(whole, name))
    assert agent.step == 90


def test_the_loop_reads_a_tag_once():
    model, tasks = random_model(layers=2), sample_anymdp(2, 8, seed=3)
    went = []
    for fused in (True, False):
        agent = Agent(model, 2, tasks.num_observations, seed=2, num_actions=tasks.num_actions, fused=fused)
        agent.act(torch.zeros(2, dtype=torch.int64))
        agent.observe(torch.ones(2), torch.zeros(2), 3)
        went.append((ClosedLoop(agent, tasks, 2).run(20), agent.state.transition))
    assert same(went[0][0], went[1][0])
    assert torch.equal(went[0][1], went[1][1])


def test_what_the_loop_refuses():
    model, tasks = random_model(layers=2), sample_anymdp(3, 8, seed=3)
    with pytest.raises(ValueError, match=r"^tasks: wanted the agent's 2 of at most"):
        ClosedLoop(Agent(model, 2, tasks.num_observations), tasks)
    with pytest.raises(ValueError, match=r"^tasks: wanted the agent's 3 of at most"):
        ClosedLoop(Agent(model, 3, tasks.num_observations - 1), tasks)
    noisy = replace(tasks, reward=torch.full_like(tasks.reward, 1e20))
    for fused in (True, False):
        with pytest.raises(ValueError, match=r"^reward: wanted finite numbers of at most 1e\+15"):
            run_agent(model, noisy, 5, fused=fused)
    with pytest.raises(ValueError, match=r"^steps: wanted"):
        run_agent(model, tasks, -1)
