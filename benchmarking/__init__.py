"""Benchmarks that say where the time goes: ``python -m benchmarking SCENARIO``."""
