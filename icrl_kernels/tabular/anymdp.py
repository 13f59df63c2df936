"""The AnyMDP task sampler's C++ entry: tables filled in place, or windows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from icrl_kernels import _C, _checks
from icrl_kernels.tabular.packed import PackedTransition

MOST_OBSERVATIONS = 2**31 - 1  # of which a list is made


class AnymdpWindows(NamedTuple):
    transition: PackedTransition
    reward: Tensor  # [M] float32: the mean reward of each transition, in the same windows; 0 where it is impossible
    attempts: Tensor  # [N] int64


def sample_anymdp_tables(
    keys: Tensor,
    num_states: Tensor,
    transition: Tensor,
    reward: Tensor,
    noise_state: Tensor,
    noise_action: Tensor,
    start: Tensor,
    terminal: Tensor,
    state_mapping: Tensor,
    max_steps: Tensor,
    *,
    num_observations: int,
    max_attempts: int,
) -> Tensor:
    """Sample one AnyMDP task for each key (arXiv 2502.02869) and write it into zeroed CPU tensors, contiguous.

    A task is a function of its key alone: the same in any batch and for any number of threads.

    Args:
        keys: [N] int64. num_states: [N] int64, 8 ≤ num_states ≤ S.
        transition, reward: [N,S,A,S] float32 zeros. noise_state, start: [N,S] float32 zeros.
        noise_action: [N,S,A] float32 zeros. terminal: [N,S] bool, false. state_mapping: [N,S] int64, -1.
        max_steps: [N] int64. num_observations: observed ids are drawn from [0, num_observations), at least S.
        max_attempts: candidates after which a task is given up.
    Returns:
        attempts: [N] int64, candidates drawn for each task.
    Raises:
        ValueError: a bad argument. RuntimeError: a task without an accepted candidate in max_attempts.
    """
    parts = (noise_state, noise_action, start, terminal, state_mapping, max_steps)
    n, s, a = _check(keys, num_states, *parts, num_observations, max_attempts)
    for name, table in (("transition", transition), ("reward", reward)):
        _tensor(name, table, "NSAS", torch.float32, N=n, S=s, A=a)
    attempts = torch.zeros(n, dtype=torch.int64, device=keys.device)
    pointers = [t.data_ptr() for t in (keys, num_states, transition, reward)]
    others = [t.data_ptr() for t in (*parts, attempts)]
    _C.anymdp_sample(*pointers, 0, 0, *others, n, s, a, num_observations, max_attempts, torch.get_num_threads())
    _all_found(attempts, num_states, max_attempts)
    return attempts


def sample_anymdp_windows(
    keys: Tensor,
    num_states: Tensor,
    noise_state: Tensor,
    noise_action: Tensor,
    start: Tensor,
    terminal: Tensor,
    state_mapping: Tensor,
    max_steps: Tensor,
    *,
    num_observations: int,
    max_attempts: int,
) -> AnymdpWindows:
    """The tasks that `sample_anymdp_tables` samples, bit for bit, in windows: dense tables are not made on the way.

    Windows reach from the first to the last entry of a row that is not zero and lie in the order of n, s, a: they are
    those of `pack_transition`. Memory: about the windows' own, 8 bytes for each probability and its reward.

    Arguments and exceptions are those of `sample_anymdp_tables`.
    """
    parts = (noise_state, noise_action, start, terminal, state_mapping, max_steps)
    n, s, a = _check(keys, num_states, *parts, num_observations, max_attempts)
    attempts = torch.zeros(n, dtype=torch.int64, device=keys.device)
    first, length = (torch.zeros(n, s, a, dtype=torch.int32, device=keys.device) for _ in range(2))
    pointers = [t.data_ptr() for t in (keys, num_states)]
    others = [t.data_ptr() for t in (first, length, *parts, attempts)]
    threads = torch.get_num_threads()
    made = _C.anymdp_sample(*pointers, 0, 0, *others, n, s, a, num_observations, max_attempts, threads)
    _all_found(attempts, num_states, max_attempts)
    ends = length.flatten().cumsum(0)
    offset = (ends - length.flatten()).view_as(length)
    probability, reward = (noise_action.new_empty(int(ends[-1]) if n else 0) for _ in range(2))
    made.move_to(probability.data_ptr(), reward.data_ptr(), offset.data_ptr(), s * a, threads)
    return AnymdpWindows(PackedTransition(probability, offset, first, length), reward, attempts)


def _tensor(name: str, tensor: Tensor, wanted: str, dtype: torch.dtype, **size: int) -> None:
    _checks.shape(name, tensor, list(wanted), **size)
    _checks.dtype(name, tensor, [dtype])
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ValueError(
            f"{name}: wanted a contiguous CPU tensor, got one on {tensor.device}, strides {tensor.stride()}"
        )


def _check(
    keys: Tensor,
    num_states: Tensor,
    noise_state: Tensor,
    noise_action: Tensor,
    start: Tensor,
    terminal: Tensor,
    state_mapping: Tensor,
    max_steps: Tensor,
    num_observations: int,
    max_attempts: int,
) -> tuple[int, int, int]:
    """N, S, A of arguments that are as promised, apart from the tables."""
    _checks.shape("noise_action", noise_action, ["N", "S", "A"])
    n, s, a = noise_action.shape
    f32, i64 = torch.float32, torch.int64
    for name, tensor, wanted, dtype in (
        ("keys", keys, "N", i64),
        ("num_states", num_states, "N", i64),
        ("noise_state", noise_state, "NS", f32),
        ("noise_action", noise_action, "NSA", f32),
        ("start", start, "NS", f32),
        ("terminal", terminal, "NS", torch.bool),
        ("state_mapping", state_mapping, "NS", i64),
        ("max_steps", max_steps, "N", i64),
    ):
        _tensor(name, tensor, wanted, dtype, N=n, S=s, A=a)
    if n and (int(num_states.min()) < 8 or int(num_states.max()) > s):
        raise ValueError(f"num_states: wanted 8 to {s}, got {int(num_states.min())} to {int(num_states.max())}")
    if a < 2:
        raise ValueError(f"noise_action: wanted at least 2 actions, got shape {list(noise_action.shape)}")
    for name, value, least, most in (
        ("num_observations", num_observations, s, MOST_OBSERVATIONS),
        ("max_attempts", max_attempts, 1, 2**62),
    ):
        _checks.integer(name, value, least, most)
    return n, s, a


def _all_found(attempts: Tensor, num_states: Tensor, max_attempts: int) -> None:
    if (attempts == 0).any():
        i = int((attempts == 0).nonzero()[0])
        raise RuntimeError(f"task {i} ({int(num_states[i])} states): no candidate of {max_attempts} passed the filters")
