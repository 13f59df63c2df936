"""Heads wider than most: K and M up to 512, V up to 4096, which flash-linear-attention's default layers have (256 and 512)."""

import pytest
import torch
from on_device import assert_good

import icrl_kernels as ik
from icrl_kernels import layers
from icrl_kernels.linear_attention.common import MAX_HEAD_DIM, MAX_VALUE_DIM
from icrl_kernels.testing import assert_as_good_as_torch

GPU = torch.cuda.is_available()
CASES = [
    ("gla", "none"),
    ("gla", "scalar"),
    ("gla", "channel"),
    ("gsa", "none"),
    ("gsa", "channel"),
    ("gated_delta_rule", "none"),
    ("gated_delta_rule", "scalar"),
    ("gated_delta_rule", "channel"),
    ("rwkv7", "channel"),
]


def with_backend(op, gate, backend):
    """Without a GPU Triton's kernels are interpreted. Those of the delta rules always take V in blocks: tested elsewhere."""
    marks = [pytest.mark.gpu] if GPU and backend == "triton" else []
    if backend == "triton" and op in ("gated_delta_rule", "rwkv7"):
        marks.append(pytest.mark.slow)
    return pytest.param(op, gate, backend, marks=marks)


EVERYWHERE = [with_backend(*case, backend) for backend in ("cpu", "triton") for case in CASES]


def inputs(op, gate, K, V, T=18, M=20, N=1, dtype=torch.float32):
    """Tokens by name, the gate in float32, of one row with two heads of q (or of v) for a head of k; initial states."""
    H, Hk = (1, 1) if op == "rwkv7" else (2, 1)
    few = H if op == "gated_delta_rule" else Hk  # heads of v, gates and states
    width = M if op == "gsa" else K  # of a gate
    q, k, v = torch.randn(1, T, H if few == Hk else Hk, K), torch.randn(1, T, Hk, K), torch.randn(1, T, few, V)
    k = k / k.norm(dim=-1, keepdim=True)
    g = {"none": None, "scalar": -torch.rand(1, T, few), "channel": -torch.rand(1, T, few, width)}[gate]
    states = [torch.randn(N, few, K, V)]
    if op == "gla":
        tokens = {"q": q, "k": k, "v": v, "g": g}
    elif op == "gsa":
        tokens = {"q": q, "k": k, "v": v, "s": torch.randn(1, T, Hk, M), "g": g}
        states = [torch.randn(N, Hk, K, M), torch.randn(N, Hk, M, V)]
    elif op == "gated_delta_rule":
        tokens = {"q": q, "k": k, "v": v, "g": g, "beta": torch.rand(1, T, H)}
    else:
        tokens = {"r": q, "w": g, "k": torch.randn(1, T, H, K), "v": v, "a": k, "b": -k * torch.rand(1, T, H, K)}
    return {n: x if x is None or n in "gw" or n == "beta" else x.to(dtype) for n, x in tokens.items()}, states


def run(f, tokens, states, weights=None, wide=None, **options):
    """Output, final states and, with weights for these, all gradients, by name."""
    to = lambda x: None if x is None else x.detach().to(wide or x.dtype).requires_grad_(weights is not None)  # noqa: E731
    given = {n: to(x) for n, x in tokens.items()}
    initial = [to(x) for x in states]
    o, final = f(
        **given, initial_state=initial[0] if len(initial) == 1 else tuple(initial), output_final_state=True, **options
    )
    results = {"o": o} | {f"final{i}": x for i, x in enumerate([final] if len(initial) == 1 else final)}
    if weights is None:
        return results
    sum((x * w.to(x)).sum() for x, w in zip(results.values(), weights, strict=True)).backward()
    leaves = {n: x for n, x in given.items() if x is not None} | {f"initial{i}": x for i, x in enumerate(initial)}
    return {n: x.detach() for n, x in results.items()} | {f"d{n}": x.grad for n, x in leaves.items()}


def compare(op, backend, tokens, states, **options):
    """With the reference in float64, as good as it is in the inputs' dtype."""
    if backend == "triton":
        pytest.importorskip("triton")
    device = "cuda" if GPU and backend == "triton" else "cpu"
    tokens = {n: None if x is None else x.to(device) for n, x in tokens.items()}
    states = [x.to(device) for x in states]
    f, reference = getattr(ik, op), getattr(ik, f"{op}_reference")
    v = tokens["v"]
    o = (*v.shape[:2], tokens.get("q", v).shape[2] if op in ("gla", "gsa") else v.shape[2], v.shape[3])
    weights = [torch.randn(o).to(device), *(torch.randn(x.shape).to(device) for x in states)]
    exact = run(reference, tokens, states, weights, torch.float64, **options)
    plain = run(reference, tokens, states, weights, **options)
    result = run(f, tokens, states, weights, backend=backend, **options)
    assert result.keys() == exact.keys()
    for name, x in exact.items():
        assert result[name].dtype == plain[name].dtype, name
        # sums over 512 channels; Triton's dg is a sum of terms whose roundings stay where the terms cancel
        roundings = 8.0 if backend == "cpu" else 128.0 if name in ("dg", "dw") else 16.0
        assert_as_good_as_torch(result[name], plain[name], x, roundings=roundings, name=name)


@pytest.mark.parametrize(("op", "gate", "backend"), EVERYWHERE)
def test_values_and_gradients(op, gate, backend):
    compare(op, backend, *inputs(op, gate, 264, 300))


@pytest.mark.slow
@pytest.mark.parametrize(("op", "gate", "backend"), EVERYWHERE)
@pytest.mark.parametrize(
    ("K", "V", "M"), [(256, 512, 64), (512, 512, 64), (512, 40, 20), (16, 1000, 300), (512, 4096, 512)]
)
def test_wider_still(op, gate, K, V, M, backend):
    compare(op, backend, *inputs(op, gate, K, V, T=18, M=M))


@pytest.mark.parametrize(("op", "gate", "backend"), EVERYWHERE)
def test_packed_sequences(op, gate, backend):
    tokens, states = inputs(op, gate, 8, 264, T=20, N=4)
    device = "cuda" if GPU and backend == "triton" else "cpu"
    compare(op, backend, tokens, states, cu_seqlens=torch.tensor([0, 9, 9, 10, 20], device=device))


@pytest.mark.parametrize(("op", "gate", "backend"), [x for x in EVERYWHERE if x.values[1] != "none"])
def test_half_precision(op, gate, backend):
    """Where V is cut into blocks, what these share is added up in float32."""
    compare(op, backend, *inputs(op, gate, 16, 520, dtype=torch.float16))


@pytest.mark.parametrize(("op", "gate"), CASES)
def test_columns_are_those_of_narrow_calls(op, gate):
    """To the bit: columns of the state do not touch one another."""
    tokens, states = inputs(op, gate, 48, 520)
    weights = [torch.randn(1, 18, 2, 520), *(torch.randn(x.shape) for x in states)]
    whole = run(getattr(ik, op), tokens, states, weights)
    for columns in (slice(0, 256), slice(256, 512), slice(512, 520)):
        some = lambda x: x[..., columns] if x.shape[-1] == 520 else x  # noqa: B023, E731
        narrow = {n: x if x is None else some(x) for n, x in tokens.items()}
        part = run(getattr(ik, op), narrow, [some(x) for x in states], [some(x) for x in weights])
        for name, x in part.items():
            if whole[name].shape[-1] == 520:
                assert torch.equal(x, whole[name][..., columns]), name


@pytest.mark.parametrize(("op", "gate"), CASES)
@pytest.mark.parametrize(
    ("K", "V", "M"), [(256, 512, 64), (512, 513, 300), pytest.param(512, 4096, 512, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", ["cpu", "reference", "auto"])
def test_step(op, gate, K, V, M, name):
    tokens, states = inputs(op, gate, K, V, T=1, M=M)
    reference = getattr(ik, f"{op}_reference")
    exact, plain = run(reference, tokens, states, wide=torch.float64), run(reference, tokens, states)
    carried = [x.clone() for x in states]
    one = {n: None if x is None else x[:, 0] for n, x in tokens.items()}
    o = getattr(ik, f"{op}_step")(**one, state=carried[0] if len(carried) == 1 else tuple(carried), backend=name)
    assert_good(o, plain["o"][:, 0], exact["o"][:, 0], name="o")
    for i, x in enumerate(carried):
        assert_good(x, plain[f"final{i}"], exact[f"final{i}"], name=f"state {i}")


@pytest.mark.parametrize(("op", "gate"), [case for case in CASES if case[1] == "channel"])
def test_compiled(op, gate):
    tokens, states = inputs(op, gate, 264, 300)
    eager = run(getattr(ik, op), tokens, states)
    compiled = run(torch.compile(getattr(ik, op), backend="aot_eager", fullgraph=True), tokens, states)
    for name, x in eager.items():
        assert torch.equal(x, compiled[name]), name


@pytest.mark.parametrize(("op", "gate"), CASES)
@pytest.mark.parametrize(
    ("symbol", "most", "sizes"),
    [("K", MAX_HEAD_DIM, {"V": 4}), ("V", MAX_VALUE_DIM, {"K": 4}), ("M", MAX_HEAD_DIM, {"K": 4, "V": 4})],
)
def test_beyond_the_limits(op, gate, symbol, most, sizes):
    if symbol == "M" and op != "gsa":
        pytest.skip("has no slots")
    tokens, states = inputs(op, gate, T=1, **{**sizes, symbol: most + 1})
    message = f"wanted {symbol} of 1 to {most} per head, got {symbol}={most + 1}"
    with pytest.raises(ValueError, match=message):
        run(getattr(ik, op), tokens, states)
    one = {n: None if x is None else x[:, 0] for n, x in tokens.items()}
    with pytest.raises(ValueError, match=message):
        getattr(ik, f"{op}_step")(**one, state=states[0] if len(states) == 1 else tuple(states))


@pytest.mark.parametrize(
    ("make", "states"),
    [
        (lambda: layers.GLA(1024, num_heads=2), [(2, 256, 512)]),
        (lambda: layers.LinearAttention(512, num_heads=1), [(1, 512, 512)]),
        (lambda: layers.GSA(512, num_heads=1, num_slots=64), [(1, 512, 64), (1, 64, 512)]),
        (lambda: layers.GatedDeltaNet(64, head_dim=256, num_heads=1), [(2, 256, 256)]),
    ],
    ids=["GLA", "LinearAttention", "GSA", "GatedDeltaNet"],
)
def test_layers_with_the_heads_of_default_layers(make, states):
    layer = make()
    x = torch.randn(1, 4, layer.hidden_size, requires_grad=True)
    y, state = layer(x)
    y.sum().backward()
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())
    assert [tuple(s.shape[1:]) for s in state.recurrent] == states
    carried, steps = layer.initial_state(1), []
    with torch.no_grad():
        for t in range(4):
            one, carried = layer.step(x[:, t], carried)
            steps.append(one)
    torch.testing.assert_close(torch.stack(steps, 1), y, rtol=1e-4, atol=1e-5)
    for a, b in zip(carried.recurrent, state.recurrent, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
