"""Ops that make tokens: values against torch, and what is refused."""

import pytest
import torch

from icrl_kernels.fused import Program

S, A, T, D, B = 5, 3, 4, 21, 9


def padded(table):
    return torch.nn.functional.pad(table, (0, -table.shape[-1] % 16))


def made():
    """A token of all that there is, and its program."""
    torch.manual_seed(0)
    p = Program()
    x, features = p.rows(D), p.rows(4)
    here, there, ends = torch.randn(S, D), torch.randn(S + 1, A, D), torch.randn(4, T, D)
    at = p.tensor("at", dtype=torch.int64, below=S)
    before, action = p.tensor("before", dtype=torch.int64, below=S), p.tensor("action", dtype=torch.int64, below=A)
    reward, done = p.tensor("reward"), p.tensor("done", dtype=torch.uint8)
    tag = p.tensor("tag", shared=True, each_call=True)
    square, count = p.tensor("square"), p.tensor("count")
    p.op("table_row", out=x, tensors=[at], weights=[p.weights(padded(here))], sizes=[S, 0])
    p.op("transition_row", out=x, tensors=[before, action, done], weights=[p.weights(padded(there))], sizes=[S, A])
    p.op("end_row", out=x, tensors=[done, tag], weights=[p.weights(padded(ends))], sizes=[T, 1])
    p.op("table_row", out=x, tensors=[at, action], weights=[p.weights(padded(torch.randn(S * A, D)))], sizes=[S * A, 1])
    p.op("reward_features", out=features, tensors=[reward, done, square, count])
    p.write("x", x)
    p.write("features", features)
    return p, (here, there, ends)


@torch.no_grad()
def test_values():
    p, (here, there, ends) = made()
    pairs = p.packed[3].view(S * A, -1)[:, :D]
    step = p.step(B, group=4)
    at, before = torch.randint(S, (2, B))
    action, done = torch.randint(A, (B,)), torch.randint(4, (B,), dtype=torch.uint8)
    done[:2] = 3
    reward, square, count = torch.randn(B), torch.zeros(B), torch.zeros(B)
    x, features = torch.zeros(B, D), torch.zeros(B, 4)
    step.bind(at=at, before=before, action=action, done=done, reward=reward, square=square, count=count)
    step.bind(x=x, features=features)
    rewards = torch.zeros(0, B)
    for tag in (2, 0, 3):
        reward.normal_().mul_(3 * (torch.rand(B) < 0.7))
        rewards = torch.cat([rewards, reward[None]])
        step.run(float(tag))
        start = done == 3
        wanted = (
            here[at] + there[torch.where(start, S, before), action] + ends[done.long(), tag] + pairs[at * A + action]
        )
        torch.testing.assert_close(x, wanted)
        seen = rewards.masked_fill(start, 0)
        mean = (seen.square().sum(0) / len(seen)).sqrt()
        unit = reward / torch.where(mean > 0, mean, 1.0)
        wanted = torch.stack([(unit / 5).clamp(-6, 6), *(torch.tanh(c * unit) for c in (1, 5, 25))], -1)
        torch.testing.assert_close(features, wanted)
        torch.testing.assert_close(square, seen.square().sum(0))
        assert count.tolist() == [len(rewards) * (d != 3) for d in done.tolist()]


@pytest.mark.parametrize(("name", "bad"), [("at", S), ("before", -1), ("action", A)])
def test_indices_are_judged_before_anything_changes(name, bad):
    p, _ = made()
    step = p.step(2)
    given = {n: torch.zeros(2, dtype=torch.int64) for n in ("at", "before", "action")}
    given[name][1] = bad
    count = torch.zeros(2)
    step.bind(**given, done=torch.zeros(2, dtype=torch.uint8), reward=torch.ones(2), square=torch.zeros(2), count=count)
    step.bind(x=torch.zeros(2, D), features=torch.zeros(2, 4))
    with pytest.raises(ValueError, match=f"^{name}: wanted 0 to"):
        step.run(0.0)
    assert not count.any()


@pytest.mark.parametrize("number", range(5))
def test_every_view_size_tensor_and_weight_is_judged(number):
    p, _ = made()
    p.step(2)
    kind, inp, out, side, more, tensors, weights, sizes, numbers = before = p.ops[number]
    two = p.rows(D, 2)
    small, free = p.tensor("small", 2).number, p.tensor("free", dtype=torch.int64).number
    changed = [(2, (-1, 0, 0)), (2, (two.buffer, 0, out[2]))]
    changed += [(5, [*tensors[:j], bad, *tensors[j + 1 :]]) for j in range(len(tensors)) for bad in (small, -1)]
    changed += [(5, [free, *tensors[1:]])]
    changed += [(6, [p.floats - 16])] if weights else []
    flags = {"table_row": (1,), "end_row": (1,)}.get(kind, ())
    for j in range(len(sizes)):
        if j not in flags:
            changed += [(7, [s if i != j else s * 1000 + 1 for i, s in enumerate(sizes)])]
            changed += [(7, [s if i != j else 0 for i, s in enumerate(sizes)])]
    for at, value in changed:
        if (kind, at) == ("table_row", 5) and value[:1] == tensors[:1]:
            continue  # one index is enough
        op = list(before)
        op[at] = value
        p.ops[number] = tuple(op)
        with pytest.raises(ValueError, match=rf"^op {number} \({kind}\): "):
            p.step(2)
