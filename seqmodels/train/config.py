"""What a training run is, apart from the model and the text."""

from __future__ import annotations

import dataclasses
import enum


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many devices divide what; no number that is computed depends on it, up to rounding."""

    data: int = 1  # rows of a batch; -1: as many devices as there are
    fsdp: int = 1  # rows, and parameters with their moments
    sequence: int = 1  # time

    def __post_init__(self) -> None:
        for name in ("fsdp", "sequence"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.mesh.{name} is {getattr(self, name)}; it has to be at least 1")
        if self.data < 1 and self.data != -1:
            raise ValueError(f"train.mesh.data is {self.data}; it has to be at least 1, or -1 for all devices")


class InitialKind(enum.StrEnum):
    """What the rows of a batch start from: see `InitialState`."""

    ZEROS = "zeros"
    NOISE = "noise"
    FITTED_NOISE = "fitted_noise"
    STATE_PASSING = "state_passing"
    TRUNCATED_BPTT = "truncated_bptt"


@dataclasses.dataclass(frozen=True)
class InitialState:
    """The state h_{-1} that the first document of every row starts from (arXiv 2507.02782); later ones start fresh.

    `zeros`: none. `noise`: the recurrent memory of all layers, IID N(0, std^2); the paper's std is not known here, and
    1 is the size of the states that it shows. `fitted_noise`: N(mean, std^2) of each layer's and head's memory at the
    end of training rows that were begun from zeros. `state_passing`: the memory at the end of another row of the batch
    before, never of the same row (but in batches of one). `truncated_bptt`: the whole state at the end of the same row
    of the batch before, whose text this batch goes on with (`seqmodels.data.make_stream_loader`). No gradient flows
    into any of them. Each mixer declares what of its state is memory (`seqmodels.typing.Memory`), and the rest starts
    fresh, but under `truncated_bptt`.

    `probability`: of a row to start from that state; the others start from zeros. `refresh`: steps from one fit of
    `fitted_noise` to the next, each to the batch of its step; 0 for a single one, at the first step, and for none where
    `train` is given moments.
    """

    kind: InitialKind = InitialKind.ZEROS
    std: float = 1.0
    probability: float = 1.0
    refresh: int = 100

    def __post_init__(self) -> None:
        if self.kind not in list(InitialKind):
            raise ValueError(f"train.initial.kind is {self.kind!r}; choose one of {', '.join(InitialKind)}")
        if not 0 < self.std < float("inf"):
            raise ValueError(f"train.initial.std is {self.std}; it has to be positive (kind zeros starts from zeros)")
        if not 0 < self.probability <= 1:
            raise ValueError(f"train.initial.probability is {self.probability}; it has to be in (0, 1]")
        if self.probability < 1 and self.kind in (InitialKind.ZEROS, InitialKind.TRUNCATED_BPTT):
            raise ValueError(
                f"train.initial.probability is {self.probability} and train.initial.kind {self.kind}: leave it at 1, "
                "or choose noise, fitted_noise or state_passing, where single rows may start from zeros"
            )
        if self.refresh < 0:
            raise ValueError(f"train.initial.refresh is {self.refresh}; it cannot be negative, and 0 fits once")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Optimisation, logging and checkpoints of one run.

    The learning rate rises linearly over `warmup` steps and falls along a cosine to `final_fraction` of its peak at
    `steps`; raising `steps` of an existing run stretches the cosine from there on.
    """

    steps: int = 1000
    batch_size: int = 16
    length: int = 256
    learning_rate: float = 3e-3
    warmup: int = 50
    final_fraction: float = 0.1
    weight_decay: float = 0.1
    clip: float = 1.0
    betas: tuple[float, float] = (0.9, 0.95)
    dynamics_rate: float = 1.0  # learning rate of decays and step sizes, as a multiple of `learning_rate`
    seed: int = 0
    log_every: int = 10
    checkpoint_every: int = 100
    keep: int = 2  # checkpoints left on disk
    evaluate_every: int = 0  # 0: only at the end
    accumulate: int = 1  # parts of a batch whose gradients are taken one after the other, to save memory
    mesh: MeshConfig = MeshConfig()
    initial: InitialState = InitialState()

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "length", "log_every", "checkpoint_every", "keep", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name} is {getattr(self, name)}; it has to be at least 1")
        for name in ("learning_rate", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"train.{name} is {getattr(self, name)}; it has to be positive")
        for name in ("warmup", "weight_decay", "dynamics_rate", "final_fraction", "evaluate_every", "seed"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"train.{name} is {getattr(self, name)}; it cannot be negative")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"train.batch_size {self.batch_size} cannot be divided into train.accumulate {self.accumulate} parts"
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"train.betas are {self.betas}; both have to be in [0, 1)")
