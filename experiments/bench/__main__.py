"""`python -m experiments.bench [scan|decode|compile|step|training|peers|kernels|memory ...] [--quick] [--out FILE]`;
the first four where none is named. `training` times steps of whole models, `peers` compares some with transformers, for
which it needs the extra `parity`, `kernels` are the hot scans at the shapes of real models, with a report beside FILE,
and `memory` compiles scans with their gradients, and training steps, to see what a token takes. What fails among
kernels is noted, named at the end, and makes the status 1.

Each implementation is checked against its oracle before it is timed. Rows are appended to FILE as JSON lines, each with
the command, commit, versions and device.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tyro

from experiments.command import fail, guarded

Name = Literal["scan", "decode", "compile", "step", "training", "peers", "kernels", "memory"]


@dataclasses.dataclass(frozen=True)
class Options:
    what: Annotated[tuple[Name, ...], tyro.conf.Positional] = ("scan", "decode", "compile", "step")
    """Which parts to run."""
    quick: bool = False
    """Small sizes, to see that everything runs; the figures mean nothing."""
    out: Path | None = None
    """JSON lines, one a measurement; later runs are added. runs/bench.jsonl, or runs/kernels.jsonl of kernels."""
    seed: int = 0
    shapes: tuple[str, ...] = ()
    """Of kernels: only families and shapes that contain one of these, as "delta" or "4x2048x16x128"."""
    peer: Literal["fla"] | None = None
    """Of kernels: those of flash-linear-attention and mamba-ssm beside ours, where one of them, torch and a CUDA device
    are."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of kernels: the type of queries, keys and values; bfloat16 but on CPUs."""
    report_only: bool = False
    """Of kernels: measure nothing, write the report of the rows in FILE anew."""


def _cells(row: dict[str, Any]) -> dict[str, str]:
    seconds = row.get("seconds")
    named = [str(row[name]) for name in ("direction", "implementation", "context", "layers") if name in row]
    milliseconds = lambda name: f"{1e3 * seconds[name]:.3g}" if seconds else ""
    optional = lambda name, form: form.format(row[name]) if row.get(name) is not None else ""
    return {
        "case": row["case"],
        "what": " ".join(named),
        "ms": milliseconds("median"),
        "quartiles": f"{milliseconds('low')} to {milliseconds('high')}" if seconds else "",
        "compile s": optional("compile_seconds", "{:.2f}"),
        "peak MB": f"{row['peak_bytes'] / 1e6:.1f}" if row.get("peak_bytes") else "",
        "state bytes": optional("state_bytes", "{:,}"),
        "tokens/s": optional("tokens_per_second", "{:,.0f}"),
        "share": f"{100 * row['share']:.0f} %" if "share" in row else "",
        "error": optional("error", "{:.0e}"),
    }


class Part(NamedTuple):
    rows: Callable[..., Iterator[dict[str, Any]]]
    verdicts: Callable[[list[dict[str, Any]]], Iterator[str]]
    cells: Callable[[dict[str, Any]], dict[str, str]] = _cells


def parts(options: Options | None = None) -> dict[str, Part]:
    from experiments.bench import kernels, kernels_report, memory, models, peers, scans, training

    options = options or Options()
    given = {"shapes": options.shapes, "peer": options.peer, "dtype": options.dtype}

    return {
        "scan": Part(scans.rows, scans.verdicts),
        "decode": Part(models.decode_rows, models.decode_verdicts),
        "compile": Part(models.compile_rows, models.compile_verdicts),
        "step": Part(models.step_rows, models.step_verdicts),
        "training": Part(training.rows, training.verdicts, training.cells),
        "peers": Part(peers.rows, peers.verdicts),
        "kernels": Part(functools.partial(kernels.rows, **given), kernels_report.verdicts, kernels_report.cells),
        "memory": Part(memory.rows, memory.verdicts, memory.cells),
    }


def main(arguments: Sequence[str]) -> None:
    options = tyro.cli(Options, prog="python -m experiments.bench", description=__doc__, args=arguments)

    if options.report_only:
        if options.what != ("kernels",):
            raise ValueError(f"--report-only is for kernels, not for {' '.join(options.what)}")
        return _report(_out("kernels", options))
    if "kernels" in options.what:
        _a_device_a_core()
    from experiments.bench.measure import rates
    from seqmodels.train.run import environment

    record = {**environment(), "seed": options.seed, "quick": options.quick, "rates": rates()._asdict()}
    print(
        f"{record['device']}; a copy moves {rates().copy / 1e9:.1f} GB/s, a product {rates().product / 1e9:.0f} Gop/s"
    )
    failed = []
    for name in options.what:
        out = _out(name, options)
        out.parent.mkdir(parents=True, exist_ok=True)
        part, found = parts(options)[name], []
        with out.open("a") as file:
            for row in part.rows(quick=options.quick, seed=options.seed):
                print(f"  {shown(part.cells(row))}", flush=True)
                file.write(json.dumps({"bench": name, **row, **record}) + "\n")
                file.flush()
                found.append(row)
        print(table(name, found))
        print("\n".join(part.verdicts(found)), flush=True)
        if name == "kernels":
            _report(out)
        print(f"rows: {out}")
        failed += [row for row in found if row.get("failed")]
    if failed:
        told = (f"{row['family']} {row['shape']}, {row['implementation']}: {row['note']}" for row in failed)
        fail("\n  ".join([f"{len(failed)} failed", *told]), 1)


def _out(name: str, options: Options) -> Path:
    return options.out or Path("runs") / ("kernels.jsonl" if name == "kernels" else "bench.jsonl")


def _report(out: Path) -> None:
    from experiments.bench.kernels_report import write

    print(f"written: {', '.join(map(str, write(out)))}")


def _a_device_a_core() -> None:
    """Lets jax see every core of a CPU as a device, unless it has begun already."""
    import jax

    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", os.cpu_count() or 1)


def shown(cells: dict[str, str]) -> str:
    """One line while the rest is still running."""
    return ", ".join(value for value in cells.values() if value)


def table(name: str, found: list[dict[str, Any]]) -> str:
    """Markdown, without the columns that are empty."""
    cells = [parts()[name].cells(row) for row in found]
    columns = [column for column in cells[0] if any(row[column] for row in cells)]
    words = {"case", "what", "quartiles", "family", "shape", "implementation", "note", "floor of"}
    lines = [columns, ["---" if column in words else "---:" for column in columns]]
    lines += [[row[column] for column in columns] for row in cells]
    return f"\n{name}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


if __name__ == "__main__":
    guarded(main)
