"""Paper tables: cells that are run once each, their rows, and reports beside the published numbers.

A table is one module of `experiments` with a `TABLE` (docs/reproducing.md shows how to add one):

    python -m experiments.NAME --scale smoke|cpu|gpu|paper
"""

from experiments.harness.command import main, run
from experiments.harness.results import NotTested, Results
from experiments.harness.table import Cell, Claim, Measure, Outcome, Published, Scale, Table, Work

__all__ = [
    "Cell",
    "Claim",
    "Measure",
    "NotTested",
    "Outcome",
    "Published",
    "Results",
    "Scale",
    "Table",
    "Work",
    "main",
    "run",
]
