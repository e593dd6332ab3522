"""Checkpoints that are complete or absent: written to a staging folder, listed with their hashes, then renamed."""

import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from unlabeled.runtime.files import file_sha256, read_json, write_json
from unlabeled.runtime.staging import flush_path

MANIFEST = "complete.json"  # {file of the checkpoint: {"bytes": size, "sha256": hash}}; written last
STAGING = "incomplete"


def staging_folder(output_dir: str) -> str:
    """The folder, on the file system of `output_dir`, in which a checkpoint is written before it is complete."""
    return os.path.join(output_dir, STAGING)


def commit_checkpoint(output_dir: str, name: str, progress: Callable[[], None] = lambda: None) -> str:
    """Turn a staged checkpoint into a complete one: flush it to disk, write its manifest, rename it.

    Args:
        output_dir: The folder of the run.
        name: The name of the checkpoint in the staging folder, such as `checkpoint-100`.
        progress: Called for each block that is read.

    Returns:
        The folder of the checkpoint.
    """
    staged = Path(staging_folder(output_dir), name)
    committed = Path(output_dir, name)
    files = sorted(file for file in staged.rglob("*") if file.is_file())
    names = [str(file.relative_to(staged)) for file in files]
    with ThreadPoolExecutor() as pool:  # hashing and flushing release the interpreter lock
        entries = list(pool.map(lambda file: _flush_and_hash(file, progress), files))
    write_json(staged / MANIFEST, dict(zip(names, entries, strict=True)))
    for folder in {file.parent for file in files} | {staged}:
        flush_path(folder)
    if committed.exists():  # damaged, or the run would have resumed from it
        shutil.rmtree(committed)
    os.rename(staged, committed)
    flush_path(committed.parent)
    return str(committed)


def _flush_and_hash(file: Path, progress: Callable[[], None]) -> dict[str, int | str]:
    """Flush a file to disk and return its entry in the manifest."""
    flush_path(file)
    return {"bytes": file.stat().st_size, "sha256": file_sha256(file, progress)}


def find_checkpoint_defect(checkpoint: str | Path, read: bool = False) -> str | None:
    """Explain why a checkpoint is not complete.

    Args:
        checkpoint: The folder of the checkpoint.
        read: Compare the hash of each file as well, for which every byte is read.

    Returns:
        The defect, or None if the checkpoint is complete.
    """
    checkpoint = Path(checkpoint)
    try:
        entries = read_json(checkpoint / MANIFEST)
        sizes = {name: entry["bytes"] for name, entry in entries.items()}
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        return f"it has no readable {MANIFEST}"
    for name, size in sizes.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes, not {size}"
    if read:
        with ThreadPoolExecutor() as pool:
            hashes = pool.map(file_sha256, [checkpoint / name for name in entries])
            for name, sha256 in zip(entries, hashes, strict=True):
                if sha256 != entries[name]["sha256"]:
                    return f"{name} has changed since it was written"
    return None


def find_checkpoints(output_dir: str) -> list[str]:
    """List the folders `checkpoint-N`, newest first, whether they are complete or not."""
    numbered = []
    for path in Path(output_dir).glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if match:
            numbered.append((int(match[1]), str(path)))
    return [path for _, path in sorted(numbered, reverse=True)]


def find_newest_checkpoint(output_dir: str, report: Callable[[str], None] = print) -> str | None:
    """Find the newest complete checkpoint; every byte of it is read.

    Args:
        output_dir: The folder of the run.
        report: Called with one line for each newer checkpoint that is skipped.

    Returns:
        The folder of the checkpoint, or None.
    """
    staging = staging_folder(output_dir)
    if os.path.isdir(staging) and os.listdir(staging):
        report(f"skipped {staging}: a checkpoint that was being written when the run stopped")
    for checkpoint in find_checkpoints(output_dir):
        defect = find_checkpoint_defect(checkpoint, read=True)
        if defect is None:
            return checkpoint
        report(f"skipped {checkpoint}: {defect}")
    return None


def delete_old_checkpoints(output_dir: str, limit: int | None, best: str | None = None) -> None:
    """Delete all but the newest complete checkpoints.

    Args:
        output_dir: The folder of the run.
        limit: How many to keep; None keeps all.
        best: The name of a checkpoint that is never deleted.
    """
    if not limit:
        return
    complete = [path for path in find_checkpoints(output_dir) if find_checkpoint_defect(path) is None]
    for path in complete[limit:]:
        name = os.path.basename(path)
        if name == best:
            continue
        # Renamed first: an interrupted deletion must not leave a folder that looks like a checkpoint.
        renamed = os.path.join(staging_folder(output_dir), f"delete-{name}")
        os.makedirs(os.path.dirname(renamed), exist_ok=True)
        os.rename(path, renamed)
        shutil.rmtree(renamed, ignore_errors=True)
