"""S-ICQL and its rivals, a file each."""

from __future__ import annotations

from icrl.offline.method import Method
from icrl.offline.registry import classes

METHODS: dict[str, type[Method]] = classes(__name__, __path__, Method)
"""Every method by its name: what a module of this folder defines. Your own may be put here, too."""


def method_class(name: str) -> type[Method]:
    """Raises ValueError for a name that no method has."""
    if name not in METHODS:
        raise ValueError(f"method: wanted one of {', '.join(METHODS)}, got {name!r}")
    return METHODS[name]
