"""From four years of daily weather in Seattle to a published chart: `python -m examples.weather`."""
