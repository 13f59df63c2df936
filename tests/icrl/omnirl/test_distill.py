import gc
import threading

import pytest
import torch
from tabular import random_tasks

from icrl.omnirl.distill import (
    PUBLISHED_BEHAVIOURS,
    TAG_RANDOM,
    TAG_UNKNOWN,
    DPDConfig,
    DPDStream,
    draw_behaviours,
    draw_references,
    hash_seed,
    make_records,
    sample_tasks,
)

SMALL = DPDConfig(batch=6, steps=60)


def sampler(config, n, seed):
    return random_tasks(n, 8, config.actions, seed=seed % 2**31)


def stream(config=SMALL, seed=0, **more):
    return DPDStream(config, seed, sampler=sampler, **more)


def assert_same(a, b):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


def test_values_and_labels_are_the_references():
    tasks = sampler(SMALL, 6, 3)
    records = make_records(SMALL, tasks, seed=1)
    inner = (tasks.state_mapping[:, None] == records.observation[..., None]).long().argmax(2)
    own = (torch.arange(5) < tasks.num_actions[:, None])[:, None, None]
    q = tasks.solve(SMALL.discounts).q.masked_fill(~own, -torch.inf)[torch.arange(6)[:, None], :, inner]
    assert_same([records.q], [q.float()])
    prompt, label = draw_references(SMALL, records, seed=1)
    assert_same([label], [q[torch.arange(6)[:, None], torch.arange(60), prompt].argmax(2)])
    assert set(prompt.unique().tolist()) == {0, 1, 2, 3}
    assert bool((records.action < tasks.num_actions[:, None]).all())


def test_greedy_behaviours_are_the_labels():
    for g in range(4):
        config = DPDConfig(batch=6, steps=60, behaviours={f"greedy{g}": 1.0}, mask_record=0.0, mask_episode=0.0)
        records = make_records(config, sampler(config, 6, 3), seed=1)
        assert_same([records.action], [records.q.argmax(3)[:, :, g]])
        assert bool((records.tag == g).all())


def test_types_and_shapes():
    records = stream().batch(0)
    assert [x.dtype for x in records] == [
        torch.int64,
        torch.int64,
        torch.float32,
        torch.int64,
        torch.int64,
        torch.float32,
    ]
    assert [list(x.shape) for x in records] == [[6, 60]] * 5 + [[6, 60, 4, 5]]


def test_batches_depend_on_seed_and_number_alone():
    with_thread, without = stream(prefetch=2), stream(prefetch=0)
    first = [next(with_thread) for _ in range(4)]
    for i, batch in enumerate(first):
        assert_same(batch, next(without))
        assert_same(batch, stream().batch(i))
    assert_same(
        next(stream(config=DPDConfig(batch=2, steps=5), threads=2)), stream(DPDConfig(batch=2, steps=5)).batch(0)
    )
    saved = with_thread.state_dict()
    assert saved == {"seed": 0, "next_batch": 4}
    fifth = next(with_thread)
    other = stream(seed=99)
    next(other)
    other.load_state_dict(saved)
    assert_same(next(other), fifth)
    rewards = [b.reward for b in first] + [stream(seed=1).batch(0).reward]
    assert not any(torch.equal(rewards[i], rewards[j]) for i in range(5) for j in range(i))
    with_thread.close()
    other.close()


def test_seeds_do_not_collide():
    seeds = {hash_seed(s, i, k) for s in range(20) for i in range(500) for k in range(2)}
    assert len(seeds) == 20_000
    assert all(0 <= s < 2**63 for s in seeds)
    assert hash_seed(0, 1) != hash_seed(1, 0)


def test_errors_reach_the_consumer_and_can_be_retried():
    failing = [True]

    def sometimes(config, n, seed):
        if failing[0]:
            raise RuntimeError("no tasks today")
        return sampler(config, n, seed)

    s = DPDStream(SMALL, 0, sampler=sometimes)
    with pytest.raises(RuntimeError, match="no tasks today"):
        next(s)
    failing[0] = False
    assert_same(next(s), stream().batch(0))
    s.close()


def test_a_forgotten_stream_stops_its_thread():
    s = stream()
    next(s)
    assert any(t.name == "dpd" for t in threading.enumerate())
    del s
    gc.collect()
    assert not any(t.name == "dpd" for t in threading.enumerate())


def test_the_thread_keeps_to_its_own_number_of_threads():
    seen, before = [], torch.get_num_threads()

    def watching(config, n, seed):
        seen.append(torch.get_num_threads())
        return sampler(config, n, seed)

    torch.set_num_threads(2)
    try:
        s = DPDStream(SMALL, 0, sampler=watching, threads=1)
        next(s)
        s.close()
        assert set(seen) == {1}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_rates_of_references_and_masks():
    shared = {"steps": 100, "behaviours": {"uniform": 1.0}, "discounts": (0.0, 0.3, 0.4, 0.5)}
    config = DPDConfig(**shared, mask_episode=0.0)
    tasks = random_tasks(2000, 5, 5, seed=1, max_steps=20)

    def near(share, wanted, n):
        assert abs(float(share) - wanted) < 4 * (wanted * (1 - wanted) / n) ** 0.5

    batch = make_records(config, tasks, seed=0)
    prompt, _ = draw_references(config, batch, seed=0)
    masked = batch.tag == TAG_UNKNOWN
    assert bool((masked == masked[:, :1]).all())
    near(masked[:, 0].float().mean(), 0.15, 2000)
    assert bool((batch.tag[~masked] == TAG_RANDOM).all())
    for g, share in enumerate((0.1, 0.1, 0.2, 0.6)):
        near((prompt[:, 0] == g).float().mean(), share, 2000)
    still = (prompt == prompt[:, :1]).all(1).float().mean()
    near(still, 0.25, 2000)
    changed = (prompt[:, 1:] != prompt[:, :-1]).float().mean()  # a redraw may give the same
    assert abs(float(changed) - 0.75 * 0.2 * (1 - 0.01 - 0.01 - 0.04 - 0.36)) < 0.004

    config = DPDConfig(**shared, mask_record=0.0)
    batch = make_records(config, tasks, seed=0)
    masked, ends = batch.tag == TAG_UNKNOWN, batch.done > 0
    assert not bool((masked[:, 1:] != masked[:, :-1])[~ends[:, :-1]].any())
    starts = torch.cat([torch.ones(2000, 1, dtype=torch.bool), ends[:, :-1]], 1)
    near(masked[starts].float().mean(), 0.15, int(starts.sum()))


def test_mixture_of_behaviours():
    config = DPDConfig(behaviours=PUBLISHED_BEHAVIOURS)
    b = draw_behaviours(config, 20_000, torch.Generator().manual_seed(0))
    shares = b.initial.mean(0)  # greedy0..3, uniform, random policy, Q-learning, model-based
    for i, share in enumerate((0.0, 0.02, 0.13, 0.15, 0.1, 0.0, 0.1, 0.5)):
        assert abs(float(shares[i]) - share) < 4 * (share * (1 - share) / 20_000) ** 0.5 + 1e-6
    hands_over = b.later.amax(1) == 1
    assert bool((b.later.argmax(1)[hands_over] < 4).all())
    assert bool((b.switch[hands_over] > 0).all())
    noisy = b.epsilon > 0
    assert bool((noisy == ((b.initial[:, 7] > 0) | (b.initial[:, 6] > 0) | (b.initial[:, 2:4].sum(1) > 0))).any())
    assert not bool(noisy[b.initial[:, 4] > 0].any())


def test_published_mixture_runs():
    batch = make_records(DPDConfig(steps=300, behaviours=PUBLISHED_BEHAVIOURS), random_tasks(64, 8, 5), seed=0)
    assert set(batch.tag.unique().tolist()) == {*range(8)}


def test_sampled_tasks_follow_the_mixture():
    tasks = sample_tasks(DPDConfig(tasks={"anymdp": 1.0, "garnet": 1.0, "bandit": 1.0}), 300, seed=0)
    bandits, garnets = tasks.num_states == 1, (tasks.noise_action == 0).flatten(1).all(1) & (tasks.num_states > 1)
    assert 70 < int(bandits.sum()) < 130
    assert set(tasks.num_states.unique().tolist()) <= {1, *range(8, 17)}
    assert int(tasks.state_mapping.max()) == 15
    assert int(garnets.sum()) >= 70
    assert bool((sample_tasks(DPDConfig(), 20, seed=0, kind="anymdp", num_states=12).num_states == 12).all())
    with pytest.raises(ValueError, match="kind: wanted"):
        sample_tasks(DPDConfig(), 20, seed=0, kind="maze")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"behaviours": {"greedy4": 1.0}}, "behaviours: wanted name"),
        ({"behaviours": {"uniform+nois": 1.0}}, "behaviours: wanted name"),
        ({"behaviours": {"uniform->": 1.0}}, "behaviours: wanted name"),
        ({"behaviours": {"uniform": -1.0}}, "behaviours: wanted weights"),
        ({"behaviours": {}}, "behaviours: wanted weights"),
        ({"tasks": {"gridworld": 1.0}}, "tasks: wanted"),
        ({"references": (1.0,)}, "references: wanted 4"),
        ({"mask_record": 1.5}, "mask_record: wanted a probability"),
        ({"least_states": 9, "states": 8}, "states: wanted at least least_states=9"),
        ({"steps": 0}, "steps: wanted"),
        ({"discounts": (0.1,) * 5, "references": (0.2,) * 5}, "discounts: tags"),
    ],
)
def test_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        DPDConfig(**change)
