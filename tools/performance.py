"""Writes what the newest run of a bench measured into the documents: `python tools/performance.py ROWS.jsonl`.

Rows of `peers` go into the README's table, all others into docs/performance.md.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.bench.__main__ import parts, table
from experiments.report import write_between

ROOT = Path(__file__).resolve().parents[1]
PAGE, README = ROOT / "docs" / "performance.md", ROOT / "README.md"
BEGIN, END = "<!-- peers: begin -->", "<!-- peers: end -->"


def rendered(rows: list[dict[str, Any]]) -> Iterator[str]:
    for name, part in parts().items():
        found = [row for row in rows if row["bench"] == name]
        if found:
            verdicts = "\n".join(f"- {verdict}" for verdict in part.verdicts(found))
            yield f"## {name}\n\n{verdicts}\n{table(name, found).replace(name, '', 1)}"


def peers(rows: list[dict[str, Any]]) -> str:
    """A line a system: tokens a second of both, their ratio, the share of the rate of products."""
    peer = rows[1]["implementation"]
    lines = [
        f"| system | tokens/s here | {peer} | times | share of the rate of products | {peer.split()[0]}' share "
        "| error |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for ours, theirs in zip(rows[::2], rows[1::2], strict=True):
        speed = [one["tokens_per_second"] for one in (ours, theirs)]
        ratio = speed[0] / speed[1]
        lines.append(
            f"| {ours['case']} | {speed[0]:,.0f} | {speed[1]:,.0f} | {ratio:.{2 if ratio < 10 else 0}f} "
            f"| {100 * ours['share']:.0f} % | {100 * theirs['share']:.{1 if theirs['share'] > 0.001 else 2}f} % "
            f"| {ours['error']:.0e} |"
        )
    first = rows[0]
    versions = ", ".join(f"{name} {first['versions'][name]}" for name in ("jax", "python") if name in first["versions"])
    where = f"*{first['device']}, {versions}, commit {first['commit'][:7]}, seed {first['seed']}.*"
    return "\n".join([*lines, "", where])


def newest(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each bench the rows of its newest run: files keep older ones."""
    times = {row["bench"]: max(x["time"] for x in rows if x["bench"] == row["bench"]) for row in rows}
    return [row for row in rows if row["time"] == times[row["bench"]]]


def main(path: str) -> None:
    rows = newest([json.loads(line) for line in Path(path).read_text().splitlines()])
    beside = [row for row in rows if row["bench"] == "peers"]
    if beside:
        write_between(README, BEGIN, END, peers(beside))
    if len(beside) < len(rows):
        head = PAGE.read_text().split("\n## scan\n")[0].rstrip()
        others = [row for row in rows if row["bench"] != "peers"]
        PAGE.write_text(re.sub(r"\n{3,}", "\n\n", "\n\n".join([head, *rendered(others)])).rstrip() + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
