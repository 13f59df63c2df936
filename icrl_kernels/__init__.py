"""Kernels for in-context reinforcement learning: linear attention and tabular control, as torch ops."""

from icrl_kernels._version import __version__
from icrl_kernels.linear_attention.gated_delta_rule import (
    gated_delta_rule,
    gated_delta_rule_reference,
    gated_delta_rule_step,
)
from icrl_kernels.linear_attention.gla import gla, gla_reference, gla_step
from icrl_kernels.linear_attention.gsa import gsa, gsa_reference, gsa_step
from icrl_kernels.linear_attention.rwkv7 import rwkv7, rwkv7_reference, rwkv7_step
from icrl_kernels.tabular.behaviours import Behaviours, constant_behaviours
from icrl_kernels.tabular.model_based import model_based_q
from icrl_kernels.tabular.packed import PackedTransition, pack_transition
from icrl_kernels.tabular.rollout import Rollout, RolloutState, rollout, rollout_start, rollout_step
from icrl_kernels.tabular.rollout_reference import rollout_reference
from icrl_kernels.tabular.rollout_tables import RolloutTables, rollout_tables
from icrl_kernels.tabular.value_iteration import ValueIteration, value_iteration
from icrl_kernels.threads import set_threads_here, threads_here

__all__ = [
    "Behaviours",
    "PackedTransition",
    "Rollout",
    "RolloutState",
    "RolloutTables",
    "ValueIteration",
    "__version__",
    "constant_behaviours",
    "gated_delta_rule",
    "gated_delta_rule_reference",
    "gated_delta_rule_step",
    "gla",
    "gla_reference",
    "gla_step",
    "gsa",
    "gsa_reference",
    "gsa_step",
    "model_based_q",
    "pack_transition",
    "rollout",
    "rollout_reference",
    "rollout_start",
    "rollout_step",
    "rollout_tables",
    "rwkv7",
    "rwkv7_reference",
    "rwkv7_step",
    "set_threads_here",
    "threads_here",
    "value_iteration",
]
