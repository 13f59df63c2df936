"""`python -m benches.sicql`: seconds of an S-ICQL training step, prompt encoded once against three full passes.

Cheetah-Vel's sizes: states of 20, actions of 6, 200 steps, width 128, 4 layers, 1 head; `--batch` prompts. With
`--public FOLDER` (a checkout of S-ICQL's public code; it needs transformers) its step is timed too, its forward passes by
its own `net.py`. Checked in the same run: a query's output is the same whether it branches or ends a full pass.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benches.common import interleaved, write
from icrl.models.trunk import TrunkConfig
from icrl.offline.iql import iql_losses
from icrl.offline.method import Spaces
from icrl.offline.methods.sicql import SICQL, SICQLConfig
from icrl.offline.trajectories import Trajectories
from icrl.offline.world_model import WorldModel, WorldModelConfig

STATE, ACTION, HORIZON, TASKS, EPISODES = 20, 6, 200, 8, 4


def data() -> Trajectories:
    generator = torch.Generator().manual_seed(0)
    T = TASKS * EPISODES * HORIZON

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    ends = torch.arange(1, TASKS * EPISODES + 1) * HORIZON
    tasks = torch.arange(TASKS).repeat_interleave(EPISODES)
    ended = torch.zeros(T, dtype=torch.bool)
    return Trajectories(
        "sizes", 0, normal(T, STATE), normal(T, ACTION), normal(T), normal(T, STATE), ended, ends, tasks
    )


def ours(batch: int, **settings: Any) -> tuple[Callable[[], float], int]:
    """A training step, and how many transitions its losses see."""
    torch.manual_seed(0)
    made = data()
    config = SICQLConfig(horizon=HORIZON, batch=batch, **settings)
    method = SICQL(config, Spaces.of(made), WorldModel.of(WorldModelConfig(), made))
    method.prepare(made)
    optimizer = torch.optim.AdamW(method.parameters(), 3e-4, weight_decay=1e-4)

    def step() -> float:
        method.before_update()
        loss, _ = method.loss(made)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(method.parameters(), 10.0)
        optimizer.step()
        return float(loss.detach())

    return step, batch * (1 if config.layout == "query_first" else config.queries)


def public(folder: Path, batch: int) -> Callable[[], float]:
    """The step of the public code's train.py around its own network."""
    sys.path.insert(0, str(folder))
    from net import Transformer_C  # pyright: ignore[reportMissingImports]

    torch.manual_seed(0)
    sizes = {"horizon": HORIZON, "n_embd": 128, "n_layer": 4, "m_layer": 2, "n_head": 1, "dropout": 0.0}
    spaces = {"state_dim": STATE, "action_dim": ACTION, "context_dim": 16, "max_action": 1.0, "mean": 0, "std": 1}
    model = Transformer_C({**sizes, **spaces, "test": False, "device": "cpu"})
    target = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-4, weight_decay=1e-4)
    prompts = {"contexts": torch.randn(TASKS, EPISODES, HORIZON, 16)}

    def step() -> float:
        x = {
            "states": torch.randn(batch, STATE),
            "actions": torch.randn(batch, ACTION),
            "next_states": torch.randn(batch, STATE),
            "goals": torch.randint(TASKS, (batch, 1)),
            "zeros": torch.zeros(batch, STATE**2 + ACTION + 1),
        }
        reward = torch.randn(batch, 1)
        action, q1, q2, v, next_v = model(x, prompts)
        with torch.no_grad():
            _, t1, t2, _, _ = target(x, prompts)
        imitation = (action - x["actions"][:, None]).square().mean(-1)
        q, target_q = torch.cat([q1, q2], -1), torch.cat([t1, t2], -1)
        ended = torch.zeros(batch, 1, dtype=torch.bool)
        losses = iql_losses(
            imitation, v[..., 0], q, target_q, next_v[..., 0], reward, ended, SICQLConfig(horizon=HORIZON).iql
        )
        loss = losses.policy + losses.q + losses.v
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        with torch.no_grad():
            for slow, fast in zip(target.parameters(), model.parameters(), strict=True):
                slow.lerp_(fast, 0.005)
        return float(loss.detach())

    return step


def check() -> None:
    """Branches are full passes, on these sizes."""
    from icrl.models.trunk import Trunk

    torch.manual_seed(0)
    trunk = Trunk(TrunkConfig(), HORIZON)
    prompt, query = torch.randn(2, HORIZON, 128), torch.randn(2, 1, 1, 128)
    assert trunk.positions is not None
    with torch.no_grad():
        read = trunk.read(query, trunk.remember(prompt, [150]))[:, 0, 0]
        last = query[:, 0] + trunk.positions[0] - trunk.positions[151]
        full = trunk(torch.cat([prompt[:, :150], last], 1))[0][:, -1]
    assert (read - full).abs().max() < 1e-5 * full.abs().max()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--public", type=Path)
    args = parser.parse_args()
    check()
    steps: dict[str, Callable[[], float]] = {}
    seen = {}
    settings = {
        "three full passes": {},
        "prompt once, 4 queries": {"layout": "branch", "queries": 4},
        "prompt once, 8 queries": {"layout": "branch", "queries": 8},
        "prompt once, 16 queries": {"layout": "branch", "queries": 16},
        "gla, prompt once, 8 queries": {"layout": "branch", "queries": 8, "trunk": TrunkConfig(heads=4, mixer="gla")},
        "prompt once of every 4th window, 8 queries": {"layout": "branch", "queries": 8, "stride": 4},
    }
    for name, s in settings.items():
        steps[name], seen[name] = ours(args.batch, **s)
    if args.public is not None:
        steps["public code"], seen["public code"] = public(args.public, args.batch), args.batch
    times = interleaved(steps, args.repeats, 1)
    base = statistics.median(times["three full passes"])
    rows = []
    for name, t in times.items():
        seconds = statistics.median(t)
        rows.append({"step": name, "seconds": seconds, "transitions": seen[name], "ratio": base / seconds})
        print(f"{name:44}{seconds:8.3f} s  {base / seconds:5.2f}x of three full passes, {seen[name]} transitions")
    if args.public is not None:
        for row in rows:
            row["against_public"] = statistics.median(times["public code"]) / row["seconds"]
    print(write("sicql_cpu", rows, batch=args.batch))


if __name__ == "__main__":
    main()
