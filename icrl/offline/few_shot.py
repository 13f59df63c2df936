"""Few-shot evaluation of in-context learners: a run of episodes in each unseen task, no weight changed.

Environments are Gymnasium's and live on the CPU. Here, and nowhere else, states go to the method's device and actions come
back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor
from tqdm import tqdm

from icrl.offline.method import Method
from icrl.offline.trajectories import Trajectories
from icrl_kernels.arguments import integer


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """torch's global generators of the CPU and of `device` at a seed; as they were, afterwards."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def few_shot(
    method: Method,
    environments: gymnasium.vector.VectorEnv,
    episodes: int = 40,
    seed: int = 0,
    progress: str | None = None,
    prompts: Trajectories | None = None,
) -> Tensor:
    """The return of each episode, [N,episodes] float32 on the CPU, in N tasks at once.

    Args:
        method: in whatever state of training. environments: one a task, of the same fixed horizon; what comes after an
            early end does not count, and actions out of bounds are cut off. episodes: in a row, the agent's context going on.
            seed: of environments and actions.
        prompts: a first episode of each task, of `horizon` steps, that the agent is given as if it had acted so.
    Raises:
        ValueError: `episodes` is less than 1, or `prompts` are of other tasks or lengths.
    """
    episodes, seed = integer("episodes", episodes, 1), integer("seed", seed)
    N, horizon, device = environments.num_envs, method.config.horizon, method.device
    agent = method.eval().agent(N)
    space = environments.single_action_space
    bounds = None
    if isinstance(space, spaces.Box):
        bounds = tuple(torch.from_numpy(x).to(device) for x in (space.low, space.high))

    def tensor(values: Any) -> Tensor:
        return torch.from_numpy(np.array(values, np.float32)).to(device)  # a copy: environments may reuse theirs

    returns = torch.zeros(N, episodes, device="cpu", dtype=torch.float32)
    if prompts is not None and (
        prompts.num_tasks != N or len(prompts.ends) != N or bool((prompts.lengths != horizon).any())
    ):
        raise ValueError(f"prompts: wanted an episode of {horizon} steps in each of {N} tasks, got {prompts!r}")
    with seeded(seed, device), torch.no_grad():
        if prompts is not None:
            prompts = prompts.to(device)
            agent.begin()
            for t in range(horizon):
                step = (prompts.begins + t).to(device)
                agent.act(prompts.states[step])  # its context takes the state; what it would do is not done
                agent.observe(
                    prompts.states[step], prompts.actions[step], prompts.rewards[step], prompts.next_states[step]
                )
        for e in tqdm(range(episodes), desc=progress, unit="episode", disable=progress is None, leave=False):
            observation, _ = environments.reset(seed=seed * 1_000_003 + e * N)  # environment i adds i
            state = tensor(observation)
            agent.begin()
            alive = np.ones(N, np.float32)
            for _ in range(horizon):
                action = agent.act(state)
                if bounds is not None:  # what is done is what the agent remembers
                    action = action.clamp(*bounds)
                observation, reward, terminated, truncated, info = environments.step(action.cpu().numpy())
                ended = np.logical_or(terminated, truncated)
                if ended.any() and "final_obs" in info:
                    last = info["final_obs"]
                    shown = np.stack([last[i] if ended[i] else observation[i] for i in range(N)])
                else:
                    shown = observation
                gain = np.asarray(reward, np.float32)
                agent.observe(state, action, tensor(gain), tensor(shown))
                returns[:, e] += torch.from_numpy(gain * alive)
                alive *= 1 - np.asarray(terminated, np.float32)
                state = tensor(observation)
    method.train()
    return returns
