"""Checks of interrupted and resumed runs: exit status, messages, checkpoints, batches."""

import os
import re
from pathlib import Path

from experiments.crash_points.changes import Change, Mode, read_changes
from experiments.runner import ROOT
from unlabeled.runtime.checkpoints import STAGING, find_checkpoint_defect, find_checkpoints

Batch = tuple[str, int, str]  # output folder, step, hash of the tensors
Steps = dict[tuple[str, int], list[str]]  # hashes of the micro-batches, by output folder and step
REMEDY = r"make room|free some space|set (it|prepared_dir|\w+ to another)|choose another"


class Failure(Exception):
    """A run did not end as it should; the message says how."""


def group_by_step(batches: list[Batch]) -> Steps:
    """The hashes of the micro-batches of each step."""
    steps: Steps = {}
    for run, step, digest in batches:
        steps.setdefault((run, step), []).append(digest)
    return steps


def newest_steps(folder: Path) -> dict[str, int]:
    """The step of the newest checkpoint in each output folder, by its path below `folder`."""
    newest: dict[str, int] = {}
    for path in folder.rglob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if match and path.parent.name != STAGING:
            run = str(path.parent.relative_to(folder))
            newest[run] = max(newest.get(run, 0), int(match[1]))
    return newest


def last_line(log: Path) -> str:
    """The last line of a log, for messages."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.exists() else []
    return lines[-1][-300:] if lines else "it printed nothing"


def check_interruption(status: int, mode: Mode, number: int, expected: Change | None, folder: Path, log: Path) -> None:
    """Check that a run was interrupted at a change, and how it ended.

    Args:
        status: exit status, negative for a signal.
        number: of the change that was to be interrupted.
        expected: the change that this number should be; None if the number was drawn, and the run may end before it.
        log: output of the run, beside the list of its changes.
    """
    changes = read_changes(log.with_name("changes"), folder)
    if len(changes) < number:
        if expected:
            raise Failure(f"the run ended with status {status} before change {number}")
        if status:
            raise Failure(f"status {status} without an interruption: {last_line(log)}")
        return
    change = changes[number - 1]
    if expected and (change.kind, change.path) != (expected.kind, expected.path):
        raise Failure(f"change {number} is {change.kind} {change.path}")
    if mode is Mode.FULL:
        check_message(status, log, folder)
    elif mode is Mode.KILL_GROUP:
        if status == 0:
            raise Failure("a process was killed, but the run ended with status 0")
    elif status != -9 and not (mode is Mode.TORN and change.bytes < 2):
        raise Failure(f"the run was to be killed, but ended with status {status}")


def check_message(status: int, log: Path, folder: Path) -> None:
    """Check a run whose disk was full: status 2 and one sentence that names the folder and a remedy.

    Status 0 is accepted: then the file was not needed, which the comparison of the files verifies.
    """
    if status == 0:
        return
    text = log.read_text(encoding="utf-8", errors="replace")
    if "Traceback" in text:
        raise Failure(f"a traceback with a full disk, status {status}: {last_line(log)}")
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    if status != 2 or len(errors) != 1:
        raise Failure(f"status {status} with a full disk: {last_line(log)}")
    message = errors[0]
    names = (str(folder), os.path.relpath(folder, ROOT))  # a chain uses paths relative to the repository
    if not any(name in message for name in names):
        raise Failure(f"the message names no folder: {message}")
    if not re.search(REMEDY, message):
        raise Failure(f"the message names no remedy: {message}")
    match = re.search(r"cannot write .* to (\S+) \(.*the last complete checkpoint is (\S+?):", message)
    if match:
        output_dir, checkpoint = match.groups()
        newest = next(iter(find_checkpoints(output_dir)), "none")
        if checkpoint != newest:
            raise Failure(f"the message names another checkpoint than the last: {message}")


def check_checkpoints(folder: Path, changes: list[Change]) -> None:
    """Check that every checkpoint is complete, and that none has been lost since it was committed.

    Args:
        changes: of the interrupted run; the last one did not happen.
    """
    newest = newest_steps(folder)
    for run in newest:
        for checkpoint in find_checkpoints(str(folder / run)):
            defect = find_checkpoint_defect(checkpoint, read=True)
            if defect:
                raise Failure(f"{checkpoint} is not complete: {defect}")
    for change in changes[:-1]:
        match = re.fullmatch(r"(.*)/checkpoint-(\d+)", change.path)
        if change.kind != "rename" or not match or match[1].endswith(STAGING):
            continue
        run, step = match.groups()
        if newest.get(run, 0) < int(step):
            raise Failure(f"{change.path} was committed and is lost")


def check_resumption(batches: list[Batch], newest: dict[str, int]) -> None:
    """Check that the first step trained in each output folder is the one after its newest checkpoint."""
    first: dict[str, int] = {}
    for run, step, _ in batches:
        first.setdefault(run, step)
    for run, step in first.items():
        if step != newest.get(run, 0) + 1:
            raise Failure(f"{run} began at step {step} with a checkpoint of step {newest.get(run, 0)}")


def check_batches(batches: list[Batch], expected: Steps) -> None:
    """Check that every step was trained, with the batches of the undisturbed run."""
    steps = group_by_step(batches)
    if steps.keys() != expected.keys():
        raise Failure(f"trained steps {sorted(steps)}, not {sorted(expected)}")
    for (run, step), digests in steps.items():
        expected_digests = expected[run, step]
        count = len(expected_digests)
        for start in range(0, len(digests), count):  # an interrupted step is trained again
            attempt = digests[start : start + count]
            if attempt != expected_digests[: len(attempt)]:
                raise Failure(f"step {step} of {run} was trained with other batches")
