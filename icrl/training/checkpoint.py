"""Checkpoints as safetensors: tensors by dotted name, everything else as JSON in the header. No pickles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors
from torch import Tensor

from icrl.files import checksum, write_bytes

FORMAT = 2


def save(path: Path | str, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write atomically: a kill at any moment leaves the old file or the new one, never a part of one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    flat = {name: t.detach().contiguous().cpu().clone() for name, t in tensors.items()}  # clone: no shared storage
    metadata = {"format": str(FORMAT), "facts": json.dumps(facts), "crc32": str(checksum(flat))}
    write_bytes(path, safetensors(flat, metadata))


def load(path: Path | str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts of a checkpoint.

    Raises:
        ValueError: there is no such file, it is cut short or damaged, or it is not one of ours.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"checkpoint: no file {path}")
    try:
        with safe_open(path, framework="pt") as f:
            metadata = f.metadata() or {}
            tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, RuntimeError) as e:
        raise ValueError(f"checkpoint: {path} is damaged or not a safetensors file ({e})") from e
    if metadata.get("format") != str(FORMAT) or "facts" not in metadata:
        raise ValueError(
            f"checkpoint: {path} was not written by icrl (format {metadata.get('format')!r}, wanted {FORMAT})"
        )
    if metadata.get("crc32") != str(checksum(tensors)):
        raise ValueError(f"checkpoint: {path} is damaged (its tensors are not those that were saved)")
    try:
        return tensors, json.loads(metadata["facts"])
    except ValueError as e:
        raise ValueError(f"checkpoint: {path} is damaged (its facts are not JSON: {e})") from e


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
    if prefix in tensors:
        return tensors[prefix]
    node = facts[prefix]
    if "dict" in node:
        keys = [int(k) if kind == "int" else k for k, kind in node["dict"]]
        return {k: unflatten(f"{prefix}.{k}", tensors, facts) for k in keys}
    if "list" in node:
        return [unflatten(f"{prefix}.{i}", tensors, facts) for i in range(node["list"])]
    return node["value"]
