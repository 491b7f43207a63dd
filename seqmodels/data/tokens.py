"""The vocabulary of byte-level text: 256 bytes and one token that stands between documents."""

from __future__ import annotations

import numpy as np

# First input of every document, and the target after its last byte.
DOCUMENT = 256
VOCAB_SIZE = 257


def encode(text: str | bytes) -> np.ndarray:
    """The bytes of `text` (UTF-8 where it is a str) as int32 tokens, without a `DOCUMENT` token."""
    data = text.encode() if isinstance(text, str) else text
    return np.frombuffer(data, np.uint8).astype(np.int32)


def decode(tokens: np.ndarray) -> bytes:
    """The bytes that `tokens` stand for; `DOCUMENT` tokens are left out.

    Raises ValueError on a token outside the vocabulary.
    """
    tokens = np.asarray(tokens)
    if tokens.size and (tokens.min() < 0 or tokens.max() >= VOCAB_SIZE):
        raise ValueError(f"tokens lie in [{tokens.min()}, {tokens.max()}]; byte-level ones lie in [0, {DOCUMENT}]")
    return tokens[tokens != DOCUMENT].astype(np.uint8).tobytes()
