"""Models from Hugging Face folders, and folders from models."""

from __future__ import annotations

import collections
import dataclasses
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from seqmodels import params
from seqmodels.hf import files
from seqmodels.hf.architecture import Architecture, Place, express, shapes
from seqmodels.hf.fields import Fields
from seqmodels.hf.mamba import FALCON_MAMBA, MAMBA
from seqmodels.hf.mamba2 import MAMBA2
from seqmodels.hf.qwen3_next import QWEN3_NEXT
from seqmodels.hf.recurrent_gemma import RECURRENT_GEMMA
from seqmodels.hf.rwkv import RWKV
from seqmodels.hf.xlstm import XLSTM
from seqmodels.models.lm import LanguageModel, ModelConfig

ARCHITECTURES: dict[str, Architecture] = {
    one.model_type: one for one in (MAMBA, FALCON_MAMBA, MAMBA2, RECURRENT_GEMMA, XLSTM, RWKV, QWEN3_NEXT)
}
STORED = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
SHARD_BYTES = 5_000_000_000
NAMES_SHOWN = 5


@dataclasses.dataclass(frozen=True)
class Source:
    """What a model does not need and its folder had: all of config.json, and names and types of tensors.

    `load_pretrained` leaves it at `model.source`, from where `save_pretrained` writes the same folder again.
    """

    model_type: str
    config: str
    dtype: str  # of most tensors, as safetensors calls it; the others in `exceptions`
    exceptions: tuple[tuple[str, str], ...]
    renamed: tuple[tuple[str, str], ...]  # name here -> name in the file
    tied_copy: bool  # the file holds the head although it is tied


def load_pretrained(directory: str | Path, *, dtype: str = "float32") -> tuple[LanguageModel, Any | None]:
    """The model in a Hugging Face folder, and its tokenizer: `(model, tokenizer or None)`.

    The folder holds config.json and safetensors, in one file or several with an index; pickles are never read.
    Parameters are float32, whatever the type of the tensors; `dtype` is that of activations (`ModelConfig.dtype`). The
    tokenizer is a `tokenizers.Tokenizer` where that package is installed and the folder has a tokenizer.json.

    Raises ValueError or FileNotFoundError that names what is unknown, unsupported, missing, left over or of the wrong
    shape: nothing is loaded in part.
    """
    directory = Path(directory)
    fields = Fields(files.read_config(directory))
    architecture = ARCHITECTURES.get(fields.model_type) if isinstance(fields.model_type, str) else None
    if architecture is None:
        known = ", ".join(sorted(ARCHITECTURES))
        raise ValueError(f"{directory} has a model of the unknown architecture {fields.model_type!r}; known: {known}")
    config = dataclasses.replace(architecture.read(fields), dtype=dtype)
    tensors = files.Tensors(directory)
    names, tied_copy = _match(architecture, config, tensors)
    model = _fill(architecture, config, tensors, names)
    dtypes = {name: tensors.dtype(stored) for name, stored in names.items()}
    usual = collections.Counter(dtypes.values()).most_common(1)[0][0]
    model.source = Source(
        architecture.model_type,
        json.dumps(fields.values),
        usual,
        tuple((name, kind) for name, kind in dtypes.items() if kind != usual),
        tuple((name, stored) for name, stored in names.items() if name != stored),
        tied_copy,
    )
    return model, _tokenizer(directory)


def save_pretrained(
    model: LanguageModel, directory: str | Path, *, dtype: str | None = None, shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes a model as a Hugging Face folder, which must not hold one yet; the inverse of `load_pretrained`.

    `dtype` ("float32", "bfloat16", "float16") is that of the tensors; None takes those of the folder that the model was
    loaded from, or float32. So a model that was loaded and saved again has the same bytes in each tensor. Tensors of
    more than `shard_bytes` together are written to several files with an index.

    Raises ValueError where no known architecture is what the model is, and says why for each.
    """
    if dtype is not None and dtype not in STORED:
        raise ValueError(f"dtype={dtype!r} is not one of {', '.join(STORED)}")
    source: Source | None = model.source
    architecture, config = _expressed(model.config, source)
    tensors = to_tensors(architecture, model.config, params.split(model)[1])
    if source is not None and source.tied_copy:
        tensors[architecture.head] = tensors[_embedding(architecture, model.config)]
    kinds, names = dict(source.exceptions) if source else {}, dict(source.renamed) if source else {}
    usual = source.dtype if source else "F32"
    stored = {
        names.get(name, name): tensor.astype(files.DTYPES[STORED[dtype] if dtype else kinds.get(name, usual)])
        for name, tensor in tensors.items()
    }
    if dtype is not None or source is None:
        config = {**config, "dtype": dtype or "float32"}
        config.pop("torch_dtype", None)
    files.write(Path(directory), config, stored, shard_bytes)


def to_tensors(architecture: Architecture, config: ModelConfig, arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Arrays of a model's structure (parameters, gradients) as tensors under the names of the architecture."""
    flat = {path: np.asarray(array) for path, array in traverse_util.flatten_dict(dict(arrays)).items()}
    tensors: dict[str, np.ndarray] = {}
    for placed in architecture.rules(config):
        tensors |= zip(placed.tensors, placed.rule.save(*(_at(flat, place) for place in placed.places)), strict=True)
    return tensors


def _at(flat: Mapping[tuple[str, ...], np.ndarray], place: Place) -> np.ndarray:
    array = flat[place.path]
    return array if place.repeat is None else array[place.repeat]


def _match(architecture: Architecture, config: ModelConfig, tensors: files.Tensors) -> tuple[dict[str, str], bool]:
    """The stored name of every tensor that is needed, and whether a tied head is stored beside the embedding."""
    needed = [name for placed in architecture.rules(config) for name in placed.tensors]
    other = {name: alias for alias, name in architecture.aliases.items() if alias in tensors.names}
    names = {name: name if name in tensors.names else other.get(name, name) for name in needed}
    missing = [name for name in names.values() if name not in tensors.names]
    if missing:
        raise ValueError(f"{tensors.directory} lacks {_listed(missing)}, which config.json calls for")
    surplus = set(tensors.names) - set(names.values())
    surplus = {s for s in surplus if not any(s.startswith(i) or s.endswith(i) for i in architecture.ignored)}
    tied_copy = config.tied and architecture.head in surplus
    if tied_copy:
        embedding = names[_embedding(architecture, config)]
        if not np.array_equal(tensors.read(architecture.head), tensors.read(embedding)):
            raise ValueError(
                f"{tensors.directory}: {architecture.head} differs from {embedding}, although config.json ties them; "
                'set "tie_word_embeddings" to false there'
            )
        surplus.discard(architecture.head)
    if surplus:
        raise ValueError(f"{tensors.directory} has {_listed(sorted(surplus))}, for which config.json has no place")
    return names, tied_copy


def _embedding(architecture: Architecture, config: ModelConfig) -> str:
    return next(one.tensors[0] for one in architecture.outer(config) if one.parameters == ("embedding",))


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return f"the tensor{'s' if len(names) > 1 else ''} {', '.join(names[:NAMES_SHOWN])}{more}"


def _fill(
    architecture: Architecture, config: ModelConfig, tensors: files.Tensors, names: Mapping[str, str]
) -> LanguageModel:
    """The model, its arrays taken from the tensors."""
    definition, wanted = shapes(config)
    arrays = {path: np.empty(shape, np.float32) for path, shape in wanted.items()}
    zero = {path: np.broadcast_to(np.float32(0), shape) for path, shape in wanted.items()}
    filled: collections.Counter[tuple[str, ...]] = collections.Counter()
    for placed in architecture.rules(config):
        expected = placed.rule.save(*(_at(zero, place) for place in placed.places))
        for name, like in zip(placed.tensors, expected, strict=True):
            tensors.dtype(names[name])
            found = tensors.shape(names[name])
            if found != like.shape:
                raise ValueError(
                    f"{tensors.directory}: tensor {names[name]} has the shape {list(found)}, "
                    f"config.json calls for {list(like.shape)}"
                )
        loaded = placed.rule.load(*(tensors.read(names[name]) for name in placed.tensors))
        for place, array in zip(placed.places, loaded, strict=True):
            _at(arrays, place)[...] = array
            filled[place.path] += array.size
    short = [".".join(path) for path, array in arrays.items() if filled[path] != array.size]
    if short:
        raise TypeError(f"the table of {architecture.model_type} does not fill {', '.join(short)} exactly once")
    on_device = {path: jnp.asarray(arrays.pop(path)) for path in list(arrays)}
    return params.merge(definition, traverse_util.unflatten_dict(on_device))


def _expressed(config: ModelConfig, source: Source | None) -> tuple[Architecture, dict[str, Any]]:
    """The architecture of a model and its config.json, with all that the one it was loaded from said besides."""
    if source is not None:
        architecture = ARCHITECTURES[source.model_type]
        before, written = json.loads(source.config), express(architecture, config)
        # The same in other words (a period in place of a list) stays in those words.
        same = express(architecture, architecture.read(Fields(before))) == written
        return architecture, before if same else {**before, **written}
    reasons = []
    for architecture in ARCHITECTURES.values():
        try:
            written = express(architecture, config)
        except ValueError as error:
            reasons.append(f"{architecture.model_type}: {error}")
            continue
        return architecture, {"architectures": [architecture.class_name], **written}
    raise ValueError("no architecture of Hugging Face's is this model.\n" + "\n".join(reasons))


def _tokenizer(directory: Path) -> Any | None:
    path = directory / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        import tokenizers
    except ImportError:
        warnings.warn(
            f"{path} is not read: the package tokenizers is missing (pip install tokenizers); the tokenizer is None",
            stacklevel=3,
        )
        return None
    return tokenizers.Tokenizer.from_file(str(path))
