"""Train a tokenizer on your text.

    python scripts/train_tokenizer.py --data data/demo/shakespeare/train.parquet --algorithm bpe --vocab_size 2048 \\
        --eval_data data/demo/shakespeare/validation.parquet --output_dir outputs/tiny/tokenizer

bpe for causal models, wordpiece for masked ones, unigram for span corruption. The folder is what a recipe's
`tokenizer_name_or_path` wants. One that exists is left alone: the same settings do nothing, others are refused.
"""

import argparse
import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from unlabeled import UserError, exit_on_user_error
from unlabeled.runtime.files import read_json

SETTINGS_FILE = "tokenizer_training.json"
SAMPLE_BYTES = 20_000_000  # measuring bytes per token on more text changes nothing


def first_bytes(texts: Iterable[str], limit: float) -> Iterator[str]:
    """Whole texts, not empty ones, until there are `limit` UTF-8 bytes of them."""
    size = 0
    for text in texts:
        if text:
            yield text
        size += len(text.encode("utf-8"))
        if size >= limit:
            return


def check_output(folder: str, settings: dict) -> bool:
    """Whether this very tokenizer is already there.

    Raises:
        UserError: something else is.
    """
    remedy = "choose another output_dir or remove it"
    if not os.path.lexists(folder):
        return False
    if not os.path.isdir(folder):
        raise UserError(f"output_dir: {folder} is a file; {remedy}")
    if not os.listdir(folder):
        return False
    try:
        before = dict(read_json(os.path.join(folder, SETTINGS_FILE))["settings"])
    except (OSError, ValueError, LookupError, TypeError):
        raise UserError(f"output_dir: {folder} holds something else than a tokenizer made here; {remedy}") from None
    if different := [key for key in settings if before.get(key) != settings[key]]:
        raise UserError(f"output_dir: {folder} holds a tokenizer made with another {', '.join(different)}; {remedy}")
    return True


@contextmanager
def writing(folder: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"output_dir: cannot write {folder} ({reason}); choose another or make room") from error


def save(tokenizer, record: dict, staged: Path, folder: str) -> None:
    """Write a tokenizer and its record to `staged`, which becomes `folder`."""
    try:
        tokenizer.save_pretrained(staged)
    except OSError:
        raise
    except Exception as error:  # what `tokenizers` raises for a full disk has no other type
        raise UserError(f"output_dir: cannot write {folder} ({error}); choose another or make room") from error
    with open(staged / SETTINGS_FILE, "w", encoding="utf-8") as handle:
        json.dump(record, handle, indent=1)


def run(arguments: argparse.Namespace) -> None:
    import tokenizers

    from unlabeled.data.files import describe_skipped, skipped_files
    from unlabeled.data.identity import identity
    from unlabeled.data.readers import read_documents
    from unlabeled.data.sources import Source
    from unlabeled.data.tokenization import bytes_per_token, encode_batch
    from unlabeled.data.tokenizer_training import train_tokenizer
    from unlabeled.runtime.staging import staged_folder

    source = Source(path=arguments.data, text_column=arguments.text_column)
    data = identity(source)
    keys = ("algorithm", "vocab_size", "lowercase", "text_column", "max_bytes")
    # The content of local files is what counts, wherever they lie.
    settings = {key: getattr(arguments, key) for key in keys} | {"data": data.get("files", data)}
    folder = os.path.normpath(os.path.expanduser(arguments.output_dir))
    if check_output(folder, settings):
        print(f"already there: {folder}")
        return

    measured = Source(path=arguments.eval_data or arguments.data, text_column=arguments.text_column)
    sample = list(first_bytes(read_documents(measured), SAMPLE_BYTES))
    if not sample:
        raise UserError(f"{measured.path} has no text in it; choose another")

    with writing(folder), staged_folder(folder, is_finished=lambda: check_output(folder, settings)) as staged:
        if staged is None:  # another process has made it meanwhile
            print(f"already there: {folder}")
            return
        started = time.perf_counter()
        texts = first_bytes(read_documents(source), arguments.max_bytes or float("inf"))
        tokenizer = train_tokenizer(texts, arguments.algorithm, arguments.vocab_size, arguments.lowercase)
        seconds = time.perf_counter() - started
        ratio = bytes_per_token(tokenizer, sample)
        where = "held-out text" if arguments.eval_data else "the training text"
        result = {"bytes_per_token": round(ratio, 4), "measured_on": where, "seconds": round(seconds, 1)}
        record = {"settings": settings, "result": result, "tokenizers": tokenizers.__version__}
        save(tokenizer, record, staged, folder)

    if skipped := skipped_files([source]):
        print(f"  not read   {describe_skipped(skipped)}")
    special = [f"{token} {index}" for index, token in sorted(tokenizer.added_tokens_decoder.items())]
    special = special if len(special) <= 10 else [*special[:5], "...", special[-1]]
    print(f"  vocabulary {len(tokenizer):,} tokens, {arguments.algorithm}")
    print(f"  special    {', '.join(special)}")
    print(f"  efficiency {ratio:.2f} bytes per token of {where}")
    examples = [" ".join(text.split())[:60] for text in (sample[0], sample[len(sample) // 2], sample[-1])]
    for i, ids in enumerate(encode_batch(tokenizer, examples)):
        print("  examples   " if i == 0 else "             ", end="")
        print("|".join(tokenizer.decode([token]) for token in ids))
    print(f"  time       {seconds:.1f} s")
    print(f"  folder     {folder}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="file, folder or glob of text, or a data set on the Hub")
    parser.add_argument("--algorithm", required=True, choices=("bpe", "wordpiece", "unigram"))
    parser.add_argument("--vocab_size", required=True, type=int, help="tokens, special ones included")
    parser.add_argument("--output_dir", required=True, help="the folder to make")
    parser.add_argument("--eval_data", help="other text to measure bytes per token on")
    parser.add_argument("--text_column", default="text", help="the column that holds the text (default: text)")
    parser.add_argument("--lowercase", action="store_true", help="in lower case; wordpiece drops accents as well")
    parser.add_argument("--max_bytes", type=int, help="train on so much text from the start (default: all of it)")
    arguments = parser.parse_args()
    with exit_on_user_error():
        run(arguments)


if __name__ == "__main__":
    main()
