"""Text straight into training: tokenized and packed shortly before the steps that need it.

A stream is divided into shards, at most `MAX_SHARDS` and a number that divides a batch; every batch takes equally many
rows from each shard. A shard reads its own segments of the files, in an order that depends on (seed, epoch), and packs
a window of documents at a time. A batch is therefore the same for any number of processes, each of which reads the
shards that it needs, and the position of a shard is a handful of numbers, which every checkpoint keeps. Segments and
the rows of a window are shuffled by computed orders: there is no shuffle buffer whose content a checkpoint would lose.
"""

import json
import os
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from unlabeled.config import BudgetArguments
from unlabeled.data.documents import Document, tokenize_texts
from unlabeled.data.files import skipped_files
from unlabeled.data.identity import fingerprint, stream_identity
from unlabeled.data.packing import span_row_cost
from unlabeled.data.randomness import seeded_generator
from unlabeled.data.row_writer import SplitWriter
from unlabeled.data.rows import RunRows, read_examples
from unlabeled.data.sources import Source
from unlabeled.data.streams.reading import Chunk, FileSegment, read_chunks, read_with_retries, split_files, stream_files
from unlabeled.data.tokenization import tokenizer_fingerprint
from unlabeled.errors import UserError
from unlabeled.planning.spans import Denoiser
from unlabeled.runtime.files import write_json
from unlabeled.runtime.processes import compute_once

MAX_SHARDS = 64
WINDOW_ROWS = 64  # packed together
EMPTY_EPOCHS = 10  # without a document, after which a shard gives up


class SourcePosition(NamedTuple):
    """Where a shard is in a source.

    Attributes:
        epoch: of the source.
        segment: index in the shard's order of segments.
        chunk: position in the file at which the current chunk starts, None at the start of a segment.
        documents: documents of the chunk that were read.
    """

    epoch: int = 0
    segment: int = 0
    chunk: int | None = None
    documents: int = 0


@dataclass(frozen=True)
class WindowStart:
    """Where a window of a shard starts; together with the seed it determines the window.

    Attributes:
        window: index of the window.
        positions: the position in each source.
        tokens: tokens read from each source.
    """

    window: int
    positions: list[SourcePosition]
    tokens: list[int]

    @classmethod
    def first(cls, sources: int) -> "WindowStart":
        """The start of the first window of a shard."""
        return cls(0, [SourcePosition()] * sources, [0] * sources)

    @classmethod
    def from_json(cls, state: dict[str, Any]) -> "WindowStart":
        positions = [SourcePosition(*position) for position in state["positions"]]
        return cls(state["window"], positions, state["tokens"])


class StreamedRows(RunRows):
    """The rows of a run like `rows.TrainingRows`, read during training; positions have to be asked for in order.

    Args:
        sources: several are mixed by their weights, in tokens, within each shard.
        tokenizer: with the tokens that the objective needs.
        manifest: of the prepared held-out text; it says how to tokenize and pack.
        args: for the budget and the seed.

    Attributes:
        shards: the number of shards.
        manifest: completed by the description of the stream. The counts of its text are estimated from the first chunk
            of each source.

    Raises:
        UserError: the files cannot be streamed, or are too few for the shards.
    """

    def __init__(
        self, sources: list[Source], tokenizer: PreTrainedTokenizerFast, manifest: dict, args: BudgetArguments
    ):
        if args.dataloader_num_workers:
            raise UserError("a stream reads ahead by itself; remove dataloader_num_workers")
        super().__init__(total=args.max_steps * args.rows_per_step)
        self.sources = sources
        self.tokenizer = tokenizer
        self.seed = args.seed
        self.rows_per_step = args.rows_per_step
        self.shards = max(count for count in range(1, MAX_SHARDS + 1) if self.rows_per_step % count == 0)
        self.rows_per_shard = self.rows_per_step // self.shards  # in a step
        self.objective = manifest["objective"]
        self.max_length = manifest["max_length"]
        self.fim_rate = manifest.get("fim_rate", 0.0)
        denoisers = [Denoiser(**denoiser) for denoiser in manifest.get("denoisers", ())]
        self.span_row_cost = span_row_cost(denoisers, self.max_length) if denoisers else None
        file_sizes = [stream_files(source) for source in sources]
        self.segments = [split_files(list(sizes), self.shards) for sizes in file_sizes]
        for source, segments in zip(sources, self.segments, strict=True):
            if len(segments) < self.shards:
                raise UserError(f"{source.path} is too small to stream, {len(segments)} texts; remove stream")
        self._shards: dict[int, StreamShard] = {}
        self._saved: dict[str, dict] = {}
        # For each shard and source, a reader that can simply continue, and its position.
        self._readers: dict[tuple[int, int], tuple[SourcePosition, Iterator]] = {}
        self.thread = ThreadPoolExecutor(1, "stream")
        self.manifest = manifest | self._describe(file_sizes, manifest)

    # --- The manifest -------------------------------------------------------------------------------------------------

    def _describe(self, file_sizes: list[dict[str, int]], manifest: dict) -> dict:
        """What the manifest says of a stream: its identity, and counts that are estimated from its beginning."""
        train: Counter = Counter()
        left_out: Counter = Counter()
        repaired: Counter = Counter(manifest["repaired"])
        for source, sizes in zip(self.sources, file_sizes, strict=True):
            counts = self._estimate_counts(source, sizes)
            left_out.update(counts.pop("left_out"))
            repaired.update(counts.pop("repaired"))
            train.update(counts)
        efficiency = train["row_tokens"] / (train["rows"] * self.max_length)
        counts = dict(train) | {"left_out": dict(left_out), "estimated": True, "packing_efficiency": efficiency}
        identities = compute_once(
            lambda: [stream_identity(source, sizes) for source, sizes in zip(self.sources, file_sizes, strict=True)]
        )
        plan = {
            "train": identities,
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
            "shards": self.shards,
            "validation_fingerprint": manifest["fingerprint"],
        }
        skipped = skipped_files(self.sources)
        for reason, paths in manifest["skipped_files"].items():  # of the held-out text
            skipped[reason] = sorted({*skipped.get(reason, []), *paths})
        return {
            "fingerprint": fingerprint(plan),
            "train": identities,
            "skipped_files": skipped,
            "repaired": dict(repaired),
            "sources": [{"path": source.path, "tokens": source.weight} for source in self.sources],
            "splits": {"train": counts, "validation": manifest["splits"]["validation"]},
        }

    def _estimate_counts(self, source: Source, sizes: dict[str, int]) -> dict:
        """The counts of a whole source, extrapolated from its first chunk with text."""
        repaired: Counter = Counter()
        file, chunk = self._first_chunk_with_text(source, sizes, repaired)
        writer = self._new_writer(pa.BufferOutputStream())
        for document in self._tokenize(chunk.texts):
            writer.add(document)
        counts = writer.close()
        if counts["unknown_tokens"] == counts["text_tokens"]:
            raise UserError(f"the tokenizer knows no token of {source.path}; choose one made from such text")
        factor = max(sum(sizes.values()) / sizes[file] / chunk.progress, 1.0)
        estimates: dict[str, Any] = {
            key: round(count * factor) for key, count in counts.items() if isinstance(count, int)
        }
        for key, by_reason in (("left_out", counts["left_out"]), ("repaired", repaired)):
            estimates[key] = {reason: round(count * factor) for reason, count in by_reason.items()}
        return estimates

    def _first_chunk_with_text(self, source: Source, sizes: dict[str, int], repaired: Counter) -> tuple[str, Chunk]:
        for file in sizes:
            segment = FileSegment(file, 0, 1)

            def read(position: int | None, segment: FileSegment = segment) -> Iterator[Chunk]:
                return read_chunks(segment, source.text_column, position, repaired)

            for chunk in read_with_retries(read, None, file):
                if any(text and not text.isspace() for text in chunk.texts):
                    return file, chunk
        raise UserError(f"{source.path} has no text; leave it out")

    # --- One window of a shard: a function of where it starts ---------------------------------------------------------

    def _tokenize(self, texts: list[str]) -> Iterator[Document]:
        return tokenize_texts(texts, self.tokenizer, self.objective, 0.0, self.fim_rate, self.max_length)

    def _new_writer(self, sink: pa.BufferOutputStream) -> SplitWriter:
        return SplitWriter(sink, self.tokenizer, self.objective, self.max_length, self.span_row_cost)

    def read_window(self, shard: int, start: WindowStart) -> tuple[list[dict], WindowStart]:
        """The rows of the window that starts there, and where the next one starts."""
        positions = list(start.positions)
        tokens = list(start.tokens)
        sink = pa.BufferOutputStream()
        writer = self._new_writer(sink)
        window_tokens = 0
        while window_tokens < WINDOW_ROWS * self.max_length:
            source = min(range(len(self.sources)), key=lambda i: tokens[i] / self.sources[i].weight)
            document, positions[source] = self._next_document(shard, source, positions[source])
            writer.add(document)
            tokens[source] += len(document.ids)
            window_tokens += len(document.ids)
        writer.close()
        packed = Dataset.from_buffer(sink.getvalue()).with_format("numpy")
        order = seeded_generator("window", self.seed, shard, start.window).permutation(len(packed))
        rows = read_examples(packed, [(0, row) for row in order])
        return rows, WindowStart(start.window + 1, positions, tokens)

    def _next_document(self, shard: int, source: int, position: SourcePosition) -> tuple[Document, SourcePosition]:
        """The next document of a source in a shard, and the position after it."""
        reader_position, reader = self._readers.pop((shard, source), (None, None))
        if reader is None or reader_position != position:
            reader = self.read_documents(shard, source, position)
        document, position = next(reader)
        self.heartbeat()
        self._readers[shard, source] = (position, reader)
        return document, position

    def read_documents(
        self, shard: int, source: int, position: SourcePosition
    ) -> Iterator[tuple[Document, SourcePosition]]:
        """The documents of a source in a shard, epoch after epoch without end, each with the position after it.

        Raises:
            UserError: the shard has no text.
        """
        column = self.sources[source].text_column
        epoch, number, chunk_start, documents_read = position
        segments_without_text = 0
        while True:
            order = self._segment_order(shard, source, epoch)
            while number < len(order):
                segment = self.segments[source][order[number]]

                def read(chunk: int | None, segment: FileSegment = segment) -> Iterator[Chunk]:
                    return read_chunks(segment, column, chunk)

                for chunk in read_with_retries(read, chunk_start, segment.file):
                    documents = (document for document in self._tokenize(chunk.texts) if document.left_out is None)
                    for index, document in enumerate(documents):
                        if index >= documents_read:
                            segments_without_text = 0
                            yield document, SourcePosition(epoch, number, chunk_start, index + 1)
                    chunk_start = chunk.end
                    documents_read = 0
                number += 1
                chunk_start = None
                segments_without_text += 1
                if segments_without_text == EMPTY_EPOCHS * len(order):
                    path = self.sources[source].path
                    raise UserError(f"{path} has no text for one of {self.shards} shards; remove stream, or add text")
            epoch += 1
            number = 0

    def _segment_order(self, shard: int, source: int, epoch: int) -> list[int]:
        """The segments of a shard in one epoch."""
        permutation = seeded_generator("shares", self.seed, source, epoch).permutation(len(self.segments[source]))
        return permutation[shard :: self.shards].tolist()

    # --- The rows of the run ------------------------------------------------------------------------------------------

    def read(self, positions: list[int]) -> list[dict]:
        return [self._read_row(position) for position in positions]

    def _read_row(self, position: int) -> dict:
        step, row_of_step = divmod(position, self.rows_per_step)
        number, row = divmod(row_of_step, self.rows_per_shard)
        if number not in self._shards:
            self._shards[number] = StreamShard(self, number, self._saved.get(str(number)))
        example = self._shards[number].row(step * self.rows_per_shard + row)
        return example | {"epoch": 0, "row": position}

    def save(self, checkpoint: str, step: int, process_index: int) -> None:
        """Write the positions of the shards of this process after a step."""
        state = {str(number): shard.state_at(step * self.rows_per_shard) for number, shard in self._shards.items()}
        write_json(os.path.join(checkpoint, f"stream-{process_index}.json"), state)

    def resume(self, position: int, checkpoint: str) -> None:
        """Continue at a position, with what all processes saved there."""
        super().resume(position, checkpoint)
        self._shards.clear()
        for file in Path(checkpoint).glob("stream-*.json"):
            self._saved |= json.loads(file.read_text(encoding="utf-8"))


class StreamShard:
    """The rows of one shard, two windows at a time: the current one, and the next one, read in the background.

    Args:
        stream: the stream.
        number: of the shard.
        state: as `state_at` gives it, or None for the beginning.
    """

    def __init__(self, stream: StreamedRows, number: int, state: dict | None):
        self.stream = stream
        self.number = number
        self.first = state["first"] if state else 0  # the number of the first row of the current window
        self.rows: list[dict] = []
        self.next_start = WindowStart.from_json(state["window"]) if state else WindowStart.first(len(stream.sources))
        self.next_window = self._read_ahead()
        self.starts: deque[tuple[int, WindowStart]] = deque()  # (first row, start) of windows a checkpoint may need

    def _read_ahead(self) -> Future[tuple[list[dict], WindowStart]]:
        return self.stream.thread.submit(self.stream.read_window, self.number, self.next_start)

    def row(self, number: int) -> dict:
        """A row by its number in the shard.

        Raises:
            IndexError: its window has been passed.
        """
        if self.starts and number < self.first:
            raise IndexError(f"row {number} of a stream has been read; ask for rows in order")
        while number >= self.first + len(self.rows):
            self.first += len(self.rows)
            self.starts.append((self.first, self.next_start))
            self.rows, self.next_start = self.next_window.result()
            self.next_window = self._read_ahead()
        return self.rows[number - self.first]

    def state_at(self, number: int) -> dict:
        """The state from which a run continues with this row, as JSON. Forgets what lies before it."""
        while len(self.starts) > 1 and self.starts[1][0] <= number:
            self.starts.popleft()
        first, start = self.starts[0]
        return {"first": first, "window": asdict(start)}
