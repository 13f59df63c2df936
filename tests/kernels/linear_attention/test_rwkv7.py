import os
import subprocess
import sys

import pytest
import torch
from on_device import assert_close_gradients, assert_good, assert_nan, assert_same_bits, compiled_backend, move, poisons

from icrl_kernels import _C, _registry, gated_delta_rule, rwkv7, rwkv7_reference, rwkv7_step
from icrl_kernels.testing import rwkv7_chunkwise_torch

CPU = torch.device("cpu")
NAMES = ["o", "final_state", "dr", "dw", "dk", "dv", "da", "db", "dinitial_state"]
TOKENS = ["r", "w", "k", "v", "a", "b"]


def inputs(device, B, T, H, K, V, strength=0.6, dtype=torch.float32, sequences=None):
    """As RWKV-7 makes them: a of norm 1, b = -a times rates in [0, 1], where the recurrence is stable."""
    r, k, a, v = (torch.randn(B, T, H, size) for size in (K, K, K, V))
    a = a / a.norm(dim=-1, keepdim=True)
    b = -a * torch.rand(B, T, H, K)
    w = -strength * torch.rand(B, T, H, K)
    tensors = [r.to(dtype), w, *(t.to(dtype) for t in (k, v, a, b)), torch.randn(sequences or B, H, K, V)]
    return move(tensors, device)


def to(tensors, dtype):
    return [t.to(dtype) for t in tensors]


def at(tensors, span):
    return [t[:, span] for t in tensors[:6]]


def run(f, tensors, weights=None, **options):
    """Output, final state and, with weights for the two, the gradients of all inputs."""
    leaves = [t.detach().clone().requires_grad_(weights is not None) for t in tensors]
    o, final = f(*leaves[:6], initial_state=leaves[6], output_final_state=True, **options)
    if weights is None:
        return [o, final]
    ((o * weights[0].to(o)).sum() + (final * weights[1].to(final)).sum()).backward()
    return [o.detach(), final.detach(), *(x.grad for x in leaves)]


def compare(tensors, **options):
    weights = torch.randn(tensors[3].shape), torch.randn(tensors[6].shape)
    exact = run(rwkv7_reference, to(tensors, torch.float64), weights, **options)
    plain = run(rwkv7_reference, tensors, weights, **options)
    result = run(rwkv7, tensors, weights, **options)
    for name, a, s, r in zip(NAMES, result, plain, exact, strict=True):
        assert a.dtype == s.dtype, name
        assert_good(a, s, r, name=name, dtype=tensors[0].dtype)


@pytest.mark.parametrize(
    "sizes",
    [
        (2, 1, 1, 16, 16),
        (1, 63, 2, 60, 40),
        (1, 64, 1, 64, 64),
        (2, 65, 3, 32, 20),
        (1, 90, 1, 5, 7),
        (1, 33, 1, 100, 256),
    ],
)
def test_values_and_gradients(device, sizes):
    compare(inputs(device, *sizes))


@pytest.mark.parametrize("scale", [None, 0.0, -3.0])
def test_scale(device, scale):
    compare(inputs(device, 1, 40, 2, 32, 16), scale=scale)


@pytest.mark.parametrize("strength", [0.0, 1e-3, 6.0, 30.0, 200.0])
def test_strength_of_gates(device, strength):
    """From none to exp(w) that underflows in one token, and, between, products that underflow within a chunk."""
    compare(inputs(device, 1, 50, 2, 20, 24, strength))


def test_one_strong_token_among_mild(device):
    for t in (0, 1, 14, 15, 16, 31):
        tensors = inputs(device, 1, 40, 1, 16, 16)
        tensors[1][:, t, :, 3:] = -60.0
        compare(tensors)


def test_closed_gates_reset(device):
    closed = [0, 7, 16, 31, 32, 45]
    tensors = inputs(device, 1, 50, 1, 16, 16, 0.1)
    tensors[1][:, closed] = -float("inf")
    tensors[1][:, 20] = -30.0
    compare(tensors)
    grad = run(rwkv7, tensors, (torch.ones(1, 50, 1, 16), torch.ones(1, 1, 16, 16)))[3]
    if device.type == "cpu":
        assert (grad[:, closed] == 0).all()
    # with b = 0 there, what came before the last reset is forgotten
    tensors[5][:, 45] = 0.0
    compare(tensors)
    after = [*at(tensors, slice(45, 50)), torch.zeros_like(tensors[6])]
    exact = run(rwkv7_reference, to(after, torch.float64))
    assert_good(run(rwkv7, tensors)[0][:, 45:], run(rwkv7, after)[0], exact[0])


def test_without_a_or_b_it_is_gated_linear_attention(device):
    """b = 0 writes nothing of what a reads; with a = 0 nothing is read."""
    for i in (4, 5):
        tensors = inputs(device, 1, 40, 2, 16, 16)
        tensors[i].zero_()
        compare(tensors)
        beta = torch.zeros(1, 40, 2, device=device)
        r, w, k, v, a, b, state = tensors
        torch.testing.assert_close(run(rwkv7, tensors), run(rwkv7, [r, w, k, v, torch.zeros_like(a), b, state]))
        tensors[2].zero_()
        expected = gated_delta_rule(r, k, v, w, beta, 1.0, state)[0]  # nothing is written: the state only decays
        torch.testing.assert_close(run(rwkv7, tensors)[0], expected)


@pytest.mark.parametrize("strength", [0.0, 0.6, 20.0])
def test_it_holds_the_gated_delta_rule(device, strength):
    r, w, k, v, _, _, state = to(inputs(device, 1, 50, 2, 16, 20, strength), torch.float64)
    k = k / k.norm(dim=-1, keepdim=True)
    beta = 2 * torch.rand(1, 50, 2, dtype=torch.float64).to(device)
    written = beta[..., None] * k
    wide = [r, w, written, v, -w.exp() * k, written, state]
    tensors = to(wide, torch.float32)
    exact = gated_delta_rule(r, k, v, w, beta, 1.0, state, True)  # float64: the other op's reference
    torch.testing.assert_close(run(rwkv7_reference, wide), list(exact))
    rounded = run(rwkv7_reference, to(tensors, torch.float64))
    for a, s, e in zip(run(rwkv7, tensors), run(rwkv7_reference, tensors), rounded, strict=True):
        assert_good(a, s, e)


def test_flash_linear_attention_agrees():
    """Its own plain recurrence, which has the heads before the tokens and a fixed scale; values and gradients."""
    naive = pytest.importorskip("fla.ops.generalized_delta_rule.dplr.naive")

    def theirs(r, w, k, v, a, b, initial_state, output_final_state):
        r, w, k, v, a, b = (t.transpose(1, 2) for t in (r, w, k, v, a, b))
        o, final = naive.dplr_recurrence(r, k, v, a, b, w, initial_state)
        return o.transpose(1, 2), final

    tensors = inputs(CPU, 2, 40, 2, 16, 24)
    weights = torch.randn(2, 40, 2, 24), torch.randn(2, 2, 16, 24)
    exact = run(rwkv7_reference, to(tensors, torch.float64), weights, scale=None)
    mine, other = run(rwkv7, tensors, weights, scale=None), run(theirs, tensors, weights)
    for name, m, o, e in zip(NAMES, mine, other, exact, strict=True):
        assert_good(m, o, e, name=name)
        assert_good(o, m, e, name=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gate_dtype", ["same", "float32"])
def test_half_precision(device, dtype, gate_dtype):
    tensors = inputs(device, 1, 50, 2, 32, 40, dtype=dtype)
    if gate_dtype == "same":
        tensors[1] = tensors[1].to(dtype)
    compare(tensors)


@pytest.mark.parametrize("strength", [0.6, 20.0])
def test_packed_sequences(device, strength):
    lengths = [0, 17, 1, 0, 33, 20, 0]
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], device=device)
    tensors = inputs(device, 1, sum(lengths), 2, 24, 16, strength, sequences=len(lengths))
    compare(tensors, cu_seqlens=bounds)
    weights = (torch.randn(1, sum(lengths), 2, 16), torch.randn(len(lengths), 2, 24, 16))
    packed = run(rwkv7, tensors, weights, cu_seqlens=bounds.int())
    for n in range(len(lengths)):
        span = slice(int(bounds[n]), int(bounds[n + 1]))
        part = [*at(tensors, span), tensors[6][n : n + 1]]
        alone = run(rwkv7, part, (weights[0][:, span], weights[1][n : n + 1]))
        for i in (0, 2, 3, 4, 5, 6, 7):
            assert_same_bits(packed[i][:, span], alone[i], NAMES[i])
        for i in (1, 8):
            assert_same_bits(packed[i][n : n + 1], alone[i], NAMES[i])


@pytest.mark.parametrize("strength", [0.6, 20.0])
def test_segments_with_carried_state_and_steps(device, strength):
    tensors = inputs(device, 2, 75, 2, 20, 36, strength)
    exact = run(rwkv7_reference, to(tensors, torch.float64))
    plain = run(rwkv7_reference, tensors)
    state, pieces = tensors[6], []
    for a, b in [(0, 16), (16, 16), (16, 19), (19, 64), (64, 75)]:
        o, state = rwkv7(*at(tensors, slice(a, b)), initial_state=state, output_final_state=True)
        pieces.append(o)
    assert_good(torch.cat(pieces, 1), plain[0], exact[0])
    assert_good(state, plain[1], exact[1])

    state = tensors[6].clone()
    steps = [rwkv7_step(*at(tensors, i), state) for i in range(75)]
    assert_good(torch.stack(steps, 1), plain[0], exact[0])
    assert_good(state, plain[1], exact[1])


def test_long_sequence_recomputes_states_in_segments(device):
    """Past the size where backward keeps every chunk's state, gradients are those of the halves joined by hand."""
    tensors = inputs(device, 1, 16 * 40, 1, 256, 256, 0.05)
    weights = move((torch.randn(1, 640, 1, 256), torch.randn(1, 1, 256, 256)), device)
    whole = run(rwkv7, tensors, weights)
    leaves = [t.clone().requires_grad_() for t in tensors]
    first, state = rwkv7(*at(leaves, slice(0, 320)), initial_state=leaves[6], output_final_state=True)
    second, state = rwkv7(*at(leaves, slice(320, 640)), initial_state=state, output_final_state=True)
    ((torch.cat([first, second], 1) * weights[0]).sum() + (state * weights[1]).sum()).backward()
    for name, a, leaf in zip(NAMES[2:], whole[2:], leaves, strict=True):
        assert_close_gradients(a, leaf.grad, name)


@pytest.mark.parametrize("strength", [0.6, 8.0])
def test_no_output_depends_on_a_later_token(device, strength):
    tensors = inputs(device, 1, 80, 2, 32, 32, strength)
    o = run(rwkv7, tensors)[0]
    for t in (1, 15, 16, 21, 47, 48, 79):
        for poison, gates in poisons(device, (-1e3, -50.0, -0.1)):
            changed = [x.clone() for x in tensors]
            for i, x in enumerate(changed[:6]):
                x[:, t:] = gates if i == 1 else poison
            assert torch.equal(run(rwkv7, changed)[0][:, :t], o[:, :t])


@pytest.mark.parametrize("sizes", [(2, 70, 2, 32, 32), (1, 70, 1, 32, 64)])
def test_bits_do_not_depend_on_run_or_threads(device, sizes):
    tensors = inputs(device, *sizes, 3.0)
    weights = (torch.randn(tensors[3].shape), torch.randn(tensors[6].shape))
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(rwkv7, tensors, weights))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for name, a, b in zip(NAMES, results[0], other, strict=True):
            assert torch.equal(a, b), name


def test_nan_goes_where_it_touches(device):
    tensors = inputs(device, 2, 40, 2, 16, 16)
    tensors[3][0, 20, 1, 3] = float("nan")  # one channel of v, one head of one sequence
    o, final = run(rwkv7, tensors)
    wanted = torch.zeros_like(o, dtype=torch.bool)
    wanted[0, 20:, 1, 3] = True
    assert_nan(o, wanted)
    assert final.isnan().any(2).nonzero().tolist() == [[0, 1, 3]]
    for i in (1, 2, 4, 5):  # one head's token of w, k, a, b
        tensors = inputs(device, 2, 40, 2, 16, 16)
        tensors[i][0, 20, 1] = float("nan")
        wanted = torch.zeros_like(o, dtype=torch.bool)
        wanted[0, 20:, 1] = True
        assert_nan(run(rwkv7, tensors)[0], wanted)


def test_empty(device):
    for sizes in [(2, 0, 2, 16, 8), (0, 5, 2, 16, 8)]:
        tensors = inputs(device, *sizes)
        o, final, *gradients = run(rwkv7, tensors, (torch.ones_like(tensors[3]), torch.ones_like(tensors[6])))
        assert o.shape == tensors[3].shape
        assert torch.equal(final, tensors[6])
        assert torch.equal(gradients[-1], torch.ones_like(tensors[6]))


def test_without_initial_state_and_final_state(device):
    tokens = inputs(device, 1, 20, 1, 16, 16)[:6]
    o, final = rwkv7(*tokens)
    assert final is None
    assert_same_bits(o, rwkv7(*tokens, initial_state=torch.zeros(1, 1, 16, 16, device=device))[0])
    assert torch.equal(rwkv7(*tokens, scale=1.0)[0], o)
    assert torch.equal(rwkv7(*tokens, scale=None)[0], rwkv7(*tokens, scale=0.25)[0])
    leaves = [t.requires_grad_() for t in tokens]
    rwkv7(*leaves)[0].sum().backward()
    exact = [t.detach().double().requires_grad_() for t in tokens]
    rwkv7_reference(*exact)[0].sum().backward()
    plain = [t.detach().clone().requires_grad_() for t in tokens]
    rwkv7_reference(*plain)[0].sum().backward()
    for a, s, e in zip(leaves, plain, exact, strict=True):
        assert_good(a.grad, s.grad, e.grad)


def test_strides_do_not_matter(device):
    *tokens, state = inputs(device, 2, 20, 2, 16, 16)
    wanted = rwkv7(*tokens, initial_state=state)[0]
    turned = [x.transpose(1, -1).contiguous().transpose(1, -1) for x in tokens]
    assert torch.equal(rwkv7(*turned, initial_state=state.mT.contiguous().mT)[0], wanted)


def test_reference_backend(device):
    tensors = inputs(device, 1, 5, 2, 4, 3)
    assert torch.equal(run(rwkv7, tensors, backend="reference")[0], run(rwkv7_reference, tensors)[0])
    state, other = tensors[6].clone(), tensors[6].clone()
    o = rwkv7_step(*at(tensors, 0), state)
    torch.testing.assert_close(o, rwkv7_step(*at(tensors, 0), other, backend="reference"))
    torch.testing.assert_close(state, other)


def test_float64_is_served_by_the_reference(device):
    tensors = to(inputs(device, 1, 5, 2, 4, 3), torch.float64)
    assert torch.equal(run(rwkv7, tensors)[0], run(rwkv7_reference, tensors)[0])
    with pytest.raises(ValueError, match=r"^r: .*float64"):
        run(rwkv7, tensors, backend=compiled_backend(device))
    leaves = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(lambda *t: rwkv7(*t[:6], 0.7, t[6], True), leaves)


def test_no_second_derivative(device):
    tokens = [t.requires_grad_() for t in inputs(device, 1, 5, 1, 4, 3)[:6]]
    (gradient,) = torch.autograd.grad(rwkv7(*tokens)[0].sum(), tokens[0], create_graph=True)
    with pytest.raises(RuntimeError, match="rwkv7 has no second derivative"):
        gradient.sum().backward()


def test_chunkwise_torch_agrees(device):
    *tokens, state = inputs(device, 2, 64, 2, 16, 24, 0.3)
    exact = run(rwkv7_reference, to([*tokens, state], torch.float64))
    plain = run(rwkv7_reference, [*tokens, state])
    # its decays e^b and e^-b lose digits that the kernel's do not
    for a, s, e in zip(rwkv7_chunkwise_torch(*tokens, initial_state=state, chunk=16), plain, exact, strict=True):
        assert_good(a, s, e, factor=8)


def broken():
    tensors = inputs(CPU, 2, 6, 2, 8, 4)
    good = dict(zip((*TOKENS, "initial_state"), tensors, strict=True))
    bounds = torch.tensor([0, 6])
    for name in TOKENS:
        t = good[name]
        yield name, {**good, name: t[0]}
        yield name, {**good, name: t.to("meta")} if name != "r" else {**good, "r": t.long()}
        if name not in "rv":
            yield name, {**good, name: t[:, :5]}
            yield name, {**good, name: t[..., :3]}
            yield name, {**good, name: t.double()}
    yield "v", {**good, "v": good["v"][:, :, :1]}
    yield "w", {**good, "w": good["w"] + 1.0}, "values"
    yield "w", {**good, "w": good["w"] + 1.0, "backend": "reference"}, "values"
    yield "scale", {**good, "scale": float("inf")}
    yield "initial_state", {**good, "initial_state": tensors[6][:1]}
    yield "initial_state", {**good, "initial_state": tensors[6].double()}
    yield "cu_seqlens", {**good, "cu_seqlens": bounds}
    yield "backend", {**good, "backend": "cudnn"}
    one = {name: t[:1] for name, t in good.items()}
    yield "cu_seqlens", {**one, "cu_seqlens": bounds.float()}
    for values in ([0, 5], [1, 6], [0, 7, 6], []):
        n = max(len(values) - 1, 0)
        states = one["initial_state"].repeat(n, 1, 1, 1)
        arguments = {**one, "cu_seqlens": torch.tensor(values).long(), "initial_state": states}
        yield "cu_seqlens", arguments, *(["values"] if values else [])
    wide = torch.zeros(1, 1, 1, 513)
    yield "r", {**dict.fromkeys(TOKENS, wide), "v": wide[..., :4]}
    yield "v", {**dict.fromkeys(TOKENS, wide[..., :4]), "v": torch.zeros(1, 1, 1, 4097)}


@pytest.mark.parametrize(
    ("name", "arguments", "values"),
    [pytest.param(n, a, bool(v), id=f"{i}-{n}") for i, (n, a, *v) in enumerate(broken())],
)
def test_refusals(device, name, arguments, values):
    if values and device.type != "cpu":
        pytest.skip("a GPU's values are not read")
    with pytest.raises(ValueError, match=f"^{name}"):
        rwkv7(**move(arguments, device))


def test_gates_up_to_the_allowance_pass(device):
    tensors = inputs(device, 1, 20, 1, 8, 8)
    tensors[1].fill_(5e-5)
    compare(tensors)


def test_step_refusals(device):
    *tokens, state = inputs(device, 2, 1, 2, 8, 4)
    good = {**dict(zip(TOKENS, (t[:, 0] for t in tokens), strict=True)), "state": state}
    rwkv7_step(**good)
    bad = {
        "r": [tokens[0], good["r"].double()],
        "w": [good["w"] + 1.0] if device.type == "cpu" else [],
        "v": [good["v"][:, :1], good["v"].half()],
        "state": [state[:1], state.double(), state.mT.contiguous().mT, state.mT, state.clone().requires_grad_()],
        "scale": [float("nan")],
    }
    for name in TOKENS:
        bad.setdefault(name, []).append(good[name].clone().requires_grad_())
        if name not in "rv":
            bad[name] += [good[name][:, :1], good[name].double()]
    for name, values in bad.items():
        for value in values:
            with pytest.raises(ValueError, match=f"^{name}"):
                rwkv7_step(**{**good, name: value})


@pytest.mark.parametrize("sizes", [(3, 1, 2, 60, 40), (2, 1, 1, 16, 16), (1, 1, 1, 3, 5), (4, 1, 4, 128, 256)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_step(device, sizes, dtype):
    tensors = inputs(device, *sizes, dtype=dtype)
    tensors[1][0, :, :, 0] = -float("inf")
    exact = run(rwkv7_reference, to(tensors, torch.float64))
    plain = run(rwkv7_reference, tensors)
    state = tensors[6].clone()
    o = rwkv7_step(*at(tensors, 0), state)
    assert o.dtype == dtype
    assert_good(o, plain[0][:, 0], exact[0][:, 0])
    assert_good(state, plain[1], exact[1])


def test_opcheck(device):
    tensors = inputs(device, 1, 20, 2, 8, 4)
    leaves = [t.clone().requires_grad_() for t in tensors]
    ops = torch.ops.icrl
    torch.library.opcheck(ops.rwkv7, (*leaves[:6], 0.3, leaves[6], None, "auto"))
    torch.library.opcheck(
        ops.rwkv7, (*leaves[:6], 0.3, None, torch.tensor([0, 20], device=device), compiled_backend(device))
    )
    backward = (torch.randn(1, 20, 2, 4).to(device), tensors[6], *tensors[:6], 0.3, tensors[6], None, "auto")
    torch.library.opcheck(ops.rwkv7_backward, backward)
    torch.library.opcheck(ops.rwkv7_step, (*at(tensors, 0), tensors[6].clone(), 0.3, "auto"))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(device, dynamic):
    compiled = torch.compile(rwkv7, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for T in (20, 33):
        tensors = inputs(device, 1, T, 2, 8, 4)
        weights = (torch.randn(1, T, 2, 4), torch.randn(1, 2, 8, 4))
        pairs = zip(NAMES, run(compiled, tensors, weights), run(rwkv7, tensors, weights), strict=True)
        for name, a, b in pairs:
            assert torch.equal(a, b), name
    tensors = inputs(device, 2, 1, 2, 8, 4)
    state, other = tensors[6].clone(), tensors[6].clone()
    step = torch.compile(rwkv7_step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    assert torch.equal(step(*at(tensors, 0), other), rwkv7_step(*at(tensors, 0), state))
    assert torch.equal(state, other)


def test_backends_listed():
    for op in ("rwkv7", "rwkv7_step"):
        assert _registry.resolve(op, "cpu")[0] == "cpu"
        assert _registry.resolve(op, "cuda")[0] == "triton"


@pytest.mark.parametrize("isa", ["generic", "avx2"])
def test_other_instruction_sets(isa):
    if os.environ.get("ICRL_ISA") or _C.isa() == "generic":
        pytest.skip("already one of several runs, or there is only one instruction set")
    chosen = "values_and or scale or strength or reset or later_token or test_step"
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
