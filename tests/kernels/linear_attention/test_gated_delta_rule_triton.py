"""The Triton kernels of gated_delta_rule, on a GPU or in Triton's interpreter (in float32: its bfloat16 is wrong)."""

import itertools

import pytest
import torch

from icrl_kernels import gated_delta_rule, gated_delta_rule_reference, gated_delta_rule_step
from icrl_kernels.testing import assert_as_good_as_torch

pytest.importorskip("triton")
from tiles import BLOCKS, WIDE, chosen, meta, tokens

from icrl_kernels.linear_attention.triton import gated_delta_rule as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
GATES = ["none", "scalar", "channel"]
NAMES = ["o", "final_state", "dq", "dk", "dv", "dg", "dbeta", "dinitial_state"]


def inputs(T=100, B=1, Hk=1, H=1, K=16, V=16, gate="channel", strength=0.1, sequences=None, seed=0):
    """Keys of norm about 1 and beta in [0, 2], where the recurrence is stable."""
    r = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, T, h, d, generator=r) for h, d in ((Hk, K), (Hk, K), (H, V)))
    k = k / k.norm(dim=-1, keepdim=True)
    shape = {"none": None, "scalar": (B, T, H), "channel": (B, T, H, K)}[gate]
    g = None if shape is None else -strength * torch.rand(shape, generator=r)
    beta, state = 2 * torch.rand(B, T, H, generator=r), torch.randn(sequences or B, H, K, V, generator=r)
    return [None if t is None else t.to(DEVICE) for t in (q, k, v, g, beta, state)]


def run(f, tensors, weights=None, **options):
    """Output, final state and, with weights for the two, the gradients of all inputs."""
    leaves = [None if t is None else t.detach().clone().requires_grad_(weights is not None) for t in tensors]
    o, final = f(*leaves[:5], initial_state=leaves[5], output_final_state=True, **options)
    if weights is not None:
        ((o * weights[0].to(o.dtype)).sum() + (final * weights[1].to(final.dtype)).sum()).backward()
    return [o.detach(), final.detach()] + [None if x is None or weights is None else x.grad for x in leaves]


def triton(*args, **options):
    return gated_delta_rule(*args, **options, backend="triton")


def draw(tensors):
    state = tensors[5]
    if state is None:
        state = torch.empty(tensors[0].shape[0], tensors[2].shape[2], tensors[0].shape[3], tensors[2].shape[3])
    return [torch.randn(t.shape).to(DEVICE) for t in (tensors[2], state)]


def compare(tensors, roundings=4.0, **options):
    weights = draw(tensors)
    double = [None if t is None else t.double() for t in tensors]
    exact = run(gated_delta_rule_reference, double, weights, **options)
    plain = run(gated_delta_rule_reference, tensors, weights, **options)
    result = run(triton, tensors, weights, **options)
    for name, a, s, r in zip(NAMES, result, plain, exact, strict=True):
        assert (a is None) == (r is None), name
        if r is not None:
            assert a.dtype == s.dtype, name
            # dg is in part a difference of sums over the chunk, whose terms' roundings stay where they cancel
            assert_as_good_as_torch(a, s, r, name=name, roundings=64.0 if name == "dg" else roundings)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("qk_l2norm", [False, True])
@pytest.mark.parametrize(
    "sizes",
    [{"T": 1}, {"T": 100, "Hk": 2, "H": 4}, {"T": 63, "B": 2, "H": 2, "K": 20, "V": 36}, {"T": 129, "K": 5, "V": 70}],
    ids=str,
)
def test_values_and_gradients(sizes, qk_l2norm, gate):
    compare(inputs(**sizes, gate=gate), qk_l2norm=qk_l2norm)


def compare_tile(K, V, gate, group, qk_l2norm):
    """Gates are mild in the first chunk; in the second they are left to the second launch."""
    T = tokens(K, V)
    tensors = inputs(T=T, H=group, K=K, V=V, gate=gate)
    if gate == "channel":
        tensors[3][:, T - 6 :] *= 300.0
    compare(tensors, qk_l2norm=qk_l2norm, roundings=32.0)


STEPS = [(16, 16), (20, 130), (13, 256), (60, 256), (100, 30), (256, 40), (512, 20)]
TILES = [(13, 16), (32, 128), (40, 140), (60, 16), (130, 70), (128, 13), (256, 32), (300, 16)]


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(("K", "V"), TILES)
def test_every_tile_that_a_plan_can_choose(K, V, gate):
    compare_tile(K, V, gate, 2, True)


@pytest.mark.slow
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize(("K", "V"), list(itertools.product(BLOCKS, BLOCKS)))
def test_every_pair_of_blocks(K, V, group, gate):
    compare_tile(K, V, gate, group, False)


def test_these_are_all_tiles():
    def calls(shapes):
        for (K, V), gate in itertools.product(shapes, GATES):
            q, k, v, g, beta, state = meta(inputs(T=70, H=2, K=K, V=V, gate=gate))
            yield lambda: kernels.forward(q, k, v, g, beta, 0.25, state, None, True)  # noqa: B023
            yield lambda: kernels.backward(v, state, q, k, v, g, beta, 0.25, state, None, True)  # noqa: B023

    assert chosen(kernels, calls(TILES)) == chosen(kernels, calls(itertools.product(BLOCKS, BLOCKS)))

    def steps(shapes):
        for K, V in shapes:
            q, k, v, _, beta, state = meta(inputs(T=1, K=K, V=V, gate="none"))
            yield lambda: kernels.step(q[:, 0], k[:, 0], v[:, 0], None, beta[:, 0], state, 0.25, True)  # noqa: B023

    assert chosen(kernels, steps(STEPS)) == chosen(kernels, steps(itertools.product(BLOCKS, WIDE)))


@pytest.mark.parametrize("gate", GATES)
def test_without_beta_and_state(gate):
    q, k, v, g, _, _ = inputs(T=70, gate=gate, B=2)
    k *= 0.5
    compare([q, k, v, g, None, None], scale=0.3)


@pytest.mark.parametrize("gate", GATES)
def test_packed(gate):
    lengths = [0, 1, 66, 0, 0, 20, 0]
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], device=DEVICE)
    tensors = inputs(T=sum(lengths), gate=gate, sequences=len(lengths))
    compare(tensors, cu_seqlens=cu)
    o, final = run(triton, tensors, cu_seqlens=cu.int())[:2]
    for n in (0, 2, 5):
        span = slice(int(cu[n]), int(cu[n + 1]))
        part = [*(None if x is None else x[:, span] for x in tensors[:5]), tensors[5][n : n + 1]]
        apart = run(triton, part)
        assert torch.equal(o[:, span], apart[0])
        assert torch.equal(final[n : n + 1], apart[1])


@pytest.mark.parametrize("gate", ["scalar", "channel"])
@pytest.mark.parametrize("strength", [1e-3, 1.0, 5.0, 30.0, 400.0, 1e6])
def test_strength_of_gates(strength, gate):
    # exp2(g·log2 e) errs by |g| roundings, which shows where all that is left of a tensor is e^-30 of it
    compare(inputs(T=130, gate=gate, strength=strength), roundings=32.0)


@pytest.mark.parametrize("gate", ["scalar", "channel"])
@pytest.mark.parametrize("reset", [-float("inf"), -1e4, -60.0])
def test_resets_among_mild_gates(reset, gate):
    tensors = inputs(T=150, gate=gate, strength=0.02)
    tensors[3][:, [0, 5, 37, 63, 64, 140, 149]] = reset
    if gate == "channel":
        tensors[3][:, 80:90, :, ::2] = reset
    compare(tensors)


@pytest.mark.parametrize("gate", ["scalar", "channel"])
@pytest.mark.parametrize("at", [20, 64, 140])
@pytest.mark.parametrize("later", [-float("inf"), -300.0])
def test_a_later_token_changes_no_bit(later, at, gate):
    tensors = inputs(T=150, gate=gate)
    before = run(triton, tensors)[0]
    for x in (*tensors[:3], tensors[4]):
        x[:, at + 1 :] *= -1.5
    tensors[3][:, at + 1 :] = later
    assert torch.equal(run(triton, tensors)[0][:, : at + 1], before[:, : at + 1])


@pytest.mark.parametrize("name", ["q", "k", "v", "g", "beta"])
@pytest.mark.parametrize("gate", GATES)
def test_nan_goes_where_it_touches(name, gate):
    """And, but for q, to the rows before it in its chunk; not to other heads, nor to other columns from v."""
    x = dict(zip(("q", "k", "v", "g", "beta"), inputs(T=200, Hk=2, H=2, gate=gate)[:5], strict=True))
    if x[name] is None:
        return
    clean, _ = gated_delta_rule(*x.values(), backend="triton")
    x[name].view(1, 200, 2, -1)[0, 100, 1, 0] = float("nan")
    o, final = gated_delta_rule(*x.values(), output_final_state=True, backend="triton")
    columns = slice(0, 1) if name == "v" else slice(None)
    assert o[:, 100 : 101 if name == "q" else None, 1, columns].isnan().all()
    free = torch.ones_like(o, dtype=torch.bool)
    free[:, 100 if name == "q" else 64 : 101 if name == "q" else None, 1, columns] = False
    assert torch.equal(o[free], clean[free])
    assert bool(final[0, 1].isnan().any()) == (name != "q")
    assert not final[0, 0].isnan().any()


@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
def test_a_key_that_repeats(beta):
    """The worst the triangular system can be: powers of it grow to 1e27, its inverse does not.

    With beta = 2 the system's condition is of the order of the chunk's square, 64^2, and how products are rounded, which
    differs between processors, decides how much of that is seen.
    """
    tensors = inputs(T=130, gate="none")
    tensors[1][:] = tensors[1][:, :1].clone()
    tensors[4].fill_(beta)
    compare(tensors, roundings=4096.0 if beta == 2 else 128.0)


def test_l2norm_of_any_length():
    tensors = inputs(T=70, K=20)
    for t in tensors[:2]:
        t *= 10.0 ** torch.randint(-4, 5, (1, 70, 1, 1)).to(DEVICE)
        t[:, [3, 40]] = 0.0
    compare(tensors, qk_l2norm=True, roundings=16.0)
    compare(tensors, qk_l2norm=True, scale=0.0, roundings=16.0)


def test_segments_with_carried_state():
    tensors = inputs(T=150, B=2, gate="scalar")
    whole, last = run(triton, tensors)[:2]
    state, pieces = tensors[5], []
    for span in (slice(0, 64), slice(64, 64), slice(64, 128), slice(128, 150)):
        part = [*(x[:, span] for x in tensors[:5]), state]
        o, state = run(triton, part)[:2]
        pieces.append(o)
    assert torch.equal(torch.cat(pieces, 1), whole)
    assert torch.equal(state, last)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(("T", "parts"), [(130, 2), (200, 3)])
def test_sequences_in_parts(T, parts, gate, monkeypatch):
    monkeypatch.setattr(kernels, "_parts", lambda programs, tokens: parts)
    *tensors, state = inputs(T=T, B=parts - 1, V=20, gate=gate)
    compare([*tensors, state if parts == 2 else None])


def test_parts_by_the_shape_rule():
    assert [kernels._parts(8, T) for T in (1000, 4096, 10**6)] == [1, 4, 16]
    assert [kernels._parts(n, 10**6) for n in (33, 34, 1000)] == [4, 1, 1]


def test_no_tokens():
    tensors = inputs(B=2, T=0, H=2)
    o, final, *gradients = run(triton, tensors, [*draw(tensors)[:1], tensors[5]])
    assert o.shape == (2, 0, 2, 16)
    assert torch.equal(final, tensors[5])
    assert [d.shape for d in gradients] == [x.shape for x in tensors]
    assert torch.equal(gradients[-1], tensors[5])


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, gate):
    if dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("the interpreter's bfloat16 is wrong")
    q, k, v, g, beta, state = inputs(T=70, H=2, K=20, gate=gate)
    compare([*(t.to(dtype) for t in (q, k, v)), None if g is None else g.to(dtype), beta, state], qk_l2norm=True)


@pytest.mark.parametrize("gate", GATES)
def test_same_bits_each_run(gate):
    tensors = inputs(T=100, H=2, gate=gate)
    weights = draw(tensors)
    first, second = (run(triton, tensors, weights, qk_l2norm=True) for _ in range(2))
    assert all(a is b or torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("qk_l2norm", [False, True])
@pytest.mark.parametrize(("K", "V"), STEPS)
def test_step(K, V, qk_l2norm, gate):
    H, Hk = (4, 2) if K < 50 else (3, 1) if K < 200 else (2, 2)
    tensors = inputs(B=3, T=4, H=H, Hk=Hk, K=K, V=V, gate=gate)
    exact, plain = (
        run(gated_delta_rule_reference, [None if t is None else t.to(d) for t in tensors], qk_l2norm=qk_l2norm)
        for d in (torch.float64, torch.float32)
    )
    state, steps = tensors[5].clone(), []
    for i in range(4):
        token = [None if x is None else x[:, i] for x in tensors[:5]]
        steps.append(gated_delta_rule_step(*token, state, qk_l2norm=qk_l2norm, backend="triton"))
    assert_as_good_as_torch(torch.stack(steps, 1), plain[0], exact[0], name="o")
    assert_as_good_as_torch(state, plain[1], exact[1], name="state")


def test_step_without_beta():
    q, k, v, g, _, state = inputs(B=2, T=1, gate="none")
    wanted = state.clone()
    o = gated_delta_rule_step(q[:, 0], k[:, 0], v[:, 0], g, None, state, backend="triton")
    other = gated_delta_rule_step(q[:, 0], k[:, 0], v[:, 0], g, None, wanted, backend="reference")
    torch.testing.assert_close(o, other)
    torch.testing.assert_close(state, wanted)


@pytest.mark.skipif(DEVICE == "cuda", reason="relies on memory that is reserved but not there")
@pytest.mark.parametrize("gate", [0, 1, 2])
def test_offsets_beyond_32_bits(gate, tmp_path):
    """The last 70 of so many tokens, in chunks so late, that every tensor with K, V or C is entered beyond 2^31."""
    K = V = 16
    C, T, chunk = 64, 2**27 + 128, 2**19 + 3
    files = itertools.count()

    def far(size):  # a file with a hole
        return torch.from_file(str(tmp_path / str(next(files))), shared=True, size=size, dtype=torch.float32)

    near = inputs(T=70, gate=GATES[gate], H=1)
    q, k, v, g, beta, state = near
    wanted, last = gated_delta_rule(q, k, v, g, beta, initial_state=state, output_final_state=True)
    tokens = {}
    for name, x in zip(("q", "k", "v", "g", "beta"), near[:5], strict=True):
        if x is not None:
            tokens[name] = far(T * x[0, 0].numel())
            tokens[name][-x.numel() :] = x.flatten()
    plan = kernels._plan(q, v, g, torch.tensor([0, 70]))
    first, owner = torch.tensor([chunk, chunk + 2]), torch.zeros(2, dtype=torch.long)
    cu, decay_size = torch.tensor([T - 70, T]), (1, 1, K)[gate]
    o, decayed = far(T * V), [far(T * K) if gate == 2 else None for _ in range(3)]
    sizes = C * C, C * C, 3 * C, decay_size  # of what a chunk leaves: solve, scores, rows, decay
    local, late = [torch.zeros(2 * n) for n in sizes], [far((chunk + 2) * n) for n in sizes]
    final = torch.zeros_like(last)
    get = tokens.get
    kernels._prepare[(2,)](
        get("q"), get("k"), get("g"), get("beta"), *local[:3], None, local[3], torch.zeros(2), *decayed, 0.25,
        cu, owner, torch.tensor([0, 2]), T, 0, 1, 1, GROUP=1, BK=16, BETA=True, NORM=False, ANY=False,
        **plan.sizes, **plan.products, **plan.gates,
    )  # fmt: skip
    for x, y in zip(late, local, strict=True):
        x[-y.numel() :] = y
    operands = decayed if gate == 2 else (get("q"), get("k"), get("k"))
    kernels._forward[(1,)](
        *operands, get("v"), *late, state, final, o, None, None, cu, first, T, 0, T, 1, 1, 1,
        GROUP=1, V=V, BK=16, BV=16, HAS_INIT=True, TRANSFER=False, **plan.sizes, **plan.products,
    )  # fmt: skip
    assert min(x.numel() for x in (tokens["q"], tokens["v"], late[0])) > 2**31
    torch.testing.assert_close(o[-70 * V :].view(wanted.shape), wanted)
    torch.testing.assert_close(final, last)


def test_rows_after_a_strong_gate_that_is_then_less_strong():
    """A gate may be a little above 0 by rounding, so that the sum of gates comes back within what one anchor serves."""
    tensors = inputs(T=24, gate="channel", strength=0.0)
    tensors[3][:, 4, :, 0] = -16.00004 * 0.6931471805599453
    tensors[3][:, 5, :, 0] = 9e-5
    compare(tensors)
