"""Benchmarks of the recipes. Run each from the repository root, e.g. `python -m benchmarks.speed`."""
