"""A training run's folder: its record, versions, log and checkpoints."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from icrl.extras import versions
from icrl.files import LOCK, append_text, locked, name_folder, sync_file, write_bytes, write_json
from icrl.reading import named, read_json, shown
from icrl.training import checkpoint
from icrl.training.config import LoopConfig, changes
from icrl.training.process import machine, of_the_first, rank, wait_for_all

FREE = {"loop.updates", "loop.device", "loop.threads", "loop.compile", "world_size"}
"""What may differ when a run goes on: settings that say how far and on what it trains."""


class Run:
    """A training run's folder, held for this process (with several, for the group) until it is closed or its process ends.

    Args:
        folder: a new one, an empty one, or that of a run, which then goes on.
        config: the run's configuration in JSON's terms: "loop" and "world_size", and what the learner has.
        upgraded: brings a record that an earlier version wrote to today's form.
    Raises:
        ValueError: the folder is not empty and holds no run, or a run of another configuration: what differs is named, with
            both values; or another process is at work there.
    """

    def __init__(
        self, folder: Path, config: dict[str, Any], upgraded: Callable[[dict[str, Any]], dict[str, Any]] = dict
    ) -> None:
        self.folder, self.checkpoints = folder, folder / "checkpoints"
        record = folder / "config.json"
        self.config = config = json.loads(json.dumps(config, default=str))
        begun = {LOCK, record.name + ".part"}  # what a kill before the first record leaves
        others = folder.is_dir() and any(p.name not in begun for p in folder.iterdir())
        if others and not record.exists():
            raise ValueError(f"out: {folder} is not empty and holds no run (no config.json); choose another")
        self._held = ExitStack()
        if refused := of_the_first(self._hold() if rank() == 0 else ""):
            raise ValueError(refused)
        try:
            self._enter(record, upgraded)
        except BaseException:
            self._held.close()
            raise
        self._board: Any = None
        self._purge: int | None = None

    def _hold(self) -> str:
        """Lock the folder; what is against it."""
        try:
            self._held.enter_context(locked(self.folder, wait=False))
        except (ValueError, OSError) as e:
            return str(e)
        return ""

    def _enter(self, record: Path, upgraded: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        goes_on = record.exists() and self.newest() is not None
        if goes_on:
            try:
                self._compare(upgraded(_read(record)))
            except (AttributeError, LookupError, TypeError) as e:  # its values are of other types
                raise ValueError(f"out: {record} is damaged ({checkpoint.why(e)})") from e
        wait_for_all()  # every process has looked at the folder as it was found
        if rank() == 0:
            for part in self.checkpoints.glob("*.part"):  # of a save that a kill cut short, perhaps of more processes
                shutil.rmtree(part)
            if not goes_on:
                write_json(record, self.config)
        wait_for_all()

    def close(self) -> None:
        """Let the folder go, with all that was logged in it."""
        with self._held:
            if self._board:
                self._board.close()

    def _compare(self, old: dict[str, Any]) -> None:
        """Refuse another configuration; say what is free to differ and does."""
        old = {"world_size": 1, **old, "loop": {**json.loads(json.dumps(asdict(LoopConfig()))), **old.get("loop", {})}}
        found = changes(old, self.config)
        if refused := [c for c in found if c[0] not in FREE]:
            what = ", ".join(_difference(*c) for c in refused)
            raise ValueError(f"out: {self.folder} holds a run with another configuration ({what}); choose another")
        newest = self.newest()
        assert newest is not None
        if (done := int(newest.name)) > self.config["loop"]["updates"]:
            given = self.config["loop"]["updates"]
            raise ValueError(f"out: {self.folder}: loop.updates: {done} done in the run, {given} given")
        if found and rank() == 0:
            print(f"{self.folder} goes on with another setting: " + ", ".join(_difference(*c) for c in found))

    def newest(self) -> Path | None:
        """The folder of the last finished checkpoint."""
        found = self._whole()
        return found[-1] if found else None

    def _whole(self) -> list[Path]:
        """The finished checkpoints, oldest first; what a kill cut short ends in .part."""
        return sorted(p for p in self.checkpoints.glob("[0-9]*") if p.name.isdigit())

    def begin(self, update: int, device: torch.device) -> None:
        """Record with what the run goes on from `update`: its configuration, versions and machine.

        `versions.json` is a list, an entry for each time that something of it changed; a change is said in a line.
        """
        if rank():
            return
        write_json(self.folder / "config.json", self.config)
        path = self.folder / "versions.json"
        entries: list[dict[str, Any]] = _read(path, list) if path.exists() else []
        if not all(isinstance(entry, dict) for entry in entries):
            raise ValueError(f"out: {path} is damaged (wanted objects)")
        now = {**versions(), **machine(device)}
        if entries:
            last = {name: value for name, value in entries[-1].items() if name != "update"}
            found = changes(last, now)
            if not found:
                return
            what = ", ".join(f"{name}: {a} in the run, {b} now" for name, a, b in found)
            print(f"{self.folder} goes on with another version or machine: {what}")
        write_json(path, [*entries, {"update": update, **now}])

    def save(self, update: int, state: dict[str, Any]) -> None:
        """Every rank writes its part; the folder takes its final name only when all are whole."""
        part, final = self.checkpoints / f"{update:08d}.part", self.checkpoints / f"{update:08d}"
        tensors: dict[str, Tensor] = {}
        facts: dict[str, Any] = {}
        checkpoint.flatten("run", state, tensors, facts)
        checkpoint.save(part / f"rank{rank()}.safetensors", tensors, facts)
        wait_for_all()
        if rank() == 0:
            if (log := self.folder / "metrics.jsonl").exists():
                sync_file(log)  # the rows up to this update are not logged again
            name_folder(part, final)
            for old in [*self._whole()[:-2], *self.checkpoints.glob("*.part")]:
                shutil.rmtree(old)
        wait_for_all()

    def load(self) -> tuple[dict[str, Any], int, bool] | None:
        """The newest checkpoint's state, how many processes wrote it, and whether this one has a file of its own in it.

        A process without one is given rank 0's.
        """
        newest = self.newest()
        if newest is None:
            return None
        processes = len(list(newest.glob("rank*.safetensors")))
        own = rank() < processes
        try:
            path = newest / f"rank{rank() if own else 0}.safetensors"
            tensors, facts = checkpoint.load(path)
            try:
                state = checkpoint.unflatten("run", tensors, facts)
                if type(state["update"]) is not int or state["update"] != int(newest.name):
                    raise ValueError(f"update: wanted {int(newest.name)}, got {shown(state['update'])}")
            except checkpoint.MALFORMED as e:
                raise ValueError(f"checkpoint: {path} is damaged ({checkpoint.why(e)})") from e
        except ValueError as e:
            raise ValueError(f"{e}; delete {newest} to go on from the checkpoint before it") from e
        return state, max(1, processes), own

    def forget_after(self, update: int) -> None:
        """Drop logged rows that the run will log again, and one that a kill cut short."""
        log = self.folder / "metrics.jsonl"
        self._purge = update + 1
        if log.is_dir():
            raise ValueError(f"out: {log} is damaged (it is a folder)")
        if rank() == 0 and log.exists():
            rows = log.read_bytes().split(b"\n")
            write_bytes(log, b"".join(row + b"\n" for row in rows if _logged(row) <= update))

    def log(self, update: int, metrics: dict[str, float]) -> None:
        """Add a row to metrics.jsonl, and to TensorBoard's files where that is installed; rank 0's alone."""
        if rank():
            return
        append_text(self.folder / "metrics.jsonl", json.dumps({"update": update, **metrics}) + "\n")
        if self._board is None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                self._board = False
                print(
                    "tensorboard is not installed (pip install 'icrl-kernels[train]'): logging to metrics.jsonl alone"
                )
            else:
                self._board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=self._purge)
        if self._board:
            for name, value in metrics.items():
                self._board.add_scalar(name, value, update)


def has_checkpoint(folder: Path) -> bool:
    """Whether a run in this folder has a finished checkpoint, from which it goes on."""
    return any(p.name.isdigit() for p in (folder / "checkpoints").glob("[0-9]*"))


def _difference(name: str, old: Any, new: Any) -> str:
    return f"{named(name)}: {shown(old)} in the run, {shown(new)} given"


def _read(path: Path, kind: type = dict) -> Any:
    return read_json(path, kind, "out: {path} is damaged ({why})")


def _logged(row: bytes) -> float:
    """The update of a logged row; infinity for one that a kill or a full disk cut short, or that a power cut left unwritten."""
    try:
        update = json.loads(row.decode())["update"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf
    return update if type(update) is int else math.inf
