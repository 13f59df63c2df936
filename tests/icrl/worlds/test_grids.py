"""Rooms of cells: DarkRoom by hand, and random rooms as they are described."""

import pytest
import torch

from icrl.worlds.grids import dark_room, sample_grids


def test_a_dark_room_by_hand():
    room = dark_room(3, seed=4)
    transition, reward = room.dense_tables()
    goal = int(room.terminal[0].nonzero())
    for cell in range(9):
        row, column = divmod(cell, 3)
        for action, (down, right) in enumerate([(0, 0), (-1, 0), (1, 0), (0, -1), (0, 1)]):
            r, c = row + down, column + right
            to = 3 * r + c if 0 <= r < 3 and 0 <= c < 3 else cell
            wanted = torch.zeros(9)
            if cell != goal:
                wanted[to] = 1
                assert reward[0, cell, action, to] == float(to == goal)
            assert torch.equal(transition[0, cell, action], wanted)
    assert room.start[0, goal] == 0
    torch.testing.assert_close(room.start[0].sum(), torch.tensor(1.0))
    assert room.max_steps.tolist() == [18]


def test_a_task_is_the_same_in_any_batch():
    many, few = dark_room(5, 20, seed=1), dark_room(5, 3, seed=1)
    assert torch.equal(many.terminal[:3], few.terminal)
    assert len(set(many.terminal.int().argmax(1).tolist())) > 5
    a, b = (sample_grids(n, (9, 30), seed=3, num_observations=40) for n in (12, 4))
    for name in ("num_states", "max_steps"):
        assert torch.equal(getattr(a, name)[:4], getattr(b, name))
    assert torch.equal(a.state_mapping[:4, : b.shape[1]], b.state_mapping[:, : a.shape[1]])


def test_grids_are_tasks():
    n = 300
    tasks = sample_grids(n, (12, 40), seed=5)
    transition, reward = tasks.dense_tables()
    sizes, live = tasks.num_states, tasks.state_mask()
    assert int(sizes.min()) >= 12
    assert int(sizes.max()) <= 40
    total = transition.sum(-1)
    torch.testing.assert_close(total, (live & ~tasks.terminal)[..., None].expand_as(total).float())
    torch.testing.assert_close(tasks.start.sum(1), torch.ones(n))
    assert not bool((tasks.start * tasks.terminal).any())
    pays = (reward == 1).flatten(1).any(1)
    assert bool(pays.all())  # every goal can be entered from a cell beside it that is no end itself
    share = {
        "pits": (tasks.terminal.sum(1) > 1).double().mean(),
        "one start": ((tasks.start > 0).sum(1) == 1).double().mean(),
        "slips": ((transition > 0) & (transition < 0.9)).flatten(1).any(1).double().mean(),
        "costs": (reward == torch.tensor(-0.03)).flatten(1).any(1).double().mean(),
    }
    for name, wanted in {"pits": 0.5, "one start": 0.5, "slips": 0.25, "costs": 0.25}.items():
        assert abs(float(share[name]) - wanted) < 0.1, name
    for i in range(n):
        own = tasks.state_mapping[i, : sizes[i]]
        assert len(set(own.tolist())) == int(sizes[i])


@pytest.mark.parametrize(
    ("call", "what"),
    [
        (lambda: dark_room(1, seed=0), "size: wanted at least 2, got 1"),
        (lambda: sample_grids(2, (3, 9), seed=0), "num_states: wanted at least 4, got 3"),
        (lambda: sample_grids(2, (9, 4), seed=0), "num_states: wanted .low, high. with low"),
        (lambda: sample_grids(2, (4, 9), seed=0, num_observations=8), "num_observations: wanted at least 9, got 8"),
    ],
)
def test_refusals(call, what):
    with pytest.raises(ValueError, match=what):
        call()
