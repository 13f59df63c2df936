"""Which module may import which, read from the source: every import counts, those inside functions and relative ones too."""

from __future__ import annotations

import ast
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("icrl", "icrl_kernels")

# The rooms of icrl from above: a room imports rooms of lower levels only. `icrl/__init__.py` imports none.
ROOMS = (
    {"cli"},
    {"commands"},
    {"omnirl", "offline"},
    {"models", "worlds"},
    {"data", "training"},
    {"files", "plots", "extras"},
)
LEAVES = {
    "_registry",
    "_checks",
    "_torch_private",
    "arguments",
}  # of icrl_kernels: they import one another and `_C` alone
TORCH_PRIVATE = "icrl_kernels._torch_private"
NAMED_TUPLE = {"_asdict", "_field_defaults", "_fields", "_make", "_replace"}  # public, for all their underscore


@dataclass
class Module:
    """One file: what it imports, and the dotted paths that its code reaches by imported names."""

    name: str
    tree: ast.Module
    is_package: bool
    targets: set[str] = field(default_factory=set)  # modules of the tree that it imports, anywhere
    at_start: set[str] = field(default_factory=set)  # of these, the ones that are imported when it is
    reached: set[tuple[str, int]] = field(default_factory=set)  # (dotted path, line)


def read(root: Path, packages: tuple[str, ...] = PACKAGES) -> dict[str, Module]:
    modules = {}
    for package in packages:
        for path in (root / package).rglob("*.pyi"):  # a compiled module
            name = ".".join(path.relative_to(root).with_suffix("").parts)
            modules[name] = Module(name, ast.parse(""), False)
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            is_package = parts[-1] == "__init__"
            name = ".".join(parts[:-1] if is_package else parts)
            modules[name] = Module(name, ast.parse(path.read_text(), str(path)), is_package)
    for module in modules.values():
        _Reader(module, modules).read()
    return modules


class _Reader(ast.NodeVisitor):
    def __init__(self, module: Module, modules: dict[str, Module]):
        self.module, self.modules = module, modules
        self.deferred = 0  # inside a function, or for a type checker only
        self.bound: dict[str, str] = {}

    def read(self) -> None:
        self.visit(self.module.tree)
        for node in ast.walk(self.module.tree):
            path = self._path(node)
            if path is not None:
                self.module.reached.add((path, node.lineno))

    def _base(self, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        parts = self.module.name.split(".")
        parts = parts[: len(parts) - node.level + self.module.is_package]
        return ".".join([*parts, *([node.module] if node.module else [])])

    def _imports(self, path: str, line: int) -> None:
        self.module.reached.add((path, line))
        while path and path not in self.modules:
            path = path.rpartition(".")[0]
        if path and path != self.module.name:
            self.module.targets.add(path)
            if not self.deferred:
                self.module.at_start.add(path)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._imports(alias.name, node.lineno)
            top = alias.name.split(".")[0]
            self.bound[alias.asname or top] = alias.name if alias.asname else top

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        base = self._base(node)
        for alias in node.names:
            path = base if alias.name == "*" else f"{base}.{alias.name}"
            self._imports(path, node.lineno)
            self.bound[alias.asname or alias.name] = path

    def _later(self, nodes) -> None:
        self.deferred += 1
        for node in nodes:
            self.visit(node)
        self.deferred -= 1

    def visit_FunctionDef(self, node) -> None:
        for default in [*node.args.defaults, *node.args.kw_defaults, *node.decorator_list]:
            if default is not None:
                self.visit(default)
        self._later(node.body)

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self._later([node.body])

    def visit_If(self, node: ast.If) -> None:
        test = node.test.attr if isinstance(node.test, ast.Attribute) else getattr(node.test, "id", None)
        if test == "TYPE_CHECKING":
            self._later(node.body)
            for other in node.orelse:
                self.visit(other)
        else:
            self.generic_visit(node)

    def _path(self, node: ast.AST) -> str | None:
        """The dotted path of `name.attribute...` or `getattr(name..., "attribute")` whose name was imported."""
        if isinstance(node, ast.Attribute):
            above = self._path(node.value) or self._name(node.value)
            return above and f"{above}.{node.attr}"
        by_name = isinstance(node, ast.Call) and getattr(node.func, "id", None) in ("getattr", "hasattr")
        if by_name and len(node.args) > 1 and isinstance(node.args[1], ast.Constant):
            above = self._path(node.args[0]) or self._name(node.args[0])
            return above and f"{above}.{node.args[1].value}"
        return None

    def _name(self, node: ast.AST) -> str | None:
        return self.bound.get(node.id) if isinstance(node, ast.Name) else None


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """The sets of nodes that reach one another (Tarjan), each sorted."""
    number: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(v: str) -> None:
        number[v] = low[v] = len(number)
        stack.append(v)
        for w in sorted(arrows.get(v, ())):
            if w not in number:
                visit(w)
                low[v] = min(low[v], low[w])
            elif w in stack:
                low[v] = min(low[v], number[w])
        if low[v] == number[v]:
            at = stack.index(v)
            if len(stack) - at > 1:
                found.append(sorted(stack[at:]))
            del stack[at:]

    for v in sorted(arrows):
        if v not in number:
            visit(v)
    return found


def room(name: str) -> str:
    """The part of a package that a module lies in: its folder or its file, "" for the package's own __init__."""
    return name.split(".")[1] if "." in name else ""


def private(part: str) -> bool:
    return part.startswith("_") and not part.endswith("__")


# ---- the rules: each returns the faults that it finds -------------------------------------------------------------------


def upward(modules: dict[str, Module]) -> list[str]:
    """(a) Arrows between the rooms of icrl that do not go down, and arrows from icrl_kernels to icrl."""
    level = {name: i for i, names in enumerate(ROOMS) for name in names}
    faults = []
    for module in modules.values():
        for target in sorted(module.targets):
            packages = module.name.split(".")[0], target.split(".")[0]
            if packages == ("icrl_kernels", "icrl"):
                faults.append(f"{module.name} -> {target}: icrl_kernels does not know icrl")
            if packages != ("icrl", "icrl"):
                continue
            here, there = room(module.name), room(target)
            if here == there or there == "":
                continue
            if here == "":
                faults.append(f"{module.name} -> {target}: every module of icrl imports icrl first")
            elif here not in level or there not in level:
                faults.append(f"{module.name} -> {target}: ROOMS gives no level to {here} or {there}")
            elif level[there] <= level[here]:
                faults.append(f"{module.name} -> {target}: {there} does not lie below {here}")
    return faults


def folder_circles(modules: dict[str, Module]) -> list[str]:
    """(b) Circles that a folder is part of, among the folders and files that lie side by side in one package."""
    faults = []
    for package in (m.name for m in modules.values() if m.is_package):
        arrows: dict[str, set[str]] = defaultdict(set)

        def side(name: str, package: str = package) -> str | None:
            inside = name.startswith(package + ".")
            return ".".join(name.split(".")[: package.count(".") + 2]) if inside else None

        for module in modules.values():
            for target in module.targets:
                a, b = side(module.name), side(target)
                if a and b and a != b:
                    arrows[a].add(b)
        faults += [
            f"circle: {', '.join(circle)}"
            for circle in circles(arrows)
            if any(modules[name].is_package for name in circle if name in modules)
        ]
    return faults


def module_circles(modules: dict[str, Module]) -> list[str]:
    """(b) Circles among modules that import one another as they are imported."""
    return [f"circle: {', '.join(c)}" for c in circles({m.name: m.at_start for m in modules.values()})]


def kernel_rooms(modules: dict[str, Module]) -> list[str]:
    """(b) In icrl_kernels: ops below layers and swap, linear_attention and tabular apart, leaves at the bottom."""
    forbidden = {"linear_attention": {"tabular", "layers", "swap"}, "tabular": {"linear_attention", "layers", "swap"}}
    faults = []
    for module in modules.values():
        for target in sorted(module.targets):
            if not target.startswith("icrl_kernels"):
                continue
            kernels = module.name.split(".")[0] == "icrl_kernels"
            here, there = room(module.name) if kernels else None, room(target)
            if there == "swap" and here != "swap":
                faults.append(f"{module.name} -> {target}: nothing imports swap")
            elif here in LEAVES and there not in LEAVES | {"_C"}:
                faults.append(f"{module.name} -> {target}: {here} is a leaf")
            elif there in forbidden.get(here or "", ()):
                faults.append(f"{module.name} -> {target}: {here} does not import {there}")
    return faults


def private_kernels(modules: dict[str, Module]) -> list[str]:
    """(c) Private names of icrl_kernels that icrl reaches."""
    faults = []
    for module in modules.values():
        if module.name.split(".")[0] != "icrl":
            continue
        for path, line in sorted(module.reached):
            top, *parts = path.split(".")
            if top == "icrl_kernels" and any(private(p) and p not in NAMED_TUPLE for p in parts):
                faults.append(f"{module.name}:{line}: {path} is private to icrl_kernels")
    return faults


def hidden_modules(modules: dict[str, Module]) -> list[str]:
    """(d) Names in a package's __init__ that stand for something else than the submodule of that name."""
    faults = []
    for package in modules.values():
        if not package.is_package:
            continue
        submodules = {m.rpartition(".")[2] for m in modules if m.rpartition(".")[0] == package.name}
        reader = _Reader(package, modules)
        reader.visit(package.tree)
        names = {name for name, path in reader.bound.items() if path != f"{package.name}.{name}"}
        for node in package.tree.body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                names.add(node.name)
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names |= {t.id for t in targets if isinstance(t, ast.Name)}
        faults += [f"{package.name}.{name} hides the module of that name" for name in sorted(names & submodules)]
    return faults


def private_torch(modules: dict[str, Module]) -> list[str]:
    """(e) Private names of torch outside the one module that keeps them."""
    faults = []
    for module in modules.values():
        if module.name == TORCH_PRIVATE:
            continue
        for path, line in sorted(module.reached):
            top, *parts = path.split(".")
            if top == "torch" and any(private(p) and p not in NAMED_TUPLE for p in parts):
                faults.append(f"{module.name}:{line}: {path} belongs in {TORCH_PRIVATE}")
    return faults


RULES = (upward, folder_circles, module_circles, kernel_rooms, private_kernels, hidden_modules, private_torch)


@pytest.fixture(scope="module")
def modules() -> dict[str, Module]:
    return read(ROOT)


def test_all_modules_are_read(modules):
    assert len(modules) > 80
    assert {"icrl.cli", "icrl.offline.methods", "icrl_kernels.linear_attention.gla"} <= modules.keys()
    assert "icrl_kernels.linear_attention.op" in modules["icrl_kernels.linear_attention.gla"].targets
    assert "icrl.commands.worlds" in modules["icrl.cli"].targets  # inside a function


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_import_graph(modules, rule):
    faults = rule(modules)
    assert not faults, "\n".join(["", *faults])


# ---- each rule can fail -------------------------------------------------------------------------------------------------

SOUND = {
    "icrl/__init__.py": "import gymnasium",
    "icrl/cli.py": "def main():\n    from icrl.commands import worlds\n    worlds.run()",
    "icrl/commands/__init__.py": "",
    "icrl/commands/worlds.py": "from icrl.worlds import sample\nfrom icrl import plots",
    "icrl/worlds/__init__.py": "from icrl.worlds.tasks import sample",
    "icrl/worlds/tasks.py": "import icrl_kernels\nfrom ..data import shards\nicrl_kernels.Rollout._fields",
    "icrl/data/__init__.py": "",
    "icrl/data/shards.py": "import torch\ntorch.__version__",
    "icrl/plots.py": "",
    "icrl/training/__init__.py": "",
    "icrl/training/loop.py": "",
    "icrl_kernels/__init__.py": "from icrl_kernels.linear_attention.gla import gla",
    "icrl_kernels/_checks.py": "",
    "icrl_kernels/_registry.py": "from icrl_kernels import _torch_private",
    "icrl_kernels/_torch_private.py": "import torch\ntorch._C.name",
    "icrl_kernels/linear_attention/__init__.py": "",
    "icrl_kernels/linear_attention/gla.py": "from icrl_kernels import _registry",
    "icrl_kernels/linear_attention/triton/__init__.py": "",
    "icrl_kernels/tabular/__init__.py": "",
    "icrl_kernels/tabular/packed.py": "from icrl_kernels import _checks",
    "icrl_kernels/layers/__init__.py": "from icrl_kernels.linear_attention.gla import gla",
    "icrl_kernels/swap/__init__.py": "from icrl_kernels.linear_attention import gla",
}

UNSOUND = [
    (upward, {"icrl/data/shards.py": "def f():\n    from icrl.training.loop import train"}, "icrl.training.loop"),
    (upward, {"icrl/data/shards.py": "from ..worlds.tasks import x"}, "icrl.worlds.tasks"),
    (upward, {"icrl/data/shards.py": "from .. import worlds"}, "icrl.worlds"),
    (upward, {"icrl/plots.py": "import icrl.extras", "icrl/extras.py": ""}, "icrl.extras"),
    (upward, {"icrl/commands/worlds.py": "from icrl import cli"}, "icrl.cli"),
    (upward, {"icrl/__init__.py": "from icrl import plots"}, "icrl.plots"),
    (upward, {"icrl/cli.py": "from icrl import hub", "icrl/hub.py": ""}, "no level"),
    (upward, {"icrl_kernels/_checks.py": "import icrl.plots"}, "does not know icrl"),
    (
        folder_circles,
        {"icrl/worlds/tasks.py": "import icrl.data.shards", "icrl/data/shards.py": "def f():\n    import icrl.worlds"},
        "icrl.data, icrl.worlds",
    ),
    (
        folder_circles,
        {
            "icrl_kernels/linear_attention/gla.py": "from icrl_kernels.linear_attention.triton import plan",
            "icrl_kernels/linear_attention/triton/plan.py": "from icrl_kernels.linear_attention import gla",
        },
        "icrl_kernels.linear_attention.triton",
    ),
    (
        module_circles,
        {"icrl/worlds/tasks.py": "from . import kinds", "icrl/worlds/kinds.py": "from icrl.worlds.tasks import x"},
        "icrl.worlds.kinds, icrl.worlds.tasks",
    ),
    (module_circles, {"icrl/worlds/tasks.py": "from icrl.worlds import sample"}, "icrl.worlds, icrl.worlds.tasks"),
    (kernel_rooms, {"icrl_kernels/tabular/packed.py": "from icrl_kernels.linear_attention import gla"}, "tabular"),
    (kernel_rooms, {"icrl_kernels/linear_attention/gla.py": "from ..tabular import packed"}, "linear_attention"),
    (kernel_rooms, {"icrl_kernels/linear_attention/gla.py": "from icrl_kernels import layers"}, "layers"),
    (kernel_rooms, {"icrl_kernels/layers/__init__.py": "import icrl_kernels.swap"}, "swap"),
    (kernel_rooms, {"icrl/worlds/tasks.py": "from icrl_kernels import swap"}, "swap"),
    (kernel_rooms, {"icrl_kernels/_registry.py": "from icrl_kernels.tabular import packed"}, "leaf"),
    (kernel_rooms, {"icrl_kernels/_checks.py": "from icrl_kernels import gla"}, "leaf"),
    (private_kernels, {"icrl/plots.py": "from icrl_kernels import _checks"}, "icrl_kernels._checks"),
    (private_kernels, {"icrl/plots.py": "from icrl_kernels._checks import shape"}, "icrl_kernels._checks.shape"),
    (private_kernels, {"icrl/plots.py": "import icrl_kernels as k\ndef f():\n    return k._registry"}, "_registry"),
    (
        private_kernels,
        {"icrl/plots.py": "from icrl_kernels.linear_attention import gla\ngla._check()"},
        "icrl_kernels.linear_attention.gla._check",
    ),
    (
        hidden_modules,
        {"icrl/worlds/__init__.py": "from icrl.worlds.sample import sample", "icrl/worlds/sample.py": ""},
        "sample",
    ),
    (hidden_modules, {"icrl/worlds/__init__.py": "def tasks(): ..."}, "icrl.worlds.tasks"),
    (hidden_modules, {"icrl/worlds/__init__.py": "class tasks: ..."}, "icrl.worlds.tasks"),
    (hidden_modules, {"icrl/worlds/__init__.py": "from x import y\ntasks = y"}, "icrl.worlds.tasks"),
    (private_torch, {"icrl/plots.py": "import torch\ntorch._C._x()"}, "torch._C"),
    (private_torch, {"icrl/plots.py": "from torch.utils._pytree import tree_map"}, "torch.utils._pytree"),
    (private_torch, {"icrl/plots.py": "from torch.autograd import forward_ad\nforward_ad._level"}, "forward_ad._level"),
    (private_torch, {"icrl/plots.py": "import torch as t\ngetattr(t.autograd, '_x', None)"}, "torch.autograd._x"),
    (private_torch, {"icrl/plots.py": "def f():\n    import torch._dynamo as d\n    d.reset()"}, "torch._dynamo"),
]


def write(root: Path, files: dict[str, str]) -> dict[str, Module]:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return read(root)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_sound_tree_passes(tmp_path, rule):
    assert rule(write(tmp_path, SOUND)) == []


@pytest.mark.parametrize(
    ("rule", "files", "named"), UNSOUND, ids=[f"{rule.__name__}-{i}" for i, (rule, *_) in enumerate(UNSOUND)]
)
def test_unsound_tree_fails(tmp_path, rule, files, named):
    faults = rule(write(tmp_path, SOUND | files))
    assert faults
    assert any(named in fault for fault in faults)


def test_imports_that_wait_close_no_module_circle(tmp_path):
    files = {
        "icrl/worlds/kinds.py": "from icrl.worlds import tasks",
        "icrl/worlds/tasks.py": (
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from icrl.worlds import kinds\n"
            "def f():\n    from icrl.worlds import kinds\n"
        ),
    }
    assert module_circles(write(tmp_path, SOUND | files)) == []
