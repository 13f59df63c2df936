"""The kinds of tasks by name."""

from __future__ import annotations

from icrl.worlds.pomdp import sample_pomdp
from icrl.worlds.samplers import sample_anymdp, sample_bandit, sample_garnet
from icrl.worlds.tasks import TabularTasks
from icrl_kernels.arguments import integer


def draw_tasks(
    kind: str,
    num_tasks: int,
    num_states: int,
    num_actions: int,
    branching: int,
    seed: int,
    progress: bool = False,
    **tokens: int,
) -> TabularTasks:
    """Fresh tasks of a kind: "anymdp", "garnet", "bandit" or "pomdp", whose `tokens` are as `sample_pomdp` has them."""
    num_tasks = integer("num_tasks", num_tasks, 1)
    if kind == "anymdp":
        return sample_anymdp(num_tasks, num_states, num_actions, seed=seed, progress=progress)
    if kind == "garnet":
        return sample_garnet(num_tasks, num_states, num_actions, branching, seed=seed)
    if kind == "bandit":
        return sample_bandit(num_tasks, num_actions, seed=seed)
    if kind == "pomdp":
        return sample_pomdp(num_tasks, num_states, num_actions, seed=seed, progress=progress, **tokens)
    raise ValueError(f"kind: wanted anymdp, garnet, bandit or pomdp, got {kind!r}")
