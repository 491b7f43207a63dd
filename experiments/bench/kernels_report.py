"""The report of `python -m experiments.bench kernels`: Markdown and a plot beside the rows."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.bench import memory
from experiments.bench.kernels_cases import cases

Row = dict[str, Any]
FLOORS = {"product": "a product's rate", "copy": "a copy's rate"}


def write(path: Path) -> list[Path]:
    """From the rows in `path`, the latest of each kind: `path` with the suffixes .md and .png.

    What tokens take is told, too, where rows of `memory` lie beside them as memory-`path`.
    """
    from experiments.bench.__main__ import table

    rows = [two_floors(row) for row in latest([json.loads(line) for line in path.read_text().splitlines()])]
    runs = list(dict.fromkeys(run_of(row) for row in rows))
    rows = [{**row, "run": str(runs.index(run_of(row)) + 1)} for row in rows]
    timed = [row for row in rows if "note" not in row]
    listed = lambda lines: "".join(f"- {line}\n" for line in lines) or "- none\n"
    text = f"""# Kernels

{devices_without(timed)}
Times beside two floors: the products with the state over the measured rate of products, and what has to be read and
written over that of a copy. The larger one counts, and is named. With gradients: the forward pass and gradients of all
inputs; products and bytes are three times the forward ones. Where every token needs an exponential for each channel or
entry of its state, what they take at the measured rate of those in registers stands beside, and is no floor.
Pairs are forward / with gradients. Peaks are what a compiled program needs, arguments included. Errors are on one head
of the longest document, against a loop over tokens in float64, relative to an array's largest entry. Differences are
those of outputs, final states and gradients of all inputs from the first XLA form that passed, which has none itself,
relative to the largest entry of their row and head. Implementations are compared within one run alone, and a shape has
the rows of the newest run that took it.

Runs:

{listed(f"{number}: {origin([row for row in rows if run_of(row) == run])}" for number, run in enumerate(runs, 1))}
What the best of ours reaches, forward and with gradients:

{listed(verdicts(timed))}{table("kernels", timed).replace("kernels", "", 1) if timed else ""}
Left out, or failed:

{listed(left_out(rows))}
Not run, of the full list:

{listed(not_run(rows))}
{memory_a_token(path.with_name(f"memory-{path.name}"))}![times the floor]({path.with_suffix(".png").name})
"""
    path.with_suffix(".md").write_text(text)
    plot(timed, path.with_suffix(".png"))
    return [path.with_suffix(".md"), path.with_suffix(".png")]


def devices_without(timed: list[Row]) -> str:
    """Says in bold of which kinds of device there is no figure."""
    there = {row["device"].split()[0].upper().replace("CUDA", "GPU") for row in timed}
    missing = [name for name in ("GPU", "TPU") if name not in there]
    return f"**No {' or '.join(missing)} figure was taken.**\n" if missing else ""


def device_kind(row: Row) -> str:
    """Without the number of devices, which is a setting on CPUs."""
    return row.get("device", "").rsplit(" x ", 1)[0]


def group_of(row: Row) -> tuple[str, ...]:
    """What can be compared, within a run."""
    return device_kind(row), row["dtype"], row["family"], row["shape"]


def run_of(row: Row) -> tuple[str, ...]:
    return tuple(str(row.get(name)) for name in ("device", "time", "command", "commit"))


def began(row: Row) -> datetime.datetime:
    return datetime.datetime.fromisoformat(row["time"])


def origin(rows: list[Row]) -> str:
    """Where the rows of a run come from, and the rates that their floors were computed with."""
    row, machine = rows[0], next((row for row in rows if "note" not in row), None)
    versions, rates = row["versions"], ""
    if machine is not None:
        rates = (
            f" a copy moves {machine['copy_gb_s']:.1f} GB/s, products in {machine['dtype']} do "
            f"{machine['product_gop_s']:,.0f} Gop/s, an exponential takes {1 / machine['exponential_g_s']:.3g} ns;"
        )
    return (
        f"{row['device']}; {row['time']}; jax {versions['jax']}, Python {versions['python']}; commit {row['commit']};"
        f"{rates} `{row['command']}`"
    )


def latest(rows: list[Row]) -> list[Row]:
    """Of every family and shape on a kind of device, the rows of the newest run that has any, in the order of runs.

    A run is as new as its `time` says, wherever its lines stand. Rows from before a row held the rates of its floors do
    not count.
    """
    rows = [row for row in rows if row.get("bench") == "kernels" and ("copy_gb_s" in row or "note" in row)]
    rows.sort(key=began)
    newest = {group_of(row): run_of(row) for row in rows}
    kept = [row for row in rows if run_of(row) == newest[group_of(row)]]
    return list({(*group_of(row), row["implementation"]): row for row in kept}.values())


def two_floors(row: Row) -> Row:
    """The row as it is written today: once exponentials were a floor, too."""
    shares = dict(row.get("shares", {}))
    if "exponential" not in shares:
        return row
    alone = shares.pop("exponential")
    row = {**row, "shares": shares, "exponentials_ms": alone[0] * row["ms_forward"]}
    forward, both = (max(share[way] for share in shares.values()) for way in (0, 1))
    row |= {"floor_ms": forward * row["ms_forward"], "floor_ms_forward_backward": both * row["ms_forward_backward"]}
    return row | {"ratio": 1 / forward, "ratio_forward_backward": 1 / both}


def left_out(rows: list[Row]) -> Iterator[str]:
    """Notes, each with all shapes that it holds of."""
    notes = dict.fromkeys((row["run"], row["implementation"], row["note"]) for row in rows if "note" in row)
    for run, name, note in notes:
        found = [row for row in rows if (row["run"], row["implementation"], row.get("note")) == (run, name, note)]
        by_family = {row["family"]: [r["shape"] for r in found if r["family"] == row["family"]] for row in found}
        told = "; ".join(f"{family} {' and '.join(shapes)}" for family, shapes in by_family.items())
        yield f"{name} (run {run}), {note}: {told}"


def not_run(rows: list[Row]) -> Iterator[str]:
    """What the list of shapes has and no row, for every kind of device."""
    quick = all(row.get("quick") for row in rows)
    for kind in dict.fromkeys(map(device_kind, rows)):
        there = {(row["family"], row["shape"]) for row in rows if device_kind(row) == kind}
        for family, shape in cases(quick=quick):
            if (family.name, str(shape)) not in there:
                yield f"{kind}: {family.name}, {shape}"


def memory_a_token(path: Path) -> str:
    """The section of the newest run with rows in `path`; nothing where there is none."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if not rows:
        return ""
    newest = max(map(began, rows))
    found = [row for row in rows if began(row) == newest]
    lines = "\n".join(f"- {told.removeprefix('memory ')}" for told in memory.verdicts(found))
    return f"""Memory a token: compiled peaks with gradients, arguments included, at several lengths, and a line through
them ([rows]({path.name}); {found[0]["device"]}; commit {found[0]["commit"]}; `{found[0]["command"]}`):

{lines}

"""


def plot(timed: list[Row], path: Path) -> None:
    """How many floors each implementation takes, a panel a direction."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    several = len({(device_kind(row), row["dtype"]) for row in timed}) > 1
    case = lambda row: ", ".join(group_of(row)[0 if several else 2 :])
    shown, names = ([*dict.fromkeys(found)] for found in (map(case, timed), (row["implementation"] for row in timed)))
    figure, panels = plt.subplots(1, 2, figsize=(13, 1 + 0.32 * len(shown)), sharey=True, layout="constrained")
    for axes, metric, title in zip(
        panels, ("ratio", "ratio_forward_backward"), ("forward", "with gradients"), strict=True
    ):
        for number, name in enumerate(names):
            found = [row for row in timed if row["implementation"] == name]
            at = [shown.index(case(row)) for row in found]
            axes.plot([row[metric] for row in found], at, "o", color=f"C{number}", label=name)
        axes.axvline(1, color="0.6", linestyle=":")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set(xlabel="times the floor", title=title, yticks=range(len(shown)), yticklabels=shown)
        axes.grid(alpha=0.3)
    panels[0].invert_yaxis()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def percent(part: float) -> str:
    """With a decimal below 30 %, and two digits below 1 %."""
    return f"{100 * part:.2g} %" if part < 0.01 else f"{100 * part:.1f} %" if part < 0.3 else f"{100 * part:.0f} %"


def cells(row: Row) -> dict[str, str]:
    """A row of the table."""
    number = lambda name, form: form.format(row[name]) if row.get(name) is not None else ""
    both = lambda name, form: " / ".join(form.format(x) for x in row[name]) if row.get(name) else ""
    return {
        "run": row.get("run", ""),
        "family": row["family"], "shape": row["shape"], "implementation": row["implementation"],
        "ms": number("ms_forward", "{:.3g}"), "ms with gradients": number("ms_forward_backward", "{:.3g}"),
        "TFLOP/s": both("tflops", "{:.3g}"), "GB/s": both("gb_per_s", "{:.3g}"),
        "floor ms": number("floor_ms", "{:.3g}"), "floor of": binding(row),
        "times the floor": number("ratio", "{:.2f}"),
        "with gradients": number("ratio_forward_backward", "{:.2f}"),
        "exponentials ms": number("exponentials_ms", "{:.3g}"),
        "peak MB": f"{row['peak_bytes'] / 1e6:,.0f}" if row.get("peak_bytes") else "",
        "error": number("error", "{:.0e}"), "difference": number("difference", "{:.0e}"), "note": row.get("note", ""),
    }  # fmt: skip


def binding(row: Row) -> str:
    """The floor that counts forward, and with gradients where that is another one."""
    shares = row.get("shares", {})
    return " / ".join(dict.fromkeys(max(shares, key=lambda name: shares[name][way]) for way in (0, 1) if shares))


def verdicts(found: list[Row]) -> Iterator[str]:
    """The part of every floor's rate that the best of ours reaches, and against the others of the same run."""
    timed = [row for row in found if "note" not in row]
    for group in dict.fromkeys(map(group_of, timed)):
        here = [row for row in timed if group_of(row) == group]
        ours = [row for row in here if row["implementation"].startswith(("XLA", "Pallas"))]
        if not ours:
            continue
        best = min(ours, key=lambda row: row["ms_forward_backward"])
        shares = sorted(best["shares"].items(), key=lambda item: -item[1][1])
        told = [f"{percent(forward)} and {percent(both)} of {FLOORS[name]}" for name, (forward, both) in shares]
        if best.get("exponentials_ms"):
            part = percent(best["exponentials_ms"] / best["ms_forward"])
            told.append(f"exponentials alone are {part} of its forward time")
        against = [
            f"{row['ms_forward'] / best['ms_forward']:.1f} and "
            f"{row['ms_forward_backward'] / best['ms_forward_backward']:.1f} times as fast as {row['implementation']}"
            for row in here
            if row is not best
        ]
        yield f"{group[2]}, {group[3]}: {best['implementation']} reaches {'; '.join([', '.join(told), *against])}"
