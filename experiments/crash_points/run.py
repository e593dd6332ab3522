"""Interrupt runs at their file-system changes, by a kill or a full disk, and compare the files of the resumed run.

    python -m experiments.crash_points.run                                  # a sample of all settings in 25 minutes
    python -m experiments.crash_points.run --settings clm --minutes 120     # every point of one setting
    python -m experiments.crash_points.run --write                          # writes the table of docs/reliability.md

The same command continues where it stopped; `--fresh` starts over, `--failed` tries failed points again. The exit
status is 1 if a point has failed. README.md explains what is tried at a point and what is compared.
"""

import argparse
import importlib.metadata
import json
import os
import re
import shutil
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from experiments import runner
from experiments.crash_points.changes import compile_library
from experiments.crash_points.harness import MODES, Harness, Point, Reference
from experiments.crash_points.settings import PRELOADED_MODULES, SETTINGS, make_inputs

RESULTS = Path(__file__).with_name("results.json")
DOCUMENT = runner.ROOT / "docs" / "reliability.md"
BEGIN = "<!-- crash points: begin -->"
END = "<!-- crash points: end -->"
TWICE_EVERY = 4  # at every fourth point, the second run is interrupted as well


# --- Which points are tried -------------------------------------------------------------------------------------------


def spread(points: list[Point], every: int) -> list[Point]:
    """Every `every`-th point, in an order in which the first points already cover the whole run."""
    chosen = points[::every]
    order = sorted(range(len(chosen)), key=lambda index: f"{index:016b}"[::-1])
    return [chosen[index] for index in order]


def interleave(queues: list[list[Point]]) -> list[Point]:
    """One point of each queue in turn, so that a time limit affects all settings alike."""
    longest = max(map(len, queues), default=0)
    return [queue[index] for index in range(longest) for queue in queues if index < len(queue)]


def choose_points(
    references: dict[str, Reference], tried: dict[str, str | None], args: argparse.Namespace
) -> list[Point]:
    """The points that the command line asks for and that have not been tried yet."""
    queues = []
    for reference in references.values():
        for mode in args.modes:
            points = [point for point in reference.points.get(mode, []) if re.search(args.match, point.name)]
            queues.append(spread(points, args.every)[: args.points])
    return [point for point in interleave(queues) if point.key not in tried or (args.failed and tried[point.key])]


def try_points(
    harness: Harness,
    points: list[Point],
    references: dict[str, Reference],
    progress: Path,
    workers: int,
    minutes: float,
) -> None:
    """Try points until the time is up; append the result of each to `progress`."""
    deadline = time.monotonic() + 60 * minutes
    lock = threading.Lock()

    def try_point(index: int, point: Point) -> None:
        if time.monotonic() > deadline:
            return
        twice = index % TWICE_EVERY == TWICE_EVERY - 1
        failure = harness.try_point(point, references[point.setting], twice)
        with lock, open(progress, "a", encoding="utf-8") as file:
            file.write(json.dumps({"point": point.key, "failure": failure}) + "\n")
            if failure:
                print(f"failed: {point.key}", flush=True)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(try_point, range(len(points)), points))


# --- Results ----------------------------------------------------------------------------------------------------------


def read_progress(file: Path) -> dict[str, str | None]:
    """For each point that was tried, why it failed last, or None if it passed."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return {entry["point"]: entry["failure"] for entry in map(json.loads, lines)}


def summarize(references: dict[str, Reference], tried: dict[str, str | None]) -> list[dict]:
    """The counts of each setting: changes, and points, tried and passed of each mode; and the failures."""
    rows = []
    for name, reference in references.items():
        row: dict = {"setting": name, "changes": len(reference.changes)}
        failures = {}
        for mode in MODES:
            keys = [point.key for point in reference.points.get(mode, [])]
            tried_keys = [key for key in keys if key in tried]
            failed = {key: tried[key] for key in tried_keys if tried[key]}
            row[mode] = {"points": len(keys), "tried": len(tried_keys), "passed": len(tried_keys) - len(failed)}
            failures |= failed
        rows.append(row | {"failed": failures})
    return rows


def make_table(rows: list[dict]) -> str:
    """The table of docs/reliability.md, in Markdown."""
    lines = [
        "| command | file-system changes | killed before a change | killed during a write | disk full |",
        "|---|---|---|---|---|",
    ]
    totals = {mode: {"passed": 0, "tried": 0, "points": 0} for mode in MODES}
    for row in rows:
        cells = [format_counts(row[mode]) for mode in MODES]
        lines.append(f"| {row['setting']} | {row['changes']} | {' | '.join(cells)} |")
        for mode in MODES:
            for key in totals[mode]:
                totals[mode][key] += row[mode][key]
    cells = [format_counts(totals[mode]) for mode in MODES]
    lines.append(f"| all | {sum(row['changes'] for row in rows)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def format_counts(counts: dict[str, int]) -> str:
    return f"{counts['passed']} of {counts['tried']} ({counts['points']})"


def write_document(table: str) -> None:
    """Put the table between its markers in docs/reliability.md."""
    text = DOCUMENT.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    DOCUMENT.write_text(f"{before}{BEGIN}\n\n{table}\n\n{END}{after}", encoding="utf-8")


# --- Command line -----------------------------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="default: all")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="default: all")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="try every N-th point only (default: 1)")
    parser.add_argument("--match", default="", help="only points whose name matches this regular expression")
    parser.add_argument("--points", type=int, help="at most this many points of each setting and mode (default: all)")
    parser.add_argument("--minutes", type=float, default=24, help="start no point after this time (default: 24)")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time (default: 2)")
    default_folder = Path("outputs/crash_points")
    parser.add_argument("--folder", type=Path, default=default_folder, help=f"default: {default_folder}")
    parser.add_argument("--results", type=Path, help="file for the counts (default: results.json in the folder)")
    parser.add_argument("--fresh", action="store_true", help="forget which points were tried")
    parser.add_argument("--failed", action="store_true", help="try failed points again")
    help_of_write = "write experiments/crash_points/results.json and docs/reliability.md"
    parser.add_argument("--write", action="store_true", help=help_of_write)
    return parser.parse_args()


def set_environment(folder: Path) -> None:
    """Set the variables of all runs, before the fork server starts."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_HOME"] = str(folder / "hugging_face")
    # Killed processes leave semaphores behind, and multiprocessing warns of each at its end.
    os.environ["PYTHONWARNINGS"] = "ignore::UserWarning:multiprocessing.resource_tracker"
    os.environ["LD_PRELOAD"] = str(compile_library(folder))


def main() -> None:
    args = parse_arguments()
    started = time.monotonic()
    folder = args.folder.resolve()
    if args.fresh:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    set_environment(folder)
    runner.start_fork_server(PRELOADED_MODULES)
    harness = Harness(folder)
    make_inputs(harness.inputs)
    progress = folder / "progress.jsonl"
    references = {name: harness.make_reference(SETTINGS[name]) for name in SETTINGS if name in args.settings}
    points = choose_points(references, read_progress(progress), args)
    print(f"{len(points)} points to try", flush=True)
    minutes_left = args.minutes - (time.monotonic() - started) / 60
    try_points(harness, points, references, progress, args.workers, minutes_left)

    rows = summarize(references, read_progress(progress))
    result = {
        "command": " ".join(["python", "-m", "experiments.crash_points.run", *sys.argv[1:]]),
        "seconds": round(time.monotonic() - started),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "trl", "peft")},
        "settings": rows,
    }
    results = args.results or (RESULTS if args.write else folder / "results.json")
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
