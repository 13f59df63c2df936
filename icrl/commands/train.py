"""`icrl train omnirl` and `icrl train value-iteration-network`: meta-training, in one process or in those that torchrun starts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from icrl.extras import versions
from icrl.files import save_numbers, write_figure
from icrl.omnirl import training as sequence
from icrl.omnirl import value_iteration_training as memory
from icrl.omnirl.learner import DistillationLearner
from icrl.plots import training_picture
from icrl.reading import read_rows
from icrl.training.config import LoopConfig, init_of
from icrl.training.loop import train
from icrl.training.process import finish, flushed_denormals, machine, prepare, rank
from icrl.training.run import has_checkpoint


def train_omnirl(
    out: Path,
    given: dict[str, Any],
    preset: str,
    over: dict[str, Any],
    init: Path | None,
    json: Path | None,
) -> dict[str, Any] | None:
    """As `train_value_iteration_network`; `preset`: a name of sequence.PRESETS, the configuration's base."""
    training, loop = sequence.read_config(given, preset)
    return _train(sequence.OmniRLLearner, training, replace(loop, **over), out, init_of(init, given), json)


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
    training, loop = memory.read_config(given)
    if records is not None:
        training = replace(training, records=str(records))
    return _train(memory.ValueIterationLearner, training, replace(loop, **over), out, init_of(init, given), json)


def _train(
    kind: Callable[..., DistillationLearner],
    training: Any,
    loop: LoopConfig,
    out: Path,
    init: Path | None,
    json: Path | None,
) -> dict[str, Any] | None:
    prepare(loop)
    learner = kind(training, loop, init, fresh=not has_checkpoint(out))
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
