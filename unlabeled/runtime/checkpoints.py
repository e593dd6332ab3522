"""Checkpoints that are whole or absent: written aside, listed, renamed; what is damaged is named and skipped."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from unlabeled.errors import UserError
from unlabeled.runtime.files import read_json
from unlabeled.runtime.run_lock import hold_output_dir
from unlabeled.runtime.staging import flush_path

MANIFEST = "complete.json"  # lists every file of a checkpoint with its size and SHA-256; written last
RUN = "run.json"  # what a run is about; a checkpoint of another run is never resumed
CONTENTS = "contents"  # its key for hashes of what the run has read, {key or file of the run: {part: hash}}
NAMES = "names"  # its key for where that lay, which is free to change
STAGING = "incomplete"
RUN_ARTIFACTS = ("*.safetensors", "*.bin", "*.json", "README.md")  # in a folder without RUN they are somebody else's


def staging_folder(output_dir: str) -> str:
    """Where a checkpoint is written before it is complete, on the same file system."""
    return os.path.join(output_dir, STAGING)


def commit_checkpoint(output_dir: str, name: str, progress: Callable[[], None] = lambda: None) -> str:
    """Turn the staged checkpoint `name` into a complete one: flushed to disk, listed, renamed. Returns its folder.

    `progress` is called all the while, for each block that is read.
    """
    staged, final = Path(staging_folder(output_dir), name), Path(output_dir, name)
    files = sorted(file for file in staged.rglob("*") if file.is_file())
    with ThreadPoolExecutor() as pool:  # hashing and flushing leave the other threads alone
        sealed = pool.map(lambda file: _seal(file, progress), files)
        entries = dict(zip((str(file.relative_to(staged)) for file in files), sealed, strict=True))
    write_json(staged / MANIFEST, entries)
    for folder in {file.parent for file in files} | {staged}:
        flush_path(folder)
    if final.exists():  # damaged, or it would have been resumed from
        shutil.rmtree(final)
    os.rename(staged, final)
    flush_path(final.parent)
    return str(final)


def _seal(file: Path, progress: Callable[[], None]) -> dict[str, int | str]:
    """Flush a file to disk, and what to know it by."""
    flush_path(file)
    return {"bytes": file.stat().st_size, "sha256": file_sha256(file, progress)}


def file_sha256(path: str | Path, progress: Callable[[], None] = lambda: None) -> str:
    """sha256 of a file, as hexadecimal digits; `progress` is called for each block."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
            progress()
    return digest.hexdigest()


def find_checkpoint_defect(checkpoint: str | Path, read: bool = False) -> str | None:
    """Why a checkpoint is not complete, or None when it is. With `read`, every byte is looked at."""
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
            for name, found in zip(
                entries, pool.map(file_sha256, (checkpoint / name for name in entries)), strict=True
            ):
                if found != entries[name]["sha256"]:
                    return f"{name} has changed since it was written"
    return None


def find_checkpoints(output_dir: str) -> list[str]:
    """The folders checkpoint-N, newest first, complete or not."""
    numbered = [(int(match[1]), str(path)) for path in Path(output_dir).glob("checkpoint-*")
                if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))]  # fmt: skip
    return [path for _, path in sorted(numbered, reverse=True)]


def newest_complete(output_dir: str, say=print) -> str | None:
    """The newest complete checkpoint, read through, or None; each damaged one above it is named."""
    if os.path.isdir(staging_folder(output_dir)) and os.listdir(staging_folder(output_dir)):
        say(f"skipped {staging_folder(output_dir)}: a checkpoint that was being written when the run stopped")
    for checkpoint in find_checkpoints(output_dir):
        torn = find_checkpoint_defect(checkpoint, read=True)
        if torn is None:
            return checkpoint
        say(f"skipped {checkpoint}: {torn}")
    return None


def keep_newest(output_dir: str, limit: int | None, best: str | None = None) -> None:
    """Delete all but the newest `limit` complete checkpoints (None: keep all), and never the one named `best`."""
    complete = [path for path in find_checkpoints(output_dir) if find_checkpoint_defect(path) is None]
    for path in [path for path in complete[limit:] if os.path.basename(path) != best] if limit else []:
        # Renamed first: a deletion that is interrupted must not leave a folder that looks like a checkpoint.
        doomed = os.path.join(staging_folder(output_dir), f"delete-{os.path.basename(path)}")
        os.makedirs(os.path.dirname(doomed), exist_ok=True)
        os.rename(path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def acquire_output_dir(output_dir: str, identity: dict, needed_bytes: int = 0, is_first: bool = True) -> bool:
    """Make `output_dir` this run's own until the process ends; True when the run in it is finished already.

    Args:
        identity: what makes two runs the same run: changing any of it must not resume.
        needed_bytes: what the checkpoints of the run take, with those that are there already.
        is_first: whether this is the first of the run's processes, which holds the lock of the folder for all of them.

    Raises:
        UserError: the folder belongs to another run, another process trains in it, it cannot be written to, or its disk
            is too full.
    """
    folder = Path(output_dir)
    known = folder / RUN
    try:
        if _is_finished(folder, identity):
            return True
        folder.mkdir(parents=True, exist_ok=True)
        if is_first:
            hold_output_dir(output_dir)
            if _is_finished(folder, identity):  # another process may have ended while this one waited
                return True
        held = sum(file.stat().st_size for path in find_checkpoints(output_dir) for file in Path(path).rglob("*"))
        free = shutil.disk_usage(folder).free
        if free < needed_bytes - held:
            raise UserError(
                f"the disk of output_dir {output_dir} has {free / 1e6:,.1f} MB free and the checkpoints need "
                f"{(needed_bytes - held) / 1e6:,.1f} MB; free some space, or lower save_total_limit"
            )
        if not known.exists():  # all processes come here, the first one first
            write_json(known, identity)
    except OSError as error:
        raise UserError(
            f"cannot write to output_dir {output_dir} ({error.strerror}); set it to another folder"
        ) from error
    return False


def _is_finished(folder: Path, identity: dict) -> bool:
    """Whether the run in a folder is finished.

    Raises:
        UserError: it is another run, or there are files of another program.
    """
    if not (folder / RUN).exists():
        if strangers := find_checkpoints(str(folder)) + [
            str(path) for name in RUN_ARTIFACTS for path in folder.glob(name)
        ]:
            raise UserError(f"{strangers[0]} was not written by this run; set output_dir to another folder")
        return False
    before = _read_run(folder / RUN)
    if difference := find_difference(str(folder), before, identity):
        raise UserError(difference)
    return (folder / "metrics.json").exists()


def find_difference(output_dir: str, before: dict, now: dict) -> str | None:
    """Why two runs are not the same run, in a sentence that names what has changed; None where they are."""
    if CONTENTS in now and CONTENTS not in before:
        return (
            f"{output_dir} holds a run of an earlier version of this code, which did not record what its model holds; "
            "finish it with that version, or set output_dir to another folder"
        )
    # Tokens and mappings last: some follow from other keys, and the key to set back is one of those. The hash of the
    # text follows from the tokenizer, among other things, and the rows follow from the text.
    kinds = {
        key: 5 if isinstance(now.get(key), dict) else 4 if key.endswith("_tokens") else 0
        for key in (before.keys() | now) - {NAMES}
    } | {CONTENTS: 1, "text": 2, "rows": 3}
    for key in sorted(kinds, key=lambda key: (kinds[key], key)):
        was, value = before.get(key), now.get(key)
        if was == value:
            continue
        if key == CONTENTS:
            return _describe_content(output_dir, before, now)
        if key == "text":
            return (
                f"{output_dir} holds a run on another text than train_data, eval_data and test_data have now, or one "
                "that was prepared in another way; set output_dir to another folder, or put the text back"
            )
        if key == "rows":
            return (
                f"{output_dir} holds a run on other rows of the same text, as other versions of the libraries prepare "
                "them; install those versions again, or set output_dir to another folder"
            )
        return (
            f"{output_dir} holds a run with {key} {_short(was)}, not {_short(value)}; set output_dir to another "
            "folder, or the key back"
        )
    return None


def _describe_content(output_dir: str, before: dict, now: dict) -> str:
    """The sentence on files that have another content than when the run began."""
    for key in sorted(before[CONTENTS].keys() | now[CONTENTS]):
        then, today = before[CONTENTS].get(key, {}), now[CONTENTS].get(key, {})
        differing = [part for part in sorted(then.keys() | today) if then.get(part) != today.get(part)]
        if differing:
            was, name = (run.get(NAMES, {}).get(key) for run in (before, now))
            where = f"{key} {name}" if was == name and name else key
            renamed = f" (then {was}, now {name})" if was != name else ""
            more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
            return (
                f"{output_dir} holds a run that began with another {differing[0]}{more} of {where}{renamed}; set "
                "output_dir to another folder, or put back what it began with"
            )
    raise ValueError("the contents are equal")


def _read_run(path: Path) -> dict:
    try:
        run = read_json(path)
        if isinstance(run, dict):
            return run
    except ValueError:
        pass
    raise UserError(f"{path} is damaged, so what this run was is not known; set output_dir to another folder")


@contextmanager
def user_error_on_failed_write(output_dir: str, what: str) -> Iterator[None]:
    """Say in one sentence that writing `what` failed, and which checkpoint is left; other errors pass through."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.errno:  # those of the Hub have no errno
            reason = error.strerror
        elif found := re.search(r"([\w ]+) \(os error \d+\)", str(error)):  # safetensors and tokenizers, in Rust
            reason = found[1].strip()
        elif any(name in str(error) for name in ("inline_container", "PytorchStreamWriter", "iostream error")):
            # torch.save
            reason = "the disk is full, or the file larger than allowed"
        else:
            raise
        last = newest_complete(output_dir, say=lambda line: None)
        raise UserError(
            f"cannot write {what} to {output_dir} ({reason}); the last complete checkpoint is {last or 'none'}: make "
            "room and run the same command again"
        ) from error


def _short(value) -> str:
    text = "its default" if value is None else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def write_json(path: str | Path, value: dict) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of it."""
    temporary = f"{path}.tmp"
    with open(temporary, "w", encoding="utf-8") as handle:
        json.dump(value, handle, indent=1)
        handle.write("\n")
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(temporary, path)
