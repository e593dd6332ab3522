"""Runs the commands of `settings.py`: undisturbed, interrupted at a point, and again."""

import os
import random
import shutil
import signal
import threading
from dataclasses import dataclass, field
from pathlib import Path

from experiments import runner
from experiments.crash_points.changes import Change, Mode, read_changes, select_changes
from experiments.crash_points.checks import (
    Batch,
    Failure,
    Steps,
    check_batches,
    check_checkpoints,
    check_interruption,
    check_resumption,
    group_by_step,
    last_line,
    newest_steps,
)
from experiments.crash_points.child import Setup
from experiments.crash_points.comparison import find_difference, read_batches, read_folder
from experiments.crash_points.settings import SETTINGS, Setting

TIMEOUT = 300  # seconds; a run takes one or two
MODES = {"kill": Mode.KILL, "torn": Mode.TORN, "full": Mode.FULL}


@dataclass(frozen=True)
class Point:
    """A change of a setting, and how it is interrupted."""

    setting: str
    mode: Mode
    name: str
    change: Change

    @property
    def key(self) -> str:
        return f"{self.setting} {self.mode.name.lower()} {self.name}"


@dataclass
class Reference:
    """An undisturbed run of a setting, and the points where others are interrupted, by "kill", "torn" and "full"."""

    changes: list[Change]
    content: dict[str, object]
    batches: Steps
    points: dict[str, list[Point]] = field(default_factory=dict)


class Harness:
    """Runs settings in subfolders of `folder`: `inputs`, `undisturbed`, and `points` for the interrupted runs."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.inputs = folder / "inputs"
        self.start_lock = threading.Lock()  # only one thread at a time may use the fork server

    def run(self, setting: Setting, folder: Path, records: Path, mode: Mode = Mode.COUNT, number: int = 0) -> int:
        """Run a setting in a folder.

        Args:
            records: folder for the output (`log`), the changes and the batches of the run.
            number: of the change that is interrupted.

        Returns:
            The exit status, negative for a signal.
        """
        with self.start_lock:
            process = runner.start_script(
                setting.script,
                setting.arguments(self.inputs, folder),
                records / "log",
                setup=Setup(folder, records, mode, number),
            )
        process.join(TIMEOUT)
        if process.exitcode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
            raise Failure(f"still running after {TIMEOUT} s")
        return process.exitcode

    def make_reference(self, setting: Setting) -> Reference:
        """Run a setting twice without interruption, and list the points of it.

        Raises:
            SystemExit: a run fails, or the two differ.
        """
        for name in setting.needs:
            if not (self.inputs / name / "finished").exists():
                self.make_input(SETTINGS[name])
        folders = [self.folder / "undisturbed" / f"{setting.name}-{index}" for index in range(2)]
        for folder in folders:
            self.run_undisturbed(setting, folder)
        content = read_folder(folders[0])
        difference = find_difference(folders[1], content)
        if difference:
            raise SystemExit(f"two undisturbed runs of {setting.name} differ, {difference}")
        records = records_of(folders[0])
        changes = read_changes(records / "changes", folders[0])
        reference = Reference(changes, content, group_by_step(read_batches(records / "batches")))
        for label in setting.modes:
            mode = setting.kill if label == "kill" else MODES[label]
            selected = select_changes(changes, mode)
            reference.points[label] = [Point(setting.name, mode, name, change) for name, change in selected]
        return reference

    def make_input(self, setting: Setting) -> None:
        """Run a setting whose output other settings read."""
        folder = self.inputs / setting.name
        self.run_undisturbed(setting, folder)
        (folder / "finished").touch()

    def run_undisturbed(self, setting: Setting, folder: Path) -> None:
        """Run a setting without interruption, in an empty folder.

        Raises:
            SystemExit: it fails.
        """
        records = records_of(folder)
        for path in (folder, records):
            shutil.rmtree(path, ignore_errors=True)
        folder.mkdir(parents=True)
        status = self.run(setting, folder, records)
        if status:
            raise SystemExit(f"{setting.name} fails undisturbed with status {status}, see {records}/log")

    def try_point(self, point: Point, reference: Reference, twice: bool) -> str | None:
        """Interrupt a setting at a point, run it again, and compare it with the undisturbed run.

        Args:
            twice: interrupt the second run as well, at a random change.

        Returns:
            The reason of a failure, or None.
        """
        home = self.folder / "points" / str(threading.get_ident())
        shutil.rmtree(home, ignore_errors=True)
        folder = home / "folder"
        folder.mkdir(parents=True)
        try:
            self.interrupt_and_compare(point, reference, twice, home, folder)
        except Failure as failure:
            return str(failure).replace(str(folder), "FOLDER")
        return None

    def interrupt_and_compare(self, point: Point, reference: Reference, twice: bool, home: Path, folder: Path) -> None:
        setting = SETTINGS[point.setting]
        batches = self.interrupt(setting, folder, home / "first", point.mode, point.change.number, point.change)
        if twice:
            number = random.Random(point.key).randint(1, max(1, len(reference.changes) // 2))
            batches += self.interrupt(setting, folder, home / "second", point.mode, number)
        newest = newest_steps(folder)
        status = self.run(setting, folder, home / "last")
        if status:
            raise Failure(f"the same command ends with status {status}: {last_line(home / 'last' / 'log')}")
        last_batches = read_batches(home / "last" / "batches")
        check_resumption(last_batches, newest)
        check_batches(batches + last_batches, reference.batches)
        difference = find_difference(folder, reference.content)
        if difference:
            raise Failure(difference)

    def interrupt(
        self, setting: Setting, folder: Path, records: Path, mode: Mode, number: int, expected: Change | None = None
    ) -> list[Batch]:
        """Run a setting up to a change, and check what is left. Returns the batches that it has trained on."""
        status = self.run(setting, folder, records, mode, number)
        check_interruption(status, mode, number, expected, folder, records / "log")
        check_checkpoints(folder, read_changes(records / "changes", folder))
        return read_batches(records / "batches")


def records_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}-records")
