"""Errors of model libraries in one line."""

import re


def first_sentence(error: BaseException) -> str:
    """The first sentence of an error's message, at most 300 characters; the error's class if it has no message."""
    message = str(error).strip() or type(error).__name__
    return re.split(r"\.\s|\n", message)[0].rstrip(".: ")[:300]
