"""Held-out bits per byte: every document from a fresh state."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array

from seqmodels import params
from seqmodels.data.text import Document
from seqmodels.data.tokens import DOCUMENT
from seqmodels.train.step import cross_entropy
from seqmodels.typing import Segments


class Windows(NamedTuple):
    """Documents laid end to end in rows, cut into windows: `[windows, B, T]` each."""

    tokens: np.ndarray
    targets: np.ndarray
    start: np.ndarray
    valid: np.ndarray


def lay_out(documents: Sequence[Document], *, batch_size: int, length: int) -> Windows:
    """Deals documents to `batch_size` rows, the longest first to the shortest row, and cuts the rows into windows.

    A document of n bytes takes n + 1 positions: its input begins, and its targets end, with DOCUMENT.
    """
    rows: list[list[bytes]] = [[] for _ in range(batch_size)]
    sizes = np.zeros(batch_size, np.int64)
    for text in sorted((document.bytes for document in documents), key=len, reverse=True):
        row = int(np.argmin(sizes))
        rows[row].append(text)
        sizes[row] += len(text) + 1
    width = max(1, math.ceil(int(sizes.max()) / length)) * length
    tokens, targets = np.zeros((2, batch_size, width), np.int32)
    start, valid = np.zeros((2, batch_size, width), bool)
    for row, texts in enumerate(rows):
        at = 0
        for text in texts:
            span, data = slice(at, at + len(text) + 1), np.frombuffer(text, np.uint8)
            tokens[row, span] = [DOCUMENT, *data]
            targets[row, span] = [*data, DOCUMENT]
            start[row, at], valid[row, span] = True, True
            at += len(text) + 1
    cut = lambda array: array.reshape(batch_size, -1, length).swapaxes(0, 1)
    return Windows(*(cut(array) for array in (tokens, targets, start, valid)))


def grows(model: Any) -> bool:
    """Whether the model's state needs a capacity (full attention)."""
    try:
        jax.eval_shape(lambda: model.init_state(1))
    except ValueError:
        return True
    return False


def make_evaluator(
    definition: params.Definition, documents: Sequence[Document], *, batch_size: int, length: int
) -> Callable[[Mapping[str, Any]], dict[str, float]]:
    """A function `arrays -> {"loss", "bits_per_byte", "bytes"}` over held-out documents, each begun afresh.

    Models of constant state carry it through a whole document; one with full attention sees at most `length` bytes,
    the context it was trained on. The ends of documents are predicted too, and counted into the bits.
    """
    if not documents:
        raise ValueError("there are no held-out documents to evaluate on")
    windows = lay_out(documents, batch_size=batch_size, length=length)
    size = sum(len(document.bytes) for document in documents)

    @jax.jit
    def score(arrays: Mapping[str, Any], state: Any, window: Windows) -> tuple[Any, Array]:
        model = params.merge(definition, arrays)
        segments = Segments(window.start, window.valid)
        hidden, state, _ = model.forward(window.tokens, state, segments)
        return state, cross_entropy(model.logits(hidden), window.targets, window.valid)[0]

    def evaluate(arrays: Mapping[str, Any]) -> dict[str, float]:
        model = params.merge(definition, arrays)
        carried = not grows(model)
        state = model.init_state(batch_size) if carried else None
        sums = []
        for index in range(len(windows.tokens)):
            window = jax.tree.map(lambda array: array[index], windows)
            if not carried:
                window = window._replace(start=window.start | (np.arange(length) == 0))
            after, total = score(arrays, state, window)
            state = after if carried else None
            sums.append(total)
        nats = float(np.sum(np.asarray(jax.device_get(sums), np.float64)))
        return {"loss": nats / int(windows.valid.sum()), "bits_per_byte": nats / math.log(2) / size, "bytes": size}

    return evaluate
