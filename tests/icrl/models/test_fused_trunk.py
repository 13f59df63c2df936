"""A trunk given a token at a time by one call of C++: against the module, over every mixer."""

import pytest
import torch
from torch import nn

from icrl.models.mixers import MIXERS, make_mixer
from icrl.models.stack import Block, Stack
from icrl.models.step import TrunkStep, add_stack, trunk_step
from icrl.models.trunk import Trunk, TrunkConfig
from icrl_kernels.fused import Program, add_affine, bind_state


def made(mixer, width=32, heads=2, layers=2, positions=80, seed=0):
    torch.manual_seed(seed)
    trunk = Trunk(TrunkConfig(width=width, layers=layers, heads=heads, mixer=mixer), positions)
    with torch.no_grad():
        for p in trunk.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return trunk


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("batch", [1, 19])
@torch.no_grad()
def test_tokens(mixer, batch):
    trunk = made(mixer)
    step, state = TrunkStep(trunk, batch), None
    for x in torch.randn(80, batch, 32):
        wanted, state = trunk(x[:, None], state)
        torch.testing.assert_close(step(x), wanted[:, 0], rtol=1e-4, atol=1e-4)
    assert step.length == 80
    found, state = step.state, state.layers
    for a, b in zip(found.layers, state, strict=True):
        for x, y in zip(*(s if isinstance(s[0], torch.Tensor) else (*s[0], *s[1]) for s in (a, b)), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mixer", MIXERS)
@torch.no_grad()
def test_goes_on_and_back(mixer):
    trunk, x = made(mixer), torch.randn(3, 12, 32)
    whole, _ = trunk(x)
    _, state = trunk(x[:, :9])
    step = TrunkStep(trunk, 3)
    step(x[:, 11])
    step.replace(state)
    for t in (9, 10):
        torch.testing.assert_close(step(x[:, t]), whole[:, t], rtol=1e-4, atol=1e-4)
    after, _ = trunk(x[:, 11:], step.state)
    torch.testing.assert_close(after[:, 0], whole[:, 11], rtol=1e-4, atol=1e-4)
    step.replace(None)
    torch.testing.assert_close(step(x[:, 0]), whole[:, 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("length", [0, 7])
@torch.no_grad()
def test_queries(mixer, length):
    trunk, prompt = made(mixer), torch.randn(3, 7, 32)[:, :length]
    step = TrunkStep(trunk, 3, stays=True)
    step.replace(trunk(prompt)[1] if length else None)
    memory = trunk.remember(prompt, [length])
    for query in torch.randn(4, 3, 32):
        wanted = trunk.read(query[:, None, None], memory)[:, 0, 0]
        torch.testing.assert_close(step(query), wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_embeddings_are_summed():
    trunk, layers = made("gla"), [nn.Linear(5, 32), nn.Linear(3, 32, bias=False)]
    step = TrunkStep(trunk, 4, layers)
    xs = torch.randn(4, 5), torch.randn(4, 3)
    wanted, _ = trunk(sum(layer(x) for layer, x in zip(layers, xs, strict=True))[:, None])
    torch.testing.assert_close(step(*xs), wanted[:, 0], rtol=1e-4, atol=1e-4)
    assert not step.stale
    layers[1].weight.mul_(2)
    assert step.stale


@pytest.mark.parametrize("mixer", ["softmax", "rwkv7", "gated_delta_net"])
@torch.no_grad()
def test_stacks_of_gated_blocks_with_rms_norms(mixer):
    """Softmax over a window, and RWKV-7 whose later layers mix in the first one's values."""
    torch.manual_seed(0)
    blocks = [
        Block(32, make_mixer(mixer, 32, 2, window=6, layer=i, layers_in_all=3), 40, gated=True, rms=True)
        for i in range(3)
    ]
    stack = Stack(32, blocks, rms=True)
    for p in stack.parameters():
        p.add_(0.1 * torch.randn_like(p))
    p = Program()
    y = add_stack(p, stack, p.read("x", 32), "layer")
    p.write("y", add_affine(p, y, stack.norm))
    step = p.step(5)
    x, y = torch.zeros(2, 5, 32).unbind()
    step.bind(x=x, y=y)
    mixers = [getattr(block.mixer, "mixer", block.mixer) for block in blocks]
    states, ours = ([m.initial_state(5) for m in mixers] for _ in range(2))
    for i, state in enumerate(ours):
        if mixer == "softmax":
            step.bind(**{f"layer{i}.{name}": t for name, t in state._asdict().items()})
        else:
            bind_state(step, f"layer{i}", state)
    for token in torch.randn(60, 5, 32):
        x.copy_(token)
        step.run()
        torch.testing.assert_close(y, stack.step(token, states), rtol=1e-4, atol=1e-4)


def test_no_room():
    step = TrunkStep(made("softmax", positions=2), 1)
    for _ in range(2):
        step(torch.zeros(1, 32))
    with pytest.raises(ValueError, match=r"^tokens: this trunk takes 2, got 3"):
        step(torch.zeros(1, 32))
    trunk = made("softmax", positions=9)
    _, state = trunk(torch.zeros(1, 9, 32))
    with pytest.raises(ValueError, match=r"^state: wanted at most 2 tokens, got 9"):
        step.replace(state)


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ((), "inputs: wanted 1, got 0"),
        ((torch.zeros(2, 31),), r"inputs\[0\]: wanted float32 \[2, 32\]"),
        ((torch.zeros(1, 32),), r"inputs\[0\]: wanted"),
        ((torch.zeros(2, 32, dtype=torch.float64),), r"inputs\[0\]: wanted"),
        ((torch.zeros(2, 32, device="meta"),), r"inputs\[0\]: wanted"),
    ],
)
def test_inputs_are_judged(inputs, said):
    with pytest.raises(ValueError, match=f"^{said}"):
        TrunkStep(made("gla"), 2)(*inputs)


def test_trunks_without_a_fused_step():
    assert trunk_step(made("gla").double(), 1, []) is None
    assert trunk_step(made("gla").to("meta"), 1, []) is None
    assert trunk_step(made("gla"), 1, [nn.Linear(3, 32).double()]) is None
    hooked = made("softmax")
    hooked.blocks[0].mlp_in.register_forward_hook(lambda *_: None)
    assert trunk_step(hooked, 1, []) is None
    other = made("gla")
    other.blocks[0].mix_norm = nn.BatchNorm1d(32)
    with pytest.raises(ValueError, match=r"^norm: wanted a LayerNorm, or an RMSNorm"):
        TrunkStep(other, 1)
