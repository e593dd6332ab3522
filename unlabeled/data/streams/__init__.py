"""Training from text that nobody prepared: files read from any place on, and the rows that are made of them."""

from unlabeled.data.streams.rows import StreamedRows

__all__ = ["StreamedRows"]
