"""Documents to packed rows in an Arrow file."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerFast

from unlabeled.data.documents import Document
from unlabeled.data.left_out import TOO_LONG
from unlabeled.data.packing import best_fit, split_points
from unlabeled.data.tokenization import Framing, framing, vocabulary_size

WINDOW_TOKENS = 4_000_000  # tokens that are packed together; packing efficiency hardly grows beyond that
BATCH_ROWS = 1000  # rows of a record batch
TOKEN_FLAGS = {"mlm": "word_starts", "sft": "targets"}  # the column of bools beside the ids, by objective

# Why a document is left out.
ONE_TOKEN = "one token, of which no span can be restored"
NO_TARGETS = "nothing to learn"

Piece = tuple[np.ndarray, np.ndarray | None]  # ids and token flags


class SplitWriter:
    """Packs the documents of one split into rows and writes them, a window of documents at a time.

    Columns: `input_ids` (uint16 if the vocabulary allows it, otherwise int32), `lengths` (int32, tokens of each piece)
    and, for "mlm" and "sft", the bools of `TOKEN_FLAGS`.

    Args:
        sink: the path of the Arrow file, or a stream.
        tokenizer: for the frame of a document and the type of the ids.
        objective: "clm", "mlm", "span" or "sft".
        max_length: tokens in a row.
        span_row_cost: for "span", what a text costs of a row, as `packing.span_row_cost` computes it.

    Attributes:
        left_out: documents that are only counted, by reason.
        too_long: the lengths of conversations that are longer than a row.
    """

    def __init__(
        self,
        sink: str | pa.NativeFile,
        tokenizer: PreTrainedTokenizerFast,
        objective: str,
        max_length: int,
        span_row_cost: np.ndarray | None = None,
    ):
        self.frame = framing(tokenizer, "clm" if objective == "sft" else objective)
        self.objective = objective
        self.max_length = max_length
        self.span_row_cost = span_row_cost
        self.left_out: Counter[str] = Counter()
        self.too_long: list[int] = []
        self._counts = dict.fromkeys(
            ("documents", "text_tokens", "unknown_tokens", "row_tokens", "bytes", "rows", "targets"), 0
        )
        self._rearranged = {"documents": 0, "text_tokens": 0, "pieces": 0}
        self._waiting: list[Document] = []
        self._waiting_tokens = 0
        self._id_type = pa.uint16() if vocabulary_size(tokenizer) <= 1 << 16 else pa.int32()
        columns = {"input_ids": pa.list_(self._id_type), "lengths": pa.list_(pa.int32())}
        if objective in TOKEN_FLAGS:
            columns[TOKEN_FLAGS[objective]] = pa.list_(pa.bool_())
        self._schema = pa.schema(columns)
        self._writer = pa.ipc.new_stream(sink, self._schema)

    def add(self, document: Document) -> None:
        """Count a document, and pack it unless it is left out."""
        reason = document.left_out or self._reason_to_leave_out(document)
        if reason:
            self.left_out[reason] += 1
            return
        self._counts["documents"] += 1
        self._counts["targets"] += document.targets
        self._counts["text_tokens"] += len(document.ids)
        self._counts["unknown_tokens"] += document.unknown_tokens
        self._counts["bytes"] += document.text_bytes
        if document.pieces:
            self._rearranged["documents"] += 1
            self._rearranged["text_tokens"] += len(document.ids)
            self._rearranged["pieces"] += document.rearranged
        self._waiting.append(document)
        self._waiting_tokens += len(document.ids)
        if self._waiting_tokens >= WINDOW_TOKENS:
            self.flush()

    def _reason_to_leave_out(self, document: Document) -> str | None:
        if self.objective == "sft" and len(document.ids) > self.max_length:
            self.too_long.append(len(document.ids))
            return TOO_LONG
        if not document.targets:
            return ONE_TOKEN if self.objective == "span" else NO_TARGETS
        return None

    def flush(self) -> None:
        """Pack the waiting documents and write their rows."""
        pieces = [piece for document in self._waiting for piece in self._cut(document)]
        costs = [self._row_cost(len(ids)) for ids, _ in pieces]
        rows = best_fit(costs, self.max_length)
        self._counts["row_tokens"] += sum(costs)
        for start in range(0, len(rows), BATCH_ROWS):
            self._write(rows[start : start + BATCH_ROWS], pieces)
        self._waiting = []
        self._waiting_tokens = 0

    def _row_cost(self, tokens: int) -> int:
        return tokens if self.span_row_cost is None else int(self.span_row_cost[tokens])

    def _cut(self, document: Document) -> Iterator[Piece]:
        """The pieces of a document with their frame."""
        if self.objective == "sft":
            yield document.ids, document.token_flags
        elif self.objective == "clm":
            yield from _cut_causal(document, self.frame, self.max_length)
        elif self.objective == "span":
            yield from _cut_for_spans(document, len(self.span_row_cost) - 1)
        else:
            yield from _cut_masked(document, self.frame, self.max_length)

    def _write(self, rows: list[list[int]], pieces: list[Piece]) -> None:
        """Write rows, each given by the numbers of its pieces."""
        order = [piece for row in rows for piece in row]
        lengths = np.array([len(pieces[piece][0]) for piece in order], dtype=np.int32)
        piece_offsets = np.cumsum([0, *(len(row) for row in rows)], dtype=np.int32)
        token_offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)[piece_offsets]
        ids = np.concatenate([pieces[piece][0] for piece in order])
        columns = [
            pa.ListArray.from_arrays(token_offsets, pa.array(ids, self._id_type)),
            pa.ListArray.from_arrays(piece_offsets, pa.array(lengths, pa.int32())),
        ]
        if self.objective in TOKEN_FLAGS:
            flags = np.concatenate([pieces[piece][1] for piece in order])
            columns.append(pa.ListArray.from_arrays(token_offsets, pa.array(flags, pa.bool_())))
        self._writer.write_batch(pa.record_batch(columns, schema=self._schema))
        self._counts["rows"] += len(rows)

    def close(self) -> dict:
        """Write the remaining rows and return the counts for the manifest."""
        self.flush()
        self._writer.close()
        counts: dict[str, Any] = {**self._counts, "left_out": dict(self.left_out)}
        if self.objective == "span":
            del counts["targets"]  # they depend on the denoiser that a text meets
        if self._rearranged["documents"]:
            counts["rearranged"] = self._rearranged
        counts["packing_efficiency"] = counts["row_tokens"] / max(counts["rows"] * self.max_length, 1)
        return counts


def _cut_causal(document: Document, frame: Framing, max_length: int) -> Iterator[Piece]:
    """Pieces that overlap by one token, so that every token is predicted exactly once."""
    framed = document.pieces or [np.concatenate([[frame.prefix_id], document.ids, [frame.suffix_id]])]
    for ids in framed:
        for start, end in split_points(len(ids), max_length, overlap=1):
            yield ids[start:end], None


def _cut_masked(document: Document, frame: Framing, max_length: int) -> Iterator[Piece]:
    """Pieces with a frame each, and the word starts. A word that is cut starts again in its second piece."""
    for start, end in split_points(len(document.ids), max_length - 2, overlap=0):
        word_starts = document.token_flags[start:end].copy()
        word_starts[:1] = True
        ids = np.concatenate([[frame.prefix_id], document.ids[start:end], [frame.suffix_id]])
        yield ids, np.concatenate([[True], word_starts, [True]])


def _cut_for_spans(document: Document, max_length: int) -> Iterator[Piece]:
    """Pieces without a frame, as the collator corrupts them first. A last piece of one token takes a second one."""
    points = split_points(len(document.ids), max_length, overlap=0)
    if len(points) > 1:
        last_start, last_end = points[-1]
        if last_end - last_start == 1:  # a single token leaves nothing to restore it from
            points[-2] = (points[-2][0], last_start - 1)
            points[-1] = (last_start - 1, last_end)
    for start, end in points:
        yield document.ids[start:end], None
