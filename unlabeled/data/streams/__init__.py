"""Training from text that is not prepared: files read from any position on, and the rows that are made of them."""

from unlabeled.data.streams.rows import StreamedRows

__all__ = ["StreamedRows"]
