"""Kill runs before each of their changes to the file system, or fill the disk there, and see how the same command ends.

    python -m experiments.crash_points.run                                  # a sample of all settings in 25 minutes
    python -m experiments.crash_points.run --settings clm --every 1 --minutes 120   # every point of one
    python -m experiments.crash_points.run --write                          # with the table of docs/reliability.md

The same command goes on where it stopped, `--fresh` begins anew, `--failed` tries the points again that failed.
Exits with 1 where a point has failed. What is tried at a point, and what is compared, is in README.md.
"""

import argparse
import importlib.metadata
import json
import os
import random
import re
import shutil
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from experiments import runner
from experiments.crash_points.changes import Change, Mode, compile_library, read_changes, select_changes
from experiments.crash_points.child import Setup
from experiments.crash_points.comparison import find_difference, read_batches, read_folder
from experiments.crash_points.settings import PRELOADED, SETTINGS, Setting, make_inputs
from unlabeled.runtime.checkpoints import STAGING, find_checkpoint_defect, find_checkpoints

FOLDER = Path(__file__).resolve().parent
TIMEOUT = 300  # seconds for a run of one or two
AGAIN = 4  # at every fourth point the second run is interrupted as well
MODES = {"kill": Mode.KILL, "torn": Mode.TORN, "full": Mode.FULL}
DOCUMENT = runner.ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- crash points: begin -->", "<!-- crash points: end -->"


Batch = tuple[str, int, str]  # output_dir, step, hash of the tensors
Steps = dict[tuple[str, int], list[str]]  # hashes of the micro-batches, by output_dir and step


class Failure(Exception):
    """A run that did not end as it should; the message says how."""


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
    """An undisturbed run of a setting."""

    changes: list[Change]
    content: dict[str, object]
    batches: Steps
    points: dict[str, list[Point]] = field(default_factory=dict)


class Harness:
    """Runs settings in `folder`, which holds the inputs, the undisturbed runs and those that are interrupted."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.inputs = folder / "inputs"
        self.start_lock = threading.Lock()  # the fork server is asked by one thread at a time

    def run(self, setting: Setting, folder: Path, records: Path, mode: Mode = Mode.COUNT, number: int = 0) -> int:
        """Run a setting in a folder; its exit status, negative for a signal. What it prints is in records/log."""
        with self.start_lock:
            process = runner.start_script(
                setting.script,
                setting.arguments(self.inputs, folder),
                records / "log",
                setup=Setup(folder, records, mode, number),
            )
        process.join(TIMEOUT)
        if process.exitcode is None:
            os.killpg(process.pid, 9)
            process.join()
            raise Failure(f"still running after {TIMEOUT} s")
        return process.exitcode

    def undisturbed(self, setting: Setting) -> Reference:
        """Run a setting twice; what both left behind.

        Raises:
            SystemExit: it fails, or the two are not equal.
        """
        for need in setting.needs:
            if not (self.inputs / need / "finished").exists():
                self.make_input(SETTINGS[need])
        folders = [self.folder / "undisturbed" / f"{setting.name}-{i}" for i in range(2)]
        for folder in folders:
            records = folder.with_name(f"{folder.name}-records")
            for path in (folder, records):
                shutil.rmtree(path, ignore_errors=True)
            folder.mkdir(parents=True)
            if status := self.run(setting, folder, records):
                raise SystemExit(f"{setting.name} fails undisturbed with status {status}, see {records}/log")
        content = read_folder(folders[0])
        if difference := find_difference(folders[1], content):
            raise SystemExit(f"two undisturbed runs of {setting.name} are not equal, {difference}")
        records = folders[0].with_name(f"{folders[0].name}-records")
        reference = Reference(
            read_changes(records / "changes", folders[0]), content, group(read_batches(records / "batches"))
        )
        for label in setting.modes:
            mode = setting.kill if label == "kill" else MODES[label]
            selected = select_changes(reference.changes, mode)
            reference.points[label] = [Point(setting.name, mode, name, change) for name, change in selected]
        return reference

    def make_input(self, setting: Setting) -> None:
        """Leave the undisturbed run of a setting in the folder of the inputs, for others to read."""
        folder = self.inputs / setting.name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        if status := self.run(setting, folder, self.inputs / f"{setting.name}-records"):
            raise SystemExit(f"{setting.name} fails with status {status}, see {self.inputs}/{setting.name}-records/log")
        (folder / "finished").touch()

    def try_point(self, point: Point, reference: Reference, again: bool) -> str | None:
        """Interrupt a setting at a point, run it again and compare; why it has failed, or None.

        Args:
            again: interrupt the second run as well, at a change that is drawn.
        """
        setting = SETTINGS[point.setting]
        home = self.folder / "points" / str(threading.get_ident())
        shutil.rmtree(home, ignore_errors=True)
        folder = home / "folder"
        folder.mkdir(parents=True)
        batches: list[Batch] = []
        try:
            self.interrupt(setting, folder, home / "first", point.mode, point.change.number, point.change)
            batches += self.check_interrupted(folder, home / "first")
            if again:
                number = random.Random(point.key).randint(1, max(1, len(reference.changes) // 2))
                self.interrupt(setting, folder, home / "second", point.mode, number)
                batches += self.check_interrupted(folder, home / "second")
            newest = newest_steps(folder)
            status = self.run(setting, folder, home / "last")
            if status:
                raise Failure(f"the same command ends with status {status}: {last_line(home / 'last' / 'log')}")
            check_resumption(read_batches(home / "last" / "batches"), newest)
            check_batches(batches + read_batches(home / "last" / "batches"), reference.batches)
            if difference := find_difference(folder, reference.content):
                raise Failure(difference)
        except Failure as failure:
            return str(failure).replace(str(folder), "FOLDER")
        return None

    def interrupt(
        self, setting: Setting, folder: Path, records: Path, mode: Mode, number: int, expected: Change | None = None
    ) -> None:
        """Run a setting up to a change and check how it ends there; `expected` is the change that it should be."""
        status = self.run(setting, folder, records, mode, number)
        changes = read_changes(records / "changes", folder)
        reached = len(changes) >= number
        if expected and not reached:
            raise Failure(f"the run ended with status {status} before change {number}")
        if expected and (changes[number - 1].kind, changes[number - 1].path) != (expected.kind, expected.path):
            raise Failure(f"change {number} is {changes[number - 1].kind} {changes[number - 1].path}")
        if not reached:
            if status:
                raise Failure(f"status {status} without an interruption: {last_line(records / 'log')}")
        elif mode is Mode.FULL:
            check_message(status, records / "log", folder)
        elif mode is Mode.KILL_GROUP:
            if not status:
                raise Failure("a process was killed and the run ended with status 0")
        elif status != -9 and not (mode is Mode.TORN and changes[number - 1].bytes < 2):
            raise Failure(f"the run was to be killed and ended with status {status}")

    def check_interrupted(self, folder: Path, records: Path) -> list[Batch]:
        """Check that checkpoints are whole or absent and none is lost; the batches that the run has trained on."""
        newest = newest_steps(folder)
        for run in newest:
            for checkpoint in find_checkpoints(str(folder / run)):
                if defect := find_checkpoint_defect(checkpoint, read=True):
                    raise Failure(f"{checkpoint} is not whole: {defect}")
        for change in read_changes(records / "changes", folder)[:-1]:
            match = re.fullmatch(r"(.*)/checkpoint-(\d+)", change.path)
            if not match or change.kind != "rename" or match[1].endswith(STAGING):
                continue
            if newest.get(match[1], 0) < int(match[2]):
                raise Failure(f"{change.path} was there and is lost")
        return read_batches(records / "batches")


def group(batches: list[Batch]) -> Steps:
    """The hashes of each step's micro-batches."""
    steps: Steps = {}
    for run, step, digest in batches:
        steps.setdefault((run, step), []).append(digest)
    return steps


def newest_steps(folder: Path) -> dict[str, int]:
    """The step of the newest checkpoint in each folder that has one."""
    newest: dict[str, int] = {}
    for path in folder.rglob("checkpoint-*"):
        if match := re.fullmatch(r"checkpoint-(\d+)", path.name):
            run = str(path.parent.relative_to(folder))
            if path.parent.name != STAGING:
                newest[run] = max(newest.get(run, 0), int(match[1]))
    return newest


def last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.exists() else []
    return lines[-1][-300:] if lines else "it printed nothing"


def check_message(status: int, log: Path, folder: Path) -> None:
    """Of a run whose disk is full: one sentence that names the folder and what to do, and status 2."""
    text = log.read_text(encoding="utf-8", errors="replace")
    if status == 0:
        return  # what needed space was not needed; the comparison shows whether that is so
    if "Traceback" in text:
        raise Failure(f"a traceback with a full disk, status {status}: {last_line(log)}")
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    if status != 2 or len(errors) != 1:
        raise Failure(f"status {status} with a full disk: {last_line(log)}")
    names = (str(folder), os.path.relpath(folder, runner.ROOT))  # a chain has paths relative to the repository
    if not any(name in errors[0] for name in names):
        raise Failure(f"the message names no folder: {errors[0]}")
    if not re.search(r"make room|free some space|set (it|prepared_dir|\w+ to another)|choose another", errors[0]):
        raise Failure(f"the message names no remedy: {errors[0]}")
    named = re.search(r"cannot write .* to (\S+) \(.*the last complete checkpoint is (\S+?):", errors[0])
    if named and named[2] != (find_checkpoints(named[1]) or ["none"])[0]:
        raise Failure(f"the message names another checkpoint than the last: {errors[0]}")


def check_resumption(batches: list[Batch], newest: dict[str, int]) -> None:
    """The first step that is trained in each folder is the one after its newest checkpoint."""
    first: dict[str, int] = {}
    for run, step, _ in batches:
        first.setdefault(run, step)
    for run, step in first.items():
        if step != newest.get(run, 0) + 1:
            raise Failure(f"{run} began at step {step} with a checkpoint of step {newest.get(run, 0)}")


def check_batches(batches: list[Batch], expected: Steps) -> None:
    """Every step has been trained, with the batches of the undisturbed run."""
    seen = group(batches)
    if seen.keys() != expected.keys():
        raise Failure(f"trained steps {sorted(seen)}, not {sorted(expected)}")
    for step, digests in seen.items():
        count = len(expected[step])
        for start in range(0, len(digests), count):  # a step may have been begun several times
            if digests[start : start + count] != expected[step][: len(digests) - start]:
                raise Failure(f"step {step[1]} of {step[0]} was trained with other batches")


# --- Which points, and what came of them ------------------------------------------------------------------------------


def spread(points: list[Point], every: int) -> list[Point]:
    """Every `every`-th point in an order in which each beginning is spread over the whole run."""
    chosen = points[::every]
    order = sorted(range(len(chosen)), key=lambda i: f"{i:016b}"[::-1])
    return [chosen[i] for i in order]


def interleave(queues: list[list[Point]]) -> list[Point]:
    """One of each queue in turn, so that a limit of time meets all settings alike."""
    longest = max(map(len, queues), default=0)
    return [queue[i] for i in range(longest) for queue in queues if i < len(queue)]


def read_progress(file: Path) -> dict[str, str | None]:
    """Why each point that was tried has failed, or None, by its key; the last try counts."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return {entry["point"]: entry["failure"] for entry in map(json.loads, lines)}


def summarize(references: dict[str, Reference], tried: dict[str, str | None]) -> list[dict]:
    """Counts of each setting."""
    rows = []
    for name, reference in references.items():
        row = {"setting": name, "changes": len(reference.changes)}
        failures = {}
        for label in MODES:
            keys = [point.key for point in reference.points.get(label, [])]
            done = [key for key in keys if key in tried]
            failed = {key: tried[key] for key in done if tried[key]}
            row[label] = {"points": len(keys), "tried": len(done), "passed": len(done) - len(failed)}
            failures |= failed
        rows.append(row | {"failed": failures})
    return rows


def make_table(rows: list[dict]) -> str:
    """Markdown for docs/reliability.md."""
    lines = ["| command | file-system changes | killed before one | killed in the middle of a write | disk full |"]
    lines += ["|---|---|---|---|---|"]
    for row in rows:
        cells = [f"{row[label]['passed']} of {row[label]['tried']} ({row[label]['points']})" for label in MODES]
        lines.append(f"| {row['setting']} | {row['changes']} | {' | '.join(cells)} |")
    totals = [[sum(row[label][key] for row in rows) for key in ("passed", "tried", "points")] for label in MODES]
    cells = [f"{passed} of {tried} ({points})" for passed, tried, points in totals]
    lines.append(f"| all | {sum(row['changes'] for row in rows)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write_document(table: str) -> None:
    """Put the table between its marks in docs/reliability.md."""
    text = DOCUMENT.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    DOCUMENT.write_text(f"{before}{BEGIN}\n\n{table}\n\n{END}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="default: all")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="default: all")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="try each N-th point only (default: 1)")
    parser.add_argument("--match", default="", help="only points whose name holds this regular expression")
    parser.add_argument("--points", type=int, help="of each setting and mode, at most (default: all)")
    parser.add_argument("--minutes", type=float, default=24, help="begin no point after that (default: 24)")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time (default: 2)")
    parser.add_argument(
        "--folder", type=Path, default=Path("outputs/crash_points"), help="default: outputs/crash_points"
    )
    parser.add_argument("--results", type=Path, help="file for the counts (default: results.json in the folder)")
    parser.add_argument("--fresh", action="store_true", help="forget what was tried before")
    parser.add_argument("--failed", action="store_true", help="try the points again that failed")
    parser.add_argument(
        "--write", action="store_true", help=f"write {FOLDER.name}/results.json and docs/reliability.md"
    )
    args = parser.parse_args()
    started = time.monotonic()
    folder = args.folder.resolve()
    if args.fresh:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hugging_face")}
    # Killed processes leave semaphores to multiprocessing, which warns of each when it ends.
    os.environ["PYTHONWARNINGS"] = "ignore::UserWarning:multiprocessing.resource_tracker"
    os.environ["LD_PRELOAD"] = str(compile_library(folder))
    runner.start_fork_server(PRELOADED)
    harness = Harness(folder)
    make_inputs(harness.inputs)
    progress = folder / "progress.jsonl"
    tried = read_progress(progress)
    references = {name: harness.undisturbed(SETTINGS[name]) for name in SETTINGS if name in args.settings}
    queues = [
        spread([point for point in reference.points.get(label, []) if re.search(args.match, point.name)], args.every)
        for reference in references.values()
        for label in args.modes
    ]
    todo = [
        point
        for point in interleave([queue[: args.points] for queue in queues])
        if point.key not in tried or (args.failed and tried[point.key])
    ]
    print(f"{len(todo)} points to try", flush=True)
    lock = threading.Lock()

    def work(numbered: tuple[int, Point]) -> None:
        number, point = numbered
        if time.monotonic() - started > 60 * args.minutes:
            return
        failure = harness.try_point(point, references[point.setting], again=number % AGAIN == AGAIN - 1)
        with lock, open(progress, "a", encoding="utf-8") as handle:
            handle.write(json.dumps({"point": point.key, "failure": failure}) + "\n")
            if failure:
                print(f"failed: {point.key}", flush=True)

    with ThreadPoolExecutor(args.workers) as pool:
        list(pool.map(work, enumerate(todo)))
    rows = summarize(references, read_progress(progress))
    result = {
        "command": " ".join(["python", "-m", "experiments.crash_points.run", *sys.argv[1:]]),
        "seconds": round(time.monotonic() - started),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "trl", "peft")},
        "settings": rows,
    }
    results = args.results or (FOLDER / "results.json" if args.write else folder / "results.json")
    results.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    table = make_table(rows)
    if args.write:
        write_document(table)
    print(table)
    failed = {key: reason for row in rows for key, reason in row["failed"].items()}
    for key, reason in failed.items():
        print(f"failed: {key}: {reason}", file=sys.stderr)
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
