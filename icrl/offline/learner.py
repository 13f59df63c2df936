"""Training of in-context learners from offline data: what `icrl.training.loop.train` drives, and their files."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from icrl.offline.method import Method, MethodConfig, Metrics, Spaces
from icrl.offline.methods import METHODS, method_class
from icrl.offline.provenance import goes_on
from icrl.offline.trajectories import Trajectories
from icrl.offline.world_model import WorldModel
from icrl.training import checkpoint
from icrl.training.config import LoopConfig, configured, differences
from icrl.training.process import autocast

__all__ = ["METHODS", "OfflineLearner", "begin_from", "load_method", "make_method", "save_method"]


def make_method(name: str, config: MethodConfig, spaces: Spaces, world_model: WorldModel | None = None) -> Method:
    """A fresh method by its name, on the CPU, in float32. Raises ValueError for an unknown name, or a world model where none is used."""
    with torch.device("cpu"):
        return method_class(name).make(config, spaces, world_model).float()


def save_method(method: Method, path: Path, **facts: Any) -> None:
    world_model = getattr(method, "world_model", None)
    made = {
        "method": method.name,
        "config": asdict(method.config),
        "spaces": method.spaces._asdict(),
        "world_model": None if world_model is None else world_model.facts(),
    }
    checkpoint.save(path, method.state_dict(), {"model": "offline method", "made": made, **facts})


def load_method(path: Path) -> Method:
    """What `save_method` wrote, on the CPU, ready to act. Raises ValueError where the file is none."""
    tensors, facts = checkpoint.load(path)
    if facts.get("model") != "offline method":
        raise ValueError(f"checkpoint: {path} holds a {facts.get('model')!r}, wanted an offline method")
    made = facts["made"]
    kind = method_class(made["method"]).config_class
    world_model = None if made["world_model"] is None else WorldModel.from_facts(made["world_model"])
    method = make_method(
        made["method"], configured(kind, made["config"], "config"), Spaces(**made["spaces"]), world_model
    )
    method.load_state_dict(tensors)
    return method.eval()


def begin_from(method: Method, initial: Method) -> None:
    """Give `method` all weights of `initial`, with the moments of the data that these were trained on.

    Raises ValueError where they are not the same network: the field and both values are named.
    """
    if method.name != initial.name:
        raise ValueError(f"init: wanted a {method.name}, got a {initial.name}")
    for name, of in (("spaces", lambda m: m.spaces._asdict()), ("settings.trunk", lambda m: asdict(m.config.trunk))):
        if other := differences(of(initial), of(method), name):
            raise ValueError(f"init: {other}")
    shapes, given = ({n: list(t.shape) for n, t in m.state_dict().items()} for m in (method, initial))
    if other := differences(given, shapes):
        raise ValueError(f"init: another network, its {other}")
    method.load_state_dict(initial.state_dict())


class OfflineLearner:
    """A method, its data, and a judge: a function of the method that scores it in unseen tasks.

    Args:
        method: on the device where it is to be trained; `prepare` is called. data: is moved there.
        facts: what, beside the method's own, a run in the same folder must share to be continued.
        judge: gives numbers to log. loop: whose `compile` and `autocast` are heeded.
        initial: whose weights to begin from, see `begin_from`; fresh ones otherwise.
        record: what config.json also holds and may be another when the run goes on, see `goes_on`.
    Raises:
        ValueError: the data have other spaces, do not suit the method, or the method cannot be compiled.
    """

    def __init__(
        self,
        method: Method,
        data: Trajectories,
        facts: dict[str, Any],
        judge: Callable[[Method], dict[str, float]],
        loop: LoopConfig | None = None,
        initial: Method | None = None,
        record: dict[str, Any] | None = None,
    ) -> None:
        if Spaces.of(data) != method.spaces:
            raise ValueError(f"data: wanted {method.spaces}, got {Spaces.of(data)}")
        self.loop = LoopConfig() if loop is None else loop
        if self.loop.compile:
            method.check_compile(method.config)
        self.model: Method = method
        self.data, self.facts, self.judge = data.to(method.device), facts, judge
        self.record = record or {}
        method.prepare(self.data)
        if initial is not None:
            begin_from(method, initial)
        self.objective = torch.compile(method.objective, dynamic=False) if self.loop.compile else method.objective

    def config(self) -> dict[str, Any]:
        made = {"method": self.model.name, "config": asdict(self.model.config), **self.facts}
        if (world_model := getattr(self.model, "world_model", None)) is not None:  # frozen: a run goes on with the same
            crc32 = checkpoint.checksum({n: t.cpu() for n, t in world_model.state_dict().items()})
            made["world_model"] = {**world_model.facts(), "crc32": crc32}
        return {**made, **self.record}

    def upgraded(self, config: dict[str, Any]) -> dict[str, Any]:
        return goes_on(config, self.record)

    def hidden_matrices(self) -> list[nn.Parameter]:
        return [
            p
            for name, p in self.model.named_parameters()
            if p.ndim == 2 and p.requires_grad and ".blocks." in name and name.endswith("weight")
        ]

    def losses(self, update: int) -> Iterable[tuple[Tensor, Metrics]]:
        self.model.before_update()
        batch = self.model.draw(self.data)
        with autocast(self.loop, self.model.device):
            loss, metrics = self.objective(self.data, batch)
        yield loss, metrics

    def evaluate(self) -> dict[str, float]:
        return self.judge(self.model)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass

    def save_model(self, path: Path, **facts: Any) -> None:
        save_method(self.model, path, **facts)
