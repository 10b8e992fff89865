"""The contestants of `benchmarks/compare.py`, one small module each."""
