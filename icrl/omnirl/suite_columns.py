"""The columns of OmniRL's table: who learns in its rows. A column is data; a new one is one more entry."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from icrl.omnirl import ppo
from icrl.omnirl.agent import Agent, Model
from icrl.omnirl.checkpoints import load
from icrl.omnirl.evaluate import LONG, LONG_SETTINGS, SETTINGS, TEMPERATURE, run_agent, run_baseline
from icrl.omnirl.learners import Fixed, ModelBasedLearner, UCBQLearner, run_world, uniform_actor
from icrl.omnirl.measures import Windows, windows
from icrl.omnirl.suite_rows import Row
from icrl.worlds.tasks import TabularTasks
from icrl.worlds.vector_world import Step, TabularWorld, VectorWorld

CPU = torch.device("cpu")
MOST_STEPS = 1 << 23  # of all contexts whose steps are held at once
MOST_WINDOWS = 64  # of the curve of a learner with a budget of its own


@dataclass(frozen=True)
class Limits:
    """What a suite's settings say about every column's run."""

    steps: int | None  # of a context, for each row's own
    learner_steps: int | None  # the most of Q-learning and PPO
    seed: int


@dataclass(frozen=True)
class Column:
    name: str  # of its files
    title: str
    identity: dict[str, Any]
    """What its numbers depend on besides the suite's settings and the row."""
    run: Callable[[Row, TabularTasks | VectorWorld, Limits, str | None], Windows]
    """(row, where it acts, limits, what a progress bar says, None for no bar) -> sums over windows."""
    check: Callable[[Row], None] = lambda _: None
    """ValueError where it cannot act in a row."""
    serves: Callable[[Row], bool] = lambda _: True
    """Whether it has a place in a row."""
    tasks: int | None = None
    """In how many of a row's tasks it is run; None: in all of them."""
    device: torch.device = CPU


def budget(own: int, given: int | None, window: int, most: int | None = None) -> tuple[int, int]:
    """Steps of a run, and of its windows: `own`, or `given` instead, at most `most`; no more than MOST_WINDOWS windows."""
    steps = own if given is None else given
    steps = steps if most is None else min(steps, most)
    window = min(window, steps)
    width = window * max(1, -(-steps // (window * MOST_WINDOWS)))
    return steps // width * width, width


# ---- models --------------------------------------------------------------------------------------------------------------


class _Acting:
    """An agent as an actor of a VectorWorld."""

    def __init__(self, agent: Agent) -> None:
        self.agent = agent

    def act(self, observation: torch.Tensor) -> torch.Tensor:
        return self.agent.act(observation)

    def learn(self, step: Step) -> None:
        self.agent.observe(step.reward, step.done)


def model_column(path: Path, device: torch.device, prompt: int, only: bool) -> Column:
    """A model from a file, acting from nothing in its context. `only`: no other model is in the table."""
    model: Model = load(path, device)
    title = model.title if only else f"{model.title}, {path.stem}"

    def agent(row: Row, contexts: int, seed: int) -> Agent:
        options: dict[str, Any] = {"prompt": prompt, "temperature": TEMPERATURE, "seed": seed}
        return Agent(model, contexts, row.states, num_actions=row.actions, **options)

    def run(row: Row, world: TabularTasks | VectorWorld, limits: Limits, said: str | None) -> Windows:
        steps, width = budget(row.steps, limits.steps, row.window)
        if isinstance(world, TabularTasks):
            options: dict[str, Any] = {"prompt": prompt, "temperature": TEMPERATURE, "seed": limits.seed}
            return windows(run_agent(model, world, steps, progress=said, **options), width)
        acting = _Acting(agent(row, world.num_contexts, limits.seed))
        return windows(run_world(world, acting, steps, said), width, world.agents)

    def check(row: Row) -> None:
        try:
            agent(row, 1, 0)
        except ValueError as e:
            raise ValueError(f"checkpoint: {path} cannot act in {row.title} ({e})") from e

    identity = {
        "checkpoint": f"{zlib.crc32(path.read_bytes()):08x}",
        "prompt": prompt,
        "temperature": vars(TEMPERATURE),
    }
    return Column(f"model-{path.stem}", title, identity, run, check, device=device)


# ---- tabular learners, random, oracle ------------------------------------------------------------------------------------


def _tabular(name: str, learner: str, own: Callable[[Row], int], most: bool) -> Column:
    """One of the simulator's learners. Where there is no table it is the same rules in torch."""
    prefix = "q" if learner == "q" else "model"
    common = {k: v for k, v in SETTINGS.items() if k.startswith(f"{prefix}_")}

    def run(row: Row, world: TabularTasks | VectorWorld, limits: Limits, said: str | None) -> Windows:
        given, cap = (None, limits.learner_steps) if most else (limits.steps, None)
        steps, width = budget(own(row), given, row.window, cap)
        constants = dict(common)
        if learner == "q":
            constants |= (LONG_SETTINGS if steps > LONG else {}) | row.q_constants
        if isinstance(world, TabularTasks):
            return _in_blocks(world, name, steps, width, limits.seed, **constants)
        bonus, discount = (constants[f"{prefix}_{what}"] for what in ("bonus", "discount"))
        sizes = world.num_contexts, world.num_observations, world.num_actions
        kind = UCBQLearner if learner == "q" else ModelBasedLearner
        device = world.observation.device
        actor = kind(*sizes, bonus=bonus, discount=discount, seed=limits.seed, device=device)
        return windows(run_world(world, actor, steps, said), width, world.agents)

    identity = common | ({"long": LONG_SETTINGS} if learner == "q" else {})
    return Column("q-ucb" if learner == "q" else "model-based", name, identity, run)


def _in_blocks(tasks: TabularTasks, name: str, steps: int, width: int, seed: int, **constants: float) -> Windows:
    """A baseline's windows, of as many tasks at a time as there is memory for."""
    size = max(1, MOST_STEPS // max(1, steps))
    starts = range(0, len(tasks), size)
    runs = (run_baseline(tasks[i : i + size], name, steps, seed + 2**20 * i, None, **constants) for i in starts)
    return Windows.joined([windows(run, width) for run in runs])


def _fixed(name: str) -> Column:
    """Random actions, or the oracle's."""

    def run(row: Row, world: TabularTasks | VectorWorld, limits: Limits, said: str | None) -> Windows:
        steps, width = budget(row.steps, limits.steps, row.window)
        if isinstance(world, TabularTasks):
            baseline = "oracle, episode" if name == "oracle" else name
            return _in_blocks(world, baseline, steps, width, limits.seed)
        uniform = uniform_actor(world.num_actions, limits.seed)
        actor = uniform if name == "random" else Fixed(lambda _: world.oracle_action())
        return windows(run_world(world, actor, steps), width, world.agents)

    return Column(name, name, {}, run)


# ---- PPO -----------------------------------------------------------------------------------------------------------------


def ppo_column(tasks: int) -> Column:
    """PPO, trained in the first `tasks` tasks of each row, one policy a task."""
    ppo.needed()

    def run(row: Row, world: TabularTasks | VectorWorld, limits: Limits, said: str | None) -> Windows:
        steps, width = budget(row.ppo_steps, None, row.window * ppo.ENVIRONMENTS, limits.learner_steps)
        envs = ppo.ENVIRONMENTS

        def make(task: int) -> VectorWorld:
            if isinstance(world, TabularTasks):
                return TabularWorld(world[[task] * envs], limits.seed + task)
            made = row.make(envs, limits.seed + 2**20 * (task + 1))
            assert not isinstance(made, TabularTasks)
            return made

        count = len(world) if isinstance(world, TabularTasks) else world.num_contexts
        return windows(ppo.train_ppo(make, count, steps, limits.seed, said), width, envs, envs)

    identity = {"tasks": tasks, "environments": ppo.ENVIRONMENTS, "settings": ppo.SETTINGS}
    return Column("ppo", "PPO", identity, run, serves=lambda row: row.ppo_steps > 0, tasks=tasks)


def baseline_columns() -> Sequence[Column]:
    return (
        _tabular("Q-learning (UCB)", "q", lambda row: row.q_steps, most=True),
        _tabular("tabular model-based", "model", lambda row: row.steps, most=False),
        _fixed("random"),
        _fixed("oracle"),
    )
