"""Our samplers' distributions against xenoverse's, part by part and task by task.

Each comparison is a two-sample test on independent draws, one number a task: chi-square on counts where there are few
values, Kolmogorov-Smirnov otherwise (with ties its p-value is too large, never too small). Seeds are fixed, so a result
repeats; no p-value of a group of K may fall below .01 / K (Bonferroni).
"""

import numpy as np
import pytest
import torch

from icrl.worlds import TabularTasks, quality, sample_anymdp, sample_bandit, sample_garnet
from icrl_kernels.tabular import anymdp_reference
from icrl_kernels.tabular.anymdp_reference import CENTERS, Rewards
from icrl_kernels.tabular.counter_rng import Stream, keys_of

pytest.importorskip("xenoverse.anymdp", exc_type=ImportError)
stats = pytest.importorskip("scipy.stats")
import xenoverse.anymdp as peer  # noqa: E402
from xenoverse.anymdp import task_sampler, task_sampler_utils  # noqa: E402

Numbers = dict[str, np.ndarray]


def seed_peer(seed: int) -> None:
    np.random.seed(seed)  # noqa: NPY002 (xenoverse draws from the global generator)


def p_value(a: np.ndarray, b: np.ndarray) -> float:
    values, inverse = np.unique(np.concatenate([a, b]), return_inverse=True)
    if len(values) > 40:
        return float(stats.ks_2samp(a, b).pvalue)
    counts = np.stack([np.bincount(part, minlength=len(values)) for part in np.split(inverse, [len(a)])])
    share = min(len(a), len(b)) / (len(a) + len(b))
    rare = counts.sum(0) * share < 5  # expected, as chi-square's approximation needs
    if rare.any():
        counts = np.concatenate([counts[:, ~rare], counts[:, rare].sum(1, keepdims=True)], 1)
    counts = counts[:, counts.sum(0) > 0]
    return 1.0 if counts.shape[1] == 1 else float(stats.chi2_contingency(counts).pvalue)


def least(ours: Numbers, theirs: Numbers) -> tuple[float, dict[str, float]]:
    """The smallest p-value times their number, and all of them."""
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert np.isfinite(ours[name]).all(), name
        assert np.isfinite(theirs[name]).all(), name
    p = {name: p_value(ours[name], theirs[name]) for name in ours}
    return min(p.values()) * len(p), p


def agree(ours: Numbers, theirs: Numbers) -> None:
    smallest, p = least(ours, theirs)
    assert smallest > 0.01, p


# ---- what comes before the filters: thousands of candidates ----------------------------------------------------------


def of_transitions(start: np.ndarray, terminal: np.ndarray, t: np.ndarray) -> Numbers:
    """start [N,3], terminal [N,S], t [N,S,A,S]; -1 where a state has no row."""
    n, ns, na, _ = t.shape
    at = np.arange(ns)
    reached = t.sum(2) > 1e-30  # [N,S,S]; xenoverse's float64 keeps what float32 drops
    live = ~terminal
    widths = reached.sum(-1)
    found = {
        "terminals": terminal.sum(1),
        "goal": terminal[:, -1],
        "terminal next to the goal": terminal[:, -2],
        "start set": (start > 0) @ np.array([1, 2, 4]),
        "share of state 0": start[:, 0],
        "largest start": start.max(1),
        "mean width": widths.sum(1) / live.sum(1),
        "density": (t > 1e-30).mean((1, 2, 3)),
        "mean self-loop": np.einsum("nsas->n", t) / na / live.sum(1),
        "drift": np.einsum("nsap,nsp->n", t, at - at[:, None] + np.zeros((n, 1, 1))) / na / live.sum(1),
    }
    for s in (0, ns // 2, ns - 2, ns - 1):  # the edges of the window rules and their middle
        row, open_ = t[:, s], live[:, s]
        entropy = -(row * np.log(row, out=np.zeros_like(row), where=row > 0)).sum(-1)
        mean_to = (row * at).sum(-1)
        found |= {
            f"first successor of {s}": np.where(open_, reached[:, s].argmax(1), -1),
            f"last successor of {s}": np.where(open_, ns - 1 - reached[:, s, ::-1].argmax(1), -1),
            f"self-loop of {s}": np.where(open_, row[:, :, s].mean(1), -1),
            f"largest probability from {s}": np.where(open_, row[:, 0].max(1), -1),
            f"entropy of {s}": np.where(open_, entropy[:, 0], -1),
            f"where {s} leads": np.where(open_, mean_to[:, 0], -1),
            f"how far actions of {s} differ": np.where(open_, mean_to.std(1), -1),
        }
    return {name: x.astype(float) for name, x in found.items()}


def our_transitions(ns: int, n: int, seed: int) -> Numbers:
    keys, sizes = keys_of(seed, torch.arange(n)), torch.full((n,), ns)
    streams = [Stream(keys, 16 + what) for what in range(10)]
    start, terminal, _ = anymdp_reference._ends(streams, sizes, ns)
    t = anymdp_reference._transition(streams, sizes, terminal, 5, anymdp_reference._rows)
    return of_transitions(start[:, :3].numpy(), terminal.numpy(), t.numpy())


@pytest.fixture(scope="module", params=[(16, 1000), (32, 500)], ids=["16 states", "32 states"])
def their_transitions(request) -> tuple[int, Numbers]:
    ns, n = request.param
    seed_peer(ns)
    start, terminal, tables = np.zeros((n, 3)), np.zeros((n, ns), dtype=bool), np.zeros((n, ns, 5, ns))
    for i in range(n):
        s_0, s_0_prob, s_e, _, tables[i] = task_sampler_utils.sample_transition(ns, 5)
        start[i, s_0], terminal[i, s_e] = s_0_prob, True
    return ns, of_transitions(start, terminal, tables)


def test_transitions_are_xenoverses(their_transitions):
    ns, theirs = their_transitions
    agree(our_transitions(ns, 4000, seed=0), theirs)


@pytest.mark.parametrize("wrong", ["self-loops not halved", "weights from .5", "centers narrower", "one terminal more"])
def test_wrong_transitions_are_found(their_transitions, monkeypatch, wrong):
    ns, theirs = their_transitions
    if wrong == "self-loops not halved":
        monkeypatch.setattr(anymdp_reference, "SELF_LOOP", 1.0)
    elif wrong == "weights from .5":
        right = anymdp_reference._clipped_normal
        monkeypatch.setattr(anymdp_reference, "_clipped_normal", lambda u: right(u).clamp(min=0.5))
    elif wrong == "centers narrower":
        uniform = Stream.uniform
        here = {int(k) for k in Stream(keys_of(0, torch.arange(4000)), 16 + CENTERS).key}
        monkeypatch.setattr(
            Stream, "uniform", lambda s, n: 0.15 + 0.7 * uniform(s, n) if int(s.key[0]) in here else uniform(s, n)
        )
    else:
        right = anymdp_reference._ends

        def one_more(*arguments):
            start, terminal, goal = right(*arguments)
            terminal[:, ns // 2] = True
            return start, terminal, goal

        monkeypatch.setattr(anymdp_reference, "_ends", one_more)
    smallest, p = least(our_transitions(ns, 4000, seed=0), theirs)
    assert smallest < 1e-4, p


def of_rewards(r: Numbers) -> Numbers:
    """potential, position, noise_state [N,S], action, noise_action [N,S,A]: numbers of each term."""
    n = len(r["potential"])
    potential, position = r["potential"] - r["potential"][:, :1], r["position"]
    some = np.ptp(potential, 1) > 0
    swing = np.where(some, np.ptp(potential, 1), -1)
    steps = np.diff(position, axis=1)
    action, noise = r["action"].reshape(n, -1), r["noise_action"].reshape(n, -1)
    on = action != 0
    deviation = np.sqrt((action**2).sum(1) / np.maximum(on.sum(1), 1))
    found = {
        "potential anywhere": some,
        "potential's swing": swing,
        "potential of the middle": potential[:, potential.shape[1] // 2],
        "potential of the last": potential[:, -1],
        "potential's bend": potential[:, -1] - 2 * potential[:, potential.shape[1] // 2],
        "position of the first": position[:, 0],
        "position of the last": position[:, -1],
        "position's last step": steps[:, -1],
        "position's largest step": steps[:, :-1].max(1),
        "position's flat steps": (steps[:, :-1] == 0).sum(1),
        "noise of a state": r["noise_state"][:, 3],
        "states without noise": (r["noise_state"] == 0).sum(1),
        "largest noise of a state over the rise": r["noise_state"].max(1) / np.ptp(position, 1),
        "actions that cost": on.sum(1),
        "deviation of costs": deviation,
        "largest cost over deviation": np.abs(action).max(1) / np.maximum(deviation, 1e-300),
        "noise of actions": noise.mean(1) / np.maximum(deviation, 1e-300),
        "actions that cost without noise": (on & (noise == 0)).sum(1),
    }
    return {name: x.astype(float) for name, x in found.items()}


def our_rewards(ns: int, n: int, seed: int) -> Numbers:
    keys, sizes = keys_of(seed, torch.arange(n)), torch.full((n,), ns)
    streams = [Stream(keys, 16 + what) for what in range(10)]
    none = torch.zeros(n, ns, dtype=torch.bool)
    rewards: Rewards = anymdp_reference._rewards(streams, sizes, none, none[:, 0], 5)
    return of_rewards({name: x.numpy() for name, x in rewards._asdict().items()})


@pytest.fixture(scope="module", params=[16, 32], ids=["16 states", "32 states"])
def their_rewards(request) -> tuple[int, Numbers]:
    ns = request.param
    seed_peer(ns)
    terms: dict[str, list] = {k: [] for k in ("potential", "position", "noise_state", "action", "noise_action")}
    for _ in range(2000):
        terms["potential"].append(
            task_sampler_utils.sample_potential_reward(ns)[:, 0, 0]
        )  # potential(s) − potential(0)
        position, noise = task_sampler_utils.sample_position_reward(ns, [])
        terms["position"].append(position[0, 0]), terms["noise_state"].append(noise[0, 0])
        action, noise = task_sampler_utils.sample_state_action_cost(ns, 5)
        terms["action"].append(action[..., 0]), terms["noise_action"].append(noise[..., 0])
    return ns, of_rewards({name: np.stack(x) for name, x in terms.items()})


def test_reward_terms_are_xenoverses(their_rewards):
    ns, theirs = their_rewards
    agree(our_rewards(ns, 5000, seed=1), theirs)


@pytest.mark.parametrize("wrong", ["normals that are uniform", "exponentials a quarter larger"])
def test_wrong_reward_terms_are_found(their_rewards, monkeypatch, wrong):
    ns, theirs = their_rewards
    if wrong == "normals that are uniform":
        monkeypatch.setattr(anymdp_reference, "_normal", lambda stream, n: 12**0.5 * (stream.uniform(n) - 0.5))
    else:
        right = anymdp_reference._exponential
        monkeypatch.setattr(anymdp_reference, "_exponential", lambda u: 1.25 * right(u))
    smallest, p = least(our_rewards(ns, 5000, seed=1), theirs)
    assert smallest < 1e-4, p


def test_steps_reward_by_how_episodes_end():
    """min(N, 0)/100 with a goal, max(N, 0)/100 with pitfalls alone, else 0: xenoverse has it inside sample_mdp."""
    keys, sizes = keys_of(5, torch.arange(6000)), torch.full((6000,), 16)
    streams = [Stream(keys, 16 + what) for what in range(10)]
    terminal, goal = torch.zeros(6000, 16, dtype=torch.bool), torch.zeros(6000, dtype=torch.bool)
    terminal[:4000, 7], goal[:2000] = True, True
    step = anymdp_reference._rewards(streams, sizes, terminal, goal, 5).step.numpy()
    drawn = np.random.default_rng(0).normal(size=(2, 4000)) * 0.01
    agree(
        {"goal": step[:2000], "pitfalls": step[2000:4000]},
        {"goal": np.minimum(drawn[0], 0), "pitfalls": np.maximum(drawn[1], 0)},
    )
    assert (step[4000:] == 0).all()


# ---- Garnet and bandits ----------------------------------------------------------------------------------------------


def of_garnet(t: np.ndarray, r: np.ndarray, steps: np.ndarray) -> Numbers:
    n, ns = t.shape[:2]
    on = t[:, 3, 1] > 0
    first, last = on.argmax(1), ns - 1 - on[:, ::-1].argmax(1)
    return {
        "successors": on.sum(1).astype(float),
        "nearest successor": first.astype(float),
        "distance of successors": (last - first).astype(float),
        "weight of the nearest": t[np.arange(n), 3, 1, first],
        "largest weight": t[:, 5, 0].max(1),
        "reward": r[np.arange(n), 3, 1, first],
        "spread of rewards": np.where(t > 0, r, 0).reshape(n, -1).std(1),
        "horizon": steps.astype(float),
    }


@pytest.mark.parametrize(("ns", "branching"), [(16, 2), (16, 4), (32, 2)])
def test_garnet_is_xenoverses(ns, branching):
    theirs = [peer.GarnetTaskSampler(ns, 5, b=branching, sigma=0.1, seed=i) for i in range(4800 // ns)]
    tables, rewards = np.stack([x["transition"] for x in theirs]), np.stack([x["reward"] for x in theirs])
    ours = sample_garnet(3000, ns, 5, branching, sigma=0.1, seed=0)
    agree(
        of_garnet(ours.transition.double().numpy(), ours.reward.double().numpy(), ours.max_steps.numpy()),
        of_garnet(tables, rewards, np.ceil([x["max_steps"] for x in theirs])),
    )


def of_bandits(means: np.ndarray, noise: np.ndarray) -> Numbers:
    return {
        "best arm": means.max(1),
        "worst arm": means.min(1),
        "gap": np.diff(np.sort(means, 1)[:, -2:])[:, 0],
        "deviation": means.std(1),
        "noise": (noise / means).mean(1),
        "noise anywhere": (noise > 0).any(1).astype(float),
    }


def test_bandits_are_xenoverses():
    seed_peer(0)
    theirs = [task_sampler_utils.sample_bandit(5) for _ in range(2000)]
    ours = sample_bandit(8000, 5, seed=0)
    agree(
        of_bandits(ours.reward[:, 0, :, 0].double().numpy(), ours.noise_action[:, 0].double().numpy()),
        of_bandits(*(np.stack([x[k][0, :, 0] for x in theirs]) for k in ("reward", "reward_noise"))),
    )


# ---- whole tasks, after the filters ----------------------------------------------------------------------------------


def of_tasks(tasks: TabularTasks, attempts: torch.Tensor) -> Numbers:
    """At γ = .99: values in units of the spread of rewards, action gaps; then what the filters see, and the tables."""
    t, _ = tasks.dense_tables()
    t, live = t.double(), (~tasks.terminal).sum(-1)
    rewards, rank = tasks.expected_reward().double(), torch.arange(t.shape[1], dtype=torch.float64)
    solved = tasks.solve(0.99)
    spread = rewards.flatten(1).std(-1)
    gap = solved.q.max(-1, keepdim=True).values - solved.q.topk(2, -1).values[..., 1:]
    found = {
        "attempts": attempts.clamp(max=12),
        "window width": (t.sum(2) > 1e-30).sum((1, 2)) / live,
        "density": (t > 1e-30).double().mean((1, 2, 3)),
        "largest probability": t.amax(-1).mean(-1).sum(-1) / live,
        "drift": (t.mean(2) * (rank - rank[:, None])).sum((1, 2)) / live,
        "self-loop": torch.diagonal(t.mean(2), dim1=1, dim2=2).sum(-1) / live,
        "terminals": tasks.terminal.sum(-1),
        "goal": tasks.terminal[:, -1],
        "start states": (tasks.start > 0).sum(-1),
        "likeliest start": tasks.start.amax(-1),
        "horizon": tasks.max_steps,
        "mean reward": rewards.sum((1, 2)) / live,
        "reward spread": spread,
        "least reward": rewards.flatten(1).amin(-1),
        "largest reward": rewards.flatten(1).amax(-1),
        "noise of states": tasks.noise_state.mean(-1),
        "noise of actions": tasks.noise_action.mean((1, 2)),
        "value of the start": (solved.v * tasks.start).sum(-1) / spread,
        "largest value": solved.v.amax(-1) / spread,
        "spread of values": solved.v.std(-1) / spread,
        "mean action gap": gap.mean((1, 2)) / spread,
        "least action gap": gap[..., 0].masked_fill(tasks.terminal, torch.inf).amin(1) / spread,
        **quality(tasks)._asdict(),
    }
    return {name: x.double().numpy() for name, x in found.items()}


@pytest.mark.slow
@pytest.mark.parametrize(("ns", "count"), [(16, 200), (32, 60)])
def test_accepted_tasks_are_xenoverses(ns, count, monkeypatch):
    attempts, sampled = [], []
    once = task_sampler.sample_mdp
    monkeypatch.setattr(task_sampler, "sample_mdp", lambda *a, **k: attempts.append(1) or once(*a, **k))
    for i in range(count):
        before = len(attempts)
        sampled.append((peer.AnyMDPTaskSampler(ns, 5, seed=i), len(attempts) - before))
    theirs = TabularTasks.from_xenoverse([task for task, _ in sampled])
    keys, sizes = keys_of(0, torch.arange(3000), stream=1), torch.full((3000,), ns)
    steps = anymdp_reference.max_steps_of(keys, sizes)
    found = anymdp_reference.sample(keys, sizes, steps, ns, 5, 1000, progress=False)
    ours = sample_anymdp(3000, ns, 5, seed=0)
    agree(
        of_tasks(ours, found.attempts[found.task.argsort()]),
        of_tasks(theirs, torch.tensor([tried for _, tried in sampled])),
    )
