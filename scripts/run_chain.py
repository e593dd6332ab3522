"""Run the stages of a chain in order, each reading the folder that the one before wrote, and make its report.

    python scripts/run_chain.py recipes/chains/tiny.yaml             # the same command again goes on where it stopped
    python scripts/run_chain.py recipes/chains/tiny.yaml --dry-run   # every command, and what is done already

A stage is a kind (a recipe, or tokenizer, prepare, merge, evaluate, push), its configuration and overrides. One that is
finished and whose inputs are the same is skipped; one that has changed runs again, its old folder put aside. Paths are
relative to the repository. OUTPUT_DIR/chain.json says what was done, OUTPUT_DIR/logs/ what was printed.
"""

import argparse
import io
import itertools
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from chain_plan import ON_A_FOLDER, ROOT, Chain, Stage, command_of, digest, follow, read_yaml, relative

from unlabeled import Stopped, UserError, exit_on_user_error
from unlabeled.planning import available_cores
from unlabeled.reporting.metrics import headline_metrics
from unlabeled.runtime import signals
from unlabeled.runtime.files import read_optional_json
from unlabeled.runtime.locks import FileLock

# Waits beside a stage for the end of its standard input: the chain closes it or is gone, be it by `kill -9`. What is
# left of the stage's process group is stopped then, so that nobody trains on in a folder that is read or resumed.
GUARD = """cat >/dev/null; kill -s TERM -- -$0; i=0
while kill -s 0 -- -$0 && [ $i -lt 320 ]; do [ $i -ne 300 ] || kill -s KILL -- -$0; i=$((i+1)); sleep 0.1; done"""
LAST_LINES = 15  # of a stage that failed, shown again
WAIT = 60  # seconds for what a killed chain has left to end


# --- Running a stage ------------------------------------------------------------------------------------------------


@contextmanager
def open_log(log: Path) -> Iterator[TextIO]:
    """A log to write to. A disk that is full costs lines of it, and nothing that is trained meanwhile."""
    copy = io.StringIO()
    try:
        copy = open(log, "a", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        print(f"cannot write {log} ({error.strerror}): what is printed is in no log", flush=True)
    try:
        yield copy
    finally:
        with suppress(OSError):  # what could not be written is tried once more
            copy.close()


def launch(chain: Chain, command: list[str], log: Path, lock: int) -> tuple[int, list[str]]:
    """Run a command in a process group of its own, printed here and in `log`.

    Returns:
        Its exit status, and the last lines that it printed.
    """
    last: deque[str] = deque(maxlen=LAST_LINES)
    with open_log(log) as copy:
        write(copy, f"$ {shlex.join(command)}\n")
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True, pass_fds=[lock], env=environment(chain),
        )  # fmt: skip
        guard = None
        try:
            guard = subprocess.Popen(
                ["sh", "-c", GUARD, str(process.pid)], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL,
                start_new_session=True, pass_fds=[lock],
            )  # fmt: skip
            reader = threading.Thread(target=tee, args=(process.stdout, copy, last), daemon=True)
            reader.start()
            status = process.wait()
        finally:
            guard.stdin.close() if guard else os.killpg(process.pid, signal.SIGTERM)
            process.wait()
            if guard:
                guard.wait()
                reader.join(timeout=5)
    return status, [line.rstrip() for line in last]


def environment(chain: Chain) -> dict[str, str]:
    """Ours, unbuffered. `accelerate launch` would set one thread a process, where torch by itself takes all cores."""
    file = read_yaml(chain.accelerate)
    counts = [file.get(key) or 1 for key in ("num_processes", "num_machines")]
    if not all(isinstance(count, int) and count > 0 for count in counts):
        raise UserError(f"{chain.accelerate}: num_processes and num_machines are numbers above 0; correct them")
    local = counts[0] // counts[1]
    threads = max(1, available_cores() // max(1, local))
    return {"OMP_NUM_THREADS": str(threads), **os.environ, "PYTHONUNBUFFERED": "1"}


def tee(stream, copy: TextIO, last: deque[str]) -> None:
    """Lines to the terminal and to the log; of a bar that is drawn over itself the log gets the last state only."""
    terminal = sys.stdout.isatty()
    for piece in io.TextIOWrapper(stream, encoding="utf-8", errors="replace", newline=""):
        whole = not piece.endswith("\r")
        if whole or terminal:
            write(sys.stdout, piece)
        if whole:
            write(copy, piece)
            last.append(piece)


def write(out: TextIO, text: str) -> None:
    with suppress(OSError, ValueError):  # a terminal that is gone, or a full disk, does not stop a training
        out.write(text)
        out.flush()


def execute(chain: Chain, stage: Stage, lock: int) -> None:
    """Run a stage to its end and record it, or leave with its exit status."""
    make_room(chain, stage)
    before, log = chain.begun.get(stage.name, {}), Path(chain.folder, "logs", f"{stage.label}.log")
    seconds = before.get("seconds", 0)
    if before and log.exists():  # a chain that was killed could not write how long its stage had run
        seconds += max(0, log.stat().st_mtime - before["at"])
    command = command_of(chain, stage)
    folder = stage.values["folder"] if stage.kind == "push" else stage.folder
    entry = {
        "name": stage.name, "kind": stage.kind, "folder": os.path.relpath(folder, chain.folder), "seconds": seconds,
        "fingerprint": digest(stage.parts), "command": shlex.join(command), "parts": stage.parts,
    }  # fmt: skip
    # Recorded before it runs: a folder is resumed only by the stage that began it.
    chain.begun[stage.name] = entry | {"at": time.time()}
    chain.done.pop(stage.name, None)
    chain.save()
    started = time.monotonic()
    status, lines = launch(chain, command, log, lock)
    if status or stage.lacks:
        failed(chain, stage.label, command, log, lines, status, stage.lacks)
    entry["seconds"] = round(seconds + time.monotonic() - started, 1)
    chain.done[stage.name] = entry
    del chain.begun[stage.name]
    chain.save()
    stage.state = "done"


def make_room(chain: Chain, stage: Stage) -> None:
    """Leave no folder where a stage starts anew; one in which something was trained is renamed, the rest deleted."""
    folder = Path(stage.folder)
    if stage.state == "interrupted" and stage.kind in ON_A_FOLDER:  # they write in one go and do not resume
        shutil.rmtree(folder, ignore_errors=True)
    if stage.state != "changed" or stage.kind == "prepare":  # whose folders are named by their content
        return
    if chain.begun.pop(stage.name, None) and not any(folder.rglob("*.safetensors")):
        shutil.rmtree(folder, ignore_errors=True)
    put_aside(stage.folder)
    stage.folder = os.path.join(chain.folder, stage.label)
    put_aside(stage.folder)  # another one, where the stage had another number


def put_aside(folder: str) -> None:
    if os.path.lexists(folder):
        aside = next(name for n in itertools.count(1) if not os.path.lexists(name := f"{folder}.old-{n}"))
        os.rename(folder, aside)
        print(f"{folder} is kept as {aside}", flush=True)


def failed(
    chain: Chain, label: str, command: list[str], log: Path, lines: list[str], status: int, lacks: str = ""
) -> None:
    """Say what a stage printed last and how to run it again; leave with 2 where it was bad input, 75 where it stopped.

    Any other failure ends with 1.
    """
    how = f"exit status {status}" if status > 0 else f"signal {-status}" if status else f"it has left no {lacks}"
    said = [f"\n{label} failed ({how}); the last lines of {log}:", *(f"    {line}" for line in lines)]
    said += ["run it alone with", f"    {shlex.join(command)}", "or go on with", f"    {again(chain)}"]
    print(*said, sep="\n", file=sys.stderr, flush=True)
    # `accelerate launch` leaves with 1 whatever the recipe's status was, whose sentence begins like these.
    if status == 2 or any(line.startswith("error: ") for line in lines):
        raise SystemExit(2)
    if status == Stopped.STATUS or any(line.startswith("stopped: ") for line in lines):
        raise SystemExit(Stopped.STATUS)
    raise SystemExit(1)


def again(chain: Chain) -> str:
    return f"{relative(sys.executable)} {shlex.join(['scripts/run_chain.py', *sys.argv[1:]])}"


def hold(chain: Chain) -> int:
    """Take the chain's folder: no other chain, and nothing that a killed one left, is at work in it.

    Returns the descriptor of the lock, which the stages inherit; each recipe locks its own output_dir as well.
    """
    lock = FileLock(os.path.join(chain.folder, "logs", "lock"))
    try:
        os.makedirs(os.path.dirname(lock.path), exist_ok=True)
        if lock.acquire(timeout=1):
            return lock.descriptor
        print(f"waiting for what still runs in {chain.folder}", flush=True)
        if lock.acquire(timeout=WAIT):
            return lock.descriptor
    except OSError as error:
        raise UserError(
            f"cannot write to output_dir {chain.folder} ({error.strerror}); set it to another folder"
        ) from error
    raise UserError(f"another run_chain.py is at work in {chain.folder}; wait for its end, or stop it")


# --- The chain ------------------------------------------------------------------------------------------------------


def show_plan(chain: Chain) -> None:
    count = len(chain.stages)
    print(f"{chain.name}: {count} stages into {chain.folder}, recipes launched with {chain.accelerate}")
    for stage in chain.stages:
        print(f"\n[{stage.number}/{count}] {stage.name}: {stage.state}{f' ({stage.why})' if stage.why else ''}")
        if stage.kind != "push":
            print(f"  folder   {stage.folder}")
        for key, value in stage.values.items():
            if key in stage.given or key.endswith("data") or key.endswith("name_or_path"):
                print(f"  reads    {key} {value}")
        print(f"  command  {shlex.join(command_of(chain, stage))}")


def run(chain: Chain, lock: int) -> None:
    newest: dict[str, Stage] = {}
    count, ran = len(chain.stages), 0
    for stage in chain.stages:
        chain.examine(stage, newest)
        head = f"[{stage.number}/{count}] {stage.name}"
        if stage.state == "done":
            print(f"{head}: done already", flush=True)
        else:
            ran += 1
            print(f"\n{head}: {stage.state}{f' ({stage.why})' if stage.why else ''}", flush=True)
            execute(chain, stage, lock)
            print(f"{head}: {chain.done[stage.name]['seconds']:,.0f} s", flush=True)
        follow(newest, stage)
    chain.save()
    report(chain, lock)
    show_results(chain, newest.get("model"))
    if not ran:
        print("nothing to do: every stage was done already")


def report(chain: Chain, lock: int) -> None:
    """Make the report, unless it is there and tells of the same stages and prompts."""
    told = digest([chain.prompts, [[entry["fingerprint"], entry["seconds"]] for entry in chain.state["stages"]]])
    if chain.state.get("reported") == told and os.path.exists(report_file(chain)):
        return
    print("\nreport", flush=True)
    log = Path(chain.folder, "logs", "report.log")
    command = [relative(sys.executable), "scripts/make_report.py", chain.folder]
    status, lines = launch(chain, command, log, lock)
    if status:
        failed(chain, "the report", command, log, lines, status)
    chain.save(reported=told)


def report_file(chain: Chain) -> str:
    """Where make_report.py puts it: beside the last stage that has a folder."""
    folders = [os.path.normpath(os.path.join(chain.folder, entry["folder"])) for entry in chain.state["stages"]]
    return os.path.join([folder for folder in folders if os.path.isdir(folder)][-1], "report.html")


def show_results(chain: Chain, model: Stage | None) -> None:
    print(f"\n  {'stage':<20}{'seconds':>10}{'tokens':>16}  result")
    for entry in chain.state["stages"]:
        folder = Path(chain.folder, entry["folder"])
        metrics = read_optional_json(folder / "metrics.json") if entry["kind"] != "push" else {}
        trained = metrics.get("train_tokens")
        tokens = f"{trained:,}" if trained and isinstance(trained, int | float) else "—"
        print(f"  {entry['name']:<20}{entry['seconds']:>10,.0f}{tokens:>16}  {result(entry['kind'], metrics)}")
    print(f"  {'together':<20}{sum(entry['seconds'] for entry in chain.state['stages']):>10,.0f}\n")
    if model:
        print(f"model:  {model.folder}")
    print(f"report: {report_file(chain)}", flush=True)


def result(kind: str, metrics: dict) -> str:
    """The most important metric of a stage."""
    texts = headline_metrics(kind, metrics)
    if not texts:
        return ""
    label = texts[0].label.split(" (")[0].removeprefix("held-out ")  # every result is
    before = f"{texts[0].before} -> " if texts[0].before else ""
    return f"{label} {before}{texts[0].value}"


def stopped(number: int, frame) -> None:
    # Not print: it may have been interrupted in a print. The guard passes the signal on.
    os.write(2, b"\nstopping; the same command goes on from here\n")
    raise SystemExit(Stopped.STATUS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chain", metavar="CHAIN.yaml", help="recipes/chains/ has some")
    parser.add_argument("--output_dir", help="where the stages write theirs, instead of the YAML's")
    parser.add_argument("--dry-run", action="store_true", help="show what would be run, and run nothing")
    arguments = parser.parse_args()
    path, output_dir = (relative(name) if name else None for name in (arguments.chain, arguments.output_dir))
    os.chdir(ROOT)  # which the paths in the YAML are relative to; that of the YAML itself may be, too
    path = path if os.path.exists(path) else arguments.chain
    chain, newest = Chain(path, output_dir), {}
    for stage in chain.stages:
        chain.connect(stage, newest)
        follow(newest, stage)
    chain.check_sources()
    newest.clear()
    for stage in chain.stages if arguments.dry_run else ():
        chain.examine(stage, newest)
        follow(newest, stage)
    if arguments.dry_run:
        return show_plan(chain)
    for number in signals.STOP_SIGNALS:
        signal.signal(number, stopped)
    lock = hold(chain)
    chain.read_state()  # another chain may have ended while we waited
    run(chain, lock)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
