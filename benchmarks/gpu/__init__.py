"""Measurements on a GPU: parts of a training step, whole steps in a plain loop, and whole recipes."""
