"""The files of a Hugging Face folder: config.json and tensors in safetensors, in one file or several with an index."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": np.dtype("float32"), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype("float16")}
"""The types of tensors that float32 parameters hold exactly."""


def read_config(directory: Path) -> dict[str, Any]:
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory} is no directory; give a folder with {CONFIG} and {SINGLE}")
    if not (directory / CONFIG).is_file():
        raise FileNotFoundError(f"{directory} has no {CONFIG}; it is no folder of a Hugging Face model")
    return _json_object(directory / CONFIG)


class Tensors:
    """The tensors of a folder, read one at a time; `names` maps each to its file."""

    def __init__(self, directory: Path):
        self.directory = directory
        self._opened: dict[str, Any] = {}
        self.names = self._indexed() if (directory / INDEX).is_file() else self._single()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._open(self.names[name]).get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """F32, BF16 or F16; raises ValueError on another one."""
        dtype = self._open(self.names[name]).get_slice(name).get_dtype()
        if dtype not in DTYPES:
            raise ValueError(
                f"tensor {name} of {self.names[name]} has the type {dtype}; only {', '.join(DTYPES)} are supported"
            )
        return dtype

    def read(self, name: str) -> np.ndarray:
        """A tensor in float32."""
        return self._open(self.names[name]).get_tensor(name).astype(np.float32)

    def _open(self, file: str) -> Any:
        if file not in self._opened:
            try:
                self._opened[file] = safetensors.safe_open(self.directory / file, framework="numpy")
            except (safetensors.SafetensorError, OSError) as error:
                raise ValueError(f"{self.directory / file} is damaged, or no safetensors file: {error}") from error
        return self._opened[file]

    def _single(self) -> dict[str, str]:
        if not (self.directory / SINGLE).is_file():
            raise FileNotFoundError(_nothing_safe(self.directory))
        return dict.fromkeys(self._open(SINGLE).keys(), SINGLE)

    def _indexed(self) -> dict[str, str]:
        path = self.directory / INDEX
        names = _json_object(path).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
            raise ValueError(f'{path} is damaged: it has no "weight_map" from tensors to files')
        for file in sorted(set(names.values())):
            if Path(file).name != file:
                raise ValueError(f"{path} names the file {file!r}, which is not in its own directory")
            if not (self.directory / file).is_file():
                raise FileNotFoundError(f"{path} names the file {file}, which is not there")
            held = set(self._open(file).keys())
            listed = {name for name, its in names.items() if its == file}
            if held != listed:
                first = sorted(held ^ listed)[0]
                which = "which holds no such tensor" if first in listed else "from which the index leaves it out"
                raise ValueError(f"{path} is damaged: tensor {first}, file {file}, {which}")
        return names


def write(directory: Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], shard_bytes: int) -> None:
    """A new folder; more than one file of tensors where together they have more than `shard_bytes`."""
    directory.mkdir(parents=True, exist_ok=True)
    present = sorted(path.name for path in directory.iterdir() if path.suffix == ".safetensors" or path.name == INDEX)
    if present:
        raise FileExistsError(f"{directory} holds a model already ({present[0]}); save into another directory")
    shards = list(_shards(tensors, shard_bytes))
    files = [SINGLE] if len(shards) == 1 else [_shard_name(n, len(shards)) for n in range(1, len(shards) + 1)]
    for file, shard in zip(files, shards, strict=True):
        whole = {name: np.ascontiguousarray(tensors[name]) for name in shard}
        safetensors.numpy.save_file(whole, directory / file, metadata={"format": "pt"})
    if len(shards) > 1:
        weights = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weights.items()))}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    (directory / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _shards(tensors: Mapping[str, np.ndarray], limit: int) -> Iterator[list[str]]:
    shard: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        if shard and size + tensor.nbytes > limit:
            yield shard
            shard, size = [], 0
        shard.append(name)
        size += tensor.nbytes
    yield shard


def _shard_name(number: int, count: int) -> str:
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def _json_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged, it holds no JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged: it holds a {type(value).__name__}, not an object")
    return value


def _nothing_safe(directory: Path) -> str:
    found = sorted(path.name for path in directory.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if not found:
        return f"{directory} has neither {SINGLE} nor {INDEX}"
    return (
        f"{directory} has no safetensors, only {found[0]}: such files are pickles, which can run any code, and are not "
        "read. Convert it once where you trust it, with transformers: "
        "AutoModelForCausalLM.from_pretrained(directory).save_pretrained(other_directory) writes safetensors"
    )
