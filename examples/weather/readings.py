"""The weather itself: daily readings, checked one by one, and what they come to by month. Knows nothing of flows."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Iterable
from datetime import date
from itertools import groupby
from math import fsum
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, FiniteFloat, model_validator


class Day(BaseModel):
    """One line of the file. The aliases are its columns' names, which leave the units out."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    day: Annotated[date, BeforeValidator(lambda text: text.replace("/", "-"))] = Field(alias="date")
    precipitation_mm: FiniteFloat = Field(alias="precipitation", ge=0)
    high_celsius: FiniteFloat = Field(alias="temp_max")
    low_celsius: FiniteFloat = Field(alias="temp_min")
    wind_metres_per_second: FiniteFloat = Field(alias="wind", ge=0)
    weather: Literal["drizzle", "fog", "rain", "snow", "sun"]

    @model_validator(mode="after")
    def _low_is_not_above_high(self) -> Day:
        if self.low_celsius > self.high_celsius:
            raise ValueError(f"the low, {self.low_celsius}, is above the high, {self.high_celsius}")
        return self


class Month(BaseModel):
    """What the days of one month come to."""

    model_config = ConfigDict(frozen=True)

    month: date
    """Its first day."""
    days: int
    precipitation_mm: float
    """The sum over its days."""
    mean_high_celsius: float
    mean_low_celsius: float
    highest_celsius: float
    lowest_celsius: float


def seattle_weather_file() -> Path:
    """The file that the package `vega_datasets` carries: NOAA's daily readings in Seattle, 2012 to 2015."""
    with warnings.catch_warnings():
        # Importing it imports pandas, some releases of which announce on import what the next ones will need.
        warnings.simplefilter("ignore", DeprecationWarning)
        from vega_datasets import local_data
    return Path(local_data.seattle_weather.filepath)


def read_days(file: Path) -> list[Day]:
    """Read the file, oldest day first.

    Raises:
        ValueError: a line that is not a `Day`; the error has its number.
    """
    days = []
    with file.open(newline="", encoding="utf-8") as lines:
        reader = csv.DictReader(lines)
        for row in reader:
            try:
                days.append(Day.model_validate(row))
            except ValueError as error:
                raise ValueError(f"{file}, line {reader.line_num}: {error}") from error
    return sorted(days, key=lambda each: each.day)


def summarize(days: Iterable[Day]) -> list[Month]:
    """Sum up days, given oldest first, by month."""
    return [_month_of(list(group)) for _, group in groupby(days, key=lambda each: each.day.replace(day=1))]


def _month_of(days: list[Day]) -> Month:
    highs = [each.high_celsius for each in days]
    lows = [each.low_celsius for each in days]
    return Month(
        month=days[0].day.replace(day=1),
        days=len(days),
        precipitation_mm=round(fsum(each.precipitation_mm for each in days), 1),
        mean_high_celsius=round(fsum(highs) / len(days), 1),
        mean_low_celsius=round(fsum(lows) / len(days), 1),
        highest_celsius=max(highs),
        lowest_celsius=min(lows),
    )
