"""OmniRL, the sequence model: one function by segments and by steps; what it sees; its gradients, files and refusals."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils import _pytree as pytree

import icrl
from icrl.models.mixers import MIXERS
from icrl.models.tokenizers import ContinuousObservations, DiscreteObservations, Tokenizer
from icrl.omnirl import Agent, OmniRL, OmniRLConfig, Tokens, ValueIterationNetwork, ValueIterationNetworkConfig
from icrl.omnirl.evaluate import run_agent
from icrl.omnirl.tags import START
from icrl.worlds import sample_anymdp

A, S = 3, 10
SMALL = OmniRLConfig(actions=A, states=S, width=40, layers=2, heads=4, head_dim=10, hidden=24, window=7, code=10)
FUSED = {
    mixer: replace(SMALL, mixer=mixer, addressed=False, policy=policy)
    for mixer, policy in zip(MIXERS, ["each", "prompted"] * len(MIXERS), strict=False)
}
INTERLEAVED = {
    mixer: replace(c, layout="interleaved", policy="prompted", arrangement=order)
    for (mixer, c), order in zip(FUSED.items(), ["opdtawr", "podawtr", "opdawr"] * len(MIXERS), strict=False)
}
CASES = {
    "fused, addressed": SMALL,
    "interleaved, each": replace(FUSED["gla"], layout="interleaved", policy="each", arrangement="odtawr"),
    **{f"fused {name}": c for name, c in FUSED.items()},
    **{f"interleaved {name}": c for name, c in INTERLEAVED.items()},
}


def make(config, seed=0):
    torch.manual_seed(seed)
    model = OmniRL(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))  # at the start much is near zero, where errors hide
    return model


def some_tokens(B=3, T=23, seed=1, channels=0):
    torch.manual_seed(seed)
    shape = (B, T, channels) if channels else (B, T)
    done = torch.where(torch.rand(B, T) < 0.2, torch.randint(1, 3, (B, T)), 0)
    done[:, 0] = START
    action = torch.randint(A, (B, T))
    action[:, 0] = A
    seen = [torch.randn(shape) if channels else torch.randint(S, shape) for _ in range(2)]
    return Tokens(*seen, action, 3 * torch.randn(B, T), done, torch.randint(8, (B, T)))


def part(tokens, begin, end):
    return Tokens(*(x[:, begin:end] for x in tokens))


def leaves(x):
    return [t for t in pytree.tree_leaves(x) if isinstance(t, torch.Tensor)]


def assert_close(a, b):
    for x, y in zip(leaves(a), leaves(b), strict=True):
        torch.testing.assert_close(x, y, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_segments_and_steps_are_the_whole(case):
    model, tokens = make(CASES[case]), some_tokens()
    prompt = torch.randint(8, (3, 23))
    whole, last = model(tokens, model.initial_state(3, S), prompt)
    state, outputs = model.initial_state(3, S), []
    for begin, end in ((0, 4), (4, 5), (5, 21), (21, 23)):
        before = copy.deepcopy(state)
        output, after = model(part(tokens, begin, end), state, prompt[:, begin:end])
        assert all(torch.equal(x, y) for x, y in zip(leaves(before), leaves(state), strict=True))  # left as it was
        state = after
        outputs.append(output)
    joined = pytree.tree_map(lambda *x: torch.cat(x, 1), *outputs)
    assert_close(joined, whole)
    assert_close(state, last)
    state, outputs = model.initial_state(3, S), []
    for t in range(23):
        output, returned = model.step(part(tokens, t, t + 1), state, prompt[:, t : t + 1])
        assert returned is state
        outputs.append(output)
    assert_close(pytree.tree_map(lambda *x: torch.cat(x, 1), *outputs), whole)
    assert_close(state, last)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_no_output_depends_on_a_later_token(case):
    model, tokens = make(CASES[case]), some_tokens()
    later = Tokens(*(torch.cat([a[:, :9], b[:, 9:]], 1) for a, b in zip(tokens, some_tokens(seed=5), strict=True)))
    one, two = (model(t, model.initial_state(3, S))[0] for t in (tokens, later))
    for a, b in zip(leaves(one), leaves(two), strict=True):
        assert torch.equal(a[:, :9], b[:, :9])
        assert not torch.equal(a[:, 9:], b[:, 9:])


def changed(tokens, name, at):
    new = getattr(tokens, name).clone()
    new[:, at] = (new[:, at] + 1) % 3
    return tokens._replace(**{name: new})


@pytest.mark.parametrize("case", ["fused, addressed", "fused gla", "interleaved gla", "interleaved rwkv7"])
@torch.no_grad()
def test_both_layouts_decide_by_the_same_things(case):
    """A decision sees this step's observation and all of the transition before; the world model, of the interleaved layout,
    sees what was done and not what it brought."""
    model, tokens = make(CASES[case]), some_tokens()
    base = model(tokens, model.initial_state(3, S))[0]
    for name in Tokens._fields:
        if name == "previous_tag" and model.config.arrangement == "opdawr":
            continue
        output = model(changed(tokens, name, 12), model.initial_state(3, S))[0]
        told_before = name == "previous_observation" and model.config.layout == "interleaved"  # by the step before
        assert torch.equal(base.logits[:, 12], output.logits[:, 12]) == told_before, name
        hidden = ("observation", "previous_reward", "previous_done") if model.config.layout == "interleaved" else ()
        if name in hidden:
            for a, b in zip(base.world, output.world, strict=True):
                assert torch.equal(a[:, 12], b[:, 12]), name
                assert not torch.equal(a[:, 13], b[:, 13]), name
        if name == "previous_action":
            assert not torch.equal(base.world.reward[:, 12], output.world.reward[:, 12])


@torch.no_grad()
def test_a_prompt_is_seen_by_its_own_step_on():
    for case in ("interleaved gla", "interleaved gsa"):
        model, tokens = make(CASES[case]), some_tokens()
        asked = torch.zeros(3, 23, dtype=torch.int64)
        other = asked.clone()
        other[:, 12] = 4
        one, two = (model(tokens, model.initial_state(3, S), p)[0].logits for p in (asked, other))
        assert torch.equal(one[:, :12], two[:, :12])
        assert not torch.equal(one[:, 12], two[:, 12])


@pytest.mark.parametrize("case", CASES)
def test_autocast_keeps_states_in_float32(case):
    model, tokens = make(CASES[case]), some_tokens()
    wanted = model(tokens, model.initial_state(3))[0]
    with torch.autocast("cpu", torch.bfloat16):
        output, state = model(tokens, model.initial_state(3))
    assert {t.dtype for t in leaves(state)} <= {torch.float32, torch.int64}
    apart = (output.logits.float() - wanted.logits).norm() / wanted.logits.norm()
    assert apart < 0.1
    output.logits.float().sum().backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())


@torch.no_grad()
def test_what_is_missing_is_not_seen():
    for case in ("fused, addressed", "interleaved kda"):
        model, tokens = make(CASES[case]), some_tokens()
        missing = torch.zeros(3, 23, dtype=torch.bool)
        missing[:, 12] = True
        other = changed(changed(tokens, "observation", 12), "previous_observation", 13)
        for a, b in zip(
            *(leaves(model(t, model.initial_state(3, S), missing=missing)[0]) for t in (tokens, other)), strict=True
        ):
            assert torch.equal(a, b)
        assert not torch.equal(
            model(tokens, model.initial_state(3, S))[0].logits, model(other, model.initial_state(3, S))[0].logits
        )


@torch.no_grad()
def test_the_start_has_no_past():
    model, tokens = make(SMALL), some_tokens()
    other = changed(changed(tokens, "previous_observation", 0), "previous_reward", 0)
    one, two = (model(t, model.initial_state(3, S)) for t in (tokens, other))
    for a, b in zip(leaves(one), leaves(two), strict=True):
        assert torch.equal(a, b)


@torch.no_grad()
def test_rewards_are_read_in_their_own_units():
    """In another unit of money every decision is the same."""
    model, tokens = make(SMALL), some_tokens()
    one, two = (
        model(t, model.initial_state(3, S))[0]
        for t in (tokens, tokens._replace(previous_reward=1000 * tokens.previous_reward))
    )
    torch.testing.assert_close(one.logits, two.logits, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(1000 * one.reward_scale[:, 1:], two.reward_scale[:, 1:])
    rewards = tokens.previous_reward[:, 1:]
    wanted = (rewards.square().cumsum(1) / torch.arange(1.0, 23)).sqrt()
    torch.testing.assert_close(one.reward_scale[:, 1:], wanted)


@pytest.mark.parametrize("case", CASES)
def test_gradients_flow_to_every_parameter(case):
    model, tokens = make(CASES[case]), some_tokens()
    tokens.previous_tag[:] = torch.arange(8).repeat(3)[:23]
    prompt, missing = tokens.previous_tag.roll(1, 1), torch.rand(3, 23) < 0.2
    output, _ = model(tokens, model.initial_state(3), prompt, tokens.previous_action % A, missing)
    model.tokenizer.loss(output.world.observation, tokens.observation).sum().backward(retain_graph=True)
    (output.logits.square().sum() + output.world.reward.square().sum() + output.world.done.square().sum()).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert (p.grad != 0).any(), name


@torch.no_grad()
def test_addresses_at_first():
    """The first layer's head h writes after action h alone, at the previous observation, and is read at this one."""
    torch.manual_seed(0)
    model = OmniRL(replace(SMALL, width=64))
    c, mixer = model.config, model.stack.blocks[0].mixer.mixer
    tokens = Tokens(
        *(torch.tensor([x]) for x in ([4, 7, 4], [0, 4, 7], [A, 1, 2], [0.0, 1.0, 1.0], [START, 0, 0], [7, 7, 7]))
    )
    x = model.stack.blocks[0].mix_norm(model.layout(model._parts(tokens, model.initial_state(1), None, None)[0]))
    beta = mixer.b_proj(x).sigmoid()[0, :, :A]
    for step, action in ((1, 1), (2, 2)):
        for h in range(A):
            assert beta[step, h] > 0.5 if h == action else beta[step, h] < 0.1
    q, k = (
        F.normalize(F.silu(f(x)).unflatten(-1, (c.heads, c.head_dim)), dim=-1)[0, :, :A]
        for f in (mixer.q_proj, mixer.k_proj)
    )
    same, other = (q[2] * k[1]).sum(-1), (q[2] * k[2]).sum(-1)  # keys of 4 and of 7, asked at 4
    assert (same > 0.9).all()
    assert (other < 0.8).all()


@pytest.mark.parametrize("config", [SMALL, INTERLEAVED["rwkv7"]])
def test_files(config, tmp_path):
    model = make(config)
    model.save(tmp_path / "m.safetensors", seed=3)
    for again in (OmniRL.load(tmp_path / "m.safetensors"), icrl.load(tmp_path / "m.safetensors")):
        assert isinstance(again, OmniRL)
        assert again.config == config
        for name, t in model.state_dict().items():
            assert torch.equal(t, again.state_dict()[name]), name
    with pytest.raises(ValueError, match=r"holds a 'omnirl_sequence', wanted .*; load it by OmniRL.load"):
        ValueIterationNetwork.load(tmp_path / "m.safetensors")
    ValueIterationNetwork(ValueIterationNetworkConfig(layers=1)).save(tmp_path / "v.safetensors")
    with pytest.raises(ValueError, match=r"wanted 'omnirl_sequence'; load it by ValueIterationNetwork.load"):
        OmniRL.load(tmp_path / "v.safetensors")
    assert isinstance(icrl.load(tmp_path / "v.safetensors"), ValueIterationNetwork)
    data = (tmp_path / "m.safetensors").read_bytes()
    (tmp_path / "m.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="checkpoint"):
        OmniRL.load(tmp_path / "m.safetensors")


class Pixels(Tokenizer):
    """A tokenizer of one's own."""

    def __init__(self, size):
        super().__init__()
        self.size, self.net, self.back = size, torch.nn.Conv2d(1, size, 4), torch.nn.Linear(size, 16)
        self.none = torch.nn.Parameter(torch.zeros(size))

    def encode(self, observation, missing=None):
        code = self.net(observation.flatten(0, 1)[:, None])[..., 0, 0].unflatten(0, observation.shape[:2])
        return code if missing is None else torch.where(missing[..., None], self.none, code)

    def read(self, z):
        return self.back(z)

    def loss(self, prediction, observation):
        return (prediction - observation.flatten(2)).square().sum(-1)


@torch.no_grad()
def test_other_observations(tmp_path):
    config = replace(SMALL, channels=6, addressed=True)
    model, tokens = make(config), some_tokens(channels=6)
    whole = model(tokens, model.initial_state(3))[0]
    assert whole.world.observation.shape == (3, 23, A, 6)
    state = model.initial_state(3)
    steps = [model.step(part(tokens, t, t + 1), state)[0] for t in range(23)]
    assert_close(pytree.tree_map(lambda *x: torch.cat(x, 1), *steps), whole)
    model.save(tmp_path / "c.safetensors")
    assert isinstance(OmniRL.load(tmp_path / "c.safetensors").tokenizer, ContinuousObservations)

    with pytest.raises(
        ValueError, match="tokenizer: wanted codes of 10 channels, as heads are addressed by them, got 9"
    ):
        OmniRL(SMALL, Pixels(9))
    torch.manual_seed(0)
    own = OmniRL(replace(SMALL, channels=16), Pixels(10))
    images = [x.view(3, 23, 4, 4) for x in some_tokens(channels=16)[:2]]
    output, _ = own(Tokens(*images, *tokens[2:]), own.initial_state(3))
    assert own.tokenizer.loss(output.world.observation[:, :, 0], images[0]).shape == (3, 23)
    own.save(tmp_path / "p.safetensors")
    with pytest.raises(ValueError, match=r"tokenizer: .* was saved with 'Pixels', got None"):
        OmniRL.load(tmp_path / "p.safetensors")
    again = OmniRL.load(tmp_path / "p.safetensors", tokenizer=Pixels(10))
    assert torch.equal(again.tokenizer.net.weight, own.tokenizer.net.weight)


def test_predictions_of_discrete_observations():
    tokenizer = DiscreteObservations(5, 8)
    z, observation = torch.randn(2, 3, 8), torch.randint(5, (2, 3))
    logits = tokenizer.read(z)
    wanted = F.cross_entropy(logits.flatten(0, 1), observation.flatten(), reduction="none").view(2, 3)
    torch.testing.assert_close(tokenizer.loss(logits, observation), wanted)
    torch.testing.assert_close(logits[1, 2, 4], z[1, 2] @ tokenizer.codes.weight[4] / 8**0.5)


def test_it_acts():
    tasks = sample_anymdp(3, 8, A, seed=1, num_observations=S)
    for config in (SMALL, INTERLEAVED["gated_delta_net"]):
        model = make(config)
        one, two = (run_agent(model, tasks, 30, seed=2) for _ in range(2))
        assert torch.equal(one.reward, two.reward)
        assert one.reward.shape == (3, 30)


@torch.no_grad()
def test_a_decision_is_the_head_that_the_prompt_names():
    model, tokens = make(SMALL), some_tokens(T=1)
    output, _ = model(tokens, model.initial_state(3))
    for prompt in range(5):
        logits = model.decide(tokens, prompt, model.initial_state(3))
        torch.testing.assert_close(logits, output.logits[:, 0, :, prompt], rtol=1e-4, atol=1e-5)
    model = make(INTERLEAVED["gla"])
    one, two = (model.decide(tokens, p, model.initial_state(3)) for p in (0, 3))
    assert not torch.equal(one, two)


@torch.no_grad()
def test_the_state_is_of_constant_size_and_may_be_copied():
    for config in (SMALL, FUSED["softmax"]):
        model = make(config)
        state = model.initial_state(2)
        sizes = [t.shape for t in leaves(state)]
        tokens = some_tokens(B=2, T=40)
        for t in range(40):
            model.step(part(tokens, t, t + 1), state)
        assert [t.shape for t in leaves(state)] == sizes
        copied = state.clone()
        model.step(part(tokens, 3, 4), state)
        assert any(not torch.equal(a, b) for a, b in zip(leaves(copied), leaves(state), strict=True))


REFUSED = {
    "layout": ({"layout": "other"}, "layout: wanted one of fused, interleaved"),
    "mixer": ({"mixer": "lstm"}, "mixer: wanted one of"),
    "policy": ({"policy": "best"}, "policy: wanted one of each, prompted"),
    "width": ({"mixer": "gla", "addressed": False, "heads": 3}, "width: wanted a multiple of heads=3"),
    "narrow": ({"width": 24}, "width: wanted at least 33, for addresses of 10 channels, got 24"),
    "heads": ({"heads": 2}, "heads: wanted at least one an action, 3, got 2"),
    "code": ({"code": 9}, "code: wanted head_dim=10"),
    "addressed": ({"mixer": "gla", "heads": 4}, "addressed: wanted gated_delta_net in the fused layout"),
    "discounts": ({"discounts": (0.5, 1.5)}, r"discounts: wanted numbers in \[0, 1\], got 1.5"),
    "letters": ({"arrangement": "opdtawx"}, "arrangement: wanted an order as 'opdtawr', of the letters"),
    "twice": ({"arrangement": "opdtaawr"}, "with one a"),
    "no action": ({"arrangement": "opdtwr"}, "with one a"),
    "decides late": ({"arrangement": "optadwr"}, "with d before a"),
    "told": ({"arrangement": "opdtarw"}, "with w before r"),
    "no prompt": (
        {"layout": "interleaved", "addressed": False, "policy": "prompted", "arrangement": "odtawr"},
        "arrangement: wanted a prompt p with policy 'prompted' alone",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_configurations_are_refused(case):
    over, match = REFUSED[case]
    with pytest.raises(ValueError, match=match) as e:
        OmniRL(replace(SMALL, **over))
    assert "\n" not in str(e.value)


def test_tasks_that_are_too_large_are_refused():
    model = make(SMALL)
    with pytest.raises(ValueError, match=r"states: wanted at most the model.s 10 observations, got 11"):
        Agent(model, 1, 11)
    with pytest.raises(ValueError, match=r"num_actions: wanted 1 to 3, the model.s, got 4 to 4"):
        Agent(model, 1, S, num_actions=4)
    with pytest.raises(ValueError, match=r"tokens: wanted one a sequence, \[B,1\], got \[3, 2\]"):
        model.step(some_tokens(T=2), model.initial_state(3))


def overfits(config, updates, B, T):
    """One batch's actions are learned by heart."""
    torch.manual_seed(0)
    model, tokens = OmniRL(config), some_tokens(B, T)
    label = torch.randint(A, (B, T))
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    losses = []
    for _ in range(updates):
        output, _ = model(tokens, model.initial_state(B))
        loss = F.cross_entropy(output.logits[..., 0].flatten(0, 1), label.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_the_published_preset_overfits_a_batch_at_a_small_width():
    config = OmniRLConfig.published(actions=A, states=S, width=64, layers=6, heads=2, hidden=128, code=64)
    losses = overfits(config, 60, 2, 12)
    assert losses[0] > 0.9
    assert losses[-1] < 0.1


def test_the_published_preset_has_the_published_size():
    with torch.device("meta"):
        model = OmniRL(OmniRLConfig.published())
    parameters = sum(p.numel() for p in model.parameters())
    assert abs(parameters / 43.6e6 - 1) < 0.01, parameters


@pytest.mark.slow
def test_the_published_preset_builds_steps_and_overfits_a_batch():
    config = OmniRLConfig.published(actions=A, states=S)
    losses = overfits(config, 20, 1, 8)
    assert losses[-1] < 0.5 * losses[0]
    model = OmniRL(config)
    assert model.decide(some_tokens(B=2, T=1), 3, model.initial_state(2)).shape == (2, A)
