"""The changes to files that a run makes, and which of them are tried: see changes.c."""

import ctypes
import enum
import os
import re
import subprocess
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).with_name("changes.c")
NEEDS_SPACE = {"create", "write", "mkdir", "link", "symlink", "allocate"}


class Mode(enum.IntEnum):
    """How the n-th change is interrupted; the numbers are those of changes.c."""

    COUNT = 0  # not at all
    KILL = 1  # all processes of the run die before it
    TORN = 2  # half of a write is made, then all processes die
    FULL = 3  # half of a write is made, then the disk is full
    KILL_GROUP = 4  # the process that makes it dies before it, with the others of its process group


@dataclass(frozen=True)
class Change:
    number: int  # from 1
    kind: str  # "create", "write", "truncate", "rename", "unlink", "mkdir", "rmdir", ...
    bytes: int  # of a write, else 0
    path: str  # relative to the folder that is watched


def compile_library(folder: Path) -> Path:
    """Compile changes.c with the system's compiler.

    Raises:
        FileNotFoundError: there is no `cc`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "changes.so"
    command = ["cc", "-O2", "-Wall", "-Wextra", "-shared", "-fPIC", "-o", str(library), str(SOURCE), "-ldl"]
    subprocess.run(command, check=True)
    return library


def watch(folder: Path, log: Path, mode: Mode, number: int) -> None:
    """Begin to count the changes below `folder` in this process, which was started with the library."""
    if ctypes.CDLL(os.environ["LD_PRELOAD"]).changes_watch(bytes(folder), bytes(log), int(mode), ctypes.c_long(number)):
        raise OSError(f"cannot watch {folder}")


def add_group(group: int) -> None:
    """Let the processes of a group die with the others of this run."""
    ctypes.CDLL(os.environ["LD_PRELOAD"]).changes_add_group(group)


def remove_group(group: int) -> None:
    """To be called when all processes of a group have ended."""
    ctypes.CDLL(os.environ["LD_PRELOAD"]).changes_remove_group(group)


def read_changes(log: Path, folder: Path) -> list[Change]:
    """The changes in a log, with names as they are in every run."""
    changes = []
    for line in log.read_text(encoding="utf-8").splitlines():
        number, kind, size, path = line.split("\t", 3)
        changes.append(Change(int(number), kind, int(size), stable_name(path.removeprefix(f"{folder}/"))))
    return changes


def stable_name(path: str) -> str:
    """A path without random names."""
    path = re.sub(r"(incomplete-)[0-9a-f]{12}\b", r"\1RANDOM", path)
    return re.sub(r"\btmp([a-z0-9_]{8}|[A-Za-z0-9]{6})\b", "tmpRANDOM", path)


def select_changes(changes: list[Change], mode: Mode) -> list[tuple[str, Change]]:
    """The changes to interrupt, each with a name of its own.

    Of consecutive writes to a file these are the first, the second and the last.
    """
    runs: list[list[Change]] = []
    for change in changes:
        if runs and change.kind == "write" == runs[-1][-1].kind and change.path == runs[-1][-1].path:
            runs[-1].append(change)
        else:
            runs.append([change])
    selected = [change for run in runs for change in dict.fromkeys([*run[:2], run[-1]])]
    if mode is Mode.TORN:
        selected = [change for change in selected if change.kind == "write" and change.bytes > 1]
    elif mode is Mode.FULL:  # where nothing needs space, a later one meets the full disk
        selected = [change for change in selected if change.kind in NEEDS_SPACE]
    seen: dict[str, int] = defaultdict(int)
    named = []
    for change in selected:
        name = f"{change.kind} {change.path}"
        seen[name] += 1
        named.append((f"{name} #{seen[name]}", change))
    return named
