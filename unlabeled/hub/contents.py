"""What of a folder a push sends: files that a run writes, of which none is a link and none holds a secret."""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatch, fnmatchcase
from pathlib import Path

from unlabeled.errors import UserError
from unlabeled.hub.push_record import PUSHED
from unlabeled.models.loading import OWN_BASE
from unlabeled.runtime.checkpoints import MANIFEST
from unlabeled.runtime.files import read_json
from unlabeled.runtime.secrets import HUB_TOKEN, find_secret

# What a run writes and others can use, by the path in its folder; `*` stands for no slash. All else stays where it is.
MODEL_FILES = (
    "config.json", "generation_config.json", "model.safetensors", "model-*-of-*.safetensors",
    "model.safetensors.index.json", "adapter_config.json", "adapter_model.safetensors",
    # Of sentence-transformers: its modules, of which all but the model have a folder of their own, such as 1_Pooling.
    "modules.json", "config_sentence_transformers.json", "sentence_bert_config.json", "[0-9]_*/config.json",
    "[0-9]_*/model.safetensors",
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "additional_chat_templates/*.jinja",
    # Of tokenizers that transformers before version 5 has saved.
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model",
    "tokenizer.model", "sentencepiece.bpe.model",
)  # fmt: skip
RECORDS = (
    "README.md", "lineage.json", "metrics.json", "history.json", "samples.md", "loss.png", "confusion.png",
    "predictions.png",
)  # fmt: skip
ALLOWED = (*MODEL_FILES, *RECORDS, *(f"{OWN_BASE}/{name}" for name in MODEL_FILES))
# Why other files stay, by their name or that of their folder.
REASONS = {
    "with the state of the optimizer": ("checkpoint-*", "global_step*"),
    "unfinished": ("incomplete", "pushing", "*.tmp"),
    "a pickle": ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt"),
    "for resuming only": ("run.json", "trainer_state.json", "complete.json"),
    "the record of pushes": (PUSHED,),
    "a log": ("runs", "logs", "wandb", "*.log"),
    "hidden": (".*", "__pycache__"),
}
LINK = "a link, which a push does not follow"
NO_TEXT = (".safetensors", ".png", ".bin", ".pt", ".pth")


def contents(folder: Path, include: Sequence[str] = ()) -> tuple[dict[str, int], dict[str, str]]:
    """What of a folder goes to the Hub, {path: bytes}, and what does not, {path: why}; links inside are not followed.

    Args:
        include: paths in the folder of files that go as well.

    Raises:
        UserError: one of these is no file, or lies behind a link or outside the folder.
    """
    going, staying = {}, {}
    for path, size, reason in _walk(folder):
        if reason is None:
            going[path] = size
        else:
            staying[path] = reason
    for name in include:
        file = folder / name
        inside = not os.path.isabs(name) and os.pardir not in Path(name).parts
        steps = [folder.joinpath(*Path(name).parts[:depth]) for depth in range(1, len(Path(name).parts) + 1)]
        if not inside or not file.is_file() or any(step.is_symlink() for step in steps):
            raise UserError(f"--include {name}: no file of {folder}; name one by its path in there, and no link")
        going[Path(name).as_posix()] = file.stat().st_size
        staying.pop(Path(name).as_posix(), None)
    return going, staying


def _walk(folder: Path, above: str = "") -> Iterator[tuple[str, int, str | None]]:
    """Path, bytes and, where it stays, the reason of each file and of each folder that stays as a whole."""
    for entry in sorted(os.scandir(folder / above), key=lambda entry: entry.name):
        path = f"{above}{entry.name}"
        if entry.is_symlink():
            yield path, 0, LINK
        elif entry.is_dir(follow_symlinks=False):
            if any(_matches(path, os.path.dirname(pattern)) for pattern in ALLOWED):
                yield from _walk(folder, f"{path}/")
            else:
                yield path, 0, _reason_to_stay(entry.name)
        elif not entry.is_file(follow_symlinks=False):
            yield path, 0, "no regular file"
        elif any(_matches(path, pattern) for pattern in ALLOWED):
            yield path, entry.stat(follow_symlinks=False).st_size, None
        else:
            yield path, 0, _reason_to_stay(entry.name)


def _matches(path: str, pattern: str) -> bool:
    parts, wanted = path.split("/"), pattern.split("/")
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


def _reason_to_stay(name: str) -> str:
    for reason, patterns in REASONS.items():
        if any(fnmatch(name, pattern) for pattern in patterns):
            return reason
    return "not a file that a run writes"


def check_links(folder: Path, staying: dict[str, str]) -> None:
    """Raise `UserError` if what stays because it is a link is a part of the model."""
    folders = {os.path.dirname(pattern) for pattern in ALLOWED} - {""}
    for path, reason in staying.items():
        if reason == LINK and any(_matches(path, pattern) for pattern in (*MODEL_FILES, *folders)):
            raise UserError(
                f"{folder / path} is a part of the model and a link, which a push does not follow; put what it points "
                "to in its place"
            )


def check_secrets(folder: Path, paths: Iterable[str], token: str | None) -> None:
    """Raise `UserError` if one of the files holds the token, or in its text anything that looks like a secret."""
    pattern = re.compile(HUB_TOKEN.encode() + (b"|" + re.escape(token.encode()) if token else b""))
    for path in paths:
        if not path.endswith(NO_TEXT) and (found := find_secret(folder / path)):
            line, kind = found
            raise UserError(
                f"{folder / path} holds a secret in line {line} (detector: {kind}); take it out, revoke it if others "
                "saw it, and push again"
            )
        with open(folder / path, "rb") as handle:
            tail = b""
            while block := handle.read(1 << 24):
                if pattern.search(tail + block):
                    raise UserError(f"{folder / path} holds a Hub token; take it out, and revoke it if others saw it")
                tail = block[-200:]  # a token may lie across two blocks


def files_of_checkpoint(checkpoint: Path) -> list[str]:
    """The paths in a complete checkpoint of the files that its run has written, without any that are links now."""
    listed = {*read_json(checkpoint / MANIFEST), MANIFEST}
    found = []
    for folder, _, names in os.walk(checkpoint):  # which follows no links
        paths = (Path(folder, name) for name in names)
        found += [path.relative_to(checkpoint).as_posix() for path in paths if not path.is_symlink()]
    return sorted(listed & {*found})


def pickles_among(paths: Iterable[str]) -> list[str]:
    """Those of the files that run code when they are loaded, by their names."""
    return [path for path in paths if any(fnmatch(path, pattern) for pattern in REASONS["a pickle"])]
