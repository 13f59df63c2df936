import os
import subprocess
import sys

import pytest
import torch
from on_device import assert_close_gradients, assert_good, assert_nan, assert_same_bits, compiled_backend, move, poisons

from icrl_kernels import _C, _registry, gla, gla_reference, gla_step
from icrl_kernels.testing import gla_chunkwise_torch

TOLERANCE = {"cpu": 1e-5, "cuda": 1e-4}
CPU = torch.device("cpu")
GATES = ["none", "scalar", "channel"]
NAMES = ["o", "final_state", "dq", "dk", "dv", "dg", "dinitial_state"]


def inputs(device, B, T, H, Hk, K, V, gate, strength=1.0, dtype=torch.float32, sequences=None):
    q, k, v = torch.randn(B, T, H, K), torch.randn(B, T, Hk, K), torch.randn(B, T, Hk, V)
    shape = {"none": None, "scalar": (B, T, Hk), "channel": (B, T, Hk, K)}[gate]
    g = None if shape is None else -strength * torch.rand(shape)
    state = torch.randn(sequences or B, Hk, K, V)
    return move([q.to(dtype), k.to(dtype), v.to(dtype), g, state], device)


def to(tensors, dtype):
    return [None if t is None else t.to(dtype) for t in tensors]


def run(f, tensors, weights=None, **options):
    """Output, final state and, with weights for the two, the gradients of all inputs."""
    leaves = [None if t is None else t.detach().clone().requires_grad_(weights is not None) for t in tensors]
    q, k, v, g, state = leaves
    o, final = f(q, k, v, g, initial_state=state, output_final_state=True, **options)
    if weights is not None:
        ((o * weights[0].to(o)).sum() + (final * weights[1].to(final)).sum()).backward()
    return [o.detach(), final.detach()] + [None if x is None or weights is None else x.grad for x in leaves]


def compare(tensors, **options):
    o, state = torch.randn(*tensors[0].shape[:3], tensors[2].shape[3]), torch.randn(tensors[4].shape)
    exact = run(gla_reference, to(tensors, torch.float64), (o, state), **options)
    torch_result = run(gla_reference, tensors, (o, state), **options)
    result = run(gla, tensors, (o, state), **options)
    for name, a, s, r in zip(NAMES, result, torch_result, exact, strict=True):
        if r is not None:
            assert a.dtype == s.dtype, name
            assert_good(a, s, r, name=name, dtype=tensors[0].dtype)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(
    "sizes",
    [(2, 1, 1, 1, 16, 16), (1, 63, 2, 2, 60, 40), (1, 64, 1, 1, 64, 64), (2, 65, 4, 2, 32, 32), (1, 200, 1, 1, 5, 7),
     (1, 33, 3, 1, 100, 256)],
)  # fmt: skip
def test_values_and_gradients(device, gate, sizes):
    compare(inputs(device, *sizes, gate))


@pytest.mark.parametrize("gate", ["scalar", "channel"])
@pytest.mark.parametrize("strength", [1e-3, 6.0, 30.0, 200.0])
def test_strength_of_gates(device, gate, strength):
    """From almost none to exp(g) that underflows in one token, and, between, products that underflow within a chunk."""
    compare(inputs(device, 1, 70, 2, 2, 20, 24, gate, strength))


@pytest.mark.parametrize("gate", ["scalar", "channel"])
def test_closed_gates_reset(device, gate):
    tensors = inputs(device, 1, 50, 2, 1, 16, 16, gate, 0.1)
    tensors[3][:, [0, 7, 16, 31, 32, 45]] = -float("inf")
    tensors[3][:, 20] = -30.0
    compare(tensors)
    grad = run(gla, tensors, (torch.ones(1, 50, 2, 16), torch.ones(1, 1, 16, 16)))[5]
    if device.type == "cpu":
        assert (grad[:, [0, 7, 16, 31, 32, 45]] == 0).all()
    # what came before the last reset is forgotten
    after = run(gla, [t[:, 45:] for t in tensors[:4]] + [torch.zeros_like(tensors[4])])
    whole = run(gla, tensors)
    torch.testing.assert_close(whole[0][:, 45:], after[0], rtol=TOLERANCE[device.type], atol=TOLERANCE[device.type])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("gate_dtype", ["same", "float32"])
def test_half_precision(device, dtype, gate, gate_dtype):
    tensors = inputs(device, 1, 70, 4, 2, 32, 40, gate, dtype=dtype)
    if gate_dtype == "same" and tensors[3] is not None:
        tensors[3] = tensors[3].to(dtype)
    compare(tensors)


def test_half_precision_conversions_are_exact():
    """k = v = 1 and no gate: o is q's rounding to and fro, for every finite value of the type."""
    for dtype in (torch.bfloat16, torch.float16):
        bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
        values = bits.view(dtype)
        values = values[values.isfinite()]
        if dtype == torch.bfloat16:  # float32's subnormals are bfloat16's
            values = values[(values.float().abs() >= 2.0**-120) | (values == 0)]
        q = values.reshape(-1, 1, 1, 1)
        one = torch.ones_like(q)
        o, _ = gla(q, one, one, scale=1.0)
        assert torch.equal(o, q)


@pytest.mark.parametrize("gate", GATES)
def test_packed_sequences(device, gate):
    lengths = [0, 17, 1, 0, 64, 40, 0]
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], device=device)
    tensors = inputs(device, 1, sum(lengths), 2, 1, 24, 16, gate, sequences=len(lengths))
    compare(tensors, cu_seqlens=bounds)
    weights = (torch.randn(1, sum(lengths), 2, 16), torch.randn(len(lengths), 1, 24, 16))
    packed = run(gla, tensors, weights, cu_seqlens=bounds.int())
    for n in range(len(lengths)):
        span = slice(int(bounds[n]), int(bounds[n + 1]))
        part = [None if t is None else t[:, span] for t in tensors[:4]] + [tensors[4][n : n + 1]]
        alone = run(gla, part, (weights[0][:, span], weights[1][n : n + 1]))
        for i in (0, 2, 3, 4, 5):
            if packed[i] is not None:
                assert_same_bits(packed[i][:, span], alone[i], NAMES[i])
        for i in (1, 6):
            assert_same_bits(packed[i][n : n + 1], alone[i], NAMES[i])


@pytest.mark.parametrize("gate", GATES)
def test_segments_with_carried_state_and_steps(device, gate):
    tensors = inputs(device, 2, 75, 4, 2, 20, 36, gate)
    exact, plain = run(gla_reference, to(tensors, torch.float64)), run(gla_reference, tensors)
    state, pieces = tensors[4], []
    for a, b in [(0, 16), (16, 16), (16, 19), (19, 64), (64, 75)]:
        part = [None if t is None else t[:, a:b] for t in tensors[:4]]
        o, state = gla(*part, initial_state=state, output_final_state=True)
        pieces.append(o)
    assert_good(torch.cat(pieces, 1), plain[0], exact[0])
    assert_good(state, plain[1], exact[1])

    state = tensors[4].clone()
    steps = [gla_step(*[None if t is None else t[:, i] for t in tensors[:4]], state) for i in range(75)]
    assert_good(torch.stack(steps, 1), plain[0], exact[0])
    assert_good(state, plain[1], exact[1])


def test_long_sequence_recomputes_states_in_segments(device):
    """Past the size where backward keeps every chunk's state, gradients are those of the halves joined by hand."""
    tensors = inputs(device, 1, 16 * 40, 1, 1, 256, 256, "channel", 0.05)
    weights = move((torch.randn(1, 640, 1, 256), torch.randn(1, 1, 256, 256)), device)
    whole = run(gla, tensors, weights)
    leaves = [t.clone().requires_grad_() for t in tensors]
    first, state = gla(*[t[:, :320] for t in leaves[:4]], initial_state=leaves[4], output_final_state=True)
    second, state = gla(*[t[:, 320:] for t in leaves[:4]], initial_state=state, output_final_state=True)
    ((torch.cat([first, second], 1) * weights[0]).sum() + (state * weights[1]).sum()).backward()
    for name, a, leaf in zip(NAMES[2:], whole[2:], leaves, strict=True):
        assert_close_gradients(a, leaf.grad, name)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("strength", [0.1, 8.0])
def test_no_output_depends_on_a_later_token(device, gate, strength):
    tensors = inputs(device, 1, 80, 2, 2, 32, 32, gate, strength)
    o = run(gla, tensors)[0]
    for t in (1, 15, 16, 21, 47, 48, 79):
        for poison, gates in poisons(device, (-float("inf"), -300.0, -0.5, float("nan"))):
            changed = [None if x is None else x.clone() for x in tensors]
            for x in changed[:3]:
                x[:, t:] = poison
            if changed[3] is not None:
                changed[3][:, t:] = gates
            assert torch.equal(run(gla, changed)[0][:, :t], o[:, :t])


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("sizes", [(2, 70, 2, 2, 32, 32), (1, 70, 1, 1, 32, 64)])
def test_bits_do_not_depend_on_run_or_threads(device, gate, sizes):
    tensors = inputs(device, *sizes, gate)
    weights = (torch.randn(*sizes[:3], sizes[5]), torch.randn(tensors[4].shape))
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(gla, tensors, weights))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for name, a, b in zip(NAMES, results[0], other, strict=True):
            assert a is None or torch.equal(a, b), name


@pytest.mark.parametrize("gate", GATES)
def test_nan_goes_where_it_touches(device, gate):
    tensors = inputs(device, 2, 40, 2, 2, 16, 16, gate)
    tensors[2][0, 20, 1, 3] = float("nan")  # one channel of v, one head of one sequence
    o, final = run(gla, tensors)[:2]
    wanted = torch.zeros_like(o, dtype=torch.bool)
    wanted[0, 20:, 1, 3] = True
    assert_nan(o, wanted)
    assert final.isnan().any(2).nonzero().tolist() == [[0, 1, 3]]
    if gate != "none":
        tensors = inputs(device, 2, 40, 2, 2, 16, 16, gate)
        tensors[3][0, 20, 1] = float("nan")
        o, final = run(gla, tensors)[:2]
        wanted = torch.zeros_like(o, dtype=torch.bool)
        wanted[0, 20:, 1] = True
        assert_nan(o, wanted)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("where", ["v", "do"])
def test_nan_of_gradients_goes_where_it_touches(gate, where):
    tensors = inputs(CPU, 2, 40, 2, 2, 16, 16, gate)
    weights = [torch.randn(2, 40, 2, 16), torch.randn(tensors[4].shape)]
    (tensors[2] if where == "v" else weights[0])[0, 20, 1, 3] = float("nan")
    result, exact = (run(f, tensors, weights) for f in (gla, gla_reference))
    for name, a, r in zip(NAMES, result, exact, strict=True):
        if r is None:
            continue
        wanted = r.isnan()
        if gate == "channel" and name == "dg" and where == "v":
            wanted[0, 16:, 1] = True  # its pairs inside a chunk are row sums minus column sums
        assert torch.equal(a.isnan(), wanted), name


def test_empty(device):
    for sizes in [(2, 0, 2, 1, 16, 8), (0, 5, 2, 1, 16, 8)]:
        tensors = inputs(device, *sizes, "channel")
        o, final, *gradients = run(gla, tensors, (torch.ones(*sizes[:3], 8), torch.ones_like(tensors[4])))
        assert o.shape == (*sizes[:3], 8)
        assert torch.equal(final, tensors[4])
        assert torch.equal(gradients[-1], torch.ones_like(tensors[4]))


def test_without_initial_state_and_final_state(device):
    q, k, v, g, _ = inputs(device, 1, 20, 1, 1, 16, 16, "channel")
    zeros = torch.zeros(1, 1, 16, 16, device=device)
    o, final = gla(q, k, v, g)
    assert final is None
    assert_same_bits(o, gla(q, k, v, g, initial_state=zeros)[0])
    assert torch.equal(gla(q, k, v, g, scale=0.25)[0], o)


def test_strides_do_not_matter(device):
    q, k, v, g, state = inputs(device, 2, 20, 2, 2, 16, 16, "channel")
    wanted = gla(q, k, v, g, initial_state=state)[0]
    turned = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in (q, k, v, g)]
    assert torch.equal(gla(*turned, initial_state=state.mT.contiguous().mT)[0], wanted)


def test_float64_is_served_by_the_reference(device):
    tensors = to(inputs(device, 1, 5, 2, 1, 4, 3, "channel"), torch.float64)
    assert torch.equal(run(gla, tensors)[0], run(gla_reference, tensors)[0])
    with pytest.raises(ValueError, match="float64"):
        run(gla, tensors, backend=compiled_backend(device))
    leaves = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(lambda q, k, v, g, s: gla(q, k, v, g, None, s, True), leaves)


def test_chunkwise_torch_agrees(device):
    q, k, v, g, state = inputs(device, 2, 64, 2, 2, 16, 24, "channel", 0.3)
    exact = run(gla_reference, to([q, k, v, g, state], torch.float64))
    o, final = gla_chunkwise_torch(q, k, v, g, initial_state=state, chunk=32)
    plain = run(gla_reference, [q, k, v, g, state])
    assert_good(o, plain[0], exact[0], factor=4)
    assert_good(final, plain[1], exact[1], factor=4)


def broken():
    q, k, v, g, state = inputs(CPU, 2, 6, 2, 1, 8, 4, "channel")
    good = {"q": q, "k": k, "v": v, "g": g, "initial_state": state}
    bounds = torch.tensor([0, 6])
    yield "q", {**good, "q": q[0]}
    yield "k", {**good, "k": k[:, :5]}
    yield "v", {**good, "v": v[:1]}
    twice = {name: good[name].repeat(1, 1, 2, 1) for name in "kvg"}
    yield "q", {**good, **twice, "q": q[:, :, :1].repeat(1, 1, 3, 1)}
    yield "g", {**good, "g": g[..., :3]}
    yield "g", {**good, "g": g[..., 0, 0]}
    yield "initial_state", {**good, "initial_state": state[:1]}
    yield "initial_state", {**good, "initial_state": state.double()}
    yield "q", {**good, "q": q.long()}
    yield "k", {**good, "k": k.bfloat16()}
    yield "g", {**good, "g": g.double()}
    yield "v", {**good, "v": v.to("meta")}
    yield "g", {**good, "g": g + 1.0}, "values"
    yield "g", {**good, "g": g[..., 0] + 1.0}, "values"
    yield "cu_seqlens", {**good, "cu_seqlens": bounds}
    yield "backend", {**good, "backend": "cudnn"}
    one = {name: t[:1] for name, t in good.items()}
    yield "cu_seqlens", {**one, "cu_seqlens": bounds.float()}
    for values in ([0, 5], [1, 6], [0, 7, 6], []):
        n = max(len(values) - 1, 0)
        yield (
            "cu_seqlens",
            {**one, "cu_seqlens": torch.tensor(values).long(), "initial_state": state[:1].repeat(n, 1, 1, 1)},
            *(["values"] if values else []),
        )
    small, wide = torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 1, 513)
    yield "q", {"q": wide, "k": wide, "v": small}
    yield "v", {"q": small, "k": small, "v": torch.zeros(1, 1, 1, 4097)}


@pytest.mark.parametrize(
    ("name", "arguments", "values"),
    [pytest.param(n, a, bool(v), id=f"{i}-{n}") for i, (n, a, *v) in enumerate(broken())],
)
def test_refusals(device, name, arguments, values):
    if values and device.type != "cpu":
        pytest.skip("a GPU's values are not read")
    with pytest.raises(ValueError, match=f"^{name}"):
        gla(**move(arguments, device))


def test_gates_up_to_the_allowance_pass(device):
    tensors = inputs(device, 1, 20, 1, 1, 8, 8, "channel")
    tensors[3].fill_(5e-5)
    compare(tensors)


def test_step_refusals(device):
    q, k, v, g, state = inputs(device, 2, 1, 2, 1, 8, 4, "channel")
    good = {"q": q[:, 0], "k": k[:, 0], "v": v[:, 0], "g": g[:, 0], "state": state}
    bad = {
        "q": [q, q[:, 0].double(), q[:, 0].requires_grad_()],
        "k": [k[:1, 0], k[:, 0].half()],
        "v": [v[:, 0, 0]],
        "g": [g[:, 0, :, :3], *([g[:, 0] + 1.0] if device.type == "cpu" else []), g[:, 0].double()],
        "state": [state[:1], state.double(), state.mT.contiguous().mT, state.mT],
    }
    gla_step(**good)
    for name, values in bad.items():
        for value in values:
            with pytest.raises(ValueError, match=f"^{name}"):
                gla_step(**{**good, name: value})


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(
    "sizes", [(3, 1, 4, 2, 60, 40), (2, 1, 1, 1, 16, 16), (1, 1, 1, 1, 3, 5), (4, 1, 4, 4, 128, 256)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_step(device, gate, sizes, dtype):
    tensors = inputs(device, *sizes, gate, dtype=dtype)
    exact, plain = run(gla_reference, to(tensors, torch.float64)), run(gla_reference, tensors)
    state = tensors[4].clone()
    o = gla_step(*[None if t is None else t[:, 0] for t in tensors[:4]], state)
    assert o.dtype == dtype
    assert_good(o, plain[0][:, 0], exact[0][:, 0])
    assert_good(state, plain[1], exact[1])


@pytest.mark.parametrize("gate", GATES)
def test_opcheck(device, gate):
    q, k, v, g, state = inputs(device, 1, 20, 2, 1, 8, 4, gate)
    leaves = [None if t is None else t.requires_grad_() for t in (q, k, v, g, state)]
    torch.library.opcheck(torch.ops.icrl.gla, (*leaves[:4], 0.3, leaves[4], None, "auto"))
    torch.library.opcheck(
        torch.ops.icrl.gla, (*leaves[:4], 0.3, None, torch.tensor([0, 20], device=device), compiled_backend(device))
    )
    plain = [None if t is None else t.detach() for t in leaves]
    backward = (torch.randn(1, 20, 2, 4).to(device), plain[4], *plain[:4], 0.3, plain[4], None, "auto")
    torch.library.opcheck(torch.ops.icrl.gla_backward, backward)
    step = [None if t is None else t[:, 0] for t in plain[:4]]
    torch.library.opcheck(torch.ops.icrl.gla_step, (*step, plain[4].clone(), 0.3, "auto"))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(device, dynamic):
    compiled = torch.compile(gla, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for T in (20, 33):
        tensors = inputs(device, 1, T, 2, 1, 8, 4, "channel")
        weights = (torch.randn(1, T, 2, 4), torch.randn(1, 1, 8, 4))
        for name, a, b in zip(NAMES, run(compiled, tensors, weights), run(gla, tensors, weights), strict=True):
            assert torch.equal(a, b), name
    q, k, v, g, state = inputs(device, 2, 1, 2, 1, 8, 4, "channel")
    other = state.clone()
    step = torch.compile(gla_step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    assert torch.equal(
        step(q[:, 0], k[:, 0], v[:, 0], g[:, 0], other), gla_step(q[:, 0], k[:, 0], v[:, 0], g[:, 0], state)
    )
    assert torch.equal(state, other)


def test_backends_listed():
    assert _registry.resolve("gla", "cpu")[0] == _registry.resolve("gla_step", "cpu")[0] == "cpu"
    assert _registry.resolve("gla", "cuda")[0] == "triton"


@pytest.mark.parametrize("isa", ["generic", "avx2"])
def test_other_instruction_sets(isa):
    if os.environ.get("ICRL_ISA") or _C.isa() == "generic":
        pytest.skip("already one of several runs, or there is only one instruction set")
    chosen = "values_and or conversions or reset or test_step"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        __file__,
        "-k",
        f"({chosen}) and not cuda",
    ]
    done = subprocess.run(command, env={**os.environ, "ICRL_ISA": isa}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


def test_what_has_no_derivative_says_so(device):
    q, k, v = (torch.randn(1, 5, 1, 4).to(device).requires_grad_() for _ in range(3))
    (first,) = torch.autograd.grad(gla(q, k, v)[0].square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        first.sum().backward()


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_float64_is_checked_as_well(backend):
    q, k, v = (torch.randn(1, 5, 1, 4, dtype=torch.float64) for _ in range(3))
    with pytest.raises(ValueError, match="g:"):
        gla(q, k, v, torch.ones(1, 5, 1), backend=backend)
    for bad in ([0], [5], [0, 4], [1, 5], [0, 3, 2, 5], [0, 6]):
        with pytest.raises(ValueError, match="cu_seqlens"):
            gla(q, k, v, cu_seqlens=torch.tensor(bad), backend=backend)
    with pytest.raises(ValueError, match="scale"):
        gla(q, k, v, scale=float("nan"), backend=backend)
    with pytest.raises(ValueError, match="q"):
        gla(torch.tensor(1.0), k, v, backend=backend)
