"""Calls of the samplers, files and environments."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from calls import (
    Moved,
    add,
    file_facts,
    folder_facts,
    icrl,
    untimed,
)


def world_calls() -> None:
    import numpy as np
    import torch

    from icrl import worlds
    from icrl_kernels import rollout

    moved = Moved()
    kinds: dict[str, Callable[..., Any]] = {
        "anymdp": lambda n=4, **o: worlds.sample_anymdp(n, 16, 5, seed=3, **o),
        "anymdp sizes": lambda n=4, **o: worlds.sample_anymdp(n, (8, 24), 3, seed=4, num_observations=30, **o),
        "anymdp 64": lambda n=2, **o: worlds.sample_anymdp(n, 64, 5, seed=5, **o),
        "garnet": lambda n=4, **o: worlds.sample_garnet(n, (8, 20), 4, 3, seed=6, num_observations=20, **o),
        "bandit": lambda n=4, packed=False, **o: (
            worlds.sample_bandit(n, 6, seed=7, num_observations=9, **o).pack()
            if packed
            else worlds.sample_bandit(n, 6, seed=7, num_observations=9, **o)
        ),
        "pomdp": lambda n=4, **o: worlds.sample_pomdp(n, 12, 4, seed=8, num_observations=20, **o),
        "pomdp tokens": lambda n=3, **o: worlds.sample_pomdp(
            n, (8, 12), 4, seed=9, num_observations=7, observation_tokens=3, action_tokens=2, **o
        ),
    }
    for kind, sample in kinds.items():
        add(f"worlds/sample/{kind}", lambda f=sample: f().tensors())
        add(f"worlds/sample/{kind}/packed", lambda f=sample: f(packed=True).tensors())
        add(f"worlds/sample/{kind}/first", lambda f=sample: f(2, first=5).tensors())
        for packed in (False, True):
            form = "packed" if packed else "dense"

            def about(sample: Any = sample, packed: bool = packed) -> Any:
                tasks = sample(packed=packed)
                solved = tasks.solve([0.0, 0.9, 0.994])
                few = tasks[[2, 0]] if len(tasks) > 2 else tasks[0]
                wide = tasks.pad(tasks.shape[1] + 3, tasks.shape[2] + 1)
                both = type(tasks).concatenate([few, wide])
                seen = tasks.emit(torch.zeros(len(tasks), 4, dtype=torch.int64), seed=3, step=torch.arange(4))
                return {
                    "solved": solved,
                    "quality": worlds.quality(tasks),
                    "accepted": worlds.quality(tasks).accepted(),
                    "mean": tasks.expected_reward(),
                    "successors": tasks.num_successors(),
                    "behind": tasks.state_of() if tasks.emission is None else None,
                    "masks": (tasks.state_mask(), tasks.available_actions()),
                    "few": few.tensors(),
                    "wide": wide.tensors(),
                    "both": both.tensors(),
                    "seen": seen,
                    "other form": (tasks.dense() if packed else tasks.pack()).tensors(),
                    "valid": tasks.validate().tensors(),
                    "tables": tasks.tables(),
                    "repr": repr(tasks),
                }

            add(f"worlds/about/{kind}/{form}", about)

            def file(sample: Any = sample, packed: bool = packed) -> Any:
                path = Path("tasks.safetensors")
                sample(packed=packed).save(path)
                return file_facts(path, metadata=True), type(sample(1)).load(path).tensors()

            add(f"worlds/file/{kind}/{form}", file)

        def run(sample: Any = sample) -> Any:
            tasks = sample()
            out = rollout(tasks.tables(), steps=90, seed=12)
            seen = tasks.emit(out.state, seed=12, step=torch.arange(90))
            return out, seen, worlds.regroup(out, tasks.action_tokens)

        add(f"worlds/rollout/{kind}", run)
        add(f"worlds/threads/{kind}", lambda f=sample: f(6).tensors(), 2)
        for mode in ("NEXT_STEP", "SAME_STEP"):

            def vector(sample: Any = sample, mode: str = mode) -> Any:
                from gymnasium.vector import AutoresetMode

                tasks = sample()
                env = worlds.TabularVectorEnv(tasks, AutoresetMode[mode])
                rng = np.random.default_rng(1)
                out: list[Any] = [env.reset(seed=5)]
                for t in range(60):
                    action = rng.integers(0, env.action_space.nvec)
                    out.append(env.step(action))
                    if t == 40:
                        out.append(env.reset())
                return out

            add(f"worlds/vector/{kind}/{mode}", vector)

        def single(sample: Any = sample) -> Any:
            env = worlds.TabularEnv(sample(1), render_mode="ansi")
            rng = np.random.default_rng(2)
            out: list[Any] = [env.reset(seed=6), env.render()]
            for _ in range(60):
                size = env.action_space.nvec if hasattr(env.action_space, "nvec") else env.action_space.n
                step = env.step(rng.integers(0, size))
                out += [step, env.render()]
                if step[2] or step[3]:
                    out.append(env.reset())
            return out

        add(f"worlds/environment/{kind}", single)

    def registered() -> Any:
        import gymnasium

        import icrl  # noqa: F401 (registers)

        env = gymnasium.make("icrl/AnyMDP-v0", task=3, num_states=10)
        many = gymnasium.make_vec("icrl/AnyMDP-v0", num_envs=3, task=3, num_states=10)
        return env.reset(seed=1), env.step(2), many.reset(seed=1), many.step(np.array([1, 2, 0]))

    def exchanged() -> Any:
        import gymnasium

        tasks = kinds["anymdp"]()
        table = worlds.TabularTasks.from_gymnasium(gymnasium.make("FrozenLake-v1"))
        given = [tasks.to_xenoverse(i) for i in range(2)]
        plain = [{k: v for k, v in x.items() if isinstance(v, (np.ndarray, int, float, str))} for x in given]
        return plain, sorted(map(str, given[0])), worlds.TabularTasks.from_xenoverse(given).tensors(), table.tensors()

    def drawn() -> Any:
        env = worlds.TabularEnv(kinds["anymdp"](1), render_mode="rgb_array")
        env.reset(seed=1)
        return env.metadata, env.render()

    def by_torch() -> Any:
        return worlds.sample_anymdp(3, 12, 4, seed=3, backend="torch").tensors()

    def slopes() -> Any:
        found = moved.difficulty(kinds["garnet"]())
        return found, found.slopes()

    add("worlds/registered", registered)
    add("worlds/exchange", exchanged)
    add("worlds/drawn", drawn)
    add("worlds/torch sampler", by_torch)
    add("worlds/difficulty", slopes)
    add("worlds/names", lambda: sorted(worlds.__all__))
    for kind in ("anymdp", "garnet", "bandit", "pomdp"):

        def shards(kind: str = kind) -> Any:
            more = ["--num-observations", 9, "--observation-tokens", 2, "--action-tokens", 2] if kind == "pomdp" else []
            args = ["worlds", "shards", "s", "--kind", kind, "--num-tasks", 5, "--num-states", 8, 10, "--seed", 3]
            icrl(moved, *args, "--discounts", 0.9, 0.99, "--workers", 1, *more)
            read = moved.TaskShards(Path("s"), full=True)
            return folder_facts(Path("s")), [t.tensors() for t in read], read.task(3).tensors()

        add(f"worlds/shards/{kind}", shards)

        def command(kind: str = kind) -> Any:
            sample = ["worlds", "sample", "t.safetensors", "--kind", kind, "--num-tasks", 6, "--num-states", 8]
            icrl(moved, *sample, "--seed", 4, "--json", "s.json")
            icrl(moved, "worlds", "inspect", "t.safetensors", "--json", "i.json")
            if kind != "bandit":  # whose one state the filters refuse
                least = ["--min-advantage", 0, "--min-gini", 0.0, "--min-entropy", -1]
                icrl(moved, "worlds", "filter", "t.safetensors", "k.safetensors", *least, "--json", "f.json")
            files = {p.name: file_facts(p, metadata=True) for p in sorted(Path().glob("*.safetensors"))}
            return files, {p.name: untimed(p) for p in sorted(Path().glob("*.json"))}

        add(f"worlds/commands/{kind}", command)
