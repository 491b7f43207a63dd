"""The training loop: resumable, interruptible, one dispatch ahead of its own bookkeeping."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax

from seqmodels import params
from seqmodels.train.checkpoint import Checkpoints
from seqmodels.train.checks import Continued, Expected, all_finite, check_batch, why_not_finite
from seqmodels.train.config import InitialKind, TrainConfig
from seqmodels.train.files import reported
from seqmodels.train.interrupt import Interrupted, SignalFlag
from seqmodels.train.metrics import MetricsLog, Row, write_curve
from seqmodels.train.optimizer import make_optimizer, schedule
from seqmodels.train.processes import agreed, first_process
from seqmodels.train.progress import TrainProgress
from seqmodels.train.run import RunFolder, as_json
from seqmodels.train.step import (
    Batch,
    Fit,
    Loss,
    Step,
    TrainState,
    begin,
    init_state,
    language_model_loss,
    make_fit,
    make_step,
    on_mesh,
    place,
)
from seqmodels.train.tensorboard import EventFiles, find_writer

# what a resumed run may change: nothing here touches a number that is computed, but for rounding and dropout's draws,
# which depend on the mesh
MESH = tuple(f"train.mesh.{name}" for name in ("type", "data", "fsdp", "sequence"))
FREE = ("train.log_every", "train.checkpoint_every", "train.keep", "train.evaluate_every", *MESH)


class Result(NamedTuple):
    """The trained model, its arrays, the logged rows, the last step, and tokens per second (None if unmeasured)."""

    model: Any
    arrays: dict[str, Any]
    rows: list[Row]
    step: int
    tokens_per_second: float | None


def train(
    model: Any,
    batches: Iterator[Batch],
    config: TrainConfig,
    *,
    workdir: str | Path | None = None,
    record: Mapping[str, Any] | None = None,
    loss: Loss = language_model_loss,
    evaluate: Callable[[dict[str, Any]], Mapping[str, float]] | None = None,
    moments: Mapping[str, Any] | None = None,
    quiet: bool = False,
    tensorboard: bool = False,
) -> Result:
    """Trains `model` on `batches` for `config.steps` steps and returns it anew; the given model keeps its parameters.

    With a `workdir` the run is kept there and goes on from its last checkpoint: `batches` then needs `get_state` and
    `set_state` as grain's iterators have. `record["settings"]` (JSON-able) is what a resumed run must share; the
    training config is always part of it. `evaluate(arrays)` is called every `config.evaluate_every` steps.
    `config.initial` says what rows start from; `moments` (`fit_moments`) are those that fitted noise begins with.
    TensorBoard's files are written under `workdir` where a package for them is installed; with `tensorboard` one has
    to be.

    Raises Interrupted after SIGTERM or Ctrl-C, once the state is saved; FloatingPointError on a loss or parameters that
    are not finite; CannotWrite on a full disk and the like; RunMismatch where the folder holds a run with other
    settings; ValueError where the batches end early or are not what the loss needs.
    """
    if tensorboard and workdir is None:
        raise ValueError("tensorboard needs a workdir to write into")
    writer = find_writer(asked=tensorboard) if workdir is not None else None
    quiet = quiet or not first_process()
    definition, arrays = params.split(model)
    optimizer = make_optimizer(config, params.labels(model))
    starts, initial = begin(model, config, loss, moments)
    placement = place(model, config)
    step = make_step(
        definition,
        optimizer,
        loss=loss,
        learning_rate=schedule(config),
        accumulate=config.accumulate,
        placement=placement,
        starts=starts,
    )
    state = init_state(arrays, optimizer, config.seed, placement, initial)
    fit = make_fit(definition, starts, config.accumulate, placement, given=moments is not None)
    if placement is not None:
        step = on_mesh(step, placement)
    described = getattr(model, "config", None)
    vocabulary = getattr(described, "vocab_size", None)
    expected = Expected(config.batch_size, config.length, vocabulary, getattr(described, "alignment", 1))
    # what a batch holds is known of this library's own loss alone
    continued = Continued() if config.initial.kind == InitialKind.TRUNCATED_BPTT else None
    check_text = functools.partial(check_batch, expected=expected, continued=continued)
    check = check_text if loss is language_model_loss else None
    explain = functools.partial(why_not_finite, vocabulary=vocabulary)
    if not hasattr(batches, "__next__"):
        batches = iter(batches)
    make_run = functools.partial(
        _Run,
        step,
        fit=fit,
        batches=batches,
        config=config,
        evaluate=evaluate,
        check=check,
        explain=explain,
        quiet=quiet,
    )
    if workdir is None:
        return make_run(state=state, log=MetricsLog(None)).result(definition)
    if not (hasattr(batches, "get_state") and hasattr(batches, "set_state")):
        raise TypeError(
            f"{type(batches).__name__} has no get_state and set_state, which resuming needs: pass a grain iterator "
            "(seqmodels.data.make_loader), or no workdir"
        )
    settings = {"train": as_json(config), **({} if described is None else {"model": as_json(described)})}
    settings |= (record or {}).get("settings", {})
    with SignalFlag() as signals, contextlib.ExitStack() as held:
        if first_process():
            held.callback(RunFolder(workdir, {**(record or {}), "settings": settings}, free=FREE).close)
        run_in = functools.partial(make_run, signals=signals)
        return _train_in(Path(workdir), run_in, definition, state, batches, config, writer=writer, quiet=quiet)


def _train_in(
    folder: Path,
    make_run: Callable[..., _Run],
    definition: params.Definition,
    state: TrainState,
    batches: Iterator[Batch],
    config: TrainConfig,
    *,
    writer: Any | None,
    quiet: bool,
) -> Result:
    """Goes on from the folder's last checkpoint, if it has one, and leaves its records whatever happens."""
    checkpoints = Checkpoints(folder / "checkpoints", keep=config.keep)
    try:
        found = checkpoints.restore(state)
        start = 0
        if found is not None:
            state, start = found.state, found.step
            batches.set_state(found.data)  # type: ignore[attr-defined]
            if not quiet:
                print(f"going on from the checkpoint of step {start}", flush=True)
        elif not quiet and (folder / "metrics.jsonl").exists():
            print(f"{folder} has no checkpoint: beginning again with step 1", flush=True)
        if start > config.steps:
            raise ValueError(f"{folder} has already trained {start} steps, more than the {config.steps} asked")
        recording = first_process()
        with MetricsLog(folder / "metrics.jsonl" if recording else None, since=start) as log:
            events = EventFiles(folder / "tensorboard", writer, log.rows) if recording and writer is not None else None
            run = make_run(state=state, log=log, start=start, checkpoints=checkpoints, events=events)
            try:
                return run.result(definition)
            finally:
                if events is not None:
                    events.close()
                if recording:
                    with reported("the curve"):
                        write_curve(log.rows, folder, title=folder.name)
    finally:
        checkpoints.close()


class _Run:
    """One process's share of a run, from the restored step to the last."""

    def __init__(
        self,
        step: Step,
        *,
        fit: Fit,
        state: TrainState,
        batches: Iterator[Batch],
        config: TrainConfig,
        evaluate: Callable[[dict[str, Any]], Mapping[str, float]] | None,
        check: Callable[..., None] | None,
        explain: Callable[[Batch], str],
        log: MetricsLog,
        start: int = 0,
        quiet: bool = False,
        checkpoints: Checkpoints | None = None,
        signals: SignalFlag | None = None,
        events: EventFiles | None = None,
    ) -> None:
        self.step, self.fit, self.state, self.batches, self.config = step, fit, state, batches, config
        self.evaluate, self.check, self.explain = evaluate, check, explain
        self.log, self.events, self.start = log, events, start
        self.checkpoints, self.signals = checkpoints, signals
        tokens = config.batch_size * config.length
        self.progress = TrainProgress(start=start, steps=config.steps, tokens_per_step=tokens, quiet=quiet)

    def result(self, definition: params.Definition) -> Result:
        try:
            self._steps()
        finally:
            self.progress.close()
        arrays = self.state["params"]
        speed = self.progress.tokens_per_second
        return Result(params.merge(definition, arrays), arrays, self.log.rows, self.config.steps, speed)

    def _steps(self) -> None:
        pending: tuple[int, dict[str, Any], Batch] | None = None
        number, signum = self.start, None
        for number in range(self.start + 1, self.config.steps + 1):
            batch = next(self.batches, None)
            if batch is None:
                self._ended_early(number - 1, pending)
            metrics = self._dispatch(number, batch)
            if pending is not None:  # fetched only now, so that the device never waits for this bookkeeping
                self._note(*pending)
            pending = number, metrics, batch
            signum = self._signal()
            stop = signum is not None
            evaluate = self.evaluate is not None and self._due(number, self.config.evaluate_every)
            save = number == self.config.steps or stop or self._due(number, self.config.checkpoint_every)
            if save or evaluate:
                self._note(*pending, evaluate=evaluate)
                pending = None
            if save:
                self._save(number)
            if stop:
                break
        if signum is None:  # it may have come during the last save
            signum = self._signal()
        if signum is not None:
            raise Interrupted(signum, number)

    def _dispatch(self, number: int, batch: Batch) -> dict[str, Any]:
        if self.check is not None:
            self.check(batch, first=number == self.start + 1)
        try:
            self.state, metrics = self.step(self.fit(number - 1, self.state, batch), batch)
        except KeyError as error:
            held = ", ".join(batch) or "nothing"
            raise ValueError(f"the loss looks up {error}, which is not there: the batch holds {held}") from error
        return metrics

    def _ended_early(self, number: int, pending: tuple[int, dict[str, Any], Batch] | None) -> NoReturn:
        if pending is not None:
            self._note(*pending)
        if self.checkpoints is not None and number not in (self.start, *self.checkpoints.steps()):
            self._save(number)
        raise ValueError(
            f"the batches ended after step {number} of {self.config.steps}{self._kept()}: give more of them "
            "(seqmodels.data.make_loader without epochs is endless), or begin a run of fewer train.steps"
        )

    def _save(self, number: int) -> None:
        if self.checkpoints is None:
            return
        with self.progress.paused():
            if not all_finite(self.state["params"]):
                self._stop(f"step {number} left parameters that are not finite", {})
            self.log.sync()
            self.checkpoints.save(number, self.state, self.batches.get_state())  # type: ignore[attr-defined]

    def _stop(self, what: str, batch: Batch) -> NoReturn:
        raise FloatingPointError(f"{what}{self._kept()}; {self.explain(batch)}")

    def _kept(self) -> str:
        if self.checkpoints is None:
            return ""
        steps = self.checkpoints.steps()
        if not steps:
            return " (there is no checkpoint yet)"
        return f" (the checkpoint of step {steps[0]} is kept in {self.checkpoints.folder})"

    def _signal(self) -> int | None:
        """The same in all processes, as soon as one of them has received it: they save and stop together."""
        received = self.signals.received if self.signals is not None else None
        return received if jax.process_count() == 1 else agreed(received)

    @staticmethod
    def _due(number: int, every: int) -> bool:
        return every > 0 and number % every == 0

    def _held_out(self) -> dict[str, float]:
        assert self.evaluate is not None
        with self.progress.paused():
            return {f"heldout_{name}": value for name, value in self.evaluate(self.state["params"]).items()}

    def _note(self, number: int, metrics: Mapping[str, Any], batch: Batch, *, evaluate: bool = False) -> None:
        """Waits for step `number` and writes its row if one is due."""
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self.progress.advance(number)
        if "loss" not in values:
            raise ValueError(f"the loss reports {', '.join(values)}: its metrics need a scalar named loss")
        if not math.isfinite(values["loss"]) or not math.isfinite(values["gradient_norm"]):
            self._stop(
                f"step {number} has loss {values['loss']} and gradient norm {values['gradient_norm']}: "
                "the run stopped there",
                batch,
            )
        if evaluate or number in (1, self.config.steps) or self._due(number, self.config.log_every):
            row: Row = {"step": number, "loss": values.pop("loss"), **values}
            if evaluate:
                row.update(self._held_out())
            if self.progress.tokens_per_second:
                row["tokens_per_second"] = round(self.progress.tokens_per_second, 1)
            self.log.write(row)
            if self.events is not None:
                self.events.write(row)
            self.progress.log(row)
