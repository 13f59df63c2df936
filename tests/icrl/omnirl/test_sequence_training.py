"""OmniRL's learner: losses, stages, exact resume, refusals; and that it learns."""

import json
import math
import time
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from devices import ExplicitDevices

from icrl.cli import main
from icrl.omnirl.distill import DPDConfig, make_batch, sample_tasks
from icrl.omnirl.evaluate import mean_ci, normalized, references, run_agent
from icrl.omnirl.model import OmniRL, OmniRLConfig, Output, World
from icrl.omnirl.tags import START, UNKNOWN
from icrl.omnirl.targets import (
    Targets,
    Transitions,
    next_transitions,
    previous_transitions,
    targets_of,
    tokens_of,
)
from icrl.omnirl.training import Asked, OmniRLLearner, OmniRLTraining, Stage, loss_of, read_config, renumbered
from icrl.training import checkpoint
from icrl.training.config import LoopConfig
from icrl.training.loop import gradient, optimizers, take_step, train

MODEL = OmniRLConfig(actions=3, states=16, width=48, layers=1, heads=3, head_dim=10, hidden=16, code=10)
TINY = OmniRLTraining(
    model=MODEL,
    data=DPDConfig(actions=3),
    stages=(Stage(0.5, 8, 8, 4, 12, 6), Stage(0.5, 8, 12, 3, 20, 10)),
    dagger=0.5,
    dagger_every=2,
    dagger_records=4,
    evaluation_tasks=2,
    evaluation_states=12,
    evaluation_steps=20,
    bandit_steps=10,
)
LOOP = LoopConfig(updates=8, checkpoint_every=2, evaluate_every=8, log_every=1, warmup=2)
PROMPTED = replace(
    TINY,
    model=replace(MODEL, layout="interleaved", addressed=False, policy="prompted"),
    observation_dropout=0.2,
    position_steps=5,
    squared=True,
)


class Killed(Exception):
    pass


def run(out, training=TINY, loop=LOOP, kill_at=None):
    learner = OmniRLLearner(training, loop)
    if kill_at is not None:
        losses = learner.losses

        def until(update):
            if update == kill_at:
                raise Killed
            return losses(update)

        learner.losses = until
    return train(learner, loop, out)


@pytest.mark.parametrize("training", [TINY, PROMPTED], ids=["fused", "interleaved"])
def test_a_killed_run_resumes_bit_for_bit(tmp_path, training):
    whole = checkpoint.load(run(tmp_path / "whole", training))[0]
    with pytest.raises(Killed):
        run(tmp_path / "killed", training, kill_at=7)  # in the second stage, after a collection of own records
    torch.manual_seed(123)  # another process's random state
    resumed = checkpoint.load(run(tmp_path / "killed", training))[0]
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name
    logs = [(tmp_path / f / "metrics.jsonl").read_text().splitlines() for f in ("whole", "killed")]
    for a, b in zip(*logs, strict=True):
        one, two = json.loads(a), json.loads(b)
        assert {k: v for k, v in one.items() if k != "seconds"} == {k: v for k, v in two.items() if k != "seconds"}


def test_stages():
    learner = OmniRLLearner(TINY, LOOP)
    for update, (records, steps, segments) in ((0, (4, 12, 2)), (3, (4, 12, 2)), (4, (3, 20, 2)), (7, (3, 20, 2))):
        learner.load_state_dict({**learner.state_dict(), "stream": {"seed": 0, "next_batch": update}})
        assert learner.records(update).action.shape == (records, steps)
        learner.load_state_dict({**learner.state_dict(), "stream": {"seed": 0, "next_batch": update}})
        assert len(list(learner.losses(update))) == segments
    learner = OmniRLLearner(TINY, LOOP)
    first = learner.records(0)
    wanted = make_batch(TINY.staged(0).data, 0, 0)
    assert all(torch.equal(a, b) for a, b in zip(first, wanted, strict=True))
    assert learner.own is None
    learner.records(2)
    assert learner.own.action.shape == (4, 12)
    learner.load_state_dict({**learner.state_dict(), "stream": {"seed": 0, "next_batch": 5}})
    learner.records(5)  # records of another length are collected anew
    assert learner.own.action.shape == (4, 20)


def test_renumbered_observations():
    records = make_batch(DPDConfig(batch=6, steps=40, states=10), 1, 0)
    other = renumbered(records, 10, 128)
    assert other.observation.max() > 9
    for a, b in zip(records.observation, other.observation, strict=True):
        pairs = {(int(x), int(y)) for x, y in zip(a, b, strict=True)}
        assert len(pairs) == len({x for x, _ in pairs}) == len({y for _, y in pairs})
    assert all(torch.equal(a, b) for a, b in zip(records[1:], other[1:], strict=True))


def test_transitions():
    records = make_batch(DPDConfig(batch=3, steps=30, states=8), 1, 0)
    records.done[:, 10], records.done[:, 11] = 1, 2
    after, before = next_transitions(records), previous_transitions(tokens_of(records))
    for name in ("action", "reward", "done", "observation", "seen"):  # one list, a step apart
        assert torch.equal(getattr(after, name)[:, :-1], getattr(before, name)[:, 1:]), name
    assert torch.equal(after.action, records.action)
    assert after.happened.all()
    assert torch.equal(after.seen[:, :-1], records.done[:, :-1] == 0)
    assert not after.seen[:, -1].any()
    assert not before.happened[:, 0].any()
    assert not before.seen[:, 0].any()
    assert before.happened[:, 1:].all()
    assert (before.done[:, 0] == START).all()


def test_the_loss_is_its_formula():
    torch.manual_seed(0)
    B, T, A, G, S = 2, 5, 3, 5, 16
    model = OmniRL(MODEL)
    output = Output(
        torch.randn(B, T, A, G),
        World(torch.randn(B, T, S), torch.randn(B, T), torch.randn(B, T)),
        torch.rand(B, T) + 0.5,
    )
    policy = torch.rand(B, T, A, G).softmax(2)
    done = torch.tensor([[0, 1, 2, 0, 0], [0, 0, 0, 1, 0]])
    seen = done == 0
    transitions = Transitions(
        torch.randint(A, (B, T)), torch.randn(B, T), done, torch.randint(S, (B, T)), torch.ones_like(seen), seen
    )
    position = torch.tensor([0.1, 0.4, 1.0, 1.0, 1.0])
    asked = Asked(Targets(policy, policy), transitions, torch.zeros(B, T, dtype=torch.int64), position)
    loss, logged = loss_of(model, output, asked, TINY, 0.3)
    total, weight, parts = 0.0, 0.0, {"observation": [0.0, 0.0], "reward": 0.0, "done": 0.0}
    for b in range(B):
        for t in range(T):
            w = float(position[t])
            weight += w
            for g, own in enumerate(TINY.policy_weights):
                total += w * own * float(-(policy[b, t, :, g] * output.logits[b, t, :, g].log_softmax(0)).sum())
            if seen[b, t]:
                parts["observation"][0] -= w * float(
                    output.world.observation[b, t].log_softmax(0)[transitions.observation[b, t]]
                )
                parts["observation"][1] += w
            e = abs(float(output.world.reward[b, t] - transitions.reward[b, t] / output.reward_scale[b, t]))
            parts["reward"] += w * (0.5 * e * e if e < 1 else e - 0.5)
            p = float(output.world.done[b, t].sigmoid())
            parts["done"] -= w * math.log(p if done[b, t] == 1 else 1 - p)
    world = parts["observation"][0] / parts["observation"][1] + (parts["reward"] + parts["done"]) / weight
    assert float(loss) == pytest.approx(total / weight + 0.3 * world, rel=1e-5)
    assert float(logged["loss"]) == pytest.approx(float(loss))
    assert {"policy_0", "explorer", "observation", "reward", "done"} <= logged.keys()


def test_the_prompted_loss_is_the_entropy_of_what_was_asked():
    records = make_batch(PROMPTED.staged(0).data, 3, 0)
    learner = OmniRLLearner(replace(PROMPTED, observation_dropout=0.0, position_steps=0, prompt_mask=1.0), LOOP)
    c = learner.at(0)
    targets = targets_of(records, c)
    torch.manual_seed(5)
    asked, told = learner._prompts(c, *records.action.shape)
    assert (told == UNKNOWN).all()
    torch.manual_seed(5)
    _, logged = next(iter(learner.segments(records, targets, c, 0.0)))
    tokens = tokens_of(records)
    part = type(tokens)(*(x[:, : c.segment] for x in tokens))
    output, _ = learner.model(part, learner.model.initial_state(4))
    chosen = targets.policy.gather(3, asked[:, :, None, None].expand(-1, -1, 3, 1))[:, : c.segment, :, 0]
    wanted = -(chosen * F.log_softmax(output.logits[..., 0], 2)).sum(2).mean()
    torch.testing.assert_close(logged["policy"], wanted.detach(), rtol=1e-5, atol=1e-6)


def test_the_world_model_counts_less_later():
    learner = OmniRLLearner(replace(TINY, world_until=0.5, policy_weights=(0.0,) * 5), LOOP)
    for update, weight in ((3, 1.0), (4, 0.3)):
        learner.load_state_dict({**learner.state_dict(), "stream": {"seed": 0, "next_batch": update}})
        for _, logged in learner.losses(update):
            world = sum(float(logged[name]) for name in ("observation", "reward", "done"))
            assert float(logged["loss"]) == pytest.approx(weight * world, rel=1e-5)


REFUSED = {
    "states": ({"stages": (Stage(1.0, 8, 20),)}, "states: the model has 16 observations, the data 20"),
    "evaluation": ({"evaluation_states": 17}, "evaluation_states: wanted at most the model's 16, got 17"),
    "actions": ({"data": DPDConfig(actions=4)}, "actions: the model has 3, the data 4"),
    "weights": ({"policy_weights": (1.0,)}, "policy_weights: wanted 5 of them"),
    "signs": ({"policy_weights": (-1.0, 1.0, 1.0, 1.0, 1.0)}, "policy_weights: wanted at least 0 each"),
    "nothing asked": (
        {"policy_weights": (0.0,) * 5, "model": replace(MODEL, policy="prompted")},
        "policy_weights: wanted at least 0 each, and not all 0",
    ),
    "shares": ({"stages": (Stage(0.5), Stage(0.4))}, "stages: wanted shares that sum to 1"),
    "records": ({"records": "somewhere"}, "records: wanted none with stages"),
    "dagger": ({"dagger": 1.0}, r"dagger: wanted a share in \[0, 1\), got 1.0"),
    "vectors": ({"model": replace(MODEL, channels=3)}, "channels: records have observations by number"),
    "dropout": ({"observation_dropout": 1.5}, r"observation_dropout: wanted a number in \[0, 1\], got 1.5"),
    "negative": ({"done_weight": -1.0}, "done_weight: wanted at least 0, got -1.0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_configurations_are_refused(case):
    over, match = REFUSED[case]
    with pytest.raises(ValueError, match=match):
        replace(TINY, **over)


def test_read_config():
    training, loop = read_config({"training": {"stages": [{"share": 1.0, "states": 12}]}, "loop": {"updates": 3}})
    assert training.stages == (Stage(1.0, 8, 12),)
    assert (loop.updates, loop.muon_learning_rate) == (3, 0.02)
    for given, match in (
        ({"training": {"stages": [{"sharp": 1.0}]}}, r"training.stages\[0\] has no sharp"),
        ({"training": {"stages": [3]}}, r"training.stages\[0\]: wanted an object"),
        ({"training": {"stages": [{"share": 0.0}]}}, "share: wanted a share of the updates"),
        ({"model": {}}, "config: there is no model"),
    ):
        with pytest.raises(ValueError, match=match):
            read_config(given)


def test_the_published_configuration():
    c, loop = read_config({}, "published")
    assert (loop.learning_rate, loop.muon_learning_rate) == (2e-4, 0.0)
    assert (c.observation_weight, c.reward_weight, c.prompted_weight) == (0.4, 0.4, 0.2)
    assert (c.data.steps, c.segment, c.position_steps, c.observation_dropout) == (12_000, 2048, 512, 0.15)


@pytest.mark.parametrize("training", [TINY, PROMPTED], ids=["fused", "interleaved"])
def test_training_makes_no_tensor_without_a_device(training):
    learner = OmniRLLearner(training, replace(LOOP, device="cpu"))
    made, parameters = optimizers(learner, LOOP), list(learner.model.parameters())
    with ExplicitDevices():
        for update in (0, 4):
            learner.load_state_dict({**learner.state_dict(), "stream": {"seed": 0, "next_batch": update}})
            for loss, _ in learner.losses(update):
                gradient(loss, parameters, LOOP.clip)
                take_step(made)
        learner.evaluate()
    learner.stream.close()


@pytest.mark.gpu
@pytest.mark.parametrize("training", [TINY, PROMPTED], ids=["fused", "interleaved"])
def test_a_run_on_a_gpu(tmp_path, training):
    rows = {}
    for device in ("cpu", "cuda"):
        run(tmp_path / device, training, replace(LOOP, device=device, updates=3, checkpoint_every=3, evaluate_every=3))
        rows[device] = [json.loads(x) for x in (tmp_path / device / "metrics.jsonl").read_text().splitlines()]
    for a, b in zip(rows["cpu"][:3], rows["cuda"][:3], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-2)


def test_command(tmp_path, capsys):
    config = {
        "training": {
            "model": {
                "actions": 3,
                "states": 16,
                "width": 48,
                "layers": 1,
                "heads": 3,
                "head_dim": 10,
                "hidden": 16,
                "code": 10,
            },
            "data": {"actions": 3, "tasks": {"anymdp": 1.0}},
            "stages": [{"share": 1.0, "states": 12, "records": 4, "steps": 12, "segment": 6}],
            "dagger": 0.0,
            "evaluation_tasks": 2,
            "evaluation_states": 12,
            "evaluation_steps": 10,
        },
        "loop": {"updates": 3, "warmup": 1},
    }
    path = tmp_path / "c.json"
    path.write_text(json.dumps(config))
    args = [
        "train",
        "omnirl",
        "--config",
        str(path),
        "--out",
        str(tmp_path / "run"),
        "--json",
        str(tmp_path / "n.json"),
    ]
    assert main(args) == 0
    assert "score" in json.loads((tmp_path / "n.json").read_text())
    assert isinstance(OmniRL.load(tmp_path / "run" / "model.safetensors"), OmniRL)
    assert (tmp_path / "run" / "curve.png").is_file()
    again = ["train", "omnirl", "--config", str(tmp_path / "run" / "config.json"), "--out", str(tmp_path / "run")]
    assert main([*again, "--updates", "4"]) == 0
    capsys.readouterr()
    assert main([*args, "--seed", "1"]) == 2
    error = capsys.readouterr().err
    assert "holds a run with another configuration (loop.seed: 0 in the run, 1 given)" in error
    assert error.count("\n") == 1


def test_it_learns_to_learn_in_two_minutes(tmp_path):
    """91K parameters, 300 batches of 2,048 steps (35 s on one core): fresh bandits and tasks of 5 to 8 states."""
    training = OmniRLTraining(
        model=OmniRLConfig(states=8, width=64, layers=2, heads=5, head_dim=16, code=16, hidden=64),
        data=DPDConfig(tasks={"garnet": 0.6, "bandit": 0.4}, least_states=5, states=8, batch=32, steps=64),
        stages=(),
        segment=64,
        dagger=0.0,
        evaluation_tasks=2,
        evaluation_states=7,
        evaluation_steps=2,
        bandit_steps=0,
    )
    rates = {"learning_rate": 3e-3, "muon_learning_rate": 0.02, "warmup": 20, "decay": 0.4}
    loop = LoopConfig(updates=300, checkpoint_every=300, evaluate_every=300, **rates)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    begin = time.process_time()
    model = OmniRL.load(train(OmniRLLearner(training, loop), loop, tmp_path / "run"))
    seconds = time.process_time() - begin
    torch.set_num_threads(threads)
    assert seconds < 120
    for kind, steps in (("garnet", 200), ("bandit", 100)):
        tasks = sample_tasks(training.data, 64, 99, kind=kind)
        context = run_agent(model, tasks, steps, seed=1)
        score, interval = mean_ci(normalized(context, references(tasks), steps // 2, steps))
        assert score - interval > 0.3, kind
