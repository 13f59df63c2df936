"""The AnyMDP sampler in torch, many candidates at once, for any device.

It draws the numbers that csrc/tabular/anymdp.inl draws, in the same places of the same streams, so a key gives the same task
up to rounding: the last bits of exp, log and sums differ, and with them, rarely, the last bit of a probability, or the
fate of a candidate that lies on the border of a filter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from icrl_kernels import PackedTransition, value_iteration
from icrl_kernels.tabular.counter_rng import Stream

SCALARS, START, ENDS, WINDOWS, WEIGHTS, CENTERS, POSITION, COSTS, ITEMS, SETTLE = range(10)
SELF_LOOP = 0.5  # what a state's own weight is multiplied by
RETRIES = 8  # rounds of a rejection that are drawn at once
F64 = torch.float64
Rows = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, float], Tensor]


class Found(NamedTuple):
    """Accepted tasks: everything of them but what depends on the key alone."""

    task: Tensor  # [n] which of the batch
    attempts: Tensor  # [n]
    start: Tensor
    terminal: Tensor
    noise_state: Tensor
    noise_action: Tensor
    first: Tensor
    length: Tensor
    probability: Tensor  # [m], of all tasks in turn
    reward: Tensor


class Rewards(NamedTuple):
    """Terms of the mean reward: of (s, a, s'), position(s') + potential(s) − potential(s') + action(s, a) + step."""

    position: Tensor  # [B,S]
    potential: Tensor  # [B,S]
    action: Tensor  # [B,S,A]
    step: Tensor  # [B]
    noise_state: Tensor  # [B,S]
    noise_action: Tensor  # [B,S,A]

    def arriving(self) -> Tensor:
        """[B,S]"""
        return self.position - self.potential

    def leaving(self) -> Tensor:
        """[B,S,A]"""
        return (self.potential + self.step[:, None])[..., None] + self.action


def max_steps_of(keys: Tensor, sizes: Tensor) -> Tensor:
    """[N] int64: steps after which an episode is truncated."""
    low = (4 * sizes).clamp(min=100)
    high = torch.maximum((8 * sizes).clamp(max=500), low + 1)
    return (low + (high - low) * Stream(keys, 0).uniform(torch.zeros_like(keys)[:, None])[:, 0]).ceil().long()


def state_mapping_of(keys: Tensor, sizes: Tensor, states: int, ids: int) -> Tensor:
    """[N,S] int64: observed ids by Fisher and Yates's shuffle, -1 in the padding."""
    at = torch.arange(states, dtype=torch.int64, device=keys.device)
    other = at + (Stream(keys, 0).uniform(1 + at.expand(len(keys), -1)) * (ids - at)).long()
    order = torch.arange(ids, dtype=torch.int64, device=keys.device).repeat(len(keys), 1)
    for s in range(states):
        pick = other[:, s : s + 1]
        chosen = order.gather(1, pick)
        order.scatter_(1, pick, order[:, s : s + 1].clone())
        order[:, s : s + 1] = chosen
    return order[:, :states].where(at < sizes[:, None], -1)


def sample(
    keys: Tensor, sizes: Tensor, max_steps: Tensor, states: int, actions: int, max_attempts: int, progress: bool
) -> Found:
    """One accepted task for each key [N], in the order of the keys; RuntimeError as `sample_anymdp`.

    As many candidates are alive as fit into the device's memory; whenever some are accepted, the next tasks take their
    places.
    """
    table = states * actions * states
    fitting = _memory(keys.device) // (40 * table + 80 * states * states)
    block = max(1, min(fitting, (2**31 - 1) // table))  # CUDA's nonzero counts in 32 bits
    found: list[Found] = []
    waiting = torch.arange(len(keys), dtype=torch.int64, device=keys.device)
    attempt = torch.ones_like(waiting)
    with tqdm(total=len(keys), unit="task", disable=not progress) as bar:
        while len(waiting):
            some = waiting[:block]
            candidates = _candidates(some, attempt[some], keys[some], sizes[some], max_steps[some], states, actions)
            found.append(candidates)
            attempt[some] += 1
            done = torch.zeros_like(keys, dtype=torch.bool)
            done[candidates.task] = True
            waiting = waiting[~done[waiting]]
            bar.update(len(candidates.task))
            late = waiting[attempt[waiting] > max_attempts]
            if len(late):
                raise RuntimeError(
                    f"task {int(late[0])} ({int(sizes[late[0]])} states): no candidate of {max_attempts} passed the filters"
                )
    if not found:
        found = [_candidates(waiting, waiting, keys, sizes, max_steps, states, actions)]
    return Found(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def _memory(device: torch.device) -> int:
    """Bytes for candidates."""
    return torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else 1 << 28


def _candidates(
    task: Tensor, attempt: Tensor, keys: Tensor, sizes: Tensor, max_steps: Tensor, states: int, actions: int
) -> Found:
    streams = [Stream(keys, attempt * 16 + what) for what in range(10)]
    start, terminal, goal = _ends(streams, sizes, states)
    rows = _rows
    if keys.device.type == "cuda":
        from icrl_kernels.tabular.anymdp_triton import transition_rows as rows  # in one pass
    transition = _transition(streams, sizes, terminal, actions, rows)
    rewards = _rewards(streams, sizes, terminal, goal, actions)
    arriving, leaving = rewards.arriving(), rewards.leaving()
    expected = leaving * transition.sum(-1)
    bonus, settled = _settle(streams[SETTLE], transition, arriving, expected, start, terminal, goal, sizes)
    arriving += bonus
    accepted = settled & _worth_playing(transition, arriving, expected, start, terminal, sizes, max_steps)

    filled = transition != 0
    some, at = filled.any(-1), torch.arange(states, dtype=torch.int64, device=keys.device)
    first = torch.where(some, filled.to(torch.int8).argmax(-1), 0)
    end = torch.where(some, states - filled.flip(-1).to(torch.int8).argmax(-1), 0)
    inside = (at >= first[..., None]) & (at < end[..., None]) & accepted[:, None, None, None]
    task_of, state_of, action_of, to = inside.nonzero(as_tuple=True)
    probability = transition[task_of, state_of, action_of, to]
    reward = leaving[task_of, state_of, action_of] + arriving[task_of, to]
    return Found(
        task[accepted],
        attempt[accepted],
        start[accepted].float(),
        terminal[accepted],
        rewards.noise_state[accepted].float(),
        rewards.noise_action[accepted].float(),
        first[accepted].int(),
        (end - first)[accepted].int(),
        probability.float(),
        torch.where(probability == 0, 0, reward).float(),
    )


def _scalar(stream: Stream, n: int) -> Tensor:
    return stream.uniform(torch.full_like(stream.key, n)[:, None])[:, 0]


def _exponential(u: Tensor) -> Tensor:
    return -torch.log1p(-u)


def _normal(stream: Stream, n: Tensor) -> Tensor:
    """From the uniforms n and n + 1."""
    return (-2 * torch.log1p(-stream.uniform(n))).sqrt() * (2 * torch.pi * stream.uniform(n + 1)).cos()


def _ends(streams: list[Stream], sizes: Tensor, states: int) -> tuple[Tensor, Tensor, Tensor]:
    """start [B,S] float64, terminal [B,S], goal [B]: whether the last state ends the episode."""
    at = torch.arange(states, dtype=torch.int64, device=sizes.device)
    retry = torch.arange(RETRIES, dtype=torch.int64, device=sizes.device)
    start = torch.zeros(len(sizes), states, dtype=F64, device=sizes.device)
    left, round_ = torch.arange(len(sizes), dtype=torch.int64, device=sizes.device), 0
    while len(left):  # until a start state has a weight
        n = (6 * (round_ + retry))[:, None] + 2 * at[:3]
        weights = _normal(streams[START][left], n.expand(len(left), -1, -1)).clamp(min=0)
        sums = weights.sum(-1)
        fine = sums >= 1e-10
        pick = fine.to(torch.int8).argmax(1)[:, None]
        w = weights.gather(1, pick[..., None].expand(-1, 1, 3))[:, 0]
        start[left, :3] = torch.where(w > 1e-10, w / sums.gather(1, pick), 0)
        left, round_ = left[~fine.any(1)], round_ + RETRIES

    real = at < sizes[:, None]
    rate = (-0.2 + 0.6 * _scalar(streams[SCALARS], 0)).clamp(min=0)
    terminal = torch.zeros(len(sizes), states, dtype=torch.bool, device=sizes.device)
    left, round_ = torch.arange(len(sizes), dtype=torch.int64, device=sizes.device), 0
    while len(left):  # until there are not too many
        ns = sizes[left, None, None]
        drawn = streams[ENDS][left].uniform((round_ + retry)[:, None] * ns + at) < rate[left, None, None]
        drawn &= real[left, None]
        fine = drawn.sum(-1) < ns[:, 0] * rate[left, None] + 1
        pick = fine.to(torch.int8).argmax(1)[:, None, None].expand(-1, 1, states)
        terminal[left] = drawn.gather(1, pick)[:, 0]
        left, round_ = left[~fine.any(1)], round_ + RETRIES
    terminal &= start == 0
    goal = _scalar(streams[SCALARS], 1) < 0.3
    terminal.scatter_(1, sizes[:, None] - 1, goal[:, None])
    return start, terminal, goal


def _clipped_normal(u: Tensor) -> Tensor:
    """clip(N(0,1), .1, 1) from uniforms."""
    return torch.special.ndtri(u).clamp_(0.1, 1.0)


def _transition(streams: list[Stream], sizes: Tensor, terminal: Tensor, actions: int, rows: Rows) -> Tensor:
    """[B,S,A,S] float64, of float32's precision."""
    batch, states = terminal.shape
    at = torch.arange(states, dtype=torch.int64, device=sizes.device)
    ns = sizes[:, None]
    live = (at < ns) & ~terminal

    far = torch.full_like(at, states).expand(batch, -1)
    here = torch.where(live, at, far)
    after = torch.cat([here, far[:, :1]], 1).flip(1).cummin(1).values.flip(1)[:, 1:]  # the next live state, or S
    second = torch.cat([after, far[:, :1]], 1).gather(1, after)
    ahead = torch.where(second < states, second + 1, ns)

    windows = streams[WINDOWS]
    from_min, to_max = (at - (ns // 2 + 1)).clamp(min=0), torch.minimum(ns, at + ns // 4 + 1)
    from_max = torch.maximum(at - 1, from_min + 1)
    to_min = torch.minimum(torch.minimum(ns - 1, at + 1), to_max - 1)
    f = from_min + (windows.uniform((3 * at).expand(batch, -1)) * (from_max - from_min)).long()
    e = torch.maximum(to_min + (windows.uniform((3 * at + 1).expand(batch, -1)) * (to_max - to_min)).long(), ahead)
    sigma = _exponential(windows.uniform((3 * at + 2).expand(batch, -1))).clamp(0.2, 1.6)

    n = at[:, None] * actions + torch.arange(actions, dtype=torch.int64, device=sizes.device)
    center = (f - 1)[..., None] + (e - (f - 1))[..., None] * streams[CENTERS].uniform(n.expand(batch, -1, -1))
    return rows(streams[WEIGHTS].key, sizes, f.where(live, 0), e.where(live, 0), sigma, center, SELF_LOOP)


def _rows(
    key: Tensor, sizes: Tensor, first: Tensor, end: Tensor, sigma: Tensor, center: Tensor, self_loop: float
) -> Tensor:
    """`icrl_kernels.tabular.anymdp_triton.transition_rows`, which says what the arguments are."""
    at = torch.arange(center.shape[1], dtype=torch.int64, device=sizes.device)
    live = first < end
    uniform = Stream.of(key).uniform(at[:, None] * sizes[:, None, None] + at)
    weight = _clipped_normal(uniform).mul_((at >= first[..., None]) & (at < end[..., None]))
    torch.diagonal(weight, dim1=1, dim2=2).mul_(torch.where(at == sizes[:, None] - 1, 0.0, self_loop))
    total_weight = weight.sum(-1)
    # [B,S,A,S], the largest tensor: the fewer passes over it the better
    bell = (center / sigma[..., None])[..., None] - (at / sigma[..., None])[:, :, None]
    torch.addcmul(bell.new_zeros(()), bell, bell, value=-1, out=bell).exp_()
    total = bell.sum(2)
    task, state, to = ((total < 1e-10) & (weight != 0)).nonzero(as_tuple=True)
    nearest = (center[task, state] - to[:, None]).abs().argmin(-1)  # far from every action: the nearest one takes it
    total[task, state, to] += 1 - bell[task, state, nearest, to]
    bell[task, state, nearest, to] = 1
    bell *= torch.where(weight == 0, 0, weight / (total_weight[..., None] * total))[:, :, None]
    scale = (1 / bell.sum(-1, keepdim=True)).masked_fill_(~live[..., None, None], 0)
    rounded = torch.mul(bell, scale, out=torch.empty_like(bell, dtype=torch.float32))
    return bell.copy_(torch.threshold_(rounded, 2.0**-126, 0.0))  # no denormals


def _rewards(streams: list[Stream], sizes: Tensor, terminal: Tensor, goal: Tensor, actions: int) -> Rewards:
    batch, states = terminal.shape
    at = torch.arange(states, dtype=torch.int64, device=sizes.device)
    real = at < sizes[:, None]
    scalar, item, position, cost = (streams[k] for k in (SCALARS, ITEMS, POSITION, COSTS))
    u = scalar.uniform(torch.arange(9, dtype=torch.int64, device=sizes.device).expand(batch, -1))

    wanted = torch.where(u[:, 2] < 0.5, 0, _exponential(u[:, 3]).clamp(0.2, 5.0))
    box = (-wanted + 2 * wanted * u[:, 4]).clamp(min=0)
    items = 1 + (u[:, 5] * 3).long()
    n = (16 * torch.arange(3, dtype=torch.int64, device=sizes.device)).expand(batch, -1)
    scale = (box / items.double().sqrt())[:, None] * (n < 16 * items[:, None])
    order = 1 + (item.uniform(n) * 5).long() + _normal(item, n + 1)
    sine = _normal(item, n + 3) * scale * _exponential(item.uniform(n + 5))
    cosine = _normal(item, n + 6) * scale * _exponential(item.uniform(n + 8))
    angle = order[..., None] * at / (2 * sizes[:, None, None])
    potential = (sine[..., None] * angle.sin() + cosine[..., None] * angle.cos()).sum(1) * real

    base = 0.2 * _exponential(u[:, 6])[:, None]
    n = (3 * at).expand(batch, -1)
    last = at == sizes[:, None] - 1
    rise = base * (_normal(position, n).clamp(min=0) + 0.2 * last.double()) * real
    height = rise.cumsum(1)
    top = height[:, -1:]
    zero = 0.1 * top + (0.9 * top - 0.1 * top) * u[:, 7:8]
    stays = real & ~terminal
    noise_state = (-0.3 + 0.6 * position.uniform(n + 2)).clamp(min=0) * base * stays

    amount = (0.05 * _exponential(u[:, 8])).clamp(max=0.1)[:, None, None]
    n = (3 * (at[:, None] * actions + torch.arange(actions, dtype=torch.int64, device=sizes.device))).expand(
        batch, -1, -1
    )
    amount = amount * (cost.uniform(n) >= 0.7) * real[..., None]
    radius, angle = (-2 * torch.log1p(-cost.uniform(n + 1))).sqrt() * amount, 2 * torch.pi * cost.uniform(n + 2)
    z = 0.01 * _normal(scalar, torch.full_like(sizes, 9)[:, None])[:, 0]
    return Rewards(
        position=(height - zero) * stays,
        potential=potential,
        action=radius * angle.cos(),
        step=torch.where(goal, z.clamp(max=0), torch.where(terminal.any(1), z.clamp(min=0), 0)),
        noise_state=noise_state,
        noise_action=(0.3 * radius * angle.sin()).clamp(min=0) * ~terminal[..., None],
    )


def _mean_reward(transition: Tensor, arriving: Tensor, leaving: Tensor) -> Tensor:
    """r̄ [B,S,A], of which `leaving` is the part that has no s'."""
    b, s, a, _ = transition.shape
    return torch.bmm(transition.view(b, s * a, s), arriving[..., None]).view(b, s, a).add_(leaving)


def _settle(
    stream: Stream,
    transition: Tensor,
    arriving: Tensor,
    expected: Tensor,
    start: Tensor,
    terminal: Tensor,
    goal: Tensor,
    sizes: Tensor,
) -> tuple[Tensor, Tensor]:
    """bonus [B,S] of arriving, and whether [B] five rounds put pitfalls below every value, the last state above starts."""
    batch, states = terminal.shape
    at = torch.arange(states, dtype=torch.int64, device=sizes.device)
    last = at == sizes[:, None] - 1
    open_states = (at < sizes[:, None]) & ~terminal
    bonus, settled = last.double(), torch.zeros(batch, dtype=torch.bool, device=sizes.device)
    left, tables = torch.arange(batch, dtype=torch.int64, device=sizes.device), transition
    for k in range(5):
        u = stream[left].uniform(3 * k + at[:3].expand(len(left), -1))
        mean = _mean_reward(tables, (arriving + bonus)[left], expected[left])
        v = value_iteration(tables, mean, 0.99, terminal=terminal[left], num_states=sizes[left]).v
        own = bonus[left]
        least = v.masked_fill(~open_states[left], torch.inf).amin(1)
        pit = own.masked_fill(at >= sizes[left, None], torch.inf).amin(1) - least + 1
        goal_value = v.gather(1, (sizes - 1 - goal.long())[left, None])[:, 0]
        fall = v.masked_fill(start[left] == 0, -torch.inf).amax(1) - goal_value + (2 + 3 * u[:, 0])
        fine = ((pit <= 0) & (fall <= 0)) | settled[left]
        drop = (pit + (1 + 9 * u[:, 1])) * (pit > 0)
        rise = torch.maximum(2 * fall, 1 + 9 * u[:, 2]) * (fall > 0)
        rise = torch.where(goal[left], rise, 0.01 * rise)
        change = rise[:, None] * last[left] - drop[:, None] * (terminal & ~last)[left]
        bonus[left] = own + change * ~fine[:, None]
        settled[left] = fine
        if 2 * int(fine.sum()) >= len(left):  # the tables are copied only where that pays
            left, tables = left[~fine], tables[~fine]
        if len(left) == 0:
            break
    return bonus, settled


def _worth_playing(
    transition: Tensor,
    arriving: Tensor,
    expected: Tensor,
    start: Tensor,
    terminal: Tensor,
    sizes: Tensor,
    max_steps: Tensor,
) -> Tensor:
    """[B] bool, at γ = 2^(−1/ns): the optimal chain is spread, and the optimal policy is worth 2 more than the random."""
    batch, states, _, _ = transition.shape
    gamma = torch.exp2(-1 / sizes.double())[:, None]
    mean = _mean_reward(transition, arriving, expected)
    best = value_iteration(transition, mean, gamma, terminal=terminal, num_states=sizes)
    at = torch.arange(states, dtype=torch.int64, device=sizes.device)
    chain = transition[torch.arange(batch, dtype=torch.int64, device=sizes.device)[:, None], at, best.policy[:, 0]]
    chain = torch.where(terminal[..., None], start[:, None], chain)
    power = torch.frexp(max_steps.double()).exponent  # ⌊log2⌋ + 1
    for k in range(int(power.max()) if batch else 0):
        square = torch.bmm(chain, chain)
        chain = square if k < int(power.min()) else torch.where((k < power)[:, None, None], square, chain)
    p = (chain[:, :3] + 1e-12) * (at < sizes[:, None])[:, None]
    gini, entropy = 1 - (p * p).sum(-1), -torch.xlogy(p, p).sum(-1) / sizes.double().log()[:, None]
    spread = (gini > 0.7) & (entropy > 0.35)

    random = transition.mean(2, keepdim=True)
    at_random = mean.mean(2, keepdim=True)
    v = value_iteration(random, at_random, gamma, terminal=terminal, num_states=sizes).v[:, 0]
    b, actions = batch, transition.shape[2]
    onward = torch.bmm(transition[:, :3].reshape(b, 3 * actions, states), v[..., None]).view(b, 3, actions)
    gap = best.q[:, 0, :3].amax(-1) - (mean[:, :3] + gamma[..., None] * onward).amax(-1)
    worth = gap * (1 - gamma) * max_steps[:, None] >= 2
    return (spread & worth).masked_fill(start[:, :3] == 0, True).all(1)


def as_transition(found: Found) -> PackedTransition:
    ends = found.length.flatten().long().cumsum(0)
    offset = (ends - found.length.flatten()).view_as(found.length)
    return PackedTransition(found.probability, offset, found.first, found.length)
