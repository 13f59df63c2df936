"""What each op refuses when it is called itself: every argument, malformed in every way, on every backend of a CPU.

A case that is not refused would read or write foreign memory: where it fails, the process may crash.
"""

import importlib
import re

import pytest
import torch
from tabular import random_tasks

from icrl_kernels import (
    PackedTransition,
    RolloutState,
    RolloutTables,
    constant_behaviours,
    model_based_q,
    pack_transition,
    rollout,
    rollout_reference,
    rollout_start,
    rollout_step,
    rollout_tables,
    value_iteration,
)
from icrl_kernels.tabular.anymdp import sample_anymdp_tables, sample_anymdp_windows
from icrl_kernels.tabular.behaviours import Behaviours
from icrl_kernels.tabular.emission import draw_tokens

N, S, A, T = 4, 8, 3, 12
HUGE = 2**62


def malformed(tensor, *, strides=False, allowed=()):
    """Other shapes, dtypes and devices than the tensor's; with `strides` other layouts."""
    yield tensor.new_zeros(0)
    yield tensor.new_zeros(())
    yield tensor[None]
    if tensor.dim() > 1:
        yield tensor.flatten(0, 1)
        yield tensor[..., : tensor.shape[-1] // 2].contiguous()
    for dtype in (torch.float16, torch.float64, torch.int8, torch.int64):
        if dtype != tensor.dtype and dtype not in allowed:
            yield tensor.to(dtype)
    yield tensor.to("meta")
    if strides:
        yield torch.stack([tensor, tensor], -1)[..., 0]
        if tensor.dim() > 1:
            yield tensor[:1].expand(tensor.shape)


def everywhere(tensor, *values):
    return [torch.full_like(tensor, value) for value in values]


def refuses(op, arguments, cases, backends):
    """cases: (what the message must name, index or (index, index of a list), values)."""
    given = arguments()
    for backend in backends:
        for name, where, values in cases:
            at, inner = where if isinstance(where, tuple) else (where, None)
            for value in values:
                changed = [list(x) if isinstance(x, list) else x for x in given]
                if inner is None:
                    changed[at] = value
                else:
                    changed[at][inner] = value
                what = (name, value.shape, value.dtype) if isinstance(value, torch.Tensor) else (name, value)
                try:
                    op(*changed, backend)
                except ValueError as error:
                    assert re.search(name, str(error)), (what, str(error))  # noqa: PT017
                else:
                    pytest.fail(f"accepted: {what}")


# ---- value_iteration -------------------------------------------------------------------------------------------------


def dense_arguments():
    tasks = random_tasks(N, S, A, ragged=False)
    return [tasks.transition, tasks.reward, [], torch.tensor([0.5]), tasks.terminal, tasks.num_states, 1e-6, "auto"]


def packed_arguments():
    tasks = random_tasks(N, S, A, ragged=False)
    packed, reward = pack_transition(tasks.transition, tasks.reward)
    return [packed[0], reward, list(packed[1:]), *dense_arguments()[3:]]


@pytest.mark.parametrize("backend", ["cpu", "reference", "triton", "auto"])
def test_value_iteration(backend):
    if backend == "triton":
        pytest.importorskip("triton")
    op = torch.ops.icrl.value_iteration
    t, r, _, gamma, terminal, sizes, *_ = dense_arguments()
    p, packed_r, windows, *_ = packed_arguments()
    others = [
        ("discount", 3, [x for x in malformed(gamma, allowed=[torch.float64]) if x.dim() != 2 and x.shape != (0,)]),
        ("discount", 3, [torch.tensor([x]) for x in (-0.1, 1.1, torch.nan, torch.inf)]),
        ("discount", 3, [gamma.clone().requires_grad_()]),
        ("terminal", 4, malformed(terminal)),
        ("num_states", 5, [x for x in malformed(sizes)]),
        ("num_states", 5, everywhere(sizes, 0, -1, S + 1, HUGE, -HUGE)),
        ("tol", 6, [0.0, -1.0, torch.nan]),
        ("method", 7, ["", "magic"]),
        ("windows", 2, [windows[:1], [*windows, windows[0]]]),
    ]
    refuses(
        op, dense_arguments, [("transition|reward", i, malformed(x)) for i, x in ((0, t), (1, r))] + others, [backend]
    )
    named = [("offset|transition", (2, 0)), ("first|transition", (2, 1)), ("length|transition", (2, 2))]
    shapes = [(name, at, list(malformed(windows[at[1]]))) for name, at in named]
    values = [("transition", at, everywhere(windows[at[1]], -1, 2**30, -(2**30))) for _, at in named]
    tables = [("probability|transition|reward", i, malformed(x)) for i, x in ((0, p), (1, packed_r))]
    refuses(op, packed_arguments, [*tables, *shapes, *values, *others[:-1]], [backend])
    refuses(op, packed_arguments, [("transition", (2, 0), everywhere(windows[0], HUGE, -HUGE, len(p)))], [backend])


# ---- rollout ---------------------------------------------------------------------------------------------------------

EVERYONE = {0: 1.0, "uniform": 1.0, "random_policy": 1.0, "q_learning": 1.0, "model_based": 1.0}


def tables_of(n=N):
    return rollout_tables(**random_tasks(n, S, A, ragged=False).raw())


def rollout_arguments(choices=True, actions=False, steps=T):
    tables, b = tables_of(), constant_behaviours(N, 1, EVERYONE, switch=0.5)
    policies = torch.zeros(N, 1, S, dtype=torch.int16) if choices else torch.full((N, 1, S, A), 2.0)
    outside = torch.zeros(N, steps, dtype=torch.int64)
    state = list(rollout_start(tables, seed=0, behaviours=b))
    references = torch.zeros(N, S, 2, dtype=torch.int16)
    who = (None, references, [], outside) if actions else (policies, references, list(b), None)
    return [*tables, *who, state, steps]


BEYOND = {
    "cumulative": (0.0, -1.0),
    "offset": (-1, HUGE, -HUGE, 2**20),
    "window": (-1, -5, 0, S, 32767, -32768),
    "start": (0.0, torch.nan, 1.0),
    "max_steps": (0, -1, -HUGE),
    "num_states": (0, -1, S + 1, HUGE),
    "num_actions": (0, -1, A + 1, HUGE),
    "task": (-1, N, HUGE, -HUGE),
    "step": (-1, 2**56, HUGE, -HUGE),
    "state": (-2, S, HUGE, -HUGE),
    "elapsed": (-1, HUGE, -HUGE),
    "behaviour": (-2, 5, HUGE, -HUGE),
    "span": (-1, S + 1, 32767, -32768),
}
OF_BEHAVIOURS = {
    "switch": (-0.1, 1.1, torch.nan),
    "epsilon": (-0.1, 1.1, torch.nan),
    "q_discount": (1.0, -1.0, torch.nan),
    "model_discount": (1.0, -1.0, torch.nan),
}


@pytest.mark.parametrize("backend", ["cpu", "plain", "auto"])
@pytest.mark.parametrize("steps", [1, T])
@pytest.mark.parametrize("source", ["choices", "probabilities", "actions"])
def test_rollout(backend, steps, source):
    def arguments():
        return rollout_arguments(source == "choices", source == "actions", steps)

    given = arguments()
    cases = []
    for i, name in enumerate(RolloutTables._fields):
        cases.append((name if i else "tables", i, list(malformed(given[i], strides=True))))
        cases.append(
            (
                "window|offset|start|cumulative|state|max_steps|num_|policies",
                i,
                everywhere(given[i], *BEYOND.get(name, ())),
            )
        )
    for i, name in enumerate(RolloutState._fields):
        shapes = [
            x for x in malformed(given[15][i], strides=True) if i < 7 or x.numel() or x.dtype != given[15][i].dtype
        ]
        cases.append(("state", (15, i), [x for x in shapes if i or x.shape != (0,)]))
        if name not in ("behaviour", "span") or source != "actions":
            cases.append(("state|task_index", (15, i), everywhere(given[15][i], *BEYOND.get(name, ()))))
    for i, name in enumerate(Behaviours._fields):
        if source != "actions":
            cases.append((name, (13, i), list(malformed(given[13][i], strides=True))))
            values = OF_BEHAVIOURS.get(name, (-1.0, torch.nan, torch.inf))
            cases.append((name, (13, i), everywhere(given[13][i], *values)))
    cases += [
        (
            "references",
            12,
            [x for x in malformed(given[12]) if x.dtype != torch.int16 or x.shape[:2] != (N, S) or x.is_meta],
        ),
        ("steps|action", 16, [-1, -HUGE, HUGE, 2**63 - 1]),
        ("state", 15, [given[15][:-1], [*given[15], given[15][0]], []]),
    ]
    if source == "actions":
        cases.append(("action", 14, list(malformed(given[14]))))
        cases.append(("action", 14, everywhere(given[14], -1, A, HUGE, -HUGE)))
        cases.append(("behaviours, actions", 14, [None]))
    else:
        cases.append(("policies", 11, list(malformed(given[11]))))
        wrong = (-1, A, 32767, -32768) if source == "choices" else (0.0, -1.0, torch.nan, 1.0)
        cases.append(("policies", 11, everywhere(given[11], *wrong)))
        cases.append(("policies", 11, [given[11][:, :1].expand(-1, 252, *given[11].shape[2:])]))
        cases.append(("behaviours", 13, [given[13][:-1], [*given[13], given[13][0]], []]))
        for i in range(7, 14):  # a learner's tensors are missing
            cases.append(("started without", (15, i), [given[15][i].new_zeros(0)]))
    refuses(torch.ops.icrl.rollout, arguments, cases, [backend])


def test_a_learner_that_the_behaviours_do_not_know():
    tables = tables_of()
    for used, other in (("q_learning", 3), ("model_based", 2)):
        b = constant_behaviours(N, 0, {used: 1.0})
        state = rollout_start(
            tables, seed=0, behaviours=constant_behaviours(N, 0, {"q_learning": 1.0, "model_based": 1.0})
        )
        state.behaviour.fill_(other), state.state.fill_(0)
        with pytest.raises(ValueError, match=r"state\.behaviour\[0\]"):
            rollout(tables, steps=5, state=state, behaviours=b)


def test_rollout_step():
    tables = tables_of()
    state, action = rollout_start(tables, seed=0), torch.zeros(N, dtype=torch.int64)
    for name in RolloutTables._fields:
        given = getattr(tables, name)
        for value in [*malformed(given, strides=True), *everywhere(given, *BEYOND.get(name, ()))]:
            if (
                name == "cumulative"
                and value.shape == given.shape
                and value.dtype == given.dtype
                and value.is_contiguous()
            ):
                continue
            with pytest.raises(ValueError, match=r"tables|window|start|num_|max_steps|state|action"):
                rollout_step(tables._replace(**{name: value}), RolloutState(*(t.clone() for t in state)), action)
    for name in RolloutState._fields[:7]:
        given = getattr(state, name)
        for value in [*malformed(given, strides=True), *everywhere(given, *BEYOND.get(name, ()))]:
            if (
                name == "behaviour"
                and value.dtype == given.dtype
                and value.shape == given.shape
                and value.is_contiguous()
            ):
                continue
            with pytest.raises(ValueError, match=r"state|task_index|action"):
                rollout_step(tables, state._replace(**{name: value}), action)
    for value in [*malformed(action), *everywhere(action, -1, A, HUGE, -HUGE)]:
        with pytest.raises(ValueError, match="action"):
            rollout_step(tables, state, value)
    assert rollout_step(tables, state, torch.stack([action, action], 1)[:, 0])[0].isfinite().all()


def test_a_refused_step_changes_nothing():
    tables = tables_of()
    state = rollout_start(tables, seed=0)
    before = [t.clone() for t in state]
    with pytest.raises(ValueError, match="action of record 3"):
        rollout_step(tables, state, torch.tensor([0, 0, 0, A]))
    assert all(torch.equal(x, y) for x, y in zip(state, before, strict=True))


@pytest.mark.parametrize("field", ["window", "offset", "task", "action", "choice", "span"])
def test_what_a_gpu_gives_where_it_cannot_refuse(field):
    """The GPU's code on the CPU: the record that meets it is spoilt and stays, the others are as ever."""
    module = importlib.import_module("icrl_kernels.tabular.rollout")
    arguments = rollout_arguments(choices=True, actions=field == "action")
    good = torch.ops.icrl.rollout(*rollout_arguments(choices=True, actions=field == "action"), "plain")
    bad = 2
    if field in ("window", "offset"):
        i = RolloutTables._fields.index(field)
        arguments[i] = arguments[i].clone()
        arguments[i][bad] = 32767
    elif field == "choice":
        arguments[13] = list(constant_behaviours(N, 1, {0: 1.0}))
        arguments[11][bad] = A
        good = None
    elif field == "action":
        arguments[14][bad, 5] = -HUGE
    else:
        arguments[15][RolloutState._fields.index(field)][bad] = -5
    state = [t.clone() for t in arguments[15][:7]]
    out = module._host(module.SPOIL)(module._check(*arguments), *arguments)
    others = torch.arange(N) != bad
    assert out[2][bad].isnan().all()
    for i, value in {0: -1, 1: -1, 3: 0, 4: 255, 5: -1, 6: -1}.items():
        assert (out[i][bad] == value).all()
    assert all(torch.equal(x[bad], y[bad]) for x, y in zip(arguments[15][:7], state, strict=True))
    assert out[2][others].isfinite().all()
    if good is not None:
        assert all(torch.equal(x[others], y[others]) for x, y in zip(out, good, strict=True))


def test_rollout_start():
    tables = tables_of()
    for name, given in (("task_index", torch.arange(N)), ("record", torch.arange(N)), ("seed", torch.arange(N))):
        for value in malformed(given):
            if name == "task_index" and value.shape == (0,):
                continue  # no records
            if name == "seed" and not value.dim() and value.dtype == torch.int64:
                continue  # an integer
            with pytest.raises(ValueError, match=f"{name}|seed|record"):
                rollout_start(tables, **{"seed": 0, "task_index": torch.arange(N), name: value})
    for value in everywhere(torch.arange(N), -1, N, HUGE, -HUGE):
        with pytest.raises(ValueError, match="task_index"):
            rollout_start(tables, seed=0, task_index=value)
    b = constant_behaviours(N, 0, {"uniform": 1.0})
    for name in ("initial", "later"):
        for value in (b.initial[:1], b.initial[:, :3], b.initial[0]):
            with pytest.raises(ValueError, match=name):
                rollout_start(tables, seed=0, behaviours=b._replace(**{name: value}))
    with pytest.raises(ValueError, match=r"tables\.offset"):
        rollout_start(tables._replace(offset=tables.offset[0]), seed=0)


def test_rollout_reference():
    tasks = random_tasks(N, S, A, ragged=False).raw()
    index = torch.arange(N)
    given = {"seed": index, "record": index, "task_index": index, "policies": torch.full((N, 1, S, A), 1 / A)}
    given |= {"actions": torch.zeros(N, T, dtype=torch.int64)}
    for name, tensor in given.items():
        for value in malformed(tensor):
            with pytest.raises(ValueError, match=r"seed|record|task_index|policies|actions"):
                rollout_reference(**tasks, **{**given, name: value}, steps=T)
    for name, values in (("task_index", (-1, N, HUGE)), ("actions", (-1, A, HUGE))):
        for value in everywhere(given[name], *values):
            with pytest.raises(ValueError, match=name):
                rollout_reference(**tasks, **{**given, name: value}, steps=T)
    for name, tensor in tasks.items():
        for value in malformed(tensor):
            with pytest.raises(ValueError, match=r"wanted|is on"):
                rollout_reference(**{**tasks, name: value}, **given, steps=T)
    for steps in (-1, T + 1):
        with pytest.raises(ValueError, match=r"steps|actions"):
            rollout_reference(**tasks, **given, steps=steps)


# ---- model_based_q ---------------------------------------------------------------------------------------------------


def history():
    g = torch.Generator().manual_seed(0)
    state, action = torch.randint(S, (N, T), generator=g), torch.randint(A, (N, T), generator=g)
    done = torch.randint(3, (N, T), generator=g)
    return [state, action, torch.randn(N, T, generator=g), done, state.flip(1), S, A, 0.2, 0.9, 2]


@pytest.mark.parametrize("backend", ["cpu", "plain", "reference", "auto"])
def test_model_based_q(backend):
    names = ("state", "action", "reward", "done", "next_state")
    given = history()
    cases = []
    for i, (name, most) in enumerate(zip(names, (S, A, None, 3, S), strict=True)):
        cases.append((f"{name}|action", i, [x for x in malformed(given[i])]))
        values = (torch.nan, torch.inf, -torch.inf) if most is None else (-1, most, HUGE, -HUGE)
        cases.append((name, i, everywhere(given[i], *values)))
    cases += [
        ("num_states", 5, [0, -1, -HUGE, 32768, HUGE, 2**63 - 1]),
        ("num_actions", 6, [0, -1, -HUGE, 2**57, HUGE, 2**63 - 1]),
        ("bonus", 7, [-1.0, torch.nan, torch.inf]),
        ("discount", 8, [-0.1, 1.0, torch.nan, torch.inf]),
        ("sweeps", 9, [0, -1, -HUGE, HUGE, 2**63 - 1]),
        ("reward", 2, [given[2].clone().requires_grad_()]),
    ]
    refuses(torch.ops.icrl.model_based_q, history, cases, [backend])


def test_what_model_based_q_gives_where_it_cannot_refuse():
    """The code of the GPU, called past the check: NaN from the first step on that is out of range."""
    module = importlib.import_module("icrl_kernels.tabular.model_based")
    good = torch.ops.icrl.model_based_q(*history(), "plain")
    for i, value in ((0, S), (0, -HUGE), (1, A), (1, HUGE), (3, 3), (3, -1), (4, S), (4, -1), (4, -2)):
        for plain in (True, False):
            arguments = history()
            arguments[i][1, 5] = value
            q = module._host(plain)(None, *arguments)
            assert q[1, 5:].isnan().all()
            assert torch.equal(q[1, :5], good[1, :5])
            assert torch.equal(q[torch.arange(N) != 1], good[torch.arange(N) != 1])


# ---- functions that hand pointers to C++ ------------------------------------------------------------------------------


def test_pack_and_unpack():
    t = random_tasks(N, S, A, ragged=False).transition
    for value in malformed(t):
        if value.dim() != 4 or value.dtype not in (torch.float32, torch.float64) or value.shape[1] != value.shape[3]:
            with pytest.raises(ValueError, match="transition"):
                pack_transition(value)
    for value in malformed(t):
        with pytest.raises(ValueError, match="reward"):
            pack_transition(t, value)
    packed = pack_transition(t)
    assert all(
        torch.equal(x, y)
        for x, y in zip(pack_transition(t.transpose(1, 3).contiguous().transpose(1, 3)), packed, strict=True)
    )
    for name in PackedTransition._fields:
        given = getattr(packed, name)
        for value in malformed(given):
            bad = packed._replace(**{name: value})
            if (
                name == "probability"
                and value.dim() == 1
                and value.is_floating_point()
                and value.dtype == torch.float64
            ):
                continue
            for call in (bad.check_shapes, bad.check, bad.unpack):
                if call == bad.check_shapes and value.shape == (0,) and name == "probability":
                    continue
                with pytest.raises(ValueError, match=r"probability|offset|first|length|transition"):
                    call()
        if name != "probability":
            for value in everywhere(given, -1, 2**30, -(2**30)):
                for call in (packed._replace(**{name: value}).check, packed._replace(**{name: value}).unpack):
                    with pytest.raises(ValueError, match="windows"):
                        call()
    with pytest.raises(ValueError, match="windows"):
        packed._replace(offset=torch.full_like(packed.offset, HUGE)).unpack()


def test_draw_tokens():
    emission = torch.full((N, 2, S, 5), 0.2)
    index = torch.zeros(6, dtype=torch.int64)
    given = {"emission": emission, "task": index, "state": index, "key": index}
    for name, tensor in given.items():
        for value in malformed(tensor):
            if name == "emission" and value.dim() == 4 and value.dtype == torch.float32 and not value.is_meta:
                continue  # fewer ids
            with pytest.raises(ValueError, match=r"emission|task|state|key"):
                draw_tokens(**{**given, name: value})
    for name, values in (("task", (-1, N, HUGE, -HUGE)), ("state", (-2, S, HUGE, -HUGE))):
        for value in everywhere(index, *values):
            with pytest.raises(ValueError, match=name):
                draw_tokens(**{**given, name: value})
    assert draw_tokens(torch.full_like(emission, torch.nan), index, index, index).shape == (6, 2)
    assert draw_tokens(emission[:, :0], index, index, index).shape == (6, 0)


def test_sample_anymdp():
    def given(tables):
        f = {"dtype": torch.float32}
        parts = {"keys": torch.arange(2), "num_states": torch.full((2,), 8)}
        if tables:
            parts |= {"transition": torch.zeros(2, 8, 2, 8, **f), "reward": torch.zeros(2, 8, 2, 8, **f)}
        return parts | {
            "noise_state": torch.zeros(2, 8, **f),
            "noise_action": torch.zeros(2, 8, 2, **f),
            "start": torch.zeros(2, 8, **f),
            "terminal": torch.zeros(2, 8, dtype=torch.bool),
            "state_mapping": torch.full((2, 8), -1),
            "max_steps": torch.zeros(2, dtype=torch.int64),
        }

    sizes = {"num_observations": 8, "max_attempts": 1000}
    for sample, tables in ((sample_anymdp_tables, True), (sample_anymdp_windows, False)):
        for name, tensor in given(tables).items():
            for value in malformed(tensor, strides=True):
                with pytest.raises(ValueError, match="wanted"):
                    sample(**{**given(tables), name: value}, **sizes)
        for value in everywhere(torch.arange(2), 7, 9, -1, HUGE, -HUGE):
            with pytest.raises(ValueError, match="num_states"):
                sample(**{**given(tables), "num_states": value}, **sizes)
        for name, values in (("num_observations", (7, -1, HUGE, -HUGE)), ("max_attempts", (0, -1, HUGE + 1))):
            for value in values:
                with pytest.raises(ValueError, match=name):
                    sample(**given(tables), **{**sizes, name: value})


# ---- backends, defaults ------------------------------------------------------------------------------------------------


def test_backends_that_do_not_serve_a_cpu():
    calls = {"value_iteration": dense_arguments, "rollout": rollout_arguments, "model_based_q": history}
    for name, arguments in calls.items():
        for backend in ("cuda", "nonsense", ""):
            with pytest.raises(ValueError, match=f"backend.*{name}"):
                getattr(torch.ops.icrl, name)(*arguments(), backend)


def answers():
    tasks = random_tasks(N, S, A, ragged=False)
    tables = rollout_tables(**tasks.raw())
    state = rollout_start(tables, seed=1)
    run = rollout(tables, steps=5, seed=0, behaviours=constant_behaviours(N, 0, {"uniform": 1.0, "model_based": 1.0}))
    yield from (
        *tables,
        *run[:-1],
        *run.final,
        *rollout_step(tables, state, torch.zeros(N, dtype=torch.int64, device="cpu")),
    )
    yield from value_iteration(tasks.transition, tasks.reward, 0.5)
    yield from (*pack_transition(tasks.transition), pack_transition(tasks.transition).unpack())
    for backend in ("cpu", "plain", "reference"):
        yield model_based_q(*GIVEN[:4], S, A, backend=backend)
    yield draw_tokens(GIVEN[4], *GIVEN[5:])


GIVEN = [*history()[:4], torch.full((N, 2, S, 5), 0.2), *(torch.arange(N) for _ in range(3))]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_default_dtype_changes_nothing(dtype, monkeypatch):
    tasks = random_tasks(N, S, A, ragged=False)
    monkeypatch.setitem(globals(), "random_tasks", lambda *_, **__: tasks)
    want = list(answers())
    torch.set_default_dtype(dtype)
    try:
        got = list(answers())
    finally:
        torch.set_default_dtype(torch.float32)
    for x, y in zip(got, want, strict=True):
        assert x.dtype == y.dtype
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


def test_default_device_changes_nothing(monkeypatch):
    tasks = random_tasks(N, S, A, ragged=False)
    monkeypatch.setitem(globals(), "random_tasks", lambda *_, **__: tasks)
    want = list(answers())
    torch.set_default_device("meta")
    try:
        got = list(answers())
    finally:
        torch.set_default_device(None)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)
