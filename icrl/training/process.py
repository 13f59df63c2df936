"""The process that trains: its threads and device, and the group that torchrun describes.

`prepare` heeds what a `LoopConfig` says of these. Under torchrun each process has a device of its own: `cuda:LOCAL_RANK`,
or the CPU. The group's backend follows the device of the parameters: nccl for CUDA, gloo for all others.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from icrl.training.config import LoopConfig


def rank() -> int:
    """This process's number in the group; 0 without one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together; 1 without a group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def of_the_first(value: Any) -> Any:
    """Rank 0's value, in every process of the group, which must all ask for it."""
    if not dist.is_initialized():
        return value
    found = [value]
    dist.broadcast_object_list(found)
    return found[0]


def wait_for_all() -> None:
    """Go on when every process of the group has come here."""
    if dist.is_initialized():
        dist.barrier()


def _promised(name: str, otherwise: int) -> int:
    """An integer that torchrun puts into the environment."""
    value = os.environ.get(name, str(otherwise))
    try:
        return int(value)
    except ValueError as e:
        raise ValueError(f"{name}: wanted an integer in the environment, got {value!r}") from e


def refuse_torchrun(command: str) -> None:
    """ValueError where torchrun started several processes of a command that runs in one."""
    count = _promised("WORLD_SIZE", 1)
    if count > 1:
        raise ValueError(f"torchrun: `icrl {command}` runs in one process, got {count}; start it without torchrun")


def resolve(name: str) -> torch.device:
    """The device of a setting: "auto" is CUDA where there is one, else the CPU; any other is a torch device's name.

    Under torchrun "auto" and "cuda" are the GPU of this process's number on its machine.

    Raises:
        ValueError: not a device's name, no such GPU, or one GPU named for several processes.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as e:
        raise ValueError(f"device: wanted auto or a device as torch names it, got {name!r}") from e
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available():
        raise ValueError(f"device: {name!r} asks for CUDA, and this process sees no CUDA device")
    count, processes = torch.cuda.device_count(), _promised("WORLD_SIZE", 1)
    if device.index is None:
        device = torch.device("cuda", _promised("LOCAL_RANK", 0) if processes > 1 else torch.cuda.current_device())
    elif processes > 1:
        raise ValueError(f"device: {name!r} is one GPU for {processes} processes; give cuda, and each has its own")
    if device.index >= count:
        raise ValueError(f"device: wanted GPU {device.index}, and this process sees {count}")
    return device


def prepare(loop: LoopConfig) -> torch.device:
    """Make this process what the configuration says: threads, device, and the group that torchrun describes.

    Returns:
        The device on which the model belongs.
    Raises:
        ValueError: see `resolve`.
    """
    if loop.threads:
        torch.set_num_threads(loop.threads)
    device = resolve(loop.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if _promised("WORLD_SIZE", 1) > 1 and not dist.is_initialized():
        # the others wait while rank 0 evaluates
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=2))
    return device


def parallel(model: nn.Module) -> nn.Module:
    """The model as a learner calls it: itself, or with several processes one that averages their gradients.

    The processes' parameters are made rank 0's. Which parameters get a gradient must be the same in every step; those that
    never do are left alone.
    """
    if world_size() == 1:
        return model
    return DistributedDataParallel(model, static_graph=True)


def finish() -> None:
    """Leave the group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def autocast(loop: LoopConfig, device: torch.device) -> AbstractContextManager[object]:
    """The context of a forward pass: torch's bfloat16 autocast where the configuration asks for it."""
    return torch.autocast(device.type, torch.bfloat16) if loop.autocast else nullcontext()


@contextmanager
def flushed_denormals() -> Iterator[None]:
    """Numbers below the smallest normal one count as 0: decays lead there, and they are slow."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """NumPy's and torch's global generators, which Stable-Baselines3 draws from, at a seed; as they were, afterwards."""
    before = np.random.get_state()  # noqa: NPY002 (its global one)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        try:
            yield
        finally:
            np.random.set_state(before)  # noqa: NPY002


def machine(device: torch.device) -> dict[str, str]:
    """The names of the device and of the processor, for a run's record: {"device": "cuda NVIDIA H200", "processor": ...}."""
    name = f"cuda {torch.cuda.get_device_name(device)}" if device.type == "cuda" else device.type
    return {"device": name, "processor": _processor()}


def _processor() -> str:
    listed = Path("/proc/cpuinfo")
    if listed.exists():
        for line in listed.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
