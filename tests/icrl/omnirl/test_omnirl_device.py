"""OmniRL on a device that is not the CPU: no op meets tensors of two, and nothing is made without saying where."""

from dataclasses import replace

import pytest
import torch
from devices import DIFFERENTIABLE, FAKES, ExplicitDevices, fake_device, faked

from icrl.commands import demo
from icrl.omnirl import evaluate
from icrl.omnirl.agent import Agent
from icrl.omnirl.distill import DPDConfig, draw_references, make_records, sample_tasks
from icrl.omnirl.tokens import Tokens
from icrl.omnirl.value_iteration_network import ValueIterationNetwork, ValueIterationNetworkConfig
from icrl.omnirl.value_iteration_training import (
    Targets,
    ValueIterationLearner,
    ValueIterationTraining,
    loss_of,
    targets_of,
    tokens_of,
)
from icrl.training.config import LoopConfig
from icrl.training.loop import gradient, optimizers, take_step
from icrl.worlds import sample_anymdp, sample_pomdp

TINY = ValueIterationTraining(
    model=ValueIterationNetworkConfig(
        layers=1, action_width=8, state_width=12, value_width=4, action_hidden=8, state_hidden=12, pool_heads=1
    ),
    data=DPDConfig(batch=4, steps=24),
    segment=12,
    dagger=0.5,
    dagger_from=1,
    dagger_every=2,
    dagger_records=4,
    evaluation_tasks=2,
    evaluation_steps=20,
)
CPU = LoopConfig(updates=2, device="cpu")
B, T, G = 3, 8, TINY.model.policies


def batch(device, length=T):
    ids = torch.zeros(B, length, dtype=torch.int64, device=device)
    table = torch.zeros(B, length, 5, G, device=device)
    return Tokens(ids, ids, ids, torch.zeros(B, length, device=device), ids, ids), Targets(table, table)


@pytest.mark.parametrize("name", FAKES)
def test_forward_loss_and_step_of_the_model(name):
    model = ValueIterationNetwork(TINY.model)
    with fake_device(name) as device, torch.no_grad():
        faked(model, device)
        tokens, targets = batch(device)
        output, state = model(tokens, model.initial_state(B, 8))
        loss, metrics = loss_of(output, targets, TINY)
        assert {t.device.type for t in (loss, *metrics.values(), state.transition, state.count)} == {name}
        output, _ = model.step(batch(device, 1)[0], state)
        assert output.readouts[-1].logits.device.type == name


@pytest.mark.parametrize("muon", [0.0, 0.01])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_the_learner_trains_on_its_device(name, muon):
    loop = replace(CPU, muon_learning_rate=muon)
    learner = ValueIterationLearner(TINY, loop)
    with fake_device(name) as device:
        learner.model, learner.device = faked(learner.model, device), device
        made, parameters = optimizers(learner, loop), list(learner.model.parameters())
        segments = 0
        for loss, metrics in learner.segments(*batch(device, 24)):
            norm = gradient(loss, parameters, loop.clip)
            assert {t.device.type for t in (loss, norm, *metrics.values(), *(p.grad for p in parameters))} == {name}
            assert loss.dtype == torch.float32
            take_step(made)
            segments += 1
        assert segments == 2


def test_training_makes_no_tensor_without_a_device():
    """Batches, labels, the model's own records, losses, steps and the evaluation."""
    learner = ValueIterationLearner(TINY, CPU)
    made, parameters = optimizers(learner, CPU), list(learner.model.parameters())
    with ExplicitDevices():
        for update in range(2):
            for loss, _ in learner.losses(update):
                gradient(loss, parameters, CPU.clip)
                take_step(made)
        learner.evaluate()
        learner.load_state_dict(learner.state_dict())
    learner.stream.close()


def test_worlds_labels_and_evaluation_make_no_tensor_without_a_device():
    data = replace(TINY.data, tasks={"anymdp": 1.0, "garnet": 1.0, "bandit": 1.0})
    model = ValueIterationNetwork(TINY.model)
    pomdp = sample_pomdp(2, 8, 5, seed=0, num_observations=9)
    with ExplicitDevices():
        tasks = sample_tasks(data, 6, 3)
        records = make_records(data, tasks, seed=1)
        draw_references(data, records, seed=2)
        tokens_of(records), targets_of(records, TINY)
        anymdp = sample_anymdp(4, 16, seed=5)
        reference = evaluate.references(anymdp, 500)
        evaluate.scores(evaluate.run_agent(model, anymdp, 20), reference, 0, 20)
        for name in evaluate.BASELINES:
            evaluate.run_baseline(anymdp, name, 20, 0)
        evaluate.run_agent(model, pomdp, 5)
        demo.run_classic(model, next(iter(demo.CLASSIC.values())), 2, 5, 0)


def test_an_agent_acts_on_its_models_device():
    model = ValueIterationNetwork(TINY.model).to("meta")  # another device than that of what it is given
    agent = Agent(model, 2, 8, num_actions=torch.tensor([3, 5]))
    action = agent.act(torch.zeros(2, dtype=torch.int64))
    assert action.device.type == "meta"
    agent.observe(torch.zeros(2), torch.zeros(2, dtype=torch.uint8))
    agent.act(torch.zeros(2, dtype=torch.int64))


def test_autocast_keeps_states_and_tables_in_float32():
    torch.manual_seed(0)
    model = ValueIterationNetwork(TINY.model)
    ids = torch.randint(0, 5, (B, 600), generator=torch.Generator().manual_seed(0))
    zeros = torch.zeros_like(ids)
    tokens = Tokens(
        ids, zeros, zeros, torch.rand(B, 600), zeros, zeros
    )  # one transition, more often than bfloat16 counts
    plain, wanted = model(tokens, model.initial_state(B, 5))
    with torch.autocast("cpu", torch.bfloat16):
        half, state = model(tokens, model.initial_state(B, 5))
    assert all(t.dtype == torch.float32 for t in (state.transition, *state.values, *state[2:]))
    assert torch.equal(state.transition, wanted.transition)
    a, b = plain.readouts[-1].q, half.readouts[-1].q.float()
    assert 0 < (a - b).norm() < 0.05 * a.norm()
