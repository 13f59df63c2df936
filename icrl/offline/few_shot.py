"""Few-shot evaluation of in-context learners: a run of episodes in each unseen task, no weight changed."""

from __future__ import annotations

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor
from tqdm import tqdm

from icrl.offline.method import Method
from icrl.offline.trajectories import Trajectories


def few_shot(
    method: Method,
    environments: gymnasium.vector.VectorEnv,
    episodes: int = 40,
    seed: int = 0,
    progress: str | None = None,
    prompts: Trajectories | None = None,
) -> Tensor:
    """The return of each episode, [N,episodes], in N tasks at once.

    Args:
        method: in whatever state of training. environments: one a task, of the same fixed horizon; what comes after an
            early end does not count, and actions out of bounds are cut off. episodes: in a row, the agent's context going on.
            seed: of environments and actions.
        prompts: a first episode of each task, of `horizon` steps, that the agent is given as if it had acted so.
    Raises:
        ValueError: `prompts` are of other tasks or lengths.
    """
    N, horizon = environments.num_envs, method.config.horizon
    agent = method.eval().agent(N)
    space = environments.single_action_space
    bounds = (torch.as_tensor(space.low), torch.as_tensor(space.high)) if isinstance(space, spaces.Box) else None
    returns = torch.zeros(N, episodes)
    if prompts is not None and (
        prompts.num_tasks != N or len(prompts.ends) != N or bool((prompts.lengths != horizon).any())
    ):
        raise ValueError(f"prompts: wanted an episode of {horizon} steps in each of {N} tasks, got {prompts!r}")
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        if prompts is not None:
            agent.begin()
            for t in range(horizon):
                step = prompts.begins + t
                agent.act(prompts.states[step])  # its context takes the state; what it would do is not done
                agent.observe(
                    prompts.states[step], prompts.actions[step], prompts.rewards[step], prompts.next_states[step]
                )
        for e in tqdm(range(episodes), desc=progress, unit="episode", disable=progress is None, leave=False):
            observation, _ = environments.reset(seed=seed * 1_000_003 + e * N)  # environment i adds i
            state = torch.as_tensor(observation, dtype=torch.float32)
            agent.begin()
            alive = torch.ones(N)
            for _ in range(horizon):
                action = agent.act(state)
                if bounds is not None:  # what is done is what the agent remembers
                    action = action.clamp(*bounds)
                observation, reward, terminated, truncated, info = environments.step(action.numpy())
                ended = np.logical_or(terminated, truncated)
                if ended.any() and "final_obs" in info:
                    last = info["final_obs"]
                    shown = np.stack([last[i] if ended[i] else observation[i] for i in range(N)])
                else:
                    shown = observation
                gain = torch.as_tensor(reward, dtype=torch.float32)
                agent.observe(state, action, gain, torch.as_tensor(shown, dtype=torch.float32))
                returns[:, e] += gain * alive
                alive *= 1 - torch.as_tensor(terminated, dtype=torch.float32)
                state = torch.as_tensor(observation, dtype=torch.float32)
    method.train()
    return returns
