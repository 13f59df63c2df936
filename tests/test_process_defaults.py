"""What a program sets for its whole process, torch's default dtype and device, changes no number that the library makes.

Other libraries set them at import. A parameter follows them, as those of torch.nn do; nothing else may.
"""

import ast
import contextlib
import tempfile
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import icrl_kernels as ik
from icrl.models.trunk import TrunkConfig
from icrl.offline.environments.darkroom import DarkRoomData
from icrl.offline.environments.point_robot import PointRobotData
from icrl.offline.environments.stitching import StitchingData
from icrl.offline.few_shot import few_shot
from icrl.offline.learner import METHODS, load_method, make_method, save_method
from icrl.offline.method import Spaces
from icrl.offline.world_model import WorldModel, WorldModelConfig
from icrl.omnirl import Agent, ValueIterationNetwork, shipped
from icrl.omnirl.distill import DPDConfig, draw_references, make_records, sample_tasks
from icrl.omnirl.evaluate import references, run_agent
from icrl.omnirl.value_iteration_training import ValueIterationTraining, targets_of, tokens_of
from icrl.worlds import (
    TabularTasks,
    TabularVectorEnv,
    quality,
    regroup,
    sample_anymdp,
    sample_bandit,
    sample_garnet,
    sample_pomdp,
)
from icrl.worlds.difficulty import compare
from icrl.worlds.gymnasium_tables import CLASSIC
from icrl.worlds.task_shards import TaskSet, load_tasks, write_tasks
from icrl_kernels.testing import gla_chunkwise_torch

ROOM = DarkRoomData(size=4, horizon=12, train_goals=12, episodes=6, history=6)
PACKAGES = [Path(__import__(name).__path__[0]) for name in ("icrl_kernels", "icrl")]

# ---- the source -----------------------------------------------------------------------------------------------------

WITH_DTYPE = {
    *("empty", "zeros", "ones", "full", "tensor", "as_tensor", "asarray", "scalar_tensor", "linspace", "logspace"),
    *("eye", "rand", "randn", "normal", "empty_strided", "empty_permuted", "complex", "polar"),
}
OF_INTEGERS = {"arange", "randint", "randperm", "tril_indices", "triu_indices"}  # int64 whatever the default
CLASSES = {"Tensor", "FloatTensor", "DoubleTensor", "LongTensor", "IntTensor", "BoolTensor"}


def unnamed(source: str) -> list[str]:
    """Calls that leave a tensor's dtype or device to torch's defaults, parameters and modules' buffers aside."""
    tree, found, allowed = ast.parse(source), [], set()
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        if ast.unparse(call.func).endswith(("nn.Parameter", ".register_buffer")):
            allowed |= {id(node) for node in ast.walk(call)}
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call) and id(node) not in allowed):
        name = ast.unparse(call.func).removeprefix("torch.") if ast.unparse(call.func).startswith("torch.") else ""
        given = {k.arg for k in call.keywords}
        floats = any(isinstance(x, ast.Constant) and isinstance(x.value, float) for x in ast.walk(call))
        wanted = {"dtype", "device"} if name in WITH_DTYPE else {"device"} if name in OF_INTEGERS else set()
        if name == "arange" and floats:
            wanted |= {"dtype"}
        scalars = name == "where" and all(map(_number, call.args[1:])) and floats
        if wanted - given or name in CLASSES or scalars:
            found.append(f"{call.lineno}: {ast.unparse(call)}")
    return found


def _number(node: ast.expr) -> bool:
    return isinstance(node.operand if isinstance(node, ast.UnaryOp) else node, ast.Constant)


def test_every_tensor_names_its_dtype_and_device():
    found = [f"{p}:{call}" for root in PACKAGES for p in sorted(root.rglob("*.py")) for call in unnamed(p.read_text())]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("torch.empty(3)", 1),
        ("torch.empty(3, dtype=d)", 1),
        ("torch.zeros(3, device=d)", 1),
        ("torch.full((3,), 1.0, dtype=a, device=b)", 0),
        ("torch.arange(3)", 1),
        ("torch.arange(3, device=d)", 0),
        ("torch.arange(0.5, 3, device=d)", 1),
        ("torch.tensor([torch.ones(2)], dtype=a, device=b)", 1),
        ("torch.where(x, 1.0, -0.5)", 1),
        ("torch.where(x, 1.0, y)", 0),
        ("torch.Tensor(3)", 1),
        ("nn.Parameter(torch.zeros(3))", 0),
        ("self.register_buffer('mean', torch.zeros(3))", 0),
        ("x.new_empty(3)", 0),
    ],
)
def test_the_source_is_read_right(line, wrong):
    assert len(unnamed(line)) == wrong


# ---- the numbers ------------------------------------------------------------------------------------------------------


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(dtype)


def integers(high: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed), device="cpu")


def tasks() -> TabularTasks:
    return sample_anymdp(3, (8, 12), 3, seed=0, num_observations=12)


def ops():
    """Outputs, final states and gradients of every linear-attention op, and its step."""
    B, T, H, D = 2, 70, 2, 8
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        x = [normal(B, T, H, D, seed=i, dtype=dtype).requires_grad_() for i in range(6)]
        q, k, v = x[:3]
        small = [(0.1 * y).detach().requires_grad_() for y in x]
        g, head = (-x[3].detach().abs()).requires_grad_(), (-x[4][..., 0].detach().abs()).requires_grad_()
        calls = [
            (q, ik.gla(q, k, v, output_final_state=True)),
            (g, ik.gla(q, k, v, g, output_final_state=True)),
            (head, ik.gla(q, k, v, head, output_final_state=True)),
            (x[5], ik.gsa(q, k, v, x[5], g, output_final_state=True)),
            (head, ik.gated_delta_rule(q, k, v, head, qk_l2norm=True, output_final_state=True)),
            (g, ik.rwkv7(q, g, k, v, *small[4:], output_final_state=True)),
        ]
        for leaf, (o, state) in calls:
            found += [o, state, *torch.autograd.grad(o.float().square().sum(), [leaf, k, v])]
        state = torch.zeros(B, H, D, D, dtype=torch.float32, device="cpu")
        with torch.no_grad():
            found += [ik.gla_step(q[:, 0], k[:, 0], v[:, 0], g[:, 0], state), state.clone()]
            found += [ik.gated_delta_rule_step(q[:, 0], k[:, 0], v[:, 0], g[:, 0], None, state), state]
    return found


def peers():
    return gla_chunkwise_torch(*(normal(1, 64, 2, 8, seed=i) for i in range(3)), None)


def solving():
    t = tasks()
    discounts = [0.5, 0.99]
    by = [t.solve(discounts, backend=b) for b in ("cpu", "reference")]
    sweeps = t.solve(0.9, method="value_iteration")
    return [*by, sweeps, t.pack().solve(discounts), t.tables(), t.pack().tables(), t.expected_reward(), quality(t)]


def simulation():
    t = tasks()
    tables, policies = t.tables(), t.solve([0.5, 0.9]).policy
    weights = {0: 1.0, "uniform": 1.0, "q_learning": 1.0, "model_based": 1.0, "random_policy": 1.0}
    mixture = ik.constant_behaviours(3, 2, weights, switch=0.5, epsilon=0.3)
    runs = [ik.rollout(tables, steps=50, seed=1)]
    runs += [
        ik.rollout(tables, steps=50, seed=1, policies=policies, behaviours=mixture, references=policies, backend=b)
        for b in ("cpu", "plain")
    ]
    state = ik.rollout_start(tables, seed=5)
    steps = [ik.rollout_step(tables, state, torch.zeros(3, dtype=torch.int64, device="cpu")) for _ in range(20)]
    probabilities = torch.full((3, 1, *t.shape[1:]), 0.0, dtype=torch.float32, device="cpu")
    probabilities[..., :2] = 0.5
    runs.append(ik.rollout(tables, steps=20, seed=3, policies=probabilities))
    return runs, steps, state, regroup(runs[0], 2)


def learner():
    h = integers(6, 4, 60), integers(3, 4, 60, seed=1), normal(4, 60), integers(3, 4, 60, seed=2)
    return [ik.model_based_q(*h, num_states=6, num_actions=3, backend=b) for b in ("cpu", "plain", "reference")]


def samplers():
    made = [sample_anymdp(2, (8, 10), 3, seed=4, packed=p, backend=b) for p in (0, 1) for b in ("cpu", "torch")]
    made += [sample_garnet(70, (60, 90), 3, seed=2), sample_garnet(3, 16, packed=True, seed=1)]
    made += [sample_bandit(4, seed=3, num_observations=9)]
    made += [sample_pomdp(2, 8, 3, seed=3, observation_tokens=2, action_tokens=2)]
    seen = made[-1].emit(torch.zeros(2, 5, dtype=torch.int64, device="cpu"), seed=1, step=0)
    joined = TabularTasks.concatenate(made[:-1])
    return [m.tensors() for m in (*made, joined, joined[[1, 2]], joined[0].pad(100, 9))], seen, tasks().state_of()


def conversions():
    t = sample_anymdp(1, 8, 3, seed=0)
    return [TabularTasks.from_xenoverse(t.to_xenoverse(0)).tensors(), *(c.table().tensors() for c in CLASSIC.values())]


def environments():
    found = []
    for mode in ("NextStep", "SameStep"):
        env = TabularVectorEnv(sample_pomdp(3, 8, 3, seed=1, action_tokens=2), mode)
        found.append(env.reset(seed=3)[0])
        found += [env.step([[i % 3, 0]] * 3)[:4] for i in range(40)]
    return pytree.tree_map(torch.from_numpy, found)


def hardness():
    return torch.tensor(compare(2, (8,), 3, 2, 0)["rows"][0]["log10_visits"], dtype=torch.float64, device="cpu")


def records():
    config = DPDConfig(
        batch=4, steps=60, states=12, behaviours={"model_based+noise->greedy1": 1.0, "random_policy": 1.0}
    )
    t = sample_tasks(config, 4, seed=1)
    r = make_records(config, t, seed=2)
    training = ValueIterationTraining(data=config)
    return [t.tensors(), r, draw_references(config, r, seed=3), tokens_of(r), targets_of(r, training)]


def acting():
    model = ValueIterationNetwork.load(shipped())
    agent = Agent(model, 3, 16, seed=4)
    actions = []
    for t in range(10):
        actions.append(agent.act(integers(16, 3, seed=t)))
        agent.observe(normal(3, seed=t), integers(3, 3, seed=t))
    t = sample_tasks(DPDConfig(), 3, seed=1)
    run = run_agent(model, t, 40, seed=1)
    reference = references(t, steps=100)
    return [
        actions,
        agent.state,
        run.reward,
        run.done,
        list(vars(reference).values()),
        list(model.state_dict().values()),
    ]


def offline_data():
    found = []
    for source in (ROOM, PointRobotData(tasks=10, episodes=20), StitchingData(size=4, train_goals=4, episodes=4)):
        data = source.train_data()
        names = ("states", "actions", "rewards", "next_states", "ends", "tasks")
        found += [*(getattr(data, n) for n in names), source.best_returns(), data.returns_to_go(0.9)]
    return found


def methods():
    """Losses, gradients and actions of every method; its weights come from a file, as fresh ones follow the default."""
    data, found = ROOM.train_data(), []
    settings = {"trunk": TrunkConfig(width=16, layers=1, heads=2, mixer="gla"), "horizon": 12, "batch": 4}
    more = {"idt": {"span": 4}} | {name: {"layout": "branch"} for name in ("sicql", "dpt", "dit")}
    for name, kind in METHODS.items():
        config = kind.config_class(**settings, **more.get(name, {}))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "method.safetensors"
            with process_defaults(torch.float32):
                torch.manual_seed(0)
                world_model = None
                if kind.needs_world_model(config):
                    world_model = WorldModel.of(WorldModelConfig(window=4, size=8), data)
                save_method(make_method(name, config, Spaces.of(data), world_model), path)
            method = load_method(path)
        method.prepare(data)
        torch.manual_seed(1)
        loss = method.loss(data)[0]
        loss.backward()
        gradients = [p.grad for p in method.parameters() if p.grad is not None]
        returns = few_shot(method, ROOM.environments(), episodes=2, seed=3)
        found += [loss, gradients, returns, method.state_dict()]
    return found


def task_shards():
    with tempfile.TemporaryDirectory() as folder:
        write_tasks(Path(folder) / "tasks", TaskSet(num_states=(8, 10), discounts=(0.5, 0.9)), 3, 0)
        return load_tasks(Path(folder) / "tasks").tensors()


CALLS = [ops, peers, solving, simulation, learner, samplers, conversions, environments, hardness, records, acting]
CALLS += [offline_data, methods, task_shards]


def plain(found) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(found) if isinstance(x, Tensor)]


def bits(x: Tensor) -> Tensor:
    return x.detach().reshape(-1).contiguous().view(torch.uint8)


@contextlib.contextmanager
def process_defaults(dtype=None, device=None):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    try:
        with torch.device(device) if device else contextlib.nullcontext():
            yield
    finally:
        torch.set_default_dtype(before)


@pytest.fixture(autouse=True)
def float32_by_default():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize("call", CALLS, ids=lambda f: f.__name__)
def test_defaults_change_no_bit(call):
    want = plain(call())
    assert want
    for default in ({"dtype": torch.float64}, {"dtype": torch.bfloat16}, {"device": "meta"}):
        with process_defaults(**default):
            got = plain(call())
        assert [x.dtype for x in got] == [x.dtype for x in want], default
        assert {x.device.type for x in got} == {"cpu"}, default
        for i, (a, b) in enumerate(zip(got, want, strict=True)):
            assert torch.equal(bits(a), bits(b)), (default, i)
