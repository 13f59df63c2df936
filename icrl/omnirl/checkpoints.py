"""Models from files, whichever a file holds."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import torch

from icrl.omnirl import model, value_iteration_network
from icrl.omnirl.model import OmniRL
from icrl.omnirl.value_iteration_network import ValueIterationNetwork
from icrl.reading import shown
from icrl.training import checkpoint


def load(path: Path | str, device: torch.device | str = "cpu") -> OmniRL | ValueIterationNetwork:
    """The model that a file holds, on a device. Raises ValueError where it holds none that acts."""
    tensors, facts = checkpoint.load(path)
    kind = facts.get("model")
    if kind in value_iteration_network.KINDS:
        return ValueIterationNetwork.loaded(path, tensors, facts, device)
    if kind == model.KIND:
        return OmniRL.loaded(path, tensors, facts, device)
    wanted = f"wanted {model.KIND} or {value_iteration_network.KIND}"
    raise ValueError(f"checkpoint: {path} holds a {shown(kind)}, {wanted}")


def shipped() -> Path:
    """The checkpoint that comes with the package."""
    path = Path(str(files("icrl.omnirl") / "weights" / "omnirl.safetensors"))
    if not path.exists():
        raise ValueError(
            f"checkpoint: this installation has no shipped model at {path}; train one with `icrl train value-iteration-network`"
        )
    return path
