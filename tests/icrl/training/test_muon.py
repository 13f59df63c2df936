"""Muon on a CPU: torch's, without its rounding to bfloat16."""

import pytest
import torch
from torch import nn

from icrl.training.muon import Muon, orthogonalized


def test_singular_values_come_near_one():
    torch.manual_seed(0)
    c = (3.4445, -4.7750, 2.0315)
    for shape in ((12, 12), (12, 30), (30, 12)):
        x = torch.randn(shape, dtype=torch.float64)
        y = orthogonalized(x, c, 5, 1e-7)
        values = torch.linalg.svdvals(y)
        assert values.min() > 0.6
        assert values.max() < 1.3
        u, s, v = torch.linalg.svd(x, full_matrices=False)
        s = s / s.norm()
        for _ in range(5):  # the same polynomial, of each singular value
            s = c[0] * s + c[1] * s**3 + c[2] * s**5
        torch.testing.assert_close(y, u @ s.diag() @ v)


@pytest.mark.parametrize("options", [{}, {"nesterov": False}, {"adjust_lr_fn": "match_rms_adamw"}])
def test_steps_are_those_of_torch_but_for_bfloat16(options):
    torch.manual_seed(0)
    shapes = ((16, 16), (40, 16), (16, 40))
    ours = [nn.Parameter(torch.randn(s)) for s in shapes]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    first = [p.detach().clone() for p in ours]
    made = [kind(p, 0.1, weight_decay=0.1, **options) for kind, p in ((Muon, ours), (torch.optim.Muon, theirs))]
    for _ in range(4):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in made:
            optimizer.step()
    for a, b, begin in zip(ours, theirs, first, strict=True):
        assert (a - b).norm() < 0.02 * (b - begin).norm()
    for a, b in zip(ours, theirs, strict=True):  # and one's state goes on as the other's
        assert made[0].state[a].keys() == made[1].state[b].keys()
        torch.testing.assert_close(made[0].state[a]["momentum_buffer"], made[1].state[b]["momentum_buffer"])
    again = Muon(theirs, 0.1)
    again.load_state_dict(made[1].state_dict())
    assert again.param_groups[0]["weight_decay"] == 0.1
