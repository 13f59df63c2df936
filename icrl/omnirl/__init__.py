"""OmniRL (arXiv 2502.02869): the model, the value-iteration network beside it, the agent that acts with it, its training data, training and evaluation."""

from icrl.omnirl.agent import Agent, Temperature
from icrl.omnirl.checkpoints import shipped
from icrl.omnirl.model import OmniRL, OmniRLConfig
from icrl.omnirl.tags import EXPLORER, START, TAGS, UNKNOWN
from icrl.omnirl.tokens import Tokens
from icrl.omnirl.value_iteration_network import Output, State, ValueIterationNetwork, ValueIterationNetworkConfig

__all__ = [
    "EXPLORER",
    "START",
    "TAGS",
    "UNKNOWN",
    "Agent",
    "OmniRL",
    "OmniRLConfig",
    "Output",
    "State",
    "Temperature",
    "Tokens",
    "ValueIterationNetwork",
    "ValueIterationNetworkConfig",
    "shipped",
]
