import sys

import pytest

from icrl.extras import require


def test_a_module_that_is_there():
    assert require("json", "this", "x") is sys.modules["json"]


def test_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "mujoco", None)
    with pytest.raises(ValueError, match=r"^cheetah-vel needs mujoco: pip install 'icrl-kernels\[mujoco\]'$"):
        require("mujoco", "cheetah-vel", "mujoco")


def test_a_broken_installation_is_not_called_missing(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "lacks_another.py").write_text("import no_such_package\n")
    (tmp_path / "lacks_a_library.py").write_text("raise ImportError('libGL.so: cannot open')\n")
    with pytest.raises(ValueError, match=r"installed, but not what it imports .*no_such_package"):
        require("lacks_another", "this", "x")
    with pytest.raises(ValueError, match=r"installed, but cannot be imported .*libGL"):
        require("lacks_a_library", "this", "x")


@pytest.mark.parametrize("wrong", ["RuntimeError('invalid value')", "AttributeError('glGetError')", "Warning"])
def test_whatever_an_import_raises_is_one_line(wrong, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mujoco", raising=False)
    monkeypatch.setenv("MUJOCO_GL", "bogus")
    (tmp_path / "mujoco.py").write_text(f"raise {wrong}\n")
    with pytest.raises(
        ValueError, match=r"^reach: mujoco is installed, but cannot be imported \(\w+.*MUJOCO_GL=bogus\)$"
    ):
        require("mujoco", "reach", "mujoco")
