"""Modules built on the meta device, and what they hold once their first weights are given."""

import torch


def tensors(module):
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def emptied(make):
    """Built on the meta device, its memory full of NaN."""
    with torch.device("meta"):
        module = make()
    module.to_empty(device="cpu")
    with torch.no_grad():
        for t in tensors(module).values():
            t.fill_(float("nan"))
    return module


def reset_each(module):
    for part in module.modules():
        if part._parameters or part._buffers:
            part.reset_parameters()
