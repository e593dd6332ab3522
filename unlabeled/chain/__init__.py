"""Chains: stages in order, each of which reads the folder that an earlier one has written."""
