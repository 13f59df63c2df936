"""S-ICQL's rivals: each loss against a hand-computed case, and acting by the same function that was trained."""

import json
import math
from dataclasses import replace

import gymnasium
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_trajectories import small
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from icrl.cli import main
from icrl.models.trunk import TrunkConfig
from icrl.offline.environments.darkroom import DarkRoomData
from icrl.offline.few_shot import few_shot
from icrl.offline.history import History, HistoryConfig
from icrl.offline.iql import IQL, iql_losses
from icrl.offline.learner import METHODS, make_method
from icrl.offline.method import MethodConfig, Spaces, deviation
from icrl.offline.methods.dicp import DICP, DICPConfig
from icrl.offline.methods.ic_iql import ICIQL
from icrl.offline.methods.idt import IDTConfig, sort_episodes

ROOM = DarkRoomData(size=4, horizon=12, train_goals=12, episodes=6, history=6)
RIVALS = [name for name in METHODS if name != "sicql"]


@pytest.fixture(scope="module")
def room():
    return ROOM.train_data()


def make(name, data, mixer="gla", **changes):
    trunk = TrunkConfig(width=16, layers=2, heads=2, mixer=mixer)
    settings = {"trunk": trunk, "horizon": 12, "batch": 4}
    settings |= {"idt": {"span": 4}, "dpt": {"layout": "branch"}, "dit": {"layout": "branch"}}.get(name, {})
    torch.manual_seed(1)
    method = make_method(name, METHODS[name].config_class(**{**settings, **changes}), Spaces.of(data))
    method.prepare(data)
    return method


def nll(logits, actions):
    return -logits.log_softmax(-1).gather(-1, actions[..., None])[..., 0]


def draw(method, data):
    """The batch that the method's next loss draws."""
    state = torch.get_rng_state()
    batch = method.draw(data)
    torch.set_rng_state(state)
    return batch


def read(method, data, batch):
    memory = method.trunk.remember(method.prompt_tokens(data, batch.prompt), batch.lengths)
    return method.trunk.read(method.trunk.embed_state(method.normal(data.states[batch.steps]))[:, :, None], memory)[
        :, :, 0
    ]


@pytest.mark.parametrize("labels", ["data", "optimal"])
def test_dpt_loss(room, labels):
    method = make("dpt", room, labels=labels)
    batch = draw(method, room)
    target = (room.actions if labels == "data" else room.optimal)[batch.steps]
    expected = nll(method.pi(read(method, room, batch)), target).mean()
    assert method.loss(room)[0].item() == pytest.approx(expected.item(), rel=1e-5)


def test_dit_loss(room):
    method = make("dit", room, discount=0.5, inverse_temperature=2.0, max_weight=3.0)
    batch = draw(method, room)
    features = read(method, room, batch)
    returns = room.returns_to_go(0.5)
    scaled = ((returns - returns.mean()) / returns.std())[batch.steps]
    advantage = scaled - method.v(features)[..., 0]
    weight = (2 * advantage).exp().clamp(max=3.0).detach()
    expected = (weight * nll(method.pi(features), room.actions[batch.steps])).mean() + advantage.square().mean()
    assert weight.max() == 3.0  # the clip is met
    assert method.loss(room)[0].item() == pytest.approx(expected.item(), rel=1e-5)


def test_ad_loss(room):
    method = make("ad", room, episodes=2)
    h = draw(method, room)
    expected = nll(method.pi(method.features(h)), h.action).mean()
    assert method.loss(room)[0].item() == pytest.approx(expected.item(), rel=1e-5)
    assert h.state.shape == (4, 24, 2)
    assert torch.equal(h.next_state[:, :11], h.state[:, 1:12])


def test_ic_iql_loss_leaves_out_the_ends_of_episodes(room):
    method = make("ic_iql", room, episodes=2, iql=IQL(discount=0.8, inverse_temperature=1.0))
    assert isinstance(method, ICIQL)
    h = draw(method, room)
    features = method.features(h)
    keep = torch.ones(24, dtype=torch.bool)
    keep[[11, 23]] = False  # their next token is not their next state
    here, following = features[:, keep], features[:, torch.arange(24)[keep] + 1]
    paired = here + method.embed_action(F.one_hot(h.action[:, keep], 5).float())
    losses = iql_losses(
        nll(method.pi(here), h.action[:, keep]),
        method.v(here)[..., 0],
        torch.cat([q(paired) for q in method.q], -1),
        torch.cat([q(paired) for q in method.target_q], -1),
        method.v(following)[..., 0],
        h.reward[:, keep],
        torch.zeros(4, 22, dtype=torch.bool),
        IQL(discount=0.8, inverse_temperature=1.0),
    )
    assert method.loss(room)[0].item() == pytest.approx(sum(losses).item(), rel=1e-5)


def test_dicp_loss(room):
    method = make("dicp", room, episodes=2, discount=0.5)
    assert isinstance(method, DICP)
    h = draw(method, room)
    features = method.features(h)
    out = method.dynamics(features + method.embed_action(F.one_hot(h.action, 5).float()))
    returns = room.returns_to_go(0.5)
    after = (returns[h.steps] - h.reward) / returns.std()
    expected = (
        nll(method.pi(features), h.action).mean()
        + (out[..., 0] - h.reward).square().mean()
        + (out[..., 1] - after).square().mean()
        + (out[..., 2:] - (h.next_state - h.state) / room.states.std(0, correction=0)).square().mean()
    )
    assert method.loss(room)[0].item() == pytest.approx(expected.item(), rel=1e-5)


class Known(nn.Module):
    """Dynamics of which the truth is known: action a pays `reward[a]`, then `after[a]`; the state stays."""

    def __init__(self, reward, after):
        super().__init__()
        self.reward, self.after = torch.tensor(reward), torch.tensor(after)

    def forward(self, x):
        a = x[..., :5].argmax(-1)
        zeros = torch.zeros_like(self.reward[a])
        return torch.stack([self.reward[a], self.after[a], zeros, zeros], -1)


def test_dicp_plans_by_reward_and_what_comes_after(room):
    method = make("dicp", room, episodes=2, depth=1, beam=64)  # any action is among so many samples
    method.embed_action = nn.Linear(5, 16, bias=False)
    nn.init.zeros_(method.embed_action.weight)
    method.embed_action.weight.data[:5] = 100 * torch.eye(5)  # the action can be read off, whatever the features
    method.return_scale.fill_(1.0)
    features, state = torch.randn(3, 16), torch.zeros(3, 2)
    _, memory = method.trunk(torch.zeros(3, 1, 2), method.nothing(3)[:, None])
    method.dynamics = Known([0.0, 1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.5, 0.0])
    assert method.decide(features, memory, state).tolist() == [3, 3, 3]
    method.dynamics = Known([0.0, 2.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.5, 0.0])
    assert method.decide(features, memory, state).tolist() == [1, 1, 1]
    method.config = replace(method.config, depth=3)  # then the policy's likeliest action twice, the same for all
    assert method.decide(features, memory, state).tolist() == [1, 1, 1]


def test_idt_draws_different_episodes_of_one_task(room):
    """Six episodes a task, in histories of two: a context of five is not consecutive ones of one history."""
    data = replace(room, history=2)
    method = make("idt", data, episodes=5)
    torch.manual_seed(0)
    tasks = torch.arange(12).repeat(40)
    drawn = method.draw_context(data, tasks)
    assert (data.tasks[drawn] == tasks[:, None]).all()
    assert (drawn.sort(1).values.diff(dim=1) > 0).all()
    assert torch.bincount(drawn.flatten(), minlength=72).min() > 15  # of 33 expected
    with pytest.raises(ValueError, match="wanted 7 of each task, one has 6"):
        make("idt", data, episodes=7)
    with pytest.raises(ValueError, match="wanted 4 in a row, a history has 2"):
        make("ad", data)


def test_histories_do_not_cut_episodes(room):
    with pytest.raises(ValueError, match="horizon: wanted the episodes' length, up to 12 steps, got 8"):
        make("ad", room, horizon=8)


def test_idt_sorts_episodes_and_wants_the_best_return(room):
    reward = torch.tensor([[3.0, 0.0, 1.0, 0.0, 0.0, 2.0]])
    steps = torch.arange(6)[None]
    h = History(steps[..., None].float(), steps, reward, steps[..., None].float(), steps)
    assert sort_episodes(h, 3).steps.tolist() == [[2, 3, 4, 5, 0, 1]]
    assert sort_episodes(h, 3).reward.tolist() == [[1, 0, 0, 2, 3, 0]]
    method = make("idt", room)
    assert method.best.item() == room.rewards.view(-1, 12).sum(1).max().item()


def test_idt_loss(room):
    method = make("idt", room, episodes=2)
    h = sort_episodes(draw(method, room), 2)
    left = room.returns_to_go(1.0)[h.steps]
    decisions, _ = method.decide_all(h, left)
    total = 0.0
    for t in range(24):
        total += nll(
            method.pi(decisions[:, t // 4] + method.embed_state(method.normal(h.state[:, t]))), h.action[:, t]
        ).mean()
    assert method.loss(room)[0].item() == pytest.approx(total.item() / 24, rel=1e-5)


def test_idt_decides_as_it_was_trained(room):
    """Fed with the steps of a context, the agent's decisions are those of the whole context."""
    method = make("idt", room, episodes=2)
    first, last = room.begins[0], room.begins[1] + 12
    steps = torch.arange(first, last)[None]
    h = History(room.states[steps], room.actions[steps], room.rewards[steps], room.next_states[steps], steps)
    left = room.returns_to_go(1.0)[steps].clone()
    left[:, 12:] = method.best - F.pad(h.reward[:, 12:-1].cumsum(1), (1, 0))  # the agent wants the best of the last one
    whole, _ = method.decide_all(h, left)
    agent = method.agent(1)
    for t in range(24):
        if t % 12 == 0:
            agent.begin()
        agent.act(h.state[:, t])
        if t >= 12:
            assert (agent.decision - whole[:, t // 4]).abs().max() < 1e-5 * whole.abs().max()
        agent.observe(h.state[:, t], h.action[:, t], h.reward[:, t], h.next_state[:, t])


@pytest.mark.parametrize("mixer", ["softmax", "gla"])
def test_a_history_agent_sees_what_training_shows(room, mixer):
    method = make("ad", room, mixer, episodes=3)
    steps = torch.arange(36)[None]
    h = History(room.states[steps], room.actions[steps], room.rewards[steps], room.next_states[steps], steps)
    whole = method.features(h)
    seen = []
    method.decide = lambda features, memory, state: seen.append(features) or torch.zeros(1, dtype=torch.int64)
    agent = method.agent(1)
    for t in range(36):
        if t % 12 == 0:
            agent.begin()
        agent.act(h.state[:, t])
        agent.observe(h.state[:, t], h.action[:, t], h.reward[:, t], h.next_state[:, t])
    assert (torch.stack(seen, 1) - whole).abs().max() < 1e-5 * whole.abs().max()
    seen.clear()
    agent.begin()  # the fourth episode: the context goes on with the newest two
    agent.act(h.state[:, 0])
    shifted = History(*(torch.cat([x[:, 12:], x[:, :12]], 1) for x in h))
    assert (seen[0] - method.features(shifted)[:, 24]).abs().max() < 1e-5 * whole.abs().max()


@pytest.mark.parametrize("mixer", ["softmax", "gla"])
@pytest.mark.parametrize("name", RIVALS)
def test_every_rival_trains_and_acts(room, name, mixer):
    method = make(name, room, mixer)
    loss, metrics = method.loss(room)
    loss.backward()
    assert math.isfinite(metrics["loss"])
    assert all(p.grad is not None for p in method.parameters() if p.requires_grad)
    returns = few_shot(method, ROOM.environments(), 6, seed=3)
    assert returns.shape == (4, 6)
    assert torch.equal(returns, few_shot(method, ROOM.environments(), 6, seed=3))


@pytest.mark.parametrize("name", ["dpt", "ad", "idt"])
def test_a_given_episode_is_the_context_of_the_first(room, name):
    method = make(name, room)
    prompts = room.reorder(room.episodes[:4, 0] + 3, torch.arange(4))
    agent = method.agent(4)
    method.agent = lambda batch: agent
    shown = []
    begin = agent.begin
    agent.begin = lambda: (shown.append(list(agent.episode.steps)), begin())
    returns = few_shot(method, ROOM.environments(), 1, prompts=prompts)
    assert returns.shape == (4, 1)
    (none, given) = shown
    assert not none
    states, actions, rewards, following = (torch.stack(x, 1) for x in zip(*given, strict=True))
    assert torch.equal(states, prompts.states.view(4, 12, 2))
    assert torch.equal(actions, prompts.actions.view(4, 12))
    assert torch.equal(rewards, prompts.rewards.view(4, 12))
    assert torch.equal(following, prompts.next_states.view(4, 12, 2))
    with pytest.raises(ValueError, match="prompts: wanted an episode of 12 steps in each of 4 tasks"):
        few_shot(method, ROOM.environments(), 1, prompts=room)


class Odometer(gymnasium.Env):
    """The state counts steps from a start of its own seed; the reward is the action; one that is given `end` ends there."""

    observation_space = gymnasium.spaces.Box(-1e6, 1e6, (1,))
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,))

    def __init__(self, end=None):
        self.end = end

    def reset(self, *, seed=None, options=None):
        self.seeded, self.steps = seed, 0
        return np.array([seed or 0.0], np.float32), {}

    def step(self, action):
        self.steps += 1
        state = np.array([(self.seeded or 0) + self.steps], np.float32)
        return state, float(action[0]), self.steps == self.end, self.steps == 3, {}


def test_few_shot_shows_agents_what_happened():
    seen = []

    class Fake(nn.Module):
        config = MethodConfig(horizon=3)
        device = torch.device("cpu")

        def agent(self, batch):
            return self

        def begin(self):
            seen.append([])

        def act(self, state):
            return torch.tensor([[0.5], [7.0]])

        def observe(self, *step):
            seen[-1].append(step)

    envs = gymnasium.vector.SyncVectorEnv(
        [Odometer, lambda: Odometer(end=2)], autoreset_mode=gymnasium.vector.AutoresetMode.SAME_STEP
    )
    returns = few_shot(Fake(), envs, 2, seed=0)
    assert returns.tolist() == [[1.5, 1.5], [2.0, 2.0]]  # 7 is cut off at 1, and nothing counts after an end
    for e, episode in enumerate(seen):
        for t, (state, action, reward, following) in enumerate(episode):
            assert action.tolist() == [[0.5], [1.0]]
            assert reward.tolist() == [0.5, 1.0]
            assert (state[0].item(), following[0].item()) == (2 * e + t, 2 * e + t + 1)  # its last next state, too
        assert episode[1][3][1].item() == 2 * e + 1 + 2
    assert len(seen) == 2


def test_refuses(room):
    with pytest.raises(ValueError, match="labels"):
        make("dpt", replace(room, optimal=None), labels="optimal")
    with pytest.raises(ValueError, match="wanted 7 in a row"):
        make("ad", room, episodes=7)
    with pytest.raises(ValueError, match="span"):
        IDTConfig(horizon=12, span=5)
    with pytest.raises(ValueError, match="depth"):
        DICPConfig(depth=0)
    with pytest.raises(ValueError, match="episodes"):
        HistoryConfig(episodes=0)
    with pytest.raises(ValueError, match="uses none"):
        make_method("ad", HistoryConfig(), Spaces.of(room), world_model="one")
    with pytest.raises(ValueError, match="method: wanted"):
        make_method("bc", HistoryConfig(), Spaces.of(room))
    with pytest.raises(ValueError, match="horizon"):
        make("dit", small(), horizon=3)


@pytest.mark.parametrize("mixer", ["softmax", "gla"])
def test_imagination_leaves_the_agents_memory_alone(room, mixer):
    """DICP's plan goes on from the memory of what happened, and so does another plan after it."""
    method = make("dicp", room, mixer, episodes=2, beam=1)
    agent = method.agent(3)
    agent.begin()
    state = room.states[:3]
    agent.act(state)
    before = tree_map(lambda t: t.clone(), agent.memory.layers)
    with torch.no_grad():
        method.decide(torch.randn(3, 16), agent.memory, state)
    for a, b in zip(tree_leaves(before), tree_leaves(agent.memory.layers), strict=True):
        assert torch.equal(a, b)


def test_few_shot_refuses_no_episodes(room):
    with pytest.raises(ValueError, match="episodes: wanted at least 1, got 0"):
        few_shot(make("ad", room), ROOM.environments(), 0)


@pytest.mark.parametrize(("values", "wanted"), [([3.0], 1.0), ([2.0, 2.0], 1e-6), ([0.0, 2.0], 2**0.5)])
def test_the_deviation_of_few_values(values, wanted):
    assert float(deviation(torch.tensor(values))) == pytest.approx(wanted)


ONE = {"dpt": {}, "dit": {}, "sicql": {"stride": 1}, "idt": {"episodes": 1, "span": 1}}
ONE |= {name: {"episodes": 1} for name in ("ad", "dicp", "ic_iql")}


@pytest.mark.parametrize("method", ONE)
def test_one_step_of_one_episode_of_one_task(method, tmp_path):
    loop = {"updates": 1, "checkpoint_every": 1, "evaluate_every": 1, "device": "cpu"}
    trunk = {"width": 16, "layers": 1, "heads": 1}
    run = {"data": {"size": 4, "horizon": 1, "train_goals": 1, "episodes": 1, "history": 1}, "judged_episodes": 1}
    run |= {"settings": {"batch": 1, "trunk": trunk, **ONE[method]}, "world_model": {"window": 1}}
    run |= {"loop": loop, "world_loop": loop, "world_batch": 1}
    (tmp_path / "c.json").write_text(json.dumps(run))
    args = ["train", "offline", "--method", method, "--config", tmp_path / "c.json", "--out", tmp_path / "run"]
    assert main([*map(str, args), "--evaluate", "1"]) == 0
