"""Prepared data: text tokenized, cut, packed, written as Arrow once, and described by a manifest.

A prepared folder holds `train.arrow`, `validation.arrow` and `manifest.json`. Its name is a fingerprint of everything
that determines its content (text, tokenizer, objective, row length), so that a recipe finds it again and never uses a
stale one.
"""

import errno
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast

from unlabeled.data.documents import Document, tokenize_conversations, tokenize_texts
from unlabeled.data.files import skipped_files
from unlabeled.data.held_out import check_held_out
from unlabeled.data.identity import fingerprint, identity
from unlabeled.data.left_out import EMPTY_TEXT, TOO_LONG, describe_lengths, join_reasons
from unlabeled.data.mixing import mix
from unlabeled.data.packing import span_row_cost
from unlabeled.data.readers import read_documents
from unlabeled.data.row_writer import SplitWriter
from unlabeled.data.sources import Source
from unlabeled.data.tokenization import framing, tokenizer_fingerprint
from unlabeled.errors import UserError
from unlabeled.planning.spans import Denoiser, span_lengths
from unlabeled.runtime.files import file_sha256, read_json, write_json
from unlabeled.runtime.staging import folder_lock, staged_folder

# Part of the fingerprint: raise it when the same text would give other rows, or the manifest lacks what is read.
FORMAT_VERSION = 4
SPLITS = ("train", "validation")


def prepare(
    train: list[Source],
    evaluation: list[Source],
    tokenizer: PreTrainedTokenizerFast,
    objective: str,
    max_length: int,
    cache_dir: str,
    eval_fraction: float = 0.0,
    max_tokens: int | None = None,
    denoisers: Sequence[Denoiser] = (),
    fim_rate: float = 0.0,
) -> str:
    """Prepare text for an objective and return the folder. A folder that exists already is returned at once.

    Args:
        train: sources of the training data; empty if the training text is streamed.
        evaluation: sources of the held-out data; empty if `eval_fraction` of the training documents is held out.
        tokenizer: with the tokens that the objective needs.
        objective: "clm" (documents start with bos and end with eos), "mlm" (each piece between cls and sep), "span"
            (pieces without a frame, as long as fits after corruption) or "sft" (conversations).
        max_length: tokens in a row; for "span", tokens of the inputs.
        cache_dir: where prepared folders are kept.
        eval_fraction: share of the training documents to hold out.
        max_tokens: stop the training text after this many tokens.
        denoisers: for "span", the denoisers that a text may meet.
        fim_rate: for "clm", share of the training documents to rearrange; `fim.add_fim_tokens` adds the tokens.

    Raises:
        UserError: there is something wrong with the text, the tokenizer or the folder.
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
    row_cost = None
    if denoisers:
        plan["raw_length"], plan["target_length"] = span_lengths(denoisers, max_length)
        plan["denoisers"] = [asdict(denoiser) for denoiser in denoisers]
        row_cost = span_row_cost(denoisers, max_length)
    digest = fingerprint(plan)
    skipped = skipped_files([*train, *evaluation])
    folder = os.path.join(cache_dir, f"{objective}-{digest[:16]}")
    repaired: Counter = Counter()

    def open_training_source(source: Source) -> Iterator[Document]:
        if objective == "sft":
            return tokenize_conversations(source, tokenizer, eval_fraction, repaired)
        texts = read_documents(source, repaired)
        return tokenize_texts(texts, tokenizer, objective, eval_fraction, fim_rate, max_length)

    def read_held_out() -> Iterator[Document]:
        for source in evaluation:
            if objective == "sft":
                yield from tokenize_conversations(source, tokenizer, 0.0, repaired)
            else:
                yield from tokenize_texts(read_documents(source, repaired), tokenizer, objective)

    def write_folder(staged: Path) -> None:
        started = time.perf_counter()
        writers = {
            split: SplitWriter(str(staged / f"{split}.arrow"), tokenizer, objective, max_length, row_cost)
            for split in SPLITS
        }
        source_counts = _write_documents(writers, train, open_training_source, read_held_out(), max_tokens)
        counts = {split: writer.close() for split, writer in writers.items()}
        _check_splits(writers, counts, eval_fraction, bool(train))
        seconds = time.perf_counter() - started
        tokens = sum(split_counts["text_tokens"] for split_counts in counts.values())
        manifest = plan | {
            "fingerprint": digest,
            "skipped_files": skipped,
            "repaired": dict(repaired),
            "splits": counts,
            "sha256": _rows_sha256(staged),
            "sources": source_counts,
            "seconds": round(seconds, 3),
            "seconds_per_million_tokens": round(seconds / tokens * 1e6, 3),
        }
        write_json(staged / "manifest.json", manifest)

    try:
        with staged_folder(folder) as staged:
            if staged is not None:
                write_folder(staged)
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
        minimum = 3
    elif objective == "span":
        minimum = 8
    else:
        minimum = 16 if fim_rate else 2
    if max_length < minimum:
        raise UserError(
            f"max_length {max_length} has no room for a target beside its frame; set it to {minimum} or more"
        )
    if fim_rate and objective != "clm":
        raise UserError(f"fim_rate is for causal models, and the objective is {objective}; remove it")
    if max_tokens is not None and max_tokens < 1:
        raise UserError(f"max_tokens is {max_tokens}; set it to 1 or more, or remove it")


def _write_documents(
    writers: dict[str, SplitWriter],
    train: list[Source],
    open_source: Callable[[Source], Iterator[Document]],
    held_out: Iterator[Document],
    max_tokens: int | None,
) -> list[dict]:
    """Write the mixture of the training sources and the held-out documents.

    Returns:
        For each training source its path, and the documents, tokens and bytes that it contributed.
    """
    source_counts: list[dict[str, Any]] = [
        {"documents": 0, "tokens": 0, "bytes": 0, "path": source.path} for source in train
    ]
    with tqdm(
        desc="tokenize and pack", unit=" tokens", unit_scale=True, total=max_tokens, leave=False, disable=None
    ) as bar:
        for index, document in mix(train, open_source, max_tokens):
            writers["validation" if document.held_out else "train"].add(document)
            if document.left_out is None:
                source_counts[index]["documents"] += 1
            source_counts[index]["tokens"] += len(document.ids)
            source_counts[index]["bytes"] += document.text_bytes
            bar.update(len(document.ids))
        for document in held_out:
            writers["validation"].add(document)
            bar.update(len(document.ids))
    return source_counts


def _check_splits(
    writers: dict[str, SplitWriter], counts: dict[str, dict], eval_fraction: float, has_train: bool
) -> None:
    """Refuse a split without rows, or one that consists of unknown tokens."""
    check_held_out(eval_fraction, counts["train"]["documents"], counts["validation"]["documents"])
    remedies = {"validation": "set eval_data to text that is not empty"}
    if has_train:
        remedies["train"] = "set train_data to text that is not empty"
    for split, remedy in remedies.items():
        if not counts[split]["rows"]:
            raise UserError(_describe_empty_split(split, remedy, writers[split]))
        if counts[split]["unknown_tokens"] == counts[split]["text_tokens"]:
            raise UserError(f"the tokenizer knows no token of the {split} text; choose one made from such text")


def _describe_empty_split(split: str, remedy: str, writer: SplitWriter) -> str:
    """Why a split is empty, and what to do about it."""
    if writer.too_long and writer.left_out.keys() == {TOO_LONG}:
        return (
            f"no conversation of the {split} data fits into max_length {writer.max_length}; raise it: "
            f"{describe_lengths(writer.too_long)}"
        )
    if writer.left_out and set(writer.left_out) != {EMPTY_TEXT}:
        return f"there is no {split} text to learn from ({join_reasons(writer.left_out)}); {remedy}"
    return f"there is no {split} text; {remedy}"


def _update_manifest(folder: str, changes: dict) -> None:
    """Update the paths and the skipped files in the manifest of a folder that was found again."""
    path = os.path.join(folder, "manifest.json")
    with suppress(OSError, ValueError):  # a read-only folder, or a damaged one, which `load_prepared` reports
        old_manifest = read_json(path)
        manifest = old_manifest | changes
        paths = [source["path"] for source in changes["train"]]
        manifest["sources"] = [
            counts | {"path": name} for counts, name in zip(old_manifest["sources"], paths, strict=True)
        ]
        if manifest != old_manifest:
            with folder_lock(folder):  # two processes that find the folder write one after the other
                write_json(path, manifest)


def _rows_sha256(folder: str | Path) -> dict[str, str]:
    """sha256 of the rows of each split."""
    paths = [Path(folder, f"{split}.arrow") for split in SPLITS]
    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter lock
        return dict(zip(SPLITS, pool.map(file_sha256, paths), strict=True))


def load_prepared(folder: str, verify: bool = True) -> tuple[dict[str, Dataset], dict]:
    """Load the rows of a prepared folder, memory-mapped, and its manifest.

    Args:
        folder: as `prepare` returns it.
        verify: read every byte and compare it with the sha256 in the manifest: 0.9 GB/s on one core of an AMD EPYC with
            SHA instructions, 18 minutes for a terabyte. One process of a machine does this for the others.

    Returns:
        {"train": Dataset, "validation": Dataset} in NumPy format, and the manifest. Columns: `input_ids` (the documents
        of the row one after the other, not padded), `lengths` (tokens of each of them), and for masked models
        `word_starts`, for conversations `targets`.

    Raises:
        UserError: a file is missing or damaged.
    """
    names = ["manifest.json", *(f"{split}.arrow" for split in SPLITS)]
    missing = [name for name in names if not os.path.isfile(os.path.join(folder, name))]
    if missing:
        raise _damage_error(folder, f"{missing[0]} is missing")
    try:
        manifest = read_json(os.path.join(folder, "manifest.json"))
        rows = {split: Dataset.from_file(os.path.join(folder, f"{split}.arrow")) for split in SPLITS}
        changed = [split for split in SPLITS if len(rows[split]) != manifest["splits"][split]["rows"]]
        if verify and not changed:
            digests = _rows_sha256(folder)
            changed = [split for split in SPLITS if digests[split] != manifest["sha256"][split]]
    except (OSError, pa.ArrowException) as error:  # pyarrow raises both for a file that is cut short
        raise _damage_error(folder, f"it cannot be read: {str(error).splitlines()[0]}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise _damage_error(folder, "manifest.json is incomplete") from error
    if changed:
        raise _damage_error(folder, f"{changed[0]}.arrow has changed")
    return {split: dataset.with_format("numpy") for split, dataset in rows.items()}, manifest


def _damage_error(folder: str, defect: str) -> UserError:
    return UserError(f"the prepared text in {folder} is damaged ({defect}); delete that folder and run this again")
