"""What the sources of offline data have in common: checks of their fields."""

from __future__ import annotations


def check_grades(split: str, quality: str) -> None:
    """Raises ValueError naming the field."""
    if split not in ("random", "far"):
        raise ValueError(f"split: wanted 'random' or 'far', got {split!r}")
    if quality not in ("mixed", "medium", "expert"):
        raise ValueError(f"quality: wanted 'mixed', 'medium' or 'expert', got {quality!r}")


def check_histories(episodes: int, history: int) -> None:
    """Raises ValueError where a task's episodes are not whole histories."""
    if history < 1 or episodes < 1 or episodes % history:
        raise ValueError(f"episodes: wanted a multiple of history={history}, got {episodes}")
