import os
import subprocess
import sys

import pytest
import torch
from on_device import assert_close_gradients, assert_good, assert_nan, assert_same_bits, compiled_backend, move, poisons

from icrl_kernels import _C, _registry, gsa, gsa_reference, gsa_step
from icrl_kernels.testing import gsa_chunkwise_torch

CPU = torch.device("cpu")
INPUTS = ["q", "k", "v", "s", "g", "initial_keys", "initial_values"]
NAMES = ["o", "final_keys", "final_values"] + ["d" + name for name in INPUTS]
GATED = [False, True]


def inputs(device, B, T, H, Hk, K, V, M, gated=True, strength=1.0, dtype=torch.float32, sequences=None):
    q, k, v, s = torch.randn(B, T, H, K), torch.randn(B, T, Hk, K), torch.randn(B, T, Hk, V), torch.randn(B, T, Hk, M)
    g = -strength * torch.rand(B, T, Hk, M) if gated else None
    N = sequences or B
    tensors = [*(x.to(dtype) for x in (q, k, v, s)), g, torch.randn(N, Hk, K, M), torch.randn(N, Hk, M, V)]
    return move(tensors, device)


def weights_for(tensors):
    q, _, v, _, _, keys, values = tensors
    return torch.randn(*q.shape[:3], v.shape[3]), torch.randn(keys.shape), torch.randn(values.shape)


def to(tensors, dtype):
    return [None if t is None else t.to(dtype) for t in tensors]


def at(tensors, index):
    """The five per-token inputs at an index of time."""
    return [None if t is None else t[:, index] for t in tensors[:5]]


def run(f, tensors, weights=None, **options):
    """Output, final state and, with weights for the three, the gradients of all inputs."""
    leaves = [None if t is None else t.detach().clone().requires_grad_(weights is not None) for t in tensors]
    o, final = f(*leaves[:5], initial_state=tuple(leaves[5:]), output_final_state=True, **options)
    results = (o, *final)
    if weights is not None:
        sum((x * w.to(x)).sum() for x, w in zip(results, weights, strict=True)).backward()
    return [x.detach() for x in results] + [None if x is None or weights is None else x.grad for x in leaves]


def compare(tensors, **options):
    weights = weights_for(tensors)
    exact = run(gsa_reference, to(tensors, torch.float64), weights, **options)
    torch_result = run(gsa_reference, tensors, weights, **options)
    result = run(gsa, tensors, weights, **options)
    for name, a, s, r in zip(NAMES, result, torch_result, exact, strict=True):
        if r is not None:
            assert a.dtype == s.dtype, name
            assert_good(a, s, r, name=name, dtype=tensors[0].dtype)


def test_reference_is_the_recurrence_for_each_query_head(device):
    """Written again, one head and one token at a time, from the definition."""
    q, k, v, s, g, keys, values = to(inputs(device, 1, 5, 4, 2, 3, 2, 4), torch.float64)
    o, final = gsa_reference(q, k, v, s, g, 0.7, (keys, values), True)
    for h in range(4):
        slots, contents = keys[0, h // 2].T, values[0, h // 2]  # [M, K], [M, V]
        for t in range(5):
            decay, write = g[0, t, h // 2].exp(), s[0, t, h // 2]
            slots = torch.diag(decay) @ slots + torch.outer(write, k[0, t, h // 2])
            contents = torch.diag(decay) @ contents + torch.outer(write, v[0, t, h // 2])
            p = torch.softmax(0.7 * slots @ q[0, t, h], 0)
            torch.testing.assert_close(o[0, t, h], contents.T @ p)
        torch.testing.assert_close(final[0][0, h // 2], slots.T)
        torch.testing.assert_close(final[1][0, h // 2], contents)


@pytest.mark.parametrize("gated", GATED)
@pytest.mark.parametrize(
    "sizes",
    [(2, 1, 1, 1, 16, 16, 16), (1, 63, 2, 2, 60, 40, 33), (1, 64, 1, 1, 64, 64, 64), (2, 65, 4, 2, 32, 32, 48),
     (1, 90, 1, 1, 5, 7, 3), (1, 18, 3, 1, 100, 256, 130), (1, 20, 2, 1, 17, 16, 1)],
)  # fmt: skip
def test_values_and_gradients(device, gated, sizes):
    compare(inputs(device, *sizes, gated))


@pytest.mark.parametrize("strength", [1e-3, 6.0, 30.0, 200.0])
def test_strength_of_gates(device, strength):
    """From almost none to exp(g) that underflows in one token, and, between, products that underflow within a chunk."""
    compare(inputs(device, 1, 70, 4, 2, 20, 24, 28, strength=strength))


def test_the_papers_gates(device):
    """s = 1 - exp g, g the logarithm of a sigmoid to the power 1/16."""
    tensors = inputs(device, 1, 70, 2, 2, 20, 24, 28)
    tensors[4] = torch.nn.functional.logsigmoid(torch.randn(1, 70, 2, 28).to(device)) / 16
    tensors[3] = 1 - tensors[4].exp()
    compare(tensors)


def test_large_logits(device):
    """Softmax that is nearly one-hot: no overflow."""
    tensors = inputs(device, 1, 40, 2, 1, 16, 16, 20)
    tensors[0] *= 30
    compare(tensors)


def test_closed_gates_reset(device):
    tensors = inputs(device, 1, 50, 2, 1, 16, 16, 20, strength=0.1)
    closed = [0, 7, 16, 31, 32, 45]
    tensors[4][:, closed] = -float("inf")
    tensors[4][:, 20] = -30.0
    tensors[4][:, 25, :, :7] = -float("inf")  # some slots only
    compare(tensors)
    grad = run(gsa, tensors, weights_for(tensors))[NAMES.index("dg")]
    if device.type == "cpu":
        assert (grad[:, closed] == 0).all()
        assert (grad[:, 25, :, :7] == 0).all()
    # what came before the last reset is forgotten
    after = run(gsa, [t[:, 45:] for t in tensors[:5]] + [torch.zeros_like(t) for t in tensors[5:]])
    tolerance = 1e-5 if device.type == "cpu" else 1e-4
    torch.testing.assert_close(run(gsa, tensors)[0][:, 45:], after[0], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gate_dtype", ["same", "float32"])
def test_half_precision(device, dtype, gate_dtype):
    tensors = inputs(device, 1, 70, 4, 2, 32, 40, 24, dtype=dtype)
    if gate_dtype == "same":
        tensors[4] = tensors[4].to(dtype)
    compare(tensors)


@pytest.mark.parametrize("gated", GATED)
def test_packed_sequences(device, gated):
    lengths = [0, 17, 1, 0, 64, 40, 0]
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], device=device)
    tensors = inputs(device, 1, sum(lengths), 2, 1, 24, 16, 20, gated, sequences=len(lengths))
    compare(tensors, cu_seqlens=bounds)
    weights = weights_for(tensors)
    packed = run(gsa, tensors, weights, cu_seqlens=bounds.int())
    for n in range(len(lengths)):
        span, one = slice(int(bounds[n]), int(bounds[n + 1])), slice(n, n + 1)
        part = at(tensors, span) + [t[one] for t in tensors[5:]]
        alone = run(gsa, part, (weights[0][:, span], weights[1][one], weights[2][one]))
        for name, a, b in zip(NAMES, packed, alone, strict=True):
            of_sequences = "keys" in name or "values" in name
            if a is not None:
                assert_same_bits(a[one] if of_sequences else a[:, span], b, name)


@pytest.mark.parametrize("gated", GATED)
def test_segments_with_carried_state_and_steps(device, gated):
    tensors = inputs(device, 2, 75, 4, 2, 20, 36, 28, gated)
    exact, plain = run(gsa_reference, to(tensors, torch.float64)), run(gsa_reference, tensors)
    state, pieces = tuple(tensors[5:]), []
    for a, b in [(0, 16), (16, 16), (16, 19), (19, 64), (64, 75)]:
        o, state = gsa(*at(tensors, slice(a, b)), initial_state=state, output_final_state=True)
        pieces.append(o)
    segmented = [torch.cat(pieces, 1), *state]
    state = tuple(t.clone() for t in tensors[5:])
    stepped = [torch.stack([gsa_step(*at(tensors, t), state) for t in range(75)], 1), *state]
    for results in (segmented, stepped):
        for name, a, s, r in zip(NAMES, results, plain, exact, strict=False):
            assert_good(a, s, r, name=name)


def test_long_sequence_recomputes_states_in_segments(device):
    """Past the size where backward keeps every chunk's state, gradients are those of the halves joined by hand."""
    tensors = inputs(device, 1, 16 * 24, 1, 1, 256, 256, 256, strength=0.05)
    weights = move(weights_for(tensors), device)
    whole = run(gsa, tensors, weights)
    leaves = [t.clone().requires_grad_() for t in tensors]
    first, state = gsa(*at(leaves, slice(192)), initial_state=tuple(leaves[5:]), output_final_state=True)
    second, state = gsa(*at(leaves, slice(192, 384)), initial_state=state, output_final_state=True)
    results = (torch.cat([first, second], 1), *state)
    sum((x * w).sum() for x, w in zip(results, weights, strict=True)).backward()
    for name, a, leaf in zip(NAMES[3:], whole[3:], leaves, strict=True):
        assert_close_gradients(a, leaf.grad, name)


@pytest.mark.parametrize("gated", GATED)
@pytest.mark.parametrize("strength", [0.1, 8.0])
def test_no_output_depends_on_a_later_token(device, gated, strength):
    tensors = inputs(device, 1, 80, 2, 2, 32, 32, 32, gated, strength)
    o = run(gsa, tensors)[0]
    for t in (1, 15, 16, 21, 47, 48, 79):
        for poison, gates in poisons(device, (-float("inf"), -300.0, -0.5, float("nan"))):
            changed = [None if x is None else x.clone() for x in tensors]
            for x in changed[:4]:
                x[:, t:] = poison
            if changed[4] is not None:
                changed[4][:, t:] = gates
            assert torch.equal(run(gsa, changed)[0][:, :t], o[:, :t])


@pytest.mark.parametrize("gated", GATED)
@pytest.mark.parametrize("sizes", [(2, 70, 2, 2, 32, 32, 40), (1, 70, 1, 1, 32, 64, 20)])
def test_bits_do_not_depend_on_run_or_threads(device, gated, sizes):
    tensors = inputs(device, *sizes, gated)
    weights = weights_for(tensors)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(gsa, tensors, weights))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for name, a, b in zip(NAMES, results[0], other, strict=True):
            assert a is None or torch.equal(a, b), name


def test_nan_goes_where_it_touches(device):
    tensors = inputs(device, 2, 40, 2, 2, 16, 16, 20)
    tensors[2][0, 20, 1, 3] = float("nan")  # one channel of v, one head of one sequence
    o, _, values = run(gsa, tensors)[:3]
    wanted = torch.zeros_like(o, dtype=torch.bool)
    wanted[0, 20:, 1, 3] = True
    assert_nan(o, wanted)
    assert values.isnan().any(2).nonzero().tolist() == [[0, 1, 3]]
    for which in (3, 4):  # one slot's s or gate: the softmax spreads it over its head
        tensors = inputs(device, 2, 40, 2, 2, 16, 16, 20)
        tensors[which][0, 20, 1, 5] = float("nan")
        o, keys, values = run(gsa, tensors)[:3]
        wanted = torch.zeros_like(o, dtype=torch.bool)
        wanted[0, 20:, 1] = True
        assert_nan(o, wanted)
        assert keys.isnan().any(2).nonzero().tolist() == [[0, 1, 5]]
        assert values.isnan().any(3).nonzero().tolist() == [[0, 1, 5]]


def test_empty(device):
    for sizes in [(2, 0, 2, 1, 16, 8, 4), (0, 5, 2, 1, 16, 8, 4)]:
        tensors = inputs(device, *sizes)
        o, *rest = run(gsa, tensors, weights_for(tensors))
        assert o.shape == (*sizes[:3], 8)
        assert all(torch.equal(a, b) for a, b in zip(rest[:2], tensors[5:], strict=True))
        assert rest[-1].shape == tensors[6].shape
    tensors = inputs(device, 2, 0, 2, 1, 16, 8, 4)
    weights = weights_for(tensors)
    gradients = run(gsa, tensors, weights)
    assert torch.equal(gradients[-2], move(weights[1], device))
    assert torch.equal(gradients[-1], move(weights[2], device))


def test_without_initial_state_and_final_state(device):
    tensors = inputs(device, 1, 20, 1, 1, 16, 16, 8)
    zeros = tuple(torch.zeros_like(t) for t in tensors[5:])
    o, final = gsa(*tensors[:5])
    assert final is None
    assert_same_bits(o, gsa(*tensors[:5], initial_state=zeros)[0])
    assert torch.equal(gsa(*tensors[:5], scale=0.25)[0], o)


def test_strides_do_not_matter(device):
    tensors = inputs(device, 2, 20, 2, 2, 16, 16, 24)
    turned = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in tensors[:5]]
    state = [x.mT.contiguous().mT for x in tensors[5:]]
    for a, b in zip(run(gsa, [*turned, *state]), run(gsa, tensors), strict=True):
        assert a is b is None or torch.equal(a, b)


def test_float64_is_served_by_the_reference(device):
    tensors = to(inputs(device, 1, 5, 2, 1, 4, 3, 5), torch.float64)
    assert torch.equal(run(gsa, tensors)[0], run(gsa_reference, tensors)[0])
    with pytest.raises(ValueError, match="float64"):
        run(gsa, tensors, backend=compiled_backend(device))
    leaves = [t.requires_grad_() for t in tensors]

    def outputs(*x):
        o, (keys, values) = gsa(*x[:5], None, x[5:], True)
        return o, keys, values

    assert torch.autograd.gradcheck(outputs, leaves)


def test_reference_checks_values_as_well():
    tensors = to(inputs(CPU, 1, 5, 2, 1, 4, 3, 5), torch.float64)
    with pytest.raises(ValueError, match="cu_seqlens:"):
        gsa(*tensors[:5], cu_seqlens=torch.tensor([0, 4]))
    with pytest.raises(ValueError, match="g:"):
        gsa(*tensors[:4], tensors[4] + 2)


def test_second_derivative_is_refused(device):
    tensors = [t.requires_grad_() for t in inputs(device, 1, 5, 2, 1, 4, 3, 5)]
    o, _ = gsa(*tensors[:5])
    (dq,) = torch.autograd.grad(o.square().sum(), tensors[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        dq.sum().backward()


@pytest.mark.parametrize("gated", GATED)
def test_chunkwise_torch_agrees(device, gated):
    tensors = inputs(device, 2, 64, 2, 2, 16, 24, 20, gated, 0.3)
    exact, plain = run(gsa_reference, to(tensors, torch.float64)), run(gsa_reference, tensors)
    o, state = gsa_chunkwise_torch(*tensors[:5], initial_state=tuple(tensors[5:]), chunk=32)
    for name, a, s, r in zip(NAMES, (o, *state), plain, exact, strict=False):
        assert_good(a, s, r, factor=4, name=name)


def broken():
    q, k, v, s, g, keys, values = inputs(CPU, 2, 6, 2, 1, 8, 4, 5)
    good = {"q": q, "k": k, "v": v, "s": s, "g": g, "initial_state": (keys, values)}
    bounds = torch.tensor([0, 6])
    yield "q", {**good, "q": q[0]}
    yield "k", {**good, "k": k[:, :5]}
    yield "v", {**good, "v": v[:1]}
    yield "s", {**good, "s": s[:, :3]}
    yield "s", {**good, "s": s[0]}
    twice = {name: good[name].repeat(1, 1, 2, 1) for name in "kvsg"}
    yield "q", {**good, **twice, "q": q[:, :, :1].repeat(1, 1, 3, 1)}
    yield "g", {**good, "g": g[..., :3]}
    yield "g", {**good, "g": g[..., 0]}
    yield "initial_state", {**good, "initial_state": (keys[:1], values)}
    yield "initial_state", {**good, "initial_state": (keys, values.mT)}
    yield "initial_state", {**good, "initial_state": (keys.double(), values)}
    yield "initial_state", {**good, "initial_state": (keys, values.double())}
    yield "initial_state", {**good, "initial_state": keys}
    yield "initial_state", {**good, "initial_state": (keys, None)}
    yield "q", {**good, "q": q.long()}
    yield "k", {**good, "k": k.bfloat16()}
    yield "s", {**good, "s": s.bfloat16()}
    yield "g", {**good, "g": g.double()}
    yield "s", {**good, "s": s.to("meta")}
    yield "g", {**good, "g": g + 1.0}, "values"
    yield "cu_seqlens", {**good, "cu_seqlens": bounds}
    yield "backend", {**good, "backend": "cudnn"}
    one = {name: good[name][:1] for name in "qkvsg"}
    yield "cu_seqlens", {**one, "cu_seqlens": bounds.float()}
    for sequence_bounds in ([0, 5], [1, 6], [0, 7, 6], []):
        arguments = {**one, "cu_seqlens": torch.tensor(sequence_bounds).long()}
        yield "cu_seqlens", arguments, *(["values"] if sequence_bounds else [])
    wide = torch.zeros(1, 1, 1, 513)
    small = torch.zeros(1, 1, 1, 4)
    yield "q", {"q": wide, "k": wide, "v": small, "s": small}
    yield "v", {"q": small, "k": small, "v": torch.zeros(1, 1, 1, 4097), "s": small}
    yield "s", {"q": small, "k": small, "v": small, "s": wide}
    yield "s", {"q": small, "k": small, "v": small, "s": small[..., :0]}


@pytest.mark.parametrize(
    ("name", "arguments", "values"),
    [pytest.param(n, a, bool(v), id=f"{i}-{n}") for i, (n, a, *v) in enumerate(broken())],
)
def test_refusals(device, name, arguments, values):
    if values and device.type != "cpu":
        pytest.skip("a GPU's values are not read")
    with pytest.raises(ValueError, match=f"^{name}"):
        gsa(**move(arguments, device))


def test_gates_up_to_the_allowance_pass(device):
    tensors = inputs(device, 1, 20, 1, 1, 8, 8, 8)
    tensors[4].fill_(5e-5)
    compare(tensors)


def test_step_refusals(device):
    tensors = inputs(device, 2, 1, 2, 1, 8, 4, 5)
    q, k, v, s, g = at(tensors, 0)
    keys, values = tensors[5:]
    good = {"q": q, "k": k, "v": v, "s": s, "g": g, "state": (keys, values)}
    bad = {
        "q": [q[:, None], q.double(), q.clone().requires_grad_()],
        "k": [k[:1], k.half()],
        "v": [v[:, 0]],
        "s": [s[:1], s.half(), s[:, 0]],
        "g": [g[..., :3], g[..., 0], *([g + 1.0] if device.type == "cpu" else []), g.double()],
        "state": [
            None, keys, (keys[:1], values), (keys, values.double()), (keys.mT.contiguous().mT, values),
            (keys, values.mT), (keys, values.clone().requires_grad_()),
        ],
    }  # fmt: skip
    gsa_step(**good)
    for name, wrong in bad.items():
        for value in wrong:
            with pytest.raises(ValueError, match=f"^{name}"):
                gsa_step(**{**good, name: value})


@pytest.mark.parametrize("gated", GATED)
@pytest.mark.parametrize(
    "sizes", [(3, 1, 4, 2, 60, 40, 35), (2, 1, 1, 1, 16, 16, 16), (1, 1, 1, 1, 3, 5, 2), (4, 1, 4, 4, 128, 256, 64)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["compiled", "reference"])
def test_step(device, gated, sizes, dtype, backend):
    tensors = inputs(device, *sizes, gated, dtype=dtype)
    exact, plain = run(gsa_reference, to(tensors, torch.float64)), run(gsa_reference, tensors)
    state = tuple(t.clone() for t in tensors[5:])
    o = gsa_step(*at(tensors, 0), state, backend=backend if backend == "reference" else compiled_backend(device))
    assert o.dtype == dtype
    for name, a, s, r in zip(NAMES, (o[:, None], *state), plain, exact, strict=False):
        assert_good(a, s, r, name=name)


@pytest.mark.parametrize("gated", GATED)
def test_opcheck(device, gated):
    tensors = inputs(device, 1, 20, 2, 1, 8, 4, 5, gated)
    leaves = [None if t is None else t.clone().requires_grad_() for t in tensors]
    torch.library.opcheck(torch.ops.icrl.gsa, (*leaves[:5], 0.3, *leaves[5:], None, "auto"))
    torch.library.opcheck(
        torch.ops.icrl.gsa,
        (*leaves[:5], 0.3, None, None, torch.tensor([0, 20], device=device), compiled_backend(device)),
    )
    backward = (*move(weights_for(tensors), device), *tensors[:5], 0.3, *tensors[5:], None, "auto")
    torch.library.opcheck(torch.ops.icrl.gsa_backward, backward)
    state = [t.clone() for t in tensors[5:]]
    torch.library.opcheck(torch.ops.icrl.gsa_step, (*at(tensors, 0), *state, 0.3, "auto"))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(device, dynamic):
    compiled = torch.compile(gsa, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for T in (20, 33):
        tensors = inputs(device, 1, T, 2, 1, 8, 4, 5)
        weights = weights_for(tensors)
        for name, a, b in zip(NAMES, run(compiled, tensors, weights), run(gsa, tensors, weights), strict=True):
            assert torch.equal(a, b), name
    tensors = inputs(device, 2, 1, 2, 1, 8, 4, 5)
    state, other = tuple(tensors[5:]), tuple(t.clone() for t in tensors[5:])
    step = torch.compile(gsa_step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    assert torch.equal(step(*at(tensors, 0), other), gsa_step(*at(tensors, 0), state))
    assert all(torch.equal(a, b) for a, b in zip(state, other, strict=True))


def test_backends_listed():
    assert _registry.resolve("gsa", "cpu")[0] == _registry.resolve("gsa_step", "cpu")[0] == "cpu"
    assert _registry.resolve("gsa", "cuda")[0] == _registry.resolve("gsa_step", "cuda")[0] == "triton"


@pytest.mark.parametrize("isa", ["generic", "avx2"])
def test_other_instruction_sets(isa):
    if os.environ.get("ICRL_ISA") or _C.isa() == "generic":
        pytest.skip("already one of several runs, or there is only one instruction set")
    chosen = "(values_and and True) or reset or (test_step and compiled)"
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
