"""Calls of the tabular ops."""

from __future__ import annotations

import itertools
from typing import Any

from calls import (
    REFUSED,
    add,
)


def tabular_calls() -> None:
    import torch
    from torch import Tensor

    import icrl_kernels as ik

    f32, f64 = torch.float32, torch.float64

    def tables(n: int, s: int, a: int, dtype: torch.dtype = f32, width: int | None = None, seed: int = 0) -> Any:
        """Random tasks: windows of `width` successors, the last state terminal, unequal sizes."""
        g = torch.Generator().manual_seed(seed + 1000 * s)
        width = width or s
        states = torch.randint(max(2, s - 3), s + 1, (n,), generator=g)
        actions = torch.randint(2, a + 1, (n,), generator=g)
        index = torch.arange(s)
        own = index < states[:, None]
        terminal = index == states[:, None] - 1
        room = (states.view(n, 1, 1, 1) - width + 1).clamp_min(1)
        first = (torch.rand(n, s, a, 1, generator=g, dtype=f64) * room).long()
        inside = (index >= first) & (index < first + width) & own[:, None, None]
        p = (0.1 + torch.rand(n, s, a, s, generator=g, dtype=f64)) * inside
        p = (
            p.masked_fill((terminal | ~own)[:, :, None, None], 0.0)
            * (torch.arange(a) < actions[:, None])[:, None, :, None]
        )
        p = p / p.sum(3, keepdim=True).clamp_min(1e-30)
        start = torch.zeros(n, s)
        start[:, 0] = 1.0
        return {
            "transition": p.to(dtype),
            "reward": torch.randn(n, s, a, s, generator=g).to(dtype),
            "noise_state": torch.rand(n, s, generator=g),
            "noise_action": torch.rand(n, s, a, generator=g) * (torch.rand(n, s, a, generator=g) < 0.5),
            "start": start,
            "terminal": terminal,
            "max_steps": torch.randint(5, 40, (n,), generator=g),
            "num_states": states,
            "num_actions": actions,
        }

    several = torch.tensor([0.0, 0.5, 0.93, 0.994])
    methods = ("auto", "policy_iteration", "value_iteration", "modified_policy_iteration")

    def solve(
        s: int,
        dtype: torch.dtype = f32,
        discount: float | Tensor = 0.93,
        form: str = "dense",
        n: int = 3,
        a: int = 5,
        width: int | None = None,
        sizes: bool = True,
        ends: bool = True,
        costs: bool = False,
        **options: Any,
    ) -> Any:
        t = tables(n, s, a, dtype, width)
        p, r = t["transition"], t["reward"]
        if costs:  # so that no policy that never ends earns
            r = -r.abs() - 0.1
        if form == "packed":
            p, r = ik.pack_transition(p, r)
        elif form == "packed mean":
            r = (p * r).sum(-1)
            p = ik.pack_transition(p)
        elif form == "mean":
            r = (p * r).sum(-1)
        options |= {"terminal": t["terminal"]} if ends else {}
        options |= {"num_states": t["num_states"]} if sizes else {}
        return ik.value_iteration(p, r, discount, **options)

    for s in (3, 16, 64, 100, 128):
        for dtype, form in itertools.product((f32, f64), ("dense", "packed", "mean", "packed mean")):
            short = str(dtype).removeprefix("torch.")
            add(
                f"value_iteration/{s}/{short}/{form}",
                lambda s=s, d=dtype, f=form: solve(s, d, several, f, width=max(3, s // 4)),
            )
        for method in methods:
            for form in ("dense", "packed"):
                add(
                    f"value_iteration/{s}/{method}/{form}",
                    lambda s=s, m=method, f=form: solve(s, method=m, form=f, width=max(3, s // 4)),
                )
        add(f"value_iteration/{s}/full rows", lambda s=s: solve(s, sizes=False))
        add(f"value_iteration/{s}/zero rows end", lambda s=s: solve(s, ends=False))
        add(f"value_iteration/{s}/undiscounted", lambda s=s: solve(s, discount=1.0, width=max(3, s // 2), costs=True))
        add(f"value_iteration/{s}/threads", lambda s=s: solve(s, discount=several, n=8, width=max(3, s // 4)), 2)
        if s <= 16:
            for method in methods:
                add(
                    f"value_iteration/{s}/reference/{method}",
                    lambda s=s, m=method: solve(s, discount=several, method=m, backend="reference"),
                )
    each = torch.tensor([[0.1, 0.9], [0.5, 0.99], [0.99, 0.0]], dtype=f64)
    add("value_iteration/discount a task", lambda: solve(16, discount=each))
    add("value_iteration/discount 0", lambda: solve(16, discount=0.0))
    add("value_iteration/near 1", lambda: solve(16, discount=0.9999, width=4))
    add("value_iteration/coarse", lambda: solve(64, method="value_iteration", tol=1e-2))
    add("value_iteration/one action", lambda: solve(16, a=2, n=1))
    add("value_iteration/none", lambda: ik.value_iteration(torch.zeros(0, 4, 2, 4), torch.zeros(0, 4, 2), 0.9))
    add("value_iteration/schema", lambda: str(torch.ops.icrl.value_iteration.default._schema))

    def wrong_solve(change: str) -> Any:
        t = tables(3, 6, 3)
        p, r, g, options = t["transition"], t["reward"], 0.9, {"terminal": t["terminal"]}
        if change == "negative":
            p[1, 0, 1, 2] = -0.25
        elif change == "sum":
            p[2, 0, 0] *= 1.5
        elif change == "infinite":
            r[0, 0, 0] = torch.inf
        elif change == "discount":
            g = torch.tensor([0.5, 1.5])
        elif change == "endless":
            g, options, p = 1.0, {}, torch.full((1, 2, 2, 2), 0.5)
            r = torch.ones(1, 2, 2)
        elif change == "earns for ever":
            g, r = 1.0, r + 5
            p[0, 0] = torch.eye(6)[0]
        elif change == "method":
            options["method"] = "guess"
        elif change == "backend":
            options["backend"] = "tpu"
        elif change == "gradient":
            r.requires_grad_()
        elif change == "shape":
            r = r[:, :, :2]
        elif change == "window":
            q = ik.pack_transition(p)
            p, r = q._replace(first=q.first + 6), (p * r).sum(-1)
        return ik.value_iteration(p, r, g, **options)

    for change in (
        "negative", "sum", "infinite", "discount", "earns for ever", "endless", "method", "backend", "gradient", "shape", "window",
    ):  # fmt: skip
        add(f"{REFUSED}value_iteration/{change}", lambda c=change: wrong_solve(c))

    for s, dtype in itertools.product((3, 16, 100), (f32, f64)):
        short = str(dtype).removeprefix("torch.")

        def pack(s: int = s, dtype: torch.dtype = dtype) -> Any:
            t = tables(4, s, 4, dtype, width=3)
            found, r = ik.pack_transition(t["transition"], t["reward"])
            return found, r, found.unpack(), found.unpack(r), ik.pack_transition(t["transition"]), found.check()

        add(f"pack_transition/{s}/{short}", pack)
    add("pack_transition/none", lambda: ik.pack_transition(torch.zeros(0, 4, 2, 4)))

    # rollouts
    def random_policies(t: Any, num: int) -> Tensor:
        n, s, a, _ = t["reward"].shape
        g = torch.Generator().manual_seed(5)
        p = (0.1 + torch.rand(n, num, s, a, generator=g)) * (torch.arange(a) < t["num_actions"][:, None])[:, None, None]
        return p / p.sum(3, keepdim=True)

    def actions_of(t: Any, num: int) -> Tensor:
        n, s, _, _ = t["reward"].shape
        g = torch.Generator().manual_seed(6)
        return (torch.rand(n, num, s, generator=g) * t["num_actions"][:, None, None]).long()

    def made(form: str, s: int = 16, n: int = 5, width: int | None = 5) -> tuple[Any, Any]:
        t = tables(n, s, 4, width=width)
        if form == "dense":
            return t, ik.rollout_tables(**t)
        p, r = ik.pack_transition(t["transition"], t["reward"])
        return t, ik.rollout_tables(**{**t, "transition": p, "reward": r})

    for form, s in itertools.product(("dense", "packed"), (3, 16, 100)):
        add(f"rollout_tables/{form}/{s}", lambda f=form, s=s: made(f, s)[1])

    builtin = ("uniform", "random_policy", "q_learning", "model_based")
    mixtures: dict[str, tuple[int, dict[int | str, float]]] = {name: (0, {name: 1.0}) for name in builtin}
    mixtures |= {
        "policy": (1, {0: 1.0}),
        "policies": (2, {0: 1.0, 1: 2.0}),
        "q, model": (0, dict.fromkeys(builtin[2:], 1.0)),
    }
    mixtures["all"] = 2, {0: 1.0, 1: 1.0, **dict.fromkeys(builtin, 1.0)}

    def act(
        form: str = "dense",
        mixture: str = "all",
        s: int = 16,
        steps: int = 120,
        seed: Any = 11,
        as_actions: torch.dtype | None = None,
        labels: bool = False,
        backend: str = "auto",
        task_index: Tensor | None = None,
        again: bool = False,
    ) -> Any:
        t, ready = made(form, s)
        num, weights = mixtures[mixture]
        records = len(t["num_states"]) if task_index is None else len(task_index)
        who = ik.constant_behaviours(records, num, weights, switch=0.5, epsilon=0.3, epsilon_decay=0.002)
        policies = None
        if num:
            policies = random_policies(t, num) if as_actions is None else actions_of(t, num).to(as_actions)
        options: dict[str, Any] = {"policies": policies, "behaviours": who, "backend": backend}
        if labels:
            options["references"] = actions_of(t, 3)
        run = ik.rollout(ready, steps=steps, seed=seed, task_index=task_index, **options)
        return (run, ik.rollout(ready, steps=31, state=run.final, **options)) if again else run

    for mixture, form, backend in itertools.product(mixtures, ("dense", "packed"), ("auto", "plain")):
        add(f"rollout/{mixture}/{form}/{backend}", lambda m=mixture, f=form, b=backend: act(f, m, backend=b))
    for s in (3, 64, 100):
        add(f"rollout/states {s}", lambda s=s: act(s=s, labels=True))
    for dtype in (torch.int64, torch.int16, torch.uint8):
        add(f"rollout/actions {str(dtype)[6:]}", lambda d=dtype: act(as_actions=d, labels=True))
    add("rollout/actions plain", lambda: act(as_actions=torch.int64, labels=True, backend="plain"))
    add("rollout/labels", lambda: act(labels=True))
    add("rollout/goes on", lambda: act(labels=True, again=True))
    add("rollout/goes on plain", lambda: act(labels=True, again=True, backend="plain"))
    add("rollout/seeds", lambda: act(seed=torch.arange(5) * 2**40 - 3))
    add("rollout/task_index", lambda: act(task_index=torch.tensor([0, 1, 2, 2, 4, 0, 3])))
    add("rollout/no steps", lambda: act(steps=0))
    add("rollout/alone", lambda: ik.rollout(made("dense")[1], steps=50, seed=-1))
    add("rollout/threads", lambda: act(labels=True, task_index=torch.arange(64) % 5), 2)
    add("rollout/schema", lambda: str(torch.ops.icrl.rollout.default._schema))

    def by_steps() -> Any:
        t, ready = made("dense")
        state = ik.rollout_start(ready, seed=7, task_index=torch.tensor([0, 1, 2, 2, 4, 0, 3]))
        given = torch.rand(7, 60, generator=torch.Generator().manual_seed(2))
        out = []
        for k in range(60):
            action = (given[:, k] * t["num_actions"][state.task]).long()
            out.append((state.state.clone(), *ik.rollout_step(ready, state, action)))
        return out, state

    def by_op() -> Any:
        """The torch op with the actions given."""
        t, ready = made("packed")
        state = ik.rollout_start(ready, seed=7)
        action = (torch.rand(5, 60, generator=torch.Generator().manual_seed(2)) * t["num_actions"][:, None]).long()
        return torch.ops.icrl.rollout(*ready, None, None, [], action, list(state), 60, "auto"), state

    def by_reference() -> Any:
        t = tables(3, 9, 4, width=4)
        keys = {"seed": torch.full((3,), 4), "record": torch.arange(3), "task_index": torch.arange(3)}
        who = ik.constant_behaviours(3, 2, {0: 1, 1: 1, "uniform": 0.5}, switch=0.5, epsilon=0.5)
        return ik.rollout_reference(**t, **keys, steps=40, policies=random_policies(t, 2), behaviours=who)

    add("rollout/step by step", by_steps)
    add("rollout/torch.ops", by_op)
    add("rollout/reference", by_reference)
    for mixture in ("uniform", "q_learning", "model_based", "all"):

        def begin(mixture: str = mixture) -> Any:
            num, weights = mixtures[mixture]
            who = ik.constant_behaviours(5, num, weights)
            return ik.rollout_start(made("dense")[1], seed=3, behaviours=who)

        add(f"rollout_start/{mixture}", begin)

    def wrong_rollout(change: str) -> Any:
        t, ready = made("dense")
        options: dict[str, Any] = {"steps": 5, "seed": 1}
        if change == "policies":
            options["policies"] = random_policies(t, 2) * 0.5
        elif change == "actions":
            options["policies"] = actions_of(t, 2) + 9
        elif change == "seed":
            options["seed"] = None
        elif change == "steps":
            options["steps"] = -1
        elif change == "task_index":
            options["task_index"] = torch.tensor([7])
        elif change == "backend":
            options["backend"] = "tpu"
        elif change == "step":
            state = ik.rollout_start(ready, seed=1)
            return ik.rollout_step(ready, state, torch.full((5,), 99))
        elif change == "behaviours":
            options["behaviours"] = ik.constant_behaviours(5, 0, {"uniform": 1.0}, epsilon=2.0)
        elif change == "names":
            return ik.constant_behaviours(5, 0, {"nobody": 1.0})
        elif change == "tables":
            t["transition"][0, 0, 0] *= 2
            return ik.rollout_tables(**t)
        return ik.rollout(ready, **options)

    for change in (
        "policies", "actions", "seed", "steps", "task_index", "backend", "step", "behaviours", "names", "tables",
    ):  # fmt: skip
        add(f"{REFUSED}rollout/{change}", lambda c=change: wrong_rollout(c))

    def learn(s: int, nexts: bool, **options: Any) -> Any:
        run = act(s=s, mixture="uniform", steps=150)
        given = [run.state.long(), run.action.long(), run.reward, run.done.long()]
        more = {"next_state": run.next_state.long()} if nexts else {}
        return ik.model_based_q(*given, s, 4, **more, **options)

    for s, nexts in itertools.product((3, 16, 40), (False, True)):
        for backend in ("auto", "plain", "reference"):
            add(f"model_based_q/{s}/{backend}/{nexts}", lambda s=s, n=nexts, b=backend: learn(s, n, backend=b))
    add("model_based_q/settings", lambda: learn(16, True, bonus=0.05, discount=0.99, sweeps=3))
    add("model_based_q/threads", lambda: learn(16, False), 2)
    add("model_based_q/schema", lambda: str(torch.ops.icrl.model_based_q.default._schema))

    def here() -> Any:
        before = torch.get_num_threads()
        ik.set_threads_here(2)
        inside = torch.get_num_threads()
        ik.set_threads_here(before)
        return inside, torch.get_num_threads()

    add("set_threads_here", here)
