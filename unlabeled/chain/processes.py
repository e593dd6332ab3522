"""Running a command of a chain: printed and logged, and stopped with the chain, however the chain ends."""

import io
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TextIO

from unlabeled.chain.stages import read_yaml
from unlabeled.errors import UserError
from unlabeled.planning import available_cores

# Runs beside a stage until its standard input ends: the chain closes it or is gone, for example after `kill -9`. Then
# what is left of the stage's process group is stopped, so that no process trains in a folder that is read or resumed.
GUARD = """cat >/dev/null; kill -s TERM -- -$0; i=0
while kill -s 0 -- -$0 && [ $i -lt 320 ]; do [ $i -ne 300 ] || kill -s KILL -- -$0; i=$((i+1)); sleep 0.1; done"""
LAST_LINES = 15  # lines of a failed command that are shown again


def run_command(accelerate: str, command: list[str], log: Path, lock: int) -> tuple[int, list[str]]:
    """Run a command in a process group of its own; its output is printed and appended to a log.

    Args:
        accelerate: the configuration file of `accelerate launch`, for the number of threads.
        log: the file of the log.
        lock: the descriptor of the chain's lock, which the command inherits.

    Returns:
        The exit status and the last lines of the output.
    """
    last_lines: deque[str] = deque(maxlen=LAST_LINES)
    with open_log(log) as log_file:
        write(log_file, f"$ {shlex.join(command)}\n")
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=[lock],
            env=stage_environment(accelerate),
        )
        guard = None
        try:
            guard = subprocess.Popen(
                ["sh", "-c", GUARD, str(process.pid)],
                stdin=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                pass_fds=[lock],
            )
            reader = threading.Thread(target=copy_output, args=(process.stdout, log_file, last_lines), daemon=True)
            reader.start()
            status = process.wait()
        finally:
            if guard is None:
                os.killpg(process.pid, signal.SIGTERM)
                process.wait()
            else:
                guard.stdin.close()
                process.wait()
                guard.wait()
                reader.join(timeout=5)
    return status, [line.rstrip() for line in last_lines]


@contextmanager
def open_log(log: Path) -> Iterator[TextIO]:
    """Open a log to append to. If that fails, as on a full disk, the stage runs without one."""
    log_file: TextIO = io.StringIO()
    try:
        log_file = open(log, "a", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        print(f"cannot write {log} ({error.strerror}): what is printed is in no log", flush=True)
    try:
        yield log_file
    finally:
        with suppress(OSError):  # closing tries once more to write what could not be written
            log_file.close()


def stage_environment(accelerate: str) -> dict[str, str]:
    """The environment of a stage. `accelerate launch` by itself would set one thread for each process."""
    launch_keys = read_yaml(accelerate)
    processes = launch_keys.get("num_processes") or 1
    machines = launch_keys.get("num_machines") or 1
    if not all(isinstance(count, int) and count > 0 for count in (processes, machines)):
        raise UserError(f"{accelerate}: num_processes and num_machines are numbers above 0; correct them")
    processes_here = max(1, processes // machines)
    threads = max(1, available_cores() // processes_here)
    return {"OMP_NUM_THREADS": str(threads), **os.environ, "PYTHONUNBUFFERED": "1"}


def copy_output(stream: IO[bytes], log_file: TextIO, last_lines: deque[str]) -> None:
    """Copy lines to the terminal and the log. Of a progress bar, which redraws itself, the log gets the last state."""
    is_terminal = sys.stdout.isatty()
    for line in io.TextIOWrapper(stream, encoding="utf-8", errors="replace", newline=""):
        is_redrawn = line.endswith("\r")
        if is_terminal or not is_redrawn:
            write(sys.stdout, line)
        if not is_redrawn:
            write(log_file, line)
            last_lines.append(line)


def write(file: TextIO, text: str) -> None:
    with suppress(OSError, ValueError):  # neither a closed terminal nor a full disk stops the training
        file.write(text)
        file.flush()
