"""A table's report at one scale: Markdown, CSV and PNG from its rows alone; no number is written by hand."""

from __future__ import annotations

import csv
import dataclasses
import io
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from experiments.harness.results import Entry, NotTested, Results
from experiments.harness.rows import Rows
from experiments.harness.table import Measure, Published, Table
from seqmodels.train.files import replace_file
from seqmodels.train.progress import duration

REPRODUCED, DIFFERS, UNTESTED = "reproduced", "not reproduced", "not tested at this scale"


def write_report(table: Table, rows: Rows, folder: Path, about: str) -> list[Path]:
    """`SCALE.md`, `SCALE.csv` and `SCALE.png` in `folder`; returns their paths."""
    results = Results.of(table, rows)
    stem = folder / str(rows.scale)
    written = [stem.with_suffix(".md"), stem.with_suffix(".csv")]
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(written[0], markdown(results, rows, about))
    replace_file(written[1], as_csv(results))
    if draw(results, stem.with_suffix(".png")):
        written.append(stem.with_suffix(".png"))
    return written


def markdown(results: Results, rows: Rows, about: str) -> str:
    table = results.table
    lines = [f"# {table.title}: {results.scale}", "", f"*{table.paper}*", "", about.strip(), ""]
    lines += [provenance(results), ""]
    for setting in results.settings():
        lines += [f"## {setting}", "", *_table(results, setting), ""]
    if table.claims:
        lines += ["## Claims", "", *claims(results), ""]
    if table.plot is not None:
        lines += [f"![{table.title}]({results.scale}.png)", ""]
    lines += list(_failures(results))
    outdated = rows.outdated(results.cells)
    if outdated:
        lines += [f"Rows of other settings than today's are left out: {', '.join(outdated)}.", ""]
    if table.published:
        lines += ["## Where the published numbers come from", "", *_sources(table.published), ""]
    return "\n".join(lines)


def provenance(results: Results, folder: str = "") -> str:
    """How the rows came about: command, commits, devices, versions, time. `folder`: where they are, for the link."""
    rows = [row for entry in results.entries for _, swept in entry.swept for row in swept]
    told = lambda key: ", ".join(sorted({str(row[key]) for row in rows}))
    versions = sorted({f"jax {row['versions'].get('jax')}, Python {row['versions'].get('python')}" for row in rows})
    commits = sorted({str(row["commit"])[:12] + ("+changes" if "+" in str(row["commit"]) else "") for row in rows})
    seconds = sum(row["seconds"] for row in rows)
    return (
        f"Command: `python -m experiments.{results.table.name} --scale {results.scale}`; "
        f"{len(rows)} runs, {duration(seconds)} of their time together; commit {', '.join(commits)}; "
        f"{told('device')}; {'; '.join(versions)}. Rows: [{results.scale}.jsonl]({folder}{results.scale}.jsonl)."
    )


def spread(values: Sequence[float], form: str) -> str:
    """The mean, and the range of values that differ."""
    mean, least, most = (form.format(f(values)) for f in (statistics.mean, min, max))
    return mean if least == most else f"{mean} ({least} to {most})"


def published_for(table: Table, entry: Entry, measure: Measure) -> Published | None:
    for one in table.published:
        if (one.model, one.setting) == (entry.model, entry.setting) and _measure(table, one) == measure.name:
            return one
    return None


def _measure(table: Table, published: Published) -> str:
    return published.measure or table.measures[0].name


def _table(results: Results, setting: str) -> Iterator[str]:
    table, entries = results.table, [entry for entry in results.entries if entry.setting == setting]
    shown = [m for m in table.measures if any(entry.values(m.name) for entry in entries)] or list(table.measures[:1])
    compared = {m.name for m in shown if any(published_for(table, entry, m) for entry in entries)}
    swept = any(entry.variants > 1 for entry in entries)
    titles = ["model", "seeds"]
    for measure in shown:
        titles += [f"ours: {measure.title}", "published", "difference"] if measure.name in compared else [measure.title]
    titles += ["best of the sweep"] if swept else []
    yield f"| {' | '.join(titles)} |"
    yield "|" + "|".join([" --- ", *[" ---: "] * (len(titles) - 1)]) + "|"
    for entry in entries:
        cells = [entry.model, str(len(entry.rows))]
        for measure in shown:
            cells += [_value(entry, measure), *(_compared(table, entry, measure) if measure.name in compared else [])]
        cells += [entry.variant or "-"] if swept else []
        yield f"| {' | '.join(cells)} |"


def _value(entry: Entry, measure: Measure) -> str:
    values, endless = entry.values(measure.name), entry.endless(measure.name)
    if values or endless:
        told = [spread(values, measure.form)] if values else []
        return ", ".join(told + [f"not finite in {endless}"] * bool(endless))
    return "failed" if entry.failures else "-" if entry.rows else "not run"


def _compared(table: Table, entry: Entry, measure: Measure) -> list[str]:
    published, values = published_for(table, entry, measure), entry.values(measure.name)
    if published is None:
        return ["-", "-"]
    best = max if measure.better == "higher" else min
    ours = None
    if values:  # the best of all variants, as `Results.value` takes it
        ours = best(entry.of_all(measure.name)) if published.over == "best" else statistics.mean(values)
    told = measure.form.format(published.value) + (" (best)" if published.over == "best" else "")
    return [told, "-" if ours is None else f"{ours - published.value:+.3f}"]


def verdicts(results: Results) -> Iterator[tuple[str, str, str, str]]:
    """`(claim, where, verdict, evidence)` for every claim."""
    for claim in results.table.claims:
        results.said()
        try:
            verdict = REPRODUCED if claim.test(results) else DIFFERS
            evidence = "; ".join(results.said())
        except NotTested as reason:
            verdict, evidence = UNTESTED, str(reason)
        yield claim.text, claim.where, verdict, evidence


def claims(results: Results) -> Iterator[str]:
    yield "| claim | where | verdict | what was read |"
    yield "| --- | --- | --- | --- |"
    for text, where, verdict, evidence in verdicts(results):
        yield f"| {text} | {where} | **{verdict}** | {evidence} |"


def _failures(results: Results) -> Iterator[str]:
    failed = [row for entry in results.entries for row in entry.failures]
    if failed:
        yield from ("## Failed cells", "")
        yield from (f"- {row['cell']}, seed {row['seed']}: {row['error']}" for row in failed)
        yield ""


def _sources(published: Sequence[Published]) -> Iterator[str]:
    sources: dict[tuple[str, str], list[str]] = {}
    for one in published:
        sources.setdefault((one.where, one.verified), []).append(f"{one.model} in {one.setting}")
    for (where, verified), names in sources.items():
        yield f"- {where} ({verified}): {', '.join(names)}"


def as_csv(results: Results) -> str:
    """One line a model, setting and variant: mean, least and most of every measure, with the published values.

    `chosen` is 1 on the variant that the report shows.
    """
    table, text = results.table, io.StringIO()
    measured = {_measure(table, one) for one in table.published}
    columns = ["scale", "setting", "model", "variant", "chosen", "seeds", "failed"]
    for measure in table.measures:
        columns += [f"{measure.name}_{what}" for what in ("mean", "min", "max")]
        columns += [f"{measure.name}_published"] if measure.name in measured else []
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for entry in results.entries:
        for variant, rows in entry.swept:
            failed = sum(row["config"]["variant"] == variant for row in entry.failures)
            line: list[object] = [results.scale, entry.setting, entry.model, variant, int(variant == entry.variant)]
            line += [len(rows), failed]
            for measure in table.measures:
                values = dataclasses.replace(entry, rows=rows).values(measure.name)
                line += [f"{f(values):.6g}" for f in (statistics.mean, min, max)] if values else [""] * 3
                published = published_for(table, entry, measure)
                line += [published.value if published else ""] if measure.name in measured else []
            writer.writerow(line)
    return text.getvalue()


def draw(results: Results, path: Path) -> bool:
    """The table's plot; False where it has none, or nothing was run."""
    if results.table.plot is None or not any(entry.rows for entry in results.entries):
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    results.table.plot(results, figure)
    # without the date and version that matplotlib writes, the same rows give the same file
    figure.savefig(path, dpi=110, metadata={"Software": None})
    return True
