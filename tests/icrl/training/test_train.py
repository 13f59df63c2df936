"""The training loop: exact resume, honest schedules, and refusals."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

import icrl
import icrl.training.loop as loop_module
import icrl.training.run as training_run
from icrl.cli import main
from icrl.data.shards import batch_rows
from icrl.extras import versions
from icrl.files import locked
from icrl.offline.experiment import OfflineRun
from icrl.omnirl.distill import DPDConfig
from icrl.omnirl.record_shards import RecordStream
from icrl.omnirl.value_iteration_network import ValueIterationNetwork, ValueIterationNetworkConfig
from icrl.omnirl.value_iteration_training import ValueIterationLearner, ValueIterationTraining, read_config
from icrl.training import checkpoint, process
from icrl.training.config import LoopConfig, configured, init_of
from icrl.training.loop import rate, train

TINY = ValueIterationTraining(
    model=ValueIterationNetworkConfig(
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
    learner = ValueIterationLearner(training, loop)
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
    fresh = ValueIterationNetwork(TINY.model).state_dict()
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
        configured(
            ValueIterationTraining, {"model": {"layers": 2}, "policy_weights": [1, 1, 1, 1, 1]}, "training"
        ).model.layers
        == 2
    )
    run = configured(OfflineRun, {"loop": {"updates": 7}}, "run")
    assert run.loop == replace(OfflineRun().loop, updates=7)  # the rest is what this run's loop has, not any loop
    with pytest.raises(ValueError, match=r"training\.model has no depth"):
        configured(ValueIterationTraining, {"model": {"depth": 2}}, "training")
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
        ValueIterationTraining(policy_weights=(1.0,))
    with pytest.raises(ValueError, match="segment"):
        ValueIterationTraining(segment=0)
    with pytest.raises(ValueError, match="wanted an object"):
        configured(ValueIterationTraining, 5, "training")


class Counting:
    """A learner whose loss is the update's number, and which can be killed."""

    def __init__(self, kill_at=None):
        self.model, self.kill_at = torch.nn.Linear(1, 1), kill_at

    def config(self):
        return {}

    def hidden_matrices(self):
        return []

    def losses(self, update):
        if update == self.kill_at:
            raise Killed
        for part in range(1 + update % 2):
            yield (self.model.weight * 0).sum(), {"loss": float(update), "part": torch.tensor(part / 3)}

    def evaluate(self):
        return {"score": 1.0}

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass

    def save_model(self, path, **facts):
        checkpoint.save(path, self.model.state_dict(), facts)


def logged(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def test_a_resumed_log_is_an_uninterrupted_one(tmp_path):
    loop = LoopConfig(updates=60, log_every=20, checkpoint_every=50, evaluate_every=25, device="cpu")
    train(Counting(), loop, tmp_path / "whole")
    with pytest.raises(Killed):
        train(Counting(kill_at=55), loop, tmp_path / "killed")
    with open(tmp_path / "killed" / "metrics.jsonl", "a") as f:
        f.write('{"update": 55, "lo')  # a line that the kill cut short
    train(Counting(), loop, tmp_path / "killed")
    rows = logged(tmp_path / "whole")
    assert rows == logged(tmp_path / "killed")
    assert [r["update"] for r in rows] == [20, 25, 40, 50, 60, 60]
    assert rows[0]["loss"] == pytest.approx(sum(u * (1 + u % 2) for u in range(20)) / 30)


def test_a_run_goes_on_to_more_updates_at_their_rates(tmp_path, capsys):
    run(tmp_path / "run")
    more = replace(LOOP, updates=9)
    run(tmp_path / "run", loop=more)
    assert "loop.updates: 6 in the run, 9 given" in capsys.readouterr().out
    rows = [r for r in logged(tmp_path / "run") if "rate" in r]
    assert [r["update"] for r in rows] == list(range(1, 10))
    assert [r["rate"] for r in rows] == [rate(u, LOOP) for u in range(6)] + [rate(u, more) for u in range(6, 9)]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["loop"]["updates"] == 9
    with pytest.raises(ValueError, match=r"loop\.updates: 9 done in the run, 6 given"):
        run(tmp_path / "run")


def test_a_refusal_names_the_field_and_both_values(tmp_path):
    run(tmp_path / "run")
    for changed, words in (
        ({"loop": replace(LOOP, learning_rate=0.001)}, r"\(loop.learning_rate: 0.003 in the run, 0.001 given\)"),
        ({"loop": replace(LOOP, seed=4)}, r"\(loop.seed: 0 in the run, 4 given\)"),
        ({"training": replace(TINY, segment=6)}, r"\(training.segment: 12 in the run, 6 given\)"),
    ):
        with pytest.raises(ValueError, match=words):
            run(tmp_path / "run", **changed)


def older(folder, **changes):
    """Make of a run's folder what a version wrote before there were devices and one seed."""
    record = json.loads((folder / "config.json").read_text())
    for name in ("device", "autocast"):
        del record["loop"][name]
    record["training"]["seed"], record["loop"]["seed"] = record["loop"]["seed"], 0
    (folder / "config.json").write_text(json.dumps(record))
    (folder / "versions.json").unlink()
    return record


def test_a_run_of_an_earlier_version_goes_on(tmp_path):
    loop = replace(LOOP, seed=5)
    whole = weights(run(tmp_path / "whole", loop=loop))
    with pytest.raises(Killed):
        run(tmp_path / "old", loop=loop, kill_at=5)
    record = older(tmp_path / "old")
    resumed = weights(run(tmp_path / "old", loop=loop))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert read_config(record) == (TINY, loop)
    assert read_config(json.loads((tmp_path / "old" / "config.json").read_text())) == (TINY, loop)


def test_the_seed_has_one_home():
    assert read_config({"loop": {"seed": 7}})[1].seed == 7
    with pytest.raises(ValueError, match=r"training\.seed.*loop\.seed") as refused:
        read_config({"training": {"seed": 7}})
    assert "\n" not in str(refused.value)
    a, b = (ValueIterationLearner(TINY, replace(LOOP, seed=s)) for s in (1, 2))
    assert not torch.equal(a.model.action_features.weight, b.model.action_features.weight)
    assert a.stream.seed != b.stream.seed


def test_a_run_begins_from_given_weights(tmp_path):
    path = run(tmp_path / "first")
    learner = ValueIterationLearner(TINY, LOOP, init=path)
    given = weights(path)
    assert all(torch.equal(given[name], value) for name, value in learner.model.state_dict().items())
    train(learner, replace(LOOP, updates=1), tmp_path / "second")
    record = json.loads((tmp_path / "second" / "config.json").read_text())
    assert record["init"] == str(path)
    with pytest.raises(ValueError, match=r"training\.model\.layers: 1 in .*, 2 given"):
        ValueIterationLearner(replace(TINY, model=replace(TINY.model, layers=2)), LOOP, init=path)


def test_other_versions_are_named_recorded_and_no_obstacle(tmp_path, capsys, monkeypatch):
    loop = LoopConfig(updates=2, checkpoint_every=1, device="cpu")
    with pytest.raises(Killed):
        train(Counting(kill_at=1), loop, tmp_path / "run")
    entries = json.loads((tmp_path / "run" / "versions.json").read_text())
    assert [e["update"] for e in entries] == [0]
    assert entries[0]["torch"] == str(torch.__version__)
    assert {"icrl_kernels", "device", "processor"} <= entries[0].keys()
    monkeypatch.setattr(training_run, "versions", lambda: {**versions(), "torch": "9.9"})
    monkeypatch.setattr(training_run, "machine", lambda device: {"device": "cpu", "processor": "an abacus"})
    capsys.readouterr()
    train(Counting(), loop, tmp_path / "run")
    line = next(x for x in capsys.readouterr().out.splitlines() if "another version" in x)
    assert f"torch: {torch.__version__} in the run, 9.9 now" in line
    assert "an abacus now" in line
    assert [e["update"] for e in json.loads((tmp_path / "run" / "versions.json").read_text())] == [0, 1]
    train(Counting(), loop, tmp_path / "run")  # nothing new
    assert len(json.loads((tmp_path / "run" / "versions.json").read_text())) == 2


def test_another_format_of_files_is_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "FORMAT", checkpoint.FORMAT + 1)
        checkpoint.save(tmp_path / "c", {}, {})
    with pytest.raises(ValueError, match="format '3', wanted 2"):
        checkpoint.load(tmp_path / "c")


WORKER = """
import sys
import torch
from icrl.cli import main
torch.set_num_threads(1)
sys.exit(main(sys.argv[1:]))
"""


def torchrun(*args, processes=2):
    """The group of processes that torchrun would start, each with its number in the environment."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    where = Path(icrl.__file__).parents[1]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, *map(str, args)],
            env={**os.environ, "RANK": str(i), "LOCAL_RANK": str(i), "WORLD_SIZE": str(processes),
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=where,
        )
        for i in range(processes)
    ]  # fmt: skip
    said = [p.communicate(timeout=300) for p in started]
    return [p.returncode for p in started], said


def test_two_processes_are_one_with_twice_the_batch(tmp_path):
    config = {"training": {**json.loads(json.dumps(asdict(TINY))), "dagger": 0.0}, "loop": asdict(LOOP)}
    config["loop"] |= {"device": "cpu", "muon_learning_rate": 0.0, "warmup": 50}  # Muon rounds to bfloat16
    for name, size in (("two", 4), ("one", 8)):
        config["training"]["data"]["batch"] = size
        (tmp_path / f"{name}.json").write_text(json.dumps(config))
    distill = ["distill", tmp_path / "rec", "--tasks", 64, "--steps", 24, "--batch", 4, "--workers", 1]
    assert main([str(a) for a in distill]) == 0
    shared = ["train", "value-iteration-network", "--records", tmp_path / "rec"]
    codes, said = torchrun(*shared, "--config", tmp_path / "two.json", "--out", tmp_path / "two")
    assert codes == [0, 0], said
    args = [*shared, "--config", tmp_path / "one.json", "--out", tmp_path / "one"]
    assert main([str(a) for a in args]) == 0
    a, b = (weights(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    a, b = (torch.cat([x[name].flatten() for name in sorted(x)]) for x in (a, b))
    assert (a - b).norm() < 1e-4 * a.norm()
    for one, two in zip(logged(tmp_path / "one"), logged(tmp_path / "two"), strict=True):  # means over both
        assert one.get("loss", 0.0) == pytest.approx(two.get("loss", 0.0), rel=1e-4)
    assert len(list((tmp_path / "two" / "checkpoints" / "00000006").iterdir())) == 2

    # with other numbers of processes
    longer = ["--updates", 8, "--out", tmp_path / "two"]
    assert main([str(a) for a in [*shared, "--config", tmp_path / "two.json", *longer]]) == 0
    longer = ["--updates", 8, "--out", tmp_path / "one"]
    codes, said = torchrun(*shared, "--config", tmp_path / "one.json", *longer)
    assert codes == [0, 0], said
    assert "world_size: 1 in the run, 2 given" in said[0][0]
    for name in ("one", "two"):
        assert logged(tmp_path / name)[-1]["update"] == 8


def test_a_group_is_refused_where_another_process_is_at_work(tmp_path):
    with locked(tmp_path / "run"):
        codes, said = torchrun("train", "value-iteration-network", "--out", tmp_path / "run", "--device", "cpu")
    assert codes == [2, 2], said
    for _, err in said:
        assert err.splitlines()[-1] == f"icrl: out: another process is at work in {tmp_path / 'run'}"
        assert "Traceback" not in err
    assert [p.name for p in (tmp_path / "run").iterdir()] == [".lock"]


def test_streams_go_on_with_other_processes_without_a_row_twice(tmp_path):
    distill = ["distill", tmp_path / "rec", "--tasks", 64, "--steps", 8, "--batch", 4, "--workers", 1]
    assert main([str(a) for a in distill]) == 0
    of = {"seed": 3, "prefetch": 0}
    for before, now, read in ((2, 1, 3), (1, 2, 3), (3, 2, 2), (2, 3, 7), (4, 1, 4)):
        seen = [batch_rows(64, 4, i, seed=3, rank=r, world=before) for i in range(read) for r in range(before)]
        streams = [RecordStream(tmp_path / "rec", 4, rank=r, world=now, **of) for r in range(now)]
        position = {s.position_after(read, before) for s in streams}
        assert len(position) == 1
        first = position.pop()
        here = (64 // (4 * before)) * (read // (64 // (4 * before)))  # batches of epochs that are over
        seen = set(torch.cat(seen[here * before :]).tolist()) if seen[here * before :] else set()
        last = (first // (64 // (4 * now)) + 1) * (64 // (4 * now))
        rest = [batch_rows(64, 4, i, seed=3, rank=r, world=now) for i in range(first, last) for r in range(now)]
        if first % (64 // (4 * now)):  # not at the beginning of the next epoch
            assert not seen & set(torch.cat(rest).tolist()), (before, now, read)


def test_a_process_without_its_own_state_collects_anew(monkeypatch):
    learner = ValueIterationLearner(TINY, LOOP)
    for _ in zip(range(3), learner.losses(2), strict=False):
        pass
    state = learner.state_dict()
    state["collections"] = 5
    for own in (True, False):
        other = ValueIterationLearner(TINY, LOOP)
        other.redistribute(state, 3, own)
        assert (other.own is not None) == own
        assert other.collections == 15  # in one process: numbers that none of the three has used
        assert other.stream.state_dict() == {"seed": other.stream.seed, "next_batch": 1}
    learner.stream.close()


def test_only_train_omnirl_runs_in_several_processes(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for command in (["eval"], ["train", "offline"], ["distill", str(tmp_path / "d")], ["worlds", "inspect", "x"]):
        assert main(command) == 2
        line = capsys.readouterr().err.strip()
        assert "torchrun" in line
        assert "\n" not in line
    with pytest.raises(ValueError, match="one process, got 2"):
        process.refuse_torchrun("eval")
    monkeypatch.setattr(loop_module, "world_size", lambda: 2)
    with pytest.raises(ValueError, match="one process"):
        train(Counting(), LOOP, tmp_path / "run")


def test_the_group_and_the_device_follow_the_machine(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, timeout: asked.append(backend))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert process.prepare(LoopConfig(device="cpu")) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    assert process.prepare(LoopConfig()) == torch.device("cuda:1")
    assert process.prepare(LoopConfig(device="cpu")) == torch.device("cpu")  # gloo, though there are GPUs
    assert asked == ["gloo", "nccl", "gloo"]
    with pytest.raises(ValueError, match="one GPU for 2 processes"):
        process.resolve("cuda:0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="wanted GPU 1"):
        process.resolve("auto")
    with pytest.raises(ValueError, match="device"):
        process.resolve("abacus")


def test_threads_are_heeded():
    before = torch.get_num_threads()
    try:
        process.prepare(LoopConfig(threads=1, device="cpu"))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_a_kill_before_the_first_checkpoint_leaves_no_rows(tmp_path):
    run(tmp_path / "whole")
    with pytest.raises(Killed):
        run(tmp_path / "killed", kill_at=1)
    log = tmp_path / "killed" / "metrics.jsonl"
    log.write_text(log.read_text() + '{"update": 2, "lo')  # a row that the kill cut short
    (tmp_path / "killed" / "checkpoints" / "00000002.part").mkdir(parents=True)
    (tmp_path / "killed" / "checkpoints" / "00000002.part" / "rank1.safetensors").write_bytes(b"of two processes")
    run(tmp_path / "killed")
    logs = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "killed")]
    rows = [[{k: v for k, v in json.loads(x).items() if k != "seconds"} for x in log] for log in logs]
    assert rows[0] == rows[1]
    assert not list((tmp_path / "killed").glob("checkpoints/*/rank1.safetensors"))


def test_a_record_that_a_kill_cut_short_is_no_run(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json.part").write_text("{")
    assert run(tmp_path / "run").exists()


def test_the_weights_to_begin_from_are_read_once(tmp_path):
    first = run(tmp_path / "first")
    learner = ValueIterationLearner(TINY, LOOP, first)
    train(learner, LOOP, tmp_path / "second")
    first.unlink()
    longer = replace(LOOP, updates=7)
    assert train(ValueIterationLearner(TINY, longer, first, fresh=False), longer, tmp_path / "second").exists()
    with pytest.raises(ValueError, match="init: wanted a path, got 5"):
        init_of(None, {"init": 5})


def test_two_processes_train_the_sequence_model(tmp_path):
    small = {"actions": 5, "states": 8, "width": 64, "layers": 1, "heads": 5, "head_dim": 12, "hidden": 16, "code": 12}
    config = {
        "training": {
            "model": small,
            "stages": [{"share": 1.0, "states": 8, "records": 4, "steps": 12, "segment": 6}],
            "dagger_records": 4,
            "dagger_every": 2,
            "evaluation_tasks": 2,
            "evaluation_states": 8,
            "evaluation_steps": 10,
            "bandit_steps": 0,
        },
        "loop": {"updates": 4, "warmup": 1, "device": "cpu", "checkpoint_every": 2, "log_every": 1},
    }
    (tmp_path / "c.json").write_text(json.dumps(config))
    command = ["train", "omnirl", "--config", tmp_path / "c.json", "--out", tmp_path / "run"]
    codes, said = torchrun(*command)
    assert codes == [0, 0], said
    states = [
        checkpoint.load(tmp_path / "run" / "checkpoints" / "00000004" / f"rank{i}.safetensors")[0] for i in range(2)
    ]
    own = [{k: v for k, v in s.items() if k.startswith("run.model.")} for s in states]
    assert own[0]
    assert all(torch.equal(own[0][k], own[1][k]) for k in own[0])  # one model
    assert not torch.equal(*(s["run.learner.own.action"] for s in states))  # of records of their own
    assert main([str(a) for a in [*command, "--updates", "6"]]) == 0
    assert logged(tmp_path / "run")[-1]["update"] == 6
