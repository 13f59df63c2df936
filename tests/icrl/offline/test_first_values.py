"""`reset_parameters` of every module of icrl, after the meta device; and states in files."""

import copy
import io
import pickle
from dataclasses import replace

import pytest
import torch
from first_weights import emptied, reset_each, tensors
from torch.utils import _pytree as pytree

from icrl.models.trunk import MIXERS, Trunk, TrunkConfig
from icrl.offline.method import Spaces
from icrl.offline.methods import METHODS, method_class
from icrl.offline.world_model import WorldModel, WorldModelConfig
from icrl.omnirl.model import OmniRL, OmniRLConfig
from icrl.omnirl.value_iteration_network import ValueIterationNetwork, ValueIterationNetworkConfig
from icrl.worlds import sample_anymdp
from icrl_kernels import rollout_start

SPACES = Spaces("x", 3, 4, 4)


def make_method(name):
    kind = method_class(name)
    config = kind.config_class()
    world_model = WorldModel(WorldModelConfig(), "x", 3, 4) if kind.needs_world_model(config) else None
    return kind.make(config, SPACES, world_model)


SEQUENCE = OmniRLConfig(states=10, width=64, layers=2, heads=6, head_dim=16, hidden=24, code=16, window=8)

MODULES = {
    "omnirl, addressed": lambda: OmniRL(SEQUENCE),
    "omnirl, vectors": lambda: OmniRL(replace(SEQUENCE, channels=6, addressed=False)),
    **{
        f"omnirl, {mixer}": lambda mixer=mixer: OmniRL(
            replace(SEQUENCE, mixer=mixer, addressed=False, layout="interleaved", policy="prompted", heads=4)
        )
        for mixer in MIXERS
    },
    "omnirl": lambda: ValueIterationNetwork(ValueIterationNetworkConfig(layers=2)),
    **{f"trunk {mixer}": lambda mixer=mixer: Trunk(TrunkConfig(32, 2, 2, mixer), 12) for mixer in MIXERS},
    "world model": lambda: WorldModel(WorldModelConfig(), "x", 3, 4),
    "world model of data": lambda: WorldModel(
        WorldModelConfig(encoder="softmax"),
        "x",
        3,
        4,
        torch.arange(3.0, device="cpu"),
        torch.full((3,), 2.0, device="cpu"),
    ),
    **{name: lambda name=name: make_method(name) for name in METHODS},
}


@pytest.mark.parametrize("case", MODULES)
def test_reset_after_the_meta_device(case):
    """Constants are equal, and what is drawn has the deviation and the mean of what building draws."""
    make = MODULES[case]
    several = []
    for seed in range(10):
        torch.manual_seed(seed)
        several.append({name: t.detach().clone() for name, t in tensors(make()).items()})
    for how in (reset_each, lambda m: m.apply(lambda p: p.reset_parameters() if p._parameters or p._buffers else None)):
        module = emptied(make)
        how(module)
        if hasattr(module, "target_q"):
            assert all(
                torch.equal(a, b) for a, b in zip(module.target_q.parameters(), module.q.parameters(), strict=True)
            )
        for name, t in tensors(module).items():
            drawn = torch.stack([s[name] for s in several]).double()
            if (drawn == drawn[0]).all():
                assert torch.equal(t, several[0][name]), name
            else:
                deviation, n = drawn.std(), t.numel()
                assert (t - drawn.mean()).mean().abs() < 6 * deviation / n**0.5, name
                assert (t.double().square().mean() / drawn.square().mean() - 1).abs() < 8 * (2 / n) ** 0.5, name


def test_omnirl_has_the_bits_of_building():
    torch.manual_seed(5)
    built = tensors(MODULES["omnirl"]())
    module = emptied(MODULES["omnirl"])
    torch.manual_seed(5)
    reset_each(module)
    assert all(torch.equal(t, built[name]) for name, t in tensors(module).items())


def some_states():
    for case in ("omnirl, addressed", "omnirl, softmax", "omnirl, rwkv7"):
        yield MODULES[case]().initial_state(2, 4)
    yield ValueIterationNetwork(ValueIterationNetworkConfig(layers=2)).initial_state(2, 4)
    for mixer in ("softmax", "gla", "rwkv7"):
        yield Trunk(TrunkConfig(32, 2, 2, mixer), 12)(torch.randn(2, 3, 32))[1]
    tasks = sample_anymdp(2, 8, 3, seed=0)
    yield rollout_start(tasks.tables(), seed=torch.arange(2), record=torch.zeros(2, dtype=torch.int64))


def test_states_in_files():
    for state in some_states():
        state = pytree.tree_map(lambda t: t.detach() if isinstance(t, torch.Tensor) else t, state)
        torch.save(state, file := io.BytesIO())
        file.seek(0)
        for copied in (torch.load(file, weights_only=True), pickle.loads(pickle.dumps(state)), copy.deepcopy(state)):
            assert type(copied) is type(state)
            assert pytree.tree_structure(copied) == pytree.tree_structure(state)
            for a, b in zip(pytree.tree_leaves(copied), pytree.tree_leaves(state), strict=True):
                assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
