"""Each private name of torch that the package uses may vanish from a later torch: the results stay the same.

One process hides a name from the modules of icrl_kernels, as if this torch had it no longer, imports the package and runs it.
torch's own code still finds the name.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PACKAGE = importlib.util.find_spec("icrl_kernels").submodule_search_locations[0]
SOURCE = Path(PACKAGE, "_torch_private.py")


def private_names(source: str) -> list[str]:
    """The dotted paths below torch that a module looks up: by `_find("path", ...)`, `getattr(module, "name", ...)` or plainly."""
    tree = ast.parse(source)
    bound = {"torch": ""}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            above = ".".join(node.module.split(".")[1:])
            bound |= {a.asname or a.name: f"{above}.{a.name}".strip(".") for a in node.names}

    def path(node: ast.AST) -> str | None:
        if isinstance(node, ast.Name):
            return bound.get(node.id)
        if isinstance(node, ast.Attribute) and (above := path(node.value)) is not None:
            return f"{above}.{node.attr}".strip(".")
        return None

    found = set()
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            strings = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            if node.func.id in ("getattr", "hasattr") and strings and (above := path(node.args[0])) is not None:
                names = [f"{above}.{strings[0]}".strip(".")]
            elif node.func.id == "_find":
                names = strings[:1]
        elif isinstance(node, ast.Attribute):
            names = [path(node) or ""]
        found |= {n for n in names if any(p.startswith("_") and not p.endswith("__") for p in n.split("."))}
    return sorted(n for n in found if not any(other.startswith(n + ".") for other in found))


NAMES = private_names(SOURCE.read_text()) if SOURCE.exists() else []

CHILD = r'''
import importlib, os, sys, types
import torch
import torch._dynamo  # imported once, for all the processes below

FOLDER, NAMES = sys.argv[1], sys.argv[2:]


def hide(names):
    """From the modules of icrl_kernels alone. Returns who asked for each."""
    asked = {name: [] for name in names}
    for above in {name.rpartition(".")[0] for name in names}:
        module = importlib.import_module(f"torch.{above}".rstrip("."))
        hidden = {name.rpartition(".")[2]: name for name in names if name.rpartition(".")[0] == above}

        class Hiding(type(module)):
            def __getattribute__(self, attribute, hidden=hidden):
                caller = sys._getframe(1).f_globals.get("__name__", "")
                if attribute in hidden and caller.split(".")[0] == "icrl_kernels":
                    asked[hidden[attribute]].append(caller)
                    raise AttributeError(f"module 'torch' has no attribute {attribute!r}")
                return super().__getattribute__(attribute)

        module.__class__ = Hiding
    return asked


def results():
    import icrl_kernels as k

    g = torch.Generator().manual_seed(0)
    q, key, v = (torch.randn(2, 70, 2, 8, generator=g) for _ in range(3))
    decay, state = -torch.rand(2, 70, 2, 8, generator=g), torch.randn(2, 2, 8, 8, generator=g)
    out = {}
    given = [t.clone().requires_grad_() for t in (q, key, v, decay)]
    o, final = k.gla(*given, initial_state=state, output_final_state=True)
    (o.sum() + final.square().sum()).backward()
    out |= {"o": o.detach(), "final": final.detach()}
    out |= {f"d{n}": t.grad for n, t in zip("qkvg", given)}
    for grad in (True, False):
        s = state.clone()
        with torch.set_grad_enabled(grad):
            out[f"step, gradients {grad}"] = k.gla_step(q[:, 0], key[:, 0], v[:, 0], decay[:, 0], s)
        out[f"state, gradients {grad}"] = s
    try:
        k.gla_step(q[:, 0].clone().requires_grad_(), key[:, 0], v[:, 0], decay[:, 0], state.clone())
    except ValueError as e:
        assert "q" in str(e).split(":")[0], e
    else:
        raise AssertionError("a step took an input that requires a gradient")
    whole = lambda *x: k.gla(*x, initial_state=state, output_final_state=True)
    compiled = torch.compile(whole, backend="eager", fullgraph=True)
    out["compiled o"], out["compiled final"] = compiled(q, key, v, decay)

    n, s, a = 2, 4, 3
    chance = torch.rand(n, s, a, s, generator=g)
    chance[..., 3, :, :] = 0
    chance /= chance.sum(-1, keepdim=True).clamp_min(1e-9)
    terminal, start = torch.zeros(n, s, dtype=torch.bool), torch.zeros(n, s)
    terminal[:, 3], start[:, 0] = True, 1
    sizes = [torch.full((n,), x) for x in (5, s, a)]
    noise = torch.full((n, s), 0.1), torch.full((n, s, a), 0.1)
    tables = k.rollout_tables(chance, torch.randn(n, s, a, s, generator=g), *noise, start, terminal, *sizes)
    records = k.rollout_start(tables, seed=0, task_index=torch.tensor([0, 1, 1]))
    for i in range(8):
        names = "reward", "done", "next_state"
        step = k.rollout_step(tables, records, torch.randint(a, (3,), generator=g))
        out |= {f"{name} {i}": t for name, t in zip(names, step)}
    return out


def run(at, hidden):
    asked = hide(hidden)
    out = results()
    torch.save({"results": out, "asked": {n: sorted(set(a)) for n, a in asked.items()}}, f"{FOLDER}/{at}.pt")


torch.set_num_threads(1)
children = {}
for at, hidden in enumerate([[], *([n] for n in NAMES), NAMES]):
    pid = os.fork()
    if not pid:
        sys.stdout = sys.stderr = open(f"{FOLDER}/{at}.txt", "w")
        try:
            run(at, hidden)
        except BaseException:
            import traceback
            traceback.print_exc(file=sys.stdout)
            sys.stdout.flush()
            os._exit(1)
        os._exit(0)
    os.waitpid(pid, 0)
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The results of each process: 0 hides nothing, i + 1 the i-th name, the last one all names."""
    folder = tmp_path_factory.mktemp("hidden")
    if not NAMES:
        pytest.fail(f"{SOURCE} is not there or looks up no private name")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(PACKAGE).parent), *sys.path])}
    command = [sys.executable, "-c", CHILD, str(folder), *NAMES]
    subprocess.run(command, check=True, timeout=600, env=environment)
    return folder


def outcome(folder: Path, at: int) -> dict:
    made = folder / f"{at}.pt"
    said = folder / f"{at}.txt"
    assert made.exists(), said.read_text() if said.exists() else "the process ended without a word"
    return torch.load(made)


def test_nothing_hidden(folder):
    assert NAMES
    results = outcome(folder, 0)["results"]
    assert len(results) > 30
    assert torch.equal(results["compiled o"], results["o"])


@pytest.mark.parametrize("at", range(1, len(NAMES) + 2), ids=[*NAMES, "all"])
def test_results_without_the_name(folder, at):
    wanted, had = outcome(folder, 0)["results"], outcome(folder, at)
    for name, asked in had["asked"].items():
        assert asked, f"nothing in icrl_kernels asked for torch.{name}"
    assert had["results"].keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(had["results"][name], tensor), name


def test_private_names_are_found_in_source():
    source = (
        "import torch\nfrom torch.autograd import forward_ad as ad\n"
        "a = _find('_C.one', None)\nb = getattr(ad, '_two', 0)\nc = torch._three.four(1)\nd = torch.__version__\n"
    )
    assert private_names(source) == ["_C.one", "_three.four", "autograd.forward_ad._two"]
