"""Packages that not everybody has: simulators and what goes with them, in extras of `pip install 'icrl-kernels[...]'`."""

from __future__ import annotations

import importlib
import os
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

import torch

from icrl_kernels import __version__


def versions(*packages: str) -> dict[str, str]:
    """What a result was made with: versions of icrl_kernels, of torch, and of those of `packages` that are installed."""
    found = {"icrl_kernels": __version__, "torch": str(torch.__version__)}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def require(module: str, what: str, extra: str) -> ModuleType:
    """Import a package of an extra where it is first needed.

    Args:
        module: to import, as "mujoco". what: needs it, as "cheetah-vel". extra: of icrl-kernels, that installs it.
    Raises:
        ValueError: it is not installed, or what is installed cannot be imported; one line, with the command that helps.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as e:
        if e.name is None or e.name.split(".")[0] != module.split(".")[0]:
            raise ValueError(f"{what}: {module} is installed, but not what it imports ({e})") from e
        raise ValueError(f"{what} needs {module}: pip install 'icrl-kernels[{extra}]'") from e
    except Exception as e:  # whatever goes wrong in another package's code
        said = f"{type(e).__name__}: {e}" if str(e) else type(e).__name__
        raise ValueError(f"{what}: {module} is installed, but cannot be imported ({said}{_drawing(module)})") from e


def _drawing(module: str) -> str:
    """MUJOCO_GL, where it is set: mujoco may fail at its import for want of that library, though nothing is drawn."""
    chosen = os.environ.get("MUJOCO_GL")
    return f"; MUJOCO_GL={chosen}" if chosen and module.split(".")[0] in ("mujoco", "metaworld") else ""
