"""Documents through TFDS: prepared here from real text without TensorFlow or network, read at random, trained on."""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from pathlib import Path

import chex
import numpy as np
import pytest
from flax import nnx

from seqmodels import ModelConfig
from seqmodels.data import Document, TFDSDocuments, documents, evaluation_batches, make_loader
from seqmodels.data.tokens import VOCAB_SIZE
from seqmodels.mixers import RGLRUConfig
from seqmodels.train import TrainConfig, train

TEXTS = 60


def texts(split: str) -> list[Document]:
    """Some sections of the language reference inside CPython; each fits in a TFDS example as it is."""
    found = [document for document in documents("cpython", split) if document.name.startswith("reference/")]
    return found[:TEXTS]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data_dir with `small_reference`, written as array_record."""
    import tensorflow_datasets as tfds

    class SmallReference(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "title": tfds.features.Text(),
                "text": tfds.features.Text(),
                "bytes": tfds.features.Scalar(np.int64),
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, manager):
            return {split: self._generate_examples(split) for split in ("train", "heldout")}

        def _generate_examples(self, split):
            for name, data in texts(split):
                yield name, {"title": name, "text": data.decode(), "bytes": len(data)}

    folder = tmp_path_factory.mktemp("tfds")
    builder = SmallReference(data_dir=folder, file_format="array_record")
    builder.download_and_prepare()
    assert list(folder.glob("small_reference/1.0.0/*.array_record-*"))
    return folder


@pytest.fixture(scope="module")
def read(prepared: Path) -> TFDSDocuments:
    return TFDSDocuments("small_reference", split="train", data_dir=prepared)


def test_every_document_is_there_at_random(read: TFDSDocuments) -> None:
    expected = texts("train")
    assert len(read) == len(expected) > 20
    assert Counter(document.bytes for document in read) == Counter(document.bytes for document in expected)
    assert [document.name for document in read] == [f"train/{i}" for i in range(len(read))]
    assert read[-1] == read[len(read) - 1]
    assert read[7] == read[7] != read[8]
    assert read.sizes.tolist() == [len(document.bytes) for document in read]
    with pytest.raises(IndexError, match="document 10000 of"):
        read[10000]


def test_tensorflow_is_not_needed(read: TFDSDocuments) -> None:
    assert read[0].bytes
    assert "tensorflow" not in sys.modules


def test_the_digest_is_that_of_the_contents(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other bytes of the same sizes are another data set: a loader must not go on with them."""
    digests = [TFDSDocuments("small_reference", split="train", data_dir=prepared).digest]
    original = TFDSDocuments.__getitem__
    monkeypatch.setattr(TFDSDocuments, "__getitem__", lambda self, i: original(self, i)._replace(bytes=b"x" * 9))
    short = TFDSDocuments("small_reference", split="train", data_dir=prepared)
    digests.append(short.digest)
    monkeypatch.setattr(TFDSDocuments, "__getitem__", lambda self, i: original(self, i)._replace(bytes=b"y" * 9))
    digests.append(TFDSDocuments("small_reference", split="train", data_dir=prepared).digest)
    assert len(set(digests)) == 3


def test_slices_and_other_features(prepared: Path, read: TFDSDocuments) -> None:
    half = TFDSDocuments("small_reference", split="train[:50%]", data_dir=prepared)
    assert [document.bytes for document in half] == [read[i].bytes for i in range(len(read) // 2)]
    titles = TFDSDocuments("small_reference:1.0.0", split="heldout", data_dir=prepared, feature="title")
    assert sorted(document.bytes.decode() for document in titles) == sorted(name for name, _ in texts("heldout"))
    assert half.digest != read.digest
    assert read.digest == TFDSDocuments("small_reference", split="train", data_dir=prepared).digest


def test_batches_are_those_of_documents_in_memory(prepared: Path) -> None:
    few = TFDSDocuments("small_reference", split="train[:6]", data_dir=prepared)
    memory, arguments = list(few), {"batch_size": 3, "length": 256}
    chex.assert_trees_all_equal(
        list(evaluation_batches(few, **arguments)), list(evaluation_batches(memory, **arguments))
    )
    lazy, loader = make_loader(few, seed=1, **arguments), make_loader(memory, seed=1, **arguments)
    chex.assert_trees_all_equal([next(lazy) for _ in range(3)], [next(loader) for _ in range(3)])
    state = json.loads(json.dumps(lazy.get_state()))
    following = next(lazy)
    fresh = make_loader(few, seed=1, **arguments)
    fresh.set_state(state)
    chex.assert_trees_all_equal(next(fresh), following)


def test_only_the_documents_of_a_batch_are_read(prepared: Path) -> None:
    """Once sizes are known, a piece reads its own document and no other."""
    from seqmodels.data.loader import Pieces

    source = TFDSDocuments("small_reference", split="train", data_dir=prepared)
    pieces = Pieces(source, 64)
    asked = []

    class Counting:
        def __getitem__(self, number):
            asked.append(number)
            return inner[number]

        def __len__(self):
            return len(inner)

    inner, source._source = source._source, Counting()
    piece = pieces[len(pieces) - 1]
    assert asked == [len(source) - 1]
    assert piece["targets"][-1] == 256


def test_a_model_learns_from_it(read: TFDSDocuments) -> None:
    layers = (((RGLRUConfig(recurrent_size=16, blocks=2),), 1),)
    model = ModelConfig(VOCAB_SIZE, 16, layers, remat=False).make(rngs=nnx.Rngs(0))
    config = TrainConfig(steps=40, batch_size=4, length=32, learning_rate=1e-2, warmup=5, log_every=1)
    result = train(model, make_loader(read, batch_size=4, length=32, seed=0), config, quiet=True)
    losses = [row["loss"] for row in result.rows]
    assert losses[0] > 5, "about log 257 at first"
    assert np.mean(losses[-5:]) < 4, "English letters and blanks, at least"


def test_what_cannot_be_read_says_why(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def open_(name="small_reference", split="train", data_dir=prepared, **rest):
        return TFDSDocuments(name, split=split, data_dir=data_dir, **rest)

    with pytest.raises(FileNotFoundError, match=r"no TFDS data set no_such_set in .*Dataset no_such_set not found"):
        open_("no_such_set")
    with pytest.raises(
        FileNotFoundError, match=r"not prepared in .*\n.*file_format='array_record'.*download_and_prepare"
    ):
        open_(data_dir=tmp_path)
    with pytest.raises(
        ValueError, match=r"no split 'validation' of small_reference; it has (heldout, train|train, heldout)"
    ):
        open_(split="validation")
    with pytest.raises(ValueError, match=r"no text feature 'bytes'; its texts are (text, title|title, text)"):
        open_(feature="bytes")
    # the same folder, written as TFDS writes without being asked for array_record
    other = tmp_path / "other"
    shutil.copytree(prepared, other)
    record = other / "small_reference" / "1.0.0" / "dataset_info.json"
    record.write_text(record.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(ValueError, match=r"was prepared as tfrecord.*convert_format"):
        open_(data_dir=other)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ImportError, match="pip install tensorflow-datasets"):
        open_()
