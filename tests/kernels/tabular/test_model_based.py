"""The recorded histories' model-based learner against its float64 reference, and refusals."""

import pytest
import torch
from tabular import moved

from icrl_kernels import _C, model_based_q
from icrl_kernels.testing import error


def history(R=5, T=60, S=6, A=3, seed=0, done_at=0.1):
    g = torch.Generator().manual_seed(seed)
    state = torch.randint(0, S, (R, T), generator=g)
    action = torch.randint(0, A, (R, T), generator=g)
    reward = torch.randn(R, T, generator=g)
    done = (torch.rand(R, T, generator=g) < done_at).long() * torch.randint(1, 3, (R, T), generator=g)
    return state, action, reward, done


@pytest.mark.parametrize(("S", "A", "T"), [(6, 3, 60), (1, 1, 5), (17, 2, 40), (4, 2, 1), (3, 2, 0), (30, 11, 50)])
def test_values(S, A, T, device):
    h = history(T=T, S=S, A=A)
    following = torch.randint(0, S, h[0].shape, generator=torch.Generator().manual_seed(1))
    for next_state in (None, following):
        reference = model_based_q(*h, S, A, next_state=next_state, backend="reference")
        plain = model_based_q(*h, S, A, next_state=next_state, backend="plain")
        if device.type == "cuda" and not _C.with_cuda:
            with pytest.raises(ValueError, match=r"backend: model_based_q has none.*ICRL_CUDA=1"):
                model_based_q(*moved(h, device), S, A, next_state=moved(next_state, device))
            continue
        q = model_based_q(*moved(h, device), S, A, next_state=moved(next_state, device)).cpu()
        assert error(q, reference) <= 64 * torch.finfo(torch.float32).eps * (1e-9 + reference.norm())
        assert torch.equal(plain, q)


def test_truncated_steps_count():
    """A bandit ends every episode by truncation: its arms' rewards must be learned all the same."""
    g = torch.Generator().manual_seed(0)
    action = torch.randint(4, (1, 400), generator=g)
    reward = action.float() / 4 + torch.randn(1, 400, generator=g) / 10
    state, done = torch.zeros_like(action), torch.full_like(action, 2)
    for next_state in (None, state):
        q = model_based_q(state, action, reward, done, 1, 4, next_state=next_state)
        assert (q[0, 50:].argmax(1) == 3).all()

    # a step that was cut short and the same step that went on, to the same place, teach the same
    h = history(done_at=0)
    following = h[0].roll(-1, 1)
    whole = model_based_q(*h, 6, 3, next_state=following)
    assert torch.equal(model_based_q(*h[:3], torch.full_like(h[3], 2), 6, 3, next_state=following), whole)


def test_where_no_next_state_is_on_record_the_future_is_optimistic():
    state, action = torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, 3, dtype=torch.int64)
    q = model_based_q(state, action, torch.ones(1, 3), torch.full_like(state, 2), 1, 1, bonus=0.5)
    assert q[0, 2, 0] == pytest.approx(1 + 0.9 * 2 / 0.1 + 0.5 / 2**0.5, rel=1e-5)


def test_causal_and_the_same_for_any_threads():
    h = history()
    q = model_based_q(*h, 6, 3)
    changed = (*h[:2], h[2].clone(), h[3])
    changed[2][:, 30:] += 1
    assert torch.equal(model_based_q(*changed, 6, 3)[:, :31], q[:, :31])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.equal(model_based_q(*h, 6, 3), q)
    finally:
        torch.set_num_threads(threads)


def test_untried_actions_are_optimistic():
    state, action = torch.zeros(1, 40, dtype=torch.int64), torch.zeros(1, 40, dtype=torch.int64)
    q = model_based_q(state, action, torch.ones(1, 40), torch.zeros_like(state), 1, 2)
    assert (q[0, 5:, 1] > q[0, 5:, 0]).all()
    assert q[0, -1, 1] == pytest.approx(2.0 / 0.1, rel=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not _C.with_cuda, reason="built without CUDA")
def test_gpu_indices_out_of_range():
    good = model_based_q(*moved(history(), "cuda"), 6, 3)
    for i, value in ((0, 6), (0, -(2**62)), (1, 3), (1, 2**62), (3, 3)):
        h = history()
        h[i][1, 5] = value
        q = model_based_q(*moved(h, "cuda"), 6, 3)
        assert q[1, 5:].isnan().all()
        before = 4 if i == 0 else 5  # a state is the next state of the step before
        assert torch.equal(q[1, :before], good[1, :before])
        assert torch.equal(q[2:], good[2:])


def test_refusals():
    s, a, r, d = history()
    for bad, name in (
        ((s[:, :-1], a, r, d), "action"),
        ((s, a.int(), r, d), "action"),
        ((s + 6, a, r, d), "state"),
        ((s, a, r * float("nan"), d), "reward"),
        ((s, a, r, d + 3), "done"),
    ):
        with pytest.raises(ValueError, match=name):
            model_based_q(*bad, 6, 3)
    with pytest.raises(ValueError, match="discount"):
        model_based_q(s, a, r, d, 6, 3, discount=1.0)
    with pytest.raises(ValueError, match="no gradient"):
        model_based_q(s, a, r.requires_grad_(), d, 6, 3)
    with pytest.raises(ValueError, match="backend"):
        model_based_q(s, a, r.detach(), d, 6, 3, backend="cuda")


def test_memory_that_is_not_to_be_had():
    """An exception of a thread of the pool reaches the caller. 2**49 bytes of counts: more than addresses reach."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        zeros = torch.zeros(4, 1, dtype=torch.int64)
        with pytest.raises(MemoryError):
            model_based_q(zeros, zeros, torch.zeros(4, 1), zeros, 32767, 2**17)
    finally:
        torch.set_num_threads(before)
