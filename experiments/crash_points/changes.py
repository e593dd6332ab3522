"""The file-system changes of a run, counted by changes.c, and the selection of those to interrupt."""

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
    """How a change is interrupted. The values are those of changes.c."""

    COUNT = 0  # not interrupted
    KILL = 1  # all processes of the run are killed before the change
    TORN = 2  # half of a write is made, then all processes are killed
    FULL = 3  # half of a write is made, then the disk is full
    KILL_GROUP = 4  # the process group of the process that makes the change is killed before it


@dataclass(frozen=True)
class Change:
    number: int  # counted from 1
    kind: str  # "create", "write", "truncate", "rename", "unlink", "mkdir", "rmdir", ...
    bytes: int  # of a write, else 0
    path: str  # relative to the watched folder


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
    """Count the changes below `folder` from now on. The process was started with the library in LD_PRELOAD."""
    if ctypes.CDLL(os.environ["LD_PRELOAD"]).changes_watch(bytes(folder), bytes(log), int(mode), ctypes.c_long(number)):
        raise OSError(f"cannot watch {folder}")


def add_group(group: int) -> None:
    """Kill the processes of this group together with the run."""
    ctypes.CDLL(os.environ["LD_PRELOAD"]).changes_add_group(group)


def remove_group(group: int) -> None:
    """Forget a group whose processes have all ended."""
    ctypes.CDLL(os.environ["LD_PRELOAD"]).changes_remove_group(group)


def read_changes(log: Path, folder: Path) -> list[Change]:
    """The changes in a log, with paths that are equal in every run."""
    changes = []
    for line in log.read_text(encoding="utf-8").splitlines():
        number, kind, size, path = line.split("\t", 3)
        changes.append(Change(int(number), kind, int(size), stable_name(path.removeprefix(f"{folder}/"))))
    return changes


def stable_name(path: str) -> str:
    """A path with placeholders for random names."""
    path = re.sub(r"(incomplete-)[0-9a-f]{12}\b", r"\1RANDOM", path)
    return re.sub(r"\btmp([a-z0-9_]{8}|[A-Za-z0-9]{6})\b", "tmpRANDOM", path)


def select_changes(changes: list[Change], mode: Mode) -> list[tuple[str, Change]]:
    """The changes to interrupt, each with a unique name.

    Of consecutive writes to a file, the first, the second and the last are selected.
    """
    groups: list[list[Change]] = []  # consecutive writes to a file, or a single change
    for change in changes:
        previous = groups[-1][-1] if groups else None
        if previous and change.kind == previous.kind == "write" and change.path == previous.path:
            groups[-1].append(change)
        else:
            groups.append([change])
    selected = []
    for group in groups:
        selected += dict.fromkeys([*group[:2], group[-1]])
    if mode is Mode.TORN:
        selected = [change for change in selected if change.kind == "write" and change.bytes > 1]
    elif mode is Mode.FULL:  # the other changes need no space
        selected = [change for change in selected if change.kind in NEEDS_SPACE]
    seen: dict[str, int] = defaultdict(int)
    named = []
    for change in selected:
        name = f"{change.kind} {change.path}"
        seen[name] += 1
        named.append((f"{name} #{seen[name]}", change))
    return named
