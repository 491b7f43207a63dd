"""RWKV-4's WKV: an exponentially weighted average of values, per channel, with a bonus for the current token."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from seqmodels import compat
from seqmodels.operators.decayed import wide
from seqmodels.operators.exponential import larger
from seqmodels.operators.family import run_family
from seqmodels.scan import Recurrence
from seqmodels.typing import Segments


class Weighted(NamedTuple):
    """One step's inputs: the log of its weight, and its value."""

    key: Float[Array, "D"]
    value: Float[Array, "D"]


class WKVState(NamedTuple):
    """The true sums of weights and of weighted values are exp(log_max) times these; (-inf, 0, 0) before any token."""

    log_max: Float[Array, "*B D"]
    numerator: Float[Array, "*B D"]
    denominator: Float[Array, "*B D"]


class WKVElement(NamedTuple):
    """A span: the sum of its log decays, and the state that it leaves behind an empty one."""

    log_decay: Float[Array, "D"]
    written: WKVState


def wkv_recurrence(log_decay: Float[Array, "D"], bonus: Float[Array, "D"]) -> Recurrence:
    """The WKV operator of RWKV-4 (2305.13048, equation 16), w = -log_decay > 0, u = bonus, per channel:

        out_t = (sum over i < t of e^{-(t-1-i) w + k_i} v_i + e^{u + k_t} v_t) / (the same without v)

    The past is kept under m_t = max(log_decay + m_{t-1}, k_t), from m = -inf, and read before its own step, so that no
    exponent is above 0 whatever the keys. `log_decay` is finite and <= 0.
    """

    def element(inputs: Weighted) -> WKVElement:
        key, value = wide(inputs.key), wide(inputs.value)
        decay = compat.vary_over(wide(log_decay), compat.varying_axes(key))
        return WKVElement(decay, WKVState(key, value, jnp.ones_like(value)))

    def read(state: WKVState, inputs: Weighted) -> Array:
        now = WKVState(wide(inputs.key) + wide(bonus), wide(inputs.value), jnp.ones_like(wide(inputs.value)))
        # A ratio does not depend on what both its sides are scaled by: the maximum is a constant to its gradient.
        log_max = jax.lax.stop_gradient(jnp.maximum(state.log_max, now.log_max))
        both = _sum(state, now, log_max)
        return both.numerator / both.denominator

    return Recurrence(
        elements=element,
        combine=lambda a, b: WKVElement(a.log_decay + b.log_decay, _act(b, a.written)),
        identity=lambda e: WKVElement(jnp.zeros_like(e.log_decay), _nothing_like(e.written)),
        act=_act,
        read=read,
        read_before=True,
        initial=lambda x: empty_wkv((), x.key.shape[-1], jnp.result_type(x.key, x.value)),
    )


def empty_wkv(batch: tuple[int, ...], size: int, dtype: Any = jnp.float32) -> WKVState:
    """What a document starts from, in at least float32."""
    zeros = jnp.zeros((*batch, size), jnp.promote_types(dtype, jnp.float32))
    return WKVState(jnp.full_like(zeros, -jnp.inf), zeros, zeros)


def _nothing_like(state: WKVState) -> WKVState:
    return jax.tree.map(jnp.zeros_like, state)._replace(log_max=jnp.full_like(state.log_max, -jnp.inf))


def _act(element: WKVElement, state: WKVState) -> WKVState:
    past = state._replace(log_max=element.log_decay + state.log_max)
    return _sum(past, element.written, larger(past.log_max, element.written.log_max))


def _sum(a: WKVState, b: WKVState, log_max: Array) -> WKVState:
    """Both under a common maximum; where there is nothing yet it is -inf."""
    base = jnp.where(log_max == -jnp.inf, 0, log_max)
    of_a, of_b = jnp.exp(a.log_max - base), jnp.exp(b.log_max - base)
    numerator = of_a * a.numerator + of_b * b.numerator
    return WKVState(log_max, numerator, of_a * a.denominator + of_b * b.denominator)


def wkv_scan(
    key: Float[Array, "B T D"],
    value: Float[Array, "B T D"],
    log_decay: Float[Array, "D"],
    bonus: Float[Array, "D"],
    state: WKVState | None = None,
    *,
    segments: Segments | None = None,
    method: str = "auto",
    chunk: int | None = None,
    sequence_axis: str | None = None,
) -> tuple[Float[Array, "B T D"], WKVState]:
    """The WKV operator (see `wkv_recurrence`) over a batch: `(out, state)`, `out` in the type of `value`.

    The state's [B, D] are at least float32. `segments` None: one document a row, which continues `state`. Raises
    ValueError on shapes that do not fit.
    """
    size = key.shape[-1:]
    if key.ndim != 3 or key.shape != value.shape or log_decay.shape != size or bonus.shape != size:
        raise ValueError(
            f"key and value [B, T, D], log_decay and bonus [D]; "
            f"not {key.shape}, {value.shape}, {log_decay.shape}, {bonus.shape}"
        )
    state = empty_wkv(key.shape[:1], key.shape[2], jnp.result_type(key, value)) if state is None else state
    if any(leaf.shape != (key.shape[0], *size) for leaf in state):
        raise ValueError(f"a state of shapes {[leaf.shape for leaf in state]} cannot continue keys of {key.shape}")
    out, state = run_family(
        "wkv",
        wkv_recurrence(log_decay, bonus),
        Weighted(key, value),
        state,
        segments=segments,
        method=method,
        chunk=chunk,
        sequence_axis=sequence_axis,
    )
    return out.astype(value.dtype), state
