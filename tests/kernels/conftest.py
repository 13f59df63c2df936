"""flash-linear-attention on its own Triton kernels under Triton's interpreter."""

import builtins
import os
import sys
import warnings

import pytest


class Index(int):
    """What `range` gives inside its kernels: the interpreter's are plain integers, which have no `to`."""

    def to(self, dtype):
        return self


@pytest.fixture
def fla(monkeypatch):
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("wants TRITON_INTERPRET=1")
    autotuner = pytest.importorskip("triton.runtime.autotuner")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no GPU, and about RWKV-7
        layers = pytest.importorskip("fla.layers", exc_type=ImportError)
        monkeypatch.setattr(autotuner.Autotuner, "_bench", lambda self, *args, **kwargs: [1.0] * 3)
        for name, module in list(sys.modules.items()):
            if name.startswith(("fla.ops.", "fla.modules.")) and hasattr(module, "tl"):
                monkeypatch.setattr(module, "range", lambda *a: map(Index, builtins.range(*map(int, a))), raising=False)
        yield layers
