"""The environments of OmniRL's table that no sampler makes: each against its rules, and against Gymnasium's own."""

import gymnasium as gym
import numpy as np
import pytest
import torch

from icrl.worlds.grids import dark_room
from icrl.worlds.gymnasium_tables import CLIFF, cliff_walking
from icrl.worlds.pendulum import TORQUES, DiscretePendulum, cell
from icrl.worlds.switch2 import CELLS, HORIZON, Switch2
from icrl.worlds.vector_world import TabularWorld

DOWN, LEFT, UP, RIGHT, STAY = range(5)


# ---- DarkRoom ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 6, 10])
def test_dark_room_is_a_room_with_a_goal(size):
    rooms = dark_room(size, 40, seed=3).validate()
    each = torch.arange(40)
    goal = rooms.terminal.long().argmax(1)
    assert (rooms.terminal.sum(1) == 1).all()
    assert len(goal.unique()) > 1
    assert (rooms.start[each, goal] == 0).all()
    assert torch.allclose(rooms.start.sum(1), torch.ones(40))
    for task in (0, 17):
        for state in range(size * size):
            if state == goal[task]:
                continue
            row, column = divmod(state, size)
            for action, (down, right) in enumerate(((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1))):
                to = min(max(row + down, 0), size - 1) * size + min(max(column + right, 0), size - 1)
                assert rooms.transition[task, state, action, to] == 1
                assert rooms.reward[task, state, action, to] == float(to == goal[task])
    assert (rooms.max_steps == 2 * size * size).all()
    assert torch.equal(dark_room(size, 9, seed=3).terminal, rooms.terminal[:9])
    with pytest.raises(ValueError, match="size"):
        dark_room(1, seed=0)


# ---- CliffWalking --------------------------------------------------------------------------------------------------------


def test_cliff_walking_is_gymnasiums_up_to_the_fall():
    task, env = cliff_walking().validate(), gym.make("CliffWalking-v1").unwrapped
    rows = task.transition.sum(-1)[0]
    assert torch.equal(rows, (~task.terminal[0]).float()[:, None].expand_as(rows))
    for state in range(48):
        if task.terminal[0, state]:
            continue
        for action in range(4):
            ((_, to, reward, end),) = env.P[state][action]
            fell = reward < -50
            to = CLIFF if fell else int(to)
            assert task.transition[0, state, action, to] == 1
            wanted = -1.0 if fell else 1.0 if end else -0.03
            assert task.reward[0, state, action, to] == pytest.approx(wanted)
            assert bool(task.terminal[0, to]) == bool(fell or end)


def test_a_fall_ends_the_episode_and_the_long_way_reaches_the_goal():
    world = TabularWorld(cliff_walking(), seed=0)
    step = world.step(torch.tensor([1]))  # right of the start is the cliff
    assert (step.reward.tolist(), step.done.tolist()) == ([-1.0], [1])
    assert world.observation.tolist() == [36]
    total = 0.0
    for action in [0, *[1] * 11, 2]:
        step = world.step(torch.tensor([action]))
        total += float(step.reward)
    assert step.done.tolist() == [1]
    assert total == pytest.approx(1 - 12 * 0.03)


# ---- Discrete-Pendulum ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("g", [1.0, 5.0, 9.8])
def test_the_pendulum_is_gymnasiums(g):
    world, n = DiscretePendulum(3, g, seed=4), 3
    envs = [gym.make("Pendulum-v1", g=g) for _ in range(n)]
    for i, env in enumerate(envs):
        env.reset(seed=0)
        env.unwrapped.state = np.array([float(world.angle[i]), float(world.speed[i])])
    generator = torch.Generator().manual_seed(1)
    for t in range(200):
        action = torch.randint(5, (n,), generator=generator)
        step = world.step(action)
        for i, env in enumerate(envs):
            seen, reward, terminated, truncated, _ = env.step(np.array([TORQUES[int(action[i])]]))
            assert float(step.reward[i]) == pytest.approx(max(reward / 30 + 0.1, -0.1), abs=1e-6)
            assert (terminated, truncated) == (False, step.done[i] == 2)
            angle = torch.atan2(torch.tensor(float(seen[1])), torch.tensor(float(seen[0])))
            there = cell(torch.tensor(env.unwrapped.state[0]), torch.tensor(env.unwrapped.state[1]))
            assert int(step.following[i]) == int(there)
            assert (
                int(cell(angle + 1e-4, torch.tensor(0.0))) // 5 == int(there) // 5 or abs(float(angle)) % 0.5236 < 1e-3
            )
        assert (step.done == (2 if t == 199 else 0)).all()
    assert (world.speed.abs() <= 1).all()  # a new episode has begun


def test_the_pendulums_cells():
    tau = 2 * torch.pi
    angles = torch.tensor([0.01, tau / 12 + 0.01, -0.01, tau - 0.01, 3 * tau + 0.01], dtype=torch.float64)
    assert (cell(angles, torch.zeros(5)) // 5).tolist() == [0, 1, 11, 11, 0]
    speeds = torch.tensor([-8.0, -4.9, -4.7, 0.0, 4.9, 8.0], dtype=torch.float64)
    assert (cell(torch.zeros(6), speeds) % 5).tolist() == [0, 0, 1, 2, 4, 4]


def test_contexts_of_a_seed_do_not_depend_on_how_many_there_are():
    few, many = DiscretePendulum(2, 5.0, seed=9), DiscretePendulum(7, 5.0, seed=9)
    assert torch.equal(few.angle, many.angle[:2])
    assert len(many.angle.unique()) == 7
    assert not torch.equal(DiscretePendulum(2, 5.0, seed=8).angle, few.angle)


def test_the_pendulums_oracle_swings_up():
    world = DiscretePendulum(16, 9.8, seed=0)
    total = sum(world.step(world.oracle_action()).reward.double() for _ in range(200))
    assert (total > 10).all()  # of at most 20; random actions earn about -10
    assert float(total.mean()) > 15


@pytest.mark.parametrize(
    "action", [torch.tensor([0, 5]), torch.tensor([-1, 0]), torch.zeros(2), torch.zeros(3).long(), [0, 1]]
)
def test_actions_are_judged(action):
    for world in (DiscretePendulum(2, 1.0, seed=0), Switch2(1)):
        with pytest.raises(ValueError, match=r"^action: wanted"):
            world.step(action)


# ---- Switch2 -------------------------------------------------------------------------------------------------------------


def place(row, column):
    return CELLS.index((row, column))


def test_switch2_by_hand():
    world = Switch2(1)
    assert world.cells.tolist() == [[place(0, 1), place(0, 5)]]
    assert world.observation.tolist() == [5 * 15 + place(0, 1), 1 * 15 + place(0, 5)]
    # both start beside a wall
    step = world.step(torch.tensor([RIGHT, LEFT]))
    assert world.cells.tolist() == [[place(0, 1), place(0, 5)]]
    assert step.reward.tolist() == pytest.approx([-0.1, -0.1])
    world.step(torch.tensor([DOWN, DOWN]))
    world.step(torch.tensor([RIGHT, LEFT]))
    assert world.cells.tolist() == [[place(1, 2), place(1, 4)]]
    world.step(torch.tensor([RIGHT, LEFT]))  # agent 0 is first in the middle, agent 1 finds it there
    assert world.cells.tolist() == [[place(1, 3), place(1, 4)]]
    world.step(torch.tensor([RIGHT, RIGHT]))  # agent 0 is blocked still, then agent 1 makes room
    assert world.cells.tolist() == [[place(1, 3), place(1, 5)]]


def test_switch2_pays_each_goal_once_and_ends_when_both_are_home():
    world, got, dones = Switch2(1), [], []
    plan = [(DOWN, STAY), *[(RIGHT, STAY)] * 3]  # agent 0 leaves the corridor below agent 1
    plan += [(RIGHT, STAY), (RIGHT, STAY), (UP, STAY)]
    plan += [(LEFT, DOWN), *[(STAY, LEFT)] * 5, (STAY, UP)]
    for actions in plan:
        step = world.step(torch.tensor(actions))
        got.append(step.reward.tolist())
        dones.append(step.done.tolist())
    assert dones == [[0, 0]] * (len(plan) - 1) + [[1, 1]]
    assert [i for i, (a, _) in enumerate(got) if a == 5] == [6]
    assert [a for a, _ in got[7:]] == [0.0] * 7  # at its goal: no cost, no second reward, no way out
    assert [b for _, b in got] == pytest.approx([-0.1] * 13 + [5.0])
    assert world.cells.tolist() == [[place(0, 1), place(0, 5)]]


def test_switch2_is_truncated_and_its_teams_are_apart():
    world = Switch2(2)
    for t in range(HORIZON):
        step = world.step(torch.tensor([STAY, STAY, DOWN, STAY]))
        assert step.done.tolist() == ([2] * 4 if t + 1 == HORIZON else [0] * 4)
    assert world.elapsed.tolist() == [0, 0]


def test_the_plan_of_switch2_is_the_best():
    world, total = Switch2(1), torch.zeros(2)
    for _ in range(1, HORIZON):
        step = world.step(world.oracle_action())
        total += step.reward
        if step.done.any():
            break
    assert step.done.tolist() == [1, 1]
    # agent 0 needs 7 steps; agent 1 can be in the corridor once agent 0 has left it, or the other way round
    assert float(total.sum()) == pytest.approx(10 - 0.1 * 17, abs=1e-5)


# ---- PettingZoo ----------------------------------------------------------------------------------------------------------


def test_switch2_behind_pettingzoos_parallel_api():
    pytest.importorskip("pettingzoo")
    from pettingzoo.test import parallel_api_test

    from icrl.worlds.switch2_parallel import parallel_switch2

    parallel_api_test(parallel_switch2(), num_cycles=120)
    env, team, generator = parallel_switch2(), Switch2(1), torch.Generator().manual_seed(0)
    with pytest.raises(ValueError, match="call reset first"):
        env.step({"agent_0": 0, "agent_1": 0})
    seen, _ = env.reset(seed=3)
    for _ in range(HORIZON):
        assert list(seen.values()) == team.observation.tolist()
        action = torch.randint(5, (2,), generator=generator)
        seen, rewards, ended, truncated, _ = env.step(dict(zip(env.agents, action.tolist(), strict=True)))
        step = team.step(action)
        assert list(rewards.values()) == pytest.approx(step.reward.tolist())
        assert [a or b for a, b in zip(ended.values(), truncated.values(), strict=True)] == (step.done > 0).tolist()
    assert env.agents == []
    env.reset()
    with pytest.raises(ValueError, match="actions: wanted one of each"):
        env.step({"agent_0": 0})
    with pytest.raises(ValueError, match=r"actions\['agent_1'\]: wanted 0 to 4, got 5"):
        env.step({"agent_0": 0, "agent_1": 5})
