"""Plots that several tables share, drawn into a figure with matplotlib's object interface."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from experiments.harness.results import Entry, Results


def by_setting(
    results: Results,
    figure: Figure,
    curve: str,
    *,
    y: str,
    x_title: str,
    y_title: str | None = None,
    trained: float | None = None,
    guess: float | None = None,
    logarithmic: bool = False,
    only: Sequence[str] | None = None,
) -> None:
    """A panel a setting: column `y` of a curve over its first column, a line a model, a band over the seeds.

    `trained`: where training stopped, as a vertical line; `guess`: what guessing gives, as a horizontal one. `only`:
    the settings that are shown.
    """
    settings = _settings(results, curve, only)
    if not settings:
        return
    if hasattr(figure, "set_size_inches"):  # a part of a figure has the size that it is given
        figure.set_size_inches(max(figure.get_figwidth(), 4 * len(settings) + 2), figure.get_figheight())
    panels = figure.subplots(1, len(settings), squeeze=False)[0]
    for axes, setting in zip(panels, settings, strict=True):
        for entry, found in results.curves(curve, setting):
            band(axes, found, y, label=entry.model, number=numbers(results)[entry.model])
        if trained is not None:
            axes.axvline(trained, color="0.6", linestyle=":", linewidth=1)
        if guess is not None:
            axes.axhline(guess, color="0.6", linestyle=":", linewidth=1)
        if logarithmic:
            axes.set_xscale("log", base=2)
        axes.set(xlabel=x_title, title=setting)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel(y if y_title is None else y_title)
    legend(figure, panels)


def _settings(results: Results, curve: str, only: Sequence[str] | None = None) -> list[str]:
    """The settings with such a curve, in the table's order."""
    ready = lambda setting: any(True for _ in results.curves(curve, setting))
    return [setting for setting in results.settings() if (only is None or setting in only) and ready(setting)]


def numbers(results: Results) -> dict[str, int]:
    """A number for every model of the table, so that it has one colour in all panels."""
    return {name: number for number, name in enumerate(dict.fromkeys(entry.model for entry in results.entries))}


def legend(figure: Any, panels: Iterable[Any]) -> None:
    """One legend beside the panels, with every label once."""
    lines = {text: line for axes in panels for line, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    if lines:
        figure.legend(lines.values(), lines.keys(), fontsize=8, loc="outside right center")


def band(axes: Any, curves: list[dict[str, list[float]]], y: str, *, label: str, number: int) -> None:
    """The mean of curves with the same first column, between the least and the most of them. A line that would hide one
    that is there already is dashed."""
    x = next(iter(curves[0].values()))
    values = np.array([[np.nan if value is None else value for value in curve[y]] for curve in curves], float)
    hides = any(np.array_equal(line.get_ydata(), values.mean(0), equal_nan=True) for line in axes.get_lines())
    style = "--" if hides else ("-", "--", "-.", ":")[number // 10 % 4]
    axes.plot(x, values.mean(0), style, color=f"C{number % 10}", label=label, linewidth=1.5)
    if len(curves) > 1:
        axes.fill_between(x, values.min(0), values.max(0), color=f"C{number % 10}", alpha=0.15, linewidth=0)


def over(
    results: Results,
    axes: Any,
    x: str | Callable[[Entry], float],
    y: str,
    *,
    x_title: str,
    y_title: str | None = None,
    settings: Sequence[str] | None = None,
) -> None:
    """One metric over another, or over what `x` reads off an entry: a line a model through its settings."""
    read = x if callable(x) else lambda entry: float(np.mean(entry.values(x)))
    for model, number in numbers(results).items():
        chosen = [e for e in results.entries if e.model == model and (settings is None or e.setting in settings)]
        points = sorted((read(e), float(np.mean(e.values(y)))) for e in chosen if e.values(y))
        if points:
            axes.plot(*zip(*points, strict=True), "o-", color=f"C{number % 10}", label=model, linewidth=1, markersize=4)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set(xlabel=x_title, ylabel=y.replace("_", " ") if y_title is None else y_title)
    axes.grid(alpha=0.3)


def by_task(
    results: Results, figure: Figure, y: str, columns: Mapping[str, str | Callable[[Entry], float]], *, mark: str
) -> None:
    """A row of panels for all settings that are one up to `mark`, and a panel a column: `y` over what that reads."""
    tasks = list(dict.fromkeys(setting.split(mark)[0] for setting in results.settings()))
    figure.set_size_inches(5 * len(columns) + 1.5, 3.8 * len(tasks))
    panels = figure.subplots(len(tasks), len(columns), squeeze=False)
    for row, task in zip(panels, tasks, strict=True):
        settings = [setting for setting in results.settings() if setting.split(mark)[0] == task]
        for axes, (title, x) in zip(row, columns.items(), strict=True):
            over(results, axes, x, y, settings=settings, x_title=title)
            axes.set_title(task)
    legend(figure, panels.flat)


def pairs(
    results: Results, figure: Figure, curve: str, columns: tuple[str, ...], titles: tuple[str, ...], *, x_title: str
) -> None:
    """A row of panels a setting: each column of a curve over its first one, both axes logarithmic."""
    settings = _settings(results, curve)
    if not settings:
        return
    figure.set_size_inches(4.5 * len(columns) + 1, 3.2 * len(settings))
    panels = figure.subplots(len(settings), len(columns), squeeze=False)
    for row, setting in zip(panels, settings, strict=True):
        for axes, column, title in zip(row, columns, titles, strict=True):
            for entry, found in results.curves(curve, setting):
                band(axes, found, column, label=entry.model, number=numbers(results)[entry.model])
            axes.set_xscale("log", base=2)
            axes.set_yscale("log", base=10)
            axes.set(xlabel=x_title, ylabel=title, title=setting)
            axes.grid(alpha=0.3)
    legend(figure, panels.flat)
