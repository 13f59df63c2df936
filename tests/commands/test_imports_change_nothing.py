"""Importing any module of ours leaves the program's own settings as they were."""

import os
import subprocess
import sys

import pytest

CHECK = r"""
import importlib, locale, os, pkgutil, random, signal, sys, threading, warnings
import gymnasium, matplotlib, matplotlib.figure, matplotlib.pyplot, numpy, psutil, safetensors.torch, torch, tqdm, tyro

matplotlib.use("svg")
matplotlib.rcParams["lines.linewidth"] = 3.5


def umask():
    now = os.umask(0)
    os.umask(now)
    return now


def settings():
    return {
        "backend": matplotlib.get_backend(),
        "rcParams": dict(matplotlib.rcParams),
        "torch threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "torch defaults": (torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled()),
        "torch numerics": (torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()),
        "denormals": float(torch.tensor(1e-40) * 1),
        "generators": (torch.get_rng_state().tolist(), str(numpy.random.get_state()), random.getstate()),
        "numpy": (numpy.geterr(), numpy.get_printoptions()),
        "warnings": list(warnings.filters),
        "signals": {s: signal.getsignal(s) for s in signal.valid_signals()},
        "hooks": (sys.excepthook, sys.unraisablehook, sys.displayhook, threading.excepthook),
        "streams": (sys.stdin, sys.stdout, sys.stderr),
        "locale": locale.setlocale(locale.LC_ALL),
        "umask": umask(),
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "path": list(sys.path),
        "limits": (sys.getrecursionlimit(), sys.getswitchinterval(), threading.active_count()),
        "figures": matplotlib.pyplot.get_fignums(),
    }


before = settings()
import icrl, icrl_kernels

names = [m.name for p in (icrl, icrl_kernels) for m in pkgutil.walk_packages(p.__path__, p.__name__ + ".")]
assert {"icrl.cli", "icrl.plots", "icrl.commands.demo", "icrl_kernels.swap"} <= set(names)
for name in names:
    importlib.import_module(name)
    after = settings()
    changed = [what for what in before if before[what] != after[what]]
    assert not changed, f"{name} changes {changed}"
print(len(names))
"""


def test_importing_changes_nothing():
    done = subprocess.run([sys.executable, "-c", CHECK], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 100


DRAW = """
import os, sys
import gymnasium, icrl.worlds

env = gymnasium.make("icrl/AnyMDP-v0", render_mode="rgb_array")
env.reset(seed=0)
assert env.render().ndim == 3
assert "matplotlib.pyplot" not in sys.modules
import matplotlib

print(os.environ["MPLBACKEND"], dict.__getitem__(matplotlib.rcParams, "backend"))
"""


@pytest.mark.parametrize("backend", ["svg", "module://no_such_module.backend_inline", "no such backend", ""])
def test_a_backend_that_is_not_installed_is_not_needed(backend):
    """One that matplotlib knows is what the program has afterwards."""
    line = [sys.executable, "-c", DRAW]
    done = subprocess.run(line, env={**os.environ, "MPLBACKEND": backend}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith(backend + " ")
    assert done.stdout.endswith(" svg\n") == (backend == "svg")
