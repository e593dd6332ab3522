"""What identifies data: its content and how it is read, wherever it lies."""

import hashlib
import json
import os
from dataclasses import asdict

from unlabeled import UserError
from unlabeled.checkpoints import file_sha256
from unlabeled.data.files import file_compression, file_format, local_files
from unlabeled.data.sources import Source

SPLITS = ("train", "evaluation", "test")  # the keys of a manifest that hold sources

ENDS_BYTES = 1_000_000  # of the files of a stream


def identity(source: Source) -> dict:
    """What determines the text of a source: sha256 of each local file in the order of reading, or the Hub's revision.

    Its path and the names of its files are there for people; `fingerprint` leaves them out.

    Raises:
        UserError: a file that cannot be read, or a data set that the Hub does not have.
    """
    files = local_files(source)
    if files:
        hashes, folder = {}, os.path.commonpath([os.path.dirname(file) for file in files])
        for file in files:
            try:
                hashes[os.path.relpath(file, folder)] = file_sha256(file)
            except OSError as error:
                raise UserError(f"cannot read {file} ({error.strerror}); make it readable or leave it out") from error
        return {"path": source.path, "text_column": source.text_column, "weight": source.weight, "files": hashes}
    from huggingface_hub import HfApi

    try:
        revision = HfApi().dataset_info(source.path, revision=source.revision).sha
    except Exception as error:
        raise UserError(
            f"{source.path} is neither a local file nor a data set that the Hub lets you read "
            f"({type(error).__name__}); check the name, the network and HF_TOKEN"
        ) from error
    return asdict(source) | {"revision": revision}


def stream_identity(source: Source, sizes: dict[str, int]) -> dict:
    """As `identity`, for files that are too large to be read before training: sizes in bytes, here or on the Hub.

    Of files here, the first and the last megabyte count as well.
    """
    folder = os.path.commonpath([os.path.dirname(file) for file in sizes])
    names = {file: os.path.relpath(file, folder) for file in sizes}
    if not local_files(source):
        return asdict(source) | {"files": {names[file]: size for file, size in sizes.items()}}
    files = {names[file]: f"{size} {_ends_sha256(file, size)}" for file, size in sizes.items()}
    return {"path": source.path, "text_column": source.text_column, "weight": source.weight, "files": files}


def _ends_sha256(file: str, size: int) -> str:
    digest = hashlib.sha256()
    try:
        with open(file, "rb") as handle:
            digest.update(handle.read(ENDS_BYTES))
            handle.seek(max(size - ENDS_BYTES, 0))
            digest.update(handle.read(ENDS_BYTES))
    except OSError as error:
        raise UserError(f"cannot read {file} ({error.strerror}); make it readable or leave it out") from error
    return digest.hexdigest()


def fingerprint(plan: dict) -> str:
    """sha256 of all that determines prepared data; the same data under another path have the same.

    Args:
        plan: the manifest before anything is read; of its sources, what `identity` gives.
    """
    plan = plan | {key: [_content(source) for source in plan[key]] for key in SPLITS if key in plan}
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()


def _content(source: dict) -> dict:
    """A source without what depends on where its files lie; their order and formats count.

    The name of a data set on the Hub is no such thing.
    """
    if "revision" in source:
        return source
    files = [[file_format(name), file_compression(name), content] for name, content in source["files"].items()]
    return {key: value for key, value in source.items() if key != "path"} | {"files": files}
