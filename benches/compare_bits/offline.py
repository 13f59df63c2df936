"""Calls of S-ICQL and its rivals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from calls import (
    Moved,
    add,
    folder_facts,
    icrl,
    numbers,
    quietly,
    run_facts,
    untimed,
)


def offline_calls() -> None:
    import torch

    moved = Moved()
    room = moved.DarkRoomData(size=4, horizon=12, train_goals=12, episodes=6, history=6)
    robot = moved.PointRobotData(horizon=12, tasks=10, episodes=6, history=6)
    sources = {
        "darkroom": room,
        "darkroom far": moved.DarkRoomData(size=4, horizon=12, train_goals=12, episodes=6, history=3, split="far"),
        "darkroom corner": moved.DarkRoomData(
            size=4, horizon=12, train_goals=12, episodes=6, history=6, start="corner", quality="q_learning"
        ),
        "point robot": robot,
        "point robot far": moved.PointRobotData(
            horizon=12, tasks=10, episodes=6, history=3, split="far", quality="medium"
        ),
        "stitching": moved.StitchingData(size=4, horizon=12, train_goals=4, episodes=6, targets=2),
    }
    for name, source in sources.items():

        def collected(source: Any = source) -> Any:
            data = source.train_data()
            best = [source.best_returns("train"), source.best_returns()]
            prompts = source.prompts() if hasattr(source, "prompts") else None
            return data, data.moments(), data.returns_to_go(0.9), best, source.goals(), prompts, repr(data)

        add(f"offline/data/{name}", collected)

        def walked(source: Any = source) -> Any:
            env = source.environments()
            env.action_space.seed(3)
            out: list[Any] = [env.reset(seed=4)[0]]
            return out + [env.step(env.action_space.sample())[:4] for _ in range(20)]

        add(f"offline/environments/{name}", walked)

    def trunk(mixer: str) -> Any:
        torch.manual_seed(1)
        net = moved.Trunk(moved.TrunkConfig(width=16, layers=2, heads=2, mixer=mixer), 20)
        x, queries = torch.randn(2, 12, 16).requires_grad_(), torch.randn(2, 3, 4, 16)
        y, state = net(x)
        more, _ = net(torch.randn(2, 1, 16), state)
        read = net.read(queries, net.remember(x, [0, 5, 12]))
        (y.sum() + more.square().sum() + read.square().sum()).backward()
        return y, more, read, x.grad, {name: p.grad for name, p in net.named_parameters()}

    for mixer in ("softmax", "gla", "gated_delta_net", "kda", "gsa", "linear", "rwkv7"):
        add(f"offline/trunk/{mixer}", lambda m=mixer: trunk(m))
    add("offline/trunk/mixers", lambda: list(moved.MIXERS))

    def world_model(data: Any, **changes: Any) -> Any:
        torch.manual_seed(0)
        return moved.WorldModel.of(moved.WorldModelConfig(size=4, hidden=8, **changes), data)

    def make(name: str, data: Any, mixer: str = "gla", **changes: Any) -> Any:
        settings: dict[str, Any] = {"trunk": moved.TrunkConfig(width=16, layers=2, heads=2, mixer=mixer)}
        settings |= {"horizon": 12, "batch": 4}
        settings |= {"idt": {"span": 4}, "ad": {}, "dicp": {}, "ic_iql": {}}.get(name, {"layout": "branch"})
        known = world_model(data) if name == "sicql" and changes.get("world_model", True) else None
        torch.manual_seed(1)
        found = moved.METHODS[name]
        kind = found[1] if isinstance(found, tuple) else found.config_class
        made = moved.make_method(name, kind(**{**settings, **changes}), moved.Spaces.of(data), known)
        made.prepare(data)
        return made

    def batch(name: str, source: Any, mixer: str = "gla", **changes: Any) -> Any:
        data = source.train_data()
        method = make(name, data, mixer, **changes)
        torch.manual_seed(5)
        method.before_update()
        total, logged = method.loss(data)
        total.backward()
        grads = {n: p.grad for n, p in method.named_parameters()}
        scores = moved.few_shot(method, source.environments(), 3, seed=2)
        return total, numbers(logged), grads, dict(method.state_dict()), scores

    for name in ("sicql", "dpt", "ad", "idt", "dicp", "dit", "ic_iql"):
        for mixer in ("softmax", "gla"):
            add(f"offline/{name}/darkroom/{mixer}", lambda n=name, m=mixer: batch(n, room, m))
        if name != "dicp":
            add(f"offline/{name}/point robot", lambda n=name: batch(n, robot))
    add("offline/dicp/point robot", lambda: batch("dicp", robot))
    add("offline/sicql/w o c", lambda: batch("sicql", room, world_model=False))
    add("offline/sicql/w o q", lambda: batch("sicql", room, q_learning=False))
    add("offline/sicql/w o cq", lambda: batch("sicql", room, world_model=False, q_learning=False))
    add("offline/sicql/stride", lambda: batch("sicql", room, stride=3))
    add("offline/dpt/query first", lambda: batch("dpt", room, "softmax", layout="query_first", balanced=1.0))

    def models(encoder: str, others: int) -> Any:
        data = room.train_data()
        net = world_model(data, encoder=encoder, others=others)
        loop = moved.LoopConfig(updates=3, muon_learning_rate=0.0, warmup=1, log_every=1, checkpoint_every=2)
        made = moved.WorldModelLearner(net.config, data, 16, loop, {})
        moved.train(made, loop, Path("world"))
        return run_facts(Path("world")), made.model.prompts(data)

    for encoder, others in (("gru", 0), ("gru", 2), ("gla", 2), ("softmax", 0)):
        add(f"offline/world model/{encoder}/{others}", lambda e=encoder, o=others: quietly(lambda: models(e, o)))

    run = {
        "data": {"size": 4, "horizon": 12, "train_goals": 12, "episodes": 6, "history": 6},
        "settings": {"trunk": {"width": 16, "layers": 2, "heads": 2}, "batch": 4},
        "world_model": {"window": 4, "size": 4, "hidden": 8, "others": 2},
        "world_loop": {"updates": 3, "warmup": 1, "log_every": 1},
        "world_batch": 16,
        "loop": {"updates": 3, "warmup": 1, "log_every": 1, "checkpoint_every": 2, "evaluate_every": 2, "threads": 1},
        "judged_episodes": 2,
    }

    def command(method: str) -> Any:
        Path("c.json").write_text(json.dumps(run))
        icrl(moved, "train", "offline", "--out", "run", "--method", method, "--config", "c.json", "--evaluate", 3)
        found = [run_facts(f) for f in (Path("run"), Path("run-world_model")) if f.exists()]
        again = moved.few_shot(moved.load_method(Path("run/model.safetensors")), room.environments(), 2, seed=1)
        return found, untimed(Path("run/few_shot.json")), untimed(Path("run/config.json")), again

    for method in ("sicql", "ad", "dpt", "sicql w/o c"):
        add(f"offline/command/train/{method.replace('/', ' ')}", lambda m=method: command(m))

    def gathered(environment: str, data: dict[str, Any]) -> Any:
        Path("c.json").write_text(json.dumps({"environment": environment, "data": data}))
        icrl(moved, "collect", "t", "--config", "c.json", "--json", "n.json")
        icrl(moved, "dataset", "t", "--full", "--json", "about.json")
        read = moved.read_trajectories(Path("t"))
        return folder_facts(Path("t")), untimed(Path("n.json")), untimed(Path("about.json")), read

    add("offline/command/collect darkroom", lambda: gathered("darkroom", run["data"]))
    add(
        "offline/command/collect point robot",
        lambda: gathered("point-robot", {"horizon": 12, "tasks": 10, "episodes": 6, "history": 6}),
    )

    def suite() -> Any:
        Path("c.json").write_text(json.dumps(run))
        args = ["eval", "sicql", "--out", "suite", "--methods", "sicql", "--seeds", 1, "--episodes", 3]
        icrl(moved, *args, "--jobs", 1, "--config", "c.json", "--json", "n.json")
        return folder_facts(Path("suite")), untimed(Path("n.json"))

    add("offline/command/suite", suite)
