"""The process that holds a lock, and the launcher that started it, as recorded in the lock file."""

import json
import os
import socket
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

# The clock of the machine may be corrected between two readings of the start of one process.
START_TOLERANCE_SECONDS = 2.0
# Names of launchers, as a command or with `python -m`.
LAUNCHERS = {
    "accelerate", "accelerate.commands.launch", "torchrun", "torch.distributed.run", "torch.distributed.launch",
    "deepspeed", "deepspeed.launcher.launch",
}  # fmt: skip
COMMAND_WORDS = 5  # words of a command among which the name of a launcher is searched


@dataclass(frozen=True)
class Process:
    """A process, distinguished from a later one with the same process id.

    Attributes:
        pid: The process id in its namespace.
        started: The time of its start, in seconds since the epoch.
        host: The name of its machine or container.
        namespace: Identifies machine, boot and container, in which `pid` is unique; the host on systems without /proc.
        command: The script and its configuration; no other option, as one may hold a secret.
    """

    pid: int
    started: float
    host: str
    namespace: str
    command: str = ""

    @classmethod
    def from_pid(cls, pid: int, command: str = "") -> "Process":
        """A running process of this machine."""
        return cls(pid, psutil.Process(pid).create_time(), socket.gethostname(), _namespace(), command)

    @property
    def is_local(self) -> bool:
        """Whether this process can see and signal it."""
        return self.namespace == _namespace()

    @property
    def is_running(self) -> bool:
        """Whether it still runs on this machine; False for a process of another machine."""
        if not self.is_local:
            return False
        try:
            process = psutil.Process(self.pid)
            is_same = abs(process.create_time() - self.started) < START_TOLERANCE_SECONDS
            return is_same and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


def _namespace() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return socket.gethostname()


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock, and its launcher if one started it."""

    process: Process
    launcher: Process | None = None

    @classmethod
    def current(cls) -> "Holder":
        """This process."""
        return cls(Process.from_pid(os.getpid(), _command()), _launcher())

    @property
    def is_orphan(self) -> bool:
        """Whether it runs on this machine although the launcher that would end it is gone."""
        return self.process.is_running and self.launcher is not None and not self.launcher.is_running

    def write(self, path: str | Path) -> None:
        """Write the record to the lock file."""
        Path(path).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: str | Path) -> "Holder | None":
        """Read the record of a lock file; None if it is missing, incomplete or damaged."""
        try:
            record = json.loads(Path(path).read_text(encoding="utf-8"))
            launcher = record["launcher"]
            return cls(Process(**record["process"]), Process(**launcher) if launcher else None)
        except (OSError, ValueError, TypeError, KeyError):
            return None


def _launcher() -> Process | None:
    """The parent process if it is a launcher, which ends when its children do.

    A shell does not count: a run that was started with `nohup` outlives it on purpose.
    """
    parent = os.getppid()
    try:
        words = psutil.Process(parent).cmdline()
        if LAUNCHERS.isdisjoint(os.path.basename(word) for word in words[:COMMAND_WORDS]):
            return None
        return Process.from_pid(parent)
    except psutil.Error:  # it has ended, or belongs to another user
        return None


def _command() -> str:
    words = sys.argv[:1]
    if "--config" in sys.argv[:-1]:
        words += ["--config", sys.argv[sys.argv.index("--config") + 1]]
    return " ".join(words)
