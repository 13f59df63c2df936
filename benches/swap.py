"""python -m benches.swap: transformers' own torch code beside our ops in its place.

Functions at the published head sizes: Qwen3-Next's gated delta rule (2 value heads for each of q and k, channels of 128)
and Kimi Linear's delta attention, with a fraction of the models' heads. The layer is Qwen3-Next's whole token mixer,
projections and convolution included.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from benches import common
from benches.run import row, table
from icrl_kernels import swap
from icrl_kernels.testing import assert_as_good_as_torch

REPEATS = 3
LENGTHS = (1024, 4096)
MODELS = {  # what: module, chunk function, recurrent function, heads of q and k, heads of v
    "gated delta rule": ("qwen3_next", "torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule", 2, 4),
    "KDA": ("kimi_linear", "chunk_kimi_delta_attention", "recurrent_kimi_delta_attention", 4, 4),
}
D = 128


def inputs(what: str, B: int, T: int) -> tuple[list[Tensor], Tensor]:
    keys, values = MODELS[what][3:]
    q, k = (torch.randn(B, T, keys, D) for _ in range(2))
    g = torch.nn.functional.logsigmoid(torch.randn((B, T, values, D) if what == "KDA" else (B, T, values)))
    return [q, k, torch.randn(B, T, values, D), g, torch.rand(B, T, values)], torch.randn(B, values, D, D)


def train(function: Any, tensors: list[Tensor], options: dict[str, Any]) -> Any:
    leaves = [t.detach().requires_grad_() for t in tensors]
    gradient = torch.ones_like(tensors[2])
    return lambda: torch.autograd.grad(function(*leaves, **options)[0], leaves, gradient)


def theirs(module: Any, name: str) -> Any:
    """Its torch code, also where flash-linear-attention is installed and would take its place."""
    function = getattr(module, name)
    return getattr(function, "__wrapped__", function)


def functions(what: str) -> list[dict[str, Any]]:
    model, chunk, recurrent = MODELS[what][:3]
    module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    torch_chunk, torch_recurrent = theirs(module, chunk), theirs(module, recurrent)
    with swap.install("transformers"):
        our_chunk, our_recurrent = getattr(module, chunk), getattr(module, recurrent)
    rows = []
    options: dict[str, Any] = {"use_qk_l2norm_in_kernel": True, "output_final_state": True}

    tensors, state = inputs(what, 2, 200)
    outputs = [f(*tensors, initial_state=state, **options) for f in (our_chunk, torch_chunk, torch_recurrent)]
    for a, b, c in zip(*outputs, strict=True):  # two float32 codes of theirs bound what one may differ by
        assert_as_good_as_torch(a, b, c, roundings=32)

    for T in LENGTHS:
        tensors, _ = inputs(what, 1, T)
        with torch.no_grad():
            runs = {"icrl": lambda t=tensors: our_chunk(*t, **options)}
            runs["torch"] = lambda t=tensors: torch_chunk(*t, **options)
            rows.append(row(common.interleaved(runs, REPEATS, 1), case=what, what="forward", batch=1, T=T))
        runs = {"icrl": train(our_chunk, tensors, options), "torch": train(torch_chunk, tensors, options)}
        rows.append(row(common.interleaved(runs, REPEATS, 1), case=what, what="fwd+bwd", batch=1, T=T))

    for B in (1, 8):
        tensors, state = inputs(what, B, 1)

        def hundred(function: Any, tensors=tensors, state=state) -> None:
            s = state
            for _ in range(100):
                _, s = function(*tensors, initial_state=s, **options)

        with torch.no_grad():
            runs = {"icrl": lambda f=hundred: f(our_recurrent), "torch": lambda f=hundred: f(torch_recurrent)}
            rows.append(row(common.interleaved(runs, REPEATS, 1), case=what, what="100 tokens", batch=B, T=1))
    return rows


def layer() -> list[dict[str, Any]]:
    module: Any = importlib.import_module("transformers.models.qwen3_next.modeling_qwen3_next")
    kept = {name: getattr(module, name) for name in MODELS["gated delta rule"][1:3]}
    with swap.install("transformers"):
        ours = {name: getattr(module, name) for name in kept}
    torch_code = {name: theirs(module, name) for name in kept}
    config = module.Qwen3NextConfig(hidden_size=512, linear_num_key_heads=4, linear_num_value_heads=8)
    mixer = module.Qwen3NextGatedDeltaNet(config, 0)

    def timed(f: Any) -> dict[str, list[float]]:
        def using(functions: dict[str, Any]) -> None:
            vars(module).update(functions)  # what a swap does, without its search for what to swap
            f()

        return common.interleaved({"icrl": lambda: using(ours), "torch": lambda: using(torch_code)}, REPEATS, 1)

    rows = []
    try:
        for T in LENGTHS:
            x = torch.randn(1, T, 512)
            with torch.no_grad():
                rows.append(row(timed(lambda x=x: mixer(x)), case="layer", what="forward", batch=1, T=T))
            times = timed(lambda x=x: mixer(x).sum().backward())
            rows.append(row(times, case="layer", what="fwd+bwd", batch=1, T=T))
    finally:
        vars(module).update(kept)
    return rows


def main() -> None:
    torch.manual_seed(0)
    rows = [r for what in MODELS for r in functions(what)] + layer()
    print(table(rows))
    print(common.write("swap_cpu", rows))


if __name__ == "__main__":
    main()
