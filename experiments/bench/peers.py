"""A training step here and in transformers, from the same weights, side by side on one machine.

Two layers of width 256 in float32, batch 2, 1024 tokens, AdamW: forward, backward and update. transformers runs its
reference path in PyTorch, since its fused kernels need a GPU. Both are compared before they are timed: the loss and
the length of its gradient.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.bench.measure import Compiled, Work, compiled, rates, side_by_side, verify
from seqmodels import params

Row = dict[str, Any]

WIDTH, LAYERS, VOCABULARY, BATCH, LENGTH = 256, 2, 1024, 2, 1024
RATE = 1e-4
# The loss and the length of its gradient, in float32 through two models of other sums (1e-5 was the worst seen).
TOLERANCE = 1e-3


def configs() -> dict[str, dict[str, Any]]:
    """What transformers' config of each model type gets besides the common sizes."""
    heads = {"num_heads": 8, "head_dim": 64, "state_size": 128, "n_groups": 1}
    gemma = {"lru_width": WIDTH, "intermediate_size": 6 * WIDTH, "num_attention_heads": 2, "head_dim": 128}
    delta = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 64}
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
    qwen = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "linear_value_head_dim": 64}
    qwen |= {"shared_expert_intermediate_size": 128, "layer_types": ["linear_attention", "full_attention"]}
    return {
        "mamba": {"state_size": 16},
        "mamba2": heads,
        "falcon_mamba": {"state_size": 16},
        "recurrent_gemma": gemma,
        "xlstm": {"num_heads": 4, "num_blocks": LAYERS},
        "rwkv": {"context_length": LENGTH, "attention_hidden_size": WIDTH},
        "qwen3_next": {**delta, **experts, **qwen},
    }


def rows(*, quick: bool, seed: int) -> Iterator[Row]:
    """Every architecture that both can train; `quick` takes 64 tokens."""
    try:
        with quiet():
            import torch
            import transformers
    except ImportError as error:
        raise ValueError(
            f"the comparison with transformers needs the extra `parity` ({error.name} is missing): "
            "make test-parity installs it, or pip install -e '.[parity]'"
        ) from error
    torch.manual_seed(seed)
    torch.set_num_threads(os.cpu_count() or 1)  # as many as XLA takes
    # no token 0: where it pads, transformers keeps its embedding at zero and sends it no gradient
    tokens = np.random.default_rng(seed).integers(1, VOCABULARY, (BATCH, 64 if quick else LENGTH))
    for name, options in configs().items():
        with quiet(), tempfile.TemporaryDirectory() as folder:
            config = transformers.AutoConfig.for_model(
                name, hidden_size=WIDTH, num_hidden_layers=LAYERS, vocab_size=VOCABULARY, use_cache=False, **options
            )
            theirs = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            theirs.save_pretrained(folder)
            ours, gradient, work = _ours(folder, tokens)
        yield from _compared(name, ours, gradient, work, theirs, tokens, f"transformers {transformers.__version__}")


def _compared(
    name: str, ours: Compiled, gradient: Any, work: Work, theirs: Any, tokens: np.ndarray, package: str
) -> Iterator[Row]:
    import torch

    given = torch.from_numpy(tokens)
    theirs.train()
    optimizer = torch.optim.AdamW(theirs.parameters(), RATE, weight_decay=0.0)

    def backward() -> float:
        optimizer.zero_grad()
        loss = theirs(input_ids=given, labels=given, use_cache=False).loss
        loss.backward()
        return float(loss)

    def step() -> None:
        backward()
        optimizer.step()

    with quiet():
        loss = backward()
        squares = sum(float(torch.sum(torch.square(p.grad))) for p in theirs.parameters() if p.grad is not None)
        error = verify(name, gradient(), (np.float64(loss), np.float64(math.sqrt(squares))), TOLERANCE)
        times = side_by_side({"seqmodels": ours.run, package: step}, budget=5.0, least=3, most=20)
    for implementation, taken in times.items():
        yield {
            "case": name,
            "implementation": implementation,
            "seconds": taken._asdict(),
            "tokens_per_second": tokens.size / taken.median,
            "share": rates().share(work, taken.median),
            "error": error,
            "threads": os.cpu_count(),
        }


def _ours(folder: str, tokens: np.ndarray) -> tuple[Compiled, Callable[[], Any], Work]:
    """The step, the loss and its gradient's length, and the work that no implementation can do without."""
    from seqmodels.hf import load_pretrained

    model = load_pretrained(folder)[0]
    model.stack.remat = False  # the peer keeps what the backward pass needs, too
    definition, arrays = params.split(model)
    optimizer = optax.adamw(RATE, weight_decay=0.0)

    def loss(arrays: Any, tokens: Any) -> Any:
        logits, _ = params.merge(definition, arrays)(tokens)
        # the last token has no next one; as in the peer, losses are cut off, not logits
        return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.roll(tokens, -1, axis=1))[:, :-1].mean()

    def step(arrays: Any, moments: Any, tokens: Any) -> Any:
        value, slope = jax.value_and_grad(loss)(arrays, tokens)
        updates, moments = optimizer.update(slope, moments, arrays)
        return optax.apply_updates(arrays, updates), moments, value

    def gradient() -> Any:
        value, slope = jax.jit(jax.value_and_grad(loss))(arrays, jnp.asarray(tokens))
        return value, optax.global_norm(slope)

    program = compiled(step, arrays, optimizer.init(arrays), jnp.asarray(tokens))
    run = functools.partial(program.run, arrays, optimizer.init(arrays), jnp.asarray(tokens))
    return program._replace(run=run), gradient, Work(0.0, 6.0 * _in_products(model) * tokens.size)


def _in_products(model: Any) -> float:
    """How many parameters a token is multiplied with: of experts those that it is sent to, and the head."""
    from seqmodels.layers.moe import MoEConfig
    from seqmodels.layers.stack import configs_of

    sent = {one.top_k / one.experts for one in configs_of(model.config.layers) if isinstance(one, MoEConfig)}
    axes, labels = params.logical_axes(model), params.labels(model)
    is_axes = lambda x: isinstance(x, tuple)
    count = 0.0
    for array, label, names in zip(
        jax.tree.leaves(params.split(model)[1]),
        jax.tree.leaves(labels),
        jax.tree.leaves(axes, is_leaf=is_axes),
        strict=True,
    ):
        if label == params.Group.MATRIX:
            count += array.size * (min(sent) if "experts" in names[:-1] else 1)  # a router has them last
        elif label == params.Group.EMBEDDING and model.head is None:
            count += array.size
    return count


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' warnings, of which there is one for every kernel that it lacks."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def verdicts(found: list[Row]) -> Iterator[str]:
    for ours, theirs in zip(found[::2], found[1::2], strict=True):
        ratio = ours["tokens_per_second"] / theirs["tokens_per_second"]
        yield (
            f"{ours['case']}: {ratio:.1f} times the tokens a second of {theirs['implementation']}, "
            f"{100 * ours['share']:.0f} % of the rate of products against {100 * theirs['share']:.1f} %"
        )
