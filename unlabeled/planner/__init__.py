"""Plan a run before it starts: size, memory, time, cost; and check the machine that it will run on.

The formulas are in `unlabeled.planning`. This package applies them to a budget, a text or the YAML file of a recipe.
"""
