"""Packed task batches: the same tasks as their dense tables in every method, at the size of their windows."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from icrl.omnirl.distill import DPDConfig, make_records
from icrl.omnirl.evaluate import references
from icrl.training.checkpoint import checksum
from icrl.worlds import TabularEnv, TabularTasks, TabularVectorEnv, quality, sample_anymdp, sample_bandit, sample_garnet
from icrl.worlds.draw import draw_task, to_rgb
from icrl_kernels import rollout
from icrl_kernels.tabular import packed as windows_module
from icrl_kernels.tabular.packed import PackedTransition, pack_transition


@pytest.fixture(scope="module")
def dense() -> TabularTasks:
    """Ragged in states and actions, terminals and zeros inside rows among them."""
    parts = [sample_anymdp(12, (12, 24), 3, seed=0), sample_garnet(5, (8, 20), 5, 3, seed=0)]
    return TabularTasks.concatenate([*parts, sample_bandit(2, 4, seed=0)])


@pytest.fixture(params=["one block", "many blocks"])
def packed(request, dense, monkeypatch) -> TabularTasks:
    monkeypatch.setattr(windows_module, "ENTRIES", 1 << 22 if request.param == "one block" else 500)
    return dense.pack()


def scattered(tasks: TabularTasks) -> TabularTasks:
    """The same tables, rows in reverse order amid entries of no row, some of them NaN."""
    p = tasks.transition
    assert isinstance(p, PackedTransition)
    m, lengths = len(p.probability), p.length.flatten().long()
    starts = (lengths + 1).flip(0).cumsum(0).flip(0) - lengths
    probability, reward = torch.full((2, m + len(lengths)), torch.nan)
    for old, new, k in zip(p.offset.flatten().tolist(), starts.tolist(), lengths.tolist(), strict=True):
        probability[new : new + k], reward[new : new + k] = (x[old : old + k] for x in (p.probability, tasks.reward))
    moved = PackedTransition(probability, starts.view_as(p.offset), p.first, p.length)
    return dataclasses.replace(tasks, transition=moved, reward=reward)


def same(a: TabularTasks, b: TabularTasks) -> bool:
    """Equal as tables, where a transition can happen."""
    a, b = a.dense(), b.dense()
    pairs = [(a.reward * (a.transition > 0), b.reward * (b.transition > 0))]
    pairs += [(x, b.tensors()[name]) for name, x in a.tensors().items() if name != "reward"]
    return a.num_observations == b.num_observations and all(torch.equal(x, y) for x, y in pairs)


def entries(tasks: TabularTasks) -> int:
    assert isinstance(tasks.transition, PackedTransition)
    return tasks.transition.probability.untyped_storage().size() // 4


def test_packed_tables_hold_the_same_tasks(dense, packed):
    assert packed.packed
    assert not dense.packed
    assert packed.pack() is packed
    assert dense.dense() is dense
    assert same(packed.validate(), dense)
    assert same(packed.dense().validate(), dense)
    assert same(scattered(packed).validate(), dense)
    assert packed.shape == dense.shape
    assert "packed" in repr(packed)
    assert "packed" not in repr(dense)
    share = entries(packed) / dense.reward.numel()
    assert share < 0.2  # windows, without padding


def test_methods_agree(dense, packed):
    for tasks in (packed, scattered(packed)):
        torch.testing.assert_close(tasks.expected_reward(), dense.expected_reward(), rtol=0, atol=0)
        assert torch.equal(tasks.num_successors(), dense.num_successors())
        assert torch.equal(tasks.state_of(), dense.state_of())
        anymdp = slice(0, 12)
        for ours, theirs in zip(quality(tasks[anymdp]), quality(dense[anymdp]), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
        for i in (0, 14, 18):
            one, other = tasks.to_xenoverse(i), dense.to_xenoverse(i)
            assert (one["transition"] == other["transition"]).all()
            assert one["s_e"] == other["s_e"]


def test_the_oracle_and_the_simulator_take_windows(dense, packed):
    for tasks in (packed, scattered(packed)):
        ours, theirs = tasks.solve([0.5, 0.99]), dense.solve([0.5, 0.99])
        assert torch.equal(ours.policy, theirs.policy)
        torch.testing.assert_close(ours.q, theirs.q, rtol=1e-9, atol=1e-12)
        assert torch.equal(ours.q.isinf(), ~dense.available_actions()[:, None].expand_as(ours.q))
        assert (ours.error_bound < 1e-6).all()
        one, two = (rollout(x.tables(), steps=200, seed=1) for x in (tasks, dense))
        for field in ("state", "action", "reward", "done"):
            assert torch.equal(getattr(one, field), getattr(two, field)), field


def test_environments_records_and_pictures_of_windows(dense, packed):
    some = slice(0, 5)
    one, two = (TabularEnv(x[3]) for x in (packed, dense))
    several, others = (TabularVectorEnv(x[some]) for x in (packed, dense))
    for a, b in ((one, two), (several, others)):
        assert (np.asarray(a.reset(seed=1)[0]) == b.reset(seed=1)[0]).all()
        for _ in range(60):
            action = 0 if a is one else np.zeros(5, dtype=int)
            got, want = a.step(action), b.step(action)
            assert all((np.asarray(x) == y).all() for x, y in zip(got[:4], want[:4], strict=True))
            if a is one and (got[2] or got[3]):
                a.reset(), b.reset()
    config = DPDConfig(batch=5, steps=40)
    for x, y in zip(*(make_records(config, t[some], seed=0) for t in (packed, dense)), strict=True):
        assert torch.equal(x, y)
    assert (to_rgb(draw_task(packed, 2)) == to_rgb(draw_task(dense, 2))).all()


def test_references_of_an_evaluation(packed, dense):
    some = slice(0, 12)  # with two states or more
    ours, theirs = references(packed[some], steps=200), references(dense[some], steps=200)
    assert torch.equal(ours.oracle_reward, theirs.oracle_reward)
    assert torch.equal(ours.random_episode, theirs.random_episode)


INDICES = [3, -1, slice(2, 9), slice(None), slice(8, 2), [5, 1, 5], torch.arange(19).flip(0), torch.arange(19) % 3 == 0]


@pytest.mark.parametrize("index", INDICES, ids=str)
def test_slices_hold_their_own_entries_only(dense, packed, index):
    whole = entries(packed)
    for tasks in (packed, scattered(packed)):
        part = tasks[index].validate()
        wanted = index % 19 if isinstance(index, int) else index
        assert same(part, dense[[wanted] if isinstance(wanted, int) else wanted])
        if 0 < len(set(torch.arange(19)[wanted].flatten().tolist())) < 19:
            assert entries(part) == entries(dense[wanted if not isinstance(wanted, int) else [wanted]].pack()) or (
                isinstance(index, list) and entries(part) == entries(dense[[1, 5]].pack())  # a repeat is shared
            )
            assert entries(part) < whole
    assert entries(packed[[3] * 100]) == entries(packed[3]) == entries(packed[np.int64(3)])
    assert len(packed[[]]) == 0
    with pytest.raises(IndexError):
        packed[19]


@st.composite
def windows(draw) -> tuple[PackedTransition, torch.Tensor]:
    """Any rows over any values: out of order, overlapping, shared, empty; values of 1e-8 and 1e8 together."""
    n, s, a, m = (draw(st.integers(least, most)) for least, most in ((1, 4), (1, 5), (1, 3), (0, 30)))
    g = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    length = (torch.rand(n, s, a, generator=g) * (min(s, m) + 1)).long()
    first = (torch.rand(n, s, a, generator=g) * (s - length + 1)).long()
    offset = (torch.rand(n, s, a, generator=g) * (m - length + 1)).long()
    scale = 10.0 ** torch.randint(-8, 9, (2, m), generator=g)
    values, reward = torch.randn(2, m, generator=g) * scale
    return PackedTransition(values, offset, first.int(), length.int()), reward


@settings(max_examples=200, deadline=None)
@given(table=windows(), data=st.data(), block=st.sampled_from([1, 7, 1 << 22]))
def test_operations_on_any_windows(table, data, block):
    """Taking, compacting, joining, padding and summing windows is what it is of the dense tables."""
    p, reward = table
    n, s, a = p.offset.shape
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows_module, "ENTRIES", block)
        transition, rewards = windows_module.unpack(p.check(), reward)
        j = torch.arange(s)
        inside = (j >= p.first[..., None]) & (j < (p.first + p.length)[..., None])

        def holds(q, r, wanted):
            for got, want in zip(windows_module.unpack(q.check(), r), wanted, strict=True):
                assert torch.equal(got, want)

        holds(p, reward, (transition, rewards))
        q, r = windows_module.compact(p, reward)
        assert len(q.probability) == len(r) == int(p.length.sum())
        holds(q, r, (transition, rewards))
        index = torch.tensor(data.draw(st.lists(st.integers(0, n - 1), max_size=6)), dtype=torch.int64)
        q, r = windows_module.take(p, reward, index)
        holds(q, r, (transition[index], rewards[index]))
        if len(index.unique()) < n:
            assert len(q.probability) == int(p.length[index.unique()].sum())
        both = windows_module.concatenate([p, q])
        holds(
            both,
            torch.cat([reward, r]),
            (torch.cat([transition, transition[index]]), torch.cat([rewards, rewards[index]])),
        )
        grown = windows_module.pad(p, s + 2, a + 1)
        size = (0, 2, 0, 1, 0, 2)
        holds(grown, reward, (torch.nn.functional.pad(transition, size), torch.nn.functional.pad(rewards, size)))
        sums = windows_module.row_sums(p, p.probability, reward)
        terms = transition.double() * rewards.double()
        rounding = s * 2.0**-53 * terms.abs().sum(-1)  # of a sum of s terms in any order
        assert ((sums - terms.sum(-1)).abs() <= 2 * rounding).all()
        assert torch.equal(windows_module.row_sums(p, torch.ones_like(reward)), inside.sum(-1).double())
        back, again = pack_transition(transition, rewards)
        assert torch.equal(windows_module.unpack(back, again)[0], transition)


def test_pad_and_concatenate(dense, packed):
    assert same(packed.pad(30, 7).validate(), dense.pad(30, 7))
    parts = [packed[:4], scattered(packed[4:10]), packed[10:]]
    assert same(TabularTasks.concatenate(parts).validate(), dense)
    mixed = TabularTasks.concatenate([dense[:4], packed[4:]])
    assert mixed.packed
    assert same(mixed, dense)
    small = TabularTasks.concatenate([sample_bandit(2, 4, seed=0).pack(), sample_garnet(1, 9, 2, seed=0)])
    assert small.shape == (3, 9, 4)
    assert small.validate().packed
    assert len(TabularTasks.concatenate([packed[:0], packed[:0]]).validate()) == 0


def test_files_of_both_forms(dense, packed, tmp_path):
    path = tmp_path / "tasks"
    for tasks in (dense, packed, scattered(packed), packed[2:5], packed[:0], packed[[3, 3]]):
        tasks.save(path)
        back = TabularTasks.load(path)
        assert back.packed == tasks.packed
        assert same(back, tasks)
    packed.save(path)
    size = path.stat().st_size
    dense.save(path)
    assert size < path.stat().st_size / 3
    shared = dense.pack()
    assert isinstance(shared.transition, PackedTransition)
    buffer = torch.stack([shared.transition.probability, shared.reward])
    one = dataclasses.replace(shared, transition=shared.transition._replace(probability=buffer[0]), reward=buffer[1])
    one.save(path)
    assert same(TabularTasks.load(path), one)


def test_files_of_version_1_are_read(dense, tmp_path):
    path = tmp_path / "old"
    facts = {"format": "icrl.TabularTasks", "version": "1", "num_observations": str(dense.num_observations)}
    save_file(dense.tensors(), path, metadata=facts | {"crc32": str(checksum(dense.tensors()))})
    assert same(TabularTasks.load(path), dense)
    assert set(load_file(path)) == set(dense.tensors())


def test_a_file_without_one_of_its_windows_tensors_is_damaged(packed, tmp_path):
    path = tmp_path / "tasks"
    kept = {name: t for name, t in packed.tensors().items() if name != "transition.first"}
    facts = {"format": "icrl.TabularTasks", "version": "2", "num_observations": "24", "action_tokens": "1"}
    save_file(kept, path, metadata=facts | {"crc32": str(checksum(kept))})
    with pytest.raises(ValueError, match="damaged"):
        TabularTasks.load(path)


def broken(tasks: TabularTasks, **changes) -> TabularTasks:
    assert isinstance(tasks.transition, PackedTransition)
    field = {name: changes.pop(name)(x) for name, x in tasks.transition._asdict().items() if name in changes}
    rest = {name: f(getattr(tasks, name)) for name, f in changes.items()}
    return dataclasses.replace(tasks, transition=tasks.transition._replace(**field), **rest)


def put(index, value):
    def change(x):
        x = x.clone()
        x.view(-1)[index] = value
        return x

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"probability": lambda x: x * 0.9}, r"^transition: row \(0, 0, 0\) sums to 0.9"),
        ({"probability": put(5, torch.nan)}, "^transition: holds NaN or infinity, first in task 0"),
        ({"probability": put(-1, -1.0)}, "^transition: holds negative entries, first in task 18"),
        ({"probability": lambda x: x.double()}, "^transition: wanted dtype torch.float32"),
        ({"reward": put(-1, torch.inf)}, "^reward: holds NaN or infinity, first in task 18"),
        ({"reward": lambda x: x[:-1]}, r"^reward: wanted shape \[M\]"),
        ({"first": lambda x: x + 1}, "^transition: (wanted windows within|leads to padding)"),
        ({"offset": lambda x: x - 1}, "^transition: wanted windows within"),
        ({"length": lambda x: x.long()}, "^length: wanted dtype torch.int32"),
        ({"first": lambda x: x[:, :-1]}, "^first: wanted shape"),
        ({"terminal": torch.logical_not}, "^terminal: marks padding"),
        ({"start": lambda x: x * 2}, "^start"),
    ],
    ids=str,
)
def test_validate_names_the_field(packed, change, message):
    with pytest.raises(ValueError, match=message):
        broken(packed, **change).validate()


def test_windows_stay_within_a_tasks_own_states():
    tasks = sample_garnet(2, torch.tensor([9, 12]), 2, seed=0).pack()
    assert isinstance(tasks.transition, PackedTransition)
    first = tasks.transition.first.clone()
    first[0, :9] = 12 - tasks.transition.length[0, :9]
    with pytest.raises(ValueError, match=r"^transition: leads to padding states, first in task 0"):
        broken(tasks, first=lambda _: first).validate()


def test_move_keeps_the_form(packed):
    moved = packed.to("meta")
    assert isinstance(moved.transition, PackedTransition)
    assert {t.device.type for t in moved.tensors().values()} == {"meta"}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "int32", "int64", "uint16"])
def test_any_integers_choose_tasks(dtype, packed):
    tasks = sample_anymdp(3, 8, seed=0, packed=packed)
    chosen = tasks[np.array([2, 0, 1], dtype)]
    assert torch.equal(chosen.max_steps, tasks.max_steps[[2, 0, 1]])
    assert torch.equal(chosen.start, tasks.start[[2, 0, 1]])
    assert len(tasks[np.array([True, False, True])]) == 2
    with pytest.raises(ValueError, match=r"^index: wanted"):
        tasks[[[0, 1]]]
