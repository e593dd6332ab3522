"""Fingerprints of data: of their content and of how they are read, not of where they are stored."""

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

    Its path and the names of its files are included for readers; `fingerprint` ignores them.

    Raises:
        UserError: a file that cannot be read, or a data set that the Hub does not have.
    """
    files = local_files(source)
    if files:
        hashes = {}
        folder = os.path.commonpath([os.path.dirname(file) for file in files])
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
    """`identity` for files that are too large to be read before training.

    Local files are identified by their size and `sampled_sha256`: all of a file of up to 16 MB, a sample of a larger
    one. Files on the Hub are identified by the Hub's own hashes of every byte, and not by the revision, which also
    changes with a README.

    Args:
        source: the source.
        sizes: {file: size in bytes}.

    Raises:
        UserError: a file that cannot be read.
    """
    folder = os.path.commonpath([os.path.dirname(file) for file in sizes])
    is_local = bool(local_files(source))
    content_hash = sampled_sha256 if is_local else remote_hash
    with ThreadPoolExecutor(16) as pool:  # they wait for a disk or the network
        hashes = pool.map(content_hash, sizes, sizes.values())
        files = {
            os.path.relpath(file, folder): f"{size} {content}"
            for (file, size), content in zip(sizes.items(), hashes, strict=True)
        }
    if not is_local:
        return asdict(source) | {"files": files}
    return {"path": source.path, "text_column": source.text_column, "weight": source.weight, "files": files}


def sampled_sha256(file: str, size: int) -> str:
    """sha256 of a whole file, or of 16 blocks of 1 MB of a larger one.

    An insertion or deletion changes the size or one of the blocks. A change in place between two blocks, which leaves
    the size as it is, is not noticed.

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
    """The hash under which a remote file is listed: on the Hub sha256 of large files and the git hash of small ones."""
    import fsspec

    system, path = fsspec.core.url_to_fs(file)
    info = system.info(path)
    stored = info.get("lfs") or {}
    return stored.get("sha256") or info.get("blob_id") or info.get("ETag") or "of no known hash"


def fingerprint(plan: dict) -> str:
    """sha256 of everything that determines prepared data. The same data under another path have the same fingerprint.

    Args:
        plan: the manifest before anything is read, with the `identity` of each source.
    """
    plan = plan | {key: [_content(source) for source in plan[key]] for key in SPLITS if key in plan}
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()


def _content(source: dict) -> dict:
    """The identity of a source without the paths of local files, but with their order and formats."""
    if "revision" in source:
        return source
    files = [[file_format(name), file_compression(name), content] for name, content in source["files"].items()]
    return {key: value for key, value in source.items() if key != "path"} | {"files": files}
