"""Text straight into training: tokenised and packed a little ahead of the steps that need it.

A stream is dealt to lanes, at most `LANES` and as many as divide a batch; each batch takes equally many rows from every
lane. A lane reads its own shares of the files, in an order that (seed, epoch) decide, and packs a window of documents
at a time. So a batch is the same for any number of processes, each of which reads the lanes that it needs, and where a
lane stands is a handful of numbers, which every checkpoint keeps. Shares and the rows of a window are shuffled by
computed orders: there is no shuffle buffer whose content a checkpoint would lose.
"""

import json
import os
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pyarrow as pa

from unlabeled.data.files import skipped_files
from unlabeled.data.identity import fingerprint, stream_identity
from unlabeled.data.packing import span_row_cost
from unlabeled.data.preparing import Document, Split, tokenised
from unlabeled.data.randomness import seeded_generator
from unlabeled.data.rows import RunRows, read_examples
from unlabeled.data.sources import Source
from unlabeled.data.streams.reading import StreamShard, chunks, files_of, read_with_retries, shares_of
from unlabeled.data.tokenization import framing, tokenizer_fingerprint, vocabulary_size
from unlabeled.errors import UserError
from unlabeled.planning.spans import Denoiser
from unlabeled.runtime.files import write_json
from unlabeled.runtime.processes import compute_once

LANES = 64
WINDOW_ROWS = 64  # packed together


class StreamedRows(RunRows):
    """The rows of a run like `packing.TrainingRows`, read while it trains; positions have to be asked for in order.

    Args:
        sources: several are mixed by their weights, in tokens, within each lane.
        manifest: of the prepared evaluation text; it says how to tokenise and pack.
        args: for the budget and the seed.

    Attributes:
        manifest: completed by what the stream is; the counts of its text are estimates from the first chunk of each
            source.

    Raises:
        UserError: the files cannot be streamed, or are too few for the lanes.
    """

    def __init__(self, sources: list[Source], tokenizer, manifest: dict, args):
        if args.dataloader_num_workers:
            raise UserError("a stream reads ahead by itself; remove dataloader_num_workers")
        self.sources, self.tokenizer, self.seed = sources, tokenizer, args.seed
        super().__init__(total=args.max_steps * args.rows_per_step)
        self.rows_per_step = args.rows_per_step
        self.lanes = max(n for n in range(1, LANES + 1) if self.rows_per_step % n == 0)
        self.rows_per_lane = self.rows_per_step // self.lanes  # in a step
        self.objective, self.max_length = manifest["objective"], manifest["max_length"]
        self.fim_rate = manifest.get("fim_rate", 0.0)
        denoisers = [Denoiser(**denoiser) for denoiser in manifest.get("denoisers", ())]
        self.room = span_row_cost(denoisers, self.max_length) if denoisers else None
        files = [files_of(source) for source in sources]
        self.shares = [shares_of(list(found), self.lanes) for found in files]
        for source, shares in zip(sources, self.shares, strict=True):
            if len(shares) < self.lanes:
                raise UserError(f"{source.path} is too small to stream, {len(shares)} texts; remove stream")
        self._lanes: dict[int, Lane] = {}
        self._saved: dict[str, dict] = {}
        self._readers: dict[tuple[int, int], tuple[list, Iterator]] = {}  # those that can simply read on
        self.thread = ThreadPoolExecutor(1, "stream")
        self.manifest = manifest | self._describe(files, manifest)

    def _describe(self, files: list[dict[str, int]], manifest: dict) -> dict:
        """What the manifest says of a stream: its identity, and counts that are estimated from its beginning."""
        train: Counter = Counter()
        left_out: Counter = Counter()
        repaired: Counter = Counter(manifest["repaired"])
        for source, sizes in zip(self.sources, files, strict=True):
            counts = self._estimate_counts(source, sizes)
            left_out.update(counts.pop("left_out"))
            repaired.update(counts.pop("repaired"))
            train.update(counts)
        efficiency = train["row_tokens"] / (train["rows"] * self.max_length)
        counts = dict(train) | {"left_out": dict(left_out), "estimated": True, "packing_efficiency": efficiency}
        identities = compute_once(
            lambda: [stream_identity(source, sizes) for source, sizes in zip(self.sources, files, strict=True)]
        )
        plan = {
            "train": identities,
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
            "lanes": self.lanes,
            "validation_fingerprint": manifest["fingerprint"],
        }
        skipped = skipped_files(self.sources)
        for reason, paths in manifest["skipped_files"].items():  # of the evaluation text
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
        """The counts of a whole source, as its first chunk with text suggests them."""
        repaired: Counter = Counter()

        def read(file: str) -> Iterator[tuple[int, float, list[str]]]:
            return read_with_retries(
                lambda place: chunks(StreamShard(file, 0, 1), source.text_column, place, repaired), None, file
            )

        beginnings = (
            (file, part, texts)
            for file in sizes
            for _, part, texts in read(file)
            if any(text and not text.isspace() for text in texts)
        )
        file, part, texts = next(beginnings, (None, 1.0, []))
        if file is None:
            raise UserError(f"{source.path} has no text; leave it out")
        split, _ = self._new_split()
        for document in self._tokenised(texts):
            split.add(document)
        counts = split.close()
        if counts["unknown_tokens"] == counts["text_tokens"]:
            raise UserError(f"the tokenizer knows no token of {source.path}; choose one made from such text")
        factor = max(sum(sizes.values()) / sizes[file] / part, 1.0)
        estimates = {key: round(count * factor) for key, count in counts.items() if isinstance(count, int)}
        for key, by_reason in (("left_out", counts["left_out"]), ("repaired", repaired)):
            estimates[key] = {reason: round(count * factor) for reason, count in by_reason.items()}
        return estimates

    # --- One window of one lane: a function of where the lane stands ------------------------------------------------

    def _tokenised(self, texts: list[str]) -> Iterator[Document]:
        return tokenised(texts, self.tokenizer, self.objective, 0.0, self.fim_rate, self.max_length)

    def _new_split(self) -> tuple[Split, pa.BufferOutputStream]:
        sink = pa.BufferOutputStream()
        id_type = pa.uint16() if vocabulary_size(self.tokenizer) <= 1 << 16 else pa.int32()
        frame = framing(self.tokenizer, self.objective)
        return Split(sink, frame, self.objective, self.max_length, id_type, self.room), sink

    def read_window(self, lane: int, start: dict) -> tuple[list[dict], dict]:
        """The rows of the window that starts there, and where the next one starts."""
        from datasets import Dataset

        places, tokens = [list(place) for place in start["places"]], list(start["tokens"])
        split, sink = self._new_split()
        read = 0
        while read < WINDOW_ROWS * self.max_length:
            index = min(range(len(self.sources)), key=lambda i: tokens[i] / self.sources[i].weight)
            document = self._next(lane, index, places)
            split.add(document)
            tokens[index] += len(document.ids)
            read += len(document.ids)
        split.close()
        packed = Dataset.from_buffer(sink.getvalue()).with_format("numpy")
        order = seeded_generator("window", self.seed, lane, start["window"]).permutation(len(packed))
        rows = read_examples(packed, [(0, row) for row in order])
        return rows, {"window": start["window"] + 1, "places": places, "tokens": tokens}

    def _next(self, lane: int, source: int, places: list) -> Document:
        """The next document of a source in a lane, whose place moves on."""
        place, reader = self._readers.pop((lane, source), (None, None))
        if place != places[source]:
            reader = self._documents(lane, source, *places[source])
        document, places[source] = next(reader)
        self.heartbeat()
        self._readers[lane, source] = (places[source], reader)
        return document

    def _documents(
        self, lane: int, source: int, epoch: int, share: int, chunk: int | None, read: int
    ) -> Iterator[tuple[Document, list]]:
        """The documents of a lane without end, each with the place after it: epoch, share, chunk, documents read."""
        column, path, empty = self.sources[source].text_column, self.sources[source].path, 0
        while True:
            order = seeded_generator("shares", self.seed, source, epoch).permutation(len(self.shares[source]))[
                lane :: self.lanes
            ]
            while share < len(order):
                one = self.shares[source][order[share]]
                for after, _, texts in read_with_retries(
                    lambda place, one=one: chunks(one, column, place), chunk, one.file
                ):
                    documents = (document for document in self._tokenised(texts) if document.left_out is None)
                    for number, document in enumerate(documents):
                        if number >= read:
                            empty = 0
                            yield document, [epoch, share, chunk, number + 1]
                    chunk, read = after, 0
                share, chunk, empty = share + 1, None, empty + 1
                if empty == 10 * len(order):
                    raise UserError(f"{path} has no text for one of {self.lanes} lanes; remove stream, or add text")
            epoch, share = epoch + 1, 0

    # --- The rows of the run ---------------------------------------------------------------------------------------

    def read(self, positions: list[int]) -> list[dict]:
        return [self._row(position) for position in positions]

    def _row(self, position: int) -> dict:
        step, place = divmod(position, self.rows_per_step)
        lane, row = divmod(place, self.rows_per_lane)
        if lane not in self._lanes:
            self._lanes[lane] = Lane(self, lane, self._saved.get(str(lane)))
        example = self._lanes[lane].row(step * self.rows_per_lane + row)
        return example | {"epoch": 0, "row": position}

    def save(self, checkpoint: str, step: int, process_index: int) -> None:
        """Write where the lanes of this process stand after a step."""
        state = {str(number): lane.start_of(step * self.rows_per_lane) for number, lane in self._lanes.items()}
        write_json(os.path.join(checkpoint, f"stream-{process_index}.json"), state)

    def resume(self, position: int, checkpoint: str) -> None:
        """Begin at a position, with what all processes saved when they were there."""
        super().resume(position, checkpoint)
        self._lanes.clear()
        for file in Path(checkpoint).glob("stream-*.json"):
            self._saved |= json.loads(file.read_text(encoding="utf-8"))


class Lane:
    """The rows of one lane, two windows at a time: the one in use, and the next one, read in the background."""

    def __init__(self, stream: StreamedRows, number: int, start: dict | None):
        sources = len(stream.sources)
        nowhere = {"window": 0, "places": [[0, 0, None, 0]] * sources, "tokens": [0] * sources}
        self.read = partial(stream.thread.submit, stream.read_window, number)
        start = start or {"first": 0, "window": nowhere}
        self.first, self.rows = start["first"], []  # the lane's number of the first row of the window in use
        self.starts = deque()  # of the windows that a checkpoint may need
        self.next, self.ahead = start["window"], self.read(start["window"])

    def row(self, number: int) -> dict:
        if self.starts and number < self.first:
            raise IndexError(f"row {number} of a stream has been read; ask for rows in order")
        while number >= self.first + len(self.rows):
            self.first += len(self.rows)
            self.starts.append({"first": self.first, "window": self.next})
            self.rows, self.next = self.ahead.result()
            self.ahead = self.read(self.next)
        return self.rows[number - self.first]

    def start_of(self, number: int) -> dict:
        """Where to start from when the next row is that one; it forgets what is before."""
        while len(self.starts) > 1 and self.starts[1]["first"] <= number:
            self.starts.popleft()
        return self.starts[0]
