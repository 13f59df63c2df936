"""The sequence model's fused step does what its module does: the same actions, logits and states within rounding."""

import pytest
import torch
from instruction_sets import ISAS, check_with

from icrl.models.mixers import MIXERS
from icrl.omnirl import Agent, OmniRL, OmniRLConfig, Temperature
from icrl.omnirl.evaluate import run_agent
from icrl.worlds import sample_anymdp

INTERLEAVED = {"layout": "interleaved", "addressed": False}


def random_model(seed=0, **config):
    torch.manual_seed(seed)
    config = {"states": 12, "width": 64, "layers": 2, "heads": 4, "head_dim": 16, "hidden": 40, "code": 16} | config
    config = {"addressed": config.get("mixer", "gated_delta_net") == "gated_delta_net"} | config
    model = OmniRL(OmniRLConfig(**{"window": 20, "actions": 4} | config)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def tensors(state):
    layers = [
        t for layer in state.layers for part in layer for t in ((part,) if isinstance(part, torch.Tensor) else part)
    ]
    return [state.reward_square, state.count, *layers]


@torch.no_grad()
def compare(model, batch, steps, *, prompt=4, num_actions=None, masks=False):
    """A fused agent and a module's in the same world: how far apart their logits are, relative to the largest."""
    options = {"prompt": prompt, "num_actions": num_actions, "temperature": Temperature(1.0, 0.2, 100), "seed": 5}
    fused, plain = (Agent(model, batch, 12, fused=on, **options) for on in (True, False))
    inner, seen, worst = plain.run, [], 0.0

    def run(*arguments):
        seen.append(inner(*arguments))
        return seen[-1]

    plain.run = run
    g = torch.Generator().manual_seed(7)
    logits, at = torch.zeros(batch, model.actions), torch.randint(12, (batch,), generator=g)
    for t in range(steps):
        mask = None
        if masks:
            mask = torch.rand(batch, model.actions, generator=g) < 0.5
            mask[:, 0] = True
        step = fused.serving()
        call = step.step.program.run
        step.run = lambda *given, call=call: call(*given[:9], logits.data_ptr(), *given[10:])
        a, b = fused.act(at, mask), plain.act(at, mask)
        assert torch.equal(a, b), t
        finite = logits.isfinite()
        worst = max(worst, float((logits - seen[-1])[finite].abs().max() / seen[-1].abs().max()))
        reward = torch.randn(batch, generator=g) * (torch.rand(batch, generator=g) < 0.5)
        done = torch.randint(3, (batch,), generator=g) * (torch.rand(batch, generator=g) < 0.1)
        tag = int(torch.randint(8, (), generator=g))
        fused.observe(reward, done, tag)
        plain.observe(reward, done, tag)
        at = torch.randint(12, (batch,), generator=g)
    for x, y in zip(tensors(fused.state), tensors(plain.state), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-5)
    return worst


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("batch", [1, 7])
def test_mixers(mixer, batch):
    assert compare(random_model(mixer=mixer), batch, 250) < 1e-4


@pytest.mark.parametrize(
    ("config", "options"),
    [
        ({}, {"batch": 64, "steps": 80}),
        ({"actions": 9, "heads": 9, "width": 66}, {"batch": 2, "steps": 100, "masks": True, "prompt": 0}),
        ({"actions": 1}, {"batch": 2, "steps": 60}),
        ({"policy": "prompted", "gated": False}, {"batch": 3, "steps": 100, "prompt": 2}),
        ({**INTERLEAVED, "mixer": "rwkv7", "policy": "prompted"}, {"batch": 3, "steps": 100, "prompt": 1}),
        ({**INTERLEAVED, "arrangement": "odawr"}, {"batch": 3, "steps": 100, "masks": True}),
        ({**INTERLEAVED, "mixer": "linear", "policy": "prompted"}, {"batch": 1, "steps": 40}),
        ({**INTERLEAVED, "mixer": "softmax", "policy": "prompted"}, {"batch": 2, "steps": 40}),
        ({"addressed": False, "width": 40}, {"batch": 3, "steps": 100, "num_actions": torch.tensor([1, 4, 3])}),
    ],
)
def test_configurations(config, options):
    assert compare(random_model(**config), **options) < 1e-4


def test_the_recipes_model_over_2000_steps():
    torch.manual_seed(0)
    assert compare(OmniRL(OmniRLConfig()).eval(), 1, 2000) < 1e-4


@pytest.mark.parametrize("isa", ISAS)
def test_instruction_sets(isa):
    script = (
        "torch.set_num_threads(1)\nfor mixer in MIXERS:\n    assert compare(random_model(mixer=mixer), 2, 60) < 1e-4\n"
    )
    check_with(isa, __file__, script)


def test_closed_loop_is_the_loop_step_by_step():
    tasks = sample_anymdp(5, 8, 4, seed=3)
    model = random_model()
    fused, plain = (run_agent(model, tasks, 120, seed=2, fused=on) for on in (True, False))
    for name in ("state", "observation", "action", "reward", "done"):
        assert torch.equal(getattr(fused, name), getattr(plain, name)), name


@torch.no_grad()
def test_changed_weights_and_states_are_seen():
    model = random_model()
    agents = [Agent(model, 2, 12, fused=on, seed=1) for on in (True, False)]
    for turn in range(3):
        for _ in range(70):
            acted = [agent.act(torch.tensor([3, 5])) for agent in agents]
            for agent in agents:
                agent.observe(torch.ones(2), torch.zeros(2, dtype=torch.uint8))
        assert torch.equal(*acted)
        if turn == 0:
            for p in model.parameters():
                p.mul_(0.9)
            for agent in agents:  # what is seen within 64 steps is not to be waited for here
                agent.state = agent.state.clone()
        else:
            for agent in agents:
                agent.state = model.initial_state(2, 12)
    for x, y in zip(*(tensors(agent.state) for agent in agents), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (lambda: random_model(channels=3), "its observations are read by a ContinuousObservations, not by number"),
        (lambda: random_model().double(), "module: wanted float32 on the CPU"),
    ],
)
def test_models_without_a_fused_step(model, said):
    with pytest.raises(ValueError, match=f"^fused: wanted a model that the fused step serves, but {said}"):
        Agent(model(), 2, 12, fused=True)


@pytest.mark.parametrize("config", [{"policy": "prompted"}, INTERLEAVED | {"policy": "prompted"}, {}])
def test_what_is_read_is_as_if_it_had_been_done_by_the_prompt(config):
    model, g = random_model(**config), torch.Generator().manual_seed(2)
    seen, reward = torch.randint(12, (2, 30), generator=g), torch.randn(2, 30, generator=g)
    done = torch.randint(3, (2, 30), generator=g)
    acting, reading = (Agent(model, 2, 12, prompt=2) for _ in range(2))
    action = []
    for t in range(30):
        action.append(acting.act(seen[:, t]))
        acting.observe(reward[:, t], done[:, t])
    reading.read(seen, torch.stack(action, 1), reward, done)
    for a, b in zip(tensors(reading.state), tensors(acting.state), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_indices_are_judged():
    agent = Agent(random_model(), 2, 12, fused=True)
    with pytest.raises(ValueError, match=r"^observation: wanted 0 to 11, got 3 to 12"):
        agent.act(torch.tensor([3, 12]))
