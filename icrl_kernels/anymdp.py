"""The AnyMDP task sampler's C++ entry: fills the tables of one batch in place."""

from __future__ import annotations

import torch
from torch import Tensor

from icrl_kernels import _C, _checks


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
    _checks.shape("transition", transition, ["N", "S", "A", "S"])
    n, s, a, _ = transition.shape
    size = {"N": n, "S": s, "A": a}
    f32, i64 = torch.float32, torch.int64
    for name, tensor, wanted, dtype in (
        ("keys", keys, "N", i64),
        ("num_states", num_states, "N", i64),
        ("transition", transition, "NSAS", f32),
        ("reward", reward, "NSAS", f32),
        ("noise_state", noise_state, "NS", f32),
        ("noise_action", noise_action, "NSA", f32),
        ("start", start, "NS", f32),
        ("terminal", terminal, "NS", torch.bool),
        ("state_mapping", state_mapping, "NS", i64),
        ("max_steps", max_steps, "N", i64),
    ):
        _checks.shape(name, tensor, list(wanted), **size)
        _checks.dtype(name, tensor, [dtype])
        if tensor.device.type != "cpu" or not tensor.is_contiguous():
            raise ValueError(
                f"{name}: wanted a contiguous CPU tensor, got one on {tensor.device}, strides {tensor.stride()}"
            )
    if n and (int(num_states.min()) < 8 or int(num_states.max()) > s):
        raise ValueError(f"num_states: wanted 8 to {s}, got {int(num_states.min())} to {int(num_states.max())}")
    if a < 2 or num_observations < s or max_attempts < 1:
        raise ValueError(
            f"A, num_observations, max_attempts: wanted at least 2, {s}, 1, got {a}, {num_observations}, {max_attempts}"
        )
    attempts = torch.zeros(n, dtype=i64)
    tensors = (
        keys,
        num_states,
        transition,
        reward,
        noise_state,
        noise_action,
        start,
        terminal,
        state_mapping,
        max_steps,
    )
    pointers = [t.data_ptr() for t in (*tensors, attempts)]
    _C.anymdp_sample(*pointers, n, s, a, num_observations, max_attempts, torch.get_num_threads())
    if (attempts == 0).any():
        i = int((attempts == 0).nonzero()[0])
        raise RuntimeError(f"task {i} ({int(num_states[i])} states): no candidate of {max_attempts} passed the filters")
    return attempts
