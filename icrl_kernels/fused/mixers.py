"""The one-token step of each token mixer of icrl_kernels.layers as ops of a program, on states as the mixers have them.

program = Program()
x = program.read("x", 128)
add_mixer(program, mixer, program.layer_norm(x, norm.eps), x, "layer0", norm=norm, add=True)  # x + mixer(norm(x))
program.write("y", x)
step = program.step(batch=8)
bind_state(step, "layer0", mixer.initial_state(8))  # changed in place by step.run(), as mixer.step does
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from icrl_kernels import _checks, _torch_private, layers
from icrl_kernels.fused.program import NONE, SIXTEEN, Matrix, Program, Rows, Slot, Step
from icrl_kernels.layers import linear_attention as maps
from icrl_kernels.layers._base import ConvolvedMixer, RMSNorm
from icrl_kernels.layers.rwkv7 import SHIFTS, LowRank

Source = tuple[nn.Module, str]

STEPS = (
    "forward",
    "step",
    "_inputs",
    "_inputs_of",
    "_one",
    "_output",
    "_output_of",
    "_qkv",
    "_gate",
    "_output_gate",
)
"""What says what a mixer computes: one that has its own is not what is built here."""


def add_mixer(
    program: Program,
    module: layers.TokenMixer,
    source: Rows,
    destination: Rows,
    state: str,
    *,
    norm: nn.Module | None = None,
    add: bool = False,
    v_first: Rows | None = None,
) -> Rows | None:
    """Add a mixer's step: what `module.step` makes of the token in `source`, one row a context, into `destination`.

    Args:
        state: what the state's tensors are called; see `bind_state`. A program may take several tokens, one after the other,
            by adding a mixer several times with the same state.
        norm: its weight and bias, if any, stand between `source` and the mixer: as `Program.linear` takes it.
        add: whether to add to what `destination` holds.
        v_first: for an RWKV7 with layer_idx > 0: the rows that the first one's `add_mixer` returned.

    Returns:
        The first RWKV7's values, which later ones mix into theirs; None for other mixers.

    Raises:
        ValueError: a module, option, dtype or device that has no fused step, by its name.
    """
    kind = next((k for k in type(module).__mro__ if k in KINDS), None)
    if kind is None:
        wanted = ", ".join(k.__name__ for k in KINDS)
        raise ValueError(f"module: wanted one of {wanted}, got {type(module).__name__}")
    for name in STEPS:
        if name in vars(module) or getattr(type(module), name, None) is not getattr(kind, name, None):
            raise ValueError(f"module: wanted {kind.__name__}'s own {name}, got {type(module).__name__}'s")
    require_plain(module)
    if program.count(source) != 1 or program.count(destination) != 1:
        raise ValueError("source, destination: wanted one row a context, for one token")
    if isinstance(module, layers.RWKV7):
        return _rwkv7(program, module, source, destination, state, norm, add, v_first)
    if v_first is not None:
        raise ValueError(f"v_first: wanted it for RWKV7 alone, got it for {kind.__name__}")
    y, last, output_norm = BUILDERS[kind](program, module, source, state, norm)
    program.linear_into(destination, y, last, norm=output_norm, add=add)
    return None


def require_plain(module: nn.Module) -> None:
    """Raises ValueError unless a module's parameters are float32 on the CPU, not made in inference mode, in which their changes
    are not seen, and it has no hooks, which no program would run."""
    if _torch_private.hooked(module):
        raise ValueError("module: wanted one without hooks")
    for name, tensor in module.named_parameters():
        if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
            raise ValueError(f"module: wanted float32 on the CPU, got {name} of {tensor.dtype} on {tensor.device}")
        if tensor.is_inference():
            raise ValueError(f"module: wanted parameters whose changes are seen, got {name}, made in inference mode")


def bind_state(step: Step, name: str, state: layers.State) -> None:
    """Bind a mixer's state, float32 and contiguous on the CPU, which `step.run` changes in place.

    Raises:
        ValueError: another state's shapes.
    """
    tensors = {f"{name}.{field}{i}": t for field in state._fields for i, t in enumerate(getattr(state, field))}
    wanted = {slot for slot in step.slots if slot.rpartition(".")[0] == name}
    if missing := wanted - tensors.keys():
        raise ValueError(f"state: wanted {', '.join(sorted(missing))}, got {', '.join(tensors) or 'nothing'}")
    for slot, tensor in tensors.items():
        if slot in wanted:
            step.bind(**{slot: tensor})
        elif tensor.numel():
            raise ValueError(f"state: wanted {', '.join(sorted(wanted))}, got {slot} too")


def add_window_attention(
    program: Program,
    q: Rows,
    k: Rows,
    v: Rows,
    heads: int,
    window: int,
    state: str,
    slopes: Tensor | None = None,
    *,
    grows: bool = False,
) -> Rows:
    """Softmax attention of a token to itself and the W - 1 before it: softmax(K^-1/2 · q·k − slope · age) v in each head.

    Args:
        q, k, v: one row a context, of heads·K columns. slopes: [heads], or none.
        state: its tensors are `state`.keys and .values [B, heads, W, K] float32, token n in slot n mod W, and .length [B]
            int64, tokens so far; a run changes them in place.
        grows: whether W is the room for all tokens: a run refuses one for which there is none.
    """
    heads, window = _checks.integer("heads", heads, 1), _checks.integer("window", window, 1)
    if q.width % heads:
        raise ValueError(f"q: wanted a multiple of heads={heads} columns, got {q.width}")
    K, out = q.width // heads, program.rows(q.width)
    keys, values = (_tensor(program, f"{state}.{name}", heads, window, K) for name in ("keys", "values"))
    program.op(
        "window_attention",
        input=q,
        side=k,
        out=out,
        more=[v, program.rows(window)],
        tensors=[keys, values, _tensor(program, f"{state}.length", dtype=torch.int64, below=window * grows)],
        weights=[] if slopes is None else [program.weights(slopes)],
        sizes=[heads, window, K],
        numbers=[K**-0.5],
    )
    return out


# --- ops that the mixers share


def _tensor(p: Program, name: str, *shape: int, dtype: torch.dtype = torch.float32, below: int = 0) -> Slot:
    """A tensor of a state: the one that there is, where the program takes several tokens."""
    return p.slots.get(name) or p.tensor(name, *shape, dtype=dtype, below=below)


def _map(p: Program, kind: str, x: Rows, side: Rows = NONE, **rest: list) -> Rows:
    """An op of each number, in place."""
    p.op(kind, input=x, side=side, out=x, **rest)
    return x


def add_affine(p: Program, x: Rows, norm: nn.Module) -> Rows:
    """x times a norm's weight plus its bias, in new rows; x itself where it has none."""
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    if weight is None:
        return x
    out, at = p.rows(x.width, p.count(x)), [p.weights(weight, (norm, "weight"))]
    if bias is not None:
        at.append(p.weights(bias, (norm, "bias")))
    p.op("affine", input=x, out=out, weights=at)
    return out


def _decay(
    p: Program,
    logits: Rows,
    rate: Tensor | float,
    *sources: Source,
    bias: Tensor | None = None,
    sign: float = 1.0,
    least: float | None = None,
    bound: float | None = None,
    writes: Rows = NONE,
) -> Rows:
    """exp(g), in place of logits x: g = −rate · softplus(sign · x + bias), at least `least`; with a bound instead
    g = bound · σ(rate · (x + bias)). writes: rows for 1 − exp(g)."""
    rate = torch.as_tensor(rate, dtype=torch.float32, device="cpu").detach()
    weights = [p.weights(rate.expand(logits.width), *sources)]
    if bias is not None:
        weights.append(p.weights(bias))
    numbers = [sign, -math.inf if least is None else least, 0.0 if bound is None else bound]
    return _map(p, "decay", logits, writes, weights=weights, sizes=[int(bound is not None)], numbers=numbers)


def _state(p: Program, m: layers.TokenMixer, state: str) -> list:
    return [_tensor(p, f"{state}.recurrent{i}", *shape) for i, shape in enumerate(m._state_shapes()[1])]


def _convolved(p: Program, m: ConvolvedMixer, rows: list[Rows], state: str) -> list[Rows]:
    """q, k and v through their short convolutions, where there are some, in place."""
    if m.use_short_conv:
        for i, (name, x) in enumerate(zip("qkv", rows, strict=True)):
            conv = getattr(m, f"{name}_conv1d")
            taps = conv.weight.detach()[:, 0].t()
            W, C = taps.shape
            weights = [p.weights(F.pad(taps, (0, -C % SIXTEEN)), (conv, "weight"))]
            if conv.bias is not None:
                weights.append(p.weights(conv.bias, (conv, "bias")))
            window = [_tensor(p, f"{state}.conv{i}", W - 1, C)] if W > 1 else []
            _map(p, "short_conv", x, tensors=window, weights=weights, sizes=[W])
    return rows


def _normed(p: Program, o: Rows, heads: int, norm: RMSNorm, z: Rows = NONE) -> Rows:
    """Each head's channels by their root mean square, times the norm's gate of z, in place; its weight is left out."""
    gates = {None: 0, F.silu: 1, torch.sigmoid: 2}
    if norm.gate not in gates:
        raise ValueError(f"gate: wanted silu, sigmoid or none, got {getattr(norm.gate, '__name__', norm.gate)}")
    return _map(p, "head_norm", o, z, sizes=[heads, gates[norm.gate]], numbers=[norm.eps])


def _headwise(layer: nn.Linear, heads: int, before: nn.Linear | None = None) -> Matrix:
    """A linear layer of each head's channels, after another layer where there is one, as one matrix."""
    weight = torch.block_diag(*[layer.weight.detach().double()] * heads)
    bias = None if layer.bias is None else layer.bias.detach().double().repeat(heads)
    made_of: list[Source] = [(layer, "weight")]
    made_of += [] if layer.bias is None else [(layer, "bias")]
    if before is not None:
        weight = weight @ before.weight.detach().double()
        made_of.append((before, "weight"))
    return Matrix(weight, bias, made_of)


# --- the mixers: the rows that their last layer reads, that layer, and the norm whose weight stands before it

Built = tuple[Rows, nn.Linear, nn.Module | None]


def _linear_attention(p: Program, m: layers.LinearAttention, x: Rows, state: str, norm: nn.Module | None) -> Built:
    H, Hk, V, K = m.num_heads, m.num_kv_heads, m.head_v_dim, m.feature_dim
    wanted: list[nn.Linear | Matrix] = []
    for proj, feature_map, heads in ((m.q_proj, m.feature_map_q, H), (m.k_proj, m.feature_map_k, Hk)):
        match feature_map:
            case maps.ElementwiseProduct():
                wanted += [_headwise(layer, heads, proj) for layer in (feature_map.layer1, feature_map.layer2)]
            case maps.Hedgehog() | maps.T2R():
                wanted.append(_headwise(feature_map.layer, heads, proj))
            case _:
                wanted.append(proj)
    wanted.append(_with_ones(m.v_proj, Hk) if m.do_feature_map_norm else m.v_proj)
    made = p.linear(x, wanted, norm=norm)
    v, mapped = made.pop(), []
    for feature_map, heads, divided in ((m.feature_map_q, H, m.norm_q), (m.feature_map_k, Hk, m.norm_k)):
        y = made.pop(0)
        match feature_map:
            case maps.ElementwiseProduct():
                _map(p, "multiply", y, made.pop(0))
            case maps.Hedgehog():
                z, y = y, p.rows(heads * K)
                p.op("hedgehog", input=z, out=y, sizes=[heads])
            case maps.T2R():
                _map(p, "relu", y)
            case _:
                _fixed_map(p, feature_map, y)
        if divided:
            _map(p, "sum_norm", y, sizes=[heads], numbers=[1e-4])
        mapped.append(y)
    columns = V + m.do_feature_map_norm
    o = p.rows(H * columns)
    sizes = [H, Hk, K, columns]
    p.op(
        "gla_step",
        input=mapped[0],
        side=mapped[1],
        out=o,
        more=[v],
        tensors=_state(p, m, state),
        sizes=sizes,
        numbers=[K**-0.5],
    )
    if m.do_feature_map_norm:
        whole, o = o, p.rows(H * V)
        p.op("divide_by_last", input=whole, out=o, sizes=[H], numbers=[maps.NORMALIZER_EPSILON])
    if isinstance(m.norm, RMSNorm):
        return _normed(p, o, H, m.norm), m.o_proj, m.norm
    return o, m.o_proj, None


def _fixed_map(p: Program, feature_map: Callable[[Tensor], Tensor], x: Rows) -> None:
    kinds = {maps.elu_plus_one: "elu_plus_one", F.relu: "relu", F.silu: "silu", maps.identity: None}
    if feature_map not in kinds:
        raise ValueError(f"feature_map: wanted one of this library's, got {feature_map!r}")
    if kind := kinds[feature_map]:
        _map(p, kind, x)


def _with_ones(layer: nn.Linear, heads: int) -> Matrix:
    """A layer's outputs with a channel of ones after each head's."""
    weight = F.pad(layer.weight.detach().double().unflatten(0, (heads, -1)), (0, 0, 0, 1))
    ones = torch.zeros(weight.shape[:2], dtype=torch.float64, device="cpu")
    ones[:, -1] = 1
    return Matrix(weight.flatten(0, 1), ones.flatten(), [(layer, "weight")])


def _gla(p: Program, m: layers.GLA, x: Rows, state: str, norm: nn.Module | None) -> Built:
    H, Hk, K, V = m.num_heads, m.num_kv_heads, m.head_k_dim, m.head_v_dim
    wanted = [m.q_proj, m.k_proj, m.v_proj, m.gk_proj[0], *([m.g_proj] if m.use_output_gate else [])]
    q, k, v, low, *gate = p.linear(x, wanted, norm=norm)  # type: ignore[arg-type]
    q, k, v = _convolved(p, m, [q, k, v], state)
    (logits,) = p.linear(low, [m.gk_proj[1]])  # type: ignore[list-item]
    e, o = _decay(p, logits, 1 / m.gate_logit_normalizer, sign=-1.0, least=m.clamp_min), p.rows(H * V)
    tensors = _state(p, m, state)
    p.op("gla_step", input=q, side=k, out=o, more=[v, e], tensors=tensors, sizes=[H, Hk, K, V], numbers=[K**-0.5])
    output_norm = m.g_norm_swish_gate if m.use_output_gate else m.g_norm
    return _normed(p, o, H, output_norm, gate[0] if gate else NONE), m.o_proj, output_norm


def _gsa(p: Program, m: layers.GSA, x: Rows, state: str, norm: nn.Module | None) -> Built:
    H, Hk, K, V, M = m.num_heads, m.num_kv_heads, m.head_k_dim, m.head_v_dim, m.num_slots
    learned = m.feature_map.layer if isinstance(m.feature_map, maps.T2R) else None
    projections = [(m.q_proj, H), (m.k_proj, Hk)]
    if learned is not None and not m.use_short_conv:
        first = [_headwise(learned, heads, proj) for proj, heads in projections]
    else:
        first = [proj for proj, _ in projections]
    *qkv, logits = p.linear(x, [*first, m.v_proj, m.f_proj], norm=norm)
    q, k, v = _convolved(p, m, qkv, state)
    if learned is not None and m.use_short_conv:
        (q,), (k,) = (p.linear(y, [_headwise(learned, heads)]) for y, heads in ((q, H), (k, Hk)))
    for y in (q, k):
        if learned is not None:
            _map(p, "relu", y)
        else:
            _fixed_map(p, m.feature_map, y)
    _map(p, "silu", v)
    w, o = p.rows(Hk * M), p.rows(H * V)
    e = _decay(p, logits, 1 / m.gate_logit_normalizer, sign=-1.0, writes=w)
    p.op(
        "gsa_step",
        input=q,
        side=k,
        out=o,
        more=[v, w, e],
        tensors=_state(p, m, state),
        sizes=[H, Hk, K, V, M],
        numbers=[K**-0.5 if m.scale is None else m.scale],
    )
    return _normed(p, _map(p, "silu", o), 1, m.g_norm), m.o_proj, m.g_norm


def _delta(
    p: Program, m: layers.GatedDeltaNet | layers.KDA, qkv: list[Rows], e: Rows, beta: Rows, z: Rows, state: str
) -> Built:
    """What the two have in common, from q, k and v on."""
    q, k, v = _convolved(p, m, qkv, state)
    if not m.use_short_conv:
        for y in (q, k, v):
            _map(p, "silu", y)
    _map(p, "sigmoid", beta, numbers=[2.0 if m.allow_neg_eigval else 1.0])
    parts, o = m._parts, p.rows(v.width)
    sizes = [m.num_v_heads * parts, m.num_heads, m.head_k_dim, m.head_v_dim // parts, parts]
    p.op(
        "delta_step",
        input=q,
        side=k,
        out=o,
        more=[v, e, beta],
        tensors=_state(p, m, state),
        sizes=sizes,
        numbers=[m.head_k_dim**-0.5],
    )
    return _normed(p, o, m.num_v_heads, m.o_norm, z), m.o_proj, m.o_norm


def _gated_delta_net(p: Program, m: layers.GatedDeltaNet, x: Rows, state: str, norm: nn.Module | None) -> Built:
    wanted = [m.q_proj, m.k_proj, m.v_proj, m.a_proj, m.b_proj, *([m.g_proj] if m.use_gate else [])]
    q, k, v, a, beta, *gate = p.linear(x, wanted, norm=norm)
    e = _decay(p, a, m.A_log.detach().exp(), (m, "A_log"), (m, "dt_bias"), bias=m.dt_bias)
    return _delta(p, m, [q, k, v], e, beta, gate[0] if gate else NONE, state)


def _kda(p: Program, m: layers.KDA, x: Rows, state: str, norm: nn.Module | None) -> Built:
    wanted = [m.q_proj, m.k_proj, m.v_proj, m.f_proj[0], m.b_proj, m.g_proj[0]]
    q, k, v, f, beta, g = p.linear(x, wanted, norm=norm)  # type: ignore[arg-type]
    (logits,), (z,) = p.linear(f, [m.f_proj[1]]), p.linear(g, [m.g_proj[1]])  # type: ignore[list-item]
    rate = m.A_log.detach().exp().repeat_interleave(m.head_k_dim)
    e = _decay(p, logits, rate, (m, "A_log"), (m, "dt_bias"), bias=m.dt_bias, bound=m.lower_bound)
    return _delta(p, m, [q, k, v], e, beta, z, state)


def _low_rank(p: Program, x: Rows, lora: LowRank) -> Rows:
    first, activation, last = lora.lora
    kinds: dict[type, str | None] = {nn.Tanh: "tanh", nn.Sigmoid: "sigmoid", nn.Identity: None}
    if type(activation) not in kinds:
        raise ValueError(f"activation: wanted tanh, sigmoid or none, got {type(activation).__name__}")
    (y,) = p.linear(x, [first])  # type: ignore[list-item]
    if kind := kinds[type(activation)]:
        _map(p, kind, y, numbers=[1.0])
    return p.linear(y, [last])[0]  # type: ignore[list-item]


def _rwkv7(
    p: Program,
    m: layers.RWKV7,
    source: Rows,
    destination: Rows,
    state: str,
    norm: nn.Module | None,
    add: bool,
    v_first: Rows | None,
) -> Rows:
    if (m.layer_idx == 0) != (v_first is None):
        wanted = "none for the first layer" if m.layer_idx == 0 else f"the first layer's, for layer_idx={m.layer_idx}"
        raise ValueError(f"v_first: wanted {wanted}, got {v_first}")
    H, K, V, D = m.num_heads, m.head_k_dim, m.head_v_dim, m.hidden_size
    x = source if norm is None else add_affine(p, source, norm)  # the state keeps the token as the mixer sees it
    mixtures = [(m, f"x_{name}") for name in SHIFTS]
    mu = torch.stack([F.pad(getattr(m, name).detach().flatten(), (0, -D % SIXTEEN)) for m, name in mixtures])
    shifted = p.rows(len(SHIFTS) * D)
    before = _tensor(p, f"{state}.conv0", 1, D)
    p.op("token_shift", input=x, out=shifted, tensors=[before], weights=[p.weights(mu, *mixtures)], sizes=[len(SHIFTS)])
    xr, xw, xk, xv, xa, xg = (shifted.part(i * D, D) for i in range(len(SHIFTS)))
    (r,), (k,), (v,) = p.linear(xr, [m.r_proj]), p.linear(xk, [m.k_proj]), p.linear(xv, [m.v_proj])
    e = _decay(p, _low_rank(p, xw, m.w_lora), 1.0, bound=-math.exp(-0.5))
    rate = _map(p, "sigmoid", _low_rank(p, xa, m.a_lora), numbers=[1.0])
    if v_first is not None:
        share = _map(p, "sigmoid", _low_rank(p, xv, m.v_lora), numbers=[1.0])
        p.op("lerp", input=v, side=v_first, out=v, more=[share])
    a, b, o = p.rows(H * K), p.rows(H * K), p.rows(H * V)
    form, eps = (1, 1e-6) if m.fuse_norm else (0, 1e-12)
    keys = [p.weights(m.k_k, (m, "k_k")), p.weights(m.k_a, (m, "k_a"))]
    p.op("rwkv7_keys", input=k, side=rate, out=a, more=[b], weights=keys, sizes=[H, form], numbers=[eps])
    tensors = _state(p, m, state)
    p.op(
        "rwkv7_step",
        input=r,
        side=k,
        out=o,
        more=[v, e, a, b],
        tensors=tensors,
        sizes=[H, K, V],
        numbers=[1.0],
    )
    weights = [p.weights(m.r_k, (m, "r_k"))]
    if m.g_norm.weight is not None and m.g_norm.bias is not None:
        weights += [p.weights(getattr(m.g_norm, name), (m.g_norm, name)) for name in ("weight", "bias")]
    gate = _low_rank(p, xg, m.g_lora)
    p.op(
        "rwkv7_output",
        input=o,
        side=gate,
        out=o,
        more=[r, k, v],
        weights=weights,
        sizes=[H],
        numbers=[m.g_norm.eps],
    )
    p.linear_into(destination, o, m.o_proj, add=add)
    return v if v_first is None else v_first


BUILDERS: dict[type, Callable[..., Built]] = {
    layers.LinearAttention: _linear_attention,
    layers.GLA: _gla,
    layers.GSA: _gsa,
    layers.GatedDeltaNet: _gated_delta_net,
    layers.KDA: _kda,
}
KINDS = (*BUILDERS, layers.RWKV7)
