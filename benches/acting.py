"""python -m benches.acting: an agent's step by the module and by the fused step, in turns, to results/acting.json.

`act` and `observe` from Python, in one context and in 64, of 16 and of 64 states, on one thread; and the closed loop with the
simulator (`icrl context`), of the module step by step and of the fused step in C++; and, of each mixer, the trunk of the
offline learners (width 128, 4 layers) given a token. Both have made the same actions before anything is timed; of trunks it is
said how far apart outputs were. `--steps`: fused steps of each, a tenth as many of the module's. ICRL_ISA lowers the instruction set.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from typing import Any

import torch
from torch import Tensor

from benches import common
from icrl.models.mixers import MIXERS
from icrl.models.step import TrunkStep
from icrl.models.trunk import Trunk, TrunkConfig
from icrl.omnirl import OmniRL, OmniRLConfig
from icrl.omnirl.agent import Agent
from icrl.omnirl.checkpoints import shipped
from icrl.omnirl.closed_loop import ClosedLoop
from icrl.omnirl.value_iteration_network import ValueIterationNetwork
from icrl.worlds import sample_anymdp

SHAPES = ((1, 16), (1, 64), (64, 16), (64, 64))  # contexts, states
TURN = 20  # steps of the fused agent in a turn; the module's are a tenth


def both(model: ValueIterationNetwork | OmniRL, contexts: int, states: int, seed: int = 0) -> dict[str, Agent]:
    return {name: Agent(model, contexts, states, seed=seed, fused=name == "fused") for name in ("fused", "module")}


def outcomes(contexts: int, states: int, steps: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    g = torch.Generator().manual_seed(contexts * states)
    return [
        (
            torch.randint(states, (contexts,), generator=g),
            torch.randn(contexts, generator=g),
            (torch.rand(contexts, generator=g) < 0.05).to(torch.uint8),
        )
        for _ in range(steps)
    ]


def same_actions(model: ValueIterationNetwork | OmniRL, contexts: int, states: int, steps: int) -> int:
    """How many of the two agents' actions differ."""
    agents, wrong = both(model, contexts, states), 0
    for observation, reward, done in outcomes(contexts, states, steps):
        wrong += int((agents["fused"].act(observation) != agents["module"].act(observation)).sum())
        for agent in agents.values():
            agent.observe(reward, done)
    return wrong


def steps_of(model: ValueIterationNetwork | OmniRL, contexts: int, states: int, steps: int) -> dict[str, Any]:
    differ = same_actions(model, contexts, states, 100)
    agents = both(model, contexts, states)
    times: dict[str, list[float]] = {name: [] for name in agents}
    came = outcomes(contexts, states, TURN)
    for _ in range(max(1, steps // TURN)):
        for name, agent in agents.items():
            for observation, reward, done in came[: TURN if name == "fused" else TURN // 10]:
                begin = time.perf_counter()
                agent.act(observation)
                agent.observe(reward, done)
                times[name].append(time.perf_counter() - begin)
    return row(f"{model.title}: act + observe", contexts, states, times, differ)


def loops_of(model: ValueIterationNetwork | OmniRL, contexts: int, states: int, steps: int) -> dict[str, Any]:
    tasks = sample_anymdp(contexts, states, seed=2**42)
    size = tasks.num_observations
    loops = {name: ClosedLoop(agent, tasks) for name, agent in both(model, contexts, size).items()}
    actions = [loop.run(50).action for loop in loops.values()]
    times: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(max(3, steps // 1000)):
        for name, loop in loops.items():
            n = 1000 if name == "fused" else 10
            begin = time.perf_counter()
            loop.run(n)
            times[name].append((time.perf_counter() - begin) / n)
    return row(f"{model.title}: closed loop", contexts, states, times, int((actions[0] != actions[1]).sum()))


@torch.no_grad()
def trunks_of(mixer: str, contexts: int, steps: int) -> dict[str, Any]:
    """A token of a trunk in which a hundred came before."""
    torch.manual_seed(0)
    trunk = Trunk(TrunkConfig(mixer=mixer), 100 + TURN).eval()
    width, apart = trunk.config.width, 0.0
    step, state = TrunkStep(trunk, contexts), None
    for x in torch.randn(100, contexts, width):
        y, state = trunk(x[:, None], state)
        apart = max(apart, float((step(x) - y[:, 0]).abs().max() / y.abs().max()))
    times: dict[str, list[float]] = {"fused": [], "module": []}
    tokens = torch.randn(TURN, contexts, width)
    for _ in range(max(1, steps // TURN)):
        step.replace(state)
        for x in tokens:
            begin = time.perf_counter()
            step(x)
            times["fused"].append(time.perf_counter() - begin)
        for x in tokens[: TURN // 10]:
            begin = time.perf_counter()
            trunk(x[:, None], state)
            times["module"].append(time.perf_counter() - begin)
    return {**row(f"trunk of {mixer}", contexts, 0, times, 0), "apart": apart}


def row(what: str, contexts: int, states: int, times: dict[str, list[float]], differ: int) -> dict[str, Any]:
    middle = {name: statistics.median(t) * 1e6 for name, t in times.items()}
    found = {"what": what, "contexts": contexts, "states": states, "actions_that_differ": differ}
    found |= {f"{name}_us": us for name, us in middle.items()}
    found |= {f"{name}_p10_us": statistics.quantiles(t, n=10)[0] * 1e6 for name, t in times.items()}
    found |= {"ratio": middle["module"] / middle["fused"], "fused_steps_per_s": contexts * 1e6 / middle["fused"]}
    print(
        f"{what:40} {contexts:3} contexts {states:3} states: fused {middle['fused']:9.1f} us, module {middle['module']:9.1f} us,"
        f" ratio {found['ratio']:6.1f}, {found['fused_steps_per_s']:10,.0f} steps/s, actions that differ: {differ}"
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*has learned labels")
    model = ValueIterationNetwork.load(shipped())
    rows = [steps_of(model, contexts, states, args.steps // (1 + contexts // 8)) for contexts, states in SHAPES]
    rows += [loops_of(model, contexts, 16, args.steps) for contexts in (1, 64)]
    torch.manual_seed(0)
    sequence = OmniRL(OmniRLConfig()).eval()
    rows += [steps_of(sequence, contexts, 16, args.steps // (1 + contexts // 8)) for contexts in (1, 64)]
    rows += [loops_of(sequence, contexts, 16, args.steps) for contexts in (1, 64)]
    rows += [trunks_of(mixer, contexts, args.steps // (2 + contexts)) for mixer in MIXERS for contexts in (1, 64)]
    print(common.write("acting", rows))


if __name__ == "__main__":
    main()
