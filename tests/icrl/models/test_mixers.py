"""Softmax attention over a window: the masked product that it is, by blocks, segments and steps."""

import pytest
import torch

from icrl.models.mixers import WindowedSoftmax

W, H, K = 5, 2, 4


def mixer():
    torch.manual_seed(0)
    return WindowedSoftmax(H * K, H, W)


def by_hand(m, x):
    """Each token by itself: scores q·k/√K less 2^(-8h/H) a token of distance, over itself and the W - 1 before."""
    q, k, v = m.qkv_proj(x).unflatten(-1, (3, H, K)).unbind(2)
    rows = []
    for t in range(x.shape[1]):
        seen = range(max(0, t - W + 1), t + 1)
        heads = []
        for h in range(H):
            scores = torch.stack(
                [(q[:, t, h] * k[:, s, h]).sum(-1) / K**0.5 - 2 ** (-8 * (h + 1) / H) * (t - s) for s in seen], 1
            )
            heads.append((scores.softmax(1)[..., None] * torch.stack([v[:, s, h] for s in seen], 1)).sum(1))
        rows.append(torch.cat(heads, -1))
    return m.o_proj(torch.stack(rows, 1))


@pytest.mark.parametrize("T", [1, 4, 5, 6, 10, 17])
def test_it_is_the_masked_product(T):
    m, x = mixer(), torch.randn(3, T, H * K, requires_grad=True)
    y, state = m(x)
    wanted = by_hand(m, x)
    torch.testing.assert_close(y, wanted)
    weight = torch.randn_like(y)
    inputs = [x, *m.parameters()]
    for a, b in zip(*(torch.autograd.grad((o * weight).sum(), inputs) for o in (y, wanted)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert state.keys.shape == (3, H, W, K)
    assert (state.length == T).all()


@torch.no_grad()
def test_segments_steps_and_batches_of_other_lengths():
    m, x = mixer(), torch.randn(3, 23, H * K)
    whole, last = m(x)
    state, outputs = None, []
    for begin, end in ((0, 3), (3, 3), (3, 4), (4, 16), (16, 23)):
        y, state = m(x[:, begin:end], state)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, 1), whole)
    steps = m.initial_state(3)
    torch.testing.assert_close(torch.stack([m.step(x[:, t], steps)[0] for t in range(23)], 1), whole)
    for a, b, c in zip(state, last, steps, strict=True):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(c, b)
    short, long = m(x[:1, :4])[1], m(x[:1, :9])[1]  # contexts of two lengths, side by side
    both = type(short)(*(torch.cat([a, b]) for a, b in zip(short, long, strict=True)))
    y, _ = m(torch.cat([x[:1, 4:10], x[:1, 9:15]]), both)
    torch.testing.assert_close(y[0], whole[0, 4:10])
    torch.testing.assert_close(y[1], whole[0, 9:15])


@torch.no_grad()
def test_what_left_the_window_is_forgotten():
    m, x = mixer(), torch.randn(1, 20, H * K)
    other = x.clone()
    other[:, 3] += 1
    one, two = m(x)[0], m(other)[0]
    assert not torch.equal(one[:, 7], two[:, 7])
    assert torch.equal(one[:, 8:], two[:, 8:])


def test_refusals():
    with pytest.raises(ValueError, match="window: wanted at least 1, got 0"):
        WindowedSoftmax(8, 2, 0)
    with pytest.raises(ValueError, match="batch"):
        mixer().initial_state(-1)
