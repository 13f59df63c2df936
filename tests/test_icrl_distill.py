import gc
import threading

import pytest
import torch
from tabular import random_tasks

from icrl.distill import (
    PUBLISHED_BEHAVIOURS,
    TAG_RANDOM,
    TAG_UNKNOWN,
    DPDConfig,
    DPDStream,
    dpd_batch,
    draw_behaviours,
    hash_seed,
)

SMALL = DPDConfig(batch=6, steps=60)


def sampler(config, seed):
    return random_tasks(config.batch, 8, config.num_actions, seed=seed % 2**31)


def stream(config=SMALL, seed=0, **more):
    return DPDStream(config, seed, sampler=sampler, **more)


def assert_same(a, b):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


def test_labels_are_the_references_greedy_actions():
    tasks = sampler(SMALL, 3)
    batch = dpd_batch(SMALL, tasks, seed=1)
    inner = (tasks.state_mapping[:, None] == batch.observation[..., None]).long().argmax(2)
    q = tasks.solve(SMALL.discounts).q.masked_fill(
        (torch.arange(5) >= tasks.num_actions[:, None])[:, None, None], -torch.inf
    )
    record = torch.arange(6)[:, None]
    at_reference = q[record, batch.prompt, inner]  # [B,T,A]
    assert_same([batch.label], [at_reference.argmax(2)])
    assert batch.q is not None
    assert bool((batch.q <= 0).all())
    assert bool((batch.q.gather(3, q[record, :, inner].argmax(3, keepdim=True)) == 0).all())
    own = (torch.arange(5) < tasks.num_actions[:, None])[:, None, None]
    gap = (q[record, :, inner] - q[record, :, inner].amax(3, keepdim=True)).masked_fill(~own, 0.0)
    for n in range(6):  # the same up to one scale for each discount
        ratio = (gap[n] / batch.q[n]).permute(1, 0, 2)
        for g in range(4):
            r = ratio[g][torch.isfinite(ratio[g])]
            torch.testing.assert_close(r, r.mean().expand_as(r), rtol=1e-4, atol=0.0)
    assert bool((batch.action < tasks.num_actions[:, None]).all())


def test_records_are_consistent():
    batch = stream().batch(0)
    going = batch.done[:, :-1] == 0
    assert bool((batch.next_observation[:, :-1] == batch.observation[:, 1:])[going].all())
    assert batch.observation.dtype == batch.label.dtype == torch.int64
    assert batch.reward.dtype == torch.float32
    assert batch.q is not None
    assert batch.q.shape == (6, 60, 4, 5)
    assert DPDStream(DPDConfig(q_values=False, batch=2), 0, sampler=sampler).batch(0).q is None


def test_batches_depend_on_seed_and_number_alone():
    with_thread, without = stream(prefetch=2), stream(prefetch=0)
    first = [next(with_thread) for _ in range(4)]
    for i, batch in enumerate(first):
        assert_same(batch, next(without))
        assert_same(batch, stream().batch(i))
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

    def sometimes(config, seed):
        if failing[0]:
            raise RuntimeError("no tasks today")
        return sampler(config, seed)

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


def test_rates_of_references_and_masks():
    config = DPDConfig(batch=2000, steps=100, behaviours={"uniform": 1.0}, mask_episode=0.0, q_values=False)
    tasks = random_tasks(2000, 5, 5, seed=1, max_steps=20)

    def near(share, wanted, n):
        assert abs(float(share) - wanted) < 4 * (wanted * (1 - wanted) / n) ** 0.5

    batch = dpd_batch(config, tasks, seed=0)
    masked = batch.tag == TAG_UNKNOWN
    assert bool((masked == masked[:, :1]).all())
    near(masked[:, 0].float().mean(), 0.15, 2000)
    assert bool((batch.tag[~masked] == TAG_RANDOM).all())
    for g, share in enumerate((0.1, 0.1, 0.2, 0.6)):
        near((batch.prompt[:, 0] == g).float().mean(), share, 2000)
    still = (batch.prompt == batch.prompt[:, :1]).all(1).float().mean()
    near(still, 0.25, 2000)
    changed = (batch.prompt[:, 1:] != batch.prompt[:, :-1]).float().mean()  # a redraw may give the same
    assert abs(float(changed) - 0.75 * 0.2 * (1 - 0.01 - 0.01 - 0.04 - 0.36)) < 0.004

    config = DPDConfig(batch=2000, steps=100, behaviours={"uniform": 1.0}, mask_record=0.0, q_values=False)
    batch = dpd_batch(config, tasks, seed=0)
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
    batch = dpd_batch(DPDConfig(batch=64, steps=80, behaviours=PUBLISHED_BEHAVIOURS), random_tasks(64, 8, 5), seed=0)
    assert set(batch.tag.unique().tolist()) == {*range(8)}


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
        ({"num_states": (9, 8)}, "num_states: wanted"),
        ({"steps": 0}, "steps: wanted"),
        ({"discounts": (0.1,) * 5, "references": (0.2,) * 5}, "discounts: tags"),
    ],
)
def test_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        DPDConfig(**change)
