"""Checkpoints as safetensors: tensors by dotted name, everything else as JSON in the header. No pickles."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save as safetensors
from torch import Tensor, nn

from icrl.files import checksum, write_bytes
from icrl.reading import TensorFile, check_seal, parse_json, sealed, shown

__all__ = ["FORMAT", "checksum", "fitted", "flatten", "load", "save", "unflatten", "why"]

FORMAT = 2
MALFORMED = (ArithmeticError, AttributeError, LookupError, RecursionError, RuntimeError, TypeError, ValueError)
"""What code raises that is given facts of another shape than it wrote."""
Made = TypeVar("Made", bound=nn.Module)


def why(error: BaseException) -> str:
    """What is wrong, in a line."""
    text = " ".join((str(error) if isinstance(error, (ValueError, RuntimeError)) else repr(error)).split())
    return text if len(text) <= 1000 else f"{text[:1000]}..."


def save(path: Path | str, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write atomically: a kill at any moment leaves the old file or the new one, never a part of one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    flat = {name: t.detach().contiguous().cpu().clone() for name, t in tensors.items()}  # clone: no shared storage
    metadata = {"format": str(FORMAT), "facts": json.dumps(facts)}
    write_bytes(path, safetensors(flat, sealed(flat, metadata)))


def load(path: Path | str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts of a checkpoint.

    Raises:
        ValueError: there is no such file, it is cut short or damaged, or it is not one of ours.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"checkpoint: no file {path}")
    try:
        with TensorFile(path) as file:
            tensors, metadata = file.tensors(), file.metadata
        if metadata.get("format") != str(FORMAT) or "facts" not in metadata:
            raise ValueError(
                f"{path} was not written by icrl (format {shown(metadata.get('format'))}, wanted {FORMAT}; perhaps damaged)"
            )
        check_seal(path, tensors, metadata, {"format", "facts"})
    except ValueError as e:
        raise ValueError(f"checkpoint: {e}") from e
    try:
        facts = parse_json(metadata["facts"])
        if not isinstance(facts, dict):
            raise ValueError(f"they are {type(facts).__name__}, wanted an object")
    except ValueError as e:
        raise ValueError(f"checkpoint: {path} is damaged (its facts are malformed: {e})") from e
    return tensors, facts


def fitted(tensors: dict[str, Tensor], layers: int, make: Callable[[str], Made]) -> Made:
    """The module that `make(device)` makes, on the CPU, with these tensors.

    It is made on the meta device first, and nothing is allocated before its shapes are the tensors'.

    Args:
        layers: of the module: at most as many as there are tensors.
    Raises:
        ValueError: what differs; and whatever `make` raises.
    """
    if not 1 <= layers <= len(tensors):
        raise ValueError(f"layers: wanted 1 to {len(tensors)}, the number of tensors, got {layers}")
    with torch.device("meta"):
        wanted = make("meta").state_dict()
    if other := sorted(wanted.keys() ^ tensors.keys()):
        raise ValueError(f"{other[0]}: is {'missing' if other[0] in wanted else 'no tensor of it'}")
    for name, t in wanted.items():
        if (there := tensors[name]).shape != t.shape or there.dtype != t.dtype:
            raise ValueError(f"{name}: wanted {t.dtype} {list(t.shape)}, got {there.dtype} {list(there.shape)}")
    module = make("cpu")
    module.load_state_dict(tensors)
    return module


def flatten(prefix: str, value: Any, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Spread a nested dict/list of tensors and plain values (an optimiser's state_dict) over the two halves of a checkpoint."""
    if isinstance(value, Tensor):
        tensors[prefix] = value
    elif isinstance(value, dict):
        facts[prefix] = {"dict": [[k, type(k).__name__] for k in value]}
        for k, v in value.items():
            flatten(f"{prefix}.{k}", v, tensors, facts)
    elif isinstance(value, (list, tuple)):
        facts[prefix] = {"list": len(value)}
        for i, v in enumerate(value):
            flatten(f"{prefix}.{i}", v, tensors, facts)
    else:
        facts[prefix] = {"value": value}


def unflatten(prefix: str, tensors: dict[str, Tensor], facts: dict[str, Any]) -> Any:
    """What was flattened. Raises one of `MALFORMED` where the facts are not what `flatten` wrote."""
    if prefix in tensors:
        return tensors[prefix]
    node = facts[prefix]
    if "dict" in node:
        keys = [int(k) if kind == "int" else k for k, kind in node["dict"]]
        return {k: unflatten(f"{prefix}.{k}", tensors, facts) for k in keys}
    if "list" in node:
        return [unflatten(f"{prefix}.{i}", tensors, facts) for i in range(node["list"])]
    return node["value"]
