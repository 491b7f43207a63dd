"""A language model: embedding, a stack of layer groups, a final norm, a tied or untied head."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from seqmodels import compat, params
from seqmodels.layers.carry import token_positions
from seqmodels.layers.dropout import check_dropout, dropout
from seqmodels.layers.linear import Linear
from seqmodels.layers.norms import NormConfig
from seqmodels.layers.stack import LayerGroups, Stack, alignment, check_layers, configs_of
from seqmodels.params import Group, param
from seqmodels.typing import ChannelConfig, Context, Segments

DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A language model over `vocab_size` tokens.

    `layers`: groups of `(pattern, repeats)`, a pattern being a tuple of mixer configs, channel configs and Blocks:
    `(((R, R, A), 8), ((R, R), 1))`. A bare mixer is followed by `channel`, if that is given.
    `dtype`: of activations; parameters, recurrent states and logits are float32. `remat`: recompute each period of
    layers in the backward pass. `embed_scale`: multiply embeddings by sqrt(width), or by the number given.
    `logits_cap` c: c tanh(logits / c).
    `norm`: the one before every layer and before the head; `embedding_norm`: one more right after the embedding (RWKV).
    `learned_positions` n: a learned vector for each of the first n positions of a document is added to the embedding
    (GPT-2); a later position has none, and NaN comes out. None adds nothing.
    `dropout`: rate on embeddings and on what each layer adds, while training: `forward` draws it from its key alone.
    """

    vocab_size: int
    width: int
    layers: LayerGroups
    channel: ChannelConfig | None = None
    tied: bool = True
    dtype: str = "float32"
    remat: bool = True
    embed_scale: bool | float = False
    logits_cap: float | None = None
    dropout: float = 0.0
    norm: NormConfig = dataclasses.field(default_factory=NormConfig)
    embedding_norm: bool = False
    learned_positions: int | None = None

    def __post_init__(self):
        for field in ("vocab_size", "width"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, not {getattr(self, field)}")
        if self.learned_positions is not None and self.learned_positions < 1:
            raise ValueError(f"learned_positions must be at least 1, or None for none, not {self.learned_positions}")
        if self.logits_cap is not None and self.logits_cap <= 0:
            raise ValueError(f"logits_cap must be positive, or None for no cap, not {self.logits_cap}")
        check_dropout(self.dropout)
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} is not one of {DTYPES}")
        if self.channel is not None and not isinstance(self.channel, ChannelConfig):
            raise TypeError(f"channel must be a ChannelConfig (MLPConfig, ...) or None, not {self.channel!r}")
        check_layers(self.layers)
        for config in configs_of(self.layers):
            if not getattr(config, "causal", True):
                raise ValueError(
                    f"a language model would see the tokens that it is to predict through {config}: set causal=True "
                    "(only the aggregator of a PrefixScan may look both ways)"
                )

    @property
    def alignment(self) -> int:
        """Documents packed into rows have to start at multiples of this (the loader's `align`)."""
        return alignment(self.layers)

    def make(self, *, rngs: nnx.Rngs) -> LanguageModel:
        return LanguageModel(self, rngs=rngs)


class LMState(NamedTuple):
    """What a model carries between calls. `position`: how many tokens the carried document has had.

    `layers`: per group and step, as `Stack` has them; None in the place of a step's state starts that layer fresh.
    """

    position: Int[Array, "B"]
    layers: Any


class LanguageModel(nnx.Module):
    """Next-token logits: `model(tokens, state=None, segments=None) -> (logits, state)` for tokens of `[B, T]`.

    `state=None` starts fresh; a state continues each row's document unless `segments.start[:, 0]` says otherwise.
    Embeddings start with standard deviation 1 / sqrt(width).
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.sequence_axis: str | None = None
        self.parameter_axis: str | None = None
        self.source: Any = None  # the files that `hf.load_pretrained` read it from, for `hf.save_pretrained`
        init = jax.nn.initializers.normal(config.width**-0.5)
        shape = (config.vocab_size, config.width)
        self.embedding = param(rngs, shape, init, group=Group.EMBEDDING, axes=("vocab", "embed"))
        vectors = functools.partial(param, rngs, init=init, group=Group.EMBEDDING, axes=(None, "embed"))
        places = config.learned_positions
        self.position_embedding = None if places is None else vectors((places, config.width))
        self.stack = Stack(
            config.width,
            config.layers,
            rngs=rngs,
            channel=config.channel,
            remat=config.remat,
            dropout=config.dropout,
            norm=config.norm,
        )
        self.norm = config.norm.make(config.width, rngs=rngs)
        self.embedding_norm = config.norm.make(config.width, rngs=rngs) if config.embedding_norm else None
        head = functools.partial(Linear, config.width, config.vocab_size, rngs=rngs, axes=("embed", "vocab"))
        self.head = None if config.tied else head()

    def on_mesh(self, *, sequence_axis: str | None = None, parameter_axis: str | None = None) -> LanguageModel:
        """This model, changed in place to be called inside `shard_map` with an axis divided over devices.

        `sequence_axis`: the mesh axis over which time is sharded; tokens and segments are then each device's span,
        states the same on every device. `parameter_axis`: the one over which parameters are, along their axis `embed`.
        """
        self.sequence_axis, self.parameter_axis = sequence_axis, parameter_axis
        return self

    def init_state(self, batch: int, capacity: int | None = None, dtype: Any = None) -> LMState:
        """The state before any token; `capacity` is needed by full attention, `dtype` is that of its cache."""
        dtype = jnp.dtype(self.config.dtype) if dtype is None else dtype
        return LMState(jnp.zeros((batch,), jnp.int32), self.stack.init_state(batch, capacity, dtype))

    def __call__(
        self, tokens: Int[Array, "B T"], state: LMState | None = None, segments: Segments | None = None
    ) -> tuple[Float[Array, "B T V"], LMState]:
        hidden, state, _ = self.forward(tokens, state, segments)
        return self.logits(hidden), state

    def forward(
        self,
        tokens: Int[Array, "B T"],
        state: LMState | None = None,
        segments: Segments | None = None,
        *,
        key: Array | None = None,
        shared: Mapping[str, Any] | None = None,
    ) -> tuple[Float[Array, "B T D"], LMState, dict[str, Array]]:
        """The normalised hidden vectors, the state after the last token, and the layers' auxiliary scalars.

        `key`: of this call's randomness (dropout); None, as in evaluation and generation, for none. `shared`: what
        layers find in `context.shared`, as S5 the time between tokens in `shared["elapsed"]` [B, T].
        """
        self._check(tokens, state, segments)
        if segments is None:
            segments = Segments.whole(*tokens.shape, fresh=state is None)
            if self.sequence_axis is not None:  # only the first device holds the beginning
                segments = segments._replace(start=segments.start & (jax.lax.axis_index(self.sequence_axis) == 0))
        offset = jnp.zeros(tokens.shape[:1], jnp.int32) if state is None else state.position
        positions, position = token_positions(segments, offset, self.sequence_axis)
        axes = {"sequence_axis": self.sequence_axis, "parameter_axis": self.parameter_axis}
        context = Context(segments, positions, key, dict(shared or {}), **axes)
        # Padding may hold any integer; a token outside the vocabulary elsewhere becomes NaN rather than another token.
        tokens = jnp.where(segments.valid, tokens, 0)
        embedding = params.whole(self.embedding, self.parameter_axis)
        x = jnp.take(embedding, tokens, axis=0, mode="fill", fill_value=jnp.nan).astype(self.config.dtype)
        if self.config.embed_scale:
            x = x * (self.config.width**0.5 if self.config.embed_scale is True else self.config.embed_scale)
        if self.position_embedding is not None:
            table = params.whole(self.position_embedding, self.parameter_axis)
            x = x + jnp.take(table, positions, axis=0, mode="fill", fill_value=jnp.nan).astype(x.dtype)
        if self.embedding_norm is not None:
            x = params.gathered(self.embedding_norm, self.parameter_axis)(x)
        x = dropout(x, self.config.dropout, context)
        x, layers, aux = self.stack(x, None if state is None else state.layers, context)
        norm = params.gathered(self.norm, self.parameter_axis)
        return norm(x), LMState(position, layers), aux

    def logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Float32 logits of hidden vectors, from the embedding (tied) or a head of their own."""
        if self.head is None:
            weight = params.whole(self.embedding, self.parameter_axis).T
        else:
            weight = params.whole(self.head.kernel, self.parameter_axis)
        flat = hidden.reshape(-1, hidden.shape[-1])  # why: `layers.linear.product`
        logits = compat.wide_einsum("td,dv->tv", flat, weight.astype(hidden.dtype))
        logits = logits.reshape(*hidden.shape[:-1], weight.shape[1])
        cap = self.config.logits_cap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def _check(self, tokens: Array, state: LMState | None, segments: Segments | None) -> None:
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(f"tokens must be integers of shape [batch, time], not {tokens.dtype} of {tokens.shape}")
        if tokens.shape[1] == 0:
            raise ValueError(f"tokens of shape {tokens.shape} hold no time step; give at least one")
        if segments is not None and any(field.shape != tokens.shape for field in segments):
            shapes = [field.shape for field in segments]
            raise ValueError(f"segments of shapes {shapes} do not describe tokens of shape {tokens.shape}")
        if state is None:
            return
        batch = tokens.shape[0]
        expected, roomier = (
            _as_far_as(state, jax.eval_shape(lambda n=n: self.init_state(batch, n))) for n in (1 << 20, 1 << 21)
        )
        structures: list[Any] = [jax.tree.structure(tree) for tree in (state, expected)]
        if structures[0] != structures[1]:
            raise ValueError("this state belongs to another model: its structure is not that of model.init_state(...)")
        for leaf, one, two in zip(*map(jax.tree.leaves, (state, expected, roomier)), strict=True):
            shape = tuple(None if a != b else a for a, b in zip(one.shape, two.shape, strict=True))
            if leaf.ndim != len(shape) or any(b not in (None, a) for a, b in zip(leaf.shape, shape, strict=True)):
                raise ValueError(
                    f"a state with a leaf of shape {leaf.shape} cannot continue tokens of shape {tokens.shape}: "
                    f"expected {shape}, None for the capacity; make it with model.init_state({batch})"
                )


def _as_far_as(state: Any, whole: LMState) -> LMState:
    """`whole` without the layers of which `state` has None."""
    layers = getattr(state, "layers", None)
    if not isinstance(layers, tuple) or list(map(len, layers)) != list(map(len, whole.layers)):
        return whole
    pairs = (zip(own, group, strict=True) for own, group in zip(layers, whole.layers, strict=True))
    return LMState(whole.position, tuple(tuple(None if own is None else of for own, of in pair) for pair in pairs))
