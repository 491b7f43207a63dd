"""Whole models against length: decoded tokens, checked against the parallel form, and training steps."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.bench.measure import compiled, seconds_of, side_by_side, size_of, verify
from seqmodels import ModelConfig, Segments, params
from seqmodels.train import TrainConfig, make_optimizer
from seqmodels.train.step import init_state, make_step

Row = dict[str, float]
REPEATS = 3


def decoding(
    config: ModelConfig,
    contexts: Sequence[int],
    tokens: int,
    *,
    seed: int,
    tolerance: float,
    report: Callable[[float], None] = lambda part: None,
) -> list[Row]:
    """For every context: `ms` a token, the median over runs of `tokens` tokens; `worst_ms`, that of the slowest of them
    alone; `bytes` of the state; `error` of the logits against those of the whole text at once.

    Raises AssertionError where that is above `tolerance` of the largest logit.
    """
    model = config.make(rngs=nnx.Rngs(seed))
    definition, arrays = params.split(model)
    text = np.random.default_rng(seed).integers(0, config.vocab_size, (1, max(contexts) + tokens))

    @jax.jit
    def take_in(arrays: Any, text: Any, state: Any) -> Any:
        model = params.merge(definition, arrays)
        hidden, state, _ = model.forward(text, state, Segments.whole(*text.shape, fresh=True))
        return model.logits(hidden[:, -tokens:]), state

    step = jax.jit(lambda arrays, token, state: params.merge(definition, arrays)(token, state))

    def steps(arrays: Any, tail: Any, state: Any) -> Any:
        def body(state: Any, token: Any) -> Any:
            logits, state = params.merge(definition, arrays)(token[None, None], state)
            return state, logits[0, 0]

        return jax.lax.scan(body, state, tail[0])[1]

    rows = []
    for number, context in enumerate(contexts):
        tail = jnp.asarray(text[:, context : context + tokens])
        _, state = take_in(arrays, text[:, :context], model.init_state(1, context + tokens))
        program = compiled(steps, arrays, tail, state).run
        # the whole text at once, without a state
        whole, _ = take_in(arrays, text[:, : context + tokens], None)
        error = verify(f"decoding after {context} tokens", program(arrays, tail, state), whole[0], tolerance)
        taken = side_by_side({"scan": functools.partial(program, arrays, tail, state)}, budget=1.0)["scan"]
        worst = 1e3 * max(_one_by_one(step, arrays, tail, state))
        row = {"context": context, "ms": 1e3 * taken.median / tokens, "worst_ms": worst}
        rows.append({**row, "bytes": size_of(state), "error": error})
        report((number + 1) / len(contexts))
    return rows


def _one_by_one(step: Any, arrays: Any, tail: Any, state: Any) -> list[float]:
    """Seconds of every token in a call of its own, the least of some repetitions."""
    runs = []
    for _ in range(1 + REPEATS):
        now, taken = state, []
        for t in range(tail.shape[1]):
            taken.append(seconds_of(step, arrays, tail[:, t : t + 1], now))
            _, now = step(arrays, tail[:, t : t + 1], now)
        runs.append(taken)
    return np.min(runs[1:], axis=0).tolist()


def training(
    config: ModelConfig, lengths: Sequence[int], *, seed: int, report: Callable[[float], None] = lambda part: None
) -> list[Row]:
    """For every length: `ms` of a step (forward, backward, AdamW) on one row, and `bytes` that its program needs."""
    model = config.make(rngs=nnx.Rngs(seed))
    definition, arrays = params.split(model)
    optimizer = make_optimizer(TrainConfig(), params.labels(model))
    step = make_step(definition, optimizer)
    random = np.random.default_rng(seed)
    rows = []
    for number, length in enumerate(lengths):
        text = random.integers(0, config.vocab_size, (1, length + 1), np.int32)
        batch = {"tokens": text[:, :-1], "targets": text[:, 1:]}
        batch |= {"start": np.arange(length)[None] == 0, "valid": np.ones((1, length), bool)}
        state = init_state(arrays, optimizer, seed)
        program = step.lower(state, batch).compile()  # type: ignore[attr-defined]
        memory = program.memory_analysis()
        held = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
        taken = []
        for _ in range(1 + REPEATS):
            seconds, (state, _) = _timed(program, state, batch)
            taken.append(seconds)
        rows.append(
            {"length": length, "ms": 1e3 * float(np.median(taken[1:])), "bytes": held - memory.alias_size_in_bytes}
        )
        report((number + 1) / len(lengths))
    return rows


def _timed(program: Any, *inputs: Any) -> tuple[float, Any]:
    """Seconds of a call, and what it gave: a step donates its state, so that it cannot be called twice."""
    given: list[Any] = []
    seconds = seconds_of(lambda: given.append(program(*inputs)) or given[0])
    return seconds, given[0]
