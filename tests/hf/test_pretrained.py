"""Folders in the format of Hugging Face, written and read back by us: round trips, and errors that name things."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from seqmodels import ModelConfig, params
from seqmodels.hf import ARCHITECTURES, load_pretrained, save_pretrained
from seqmodels.hf.architecture import express
from seqmodels.hf.files import CONFIG, INDEX, SINGLE
from seqmodels.layers import NormConfig
from seqmodels.mixers import GLAConfig, Mamba2Config
from tests.hf import models

MODEL = models.MAMBA2


@pytest.fixture(scope="module")
def model() -> Any:
    return models.moved(MODEL)


@pytest.fixture(scope="module")
def saved(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model") / "saved"
    save_pretrained(model, directory)
    return directory


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "saved")


def edit(folder: Path, **changes: Any) -> Path:
    """Changes the entries of a config.json; None takes one out."""
    path = folder / CONFIG
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))
    return folder


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in safetensors.numpy.load_file(file).items()}


def replace(folder: Path, changes: dict[str, np.ndarray | None]) -> Path:
    tensors = tensors_of(folder) | changes
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    safetensors.numpy.save_file(kept, folder / SINGLE)
    return folder


def assert_same_bytes(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape), name
        assert a[name].tobytes() == b[name].tobytes(), name


def test_a_saved_model_is_loaded_again(model: Any, folder: Path) -> None:
    loaded, tokenizer = load_pretrained(folder)
    assert tokenizer is None
    chex.assert_trees_all_equal(params.split(loaded)[1], params.split(model)[1])
    tokens = jnp.arange(10)[None] % 11
    chex.assert_trees_all_equal(loaded(tokens)[0], model(tokens)[0])
    assert json.loads((folder / CONFIG).read_text())["architectures"] == ["Mamba2ForCausalLM"]


@pytest.mark.parametrize("name", models.MODELS)
def test_every_architecture_is_written_and_read(name: str, tmp_path: Path) -> None:
    """The same parameters and a config that means the same; a second time the same bytes."""
    model = models.moved(models.MODELS[name])
    save_pretrained(model, tmp_path / "one")
    assert json.loads((tmp_path / "one" / CONFIG).read_text())["model_type"] == name
    loaded, _ = load_pretrained(tmp_path / "one")
    chex.assert_trees_all_equal(params.split(loaded)[1], params.split(model)[1])
    save_pretrained(loaded, tmp_path / "two")
    assert_same_bytes(tensors_of(tmp_path / "one"), tensors_of(tmp_path / "two"))
    assert (tmp_path / "one" / CONFIG).read_text() == (tmp_path / "two" / CONFIG).read_text()


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("recurrent_gemma", "hidden_activation", "gelu"),
        ("recurrent_gemma", "block_types", ["recurrent", "global"]),
        ("recurrent_gemma", "rope_parameters", {"rope_type": "linear", "factor": 2.0}),
        ("xlstm", "weight_mode", "fused"),
        ("xlstm", "use_bias", True),
        ("rwkv", "layer_norm_epsilon", 1e-3),
        ("mamba", "hidden_act", "relu"),
    ],
)
def test_values_that_are_not_supported(name: str, field: str, value: Any, tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text(json.dumps(express(ARCHITECTURES[name], models.MODELS[name]) | {field: value}))
    with pytest.raises(ValueError, match=f"'{name}' has (rope_type|{field})=.* not supported: it has to be"):
        load_pretrained(tmp_path)


def test_a_loaded_folder_is_saved_as_it_was(folder: Path, tmp_path: Path) -> None:
    """Tensors of several types keep theirs; entries of config.json without a meaning here are kept."""
    halves = {name: t.astype(ml_dtypes.bfloat16) for name, t in tensors_of(folder).items() if "A_log" not in name}
    replace(edit(folder, transformers_version="5.0", time_step_limit=[0.0, {"__float__": "Infinity"}]), halves)
    loaded, _ = load_pretrained(folder)
    assert all(array.dtype == jnp.float32 for array in jax.tree.leaves(params.split(loaded)[1]))
    save_pretrained(loaded, tmp_path / "again")
    assert_same_bytes(tensors_of(folder), tensors_of(tmp_path / "again"))
    assert json.loads((tmp_path / "again" / CONFIG).read_text())["transformers_version"] == "5.0"
    save_pretrained(loaded, tmp_path / "wide", dtype="float32")
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "wide").values()} == {np.dtype("float32")}


def test_tensors_in_several_files(model: Any, folder: Path, tmp_path: Path) -> None:
    save_pretrained(model, tmp_path / "parts", shard_bytes=10_000)
    assert len(list((tmp_path / "parts").glob("model-*-of-*.safetensors"))) > 2
    assert_same_bytes(tensors_of(folder), tensors_of(tmp_path / "parts"))
    loaded, _ = load_pretrained(tmp_path / "parts")
    chex.assert_trees_all_equal(params.split(loaded)[1], params.split(model)[1])


@pytest.mark.slow
def test_layers_may_be_written_in_several_ways(model: Any, folder: Path, tmp_path: Path) -> None:
    """Groups, repeats and patterns of our config are no part of the format."""
    config = ModelConfig(11, 32, (((models.MIXER, models.MIXER), 1), ((models.MIXER,), 1)), norm=MODEL.norm)
    other = models.moved(config)
    save_pretrained(other, tmp_path / "other")
    loaded, _ = load_pretrained(tmp_path / "other")
    tokens = jnp.arange(7)[None]
    chex.assert_trees_all_close(loaded(tokens)[0], other(tokens)[0], rtol=1e-5, atol=1e-5)  # other programs
    assert tensors_of(folder).keys() == tensors_of(tmp_path / "other").keys()


@pytest.mark.parametrize("stored", [False, True])
def test_tied_heads(folder: Path, tmp_path: Path, stored: bool) -> None:
    """A tied head that a file holds all the same is written again; one that differs from the embedding is an error."""
    embedding = tensors_of(folder)["backbone.embeddings.weight"]
    assert "lm_head.weight" not in tensors_of(folder)
    if stored:
        replace(folder, {"lm_head.weight": embedding})
    save_pretrained(load_pretrained(folder)[0], tmp_path / "again")
    assert_same_bytes(tensors_of(folder), tensors_of(tmp_path / "again"))
    replace(folder, {"lm_head.weight": embedding + 1})
    with pytest.raises(ValueError, match=r"lm_head\.weight differs .*tie_word_embeddings"):
        load_pretrained(folder)
    assert load_pretrained(edit(folder, tie_word_embeddings=False))[0].head is not None


def test_another_name_of_a_tensor(folder: Path, tmp_path: Path) -> None:
    embedding = tensors_of(folder)["backbone.embeddings.weight"]
    replace(folder, {"backbone.embeddings.weight": None, "backbone.embedding.weight": embedding})
    save_pretrained(load_pretrained(folder)[0], tmp_path / "again")
    assert_same_bytes(tensors_of(folder), tensors_of(tmp_path / "again"))


NAME = "backbone.layers.1.mixer.in_proj.weight"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({NAME: None}, r"lacks the tensor backbone\.layers\.1\.mixer\.in_proj\.weight"),
        ({"other.weight": np.zeros(2, np.float32)}, r"has the tensor other\.weight, for which"),
        ({NAME: np.zeros((3, 2), np.float32)}, r"in_proj\.weight has the shape \[3, 2\], .*calls for \[164, 32\]"),
        ({NAME: np.zeros((164, 32), np.int8)}, r"in_proj\.weight of model\.safetensors has the type I8"),
    ],
)
def test_wrong_tensors(folder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_pretrained(replace(folder, changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "unknown architecture 'llama'; known: .*mamba2"),
        ({"model_type": None}, "unknown architecture None"),
        ({"hidden_act": "relu"}, "hidden_act='relu', which is not supported: it has to be 'silu'"),
        ({"num_hidden_layers": "three"}, "num_hidden_layers='three'.* an integer"),
        ({"use_bias": 1}, "use_bias=1.* true or false"),
        ({"layer_norm_epsilon": "small"}, "layer_norm_epsilon='small'.* a number"),
        ({"time_step_limit": 3}, "time_step_limit=3.* a pair"),
        ({"num_heads": 5}, "num_heads=5.* hidden_size"),
        ({"num_hidden_layers": 4}, r"lacks the tensors backbone\.layers\.3\.\S+, .* and 6 more"),
    ],
)
def test_wrong_configs(folder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_pretrained(edit(folder, **changes))


def test_folders_that_hold_no_model(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no directory"):
        load_pretrained(tmp_path / "nowhere")
    (folder / SINGLE).rename(folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"only pytorch_model\.bin: .*pickles.*save_pretrained"):
        load_pretrained(folder)
    (folder / "pytorch_model.bin").rename(folder / "other")
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors"):
        load_pretrained(folder)
    (folder / SINGLE).write_bytes(b"not at all")
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        load_pretrained(folder)
    (folder / CONFIG).write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        load_pretrained(folder)
    (folder / CONFIG).unlink()
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        load_pretrained(folder)


def test_damaged_indices(model: Any, tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    save_pretrained(model, folder, shard_bytes=10_000)
    index = json.loads((folder / INDEX).read_text())
    files, name = index["weight_map"], "backbone.norm_f.weight"

    def raises(kind: type[Exception], weight_map: Any, message: str) -> None:
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(kind, match=message):
            load_pretrained(folder)

    raises(ValueError, None, "no .weight_map.")
    raises(ValueError, files | {name: f"../{files[name]}"}, "not in its own directory")
    raises(FileNotFoundError, files | {name: "gone.safetensors"}, r"gone\.safetensors, which is not there")
    raises(ValueError, files | {"new": files[name]}, "tensor new, .*no such tensor")
    raises(ValueError, {k: v for k, v in files.items() if k != name}, r"norm_f\.weight.*leaves it out")
    (folder / INDEX).write_text("[]")
    with pytest.raises(ValueError, match="holds a list"):
        load_pretrained(folder)


def test_what_cannot_be_saved(model: Any, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match="holds a model already"):
        save_pretrained(model, folder)
    with pytest.raises(ValueError, match="dtype='int8'"):
        save_pretrained(model, tmp_path / "other", dtype="int8")

    def raises(message: str, **changes: Any) -> None:
        fields = {"vocab_size": 11, "width": 32, "layers": MODEL.layers, "norm": MODEL.norm} | changes
        with pytest.raises(ValueError, match=message):
            save_pretrained(ModelConfig(**fields).make(rngs=nnx.Rngs(0)), tmp_path / "other")

    raises("mamba2: a block has to consist of Mamba2Config, not of GLAConfig", layers=(((GLAConfig(),), 2),))
    raises("mamba2: .* this model has 2 different", layers=(((models.MIXER, Mamba2Config(head_size=32)), 1),))
    raises("mamba2: ModelConfig.logits_cap has to be None there, not 30.0", logits_cap=30.0)
    raises("mamba2: Mamba2Config.norm_eps has to be 1e-06 there, not 1e-05", norm=NormConfig(eps=1e-6))
    assert not (tmp_path / "other").exists()


def test_a_tokenizer_beside_the_model(folder: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")  # part of the dev install
    words = {"a": 0, "b": 1, "?": 2}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="?"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(folder / "tokenizer.json"))
    assert load_pretrained(folder)[1].encode("a b b").ids == [0, 1, 1]


def test_a_tokenizer_that_cannot_be_read_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "tokenizer.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.warns(UserWarning, match=r"tokenizer\.json is not read: .*pip install tokenizers"):
        assert load_pretrained(folder)[1] is None
