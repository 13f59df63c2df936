"""Seeds, counts and sizes at every public door: whole numbers of any library are taken, all else is refused by name."""

from functools import cache

import numpy as np
import pytest
import torch
from torch.utils import _pytree as pytree

import icrl_kernels as ik
from icrl.data.shards import batch_rows
from icrl.models.trunk import TrunkConfig
from icrl.offline.environments.darkroom import DarkRoom, DarkRoomData
from icrl.offline.environments.point_robot import PointRobot, PointRobotData
from icrl.offline.environments.stitching import StitchingData
from icrl.offline.experiment import OfflineRun
from icrl.offline.learner import METHODS
from icrl.offline.world_model import WorldModelConfig
from icrl.omnirl import Agent, Temperature, ValueIterationNetwork, ValueIterationNetworkConfig
from icrl.omnirl.distill import DPDConfig, DPDStream, draw_references, make_records, sample_tasks, simulate
from icrl.omnirl.evaluate import references, run_agent
from icrl.omnirl.value_iteration_training import ValueIterationTraining
from icrl.training.config import LoopConfig
from icrl.worlds import (
    TabularEnv,
    TabularVectorEnv,
    regroup,
    sample_anymdp,
    sample_bandit,
    sample_garnet,
    sample_pomdp,
)
from icrl.worlds.difficulty import compare
from icrl.worlds.gym_env import make_anymdp_vec
from icrl.worlds.kinds import draw_tasks
from icrl.worlds.task_shards import TaskSet
from icrl_kernels import layers

TINY = DPDConfig(batch=2, steps=6, states=8)


@cache
def tasks(actions: int = 3):
    return sample_anymdp(8, 8, actions, seed=0)


@cache
def tables():
    return tasks().tables()


@cache
def model():
    return ValueIterationNetwork(ValueIterationNetworkConfig(layers=1))


@cache
def records():
    return make_records(TINY, tasks(5), seed=0)


def history(num_states=9, num_actions=9, **more):
    index = torch.zeros(2, 5, dtype=torch.int64)
    return ik.model_based_q(index, index, torch.zeros(2, 5), index, num_states, num_actions, **more)


def states():
    return torch.zeros(8, dtype=torch.int64)


# What is called: the argument's name, and the call, which must take 8.
CALLS = [
    ("seed", lambda v: ik.rollout(tables(), steps=3, seed=v).reward),
    ("steps", lambda v: ik.rollout(tables(), steps=v, seed=0).reward),
    ("seed", lambda v: ik.rollout_start(tables(), seed=v).state),
    ("num_states", lambda v: history(num_states=v)),
    ("num_actions", lambda v: history(num_actions=v)),
    ("sweeps", lambda v: history(sweeps=v)),
    ("num_records", lambda v: ik.constant_behaviours(v, 0, {"uniform": 1.0}).initial),
    ("num_policies", lambda v: ik.constant_behaviours(2, v, {"uniform": 1.0}).initial),
    ("threads", ik.set_threads_here),
    ("hidden_size", lambda v: layers.GLA(v, num_heads=2)),
    ("num_heads", lambda v: layers.GLA(64, num_heads=v)),
    ("gate_low_rank_dim", lambda v: layers.GLA(64, num_heads=2, gate_low_rank_dim=v)),
    ("batch", lambda v: layers.GLA(64, num_heads=2).initial_state(v).recurrent),
    ("head_dim", lambda v: layers.GatedDeltaNet(64, head_dim=v, num_heads=2)),
    ("conv_size", lambda v: layers.GatedDeltaNet(64, head_dim=8, num_heads=2, conv_size=v)),
    ("num_heads", lambda v: layers.KDA(64, head_dim=8, num_heads=v)),
    ("num_heads", lambda v: layers.LinearAttention(64, num_heads=v)),
    ("n", lambda v: sample_anymdp(v, 8, 3, seed=0).reward),
    ("num_states", lambda v: sample_anymdp(1, v, 3, seed=0).reward),
    ("num_states", lambda v: sample_anymdp(1, (v, 9), 3, seed=0, num_observations=9).reward),
    ("num_actions", lambda v: sample_anymdp(1, 8, v, seed=0).reward),
    ("seed", lambda v: sample_anymdp(1, 8, 3, seed=v).reward),
    ("first", lambda v: sample_anymdp(1, 8, 3, seed=0, first=v).reward),
    ("n", lambda v: sample_garnet(v, 8, 3, seed=0).reward),
    ("num_states", lambda v: sample_garnet(1, v, 3, seed=0).reward),
    ("branching", lambda v: sample_garnet(1, 16, 3, v, seed=0).reward),
    ("seed", lambda v: sample_garnet(1, 8, 3, seed=v).reward),
    ("n", lambda v: sample_bandit(v, 3, seed=0).reward),
    ("num_observations", lambda v: sample_bandit(2, 3, seed=0, num_observations=v).state_mapping),
    ("seed", lambda v: sample_bandit(2, 3, seed=v).reward),
    ("seed", lambda v: sample_pomdp(1, 8, 3, seed=v).emission),
    ("num_observations", lambda v: sample_pomdp(1, 8, 3, seed=0, num_observations=v).emission),
    ("observation_tokens", lambda v: sample_pomdp(1, 8, 3, seed=0, observation_tokens=v).emission),
    ("action_tokens", lambda v: sample_pomdp(1, 8, 3, seed=0, action_tokens=v).action_tokens),
    ("num_tasks", lambda v: draw_tasks("bandit", v, 8, 3, 2, 0).reward),
    ("seed", lambda v: draw_tasks("garnet", 1, 8, 3, 2, v).reward),
    ("states", lambda v: tasks().pad(v, 3).reward),
    ("actions", lambda v: tasks().pad(8, v).reward),
    ("seed", lambda v: tasks().emit(states(), seed=v, step=0)),
    ("step", lambda v: sample_pomdp(8, 8, 3, seed=0).emit(states(), seed=0, step=v)),
    ("action_tokens", lambda v: regroup(ik.rollout(tables(), steps=20, seed=0), v)),
    ("num_tasks", lambda v: compare(v, (8,), 3, 2, 0)),
    ("task", lambda v: TabularEnv(task=v).task.reward),
    ("num_actions", lambda v: TabularEnv(num_states=8, num_actions=v).task.reward),
    ("num_envs", lambda v: make_anymdp_vec(v, 0, 8).tasks.reward),
    ("task", lambda v: make_anymdp_vec(1, v, 8).tasks.reward),
    ("branching", lambda v: TaskSet(branching=v)),
    ("num_states", lambda v: TaskSet(num_states=(v, v))),
    ("batch", lambda v: Agent(model(), v, 8).state.count),
    ("states", lambda v: Agent(model(), 2, v).state.transition),
    ("seed", lambda v: Agent(model(), 2, 8, seed=v).generator.get_state()),
    ("steps", lambda v: Temperature(1.0, 0.5, v)),
    ("actions", lambda v: ValueIterationNetworkConfig(actions=v)),
    ("batch", lambda v: model().initial_state(v, 8).count),
    ("batch", lambda v: DPDConfig(batch=v)),
    ("seed", lambda v: next(DPDStream(TINY, seed=v, prefetch=0)).reward),
    ("prefetch", lambda v: DPDStream(TINY, seed=0, prefetch=v).prefetch),
    ("threads", lambda v: DPDStream(TINY, seed=0, threads=v).threads),
    ("n", lambda v: sample_tasks(TINY, v, 0).reward),
    ("seed", lambda v: sample_tasks(TINY, 2, v).reward),
    ("seed", lambda v: simulate(TINY, tasks(5), seed=v).run.reward),
    ("seed", lambda v: draw_references(TINY, records(), seed=v)[0]),
    ("segment", lambda v: ValueIterationTraining(segment=v)),
    ("steps", lambda v: references(tasks(5), steps=v).random_reward),
    ("seed", lambda v: references(tasks(5), steps=9, seed=v).random_reward),
    ("steps", lambda v: run_agent(model(), tasks(5), v).reward),
    ("updates", lambda v: LoopConfig(updates=v)),
    ("warmup", lambda v: LoopConfig(warmup=v)),
    ("seed", lambda v: LoopConfig(seed=v)),
    ("threads", lambda v: LoopConfig(threads=v)),
    ("batch", lambda v: batch_rows(100, v, 0, seed=0)),
    ("seed", lambda v: batch_rows(100, 2, 0, seed=v)),
    ("horizon", lambda v: DarkRoomData(horizon=v)),
    ("seed", lambda v: DarkRoomData(seed=v)),
    ("size", lambda v: DarkRoom((1, 1), v).size),
    ("goal", lambda v: DarkRoom((v, 1)).goal),
    ("horizon", lambda v: PointRobot(horizon=v).horizon),
    ("horizon", lambda v: PointRobotData(horizon=v)),
    ("targets", lambda v: StitchingData(targets=v)),
    ("width", lambda v: TrunkConfig(width=v)),
    ("window", lambda v: WorldModelConfig(window=v)),
    ("world_batch", lambda v: OfflineRun(world_batch=v)),
    *(("horizon", lambda v, m=m: m.config_class(horizon=v).horizon) for n, m in METHODS.items() if n != "idt"),
]
WITH_NONE = [  # where None means something
    ("seed", lambda v: TabularEnv(tasks()[0]).reset(seed=v)[0]),
    ("seed", lambda v: TabularVectorEnv(tasks()).reset(seed=v)[0].tolist()),
    ("seed", lambda v: DarkRoom().reset(seed=v)[0].tolist()),
    ("seed", lambda v: PointRobot().reset(seed=v)[0].tolist()),
    ("num_observations", lambda v: sample_anymdp(1, 8, 3, seed=0, num_observations=v).num_observations),
    ("num_slots", lambda v: layers.GSA(64, num_heads=2, num_slots=v)),
    ("decay_low_rank_dim", lambda v: layers.RWKV7(64, head_dim=8, decay_low_rank_dim=v)),
    ("seed", lambda v: torch.from_numpy(TabularVectorEnv(tasks()).reset(seed=[v] * 8)[0])),
    ("value_dim", lambda v: layers.RWKV7(8, head_dim=8, value_dim=v).value_dim),
]
TAKEN = [np.int64(8), np.uint64(8), np.int8(8), np.array(8), torch.tensor(8), torch.tensor(8, dtype=torch.uint8)]
REFUSED = [8.0, np.float32(8), True, np.True_, torch.tensor(True), torch.tensor(8.0), "8", 8j]


def same(a, b) -> bool:
    """Of what a call returned: the same types and bits; of modules, the weights."""
    a, b = (pytree.tree_leaves(dict(x.state_dict()) if isinstance(x, torch.nn.Module) else x) for x in (a, b))
    return len(a) == len(b) and all(
        type(x) is type(y) and (torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y)
        for x, y in zip(a, b, strict=True)
    )


@pytest.fixture(autouse=True)
def threads_of_this_test():
    before = torch.get_num_threads()
    ik.set_threads_here(1)  # the calls are small
    yield
    ik.set_threads_here(before)


@pytest.mark.parametrize(("name", "call"), [*CALLS, *WITH_NONE])
def test_whole_numbers_of_any_library(name, call):
    torch.manual_seed(0)
    wanted = call(8)
    for value in TAKEN:
        torch.manual_seed(0)
        assert same(call(value), wanted), repr(value)


@pytest.mark.parametrize(("name", "call"), [*CALLS, *WITH_NONE])
def test_all_else_is_refused_by_name(name, call):
    for value in [*REFUSED, *([None] if (name, call) in CALLS else [])]:
        with pytest.raises(ValueError, match=rf"^{name}(: wanted |, state: give)"):
            call(value)


@pytest.mark.parametrize("call", [c for n, c in CALLS if n == "threads"])
@pytest.mark.parametrize("value", [10**6, 2**31, 2**63, 2**80, -1])
def test_thread_counts_beyond_reason(call, value):
    with pytest.raises(ValueError, match=r"^threads: wanted"):
        call(value)


def test_messages_are_one_short_sentence():
    for value in (torch.zeros(1000), np.zeros(1000), "x" * 1000, list(range(1000))):
        with pytest.raises(ValueError, match=r"^steps: wanted an integer, got ") as error:
            ik.rollout(tables(), steps=value, seed=0)
        assert len(str(error.value)) < 150
