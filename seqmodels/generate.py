"""Text from a language model: one parallel prefill, then steps of constant cost.

`generate(model, prompts, steps, key=key)` returns the tokens and the state after them, which a later call can go on
from; `stream(...)` yields them as they come.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from seqmodels import params
from seqmodels.sampling import Sampling, check_settings, draw
from seqmodels.typing import Segments

_ENDLESS = 1 << 30  # tokens that no document has
SMALLEST_BUCKET = 16  # prompts are padded to powers of two from here on, so that few shapes are compiled
NOT_A_TOKEN = -2  # in place of one that would be sampled from NaN


class GenerationState(NamedTuple):
    """A conversation so far: the model has taken in every token of it, and `logits` are those of the next one."""

    model: Any
    logits: Float[Array, "B V"]


class Generation(NamedTuple):
    """New tokens `[B, N]` (N <= steps; a row is filled up with the stop token after its own), and the state after."""

    tokens: Int[np.ndarray, "B N"]
    state: GenerationState


class _Programs(NamedTuple):
    prefill: Callable[..., GenerationState]
    advance: Callable[..., tuple[Array, Array, GenerationState]]


@functools.lru_cache(maxsize=16)
def _programs(definition: params.Definition) -> _Programs:
    """The two compiled functions of a model; kept, so that a second call of `generate` compiles nothing."""

    def prefill(
        arrays: dict[str, Any], state: Any, logits: Float[Array, "B V"] | None, tokens: Int[Array, "B T"],
        lengths: Int[Array, "B"], fresh: Bool[Array, ""],
    ) -> GenerationState:  # fmt: skip
        model = params.merge(definition, arrays)
        at = jnp.arange(tokens.shape[1])[None]
        segments = Segments(jnp.broadcast_to((at == 0) & fresh, tokens.shape), at < lengths[:, None])
        hidden, state, _ = model.forward(tokens, state, segments)
        last = jnp.maximum(lengths - 1, 0)
        read = model.logits(jnp.take_along_axis(hidden, last[:, None, None], axis=1))[:, 0]
        if logits is not None:  # a row that got nothing new keeps what it was about to say
            read = jnp.where((lengths > 0)[:, None], read, logits)
        return GenerationState(state, read)

    def advance(
        arrays: dict[str, Any], state: GenerationState, done: Bool[Array, "B"], key: Array, count: Int[Array, ""],
        sampling: Sampling, stop: Int[Array, ""], greedy: bool, restricted: bool, stops: bool,
    ) -> tuple[Array, Array, GenerationState]:  # fmt: skip
        model = params.merge(definition, arrays)
        if greedy:
            token = jnp.argmax(state.logits, axis=-1)
        else:
            token = draw(jax.random.fold_in(key, count), state.logits, sampling, restricted=restricted)
        token = jnp.where(jnp.any(jnp.isnan(state.logits), axis=-1), NOT_A_TOKEN, token.astype(jnp.int32))
        if not stops:
            read, after = model(token[:, None], state.model)
            return token, done, GenerationState(after, read[:, 0])
        token = jnp.where(done, stop, token)
        segments = Segments(jnp.zeros_like(done)[:, None], ~done[:, None])
        read, after = model(token[:, None], state.model, segments)
        read = jnp.where(done[:, None], state.logits, read[:, 0])
        return token, done | (token == stop), GenerationState(after, read)

    donating = jax.jit(advance, static_argnames=("greedy", "restricted", "stops"), donate_argnums=1)
    return _Programs(jax.jit(prefill), donating)


def capacity_of(model: Any, state: Any) -> int | None:
    """How many tokens a model's `state` has room for; None where it does not grow with them.

    That is the largest capacity for which `init_state` asks for no larger leaves: caches hold so many tokens, a PSM's
    levels somewhat more.
    """
    held = jax.tree.leaves(state)
    batch = held[0].shape[0]  # only shapes are looked at, so any leaf's first axis serves

    def fits(capacity: int) -> bool:
        asked = jax.tree.leaves(jax.eval_shape(functools.partial(model.init_state, batch, capacity=capacity)))
        return all(
            size <= there
            for leaf, one in zip(held, asked, strict=True)
            for there, size in zip(leaf.shape, one.shape, strict=True)
        )

    if fits(_ENDLESS):
        return None
    return bisect.bisect_left(range(1, _ENDLESS), True, key=lambda capacity: not fits(capacity))


class Stream(Iterator[np.ndarray]):
    """Iterates over new tokens, `[B]` at a time, as they are sampled; see `generate` for the arguments.

    `state` is at any moment the state after all tokens handed out so far, safe to keep.
    """

    def __init__(
        self,
        model: Any,
        prompt: Sequence[Sequence[int]] | Int[Array, "B T"] | np.ndarray,
        steps: int,
        *,
        key: Array | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        stop: int | None = None,
        valid: Bool[Array, "B T"] | np.ndarray | None = None,
        state: GenerationState | None = None,
        capacity: int | None = None,
    ) -> None:
        tokens, lengths = _as_rows(prompt, valid)
        if not isinstance(steps, int | np.integer) or steps < 1:
            raise ValueError(f"steps is {steps!r}; it has to be a whole number of at least 1")
        if state is not None and not isinstance(state, GenerationState):
            raise TypeError(
                f"state is a {type(state).__name__}; pass the state that an earlier generate or stream returned"
            )
        check_settings(temperature, top_k, top_p, key)
        definition, self._arrays = params.split(model)
        self._programs = _programs(definition)
        self._state = self._prefill(model, tokens, lengths, steps, state, capacity)
        vocabulary = self._state.logits.shape[-1]
        if tokens.min() < 0 or tokens.max() >= vocabulary:
            raise ValueError(
                f"prompt tokens lie in [{tokens.min()}, {tokens.max()}], the vocabulary in [0, {vocabulary})"
            )
        greedy = temperature == 0
        self._key = jax.random.key(0) if key is None else key
        self._settings = Sampling(
            jnp.float32(temperature if temperature else 1.0),
            jnp.int32(vocabulary if top_k is None else top_k),
            jnp.float32(1.0 if top_p is None else top_p),
        )
        self._stop = jnp.int32(-1 if stop is None else stop)
        self._flags = {"greedy": greedy, "restricted": not (top_k is None and top_p is None), "stops": stop is not None}
        self._done = jnp.zeros(len(tokens), bool)
        self._count, self._steps = 0, steps

    def _prefill(
        self, model: Any, tokens: np.ndarray, lengths: np.ndarray, steps: int, state: GenerationState | None,
        capacity: int | None,
    ) -> GenerationState:  # fmt: skip
        """The state after the prompt. Checks the room for prompt and steps before anything is computed."""
        batch, need = len(tokens), int(lengths.max()) + steps
        if state is None:
            if lengths.min() < 1:
                raise ValueError(f"every prompt needs a token to start from; the lengths are {lengths.tolist()}")
            if capacity is not None and capacity < need:
                raise ValueError(_too_small(capacity, 0, int(lengths.max()), steps))
            start = model.init_state(batch, capacity or _bucket(need))
            return self._take_in(start, None, tokens, lengths, fresh=True)
        if state.logits.shape[0] != batch:
            raise ValueError(f"the state is of {state.logits.shape[0]} rows, the prompt of {batch}")
        room = capacity_of(model, state.model)
        if room is not None:
            used = np.asarray(state.model.position)
            row = int(np.argmax(used + lengths))
            if used[row] + lengths[row] + steps > room:
                raise ValueError(_too_small(room, int(used[row]), int(lengths[row]), steps))
        if lengths.max() == 0:  # the caller may keep `state`, and a step donates what it is given
            return jax.tree.map(jnp.copy, state)
        return self._take_in(state.model, state.logits, tokens, lengths, fresh=False)

    def _take_in(
        self, state: Any, logits: Array | None, tokens: np.ndarray, lengths: np.ndarray, *, fresh: bool
    ) -> GenerationState:
        width = _bucket(tokens.shape[1])
        tokens = np.pad(tokens, ((0, 0), (0, width - tokens.shape[1])))
        return self._programs.prefill(self._arrays, state, logits, tokens, lengths, np.bool_(fresh))

    @property
    def state(self) -> GenerationState:
        return jax.tree.map(jnp.copy, self._state)

    def _advance(self) -> Array:
        token, self._done, self._state = self._programs.advance(
            self._arrays, self._state, self._done, self._key, np.int32(self._count), self._settings, self._stop,
            **self._flags,
        )  # fmt: skip
        self._count += 1
        return token

    def _finished(self) -> bool:
        return self._count >= self._steps or (self._flags["stops"] and bool(np.all(self._done)))

    def __next__(self) -> np.ndarray:
        if self._finished():
            raise StopIteration
        number = self._count
        return _checked(np.asarray(self._advance())[:, None], number)[:, 0]

    def collect(self) -> Generation:
        """All the tokens that are left, and the state after them."""
        tokens, first = [], self._count
        before = self._done
        while self._count < self._steps:
            tokens.append(self._advance())
            # one step late, so that the device never waits; a step past the end leaves a finished row as it is
            if self._flags["stops"] and bool(np.all(before)):
                tokens.pop()
                break
            before = self._done
        rows = np.stack(jax.device_get(tokens), axis=1) if tokens else np.zeros((len(self._done), 0), np.int32)
        return Generation(_checked(rows, first), self._state)


def stream(model: Any, prompt: Any, steps: int, **settings: Any) -> Stream:
    """As `generate`, but an iterator over the tokens `[B]` as they come, whose `state` can be read at any time."""
    return Stream(model, prompt, steps, **settings)


def generate(model: Any, prompt: Any, steps: int, **settings: Any) -> Generation:
    """Samples up to `steps` tokens after each prompt: `(tokens [B, N], state)`.

    `prompt` is a list of token lists (which may differ in length), or an array `[B, T]`, right-padded where `valid` is
    False. It is taken in by one parallel call; every further token costs one step of the model whatever came before.

    Settings: `key` for sampling; `temperature` (0: the likeliest token); `top_k`, `top_p` (see `sampling.restrict`;
    the temperature is applied first); `stop`, a token that ends a row and is kept as its last; `state` of an earlier
    call to go on from (the prompt's rows may then be empty); `capacity`, how many tokens the caches of full attention
    are to hold, those of later calls included (default: enough for this call).

    Raises ValueError where prompt and steps exceed that capacity, with both numbers, and FloatingPointError where the
    model's logits are NaN.
    """
    return Stream(model, prompt, steps, **settings).collect()


def _checked(tokens: np.ndarray, first: int) -> np.ndarray:
    """Raises FloatingPointError where a token was to be sampled from NaN; `first` counts those handed out before."""
    row, step = np.nonzero(tokens == NOT_A_TOKEN)
    if row.size:
        raise FloatingPointError(
            f"the logits of rows {sorted(set(row.tolist()))} are NaN from new token {first + step.min() + 1} on: the "
            "parameters are not finite, the state given is not, a document is longer than its layers can hold, or "
            "Newton's method did not converge (method='newton': use 'sequential')"
        )
    return tokens


def _bucket(length: int) -> int:
    return max(SMALLEST_BUCKET, 1 << (length - 1).bit_length())


def _too_small(capacity: int, used: int, prompt: int, steps: int) -> str:
    return (
        f"the states hold {capacity} tokens, but {used + prompt + steps} are needed ({used} so far, {prompt} "
        f"of the prompt, {steps} steps): start with capacity={used + prompt + steps} or more, or ask for fewer steps"
    )


def _as_rows(prompt: Any, valid: Any) -> tuple[np.ndarray, np.ndarray]:
    """The prompt as right-padded int32 `[B, T]` with T >= 1, and the length of each row."""
    if isinstance(prompt, (jax.Array, np.ndarray)):
        tokens = np.asarray(prompt)
        if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
            raise ValueError(f"the prompt is {tokens.dtype}{list(tokens.shape)}; it has to be integer [batch, time]")
        mask = np.ones(tokens.shape, bool) if valid is None else np.asarray(valid)
        if mask.shape != tokens.shape:
            raise ValueError(f"valid is {list(mask.shape)}, the prompt {list(tokens.shape)}; they have to agree")
        lengths = mask.sum(axis=1)
        if not np.array_equal(mask, np.arange(tokens.shape[1]) < lengths[:, None]):
            raise ValueError(
                "a prompt is padded on the right: valid has to be True up to each row's length, then False"
            )
        tokens = np.where(mask, tokens, 0)
    else:
        rows = [np.asarray(row, np.int64) for row in prompt]
        if not rows or any(row.ndim != 1 for row in rows):
            raise ValueError("the prompt has to be a non-empty list of token lists, or an array [batch, time]")
        lengths = np.array([len(row) for row in rows])
        tokens = np.zeros((len(rows), max(1, lengths.max())), np.int64)
        for row, length, values in zip(tokens, lengths, rows, strict=True):
            row[:length] = values
    return tokens.astype(np.int32), lengths.astype(np.int32)
