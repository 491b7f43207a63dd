"""Held-out bits per byte: every document from a fresh state."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import Array

from seqmodels import params
from seqmodels.models.memory import grows
from seqmodels.train.step import Batch, cross_entropy
from seqmodels.typing import Segments

if TYPE_CHECKING:
    from seqmodels.data import Document


def make_evaluator(
    definition: params.Definition, documents: Sequence[Document], *, batch_size: int, length: int
) -> Callable[[Mapping[str, Any]], dict[str, float]]:
    """A function `arrays -> {"loss", "bits_per_byte"}` over held-out documents, each begun afresh.

    A model of constant state carries it through a whole document, `length` tokens a call. One with full attention, or
    whose documents have to be aligned (a PSM), sees pieces of at most `length` tokens, the context it was trained on.
    The end of every document is predicted too: its bits count, though it is no byte.
    """
    # grain takes half a second to import, which --help of the commands should not
    from seqmodels.data import counts, evaluation_batches, evaluation_streams

    if not documents:
        raise ValueError("there are no held-out documents: give at least one, or train without evaluate")
    size = counts(documents).bytes

    @jax.jit
    def score(arrays: Mapping[str, Any], state: Any, batch: Batch) -> tuple[Any, Array, Array]:
        model = params.merge(definition, arrays)
        hidden, state, _ = model.forward(batch["tokens"], state, Segments(batch["start"], batch["valid"]))
        return state, *cross_entropy(model.logits(hidden), batch["targets"], batch["valid"])

    def evaluate(arrays: Mapping[str, Any]) -> dict[str, float]:
        model = params.merge(definition, arrays)
        align = model.config.alignment
        carried = not grows(model) and align == 1
        state = model.init_state(batch_size) if carried else None
        batches = evaluation_streams if carried else functools.partial(evaluation_batches, align=align)
        sums = []
        for batch in batches(documents, batch_size=batch_size, length=length):
            after, *totals = score(arrays, state, batch)
            state = after if carried else None
            sums.append(totals)
        nats, tokens = np.asarray(jax.device_get(sums), np.float64).sum(axis=0)
        return {"loss": nats / tokens, "bits_per_byte": nats / math.log(2) / size}

    return evaluate
