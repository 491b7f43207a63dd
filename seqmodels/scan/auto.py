"""The one table of what `method="auto"` runs, by platform, family, kind of recurrence and length."""

from __future__ import annotations

from typing import NamedTuple

import jax

METHODS = ("auto", "sequential", "associative", "chunked", "tree")


class Rule(NamedTuple):
    """The first rule that fits decides; None fits everything."""

    method: str
    platform: str | None = None
    family: str | None = None
    matmul_form: bool | None = None  # whether the recurrence has both fold and emit
    max_length: int | None = None


# Measured with jax 0.10.2 on 2 CPU cores; the rows of other platforms follow from depth: a token at a time leaves an
# accelerator idle, and an associative scan compiles slowly and holds one element per token.
RULES = (
    Rule("sequential", max_length=4),
    Rule("sequential", platform="cpu", family="diagonal"),
    Rule("sequential", platform="cpu", family="selective"),
    Rule("sequential", platform="cpu", family="softmax"),
    Rule("chunked", matmul_form=True),
    Rule("sequential", platform="cpu"),
    Rule("associative", max_length=64),
    Rule("chunked"),
)


def choose(*, matmul_form: bool, length: int, family: str | None = None, platform: str | None = None) -> str:
    """The method for an associative recurrence of this kind and length; the platform defaults to jax's own."""
    platform = platform or jax.default_backend()
    for rule in RULES:
        fits = (
            rule.platform in (None, platform)
            and rule.family in (None, family)
            and rule.matmul_form in (None, matmul_form)
            and (rule.max_length is None or length <= rule.max_length)
        )
        if fits:
            return rule.method
    raise AssertionError("the last rule fits everything")
