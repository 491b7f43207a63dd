"""Byte-level text: documents, packed batches whose iterator can be saved, and the codes that a model has to beat."""

from seqmodels.data.compression import baselines
from seqmodels.data.corpora import documents
from seqmodels.data.loader import evaluation_batches, evaluation_streams, make_loader
from seqmodels.data.stream import make_stream_loader, token_rows
from seqmodels.data.text import Counts, Document, counts
from seqmodels.data.tfds import TFDSDocuments
from seqmodels.data.tokens import DOCUMENT, VOCAB_SIZE, decode, encode

__all__ = [
    "DOCUMENT",
    "VOCAB_SIZE",
    "Counts",
    "Document",
    "TFDSDocuments",
    "baselines",
    "counts",
    "decode",
    "documents",
    "encode",
    "evaluation_batches",
    "evaluation_streams",
    "make_loader",
    "make_stream_loader",
    "token_rows",
]
