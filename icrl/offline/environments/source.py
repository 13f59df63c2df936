"""What a source of offline data is: tasks of one family, their environments, and the trajectories gathered in them.

A source is a frozen dataclass that derives from `DataSource` and has a `name`. Its fields are the settings that "data" in a
configuration sets. It is found by its name in `icrl.offline.environments.SOURCES`; the file alone adds it there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, ClassVar, ParamSpec, Protocol, TypeVar

import gymnasium
import torch
from torch import Tensor

from icrl.offline.trajectories import Trajectories
from icrl.offline.trajectory_shards import TaskByTask

P = ParamSpec("P")
T = TypeVar("T")


class DataSource(Protocol):
    """A family of tasks, split into training and test tasks, and what gathers data in the training tasks.

    What has a default here a source may leave out. All that a source makes lies on the CPU.
    """

    name: ClassVar[str]
    horizon: int
    """Steps of every episode."""
    seed: int
    """Of tasks and data."""
    split: str = "random"
    """How training and test tasks are parted; published figures are kept by it."""
    simulators: ClassVar[tuple[str, ...]] = ()
    """Distributions (as pip names them) on which the environments' numbers depend: their versions stand in all that is made,
    and data of another version are refused."""
    tools: ClassVar[tuple[str, ...]] = ()
    """Distributions that gather data and are not needed after that: another version is refused where gathering goes on."""
    has_teacher: ClassVar[bool] = False
    """Whether `collect` trains a teacher first, in a folder of its own."""
    best_of: ClassVar[str] = "optimal"
    """The policy that earns the best known returns: "optimal", "teacher" or "scripted"."""
    counts_goals: ClassVar[bool] = False
    """Whether a positive return means that the goal was reached: tables then have its share."""
    counts_first: ClassVar[bool] = False
    """Whether the first episode is what a study is about: tables then begin with it."""

    def train_data(self) -> Trajectories:
        """The data of all training tasks. Raises ValueError where a command of its own must gather them first."""
        ...

    def environments(self, which: str = "test") -> gymnasium.vector.VectorEnv:
        """One environment a task of the "train" or "test" tasks, in the same order each time. An episode follows from the
        seed that its reset is given, whatever came before. Raises ValueError for another `which`."""
        ...

    def best_returns(self, which: str = "test") -> Tensor | None:
        """[N] float32, the best known return of an episode of each task; None where nothing is known without data. Raises
        ValueError for another `which`."""
        ...

    def prompts(self) -> Trajectories | None:
        """An episode of each test task that few-shot agents are given to begin with; None, as usual, for none."""
        return None

    def collect(self, teacher: Path) -> tuple[Trajectories | TaskByTask, dict[str, Any]]:
        """The training data, whole or task by task, and facts to be kept with them ("test_return" is the best known return
        in test tasks).

        Args:
            teacher: the folder of the teacher, where there is one: trained there, or on from where it stopped.
        """
        return self.train_data(), {}


def half(which: str) -> int:
    """0 for "train", 1 for "test". Raises ValueError for another name."""
    if which not in ("train", "test"):
        raise ValueError(f"which: wanted 'train' or 'test', got {which!r}")
    return int(which == "test")


def on_cpu(make: Callable[P, T]) -> Callable[P, T]:
    """`make`, whose tensors then lie on the CPU, whatever torch's default device is."""

    @wraps(make)
    def made(*args: P.args, **kwargs: P.kwargs) -> T:
        with torch.device("cpu"):
            return make(*args, **kwargs)

    return made


def check_grades(split: str, quality: str) -> None:
    """Raises ValueError naming the field."""
    if split not in ("random", "far"):
        raise ValueError(f"split: wanted 'random' or 'far', got {split!r}")
    if quality not in ("mixed", "medium", "expert"):
        raise ValueError(f"quality: wanted 'mixed', 'medium' or 'expert', got {quality!r}")


def check_histories(episodes: int, history: int) -> None:
    """Raises ValueError where a task's episodes are not whole histories."""
    if history < 1 or episodes < 1 or episodes % history:
        raise ValueError(f"episodes: wanted a multiple of history={history}, got {episodes}")
