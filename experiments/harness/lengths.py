"""Cells that train a model at a short length, go on from other initial states, and measure it far beyond (2507.02782).

A base is trained once for all cells of a seed and kept beside their folders; the first cell that needs it trains it,
others wait for that, and a cell that was stopped goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from experiments.harness.rows import settings
from experiments.harness.table import Curve, Outcome, Work
from experiments.harness.tasks import CHECKPOINTS, Counted
from experiments.harness.text import Encode, Text, Windows, read_text, spread_rows
from seqmodels.models.lm import ModelConfig
from seqmodels.train.config import InitialKind, TrainConfig

NEAR, SHORT = 4, 64  # training lengths that most and that many rows are read to; beyond, one long row
REMEMBRANCE = 16  # training lengths of the rows that remembrance is taken of
BACK = (12, 8, 4, 2, 1, 0.5, 0.25)  # training lengths from a row's end, from where the text is cut off


class Base(NamedTuple):
    """A model before its post-training, the text that goes with it, and how that became tokens (None: as bytes)."""

    model: Any
    text: Text
    loss: Curve | None = None
    encode: Encode | None = None


@dataclasses.dataclass(frozen=True)
class Trained:
    """A model trained from scratch on a corpus in bytes, its rows from zeros."""

    model: ModelConfig
    train: TrainConfig
    corpus: str

    def get(self, work: Work) -> Base:
        from flax import nnx

        text = read_text(self.corpus)
        digest = hashlib.sha256(json.dumps(settings(self)).encode()).hexdigest()[:8]
        folder = work.folder.parent / f"base-{work.seed}-{digest}"
        model = self.model.make(rngs=nnx.Rngs(work.seed))
        with locked(folder.with_suffix(".lock")):
            model, loss = _trained(model, text, self.train, work, folder)
        return Base(model, text, loss)


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """The model in a Hugging Face folder with its tokenizer; bytes are its tokens where it has none.

    `directory` is where the folder `name` is on this machine, and no setting: rows are compared without it.
    """

    name: str
    corpus: str
    directory: str = dataclasses.field(default="", compare=False)

    def get(self, work: Work) -> Base:
        from seqmodels.data import VOCAB_SIZE
        from seqmodels.hf import load_pretrained

        if not self.directory:
            raise ValueError(f"the weights of {self.name} are needed: --checkpoint DIR/{self.name}, a folder with them")
        model, tokenizer = load_pretrained(self.directory)
        vocabulary = model.config.vocab_size
        if tokenizer is None and vocabulary < VOCAB_SIZE:
            raise ValueError(
                f"{self.directory} has no tokenizer that could be read, and {vocabulary} tokens, fewer than the "
                f"{VOCAB_SIZE} that bytes need: put its tokenizer.json there (and pip install tokenizers)"
            )
        encode = None if tokenizer is None else lambda text: tokenizer.encode(text, add_special_tokens=False).ids
        return Base(model, read_text(self.corpus, encode), encode=encode)


@dataclasses.dataclass(frozen=True)
class LengthRun:
    """A base, `post` more steps of it where they are given, and what it does up to `longest` tokens.

    `length`: the base's training length, in whose multiples all is measured. `rows` held-out rows are read to `SHORT`
    times that, more in proportion to `NEAR` times, one row to `longest`, or to the text's end where that is less.
    """

    base: Trained | Pretrained
    length: int
    longest: int
    post: TrainConfig | None = None
    rows: int = 32

    def run(self, work: Work) -> Outcome:
        from seqmodels import params

        model, text, loss, _ = self.base.get(work)
        if self.post is not None:
            model, loss = _trained(model, text, self.post, work, work.folder / "train")
        metrics, curves = measure(model, text.heldout, length=self.length, longest=self.longest, rows=self.rows)
        if loss is not None:
            curves = {**curves, "training": loss}
        return Outcome({**metrics, "parameters": params.count(model)}, curves)


def _trained(model: Any, text: Text, config: TrainConfig, work: Work, folder: Path) -> tuple[Any, Curve]:
    from seqmodels.train import train

    config = for_run(config, work.seed)
    batches = Windows(
        text.train,
        batch_size=config.batch_size,
        length=config.length,
        seed=config.seed,
        consecutive=config.initial.kind == InitialKind.TRUNCATED_BPTT,
    )
    result = train(model, Counted(batches, work.report, config.steps), config, workdir=folder, quiet=True)
    return result.model, {name: [row[name] for row in result.rows] for name in ("step", "loss")}


def for_run(config: TrainConfig, seed: int) -> TrainConfig:
    """A training of a cell: its rows of metrics and checkpoints in proportion to its steps."""
    every = max(1, config.steps // CHECKPOINTS)
    log = max(1, config.steps // 100)
    return dataclasses.replace(config, seed=seed, log_every=log, checkpoint_every=every, keep=1)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Held by one process at a time; the system frees it when that ends, however it does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def measure(
    model: Any, heldout: np.ndarray, *, length: int, longest: int, rows: int
) -> tuple[dict[str, float], dict[str, Curve]]:
    """Loss, remembrance and size of the state against position, and their values at multiples of `length`.

    The loss at a position is the mean over the second half of the positions up to there. `loss_1x` is at the training
    length, `loss_last` over the second half of the longest row, `loss_afresh` in the same text where the model knows no
    more of it than in training, and `rise` what lies between the two: what harm the longer past does. `remembrance` is
    that of what lies more than four training lengths back.
    """
    last = min(longest, len(heldout) - 1)
    positions, losses = _losses(model, heldout, length=length, last=last, rows=rows)
    at = dict(zip(positions, losses, strict=True))
    metrics = {f"loss_{k}x": at[k * length] for k in (1, 8, 16, 64) if k * length in at}
    begin, end = [length // 2, *positions][-2:]
    afresh = _afresh(model, heldout[begin - length // 2 : end + 1], length=length, rows=rows)
    metrics |= {"loss_last": losses[-1], "loss_afresh": afresh, "rise": losses[-1] - afresh, "last": last}
    if 16 * length in at:
        metrics["perplexity_16x"] = float(np.exp(at[16 * length]))
    curves: dict[str, Curve] = {"loss": {"position": positions, "loss": losses}}

    span = min(REMEMBRANCE * length, len(heldout))
    metrics["remembrance"], curves["remembrance"] = _remembrance(
        model, spread_rows(heldout, rows=rows, length=span), length
    )
    state = _state(model, spread_rows(heldout, rows=rows, length=min(SHORT * length, last)), length)
    if state is not None:
        curves["state"] = state
        of = dict(zip(state["position"], state["std"], strict=True))
        metrics |= {f"std_{k}x": of[k * length] for k in (1, 8) if k * length in of}
    return metrics, curves


def _edges(first: int, last: int) -> list[int]:
    """`first` doubled up to `last`."""
    edges = [first]
    while 2 * edges[-1] <= last:
        edges.append(2 * edges[-1])
    return edges if edges[-1] == last or last < 1.5 * edges[-1] else [*edges, last]


def _losses(model: Any, heldout: np.ndarray, *, length: int, last: int, rows: int) -> tuple[list[int], list[float]]:
    from seqmodels.train import loss_by_position
    from seqmodels.train.length import CHUNK

    def read(tokens: np.ndarray, edges: list[int]) -> list[float]:
        # a PSM goes on from a state token by token
        chunk = tokens.shape[1] - 1 if model.config.alignment > 1 else CHUNK
        return loss_by_position(model, tokens, edges=edges, chunk=chunk).loss.tolist()

    positions: list[int] = []
    losses: list[float] = []
    first = length // 2
    for most, many in ((NEAR, rows * SHORT // NEAR), (SHORT, rows), (last, 1)):
        edges = _edges(first, min(most * length, last))
        if len(edges) > 1:
            tokens = (
                heldout[None, : edges[-1] + 1] if many == 1 else spread_rows(heldout, rows=many, length=edges[-1] + 1)
            )
            positions, losses, first = positions + edges[1:], losses + read(tokens, edges), edges[-1]
    return positions, losses


def _afresh(model: Any, tokens: Int[np.ndarray, " T+1"], *, length: int, rows: int) -> float:
    """The loss of tokens, all but the first half of a training length, each with a half to a whole of one before it."""
    from seqmodels.train import loss_by_position

    half = length // 2
    starts = np.arange(0, len(tokens) - length, half)
    batch = min(len(starts), rows * SHORT // NEAR)
    starts = starts[: len(starts) // batch * batch]  # whole batches: one program
    windows = tokens[starts.reshape(-1, batch)[..., None] + np.arange(length + 1)]
    found = [loss_by_position(model, piece, edges=[half, length], chunk=length).loss[0] for piece in windows]
    return float(np.mean(found))


def _remembrance(model: Any, tokens: Int[np.ndarray, "B T"], length: int) -> tuple[float, Curve]:
    from seqmodels.train import effective_remembrance

    align, span = model.config.alignment, tokens.shape[1]
    starts = sorted({max(span - round(k * length), 0) // align * align for k in BACK})
    found = effective_remembrance(model, tokens, starts).mean(axis=0).tolist()
    back = [span - start for start in starts]
    four = min(range(len(back)), key=lambda i: abs(back[i] - 4 * length))
    return found[four], {"back": back, "remembrance": found}


def _state(model: Any, tokens: Int[np.ndarray, "B T"], length: int) -> Curve | None:
    """The std of the recurrent memory, as the root mean square over layers; None for a model without any."""
    from seqmodels.models.memory import Role, described
    from seqmodels.train.length import state_statistics

    if not any(leaf.role == Role.MEMORY for leaf in described(model).values()):
        return None
    positions = _edges(max(length // 4, 1), tokens.shape[1])
    found = state_statistics(model, tokens, positions)
    std = np.concatenate([one.std for one in found.values()], axis=1)
    return {"position": positions, "std": np.sqrt(np.mean(np.square(std), axis=1)).tolist()}
