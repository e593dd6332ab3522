"""Signals that ask a process to end: those of schedulers, Ctrl-C, and one that stands for a launcher that is gone.

Where nothing is lost by it, before and after training, a signal ends a process within seconds, with one sentence and
with status 75. During training `training.guards.Preemption` has handlers of its own, which let the step finish.
"""

import atexit
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # `kill` and Slurm, Ctrl-C, `sbatch --signal`
STATUS = 75  # EX_TEMPFAIL of sysexits.h: the same command may be run again
REPEAT = 5.0  # seconds; launchers pass on signals that their processes had already: only a later one is a second one
REACTION = 2.0  # seconds within which Python runs a handler, unless it is inside a library
CLEANUP = 15.0  # seconds for removing what is half written
EXIT = 20.0  # seconds from an error to the end of the process
PARENT_CHECK = 1.0  # seconds between two looks at the parent process
LAUNCHER_GRACE = 20.0  # seconds for the step and its checkpoint when the launcher is gone
LAUNCHERS = ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION")  # set by torchrun, and by `accelerate launch`


class Interruption(KeyboardInterrupt):
    """A stop signal. It is a `KeyboardInterrupt` because libraries remove temporary files after one.

    The message is one sentence.
    """


class _State:
    """Of this process."""

    received = 0  # the first stop signal
    received_at = 0.0
    launcher_is_gone = False
    is_interruptible = False  # whether somebody catches an `Interruption`
    is_watching_launcher = False
    runs_recipe = False  # and nothing else
    exit_status: int | None = None  # see `skip_finalization`
    outcome = "the same command starts again"
    released = threading.Event()  # a new one each time that handlers are installed
    reader = -1
    writer = -1


def reason_of(number: int) -> str:
    """What ended the process, as the subject of a sentence."""
    return "the end of the launcher" if _State.launcher_is_gone else signal.Signals(number).name


def set_outcome(outcome: str) -> None:
    """Replace what the message of a stop signal says about the next run of the same command."""
    _State.outcome = outcome


def launcher_is_gone() -> bool:
    """Whether the launcher of this process has ended before it."""
    return _State.launcher_is_gone


def start() -> None:
    """Answer stop signals, and the end of the launcher, in a process that runs a recipe and nothing else."""
    _State.runs_recipe = True
    install()
    watch_launcher()


def install() -> bool:
    """Answer stop signals from now on. Returns False where they are answered already, or outside the main thread."""
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or any(signal.getsignal(number) is _handle for number in STOP_SIGNALS):
        return False
    for number in STOP_SIGNALS:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):  # the shell may ignore SIGINT
            signal.signal(number, _handle)
    if _State.reader < 0:
        # Python notices a signal only between two steps of its own. Its number is written here at once.
        _State.reader, _State.writer = os.pipe()
        os.set_blocking(_State.writer, False)
        os.register_at_fork(after_in_child=_release_child)
        threading.Thread(target=_enforce, name="signals", daemon=True).start()
    signal.set_wakeup_fd(_State.writer, warn_on_full_buffer=False)
    _State.received = 0
    _State.released = threading.Event()
    return True


def release() -> None:
    """Undo `install`."""
    _State.released.set()
    _restore()


def _restore() -> None:
    signal.set_wakeup_fd(-1)
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is _handle:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise `Interruption` at a stop signal instead of ending the process without cleaning up."""
    is_installed_here = install()
    before = _State.is_interruptible
    _State.is_interruptible = True
    try:
        yield
    finally:
        _State.is_interruptible = before
        if is_installed_here:
            release()


def watch_launcher() -> None:
    """End this process soon after the launcher that started it; without a launcher, do nothing."""
    if not _State.is_watching_launcher and any(name in os.environ for name in LAUNCHERS):
        _State.is_watching_launcher = True
        threading.Thread(target=_follow_launcher, args=(os.getppid(),), name="launcher", daemon=True).start()


def end_with_parent() -> None:
    """End this process when the process that has started it is gone, whatever else it does. Returns at once."""

    def follow(parent: int) -> None:
        _wait_for_end(parent)
        os._exit(1)

    threading.Thread(target=follow, args=(os.getppid(),), name="parent", daemon=True).start()


def _wait_for_end(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(PARENT_CHECK)


def limit_exit(status: int) -> None:
    """End a process that runs a recipe with that status if it has not ended by itself in 20 s. Returns at once.

    Python waits at exit for threads and processes, some of which may wait for something that an error has prevented.
    """

    def end() -> None:
        time.sleep(EXIT)
        os._exit(status)

    if _State.runs_recipe:
        threading.Thread(target=end, name="exit", daemon=True).start()


def skip_finalization(status: int) -> None:
    """End with that status once all exit functions have run, instead of taking the interpreter down.

    Threads of a process group drop tensors after the collective that used them, for which they need the interpreter.
    Where it is being taken down, Python before 3.14 ends such a thread in the middle of a destructor, and C++ then
    aborts the process: "terminate called without an active exception", status 134.
    """
    _State.exit_status = status


@atexit.register  # before all others, so that it is called after them
def _leave() -> None:
    if _State.exit_status is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_State.exit_status)


def end_now(number: int) -> None:
    """End this process because of a signal, without cleaning up."""
    # Neither print nor sys.stderr: the signal may have arrived while one of them was at work.
    with suppress(OSError):
        os.write(2, f"stopped: {_sentence(number)}\n".encode())
    os._exit(STATUS)


def _sentence(number: int) -> str:
    return f"{reason_of(number)} ended the process; {_State.outcome}"


def _handle(number: int, frame: FrameType | None) -> None:
    if _State.received:
        if time.monotonic() - _State.received_at > REPEAT:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        _State.received_at = time.monotonic()
        return
    _State.received, _State.received_at = number, time.monotonic()
    if not _State.is_interruptible:
        end_now(number)
    raise Interruption(_sentence(number))


def _enforce() -> None:
    """End the process where its main thread does not, be it inside a library or in cleaning up."""
    while data := os.read(_State.reader, 1):
        number = data[0]
        released = _State.released
        if signal.getsignal(number) is not _handle:  # somebody else's, or of a signal that is not about the end
            continue
        if released.wait(REACTION) or signal.getsignal(number) is not _handle:
            continue
        if _State.received and released.wait(CLEANUP):
            continue
        end_now(number)


def _release_child() -> None:
    """A fork shares the pipe: its signals are not those of this process."""
    _State.exit_status = None
    with suppress(ValueError):
        _restore()


def _follow_launcher(launcher: int) -> None:
    _wait_for_end(launcher)
    _State.launcher_is_gone = True
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(LAUNCHER_GRACE)
    end_now(signal.SIGTERM)
