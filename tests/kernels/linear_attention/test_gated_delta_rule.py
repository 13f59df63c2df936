import os
import subprocess
import sys

import pytest
import torch
from on_device import assert_close_gradients, assert_good, assert_nan, assert_same_bits, compiled_backend, move, poisons

from icrl_kernels import (
    _C,
    _registry,
    gated_delta_rule,
    gated_delta_rule_reference,
    gated_delta_rule_step,
)
from icrl_kernels.testing import gated_delta_rule_chunkwise_torch

CPU = torch.device("cpu")
GATES = ["none", "scalar", "channel"]
NAMES = ["o", "final_state", "dq", "dk", "dv", "dg", "dbeta", "dinitial_state"]


def inputs(device, B, T, Hk, H, K, V, gate, strength=1.0, dtype=torch.float32, sequences=None):
    """Keys of norm about 1 and beta in [0, 2], where the recurrence is stable."""
    q, k, v = torch.randn(B, T, Hk, K), torch.randn(B, T, Hk, K), torch.randn(B, T, H, V)
    k = k / k.norm(dim=-1, keepdim=True)
    shape = {"none": None, "scalar": (B, T, H), "channel": (B, T, H, K)}[gate]
    g = None if shape is None else -strength * torch.rand(shape)
    state = torch.randn(sequences or B, H, K, V)
    return move([q.to(dtype), k.to(dtype), v.to(dtype), g, 2 * torch.rand(B, T, H), state], device)


def to(tensors, dtype):
    return [None if t is None else t.to(dtype) for t in tensors]


def at(tensors, span):
    return [None if t is None else t[:, span] for t in tensors[:5]]


def run(f, tensors, weights=None, **options):
    """Output, final state and, with weights for the two, the gradients of all inputs."""
    leaves = [None if t is None else t.detach().clone().requires_grad_(weights is not None) for t in tensors]
    o, final = f(*leaves[:5], initial_state=leaves[5], output_final_state=True, **options)
    if weights is not None:
        ((o * weights[0].to(o)).sum() + (final * weights[1].to(final)).sum()).backward()
    return [o.detach(), final.detach()] + [None if x is None or weights is None else x.grad for x in leaves]


def compare(tensors, **options):
    weights = torch.randn(tensors[2].shape), torch.randn(tensors[5].shape)
    exact = run(gated_delta_rule_reference, to(tensors, torch.float64), weights, **options)
    plain = run(gated_delta_rule_reference, tensors, weights, **options)
    result = run(gated_delta_rule, tensors, weights, **options)
    for name, a, s, r in zip(NAMES, result, plain, exact, strict=True):
        if r is not None:
            assert a.dtype == s.dtype, name
            assert_good(a, s, r, name=name, dtype=tensors[0].dtype)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("qk_l2norm", [False, True])
@pytest.mark.parametrize(
    "sizes",
    [(2, 1, 1, 1, 16, 16), (1, 63, 2, 2, 60, 40), (1, 64, 1, 1, 64, 64), (1, 65, 1, 3, 32, 20), (1, 90, 1, 1, 5, 7),
     (1, 33, 1, 1, 100, 256)],
)  # fmt: skip
def test_values_and_gradients(device, gate, sizes, qk_l2norm):
    compare(inputs(device, *sizes, gate), qk_l2norm=qk_l2norm)


@pytest.mark.parametrize("gate", ["scalar", "channel"])
@pytest.mark.parametrize("strength", [1e-3, 6.0, 30.0, 200.0])
def test_strength_of_gates(device, gate, strength):
    """From almost none to exp(g) that underflows in one token, and, between, products that underflow within a chunk."""
    compare(inputs(device, 1, 50, 1, 2, 20, 24, gate, strength))


@pytest.mark.parametrize("gate", ["scalar", "channel"])
def test_closed_gates_reset(device, gate):
    tensors = inputs(device, 1, 50, 1, 1, 16, 16, gate, 0.1)
    tensors[3][:, [0, 7, 16, 31, 32, 45]] = -float("inf")
    tensors[3][:, 20] = -30.0
    compare(tensors)
    grad = run(gated_delta_rule, tensors, (torch.ones(1, 50, 1, 16), torch.ones(1, 1, 16, 16)))[5]
    if device.type == "cpu":
        assert (grad[:, [0, 7, 16, 31, 32, 45]] == 0).all()
    # what came before the last reset is forgotten
    after = run(gated_delta_rule, [*at(tensors, slice(45, 50)), torch.zeros_like(tensors[5])])
    exact = run(gated_delta_rule_reference, to([*at(tensors, slice(45, 50)), tensors[5]], torch.float64))
    whole = run(gated_delta_rule, tensors)
    assert_good(whole[0][:, 45:], after[0], exact[0])


@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0, -1.5])
@pytest.mark.parametrize("gate", ["none", "channel"])
def test_beta(device, beta, gate):
    tensors = inputs(device, 1, 40, 1, 2, 16, 16, gate)
    tensors[4].fill_(beta)
    tensors[4][:, 20] = 0.5
    compare(tensors)
    if beta == 1.0:
        tensors[4].fill_(beta)
        whole, default = run(gated_delta_rule, tensors), run(gated_delta_rule, [*tensors[:4], None, tensors[5]])
        assert_same_bits(whole[0], default[0])
    if beta == 0.0 and gate == "none":
        tensors[4].fill_(beta)
        assert torch.equal(run(gated_delta_rule, tensors)[1], tensors[5])  # nothing is written


def test_beta_one_stores_the_value(device):
    q, k, v, _, _, state = inputs(device, 1, 30, 1, 1, 16, 16, "none")
    o, _ = gated_delta_rule(k, k, v, initial_state=state, scale=1.0, qk_l2norm=True)
    exact, _ = gated_delta_rule_reference(*to([k, k, v], torch.float64), initial_state=state.double(), scale=1.0)
    assert torch.linalg.vector_norm(exact - v) < 1e-5 * v.norm()
    assert torch.linalg.vector_norm(o - v) < 1e-5 * v.norm()


@pytest.mark.parametrize("qk_l2norm", [False, True])
def test_zero_keys_and_queries(device, qk_l2norm):
    tensors = inputs(device, 1, 40, 1, 1, 16, 16, "scalar")
    tensors[1][:, [3, 4, 17]] = 0.0
    tensors[0][:, [3, 20]] = 0.0
    compare(tensors, qk_l2norm=qk_l2norm)


def test_l2norm_of_any_length(device):
    tensors = inputs(device, 1, 40, 1, 2, 20, 16, "channel")
    for t in tensors[:2]:
        t *= 10.0 ** torch.randint(-4, 5, (1, 40, 1, 1)).to(device)
    compare(tensors, qk_l2norm=True)
    compare(tensors, qk_l2norm=True, scale=0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("other_dtype", ["same", "float32"])
def test_half_precision(device, dtype, gate, other_dtype):
    tensors = inputs(device, 1, 50, 1, 2, 32, 40, gate, dtype=dtype)
    if other_dtype == "same":
        tensors[3:5] = to(tensors[3:5], dtype)
    compare(tensors)


@pytest.mark.parametrize("gate", GATES)
def test_packed_sequences(device, gate):
    lengths = [0, 17, 1, 0, 33, 20, 0]
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], device=device)
    tensors = inputs(device, 1, sum(lengths), 1, 2, 24, 16, gate, sequences=len(lengths))
    compare(tensors, cu_seqlens=bounds)
    weights = (torch.randn(1, sum(lengths), 2, 16), torch.randn(len(lengths), 2, 24, 16))
    packed = run(gated_delta_rule, tensors, weights, cu_seqlens=bounds.int())
    for n in range(len(lengths)):
        span = slice(int(bounds[n]), int(bounds[n + 1]))
        part = [*at(tensors, span), tensors[5][n : n + 1]]
        alone = run(gated_delta_rule, part, (weights[0][:, span], weights[1][n : n + 1]))
        for i in (0, 2, 3, 4, 5, 6):
            if packed[i] is not None:
                assert_same_bits(packed[i][:, span], alone[i], NAMES[i])
        for i in (1, 7):
            assert_same_bits(packed[i][n : n + 1], alone[i], NAMES[i])


@pytest.mark.parametrize("gate", GATES)
def test_segments_with_carried_state_and_steps(device, gate):
    tensors = inputs(device, 2, 75, 2, 4, 20, 36, gate)
    exact = run(gated_delta_rule_reference, to(tensors, torch.float64))
    plain = run(gated_delta_rule_reference, tensors)
    state, pieces = tensors[5], []
    for a, b in [(0, 16), (16, 16), (16, 19), (19, 64), (64, 75)]:
        o, state = gated_delta_rule(*at(tensors, slice(a, b)), initial_state=state, output_final_state=True)
        pieces.append(o)
    assert_good(torch.cat(pieces, 1), plain[0], exact[0])
    assert_good(state, plain[1], exact[1])

    state = tensors[5].clone()
    steps = [gated_delta_rule_step(*at(tensors, i), state) for i in range(75)]
    assert_good(torch.stack(steps, 1), plain[0], exact[0])
    assert_good(state, plain[1], exact[1])


def test_long_sequence_recomputes_states_in_segments(device):
    """Past the size where backward keeps every chunk's state, gradients are those of the halves joined by hand."""
    tensors = inputs(device, 1, 16 * 40, 1, 1, 256, 256, "channel", 0.05)
    weights = move((torch.randn(1, 640, 1, 256), torch.randn(1, 1, 256, 256)), device)
    whole = run(gated_delta_rule, tensors, weights)
    leaves = [t.clone().requires_grad_() for t in tensors]
    first, state = gated_delta_rule(*at(leaves, slice(0, 320)), initial_state=leaves[5], output_final_state=True)
    second, state = gated_delta_rule(*at(leaves, slice(320, 640)), initial_state=state, output_final_state=True)
    ((torch.cat([first, second], 1) * weights[0]).sum() + (state * weights[1]).sum()).backward()
    for name, a, leaf in zip(NAMES[2:], whole[2:], leaves, strict=True):
        assert_close_gradients(a, leaf.grad, name)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("strength", [0.1, 8.0])
def test_no_output_depends_on_a_later_token(device, gate, strength):
    tensors = inputs(device, 1, 80, 1, 2, 32, 32, gate, strength)
    o = run(gated_delta_rule, tensors)[0]
    for t in (1, 15, 16, 21, 47, 48, 79):
        for poison, gates in poisons(device, (-float("inf"), -300.0, -0.5)):
            changed = [None if x is None else x.clone() for x in tensors]
            for x in (*changed[:3], changed[4]):
                x[:, t:] = poison
            if changed[3] is not None:
                changed[3][:, t:] = gates
            assert torch.equal(run(gated_delta_rule, changed)[0][:, :t], o[:, :t])


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("sizes", [(2, 70, 1, 2, 32, 32), (1, 70, 1, 1, 32, 64)])
def test_bits_do_not_depend_on_run_or_threads(device, gate, sizes):
    tensors = inputs(device, *sizes, gate)
    weights = (torch.randn(tensors[2].shape), torch.randn(tensors[5].shape))
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(gated_delta_rule, tensors, weights, qk_l2norm=True))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for name, a, b in zip(NAMES, results[0], other, strict=True):
            assert a is None or torch.equal(a, b), name


@pytest.mark.parametrize("gate", GATES)
def test_nan_goes_where_it_touches(device, gate):
    tensors = inputs(device, 2, 40, 2, 2, 16, 16, gate)
    tensors[2][0, 20, 1, 3] = float("nan")  # one channel of v, one head of one sequence
    o, final = run(gated_delta_rule, tensors)[:2]
    wanted = torch.zeros_like(o, dtype=torch.bool)
    wanted[0, 20:, 1, 3] = True
    assert_nan(o, wanted)
    assert final.isnan().any(2).nonzero().tolist() == [[0, 1, 3]]
    for i in (4,) if gate == "none" else (3, 4):  # one head's gate or beta
        tensors = inputs(device, 2, 40, 1, 2, 16, 16, gate)
        tensors[i][0, 20, 1] = float("nan")
        o, final = run(gated_delta_rule, tensors)[:2]
        wanted = torch.zeros_like(o, dtype=torch.bool)
        wanted[0, 20:, 1] = True
        assert_nan(o, wanted)


def test_empty(device):
    for sizes in [(2, 0, 1, 2, 16, 8), (0, 5, 1, 2, 16, 8)]:
        tensors = inputs(device, *sizes, "channel")
        o, final, *gradients = run(
            gated_delta_rule, tensors, (torch.ones_like(tensors[2]), torch.ones_like(tensors[5]))
        )
        assert o.shape == tensors[2].shape
        assert torch.equal(final, tensors[5])
        assert torch.equal(gradients[-1], torch.ones_like(tensors[5]))


def test_without_initial_state_and_final_state(device):
    q, k, v, g, beta, _ = inputs(device, 1, 20, 1, 1, 16, 16, "channel")
    zeros = torch.zeros(1, 1, 16, 16, device=device)
    o, final = gated_delta_rule(q, k, v, g, beta)
    assert final is None
    assert_same_bits(o, gated_delta_rule(q, k, v, g, beta, initial_state=zeros)[0])
    assert torch.equal(gated_delta_rule(q, k, v, g, beta, scale=0.25)[0], o)


def test_strides_do_not_matter(device):
    *tokens, state = inputs(device, 2, 20, 2, 2, 16, 16, "channel")
    wanted = gated_delta_rule(*tokens, initial_state=state)[0]
    turned = [x.transpose(1, -1).contiguous().transpose(1, -1) for x in tokens]
    assert torch.equal(gated_delta_rule(*turned, initial_state=state.mT.contiguous().mT)[0], wanted)


def test_reference_backend(device):
    tensors = inputs(device, 1, 5, 1, 2, 4, 3, "channel")
    assert torch.equal(
        run(gated_delta_rule, tensors, backend="reference")[0], run(gated_delta_rule_reference, tensors)[0]
    )
    state, other = tensors[5].clone(), tensors[5].clone()
    token = at(tensors, 0)
    o = gated_delta_rule_step(*token, state, qk_l2norm=True)
    reference = gated_delta_rule_step(*token, other, qk_l2norm=True, backend="reference")
    torch.testing.assert_close(o, reference)
    torch.testing.assert_close(state, other)


def test_float64_is_served_by_the_reference(device):
    tensors = to(inputs(device, 1, 5, 1, 2, 4, 3, "channel"), torch.float64)
    assert torch.equal(run(gated_delta_rule, tensors)[0], run(gated_delta_rule_reference, tensors)[0])
    with pytest.raises(ValueError, match="float64"):
        run(gated_delta_rule, tensors, backend=compiled_backend(device))
    leaves = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(
        lambda q, k, v, g, beta, s: gated_delta_rule(q, k, v, g, beta, None, s, True, None, True), leaves
    )


@pytest.mark.parametrize("gate", GATES)
def test_chunkwise_torch_agrees(device, gate):
    *tokens, state = inputs(device, 2, 64, 2, 2, 16, 24, gate, 0.3)
    exact = run(gated_delta_rule_reference, to([*tokens, state], torch.float64))
    o, final = gated_delta_rule_chunkwise_torch(*tokens, initial_state=state, chunk=32)
    plain = run(gated_delta_rule_reference, [*tokens, state])
    # its decays e^b and e^-b lose digits that the kernel's do not
    assert_good(o, plain[0], exact[0], factor=8)
    assert_good(final, plain[1], exact[1], factor=8)


def broken():
    q, k, v, g, beta, state = inputs(CPU, 2, 6, 1, 2, 8, 4, "channel")
    good = {"q": q, "k": k, "v": v, "g": g, "beta": beta, "initial_state": state}
    bounds = torch.tensor([0, 6])
    yield "q", {**good, "q": q[0]}
    yield "k", {**good, "k": k[:, :5]}
    yield "k", {**good, "k": k.repeat(1, 1, 2, 1)}
    yield "v", {**good, "v": v[:1]}
    yield "v", {**good, "q": q.repeat(1, 1, 3, 1), "k": k.repeat(1, 1, 3, 1)}
    yield "g", {**good, "g": g[..., :3]}
    yield "g", {**good, "g": g[..., 0, 0]}
    yield "beta", {**good, "beta": beta[..., None]}
    yield "beta", {**good, "beta": beta[..., :1]}
    yield "beta", {**good, "beta": beta.double()}
    yield "beta", {**good, "beta": beta.to("meta")}
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
        states = state[:1].repeat(n, 1, 1, 1)
        arguments = {**one, "cu_seqlens": torch.tensor(values).long(), "initial_state": states}
        yield "cu_seqlens", arguments, *(["values"] if values else [])
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
        gated_delta_rule(**move(arguments, device))


def test_gates_up_to_the_allowance_pass(device):
    tensors = inputs(device, 1, 20, 1, 1, 8, 8, "channel")
    tensors[3].fill_(5e-5)
    compare(tensors)


def test_step_refusals(device):
    q, k, v, g, beta, state = inputs(device, 2, 1, 1, 2, 8, 4, "channel")
    good = dict(zip(("q", "k", "v", "g", "beta"), (t[:, 0] for t in (q, k, v, g, beta)), strict=True)) | {
        "state": state
    }
    bad = {
        "q": [q, q[:, 0].double(), q[:, 0].requires_grad_()],
        "k": [k[:1, 0], k[:, 0].half()],
        "v": [v[:, 0, 0]],
        "g": [g[:, 0, :, :3], *([g[:, 0] + 1.0] if device.type == "cpu" else []), g[:, 0].double()],
        "beta": [beta, beta[:, 0].double(), beta[:, 0].clone().requires_grad_()],
        "state": [state[:1], state.double(), state.mT.contiguous().mT, state.mT],
    }
    gated_delta_rule_step(**good)
    for name, values in bad.items():
        for value in values:
            with pytest.raises(ValueError, match=f"^{name}"):
                gated_delta_rule_step(**{**good, name: value})


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(
    "sizes", [(3, 1, 2, 4, 60, 40), (2, 1, 1, 1, 16, 16), (1, 1, 1, 1, 3, 5), (4, 1, 4, 4, 128, 256)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("qk_l2norm", [False, True])
def test_step(device, gate, sizes, dtype, qk_l2norm):
    tensors = inputs(device, *sizes, gate, dtype=dtype)
    exact = run(gated_delta_rule_reference, to(tensors, torch.float64), qk_l2norm=qk_l2norm)
    plain = run(gated_delta_rule_reference, tensors, qk_l2norm=qk_l2norm)
    state = tensors[5].clone()
    o = gated_delta_rule_step(*at(tensors, 0), state, qk_l2norm=qk_l2norm)
    assert o.dtype == dtype
    assert_good(o, plain[0][:, 0], exact[0][:, 0])
    assert_good(state, plain[1], exact[1])


@pytest.mark.parametrize("gate", GATES)
def test_opcheck(device, gate):
    *tokens, state = inputs(device, 1, 20, 1, 2, 8, 4, gate)
    leaves = [None if t is None else t.requires_grad_() for t in (*tokens, state)]
    ops = torch.ops.icrl
    torch.library.opcheck(ops.gated_delta_rule, (*leaves[:5], 0.3, leaves[5], None, True, "auto"))
    no_beta = (*leaves[:4], None, 0.3, None, torch.tensor([0, 20], device=device), False, compiled_backend(device))
    torch.library.opcheck(ops.gated_delta_rule, no_beta)
    plain = [None if t is None else t.detach() for t in leaves]
    backward = (torch.randn(1, 20, 2, 4).to(device), plain[5], *plain[:5], 0.3, plain[5], None, True, "auto")
    torch.library.opcheck(ops.gated_delta_rule_backward, backward)
    step = (*at(plain, 0), plain[5].clone(), 0.3, True, "auto")
    torch.library.opcheck(ops.gated_delta_rule_step, step)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(device, dynamic):
    compiled = torch.compile(gated_delta_rule, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for T in (20, 33):
        tensors = inputs(device, 1, T, 1, 2, 8, 4, "channel")
        weights = (torch.randn(1, T, 2, 4), torch.randn(1, 2, 8, 4))
        pairs = zip(NAMES, run(compiled, tensors, weights), run(gated_delta_rule, tensors, weights), strict=True)
        for name, a, b in pairs:
            assert torch.equal(a, b), name
    tensors = inputs(device, 2, 1, 1, 2, 8, 4, "channel")
    state, other = tensors[5].clone(), tensors[5].clone()
    step = torch.compile(gated_delta_rule_step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    assert torch.equal(step(*at(tensors, 0), other), gated_delta_rule_step(*at(tensors, 0), state))
    assert torch.equal(state, other)


def test_backends_listed():
    for op in ("gated_delta_rule", "gated_delta_rule_step"):
        assert _registry.resolve(op, "cpu")[0] == "cpu"
        assert _registry.resolve(op, "cuda")[0] == "triton"


@pytest.mark.parametrize("isa", ["generic", "avx2"])
def test_other_instruction_sets(isa):
    if os.environ.get("ICRL_ISA") or _C.isa() == "generic":
        pytest.skip("already one of several runs, or there is only one instruction set")
    chosen = "values_and or any_length or reset or test_step"
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
