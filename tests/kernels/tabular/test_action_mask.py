"""Actions that a state does not have: value_iteration, rollout and the learners."""

import importlib
import itertools

import pytest
import torch
from test_value_iteration import banded, garnet

from icrl_kernels import PackedTransition, model_based_q, pack_transition, value_iteration
from icrl_kernels.testing import error

GAMMAS = torch.tensor([0.0, 0.6, 0.97], dtype=torch.float64)


def random_mask(n, s, a, seed=0, ends=0):
    """About half of the actions; at least one in each state but the last `ends`, which have none."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(n, s, a, generator=g) < 0.5
    mask |= torch.nn.functional.one_hot(torch.randint(a, (n, s), generator=g), a).bool()
    mask[:, s - ends :] = False
    return mask


def masked_task(n, s, a, seed=0, dtype=torch.float64, ends=1):
    t, r = banded(n, s, a, seed=seed, dtype=dtype, ends=ends)
    return t, r, random_mask(n, s, a, seed=seed, ends=ends)


def best_values(t, r, mask, gamma):
    """Q* over the actions that the states have, by value iteration that never looks at another."""
    t, r = t.double(), r.double()
    mean = (t * torch.where(t > 0, r, 0)).sum(-1) if r.dim() == 4 else r
    has = mask | ~mask.any(-1, keepdim=True)
    mean = torch.where(mask.any(-1, keepdim=True), mean, 0)
    q = torch.zeros_like(mean)
    for _ in range(1 if gamma == 0 else int(32 / (1 - gamma))):
        q = mean + gamma * torch.einsum("nsaj,nj->nsa", t, q.masked_fill(~has, -torch.inf).amax(-1))
    return q.masked_fill(~has, -torch.inf)


def spoilt(t, r, mask):
    """The same tables with NaN at what no state has."""
    missing = (~mask & mask.any(-1, keepdim=True))[..., None]
    return t.masked_fill(missing, torch.nan), r.masked_fill(missing if r.dim() == 4 else missing[..., 0], torch.nan)


def check(t, r, mask, gammas=GAMMAS, **options):
    got = value_iteration(t, r, gammas, action_mask=mask, **options)
    missing = ~mask & mask.any(-1, keepdim=True)
    assert torch.equal(got.q == -torch.inf, missing[:, None].expand_as(got.q))
    assert torch.equal(got.v, got.q.amax(-1))
    assert torch.equal(got.policy, got.q.argmax(-1))
    return got


def assert_right(got, t, r, mask, gammas=GAMMAS):
    for g, gamma in enumerate(gammas.tolist()):
        want = best_values(t, r, mask, gamma)
        error = torch.where(want == -torch.inf, 0, (got.q[:, g] - want).abs()).amax((1, 2))
        assert (error <= got.error_bound[:, g] + 1e-11).all()
        assert ((got.v[:, g] - want.amax(-1)).abs().amax(1) <= got.error_bound[:, g] + 1e-11).all()


@pytest.mark.parametrize("s", [1, 2, 9, 40, 130])
@pytest.mark.parametrize("method", ["policy_iteration", "value_iteration", "modified_policy_iteration"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_values(s, method, backend):
    if s > 40 and backend == "reference":
        pytest.skip("the specification is slow there")
    ends = min(1, s - 1)
    t, r, mask = masked_task(3, s, 5, seed=s, ends=ends)
    got = check(*spoilt(t, r, mask), mask, method=method, backend=backend)
    assert (got.error_bound <= 1e-6).all()
    assert_right(got, t, r, mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("by_successor", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_forms_of_tables(dtype, by_successor, packed):
    t, r, mask = masked_task(4, 12, 4, dtype=dtype)
    if not by_successor:
        r = (t * r).sum(-1)
    tables = spoilt(t, r, mask)
    if packed and by_successor:
        tables = pack_transition(*tables)
    elif packed:
        tables = pack_transition(tables[0]), tables[1]
    assert_right(check(*tables, mask), t, r, mask)


def test_a_missing_actions_window_is_not_read():
    t, r, mask = masked_task(2, 10, 4)
    p, reward = pack_transition(t, r)
    missing = ~mask & mask.any(-1, keepdim=True)
    wild = PackedTransition(p.probability, *(x.masked_fill(missing, 2**30) for x in p[1:]))
    want, got = check(p, reward, mask), check(wild, reward, mask)
    assert all(torch.equal(x, y) for x, y in zip(want, got, strict=True))


def test_the_same_as_fewer_actions():
    """Where every state has the first k of the actions, all is as with tables of k actions."""
    t, r = garnet(3, 14, 6, dtype=torch.float64)
    mask = (torch.arange(6) < 4).expand(3, 14, 6)
    for method in ("policy_iteration", "value_iteration", "modified_policy_iteration"):
        want = value_iteration(t[:, :, :4], r[:, :, :4], GAMMAS, method=method)
        got = value_iteration(t, r, GAMMAS, method=method, action_mask=mask)
        torch.testing.assert_close(got.q[..., :4], want.q, rtol=0, atol=2e-12)
        assert torch.equal(got.policy, want.policy)
        assert torch.equal(got.iterations, want.iterations)
        torch.testing.assert_close(got.error_bound, want.error_bound, rtol=1e-6, atol=0)


def test_a_mask_that_lacks_nothing_changes_no_bit():
    t, r = banded(3, 20)
    want = value_iteration(t, r, GAMMAS)
    got = value_iteration(t, r, GAMMAS, action_mask=torch.ones(3, 20, 5, dtype=torch.bool))
    assert all(torch.equal(x, y) for x, y in zip(want, got, strict=True))


def test_undiscounted_costs():
    """Every action costs 1 on the way to the end; ending for nothing is not to be had where it is missing."""
    s = 6
    t, r = torch.zeros(1, s, 2, s, dtype=torch.float64), torch.full((1, s, 2), -1.0, dtype=torch.float64)
    for i in range(s - 1):
        t[0, i, 0, i + 1] = 1
    mask = torch.zeros(1, s, 2, dtype=torch.bool)
    mask[0, : s - 1, 0] = True
    terminal = torch.arange(s)[None] == s - 1
    trap = value_iteration(t, r, 1.0, terminal=terminal)
    assert trap.v[0].tolist() == [-1] * (s - 1) + [0]  # a zero row ends the episode
    for more in ({}, {"terminal": terminal}):
        got = value_iteration(t, r, 1.0, action_mask=mask, **more)
        assert got.v[0].tolist() == [-5, -4, -3, -2, -1, 0]
        assert got.error_bound.item() < 1e-9
        assert got.policy[0, :-1].tolist() == [0] * (s - 1)


def test_terminal_states_and_padding_need_no_action():
    t, r, mask = masked_task(2, 8, 3, ends=1)
    sizes = torch.tensor([6, 8])
    t[0, :6, :, 5], t[0, :, :, 6:], t[0, 5] = t[0, :6, :, 5:].sum(-1), 0, 0
    mask[0, 5:] = False
    plain = value_iteration(t, r, GAMMAS, num_states=sizes, action_mask=mask)
    assert (plain.v[0, :, 5:] == 0).all()
    wrong = t.clone()
    wrong[1, 7], wrong[0, 6:] = torch.nan, torch.nan  # neither is read
    terminal = (torch.arange(8) == 7) | (torch.arange(8) == sizes[:, None] - 1)
    given = value_iteration(wrong, r, GAMMAS, num_states=sizes, terminal=terminal, action_mask=mask)
    assert all(torch.equal(x, y) for x, y in zip(plain, given, strict=True))


@pytest.mark.parametrize("packed", [False, True])
def test_refusals(packed):
    t, r, mask = masked_task(2, 8, 3)
    tables = pack_transition(t, r) if packed else (t, r)
    bare = mask.clone()
    bare[1, 4] = False
    terminal = torch.arange(8).expand(2, 8) == 7
    for more in ({}, {"terminal": terminal}, {"num_states": torch.tensor([8, 8])}):
        with pytest.raises(ValueError, match=r"^action_mask: wanted an action in .* state 4 of task 1"):
            value_iteration(*tables, 0.9, action_mask=bare, **more)
    for wrong in (mask[0], mask[:, :-1], mask.int(), mask.to("meta"), mask[..., :2], mask.tolist()):
        with pytest.raises(ValueError, match=r"^action_mask"):
            value_iteration(*tables, 0.9, action_mask=wrong)
    worse = t.clone()
    worse[1, 2, mask[1, 2].nonzero()[0]] *= 2
    with pytest.raises(ValueError, match=r"^transition"):
        value_iteration(pack_transition(worse) if packed else worse, (t * r).sum(-1), 0.9, action_mask=mask)


def test_gpu_code_on_the_host():
    """The CUDA planner's code, run by coroutines: a mask reaches it as tables like any others."""
    team = importlib.import_module("test_value_iteration_cuda").team
    specification = importlib.import_module("icrl_kernels.tabular.value_iteration_reference")
    t, r, mask = masked_task(2, 9, 4)
    changed, reward, _, missing = specification.without_missing(*spoilt(t, r, mask)[:1], r, [], None, None, mask)
    got, _ = team(changed, reward, GAMMAS)
    q = got.q.masked_fill(missing[:, None], -torch.inf)
    assert_right(got._replace(q=q, v=q.amax(-1)), t, r, mask)


def test_triton():
    triton = importlib.import_module("test_value_iteration_triton")
    t, r, mask = masked_task(2, 9, 4)
    got = triton.solve(*spoilt(t, r, mask), GAMMAS.tolist(), action_mask=mask)
    assert_right(got, t, r, mask)


def test_the_best_of_all_policies():
    """By looking at every policy of a small task."""
    t, r, mask = masked_task(1, 4, 3, ends=0)
    t = t.double()
    mean, gamma = (t * r).sum(-1)[0], 0.8
    got = check(t, r, mask, torch.tensor([gamma], dtype=torch.float64))
    values = []
    for policy in itertools.product(*(mask[0, s].nonzero()[:, 0].tolist() for s in range(4))):
        p, earned = t[0, range(4), policy], mean[range(4), policy]
        values.append(torch.linalg.solve(torch.eye(4, dtype=torch.float64) - gamma * p, earned))
    torch.testing.assert_close(got.v[0, 0], torch.stack(values).amax(0), rtol=0, atol=1e-12)


def history(mask, T=70, seed=0):
    """A history of actions that the states have."""
    R, S, _ = mask.shape
    g = torch.Generator().manual_seed(seed)
    state = torch.randint(S, (R, T), generator=g)
    action = torch.multinomial(mask[torch.arange(R)[:, None], state].float().flatten(0, 1), 1, generator=g).view(R, T)
    return state, action, torch.randn(R, T, generator=g, dtype=torch.float32), torch.randint(3, (R, T), generator=g)


@pytest.mark.parametrize(("s", "a"), [(6, 3), (17, 9)])
def test_model_based_q(s, a):
    mask = random_mask(4, s, a)
    h = history(mask)
    given = (*h, s, a)
    for more in ({}, {"next_state": h[0].flip(1), "sweeps": 3}):
        runs = {x: model_based_q(*given, **more, backend=x, action_mask=mask) for x in ("cpu", "plain", "reference")}
        assert torch.equal(runs["cpu"], runs["plain"])
        missing = ~mask[torch.arange(4)[:, None], h[0]]
        assert torch.equal(runs["cpu"] == -torch.inf, missing)
        assert torch.equal(runs["reference"] == -torch.inf, missing)
        q, want = (runs[x].masked_fill(missing, 0) for x in ("cpu", "reference"))
        assert error(q, want) <= 64 * torch.finfo(torch.float32).eps * (1e-9 + want.norm())
        assert not torch.allclose(q, model_based_q(*given, **more).masked_fill(missing, 0))
        every = torch.ones_like(mask)
        assert torch.equal(model_based_q(*given, **more, action_mask=every), model_based_q(*given, **more))


def test_model_based_q_as_with_fewer_actions():
    mask = (torch.arange(5) < 3).expand(4, 6, 5)
    h = history(mask)
    for backend in ("cpu", "plain", "reference"):
        got = model_based_q(*h, 6, 5, action_mask=mask, backend=backend)
        assert torch.equal(got[..., :3], model_based_q(*h, 6, 3, backend=backend))


def test_model_based_q_refusals():
    mask = random_mask(4, 6, 3)
    state, action, *rest = history(mask)
    for wrong in (mask[:1], mask.int(), mask[..., :2], mask.to("meta")):
        with pytest.raises(ValueError, match=r"^action_mask"):
            model_based_q(state, action, *rest, 6, 3, action_mask=wrong)
    r, s, a = (~mask).nonzero()[0].tolist()
    state[r, 9], action[r, 9] = s, a
    with pytest.raises(
        ValueError, match=rf"^action: in step 9 of record {r} it is {a}, which state {s} does not have$"
    ):
        model_based_q(state, action, *rest, 6, 3, action_mask=mask)
    module = importlib.import_module("icrl_kernels.tabular.model_based")
    for plain in (True, False):  # past the check, as on a GPU
        q = module._host(plain)(None, state, action, *rest, None, 6, 3, 0.2, 0.9, 2, mask)
        assert not q[r, :9].isnan().any()
        assert q[r, 9:].isnan().all()
        assert not q[torch.arange(4) != r].isnan().any()
