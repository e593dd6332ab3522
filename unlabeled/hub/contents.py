"""Which files of a folder a push sends: those that a run writes, none of them a link, none of them with a secret."""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatch, fnmatchcase
from pathlib import Path

from unlabeled.errors import UserError
from unlabeled.hub.push_record import PUSHED
from unlabeled.models.adapter_files import OWN_BASE
from unlabeled.runtime.checkpoints import MANIFEST
from unlabeled.runtime.files import read_json
from unlabeled.runtime.secrets import HUB_TOKEN, find_secret

# Files that a run writes and others can use, by their path in its folder. `*` does not match a slash. No other file is
# pushed.
MODEL_FILES = (
    "config.json", "generation_config.json", "model.safetensors", "model-*-of-*.safetensors",
    "model.safetensors.index.json", "adapter_config.json", "adapter_model.safetensors",
    # sentence-transformers: each module but the model has a folder of its own, such as 1_Pooling.
    "modules.json", "config_sentence_transformers.json", "sentence_bert_config.json", "[0-9]_*/config.json",
    "[0-9]_*/model.safetensors",
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "additional_chat_templates/*.jinja",
    # Tokenizers that were saved by transformers before version 5.
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model",
    "tokenizer.model", "sentencepiece.bpe.model",
)  # fmt: skip
RECORDS = (
    "README.md", "lineage.json", "metrics.json", "history.json", "samples.md", "loss.png", "confusion.png",
    "predictions.png",
)  # fmt: skip
ALLOWED = (*MODEL_FILES, *RECORDS, *(f"{OWN_BASE}/{name}" for name in MODEL_FILES))
# Why other files are not pushed, by their name or that of their folder.
EXCLUSION_REASONS = {
    "with the state of the optimizer": ("checkpoint-*", "global_step*"),
    "unfinished": ("incomplete", "pushing", "*.tmp"),
    "a pickle": ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt"),
    "for resuming only": ("run.json", "trainer_state.json", "complete.json"),
    "the record of pushes": (PUSHED,),
    "a log": ("runs", "logs", "wandb", "*.log"),
    "hidden": (".*", "__pycache__"),
}
LINK = "a link, which a push does not follow"
BINARY_SUFFIXES = (".safetensors", ".png", ".bin", ".pt", ".pth")
BLOCK_BYTES = 1 << 24
TOKEN_OVERLAP_BYTES = 200  # a token may lie across two blocks


def find_push_contents(folder: Path, include: Sequence[str] = ()) -> tuple[dict[str, int], dict[str, str]]:
    """Sort the files of a folder into those that are pushed and those that are not. Links are not followed.

    Args:
        folder: The folder to push.
        include: Paths in the folder of files that are pushed as well.

    Returns:
        `{path: bytes}` of the files to push, and `{path: reason}` of the files and folders that are not pushed.

    Raises:
        UserError: A path in `include` is not a file, or lies behind a link or outside the folder.
    """
    sizes = {}
    excluded = {}
    for path, size, reason in _walk(folder):
        if reason is None:
            sizes[path] = size
        else:
            excluded[path] = reason
    for name in include:
        _check_included(folder, name)
        path = Path(name).as_posix()
        sizes[path] = (folder / name).stat().st_size
        excluded.pop(path, None)
    return sizes, excluded


def _check_included(folder: Path, name: str) -> None:
    parts = Path(name).parts
    is_inside = not os.path.isabs(name) and os.pardir not in parts
    prefixes = [folder.joinpath(*parts[:depth]) for depth in range(1, len(parts) + 1)]
    if not is_inside or not (folder / name).is_file() or any(prefix.is_symlink() for prefix in prefixes):
        raise UserError(f"--include {name}: no file of {folder}; name one by its path in there, and no link")


def _walk(folder: Path, prefix: str = "") -> Iterator[tuple[str, int, str | None]]:
    """Yield `(path, bytes, None)` of each file to push and `(path, 0, reason)` of each excluded file or folder."""
    for entry in sorted(os.scandir(folder / prefix), key=lambda entry: entry.name):
        path = f"{prefix}{entry.name}"
        if entry.is_symlink():
            yield path, 0, LINK
        elif entry.is_dir(follow_symlinks=False):
            if any(_matches(path, os.path.dirname(pattern)) for pattern in ALLOWED):
                yield from _walk(folder, f"{path}/")
            else:
                yield path, 0, _exclusion_reason(entry.name)
        elif not entry.is_file(follow_symlinks=False):
            yield path, 0, "no regular file"
        elif any(_matches(path, pattern) for pattern in ALLOWED):
            yield path, entry.stat(follow_symlinks=False).st_size, None
        else:
            yield path, 0, _exclusion_reason(entry.name)


def _matches(path: str, pattern: str) -> bool:
    path_parts = path.split("/")
    pattern_parts = pattern.split("/")
    return len(path_parts) == len(pattern_parts) and all(map(fnmatchcase, path_parts, pattern_parts))


def _exclusion_reason(name: str) -> str:
    for reason, patterns in EXCLUSION_REASONS.items():
        if any(fnmatch(name, pattern) for pattern in patterns):
            return reason
    return "not a file that a run writes"


def check_links(folder: Path, excluded: dict[str, str]) -> None:
    """Raise `UserError` if a file that is excluded because it is a link is a part of the model."""
    folders = {os.path.dirname(pattern) for pattern in ALLOWED} - {""}
    for path, reason in excluded.items():
        if reason == LINK and any(_matches(path, pattern) for pattern in (*MODEL_FILES, *folders)):
            raise UserError(
                f"{folder / path} is a part of the model and a link, which a push does not follow; put what it points "
                "to in its place"
            )


def check_secrets(folder: Path, paths: Iterable[str], token: str | None) -> None:
    """Raise `UserError` if a file holds a Hub token, or if a text file holds anything that looks like a secret.

    Args:
        folder: The folder.
        paths: Paths in the folder.
        token: The token of the user, which is searched for even if it does not look like one of the Hub.
    """
    for path in paths:
        if not path.endswith(BINARY_SUFFIXES):
            _check_text(folder / path)
        if _holds_token(folder / path, token):
            raise UserError(f"{folder / path} holds a Hub token; take it out, and revoke it if others saw it")


def _check_text(path: Path) -> None:
    secret = find_secret(path)
    if secret is not None:
        line, kind = secret
        raise UserError(
            f"{path} holds a secret in line {line} (detector: {kind}); take it out, revoke it if others saw it, and "
            "push again"
        )


def _holds_token(path: Path, token: str | None) -> bool:
    pattern = HUB_TOKEN.encode()
    if token:
        pattern += b"|" + re.escape(token.encode())
    expression = re.compile(pattern)
    tail = b""
    with open(path, "rb") as handle:
        while block := handle.read(BLOCK_BYTES):
            if expression.search(tail + block):
                return True
            tail = block[-TOKEN_OVERLAP_BYTES:]
    return False


def list_checkpoint_files(checkpoint: Path) -> list[str]:
    """List the files of a complete checkpoint that its run has written, without those that are links now."""
    listed = {*read_json(checkpoint / MANIFEST), MANIFEST}
    regular_files = set()
    for folder, _, names in os.walk(checkpoint):  # does not follow links
        for name in names:
            path = Path(folder, name)
            if not path.is_symlink():
                regular_files.add(path.relative_to(checkpoint).as_posix())
    return sorted(listed & regular_files)


def find_pickles(paths: Iterable[str]) -> list[str]:
    """Select the files that may run code when they are loaded, by their names."""
    return [path for path in paths if any(fnmatch(path, pattern) for pattern in EXCLUSION_REASONS["a pickle"])]
