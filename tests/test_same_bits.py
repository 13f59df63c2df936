"""Tasks, trajectories and labels that are the same bits on every processor: the hashes of what was made when they were stored.

A change of one of these is a change of every data set and of every experiment with a seed: it wants a reason and a line in the
changelog. `python tests/test_same_bits.py` prints what this processor makes; a case is kept if it agrees whatever the instruction
sets of these kernels (ICRL_ISA) and of torch (ATEN_CPU_CAPABILITY) are.
"""

import dataclasses
import hashlib

import numpy as np
import pytest
import torch

from icrl.offline.environments.darkroom import DarkRoomData
from icrl.offline.environments.stitching import StitchingData
from icrl.omnirl.distill import DPDConfig, make_batch, simulate
from icrl.worlds import TabularVectorEnv, regroup, sample_anymdp, sample_bandit, sample_garnet, sample_pomdp
from icrl_kernels import constant_behaviours, rollout, rollout_start, rollout_step


def hashed(value, into=None):
    """16 digits of the SHA-256 of all tensors in `value`, their dtypes and shapes."""
    h = into or hashlib.sha256()
    if isinstance(value, torch.Tensor):
        h.update(f"{value.dtype} {list(value.shape)}".encode())
        h.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    elif isinstance(value, (np.ndarray, np.generic)):
        hashed(torch.as_tensor(np.array(value)), h)
    elif dataclasses.is_dataclass(value):
        hashed([getattr(value, f.name) for f in dataclasses.fields(value)], h)
    elif isinstance(value, (list, tuple, dict)):
        for x in value.values() if isinstance(value, dict) else value:
            hashed(x, h)
    return h.hexdigest()[:16]


def anymdp(n=4, **options):
    return sample_anymdp(n, (8, 20), 4, seed=3, num_observations=24, **options)


def garnet():
    return sample_garnet(3, (8, 12), 4, 3, seed=6, num_observations=12)


def bandit():
    return sample_bandit(3, 5, seed=7, num_observations=9)


def pomdp(tokens=1):
    return sample_pomdp(3, 10, 4, seed=8, num_observations=7, observation_tokens=tokens, action_tokens=tokens)


def acted(tasks, weights, policies=0, steps=150, **options):
    n, s, _ = tasks.shape
    given = (torch.arange(n * policies * s) * 7919 % 1009).view(n, policies, s) % tasks.num_actions[:, None, None]
    who = constant_behaviours(n, policies, weights, switch=0.4, epsilon=0.2, epsilon_decay=0.001)
    if policies:
        options |= {"policies": given, "references": given.flip(1)}
    return rollout(tasks.tables(), steps=steps, seed=11, behaviours=who, **options)


def stepped(tasks):
    tables, each = tasks.tables(), torch.arange(len(tasks))
    state = rollout_start(tables, seed=5)
    return [rollout_step(tables, state, (7 * t + each) % tasks.num_actions) for t in range(60)], state


def vector(tasks):
    env = TabularVectorEnv(tasks)
    each = np.arange(env.action_space.nvec.size).reshape(env.action_space.shape)
    return [env.reset(seed=5)[0], *(env.step((7 * t + each) % 4)[:4] for t in range(80))]


def labels():
    config = DPDConfig(batch=6, steps=60, states=12)
    found = simulate(config, anymdp().pad(24, 5), seed=9, labels=True)
    return found.run.labels, found.run.action, found.observation, found.tag, found.q.argmax(-1)


def batch():
    records = make_batch(DPDConfig(batch=6, steps=60, states=12), 3, 1)
    return records[:5], records.q.argmax(-1)


def tokens():
    tasks = pomdp(2)
    run = rollout(tasks.tables(), steps=80, seed=4)
    return tasks.emit(run.state, seed=4, step=torch.arange(80)), regroup(run, 2)


SMALL = {"size": 4, "horizon": 12}
CASES = {
    "anymdp": (anymdp, "ddf7bdf568fabee0"),
    "anymdp packed": (lambda: anymdp(packed=True), "cf87d60847a66d16"),
    "anymdp 64": (lambda: sample_anymdp(2, 64, 5, seed=5), "68e2db4b9b08f4fe"),
    "garnet": (garnet, "000080d691479f9d"),
    "bandit": (bandit, "6f7dceab4908f4bb"),
    "pomdp": (pomdp, "5d52e4faebcee4b4"),
    "pomdp tokens": (lambda: pomdp(3), "950af98c761bbe39"),
    "rollout uniform": (lambda: acted(anymdp(), {"uniform": 1.0}), "e1ed6094165ed301"),
    "rollout random policy": (lambda: acted(anymdp(), {"random_policy": 1.0}), "4a52226cf2f4d4bd"),
    "rollout q learning": (lambda: acted(anymdp(), {"q_learning": 1.0}), "8cba577c3bf844cb"),
    "rollout model based": (lambda: acted(anymdp(), {"model_based": 1.0}), "9da6fa2cc6390f95"),
    "rollout labels": (
        lambda: acted(anymdp(), {0: 1.0, 1: 1.0, "uniform": 1.0, "q_learning": 1.0}, 2),
        "3c01a647a6a74d78",
    ),
    "rollout garnet": (lambda: acted(garnet(), {0: 1.0, "uniform": 1.0}, 1), "a0c0743ff6402b21"),
    "rollout bandit": (lambda: acted(bandit(), {"uniform": 1.0}), "b89304ebfe9c9c2a"),
    "rollout steps": (lambda: stepped(anymdp()), "1f4be4dbcedbe4c4"),
    "vector environment": (lambda: vector(anymdp()), "82760d9dfdbba26e"),
    "vector environment tokens": (lambda: vector(pomdp(2)), "e8a4940d51bdd3d5"),
    "tokens": (tokens, "079095057fd97841"),
    "labels": (labels, "ee8179446621c952"),
    "batch": (batch, "b82a66c4b7a778df"),
    "policies": (lambda: anymdp().solve([0.5, 0.9, 0.994]).policy, "11cb95fbbb0b4976"),
    "darkroom": (lambda: DarkRoomData(**SMALL, train_goals=12, episodes=6, history=3).train_data(), "e42485e05f5a0360"),
    "darkroom q learning": (
        lambda: DarkRoomData(**SMALL, train_goals=12, episodes=6, history=6, quality="q_learning").train_data(),
        "52eec47bcda2088a",
    ),
    "stitching": (
        lambda: StitchingData(**SMALL, train_goals=4, episodes=6, targets=2).train_data(),
        "77117b8f292ae80a",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_same_bits_as_when_they_were_stored(name):
    make, stored = CASES[name]
    assert hashed(make()) == stored


if __name__ == "__main__":
    for each, (make, _) in CASES.items():
        print(f"{each:28}{hashed(make())}")
