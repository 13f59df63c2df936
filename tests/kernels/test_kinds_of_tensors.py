"""Arrays, lists, sparse, quantised, nested and other tensors that are not dense: one sentence that names the argument."""

import re
import warnings

import numpy as np
import pytest
import torch
from tabular import random_tasks

import icrl_kernels as ik
from icrl_kernels import layers
from icrl_kernels.arguments import number

B, T, H, D = 2, 3, 1, 4
N, S, A = 2, 6, 3


def ops():
    """By name: the function and its arguments, tensors by name."""
    torch.manual_seed(0)
    x, g, state = torch.randn(1, T, H, D), -torch.rand(1, T, H, D), torch.zeros(1, H, D, D)
    one, cu = x[:, 0], torch.tensor([0, T])
    tasks = random_tasks(N, S, A, ragged=False)
    tables = tasks.tables()
    index = torch.zeros(N, 5, dtype=torch.int64)
    policies = torch.zeros(N, 1, S, dtype=torch.int64)
    records = {"task_index": torch.arange(N)}
    start = {"seed": torch.arange(N), "record": torch.arange(N)}
    whole = {"initial_state": state, "cu_seqlens": cu}
    history = {"state": index, "action": index, "reward": torch.zeros(N, 5), "done": index, "next_state": index}
    sizes = {"terminal": tasks.terminal, "num_states": tasks.num_states}
    transition = {"transition": tasks.transition, "reward": tasks.reward}
    b = torch.zeros(1, T, H)
    return {
        "gla": (ik.gla, {"q": x, "k": x, "v": x, "g": g, **whole}),
        "gsa": (ik.gsa, {"q": x, "k": x, "v": x, "s": x, "g": g, "cu_seqlens": cu}),
        "gated_delta_rule": (ik.gated_delta_rule, {"q": x, "k": x, "v": x, "g": g, "beta": b, **whole}),
        "rwkv7": (ik.rwkv7, {"r": x, "w": g, "k": x, "v": x, "a": x, "b": x, **whole}),
        "gla_step": (ik.gla_step, {"q": one, "k": one, "v": one, "g": g[:, 0], "state": state}),
        "rwkv7_step": (
            ik.rwkv7_step,
            {"r": one, "w": g[:, 0], "k": one, "v": one, "a": one, "b": one, "state": state},
        ),
        "pack_transition": (ik.pack_transition, transition),
        "rollout_tables": (ik.rollout_tables, tasks.raw()),
        "rollout_start": (lambda **k: ik.rollout_start(tables, **k), start | records),
        "rollout": (
            lambda **k: ik.rollout(tables, steps=2, **k),
            {"seed": torch.arange(N), "policies": policies, "references": policies, **records},
        ),
        "model_based_q": (lambda **k: ik.model_based_q(num_states=S, num_actions=A, **k), history),
        "value_iteration": (ik.value_iteration, transition | sizes | {"discount": torch.tensor([0.5])}),
    }


OPS = ops()


def others(x):
    """What is no dense tensor, by kind."""
    rows = x if x.dim() < 2 else x[0]
    yield "list", x.tolist()
    yield "sparse coo", x.to_sparse()
    if x.dim() == 2:
        yield "sparse csr", x.to_sparse_csr()
    yield "nested", torch.nested.nested_tensor([rows, rows])
    yield "nested", torch.nested.nested_tensor([rows, rows], layout=torch.jagged)
    if x.is_floating_point():
        yield "quantised", torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)
        yield "mkldnn", x.to_mkldnn()
    yield "object", object()
    yield "ndarray", x.numpy()


@pytest.mark.parametrize(("op", "name"), [(op, name) for op, (_, given) in OPS.items() for name in given])
def test_what_is_no_dense_tensor_is_refused(op, name):
    call, given = OPS[op]
    call(**given)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, that quantised and nested tensors are on their way out
        for kind, value in others(given[name]):
            if kind == "ndarray" and op == "value_iteration":
                continue
            with pytest.raises(ValueError, match=rf"^{name}: wanted ") as error:
                call(**given | {name: value})
            assert re.fullmatch(r"[^\n]{10,160}", str(error.value))
    call(**given)


def test_the_raw_op_refuses_them_too():
    call = torch.ops.icrl.gla
    x = torch.randn(1, T, H, D)
    with pytest.raises(ValueError, match=r"^k: wanted a dense tensor, got a sparse coo one$"):
        call(x, x.to_sparse(), x, None, 1.0, None, None, "auto")
    tables = random_tasks(N, S, A).tables()
    state = ik.rollout_start(tables, seed=0)
    odd = [x.to_sparse() if i == 2 else x for i, x in enumerate(state)]
    nothing = torch.zeros(N, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"^state\[2\]: wanted a dense tensor, got a sparse coo one$"):
        torch.ops.icrl.rollout(*tables, None, None, [], nothing, odd, 1, "auto")


@pytest.mark.parametrize("which", ["tables", "state", "behaviours"])
def test_named_tuples_of_another_kind(which):
    tables = random_tasks(N, S, A).tables()
    state, action = ik.rollout_start(tables, seed=0), torch.zeros(N, dtype=torch.int64)
    behaviours = ik.constant_behaviours(N, 0, {"uniform": 1.0})
    given = {"tables": tables, "state": state, "behaviours": behaviours}
    for value in (3, "x", [1, 2], torch.zeros(3), tuple(given[which])):
        changed = given | {which: value}
        with pytest.raises(ValueError, match=rf"^{which}: wanted [A-Z]"):
            ik.rollout(changed["tables"], steps=1, state=changed["state"], behaviours=changed["behaviours"])
        if which != "behaviours":
            with pytest.raises(ValueError, match=rf"^{which}: wanted [A-Z]"):
                ik.rollout_step(changed["tables"], changed["state"], action)


@pytest.mark.parametrize("backend", [3, None, ["cpu"], b"cpu", torch.zeros(1)])
@pytest.mark.parametrize("op", ["gla", "gla_step", "rwkv7", "rollout", "model_based_q", "value_iteration"])
def test_backends_of_another_type(op, backend):
    call, given = OPS[op]
    if (op, backend) == ("value_iteration", None):
        return
    with pytest.raises(ValueError, match=r"^backend: wanted a name"):
        call(**given, backend=backend)


@pytest.mark.parametrize("scale", ["1", True, [1.0], np.ones(2), torch.ones(2), torch.tensor(True), 1j, 10**400])
@pytest.mark.parametrize("op", ["gla", "gla_step", "gsa", "gated_delta_rule", "rwkv7", "rwkv7_step"])
def test_scales_of_another_type(op, scale):
    call, given = OPS[op]
    with pytest.raises(ValueError, match=r"^scale: wanted a (finite )?number, got "):
        call(**given, scale=scale)


def test_scales_of_any_library():
    call, given = OPS["gla"]
    wanted = call(**given, scale=2.0)[0]
    for scale in (2, np.float32(2), np.int64(2), torch.tensor(2), torch.tensor(2.0), np.array(2.0)):
        assert torch.equal(call(**given, scale=scale)[0], wanted)


def test_value_iteration_takes_numpy():
    call, given = OPS["value_iteration"]
    wanted = call(**given)
    arrays = {name: x.numpy() for name, x in given.items()}
    for a, b in zip(call(**arrays), wanted, strict=True):
        assert isinstance(a, torch.Tensor)
        assert torch.equal(a, b)
    frozen = {name: x.copy() for name, x in arrays.items()}
    for x in frozen.values():
        x.setflags(write=False)
    fortran = {name: np.asfortranarray(x) for name, x in arrays.items()}
    backwards = arrays | {"transition": arrays["transition"][:, :, ::-1][:, :, ::-1]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for other in (frozen, fortran, backwards):
            assert torch.equal(call(**other).q, wanted.q)
    assert torch.equal(call(**given | {"discount": np.float64(0.5)}).q, wanted.q[:, 0])
    assert torch.equal(call(**given | {"discount": torch.tensor(0.5)}).q, wanted.q[:, 0])


@pytest.mark.parametrize(
    "dtype", ["float16", "int64", "bool", "complex64", "O", "U3", "M8[s]", ">f4", "longdouble", "f4,f4"]
)
def test_value_iteration_refuses_arrays_of_other_numbers(dtype):
    call, given = OPS["value_iteration"]
    transition = np.zeros(given["transition"].shape, dtype)
    with pytest.raises(ValueError, match=r"^transition: (wanted|holds|has)"):
        call(**given | {"transition": transition})


@pytest.mark.parametrize("name", ["discount", "tol"])
@pytest.mark.parametrize("value", ["0.5", True, None, [0.5], 1j])
def test_value_iteration_refuses_what_is_no_number(name, value):
    call, given = OPS["value_iteration"]
    with pytest.raises(ValueError, match=rf"^{name}: wanted a number, got "):
        call(**given | {name: value})


@pytest.mark.parametrize("value", ["1", True, None, 1j, np.ones(1), torch.ones(1)])
def test_weights_and_settings_are_numbers(value):
    with pytest.raises(ValueError, match=r"^weights\['uniform'\]: wanted a number"):
        ik.constant_behaviours(2, 0, {"uniform": value})
    with pytest.raises(ValueError, match=r"^epsilon: wanted a number"):
        ik.constant_behaviours(2, 0, {"uniform": 1.0}, epsilon=value)
    with pytest.raises(ValueError, match=r"^expand_v: wanted a number"):
        layers.GLA(32, num_heads=2, expand_v=value)


def test_numbers_of_any_library():
    for value in (2, 2.0, np.float32(2), np.int8(2), torch.tensor(2), torch.tensor(2.0), np.array(2.0)):
        assert type(number("x", value)) is float
        assert number("x", value) == 2.0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_passes_through_tokens_and_no_further(value):
    """NaN and infinity in q, k, v and gates are answered; in tables, rewards and discounts they are refused."""
    for op, names in (("gla", "qkvg"), ("gsa", "qkvsg"), ("gated_delta_rule", "qkv"), ("rwkv7", "rkvab")):
        call, given = OPS[op]
        for name in names:
            if name in "gw" and value > 0:
                continue  # a gate above 0 is refused
            x = given[name].clone()
            x[0, -1] = value
            call(**given | {name: x})
    call, given = OPS["value_iteration"]
    for name in ("transition", "reward", "discount"):
        x = given[name].clone()
        x.view(-1)[0] = value
        with pytest.raises(ValueError, match=rf"^{name}"):
            call(**given | {name: x})
    call, given = OPS["model_based_q"]
    with pytest.raises(ValueError, match=r"^reward"):
        call(**given | {"reward": given["reward"] + value})


LAYERS = [
    layers.GLA(32, num_heads=2),
    layers.GSA(32, num_heads=2),
    layers.GatedDeltaNet(32, head_dim=16, num_heads=2),
    layers.LinearAttention(32, num_heads=2),
    layers.RWKV7(32, head_dim=16),
]


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
@torch.no_grad()
def test_layers_refuse_them_too(layer):
    x, state = torch.randn(2, 5, 32), layer.initial_state(2)
    for _, value in others(x):
        with pytest.raises(ValueError, match=r"^x: wanted "):
            layer(value)
    for _, value in others(x[:, 0]):
        with pytest.raises(ValueError, match=r"^x: wanted "):
            layer.step(value, state)
    for value in (3, "x", (1, 2), torch.zeros(2), tuple(state)):
        with pytest.raises(ValueError, match=r"^state: wanted a State, got "):
            layer(x, value)
        with pytest.raises(ValueError, match=r"^state: wanted a State, got "):
            layer.step(x[:, 0], value)
    for value in (3, None, (None,), (state.recurrent[0].to_sparse(), *state.recurrent[1:])):
        with pytest.raises(ValueError, match=r"^state\.recurrent(\[0\])?: wanted "):
            layer(x, state._replace(recurrent=value))
    for value in ([0, 5], np.array([0, 5]), "x", torch.tensor([0.0, 5.0])):
        with pytest.raises(ValueError, match=r"^cu_seqlens: wanted "):
            layer(x[:1], None, value)
