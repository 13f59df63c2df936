"""The network's program: an op that is changed is refused when the step is made, or writes nothing but what is its own."""

import random

import pytest
import torch

from icrl.omnirl import EXPLORER, ValueIterationNetwork, ValueIterationNetworkConfig
from icrl.omnirl.value_iteration_step import program

A, S, B, LAYERS = 3, 6, 2, 2
GUARD = 64  # bytes before and after each tensor, in which nothing may be written


def network(**config):
    torch.manual_seed(0)
    return ValueIterationNetwork(ValueIterationNetworkConfig(actions=A, layers=LAYERS, **config))


class Guarded:
    """A tensor of zeros between two guards."""

    def __init__(self, slot):
        shape = slot.shape if slot.shared else (B, *slot.shape)
        size = torch.Size(shape).numel() * slot.dtype.itemsize
        self.memory = torch.full((2 * GUARD + size,), 77, dtype=torch.uint8)
        self.inside = self.memory[GUARD : GUARD + size]
        self.inside.zero_()
        self.tensor = self.inside.view(slot.dtype).view(shape)

    def whole(self):
        return bool((self.memory[:GUARD] == 77).all() and (self.memory[-GUARD:] == 77).all())


def run(p):
    """One token of a program with every tensor guarded; whether all guards are whole."""
    step = p.step(B)
    kept = {name: Guarded(slot) for name, slot in p.slots.items()}
    step.bind(**{name: g.tensor for name, g in kept.items() if not p.slots[name].each_call})
    given = [0.5 if s.shared else kept[n].tensor.data_ptr() for n, s in p.slots.items() if s.each_call]
    step.run(*given)
    return all(g.whole() for g in kept.values())


def changed(rng, value):
    """Another value of an op's field."""
    if isinstance(value, (tuple, list)):
        if not value or rng.random() < 0.2:
            return type(value)([*value, rng.choice([0, 1, -1])]) if isinstance(value, list) else value
        i = rng.randrange(len(value))
        return type(value)([*value[:i], changed(rng, value[i]), *value[i + 1 :]])
    if isinstance(value, float):
        return value * rng.choice([0.0, -1.0, 2.0])
    return rng.choice([value + 1, value - 1, value + 16, 0, 1, -1, 2 * value, 2**31, rng.randrange(40)])


@pytest.mark.parametrize("seed", range(6))
def test_changed_ops_stay_within_their_tensors(seed):
    rng, model, refused = random.Random(seed), network(), 0
    for _ in range(150):
        p = program(model, S, LAYERS, EXPLORER, S)
        i = rng.randrange(len(p.ops))
        op = list(p.ops[i])
        field = rng.randrange(1, len(op))
        op[field] = changed(rng, op[field])
        p.ops[i] = tuple(op)
        try:
            assert run(p), (i, p.ops[i])
        except (ValueError, TypeError):  # the latter: no list of views
            refused += 1
    assert 40 < refused < 150


def test_the_program_itself_stays_within_them():
    assert run(program(network(), S, LAYERS, EXPLORER, S))
    assert run(program(network(tied=True), S, 5, 0, S - 1))


def test_tied_layers_are_packed_once():
    few, many = (program(network(tied=True), S, n, EXPLORER, S) for n in (2, 40))
    assert few.floats == many.floats
    assert len(many.ops) > len(few.ops)


def test_indices_are_judged_before_anything_changes():
    p = program(network(), S, LAYERS, EXPLORER, S)
    for name, least in (("observation", S), ("previous", -1), ("action", A + 1)):
        step = p.step(B)
        kept = {n: Guarded(slot) for n, slot in p.slots.items()}
        step.bind(**{n: g.tensor for n, g in kept.items() if not p.slots[n].each_call})
        kept[name].tensor[1] = least
        given = [0.5 if s.shared else kept[n].tensor.data_ptr() for n, s in p.slots.items() if s.each_call]
        before = {n: g.tensor.clone() for n, g in kept.items()}
        with pytest.raises(ValueError, match=f"^{name}: wanted 0 to "):
            step.run(*given)
        assert all(torch.equal(before[n], g.tensor) for n, g in kept.items())
