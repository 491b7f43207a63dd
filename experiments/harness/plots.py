"""Plots that several tables share, drawn into a figure with matplotlib's object interface."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from experiments.harness.results import Results


def by_setting(
    results: Results,
    figure: Figure,
    curve: str,
    *,
    y: str,
    x_title: str,
    y_title: str | None = None,
    trained: float | None = None,
    logarithmic: bool = False,
) -> None:
    """A panel a setting: column `y` of a curve over its first column, a line a model, a band over the seeds.

    `trained`: where training stopped, as a vertical line.
    """
    settings = [setting for setting in results.settings() if any(True for _ in results.curves(curve, setting))]
    if not settings:
        return
    panels = figure.subplots(1, len(settings), squeeze=False)[0]
    for axes, setting in zip(panels, settings, strict=True):
        for number, (entry, found) in enumerate(results.curves(curve, setting)):
            band(axes, found, y, label=entry.model, number=number)
        if trained is not None:
            axes.axvline(trained, color="0.6", linestyle=":", linewidth=1)
        if logarithmic:
            axes.set_xscale("log", base=2)
        axes.set(xlabel=x_title, title=setting)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel(y if y_title is None else y_title)
    panels[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))


def band(axes: Any, curves: list[dict[str, list[float]]], y: str, *, label: str, number: int) -> None:
    """The mean of curves with the same first column, between the least and the most of them."""
    x = next(iter(curves[0].values()))
    values = np.array([[np.nan if value is None else value for value in curve[y]] for curve in curves], float)
    style = ("-", "--", "-.", ":")[number // 10 % 4]
    axes.plot(x, values.mean(0), style, color=f"C{number % 10}", label=label, linewidth=1.5)
    if len(curves) > 1:
        axes.fill_between(x, values.min(0), values.max(0), color=f"C{number % 10}", alpha=0.15, linewidth=0)


def trade_off(results: Results, figure: Figure, x: str, y: str, *, x_title: str, y_title: str | None = None) -> None:
    """One metric over another for every entry, on a logarithmic axis: a line a model through its settings."""
    axes = figure.subplots()
    models = list(dict.fromkeys(entry.model for entry in results.entries))
    for number, model in enumerate(models):
        entries = [e for e in results.entries if e.model == model and e.values(x) and e.values(y)]
        points = sorted((float(np.mean(entry.values(x))), float(np.mean(entry.values(y)))) for entry in entries)
        if points:
            axes.plot(*zip(*points, strict=True), "o-", color=f"C{number % 10}", label=model, linewidth=1, markersize=4)
    axes.set_xscale("log", base=2)
    axes.set(xlabel=x_title, ylabel=y.replace("_", " ") if y_title is None else y_title)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(fontsize=8)


def pairs(
    results: Results, figure: Figure, curve: str, columns: tuple[str, ...], titles: tuple[str, ...], *, x_title: str
) -> None:
    """A row of panels a setting: each column of a curve over its first one, both axes logarithmic."""
    settings = [setting for setting in results.settings() if any(True for _ in results.curves(curve, setting))]
    if not settings:
        return
    figure.set_size_inches(4.5 * len(columns) + 1, 3.2 * len(settings))
    panels = figure.subplots(len(settings), len(columns), squeeze=False)
    for row, setting in zip(panels, settings, strict=True):
        for axes, column, title in zip(row, columns, titles, strict=True):
            for number, (entry, found) in enumerate(results.curves(curve, setting)):
                band(axes, found, column, label=entry.model, number=number)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log", base=10)
            axes.set(xlabel=x_title, ylabel=title, title=setting)
            axes.grid(alpha=0.3)
    panels[0][-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
