"""The report of `python -m experiments.bench kernels`: Markdown and a plot beside the rows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def write(path: Path) -> list[Path]:
    """From the rows in `path`, the latest of each kind: `path` with the suffixes .md and .png."""
    from experiments.bench.__main__ import table

    rows = latest([json.loads(line) for line in path.read_text().splitlines()])
    origins = dict.fromkeys(origin(row) for row in rows if "note" not in row)
    text = f"""# Kernels

Times beside two floors: the products with the state over the measured rate of products, and what has to be read and
written over the measured rate of a copy; the larger one counts. With gradients: the forward pass and gradients of all
inputs, with a floor of three times the forward one. Pairs are forward / with gradients. Errors are on one head of the
longest document, against a loop over tokens in float64, relative to an array's largest entry.

{"".join(f"- {origin}" + chr(10) for origin in origins)}
{"".join(f"- {verdict}" + chr(10) for verdict in verdicts(rows))}{table("kernels", rows).replace("kernels", "", 1)}
![times the floor]({path.with_suffix(".png").name})
"""
    path.with_suffix(".md").write_text(text)
    plot(rows, path.with_suffix(".png"))
    return [path.with_suffix(".md"), path.with_suffix(".png")]


def origin(row: Row) -> str:
    """Where a row comes from, and what its floors were measured to be."""
    versions, copy, product = row["versions"], row["rates"]["copy"] / 1e9, row["product_rate"] / 1e9
    return (
        f"{row['device']}; jax {versions['jax']}, Python {versions['python']}; commit {row['commit']}; a copy moves "
        f"{copy:.1f} GB/s, products in {row['dtype']} do {product:,.0f} Gop/s; `{row['command']}`"
    )


def latest(rows: list[Row]) -> list[Row]:
    """A later row of the same implementation and shape on the same device and type stands for earlier ones."""
    key = lambda row: tuple(row[name] for name in ("device", "dtype", "family", "shape", "implementation"))
    return list({key(row): row for row in rows if row.get("bench") == "kernels"}.values())


def plot(rows: list[Row], path: Path) -> None:
    """How many floors each implementation takes, a panel a direction."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    timed = [row for row in rows if "note" not in row]
    cases = list(dict.fromkeys(f"{row['family']}, {row['shape']}" for row in timed))
    names = list(dict.fromkeys(row["implementation"] for row in timed))
    figure, panels = plt.subplots(1, 2, figsize=(13, 1 + 0.32 * len(cases)), sharey=True, layout="constrained")
    for axes, metric, title in zip(
        panels, ("ratio", "ratio_forward_backward"), ("forward", "with gradients"), strict=True
    ):
        for number, name in enumerate(names):
            found = {f"{row['family']}, {row['shape']}": row[metric] for row in timed if row["implementation"] == name}
            axes.plot(list(found.values()), [cases.index(case) for case in found], "o", color=f"C{number}", label=name)
        axes.axvline(1, color="0.6", linestyle=":")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set(xlabel="times the floor", title=title, yticks=range(len(cases)), yticklabels=cases)
        axes.grid(alpha=0.3)
    panels[0].invert_yaxis()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def cells(row: Row) -> dict[str, str]:
    """A row of the table."""
    number = lambda name, form: form.format(row[name]) if row.get(name) is not None else ""
    both = lambda name, form: " / ".join(form.format(x) for x in row[name]) if name in row else ""
    return {
        "family": row["family"], "shape": row["shape"], "implementation": row["implementation"],
        "ms": number("ms_forward", "{:.3g}"), "ms with gradients": number("ms_forward_backward", "{:.3g}"),
        "TFLOP/s": both("tflops", "{:.3g}"), "GB/s": both("gb_per_s", "{:.3g}"),
        "floor ms": number("floor_ms", "{:.3g}"), "times the floor": number("ratio", "{:.2f}"),
        "with gradients": number("ratio_forward_backward", "{:.2f}"),
        "peak MB": f"{row['peak_bytes'] / 1e6:,.0f}" if row.get("peak_bytes") else "",
        "error": number("error", "{:.0e}"), "note": row.get("note", ""),
    }  # fmt: skip


def verdicts(found: list[Row]) -> Iterator[str]:
    """The part of the floor's rate that the best of ours reaches, and against the others."""
    timed = [row for row in found if "note" not in row]
    for family, shape in dict.fromkeys((row["family"], row["shape"]) for row in timed):
        here = [row for row in timed if (row["family"], row["shape"]) == (family, shape)]
        ours = [row for row in here if row["implementation"].startswith(("XLA", "Pallas"))]
        best = min(ours, key=lambda row: row["ms_forward_backward"])
        shares = f"{1 / best['ratio']:.0%} forward, {1 / best['ratio_forward_backward']:.0%} with gradients"
        told = [
            f"{row['ms_forward'] / best['ms_forward']:.1f} and "
            f"{row['ms_forward_backward'] / best['ms_forward_backward']:.1f} times as fast as {row['implementation']}"
            for row in here
            if row is not best
        ]
        yield f"{family}, {shape}: {best['implementation']} reaches {shares} of the floor's rate" + "".join(
            f"; {part}" for part in told
        )
