"""What a training run checks on the host, so that a mistake in the data is named as such."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

NEEDED = ("tokens", "targets", "start", "valid")


class Expected(NamedTuple):
    """What the batches of a run have to be like: `[rows, length]`, tokens below `vocabulary` (None: not known)."""

    rows: int
    length: int
    vocabulary: int | None = None
    alignment: int = 1
    """Documents start at multiples of it, as the model needs them to."""


def check_batch(
    batch: Mapping[str, Any], expected: Expected, *, first: bool, continued: Continued | None = None
) -> None:
    """Raises ValueError where a batch is not what `language_model_loss` needs.

    Keys, shapes and tokens are looked at in the `first` batch; how documents are aligned, and whether they go on as
    `continued` wants them to, in every one.
    """
    if first:
        _check_arrays(batch, expected)
        problem = outside_vocabulary(batch, expected.vocabulary)
        if problem:
            raise ValueError(f"the first batch {problem}")
    if expected.alignment > 1:
        wrong = np.argwhere(np.asarray(batch["start"])[:, np.arange(expected.length) % expected.alignment != 0])
        if len(wrong):
            raise ValueError(
                f"a document starts inside a chunk (row {wrong[0][0]} of a batch), and this model needs starts at "
                f"multiples of {expected.alignment}: make_loader(..., align={expected.alignment})"
            )
    if continued is not None:
        continued(batch)


def _check_arrays(batch: Mapping[str, Any], expected: Expected) -> None:
    missing = [name for name in NEEDED if name not in batch]
    if missing:
        raise ValueError(
            f"the loss needs {' and '.join(missing)} in a batch, which holds {', '.join(batch) or 'nothing'}: "
            "give batches as seqmodels.data.make_loader does, or a loss of your own"
        )
    shapes = {name: np.shape(batch[name]) for name in NEEDED}
    if len(set(shapes.values())) > 1 or len(shapes["tokens"]) != 2:
        listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"all of a batch's arrays have to be of one shape [batch, time], not {listed}")
    if shapes["tokens"] != (expected.rows, expected.length):
        raise ValueError(
            f"the batches are {shapes['tokens'][0]} rows of {shapes['tokens'][1]} tokens, train.batch_size and "
            f"train.length say {expected.rows} of {expected.length}: make both the same"
        )


def outside_vocabulary(batch: Mapping[str, Any], vocabulary: int | None) -> str | None:
    """Which token or target of a batch lies outside the vocabulary, with what to do; None where none does."""
    if vocabulary is None or not set(NEEDED) <= set(batch):
        return None
    valid = np.asarray(batch["valid"])
    for name in ("targets", "tokens"):
        values = np.asarray(batch[name])
        wrong = np.argwhere(valid & ((values < 0) | (values >= vocabulary)))
        if len(wrong):
            row, position = wrong[0].tolist()
            return (
                f"has {values[row, position]} among its {name} (row {row}, position {position}), outside the model's "
                f"vocabulary of {vocabulary} tokens, 0 to {vocabulary - 1}: raise model.vocab_size or mend the data; "
                "what is no token has valid False"
            )
    return None


def why_not_finite(batch: Mapping[str, Any], vocabulary: int | None) -> str:
    """What can be said, and done, about a step whose loss is not finite: about its batch where that is to blame."""
    problem = outside_vocabulary(batch, vocabulary)
    if problem:
        return f"its batch {problem}"
    for name, values in batch.items():
        values = np.asarray(values)
        if np.issubdtype(values.dtype, np.inexact) and not np.isfinite(values).all():
            return f"its batch has values in {name} that are not finite: mend the data"
    return (
        "the same command would meet it again: begin anew in another workdir with a lower train.learning_rate, "
        "a longer train.warmup or a lower train.clip; or with method='sequential', where a mixer's 'newton' gave NaN "
        "because it did not converge"
    )


@jax.jit
def all_finite(tree: Any) -> jax.Array:
    """Whether every number in a tree of arrays is finite."""
    return jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]))


class Continued:
    """Checks that batches go on from one to the next, as `truncated_bptt` needs them to: `check(batch)`.

    Raises ValueError where a row that does not start a document begins with another token than the one that was the
    last target of the same row before (rows whose targets are not the next tokens are left out), and where none of the
    first `patience` batches goes on with anything. The first batch of a resumed run is taken as it is.
    """

    def __init__(self, patience: int = 8) -> None:
        self._before: tuple[np.ndarray, np.ndarray] | None = None
        self._patience, self._fresh, self._met = patience, 0, False

    def __call__(self, batch: Mapping[str, Any]) -> None:
        tokens, targets, start, valid = (np.asarray(batch[name]) for name in NEEDED)
        goes_on = ~start[:, 0] & valid[:, 0]
        self._met |= bool(goes_on.any())
        self._fresh += 1
        way_out = "seqmodels.data.make_stream_loader gives such batches"
        if not self._met and self._fresh == self._patience:
            raise ValueError(
                f"train.initial.kind is truncated_bptt, and none of the first {self._patience} batches goes on with "
                f"the one before: every row begins a document (start[:, 0]). {way_out}; else choose another kind"
            )
        if self._before is not None:
            last, predicts = self._before
            wrong = np.flatnonzero(goes_on & predicts & (last != tokens[:, 0]))
            if len(wrong):
                row = int(wrong[0])
                raise ValueError(
                    f"train.initial.kind is truncated_bptt, and row {row} of a batch begins with {tokens[row, 0]} "
                    f"inside a document, where the one before ended with the target {last[row]}: row r has to go on "
                    f"with row r of the batch before. {way_out}"
                )
        follows = (targets[:, :-1] == tokens[:, 1:]) | start[:, 1:] | ~valid[:, 1:] | ~valid[:, :-1]
        self._before = targets[:, -1], follows.all(axis=1) & valid[:, -1]
