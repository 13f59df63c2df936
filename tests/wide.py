"""Running other people's float32 code in float64."""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map


class Wide(TorchFunctionMode):
    """Runs code that casts to float32 in float64 instead: the reference that has no roundings of its own to speak of."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args, kwargs = tree_map(lambda x: torch.float64 if x is torch.float32 else x, (args, kwargs or {}))
        return func(*args, **kwargs)
