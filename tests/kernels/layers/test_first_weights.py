"""First weights: with `reset_parameters` after the meta device and in half precision; and states in files."""

import copy
import io
import pickle
from typing import NamedTuple

import pytest
import torch
from first_weights import emptied, reset_each, tensors
from test_layers import MIXERS, D, alive, some_state, steps
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from icrl_kernels.layers import RWKV7, State
from icrl_kernels.testing import assert_as_good_as_torch

BUILT = {
    **MIXERS,
    "rwkv7": lambda: RWKV7(D, head_dim=16, value_dim=48),
    "rwkv7_fused": lambda: RWKV7(D, head_dim=16, fuse_norm=True, elementwise_affine=False),
    "rwkv7_later": lambda: RWKV7(D, head_dim=16, layer_idx=2, num_layers=4),
}
IN_ORDER = [name for name in BUILT if name.split("_")[0] in ("linear", "gla", "gsa")]  # of drawing


def assert_same_distribution(module, make):
    """Constants are equal, and what is drawn has the deviation and the mean of many of its kind."""
    several = []
    for seed in range(100, 130):
        torch.manual_seed(seed)
        several.append({n: t.detach().clone() for n, t in tensors(make()).items()})
    for name, t in tensors(module).items():
        drawn = torch.stack([s[name] for s in several]).double()
        if (drawn == drawn[0]).all():
            assert torch.equal(t, several[0][name]), name
        else:
            deviation, n = drawn.std(), t.numel()
            assert (t - drawn.mean()).mean().abs() < 6 * deviation / n**0.5, name
            assert (t.double().square().mean() / drawn.square().mean() - 1).abs() < 8 * (2 / n) ** 0.5, name


@pytest.mark.parametrize(
    "reset", [reset_each, lambda m: m.apply(lambda p: reset_each(p)), lambda m: m.reset_parameters()]
)
@pytest.mark.parametrize("case", BUILT)
def test_reset_after_the_meta_device(case, reset):
    module = emptied(BUILT[case])
    reset(module)
    assert all(t.isfinite().all() for t in tensors(module).values())
    assert_same_distribution(module, BUILT[case])


@pytest.mark.parametrize("case", IN_ORDER)
def test_reset_has_the_bits_of_building(case):
    torch.manual_seed(5)
    built = tensors(BUILT[case]())
    module = emptied(BUILT[case])
    torch.manual_seed(5)
    module.reset_parameters()
    assert all(torch.equal(t, built[name]) for name, t in tensors(module).items())


@pytest.fixture
def mesh(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_reset_of_shards(mesh):
    for case, make in BUILT.items():
        with torch.device("meta"):
            module = make()
        fully_shard(module, mesh=mesh)
        module.to_empty(device="cpu")
        with torch.no_grad():
            for t in tensors(module).values():
                t.fill_(float("nan"))
        reset_each(module)
        assert all(isinstance(p, DTensor) for p in module.parameters()), case
        whole = make()
        whole.load_state_dict({n: t.full_tensor() for n, t in module.state_dict().items()})
        assert_same_distribution(whole, make)


@pytest.fixture(params=[torch.bfloat16, torch.float16])
def half(request):
    yield request.param
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("how", ["default dtype", "to"])
@pytest.mark.parametrize("case", BUILT)
def test_half_precision(case, half, how):
    torch.manual_seed(0)
    single = BUILT[case]()
    torch.manual_seed(0)
    if how == "to":
        mixer = BUILT[case]().to(dtype=half)
    else:
        torch.set_default_dtype(half)
        mixer = BUILT[case]()
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in mixer.parameters()} == {half}
    for (name, p), q in zip(mixer.named_parameters(), single.parameters(), strict=True):
        if name.rpartition(".")[2] not in ("weight", "bias"):  # the others draw in float32
            torch.testing.assert_close(
                p.float(), q, rtol=2 * torch.finfo(half).eps, atol=1e-3, msg=lambda m, n=name: n + m
            )
    if how == "default dtype":
        torch.set_default_dtype(half)
    alive(mixer)
    x, state = torch.randn(2, 7, D, dtype=half), some_state(mixer, 2)
    options = {"v_first": torch.randn(2, 7, D, dtype=half)} if case == "rwkv7_later" else {}
    y, final = mixer(x, state, **options)
    y.float().square().sum().backward()
    assert y.dtype == half
    assert {t.dtype for t in pytree.tree_leaves(final)} == {torch.float32}
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mixer.parameters())
    if not options:
        exact = copy.deepcopy(mixer).double()(x.double(), pytree.tree_map(torch.Tensor.double, state))
        stepped = steps(mixer, x, state)
        assert stepped[0].dtype == half
        for a, b, c in zip(*map(pytree.tree_leaves, (stepped, (y, final), exact)), strict=True):
            assert_as_good_as_torch(a, b.detach(), c.detach(), factor=3.0)


class Kept(NamedTuple):
    """Not one of the library's."""

    state: State


@pytest.mark.parametrize("case", BUILT)
def test_states_in_files(case):
    state = some_state(BUILT[case](), 3)
    kept = {"step": 7, "states": [state, (state, None)]}
    file = io.BytesIO()
    torch.save(kept, file)
    file.seek(0)
    for copied in (torch.load(file, weights_only=True), pickle.loads(pickle.dumps(kept)), copy.deepcopy(kept)):
        assert type(copied["states"][0]) is State
        assert pytree.tree_structure(copied) == pytree.tree_structure(kept)
        for a, b in zip(pytree.tree_leaves(copied), pytree.tree_leaves(kept), strict=True):
            assert a is b or a == b if not isinstance(a, torch.Tensor) else torch.equal(a, b)
    torch.save(Kept(state), file := io.BytesIO())
    file.seek(0)
    with pytest.raises(pickle.UnpicklingError, match="Kept"):
        torch.load(file, weights_only=True)
