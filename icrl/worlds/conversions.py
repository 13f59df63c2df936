"""Tasks from and to other libraries' forms: xenoverse's dicts, Gymnasium's tables. `TabularTasks` has the methods.

What comes in is a dict of one task's fields by name, as arrays without the batch dimension.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np

from icrl_kernels.arguments import integer, number


def to_xenoverse(task: Any) -> dict[str, Any]:
    """The dict of a dense batch of one task."""
    ns, na, O = int(task.num_states[0]), int(task.num_actions[0]), task.num_observations
    t = task.transition[0, :ns, :na, :ns].double().cpu().numpy()
    start = task.start[0, :ns].double().cpu().numpy()
    s_0 = np.flatnonzero(start)
    noise = task.noise_state[0, None, None, :ns] + task.noise_action[0, :ns, :na, None]
    terminal = task.terminal[0, :ns].cpu().numpy()
    lacks = ~task.available_actions()[0, :ns, :na].all(-1).cpu().numpy() & ~terminal
    if lacks.any():
        raise ValueError(
            f"action_mask: xenoverse's tasks have every action in every state, but state {lacks.argmax()} lacks one"
        )
    ids = task.state_mapping[0, :ns].cpu().numpy()
    out = {
        "ns": O,
        "na": na,
        "max_steps": int(task.max_steps[0]),
        "state_mapping": ids,
        "task_type": "MDP",
        "transition": _normalised(t),
        "reward": task.reward[0, :ns, :na, :ns].double().cpu().numpy(),
        "reward_noise": noise.double().cpu().numpy(),
        "s_0": s_0,
        "s_0_prob": start[s_0] / start[s_0].sum(),
        "s_e": np.flatnonzero(terminal).tolist(),
        "final_goal_terminate": bool(terminal[-1]),
    }
    if task.emission is None and task.action_tokens == 1:
        return out
    if task.emission is None:  # what is seen is the state's id, with certainty
        emission = np.eye(O)[ids][None]
    else:
        emission = _normalised(task.emission[0, :, :ns].double().cpu().numpy())
        out["ns"] = max(ns, int(ids.max()) + 1)
    if len(emission) == 1 and task.action_tokens == 1:
        return out | {"task_type": "POMDP", "no": O, "observation_transition": emission[0]}
    tokens = {"do": len(emission), "da": task.action_tokens}
    return out | {"task_type": "MTPOMDP", "no": O, **tokens, "observation_transition": list(emission)}


def _normalised(rows: np.ndarray) -> np.ndarray:
    mass = rows.sum(-1, keepdims=True)
    return np.divide(rows, mass, out=np.zeros_like(rows), where=mass > 0)


def from_xenoverse(task: dict[str, Any]) -> dict[str, Any]:
    """One task's fields; ValueError where it has no place in them."""
    if not isinstance(task, dict):
        raise ValueError(f"tasks: wanted dicts, got {type(task).__name__}")
    kind = task.get("task_type", "MDP")
    if kind not in ("MDP", "POMDP", "MTPOMDP"):
        raise ValueError(f"task_type: wanted 'MDP', 'POMDP' or 'MTPOMDP', got {kind!r}")
    wanted = {"transition", "reward", "reward_noise", "s_0", "s_0_prob", "s_e", "max_steps", "state_mapping", "ns"}
    wanted |= {"no", "observation_transition"} if kind != "MDP" else set()
    wanted |= {"do", "da"} if kind == "MTPOMDP" else set()
    if lacking := wanted - task.keys():
        raise ValueError(f"tasks: a task_type {kind!r} without {', '.join(sorted(lacking))}")
    t, r = np.asarray(task["transition"], dtype=np.float64), np.asarray(task["reward"], dtype=np.float64)
    if t.ndim != 3 or t.shape[0] != t.shape[2] or r.shape != t.shape:
        raise ValueError(f"transition, reward: wanted [S, A, S] both, got {list(t.shape)} and {list(r.shape)}")
    size = t.shape[0]
    places = {name: np.asarray(task[name]).reshape(-1) for name in ("s_e", "s_0")}
    for name, states in places.items():
        if len(states) and (states.dtype.kind not in "iu" or states.min() < 0 or states.max() >= size):
            raise ValueError(f"{name}: wanted states from 0 to {size - 1}, got {task[name]!s:.80}")
    if np.shape(task["s_0_prob"]) != places["s_0"].shape:
        raise ValueError(f"s_0_prob: wanted a probability of each state in s_0, got {task['s_0_prob']!s:.80}")
    terminal, start = np.zeros(size, dtype=bool), np.zeros(size)
    terminal[places["s_e"].astype(np.int64)] = True
    start[places["s_0"].astype(np.int64)] = task["s_0_prob"]
    noise = np.broadcast_to(np.asarray(task["reward_noise"], dtype=np.float64), t.shape)
    # n(s') + n(s, a): the smallest entry over s' is n(s, a) up to a constant, which belongs to either
    by_action = noise.min(-1)
    by_state = (noise - by_action[..., None]).max((0, 1))
    if not np.allclose(by_state + by_action[..., None], noise, atol=1e-9):
        raise ValueError("reward_noise: is not of the form n(s') + n(s, a)")
    horizon = np.ceil(number("max_steps", task["max_steps"]))  # xenoverse's is a float
    if not 1 <= horizon < 2**62:
        raise ValueError(f"max_steps: wanted a finite number of at least 1, got {task['max_steps']}")
    horizon = int(horizon)
    fields = {
        "transition": np.where(terminal[:, None, None], 0.0, t),
        "reward": r,
        "noise_state": by_state,
        "noise_action": by_action,
        "start": start,
        "terminal": terminal,
        "max_steps": horizon,
        "state_mapping": np.asarray(task["state_mapping"]),
        "num_observations": integer("ns", task["ns"], 1),
    }
    if kind != "MDP":
        emission = np.asarray(task["observation_transition"], dtype=np.float64)
        emission = emission[None] if kind == "POMDP" else emission
        ids = integer("no", task["no"], 1)
        shape = (integer("do", task["do"], 1) if kind == "MTPOMDP" else 1, size, ids)
        if emission.shape != shape:
            raise ValueError(f"observation_transition: wanted shape {list(shape)}, got {list(emission.shape)}")
        tokens = integer("da", task["da"], 1) if kind == "MTPOMDP" else 1
        fields |= {"emission": emission, "action_tokens": tokens, "num_observations": ids}
    return fields


def from_gymnasium(env: Any, max_steps: int | None) -> dict[str, Any]:
    """One task's fields from `env.unwrapped.P`; ValueError where that is no table, or not all that the environment does."""
    _check_told(env)
    spec = getattr(env, "spec", None)
    horizon = max_steps if max_steps is not None else getattr(spec, "max_episode_steps", None)
    if horizon is None:
        raise ValueError("max_steps: the environment has no TimeLimit, so give the horizon")
    horizon = integer("max_steps", horizon, 1)
    ns, na, edges = _outcomes(env.unwrapped.P)
    start = _start(env, ns)
    edges = [e for e in edges if e[2] > 0]
    following: dict[int, set[int]] = {s: set() for s in range(ns)}
    for s, _, _, s2, _, done in edges:
        if not done:
            following[s].add(s2)
    live: set[int] = set()
    frontier = {int(s) for s in np.flatnonzero(start)}
    while frontier:  # rows that no episode reaches (those of ended states) say nothing about ends
        live |= frontier
        frontier = set().union(*(following[s] for s in frontier)) - live
    for s in sorted(live - {e[0] for e in edges}):
        raise ValueError(f"env: P[{s}] has no action with an outcome, and episodes come to state {s}")
    ends = {e[3] for e in edges if e[5] and e[0] in live}
    mixed = sorted(ends & live)
    own: dict[int, int] = {s: ns + k for k, s in enumerate(mixed)}
    terminal_states = [own.get(s, s) for s in ends]
    total = ns + len(mixed)
    t, r = np.zeros((total, na, total)), np.zeros((total, na, total))
    for s, a, p, s2, reward, done in edges:
        target = own.get(s2, s2) if done else s2
        t[s, a, target] += p
        r[s, a, target] += p * reward
    r = np.divide(r, t, out=np.zeros_like(r), where=t > 0)
    t[terminal_states], r[terminal_states] = 0, 0
    terminal = np.zeros(total, dtype=bool)
    terminal[terminal_states] = True
    has = np.zeros((total, na), dtype=bool)
    has[[e[0] for e in edges], [e[1] for e in edges]] = True
    return {
        "transition": t,
        "reward": r,
        "noise_state": np.zeros(total),
        "noise_action": np.zeros((total, na)),
        "start": np.pad(start, (0, total - ns)) / start.sum(),
        "terminal": terminal,
        "max_steps": horizon,
        "state_mapping": np.arange(total),
        "num_observations": total,
        "action_mask": None if has[~terminal].all() else has,
    }


Edge = tuple[
    int, int, float, int, float, bool
]  # state, action, probability, next state, reward, whether the episode ends


def _check_told(env: Any) -> None:
    """ValueError where the environment has no table, or does what its table does not hold."""
    own = getattr(env, "unwrapped", None)
    if not isinstance(getattr(own, "P", None), dict):
        raise ValueError(f"env: {env} has no transition table env.unwrapped.P")
    if getattr(own, "fickle_passenger", False) and getattr(own, "fickle_probability", 1) > 0:
        raise ValueError(
            f"env: {env} has fickle_passenger=True, whose changes of mind are not in the table env.unwrapped.P"
        )
    while isinstance(env, gymnasium.Wrapper):
        if isinstance(env, CHANGES):
            raise ValueError(
                f"env: {type(env).__name__} changes what the table env.unwrapped.P holds; give the environment without it"
            )
        env = env.env


CHANGES = (
    gymnasium.ActionWrapper,
    gymnasium.ObservationWrapper,
    gymnasium.RewardWrapper,
    gymnasium.wrappers.FrameStackObservation,
    gymnasium.wrappers.NormalizeReward,
)


def _outcomes(table: Any) -> tuple[int, int, list[Edge]]:
    """The numbers of states and of actions, and every outcome in a table {state: {action: [(probability, next state, reward,
    ended)]}}, where a state may lack actions; ValueError naming the entry that is not so, or whose probabilities do not sum
    to 1."""
    ns = len(table)
    if not ns or table.keys() != set(range(ns)):
        raise ValueError(f"env: P: wanted the states 0 to {ns - 1} as keys, got {list(table)!s:.80}")
    for s in range(ns):
        if not isinstance(table[s], dict):
            raise ValueError(f"env: P[{s}]: wanted a dict of actions, got {table[s]!r:.80}")
    actions = set().union(*table.values())
    na = len(actions)
    if not na or actions != set(range(na)):
        raise ValueError(
            f"env: P: wanted the actions 0 to {max(na, 1) - 1}, each in a state, got {list(actions)!s:.80}"
        )
    edges: list[Edge] = []
    for s in range(ns):
        for a in table[s]:
            place, total = f"env: P[{s}][{a}]", 0.0
            if not isinstance(table[s][a], (list, tuple)):
                raise ValueError(f"{place}: wanted a list of outcomes, got {table[s][a]!r:.80}")
            for outcome in table[s][a]:
                if not isinstance(outcome, (list, tuple)) or len(outcome) != 4:
                    raise ValueError(f"{place}: wanted (probability, next state, reward, ended), got {outcome!r:.80}")
                p, r = (number(place, x) for x in (outcome[0], outcome[2]))
                if not 0 <= p <= 1 + TOLERANCE or not np.isfinite(r):
                    raise ValueError(f"{place}: wanted a probability and a finite reward, got {p} and {r}")
                if not isinstance(outcome[3], (bool, np.bool_)):
                    raise ValueError(f"{place}: wanted True or False for ended, got {outcome[3]!r:.80}")
                total += p
                edges.append((s, a, p, integer(place, outcome[1], 0, ns - 1), r, bool(outcome[3])))
            if table[s][a] and abs(total - 1) > TOLERANCE:
                raise ValueError(f"{place}: wanted probabilities that sum to 1, got {total:g}")
    return ns, na, edges


TOLERANCE = 1e-4  # of a row's sum, as of a batch's


def _start(env: Any, ns: int) -> np.ndarray:
    try:
        start = np.asarray(getattr(env.unwrapped, "initial_state_distrib", None), dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError("env: wanted numbers in env.unwrapped.initial_state_distrib") from error
    if start.shape != (ns,) or not (start >= 0).all() or abs(start.sum() - 1) > TOLERANCE:
        raise ValueError(f"env: wanted the probabilities of {ns} states in env.unwrapped.initial_state_distrib")
    return start
