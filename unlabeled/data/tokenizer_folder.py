"""A tokenizer trained on text and written to a folder, with the record of its training."""

import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from transformers import PreTrainedTokenizerFast

from unlabeled.data.files import describe_skipped, skipped_files
from unlabeled.data.identity import identity
from unlabeled.data.readers import read_documents
from unlabeled.data.sources import Source
from unlabeled.data.tokenization import bytes_per_token, encode_batch
from unlabeled.data.tokenizer_training import train_tokenizer
from unlabeled.errors import UserError
from unlabeled.runtime.files import read_json
from unlabeled.runtime.staging import staged_folder

SETTINGS_FILE = "tokenizer_training.json"
SAMPLE_BYTES = 20_000_000  # of text to measure bytes per token on; more text changes nothing
MAX_SPECIAL_TOKENS_LISTED = 10
EXAMPLE_CHARACTERS = 60


@dataclass(frozen=True)
class TokenizerSettings:
    """What a tokenizer is trained on and how.

    Attributes:
        data: File, folder or glob of text, or a data set on the Hub.
        algorithm: "bpe", "wordpiece" or "unigram".
        vocab_size: Tokens, special ones included.
        text_column: The column that holds the text.
        lowercase: Whether text is lowercased; WordPiece removes accents as well.
        max_bytes: Train on this many UTF-8 bytes from the start of the text; None for all of it.
    """

    data: str
    algorithm: str
    vocab_size: int
    text_column: str = "text"
    lowercase: bool = False
    max_bytes: int | None = None

    @property
    def source(self) -> Source:
        return Source(path=self.data, text_column=self.text_column)

    def record(self) -> dict[str, Any]:
        """The settings as `SETTINGS_FILE` holds them; local files are recorded by their content, not their path."""
        data = identity(self.source)
        return {
            "algorithm": self.algorithm,
            "vocab_size": self.vocab_size,
            "lowercase": self.lowercase,
            "text_column": self.text_column,
            "max_bytes": self.max_bytes,
            "data": data.get("files", data),
        }


def make_tokenizer_folder(settings: TokenizerSettings, output_dir: str, eval_data: str | None = None) -> None:
    """Train a tokenizer, write it to a folder and print a summary. A folder with the same settings is left alone.

    Args:
        settings: What to train on and how.
        output_dir: The folder to create.
        eval_data: Other text to measure bytes per token on; by default the training text.

    Raises:
        UserError: The text cannot be used, or the folder holds something else or cannot be written.
    """
    record = settings.record()
    folder = os.path.normpath(os.path.expanduser(output_dir))
    if is_trained(folder, record):
        print(f"already there: {folder}")
        return
    sample_source = Source(path=eval_data or settings.data, text_column=settings.text_column)
    sample = list(take_bytes(read_documents(sample_source), SAMPLE_BYTES))
    if not sample:
        raise UserError(f"{sample_source.path} has no text in it; choose another")
    sample_name = "held-out text" if eval_data else "the training text"

    with (
        _user_error_on_failed_write(folder),
        staged_folder(folder, is_finished=lambda: is_trained(folder, record)) as staged,
    ):
        if staged is None:  # another process has trained it meanwhile
            print(f"already there: {folder}")
            return
        started = time.perf_counter()
        texts = take_bytes(read_documents(settings.source), settings.max_bytes or float("inf"))
        tokenizer = train_tokenizer(texts, settings.algorithm, settings.vocab_size, settings.lowercase)
        seconds = time.perf_counter() - started
        ratio = bytes_per_token(tokenizer, sample)
        result = {"bytes_per_token": round(ratio, 4), "measured_on": sample_name, "seconds": round(seconds, 1)}
        _save(tokenizer, {"settings": record, "result": result, "tokenizers": tokenizers.__version__}, staged, folder)

    skipped = skipped_files([settings.source])
    if skipped:
        print(f"  not read   {describe_skipped(skipped)}")
    print(f"  vocabulary {len(tokenizer):,} tokens, {settings.algorithm}")
    print(f"  special    {_format_special_tokens(tokenizer)}")
    print(f"  efficiency {ratio:.2f} bytes per token of {sample_name}")
    _print_examples(tokenizer, sample)
    print(f"  time       {seconds:.1f} s")
    print(f"  folder     {folder}")


def is_trained(folder: str, record: dict[str, Any]) -> bool:
    """Whether a folder holds the tokenizer that was trained with these settings; False if it is missing or empty.

    Raises:
        UserError: The folder holds something else.
    """
    remedy = "choose another output_dir or remove it"
    if not os.path.lexists(folder):
        return False
    if not os.path.isdir(folder):
        raise UserError(f"output_dir: {folder} is a file; {remedy}")
    if not os.listdir(folder):
        return False
    try:
        earlier = dict(read_json(os.path.join(folder, SETTINGS_FILE))["settings"])
    except (OSError, ValueError, LookupError, TypeError):
        raise UserError(f"output_dir: {folder} holds something else than a tokenizer made here; {remedy}") from None
    different = [key for key in record if earlier.get(key) != record[key]]
    if different:
        raise UserError(f"output_dir: {folder} holds a tokenizer made with another {', '.join(different)}; {remedy}")
    return True


def take_bytes(texts: Iterable[str], limit: float) -> Iterator[str]:
    """Yield whole texts that are not empty until they have `limit` UTF-8 bytes."""
    size = 0
    for text in texts:
        if text:
            yield text
        size += len(text.encode("utf-8"))
        if size >= limit:
            return


@contextmanager
def _user_error_on_failed_write(folder: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"output_dir: cannot write {folder} ({reason}); choose another or make room") from error


def _save(tokenizer: PreTrainedTokenizerFast, record: dict[str, Any], staged: Path, folder: str) -> None:
    """Write a tokenizer and its record to `staged`, which becomes `folder`."""
    try:
        tokenizer.save_pretrained(staged)
    except OSError:
        raise
    except Exception as error:  # for a full disk, `tokenizers` raises an exception of no other type
        raise UserError(f"output_dir: cannot write {folder} ({error}); choose another or make room") from error
    with open(staged / SETTINGS_FILE, "w", encoding="utf-8") as handle:
        json.dump(record, handle, indent=1)


def _format_special_tokens(tokenizer: PreTrainedTokenizerFast) -> str:
    tokens = [f"{token} {index}" for index, token in sorted(tokenizer.added_tokens_decoder.items())]
    if len(tokens) > MAX_SPECIAL_TOKENS_LISTED:
        tokens = [*tokens[:5], "...", tokens[-1]]
    return ", ".join(tokens)


def _print_examples(tokenizer: PreTrainedTokenizerFast, sample: list[str]) -> None:
    """Print the tokens of the start of three texts."""
    texts = (sample[0], sample[len(sample) // 2], sample[-1])
    examples = [" ".join(text.split())[:EXAMPLE_CHARACTERS] for text in texts]
    label = "  examples   "
    for ids in encode_batch(tokenizer, examples):
        print(label + "|".join(tokenizer.decode([token_id]) for token_id in ids))
        label = " " * len(label)
