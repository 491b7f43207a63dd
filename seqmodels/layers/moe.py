"""A mixture of experts as the channel layer: every token goes through the few MLPs that its router chose."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from seqmodels import compat
from seqmodels.layers.linear import Linear, scaled
from seqmodels.layers.mlp import MLP, Activation, MLPConfig, activate, hidden_width
from seqmodels.params import Group, param
from seqmodels.typing import ChannelConfig, Context


@dataclasses.dataclass(frozen=True)
class MoEConfig(ChannelConfig):
    """`experts` MLPs, of which each token x goes through the `top_k` that its router prefers; none is ever dropped.

        p = softmax(W_r x),   y = sum_{i in top k of p} g_i E_i(x) (+ s E_shared(x))
        E_i(x) = W_down (act(W_gate x) * W_up x), without W_gate where `gated` is False

    g = p over its sum among the chosen ones (`renormalise`; equal to Mixtral's softmax over their logits, 2401.04088),
    or p itself. One expert is `hidden_size` wide, by default `expansion` times the model, rounded up to a multiple of
    8. `shared_hidden_size`: the width of an expert that every token goes through besides, times s = sigmoid(w_s x) with
    `shared_gate` (Qwen3-Next), s = 1 without.

    `balance` a reports a E sum_i f_i P_i (2101.03961, eq. 4) as `aux["balance"]`: f_i is the part of tokens that chose
    expert i, without a gradient, P_i the mean of p_i; its least value a k is at uniform routing. `router_z` c reports
    c mean(logsumexp(W_r x)^2) (2202.08906). Both are over the tokens that are not padding, and 0 leaves one out.
    The router starts with a tenth of the usual variance (2101.03961), the last projections as in `MLPConfig`.
    """

    experts: int = 8
    top_k: int = 2
    expansion: float = 3.0
    hidden_size: int | None = None
    activation: Activation = Activation.SILU
    gated: bool = True
    renormalise: bool = True
    shared_hidden_size: int | None = None
    shared_gate: bool = True
    balance: float = 0.01
    router_z: float = 0.0

    def __post_init__(self):
        if not 1 <= self.top_k <= self.experts:
            raise ValueError(f"each token chooses top_k={self.top_k} of experts={self.experts}: choose 1 up to all")
        if self.expansion <= 0:
            raise ValueError(f"expansion must be positive, not {self.expansion}")
        for field in ("hidden_size", "shared_hidden_size"):
            if (value := getattr(self, field)) is not None and value < 1:
                raise ValueError(f"{field} must be at least 1, or None, not {value}")
        for field in ("balance", "router_z"):
            if not 0 <= (value := getattr(self, field)) < math.inf:
                raise ValueError(f"{field} is the coefficient of a loss: at least 0, not {value}")
        if self.activation not in list(Activation):
            raise ValueError(f"unknown activation {self.activation!r}; choose one of {[str(a) for a in Activation]}")

    def make(self, width: int, *, layer: int, depth: int, rngs: nnx.Rngs) -> MoE:
        return MoE(self, width, depth=depth, rngs=rngs)


class MoE(nnx.Module):
    """See `MoEConfig`. The router is at least float32, whatever the type of x; padding is masked on the way in.

    On a mesh the auxiliary losses are over the tokens of all devices: under `shard_map` with `check_vma=True`, as the
    train step runs, the types of arrays name the mesh axes that tokens are divided over, data included. With
    `check_vma=False` only the sequence axis is known, and each device takes its own rows. Accumulated parts of a batch
    count each for itself.
    """

    def __init__(self, config: MoEConfig, width: int, *, depth: int, rngs: nnx.Rngs):
        self.config = config
        hidden = hidden_width(config, width)
        self.router = Linear(width, config.experts, rngs=rngs, axes=("embed", "experts"), init=scaled(0.1))

        def kernel(fan_in: int, fan_out: int, axes: tuple[str, str], variance: float) -> nnx.Param:
            init = jax.nn.initializers.variance_scaling(variance, "fan_in", "truncated_normal", batch_axis=0)
            shape = (config.experts, fan_in, fan_out)
            return param(rngs, shape, init, group=Group.MATRIX, axes=("experts", *axes))

        self.up = kernel(width, hidden, ("embed", "mlp"), 1.0)
        self.gate = kernel(width, hidden, ("embed", "mlp"), 1.0) if config.gated else None
        self.down = kernel(hidden, width, ("mlp", "embed"), 2.0 / depth)
        shared = MLPConfig(hidden_size=config.shared_hidden_size, activation=config.activation, gated=config.gated)
        has_shared = config.shared_hidden_size is not None
        self.shared = MLP(shared, width, depth=depth, rngs=rngs) if has_shared else None
        gated = has_shared and config.shared_gate
        self.shared_gate = Linear(width, 1, rngs=rngs, axes=("embed", None)) if gated else None

    def init_state(self, batch: int, capacity: int | None = None, dtype: Any = jnp.float32) -> tuple[()]:
        return ()

    def __call__(
        self, x: Float[Array, "B T D"], state: tuple[()] | None, context: Context
    ) -> tuple[Float[Array, "B T D"], tuple[()], dict[str, Array]]:
        valid = context.segments.valid
        x = jnp.where(valid[..., None], x, 0)
        tokens = x.reshape(-1, x.shape[-1])
        logits = self.router(tokens.astype(jnp.promote_types(x.dtype, jnp.float32)))
        probabilities = jax.nn.softmax(logits)
        gates, chosen = jax.lax.top_k(probabilities, self.config.top_k)
        if self.config.renormalise:
            gates = gates / jnp.sum(gates, axis=-1, keepdims=True)
        y = self._experts(tokens, gates, chosen).astype(x.dtype).reshape(x.shape)
        if self.shared is not None:
            shared, _, _ = self.shared(x, (), context)
            y = y + (shared if self.shared_gate is None else jax.nn.sigmoid(self.shared_gate(x)) * shared)
        return y, (), self._losses(logits, probabilities, chosen, valid.reshape(-1), context.sequence_axis)

    def _experts(
        self, x: Float[Array, "T D"], gates: Float[Array, "T K"], chosen: Int[Array, "T K"]
    ) -> Float[Array, "T D"]:
        """sum_k gates_k E_{chosen_k}(x) of every token, at least float32."""
        blocks = _blocks(chosen.reshape(-1), self.config.experts)
        rows = jnp.zeros((blocks.expert.shape[0] * blocks.size, x.shape[1]), x.dtype)
        rows = rows.at[blocks.row].set(jnp.repeat(x, self.config.top_k, axis=0), unique_indices=True)
        rows = rows.reshape(-1, blocks.size, x.shape[1])
        weights = lambda kernel: jnp.take(kernel[...], blocks.expert, axis=0, mode="clip").astype(x.dtype)
        each = lambda rows, kernel: jnp.einsum("nci,nio->nco", rows, weights(kernel))
        kind, up = self.config.activation, each(rows, self.up)
        hidden = activate(kind, up) if self.gate is None else activate(kind, each(rows, self.gate)) * up
        y = each(hidden, self.down).reshape(-1, x.shape[1])[blocks.row]
        return jnp.sum(y.reshape(*gates.shape, -1) * gates[..., None], axis=1)

    def _losses(
        self,
        logits: Float[Array, "T E"],
        probabilities: Float[Array, "T E"],
        chosen: Int[Array, "T K"],
        valid: Bool[Array, "T"],
        sequence_axis: str | None,
    ) -> dict[str, Array]:
        weight = valid.astype(logits.dtype)
        votes = jnp.broadcast_to(weight[:, None], chosen.shape).reshape(-1)
        square = jnp.square(jax.nn.logsumexp(logits, axis=-1))
        sums = (
            jnp.sum(weight),
            jnp.zeros(self.config.experts, logits.dtype).at[chosen.reshape(-1)].add(votes),
            jnp.sum(probabilities * weight[:, None], axis=0),
            jnp.sum(square * weight),
        )
        axes = compat.varying_axes(logits) | (frozenset() if sequence_axis is None else {sequence_axis})
        if axes:
            sums = jax.lax.psum(tuple(compat.vary_over(x, axes) for x in sums), tuple(sorted(axes)))
        count = jnp.maximum(sums[0], 1)
        choices, mass, squares = (x / count for x in sums[1:])
        losses = {}
        if self.config.balance:
            losses["balance"] = self.config.balance * self.config.experts * jnp.sum(choices * mass)
        if self.config.router_z:
            losses["router_z"] = self.config.router_z * squares
        return losses


class _Blocks(NamedTuple):
    """Rows for A assignments of a token to an expert, such that each block of `size` rows belongs to one expert.

    Blocks that a routing leaves empty name an expert beyond the last; their rows are zero.
    """

    row: Int[Array, "A"]
    expert: Int[Array, "N"]  # of each block
    size: int


def _blocks(expert: Int[Array, "A"], experts: int) -> _Blocks:
    """Assignments sorted by expert, each expert's rows filled up to whole blocks.

    Shapes do not depend on the routing: there are as many blocks as the worst one needs, at most half as many rows
    again as assignments, and a token alone (A = k) reads the weights of its k experts only. One batched product over
    blocks takes a thirteenth of the time of `jax.lax.ragged_dot` on a CPU (16 experts; forward and backward), which
    multiplies every row with every expert there.
    """
    count = expert.shape[0]
    size = max(1, count // (2 * experts))
    number = (count + min(experts, count) * (size - 1)) // size
    tokens = jnp.zeros(experts, jnp.int32).at[expert].add(1)
    needed = -(-tokens // size)
    last, before = jnp.cumsum(needed), jnp.cumsum(tokens) - tokens
    order = jnp.argsort(expert)
    owner = expert[order]
    row = (last - needed)[owner] * size + jnp.arange(count, dtype=jnp.int32) - before[owner]
    blocks = jnp.searchsorted(last, jnp.arange(number, dtype=jnp.int32), side="right")
    return _Blocks(jnp.zeros_like(row).at[order].set(row), blocks, size)
