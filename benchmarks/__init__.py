"""Comparisons with other people's programs, each `python -m benchmarks.NAME`; no part of the product."""
