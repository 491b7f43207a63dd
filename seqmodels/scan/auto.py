"""The one table of what `method="auto"` runs, by device, family, kind of recurrence, length, sizes and type."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import numpy as np

from seqmodels import compat

METHODS = ("auto", "sequential", "associative", "chunked", "tree")


class Rule(NamedTuple):
    """The first rule that fits decides; None fits everything."""

    method: str
    platform: str | None = None
    family: str | None = None
    matmul_form: bool | None = None  # whether the recurrence has both fold and emit
    max_length: int | None = None
    min_length: int | None = None
    device: str | None = None  # a regular expression that is found in the device's kind, as "H100" in "NVIDIA H100"
    sizes: tuple[tuple[int, ...], ...] | None = None  # of keys and values; or of channels, and what each of them holds
    dtypes: tuple[str, ...] | None = None  # of what is scanned


# Kernels come first, by what was measured on a device of their kind (`python -m experiments.bench kernels`), a row as
# Rule("pallas", device=r"\bH100\b", family="outer", sizes=((128, 128),), dtypes=("bfloat16",), min_length=1024).
# Families are as in `operators/kernels.py`. None was measured yet: there is no row, and `auto` takes no kernel.
KERNELS: tuple[Rule, ...] = ()

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


def choose(
    *,
    matmul_form: bool,
    length: int,
    family: str | None = None,
    platform: str | None = None,
    device: str = "",
    sizes: tuple[int, ...] | None = None,
    dtype: Any = None,
) -> str:
    """The method for an associative recurrence of this kind and length; the platform defaults to jax's own.

    "pallas" is chosen only for a `device`, the kind of device that the program is made for.
    """
    platform = platform or compat.device().platform
    for rule in (KERNELS if device else ()) + RULES:
        fits = (
            rule.platform in (None, platform)
            and rule.family in (None, family)
            and rule.matmul_form in (None, matmul_form)
            and (rule.max_length is None or length <= rule.max_length)
            and (rule.min_length is None or length >= rule.min_length)
            and (rule.device is None or re.search(rule.device, device) is not None)
            and (rule.sizes is None or sizes in rule.sizes)
            and (rule.dtypes is None or np.dtype(dtype).name in rule.dtypes)
        )
        if fits:
            return rule.method
    raise AssertionError("the last rule fits everything")
