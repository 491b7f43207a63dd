"""A table of cells that compute next to nothing: what the tests of the harness run, as a user's module would be."""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path

from experiments.harness import Cell, Claim, Measure, Outcome, Published, Results, Scale, Table, Work, main

HELD = 3


@dataclasses.dataclass(frozen=True)
class Toy:
    """Scores `score` plus its seed. `fail`: raise while the file of that name is there. `pieces`: of `pause` seconds,
    each kept, so that a stop loses none; `hold`: before piece HELD, wait for the file of that name."""

    score: float
    rate: float = 1.0
    fail: str | None = None
    pieces: int = 1
    pause: float = 0.0
    hold: str | None = None

    def run(self, work: Work) -> Outcome:
        if self.fail is not None and Path(self.fail).exists():
            print("about to fail")
            raise FloatingPointError(f"the loss is nan at rate {self.rate}")
        kept = work.folder / "pieces"
        done = len(kept.read_text()) if kept.exists() else 0
        for piece in range(done, self.pieces):
            while self.hold is not None and piece == HELD and not Path(self.hold).exists():
                time.sleep(0.05)
            time.sleep(self.pause)
            with kept.open("a") as file:
                file.write("x")
            work.report((piece + 1) / self.pieces)
        curve = {"step": list(range(1000)), "loss": [self.score + work.seed] * 999 + [float("nan")]}
        return Outcome({"score": self.score + work.seed, "size": 1e6, "began_at": done}, {"loss": curve})


BASE = Toy(0.25)


def cells(scale: Scale) -> list[Cell]:
    if scale == Scale.GPU:
        return [Cell("slow", "first", dataclasses.replace(BASE, pieces=6, pause=0.1, hold="go"), BASE)]
    found = [Cell("one", "first", BASE, BASE)]
    for rate in (0.5, 2.0):
        found.append(Cell("swept [-1, 1]", "first", Toy(0.5 * rate, rate), BASE, variant=f"rate {rate:g}"))
    found.append(Cell("broken", "second", dataclasses.replace(BASE, fail="broken"), BASE))
    return found


def swept_wins(results: Results) -> bool:
    return results.value("swept [-1, 1]", "first") > results.value("one", "first")


TABLE = Table(
    name="toy",
    title="A toy table",
    paper="0000.00000, Table 1",
    cells=cells,
    measures=(Measure("score", "score"), Measure("size", "parameters", "{:,.0f}", "lower")),
    seeds={Scale.SMOKE: 1, Scale.CPU: 2, Scale.GPU: 1, Scale.PAPER: 1},
    published=(Published("one", "first", 0.5, "Table 1", "made up"),),
    claims=(
        Claim("the sweep wins", "Table 1", swept_wins),
        Claim("one is perfect", "Table 1", lambda results: results.value("one", "first") > 1),
        Claim("broken is best", "Table 1", lambda results: results.value("broken", "second") > 0),
    ),
)

if __name__ == "__main__":
    sys.exit(main(TABLE))
