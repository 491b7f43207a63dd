"""What the commands share: presets and flags from the command line, runs from their folder, errors as one line."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import tyro

from experiments.presets import PRESETS, Experiment
from seqmodels.host import keep_freed_memory
from seqmodels.train.interrupt import Interrupted
from seqmodels.train.run import as_json, differences, read_record

TRAIN = "python -m experiments.train"


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """Shortcuts; every field of the experiment has a flag of its own as well."""

    experiment: Annotated[Experiment, tyro.conf.arg(name="")]
    workdir: Path | None = None
    """Folder of the run, runs/PRESET by default. A run that is already there goes on."""
    steps: int | None = None
    """Same as --train.steps."""
    seed: int | None = None
    """Same as --train.seed."""
    log_every: int | None = None
    """Same as --train.log-every."""
    checkpoint_every: int | None = None
    """Same as --train.checkpoint-every."""
    tensorboard: bool = False
    """Insist on TensorBoard's files; otherwise they are written where tensorboardX is installed."""

    def resolved(self) -> Experiment:
        """The experiment with the shortcuts put in."""
        names = ("steps", "seed", "log_every", "checkpoint_every")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return dataclasses.replace(self.experiment, train=dataclasses.replace(self.experiment.train, **given))


@dataclasses.dataclass(frozen=True)
class Run:
    """An experiment, and how the command line spelled it."""

    preset: str
    overrides: tuple[str, ...]
    experiment: Experiment
    tensorboard: bool = False

    @property
    def record(self) -> dict[str, Any]:
        """For the run folder: enough to build the experiment again, and all of it resolved."""
        settings = {
            field.name: as_json(getattr(self.experiment, field.name)) for field in dataclasses.fields(Experiment)
        }
        return {"preset": self.preset, "overrides": list(self.overrides), "settings": settings}


def fail(message: str, code: int = 2) -> NoReturn:
    """Ends the process with one line on stderr."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


def about(preset: Callable[[], Experiment]) -> str:
    """The first line of a preset's docstring."""
    return (inspect.getdoc(preset) or "").split("\n")[0]


def usage() -> str:
    width = max(map(len, PRESETS))
    lines = [f"  {name:<{width}}  {about(preset)}" for name, preset in PRESETS.items()]
    return "\n".join(
        [f"usage: {TRAIN} PRESET [FLAGS]      ({TRAIN} PRESET --help lists the flags)", "", "presets:", *lines]
    )


def parse_train(arguments: Sequence[str]) -> tuple[Run, Path]:
    """The run and its folder from `PRESET [FLAGS]`; prints help and ends the process where that is asked for."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        sys.exit(0 if arguments else 2)
    name, *flags = arguments
    if name.startswith("-"):
        fail(f"the preset comes first: {TRAIN} PRESET {' '.join(arguments)}; presets are {', '.join(PRESETS)}")
    preset = _preset(name)
    options: TrainOptions = tyro.cli(
        TrainOptions,
        prog=f"{TRAIN} {name}",
        description=inspect.getdoc(preset),
        args=flags,
        default=TrainOptions(preset()),
        # a union whose default is given has flags like any other field instead of subcommands
        config=(tyro.conf.AvoidSubcommands,),
    )
    run = Run(name, _without_workdir(flags), options.resolved(), options.tensorboard)
    return run, options.workdir or Path("runs") / name


def _preset(name: str) -> Callable[[], Experiment]:
    if name in PRESETS:
        return PRESETS[name]
    near = difflib.get_close_matches(name, PRESETS, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    fail(f"there is no preset {name!r}: {hint}presets are {', '.join(PRESETS)}")


def _without_workdir(flags: Sequence[str]) -> tuple[str, ...]:
    """A folder may be moved, so where it was is no part of what it holds."""
    kept, skip = [], False
    for flag in flags:
        if skip:
            skip = False
        elif flag == "--workdir":
            skip = True
        elif not flag.startswith("--workdir="):
            kept.append(flag)
    return tuple(kept)


def load_run(folder: str | Path) -> Run:
    """The run that a folder holds, built again from its preset and flags.

    Raises FileNotFoundError where there is none, ValueError where the preset has changed since.
    """
    record = read_record(folder)
    if record is None:
        raise FileNotFoundError(
            f"{folder} holds no run (no config.json): train one with {TRAIN} PRESET --workdir {folder}"
        )
    if "preset" not in record:
        raise ValueError(f"{folder} holds a run that was not started by {TRAIN}")
    run, _ = parse_train([record["preset"], *record["overrides"]])
    changed = differences(record["settings"], run.record["settings"])
    if changed:
        raise ValueError(
            f"the preset {run.preset} has changed since {folder} was trained ({'; '.join(changed)}): "
            "check out the commit that its environment.json names"
        )
    return run


def guarded(main: Callable[[Sequence[str]], None]) -> None:
    """Runs `main(arguments)`; errors that a user can act on become one line and a status, signals their own."""
    keep_freed_memory()
    signal.signal(signal.SIGTERM, lambda signum, _: sys.exit(128 + signum))  # while training, the loop saves first
    # a warning to the user needs no place in the source; the others are for developers and keep theirs
    formatted = warnings.formatwarning
    warnings.formatwarning = lambda message, category, *rest: (
        f"warning: {message}\n" if category is UserWarning else formatted(message, category, *rest)
    )
    try:
        main(sys.argv[1:])
    except Interrupted as stopped:
        print(f"\n{stopped}", file=sys.stderr)
        sys.exit(stopped.code)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has gone, as with `| head`
        sys.stderr.close()
        sys.exit(141)
    except (ValueError, OSError, FloatingPointError) as error:
        fail(str(error), 1)
