"""Decoupled policy distillation (DPD; OmniRL, arXiv 2502.02869): one policy acts, another labels every visited state.

Records are made on the fly: tasks are sampled, solved at a few discounts and acted in by a mixture of behaviours; every
step carries the optimal values at each discount, whose greedy policies are the references to imitate. A batch is a
function of (config, seed, batch number) alone; seeds are hashed, so that no task comes twice.

Tags name policies: 0..3 greedy at the discounts, 4 model-based learner, 5 Q-learning, 6 random, 7 unknown.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from icrl import worlds
from icrl.data.prefetch import Stream
from icrl.data.seeds import hash_seed
from icrl.worlds import TabularTasks
from icrl.worlds.grids import sample_grids
from icrl_kernels import Behaviours, Rollout, rollout
from icrl_kernels.arguments import integer, integer_fields, number
from icrl_kernels.tabular.behaviours import BUILTIN

Sampler = Callable[["DPDConfig", int, int], TabularTasks]

KINDS = ("anymdp", "garnet", "bandit", "grid")
ANYMDP_LEAST = 8  # states of an AnyMDP task
GRID_LEAST, GRID_ACTIONS = 4, 5
TAG_MODEL_BASED, TAG_Q_LEARNING, TAG_RANDOM, TAG_UNKNOWN = 4, 5, 6, 7
BUILTIN_TAGS = {
    "uniform": TAG_RANDOM,
    "random_policy": TAG_RANDOM,
    "q_learning": TAG_Q_LEARNING,
    "model_based": TAG_MODEL_BASED,
}

PUBLISHED_BEHAVIOURS: dict[str, float] = {
    "uniform": 0.10,
    "model_based+noise": 0.10,
    "q_learning+noise": 0.10,
    "model_based->greedy0": 0.10,
    "model_based->greedy1": 0.10,
    "model_based->greedy2": 0.10,
    "model_based->greedy3": 0.10,
    "greedy2+noise": 0.10,
    "greedy3+noise": 0.10,
    "greedy1": 0.02,
    "greedy2": 0.03,
    "greedy3": 0.05,
}
"""The mixture of the public record generator."""


@dataclass(frozen=True)
class DPDConfig:
    """What a batch is made of. Mixtures are weights by name.

    A behaviour is `name[+noise][->name]`: `uniform`, `random_policy`, `q_learning`, `model_based` (see
    icrl_kernels.Behaviours) or `greedy0`.. (greedy at that discount). With `+noise` its actions are uniform with a
    probability that starts at U(0,1) and decays to zero, or, for 30% of them, stays. After `->` comes the behaviour that takes over at
    some episode's end, for good.
    """

    batch: int = 32
    steps: int = 512
    states: int = 16
    """The largest number of states; observed ids are drawn from as many."""
    least_states: int = 8
    actions: int = 5
    garnet_branching: int = 2
    tasks: dict[str, float] = field(default_factory=lambda: {"anymdp": 0.8, "garnet": 0.15, "bandit": 0.05})
    discounts: tuple[float, ...] = (0.0, 0.5, 0.93, 0.994)
    references: tuple[float, ...] = (0.1, 0.1, 0.2, 0.6)
    """Weights of the discounts' greedy policies, for `draw_references`."""
    behaviours: dict[str, float] = field(
        default_factory=lambda: {
            "uniform": 0.25,
            "random_policy": 0.20,
            "q_learning+noise": 0.15,
            "model_based+noise": 0.30,
            "model_based+noise->greedy3": 0.05,
            "greedy3+noise": 0.05,
        }
    )
    reference_resample: float = 0.2
    """Probability a step that the reference is drawn anew, in `reference_resample_records` of the records."""
    reference_resample_records: float = 0.75
    behaviour_resample: float = 0.2
    """Probability an episode that the behaviour is drawn anew, in `behaviour_resample_records` of the records."""
    behaviour_resample_records: float = 0.85
    mask_record: float = 0.15
    """Probability that the tag is unknown for the whole record."""
    mask_episode: float = 0.15
    """Probability that the tag is unknown for an episode."""

    def __post_init__(self) -> None:
        integer_fields(self, batch=1, steps=1, least_states=1, actions=1, garnet_branching=1)
        if len(self.references) != len(self.discounts):
            raise ValueError(f"references: wanted {len(self.discounts)} weights, one a discount, got {self.references}")
        if len(self.discounts) > TAG_MODEL_BASED:
            raise ValueError(f"discounts: tags leave room for {TAG_MODEL_BASED}, got {len(self.discounts)}")
        if self.states < self.least_states:
            raise ValueError(f"states: wanted at least least_states={self.least_states}, got {self.states}")
        for name in ("tasks", "behaviours"):
            _check_weights(name, getattr(self, name))
        for name in ("discounts", "references"):
            if not isinstance(getattr(self, name), (tuple, list)):
                raise ValueError(f"{name}: wanted a tuple of numbers, got {getattr(self, name)!r}")
        _check_weights("references", dict(enumerate(self.references)))
        for i, discount in enumerate(self.discounts):
            if not 0 <= number(f"discounts[{i}]", discount) <= 1:
                raise ValueError(f"discounts[{i}]: wanted a number in [0, 1], got {discount}")
        for name in ("reference_resample", "behaviour_resample", "mask_record", "mask_episode"):
            for each in (name, f"{name}_records"):
                if not 0 <= number(each, getattr(self, each, 0)) <= 1:
                    raise ValueError(f"{each}: wanted a probability, got {getattr(self, each)}")
        if unknown := set(self.tasks) - set(KINDS):
            raise ValueError(f"tasks: wanted {', '.join(KINDS)}, got {', '.join(sorted(map(str, unknown)))}")
        for name in self.behaviours:
            _parse(name, len(self.discounts))
        self._check_sizes()

    def _check_sizes(self) -> None:
        """ValueError for sizes that a kind of tasks in the mixture does not have."""
        least = {
            "anymdp": {"states": ANYMDP_LEAST, "actions": 2},
            "garnet": {"states": max(2, self.garnet_branching), "actions": 1},
            "bandit": {"states": 1, "actions": 2},
            "grid": {"states": GRID_LEAST, "actions": GRID_ACTIONS},
        }
        for kind in (kind for kind, weight in self.tasks.items() if weight > 0):
            for name, given in (("states", self.least_states), ("actions", self.actions)):
                if given < least[kind][name]:
                    field = "least_states" if name == "states" else name
                    raise ValueError(f"{field}: {kind} tasks have {least[kind][name]} {name} or more, got {given}")


class Records(NamedTuple):
    """B records of T steps, [B,T]."""

    observation: Tensor  # int64
    action: Tensor  # int64, the behaviour's
    reward: Tensor  # float32
    done: Tensor  # int64: 0 no, 1 terminated, 2 truncated
    tag: Tensor  # int64, the behaviour's, 0..7
    q: Tensor  # [B,T,G,A] float32, optimal values at each discount; -inf past a task's own actions


def sample_tasks(
    config: DPDConfig, n: int, seed: int, *, kind: str | None = None, num_states: int | None = None
) -> TabularTasks:
    """n new tasks of the configured kinds and sizes, or all of one kind, of one size; on the CPU."""
    n = integer("n", n, 1)
    generator = torch.Generator().manual_seed(hash_seed(seed, 0))
    mixture = {kind: 1.0} if kind else dict(config.tasks)
    weights = torch.tensor(list(mixture.values()), dtype=torch.float64, device="cpu")
    counts = torch.multinomial(weights, n, replacement=True, generator=generator).bincount(minlength=len(weights))
    sizes = num_states or (config.least_states, config.states)
    parts = []
    for i, (name, count) in enumerate(zip(mixture, counts.tolist(), strict=True)):
        own = hash_seed(seed, 1, i)
        if not count:
            continue
        if name == "anymdp":
            tasks = worlds.sample_anymdp(
                count, sizes, config.actions, seed=own, num_observations=config.states, packed=True
            )
        elif name == "garnet":
            branching = config.garnet_branching
            tasks = worlds.sample_garnet(
                count, sizes, config.actions, branching, seed=own, num_observations=config.states
            )
        elif name == "bandit":
            tasks = worlds.sample_bandit(count, config.actions, seed=own, num_observations=config.states)
        elif name == "grid":
            span = (sizes, sizes) if isinstance(sizes, int) else sizes
            tasks = sample_grids(count, span, seed=own, num_observations=config.states)
        else:
            raise ValueError(f"kind: wanted {', '.join(KINDS)}, got {name!r}")
        parts.append(tasks)
    return worlds.TabularTasks.concatenate(parts)


class Simulated(NamedTuple):
    """What records in N tasks are made of."""

    run: Rollout
    observation: Tensor  # [N,T] int64, what was seen before acting
    tag: Tensor  # [N,T] int64
    q: Tensor  # [N,G,S,A] float32, optimal values of each inner state at each discount; -inf past a task's own actions


def simulate(config: DPDConfig, tasks: TabularTasks, *, seed: int, labels: bool = False) -> Simulated:
    """Act for `config.steps` steps in each task, with optimal values to label what was visited.

    All of it runs where the tasks are; what is drawn is drawn on the CPU. With `labels`, `run.labels` [N,T,G] are the
    optimal actions at each discount. ValueError for tasks of several tokens a step: a record has one observation and one
    action.
    """
    if tasks.observation_tokens > 1 or tasks.action_tokens > 1:
        raise ValueError(
            f"tasks: a record has one observation and one action a step, got {tasks.observation_tokens} and "
            f"{tasks.action_tokens} tokens"
        )
    N, _, A = tasks.noise_action.shape
    device = tasks.noise_action.device
    own_action = torch.arange(A, device=device) < tasks.num_actions[:, None]
    q = tasks.solve(config.discounts).q.float().masked_fill(~own_action[:, None, None], -torch.inf)
    best = q.argmax(3)
    generator = torch.Generator().manual_seed(hash_seed(seed, 0))
    run = rollout(
        tasks.tables(),
        steps=config.steps,
        seed=hash_seed(seed, 1),
        policies=best,
        references=best if labels else None,
        behaviours=Behaviours(*(x.to(device) for x in draw_behaviours(config, N, generator))),
    )
    steps = torch.arange(config.steps, device=device)
    observation = tasks.emit(run.state, seed=hash_seed(seed, 3), step=steps)[..., 0]
    return Simulated(run, observation, _tags(config, run.behaviour, run.done, generator), q)


def make_records(config: DPDConfig, tasks: TabularTasks, *, seed: int) -> Records:
    """One record of `config.steps` steps in each task."""
    run, observation, tag, q = simulate(config, tasks, seed=seed)
    state = run.state.long()
    N, G, S, A = q.shape
    rows = q.transpose(1, 2).reshape(N * S, G * A)  # whole rows are gathered faster
    return Records(
        observation=observation,
        action=run.action.long(),
        reward=run.reward,
        done=run.done.long(),
        tag=tag,
        q=rows.index_select(0, (state + torch.arange(N, device=q.device)[:, None] * S).flatten()).view(
            *state.shape, G, A
        ),
    )


def draw_policies(config: DPDConfig, weights: tuple[float, ...], records: int, generator: torch.Generator) -> Tensor:
    """`[records, steps]` int64 on the CPU: policies to imitate, by these weights, drawn anew as references are."""
    R, T = records, config.steps
    of = torch.tensor(weights, dtype=torch.float32, device="cpu")
    drawn = torch.multinomial(of, R * T, replacement=True, generator=generator).view(R, T)
    resamples = (
        torch.rand(R, 1, generator=generator, device="cpu", dtype=torch.float32) < config.reference_resample_records
    )
    changes = resamples & (
        torch.rand(R, T, generator=generator, device="cpu", dtype=torch.float32) < config.reference_resample
    )
    since = torch.where(changes, torch.arange(T, device="cpu"), 0).cummax(1).values
    return drawn.gather(1, since)


def draw_references(config: DPDConfig, records: Records, *, seed: int) -> tuple[Tensor, Tensor]:
    """The policy to imitate at each step: (prompt, the reference's tag, and label, its greedy action), both [B,T] int64."""
    R, T = records.action.shape
    generator = torch.Generator().manual_seed(hash_seed(seed, 2))
    prompt = draw_policies(replace(config, steps=T), config.references, R, generator).to(records.q.device)
    return prompt, records.q.argmax(3).gather(2, prompt[..., None])[..., 0]


class DPDStream(Stream[Records]):
    """Batches 0, 1, 2, ... of a seed, made in a background thread a few ahead of their use (C++ releases the GIL).

    Args:
        sampler: (config, n, seed) -> n tasks; by default new tasks every batch. A function that ignores the seed
            trains on a fixed set.
        prefetch, threads: see `icrl.data.prefetch.Stream`.

    Raises (from next): whatever making the batch raised.
    """

    def __init__(
        self,
        config: DPDConfig,
        seed: int,
        *,
        sampler: Sampler = sample_tasks,
        prefetch: int = 2,
        threads: int = 1,
    ) -> None:
        super().__init__(seed, prefetch=prefetch, threads=threads, name="dpd")
        self.config, self.sampler = config, sampler

    def _maker(self) -> Callable[[int], Records]:
        return partial(make_batch, self.config, self.seed, sampler=self.sampler)


def make_batch(config: DPDConfig, seed: int, index: int, *, sampler: Sampler = sample_tasks) -> Records:
    """Batch `index` of a seed."""
    tasks, own = batch_tasks(config, seed, index, sampler=sampler)
    return make_records(config, tasks, seed=own)


def batch_tasks(
    config: DPDConfig, seed: int, index: int, *, sampler: Sampler = sample_tasks
) -> tuple[TabularTasks, int]:
    """The tasks of batch `index` of a seed, and the seed of what happens in them."""
    return sampler(config, config.batch, hash_seed(seed, index, 0)), hash_seed(seed, index, 1)


def draw_behaviours(config: DPDConfig, num_records: int, generator: torch.Generator) -> Behaviours:
    """Each record's mixture of behaviours, their noise and the learners' settings; drawn on the CPU, where they lie."""
    R, G, T = num_records, len(config.discounts), config.steps
    parsed = [_parse(name, G) for name in config.behaviours]
    weights = torch.tensor(list(config.behaviours.values()), dtype=torch.float32, device="cpu")
    kind = torch.multinomial(weights, R, replacement=True, generator=generator)
    first, noisy, last = (torch.tensor([p[i] for p in parsed], device="cpu", dtype=torch.int64) for i in range(3))
    M = G + len(BUILTIN)

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(R, generator=generator, device="cpu", dtype=torch.float32) * (high - low) + low

    def exponential(mean: float) -> Tensor:
        return torch.empty(R, device="cpu", dtype=torch.float32).exponential_(1 / mean, generator=generator)

    # with `->` the successor for good; else any behaviour of the mixture
    everyone = torch.zeros(M, device="cpu", dtype=torch.float32).index_add_(0, first, weights)
    hands_over = last[kind] >= 0
    later = torch.where(hands_over[:, None], torch.nn.functional.one_hot(last[kind].clamp_min(0), M).float(), everyone)
    resamples = (uniform(0, 1) < config.behaviour_resample_records) | hands_over
    epsilon, stays, decay = uniform(0, 1), uniform(0, 1) < 0.3, uniform(0, 3 / T)
    return Behaviours(
        initial=torch.nn.functional.one_hot(first[kind], M).float(),
        later=later,
        switch=resamples.float() * config.behaviour_resample,
        epsilon=epsilon * noisy[kind],
        epsilon_decay=decay * ~stays,
        policy_scale=exponential(2.0),
        q_bonus=exponential(0.5),
        q_discount=uniform(0.9, 0.99),
        model_bonus=exponential(0.3) * (uniform(0, 1) < 0.7),
        model_discount=uniform(0.85, 0.97),
    )


def _check_weights(name: str, weights: Any) -> None:
    if not isinstance(weights, dict):
        raise ValueError(f"{name}: wanted weights by name, got {weights!r:.80}")
    given = [number(f"{name}[{key!r}]", weight) for key, weight in weights.items()]
    if not given or not min(given) >= 0 or not 0 < sum(given) < float("inf"):
        raise ValueError(f"{name}: wanted weights >= 0 that are finite and not all 0, got {given}")


def _parse(behaviour: str, num_policies: int) -> tuple[int, bool, int]:
    """(index of the first, whether noisy, index of the successor or -1)."""
    names = [*(f"greedy{i}" for i in range(num_policies)), *BUILTIN]
    if not isinstance(behaviour, str):
        raise ValueError(f"behaviours: wanted names, got {behaviour!r}")
    name, arrow, successor = behaviour.partition("->")
    name, plus, noise = name.partition("+")
    if name not in names or (arrow and successor not in names) or (plus and noise != "noise"):
        raise ValueError(f"behaviours: wanted name[+noise][->name] with names {', '.join(names)}, got {behaviour!r}")
    return names.index(name), bool(plus), names.index(successor) if arrow else -1


def _tags(config: DPDConfig, behaviour: Tensor, done: Tensor, generator: torch.Generator) -> Tensor:
    R, T = behaviour.shape
    device = behaviour.device
    known = [*range(len(config.discounts)), *(BUILTIN_TAGS[name] for name in BUILTIN)]
    tags = torch.tensor(known, device=device, dtype=torch.int64)[behaviour.long()]
    episode = torch.nn.functional.pad((done != 0).long().cumsum(1)[:, :-1], (1, 0))
    by_episode = torch.rand(R, T, generator=generator, device="cpu", dtype=torch.float32) < config.mask_episode
    masked = by_episode.to(device).gather(1, episode)
    masked |= (torch.rand(R, 1, generator=generator, device="cpu", dtype=torch.float32) < config.mask_record).to(device)
    return tags.masked_fill(masked, TAG_UNKNOWN)
