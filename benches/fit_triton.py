"""Times candidates for the constants of the gla launchers on a GPU, and prints the best of each shape.

The launchers choose by rules in the source, never by timing at a first call. This is how the rules are found: for each
shape whole sequences against segments (`_single`), the segment's length (`_segment_length`), and the number of warps
(`_warps`). `python -m benches.fit_triton`, with --tiny for a run in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import itertools
import os
from typing import Any
from unittest import mock

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from benches import common
from icrl_kernels.linear_attention.triton import gla

SHAPES = [(8, 16384, 4, 128), (8, 16384, 8, 128), (8, 4096, 16, 128), (1, 131072, 8, 128), (16, 8192, 16, 64)]
LENGTHS, WARPS = (128, 256, 512, 1024, 2048, 4096), (None, 4, 8)


def candidates(T: int):
    """(label, what the rules are to return): a segment of None stands for whole sequences, warps of None for the rule."""
    for length, warps in itertools.product((None, *(x for x in LENGTHS if x < T)), WARPS):
        rules: dict[str, Any] = {"_single": lambda *_, single=length is None: single}
        if length is not None:
            rules["_segment_length"] = lambda *_, length=length: length
        if warps is not None:
            rules["_warps"] = lambda *_, warps=warps: warps
        yield {"segment": length, "warps": warps}, rules


def fit(B: int, T: int, H: int, size: int, gate: int, backward: bool, dtype: torch.dtype, repeats: int) -> list[dict]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    q, k, v, do = (torch.randn(B, T, H, size, dtype=dtype, device=device) for _ in range(4))
    g = None if gate == 0 else -0.05 * torch.rand((B, T, H, size)[: gate + 2], device=device)
    arguments = (q, k, v, g, 0.1, None, None)
    rows = []
    for label, rules in candidates(T):
        with mock.patch.multiple(gla, **rules):
            call = (lambda: gla.backward(do, None, *arguments)) if backward else (lambda: gla.forward(*arguments))
            seconds = common.interleaved({"call": call}, repeats, 1)["call"]
        shape = {"B": B, "T": T, "H": H, "K": size, "gate": gate, "backward": backward}
        rows.append({**shape, **label, **common.summary(seconds)})
    return sorted(rows, key=lambda r: r["median_ms"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="one tiny shape in float32, to see that it runs")
    tiny = parser.parse_args().tiny
    rows = []
    for shape, gate, backward in itertools.product([(1, 200, 1, 16)] if tiny else SHAPES, (0, 1, 2), (False, True)):
        ranked = fit(*shape, gate, backward, torch.float32 if tiny else torch.bfloat16, 1 if tiny else 9)
        print(ranked[0], flush=True)
        rows += ranked
    if not tiny:
        print(common.write("gla_triton_fit", rows))


if __name__ == "__main__":
    main()
