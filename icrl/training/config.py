"""The loop's configuration, and configurations from JSON objects: read, merged, compared."""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from icrl_kernels.arguments import MOST_THREADS, integer, integer_fields


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over`, objects within objects too."""
    both = {
        k: merged(base[k], v) if isinstance(base.get(k), dict) and isinstance(v, dict) else v for k, v in over.items()
    }
    return {**base, **both}


def differences(found: Any, wanted: Any, name: str = "") -> str:
    """Where two JSON objects differ: "a.b: 1, wanted 2"; empty where they do not."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        both = (differences(found.get(k), wanted.get(k), f"{name}.{k}".lstrip(".")) for k in {**found, **wanted})
        return ", ".join(d for d in both if d)
    return "" if found == wanted else f"{name}: {found!r}, wanted {wanted!r}"


def changes(old: Any, new: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    """(name, old value, new value) of each place where two JSON objects differ; None where one has no such key."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = {**old, **new}
        return [c for k in keys for c in changes(old.get(k), new.get(k), f"{name}.{k}".lstrip("."))]
    return [] if old == new else [(name, old, new)]


@dataclass(frozen=True)
class LoopConfig:
    updates: int = 1500
    """Batches; one of several segments takes an optimiser step after each. A run may go on to more than it was begun with:
    from there on its rates are those of a run of the new total."""
    learning_rate: float = 3e-3
    """AdamW's, for all parameters that Muon does not take."""
    muon_learning_rate: float = 0.01
    """Muon's, for the hidden matrices; 0 leaves all to AdamW."""
    weight_decay: float = 0.01
    warmup: int = 50
    """Updates of linear warm-up."""
    decay: float = 0.4
    """The last fraction of the updates, over which the rates fall linearly to a hundredth."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    checkpoint_every: int = 50
    evaluate_every: int = 150
    log_every: int = 20
    seed: int = 0
    """Of weights, batches and all else that is drawn."""
    device: str = "auto"
    """Where the model and its tensors live: a torch device, or "auto", which is CUDA where there is one, else the CPU."""
    autocast: bool = False
    """Compute in bfloat16 where torch's autocast does; weights and states stay float32."""
    threads: int = 0
    """Threads of this process; 0 leaves torch's choice."""
    compile: bool = False
    """Compile the model with torch.compile: on two CPU cores 10% faster after minutes of compiling."""

    def __post_init__(self) -> None:
        integer_fields(self, updates=1, checkpoint_every=1, evaluate_every=1, log_every=1)
        integer("threads", self.threads, 0, MOST_THREADS)
        for name in ("learning_rate", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: wanted a positive number, got {getattr(self, name)}")
        for name in ("muon_learning_rate", "weight_decay", "warmup", "decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: wanted at least 0, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed: wanted 0 to 2^63 - 1, got {self.seed}")


def configured(kind: type[Any] | Any, values: dict[str, Any], name: str) -> Any:
    """A (nested) configuration dataclass with `values` over its defaults, or over those of an instance given as `kind`.

    Raises ValueError naming a key that it does not have, or whose value is of another type.
    """
    if not isinstance(values, dict):
        raise ValueError(f"config: {name}: wanted an object, got {values!r}")
    base = kind() if isinstance(kind, type) else kind
    known = {f.name: f for f in fields(base)}
    if unknown := set(values) - set(known):
        raise ValueError(f"config: {name} has no {', '.join(sorted(unknown))}; it has {', '.join(known)}")
    changes: dict[str, Any] = {}
    for key, value in values.items():
        old = getattr(base, key)
        if is_dataclass(old):
            value = configured(old, value, f"{name}.{key}")
        elif isinstance(old, tuple) and isinstance(value, list):
            value = tuple(value)
        elif isinstance(old, float) and type(value) is int:
            value = float(value)
        if type(value) is not type(old):
            raise ValueError(f"config: {name}.{key}: wanted {type(old).__name__}, got {value!r}")
        changes[key] = value
    return replace(base, **changes)


def init_of(init: Path | None, given: dict[str, Any]) -> Path | None:
    """`init`, or else the one in a configuration that is a run's own record. Raises ValueError where that is no path."""
    found = given.get("init")
    if not isinstance(found, str | None):
        raise ValueError(f"config: init: wanted a path, got {found!r}")
    return Path(found) if init is None and found else init
