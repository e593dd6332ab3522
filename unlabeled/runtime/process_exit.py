"""The end of a process: its exit status survives, and it ends within a bounded time.

A process leaves by returning or raising, so that the interpreter prints a traceback and runs the exit functions. Two
things may go wrong afterwards. Python waits for threads and child processes, some of which may wait for something that
an error has prevented: `limit_exit_time`. And Python takes the interpreter down, during which threads of a process
group may crash and signals are no longer handled: `skip_finalization`.
"""

import atexit
import os
import sys
import threading
import time

EXIT_SECONDS = 20.0  # from an error to the end of the process

_exit_status: int | None = None  # set by `skip_finalization`


def limit_exit_time(status: int) -> None:
    """End the process with a status unless it ends by itself within 20 s. Returns at once."""

    def end_process() -> None:
        time.sleep(EXIT_SECONDS)
        os._exit(status)

    threading.Thread(target=end_process, name="exit", daemon=True).start()


def skip_finalization(status: int) -> None:
    """End the process with a status once all exit functions have run, instead of taking the interpreter down.

    Threads of a process group drop tensors after the collective that used them, for which they need the interpreter.
    While it is being taken down, Python before 3.14 ends such a thread in the middle of a destructor, and C++ then
    aborts the process: "terminate called without an active exception", status 134. A SIGTERM from the launcher that
    arrives during that time would replace the status as well.
    """
    global _exit_status
    _exit_status = status


@atexit.register  # exit functions run in reverse order: those that are registered later run before this one
def _exit_without_finalization() -> None:
    if _exit_status is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_exit_status)


def _reset_in_child() -> None:
    global _exit_status
    _exit_status = None


os.register_at_fork(after_in_child=_reset_in_child)
