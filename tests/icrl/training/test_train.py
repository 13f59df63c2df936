"""The training loop: exact resume, honest schedules, and refusals."""

import json
from dataclasses import replace

import pytest
import torch

from icrl.offline.experiment import OfflineRun
from icrl.omnirl.distill import DPDConfig
from icrl.omnirl.model import OmniRL, OmniRLConfig
from icrl.omnirl.training import OmniRLLearner, OmniRLTraining
from icrl.training import checkpoint
from icrl.training.config import LoopConfig, configured
from icrl.training.loop import rate, train

TINY = OmniRLTraining(
    model=OmniRLConfig(
        layers=1, action_width=8, state_width=12, value_width=4, action_hidden=8, state_hidden=12, pool_heads=1
    ),
    data=DPDConfig(batch=4, steps=24),
    segment=12,
    dagger=0.5,
    dagger_from=2,
    dagger_every=2,
    dagger_records=4,
    evaluation_tasks=2,
    evaluation_steps=20,
)
LOOP = LoopConfig(updates=6, checkpoint_every=2, evaluate_every=6, log_every=1, warmup=2, compile=False)


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


def weights(path):
    return checkpoint.load(path)[0]


def test_a_killed_run_resumes_bit_for_bit(tmp_path):
    whole = weights(run(tmp_path / "whole"))
    with pytest.raises(Killed):
        run(tmp_path / "killed", kill_at=5)  # the last checkpoint is at 4, after a collection of own rollouts
    torch.manual_seed(123)  # another process's random state
    resumed = weights(run(tmp_path / "killed"))
    assert whole.keys() == resumed.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name
    steps = [json.loads(line)["update"] for line in (tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()]
    assert steps[-1] == 6


def test_training_changes_the_weights_and_logs(tmp_path):
    model = weights(run(tmp_path / "run"))
    torch.manual_seed(LOOP.seed)
    fresh = OmniRL(TINY.model).state_dict()
    assert any(not torch.equal(model[k], fresh[k]) for k in fresh)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {"loss", "gradient_norm", "policy_0.5"} <= rows[0].keys()
    assert "score" in rows[-1]
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 2


def test_another_configuration_is_refused_and_the_run_left_alone(tmp_path):
    run(tmp_path / "run")
    before = (tmp_path / "run" / "config.json").read_text()
    with pytest.raises(ValueError, match="another configuration"):
        run(tmp_path / "run", replace(TINY, q_weight=0.1))
    assert (tmp_path / "run" / "config.json").read_text() == before


def test_a_damaged_checkpoint_is_named(tmp_path):
    run(tmp_path / "run")
    newest = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1] / "rank0.safetensors"
    newest.write_bytes(newest.read_bytes()[:1000])
    with pytest.raises(ValueError, match="damaged"):
        run(tmp_path / "run")


def test_rate():
    loop = LoopConfig(updates=100, warmup=10, decay=0.5)
    assert rate(0, loop) == pytest.approx(0.1)
    assert rate(9, loop) == rate(30, loop) == 1.0
    assert rate(75, loop) == pytest.approx(0.51)
    assert rate(99, loop) == pytest.approx(0.03)


def test_configured_refuses():
    assert (
        configured(OmniRLTraining, {"model": {"layers": 2}, "policy_weights": [1, 1, 1, 1, 1]}, "training").model.layers
        == 2
    )
    run = configured(OfflineRun, {"loop": {"updates": 7}}, "run")
    assert run.loop == replace(OfflineRun().loop, updates=7)  # the rest is what this run's loop has, not any loop
    with pytest.raises(ValueError, match=r"training\.model has no depth"):
        configured(OmniRLTraining, {"model": {"depth": 2}}, "training")
    with pytest.raises(ValueError, match="wanted int"):
        configured(LoopConfig, {"updates": "many"}, "loop")


def test_checkpoint_round_trip(tmp_path):
    state = {"a": [torch.arange(3), {"b": 1.5, 7: None}], "t": torch.zeros(0), "s": "x", "flag": True}
    tensors, facts = {}, {}
    checkpoint.flatten("run", state, tensors, facts)
    checkpoint.save(tmp_path / "c", tensors, facts)
    again = checkpoint.unflatten("run", *checkpoint.load(tmp_path / "c"))
    assert torch.equal(again["a"][0], state["a"][0])
    assert again["a"][1] == {"b": 1.5, 7: None}
    assert again["s"] == "x"
    assert again["flag"] is True
    assert again["t"].shape == (0,)


def test_a_kill_during_a_save_costs_nothing(tmp_path):
    whole = weights(run(tmp_path / "whole"))
    with pytest.raises(Killed):
        run(tmp_path / "killed", kill_at=5)
    half = tmp_path / "killed" / "checkpoints" / "00000006.part"
    half.mkdir()
    (half / "rank0.safetensors.part").write_bytes(b"cut short")
    resumed = weights(run(tmp_path / "killed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert not half.exists()
    updates = [
        json.loads(x)["update"] for x in (tmp_path / "killed" / "metrics.jsonl").read_text().splitlines() if "loss" in x
    ]
    assert updates == sorted(set(updates))


def test_a_folder_that_is_no_run_is_left_alone(tmp_path):
    (tmp_path / "model.safetensors").write_text("precious")
    with pytest.raises(ValueError, match="not empty"):
        run(tmp_path)
    assert (tmp_path / "model.safetensors").read_text() == "precious"


@pytest.mark.parametrize(
    "values", [{"updates": -1}, {"checkpoint_every": 0}, {"clip": 0.0}, {"warmup": -1}], ids=lambda v: next(iter(v))
)
def test_loop_refuses(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        LoopConfig(**values)


def test_training_refuses():
    with pytest.raises(ValueError, match="policy_weights"):
        OmniRLTraining(policy_weights=(1.0,))
    with pytest.raises(ValueError, match="segment"):
        OmniRLTraining(segment=0)
    with pytest.raises(ValueError, match="wanted an object"):
        configured(OmniRLTraining, 5, "training")
