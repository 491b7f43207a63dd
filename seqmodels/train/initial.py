"""What training rows start from instead of zeros (arXiv 2507.02782), as pure functions over the train state.

Memory at the beginning of a row is drawn, or comes from the batch before; `InitialState` says which. It travels as
`Rows`, the arrays of a state by name with the batch in front, so that parts of a batch and devices take their share of
it as they do of the tokens. It is made for the whole batch at once: no draw depends on the parts or on the mesh.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from seqmodels import params
from seqmodels.models.lm import LMState
from seqmodels.models.memory import Leaf, Role, described, fresh_memory, grows, named, replaced, rows_first
from seqmodels.train.config import InitialKind, InitialState
from seqmodels.typing import Segments

Rows = dict[str, Array]
Moments = dict[str, dict[str, Array]]
"""`mean` and `std` of each leaf of memory, per layer and head (`[repeats, heads]`, `[repeats]` without heads); `mean`
of each companion, entry by entry: normalisers form a convex set, so that their mean is one."""

DRAW = 0x5EED
"""Folded into a step's key; parts of a batch fold their numbers into it, from 0."""


class Starts:
    """How the rows of a run start, for a kind other than zeros.

    What it carries from step to step stands in the train state as `initial`: `{"rows": ...}` for state passing and
    truncated BPTT, `{"moments": ...}` for fitted noise, nothing for noise.
    """

    def __init__(self, model: Any, config: InitialState) -> None:
        self.config, self.kind = config, InitialKind(config.kind)
        self.leaves = described(model)
        if self.kind == InitialKind.TRUNCATED_BPTT:
            _check_goes_on(model)
        elif not any(leaf.role == Role.MEMORY for leaf in self.leaves.values()):
            raise ValueError(
                f"train.initial.kind is {self.kind}, and no layer of this model has recurrent memory that it could be "
                "given to (attention, a PSM and log-linear Mamba-2 have none): choose zeros, or truncated_bptt where "
                "the state has a fixed size, or add a recurrence"
            )

    @property
    def fits(self) -> bool:
        """Whether what it draws has to be fitted (`due`)."""
        return self.kind == InitialKind.FITTED_NOISE

    @property
    def passed(self) -> list[str]:
        """The leaves of a state at the end of a row that are needed afterwards."""
        if self.kind == InitialKind.TRUNCATED_BPTT:
            return list(self.leaves)
        keep = self.kind in (InitialKind.STATE_PASSING, InitialKind.FITTED_NOISE)
        return [name for name, leaf in self.leaves.items() if keep and leaf.role != Role.REST]

    def first(self, model: Any, batch_size: int, moments: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """What the train state holds before the first step. Raises ValueError on moments of another model."""
        if not self.fits:
            if not self.passed:
                return {}
            rows = rows_first(named(self._fresh(model, batch_size)))
            return {"rows": {name: rows[name] for name in self.passed}}
        empty = jax.eval_shape(self.moments, *self._shapes(1))
        if moments is None:
            return {"moments": jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), empty)}
        shapes = [{name: np.shape(x) for name, x in _flat(tree).items()} for tree in (moments, empty)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"these moments have arrays {shapes[0]}, and this model needs {shapes[1]}: fit_moments(model, batches)"
            )
        return {"moments": jax.tree.map(lambda x, like: jnp.array(x, like.dtype, copy=True), dict(moments), empty)}

    def draw(self, carried: Mapping[str, Any], key: Array, batch: Mapping[str, Any]) -> tuple[Rows, dict[str, Any]]:
        """The state that each row of a batch starts from, and the batch, marked to go on with it."""
        if self.kind == InitialKind.TRUNCATED_BPTT:
            return carried["rows"], dict(batch)
        batch_size = batch["start"].shape[0]
        draw, choose = jax.random.split(jax.random.fold_in(key, DRAW))
        if self.kind == InitialKind.STATE_PASSING:
            source = other_rows(draw, batch_size)
            rows = {name: x[source] for name, x in carried["rows"].items()}
        else:
            rows = self._noise(carried.get("moments"), draw, batch_size)
        chosen = jax.random.bernoulli(choose, self.config.probability, (batch_size,))
        # a row whose first document begins later starts that one fresh
        fresh = jnp.where(chosen, False, batch["valid"][:, 0])
        return rows, {**batch, "start": jnp.asarray(batch["start"]).at[:, 0].set(fresh)}

    def _noise(self, moments: Moments | None, key: Array, batch_size: int) -> Rows:
        rows = {}
        for number, (name, leaf) in enumerate(self.leaves.items()):
            if leaf.role == Role.REST:
                continue
            shape = (batch_size, *leaf.shape)
            mean: Any = leaf.neutral
            if moments is not None and name in moments:
                mean = _along(moments[name]["mean"], leaf)
            row = jnp.broadcast_to(jnp.asarray(mean, leaf.dtype), shape)
            if leaf.role == Role.MEMORY:
                std: Any = self.config.std if moments is None else _along(moments[name]["std"], leaf)
                row += std * jax.random.normal(jax.random.fold_in(key, number), shape, leaf.dtype)
            rows[name] = row
        return rows

    def _fresh(self, model: Any, batch_size: int) -> LMState:
        if self.kind == InitialKind.TRUNCATED_BPTT:
            return model.init_state(batch_size)
        return fresh_memory(model, batch_size)

    def state(self, model: Any, rows: Rows) -> LMState:
        """A model's state with what its rows start from."""
        return replaced(self._fresh(model, rows["position"].shape[0]), rows_first(rows))

    def finals(self, state: LMState) -> Rows:
        """What is needed of the state after a batch."""
        arrays = named(state)
        return rows_first({name: arrays[name].astype(self.leaves[name].dtype) for name in self.passed})

    def moments(self, finals: Rows, present: Bool[Array, "B"]) -> Moments:
        """Of the rows that are `present`; zeros where none is."""
        found: Moments = {}
        count = jnp.maximum(jnp.sum(present), 1)
        for name, x in finals.items():
            leaf, there = self.leaves[name], present.reshape(-1, *[1] * (x.ndim - 1))
            if not jnp.issubdtype(x.dtype, jnp.inexact):
                continue
            x = jnp.where(there, x, 0)  # an absent row may hold -inf
            mean = jnp.sum(x, axis=0) / count
            if leaf.role == Role.COMPANION:
                found[name] = {"mean": mean}
                continue
            entries = tuple(range(2 if leaf.heads else 1, mean.ndim))
            mean = jnp.mean(mean, axis=entries)
            off = jnp.where(there, jnp.square(jnp.abs(x - _along(mean, leaf))), 0)
            found[name] = {"mean": mean, "std": jnp.sqrt(jnp.mean(jnp.sum(off, axis=0) / count, axis=entries))}
        return found

    def due(self, step: int, *, given: bool) -> bool:
        """Whether moments are to be fitted before step number `step`, from 0; `given`: the run began with some."""
        if not self.fits or (given and step == 0):
            return False
        return step % self.config.refresh == 0 if self.config.refresh else step == 0

    def _shapes(self, batch_size: int) -> tuple[dict[str, Any], Any]:
        leaves = {name: self.leaves[name] for name in self.passed}
        rows = {name: jax.ShapeDtypeStruct((batch_size, *leaf.shape), leaf.dtype) for name, leaf in leaves.items()}
        return rows, jax.ShapeDtypeStruct((batch_size,), bool)


def _along(moment: Array, leaf: Leaf) -> Array:
    """A moment per layer (and head), or per entry, beside rows `[B, repeats, ...]`."""
    return moment.reshape(1, *moment.shape, *[1] * (len(leaf.shape) - moment.ndim))


def _flat(tree: Any) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _check_goes_on(model: Any) -> None:
    way_out = "choose state_passing, which passes the memory of its recurrences alone, or zeros"
    if grows(model):
        raise ValueError(
            "train.initial.kind is truncated_bptt, and full attention's state grows with the document, as it keeps "
            f"every key: set AttentionConfig.window, or {way_out}"
        )
    if getattr(model.config, "alignment", 1) > 1:
        raise ValueError(
            "train.initial.kind is truncated_bptt, and from a state a PSM runs token by token, a loop over time: "
            f"{way_out}"
        )


def other_rows(key: Array, batch_size: int) -> Array:
    """For each row the number of another one, every row once: neighbours along a random circle."""
    circle = jax.random.permutation(key, batch_size)
    return jnp.zeros(batch_size, circle.dtype).at[circle].set(jnp.roll(circle, 1))


def make_starts(model: Any, config: InitialState) -> Starts | None:
    """None for zeros. Raises ValueError where the model cannot start so, and says what can."""
    return None if config.kind == InitialKind.ZEROS else Starts(model, config)


def fit_moments(model: Any, batches: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, np.ndarray]]:
    """Mean and std of the recurrent memory at the end of the rows of `batches`, each begun from zeros, as `Moments`.

    Per layer and head, as 2507.02782 records them of training sequences, over rows and entries together; for
    `train(..., moments=...)`. Rows without a token do not count. Raises ValueError where the model has no such memory.
    """
    starts = Starts(model, InitialState(InitialKind.FITTED_NOISE))
    definition, arrays = params.split(model)

    @jax.jit
    def fit(arrays: Mapping[str, Any], batch: Mapping[str, Any]) -> tuple[Moments, Array]:
        segments = Segments(batch["start"], batch["valid"])
        _, state, _ = params.merge(definition, arrays).forward(batch["tokens"], None, segments)
        present = jnp.any(batch["valid"], axis=1)
        return starts.moments(starts.finals(state), present), jnp.sum(present)

    fitted = jax.device_get([fit(arrays, dict(batch)) for batch in batches])
    weights = np.array([count for _, count in fitted], np.float64)
    if not weights.sum():
        raise ValueError("the batches hold no token: moments need at least one row with one")
    pooled: dict[str, dict[str, np.ndarray]] = {}
    for name, one in fitted[0][0].items():
        of = lambda what, name=name: np.stack([moments[name][what] for moments, _ in fitted])
        average = lambda x: np.tensordot(weights / weights.sum(), x, 1)
        mean = average(of("mean"))
        pooled[name] = {"mean": mean.astype(one["mean"].dtype)}
        if "std" in one:
            square = average(of("std").astype(np.float64) ** 2 + np.abs(of("mean") - mean) ** 2)
            pooled[name]["std"] = np.sqrt(square).astype(one["std"].dtype)
    return pooled
