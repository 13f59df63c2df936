"""What an agent needs beside its step: whether a step in C++ is what a module would compute, and a loop with a simulator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from icrl_kernels import _C, _checks, _torch_private
from icrl_kernels.fused.program import Step
from icrl_kernels.tabular.rollout import RolloutState, fits
from icrl_kernels.tabular.rollout_tables import READ_PAST, RolloutTables

TRAJECTORY = (torch.int64, torch.int64, torch.int64, torch.float32, torch.uint8)


def hooked(module: nn.Module) -> bool:
    """Whether hooks, its own, its submodules' or those of all modules, want to see the module's forward pass."""
    return _torch_private.hooked(module)


def watched() -> bool:
    """Whether autocast on the CPU or a dispatch mode is on: torch's operators would then do something else."""
    return torch.is_autocast_enabled("cpu") or bool(_torch_private.dispatch_modes())


def plain_integers(tensor: object, n: int) -> int:
    """The address of a tensor [n] int64, contiguous and on the CPU; 0 for anything else."""
    return _C.plain_integers(tensor, n)


def plain_outcome(reward: object, done: object, n: int, most: float) -> tuple[int, int] | None:
    """The addresses of rewards [n] float32, none beyond `most` in size, and ends [n] uint8 of 0, 1 and 2, both contiguous and
    on the CPU; None for anything else."""
    return _C.plain_outcome(reward, done, n, most)


def closed_loop(
    step: Step,
    given: Sequence[int | float],
    tables: RolloutTables,
    state: RolloutState,
    observations: Tensor,
    noise: Tensor,
    temperature: Tensor,
    out: Sequence[Tensor],
    *,
    begin: int = 0,
    open: Tensor | None = None,
    most_reward: float,
    threads: int = 1,
) -> None:
    """T steps of an acting program and of the simulator, in C++: what `step.run` and `rollout_step` in turns give.

    The program acts: it is given with each call, in this order, observation, reward, done, tag, noise, temperature, mask, the
    tasks' actions, logits, and then previous observation and action, and this step's, which change places after a step.

    Args:
        step: of B contexts with M actions. given: addresses (of the reward, the end and the tasks' actions those that the
            simulator writes to and reads), or floats, of those tensors. tables, state: B records, on the CPU; changed.
        observations: [N,S] int64, what is seen in a task's state. noise: [T,B,M] float32. temperature: [T] float32.
        out: state, observation and action [B,L] int64, reward [B,L] float32, done [B,L] uint8: steps begin to begin+T-1 are
            written. open: [N,S,M] bool, the actions that a state has; then the mask's address is given.
    Raises:
        ValueError: a shape, dtype, device or layout is not as above; a reward beyond `most_reward` in size, an observation or
            a table out of range, by the lowest context's: contexts are at steps of their own then.
    """
    (N, S, A), B = tables.offset.shape, step.batch
    if not fits((*tables, *state)) or state.task.shape != (B,) or not all(t.is_cpu for t in (*tables, *state)):
        raise ValueError(f"tables, state: wanted {B} records on the CPU, as rollout_start gives them")
    T, M = len(temperature), noise.shape[-1]
    wanted = {
        "observations": (observations, (N, S), torch.int64),
        "noise": (noise, (T, B, M), torch.float32),
        "temperature": (temperature, (T,), torch.float32),
    }
    if open is not None:
        wanted["open"] = (open, (N, S, M), torch.bool)
    for name, (tensor, shape, dtype) in wanted.items():
        _checks.shape(name, tensor, shape)
        _checks.dtype(name, tensor, [dtype])
        if not tensor.is_cpu or not tensor.is_contiguous():
            raise ValueError(f"{name}: wanted a contiguous tensor on the CPU")
    for tensor, dtype in zip(out, TRAJECTORY, strict=True):
        _checks.shape("out", tensor, [B, "L"], L=out[0].shape[1])
        _checks.dtype("out", tensor, [dtype])
        if not tensor.is_cpu or not tensor.is_contiguous() or not 0 <= begin <= tensor.shape[1] - T:
            raise ValueError(f"out: wanted contiguous tensors of {begin + T} steps or more, on the CPU")
    ended_in = torch.empty(B, dtype=torch.int16, device="cpu")
    _C.closed_loop(
        step.program,
        list(given),
        [t.data_ptr() for t in tables],
        [t.data_ptr() if t.numel() else 0 for t in state],
        *(N, S, A, len(tables.cumulative) - READ_PAST),
        [t.data_ptr() + begin * t.element_size() for t in out],
        out[0].shape[1],
        ended_in.data_ptr(),
        observations.data_ptr(),
        0 if open is None else open.data_ptr(),
        noise.data_ptr(),
        temperature.data_ptr(),
        *(most_reward, T, M, threads),
    )
