"""With what versions data and runs were made, and whether they may go on with others."""

from __future__ import annotations

import json
from typing import Any

from icrl.extras import versions


def check_versions(what: str, made: dict[str, str] | None, packages: tuple[str, ...], say: bool) -> None:
    """Compare the versions that `what` was made with, if it says so, with those here.

    Raises ValueError where one of `packages` has another version: both are named. Where others differ, `say` prints a line.
    """
    if made is not None and not (isinstance(made, dict) and all(type(v) is str for v in made.values())):
        raise ValueError(f"{what}: its versions are no texts by name, damaged")
    here = versions(*(made or {}))
    changed = {p: (v, here[p]) for p, v in (made or {}).items() if p in here and here[p] != v}
    for package, (old, new) in changed.items():
        if package in packages:
            raise ValueError(f"{what} was made with {package} {old}, here is {new}: its numbers may be others")
    if changed and say:
        print(f"{what} goes on with other versions: " + ", ".join(f"{p} {b}, not {a}" for p, (a, b) in changed.items()))


def goes_on(config: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """A run's config.json as it was, with today's `record` in place of its own: "run", the run as it was given, and
    "simulators", their versions. Neither is a reason not to go on; versions of simulators that differ are printed."""
    old, now = config.get("simulators") or {}, record.get("simulators") or {}
    if changed := [f"{p} {now[p]}, not {v}" for p, v in old.items() if p in now and now[p] != v]:
        print("the run goes on with other versions: " + ", ".join(changed))
    rest = {k: v for k, v in config.items() if k not in ("run", "simulators")}
    return {**rest, **json.loads(json.dumps(record))}
