"""Shared vocabulary: axis letters, document segments, the context of a forward pass, and the bases of layer configs.

Axis letters, everywhere in this code base:
B batch, T time, D model or channel width, H heads, G groups of heads, K key size, V value size, N state size, C chunk.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

State = Any
Initializer = Callable[..., Array]


class Segments(NamedTuple):
    """Where documents start and which positions hold tokens, both `[B, T]`.

    `start[b, t]` True: a document begins at t; everything carried from before is forgotten.
    `start[b, 0]` False: the row goes on with the carried state.
    `valid[b, t]` False: padding. It stands at row ends, or before a start.
    """

    start: Bool[Array, "B T"]
    valid: Bool[Array, "B T"]

    @classmethod
    def whole(cls, batch: int, length: int, *, fresh: bool) -> Segments:
        """One unpadded document a row, which starts here (`fresh`) or goes on from the carried state."""
        start = jnp.zeros((batch, length), bool).at[:, 0].set(fresh)
        return cls(start, jnp.ones((batch, length), bool))

    @property
    def ids(self) -> Int[Array, "B T"]:
        """Number of the document that each position belongs to, 0 for the one carried in."""
        return jnp.cumsum(self.start.astype(jnp.int32), axis=-1)

    def positions(self, offset: Int[Array, "B"] | int = 0) -> tuple[Int[Array, "B T"], Int[Array, "B"]]:
        """Position of every token inside its own document, and the offset to hand to the next call.

        `offset[b]`: how many tokens of the carried document came before this call. Padding does not count.
        """
        count = jnp.cumsum(self.valid.astype(jnp.int32), axis=-1)
        before = count - self.valid
        base = jax.lax.cummax(jnp.where(self.start, before, -1), axis=1)
        offset = jnp.broadcast_to(jnp.asarray(offset, jnp.int32), count.shape[:1])
        shift = jnp.where(base < 0, offset[:, None], -base)
        return before + shift, count[:, -1] + shift[:, -1]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """What every layer of a forward pass may look at; one pytree, passed down unchanged unless a layer publishes.

    `shared` holds what earlier layers published for later ones. `sequence_axis` names the mesh axis over which time is
    sharded, `parameter_axis` that over which the parameters of a stack are; None where they are not.
    """

    segments: Segments
    positions: Int[Array, "B T"]
    key: Array | None = None
    shared: dict[str, Any] = dataclasses.field(default_factory=dict)
    sequence_axis: str | None = dataclasses.field(default=None, metadata={"static": True})
    parameter_axis: str | None = dataclasses.field(default=None, metadata={"static": True})

    @classmethod
    def whole(cls, batch: int, length: int, *, fresh: bool = True, offset: Int[Array, "B"] | int = 0) -> Context:
        """The context of `batch` unpadded documents; `fresh=False` and `offset` continue carried ones."""
        segments = Segments.whole(batch, length, fresh=fresh)
        return cls(segments, segments.positions(offset)[0])

    def replace(self, **changes: Any) -> Context:
        return dataclasses.replace(self, **changes)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Which leaves of a mixer's state are its recurrent memory, by their dotted names ("hidden", "cell.memory").

    A mixer says so in its class attribute `recurrent_memory`, and one without it has none: nothing of its state is ever
    drawn, or handed to another sequence, but all of it goes on where a text goes on.

    `leaves`: sums over the tokens so far, `[B, ...]`, for which any value is a valid one.
    `heads`: the axis after the batch is that of heads.
    `companions`: leaves without which those mean something else, as a maximum that they are scaled by, a normaliser
    that they are divided by, an angle that they are turned by; each with the value beside which a drawn memory stands
    for itself. They are not drawn (a normaliser has a sign), and go wherever their memory goes.

    Inputs that a short convolution or a token shift keeps, attention's caches and all that is bound to a position of
    its own document are neither.
    """

    leaves: tuple[str, ...]
    heads: bool = False
    companions: Mapping[str, float] = dataclasses.field(default_factory=dict)


@runtime_checkable
class Mixer(Protocol):
    """Mixes along time: `mixer(x, state, context) -> (y, state)` for x of `[B, T, D]` with any T >= 1.

    `state=None` starts fresh. The same call trains, prefills and decodes. A recurrence declares its `recurrent_memory`
    (`Memory`).
    """

    def __call__(
        self, x: Float[Array, "B T D"], state: State | None, context: Context
    ) -> tuple[Float[Array, "B T D"], State]: ...

    def init_state(self, batch: int, capacity: int | None = None, dtype: Any = jnp.float32) -> State: ...


@runtime_checkable
class Channel(Protocol):
    """Works within a position (MLP, mixture of experts): `channel(x, state, context) -> (y, state, aux)`.

    `aux` is a dict of scalars, `{}` where there is nothing to report.
    """

    def __call__(
        self, x: Float[Array, "B T D"], state: State | None, context: Context
    ) -> tuple[Float[Array, "B T D"], State, dict[str, Array]]: ...

    def init_state(self, batch: int, capacity: int | None = None, dtype: Any = jnp.float32) -> State: ...


@dataclasses.dataclass(frozen=True)
class MixerConfig:
    """Base of every mixer's config: a frozen dataclass beside the mixer it makes."""

    @property
    def alignment(self) -> int:
        """Documents packed into rows have to start at multiples of this."""
        return 1

    def make(self, width: int, *, layer: int, depth: int, rngs: nnx.Rngs) -> Mixer:
        """Builds layer number `layer` of `depth`. Only values may depend on the two numbers, never structure."""
        raise TypeError(f"{type(self).__name__} is a MixerConfig without a make method")

    def across_layers(self, width: int) -> Any:
        """A parameter that this layer shares with others of its stack (`layers.across.AcrossLayers`), or None."""
        return None


@dataclasses.dataclass(frozen=True)
class ChannelConfig:
    """Base of every channel layer's config (MLP, mixture of experts)."""

    def make(self, width: int, *, layer: int, depth: int, rngs: nnx.Rngs) -> Channel:
        """As `MixerConfig.make`."""
        raise TypeError(f"{type(self).__name__} is a ChannelConfig without a make method")

    def across_layers(self, width: int) -> Any:
        """A parameter that this layer shares with others of its stack (`layers.across.AcrossLayers`), or None."""
        return None
