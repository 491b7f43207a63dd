"""A tiny random model of transformers' and the same one loaded by us, and everything in which the two have to agree.

transformers runs its reference path: plain torch on a CPU, float32, eager attention. Every weight is random, norms,
biases and decays too, so that none is hidden by its initial value.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
import torch
import transformers
from transformers.core_model_loading import revert_weight_conversion

from seqmodels import params
from seqmodels.hf import ARCHITECTURES, load_pretrained, save_pretrained, to_tensors
from seqmodels.hf.architecture import steps
from tests import evidence

torch.set_num_threads(1)  # models this small only wait for more

LOGITS_ERROR = 1e-4
"""The bound that the project promises on logits, which are of order 1 here; what is seen is a few float32 roundings."""
STATE_ERROR = 1e-4
"""Of the largest entry of a state."""
GRADIENT_ERROR = 5e-4
"""Of the largest entry of a tensor's gradient: roundings of both passes, which add up in sums over all tokens."""
BATCH, LENGTH, PREFIX, DECODED = 2, 21, 13, 9
"""Odd lengths: no chunk divides them."""


@dataclasses.dataclass(frozen=True)
class Pair:
    system: str
    theirs: Any
    ours: Any
    folder: Path
    first: Callable[[Any, np.ndarray], Any]
    rows: int

    @property
    def tokens(self) -> np.ndarray:
        generator = np.random.default_rng(7)
        return generator.integers(0, self.theirs.config.vocab_size, (BATCH, LENGTH))


def first_call(theirs: Any, tokens: np.ndarray) -> Any:
    """The call that starts a cache, which the output holds."""
    return theirs(torch.tensor(tokens), use_cache=True)


def make_pair(
    config: Any,
    folder: Path,
    adjust: Callable[[str, torch.Tensor], torch.Tensor | None] | None = None,
    *,
    first: Callable[[Any, np.ndarray], Any] = first_call,
    rows: int = BATCH,
) -> Pair:
    """A model of that config with random weights, saved by transformers to `folder` and loaded by us.

    `adjust(name, random)` may return other values for a parameter; `first` is for models that do not hand their cache
    out; `rows`: with how many transformers can decode.
    """
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            noise = torch.randn_like(parameter)
            fan_in = parameter[0].numel() if parameter.ndim == 3 and parameter.shape[1] == 1 else parameter.shape[-1]
            value = parameter + 0.2 * noise if parameter.ndim < 2 else noise * fan_in**-0.5
            other = None if adjust is None else adjust(name, value)
            parameter.copy_(value if other is None else other)
    theirs.save_pretrained(folder)
    ours, _ = load_pretrained(folder)
    return Pair(config.model_type, theirs, ours, folder, first, rows)


def check_logits(pair: Pair) -> None:
    """Logits of whole documents, and of their first token alone."""
    for tokens in (pair.tokens, pair.tokens[:, :1]):
        with torch.no_grad():
            expected = pair.theirs(torch.tensor(tokens), use_cache=False).logits.numpy()
        assert expected.std() > 0.1, "logits this small would agree whatever the models compute"
        close(pair, "logits", run(pair.ours, tokens)[0], expected)


def check_states(pair: Pair, cached: Callable[[Any], Iterator[Any]], of_ours: Callable[[Any], Any]) -> None:
    """Each layer's state after a prefix, and what both compute from there on.

    `cached(output)`: transformers' states, layer after layer, from the output of a call; `of_ours(state)`: the same of
    a mixer's state of ours, leaf by leaf. Odd and even prefixes, and such that fill no window.
    """
    for length in (1, PREFIX, LENGTH - 1):
        tokens = pair.tokens[: pair.rows]
        prefix, rest = tokens[:, :length], tokens[:, length : length + 1]
        with torch.no_grad():
            output = pair.first(pair.theirs, prefix)
            expected = [jax.tree.map(lambda leaf: leaf.numpy().copy(), state) for state in cached(output)]
        _, state = run(pair.ours, prefix, pair.ours.init_state(pair.rows, LENGTH))
        found = [of_ours(one) for one in layer_states(pair.ours, state)]
        assert len(found) == len(expected)
        for number, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
            for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
                assert a.shape == b.shape, f"layer {number}: {a.shape} against {b.shape}"
                error = np.max(np.abs(np.asarray(a) - b)) / max(1e-3, np.max(np.abs(b)))
                assert error < STATE_ERROR, f"a state of layer {number} after {length} tokens is off by {error:.1e}"
        with torch.no_grad():
            logits = _continued(pair.theirs, rest, output).logits
        close(pair, "logits", run(pair.ours, rest, state)[0], logits.numpy())


def check_decoding(pair: Pair) -> None:
    """Token by token, in both, is what a whole call gives."""
    tokens = pair.tokens[: pair.rows, :DECODED]
    with torch.no_grad():
        whole = pair.theirs(torch.tensor(tokens), use_cache=False).logits.numpy()
    state, output = pair.ours.init_state(pair.rows, DECODED), None
    for at in range(DECODED):
        token = tokens[:, at : at + 1]
        logits, state = run(pair.ours, token, state)
        close(pair, "logits", logits[:, 0], whole[:, at])
        with torch.no_grad():
            output = pair.first(pair.theirs, token) if output is None else _continued(pair.theirs, token, output)
        close(pair, "theirs", output.logits.numpy()[:, 0], whole[:, at])


def check_gradients(pair: Pair) -> None:
    """Of the mean loss over all tokens but the first, with respect to every parameter, by name of the tensor."""
    tokens = pair.tokens
    pair.theirs.zero_grad()
    logits = pair.theirs(torch.tensor(tokens), use_cache=False).logits[:, :-1]
    torch.nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), torch.tensor(tokens[:, 1:]).reshape(-1)
    ).backward()
    expected = {name: parameter.grad.numpy() for name, parameter in pair.theirs.named_parameters()}

    definition, arrays = params.split(pair.ours)

    def loss(arrays: Any) -> jax.Array:
        scores = jax.nn.log_softmax(params.merge(definition, arrays)(jnp.asarray(tokens))[0][:, :-1])
        return -jnp.mean(jnp.take_along_axis(scores, jnp.asarray(tokens)[:, 1:, None], axis=-1))

    found = to_tensors(ARCHITECTURES[pair.system], pair.ours.config, jax.jit(jax.grad(loss))(arrays))
    expected = stored(pair, expected)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        error = np.max(np.abs(found[name] - tensor)) / np.max(np.abs(tensor))
        assert error < GRADIENT_ERROR, f"the gradient of {name} is off by {error:.1e} of its largest entry"


def check_round_trip(pair: Pair, directory: Path) -> None:
    """Loaded and saved by us, the folder has the same bytes in every tensor and means the same to transformers."""
    save_pretrained(pair.ours, directory)
    before, after = (_tensors(folder) for folder in (pair.folder, directory))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert (tensor.dtype, tensor.shape) == (after[name].dtype, after[name].shape), name
        assert tensor.tobytes() == after[name].tobytes(), name
    one, two = (json.loads((folder / "config.json").read_text()) for folder in (pair.folder, directory))
    assert one == two


def close(pair: Pair, what: str, found: Any, expected: Any) -> None:
    """Within the bound on logits; the largest error goes into the record of the run."""
    error = float(np.max(np.abs(np.asarray(found) - np.asarray(expected))))
    if what == "logits":
        evidence.record(pair.system, f"transformers {transformers.__version__}", error)
    assert error < LOGITS_ERROR, f"{what} of {pair.system} are off by {error:.1e}"


def stored(pair: Pair, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors of a model of transformers under the names, and in the form, that its files have."""
    written = revert_weight_conversion(pair.theirs, {name: torch.tensor(tensor) for name, tensor in tensors.items()})
    return {name: tensor.numpy() for name, tensor in written.items()}


def layer_states(model: Any, state: Any) -> list[Any]:
    """The states of a model's mixers, layer after layer."""
    found = []
    for step in steps(model.config):
        group, index = int(step.path[2]), int(step.path[4])
        one = jax.tree.map(lambda leaf, repeat=step.repeat: leaf[repeat], state.layers[group][index])
        if jax.tree.leaves(one):
            found.append(one)
    return found


def _continued(theirs: Any, tokens: np.ndarray, output: Any) -> Any:
    """The call after `output`, under whichever name the model hands its cache on."""
    for name in ("cache_params", "past_key_values", "state"):
        if getattr(output, name, None) is not None:
            after = theirs(torch.tensor(tokens), use_cache=True, **{name: getattr(output, name)})
            if getattr(after, name, None) is None:  # changed in place
                setattr(after, name, getattr(output, name))
            return after
    raise AssertionError(f"{type(output).__name__} holds no cache")


@functools.partial(jax.jit, static_argnums=0)
def _jitted(definition: Any, arrays: Any, tokens: Any, state: Any) -> Any:
    return params.merge(definition, arrays)(tokens, state)


def run(model: Any, tokens: np.ndarray, state: Any = None) -> Any:
    definition, arrays = params.split(model)
    return _jitted(definition, arrays, jnp.asarray(tokens), state)


def _tensors(folder: Path) -> dict[str, np.ndarray]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in safetensors.numpy.load_file(file).items()}
