"""The loop's configuration, and configurations from JSON objects: read, merged, compared."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from icrl.reading import named, shown
from icrl_kernels.arguments import MOST_THREADS, integer, integer_fields

LONGEST_TEXT = 4096  # characters of a configuration's texts: names and paths


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
    """Muon's alone."""
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
        if self.decay > 1:
            raise ValueError(f"decay: wanted a fraction of the updates, at most 1, got {self.decay}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed: wanted 0 to 2^63 - 1, got {self.seed}")


def configured(kind: type[Any] | Any, values: Any, name: str) -> Any:
    """A (nested) configuration dataclass with `values` over its defaults, or over those of an instance given as `kind`.

    Raises ValueError naming a key that it does not have, or whose value is of another type: elements of lists and objects
    too, and numbers that are not finite.
    """
    if not isinstance(values, dict):
        raise ValueError(f"config: {name}: wanted an object, got {shown(values)}")
    base = kind() if isinstance(kind, type) else kind
    known = get_type_hints(type(base))
    names = [f.name for f in fields(base)]
    if unknown := set(values) - set(names):
        raise ValueError(f"config: {name} has no {', '.join(sorted(map(named, unknown)))}; it has {', '.join(names)}")
    changes = {}
    for key, value in values.items():
        where, old = f"{name}.{key}", getattr(base, key)
        changes[key] = configured(old, value, where) if is_dataclass(old) else _typed(value, known[key], where)
    return replace(base, **changes)


def _typed(value: Any, kind: Any, name: str) -> Any:
    """A JSON value as a field's type has it: lists as tuples, whole numbers as floats where these are wanted."""
    of, inner = get_origin(kind) or kind, get_args(kind)
    if of is Any:
        return value
    if is_dataclass(kind):
        return configured(kind, value, name)
    if of is dict and type(value) is dict:
        return {_typed(key, str, name): _typed(item, inner[1], f"{name}.{named(key)}") for key, item in value.items()}
    if of is tuple and type(value) in (list, tuple):
        kinds = [inner[0]] * len(value) if inner[1:] == (...,) else inner
        if len(kinds) != len(value):
            raise ValueError(f"config: {name}: wanted {len(kinds)} values, got {shown(value)}")
        return tuple(_typed(v, k, f"{name}[{i}]") for i, (v, k) in enumerate(zip(value, kinds, strict=True)))
    if of is float and type(value) in (int, float):
        try:
            value = float(value)
        except OverflowError:
            value = math.inf
        if not math.isfinite(value):
            raise ValueError(f"config: {name}: wanted a finite number, got {value}")
        return value
    if type(value) is str and len(value) > LONGEST_TEXT:
        raise ValueError(f"config: {name}: wanted at most {LONGEST_TEXT} characters, got {len(value)}")
    if type(value) is not of:
        raise ValueError(f"config: {name}: wanted {of.__name__}, got {shown(value)}")
    return value


def init_of(init: Path | None, given: dict[str, Any]) -> Path | None:
    """`init`, or else the one in a configuration that is a run's own record. Raises ValueError where that is no path."""
    found = given.get("init")
    if not isinstance(found, str | None):
        raise ValueError(f"config: init: wanted a path, got {shown(found)}")
    return Path(found) if init is None and found else init
