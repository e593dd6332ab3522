"""Pushing to the Hugging Face Hub."""
