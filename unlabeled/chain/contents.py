"""Fingerprints of what a stage reads: local files and folders count by their content, wherever they are."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from unlabeled.config.resume_keys import KEYS_FREE_TO_CHANGE_ON_RESUME
from unlabeled.data.files import local_files
from unlabeled.data.sources import parse_sources
from unlabeled.runtime.files import file_sha256

DATA_KEYS = ("train_data", "eval_data", "test_data", "data", "tasks")
MODEL_KEYS = ("model_name_or_path", "tokenizer_name_or_path", "folder")
# What a resumed run may change does not make it another run. Data and models count by their content.
KEYS_WITHOUT_EFFECT = (KEYS_FREE_TO_CHANGE_ON_RESUME | {"prepared_dir", "env"}) - {*DATA_KEYS, *MODEL_KEYS}
# Two folders in which these files are equal are the same model or tokenizer to the stage that reads them.
MODEL_FILES = (
    "*.safetensors",
    "base/*.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "adapter_config.json",
)


def digest(value: Any) -> str:
    """The sha256 of a value that JSON can hold."""
    return f"sha256:{hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()}"


class ContentHashes:
    """The sha256 of files, computed again only for a file whose size or modification time has changed.

    Args:
        hashes: path to size, modification time in nanoseconds and sha256; kept in `logs/hashes.json`.
    """

    def __init__(self, hashes: dict[str, list] | None = None):
        self.hashes = hashes or {}

    def sha256(self, file: str | Path) -> str:
        stat = os.stat(file)
        version = [stat.st_size, stat.st_mtime_ns]
        if self.hashes.get(str(file), [])[:2] != version:
            self.hashes[str(file)] = [*version, file_sha256(str(file))]
        return self.hashes[str(file)][2]

    def content(self, key: str, value: Any) -> Any:
        """The value of a key, with the content of the local files and folders that it names instead of their paths."""
        if key in MODEL_KEYS and os.path.isdir(value):
            files = [file for pattern in MODEL_FILES for file in sorted(Path(value).glob(pattern))]
            return digest([[file.name, self.sha256(file)] for file in files])
        if key in DATA_KEYS and value:
            return digest([self._source_content(source) for source in parse_sources(value, key)])
        if isinstance(value, str) and os.path.isfile(value):
            return self.sha256(value)
        return value

    def _source_content(self, source: Any) -> dict:
        files = local_files(source)
        if not files:
            return vars(source)
        return vars(source) | {"path": [self.sha256(file) for file in files]}

    def stage_parts(self, kind: str, values: dict) -> dict:
        """All that a stage's result depends on, as `chain.json` records it."""
        parts = {key: self.content(key, value) for key, value in values.items() if key not in KEYS_WITHOUT_EFFECT}
        return json.loads(json.dumps({"kind": kind, **parts}, default=str))


def describe_change(key: str, before: Any, now: Any) -> str:
    """How a part of a stage differs from what `chain.json` has recorded."""
    if any(str(value).startswith("sha256:") for value in (before, now)):
        return f"{key} has other content"
    return f"{key} {json.dumps(before)} -> {json.dumps(now)}"
