"""Experiments on the recipes. Run each from the repository root, e.g. `python -m experiments.objectives.run`."""
