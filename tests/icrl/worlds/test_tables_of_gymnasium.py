"""`TabularTasks.from_gymnasium`: every entry of env.P is judged, and what the table does not tell is refused by name."""

from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.toy_text.taxi import TaxiEnv

from icrl.worlds import TabularTasks


class Env(gym.Env):
    """Two states: action 0 stays, action 1 moves; state 1 ends."""

    def __init__(self, P=None, start=(1.0, 0.0)):
        go, stay = [(1.0, 1, 1.0, True)], [(0.75, 0, 0.0, False), (0.25, 1, 0.5, True)]
        self.P = {0: {0: stay, 1: go}, 1: {0: [], 1: []}} if P is None else P
        self.initial_state_distrib = start


def read(env):
    return TabularTasks.from_gymnasium(env, max_steps=9)


def changed(outcomes):
    """The environment with other outcomes of state 0 under action 1."""
    P = Env().P
    P[0][1] = outcomes
    return Env(P)


def test_a_table_as_it_should_be():
    task = read(Env())
    assert task.transition[0, 0].tolist() == [[0.75, 0.25], [0.0, 1.0]]
    assert task.reward[0, 0].tolist() == [[0.0, 0.5], [0.0, 1.0]]
    assert task.terminal.tolist() == [[False, True]]
    of_numpy = changed([(np.float64(1), np.int64(1), np.float32(1), np.bool_(True))])
    assert read(of_numpy).transition[0, 0, 1].tolist() == [0.0, 1.0]
    assert read(Env({np.int64(s): row for s, row in Env().P.items()})).shape == (1, 2, 2)


@pytest.mark.parametrize(
    ("outcomes", "named"),
    [
        ([(0.5, 1, 0.0, True)], "sum to 1, got 0.5"),
        ([(0.75, 0, 0.0, False), (0.75, 1, 0.0, True)], "sum to 1, got 1.5"),
        ([(float("nan"), 1, 0.0, True)], "a probability and a finite reward, got nan"),
        ([(-0.5, 0, 0.0, False), (1.5, 1, 0.0, True)], "a probability and a finite reward, got -0.5"),
        ([(1.0, 1, float("nan"), True)], "a finite reward, got 1.0 and nan"),
        ([(1.0, 1, float("inf"), True)], "a finite reward"),
        ([(1.0, 2, 0.0, True)], "wanted 0 to 1, got 2"),
        ([(1.0, -1, 0.0, True)], "wanted 0 to 1, got -1"),
        ([(1.0, 1.0, 0.0, True)], "wanted an integer, got 1.0"),
        ([(1.0, None, 0.0, True)], "wanted an integer, got None"),
        ([("1", 1, 0.0, True)], "wanted a number, got '1'"),
        ([(1.0, 1, None, True)], "wanted a number, got None"),
        ([(1.0, 1, 0.0, 0.5)], "wanted True or False for ended, got 0.5"),
        ([(1.0, 1, 0.0)], r"wanted \(probability, next state, reward, ended\)"),
        ([1.0, 1, 0.0, True], r"wanted \(probability, next state, reward, ended\)"),
        ((1.0, 1, 0.0, True), r"wanted \(probability, next state, reward, ended\)"),
        ({1: 1.0}, "wanted a list of outcomes"),
        (None, "wanted a list of outcomes, got None"),
        ([(0.0, 1, 0.0, True)], "sum to 1, got 0"),
    ],
)
def test_outcomes_are_judged(outcomes, named):
    with pytest.raises(ValueError, match=rf"^env: P\[0\]\[1\].*{named}"):
        read(changed(outcomes))


def without(table, *keys):
    return {k: v for k, v in table.items() if k not in keys}


GOOD = Env().P


@pytest.mark.parametrize(
    ("P", "named"),
    [
        ({}, "P: wanted the states"),
        (without(GOOD, 0), "P: wanted the states 0 to 0 as keys"),
        ({**GOOD, "goal": GOOD[1]}, "P: wanted the states 0 to 2 as keys"),
        ({**GOOD, 1: None}, r"P\[1\]: wanted a dict of actions, got None"),
        ({**GOOD, 1: [[], []]}, r"P\[1\]: wanted a dict of actions"),
        ({**GOOD, 1: {0: [], 3: []}}, r"P: wanted the actions 0 to 2, each in a state"),
        ({**GOOD, 1: {"left": []}}, r"P: wanted the actions 0 to 2, each in a state"),
        ({0: {}, 1: {}}, r"P: wanted the actions 0 to 0, each in a state"),
        ({0: None, 1: None}, r"P\[0\]: wanted a dict of actions"),
        ({0: {0: [], 1: []}, 1: GOOD[1]}, r"P\[0\] has no action with an outcome, and episodes come to state 0"),
        (None, "no transition table"),
        ([GOOD[0], GOOD[1]], "no transition table"),
        (np.zeros((2, 2)), "no transition table"),
    ],
)
def test_nesting_is_judged(P, named):
    env = Env()
    env.P = P
    with pytest.raises(ValueError, match=f"^env: .*{named}"):
        read(env)


@pytest.mark.parametrize(
    "start", [None, (1.0,), (0.5, 0.4), (1.5, -0.5), (float("nan"), 1.0), "start", (0.0, 0.0), [[1.0, 0.0]]]
)
def test_the_start_is_judged(start):
    with pytest.raises(ValueError, match=r"^env: wanted .* in env\.unwrapped\.initial_state_distrib"):
        read(Env(start=start))


@pytest.mark.parametrize("steps", [0, -1, 2.5, True])
def test_the_horizon_is_judged(steps):
    with pytest.raises(ValueError, match="max_steps: wanted"):
        TabularTasks.from_gymnasium(Env(), max_steps=steps)


def taxi(**options):
    return gym.make("Taxi-v4" if "Taxi-v4" in gym.registry else "Taxi-v3", **options)


def has(option):
    return option in TaxiEnv.__init__.__code__.co_varnames


@pytest.mark.skipif(not has("fickle_passenger"), reason="this Gymnasium's Taxi has no fickle passenger")
def test_a_fickle_taxi_is_refused():
    with pytest.raises(ValueError, match=r"^env: .*fickle_passenger=True"):
        TabularTasks.from_gymnasium(taxi(fickle_passenger=True))
    rainy = TabularTasks.from_gymnasium(taxi(is_rainy=True))  # whose drift the table holds
    assert int(rainy.num_successors().max()) > int(TabularTasks.from_gymnasium(taxi()).num_successors().max()) == 1


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda env: gym.wrappers.TransformReward(env, lambda r: 2 * r),
        lambda env: gym.wrappers.NormalizeReward(env),
        lambda env: gym.wrappers.StickyAction(env, 0.25),
        lambda env: gym.wrappers.TransformObservation(env, lambda o: o, env.observation_space),
        lambda env: gym.wrappers.RecordEpisodeStatistics(gym.wrappers.TransformReward(env, abs)),
    ],
)
def test_wrappers_that_change_what_the_table_holds(wrapped):
    with pytest.raises(ValueError, match=r"^env: .* changes what the table"):
        TabularTasks.from_gymnasium(wrapped(gym.make("FrozenLake-v1")))


def test_other_wrappers_are_read_through():
    plain = gym.make("FrozenLake-v1")
    watched = gym.wrappers.TimeLimit(gym.wrappers.RecordEpisodeStatistics(plain), 7)
    assert TabularTasks.from_gymnasium(watched).max_steps.tolist() == [7]


def test_what_is_no_environment():
    with pytest.raises(ValueError, match=r"^env: .* no transition table"):
        TabularTasks.from_gymnasium(SimpleNamespace(P={}), 3)
