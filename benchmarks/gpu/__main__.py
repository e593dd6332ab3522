"""The speed of the recipes on a GPU, and the cost of each part of a step: parts, whole steps in a loop, whole recipes.

    python -m benchmarks.gpu --output results                    # at most nine minutes on an H100
    python -m benchmarks.gpu --output results --only head loop   # the sections of these names
    python -m benchmarks.gpu --output results --device cpu --small --minutes 2   # only to see whether it runs

Nothing is downloaded. Each piece runs in a process of its own with a time limit, the most important ones first, and its
values are written at once: `results.md` (tables), `results.json` (everything) and `logs/` in the output folder. If a
piece fails, its error is recorded and the next one starts. Needs torch 2.11 or newer; fine-tuning needs TRL.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import time
import traceback
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.gpu.results import SECTIONS, Results, format_value

if TYPE_CHECKING:
    from benchmarks.gpu.pieces import Piece

ROOT = Path(__file__).resolve().parents[2]
MIN_SECONDS = 8  # no piece starts with less time left


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    parser.add_argument("--minutes", type=float, default=9.0, help="time limit of the benchmark (default: 9)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: cuda")
    parser.add_argument("--small", action="store_true", help="sizes for a test")
    parser.add_argument("--compile", action="store_true", help="compile on a CPU, too")
    sections = f"sections ({', '.join(SECTIONS)}) or names of pieces"
    parser.add_argument("--only", nargs="+", metavar="section", help=f"run these {sections}")
    parser.add_argument("--skip", nargs="+", default=[], metavar="section", help="leave these out")
    parser.add_argument("--work", type=Path, help="folder for text and runs (default: work in the output folder)")
    parser.add_argument("--commit", help="the commit of the project, where there is no git")
    return parser.parse_args()


def set_environment(device: str) -> None:
    """Set the variables that have to be set before torch and transformers are imported."""
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asking for a GPU must not start CUDA before the fork
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ["ACCELERATE_USE_CPU"] = "true"


def describe_machine(args: argparse.Namespace) -> dict:
    """The date, the command, versions and the GPU, without starting CUDA in this process."""
    from unlabeled.planning import available_cores

    about = {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "commit": args.commit or read_commit(),
        "command": " ".join(["python -m benchmarks.gpu", *sys.argv[1:]]),
        "python": platform.python_version(),
    }
    for package in ("torch", "transformers", "accelerate"):
        about[package] = importlib.metadata.version(package)
    about["cores"] = available_cores()
    if args.device == "cuda":
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        with contextlib.suppress(OSError):
            about["card, driver, memory"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return about


def read_commit() -> str:
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    with contextlib.suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"
    return "unknown"


def run_piece(piece: "Piece", results: Results, args: argparse.Namespace, log: Path, seconds: float) -> None:
    """Run a piece in a process of its own.

    The process is forked from this one, which has imported everything and has not started CUDA.
    """
    child = multiprocessing.get_context("fork").Process(target=measure_piece, args=(piece, results, args, log, seconds))
    child.start()
    child.join(seconds)
    if child.is_alive():
        results.record(piece.section, piece.name, error=f"not finished within {seconds:.0f} s")
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)  # the piece and the processes that it has started
    child.join()


def measure_piece(piece: "Piece", results: Results, args: argparse.Namespace, log: Path, seconds: float) -> None:
    """The process of a piece. It leads a process group of its own."""
    os.setsid()
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    status = 0
    try:
        import torch

        from benchmarks.gpu.bench import SMALL, Bench, Shape
        from unlabeled.planning import available_cores

        torch.set_num_threads(max(1, min(8, available_cores())))
        torch.set_float32_matmul_precision("high")
        bench = Bench(
            device=torch.device(args.device),
            shape=SMALL if args.small else Shape(),
            record=partial(results.record, piece.section),
            compile=args.compile or args.device == "cuda",
            seconds=seconds,
        )
        piece.measure(bench)
    except BaseException as error:
        traceback.print_exc()
        reason = f"{type(error).__name__}: {str(error).strip()}"[:400]
        results.record(piece.section, piece.name, error=reason)
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def print_entries(entries: list[dict]) -> None:
    """Print the single values of entries, a line each."""
    for entry in entries:
        values = {key: value for key, value in entry.items() if not isinstance(value, dict | list)}
        print(", ".join(f"{key} {format_value(value)[:200]}" for key, value in values.items()), flush=True)


def main() -> None:
    args = parse_arguments()
    started = time.monotonic()
    set_environment(args.device)

    import torch

    torch.set_num_threads(1)  # threads of this process would not survive the fork
    from benchmarks.gpu.pieces import make_pieces  # imports everything, once for all pieces

    output = args.output.resolve()
    (output / "logs").mkdir(parents=True, exist_ok=True)
    (output / "results.jsonl").unlink(missing_ok=True)
    results = Results(output, describe_machine(args))
    pieces = []
    for piece in make_pieces((args.work or output / "work").resolve(), args.small):
        names = {piece.section, piece.name}
        if (not args.only or names & set(args.only)) and not names & set(args.skip):
            pieces.append(piece)
    for index, piece in enumerate(pieces):
        missing = [module for module in piece.needs if not importlib.util.find_spec(module)]
        seconds_left = 60 * args.minutes - (time.monotonic() - started)
        if missing:
            results.record(piece.section, piece.name, error=f"{missing[0]} is not installed")
            continue
        if seconds_left < MIN_SECONDS:
            results.record(piece.section, piece.name, error="no time was left")
            continue
        piece_started = time.monotonic()
        entries_before = len(results.entries())
        log = output / "logs" / f"{index:02d}-{piece.name.replace(' ', '_').replace(',', '')}.log"
        run_piece(piece, results, args, log, min(piece.seconds, seconds_left))
        print_entries(results.entries()[entries_before:])
        print(f"--- {piece.section}: {piece.name}: {time.monotonic() - piece_started:.1f} s", flush=True)
        results.about["seconds"] = round(time.monotonic() - started, 1)
        results.write()
    results.write()


if __name__ == "__main__":
    main()
