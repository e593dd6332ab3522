"""Processes in PID namespaces of their own, as in containers that share a mount.

Each is a fork of a server that has imported torch and transformers already. It can be stopped at the call of a named
function, and killed there.
"""

import ctypes
import importlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from conftest import ROOT

PRELOADED_MODULES = [
    "unlabeled.data.collators",
    "unlabeled.reporting.run_plan",
    "unlabeled.hub.push",
    "unlabeled.data.preparing",
    "unlabeled.training",
]
# Constants of <sched.h>, <sys/mount.h> and <sys/prctl.h>.
CLONE_NEWNS = 0x00020000
CLONE_NEWPID = 0x20000000
MS_REC = 0x4000
MS_PRIVATE = 0x40000
PR_SET_PDEATHSIG = 1

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(PRELOADED_MODULES)


def skip_without_namespaces() -> None:
    """Skip the module if PID namespaces cannot be created."""
    try:
        probe = subprocess.run(["unshare", "--fork", "--pid", "--mount-proc", "true"], capture_output=True)
        is_possible = probe.returncode == 0
    except FileNotFoundError:
        is_possible = False
    if not is_possible:
        pytest.skip("needs root and PID namespaces", allow_module_level=True)


class Container:
    """A script that runs as process 1 of a PID namespace.

    Args:
        script: path in the repository.
        stop_at: "module:function"; at its first call the script waits for `go` or `kill`.
    """

    def __init__(self, script: str, arguments: list[str], log: Path, stop_at: str | None = None):
        self.log = log
        self._connection, child_connection = _context.Pipe()
        self._process = _context.Process(target=_start, args=(script, arguments, str(log), stop_at, child_connection))
        self._process.daemon = True  # a test that fails does not wait for it
        log.touch()
        self._process.start()
        child_connection.close()

    def wait_until_stopped(self) -> None:
        """Wait until the script calls `stop_at`."""
        try:
            assert self._connection.recv() == 1, "it is process 1"
        except EOFError:
            raise AssertionError(self.log.read_text()[-3000:]) from None

    def wait_for_output(self, text: str) -> None:
        """Wait until the script has printed a text."""
        deadline = time.monotonic() + 120
        while text not in self.log.read_text():
            assert self._process.is_alive() and time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.02)

    def go(self) -> None:
        """Let the script continue after `stop_at`."""
        self._connection.send("go")

    def kill(self) -> None:
        """Kill all processes of the container, and wait until they have ended."""
        self._process.kill()
        self._process.join()
        with pytest.raises((EOFError, ConnectionResetError)):  # process 1 has the other end
            self._connection.recv()

    def finish(self) -> str:
        """Wait for a successful end and return the output."""
        self._process.join()
        output = self.log.read_text()
        assert self._process.exitcode == 0, output[-3000:]
        return output


def _start(script: str, arguments: list[str], log: str, stop_at: str | None, connection: Connection) -> None:
    """The process of a container: forks a child, which is process 1 of new namespaces and runs the script."""
    libc = ctypes.CDLL(None, use_errno=True)
    _check(libc.unshare(CLONE_NEWPID | CLONE_NEWNS))
    child = os.fork()
    if child:
        connection.close()
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    _check(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL))
    _check(libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None))
    _check(libc.mount(b"proc", b"/proc", b"proc", 0, None))
    if stop_at is not None:
        _stop_at(stop_at, connection)
    status = 1
    try:
        os.chdir(ROOT)
        sys.argv = [script, *arguments]
        with open(log, "w", encoding="utf-8", buffering=1) as sys.stdout:
            sys.stderr = sys.stdout
            try:
                runpy.run_path(script, run_name="__main__")
                status = 0
            except SystemExit as error:
                status = error.code or 0
            except BaseException:
                sys.excepthook(*sys.exc_info())
    finally:
        os._exit(status)


def _check(result: int) -> None:
    """Raise the error of a failed call of the C library."""
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _stop_at(name: str, connection: Connection) -> None:
    """Make the first call of a function send the process id, and wait for an answer."""
    module_name, path = name.split(":")
    owner = importlib.import_module(module_name)
    *outer, attribute = path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    original = getattr(owner, attribute)

    def stop(*args, **kwargs):
        setattr(owner, attribute, original)
        connection.send(os.getpid())
        connection.recv()
        return original(*args, **kwargs)

    setattr(owner, attribute, stop)
