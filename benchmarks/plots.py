"""Draws the curves of `curves.json`, one PNG each, into docs/performance: `python benchmarks/plots.py`."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

DATA = Path(__file__).with_name("curves.json")
FOLDER = Path(__file__).parents[1] / "docs" / "performance"

# Two hues that differ in lightness as well, from the palette of Okabe and Ito (https://jfly.uni-koeln.de/color/).
COLOURS = {"PostgreSQL": "#0072B2", "SQLite": "#D55E00"}
MARKERS = {"PostgreSQL": "o", "SQLite": "s"}
STYLES = ("-", "--", ":")
GREY = "#555555"

STYLE = {
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "figure.constrained_layout.use": True,
}

LEAST_MS = 0.5
"""SQLite's clock tells milliseconds: less than this has no place on a logarithmic axis."""

Line = dict[str, Any]


@dataclass(frozen=True)
class Plot:
    """How a curve is drawn: the words on its axes, and their scales."""

    title: str
    x: str
    y: str | tuple[str, ...]
    """One label for all panels, or one for each of them: empty where it is the one on the left."""
    base: int = 10
    """Of the logarithmic x axis: 2 where sizes double."""
    scale: str | tuple[str, ...] = "log"
    """Of the y axis, as for `y`: "log", or "zero", which is linear and begins there, for what should stay level."""
    draw: Callable[[Plot, Any, list[Line]], None] | None = None


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw what there is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=DATA, help="what curves.py has written; default beside this file")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the PNGs go; default docs/performance")
    options = parser.parse_args(arguments)
    curves = json.loads(options.data.read_text())["curves"]
    options.folder.mkdir(parents=True, exist_ok=True)
    mpl.rcParams.update(STYLE)
    for name, curve in curves.items():
        if not curve["lines"]:
            print(f"{name}: there is nothing to draw")
            continue
        path = options.folder / f"{name}.png"
        draw(PLOTS[name], curve["lines"], path)
        print(path)


def draw(plot: Plot, lines: list[Line], path: Path) -> None:
    """Draw one curve, its panels side by side."""
    panels = list(dict.fromkeys(line["panel"] for line in lines))
    labels_of_y = [plot.y] + [""] * (len(panels) - 1) if isinstance(plot.y, str) else plot.y
    figure, grid = plt.subplots(1, len(panels), figsize=(7.0 if len(panels) == 1 else 10.0, 4.2), squeeze=False)
    scales = [plot.scale] * len(panels) if isinstance(plot.scale, str) else plot.scale
    for axes, panel, label, left in zip(grid[0], panels, labels_of_y, [None, *grid[0]], strict=False):
        if left is not None and not label:  # the same quantity as on its left
            axes.sharey(left)
        (plot.draw or draw_lines)(plot, axes, [line for line in lines if line["panel"] == panel])
        axes.set_title(panel)
        axes.set_xlabel(plot.x)
        axes.set_ylabel(label)
    for axes, scale in zip(grid[0], scales, strict=False):  # now that axes which share their scale have all their lines
        if plot.draw is None:
            set_scale(axes, scale)
    handles, labels = grid[0][0].get_legend_handles_labels()
    handles = [each[0] if isinstance(each, ErrorbarContainer) else each for each in handles]
    figure.suptitle(plot.title, x=0.01, ha="left", fontsize=13)
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels) if len(labels) < 4 else 2)
    figure.savefig(path, dpi=160, metadata={"Software": None})
    plt.close(figure)


def draw_lines(plot: Plot, axes: Axes, lines: list[Line]) -> None:
    """Lines of medians, with the range of the rounds."""
    variants = list(dict.fromkeys(line["variant"] for line in lines))
    sizes = sorted({int(size) for line in lines for size in line["points"]})
    places = {size: float(size) for size in sizes}
    if 0 in places:  # has no place on a logarithmic axis: one to the left of all others
        places[0] = sizes[1] / 10
    for line in lines:
        points = sorted((int(size), values) for size, values in line["points"].items())
        middle = [statistics.median(values) for _, values in points]
        below = [here - min(values) for here, (_, values) in zip(middle, points, strict=True)]
        above = [max(values) - here for here, (_, values) in zip(middle, points, strict=True)]
        style = STYLES[variants.index(line["variant"])]
        axes.errorbar(
            [places[size] for size, _ in points],
            middle,
            yerr=[below, above],
            color=COLOURS[line["database"]],
            marker=MARKERS[line["database"]],
            markerfacecolor=COLOURS[line["database"]] if style == "-" else "white",
            markersize=5,
            linestyle=style,
            linewidth=1.6,
            elinewidth=1.0,
            capsize=2.5,
            label=", ".join(filter(None, (line["database"], line["variant"]))),
        )
    axes.set_xscale("log", base=plot.base)
    axes.xaxis.set_major_locator(plt.FixedLocator([places[size] for size in sizes]))
    axes.xaxis.set_minor_locator(NullLocator())
    names = {place: short(size) for size, place in places.items()}
    axes.xaxis.set_major_formatter(FuncFormatter(lambda place, _: names.get(place, "")))


def set_scale(axes: Axes, scale: str) -> None:
    """Let the y axis be logarithmic, or begin at zero."""
    if scale == "log":
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(mpl.ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(0, axes.get_ylim()[1] * 1.03)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))


def draw_shares(plot: Plot, axes: Axes, lines: list[Line]) -> None:
    """Of each database which share of the starts came within so many milliseconds; p50 and p99 are marked."""
    for line in lines:
        values = sorted(max(each, LEAST_MS) for each in line["points"]["0"])
        shares = [(index + 1) / len(values) * 100 for index in range(len(values))]
        colour = COLOURS[line["database"]]
        label = f"{line['database']}, {line['variant']}"
        axes.step(values, shares, where="post", color=colour, linewidth=1.8, label=label)
        for percent in (50, 99):
            value = values[max(0, -(-len(values) * percent // 100) - 1)]
            axes.plot([value], [percent], MARKERS[line["database"]], color=colour, markersize=6)
            axes.annotate(
                f"p{percent} {value:,.3g} ms",
                (value, percent),
                xytext=(9, 0),
                textcoords="offset points",
                va="center",
                color=colour,
                fontsize=10,
            )
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.set_xlim(right=axes.get_xlim()[1] * 4)  # room for the words
    axes.set_ylim(0, 103)


def short(size: int) -> str:
    """A size as it stands on an axis."""
    if size == 0:
        return "none"
    for power, letter in ((1_000_000, "M"), (1_000, "k")):
        if size >= power and size % power == 0:
            return f"{size // power}{letter}"
    return str(size)


PLOTS = {
    "in_flight": Plot(
        "Tasks a second, by executions in flight",
        "executions in flight (concurrency of one worker)",
        "tasks/s",
        base=2,
    ),
    "claim": Plot("Time of a claim, by executions that wait", "executions that wait and are due", "ms a claim"),
    "claim_behind": Plot(
        "Time of a claim, by executions in front that are not for this worker",
        "executions in front",
        "ms a claim",
    ),
    "finished": Plot(
        "Time of a step, by finished executions in the tables",
        "finished executions",
        ("ms a step", "ms a step (one worker)"),
        scale="zero",
    ),
    "context": Plot("Time of a step, by what the flow carries", "bytes carried", ("ms a step", "", "ms a flow")),
    "tasks": Plot(
        "Time of a step, by tasks in the flow",
        "tasks in the flow",
        "ms a step",
        scale="zero",
    ),
    "latency": Plot(
        "From schedule to start, when the worker is idle",
        "ms from the execution's creation to its first attempt's start",
        "% of the executions have started",
        draw=draw_shares,
    ),
    "memory": Plot(
        "A worker with many executions in flight",
        "executions in flight, each waiting in an async task",
        ("resident memory of the process, MB", "seconds until all are in flight"),
        scale=("zero", "log"),
    ),
    "processes": Plot(
        "Tasks a second, by worker processes on one queue",
        "worker processes",
        "tasks/s",
        base=2,
        scale="zero",
    ),
}


if __name__ == "__main__":
    main()
