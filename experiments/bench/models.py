"""Models: time per decoded token against the length of the context, compilation against depth, a step's overhead."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.bench.measure import compiled, side_by_side, size_of, verify
from seqmodels import Context, ModelConfig, params
from seqmodels.layers import MLPConfig
from seqmodels.mixers import AttentionConfig, Mamba2Config, RGLRUConfig, examples
from seqmodels.train import TrainConfig, language_model_loss, make_optimizer
from seqmodels.train.step import init_state, make_step

Row = dict[str, Any]

WIDTH = 64  # of the examples
# float32 through hundreds of steps, relative to the largest output
TOLERANCE = 1e-3
PIECE = 1024  # tokens of a context taken in at once
DECODED = 64  # tokens in one timed call: one alone would be lost in the call itself


def decode_rows(*, quick: bool, seed: int) -> Iterator[Row]:
    """Seconds per token of one layer of every example mixer, after a short and a long context."""
    contexts = (64, 256) if quick else (1024, 32768)
    for name, config in examples():
        yield from _decode(name, config, contexts, seed)


def _decode(name: str, config: Any, contexts: tuple[int, ...], seed: int) -> Iterator[Row]:
    mixer = config.make(WIDTH, layer=0, depth=1, rngs=nnx.Rngs(seed))
    definition, arrays = params.split(mixer)
    random = np.random.default_rng(seed)
    longest = max(contexts) + DECODED
    x = jnp.asarray(random.standard_normal((1, longest, WIDTH)), jnp.float32)

    @functools.partial(jax.jit, static_argnames="fresh")
    def span(arrays: Any, x: Any, state: Any, begin: Any, fresh: bool = False) -> Any:
        context = Context.whole(*x.shape[:2], fresh=fresh, offset=begin)
        return params.merge(definition, arrays)(x, state, context)

    def steps(arrays: Any, x: Any, state: Any, begin: Any) -> Any:
        def body(carry: tuple[Any, Any], token: Any) -> Any:
            state, place = carry
            context = Context.whole(1, 1, fresh=False, offset=place)
            y, state = params.merge(definition, arrays)(token[None, None], state, context)
            return (state, place + 1), y[0, 0]

        return jax.lax.scan(body, (state, begin), x[0])

    runs, states, programs = {}, {}, {}
    for context in contexts:
        state = mixer.init_state(1, context + DECODED)
        for begin in range(0, context, PIECE):
            _, state = span(arrays, x[:, begin : min(begin + PIECE, context)], state, jnp.int32(begin), begin == 0)
        tail, end = x[:, context : context + DECODED], jnp.int32(context)
        programs[context] = compiled(steps, arrays, tail, state, end)
        decoded = programs[context].run(arrays, tail, state, end)[1]
        # all tokens at once, from the beginning; the scores of full attention would be too many for that
        full = isinstance(config, AttentionConfig)
        known = (tail, state, end) if full else (x[:, : context + DECODED], None, jnp.int32(0), True)
        expected = span(arrays, *known)[0]
        error = verify(f"{name} after {context} tokens", decoded, expected.reshape(-1, WIDTH)[-DECODED:], TOLERANCE)
        runs[str(context)] = functools.partial(programs[context].run, arrays, tail, state, end)
        states[context] = (size_of(state), error)
    times = side_by_side(runs, budget=1.0, least=9)
    for context in contexts:
        taken = times[str(context)]
        yield {
            "case": f"decode {name}",
            "context": context,
            "seconds": {field: value / DECODED for field, value in taken._asdict().items()},
            "compile_seconds": programs[context].seconds,
            "state_bytes": states[context][0],
            "error": states[context][1],
        }


def decode_verdicts(found: list[Row]) -> Iterator[str]:
    by_case: dict[str, list[Row]] = {}
    for row in found:
        by_case.setdefault(row["case"], []).append(row)
    for case, (short, long) in by_case.items():
        ratio = long["seconds"]["median"] / short["seconds"]["median"]
        yield (
            f"{case}: a token at {long['context']:,} takes {ratio:.2f} of one at {short['context']:,}, "
            f"state {short['state_bytes']:,} and {long['state_bytes']:,} bytes"
        )


def _model(mixer: Any, depth: int) -> ModelConfig:
    return ModelConfig(257, WIDTH, (((mixer,), depth),), channel=MLPConfig(expansion=2))


def compile_rows(*, quick: bool, seed: int) -> Iterator[Row]:
    """Tracing and compiling a training step of 4 and of 48 layers, by turns."""
    mixers = {
        "rg_lru": RGLRUConfig(recurrent_size=64, blocks=4),
        "mamba2": Mamba2Config(head_size=32, state_size=16),
        "attention": AttentionConfig(heads=4),
    }
    batch = {name: np.zeros((2, 64), np.int32) for name in ("tokens", "targets")}
    batch |= {"start": np.arange(64)[None].repeat(2, 0) == 0, "valid": np.ones((2, 64), bool)}
    for name, mixer in mixers.items():
        programs = {}
        for depth in (2, 8) if quick else (4, 48):
            model = _model(mixer, depth).make(rngs=nnx.Rngs(seed))
            definition, arrays = params.split(model)
            optimizer = make_optimizer(TrainConfig(), params.labels(model))
            state = init_state(arrays, optimizer, seed)
            programs[depth] = (definition, optimizer, state)
        seconds: dict[int, list[float]] = {depth: [] for depth in programs}
        for _ in range(1 if quick else 3):
            for depth, (definition, optimizer, state) in programs.items():
                step = make_step(definition, optimizer)
                began = time.perf_counter()
                step.lower(state, batch).compile()
                seconds[depth].append(time.perf_counter() - began)
        for depth, taken in seconds.items():
            yield {
                "case": f"compile {name}",
                "layers": depth,
                "compile_seconds": float(np.median(taken)),
                "all_compile_seconds": taken,
            }


def compile_verdicts(found: list[Row]) -> Iterator[str]:
    for few, many in zip(found[::2], found[1::2], strict=True):
        ratio = many["compile_seconds"] / few["compile_seconds"]
        yield f"{few['case']}: {many['layers']} layers take {ratio:.2f} of the time of {few['layers']}"


def step_rows(*, quick: bool, seed: int) -> Iterator[Row]:
    """What Python adds to a training step: the time until a step is dispatched, while the device is idle or busy."""
    model = _model(RGLRUConfig(recurrent_size=64, blocks=4), 4).make(rngs=nnx.Rngs(seed))
    definition, arrays = params.split(model)
    optimizer = make_optimizer(TrainConfig(), params.labels(model))
    state, step = init_state(arrays, optimizer, seed), make_step(definition, optimizer, loss=language_model_loss)
    batch = {name: np.zeros((1, 8), np.int32) for name in ("tokens", "targets")}
    batch |= {"start": np.arange(8)[None] == 0, "valid": np.ones((1, 8), bool)}
    dispatch, whole = [], []
    for number in range(20 if quick else 200):
        began = time.perf_counter()
        state, metrics = step(state, batch)
        sent = time.perf_counter()
        jax.block_until_ready((state, metrics))
        if number >= 10:
            dispatch.append(sent - began)
            whole.append(time.perf_counter() - began)
    for name, taken in (("dispatch", dispatch), ("whole", whole)):
        low, median, high = np.percentile(taken, (25, 50, 75)).tolist()
        yield {"case": f"step {name}", "seconds": {"low": low, "median": median, "high": high}}


def step_verdicts(found: list[Row]) -> Iterator[str]:
    median = next(row["seconds"]["median"] for row in found if row["case"] == "step dispatch")
    yield f"a training step is dispatched in {1e3 * median:.2f} ms"
