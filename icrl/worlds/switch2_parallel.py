"""Switch2 as an environment of PettingZoo's parallel API. It needs the extra "multiagent", which is imported where one is made."""

from __future__ import annotations

from typing import Any

import gymnasium
import torch

from icrl.extras import require
from icrl.worlds.switch2 import OBSERVATIONS, Switch2
from icrl_kernels.arguments import integer


def parallel_switch2() -> Any:
    """A pettingzoo.ParallelEnv of one team. ValueError where PettingZoo is not installed."""
    base = require("pettingzoo", "Switch2 behind PettingZoo's parallel API", "multiagent").ParallelEnv
    return type("ParallelSwitch2", (ParallelSwitch2, base), {})()


class ParallelSwitch2:
    """One team of `icrl.worlds.switch2.Switch2`: the same rules, observations and rewards.

    An agent that is at its goal stays in `agents`, and its actions do nothing, until the episode ends for both.
    """

    metadata = {"name": "switch2_v0", "render_modes": []}  # noqa: RUF012 (as the API has it)
    render_mode = None

    def __init__(self) -> None:
        self.possible_agents = ["agent_0", "agent_1"]
        self.agents: list[str] = []
        self._observations = {name: gymnasium.spaces.Discrete(OBSERVATIONS) for name in self.possible_agents}
        self._actions = {name: gymnasium.spaces.Discrete(Switch2.num_actions) for name in self.possible_agents}
        self._team = Switch2(1)

    def observation_space(self, agent: str) -> gymnasium.spaces.Discrete:
        return self._observations[agent]

    def action_space(self, agent: str) -> gymnasium.spaces.Discrete:
        return self._actions[agent]

    def reset(
        self, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, int], dict[str, dict[str, Any]]]:
        """The agents at their starts; nothing depends on the seed."""
        self.agents, self._team = list(self.possible_agents), Switch2(1)
        return self._by_agent(self._team.observation), {name: {} for name in self.agents}

    def step(self, actions: dict[str, int]) -> tuple[dict[str, Any], ...]:
        """ValueError before `reset`, after an episode's end, and for actions that are not one of each agent's own."""
        if not self.agents:
            raise ValueError("actions: there is no episode, call reset first")
        if set(actions) != set(self.agents):
            raise ValueError(
                f"actions: wanted one of each of {', '.join(self.agents)}, got {', '.join(actions) or 'none'}"
            )
        given = [integer(f"actions[{name!r}]", actions[name], 0, Switch2.num_actions - 1) for name in self.agents]
        reward, done, following = self._team.step(torch.tensor(given, dtype=torch.int64, device="cpu"))
        out = (
            self._by_agent(following),
            self._by_agent(reward),
            self._by_agent(done == 1),
            self._by_agent(done == 2),
            {name: {} for name in self.agents},
        )
        if int(done[0]):
            self.agents = []
        return out

    def _by_agent(self, values: torch.Tensor) -> dict[str, Any]:
        return dict(zip(self.agents, values.tolist(), strict=True))
