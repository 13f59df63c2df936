"""Files that are read: all of their bits are covered, what is read is a copy, and whatever else lies there is named."""

import json
import math
import os
import struct
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from icrl.cli import main
from icrl.data.shards import DataSet, Field, ShardReader, shard_path, write_shards
from icrl.files import checksum
from icrl.offline.experiment import OfflineRun
from icrl.omnirl.value_iteration_network import ValueIterationNetwork, ValueIterationNetworkConfig
from icrl.reading import TensorFile, parse_json, read_json, read_rows
from icrl.training import checkpoint
from icrl.training.config import LoopConfig, configured
from icrl.worlds import TabularTasks, sample_anymdp
from icrl_kernels import _C

OLD = Path(__file__).parents[1] / "data" / "written_by_0.1.0.dev"
TINY = ValueIterationNetworkConfig(actions=2, layers=1, action_width=2, state_width=2, value_width=2, pool_heads=1)


def header_end(raw):
    return 8 + struct.unpack("<Q", raw[:8])[0]


def optimised(path):
    """A checkpoint as runs have it: an optimiser's state, its rates, the update's number."""
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=3e-3)
    layer(torch.ones(3)).sum().backward()
    optimizer.step()
    tensors, facts = {}, {}
    state = {"update": 2, "seconds": 1.0, "model": layer.state_dict(), "optimizers": [optimizer.state_dict()]}
    checkpoint.flatten("run", state, tensors, facts)
    checkpoint.save(path, tensors, facts)


def same_tensors(a, b):
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("bits", [1, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["checkpoint", "weights", "tasks", "packed tasks"])
def test_every_bit_of_a_header_is_covered(kind, bits, tmp_path):
    """A flipped bit is refused in a line that names the file, or leaves a file that says the same."""
    path = tmp_path / "file.safetensors"
    if kind == "checkpoint":
        optimised(path)
    elif kind == "weights":
        ValueIterationNetwork(TINY).save(path, seed=3)
    else:
        tasks = sample_anymdp(2, 8, 2, seed=1)
        (tasks.pack() if kind == "packed tasks" else tasks).save(path)

    def read():
        if kind in ("checkpoint", "weights"):
            return checkpoint.load(path)
        found = TabularTasks.load(path)
        return found.tensors(), [found.num_observations, found.action_tokens]

    raw, (tensors, facts) = path.read_bytes(), read()
    counts = {"refused": 0, "same": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # none is taken for an earlier version's
        for place in range(header_end(raw)):
            for bit in [place % 8] if bits == 1 else range(8):
                flipped = bytearray(raw)
                flipped[place] ^= 1 << bit
                path.write_bytes(flipped)
                try:
                    found, refused = read(), ""
                except ValueError as e:
                    found, refused = None, str(e)
                if found is None:
                    assert str(path) in refused
                    assert "\n" not in refused
                else:
                    assert same_tensors(found[0], tensors), (place, bit)
                    assert found[1] == facts, (place, bit)
                counts["same" if found else "refused"] += 1
    assert counts["refused"] > 20 * counts["same"]  # the same: a blank that is another, \u0041 for A


def test_earlier_files_load_and_say_what_is_not_covered():
    for read, name in ((checkpoint.load, "omnirl/model"), (TabularTasks.load, "tasks"), (TabularTasks.load, "packed")):
        with pytest.warns(UserWarning, match=rf"{name}\.safetensors: its checksum .* not its header and facts"):
            read(OLD / f"{name}.safetensors")


def test_an_earlier_file_keeps_to_the_metadata_that_it_had(tmp_path):
    """A flip in the name of the header's checksum makes no earlier version's file of one."""
    path = tmp_path / "m.safetensors"
    ValueIterationNetwork(TINY).save(path)
    path.write_bytes(path.read_bytes().replace(b"header_crc32", b"header_crc31"))
    with pytest.raises(ValueError, match=r"m\.safetensors: damaged"):
        checkpoint.load(path)


# --- copies -----------------------------------------------------------------------------------------------------------


def test_a_loaded_task_file_is_a_copy(tmp_path):
    path = tmp_path / "t.safetensors"
    sample_anymdp(4, 8, 3, seed=1).save(path)
    tasks = TabularTasks.load(path)
    before = {name: t.clone() for name, t in tasks.tensors().items()}
    size = path.stat().st_size
    with open(path, "r+b") as file:  # in place, as a copy to the same name does it
        file.write(b"\xff" * size)
        file.truncate(10)
    assert same_tensors(tasks.tensors(), before)


TOY = DataSet("toy", {"x": Field("int64", ("N", "T"), "")}, {"T": 512}, {}, seed=0, rows=16, rows_per_shard=4)


def toy(folder):
    write_shards(folder, TOY, lambda first, count: {"x": torch.arange(first, first + count)[:, None].repeat(1, 512)})
    return ShardReader(folder, open_files=2)


def test_a_shard_is_checked_before_its_first_row_is_read(tmp_path):
    toy(tmp_path)
    path = shard_path(tmp_path, 2)
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 16
    path.write_bytes(raw)
    reader = ShardReader(tmp_path)  # sizes are as listed
    assert reader.read(torch.tensor([0, 7]))["x"][:, 5].tolist() == [0, 7]
    with pytest.raises(ValueError, match=r"shard-00002\.safetensors: damaged"):
        reader.read(torch.tensor([0, 9]))
    with pytest.raises(ValueError, match=r"shard-00002\.safetensors: damaged"):
        reader.shard(2)


def test_a_shard_that_changes_while_it_is_read_is_refused(tmp_path):
    reader = toy(tmp_path)
    path = shard_path(tmp_path, 1)
    assert reader.read(torch.tensor([5]))["x"][0, 0] == 5
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - 8)
    with pytest.raises(ValueError, match=r"shard-00001\.safetensors: cut short or damaged"):
        reader.shard(1)
    with pytest.raises(ValueError, match=r"shard-00001\.safetensors"):
        reader.read(torch.tensor([4]))


def test_another_shard_of_the_same_data_set_is_refused(tmp_path):
    reader = toy(tmp_path)
    shard_path(tmp_path, 1).write_bytes(shard_path(tmp_path, 0).read_bytes())
    with pytest.raises(ValueError, match=r"shard-00001\.safetensors: holds shard 0 of 4 rows, wanted shard 1 of 4"):
        reader.read(torch.tensor([5]))


def test_shards_in_any_order_through_few_open_files(tmp_path):
    reader = toy(tmp_path)
    rows = torch.randperm(16).repeat(3)
    assert torch.equal(reader.read(rows)["x"][:, 0], rows)
    assert len(reader._open) == 2


SHORTENED = """
import sys, torch
from pathlib import Path
from icrl.worlds import TabularTasks, sample_anymdp
from icrl.data.shards import ShardReader
from icrl.omnirl.record_shards import write_records
from icrl.omnirl.distill import DPDConfig
here = Path(sys.argv[1])
sample_anymdp(64, 16, 3, seed=1).save(here / "t.safetensors")
tasks = TabularTasks.load(here / "t.safetensors")
write_records(here / "r", DPDConfig(batch=2, steps=4096, states=8, actions=3), 8, 1)
reader = ShardReader(here / "r")
reader.read(torch.tensor([0]))
for path in (here / "t.safetensors", here / "r" / "shard-00000.safetensors"):
    with open(path, "r+b") as file:
        file.truncate(100)
print(float(tasks.reward.sum()) != 0)
try:
    reader.read(torch.arange(8))
except ValueError as e:
    print(e)
"""


def test_shortened_files_end_no_process(tmp_path):
    where = str(Path(_C.__file__).parents[1])
    command = [sys.executable, "-c", SHORTENED, str(tmp_path)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": where}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    assert done.stdout.splitlines()[0] == "True"
    assert "shard-00000.safetensors: cut short or damaged" in done.stdout


# --- facts, indexes and configurations --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (b"", "Expecting value"),
        (b"\xff\xfe{}", "utf-8"),
        (b"\xef\xbb\xbf{}", "BOM"),
        (b"[" * 100_000, "nested more than 100 deep"),
        (b'{"a":' * 150 + b"1" + b"}" * 150, "nested more than 100 deep"),
        (b'{"a": 1, "b": 2, "a": 3}', "'a' is there twice"),
        (b"1" * 10_000, "a number of 10000 digits"),
        (b"[1, 2]", "holds list, wanted dict"),
        (b"\x1f\x8b\x08", "utf-8"),
    ],
)
def test_json_of_any_content(text, what, tmp_path):
    path = tmp_path / "c.json"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=what) as caught:
        read_json(path)
    assert str(path) in str(caught.value)
    for command in ("value-iteration-network", "offline"):
        assert main(["train", command, "--config", str(path), "--out", str(tmp_path / "run")]) == 2
    assert not (tmp_path / "run").exists()


def test_folders_pipes_and_nothing(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path} is damaged .it is a folder"):
        read_json(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none")
    with pytest.raises(ValueError, match=f"{tmp_path} is damaged .it is a folder"):
        read_rows(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(ValueError, match=f"{path}: cut short or damaged"):
            TensorFile(path)
        with pytest.raises(ValueError, match=f"checkpoint: no file {path}"):
            checkpoint.load(path)


def test_rows_of_a_log(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"update": 1, "loss": NaN}\n{"update": 2}\n{"update": 3, "lo')  # cut short by a kill
    assert [row["update"] for row in read_rows(path)] == [1, 2]
    assert math.isnan(read_rows(path)[0]["loss"])
    for line, what in (
        ("{}", "an integer 'update'"),
        ('{"update": 1, "loss": "x"}', "'loss': wanted a number"),
        ("", ""),
    ):
        path.write_text(f'{{"update": 1}}\n{line}\n{{"update": 2}}\n')
        with pytest.raises(ValueError, match=rf"{path} is damaged \(line 2: .*{what}"):
            read_rows(path)


def test_numbers_as_icrl_writes_them():
    for value in (2**64 - 1, -(2**63), 0.1, 1e-300, float("inf")):
        assert parse_json(json.dumps({"x": [value]})) == {"x": [value]}


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"loop": {"learning_rate": float("nan")}}, r"run\.loop\.learning_rate: wanted a finite number, got nan"),
        ({"loop": {"clip": 10**400}}, r"run\.loop\.clip: wanted a finite number, got inf"),
        ({"loop": {"updates": 1.5}}, r"run\.loop\.updates: wanted int, got 1\.5"),
        ({"loop": {"updates": True}}, r"run\.loop\.updates: wanted int, got True"),
        ({"loop": []}, r"run\.loop: wanted an object, got \[\]"),
        ({"data": [1]}, r"run\.data: wanted dict, got \[1\]"),
        ({"method": None}, r"run\.method: wanted str, got None"),
        ({"x" * 500: 1}, r"run has no x{80}\.\.\.; it has"),
        ({"method": ["x"] * 500}, r"run\.method: wanted str, got .{80}\.\.\.$"),
    ],
)
def test_configurations_of_other_types(values, what):
    with pytest.raises(ValueError, match=what):
        configured(OfflineRun, values, "run")


def test_elements_of_configurations_have_types():
    assert configured(ValueIterationNetworkConfig, {"discounts": [0, 0.5]}, "model").discounts == (0.0, 0.5)
    for given, what in (([0, "x"], r"discounts\[1\]: wanted float, got 'x'"), ([[0]], r"discounts\[0\]: wanted float")):
        with pytest.raises(ValueError, match=what):
            configured(ValueIterationNetworkConfig, {"discounts": given}, "model")
    assert configured(LoopConfig, {"clip": 2}, "loop").clip == 2.0


def test_a_command_names_its_configuration(tmp_path, capsys):
    path = tmp_path / "c.json"
    for command, given in (
        (["train", "value-iteration-network"], {"training": {"segment": "x"}}),
        (["train", "offline"], {"settings": {"horizon": [1]}}),
        (["train", "world-model"], {"world_model": {"size": None}}),
        (["collect", str(tmp_path / "out")], {"data": {"size": "x"}}),
        (["distill", str(tmp_path / "out"), "--tasks", "2"], {"tasks": {"anymdp": "x"}}),
        (["eval", "--suite", "sicql"], {"loop": {"updates": 0}}),
    ):
        path.write_text(json.dumps(given))
        out = [] if str(tmp_path / "out") in command else ["--out", str(tmp_path / "out")]
        assert main([*command, "--config", str(path), *out]) == 2
        said = capsys.readouterr().err
        assert str(path) in said, command
        assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "config",
    [
        {"layers": 10**9},
        {"action_width": 2**40},
        {"state_hidden": 2**60},
        {"layers": 0},
        {"pool_heads": -1},
        {"write_rate": 1.0},
        {"discounts": [0.5] * 100_000},
        {"discounts": {}},
        {"actions": "5"},
        "x",
        None,
    ],
)
def test_a_model_is_no_larger_than_its_file(config, tmp_path):
    """Sizes are compared before anything is allocated: terabytes of weights end in a line."""
    path = tmp_path / "m.safetensors"
    model = ValueIterationNetwork(TINY)
    facts = {"model": "omnirl", "config": {**TINY.__dict__, **config} if isinstance(config, dict) else config}
    checkpoint.save(path, model.state_dict(), facts)
    with pytest.raises(ValueError, match=r"m\.safetensors does not fit its own configuration"):
        ValueIterationNetwork.load(path)


def test_facts_of_any_type(tmp_path):
    path, tensors = tmp_path / "m.safetensors", {"x": torch.ones(2)}
    for facts in ("[]", "3", '"x"', "null", "[" * 100_000, '{"a": 1, "a": 2}', "{", "9" * 5000):
        save_file(tensors, path, metadata={"format": "2", "facts": facts, "crc32": str(checksum(tensors))})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is an earlier version's
            with pytest.raises(ValueError, match=r"m\.safetensors is damaged \(its facts are malformed"):
                checkpoint.load(path)
