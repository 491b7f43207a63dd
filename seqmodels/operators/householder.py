"""Several delta rules a token: a transition of higher rank, a product of Householder matrices (arXiv 2502.10297)."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from seqmodels.operators.delta import delta_rule
from seqmodels.typing import Segments


def delta_product(
    query: Float[Array, "B T G K"],
    key: Float[Array, "B T N G K"],
    value: Float[Array, "B T N H V"],
    beta: Float[Array, "B T N H"],
    log_decay: Float[Array, "B T H *K"] | None = None,
    state: Float[Array, "B H K V"] | None = None,
    *,
    segments: Segments | None = None,
    **options: Any,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """The state decays, takes N delta rules in turn, and is read after the last: `(out, state)` for a batch of heads.

        S = exp(log_decay_t) S_{t-1};   S = S + beta_ti k_ti (v_ti - S^T k_ti)^T for i = 1..N;   o_t = q_t^T S

    DeltaProduct (2502.10297); with N = 1 it is `delta_rule`, whose errors, bounds, types and other options hold here
    too. The N micro-steps run as steps of that recurrence: documents begin at a token's first one, and the reads of all
    but the last are thrown away. `chunk` counts micro-steps. Raises ValueError on shapes that do not fit.
    """
    steps, tokens = key.shape[2], value.shape[:2]
    fits = key.shape == (*query.shape[:2], steps, *query.shape[2:]) and beta.shape == (*tokens, steps, value.shape[3])
    if steps < 1 or not fits or value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"query [B, T, G, K], key [B, T, N, G, K], value [B, T, N, H, V] and beta [B, T, N, H] with N of at least "
            f"1; not {query.shape}, {key.shape}, {value.shape}, {beta.shape}"
        )
    flat = lambda x: x.reshape(x.shape[0], -1, *x.shape[3:])

    def only(x: Array, step: int) -> Array:
        """[B, T, ...] at one micro-step of each token, and 0 at the others."""
        return flat(jnp.zeros((*x.shape[:2], steps, *x.shape[2:]), x.dtype).at[:, :, step].set(x))

    if segments is not None:
        segments = Segments(only(segments.start, 0), jnp.repeat(segments.valid, steps, axis=1))
    out, state = delta_rule(
        only(query, -1),
        flat(key),
        flat(value),
        flat(beta),
        None if log_decay is None else only(log_decay, 0),
        state,
        segments=segments,
        **options,
    )
    return out[:, steps - 1 :: steps], state
