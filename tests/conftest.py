import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
if not any((ROOT / "icrl_kernels").glob("_C.*.so")):
    # `python -m pytest` puts the source tree first; without a build in place, it is the installed package that is tested
    sys.path[:] = [p for p in sys.path if Path(p).resolve() != ROOT]
    os.environ["PYTHONSAFEPATH"] = "1"  # nor do processes that a test starts look there first

os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")


def pytest_configure(config):
    """With ICRL_TEST_IN_A_FORK=1 the tests run in a forked child of a process that has used all threads."""
    if os.environ.get("ICRL_TEST_IN_A_FORK") != "1":
        return
    from icrl.worlds import sample_anymdp
    from icrl_kernels import _C

    torch.set_num_threads(2)
    for own in (False, True):
        _C.use_own_helpers(10**9 if own else -1)
        sample_anymdp(64, 16, seed=0)
    torch.ones(10**6, dtype=torch.float32, device="cpu").exp()  # torch's own threads
    child = os.fork()
    if child:
        os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    assert torch.get_num_threads() == 1, "a forked child has one thread"
    torch.set_num_threads = lambda threads: None  # with more, torch's own operators wait for threads that are not there


def pytest_collection_modifyitems(config, items):
    if config.getoption("-m"):
        return
    for item in items:
        if item.get_closest_marker("slow"):  # keywords would name the folders above, too
            item.add_marker(pytest.mark.skip(reason="slow: run with -m slow"))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def poison_empty(monkeypatch):
    """Fill torch.empty with NaN, so that an output a kernel forgot to write is seen."""

    def poisoned(make):
        def call(*args, **kwargs):
            t = make(*args, **kwargs)
            if t.is_floating_point() and not torch.compiler.is_compiling():
                t.fill_(float("nan"))
            return t

        return call

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    torch.manual_seed(0)


OTHER_DEFAULT = os.environ.get("ICRL_TEST_DEFAULT_DTYPE")
FACTORIES = ("arange", "as_tensor", "empty", "eye", "full", "linspace", "ones", "rand", "randn", "tensor", "zeros")


@pytest.fixture(autouse=True)
def other_default_dtype(monkeypatch, poison_empty):
    """With ICRL_TEST_DEFAULT_DTYPE=float64 that is torch's default dtype, for all but what a test file makes by itself."""
    if OTHER_DEFAULT is None:
        yield
        return
    other, tests = getattr(torch, OTHER_DEFAULT), str(Path(__file__).parent)

    def of_tests(make):
        def call(*args, **kwargs):
            if torch.compiler.is_compiling() or not sys._getframe(1).f_code.co_filename.startswith(tests):
                return make(*args, **kwargs)
            torch.set_default_dtype(torch.float32)
            try:
                return make(*args, **kwargs)
            finally:
                torch.set_default_dtype(other)

        return call

    for name in FACTORIES:
        monkeypatch.setattr(torch, name, of_tests(getattr(torch, name)))
    torch.set_default_dtype(other)
    yield
    torch.set_default_dtype(torch.float32)
