"""The version of the labels: in weights, records and runs; named once where it is another, refused where it would be mixed."""

import json
import warnings
from pathlib import Path

import pytest
import torch

from icrl.cli import main
from icrl.data.shards import read_index, shard_path
from icrl.omnirl import record_shards
from icrl.omnirl.agent import Agent
from icrl.omnirl.checkpoints import shipped
from icrl.omnirl.distill import DPDConfig
from icrl.omnirl.labels import CHANGED, LABELS_VERSION
from icrl.omnirl.record_shards import RecordStream, write_records
from icrl.omnirl.value_iteration_network import ValueIterationNetwork, ValueIterationNetworkConfig
from icrl.omnirl.value_iteration_training import ValueIterationLearner, ValueIterationTraining
from icrl.training import checkpoint
from icrl.training.config import LoopConfig
from icrl.training.loop import train
from icrl_kernels import model_based_q

OLD = Path(__file__).parents[2] / "data" / "written_by_0.1.0.dev"
TINY = ValueIterationNetworkConfig(actions=3, layers=1, action_width=4, state_width=6, value_width=4)
DATA = DPDConfig(batch=2, steps=16, states=8, actions=3)
CONFIG = ValueIterationTraining(model=TINY, data=DATA, segment=16, dagger=0.0, evaluation_tasks=2, evaluation_steps=4)
LOOP = LoopConfig(updates=1, warmup=1, device="cpu")


def labels_of(path):
    return checkpoint.load(path)[1].get("labels")


def test_every_version_says_what_is_different():
    assert sorted(CHANGED) == list(range(1, LABELS_VERSION + 1))


def test_what_version_1_changed():
    """A bandit's rewards count, though each of its steps is truncated: the better arm is the explorer's label."""
    action = torch.tensor([[0, 1, 2] * 8])
    steps = {"state": torch.zeros_like(action), "done": torch.full_like(action, 2)}
    q = model_based_q(action=action, reward=(action == 1).float(), num_states=1, num_actions=3, **steps)
    assert q[0, -1].argmax() == 1


def named(model, times=1):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            Agent(model, 2, 8)
    found = [str(w.message) for w in caught if "labels of version 0" in str(w.message)]
    assert len(found) == times
    return found


@pytest.mark.filterwarnings("ignore:.*its checksum")
def test_acting_with_older_labels_names_it_once(tmp_path):
    (said,) = named(ValueIterationNetwork.load(shipped()))
    assert CHANGED[1] in said
    named(ValueIterationNetwork(TINY), times=0)
    model = ValueIterationNetwork(TINY)
    model.save(tmp_path / "m")
    named(ValueIterationNetwork.load(tmp_path / "m"), times=0)
    older = ValueIterationNetwork.load(OLD / "omnirl" / "model.safetensors")
    older.save(tmp_path / "older")  # which changes no label that they have learned
    assert labels_of(tmp_path / "older") == 0
    named(ValueIterationNetwork.load(tmp_path / "older"))


def test_weights_runs_and_records_have_a_version(tmp_path):
    write_records(tmp_path / "records", DATA, 4, 1, rows_per_shard=2)
    assert [s.labels for s in read_index(tmp_path / "records")[1]] == [LABELS_VERSION] * 2
    assert RecordStream(tmp_path / "records", 2, 0).reader.labels == LABELS_VERSION
    path = train(ValueIterationLearner(CONFIG, LOOP), LOOP, tmp_path / "run")
    assert labels_of(path) == ValueIterationNetwork.load(path).labels == LABELS_VERSION


@pytest.mark.parametrize("labels", ["x", -1, 1.0, None, [1]])
def test_a_version_is_a_number(labels, tmp_path):
    checkpoint.save(
        tmp_path / "m",
        ValueIterationNetwork(TINY).state_dict(),
        {"model": "omnirl", "config": TINY.__dict__, "labels": labels},
    )
    with pytest.raises(ValueError, match="labels: wanted a version"):
        ValueIterationNetwork.load(tmp_path / "m")


def of_version(monkeypatch, version):
    monkeypatch.setattr(record_shards, "LABELS_VERSION", version)


def test_records_of_mixed_versions_are_refused(tmp_path, monkeypatch):
    folder = tmp_path / "records"
    write_records(folder, DATA, 4, 1, rows_per_shard=2, shards=range(1))
    of_version(monkeypatch, LABELS_VERSION + 1)
    with pytest.raises(
        ValueError,
        match=f"out: {folder} holds labels of version {LABELS_VERSION}, and {LABELS_VERSION + 1} would be added",
    ):
        write_records(folder, DATA, 4, 1, rows_per_shard=2)
    write_records(tmp_path / "later", DATA, 4, 1, rows_per_shard=2)
    shard_path(folder, 1).write_bytes(shard_path(tmp_path / "later", 1).read_bytes())
    assert write_records(folder, DATA, 4, 1, rows_per_shard=2).made == 0  # lists what is there
    with pytest.raises(
        ValueError,
        match=rf"shard-00001.safetensors: holds labels of version {LABELS_VERSION + 1}, shard-00000.* of {LABELS_VERSION}",
    ):
        RecordStream(folder, 2, 0)
    monkeypatch.undo()
    with pytest.raises(
        ValueError,
        match=f"records: {tmp_path}/later has labels of version {LABELS_VERSION + 1}: .* knows {LABELS_VERSION}",
    ):
        RecordStream(tmp_path / "later", 2, 0)


def test_records_from_before_versions_hold_the_labels_of_today():
    assert (
        RecordStream(OLD / "records", 2, 0).reader.labels == 0
    )  # optimal values alone; the explorer's are made in training


@pytest.mark.filterwarnings("ignore:.*its checksum")
def test_beginning_from_older_weights_is_refused(tmp_path, capsys):
    older = ValueIterationNetwork(TINY)
    older.labels = 0
    older.save(tmp_path / "older")
    with pytest.raises(
        ValueError, match=f"init: {tmp_path}/older has labels of version 0, training makes .* version {LABELS_VERSION}"
    ):
        ValueIterationLearner(CONFIG, LOOP, tmp_path / "older")
    assert main(["train", "value-iteration-network", "--init", str(shipped()), "--out", str(tmp_path / "run")]) == 2
    assert f"init: {shipped()} has labels of version 0" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    ValueIterationNetwork(TINY).save(tmp_path / "today")
    ValueIterationLearner(CONFIG, LOOP, tmp_path / "today")


def with_labels(run, labels):
    """The run's checkpoint with another version, or none."""
    path = run / "checkpoints" / "00000001" / "rank0.safetensors"
    tensors, facts = checkpoint.load(path)
    state = checkpoint.unflatten("run", tensors, facts)
    del state["learner"]["labels"]
    if labels is not None:
        state["learner"]["labels"] = labels
    tensors, facts = {}, {}
    checkpoint.flatten("run", state, tensors, facts)
    checkpoint.save(path, tensors, facts)


def test_a_run_goes_on_with_its_own_labels_alone(tmp_path):
    train(ValueIterationLearner(CONFIG, LOOP), LOOP, tmp_path / "run")
    longer = LoopConfig(updates=2, warmup=1, device="cpu")
    with_labels(tmp_path / "run", LABELS_VERSION + 1)
    with pytest.raises(
        ValueError,
        match=f"the run has labels of version {LABELS_VERSION + 1}, training makes labels of version {LABELS_VERSION}",
    ):
        train(ValueIterationLearner(CONFIG, longer), longer, tmp_path / "run")
    with_labels(tmp_path / "run", None)  # from before versions: which they are is not known
    with pytest.warns(UserWarning, match="the run has learned labels of version 0"):
        path = train(ValueIterationLearner(CONFIG, longer), longer, tmp_path / "run")
    assert labels_of(path) == 0
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["update"] == 2
