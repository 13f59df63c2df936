"""Sources of offline data: environments and the trajectories that are gathered in them, a file each."""

from __future__ import annotations

from icrl.offline.environments.source import DataSource
from icrl.offline.registry import classes

SOURCES: dict[str, type[DataSource]] = classes(__name__, __path__, DataSource)
"""Every source by its name: what a module of this folder defines. Your own may be put here, too."""


def source_class(name: str) -> type[DataSource]:
    """Raises ValueError for a name that no source has."""
    if name not in SOURCES:
        raise ValueError(f"environment: wanted one of {', '.join(SOURCES)}, got {name!r}")
    return SOURCES[name]
