"""What the token mixers share: their state, short convolutions, norms, checks, and weights from flash-linear-attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from icrl_kernels import _checks
from icrl_kernels.linear_attention import common
from icrl_kernels.linear_attention.common import MAX_HEAD_DIM, MAX_VALUE_DIM


class State(NamedTuple):
    """All that a mixer keeps of the tokens it has seen, for N sequences. A pytree; float32 whatever the layer's dtype
    (float64 for float64 layers).

    conv: the windows of the short convolutions, [N, conv_size − 1, channels] each (the last token [N, 1, D] for RWKV7).
    recurrent: the state, or states, of the op, [N, heads, ...].
    """

    conv: tuple[Tensor, ...]
    recurrent: tuple[Tensor, ...]

    def _map(self, f: Callable[[Tensor], Tensor]) -> State:
        return State(tuple(map(f, self.conv)), tuple(map(f, self.recurrent)))

    def detach(self) -> State:
        """Cut from the graph: truncated backpropagation carries this from one segment to the next."""
        return self._map(Tensor.detach)

    def clone(self) -> State:
        """A copy: `step` changes its state in place."""
        return self._map(Tensor.clone)

    def to(self, device: torch.device | str) -> State:
        return self._map(lambda t: t.to(device))


torch.serialization.add_safe_globals([State])  # torch.load with weights_only makes it


def wide(dtype: torch.dtype) -> torch.dtype:
    """What sums, gates and states of a layer of this dtype are kept in."""
    return torch.promote_types(dtype, torch.float32)


@torch.no_grad()
def fill(parameter: Tensor, value: Tensor) -> None:
    """Copy the whole value into a parameter, which FSDP2 may keep in shards."""
    if hasattr(parameter, "placements"):  # a DTensor
        from torch.distributed.tensor import DTensor, distribute_tensor  # takes half a second

        assert isinstance(parameter, DTensor)
        value = distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    parameter.copy_(value)


def orthogonal(layer: nn.Linear, gain: float) -> None:
    """As nn.init.orthogonal_, which knows no half precision."""
    weight = torch.empty(layer.weight.shape, dtype=wide(layer.weight.dtype), device=layer.weight.device)
    fill(layer.weight, nn.init.orthogonal_(weight, gain=gain))


def zeros(layer: nn.Linear) -> None:
    nn.init.zeros_(layer.weight)


class Linear(nn.Linear):
    """nn.Linear whose first weights are those of `begin`, where `start` was given one, after `reset_parameters` too."""

    begin: Callable[[nn.Linear], None] | None = None

    def start(self, begin: Callable[[nn.Linear], None]) -> Self:
        self.begin = begin
        begin(self)
        return self

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.begin is not None:
            self.begin(self)


def at_least_one(**sizes: int) -> tuple[int, ...]:
    """Them as ints, in their order."""
    return tuple(_checks.integer(name, size, 1) for name, size in sizes.items())


def multiple(name: str, size: int, of: str, divisor: int) -> None:
    if size % divisor:
        raise ValueError(f"{name}: wanted a multiple of {of}={divisor}, got {size}")


def expanded(name: str, size: int, factor: float) -> int:
    """size · factor, which must be a whole number."""
    factor = _checks.number(name, factor)
    result = round(size * factor) if math.isfinite(factor) else 0
    if result < 1 or abs(result - size * factor) > 1e-6 * result:
        raise ValueError(f"{name}: wanted {name} · {size} to be a whole number of channels, got {size * factor}")
    return result


def head_dims(hidden_size: int, num_heads: int, num_kv_heads: int, expand_k: float, expand_v: float) -> tuple[int, int]:
    """K and V of heads that share hidden_size · expand_k and hidden_size · expand_v channels."""
    multiple("num_heads", num_heads, "num_kv_heads", num_kv_heads)
    dims = []
    for name, factor, most in (("expand_k", expand_k, MAX_HEAD_DIM), ("expand_v", expand_v, MAX_VALUE_DIM)):
        channels = expanded(name, hidden_size, factor)
        multiple(f"hidden_size · {name}", channels, "num_heads", num_heads)
        dims.append(channels // num_heads)
        if dims[-1] > most:
            raise ValueError(f"num_heads: wanted at most {most} channels per head, got {dims[-1]} ({name})")
    return dims[0], dims[1]


def history(x: Tensor, window: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
    """Put each sequence's window [N, W, C], the W tokens before its first, before its tokens of x [B, T, C].

    Returns the tokens [B, T', C], where in them x's tokens went (None: from W on), and each sequence's last W of them.
    """
    W, T = window.shape[1], x.shape[1]
    if cu_seqlens is None:
        tokens = torch.cat([window, x], 1)
        return tokens, None, tokens[:, T:].clone()
    N = cu_seqlens.shape[0] - 1
    bounds = cu_seqlens.long()
    index = torch.arange(T, device=x.device)
    places = index + W * torch.searchsorted(bounds, index, right=True)  # 1 + the sequence that a token is of, times W
    ahead = (bounds[:-1] + W * torch.arange(N, device=x.device))[:, None] + torch.arange(W, device=x.device)
    tokens = x.new_zeros(T + N * W, x.shape[2])
    tokens = tokens.index_copy(0, places, x[0]).index_copy(0, ahead.flatten(), window.flatten(0, 1))
    last = (bounds[1:] - bounds[:-1])[:, None] + ahead
    return tokens[None], places, tokens[last]


class ShortConvolution(nn.Module):
    """Causal convolution of each channel with its own few taps, then silu: y_t = silu(b + Σ_j w_j x_{t − W + 1 + j}).

    Sums are float32 whatever the dtype; `weight` is [channels, 1, W], as nn.Conv1d's with groups=channels.
    """

    def __init__(self, channels: int, size: int, bias: bool = False) -> None:
        super().__init__()
        channels, size = at_least_one(channels=channels, conv_size=size)
        self.weight = nn.Parameter(torch.empty(channels, 1, size))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.weight.uniform_(-1, 1).mul_(self.weight.shape[2] ** -0.5)
        if self.bias is not None:
            self.bias.zero_()

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, size={self.weight.shape[2]}, bias={self.bias is not None}"

    def forward(self, x: Tensor, window: Tensor, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x [B, T, channels] and the window before it [N, W − 1, channels]; returns y and the window after it."""
        W, T = self.weight.shape[2], x.shape[1]
        tokens, places, last = history(x.to(window.dtype), window, cu_seqlens)
        taps = self.weight[:, 0].to(window.dtype).unbind(1)
        # A multiply-add per tap beats nn.Conv1d on the CPU, needs no transposes, and is one loop once compiled.
        length = T if places is None else tokens.shape[1] - W + 1
        y = tokens[:, :length] * taps[0]
        for j in range(1, W):
            y = torch.addcmul(y, tokens[:, j : j + length], taps[j])
        if places is not None:
            y = y[:, places - (W - 1)]
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return F.silu(y).to(x.dtype), last

    def step(self, x: Tensor, window: Tensor) -> Tensor:
        """One token x [B, channels]; the window is moved on in place."""
        tokens = torch.cat([window, x.to(window.dtype)[:, None]], 1)
        y = (tokens * self.weight[:, 0].t().to(window.dtype)).sum(1)
        window.copy_(tokens[:, 1:])
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return F.silu(y).to(x.dtype)


class RMSNorm(nn.Module):
    """x / sqrt(mean x² + eps) · weight, times gate(z) when there is a gate, all in float32; the result has x's dtype."""

    def __init__(
        self, size: int, eps: float, gate: Callable[[Tensor], Tensor] | None = None, affine: bool = True
    ) -> None:
        super().__init__()
        self.eps, self.gate = eps, gate
        self.weight = nn.Parameter(torch.empty(size)) if affine else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.weight is not None:
            nn.init.ones_(self.weight)

    def extra_repr(self) -> str:
        return f"eps={self.eps}, gate={getattr(self.gate, '__name__', None)}"

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        y = x.to(wide(x.dtype))
        weight = None if self.weight is None else self.weight.to(y.dtype)
        y = F.rms_norm(y, x.shape[-1:], weight, self.eps)
        if self.gate is not None:
            assert z is not None
            y = y * self.gate(z.to(y.dtype))
        return y.to(x.dtype)


class TokenMixer(nn.Module):
    """A layer between tokens, [B, T, hidden_size] to the same, with an explicit state.

    `forward` takes any number of tokens by chunks and is differentiable; `step` takes one and is not. Both start from a
    `State`, and a sequence may be cut anywhere: forward over it all, forward over its pieces with the state carried,
    and steps over its tokens are the same function.

    Subclasses give what a layer is: `_inputs`, of its op, from tokens [..., hidden_size]; the op by chunks, `_chunk`, and
    by tokens, `_one`; and `_output`, from the op's outputs.
    """

    hidden_size: int
    o_proj: Linear

    def reset_parameters(self) -> None:
        """Give all parameters first values, those of submodules too: what a mixer built on the meta device wants after
        `to_empty`. Parameters may be shards (FSDP2)."""
        for module in self.modules():
            if module is not self and isinstance(reset := getattr(module, "reset_parameters", None), Callable):
                reset()
        self._start()

    def _start(self) -> None:
        """Give first values to the parameters that are no submodule's."""

    def initial_state(self, batch: int, device: torch.device | str | None = None) -> State:
        """The state before the first token of `batch` sequences: zeros."""
        weight, batch = self.o_proj.weight, _checks.integer("batch", batch, 0)
        conv, recurrent = (
            tuple(
                torch.zeros(batch, *shape, dtype=wide(weight.dtype), device=weight.device if device is None else device)
                for shape in shapes
            )
            for shapes in self._state_shapes()
        )
        return State(conv, recurrent)

    def forward(self, x: Tensor, state: State | None = None, cu_seqlens: Tensor | None = None) -> tuple[Tensor, State]:
        """Mix the tokens x [B, T, hidden_size].

        Args:
            state: what came before, as an earlier call returned it or `initial_state`, for N = B sequences or as many
                as are packed; None is nothing. It is not changed.
            cu_seqlens: [N + 1] int32 or int64, with B = 1: sequence n is tokens cu_seqlens[n] to cu_seqlens[n + 1] - 1.

        Returns:
            y [B, T, hidden_size] and the state after the last token; `state.detach()` truncates backpropagation.

        Raises:
            ValueError: for shapes and dtypes other than these, naming the argument.
        """
        state = self._begin(x, state, cu_seqlens)
        inputs, windows = self._inputs(x, state.conv, cu_seqlens)
        o, recurrent = self._chunk(*inputs, state.recurrent, cu_seqlens)
        return self._output(o, x), State(windows, recurrent)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Mix one token of each sequence, x [B, hidden_size], after `state`, which is changed in place and returned.

        There is no gradient: call it under torch.no_grad(). Layers of float64 have no step.

        Raises:
            ValueError: as `forward`, and where gradients are on.
        """
        self._check_step(x, state)
        inputs, _ = self._inputs(x, state.conv, None)
        return self._output(self._one(*inputs, state.recurrent), x), state

    @classmethod
    def from_fla(cls, layer: nn.Module) -> Self:
        """A copy of flash-linear-attention's layer: its options, and copies of its weights, dtypes and devices.

        Raises:
            ValueError: for another layer, or for an option that this one does not have.
        """
        if type(layer).__name__ != cls._fla_name():
            raise ValueError(f"layer: wanted flash-linear-attention's {cls._fla_name()}, got {type(layer).__name__}")
        options, renamed = cls._fla_options(layer)
        weights = {}
        for name, value in layer.state_dict().items():
            head, _, rest = name.partition(".")
            weights[f"{renamed.get(head, head)}.{rest}" if rest else name] = value.detach().clone()
        result = cls(**options)
        result.load_state_dict(weights, assign=True)
        return result.train(layer.training)

    # What subclasses give

    @classmethod
    def _fla_name(cls) -> str:
        return cls.__name__

    @classmethod
    def _fla_options(cls, layer: Any) -> tuple[dict[str, Any], dict[str, str]]:
        """The constructor's arguments for a layer like this one, and names of submodules that differ."""
        raise NotImplementedError

    def _state_shapes(self) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
        raise NotImplementedError

    def _inputs(self, x: Tensor, windows: tuple[Tensor, ...], cu_seqlens: Tensor | None) -> tuple[Any, Any]:
        raise NotImplementedError

    def _chunk(self, *args: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        raise NotImplementedError

    def _one(self, *args: Any) -> Tensor:
        raise NotImplementedError

    def _output(self, o: Tensor, x: Tensor) -> Tensor:
        raise NotImplementedError

    # Checks

    def _begin(self, x: Tensor, state: State | None, cu_seqlens: Tensor | None) -> State:
        _checks.shape("x", x, ("B", "T", "hidden_size"), hidden_size=self.hidden_size)
        self._check_dtype(x)
        N = x.shape[0]
        if cu_seqlens is not None:
            _checks.shape("cu_seqlens", cu_seqlens, ("N+1",))
            _checks.dtype("cu_seqlens", cu_seqlens, (torch.int32, torch.int64))
            N = cu_seqlens.shape[0] - 1
            if x.shape[0] != 1 or N < 0:
                raise ValueError(
                    f"cu_seqlens: wanted N + 1 ≥ 1 entries and a batch of B=1, got {N + 1} and B={x.shape[0]}"
                )
            if x.device.type == "cpu" and not _checks.compiling():
                common.bounds(x.shape[0], x.shape[1], cu_seqlens)
        if state is None:
            return self.initial_state(N, x.device)
        self._check_state(state, N)
        return state

    def _check_step(self, x: Tensor, state: State) -> None:
        _checks.shape("x", x, ("B", "hidden_size"), hidden_size=self.hidden_size)
        self._check_dtype(x)
        if x.dtype == torch.float64:
            raise ValueError(
                "x: step serves float32, bfloat16 and float16, got torch.float64; forward with T=1 serves it"
            )
        if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.parameters())):
            raise ValueError("x: step has no gradient; call it under torch.no_grad(), or forward with T=1")
        self._check_state(state, x.shape[0])
        for field in State._fields:
            for i, t in enumerate(getattr(state, field)):
                if t.requires_grad:
                    raise ValueError(
                        f"state.{field}[{i}]: carries a graph, and step would change it; pass state.detach()"
                    )
                if field == "recurrent" and not t.is_contiguous():
                    raise ValueError(f"state.{field}[{i}]: wanted a contiguous tensor, because it is changed in place")

    def _check_dtype(self, x: Tensor) -> None:
        if not torch.is_autocast_enabled(x.device.type):
            _checks.dtype("x", x, (self.o_proj.weight.dtype,))

    def _check_state(self, state: State, N: int) -> None:
        dtype = wide(self.o_proj.weight.dtype)
        if not isinstance(state, State):
            raise ValueError(f"state: wanted a State, got {type(state).__name__}")
        for field, shapes in zip(State._fields, self._state_shapes(), strict=True):
            tensors = getattr(state, field)
            if not isinstance(tensors, (tuple, list)):
                raise ValueError(f"state.{field}: wanted a tuple of tensors, got {type(tensors).__name__}")
            if len(tensors) != len(shapes):
                raise ValueError(f"state.{field}: wanted {len(shapes)} tensors, got {len(tensors)}")
            for i, (t, shape) in enumerate(zip(tensors, shapes, strict=True)):
                _checks.dense(f"state.{field}[{i}]", t)
                if t.shape != (N, *shape) or t.dtype != dtype:
                    raise ValueError(
                        f"state.{field}[{i}]: wanted {[N, *shape]} of {dtype}, got {list(t.shape)} of {t.dtype}"
                    )


class ConvolvedMixer(TokenMixer):
    """A mixer whose q, k and v are projections of the token, through short convolutions where there are some."""

    use_short_conv: bool
    conv_size: int
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear

    def _make_qkv(self, q: int, k: int, v: int, use_short_conv: bool, conv_size: int, conv_bias: bool) -> None:
        """Make the projections to q, k and v channels, and their convolutions."""
        if use_short_conv:
            (conv_size,) = at_least_one(conv_size=conv_size)
        self.use_short_conv, self.conv_size = use_short_conv, conv_size
        self._channels = (q, k, v)
        for name, channels in zip("qkv", self._channels, strict=True):
            setattr(self, f"{name}_proj", nn.Linear(self.hidden_size, channels, bias=False))
            if use_short_conv:
                setattr(self, f"{name}_conv1d", ShortConvolution(channels, conv_size, conv_bias))

    def _window_shapes(self) -> list[tuple[int, ...]]:
        return [(self.conv_size - 1, c) for c in self._channels] if self.use_short_conv else []

    def _qkv(self, x: Tensor, windows: tuple[Tensor, ...], cu_seqlens: Tensor | None) -> tuple[list[Tensor], Any]:
        """q, k and v [..., channels], and the windows after x; a single token, x [B, D], moves the windows in place."""
        results, after = [], []
        for i, name in enumerate("qkv"):
            y = getattr(self, f"{name}_proj")(x)
            if self.use_short_conv:
                conv = getattr(self, f"{name}_conv1d")
                if x.dim() == 2:
                    y = conv.step(y, windows[i])
                else:
                    y, window = conv(y, windows[i], cu_seqlens)
                    after.append(window)
            results.append(y)
        return results, tuple(after)


def fla_norm(norm: Any) -> dict[str, Any]:
    """Options of flash-linear-attention's RMSNorm, by our names."""
    return {"norm_eps": norm.eps, "elementwise_affine": norm.weight is not None}


def fla_conv(layer: Any) -> dict[str, Any]:
    if not layer.use_short_conv:
        return {"use_short_conv": False}
    return {"use_short_conv": True, "conv_size": layer.conv_size, "conv_bias": layer.q_conv1d.bias is not None}


def refuse(layer: Any, option: str, given: object) -> ValueError:
    return ValueError(f"layer: this library's mixer has no {option} as {type(layer).__name__}'s, which has {given!r}")
