"""Softmax attention: causal, full with a preallocated cache or a sliding window with a ring buffer; or non-causal."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from seqmodels.layers.attend import Keys, Queries, Scoring, attend, attend_in_window, attend_over_devices
from seqmodels.layers.carry import document_numbers, gather_time, token_positions
from seqmodels.layers.linear import Linear, scaled
from seqmodels.layers.norms import NormConfig
from seqmodels.layers.positions import Positions, alibi_slopes, rope, rotated_size
from seqmodels.typing import Context, MixerConfig, Segments

NO_STATE = (
    "attention with causal=False sees a whole document at once and has no state to go on from: call it with "
    "state=None, or set causal=True to generate and to carry documents on"
)


@dataclasses.dataclass(frozen=True)
class AttentionConfig(MixerConfig):
    """Multi-head attention with `kv_heads` groups of keys and values (arXiv 1706.03762, 2305.13245).

    `window` w: each token sees w keys, its own included, and the state is a ring of w slots; None sees the whole
    document, and the state is a cache of the capacity that `init_state` was given. `kv_heads=1` is MQA, None is one
    per head; `head_size` defaults to width / heads. `logits_cap` c bounds the scores as c tanh(score / c).
    `causal` False: each token sees its whole document, the tokens after it too, so there is no state to go on from.
    `query_key_norm`: a norm over every head of the queries, and one of the keys, before they rotate (2010.04245).
    `output_gate`: W_o (y * sigmoid(W_g x)), a gate for every channel of every head (2505.06708).
    `bias`: of all projections; `output_bias` that of W_o if it is another one. The output projection starts with
    variance 2 / depth over its fan-in, as in Griffin.
    """

    heads: int = 4
    kv_heads: int | None = None
    head_size: int | None = None
    window: int | None = None
    positions: Positions = Positions.ROPE
    rope_base: float = 10_000.0
    rope_fraction: float = 1.0
    logits_cap: float | None = None
    bias: bool = False
    output_bias: bool | None = None
    causal: bool = True
    query_key_norm: NormConfig | None = None
    output_gate: bool = False

    def __post_init__(self):
        groups = self.heads if self.kv_heads is None else self.kv_heads
        if self.heads < 1 or groups < 1 or self.heads % groups:
            raise ValueError(f"heads={self.heads} do not divide into kv_heads={groups} groups; choose a divisor")
        if self.head_size is not None and self.head_size < 1:
            raise ValueError(f"head_size must be at least 1, not {self.head_size}; None is width / heads")
        if not 0 < self.rope_fraction <= 1:
            raise ValueError(f"rope_fraction is the part of a head that rotates, in (0, 1], not {self.rope_fraction}")
        if self.logits_cap is not None and self.logits_cap <= 0:
            raise ValueError(f"logits_cap must be positive, or None for no cap, not {self.logits_cap}")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window={self.window} keys leave not even the own one; use 1 or more, or None for all")
        if self.window is not None and not self.causal:
            raise ValueError(f"window={self.window} looks back only: with causal=False leave window=None")
        if self.positions not in list(Positions):
            raise ValueError(f"unknown positions {self.positions!r}; choose one of {[str(p) for p in Positions]}")

    def make(self, width: int, *, layer: int, depth: int, rngs: nnx.Rngs) -> Attention:
        return Attention(self, width, depth=depth, rngs=rngs)


class AttentionState(NamedTuple):
    """Keys and values of the carried document. The token at position p lies in slot p, or p % window in a ring.

    `length`: how many tokens the document has had so far.
    """

    key: Float[Array, "B S G K"]
    value: Float[Array, "B S G V"]
    length: Int[Array, "B"]


class Attention(nnx.Module):
    """See `AttentionConfig`. Positions are counted from the state's own `length`: only differences matter here.

    With time sharded over a mesh axis, queries stay where they are, and keys and values pass around the devices. A
    document that outgrows a given cache yields NaN from its first token without a slot on (through later layers in the
    whole row); nothing is overwritten.
    """

    def __init__(self, config: AttentionConfig, width: int, *, depth: int, rngs: nnx.Rngs):
        if config.head_size is None and width % config.heads:
            raise ValueError(f"width {width} does not divide into {config.heads} heads; give head_size")
        self.config = config
        self.groups = config.heads if config.kv_heads is None else config.kv_heads
        self.size = size = config.head_size or width // config.heads
        if config.positions == Positions.ROPE:
            rotated_size(size, config.rope_fraction)
        inner = functools.partial(Linear, width, rngs=rngs, axes=("embed", "heads"), bias=config.bias)
        self.query = inner(config.heads * size)
        self.key = inner(self.groups * size)
        self.value = inner(self.groups * size)
        norms = config.query_key_norm
        self.query_norm = None if norms is None else norms.make(size, rngs=rngs, axis=None)
        self.key_norm = None if norms is None else norms.make(size, rngs=rngs, axis=None)
        self.gate = inner(config.heads * size) if config.output_gate else None
        bias, init = config.bias if config.output_bias is None else config.output_bias, scaled(2.0 / depth)
        self.out = Linear(config.heads * size, width, rngs=rngs, axes=("heads", "embed"), bias=bias, init=init)

    def init_state(self, batch: int, capacity: int | None = None, dtype: Any = jnp.float32) -> AttentionState:
        """An empty cache of `capacity` tokens; a sliding window needs no capacity and ignores it."""
        if not self.config.causal:
            raise ValueError(NO_STATE)
        slots = self.config.window or capacity
        if slots is None:
            raise ValueError(
                "full attention keeps every key: give init_state a capacity, the longest document in tokens "
                "(prompt and generated together), or set AttentionConfig.window"
            )
        return self._empty(batch, slots, dtype)

    def _empty(self, batch: int, slots: int, dtype: Any) -> AttentionState:
        slots = self.config.window or slots
        empty = lambda: jnp.zeros((batch, slots, self.groups, self.size), dtype)
        return AttentionState(empty(), empty(), jnp.zeros((batch,), jnp.int32))

    def __call__(
        self, x: Float[Array, "B T D"], state: AttentionState | None, context: Context
    ) -> tuple[Float[Array, "B T D"], AttentionState | tuple[()]]:
        config, segments, axis = self.config, context.segments, context.sequence_axis
        batch, length = x.shape[:2]
        cached = None
        if state is None:
            spans = 1 if axis is None else jax.lax.axis_size(axis)
            state = self._empty(batch, length * spans, x.dtype)
        elif not config.causal:
            raise ValueError(NO_STATE)
        elif state.length.shape == (batch,):
            cached = _cached(state, segments, ring=config.window is not None)
        else:
            raise ValueError(f"a state of {state.length.shape[0]} rows cannot continue x of shape {x.shape}")
        position, total = token_positions(segments, state.length, axis)

        x = jnp.where(segments.valid[..., None], x, 0)
        heads = lambda linear: linear(x).reshape(batch, length, -1, self.size)
        query, key, value = heads(self.query), heads(self.key), heads(self.value)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        slopes = None
        if config.positions == Positions.ROPE:
            query, key = (rope(a, position, base=config.rope_base, fraction=config.rope_fraction) for a in (query, key))
        elif config.positions == Positions.ALIBI:
            slopes = alibi_slopes(config.heads)

        document = document_numbers(segments, axis)
        queries, keys = Queries(query, document, position), Keys(key, value, document, position, segments.valid)
        scoring = Scoring(config.window, slopes, config.logits_cap, config.causal)
        if axis is not None:
            out = attend_over_devices(queries, cached, keys, scoring, axis)
        elif config.window is None:
            out = attend(queries, cached, keys, scoring)
        else:
            out = attend_in_window(queries, cached, keys, scoring)
        if config.window is None:
            overflow = segments.valid & (position >= state.key.shape[1])
            out = jnp.where(overflow[:, :, None, None], jnp.nan, out)
        out = out.reshape(batch, length, -1)
        if self.gate is not None:
            out = out * jax.nn.sigmoid(self.gate(x))
        out = jnp.where(segments.valid[..., None], self.out(out), 0)
        if not config.causal:
            return out, ()
        if axis is not None:  # a state is the same on every device; where nobody asks for it, nothing is gathered
            keys, segments = gather_time((keys, segments), axis)
        return out, _stored(state, keys, segments, total, ring=config.window is not None)


def _cached(state: AttentionState, segments: Segments, *, ring: bool) -> Keys:
    """The slots of a state as keys of document 0, the carried one; none where a row does not go on with it."""
    batch, slots = state.key.shape[:2]
    slot = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32), (batch, slots))
    length = state.length[:, None]
    # The newest token lies in slot (length - 1) % slots; going back from there, each slot is one token older.
    position = length - 1 - (length - 1 - slot) % slots if ring else slot
    goes_on = jnp.any(segments.valid & (segments.ids == 0), axis=1, keepdims=True)
    filled = (position >= 0) & (position < length) & goes_on
    return Keys(state.key, state.value, jnp.zeros_like(slot), position, filled)


def _stored(state: AttentionState, own: Keys, segments: Segments, total: Array, *, ring: bool) -> AttentionState:
    """The state after a call: tokens of each row's last document in their slots, zeros in all others.

    A start clears the row, so that equal documents leave equal states, whatever stood there before them.
    """
    batch, slots = state.key.shape[:2]
    position = own.position
    keep = segments.valid & (own.document == own.document[:, -1:])
    if ring:
        keep &= position >= total[:, None] - slots
        position = position % slots
    slot = jnp.where(keep, position, slots)
    row = jnp.arange(batch)[:, None]
    forgets = jnp.any(segments.start, axis=1)[:, None, None, None]

    def write(cache: Array, new: Array) -> Array:
        return jnp.where(forgets, 0, cache).at[row, slot].set(new.astype(cache.dtype), mode="drop")

    return AttentionState(write(state.key, own.key), write(state.value, own.value), total)
