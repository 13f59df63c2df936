"""The version of the labels that OmniRL is trained on: it stands in weights, in runs' checkpoints and in shards of records."""

from __future__ import annotations

import warnings
from typing import Any

from icrl.reading import shown

LABELS_VERSION = 2
"""Of the labels that this code makes. One more for every change of what a label says of the same history; `CHANGED` says
which. Files from before labels had a version are of version 0."""

CHANGED = {
    1: "the explorer's labels count the rewards of truncated steps, of which bandits have no others",  # since 2026-11-21
    2: "the explorer's label is the optimal action where an expert (tag 2 or 3) was seen to act before",  # since 2026-11-30
}
"""By version: what is different from the version before."""

RECORDED = 0
"""Records of this version and later hold the labels of today: optimal values alone, which no later version has changed. The
explorer's labels are made in training."""


def version_of(facts: dict[str, Any]) -> int:
    """The version in a file's facts. Raises ValueError where it is none."""
    found = facts.get("labels", 0)
    if type(found) is not int or found < 0:
        raise ValueError(f"labels: wanted a version, an integer of at least 0, got {shown(found)}")
    return found


def difference(version: int) -> str:
    """How labels of a version are not today's."""
    since = "; ".join(CHANGED[v] for v in range(version + 1, LABELS_VERSION + 1))
    later = f"they are of a later version, this code knows {LABELS_VERSION}"
    return f"since version {LABELS_VERSION} {since}" if since else later


def name_others(what: str, version: int) -> None:
    """A warning where `what` has labels that are not today's."""
    if version != LABELS_VERSION:
        warnings.warn(f"{what} has learned labels of version {version}: {difference(version)}", stacklevel=3)


def refuse_others(what: str, version: int) -> None:
    """ValueError where training on `what` beside today's labels would mix versions."""
    if version != LABELS_VERSION:
        raise ValueError(
            f"{what} has labels of version {version}, training makes labels of version {LABELS_VERSION}, and does not mix "
            f"them: {difference(version)}"
        )
