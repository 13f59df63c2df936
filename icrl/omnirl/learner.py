"""What the learners of both models share: decoupled policy distillation with the model's own contexts mixed in (DAgger).

A batch holds records: a behaviour policy acted, references label every state. From some update on, a share of each batch is
records in which the model itself acted, in fresh tasks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from icrl.data.prefetch import Stream
from icrl.omnirl.agent import Temperature
from icrl.omnirl.distill import ANYMDP_LEAST, DPDConfig, DPDStream, Records, sample_tasks
from icrl.omnirl.evaluate import mean_ci, normalized, references, run_agent
from icrl.omnirl.labels import name_others, refuse_others, version_of
from icrl.omnirl.record_shards import RecordStream
from icrl.omnirl.tags import EXPLORER, UNKNOWN
from icrl.training.config import LoopConfig, changes
from icrl.training.process import parallel, rank, resolve, world_size


class Distillation(Protocol):
    """What a training's configuration says of records and of judging."""

    @property
    def model(self) -> Any: ...
    @property
    def data(self) -> DPDConfig: ...
    @property
    def records(self) -> str:
        """Folder of records (`icrl distill`) to train from; empty: made on the fly."""
        ...

    @property
    def dagger(self) -> float:
        """Share of the batch in which the model itself acted."""
        ...

    @property
    def dagger_every(self) -> int:
        """Updates between two collections."""
        ...

    @property
    def dagger_records(self) -> int:
        """Records of one collection, no fewer than a batch's share."""
        ...

    @property
    def dagger_kept(self) -> int:
        """How many collections are kept, the newest."""
        ...

    @property
    def own_records(self) -> int:
        """Records of a batch in which the model itself acted."""
        ...

    @property
    def evaluation_tasks(self) -> int: ...
    @property
    def evaluation_steps(self) -> int: ...


def check_distillation(c: Distillation) -> None:
    """ValueError where the model does not fit the data, or shares and sizes do not fit one another."""
    if c.model.discounts != c.data.discounts:
        raise ValueError(f"discounts: the model has {c.model.discounts}, the data {c.data.discounts}")
    if c.model.actions != c.data.actions:
        raise ValueError(f"actions: the model has {c.model.actions}, the data {c.data.actions}")
    if not 0 <= c.dagger < 1:
        raise ValueError(f"dagger: wanted a share in [0, 1), got {c.dagger}")
    if c.evaluation_steps < 2:
        raise ValueError(f"evaluation_steps: wanted at least 2, as halves are scored, got {c.evaluation_steps}")
    if c.data.actions < 2:
        raise ValueError(f"actions: wanted at least 2 to choose from, got {c.data.actions}")
    if c.own_records > c.dagger_records:
        raise ValueError(
            f"dagger_records: wanted at least {c.own_records}, the share of a batch of {c.data.batch} in which "
            f"the model acts, got {c.dagger_records}"
        )


class DistillationLearner:
    """What `icrl.training.loop.train` drives. A subclass gives the model, its configuration at each update, and losses.

    Records are made and labelled on the CPU; the model, its tokens and its targets live on the loop's device.

    Args:
        model: on the CPU, its weights drawn.
        init: a model's file to begin from, instead of from random weights; its configuration must be `config.model`.
        fresh: whether the run begins; one that goes on from a checkpoint does not read `init` again.
    Raises:
        ValueError: the device is not to be had, `init` is no such file, or the records are not what the model takes.
    """

    model: Any

    def __init__(
        self, model: nn.Module, config: Distillation, loop: LoopConfig, init: Path | None, fresh: bool
    ) -> None:
        self.loop, self.init = loop, init
        self.device = resolve(loop.device)
        self.model = model
        if init is not None and fresh:
            self._begin_from(init, config)
        self.model.to(self.device)
        if loop.compile:
            self.model.compile(dynamic=False)
        self.forward = parallel(self.model)
        self.stream: Stream[Records] = self._stream(config, loop.seed)
        self.own: Records | None = None
        self.collections = 0
        self._judge: Any = None

    def at(self, update: int) -> Any:
        """The training's configuration at an update."""
        raise NotImplementedError

    def config(self) -> dict[str, Any]:
        raise NotImplementedError

    def evaluate(self) -> dict[str, float]:
        raise NotImplementedError

    def save_model(self, path: Path, **facts: Any) -> None:
        self.model.save(path, training=self.config()["training"], seed=self.loop.seed, **facts)

    @property
    def dagger_from(self) -> int:
        """The first update with own records in its batch."""
        raise NotImplementedError

    def hidden_matrices(self) -> list[nn.Parameter]:
        raise NotImplementedError

    def losses(self, update: int) -> Iterable[tuple[Tensor, dict[str, Tensor]]]:
        raise NotImplementedError

    def _stream(self, config: Distillation, seed: int) -> Stream[Records]:
        """This process's batches, from disk or made on the fly."""
        if not config.records:
            return DPDStream(config.data, seed=seed * world_size() + rank())
        stream = RecordStream(config.records, config.data.batch, seed, rank=rank(), world=world_size())
        stream.check(config.data)
        return stream

    def _begin_from(self, init: Path, config: Distillation) -> None:
        given = type(self.model).load(init)
        refuse_others(f"init: {init}", given.labels)
        if found := changes(asdict(given.config), asdict(config.model), "training.model"):
            what = ", ".join(f"{name}: {there!r} in {init}, {here!r} given" for name, there, here in found)
            raise ValueError(f"init: {what}")
        self.model.load_state_dict(given.state_dict())

    def records(self, update: int) -> Records:
        """The batch of an update, on the CPU: the stream's next, with own records in place of its share."""
        c = self.at(update)
        records = next(self.stream)
        n = c.own_records
        if n and update >= self.dagger_from:
            fits = self.own is not None and self.own.observation.shape[1] == records.observation.shape[1]
            if not fits or (update - self.dagger_from) % c.dagger_every == 0:
                self._collect(c, None if not fits else self.own)
            assert self.own is not None
            chosen = torch.randperm(len(self.own.observation), device="cpu")[:n]
            records = Records(*(torch.cat([a[n:], b[chosen]]) for a, b in zip(records, self.own, strict=True)))
        return records

    def _collect(self, c: Distillation, kept: Records | None) -> None:
        """Let the model act in fresh tasks, and label where it went; `kept` is what there was before."""
        seed = (
            (1 + self.collections * world_size() + rank()) * 1_000_003 + self.loop.seed + 2**40
        )  # apart from the stream's
        tasks = sample_tasks(c.data, c.dagger_records, seed)
        q = tasks.solve(torch.tensor(c.model.discounts, dtype=torch.float32, device=tasks.device)).q.float()
        end = (1.0, 0.5, 0.2)[self.collections % 3]  # of the temperature: from exploring to exploiting
        prompt = (EXPLORER, 2, EXPLORER, 3)[self.collections % 4]
        went = run_agent(
            self.model,
            tasks,
            c.data.steps,
            prompt=prompt,
            temperature=Temperature(1.0, end, c.data.steps // 2),
            seed=seed,
        )
        everyone = torch.arange(len(tasks), dtype=torch.int64, device=q.device)[:, None]
        unknown = torch.full_like(went.action, UNKNOWN)
        new = Records(went.observation, went.action, went.reward, went.done.long(), unknown, q[everyone, :, went.state])
        if kept is not None:
            most = c.dagger_kept * c.dagger_records
            new = Records(*(torch.cat([a, b])[-most:] for a, b in zip(kept, new, strict=True)))
        self.own = new
        self.collections += 1

    def _score(self, c: Distillation, states: int) -> dict[str, float]:
        """Reward per step in fresh tasks of AnyMDP of so many states, or, where these are too few, as the data's."""
        if self._judge is None:
            chosen: dict[str, Any] = {"kind": "anymdp", "num_states": states} if states >= ANYMDP_LEAST else {}
            tasks = sample_tasks(c.data, c.evaluation_tasks, 2**41 + 17, **chosen)
            self._judge = tasks, references(tasks)
        tasks, reference = self._judge
        context = run_agent(self.model, tasks, c.evaluation_steps, seed=7)
        half = c.evaluation_steps // 2
        spans = {"score_first_half": (0, half), "score": (half, c.evaluation_steps)}
        return {name: mean_ci(normalized(context, reference, *span))[0] for name, span in spans.items()}

    def state_dict(self) -> dict[str, Any]:
        own = None if self.own is None else self.own._asdict()
        return {
            "stream": self.stream.state_dict(),
            "own": own,
            "collections": self.collections,
            "labels": self.model.labels,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._go_on_with_labels(version_of(state))
        self.stream.load_state_dict(state["stream"])
        self.own = None if state["own"] is None else Records(**state["own"])
        self.collections = state["collections"]

    def _go_on_with_labels(self, version: int) -> None:
        """A run of another version is refused; one from before there were versions goes on, and its weights stay of none."""
        if version:
            refuse_others("out: the run", version)
        if not self.model.labels_named:
            name_others("the run", version)
        self.model.labels, self.model.labels_named = version, True

    def redistribute(self, state: dict[str, Any], processes: int, own: bool) -> None:
        """Go on from a state of a run of another number of processes.

        No batch comes twice: streams made on the fly keep the position of the next batch, under the seeds of the new
        processes; records on disk go on where all processes together had come to in the epoch. A process whose state is
        not its own (`own`) lets the model act anew for records of its own.
        """
        self._go_on_with_labels(version_of(state))
        before, here = state["stream"], self.stream
        position = before["next_batch"]
        if isinstance(here, RecordStream):
            position = here.position_after(position, processes)
        here.load_state_dict({"seed": here.seed, "next_batch": position})
        self.own = None if state["own"] is None or not own else Records(**state["own"])
        self.collections = -(-state["collections"] * processes // world_size())  # numbers that no process has used
