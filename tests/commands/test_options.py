"""What a command cannot heed is refused at its start, and named."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import icrl.cli
from icrl.cli import main
from icrl.omnirl.distill import DPDConfig
from icrl.omnirl.value_iteration_training import ValueIterationTraining
from icrl.training.config import configured
from icrl.worlds import TabularTasks
from icrl.worlds.difficulty import compare, draw_difficulty

ROOT = Path(icrl.cli.__file__).parents[1]  # of the package under test, which may be an installed one


def refused(capsys, *args) -> str:
    capsys.readouterr()
    assert main([str(a) for a in args]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


@pytest.mark.parametrize("option", [("--kind", "garnet"), ("--num-tasks", 64), ("--num-states", 16)])
def test_eval_of_a_file_has_no_fresh_tasks(option, tmp_path, capsys):
    file = tmp_path / "t.safetensors"
    name = option[0][2:].replace("-", "_")
    said = refused(capsys, "eval", "--tasks", file, *option)
    assert said == f"icrl: {name}: an option of fresh tasks, got {option[1]} beside tasks={file}"


OF_OTHERS = [
    ("bandit", "--branching", "garnet"),
    ("anymdp", "--branching", "garnet"),
    ("pomdp", "--branching", "garnet"),
    *((kind, f"--{name}", "pomdp") for kind in ("anymdp", "garnet", "bandit") for name in
      ("num-observations", "observation-tokens", "action-tokens")),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "option", "of"), OF_OTHERS)
@pytest.mark.parametrize("command", ["sample", "shards"])
def test_options_of_other_kinds_of_tasks(command, kind, option, of, tmp_path, capsys):
    said = refused(capsys, "worlds", command, tmp_path / "t", "--kind", kind, option, 2)
    assert said == f"icrl: {option[2:].replace('-', '_')}: an option of {of} tasks, got 2 for {kind}"
    assert not (tmp_path / "t").exists()


def test_a_bandits_number_of_states_is_that_of_its_ids(tmp_path):
    for given, ids in (([], 1), (["--num-states", "4"], 4)):
        file = tmp_path / f"{ids}"
        assert main(["worlds", "sample", str(file), "--kind", "bandit", "--num-tasks", "40", *given]) == 0
        tasks = TabularTasks.load(file)
        assert (tasks.num_observations, int(tasks.state_mapping.max())) == (ids, ids - 1)


TINY = {
    "model": {"layers": 1, "action_width": 8, "state_width": 12, "value_width": 4},
    "data": {"batch": 2, "steps": 16},
    "segment": 8,
    "dagger": 0.0,
    "evaluation_tasks": 2,
    "evaluation_steps": 20,
}


def test_small_tasks_are_judged_by_their_own_kind(tmp_path):
    """AnyMDP has no tasks of fewer than 8 states."""
    data = {**TINY["data"], "states": 4, "least_states": 3, "tasks": {"garnet": 1.0}}
    loop = {"updates": 2, "evaluate_every": 1, "checkpoint_every": 2, "log_every": 1}
    (tmp_path / "c.json").write_text(json.dumps({"training": {**TINY, "data": data}, "loop": loop}))
    assert (
        main(["train", "value-iteration-network", "--config", str(tmp_path / "c.json"), "--out", str(tmp_path / "run")])
        == 0
    )
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    scores = [row["score"] for row in rows if "score" in row]
    assert len(scores) == 2
    assert all(-20 < score < 20 for score in scores)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"least_states": 3}, "least_states: anymdp tasks have 8 states or more, got 3"),
        ({"garnet_branching": 9}, "least_states: garnet tasks have 9 states or more, got 8"),
        ({"actions": 1}, "actions: anymdp tasks have 2 actions or more, got 1"),
        ({"actions": 1, "tasks": {"bandit": 1.0}}, "actions: bandit tasks have 2 actions or more, got 1"),
    ],
)
def test_tasks_that_cannot_be_drawn(data, said):
    with pytest.raises(ValueError, match=f"^{said}$"):
        configured(DPDConfig, data, "data")


def test_sizes_of_kinds_that_are_not_drawn_do_not_count():
    assert DPDConfig(least_states=3, tasks={"anymdp": 0.0, "garnet": 1.0}).least_states == 3


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"dagger": 0.5, "dagger_records": 4, "data": {"batch": 10}}, "dagger_records: wanted at least 5, .*, got 4"),
        ({"evaluation_steps": 1}, "evaluation_steps: wanted at least 2, .*, got 1"),
        (
            {"model": {"actions": 1}, "data": {"actions": 1, "tasks": {"garnet": 1.0}}},
            "actions: wanted at least 2 to choose from, got 1",
        ),
    ],
)
def test_training_that_cannot_do_what_it_says(settings, said):
    with pytest.raises(ValueError, match=f"^{said}$"):
        configured(ValueIterationTraining, settings, "training")


def test_as_many_own_records_as_a_batch_wants_are_enough():
    training: ValueIterationTraining = configured(
        ValueIterationTraining, {"dagger": 0.5, "dagger_records": 5, "data": {"batch": 10}}, "training"
    )
    assert training.own_records == 5


def test_every_size_of_the_difficulty_is_drawn():
    numbers = compare(4, (8, 9, 10, 11, 12), 3, 2, 0)
    for axis in draw_difficulty(numbers).axes:
        assert len(axis.collections) == 5


def test_a_deleted_folder(tmp_path):
    line = f"mkdir gone; cd gone; rmdir ../gone; {sys.executable} -m icrl.cli worlds inspect {tmp_path}/t"
    given = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, env=given, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "icrl: the working directory was deleted; change to one that exists"


@pytest.mark.parametrize(
    "command", [["worlds", "sample", "OUT", "--num-tasks"], ["eval", "--num-tasks"], ["context", "--steps"]]
)
def test_more_than_the_memory_holds(command, tmp_path, capsys):
    said = refused(capsys, *(tmp_path / "t" if part == "OUT" else part for part in command), 10**14)
    assert said.startswith("icrl: not enough memory for ")
    assert said.endswith(" bytes")
    assert not list(tmp_path.iterdir())
