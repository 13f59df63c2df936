"""`icrl train value-iteration-network`: meta-training, in one process or in those that torchrun starts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from icrl.extras import versions
from icrl.files import save_numbers, write_figure
from icrl.omnirl.value_iteration_training import ValueIterationLearner, read_config
from icrl.plots import training_picture
from icrl.reading import read_rows
from icrl.training.config import init_of
from icrl.training.loop import train
from icrl.training.process import finish, flushed_denormals, machine, prepare, rank
from icrl.training.run import has_checkpoint


def train_value_iteration_network(
    out: Path, given: dict[str, Any], records: Path | None, over: dict[str, Any], init: Path | None, json: Path | None
) -> dict[str, Any] | None:
    """Train in the folder `out`, or go on there; prints where the model and its picture are.

    Args:
        given: the configuration as a JSON object, over the defaults. records: a folder of records, over it.
        over: fields of the loop's configuration, over it. init: a model's file to begin from.
        json: where an evaluation of the model at the end is written; None for no evaluation.
    Returns:
        the evaluation, versions and machine, where this process is the first one and there was an evaluation.
    """
    training, loop = read_config(given)
    if records is not None:
        training = replace(training, records=str(records))
    loop = replace(loop, **over)
    prepare(loop)
    learner = ValueIterationLearner(training, loop, init_of(init, given), fresh=not has_checkpoint(out))
    with flushed_denormals():
        path = train(learner, loop, out)
    numbers = None
    if rank() == 0:
        write_figure(out / "curve.png", training_picture(read_rows(out / "metrics.jsonl")), dpi=110)
        if json is not None:
            numbers = {"model": str(path), **learner.evaluate(), "versions": versions(), **machine(learner.device)}
            save_numbers(json, numbers)
        print(f"model: {path}\npicture: {out / 'curve.png'}")
    finish()
    return numbers
