"""`python -m benches.readme`: write the tables of README.md and docs/SICQL.md from benches/results/; `--check` fails where they
differ."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any

from benches.common import RESULTS
from benches.end_to_end import STUDIES
from icrl.files import write_text
from icrl.reading import read_json

LINEAR_ATTENTION = ("gla", "gsa", "gated_delta_rule", "rwkv7")
README = RESULTS.parent.parent / "README.md"


def result(name: str) -> dict[str, Any]:
    return read_json(RESULTS / f"{name}.json")


def table(heads: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(r) + " |" for r in [heads, ["---"] * len(heads), *rows]]
    return "\n".join(lines)


def where(record: dict[str, Any]) -> str:
    m = record["machine"]
    kernels = f" ({m['kernels']} kernels)" if "kernels" in m else ""
    return f"{m['cpu']}{kernels}, {m['threads']} threads, torch {m['torch']}"


def demo() -> str:
    r = result("demo")
    first, methods = r["anymdp"], r["anymdp"]["methods"]
    begin, end = first["measured_over"]
    heads = [
        f"{first['tasks']} unseen AnyMDP tasks, {first['num_states']} states, 5 actions",
        "reward per step by 500",
        "by 1000",
    ]
    heads += [f"steps {begin}-{end} (mean ± 95%)", "return per episode (IQM ± 95%)"]
    rows = []
    for name in sorted(methods, key=lambda n: -methods[n]["normalized"]):
        m, c = methods[name], first["curves"][name]
        cells = [f"{c['mean'][4]:.2f}", f"{c['mean'][9]:.2f}", f"{m['normalized']:.3f} ± {m['ci95']:.3f}"]
        rows.append([name, *cells, f"{m['episode']:.3f} ± {m['episode_ci95']:.3f}"])
    tasks = r["gymnasium"]
    names = sorted(next(iter(tasks.values())), key=lambda n: -methods[n]["normalized"])
    second = table(
        ["episodes that reach the goal, 32 contexts each", *(f"{t}: by 500 / last quarter" for t in tasks)],
        [
            [n, *(f"{t[n]['by_500']['success']:.2f} / {t[n]['last_quarter']['success']:.2f}" for t in tasks.values())]
            for n in names
        ],
    )
    return table(heads, rows) + "\n\n" + second + f"\n\n{r['seconds']:.0f} s for all of it ({where(r)})."


def context() -> str:
    r = result("context")
    tenths = list(r["normalized_by_tenth"].values())
    rows = [
        ["steps", f"{r['steps']:,}"],
        ["steps per second", f"{r['steps_per_s']:,.0f}"],
        [
            "time per step, last 10K over first 10K (last tenth over first)",
            f"{r['step_time_ratio_10k']:.3f} ({r['step_time_ratio']:.3f})",
        ],
        ["growth of resident memory", f"{r['rss_growth_mb']:.1f} MB; the context is {r['state_bytes']:,} bytes"],
        ["normalised reward per step, first and last tenth", f"{tenths[0]:.2f}, {tenths[-1]:.2f}"],
    ]
    return table([where(r), ""], rows)


def acting() -> str:
    r = result("acting")
    rows = []
    for x in r["rows"]:
        if not x["what"].startswith("trunk") and x["states"] == 16:
            times = [f"{x['fused_us']:,.0f}", f"{x['module_us']:,.0f}", f"{x['ratio']:.0f}×"]
            rows.append([x["what"], str(x["contexts"]), *times, f"{x['fused_steps_per_s']:,.0f}"])
    heads = ["16 states, one thread", "contexts", "one call, µs a step", "the module, µs", "faster", "steps/s"]
    return table(heads, rows) + f"\n\n{where(r)}, medians in turns; the actions are the same."


def linear_attention() -> str:
    rows = []
    for op in LINEAR_ATTENTION:
        for x in result(f"{op}_cpu")["rows"]:
            if x["shape"] == "4x4096x4x64":
                sdpa = f"{x['sdpa x']:.1f}×" if "sdpa x" in x else ""
                times = [f"{x['ms']:.1f}", f"{x['of floor']:.1f}×", f"{x['torch x']:.1f}× ({x['torch ms']:.0f} ms)"]
                rows.append([f"`{op}`", x["gate"], x["what"], *times, sdpa])
    heads = ["float32, B=4 T=4096 H=4 D=64", "gate", "", "ms", "of the matmul floor"]
    return table([*heads, "faster than torch's chunkwise form (at its best chunk)", "than causal SDPA"], rows)


def steps() -> str:
    rows = []
    for op in LINEAR_ATTENTION:
        for gate in dict.fromkeys(x["gate"] for x in result(f"{op}_cpu")["rows"]):
            found = [
                x for x in result(f"{op}_cpu")["rows"] if x["what"] == "100 steps" and x["gate"] == gate
            ]  # by batch size
            cells = [f"{x['ms'] * 10:.1f} µs, {x['torch x']:.1f}×" for x in found]
            rows.append([f"`{op}_step`", gate, *cells])
    shapes = [x["shape"].split("x")[0] for x in result("gla_cpu")["rows"] if x["what"] == "100 steps"]
    heads = ["one token, H=4 D=64: time, and how much faster than torch", "gate"]
    return table([*heads, *dict.fromkeys(f"B={b}" for b in shapes)], rows) + f"\n\n{where(result('gla_cpu'))}."


def swap() -> str:
    rows = []
    for x in result("swap_cpu")["rows"]:
        shape = f"T={x['T']}" if x["T"] > 1 else f"B={x['batch']}"
        rows.append([x["case"], x["what"], shape, f"{x['ms']:.1f}", f"{x['torch x']:.1f}× ({x['torch ms']:.0f} ms)"])
    heads = ["float32, channels of 128", "", "", "ms", "faster than transformers' torch code"]
    return table(heads, rows) + f"\n\n{where(result('swap_cpu'))}."


def traffic() -> str:
    rows = []
    for x in result("triton_traffic")["rows"]:
        if x["call"] != "step" and (x["B"], x["T"], x["K"]) == (8, 16384, 128):
            cells = [f"`{x['op']}`", x["gate"], f"{x['call']}, H={x['H']}", f"{x['launches']}"]
            ratio = x["bytes_per_token"] / x["ideal_bytes_per_token"]
            rows.append([*cells, f"{x['bytes_per_token']:,.0f}", f"{ratio:.2f}", f"{x['floor_ms']:.3f}"])
    heads = ["counted, not timed: bfloat16, B=8 T=16384 K=V=128", "gate", "", "launches", "bytes per token"]
    return table([*heads, "of what must move", "ms at 4.3 TB/s"], rows)


def value_iteration() -> str:
    r = result("value_iteration_cpu")
    rows = []
    for x in r["rows"]:
        chained = isinstance(x["discount"], list)
        if chained and x["tables"] != "anymdp":
            continue
        rows.append(
            [
                f"{x['tables']}, {x['input']}",
                "three" if chained else str(x["discount"]),
                str(x["states"]),
                f"{x['icrl, 1 thread: tasks/s']:,.0f}",
                f"{x['icrl, 2 threads: tasks/s']:,.0f}",
                f"{x['speed-up over quantecon policy iteration']:.1f}×",
                f"{x['speed-up over xenoverse']:,.0f}×",
                f"{x['icrl error']:.0e}",
            ]
        )
    rows.sort(key=lambda row: row[1] == "three")
    heads = ["tables", "discount", "states", "tasks/s, 1 thread", "2 threads"]
    heads += ["over quantecon's policy iteration, 1 thread", "over xenoverse's solver", "error, relative"]
    three = next(x["discount"] for x in r["rows"] if isinstance(x["discount"], list))
    return table(heads, rows) + f"\n\nThree: {', '.join(map(str, three))} in one call. {where(r)}."


def instruction_sets() -> str:
    r = result("instruction_sets")
    sets = [name for name in ("generic", "avx2", "avx512") if f"{name}: us" in r["rows"][0]]
    rows = []
    for x in r["rows"]:
        times = [f"{x[f'{name}: us']:,.3g}" for name in sets]
        peer = x.get("quantecon: us")
        over = [f"{peer / x[f'{name}: us']:.1f}×" if peer else "" for name in sets[1:]]
        rows.append([x["case"], *times, *over])
    names = {"generic": "generic x86-64", "avx2": "AVX2", "avx512": "AVX-512"}
    heads = ["one thread, µs a task, token or step", *(names[name] for name in sets)]
    heads += [f"quantecon's policy iteration over {names[name]}" for name in sets[1:]]
    return table(heads, rows) + f"\n\n{r['machine']['cpu']}, torch {r['machine']['torch']}; eight tasks a call."


def contention() -> str:
    r = result("contention")
    ours = [x for x in r["rows"] if not x["variant"].startswith("old")]
    rows = []
    for what in dict.fromkeys(x["what"] for x in ours):
        for busy in dict.fromkeys(x["busy_processes"] for x in ours):
            found = {x["variant"]: x for x in ours if (x["what"], x["busy_processes"]) == (what, busy)}
            cells = [f"{x['median_ms']:,.1f} ({x['ratio_to_one_thread']:.2f})" for x in found.values()]
            rows.append([what, str(busy), *cells])
    heads = ["ms (in one thread's time)", "busy processes beside", *dict.fromkeys(x["variant"] for x in ours)]
    return table(heads, rows) + f"\n\n{where(r)}."


def worlds() -> str:
    r, s = result("worlds"), result("rollout_cpu")
    rows = []
    for x in r["rows"]:
        if x["what"] in ("sample_anymdp, dense", "sample_anymdp, packed"):
            peer = f"{x['ratio']:,.0f}× ({x['xenoverse_tasks_per_s']:.2f})" if "ratio" in x else ""
            what = (
                f"AnyMDP tasks sampled, solved and filtered a second, {x['num_states']} states, {x['what'].split()[-1]}"
            )
            rows.append([what, f"{x['tasks_per_s']:,.0f}", peer])
    for size in (16, 64, 128):
        cases = {(x["case"], x["threads"]): x for x in s["rows"] if x.get("num_states") == size}
        peer = cases.get(("xenoverse AnyMDPEnv, uniform", 1))
        for case in ("uniform", "optimal", "optimal, as actions", "DPD, labelled"):
            mine = cases[case, 2]["steps_per_second"]
            ratio = (
                f"{mine / peer['steps_per_second']:,.0f}× ({peer['steps_per_second']:,.0f})"
                if peer and case == "uniform"
                else ""
            )
            rows.append([f"`rollout` steps a second, {case} behaviour, {size} states", f"{mine / 1e6:,.1f}M", ratio])
    return table(["two threads", "ours", "over xenoverse (its rate)"], rows) + f"\n\n{where(r)}."


def datasets() -> str:
    r = result("datasets")
    sets = []
    for x in r["rows"]:
        if "set" in x:
            cells = [x["set"], "-".join(str(n) for n in dict.fromkeys(x["states"])), f"{x['tasks']:,} × {x['steps']:,}"]
            cells += [f"{x['steps_per_second'] / 1e6:.2f}M", f"{x['seconds_per_task'] * 1e3:,.1f} ms"]
            cells += [f"{x['bytes_per_step']:.2f}", f"{x['bytes_per_task'] / 1e3:,.0f} KB"]
            sets.append([*cells, f"{x['planned_hours']:.1f} h, {x['planned_gigabytes']:.0f} GB"])
    heads = ["records, planned from measured costs", "states", "tasks × steps", "steps a second", "time a task"]
    first = table([*heads, "bytes a step", "a task", "the whole set"], sets)
    bare = {x["tasks of states"]: x for x in r["rows"] if x.get("discounts") == 0}
    solved = {x["tasks of states"]: x for x in r["rows"] if x.get("discounts", 0) > 0}
    tasks = []
    for name, x in bare.items():
        y = solved[name]
        cells = [name, f"{x['tasks_per_second']:,.0f}", f"{x['bytes_per_task'] / 1e3:.1f} KB"]
        tasks.append([*cells, f"{y['tasks_per_second']:,.0f}", f"{y['bytes_per_task'] / 1e3:.1f} KB"])
    heads = ["AnyMDP tasks in shards, states", "tasks a second", "a task"]
    second = table([*heads, "solved at four discounts: tasks a second", "a task"], tasks)
    rate = {x["batches"]: x["steps_per_second"] / 1e6 for x in r["rows"] if "batches" in x}
    reading = ", ".join(f"{v:.1f}M {name}" for name, v in rate.items())
    machine = f"{r['machine']['cpu']}, torch {r['machine']['torch']}; two workers of one thread each"
    text = f"{first}\n\n{second}\n\n{machine}. Steps a second into training, one thread: {reading}."
    if (RESULTS / "dataset_run.json").exists():
        x = result("dataset_run")
        text += (
            f"\n\nMade for real: the large set's first {x['tasks']:,} tasks, {x['steps'] / 1e9:.2f} billion steps, "
            f"{x['bytes'] / 1e9:.1f} GB; {x['tasks_made_in_this_run']:,} of them in the last run's {x['seconds'] / 60:.1f} "
            f"minutes, {x['steps_per_second'] / 1e6:.2f}M steps a second. Every byte checked in "
            f"{x['seconds_to_check_every_byte']:.0f} s."
        )
    return text


def few_shot(study: str) -> str:
    """A table of `benches.end_to_end sicql`."""
    r = result(f"sicql_{study}")
    methods = list(r["methods"].values())
    some, first = methods[0], r["environment"] == "stitching"
    share, published = (some["best"] or 0) > 0, any(x["published"] is not None for x in methods)

    def mean(x: dict[str, Any], key: str) -> str:
        sem = x[f"{key}_sem"]
        return f"{x[key]:.1f}" + ("" if sem is None else f" ± {sem:.1f}")

    rows = []
    for x in sorted(methods, key=lambda x: -x["first" if first else "all"]):
        cells = [mean(x, "first"), f"{x['first_reached']:.2f}"] if first else []
        cells += [mean(x, "all"), mean(x, "last")]
        cells += [f"{x['last'] / x['best']:.2f}"] if share else []
        cells += ["" if x["published"] is None else f"{x['published']:.1f}"] if published else []
        rows.append([x["title"], *cells])
    episodes = len(some["curve"])
    heads = [
        f"{study}: return, mean ± s.e.m. of {some['seeds']} seeds"
        if some["seeds"] > 1
        else f"{study}: return, one seed"
    ]
    heads += ["first episode", "reach the goal in it"] if first else []
    heads += [f"{episodes} episodes", f"the last {max(1, episodes // 4)}"]
    best = "unknown" if some["best"] is None else f"{some['best']:.1f}"
    heads += [f"of the {some['best_of']} policy's {best}" if share else ""] if share else []
    heads += ["published, another set-up"] if published else []
    note = "" if share or some["best"] is None else f" The {some['best_of']} policy reaches {best}."
    return table(heads, rows) + f"\n\n{where(r)}.{note}"


def training_step() -> str:
    r = result("sicql_cpu")
    rows = []
    for x in r["rows"]:
        ratios = [f"{x['ratio']:.1f}×", f"{x['against_public']:.1f}×"]
        rows.append([x["step"], f"{x['seconds'] * 1e3:.0f}", str(x["transitions"]), *ratios])
    heads = [f"a training step, {r['batch']} prompts of 200 steps, width 128, 4 layers", "ms", "transitions"]
    return table([*heads, "faster than three full passes", "than the public code"], rows) + f"\n\n{where(r)}."


TABLES: dict[str, Callable[[], str]] = {
    "demo": demo,
    "context": context,
    "acting": acting,
    "linear_attention": linear_attention,
    "steps": steps,
    "swap": swap,
    "traffic": traffic,
    "value_iteration": value_iteration,
    "instruction_sets": instruction_sets,
    "contention": contention,
    "worlds": worlds,
    "datasets": datasets,
    "sicql": lambda: few_shot("darkroom"),
}
SICQL_TABLES: dict[str, Callable[[], str]] = {
    study: lambda study=study: few_shot(study) for study in STUDIES if study != "darkroom"
} | {"training_step": training_step}


def main() -> int:
    same = True
    for path, tables in ((README, TABLES), (README.parent / "docs" / "SICQL.md", SICQL_TABLES)):
        old = new = path.read_text()
        for name, make in tables.items():
            block = re.compile(rf"(<!-- {name} -->\n).*?(\n<!-- end -->)", re.S)
            if not block.search(new):
                raise SystemExit(f"{path.name} has no block <!-- {name} --> ... <!-- end -->")
            text = make()
            new = block.sub(lambda m, text=text: m[1] + text + m[2], new)
        same &= old == new
        if "--check" not in sys.argv:
            write_text(path, new)
    return int("--check" in sys.argv and not same)


if __name__ == "__main__":
    sys.exit(main())
