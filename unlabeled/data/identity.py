"""What identifies data: its content and how it is read, wherever it lies."""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

from unlabeled.data.files import file_compression, file_format, local_files
from unlabeled.data.sources import Source
from unlabeled.errors import UserError
from unlabeled.runtime.files import file_sha256

SPLITS = ("train", "evaluation", "test")  # the keys of a manifest that hold sources

# Of a file of a stream, this many blocks of this many bytes are read, at even distances from its beginning to its end.
SAMPLED_BLOCKS, BLOCK_BYTES = 16, 1_000_000


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

    Of files here, `sampled_sha256` counts as well: all of a file of up to 16 MB, a sample of a larger one. For files on
    the Hub its own hashes count, which are of every byte, and not the revision, which also changes with a README.

    Raises:
        UserError: a file that cannot be read.
    """
    folder = os.path.commonpath([os.path.dirname(file) for file in sizes])
    is_local = bool(local_files(source))
    content_hash = sampled_sha256 if is_local else remote_hash
    with ThreadPoolExecutor(16) as pool:  # each waits for a disk or the network
        hashes = pool.map(content_hash, sizes, sizes.values())
        files = {
            os.path.relpath(file, folder): f"{size} {found}"
            for (file, size), found in zip(sizes.items(), hashes, strict=True)
        }
    if not is_local:
        return asdict(source) | {"files": files}
    return {"path": source.path, "text_column": source.text_column, "weight": source.weight, "files": files}


def sampled_sha256(file: str, size: int) -> str:
    """sha256 of a whole file, or of 16 blocks of a megabyte of one that is larger than these.

    A file of another size, or with anything inserted or taken out, differs in one of the blocks; a change in place that
    lies between them, and leaves the size as it is, is not noticed.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        if size <= SAMPLED_BLOCKS * BLOCK_BYTES:
            return file_sha256(file)
        digest = hashlib.sha256()
        with open(file, "rb") as handle:
            for block in range(SAMPLED_BLOCKS):
                handle.seek(block * (size - BLOCK_BYTES) // (SAMPLED_BLOCKS - 1))
                digest.update(handle.read(BLOCK_BYTES))
        return digest.hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {file} ({error.strerror}); make it readable or leave it out") from error


def remote_hash(file: str, size: int) -> str:
    """The hash that the host of a file lists it with: on the Hub sha256 of large files, git's hash of small ones."""
    import fsspec

    system, path = fsspec.core.url_to_fs(file)
    info = system.info(path)
    stored = info.get("lfs") or {}
    return stored.get("sha256") or info.get("blob_id") or info.get("ETag") or "of no known hash"


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
