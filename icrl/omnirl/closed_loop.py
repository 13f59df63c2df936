"""An agent in tabular tasks, closed: what it does is simulated, and what that brings is what it sees next."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from icrl.omnirl.agent import MOST_AHEAD, MOST_REWARD, Agent
from icrl.omnirl.sequence_step import SequenceStep
from icrl.omnirl.tags import UNKNOWN
from icrl.omnirl.value_iteration_step import ValueIterationStep
from icrl.worlds.tasks import TabularTasks
from icrl_kernels import rollout_start, rollout_step
from icrl_kernels.arguments import integer
from icrl_kernels.fused import closed_loop


@dataclass
class Context:
    """What happened in `[N,T]` steps of one context a task, where the tasks are."""

    reward: Tensor  # float32
    done: Tensor  # uint8: 0 no, 1 terminated, 2 truncated


@dataclass
class Trajectory(Context):
    """And where that was, and by what action: `[N,T]` int64 each."""

    state: Tensor
    observation: Tensor
    action: Tensor


class ClosedLoop:
    """An agent in every one of its tasks, a context each; `run` goes on where it stopped.

    Where the agent's fused step serves, and the tasks are on the CPU and observed, agent and simulator run in C++, steps of
    many contexts side by side; otherwise step by step. The trajectory is the same within what `Agent` says of the two.

    Args:
        agent: of as many contexts as there are tasks. tasks: of one token and one action a step. seed: of the simulation and
            of what is observed.
    Raises:
        ValueError: naming what does not fit.
    """

    def __init__(self, agent: Agent, tasks: TabularTasks, seed: int = 0) -> None:
        if tasks.multi_token:
            raise ValueError(
                f"tasks: the model reads one token and takes one action a step, got {tasks.observation_tokens} and "
                f"{tasks.action_tokens}"
            )
        if len(tasks) != agent.batch or tasks.num_observations > agent.states:
            raise ValueError(
                f"tasks: wanted the agent's {agent.batch} of at most {agent.states} observations, got {len(tasks)} of "
                f"{tasks.num_observations}"
            )
        self.agent, self.tasks, self.seed, self.steps = agent, tasks, seed, 0
        self.tables = tasks.tables()
        self.simulator = rollout_start(self.tables, seed=seed)
        self._most = max(1, MOST_AHEAD // (agent.batch * agent.model.actions))  # steps whose noise is drawn at once
        self._ids = tasks.state_mapping.contiguous()
        self._open = None
        if tasks.action_mask is not None:  # of all the model's actions
            missing = agent.model.actions - tasks.shape[2]
            self._open = torch.nn.functional.pad(tasks.available_actions(), (0, missing)).contiguous()
        self._each = torch.arange(len(tasks), dtype=torch.int64, device=tasks.device)

    def run(self, steps: int, told: Callable[[int], object] = lambda steps: None) -> Trajectory:
        """The next `steps` steps of every context; `told` hears of how many have been made, again and again.

        After a ValueError there are no next ones: contexts are at steps of their own.
        """
        steps = integer("steps", steps, 0)
        shape, device = (len(self.tasks), steps), self.tasks.device
        reward = torch.zeros(shape, dtype=torch.float32, device=device)
        done = torch.zeros(shape, dtype=torch.uint8, device=device)
        out = Trajectory(reward, done, *torch.zeros((3, *shape), dtype=torch.int64, device=device).unbind())
        t = 0
        while t < steps:
            fused = self.agent.serving() if device.type == "cpu" and self.tasks.emission is None else None
            if fused is None:
                self._step(out, t)
                size = 1
            else:
                size = self._steps(fused, out, t, min(self._most, steps - t))
            t += size
            self.steps += size
            told(size)
        return out

    def _step(self, out: Trajectory, t: int) -> None:
        """Step t of this call, with Python between agent and simulator."""
        state = self.simulator.state.clone()
        observation = self.tasks.emit(state, seed=self.seed, step=self.steps)[:, 0]
        action = self.agent.act(observation, None if self._open is None else self._open[self._each, state])
        action = action.to(self.tasks.device)
        reward, done, _ = rollout_step(self.tables, self.simulator, action)
        self.agent.observe(reward, done)
        for to, what in zip((out.state, out.observation, out.action), (state, observation, action), strict=True):
            to[:, t] = what
        out.reward[:, t], out.done[:, t] = reward, done

    def _steps(self, fused: ValueIterationStep | SequenceStep, out: Trajectory, t: int, steps: int) -> int:
        """At most `steps` steps from t on of this call, in C++: how many."""
        steps = self.agent.ahead(steps)
        agent, batch = self.agent, self.agent.batch
        tag, reward, done = agent.outcome()
        if tag != UNKNOWN:  # of the first step alone
            steps = 1
        temperature = [agent.temperature.at(agent.step + i) for i in range(steps)]
        observation, action = torch.empty((2, batch), dtype=torch.int64, device="cpu").unbind()
        mask = torch.empty(batch, agent.model.actions, dtype=torch.bool, device="cpu")
        given = [*(x.data_ptr() for x in (observation, reward, done)), tag, 0, 0.0]
        given += [0 if self._open is None else mask.data_ptr(), action.data_ptr(), 0, *agent.places()]
        closed_loop(
            fused.step,
            given,
            self.tables,
            self.simulator,
            self._ids,
            agent.noise(steps),
            torch.tensor(temperature, dtype=torch.float32, device="cpu"),
            (out.state, out.observation, out.action, out.reward, out.done),
            begin=t,
            open=self._open,
            most_reward=MOST_REWARD,
            threads=torch.get_num_threads(),
        )
        fused.told()
        agent.went(steps, reward, done)
        return steps
