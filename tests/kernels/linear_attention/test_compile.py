"""Every linear-attention op and its step under torch's compiler, exporter, transforms and modes."""

import importlib
import io
from typing import Any, NamedTuple

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils import checkpoint
from torch.utils._python_dispatch import TorchDispatchMode

import icrl_kernels
from icrl_kernels import gla_step

CPU = torch.device("cpu")
H, K, V, M = 2, 8, 4, 6


class Op(NamedTuple):
    name: str
    sizes: dict[str, tuple[int, ...]]  # of each input, after [B, T]
    state: tuple[tuple[int, ...], ...] = ((H, K, V),)

    def __call__(self, *inputs, **options) -> Any:
        return getattr(icrl_kernels, self.name)(*inputs, **options)

    def step(self, *inputs, state, **options) -> Any:
        f = getattr(icrl_kernels, self.name + "_step")
        return f(*inputs, state if self.name == "gsa" else state[0], **options)

    def inputs(self, device: torch.device, B: int, *T: int) -> list[torch.Tensor]:
        def make(name, size):
            x = torch.randn(B, *T, *size).to(device)
            return -x.abs() if name in ("g", "w") else x / 3

        return [make(name, size) for name, size in self.sizes.items()]

    def states(self, device: torch.device, B: int) -> tuple[torch.Tensor, ...]:
        return tuple(torch.randn(B, *size).to(device) for size in self.state)


QKV = {"q": (H, K), "k": (H, K), "v": (H, V)}
DELTA = {**QKV, "g": (H, K), "beta": (H,)}
OPS = [
    Op("gla", {**QKV, "g": (H, K)}),
    Op("gated_delta_rule", DELTA),
    Op("gsa", {**QKV, "s": (H, M), "g": (H, M)}, ((H, K, M), (H, M, V))),
    Op("rwkv7", {"r": (H, K), "w": (H, K), "k": (H, K), "v": (H, V), "a": (H, K), "b": (H, K)}),
]
every_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)


def gradients(f, inputs):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    o = f(*leaves)
    return [o.detach(), *torch.autograd.grad(o.square().sum(), leaves)]


def assert_same(one, other):
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@every_op
def test_compiled_is_eager_to_the_bit_and_one_graph_serves_every_length(device, op):
    def output(*x):
        return op(*x)[0]

    compiled = torch.compile(output, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for T in (20, 33, 5):
            inputs = op.inputs(device, 2, T)
            for x in inputs:
                torch._dynamo.mark_dynamic(x, 1)
            leaves = [x.requires_grad_() for x in inputs]
            o = compiled(*leaves)
            grads = torch.autograd.grad(o.square().sum(), leaves)
            assert_same([o.detach(), *grads], gradients(output, inputs))


@every_op
def test_compiled_step_changes_the_state_in_place(device, op):
    inputs, state = op.inputs(device, 3), op.states(device, 3)
    other = tuple(s.clone() for s in state)

    def twice(*x, state):
        first = op.step(*x, state=state)
        before = state[0].sum()  # a read between two writes
        return first, before, op.step(*x, state=state)

    with torch.no_grad():
        compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
        assert_same(compiled(*inputs, state=state), twice(*inputs, state=other))
        assert_same(state, other)


@pytest.mark.slow
def test_inductor(device):
    op, inputs = OPS[0], OPS[0].inputs(device, 2, 20)

    def f(*x):
        return op(*(y * 2 for y in x))[0] + 1

    for a, b in zip(gradients(torch.compile(f, fullgraph=True), inputs), gradients(f, inputs), strict=True):
        torch.testing.assert_close(a, b)


@every_op
def test_exported_with_dynamic_length(device, op):
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor(0.7, device=device))

        def forward(self, inputs):
            o, state = op(inputs[0] * self.weight, *inputs[1:], output_final_state=True)
            return o, state

    layer, T = Layer(), torch.export.Dim("T", min=2)
    program = torch.export.export(layer, (op.inputs(device, 2, 20),), dynamic_shapes=([{1: T}] * len(op.sizes),))
    assert any(op.name in str(node.target) for node in program.graph.nodes)  # the op, not what it is made of
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for length in (20, 37, 2):
        inputs = op.inputs(device, 2, length)
        flat = [torch.utils._pytree.tree_leaves(f(inputs)) for f in (loaded, layer)]
        assert_same(*flat)


@every_op
def test_autocast_does_not_cast(device, op):
    inputs, state = op.inputs(device, 2, 9), op.states(device, 2)
    token = [x[:, 0] for x in inputs]
    with torch.autocast(device.type, torch.bfloat16):
        o = op(*inputs)[0]
        assert o.dtype == op.step(*token, state=state).dtype == torch.float32
        mixed = inputs[0] @ torch.eye(K, device=device)  # what autocast does to a projection
        assert mixed.dtype == torch.bfloat16
        for f in (lambda: op(mixed, *inputs[1:]), lambda: op.step(mixed[:, 0], *token[1:], state=state)):
            with pytest.raises(ValueError, match="dtype"):
                f()
    assert torch.equal(o, op(*inputs)[0])


@every_op
@pytest.mark.parametrize("selective", [False, True])
def test_activation_checkpointing_keeps_the_bits(device, op, selective):
    def f(*x):
        return op(*(y * 1.5 for y in x))[0]

    context: dict[str, Any] = {}
    if selective:
        kept = [getattr(torch.ops.icrl, op.name).default]
        context = {"context_fn": lambda: checkpoint.create_selective_checkpoint_contexts(kept)}
    inputs = op.inputs(device, 2, 20)
    saved = gradients(lambda *x: checkpoint.checkpoint(f, *x, use_reentrant=False, **context), inputs)
    assert_same(saved, gradients(f, inputs))


@every_op
def test_derivatives_that_are_not_there_are_refused(device, op):
    inputs, state = op.inputs(device, 1, 5), op.states(device, 1)
    token = [x[:, 0] for x in inputs]

    def whole(x):
        return op(x, *inputs[1:])[0].sum()

    def step(x):
        return op.step(x, *token[1:], state=state).sum()

    for f, x in ((whole, inputs[0]), (step, token[0])):
        for transform in (lambda: torch.func.jvp(f, (x,), (x,)), lambda: torch.func.grad(f)(x)):  # noqa: B023
            with pytest.raises(NotImplementedError, match="no derivative"):
                transform()
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no derivative"):
            f(forward_ad.make_dual(x, x))
    with pytest.raises(ValueError, match="no gradient"):
        step(token[0].clone().requires_grad_())


@every_op
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_is_a_loop_and_a_step_refuses_it(device, op):
    many = [torch.stack([x, 2 * x]) for x in op.inputs(device, 1, 5)]
    mapped = torch.vmap(lambda *x: op(*x)[0])(*many)
    assert_same(mapped, [op(*(x[i] for x in many))[0] for i in range(2)])
    state = op.states(device, 1)
    with pytest.raises(RuntimeError, match=r"[Bb]atching rule"):
        torch.vmap(lambda *x: op.step(*(y[:, 0] for y in x), state=state))(*many)


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class Tagged(torch.Tensor):
    pass


@every_op
def test_a_step_is_seen_by_modes_and_profilers(op):
    """The short way round the dispatcher is taken where nobody looks, and gives the same bits as the long one."""
    inputs, name = op.inputs(CPU, 3), f"icrl.{op.name}_step"
    state = op.states(CPU, 3)
    start, results, calls = tuple(s.clone() for s in state), [], []
    declared = importlib.import_module(f"icrl_kernels.linear_attention.{op.name}").OP
    original = declared.plain

    def run(*x):
        for s, first in zip(state, start, strict=True):
            s.copy_(first)
        versions = [s._version for s in state]
        o = op.step(*x, state=state)
        assert all(s._version > v for s, v in zip(state, versions, strict=True))  # autograd knows of the write
        results.append([o.as_subclass(torch.Tensor), *(s.clone() for s in state)])

    def counted(*args):
        calls.append(original(*args))
        return calls[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(declared, "plain", counted)
        run(*inputs)
        assert len(calls) == 1
        if hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
            assert calls[0] is not None
        with Seen() as seen:
            run(*inputs)
        with torch.autograd.profiler.profile() as profile:
            run(*inputs)
        assert len(calls) == 1
        assert any(name in x for x in seen.names)
        assert any(f"icrl::{op.name}_step" in e.name for e in profile.function_events)
        run(inputs[0].as_subclass(Tagged), *inputs[1:])
        run(torch.nn.Parameter(inputs[0], requires_grad=False), *inputs[1:])
        run(torch._neg_view(-inputs[0]), *inputs[1:])  # whose memory holds the opposite
        run(torch.complex(inputs[0], -inputs[0]).conj().imag, *inputs[1:])  # and which is not contiguous
        run(*(torch.stack([x, x], -1)[..., 0] for x in inputs))  # not contiguous
        assert [c is None for c in calls[1:]] == [True] * 3 + [False] * 2 or calls[0] is None
    for other in results[1:]:
        assert_same(results[0], other)


@every_op
def test_a_graph_that_saved_the_state_notices_the_step(device, op):
    inputs, state = op.inputs(device, 2), op.states(device, 2)
    weight = torch.ones(1, device=device, requires_grad=True)
    loss = (weight * state[-1]).sum()
    with torch.no_grad():
        op.step(*inputs, state=state)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@every_op
def test_steps_in_inference_mode(device, op):
    inputs, state = op.inputs(device, 2), op.states(device, 2)
    other = tuple(s.clone() for s in state)
    wanted = op.step(*inputs, state=state)
    with torch.inference_mode():
        mine = tuple(s.clone() for s in other)
        assert torch.equal(op.step(*inputs, state=mine), wanted)
        assert_same(mine, state)


@every_op
def test_steps_of_every_backend_agree(device, op):
    inputs, state = op.inputs(device, 2), op.states(device, 2)
    other = tuple(s.clone() for s in state)
    o, reference = op.step(*inputs, state=state), op.step(*inputs, state=other, backend="reference")
    for a, b in zip((o, *state), (reference, *other), strict=True):
        torch.testing.assert_close(a, b)


def test_a_step_goes_straight_to_c_for_its_own_backend_alone(monkeypatch):
    op, calls = importlib.import_module("icrl_kernels.linear_attention.gla").OP, []
    monkeypatch.setattr(op, "plain", lambda *args: calls.append(args))  # None: ask the dispatcher
    x, state = torch.zeros(1, 2, 4), torch.zeros(1, 2, 4, 4)
    for backend, wanted in (("auto", 1), ("cpu", 2), ("reference", 2)):
        gla_step(x, x, x, None, state, backend=backend)
        assert len(calls) == wanted


@every_op
@pytest.mark.gpu
def test_cuda_graph_replays_a_step(op):
    inputs, state = ([x.cuda() for x in y] for y in (op.inputs(CPU, 2), op.states(CPU, 2)))
    other = [s.clone() for s in state]
    op.step(*inputs, state=other)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = op.step(*inputs, state=state)
    graph.replay()
    assert_same(state, other)
    wanted = op.step(*inputs, state=other)
    graph.replay()
    assert torch.equal(o, wanted)


@every_op
def test_steps_of_permuted_inputs(device, op):
    inputs, state = op.inputs(device, 3), op.states(device, 3)
    permuted = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in inputs]
    other = tuple(t.clone() for t in state)
    assert torch.equal(op.step(*inputs, state=state), op.step(*permuted, state=other))
    assert_same(state, other)


@every_op
def test_the_reference_step_refuses_gates_too(op):
    gate = "w" if op.name == "rwkv7" else "g"
    inputs = [x.abs() + 1 if name == gate else x for name, x in zip(op.sizes, op.inputs(CPU, 2), strict=True)]
    with pytest.raises(ValueError, match=f"^{gate}"):
        op.step(*inputs, state=op.states(CPU, 2), backend="reference")


@every_op
def test_steps_name_a_tensor_on_another_device(device, op):
    inputs = [x.to("meta") if name == "v" else x for name, x in zip(op.sizes, op.inputs(device, 2), strict=True)]
    with pytest.raises(ValueError, match=r"^v: is on meta"):
        op.step(*inputs, state=op.states(device, 2))


def test_flags_that_are_not_bool_mean_what_they_mean(device):
    q, k, v, g, beta = OPS[1].inputs(device, 2)
    one, other = (torch.zeros(2, H, K, V, device=device) for _ in range(2))
    normed = icrl_kernels.gated_delta_rule_step(q, k, v, g, beta, one, qk_l2norm=True)
    assert torch.equal(icrl_kernels.gated_delta_rule_step(q, k, v, g, beta, other, qk_l2norm=1), normed)


@every_op
@pytest.mark.parametrize("broken", [0, 1, 2])
def test_the_backward_op_refuses_what_autograd_would_not_give(device, op, broken):
    inputs, states = op.inputs(device, 2, 5), op.states(device, 2)
    wrong = [torch.randn(2, 5, H, V).to(device), *states, *inputs]
    at = broken if broken < 2 else 1 + len(states) + list(op.sizes).index("k")  # do, a state's gradient, k
    wrong[at] = wrong[at][:, :1].clone()
    options = [1.0, *[None] * len(states), None, *([False] if op.name == "gated_delta_rule" else []), "auto"]
    with pytest.raises(ValueError, match=r"^(do|dfinal_\w+|k): wanted shape"):
        getattr(torch.ops.icrl, op.name + "_backward")(*wrong, *options)


@pytest.mark.parametrize("first", ["fake", "grad", "functionalize"])
def test_a_call_under_a_mode_or_transform_leaves_the_next_alone(first):
    """What is kept from call to call holds no tensor, which a mode or a transform would have wrapped."""
    T = {"fake": 41, "grad": 42, "functionalize": 43}[first]  # a length that no other test uses
    q, k, v = (torch.randn(2, T, 2, 4) for _ in range(3))
    if first == "fake":
        with FakeTensorMode() as mode:
            icrl_kernels.gla(*(mode.from_tensor(t) for t in (q, k, v)), backend="reference")
    elif first == "grad":
        torch.func.grad(lambda q: icrl_kernels.gla(q, k, v, backend="reference")[0].sum())(q)
    else:
        torch.func.functionalize(lambda q: icrl_kernels.gla(q, k, v, backend="reference")[0])(q)
    o, _ = icrl_kernels.gla(q, k, v)
    torch.testing.assert_close(o, icrl_kernels.gla_reference(q, k, v)[0])
