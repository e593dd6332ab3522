"""The result of a run in one line."""
