"""The trunk: a prompt encoded once and read by queries is the full pass over it, for every mixer."""

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

from icrl.models.trunk import MIXERS, Trunk, TrunkConfig


def make(mixer, seed=0):
    torch.manual_seed(seed)
    trunk = Trunk(TrunkConfig(width=32, layers=2, heads=2, mixer=mixer), positions=12)
    for p in trunk.parameters():
        p.data += 0.1 * torch.randn_like(p)  # at the start much is near zero, where errors hide
    return trunk


def full_pass(trunk, prompt, query):
    """The trunk over [prompt, query], the query at position 0; its output at the query."""
    if trunk.positions is not None:
        query = query + trunk.positions[0] - trunk.positions[prompt.shape[1] + 1]
    return trunk(torch.cat([prompt, query], 1))[0][:, -1]


@pytest.mark.parametrize("mixer", MIXERS)
def test_reads_are_full_passes_and_so_are_their_gradients(mixer):
    trunk, lengths = make(mixer), [0, 1, 7, 7, 10]
    prompt, queries = torch.randn(3, 10, 32, requires_grad=True), torch.randn(3, 5, 2, 32, requires_grad=True)
    weight = torch.randn(3, 5, 2, 32)
    inputs = [prompt, queries, *trunk.parameters()]

    read = trunk.read(queries, trunk.remember(prompt, lengths))
    full = torch.stack(
        [
            torch.stack([full_pass(trunk, prompt[:, :n], queries[:, i, j : j + 1]) for j in range(2)], 1)
            for i, n in enumerate(lengths)
        ],
        1,
    )
    scale = full.abs().max()
    assert (read - full).abs().max() < 1e-5 * scale  # float32, sums in another order
    ours = torch.autograd.grad((read * weight).sum(), inputs, allow_unused=True, materialize_grads=True)
    theirs = torch.autograd.grad((full * weight).sum(), inputs, allow_unused=True, materialize_grads=True)
    for a, b in zip(ours, theirs, strict=True):
        # float32 again, through sums of a hundred products that nearly cancel
        assert (a - b).abs().max() <= 5e-5 * (theirs[0].abs().max() + b.abs().max())


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_sequence_may_be_cut_anywhere(mixer):
    trunk, x = make(mixer), torch.randn(2, 12, 32)
    whole, _ = trunk(x)
    state, parts = None, []
    for piece in x.split([5, 1, 6], 1):
        y, state = trunk(piece, state)
        parts.append(y)
    assert state.length == 12
    assert (torch.cat(parts, 1) - whole).abs().max() < 1e-5 * whole.abs().max()


@pytest.mark.parametrize("mixer", ["softmax", "gla"])
def test_no_query_sees_another_or_the_future(mixer):
    trunk, prompt, queries = make(mixer), torch.randn(1, 10, 32), torch.randn(1, 3, 2, 32)
    before = trunk.read(queries, trunk.remember(prompt, [2, 5, 8]))
    prompt2, queries2 = prompt.clone(), queries.clone()
    prompt2[:, 5:] += 1
    queries2[:, 2:] += 1
    queries2[:, :, 1] += 1
    after = trunk.read(queries2, trunk.remember(prompt2, [2, 5, 8]))
    assert torch.equal(before[:, :2, 0], after[:, :2, 0])
    assert not torch.equal(before[:, 2, 0], after[:, 2, 0])


def test_refuses():
    with pytest.raises(ValueError, match="mixer"):
        TrunkConfig(mixer="soft")
    with pytest.raises(ValueError, match="width"):
        TrunkConfig(width=10, heads=3)
    with pytest.raises(ValueError, match="takes 12, got 13"):
        make("softmax")(torch.zeros(1, 13, 32))
    with pytest.raises(ValueError, match="lengths"):
        make("gla").remember(torch.zeros(1, 5, 32), [3, 2])
    with pytest.raises(ValueError, match="lengths"):
        make("gla").remember(torch.zeros(1, 5, 32), [6])


def copied(state):
    return tree_map(lambda t: t.clone() if isinstance(t, torch.Tensor) else t, state)


def same(a, b):
    pairs = zip(tree_leaves(a), tree_leaves(b), strict=True)
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs)


@pytest.mark.parametrize("grad", [False, True], ids=["without gradients", "with gradients"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_a_state_and_a_memory_are_left_as_they_were(mixer, grad):
    trunk = make(mixer)
    with torch.set_grad_enabled(grad):
        _, state = trunk(torch.randn(2, 3, 32))
        for T in (1, 2):
            before, tokens = copied(state), torch.randn(2, T, 32)
            first, after = trunk(tokens, state)
            second, again = trunk(tokens, state)
            assert same(state, before)
            assert torch.equal(first, second)
            assert same(after, again)
        memory = trunk.remember(torch.randn(2, 4, 32), [0, 2, 4])
        before, queries = copied(memory), torch.randn(2, 3, 2, 32)
        assert torch.equal(trunk.read(queries, memory), trunk.read(queries, memory))
        assert same(memory, before)
