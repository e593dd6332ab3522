"""Run the stages of a chain: skip those that are finished, resume or repeat the others, and write the report."""

import itertools
import os
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path

from unlabeled.chain.commands import TAKES_FOLDER, relative_path
from unlabeled.chain.contents import digest
from unlabeled.chain.plan import Chain, provide
from unlabeled.chain.processes import run_command
from unlabeled.chain.stages import ChainStage
from unlabeled.errors import Stopped, UserError
from unlabeled.reporting.metrics import headline_metrics
from unlabeled.runtime import signals
from unlabeled.runtime.files import read_optional_json
from unlabeled.runtime.locks import FileLock

LOCK_TIMEOUT = 60  # seconds to wait for processes of a killed chain


def run_chain(path: str, output_dir: str | None = None, dry_run: bool = False) -> None:
    """Run a chain from its YAML. The working directory has to be the root of the repository.

    Args:
        path: the YAML of the chain.
        output_dir: the folder of the chain; default: that of the YAML.
        dry_run: print what would be run, and run nothing.

    Raises:
        UserError: the chain cannot be run as it is.
        SystemExit: a stage failed, or a signal stopped the chain.
    """
    chain = Chain(path, output_dir)
    chain.connect_all()
    chain.check_sources()
    if dry_run:
        chain.examine_all()
        print_chain(chain)
        return
    for number in signals.STOP_SIGNALS:
        signal.signal(number, stop)
    lock = acquire_chain_folder(chain)
    chain.read_state()  # another chain may have ended meanwhile
    model = run_stages(chain, lock)
    write_report(chain, lock)
    print_results(chain, model)


def print_chain(chain: Chain) -> None:
    """Print the state, inputs and command of each stage."""
    count = len(chain.stages)
    print(f"{chain.name}: {count} stages into {chain.folder}, recipes launched with {chain.accelerate}")
    for stage in chain.stages:
        print(f"\n[{stage.number}/{count}] {stage.name}: {describe_state(stage)}")
        if stage.kind != "push":
            print(f"  folder   {stage.folder}")
        for key, value in stage.values.items():
            if key in stage.inputs or key.endswith("data") or key.endswith("name_or_path"):
                print(f"  reads    {key} {value}")
        print(f"  command  {shlex.join(chain.command(stage))}")


def describe_state(stage: ChainStage) -> str:
    return f"{stage.state} ({stage.reason})" if stage.reason else stage.state


def acquire_chain_folder(chain: Chain) -> int:
    """Lock the folder of a chain, so that no other chain, and no process that a killed one left, works in it.

    Returns:
        The descriptor of the lock, which the stages inherit. Each recipe locks its own output_dir as well.

    Raises:
        UserError: the folder cannot be written to, or another chain does not end within `LOCK_TIMEOUT` seconds.
    """
    lock = FileLock(os.path.join(chain.folder, "logs", "lock"))
    try:
        os.makedirs(os.path.dirname(lock.path), exist_ok=True)
        if lock.acquire(timeout=1):
            return lock.descriptor
        print(f"waiting for what still runs in {chain.folder}", flush=True)
        if lock.acquire(timeout=LOCK_TIMEOUT):
            return lock.descriptor
    except OSError as error:
        raise UserError(
            f"cannot write to output_dir {chain.folder} ({error.strerror}); set it to another folder"
        ) from error
    raise UserError(f"another run_chain.py is at work in {chain.folder}; wait for its end, or stop it")


def stop(number: int, frame: object) -> None:
    """Handle a stop signal. The guard of the running stage passes it on."""
    # Not print: the signal may have arrived in the middle of one.
    os.write(2, b"\nstopping; the same command goes on from here\n")
    raise SystemExit(Stopped.STATUS)


# --- Stages -----------------------------------------------------------------------------------------------------------


def run_stages(chain: Chain, lock: int) -> ChainStage | None:
    """Run all stages that are not finished. Returns the last stage that provides a model."""
    latest: dict[str, ChainStage] = {}
    is_anything_run = False
    for stage in chain.stages:
        chain.examine(stage, latest)
        position = f"[{stage.number}/{len(chain.stages)}] {stage.name}"
        if stage.state == "done":
            print(f"{position}: done already", flush=True)
        else:
            is_anything_run = True
            print(f"\n{position}: {describe_state(stage)}", flush=True)
            run_stage(chain, stage, lock)
            print(f"{position}: {chain.finished[stage.name]['seconds']:,.0f} s", flush=True)
        provide(latest, stage)
    chain.save()
    if not is_anything_run:
        print("nothing to do: every stage was done already")
    return latest.get("model")


def run_stage(chain: Chain, stage: ChainStage, lock: int) -> None:
    """Run a stage to its end and record it in chain.json.

    Raises:
        SystemExit: it failed.
    """
    clear_folder(chain, stage)
    log = Path(chain.folder, "logs", f"{stage.label}.log")
    seconds_before = seconds_of_earlier_attempts(chain, stage, log)
    command = chain.command(stage)
    folder = stage.values["folder"] if stage.kind == "push" else stage.folder
    entry = {
        "name": stage.name,
        "kind": stage.kind,
        "folder": os.path.relpath(folder, chain.folder),
        "seconds": seconds_before,
        "fingerprint": digest(stage.parts),
        "command": shlex.join(command),
        "parts": stage.parts,
    }
    # Recorded before it runs: only the stage that has started a folder may resume in it.
    chain.started[stage.name] = entry | {"at": time.time()}
    chain.finished.pop(stage.name, None)
    chain.save()
    started_at = time.monotonic()
    status, lines = run_command(chain.accelerate, command, log, lock)
    if status or stage.missing_files:
        exit_after_failure(stage.label, command, log, lines, status, stage.missing_files)
    entry["seconds"] = round(seconds_before + time.monotonic() - started_at, 1)
    chain.finished[stage.name] = entry
    del chain.started[stage.name]
    chain.save()
    stage.state = "done"


def seconds_of_earlier_attempts(chain: Chain, stage: ChainStage, log: Path) -> float:
    """The seconds that a stage has run already. A chain that was killed could not record them; its log shows them."""
    record = chain.started.get(stage.name)
    if not record:
        return 0
    seconds = record["seconds"]
    if log.exists():
        seconds += max(0, log.stat().st_mtime - record["at"])
    return seconds


def clear_folder(chain: Chain, stage: ChainStage) -> None:
    """Leave no folder where a stage starts anew. A folder with trained weights is renamed, any other is deleted."""
    folder = Path(stage.folder)
    if stage.state == "interrupted" and stage.kind in TAKES_FOLDER:  # these scripts do not resume
        shutil.rmtree(folder, ignore_errors=True)
    if stage.state != "changed" or stage.kind == "prepare":  # its folders are named by their content
        return
    was_started = chain.started.pop(stage.name, None)
    if was_started and not any(folder.rglob("*.safetensors")):
        shutil.rmtree(folder, ignore_errors=True)
    keep_old_folder(stage.folder)
    stage.folder = os.path.join(chain.folder, stage.label)
    keep_old_folder(stage.folder)  # a different one if the stage had another number


def keep_old_folder(folder: str) -> None:
    """Rename a folder, if there is one, to FOLDER.old-1, FOLDER.old-2, ..."""
    if not os.path.lexists(folder):
        return
    for number in itertools.count(1):
        new_name = f"{folder}.old-{number}"
        if not os.path.lexists(new_name):
            break
    os.rename(folder, new_name)
    print(f"{folder} is kept as {new_name}", flush=True)


def exit_after_failure(
    label: str, command: list[str], log: Path, lines: list[str], status: int, missing_files: str = ""
) -> None:
    """Print the last lines of a failed command and how to continue.

    Raises:
        SystemExit: always; with status 2 after bad input, with 75 if the stage was stopped, otherwise with 1.
    """
    if status > 0:
        reason = f"exit status {status}"
    elif status < 0:
        reason = f"signal {-status}"
    else:
        reason = f"it has left no {missing_files}"
    chain_command = f"{relative_path(sys.executable)} {shlex.join(['scripts/run_chain.py', *sys.argv[1:]])}"
    message = [f"\n{label} failed ({reason}); the last lines of {log}:"]
    message += [f"    {line}" for line in lines]
    message += ["run it alone with", f"    {shlex.join(command)}", "or go on with", f"    {chain_command}"]
    print(*message, sep="\n", file=sys.stderr, flush=True)
    # `accelerate launch` ends with 1 whatever the status of the recipe was; the recipe's message begins like these.
    if status == 2 or any(line.startswith("error: ") for line in lines):
        raise SystemExit(2)
    if status == Stopped.STATUS or any(line.startswith("stopped: ") for line in lines):
        raise SystemExit(Stopped.STATUS)
    raise SystemExit(1)


# --- Report -----------------------------------------------------------------------------------------------------------


def write_report(chain: Chain, lock: int) -> None:
    """Run make_report.py, unless there is a report of the same stages and prompts."""
    runs = [[entry["fingerprint"], entry["seconds"]] for entry in chain.state["stages"]]
    reported = digest([chain.prompts, runs])
    if chain.state.get("reported") == reported and os.path.exists(report_path(chain)):
        return
    print("\nreport", flush=True)
    log = Path(chain.folder, "logs", "report.log")
    command = [relative_path(sys.executable), "scripts/make_report.py", chain.folder]
    status, lines = run_command(chain.accelerate, command, log, lock)
    if status:
        exit_after_failure("the report", command, log, lines, status)
    chain.save(reported=reported)


def report_path(chain: Chain) -> str:
    """Where make_report.py writes the report: beside the last stage that has a folder."""
    folders = [os.path.normpath(os.path.join(chain.folder, entry["folder"])) for entry in chain.state["stages"]]
    return os.path.join([folder for folder in folders if os.path.isdir(folder)][-1], "report.html")


def print_results(chain: Chain, model: ChainStage | None) -> None:
    """Print the table of stages, the folder of the model and the path of the report."""
    entries = chain.state["stages"]
    print(f"\n  {'stage':<20}{'seconds':>10}{'tokens':>16}  result")
    for entry in entries:
        metrics = {}
        if entry["kind"] != "push":
            metrics = read_optional_json(Path(chain.folder, entry["folder"], "metrics.json"))
        tokens = metrics.get("train_tokens")
        tokens = f"{tokens:,}" if tokens and isinstance(tokens, int | float) else "—"
        result = describe_result(entry["kind"], metrics)
        print(f"  {entry['name']:<20}{entry['seconds']:>10,.0f}{tokens:>16}  {result}")
    print(f"  {'together':<20}{sum(entry['seconds'] for entry in entries):>10,.0f}\n")
    if model:
        print(f"model:  {model.folder}")
    print(f"report: {report_path(chain)}", flush=True)


def describe_result(kind: str, metrics: dict) -> str:
    """The most important metric of a stage, after its value before the stage if there is one."""
    headlines = headline_metrics(kind, metrics)
    if not headlines:
        return ""
    headline = headlines[0]
    label = headline.label.split(" (")[0].removeprefix("held-out ")  # without the unit; all results are held-out
    value = f"{headline.before} -> {headline.value}" if headline.before else headline.value
    return f"{label} {value}"
