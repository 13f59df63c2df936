"""The GPU's transition rows, in Triton's interpreter where there is no GPU, against torch's."""

import pytest
import torch

from icrl_kernels.tabular import anymdp_reference
from icrl_kernels.tabular.counter_rng import Stream, keys_of

pytest.importorskip("triton")
from icrl_kernels.tabular.anymdp_triton import transition_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(("sizes", "actions"), [((8, 9), 5), ((16, 16), 2), ((12, 40), 5)])
def test_rows_are_torchs(sizes, actions):
    """Equal but for float32's last bit: exp and the order of sums differ in float64's."""
    states = max(sizes)
    keys = keys_of(1, torch.arange(2, device=DEVICE))
    size = torch.tensor(sizes, device=DEVICE)
    streams = [Stream(keys, 16 + what) for what in range(10)]
    _, terminal, _ = anymdp_reference._ends(streams, size, states)
    terminal[:, 5] = True
    got = anymdp_reference._transition(streams, size, terminal, actions, rows=transition_rows)
    want = anymdp_reference._transition(streams, size, terminal, actions, rows=anymdp_reference._rows)
    torch.testing.assert_close(got, want, rtol=2.0**-23, atol=0)
    assert (got == want).double().mean() > 0.999
    assert torch.equal(got, got.float().double())
    live = (torch.arange(states, device=DEVICE) < size[:, None]) & ~terminal
    sums = got.sum(-1)
    torch.testing.assert_close(sums, live[..., None].expand_as(sums).double(), rtol=0, atol=states * 2.0**-25)


def test_an_action_too_far_from_all_gets_the_nearest():
    """Narrow bells: most next states lie beyond every bell's reach, and each goes to one action alone."""
    s, a = 20, 3
    first, end = torch.zeros(1, s, dtype=torch.int64), torch.full((1, s), s)
    center = torch.tensor([1.0, 10.2, 17.0], dtype=torch.float64).expand(1, s, a)
    given = (keys_of(1, torch.arange(1)), torch.tensor([s]), first, end, torch.full((1, s), 0.2).double(), center, 0.5)
    given = [x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in given]
    got, want = transition_rows(*given), anymdp_reference._rows(*given)
    torch.testing.assert_close(got, want, rtol=2.0**-23, atol=0)
    assert (got[0, 3, :, 5] > 1e-30).tolist() == [True, False, False]
    assert (got[0, 3, :, 14] > 1e-30).tolist() == [False, False, True]
