"""Tables in Markdown, as the benchmarks print them."""

from collections.abc import Sequence


def table_header(columns: Sequence[str], text_columns: int) -> str:
    """The first two lines of a table: names, and alignment.

    Args:
        text_columns: the number of columns at the left that hold text; the others hold numbers, aligned to the right.
    """
    alignments = ["---"] * text_columns + ["---:"] * (len(columns) - text_columns)
    return f"| {' | '.join(columns)} |\n|{'|'.join(alignments)}|"
