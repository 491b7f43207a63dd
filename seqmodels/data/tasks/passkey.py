"""Passkey retrieval: a number hidden in text that repeats itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from seqmodels.data.tasks.base import Row, Task
from seqmodels.data.tokens import VOCAB_SIZE, encode

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
NEEDLE = "The pass key is {key}. Remember it. "
QUESTION = "What is the pass key? The pass key is "


@dataclasses.dataclass(frozen=True)
class Passkey(Task):
    """`filler, "The pass key is 12345. Remember it.", filler, "What is the pass key? The pass key is 12345"`, in bytes.

    Mohtashami and Jaggi (2305.16300), whose filler sentences these are [MEM]; asked of recurrences by length and depth
    in 2507.02782, whose exact words are not known here. `length` positions hold all but the last digit; `depth` is the
    share of the filler that stands before the needle, None for a uniform one in each row. All `digits` are uniform and
    scored. Metric: the share of keys without a wrong digit.
    """

    length: int = 2048
    depth: float | None = None
    digits: int = 5
    test_depth: float = 0.5

    metric: ClassVar[str] = "sequence_accuracy"

    def __post_init__(self) -> None:
        if self.digits < 1 or any(depth is not None and not 0 <= depth <= 1 for depth in (self.depth, self.test_depth)):
            raise ValueError(
                f"digits {self.digits}, depth {self.depth}, test_depth {self.test_depth}: a key has at least one "
                "digit, and a depth is between 0 (the beginning) and 1 (right before the question), or None"
            )
        if self.length < (least := self.spell("0" * self.digits, 0.0, filler=0).tokens.size):
            raise ValueError(
                f"length is {self.length}; a key of {self.digits} digits and its question take {least} positions"
            )

    @property
    def vocab_size(self) -> int:
        return VOCAB_SIZE

    def encode(self, text: str) -> Sequence[int] | np.ndarray:
        """A piece of the text as tokens; pieces are encoded one by one."""
        return encode(text)

    def asked(self, key: str) -> tuple[Sequence[int] | np.ndarray, Sequence[int] | np.ndarray]:
        """The tokens of the question, and those of the key after it."""
        return self.encode(QUESTION), self.encode(key)

    def evaluation(self) -> Passkey:
        return dataclasses.replace(self, depth=self.test_depth)

    def sample(self, generator: np.random.Generator) -> Row:
        key = "".join(str(digit) for digit in generator.integers(0, 10, self.digits))
        depth = generator.uniform() if self.depth is None else self.depth
        return self.spell(key, depth)

    def spell(self, key: str, depth: float, *, filler: int | None = None) -> Row:
        """The row of this key; `filler`: tokens of it, by default as many as fill the row."""
        needle, (question, answer) = self.encode(NEEDLE.format(key=key)), self.asked(key)
        if filler is None:
            filler = self.length + 1 - len(needle) - len(question) - len(answer)
        before = round(depth * filler)
        text = np.resize(np.asarray(self.encode(FILLER), np.int32), filler)
        whole = np.concatenate([text[:before], needle, text[before:], question, answer]).astype(np.int32)
        scored = np.arange(len(whole) - 1) >= len(whole) - 1 - len(answer)
        return Row(whole[:-1], whole[1:], scored)
