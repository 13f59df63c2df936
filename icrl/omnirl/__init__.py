"""OmniRL (arXiv 2502.02869): the model, the agent that acts with it, its training data, training and evaluation."""

from icrl.omnirl.agent import Agent, Temperature
from icrl.omnirl.model import OmniRL, OmniRLConfig, Output, State, Tokens, shipped
from icrl.omnirl.tags import EXPLORER, START, TAGS, UNKNOWN

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
    "shipped",
]
