"""S-ICQL: its losses against hand-computed ones, its values where Q* is known, its prompts, and what it refuses."""

import math
from dataclasses import replace

import pytest
import torch
from test_trajectories import small

from icrl.models.trunk import TrunkConfig
from icrl.offline.environments.darkroom import DarkRoomData
from icrl.offline.few_shot import few_shot
from icrl.offline.iql import IQL, iql_losses
from icrl.offline.learner import OfflineLearner, load_method, save_method
from icrl.offline.method import Spaces
from icrl.offline.methods.sicql import SICQL, SICQLConfig
from icrl.offline.trajectories import Trajectories
from icrl.offline.world_model import WorldModel, WorldModelConfig, WorldModelLearner
from icrl.training.config import LoopConfig
from icrl.training.loop import train

ROOM = DarkRoomData(size=4, horizon=12, train_goals=12, episodes=4, history=4)
TINY = SICQLConfig(trunk=TrunkConfig(width=16, layers=2, heads=2), horizon=12, batch=4, layout="branch", queries=3)


@pytest.fixture(scope="module")
def room():
    return ROOM.train_data()


def world_model(data, **changes):
    torch.manual_seed(0)
    return WorldModel.of(WorldModelConfig(size=4, hidden=8, **changes), data)


def make(data, config=TINY):
    wm = world_model(data) if config.world_model else None
    torch.manual_seed(1)
    method = SICQL(config, Spaces.of(data), wm)
    method.prepare(data)
    return method


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_losses_by_hand(scale):
    losses = iql_losses(
        imitation=torch.tensor([2.0, 3.0]),
        v=torch.tensor([1.0, 4.0]),
        q=torch.tensor([[1.0, 2.0], [0.0, 5.0]]),
        target_q=torch.tensor([[3.0, 2.5], [3.0, 7.0]]),
        next_v=torch.tensor([2.0, 10.0]),
        reward=torch.tensor([1.0, -1.0]) / scale,
        terminated=torch.tensor([False, True]),
        c=IQL(expectile=0.7, discount=0.5, inverse_temperature=2.0, max_weight=10.0, reward_scale=scale),
    )
    # advantages: min(3, 2.5) - 1 = 1.5 and min(3, 7) - 4 = -1
    assert losses.v.item() == pytest.approx((0.7 * 1.5**2 + 0.3 * 1) / 2)
    # targets: 1 + .5 * 2 = 2, and -1 for the end
    assert losses.q.item() == pytest.approx(((1 + 0) / 2 + (1 + 36) / 2) / 2)
    assert losses.policy.item() == pytest.approx((10.0 * 2 + math.exp(-2) * 3) / 2)  # exp(3) is cut off at 10


def test_gradients_flow_where_they_should():
    leaves = {
        n: torch.tensor([[1.0, 2.0]] if "q" in n else [1.0], requires_grad=True)
        for n in ("v", "q", "target_q", "next_v")
    }
    imitation = torch.tensor([1.0], requires_grad=True)
    losses = iql_losses(
        imitation,
        **leaves,
        reward=torch.ones(1),
        terminated=torch.zeros(1, dtype=torch.bool),
        c=IQL(expectile=0.7, discount=0.9, inverse_temperature=1.0, max_weight=5.0),
    )
    sum(losses).backward()
    assert leaves["v"].grad is not None
    assert leaves["q"].grad is not None
    assert leaves["target_q"].grad is None
    assert leaves["next_v"].grad is None
    assert imitation.grad.item() == pytest.approx(1.0)  # the weight exp(0): the least target is v


def two_state_task(steps=2000):
    """Action 1 in state 0 costs .2 and leads to state 1, where action 0 pays 1 and stays; the others stay put or go back."""
    torch.manual_seed(3)
    following, reward = torch.tensor([[0, 1], [1, 0]]), torch.tensor([[0.0, -0.2], [1.0, 0.0]])
    action = torch.randint(2, (steps,))
    states = [0]
    for a in action.tolist():
        states.append(int(following[states[-1], a]))
    s = torch.tensor(states)
    data = Trajectories(
        "two states",
        2,
        s[:-1, None].float(),
        action,
        reward[s[:-1], action],
        s[1:, None].float(),
        torch.zeros(steps, dtype=torch.bool),
        torch.arange(1, steps // 10 + 1) * 10,
        torch.zeros(steps // 10, dtype=torch.int64),
    )
    return data, following, reward


def test_values_of_a_task_whose_q_is_known():
    data, following, reward = two_state_task()
    discount, omega = 0.8, 0.9
    config = SICQLConfig(
        trunk=TrunkConfig(width=16, layers=1, heads=1),
        horizon=10,
        batch=32,
        layout="branch",
        queries=8,
        world_model=False,
        iql=IQL(discount=discount, expectile=omega, inverse_temperature=10.0, max_weight=50.0, target_rate=0.05),
    )
    method = make(data, config)
    optimizer = torch.optim.AdamW(method.parameters(), 3e-3)
    for step in range(500):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / 500)
        method.before_update()
        loss, _ = method.loss(data)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    # The fixed point that the losses have: V is the ω-expectile of Q over the data's (uniform) actions.
    q = torch.zeros(2, 2)
    for _ in range(300):
        low, high = q.min(1).values, q.max(1).values
        q = reward + discount * ((1 - omega) * low + omega * high)[following]
    best = torch.zeros(2, 2)
    for _ in range(300):
        best = reward + discount * best.max(1).values[following]

    with torch.no_grad():
        memory = method.trunk.remember(method.prompt_tokens(data, torch.arange(10)[None]), [10])
        at = method.trunk.embed_state(method.normal(torch.tensor([[0.0], [1.0]])))
        pairs = at[:, None] + method.embed_action(torch.eye(2))  # [2,2,D]
        features = method.trunk.read(pairs.view(1, 1, 4, -1), memory)
        learned = method.q[0](features).view(2, 2)
        logits = method.pi(method.trunk.read(at.view(1, 1, 2, -1), memory)).view(2, 2)
    spread = q.max() - q.min()
    assert (learned - q).abs().max() < 0.1 * spread, (
        learned,
        q,
    )  # 500 small steps; wrong signs or targets miss by > .3
    assert torch.equal(learned.argmax(1), best.argmax(1))
    assert torch.equal(logits.argmax(1), best.argmax(1))
    assert best.argmax(1).tolist() == [1, 0]


def test_both_layouts_draw_the_same_expectation_of_values(room):
    """query_first asks one transition at all lengths; branch asks as many as there are queries, the last of the full prompt."""
    faithful = make(room, replace(TINY, layout="query_first"))
    batch = faithful.draw(room)
    assert batch.lengths == list(range(13))
    assert batch.steps.shape == (4, 1)
    batch = make(room).draw(room)
    assert batch.lengths[-1] == 12
    assert batch.steps.shape == (4, 3)
    for b in batch.prompt, batch.steps:
        task = torch.searchsorted(room.steps[:, 1].contiguous(), b, right=True)
        assert (task == task[:, :1]).all()
    assert torch.equal(
        torch.searchsorted(room.steps[:, 1].contiguous(), batch.prompt, right=True)[:, 0],
        torch.searchsorted(room.steps[:, 1].contiguous(), batch.steps, right=True)[:, 0],
    )


def test_query_first_is_one_causal_pass_a_query(room):
    method = make(room, replace(TINY, layout="query_first"))
    prompt = method.prompt_tokens(room, torch.arange(24).view(2, 12))
    query = torch.randn(2, 1, 3, 16)
    got = method.trunk.read(query, method.trunk.remember(prompt, [0, 5, 12]))
    x = method.trunk.embed_prompt(prompt)
    for j in range(3):
        y, _ = method.trunk.trunk(torch.cat([query[:, :, j], x], 1), first=0)
        assert (got[:, :, j] - y[:, [0, 5, 12]]).abs().max() < 1e-6 * y.abs().max()


def test_prompts_are_windows_of_their_own_episode(room):
    wm = world_model(room)
    z = wm.prompts(room, block=100)
    part = slice(24, 36)
    alone = wm.prompt_of(
        room.states[None, part], room.action_features(room.actions[None, part]), room.rewards[None, part]
    )
    assert (alone[0] - z[part]).abs().max() < 1e-5 * z.abs().max()
    changed = replace(room, rewards=room.rewards.index_fill(0, torch.tensor([30]), 5.0))
    moved = (wm.prompts(changed) != z).any(1).nonzero()[:, 0].tolist()
    assert moved == [30, 31, 32, 33]


@pytest.mark.parametrize("encoder", ["gru", "gla", "softmax"])
def test_a_window_does_not_hold_what_it_predicts(room, encoder, monkeypatch):
    wm, step, shown = world_model(room, encoder=encoder), torch.tensor([30]), []
    predict = wm.predict
    monkeypatch.setattr(wm, "predict", lambda z, *given: (shown.append(z), predict(z, *given))[1])
    for changed in ([], [27], [30], [31]):
        data = replace(room, rewards=room.rewards.index_fill(0, torch.tensor(changed, dtype=torch.int64), 5.0))
        assert math.isfinite(wm.loss(data, step)[0])
    plain, before, own, after = shown
    assert torch.equal(plain, own)
    assert torch.equal(plain, after)
    assert not torch.equal(plain, before)


def test_world_model_loss_by_hand(room):
    """Decoders replaced by known ones: the reward's says 2, the state's a change of (1, -1) deviations."""
    wm = world_model(room)
    for decoder, says in ((wm.reward_decoder, [2.0]), (wm.state_decoder, [1.0, -1.0])):
        torch.nn.init.zeros_(decoder[-1].weight)
        decoder[-1].bias.data = torch.tensor(says)
    steps = torch.tensor([0, 30, 47])
    change = (room.next_states - room.states)[steps] / room.states.std(0, correction=0)
    reward_loss = sum((2.0 - float(r)) ** 2 for r in room.rewards[steps]) / 3
    state_loss = sum((1.0 - float(x)) ** 2 + (-1.0 - float(y)) ** 2 for x, y in change) / 6
    loss, parts = wm.loss(room, steps)
    assert parts["reward"] == pytest.approx(reward_loss)
    assert parts["state"] == pytest.approx(state_loss)
    assert loss.item() == pytest.approx(reward_loss + state_loss)


def test_a_world_model_that_predicts_others_of_the_task(room, monkeypatch):
    """Drawn from the window's own task; z is still the window's before the step."""
    wm, steps = world_model(room, others=3), torch.tensor([5, 100, 500])
    drawn = []

    def draw_steps(tasks, each, balanced):
        drawn.append((tasks.tolist(), each, balanced))
        return torch.tensor([[7, 8, 9], [101, 102, 103], [501, 502, 503]])

    monkeypatch.setattr(room, "draw_steps", draw_steps)
    loss, parts = wm.loss(room, steps)
    assert drawn == [([s // (4 * 12) for s in steps.tolist()], 3, 0.5)]  # four episodes of twelve steps a task
    index, seen = room.windows(steps - 1, 4)
    z = wm.encode(
        room.states[index], room.action_features(room.actions[index]), room.rewards[index], seen & (steps > 0)[:, None]
    )
    at = torch.cat([steps[:, None], torch.tensor([[7, 8, 9], [101, 102, 103], [501, 502, 503]])], 1)
    errors = []
    for i in range(3):
        for t in at[i].tolist():
            features = room.action_features(room.actions[t])
            reward, change = wm.predict(z[i], room.states[t], features, room.next_states[t])
            wanted = (room.next_states[t] - room.states[t]) / room.states.std(0, correction=0)
            errors.append([(reward - room.rewards[t]).square().item(), (change - wanted).square().mean().item()])
    r, s = torch.tensor(errors).mean(0).tolist()
    assert (parts["reward"], parts["state"]) == (pytest.approx(r), pytest.approx(s))
    loss.backward()
    assert wm.to_z.weight.grad.abs().sum() > 0


def test_world_model_learns_and_comes_back_from_its_file(room, tmp_path):
    loop = LoopConfig(updates=60, learning_rate=3e-3, muon_learning_rate=0.0, evaluate_every=60, checkpoint_every=60)
    learner = WorldModelLearner(WorldModelConfig(size=4, hidden=16), room, 128, loop, {})
    before = learner.evaluate()
    path = train(learner, loop, tmp_path / "wm")
    assert learner.evaluate()["reward_error"] < 0.7 * before["reward_error"]
    again = WorldModel.load(path)
    assert torch.equal(again.prompts(room), learner.model.prompts(room))
    assert not any(p.requires_grad for p in again.parameters())


def test_a_method_comes_back_from_its_file(room, tmp_path):
    method = make(room)
    save_method(method, tmp_path / "m", updates=0)
    again = load_method(tmp_path / "m")
    assert again.config == method.config
    for (name, a), b in zip(method.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_training_moves_all_but_the_world_model_and_follows_with_the_target(room, tmp_path):
    method = make(room)
    before = {n: p.clone() for n, p in method.named_parameters()}
    loop = LoopConfig(updates=3, warmup=0, evaluate_every=3, checkpoint_every=3)
    train(OfflineLearner(method, room, {}, lambda m: {}), loop, tmp_path / "run")
    for name, p in method.named_parameters():
        moved = not torch.equal(p, before[name])
        assert moved == (not name.startswith("world_model")), name


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({"q_learning": False}, ["v", "q", "target_q"]),
        ({"world_model": False}, []),
        ({"world_model": False, "q_learning": False}, ["v"]),
    ],
    ids=["w/o q", "w/o c", "w/o cq"],
)
def test_ablations(room, changes, missing):
    method = make(room, replace(TINY, **changes))
    loss, metrics = method.loss(room)
    loss.backward()
    assert math.isfinite(metrics["loss"])
    assert (method.world_model is None) == ("world_model" in changes)
    assert not any(hasattr(method, name) for name in missing)


def test_continuous_actions():
    n = 24
    torch.manual_seed(0)
    data = Trajectories(
        "line", 0, torch.randn(n, 3), torch.rand(n, 2), torch.randn(n), torch.randn(n, 3),
        torch.zeros(n, dtype=torch.bool), torch.tensor([12, 24]), torch.tensor([0, 1]),
    )  # fmt: skip
    method = make(data)
    loss, _ = method.loss(data)
    loss.backward()
    agent = method.agent(5)
    agent.begin()
    assert agent.act(torch.randn(5, 3)).shape == (5, 2)
    output, target = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 4.0]])
    assert method.imitation(output, target).tolist() == [2.5]


def test_refuses(room):
    with pytest.raises(ValueError, match="environment 'DarkRoom', the data has 'toy'"):
        world_model(room).check(small())
    with pytest.raises(ValueError, match="horizon: wanted at most the shortest episode's 12 steps, got 13"):
        make(room, replace(TINY, horizon=13))
    with pytest.raises(ValueError, match="window: wanted at most"):
        WorldModelLearner(WorldModelConfig(window=13), room, 4, LoopConfig(), {})
    with pytest.raises(ValueError, match="stride"):
        make(room, replace(TINY, stride=5))
    with pytest.raises(ValueError, match="world_model: wanted none"):
        SICQL(replace(TINY, world_model=False), Spaces.of(room), world_model(room))
    with pytest.raises(ValueError, match="world_model: wanted one"):
        SICQL(TINY, Spaces.of(room))
    for name, value in {
        "layout": "both",
        "queries": 0,
        "balanced": 1.5,
        "batch": 0,
    }.items():
        with pytest.raises(ValueError, match=name):
            replace(TINY, **{name: value})
    for name in ("expectile", "discount", "max_weight", "inverse_temperature", "reward_scale"):
        with pytest.raises(ValueError, match=name):
            IQL(**{name: -1.0})
    with pytest.raises(ValueError, match="target_rate"):
        IQL(target_rate=0.0)
    with pytest.raises(ValueError, match="branch"):
        replace(TINY, layout="query_first", trunk=TrunkConfig(mixer="gla"))
    with pytest.raises(ValueError, match="encoder"):
        WorldModelConfig(encoder="lstm")
    with pytest.raises(ValueError, match="others: wanted at least 0, got -1"):
        WorldModelConfig(others=-1)
    with pytest.raises(ValueError, match="data: wanted"):
        OfflineLearner(make(room), small(), {}, lambda m: {})


def test_a_killed_run_resumes_bit_for_bit(room, tmp_path):
    loop = LoopConfig(updates=6, warmup=2, checkpoint_every=2, evaluate_every=2)

    def run(out, kill_at=None):
        method = make(room)
        learner = OfflineLearner(
            method, room, {}, lambda m: {"return": float(few_shot(m, ROOM.environments(), 2).mean())}
        )
        losses = learner.losses

        def until(update):
            if update == kill_at:
                raise KeyboardInterrupt
            return losses(update)

        learner.losses = until
        return load_method(train(learner, loop, out)).state_dict()

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", kill_at=5)
    torch.manual_seed(99)
    resumed = run(tmp_path / "killed")
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name
