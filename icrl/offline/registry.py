"""Registries by discovery: a method or a data source is a file in its folder, and no list knows it by name."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def classes(package: str, path: Iterable[str], kind: type[T]) -> dict[str, type[T]]:
    """The classes that derive from `kind` and have a `name` of their own, by that name.

    Args:
        package: whose modules are imported, in alphabetical order. path: the package's `__path__`.
    Raises:
        ValueError: two classes have one name.
    """
    found: dict[str, type[T]] = {}
    for module in pkgutil.iter_modules(path):
        members = vars(importlib.import_module(f"{package}.{module.name}")).values()
        for member in members:
            if not isinstance(member, type) or member.__module__ != f"{package}.{module.name}":
                continue
            name = vars(member).get("name")
            if kind in member.__mro__ and isinstance(name, str):
                if name in found:
                    raise ValueError(f"name: {found[name].__qualname__} and {member.__qualname__} are both {name!r}")
                found[name] = member
    return found
