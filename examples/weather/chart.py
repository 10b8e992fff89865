"""The chart of the months. Knows nothing of flows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.dates import DateFormatter, MonthLocator, YearLocator, date2num
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from examples.weather.readings import Month

WARM, WET, INK, FADED, FAINT = "#d1603d", "#2f6f9f", "#333333", "#777777", "#dddddd"


def draw(months: Sequence[Month], file: Path) -> None:
    """Draw temperatures above precipitation and save them as a PNG; a file that is there already is replaced."""
    # A Figure of its own, instead of pyplot, has no state in common with other threads, and needs no display.
    margins = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.1)
    figure = Figure(figsize=(11, 6.5), dpi=150, layout=margins, facecolor="white")
    warmth, rain = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    middles = [float(date2num(each.month)) + each.days / 2 for each in months]

    warmth.fill_between(
        middles,
        [each.lowest_celsius for each in months],
        [each.highest_celsius for each in months],
        color=WARM,
        alpha=0.16,
        linewidth=0,
        label="lowest to highest of the month",
    )
    warmth.fill_between(
        middles,
        [each.mean_low_celsius for each in months],
        [each.mean_high_celsius for each in months],
        color=WARM,
        alpha=0.6,
        linewidth=0,
        label="mean daily low to mean daily high",
    )
    warmth.axhline(0, color=INK, linewidth=0.8)
    warmth.set_ylabel("Temperature (°C)")
    warmth.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, borderaxespad=0, fontsize=9)
    warmth.set_xlim(middles[0] - months[0].days / 2, middles[-1] + months[-1].days / 2)

    rain.bar(
        middles,
        [each.precipitation_mm for each in months],
        width=[0.8 * each.days for each in months],
        color=WET,
    )
    rain.set_ylabel("Precipitation (mm)")
    rain.xaxis.set_major_locator(YearLocator())
    rain.xaxis.set_major_formatter(DateFormatter("%Y"))
    rain.xaxis.set_minor_locator(MonthLocator(bymonth=[4, 7, 10]))
    rain.xaxis.set_minor_formatter(DateFormatter("%b"))
    rain.tick_params(axis="x", which="minor", labelsize=8, labelcolor=FADED)
    rain.set_xlabel("Month")

    for axes in (warmth, rain):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="both", color=FAINT, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(colors=INK)
    figure.align_ylabels()
    first, last = months[0].month.year, months[-1].month.year
    warmth.set_title(f"The weather in Seattle by month, {first}\N{EN DASH}{last}", loc="left", fontsize=14, color=INK)
    figure.supxlabel("Daily readings: NOAA, as carried by vega_datasets", x=0.99, ha="right", fontsize=8, color=FADED)
    figure.savefig(file)
