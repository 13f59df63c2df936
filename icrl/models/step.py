"""A stack's step, one token of each context, as one call of C++: its weights packed into a program (icrl_kernels.fused)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from icrl.models.mixers import Recurrent, Softmax, WindowedSoftmax
from icrl.models.stack import Block, Stack
from icrl.models.trunk import Trunk, TrunkState
from icrl_kernels import layers
from icrl_kernels.arguments import integer
from icrl_kernels.fused import Program, Rows, add_affine, add_mixer, add_window_attention, bind_state, require_plain


def add_norm(program: Program, x: Rows, norm: nn.Module) -> Rows:
    """A LayerNorm or an RMSNorm of rows, without its weight and bias: give the norm to what reads them."""
    if isinstance(norm, nn.LayerNorm):
        return program.layer_norm(x, norm.eps)
    if isinstance(norm, nn.RMSNorm) and norm.eps is not None:
        return program.rms_norm(x, norm.eps)
    raise ValueError(f"norm: wanted a LayerNorm, or an RMSNorm with an eps, got {norm}")


def add_stack(program: Program, stack: Stack, x: Rows, state: str, *, room: int = 0) -> Rows:
    """Add the step of all blocks to the rows `x`, one a context, which they change; returns rows to which `stack.norm`'s weight
    and bias are still to be applied.

    Args:
        state: the state's tensors are those of `icrl_kernels.fused.add_mixer` and `add_window_attention`, called `state`0 for
            the first block, and so on.
        room: for how many tokens, where softmax attention reads all of them.

    Raises:
        ValueError: a mixer, norm or option that has no fused step; other weights than float32 on the CPU; hooks.
    """
    require_plain(stack)
    first = None
    for i, block in enumerate(stack.blocks):
        if type(block) is not Block:
            raise ValueError(f"stack: wanted blocks of icrl.models.stack, got {type(block).__name__}")
        with program.passing() as kept:
            first = _add_mixed(program, block, x, f"{state}{i}", room, first)
            (h,) = program.linear(add_norm(program, x, block.mlp_norm), [block.mlp_in], norm=block.mlp_norm)
            program.linear_into(x, program.gated(h) if block.gated else program.gelu_tanh(h), block.mlp_out, add=True)
            kept += [] if first is None else [first]
    return add_norm(program, x, stack.norm)


def _add_mixed(program: Program, block: Block, x: Rows, state: str, room: int, first: Rows | None) -> Rows | None:
    """x + mixer(norm x), in place; the values of RWKV-7's first layer."""
    normed, mixer = add_norm(program, x, block.mix_norm), block.mixer
    if isinstance(mixer, Recurrent):
        own = first if getattr(mixer.mixer, "layer_idx", 0) else None
        return add_mixer(program, mixer.mixer, normed, x, state, norm=block.mix_norm, add=True, v_first=own)
    (qkv,) = program.linear(normed, [mixer.qkv_proj], norm=block.mix_norm)
    q, k, v = (qkv.part(j * x.width, x.width) for j in range(3))
    if isinstance(mixer, WindowedSoftmax):
        slopes = mixer.slopes(torch.device("cpu"))
        y = add_window_attention(program, q, k, v, mixer.heads, mixer.window, state, slopes)
    else:
        y = add_window_attention(program, q, k, v, mixer.heads, integer("room", room, 1), state, grows=True)
    program.linear_into(x, y, mixer.o_proj, add=True)
    return None


class TrunkStep:
    """A trunk that is given a token at a time: `step(x)` is `trunk(x[:, None], state)` within rounding, and keeps the state.

    Args:
        trunk: of float32 on the CPU, without hooks. Its weights are copied: see `stale`.
        batch: how many contexts.
        embeddings: layers whose outputs are summed to the token; `step` takes their inputs. Without, it takes tokens.
        stays: whether every token is a query, as `trunk.read` has them: after the same state, at position 0.

    Raises:
        ValueError: a trunk that has no fused step, saying what hasn't.
    """

    def __init__(self, trunk: Trunk, batch: int, embeddings: Sequence[nn.Linear] = (), *, stays: bool = False) -> None:
        self.trunk, self.batch, self.stays = trunk, integer("batch", batch, 1), stays
        self.length = 0
        for layer in embeddings:
            require_plain(layer)
        width = trunk.config.width
        p = Program()
        if embeddings:
            x = p.rows(width)
            for i, layer in enumerate(embeddings):
                p.linear_into(x, p.read(f"x{i}", layer.in_features, each_call=True), layer, add=i > 0)
        else:
            x = p.read("x0", width, each_call=True)
        self.widths = [layer.in_features for layer in embeddings] or [width]
        self.room = 0
        """For how many tokens, where softmax attention keeps them all; 0: no end."""
        if trunk.positions is not None:
            self.room = len(trunk.positions) - (not stays)
            table = trunk.positions.detach()[:1] if stays else trunk.positions.detach()[1:]
            at = p.tensor("position", dtype=torch.int64, below=len(table))
            weights = [p.weights(torch.nn.functional.pad(table, (0, -width % 16)), (trunk, "positions"))]
            p.op("table_row", out=x, tensors=[at], weights=weights, sizes=[len(table), 1])
        y = add_stack(p, trunk, x, "layer", room=self.room)
        p.write("y", add_affine(p, y, trunk.norm), each_call=True)
        self.step = p.step(self.batch, group=32)
        self.replace(None)

    @property
    def stale(self) -> bool:
        """Whether a weight has changed since it was copied, or is another."""
        return self.step.stale or self.step.replaced

    def replace(self, state: TrunkState | None) -> None:
        """Go on from what `trunk` returned, which is copied, or from the beginning."""
        self.length = 0 if state is None else state.length
        if self.room and self.length > self.room - self.stays:
            raise ValueError(f"state: wanted at most {self.room - self.stays} tokens, got {self.length}")
        self.lengths = torch.full((self.batch,), self.length, dtype=torch.int64, device="cpu")
        if self.room:
            self.position = torch.zeros_like(self.lengths) if self.stays else self.lengths
            self.step.bind(position=self.position)
        self.layers: list[tuple[Tensor, ...]] = []
        for i, block in enumerate(self.trunk.blocks):
            assert isinstance(block, Block)
            given = None if state is None else state.layers[i]
            if isinstance(block.mixer, Recurrent):
                made = block.mixer.mixer.initial_state(self.batch) if given is None else given.clone()
                bind_state(self.step, f"layer{i}", made)
                self.layers.append((*made.conv, *made.recurrent))
            else:
                assert isinstance(block.mixer, Softmax)
                rings = (*_rings(block.mixer, self.batch, self.room, given), self.lengths.clone())
                self.step.bind(**{f"layer{i}.{name}": t for name, t in zip(RINGS, rings, strict=True)})
                self.layers.append(rings)
        # what a query changes, as it was: of a ring only its length says that it is there
        changed = [t for layer in self.layers for t in (layer[2:] if self.room else layer)]
        self._kept = [(t, t.clone()) for t in changed] if self.stays else []

    @property
    def state(self) -> TrunkState:
        """A copy of the state, as `trunk` takes it."""
        made: list[Any] = []
        for block, layer in zip(self.trunk.blocks, self.layers, strict=True):
            assert isinstance(block, Block)
            if isinstance(block.mixer, Recurrent):
                recurrent = len(block.mixer.mixer.initial_state(0, "meta").recurrent)
                tensors = [t.clone() for t in layer]
                made.append(layers.State(tuple(tensors[:-recurrent]), tuple(tensors[-recurrent:])))
            else:
                made.append(tuple(t[:, :, : self.length].clone() for t in layer[:2]))
        return TrunkState(made, self.length)

    @torch.no_grad()
    def __call__(self, *inputs: Tensor) -> Tensor:
        """The next token of each context, [batch, D], or the embeddings' inputs -> outputs [batch, D].

        Raises:
            ValueError: inputs of another number, shape, dtype or device; a token more than the trunk has positions.
        """
        if len(inputs) != len(self.widths):
            raise ValueError(f"inputs: wanted {len(self.widths)}, got {len(inputs)}")
        if self.room and self.length >= self.room:
            raise ValueError(f"tokens: this trunk takes {self.room}, got {self.length + 1}")
        given = []
        for i, (x, width) in enumerate(zip(inputs, self.widths, strict=True)):
            if x.shape != (self.batch, width) or x.dtype != torch.float32 or not x.is_cpu:
                wanted = f"float32 {[self.batch, width]} on the CPU"
                raise ValueError(f"inputs[{i}]: wanted {wanted}, got {x.dtype} {list(x.shape)} on {x.device}")
            given.append(x.contiguous())
        for t, before in self._kept:
            t.copy_(before)
        y = torch.empty(self.batch, self.trunk.config.width, dtype=torch.float32, device="cpu")
        self.step.run(*(x.data_ptr() for x in given), y.data_ptr(), threads=torch.get_num_threads())
        if not self.stays:
            self.length += 1
            self.lengths += 1
        return y


RINGS = ("keys", "values", "length")


def _rings(mixer: Softmax, batch: int, room: int, state: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """Keys and values [B,H,room,K], those of the state first."""
    shape = (batch, mixer.heads, room, mixer.o_proj.in_features // mixer.heads)
    made = torch.zeros(2, *shape, dtype=torch.float32, device="cpu").unbind()
    if state is not None:
        for to, of in zip(made, state, strict=True):
            to[:, :, : of.shape[2]] = of
    return made[0], made[1]


def trunk_step(trunk: Trunk, batch: int, embeddings: Sequence[nn.Linear], *, stays: bool = False) -> TrunkStep | None:
    """A `TrunkStep` where one serves; None where the module is to do: on another device, of another dtype, with hooks."""
    try:
        return TrunkStep(trunk, batch, embeddings, stays=stays)
    except ValueError:
        return None
