"""Calls of OmniRL and of the commands."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from calls import (
    Moved,
    add,
    folder_facts,
    icrl,
    numbers,
    run_facts,
    untimed,
)


def learning_calls() -> None:
    import torch

    moved = Moved()
    data = {"batch": 4, "steps": 48, "states": 10}
    model = {
        "layers": 2,
        "action_width": 8,
        "state_width": 12,
        "value_width": 4,
        "action_hidden": 8,
        "state_hidden": 12,
    }

    def config(**changes: Any) -> Any:
        return moved.DPDConfig(**{**data, **changes})

    def batches(prefetch: int, **changes: Any) -> Any:
        stream = moved.DPDStream(config(**changes), 3, prefetch=prefetch)
        try:
            return [next(stream) for _ in range(3)], stream.state_dict(), stream.batch(7)
        finally:
            stream.close()

    add("icrl/stream", lambda: batches(0))
    add("icrl/stream/prefetch", lambda: batches(2))
    add("icrl/stream/threads", lambda: batches(0, batch=16), 2)
    add("icrl/stream/published", lambda: batches(0, batch=24, behaviours=moved.PUBLISHED_BEHAVIOURS))
    add("icrl/stream/garnet", lambda: batches(0, tasks={"garnet": 1.0}))
    add("icrl/stream/bandit", lambda: batches(0, tasks={"bandit": 1.0}))

    def labelled() -> Any:
        tasks = moved.sample_tasks(config(), 6, 5)
        records = moved.make_batch(config(), 2, 1)
        references = moved.draw_references(config(), records, seed=4)
        return tasks.tensors(), moved.simulate(config(), tasks, seed=9, labels=True), records, references

    add("icrl/distill", labelled)
    add("icrl/hash_seed", lambda: [moved.hash_seed(i, 3 * i, -i) for i in range(20)])
    add("icrl/batch_rows", lambda: [moved.batch_rows(20, 4, i, seed=2, rank=i % 2, world=2) for i in range(12)])

    def fixed_context() -> Any:
        records = moved.make_batch(config(batch=3, steps=80, states=16), 5, 0)
        return records, moved.tokens_of(records)

    def logits(segment: int) -> Any:
        net = moved.ValueIterationNetwork.load(moved.shipped())
        _, tokens = fixed_context()
        state, out = net.initial_state(3, 16), []
        with torch.no_grad():
            for begin in range(0, 80, segment):
                found, state = net(type(tokens)(*(x[:, begin : begin + segment] for x in tokens)), state)
                out.append(found)
        return out, state

    add("icrl/omnirl/logits", lambda: logits(80))
    add("icrl/omnirl/logits segments", lambda: logits(20))
    add("icrl/omnirl/logits one by one", lambda: logits(1))
    add("icrl/omnirl/logits threads", lambda: logits(40), 2)

    def acting(**options: Any) -> Any:
        from icrl import worlds
        from icrl_kernels import rollout_start, rollout_step

        net = moved.ValueIterationNetwork.load(moved.shipped())
        tasks = worlds.sample_anymdp(4, (8, 16), 5, seed=2)
        agent = moved.Agent(net, 4, 16, seed=3, num_actions=tasks.num_actions, **options)
        ready, out = tasks.tables(), []
        state = rollout_start(ready, seed=1)
        for _ in range(40):
            action = agent.act(tasks.observe(state.state))
            reward, done, _ = rollout_step(ready, state, action)
            agent.observe(reward, done)
            out.append((action, reward, done))
        return out, agent.state

    add("icrl/omnirl/agent", lambda: acting())
    add("icrl/omnirl/agent prompt", lambda: acting(prompt=3, temperature=moved.Temperature(1.0, 0.2, 20)))

    def evaluated() -> Any:
        from icrl import worlds

        tasks = worlds.sample_anymdp(4, 10, 5, seed=2)
        known = moved.references(tasks, 2000)
        runs = {name: moved.run_baseline(tasks, name, 100, 3) for name in moved.BASELINES}
        runs["ours"] = moved.run_agent(moved.ValueIterationNetwork.load(moved.shipped()), tasks, 100, seed=2)
        return known, runs, {name: moved.scores(run, known, 50, 100) for name, run in runs.items()}

    add("icrl/evaluate", evaluated)

    def training(**changes: Any) -> Any:
        given = {
            "model": moved.ValueIterationNetworkConfig(**model),
            "data": config(),
            "segment": 24,
            "seed": 2,
            **changes,
        }
        known = {f.name for f in dataclasses.fields(moved.ValueIterationTraining)}  # the seed is the loop's now
        return moved.ValueIterationTraining(**{k: v for k, v in given.items() if k in known})

    def loss() -> Any:
        torch.manual_seed(2)
        net, c = moved.ValueIterationNetwork(moved.ValueIterationNetworkConfig(**model)), training()
        records = moved.make_batch(c.data, 5, 0)
        targets = moved.targets_of(records, c)
        output, state = net(moved.tokens_of(records), net.initial_state(4, 10))
        total, logged = moved.loss_of(output, targets, c)
        total.backward()
        return total, numbers(logged), targets, {name: p.grad for name, p in net.named_parameters()}, state

    add("icrl/omnirl/loss", loss)
    add("icrl/omnirl/loss threads", loss, 2)

    def learner() -> Any:
        """With the model's own records mixed in."""
        c = training(dagger=0.5, dagger_from=0, dagger_records=4, evaluation_tasks=2, evaluation_steps=20)
        made = moved.ValueIterationLearner(c, moved.LoopConfig(updates=2, threads=1, seed=2))
        try:
            found = [(total, numbers(logged)) for u in range(2) for total, logged in made.losses(u)]
            return found, made.own, made.collections, made.evaluate(), [p.shape for p in made.hidden_matrices()]
        finally:
            made.stream.close()

    add("icrl/omnirl/learner", learner)

    tiny = {
        "training": {
            "model": model,
            "data": data,
            "segment": 24,
            "dagger": 0.5,
            "dagger_from": 1,
            "dagger_records": 3,
            "evaluation_tasks": 2,
            "evaluation_steps": 20,
        },
        "loop": {"updates": 3, "warmup": 1, "log_every": 1, "checkpoint_every": 2, "threads": 1},
    }

    def command() -> Any:
        """A run of three updates, in two goes, with momentum and the model's own records in its checkpoint."""
        Path("c.json").write_text(json.dumps(tiny))
        args = ["train", "value-iteration-network", "--config", "c.json", "--out", "run"]
        icrl(moved, *args, "--json", "scores.json")
        return run_facts(Path("run")), untimed(Path("scores.json")), untimed(Path("run/config.json"))

    def resumed() -> Any:
        Path("c.json").write_text(json.dumps(tiny))
        args = ["train", "value-iteration-network", "--config", "c.json", "--out", "run"]
        icrl(moved, *args)
        folder = Path("run/checkpoints/00000003")
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
        icrl(moved, *args)
        return run_facts(Path("run"))

    def from_records() -> Any:
        given = {**data, "discounts": [0.0, 0.5, 0.93, 0.994]}
        Path("d.json").write_text(json.dumps(given))
        icrl(moved, "distill", "records", "--tasks", 12, "--config", "d.json", "--workers", 1, "--labels", "--seed", 3)
        icrl(moved, "dataset", "records", "--full", "--json", "about.json")
        stream = moved.RecordStream("records", 4, 3, shuffle=False, prefetch=0)
        shuffled = moved.RecordStream("records", 4, 3, prefetch=0)
        batches = [next(stream) for _ in range(3)], [next(shuffled) for _ in range(4)]
        Path("c.json").write_text(json.dumps({**tiny, "loop": {**tiny["loop"], "updates": 2}}))
        icrl(moved, "train", "value-iteration-network", "--config", "c.json", "--out", "run", "--records", "records")
        return folder_facts(Path("records")), untimed(Path("about.json")), batches, run_facts(Path("run"))

    def eval_command() -> Any:
        icrl(moved, "eval", "--num-tasks", 3, "--num-states", 8, "--steps", 60, "--json", "e.json")
        return untimed(Path("e.json"))

    def demo() -> Any:
        icrl(moved, "demo", "--tasks", 2, "--num-states", 8, "--steps", 500, "--out", "d.png", "--json", "d.json")
        return untimed(Path("d.json"))

    def context() -> Any:
        icrl(moved, "context", "--steps", 300, "--num-states", 8, "--json", "c.json")
        return untimed(Path("c.json"))

    add("icrl/command/context", context)
    add("icrl/command/train omnirl", command)
    add("icrl/command/train omnirl resumed", resumed)
    add("icrl/command/distill", from_records)
    add("icrl/command/eval", eval_command)
    add("icrl/command/demo", demo)
