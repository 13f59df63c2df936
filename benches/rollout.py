"""`python -m benches.rollout`: environment steps a second, by who acts and by threads, beside xenoverse's AnyMDPEnv.

AnyMDP tasks (32 of each size, na=5), one record each. Checked in the same run: one thread's bits are two threads'.
xenoverse's numbers are left out where it cannot be imported.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch

from benches.common import interleaved, write
from icrl.omnirl.distill import PUBLISHED_BEHAVIOURS, DPDConfig, DPDStream, draw_behaviours
from icrl.worlds import TabularTasks, sample_anymdp
from icrl_kernels import constant_behaviours, rollout, rollout_start, rollout_step

TASKS, SIZES, REPEATS = 32, (16, 64, 128), 7
STEPS = {
    "optimal": 20_000,
    "optimal, as actions": 20_000,
    "uniform": 20_000,
    "q_learning": 5_000,
    "model_based": 1_000,
    "DPD": 2_000,
    "DPD, labelled": 2_000,
}


def rate(seconds: list[float], steps: int) -> dict[str, float]:
    return {"steps_per_second": steps / statistics.median(seconds), "best": steps / min(seconds), "runs": len(seconds)}


def size_rows(num_states: int) -> list[dict[str, Any]]:
    tasks = sample_anymdp(TASKS, num_states, seed=1)
    tables = tasks.tables()
    q = tasks.solve(DPDConfig().discounts).q
    policies = torch.nn.functional.one_hot(q.argmax(3), q.shape[3]).float()
    published = DPDConfig(behaviours=PUBLISHED_BEHAVIOURS, steps=STEPS["DPD"])
    behaviours = {
        "optimal": constant_behaviours(TASKS, 4, {3: 1.0}),
        "uniform": constant_behaviours(TASKS, 4, {"uniform": 1.0}),
        "q_learning": constant_behaviours(TASKS, 4, {"q_learning": 1.0}),
        "model_based": constant_behaviours(TASKS, 4, {"model_based": 1.0}),
        "DPD": draw_behaviours(published, TASKS, torch.Generator().manual_seed(0)),
    }
    behaviours |= {"optimal, as actions": behaviours["optimal"], "DPD, labelled": behaviours["DPD"]}
    actions = q.argmax(3)
    threads = torch.get_num_threads()

    def run(name: str, n: int) -> Any:
        torch.set_num_threads(n)
        table = policies if name in ("optimal", "DPD") else actions
        labels = actions if name == "DPD, labelled" else None
        out = rollout(tables, steps=STEPS[name], seed=0, policies=table, references=labels, behaviours=behaviours[name])
        torch.set_num_threads(threads)
        return out

    functions: dict[str, Any] = {}
    for name in STEPS:
        one, two = run(name, 1), run(name, 2)
        for a, b in zip(one[:-1], two[:-1], strict=True):
            if not torch.equal(a, b):
                raise AssertionError(f"{name}: one thread and two differ")
        for n in (1, 2):
            functions[f"{name}/{n}"] = lambda name=name, n=n: run(name, n)

    def prepare() -> None:
        torch.set_num_threads(1)
        tasks.tables()
        torch.set_num_threads(threads)

    functions["tables/1"] = prepare
    peer = xenoverse_steps(tasks)
    if peer is not None:
        functions["xenoverse AnyMDPEnv, uniform/1"] = peer
    rows = []
    for label, seconds in interleaved(functions, REPEATS).items():
        name, n = label.rsplit("/", 1)
        row: dict[str, Any] = {"num_states": num_states, "case": name, "threads": int(n)}
        if name == "tables":
            rows.append({**row, "tasks_per_second": TASKS / statistics.median(seconds), "runs": len(seconds)})
        else:
            rows.append({**row, **rate(seconds, PEER_STEPS if name not in STEPS else TASKS * STEPS[name])})
    return rows


PEER_STEPS = 2_000


def xenoverse_steps(tasks: TabularTasks) -> Any:
    """2000 uniform steps of the first task in xenoverse's environment, or None where it cannot be imported."""
    try:
        from xenoverse.anymdp import AnyMDPEnv
    except ImportError as error:
        print(f"xenoverse cannot be imported ({error}): its rows are left out")
        return None
    env = AnyMDPEnv(int(tasks.max_steps[0]))
    env.set_task(tasks.to_xenoverse(0))
    actions = torch.randint(
        int(tasks.num_actions[0]), (PEER_STEPS,), generator=torch.Generator().manual_seed(0)
    ).tolist()

    def run() -> None:
        env.reset()
        for action in actions:
            _, _, terminated, truncated, _ = env.step(action)
            if terminated or truncated:
                env.reset()

    return run


def step_rows() -> list[dict[str, Any]]:
    """The cost of one call of `rollout_step`, which vector environments and evaluation pay a step."""
    tasks = sample_anymdp(TASKS, 16, seed=1)
    tables = tasks.tables()
    rows, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)
    for records in (1, 64, 1024):
        state = rollout_start(tables, seed=0, task_index=torch.arange(records) % TASKS)
        action = torch.zeros(records, dtype=torch.int64)

        def run(state: Any = state, action: Any = action) -> None:
            for _ in range(200):
                rollout_step(tables, state, action)

        seconds = statistics.median(interleaved({"": run}, REPEATS)[""]) / 200
        rows.append({"case": "rollout_step", "records": records, "threads": 1, "microseconds_a_call": seconds * 1e6})
    torch.set_num_threads(threads)
    return rows


def stream_rows() -> list[dict[str, Any]]:
    """Whole batches of training data: sampled, solved, acted in, labelled; one thread."""
    rows = []
    for least, most in ((8, 16), (32, 64)):
        config = DPDConfig(least_states=least, states=most)
        stream = DPDStream(config, 0, threads=1)
        next(stream)
        seconds = interleaved({"": lambda stream=stream: next(stream)}, 20)[""]
        stream.close()
        # the batches that were waiting cost nothing: the sum counts, not the median
        each = sum(seconds) / len(seconds)
        row = {"case": "DPD batches", "num_states": f"{least}-{most}", "batch": config.batch, "steps": config.steps}
        rows.append({**row, "threads": 1, "steps_per_second": config.batch * config.steps / each})
    return rows


def run() -> list[dict[str, Any]]:
    rows = [row for size in SIZES for row in size_rows(size)]
    return rows + step_rows() + stream_rows()


def main() -> None:
    rows = run()
    for row in rows:
        shown = {k: f"{v:,.0f}" if isinstance(v, float) else v for k, v in row.items()}
        print("  ".join(f"{k}={v}" for k, v in shown.items()))
    print(write("rollout_cpu", rows))


if __name__ == "__main__":
    main()
