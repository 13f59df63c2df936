"""Programs of fused ops: values against torch, the same bits however contexts are shared out, and what is refused."""

import pytest
import torch
from instruction_sets import ISAS, check_with
from torch import nn
from torch.nn import functional as F

from icrl_kernels.fused import Program, Rows

SIZES = [(1, 1, 1), (7, 5, 3), (16, 33, 16), (64, 176, 24), (37, 130, 97), (96, 64, 5)]  # width, hidden, outputs


class Net(nn.Module):
    """A row goes through a norm, a gated unit with a row for all at its side, a GELU and another norm."""

    def __init__(self, width, hidden, outputs):
        super().__init__()
        self.norm, self.last = nn.LayerNorm(width), nn.RMSNorm(width, eps=1e-5)
        self.gate, self.side = nn.Linear(width, 2 * hidden), nn.Linear(width, 2 * hidden, bias=False)
        self.back, self.up = nn.Linear(hidden, width, bias=False), nn.Linear(width, hidden)
        self.down, self.head, self.other = (
            nn.Linear(hidden, width),
            nn.Linear(width, outputs),
            nn.Linear(width, outputs),
        )
        for p in self.parameters():
            nn.init.normal_(p, std=0.5)

    def forward(self, rows, row):
        a, b = (self.gate(self.norm(rows)) + self.side(row)[:, None]).chunk(2, -1)
        x = rows + self.back(F.silu(a) * b)
        x = x + self.down(F.gelu(self.up(x), approximate="tanh"))
        normed = self.last(x)
        return torch.cat([self.head(normed), self.other(normed) + self.head.bias], -1)

    def program(self, count):
        p = Program()
        width, hidden = self.gate.in_features, self.back.in_features
        x, row = p.read("rows", width, count), p.read("row", width)
        side = p.rows(2 * hidden)
        p.linear_into(side, row, self.side)
        (h,) = p.linear(p.layer_norm(x, self.norm.eps), [self.gate], norm=self.norm)
        p.linear_into(x, p.gated(h, side), self.back, add=True)
        (h,) = p.linear(x, [self.up])
        p.linear_into(x, p.gelu_tanh(h), self.down, add=True)
        normed = p.rms_norm(x, self.last.eps)
        (a,) = p.linear(normed, [self.head], norm=self.last)
        (b,) = p.linear(normed, [self.other], norm=self.last, biases_of=[self.head])
        p.write("a", a)
        p.write("b", b)
        return p


def run(net, rows, row, *, group=8, threads=1):
    batch, count, _ = rows.shape
    step = net.program(count).step(batch, group=group)
    outputs = net.head.out_features
    a, b = torch.full((2, batch, count, outputs), torch.nan).unbind()
    step.bind(rows=rows, row=row, a=a, b=b)
    step.run(threads=threads)
    return torch.cat([a, b], -1)


def made(sizes, batch, count, seed=0):
    torch.manual_seed(seed)
    net = Net(*sizes)
    return net, torch.randn(batch, count, sizes[0]), torch.randn(batch, sizes[0])


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(("batch", "count"), [(1, 1), (1, 5), (3, 2), (13, 9)])
@torch.no_grad()
def test_values(sizes, batch, count):
    net, rows, row = made(sizes, batch, count)
    found = run(net, rows, row)
    plain = net(rows, row)
    exact = net.double()(rows.double(), row.double())
    floor = 1e-6 * exact.norm()
    assert (found - exact).norm() <= 4 * (plain - exact).norm() + floor


@pytest.mark.parametrize("sizes", [(37, 130, 97), (64, 176, 24)])
def test_same_bits_in_any_batch_group_and_threads(sizes):
    net, rows, row = made(sizes, 23, 5)
    alone = torch.cat([run(net, rows[i : i + 1], row[i : i + 1]) for i in range(23)])
    for group, threads in ((1, 1), (4, 1), (5, 2), (8, 3), (64, 1)):
        assert torch.equal(run(net, rows, row, group=group, threads=threads), alone)


def test_values_do_not_depend_on_what_ran_before():
    net, rows, row = made((37, 130, 97), 5, 3)
    before = run(net, rows, row)
    run(net, torch.full_like(rows, torch.nan), row)
    assert torch.equal(run(net, rows, row), before)


def test_a_layer_is_packed_once():
    net, _, _ = made((16, 33, 16), 1, 1)
    p = net.program(2)
    before = p.floats
    p.linear(p.rows(16), [net.up])
    assert p.floats == before
    p.linear(p.rows(16), [net.up], norm=net.norm)
    assert p.floats > before


def test_changed_parameters_are_seen():
    net, _, _ = made((16, 33, 16), 1, 1)
    step = net.program(2).step(1)
    assert not step.stale
    assert not step.replaced
    with torch.no_grad():
        net.norm.bias.add_(1)
    assert step.stale
    assert not step.replaced
    step = net.program(2).step(1)
    net.up.bias = nn.Parameter(net.up.bias.detach().clone())
    assert step.replaced


@pytest.mark.parametrize("isa", ISAS)
def test_instruction_sets(isa):
    script = (
        "for sizes in SIZES:\n"
        "    test_values(sizes, 13, 9), test_values(sizes, 1, 5)\n"
        "test_same_bits_in_any_batch_group_and_threads((37, 130, 97))\n"
    )
    check_with(isa, __file__, script)


# ---- what is refused, when a step is made


def linear(**changed):
    p = Program()
    layer = nn.Linear(8, 24)
    x = p.read("x", 8, 3)
    (y,) = p.linear(x, [layer])
    p.write("y", y)
    kind, *rest = p.ops[1]
    names = ("input", "out", "side", "more", "tensors", "weights", "sizes", "numbers")
    p.ops[1] = (changed.pop("kind", kind), *(changed.get(n, r) for n, r in zip(names, rest, strict=True)))
    return p


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"kind": "polynomial"}, "no such kind"),
        ({"input": (9, 0, 8)}, "no buffer 9"),
        ({"input": (0, 1, 8)}, "columns 1 to 9"),
        ({"input": (0, -1, 8)}, "columns"),
        ({"input": (0, 0, 7)}, "columns of input"),
        ({"input": (-1, 0, 0)}, "an input and an output"),
        ({"out": (0, 0, 8)}, "columns of output"),
        ({"out": (1, 9, 24)}, "columns 9 to 33"),
        ({"out": (1, 8, 24), "sizes": [8, 24, 0]}, "room"),
        ({"out": (1, 8, 12), "sizes": [8, 12, 0], "input": (1, 20, 8)}, "apart"),
        ({"input": (1, 0, 8)}, "apart"),
        ({"weights": [0]}, None),
        ({"weights": []}, "within the packed"),
        ({"weights": [8]}, "within the packed"),
        ({"weights": [16]}, None),
        ({"weights": [256]}, "within the packed"),
        ({"weights": [2**40]}, "not there"),
        ({"weights": [0, 288]}, "within the packed"),
        ({"sizes": [8, 25, 0]}, "columns of output"),
        ({"sizes": [2**31, 24, 0]}, "sizes"),
        ({"sizes": [-1, 24, 0]}, "sizes"),
        ({"sizes": []}, "sizes"),
        ({"tensors": [2]}, "no tensor 2"),
        ({"tensors": [0] * 17}, "too many tensors"),
        ({"more": [(0, 0, 1)] * 5}, "too many views"),
        ({"more": [(0, 8, 1)]}, "columns 8 to 9"),
    ],
)
def test_what_an_op_may_not_do(changed, said):
    program = linear(**changed)
    if said is None:
        program.step(2)
        return
    with pytest.raises(ValueError, match=rf"^op 1 \({changed.get('kind', 'linear')}\): .*{said}"):
        program.step(2)


@pytest.mark.parametrize("kind", ["rms_norm", "layer_norm", "gelu_tanh", "gated"])
@pytest.mark.parametrize("out", [(0, 1, 8), (1, 0, 9), (2, 0, 8), (-1, 0, 0)])
def test_shapes_of_rows(kind, out):
    p = Program()
    x, _, _ = p.rows(16, 3), p.rows(16, 3), p.rows(16, 2)
    width = 8 if kind != "gated" else 16
    p.op(kind, input=Rows(x.buffer, 0, width), out=Rows(*out), numbers=[1e-5])
    with pytest.raises(ValueError, match=rf"^op 0 \({kind}\): wants"):
        p.step(1)


@pytest.mark.parametrize("kind", ["read", "write"])
def test_shapes_of_tensors(kind):
    p = Program()
    x, slot = p.rows(16, 3), p.tensor("x", 3, 15)
    p.op(kind, input=x, out=x, tensors=[slot])
    with pytest.raises(ValueError, match=rf"^op 0 \({kind}\): wants a float32 tensor"):
        p.step(1)


@pytest.mark.parametrize("options", [{"optional": True}, {"shared": True}])
def test_tensors_of_copies_are_each_contexts_own(options):
    p = Program()
    p.op("read", out=p.rows(8), tensors=[p.tensor("x", 1, 8, **options)])
    with pytest.raises(ValueError, match=r"^op 0 \(read\): wants a float32 tensor"):
        p.step(1)


def test_sizes_of_steps():
    program = linear()
    for batch, group in ((0, 8), (-1, 8), (2, 0), (2.5, 8)):
        with pytest.raises(ValueError, match=r"^(batch|group): wanted"):
            program.step(batch, group=group)


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (torch.zeros(2, 3, 7), "shape"),
        (torch.zeros(3, 3, 8), "shape"),
        (torch.zeros(2, 3, 8, dtype=torch.float64), "float32"),
        (torch.zeros(2, 3, 8, device="meta"), "on the CPU"),
        (torch.zeros(2, 8, 3).transpose(1, 2), "contiguous"),
        (torch.zeros(2, 3, 8).to_sparse(), "dense"),
        ([0.0] * 48, "tensor"),
    ],
)
def test_tensors_are_judged_when_bound(tensor, said):
    with pytest.raises(ValueError, match=rf"^x: wanted .*{said}"):
        linear().step(2).bind(x=tensor)


def test_nothing_runs_unbound():
    step = linear().step(2)
    step.bind(x=torch.zeros(2, 3, 8))
    with pytest.raises(ValueError, match=r"^y: is not bound"):
        step.run()
    with pytest.raises(ValueError, match=r"^z: wanted one of x, y"):
        step.bind(z=torch.zeros(2))
    with pytest.raises(ValueError, match="tensors with the call"):
        step.run(5)


def test_what_a_builder_may_not_say():
    p = Program()
    x = p.rows(8)
    p.tensor("x", 8)
    for call, name in (
        (lambda: p.tensor("x", 8), "name"),
        (lambda: p.rows(0), "width"),
        (lambda: p.rows(4, 0), "count"),
        (lambda: x.part(4, 5), "part"),
        (lambda: p.linear(x, [nn.Linear(9, 4)]), "input"),
        (lambda: p.linear_into(p.rows(17), x, nn.Linear(8, 16)), "out"),
    ):
        with pytest.raises(ValueError, match=f"^{name}: wanted"):
            call()
