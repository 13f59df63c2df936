"""One teacher for all training tasks: Stable-Baselines3's PPO, told the task that it is in, and what it gathers.

The published data come from a policy of each task. One policy that sees the task's parameters beside the observation learns
what they share, and is as good at a fraction of the steps; what it gathers holds the observation alone.

Every iteration begins with fresh episodes of all tasks and a seed of its own, so that it follows from the policy, its
optimiser and the moments before it: these are what a checkpoint is (no pickles), and a resumed run is the same run.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from icrl.extras import require, versions
from icrl.offline.provenance import check_versions
from icrl.offline.trajectories import Trajectories
from icrl.training import checkpoint
from icrl.training.process import seeded

if TYPE_CHECKING:
    from icrl.offline.environments.mujoco import MujocoData, MujocoTask

PPO_SETTINGS: dict[str, Any] = {"learning_rate": 1e-3, "batch_size": 500, "n_epochs": 10, "gamma": 0.99}
JUDGED = 2
"""Episodes of each task by which the finished teacher is judged, with the means of its actions."""


class Told(gymnasium.ObservationWrapper):
    """The observation, and the task's parameters."""

    def __init__(self, env: MujocoTask) -> None:
        super().__init__(env)
        self._task = env.task.astype(np.float32)
        size = env.observation_space.shape[0] + len(self._task)  # pyright: ignore
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (size,), np.float32)

    def observation(self, observation: np.ndarray) -> np.ndarray:
        return np.concatenate([observation, self._task])


class Teacher:
    """A policy for all training tasks of a data source, in training."""

    def __init__(self, source: MujocoData) -> None:
        name = source.make("train")[0].name
        sb3 = require("stable_baselines3", f"{name}'s teacher", "mujoco")
        vec = require("stable_baselines3.common.vec_env", f"{name}'s teacher", "mujoco")
        self.source = source
        self._told = vec.DummyVecEnv([lambda e=e: Told(e) for e in source.make("train")])
        self._normal = vec.VecNormalize(self._told, gamma=PPO_SETTINGS["gamma"])
        with seeded(source.seed):
            self._ppo = sb3.PPO(
                "MlpPolicy",
                self._normal,
                n_steps=source.horizon,
                policy_kwargs={"log_std_init": -1.0},
                device="cpu",
                **{**PPO_SETTINGS, "batch_size": min(PPO_SETTINGS["batch_size"], source.horizon * self._told.num_envs)},
            )
        self.iteration = 0
        self.returns: list[float] = []
        """Of each iteration: the mean over tasks."""

    def improve(self) -> None:
        """One iteration: an episode of every task, and what is learned from it."""
        total = 0.0

        def note(values: dict[str, Any], _: dict[str, Any]) -> bool:
            nonlocal total
            total += float(self._normal.get_original_reward().mean())
            return True

        seed = self.source.seed + 1_000_003 * (self.iteration + 1)
        steps = self.source.horizon * self._told.num_envs
        self._told.seed(seed % 2**31)
        self._ppo._last_obs = None  # learn() then begins with a reset, as it does in a resumed run
        with seeded(seed):
            self._ppo.learn(steps, callback=note, log_interval=None, reset_num_timesteps=False)  # pyright: ignore
        self.iteration += 1
        self.returns.append(total)

    def act(self, observations: np.ndarray, tasks: np.ndarray, mean: bool = False) -> np.ndarray:
        """Actions [N,A] in [-1, 1], drawn with torch's generator, or the policy's means."""
        told = np.concatenate([observations, tasks], 1).astype(np.float32)
        normal = torch.from_numpy(np.asarray(self._normal.normalize_obs(told)))
        with torch.no_grad():
            actions = self._ppo.policy(normal, deterministic=mean)[0]
        return actions.numpy().clip(-1.0, 1.0)

    def save(self, path: Path) -> None:
        tensors: dict[str, Tensor] = {}
        facts: dict[str, Any] = {"iteration": self.iteration, "returns": self.returns, "teacher": identity(self.source)}
        facts["versions"] = versions_of(self.source)
        for name, state in self._ppo.get_parameters().items():
            checkpoint.flatten(name, state, tensors, facts)
        for name, moments in (("observations", self._normal.obs_rms), ("rewards", self._normal.ret_rms)):
            tensors[f"{name}.mean"] = torch.from_numpy(np.asarray(moments.mean))
            tensors[f"{name}.var"] = torch.from_numpy(np.asarray(moments.var))
            facts[f"{name}.count"] = float(moments.count)
        checkpoint.save(path, tensors, facts)

    def load(self, path: Path, say: bool = False) -> None:
        """Raises ValueError where the file is damaged, another teacher's, or made with another simulator."""
        tensors, facts = checkpoint.load(path)
        wanted = identity(self.source)
        if facts.get("teacher") != wanted:
            found = facts.get("teacher")
            old = found if isinstance(found, dict) else {}
            changed = ", ".join(f"{k} {old.get(k)!r}, not {v!r}" for k, v in wanted.items() if old.get(k) != v)
            raise ValueError(f"teacher: {path} is another teacher's: {changed or 'of an older version'}")
        check_versions(f"teacher: {path}", facts.get("versions"), packages(self.source), say=say)
        try:
            self._restore(tensors, facts)
        except checkpoint.MALFORMED as e:
            raise ValueError(f"teacher: {path} does not fit this teacher ({checkpoint.why(e)})") from e

    def _restore(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        names = ("policy", "policy.optimizer")
        self._ppo.set_parameters({name: checkpoint.unflatten(name, tensors, facts) for name in names}, device="cpu")
        for name, moments in (("observations", self._normal.obs_rms), ("rewards", self._normal.ret_rms)):
            moments.mean, moments.var = tensors[f"{name}.mean"].numpy(), tensors[f"{name}.var"].numpy()
            moments.count = facts[f"{name}.count"]
        self.iteration, self.returns = facts["iteration"], list(facts["returns"])
        self._ppo.num_timesteps = self.iteration * self.source.horizon * self._told.num_envs


EPISODES = {"states", "actions", "rewards", "next_states"}
"""The tensors of a file of episodes."""


def identity(source: MujocoData) -> dict[str, Any]:
    """What makes a teacher: not how much is gathered with it."""
    rest = {k: v for k, v in asdict(source).items() if k not in ("episodes", "quality")}
    return {"data": type(source).__name__, **rest, "ppo": PPO_SETTINGS}


def packages(source: MujocoData) -> tuple[str, ...]:
    """What a teacher and its episodes depend on."""
    return (*source.simulators, *source.tools)


def versions_of(source: MujocoData) -> dict[str, str]:
    return versions(*packages(source))


def checkpoint_path(folder: Path, number: int) -> Path:
    return folder / f"checkpoint-{number:02d}.safetensors"


def train_teacher(source: MujocoData, folder: Path) -> Teacher:
    """Train the teacher in `folder`, or on from its newest iteration; a file stays for each checkpoint.

    Raises ValueError where the folder holds another teacher, or a damaged file.
    """
    teacher = Teacher(source)
    newest = folder / "newest.safetensors"
    if newest.exists():
        teacher.load(newest, say=True)
    last = source.checkpoints - 1
    due = {round(source.iterations * c / last): c for c in range(source.checkpoints)}
    each = len(source.goals()[0]) * source.horizon
    with tqdm(
        total=source.iterations * each,
        initial=teacher.iteration * each,
        desc="teacher",
        unit="step",
        unit_scale=True,
        smoothing=0.05,
    ) as bar:
        while True:
            # the checkpoint before the newest state: a kill between the two repeats an iteration, and loses nothing
            if teacher.iteration in due and not checkpoint_path(folder, due[teacher.iteration]).exists():
                teacher.save(checkpoint_path(folder, due[teacher.iteration]))
            teacher.save(newest)
            if teacher.iteration >= source.iterations:
                return teacher
            teacher.improve()
            bar.update(each)
            bar.set_postfix(return_=f"{teacher.returns[-1]:.1f}")


def gather(source: MujocoData, folder: Path) -> tuple[Trajectories, dict[str, Any]]:
    """The source's training data, by the teacher's checkpoints, and facts on the teacher: returns of its checkpoints in
    training tasks while gathering, and of the last one, told the task, by its mean actions in training and test tasks.

    What each checkpoint gathered is a file in `folder` too, so that a killed command goes on from there.
    """
    clock = time.perf_counter()
    teacher = train_teacher(source, folder)
    C = source.checkpoints
    plan = {"mixed": list(range(C)), "medium": [C // 2], "expert": [C - 1]}[source.quality]
    each = source.episodes // len(plan)
    tasks = source.goals()[0].numpy()
    environments = source.make("train")
    parts, returns = [], []
    with tqdm(total=source.episodes * len(tasks), desc="episodes", unit="episode", smoothing=0.05) as bar:
        for c in plan:
            path = folder / f"episodes-{c:02d}-{each}.safetensors"
            wanted = {**identity(source), "checkpoint": c, "each": each}
            if path.exists():
                part, facts = checkpoint.load(path)
                if facts.get("episodes") != wanted or part.keys() != EPISODES:
                    raise ValueError(f"teacher: {path} was gathered otherwise; delete it, or choose another folder")
                check_versions(f"teacher: {path}", facts.get("versions"), packages(source), say=False)
            else:
                teacher.load(checkpoint_path(folder, c))
                part = episodes(teacher, environments, tasks, each, source.seed + 7919 * (c + 1), bar)
                checkpoint.save(path, part, {"episodes": wanted, "versions": versions_of(source)})
            parts.append(part)
            returns.append(float(part["rewards"].double().sum(-1).mean()))
    teacher.load(checkpoint_path(folder, C - 1))
    reached = {}
    for which, goals in zip(("train", "test"), source.goals(), strict=True):
        part = episodes(teacher, source.make(which), goals.numpy(), JUDGED, source.seed + 7907, None, mean=True)
        reached[f"{which}_return"] = round(float(part["rewards"].double().sum(-1).mean()), 3)
    lines = ", ".join(f"{r:.1f}" for r in returns)
    tqdm.write(f"returns of checkpoints {plan[0]} to {plan[-1]} of {C}: {lines}; {time.perf_counter() - clock:.0f} s")
    # [N,E,H,...]: a task's episodes in the order of the checkpoints
    rows: dict[str, Any] = {name: torch.cat([p[name] for p in parts], 1).flatten(0, 2) for name in parts[0]}
    N, E, H = len(tasks), source.episodes, source.horizon
    data = Trajectories(
        type(environments[0]).__name__,
        0,
        **rows,
        terminated=torch.zeros(N * E * H, dtype=torch.bool, device="cpu"),
        ends=torch.arange(1, N * E + 1, device="cpu") * H,
        tasks=torch.arange(N, device="cpu").repeat_interleave(E),
    )
    return data, {"checkpoint_returns": [round(r, 3) for r in returns], **reached}


def episodes(
    teacher: Teacher,
    environments: list[MujocoTask],
    tasks: np.ndarray,
    each: int,
    seed: int,
    bar: Any = None,
    mean: bool = False,
) -> dict[str, Tensor]:
    """`each` episodes of every task: states, actions, rewards, next_states [N,each,H,...] float32."""
    N, H = len(tasks), teacher.source.horizon
    S, A = (space.shape[0] for space in (environments[0].observation_space, environments[0].action_space))  # pyright: ignore
    states, following = (np.zeros((N, each, H, S), np.float32) for _ in range(2))
    actions, rewards = np.zeros((N, each, H, A), np.float32), np.zeros((N, each, H), np.float32)
    with seeded(seed):
        for e in range(each):
            seen = np.stack([env.reset(seed=seed * 1009 + e * N + i)[0] for i, env in enumerate(environments)])
            for t in range(H):
                states[:, e, t], actions[:, e, t] = seen, teacher.act(seen, tasks, mean)
                for i, env in enumerate(environments):
                    following[i, e, t], rewards[i, e, t], *_ = env.step(actions[i, e, t])
                seen = following[:, e, t]
            if bar is not None:
                bar.update(N)
    arrays = {"states": states, "actions": actions, "rewards": rewards, "next_states": following}
    return {name: torch.from_numpy(a) for name, a in arrays.items()}
