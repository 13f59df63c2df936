"""Token mixers on the library's ops, as torch modules: `forward` by chunks and `step` by tokens from one explicit state.

mixer = GatedDeltaNet(hidden_size=256, head_dim=64, num_heads=4)
y, state = mixer(x)                                   # x [B, T, 256], differentiable
y, state = mixer(x, state.detach())                   # the next segment, truncated backpropagation
with torch.no_grad():
    y, state = mixer.step(token, state)               # token [B, 256]; state changes in place
"""

from icrl_kernels.layers._base import Linear, State, TokenMixer, fill
from icrl_kernels.layers.delta import KDA, GatedDeltaNet
from icrl_kernels.layers.gla import GLA
from icrl_kernels.layers.gsa import GSA
from icrl_kernels.layers.linear_attention import LinearAttention
from icrl_kernels.layers.rwkv7 import RWKV7

__all__ = ["GLA", "GSA", "KDA", "RWKV7", "GatedDeltaNet", "Linear", "LinearAttention", "State", "TokenMixer", "fill"]
