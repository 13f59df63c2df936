"""Training of in-context learners from offline data: what `icrl.training.loop.train` drives, and their files."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from icrl.offline.history import HistoryConfig
from icrl.offline.method import Method, MethodConfig, Spaces
from icrl.offline.methods.ad import AD
from icrl.offline.methods.dicp import DICP, DICPConfig
from icrl.offline.methods.dit import DIT, DITConfig
from icrl.offline.methods.dpt import DPT, DPTConfig
from icrl.offline.methods.ic_iql import ICIQL, ICIQLConfig
from icrl.offline.methods.idt import IDT, IDTConfig
from icrl.offline.methods.sicql import SICQL, SICQLConfig
from icrl.offline.trajectories import Trajectories
from icrl.offline.world_model import WorldModel
from icrl.training import checkpoint
from icrl.training.config import configured

METHODS: dict[str, tuple[type[Method], type[MethodConfig]]] = {
    "sicql": (SICQL, SICQLConfig),
    "dpt": (DPT, DPTConfig),
    "ad": (AD, HistoryConfig),
    "idt": (IDT, IDTConfig),
    "dicp": (DICP, DICPConfig),
    "dit": (DIT, DITConfig),
    "ic_iql": (ICIQL, ICIQLConfig),
}


def make_method(name: str, config: MethodConfig, spaces: Spaces, world_model: WorldModel | None = None) -> Method:
    """A fresh method by its name. Raises ValueError for an unknown name, or a world model where none is used."""
    if name not in METHODS:
        raise ValueError(f"method: wanted one of {', '.join(METHODS)}, got {name!r}")
    if name == "sicql":
        assert isinstance(config, SICQLConfig)
        return SICQL(config, spaces, world_model)
    if world_model is not None:
        raise ValueError(f"world_model: {name} uses none")
    return METHODS[name][0](config, spaces)


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
    """What `save_method` wrote, ready to act. Raises ValueError where the file is none."""
    tensors, facts = checkpoint.load(path)
    if facts.get("model") != "offline method":
        raise ValueError(f"checkpoint: {path} holds a {facts.get('model')!r}, wanted an offline method")
    made = facts["made"]
    kind = METHODS[made["method"]][1]
    world_model = None if made["world_model"] is None else WorldModel.from_facts(made["world_model"])
    method = make_method(
        made["method"], configured(kind, made["config"], "config"), Spaces(**made["spaces"]), world_model
    )
    method.load_state_dict(tensors)
    return method.eval()


class OfflineLearner:
    """A method, its data, and a judge: a function of the method that scores it in unseen tasks."""

    def __init__(
        self,
        method: Method,
        data: Trajectories,
        facts: dict[str, Any],
        judge: Callable[[Method], dict[str, float]],
    ) -> None:
        if Spaces.of(data) != method.spaces:
            raise ValueError(f"data: wanted {method.spaces}, got {Spaces.of(data)}")
        method.prepare(data)
        self.model: Method = method
        self.data, self.facts, self.judge = data, facts, judge

    def config(self) -> dict[str, Any]:
        made = {"method": self.model.name, "config": asdict(self.model.config), **self.facts}
        if (world_model := getattr(self.model, "world_model", None)) is not None:  # frozen: a run goes on with the same
            made["world_model"] = {**world_model.facts(), "crc32": checkpoint.checksum(world_model.state_dict())}
        return made

    def hidden_matrices(self) -> list[nn.Parameter]:
        return [
            p
            for name, p in self.model.named_parameters()
            if p.ndim == 2 and p.requires_grad and ".blocks." in name and name.endswith("weight")
        ]

    def losses(self, update: int) -> Iterable[tuple[Tensor, dict[str, float]]]:
        self.model.before_update()
        yield self.model.loss(self.data)

    def evaluate(self) -> dict[str, float]:
        return self.judge(self.model)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass

    def save_model(self, path: Path, **facts: Any) -> None:
        save_method(self.model, path, **facts)
