"""Text to packed Arrow, once: tokenised in parallel, cut, packed, and described by a manifest.

A prepared folder holds `train.arrow`, `validation.arrow` and `manifest.json`. Its name is a fingerprint of everything
that determines its content (text, tokenizer, objective, row length), so a recipe finds it again and never uses a stale
one.
"""

import errno
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from unlabeled.data.conversations import LeftOut, read_conversations
from unlabeled.data.files import skipped_files
from unlabeled.data.fim import is_rearranged, rearrange
from unlabeled.data.held_out import check_held_out, unit_hash
from unlabeled.data.identity import fingerprint, identity
from unlabeled.data.left_out import EMPTY_TEXT, TOO_LONG, describe_lengths, join_reasons
from unlabeled.data.mixing import mix
from unlabeled.data.packing import best_fit, span_row_cost, split_points
from unlabeled.data.readers import read_documents
from unlabeled.data.sources import Source
from unlabeled.data.tokenization import Framing, encode_batch, framing, tokenizer_fingerprint, vocabulary_size
from unlabeled.errors import UserError
from unlabeled.planning.spans import Denoiser, span_lengths
from unlabeled.runtime.files import file_sha256, read_json, write_json
from unlabeled.runtime.staging import folder_lock, staged_folder

# Part of the fingerprint: raise it when the same text would give other rows, or the manifest lacks what is read.
FORMAT_VERSION = 4
SPLITS = ("train", "validation")
BATCH_CHARACTERS = 4_000_000  # handed to the tokenizer's threads at a time
BATCH_DOCUMENTS = 10_000
WINDOW_TOKENS = 4_000_000  # tokens packed together; packing efficiency hardly grows beyond that
MARKS = {"mlm": "word_starts", "sft": "targets"}  # the column of bools beside the ids

# Why a document is left out.
NO_TOKENS = "no token of the tokenizer"
ONE_TOKEN = "one token, of which no span can be restored"
NO_TARGETS = "nothing to learn"


@dataclass
class Document:
    """One tokenised document: ids int32 (n,), what `MARKS` names as bool (n,), and counts.

    `left_out` is the reason for which it is counted and not trained on, or None.
    """

    ids: np.ndarray
    marks: np.ndarray | None
    bytes: int
    targets: int
    held_out: bool
    unknown_tokens: int = 0
    pieces: list[np.ndarray] = field(default_factory=list)  # with their frame, where the text is rearranged
    rearranged: int = 0  # of the pieces
    left_out: str | None = None


def left_out_document(reason: str) -> Document:
    """A document that is only counted."""
    return Document(np.empty(0, np.int32), np.empty(0, bool), bytes=0, targets=0, held_out=False, left_out=reason)


@dataclass
class Split:
    """The rows of one split while they are written; its counts go into the manifest."""

    sink: str | pa.NativeFile
    frame: Framing
    objective: str
    max_length: int
    id_type: pa.DataType
    room: np.ndarray | None = None  # spans: by the length of a text, what it takes of a row
    documents: int = 0
    left_out: Counter = field(default_factory=Counter)  # by reason
    long: list[int] = field(default_factory=list)  # the lengths of those that are longer than a row
    text_tokens: int = 0
    unknown_tokens: int = 0
    row_tokens: int = 0
    targets: int = 0
    bytes: int = 0
    rows: int = 0
    rearranged: dict = field(default_factory=lambda: {"documents": 0, "text_tokens": 0, "pieces": 0})
    waiting: list[Document] = field(default_factory=list)
    waiting_tokens: int = 0

    def __post_init__(self):
        columns = {"input_ids": pa.list_(self.id_type), "lengths": pa.list_(pa.int32())}
        if self.objective in MARKS:
            columns[MARKS[self.objective]] = pa.list_(pa.bool_())
        self.schema = pa.schema(columns)
        self.writer = pa.ipc.new_stream(self.sink, self.schema)

    def add(self, document: Document) -> None:
        reason = document.left_out or self._reason_to_leave_out(document)
        if reason:
            self.left_out[reason] += 1
            return
        self.documents += 1
        self.targets += document.targets
        self.text_tokens += len(document.ids)
        self.unknown_tokens += document.unknown_tokens
        self.bytes += document.bytes
        if document.pieces:
            for key, more in zip(self.rearranged, (1, len(document.ids), document.rearranged), strict=True):
                self.rearranged[key] += more
        self.waiting.append(document)
        self.waiting_tokens += len(document.ids)
        if self.waiting_tokens >= WINDOW_TOKENS:
            self.flush()

    def _reason_to_leave_out(self, document: Document) -> str | None:
        if self.objective == "sft" and len(document.ids) > self.max_length:
            self.long.append(len(document.ids))
            return TOO_LONG
        if not document.targets:
            return ONE_TOKEN if self.objective == "span" else NO_TARGETS
        return None

    def flush(self) -> None:
        """Pack the documents that wait and write their rows."""
        pieces = [piece for document in self.waiting for piece in self._pieces(document)]
        sizes = [len(ids) if self.room is None else int(self.room[len(ids)]) for ids, _ in pieces]
        rows = best_fit(sizes, self.max_length)
        self.row_tokens += sum(sizes)
        for start in range(0, len(rows), 1000):
            self._write(rows[start : start + 1000], pieces)
        self.waiting, self.waiting_tokens = [], 0

    def _pieces(self, document: Document) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        """The document's pieces with their frame; see `packing` for why causal pieces overlap."""
        prefix, suffix = [self.frame.prefix_id], [self.frame.suffix_id]
        if self.objective == "clm":
            for ids in document.pieces or [np.concatenate([prefix, document.ids, suffix])]:
                for start, end in split_points(len(ids), self.max_length, overlap=1):
                    yield ids[start:end], None
        elif self.objective == "sft":
            yield document.ids, document.marks
        elif self.objective == "span":  # bare: the collator corrupts a piece first and ends it then
            points = split_points(len(document.ids), len(self.room) - 1, overlap=0)
            if len(points) > 1 and points[-1][1] - points[-1][0] == 1:  # one token has nothing to be restored from
                points[-2:] = [(points[-2][0], points[-2][1] - 1), (points[-1][0] - 1, points[-1][1])]
            yield from ((document.ids[start:end], None) for start, end in points)
        else:
            for start, end in split_points(len(document.ids), self.max_length - 2, overlap=0):
                words = document.marks[start:end].copy()
                words[:1] = True  # a word that was cut starts anew in its second piece
                yield np.concatenate([prefix, document.ids[start:end], suffix]), np.concatenate([[True], words, [True]])

    def _write(self, rows: list[list[int]], pieces: list) -> None:
        order = [piece for row in rows for piece in row]
        lengths = np.array([len(pieces[piece][0]) for piece in order], dtype=np.int32)
        piece_offsets = np.cumsum([0, *(len(row) for row in rows)], dtype=np.int32)
        token_offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)[piece_offsets]
        tokens = np.concatenate([pieces[piece][0] for piece in order])
        columns = [
            pa.ListArray.from_arrays(token_offsets, pa.array(tokens, self.id_type)),
            pa.ListArray.from_arrays(piece_offsets, pa.array(lengths, pa.int32())),
        ]
        if self.objective in MARKS:
            marks = np.concatenate([pieces[piece][1] for piece in order])
            columns.append(pa.ListArray.from_arrays(token_offsets, pa.array(marks, pa.bool_())))
        self.writer.write_batch(pa.record_batch(columns, schema=self.schema))
        self.rows += len(rows)

    def close(self) -> dict:
        """Write what is left and return the counts for the manifest."""
        self.flush()
        self.writer.close()
        names = ("documents", "text_tokens", "unknown_tokens", "row_tokens", "bytes", "rows", "targets")
        counts = {name: getattr(self, name) for name in names}
        counts["left_out"] = dict(self.left_out)
        if self.objective == "span":
            del counts["targets"]  # they depend on the denoiser that a text meets
        if self.rearranged["documents"]:
            counts["rearranged"] = self.rearranged
        counts["packing_efficiency"] = self.row_tokens / max(self.rows * self.max_length, 1)
        return counts


def _conversations(source: Source, tokenizer, eval_fraction: float, repaired: Counter) -> Iterator[Document]:
    for conversation in read_conversations(source, tokenizer, repaired):
        if isinstance(conversation, LeftOut):
            yield left_out_document(conversation.reason)
            continue
        ids, targets = conversation.ids, conversation.targets
        held_out = eval_fraction > 0 and unit_hash(ids.tobytes()) < eval_fraction
        yield Document(ids, targets, conversation.target_bytes, int(targets[1:].sum()), held_out)


def batch_texts(texts: Iterable[str]) -> Iterator[list[str]]:
    """Group texts into lists that keep the tokenizer's threads busy and fit into memory."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS or len(batch) == BATCH_DOCUMENTS:
            yield batch
            batch = []
            size = 0
    if batch:
        yield batch


def tokenised(
    texts: Iterable[str], tokenizer, objective: str, eval_fraction: float = 0.0, fim_rate: float = 0.0, max_length=0
) -> Iterator[Document]:
    """Texts as documents, tokenised a batch at a time by the tokenizer's threads.

    Texts without content are documents that are left out; they come before the others of their batch.
    """
    unknown_id = -1 if tokenizer.unk_token_id in (None, tokenizer.eos_token_id) else tokenizer.unk_token_id
    for whole_batch in batch_texts(texts):
        batch = [text for text in whole_batch if text and not text.isspace()]
        for _ in range(len(whole_batch) - len(batch)):
            yield left_out_document(EMPTY_TEXT)
        if not batch:
            continue
        encoded = encode_batch(tokenizer, batch, word_starts=objective == "mlm")
        ids, words = encoded if objective == "mlm" else (encoded, [None] * len(batch))
        chosen = [text for text in batch if is_rearranged(text, fim_rate)]
        rearranged = rearrange(chosen, tokenizer, max_length) if chosen else {}
        for text, text_ids, text_words in zip(batch, ids, words, strict=True):
            if not len(text_ids):  # such as control characters
                yield left_out_document(NO_TOKENS)
                continue
            raw = text.encode("utf-8")
            # By content, so that a text and its exact copy always end on the same side.
            held_out = eval_fraction > 0 and unit_hash(raw) < eval_fraction
            # Causal: every token and the closing eos, exactly once. Of one token alone nothing can be restored.
            targets = len(text_ids) - 1 if objective == "span" else len(text_ids) + (objective == "clm")
            document = Document(text_ids, text_words, len(raw), targets, held_out, int((text_ids == unknown_id).sum()))
            if text in rearranged and not held_out:
                document.pieces = rearranged[text].pieces
                document.rearranged = rearranged[text].rearranged
                document.targets = sum(len(piece) - 1 for piece in document.pieces)
            yield document


def prepare(
    train: list[Source],
    evaluation: list[Source],
    tokenizer,
    objective: str,
    max_length: int,
    cache_dir: str,
    eval_fraction: float = 0.0,
    max_tokens: int | None = None,
    denoisers: Sequence[Denoiser] = (),
    fim_rate: float = 0.0,
) -> str:
    """Prepare text for an objective and return the folder; a folder that exists already is returned at once.

    Args:
        train, evaluation: sources; without `evaluation`, `eval_fraction` of the training documents is held out. Without
            `train` there is only the evaluation (the training text is a stream).
        objective: "clm" (documents start with bos, end with eos), "mlm" (each piece framed by cls and sep), "span"
            (bare pieces as long as fit after corruption) or "sft" (conversations, see `chat`).
        max_length: tokens in a row; of spans, those of the inputs.
        cache_dir: where prepared folders live.
        max_tokens: stop the training text after this many tokens.
        denoisers: of spans, those that a text may meet.
        fim_rate: of "clm", the share of the training documents to rearrange; `fim.add_fim_tokens` adds the tokens.

    Raises:
        UserError: for everything that is wrong with the text, the tokenizer or the folder.
    """
    _check_limits(objective, max_length, max_tokens, fim_rate)
    frame = framing(tokenizer, "clm" if objective == "sft" else objective)
    plan = {
        "format": FORMAT_VERSION,
        "objective": objective,
        "max_length": max_length,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "frame": [frame.prefix_id, frame.suffix_id],
        "train": [identity(source) for source in train],
        "evaluation": [identity(source) for source in evaluation],
        "eval_fraction": eval_fraction,
        "max_tokens": max_tokens,
    }
    if objective == "sft":
        plan["chat_template"] = tokenizer.chat_template
    if fim_rate:
        plan["fim_rate"] = fim_rate
    if denoisers:
        plan["raw_length"], plan["target_length"] = span_lengths(denoisers, max_length)
        plan["denoisers"] = [asdict(denoiser) for denoiser in denoisers]
    digest = fingerprint(plan)
    skipped = skipped_files([*train, *evaluation])
    folder = os.path.join(cache_dir, f"{objective}-{digest[:16]}")
    id_type = pa.uint16() if vocabulary_size(tokenizer) <= 1 << 16 else pa.int32()
    room = span_row_cost(denoisers, max_length) if denoisers else None
    repaired: Counter = Counter()

    def documents(source: Source, eval_fraction: float = 0.0, fim_rate: float = 0.0) -> Iterator[Document]:
        if objective == "sft":
            return _conversations(source, tokenizer, eval_fraction, repaired)
        return tokenised(read_documents(source, repaired), tokenizer, objective, eval_fraction, fim_rate, max_length)

    def write_rows(staged: Path) -> None:
        started = time.perf_counter()
        splits = {
            name: Split(str(staged / f"{name}.arrow"), frame, objective, max_length, id_type, room) for name in SPLITS
        }
        mixture = mix(train, lambda source: documents(source, eval_fraction, fim_rate), max_tokens)
        held_out = (document for source in evaluation for document in documents(source))
        shares = _fill(splits, mixture, len(train), held_out, max_tokens)
        counts = {name: split.close() for name, split in splits.items()}
        _check_splits(splits, counts, eval_fraction, bool(train))
        seconds = time.perf_counter() - started
        tokens = sum(split["text_tokens"] for split in counts.values())
        manifest = plan | {
            "fingerprint": digest,
            "skipped_files": skipped,
            "repaired": dict(repaired),
            "splits": counts,
            "sha256": _rows_sha256(staged),
            "sources": [share | {"path": source.path} for share, source in zip(shares, train, strict=True)],
            "seconds": round(seconds, 3),
            "seconds_per_million_tokens": round(seconds / tokens * 1e6, 3),
        }
        write_json(staged / "manifest.json", manifest)

    try:
        with staged_folder(folder) as staged:
            if staged is not None:
                write_rows(staged)
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = "make room, or set prepared_dir" if is_full else "set prepared_dir"
        raise UserError(f"cannot write prepared data to {cache_dir} ({error.strerror or error}); {remedy}") from error
    if staged is None:
        _update_manifest(folder, plan | {"skipped_files": skipped})
    return folder


def _check_limits(objective: str, max_length: int, max_tokens: int | None, fim_rate: float) -> None:
    """Refuse keys that leave nothing to learn, or do not fit together."""
    if objective == "mlm":
        least = 3
    elif objective == "span":
        least = 8
    else:
        least = 16 if fim_rate else 2
    if max_length < least:
        raise UserError(f"max_length {max_length} has no room for a target beside its frame; set it to {least} or more")
    if fim_rate and objective != "clm":
        raise UserError(f"fim_rate is for causal models, and the objective is {objective}; remove it")
    if max_tokens is not None and max_tokens < 1:
        raise UserError(f"max_tokens is {max_tokens}; set it to 1 or more, or remove it")


def _fill(
    splits: dict[str, Split],
    mixture: Iterator[tuple[int, Document]],
    sources: int,
    held_out: Iterator[Document],
    max_tokens: int | None,
) -> list[dict]:
    """Write the documents of the training sources and the held-out ones; what each training source gave."""
    from tqdm.auto import tqdm

    shares = [{"documents": 0, "tokens": 0, "bytes": 0} for _ in range(sources)]
    with tqdm(
        desc="tokenise and pack", unit=" tokens", unit_scale=True, total=max_tokens, leave=False, disable=None
    ) as bar:
        for index, document in mixture:
            splits["validation" if document.held_out else "train"].add(document)
            if document.left_out is None:
                shares[index]["documents"] += 1
            shares[index]["tokens"] += len(document.ids)
            shares[index]["bytes"] += document.bytes
            bar.update(len(document.ids))
        for document in held_out:
            splits["validation"].add(document)
            bar.update(len(document.ids))
    return shares


def _check_splits(splits: dict[str, Split], counts: dict[str, dict], eval_fraction: float, has_train: bool) -> None:
    """Refuse a split without rows, or of which the tokenizer knows nothing."""
    check_held_out(eval_fraction, counts["train"]["documents"], counts["validation"]["documents"])
    remedies = {"validation": "set eval_data to text that is not empty"}
    if has_train:
        remedies["train"] = "set train_data to text that is not empty"
    for name, remedy in remedies.items():
        if not counts[name]["rows"]:
            raise UserError(_no_rows(name, remedy, splits[name]))
        if counts[name]["unknown_tokens"] == counts[name]["text_tokens"]:
            raise UserError(f"the tokenizer knows no token of the {name} text; choose one made from such text")


def _update_manifest(folder: str, now: dict) -> None:
    """Let the manifest of prepared data that were found again name the paths of today, and what is not read there."""
    path = os.path.join(folder, "manifest.json")
    with suppress(OSError, ValueError):  # a folder that can only be read, or is damaged, which `load_prepared` reports
        before = read_json(path)
        manifest = before | now
        paths = [source["path"] for source in now["train"]]
        manifest["sources"] = [share | {"path": name} for share, name in zip(before["sources"], paths, strict=True)]
        if manifest != before:
            with folder_lock(folder):  # two processes that find the folder write one after the other
                write_json(path, manifest)


def _no_rows(name: str, remedy: str, split: Split) -> str:
    """Why a split is empty, and what to do about it."""
    if split.long and split.left_out.keys() == {TOO_LONG}:
        return (
            f"no conversation of the {name} data fits into max_length {split.max_length}; raise it: "
            f"{describe_lengths(split.long)}"
        )
    if split.left_out and set(split.left_out) != {EMPTY_TEXT}:
        return f"there is no {name} text to learn from ({join_reasons(split.left_out)}); {remedy}"
    return f"there is no {name} text; {remedy}"


def _rows_sha256(folder: str | Path) -> dict[str, str]:
    """sha256 of the rows of each split."""
    with ThreadPoolExecutor() as pool:  # hashing leaves the other threads alone
        return dict(zip(SPLITS, pool.map(file_sha256, (Path(folder, f"{name}.arrow") for name in SPLITS)), strict=True))


def load_prepared(folder: str, verify: bool = True):
    """The rows and the manifest of a prepared folder: ({"train": Dataset, "validation": Dataset}, dict), memory-mapped.

    Columns: `input_ids` (the documents of the row one after the other, not padded), `lengths` (tokens of each of them)
    and, for masked models, `word_starts`, for conversations `targets`.

    Args:
        verify: read every byte and compare it with the sha256 of the manifest: 0.9 GB/s on one core of an AMD EPYC
            with SHA instructions, 18 minutes for a terabyte. One process of a machine does this for the others.

    Raises:
        UserError: a file is missing or damaged.
    """
    from datasets import Dataset

    names = ["manifest.json", *(f"{split}.arrow" for split in SPLITS)]
    missing = [name for name in names if not os.path.isfile(os.path.join(folder, name))]
    if missing:
        raise _damaged(folder, f"{missing[0]} is missing")
    try:
        manifest = read_json(os.path.join(folder, "manifest.json"))
        rows = {name: Dataset.from_file(os.path.join(folder, f"{name}.arrow")) for name in SPLITS}
        wrong = [name for name in SPLITS if len(rows[name]) != manifest["splits"][name]["rows"]]
        if verify and not wrong:
            digests = _rows_sha256(folder)
            wrong = [name for name in SPLITS if digests[name] != manifest["sha256"][name]]
    except (OSError, pa.ArrowException) as error:  # pyarrow raises both for a file that is cut short
        raise _damaged(folder, f"it cannot be read: {str(error).splitlines()[0]}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise _damaged(folder, "manifest.json is incomplete") from error
    if wrong:
        raise _damaged(folder, f"{wrong[0]}.arrow has changed")
    return {name: split.with_format("numpy") for name, split in rows.items()}, manifest


def _damaged(folder: str, defect: str) -> UserError:
    return UserError(f"the prepared text in {folder} is damaged ({defect}); delete that folder and run this again")
