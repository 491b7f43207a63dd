"""Steps of a tiny hybrid whose rows start from a state, for the tests of initial states: each compiled once."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from seqmodels import params
from seqmodels.data import make_stream_loader
from seqmodels.mixers import Mamba2Config
from seqmodels.models.lm import LanguageModel, LMState
from seqmodels.train import InitialKind, InitialState
from seqmodels.train.initial import Starts, make_starts
from seqmodels.train.step import init_state, make_fit, make_step
from tests.train.tiny import BATCH, LENGTH, LOCAL, RECURRENT, texts, tiny_model

MAMBA = Mamba2Config(head_size=8, state_size=4, expansion=1.0)
KINDS = [kind for kind in InitialKind if kind != InitialKind.ZEROS]


def hybrid() -> LanguageModel:
    """Two layers with memory, and a window."""
    return tiny_model(RECURRENT, MAMBA, LOCAL)


def streams(seed: int = 0) -> Iterator[dict[str, np.ndarray]]:
    return make_stream_loader(texts(), batch_size=BATCH, length=LENGTH, seed=seed)


def keeps_gradients() -> optax.GradientTransformation:
    """Leaves parameters alone and has the last gradients as its state."""
    zeros = lambda tree: jax.tree.map(jnp.zeros_like, tree)
    return optax.GradientTransformation(zeros, lambda gradients, state, arrays: (zeros(gradients), gradients))


class Run(NamedTuple):
    """The state before each step and after the last, and what each step reported."""

    states: list[dict[str, Any]]
    metrics: list[dict[str, float]]


@functools.cache
def compiled(initial: InitialState, accumulate: int = 1) -> tuple[Starts | None, Any]:
    definition, _ = params.split(hybrid())
    starts = make_starts(hybrid(), initial)
    step = make_step(definition, keeps_gradients(), accumulate=accumulate, starts=starts)
    fits = {given: make_fit(definition, starts, accumulate, given=given) for given in (False, True)}
    return starts, lambda state, batch, number, given: step(fits[given](number, state, batch), batch)


def run(
    initial: InitialState, batches: list[dict[str, np.ndarray]], *, moments: Any = None, accumulate: int = 1
) -> Run:
    starts, step = compiled(initial, accumulate)
    first = {} if starts is None else starts.first(hybrid(), BATCH, moments)
    state = init_state(params.split(hybrid())[1], keeps_gradients(), 0, initial=first)
    states, reported = [jax.device_get(state)], []
    for number, batch in enumerate(batches):
        state, metrics = step(state, batch, number, moments is not None)
        states.append(jax.device_get(state))
        reported.append(jax.device_get(metrics))
    return Run(states, reported)


def memory(state: LMState) -> dict[str, np.ndarray]:
    """What the hybrid's state passes on, picked by hand, rows first."""
    lru, _, mamba, _, _, _ = state.layers[0]
    picked = {
        "position": state.position,
        "layers.0.0.hidden": lru.hidden.swapaxes(0, 1),
        "layers.0.0.length": lru.length.swapaxes(0, 1),
        "layers.0.2.ssm": mamba.ssm.swapaxes(0, 1),
    }
    return {name: np.asarray(x) for name, x in picked.items()}


def starting_from(rows: dict[str, Any]) -> LMState:
    """The hybrid's state with this memory and nothing else, by hand."""
    state = hybrid().init_state(BATCH)
    lru, mlp, mamba, *rest = state.layers[0]
    back = {name: jnp.asarray(x) if x.ndim == 1 else jnp.asarray(x).swapaxes(0, 1) for name, x in rows.items()}
    lru = lru._replace(hidden=back["layers.0.0.hidden"], length=back["layers.0.0.length"])
    mamba = mamba._replace(ssm=back["layers.0.2.ssm"])
    return LMState(back["position"], ((lru, mlp, mamba, *rest),))
