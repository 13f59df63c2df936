"""Data sets on disk: kills, cuts, flipped bytes, other configurations, several writers, resumed readers, training."""

import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from icrl.cli import main
from icrl.data.shards import DataSet, Field, ShardReader, batch_rows, read_index, shard_path, write_shards
from icrl.omnirl.distill import DPDConfig, DPDStream
from icrl.omnirl.record_shards import RECORDS, RecordStream, records_dataset, write_records
from icrl.omnirl.value_iteration_network import ValueIterationNetworkConfig
from icrl.omnirl.value_iteration_training import ValueIterationLearner, ValueIterationTraining
from icrl.training.config import LoopConfig
from icrl.training.loop import train
from icrl.worlds import TabularTasks
from icrl.worlds import task_shards as shards_of_tasks
from icrl.worlds.task_shards import TaskSet, TaskShards
from icrl_kernels import _C

TOY = DataSet(
    "toy",
    {"x": Field("float32", ("N", "T"), "the row's number"), "m": Field("int16", ("M",), "two a row, end to end")},
    {"T": 3},
    {"scale": 1.0, "nested": {"depth": 2}},
    seed=7,
    rows=26,
    rows_per_shard=4,
)


def make(first, count):
    rows = torch.arange(first, first + count)
    return {"x": rows[:, None].float().repeat(1, 3), "m": rows.repeat_interleave(2).short()}


def contents(folder):
    """Every file's bytes but the lock's."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != ".lock"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    written = write_shards(folder, TOY, make)
    assert (written.made, written.found, written.left) == (7, 0, 0)
    return folder


@pytest.fixture
def copy(whole, tmp_path):
    folder = tmp_path / "copy"
    folder.mkdir()
    for name, data in contents(whole).items():
        (folder / name).write_bytes(data)
    return folder


CHILD = """
import os, signal, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import test_shards as here
from icrl import files
from icrl.data import shards

def killed_while_writing(file, synced=files.sync):
    if "00003" in os.readlink(f"/proc/self/fd/{file.fileno()}"):  # half of the bytes have reached the disk
        file.flush()
        file.truncate(os.fstat(file.fileno()).st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    synced(file)

def killed_before_the_name(part, path, replace=os.replace):
    if "00003" in str(path):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(part, path)

def killed_before_the_index(folder, dataset, write=shards._write_index):
    if len(list(folder.glob("*.safetensors"))) == dataset.num_shards:
        os.kill(os.getpid(), signal.SIGKILL)
    return write(folder, dataset)

def in_company(first, count):
    end = time.time() + 60  # both processes have a shard in hand before either goes on
    while len(list(Path(sys.argv[1]).glob("shard-*"))) < 2 and time.time() < end:
        time.sleep(0.01)
    return here.make(first, count)

how = sys.argv[3]
if how == "writing":
    files.sync = killed_while_writing
elif how == "naming":
    os.replace = killed_before_the_name
elif how == "indexing":
    shards._write_index = killed_before_the_index
print("ready", flush=True)
sys.stdin.readline()
make = in_company if how == "company" else here.make
print(shards.write_shards(Path(sys.argv[1]), here.TOY, make).made)
"""


def child(folder, how):
    args = [sys.executable, "-c", CHILD, str(folder), str(Path(__file__).parent), how]
    where = Path(_C.__file__).parents[1]  # of the package under test, which may be an installed one
    process = subprocess.Popen(args, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=where)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(("how", "kept"), [("writing", 3), ("naming", 3), ("indexing", 7)])
def test_killed_and_resumed_is_uninterrupted(how, kept, whole, tmp_path):
    """SIGKILL in the middle of a shard, between a shard and its name, and between the last shard and the index."""
    folder = tmp_path / "d"
    process = child(folder, how)
    process.communicate("go\n")
    assert process.returncode == -signal.SIGKILL
    assert len(list(folder.glob("*.safetensors"))) == kept
    assert len(list(folder.glob("*.part"))) == (kept < 7)
    with pytest.raises(ValueError, match="not finished"):
        ShardReader(folder)
    written = write_shards(folder, TOY, make)
    assert (written.made, written.found, written.left, written.remade) == (7 - kept, kept, 0, [])
    assert contents(folder) == contents(whole)


def test_two_processes_share_the_work(whole, tmp_path):
    folder = tmp_path / "d"
    processes = [child(folder, "company") for _ in range(2)]
    for p in processes:
        p.stdin.write("go\n")
        p.stdin.flush()
    made = [int(p.communicate()[0]) for p in processes]
    assert sum(made) == 7
    assert min(made) >= 1
    assert contents(folder) == contents(whole)


def test_two_threads_make_the_same_bytes(whole, tmp_path):
    seen = set()
    meeting = threading.Barrier(2, timeout=20)

    def watching(first, count):
        if first < 8:
            meeting.wait()  # the first two shards are in hand at once
        seen.add(threading.current_thread().name)
        return make(first, count)

    write_shards(tmp_path / "d", TOY, watching, workers=2)
    assert len(seen) == 2
    assert contents(tmp_path / "d") == contents(whole)


def test_shard_ranges_add_up(whole, tmp_path):
    first = write_shards(tmp_path, TOY, make, shards=range(5, 7))
    assert (first.made, first.left) == (2, 5)
    assert [s.file for s in read_index(tmp_path)[1]] == [f"shard-0000{i}.safetensors" for i in (5, 6)]
    write_shards(tmp_path, TOY, make, shards=range(0, 5))
    assert contents(tmp_path) == contents(whole)
    with pytest.raises(ValueError, match="shards: wanted some of 0 to 6, got 5 to 7"):
        write_shards(tmp_path, TOY, make, shards=range(5, 8))


@pytest.mark.parametrize("cut", [1, 40, 10_000])
def test_a_shard_cut_short_is_found_and_made_again(cut, copy, whole, capsys):
    path = shard_path(copy, 2)
    data = path.read_bytes()
    path.write_bytes(data[: max(0, len(data) - cut)])
    with pytest.raises(ValueError, match=r"shard-00002.safetensors: is cut short or changed: \d+ bytes, wanted"):
        ShardReader(copy)
    others = {p: p.stat().st_ino for p in copy.glob("*.safetensors") if p != path}
    written = write_shards(copy, TOY, make)
    assert (written.made, written.found) == (1, 6)
    assert "shard-00002.safetensors: cut short or damaged" in written.remade[0]
    assert "shard-00002.safetensors: cut short or damaged" in capsys.readouterr().out
    assert contents(copy) == contents(whole)
    assert {p: p.stat().st_ino for p in others} == others  # untouched


@pytest.mark.parametrize("place", [9, 60, 90, 130, 170, 210, 250, 290, 330, 370, -1])
def test_a_flipped_bit_is_found(place, copy, whole):
    """In the header's names or facts, in its offsets, in the data: the full check finds them all."""
    path = shard_path(copy, 4)
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"shard-00004.safetensors"):
        ShardReader(copy, full=True)
    if place == -1:
        assert write_shards(copy, TOY, make).made == 0  # the cheap check reads no data
    written = write_shards(copy, TOY, make, full=True)
    assert written.made == 1
    assert contents(copy) == contents(whole)


def test_a_missing_shard_is_named(copy):
    shard_path(copy, 5).unlink()
    with pytest.raises(ValueError, match=r"shard-00005.safetensors: is missing"):
        ShardReader(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 8}, "seed: there 7, asked for 8"),
        ({"config": {"scale": 2.0, "nested": {"depth": 2}}}, r"config.scale: there 1.0, asked for 2.0"),
        ({"config": {"scale": 1.0, "nested": {"depth": 3}}}, r"config.nested.depth: there 2, asked for 3"),
        ({"config": {"scale": 1.0}}, r"config.nested: there \{.*\}, asked for null"),
        ({"sizes": {"T": 4}}, "sizes.T"),
        ({"rows_per_shard": 5}, "rows_per_shard"),
        ({"kind": "other"}, "kind"),
        ({"rows": 25}, "holds a data set of 26 rows, more than 25"),
    ],
)
def test_another_configuration_is_refused(change, message, copy, whole):
    with pytest.raises(ValueError, match=message):
        write_shards(copy, replace(TOY, **change), make)
    assert contents(copy) == contents(whole)


def test_shards_of_another_data_set_are_never_overwritten(copy):
    (copy / "index.json").unlink()
    with pytest.raises(ValueError, match=r"shard-00000.safetensors: belongs to another data set"):
        write_shards(copy, replace(TOY, seed=8), make)
    assert write_shards(copy, TOY, make).found == 7  # but its own go on without their index


def test_a_data_set_grows(copy, tmp_path):
    more = replace(TOY, rows=33)
    written = write_shards(copy, more, make)
    assert (written.made, written.found) == (3, 6)  # the last shard had 2 rows of 4
    write_shards(tmp_path / "whole", more, make)
    assert contents(copy) == contents(tmp_path / "whole")


def test_a_failing_maker_stops_all_and_leaves_no_part(tmp_path):
    def failing(first, count):
        if first == 12:
            raise OSError("no space left")
        return make(first, count)

    with pytest.raises(OSError, match="no space left"):
        write_shards(tmp_path, TOY, failing, workers=2)
    assert not list(tmp_path.glob("*.part"))
    assert read_index(tmp_path)[0].num_shards != len(read_index(tmp_path)[1])
    assert write_shards(tmp_path, TOY, make).left == 0


def test_what_cannot_be_made_leaves_the_folder_to_others(tmp_path, copy):
    def failing(first, count):
        raise ValueError("scale: wanted less")

    with pytest.raises(ValueError, match="scale: wanted less"):
        write_shards(tmp_path / "out", replace(TOY, config={"scale": 9.0}), failing)
    assert write_shards(tmp_path / "out", TOY, make).left == 0
    with pytest.raises(ValueError, match="scale: wanted less"):  # what others have finished keeps its index
        write_shards(copy, replace(TOY, rows=40), failing)
    assert read_index(copy)[0].rows == 40


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (lambda t: {"x": t["x"]}, "wanted tensors m, x, got x"),
        (lambda t: t | {"x": t["x"].double()}, r"x: wanted float32 \['N', 'T'\] = \[4, 3\], got float64"),
        (lambda t: t | {"x": t["x"][:3]}, r"x: wanted float32 .* got float32 \[3, 3\]"),
        (lambda t: t | {"m": t["m"][None]}, "m: wanted int16"),
    ],
)
def test_makers_are_held_to_the_schema(tensors, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        write_shards(tmp_path, TOY, lambda first, count: tensors(make(first, count)))


def test_refuses_what_is_no_data_set(tmp_path, copy):
    with pytest.raises(ValueError, match=r"holds no data set \(no index.json\)"):
        ShardReader(tmp_path / "absent")
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ValueError, match="is not a folder"):
        write_shards(tmp_path / "file", TOY, make)
    with pytest.raises(ValueError, match=r"is not empty and holds no data set"):
        write_shards(tmp_path, TOY, make)
    with pytest.raises(ValueError, match=r"holds toy, wanted dpd records"):
        ShardReader(copy, kind=RECORDS)
    index = copy / "index.json"
    text = index.read_text()
    for damaged in (text[:200], "[]", text.replace('"rows":', '"rose":')):
        index.write_text(damaged)
        with pytest.raises(ValueError, match=r"index.json: damaged"):
            ShardReader(copy)
        with pytest.raises(ValueError, match=r"index.json: damaged"):
            write_shards(copy, TOY, make)
    index.write_text(text.replace('"version": 1', '"version": 9'))
    with pytest.raises(ValueError, match=r"wanted 'icrl.shards' version 1, got 'icrl.shards' version 9"):
        ShardReader(copy)
    with pytest.raises(ValueError, match="rows: wanted at least 1"):
        replace(TOY, rows=0)


# --- readers ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 25), max_size=40))
@settings(max_examples=50, deadline=None)
def test_rows_are_those_asked_for(whole, rows):
    reader = ShardReader(whole, open_files=2)
    found = reader.read(torch.tensor(rows, dtype=torch.int64))
    assert found.keys() == {"x"}
    assert found["x"].tolist() == [[float(r)] * 3 for r in rows]


def test_a_shard_and_bad_rows(whole):
    reader = ShardReader(whole, full=True)
    assert len(reader) == 26
    assert reader.shard(6)["m"].tolist() == [24, 24, 25, 25]
    with pytest.raises(ValueError, match="rows: wanted some of 0 to 25, got 3 to 26"):
        reader.read(torch.tensor([3, 26]))
    with pytest.raises(ValueError, match="names: wanted some of x, which have rows, got m"):
        reader.read(torch.tensor([3]), ["x", "m"])


def test_every_epoch_is_a_permutation_shared_among_processes():
    for shuffle in (False, True):
        epochs = []
        for epoch in range(3):
            of = {"seed": 5, "shuffle": shuffle, "world": 3}
            parts = [batch_rows(20, 2, 3 * epoch + i, rank=r, **of) for i in range(3) for r in range(3)]
            rows = torch.cat(parts).tolist()
            assert len(set(rows)) == 18  # two of twenty do not fill a batch for all three
            epochs.append(rows)
        assert (epochs[0] == epochs[1]) == (not shuffle)
        assert (epochs[0] == list(range(18))) == (not shuffle)
    with pytest.raises(ValueError, match="batch: wanted 1 to 6, 20 rows among 3 processes, got 7"):
        batch_rows(20, 7, 0, seed=0, world=3)
    with pytest.raises(ValueError, match="rank, world"):
        batch_rows(20, 1, 0, seed=0, rank=3, world=3)


# --- records ----------------------------------------------------------------------------------------------------------

SMALL = DPDConfig(batch=3, steps=40, states=10, actions=3)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    folder = tmp_path_factory.mktemp("records")
    write_records(folder, SMALL, 14, seed=3, labels=True)
    return folder


def same(a, b):
    for name, x, y in zip(a._fields, a, b, strict=True):
        assert x.dtype == y.dtype, name
        assert torch.equal(x, y), name


def test_records_from_disk_are_those_made_on_the_fly(records):
    made, read = DPDStream(SMALL, 3), RecordStream(records, 3, 0, shuffle=False)
    for _ in range(4):
        same(next(read), next(made))
    first = next(read)  # the fifth batch was cut: the second epoch begins
    same(first, DPDStream(SMALL, 3).batch(0))
    labels = read.reader.read(torch.arange(3))["label"]
    assert torch.equal(labels.long(), first.q.argmax(3))
    made.close()
    read.close()


def test_a_resumed_stream_goes_on_exactly(records):
    stream = RecordStream(records, 2, seed=1)
    given = [next(stream) for _ in range(9)]  # past the end of the first epoch
    saved = stream.state_dict()
    other = RecordStream(records, 2, seed=99, prefetch=0)
    other.load_state_dict(saved)
    after = next(stream)
    same(after, next(other))
    assert not torch.equal(given[0].reward, after.reward)
    stream.close()


def test_rows_are_the_same_however_they_are_cut(records, tmp_path):
    assert records_dataset(SMALL, 14, 3).rows_per_shard > 14
    write_records(tmp_path, SMALL, 14, 3, labels=True, rows_per_shard=4, workers=2)  # not even whole batches
    assert read_index(tmp_path)[0].num_shards == 4
    a, b = ShardReader(records).read(torch.arange(14)), ShardReader(tmp_path).read(torch.arange(14))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_bytes_a_step(records):
    with safe_open(records / "shard-00000.safetensors", framework="pt") as f:
        sizes = {name: f.get_tensor(name).nbytes / 14 / 40 for name in f.keys()}  # noqa: SIM118
    assert sizes.pop("value") * 40 == 4 * 4 * 10 * 3  # once a record
    assert sizes == {"observation": 2, "action": 1, "reward": 4, "done": 1, "tag": 1, "label": 4}


def test_refuses_records_that_do_not_fit(records):
    with pytest.raises(ValueError, match="states: records hold at most 32768, got 40000"):
        records_dataset(replace(SMALL, states=40_000), 5, 0)
    with pytest.raises(ValueError, match="batch: wanted 1 to 14"):
        RecordStream(records, 15, 0)
    with pytest.raises(ValueError, match=r"has steps 40, the configuration 41"):
        RecordStream(records, 2, 0).check(replace(SMALL, steps=41))
    RecordStream(records, 2, 0).check(SMALL)


def test_training_from_disk_is_training_on_the_fly(records, tmp_path):
    """The same batches in the same order give the same model; and a run from disk resumes."""
    tiny = ValueIterationNetworkConfig(actions=3, layers=1, action_width=8, state_width=12, value_width=4)
    config = ValueIterationTraining(
        model=tiny, data=SMALL, segment=20, dagger=0.0, evaluation_tasks=2, evaluation_steps=4
    )
    loop = LoopConfig(updates=3, warmup=1, checkpoint_every=2, seed=3)
    from_disk = ValueIterationLearner(replace(config, records=str(records)), loop)
    assert isinstance(from_disk.stream, RecordStream)
    from_disk.stream.order["shuffle"] = False
    on_the_fly = ValueIterationLearner(config, loop)
    for learner, name in ((from_disk, "disk"), (on_the_fly, "fly")):
        train(learner, loop, tmp_path / name)
        learner.stream.close()
    for a, b in zip(from_disk.model.parameters(), on_the_fly.model.parameters(), strict=True):
        assert torch.equal(a, b)
    given = {"training": json.loads(json.dumps(asdict(config))), "loop": {"updates": 1}}
    (tmp_path / "c.json").write_text(json.dumps(given))
    args = ["train", "value-iteration-network", "--config", str(tmp_path / "c.json"), "--out", str(tmp_path / "run")]
    assert main([*args, "--records", str(records)]) == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["training"]["records"] == str(records)
    with pytest.raises(ValueError, match="has states 10, the configuration 11"):
        ValueIterationLearner(replace(config, data=replace(SMALL, states=11), records=str(records)), loop)


def test_a_configuration_keeps_its_steps_and_batch(tmp_path):
    config = tmp_path / "c.json"
    config.write_text(json.dumps({"steps": 24, "batch": 3, "states": 8}))
    args = ["distill", "--tasks", "3", "--config", str(config), "--workers", "1"]
    for name, options, wanted in (("a", [], (24, 3)), ("b", ["--steps", "20", "--batch", "2"], (20, 2))):
        assert main([*args, str(tmp_path / name), *options]) == 0
        made_by = read_index(tmp_path / name)[0].config
        assert (made_by["steps"], made_by["batch"]) == wanted


def test_commands(tmp_path, capsys):
    out, config = tmp_path / "d", tmp_path / "c.json"
    config.write_text(json.dumps({"actions": 3, "discounts": [0.0, 0.9], "references": [0.5, 0.5],
                                  "behaviours": {"uniform": 1.0}}))  # fmt: skip
    args = ["distill", str(out), "--tasks", "6", "--steps", "20", "--states", "8", "12", "--batch", "3"]
    args += ["--config", str(config), "--json", str(tmp_path / "d.json")]
    assert main([*args, "--workers", "2"]) == 0
    numbers = json.loads((tmp_path / "d.json").read_text())
    assert (numbers["rows"], numbers["shards_left"]) == (6, 0)
    assert numbers["bytes"] == sum(p.stat().st_size for p in out.glob("*.safetensors"))
    assert main(["dataset", str(out), "--full"]) == 0
    assert "1 of 1 shards are whole" in capsys.readouterr().out
    assert main([*args, "--seed", "1"]) == 2
    assert "seed: there 0, asked for 1" in capsys.readouterr().err
    os.truncate(out / "shard-00000.safetensors", 100)
    assert main(["dataset", str(out)]) == 2
    assert "cut short" in capsys.readouterr().out
    assert main(args) == 0
    assert main(["dataset", str(out), "--full"]) == 0


# --- tasks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["anymdp", "garnet", "bandit", "pomdp"])
def test_tasks_from_disk_are_those_sampled(kind, tmp_path):
    config = TaskSet(
        kind, (8, 12), 3, discounts=(0.5, 0.994), num_observations=5, observation_tokens=2, action_tokens=2
    )
    small = replace(config.dataset(11, 5), rows_per_shard=4)
    assert config.dataset(11, 5).rows_per_shard > 11
    write_shards(tmp_path, small, lambda first, count: shards_of_tasks._make(config, 5, first, count), workers=2)
    shards = TaskShards(tmp_path, full=True)
    read, wanted = TabularTasks.concatenate(list(shards)), config.sample(11, 5)
    assert (len(shards), len(read), read.packed) == (11, 11, True)
    assert (read.num_observations, read.action_tokens) == (wanted.num_observations, wanted.action_tokens)
    assert read.multi_token == (kind == "pomdp")
    for name, a in read.dense().tensors().items():
        assert torch.equal(a, getattr(wanted.dense(), name)), name
    solved = wanted.solve(config.discounts)
    found = shards.reader.read(torch.arange(11))
    assert torch.equal(found["policy"].long(), solved.policy)
    assert torch.equal(found["value"], solved.v.float())
    assert bool((found["error_bound"].double() >= solved.error_bound).all())
    one = shards.task(9)
    assert torch.equal(one.dense().reward, wanted[9].dense().reward)
    with pytest.raises(ValueError, match="index: wanted 0 to 10, got 11"):
        shards.task(11)


def test_task_commands(tmp_path, capsys):
    out = tmp_path / "t"
    args = ["worlds", "shards", str(out), "--num-tasks", "6", "--num-states", "8", "10", "--discounts", "0.5", "0.9"]
    assert main([*args, "--workers", "1"]) == 0
    assert "6 of 6 rows" in capsys.readouterr().out
    assert main(["worlds", "inspect", str(out)]) == 0
    assert "Gini" in capsys.readouterr().out
    assert main(["worlds", "draw", str(out), "--index", "5", "--out", str(tmp_path / "t.png")]) == 0
    assert main(["worlds", "draw", str(out), "--index", "6", "--out", str(tmp_path / "t.png")]) == 2
    assert "index: wanted 0 to 5, got 6" in capsys.readouterr().err
    assert main(["worlds", "shards", str(out), "--num-tasks", "6", "--num-states", "8", "10"]) == 2
    assert "config.discounts: there [0.5, 0.9], asked for []" in capsys.readouterr().err
    assert main(["worlds", "shards", str(tmp_path / "u"), "--num-states", "9", "8"]) == 2
    assert "num_states: wanted 1 <= LOW <= HIGH" in capsys.readouterr().err
    fresh = ["worlds", "shards", str(tmp_path / "u"), "--num-tasks", "6"]
    for options, message in (
        (["--workers", "0"], "workers"),
        (["--shard-range", "3", "1"], "shards: wanted some of 0 to 0"),
    ):
        assert main([*fresh, *options]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "u").exists()
