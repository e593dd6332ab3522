"""Signals that ask a process to end: those of schedulers, Ctrl-C, and the end of its launcher.

Before and after training, where nothing is lost, a signal ends a process within seconds, with one sentence and exit
status 75. During training, `training.preemption.Preemption` installs handlers of its own, which let the step finish.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from unlabeled.runtime import process_exit
from unlabeled.runtime.exit_status import FAILED, STOPPED

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # `kill` and Slurm, Ctrl-C, `sbatch --signal`
REPEAT_SECONDS = 5.0  # a repeat within this time is the launcher's echo of the same signal
REACTION_SECONDS = 2.0  # within which Python runs a handler, unless it is inside a library
CLEANUP_SECONDS = 15.0  # for removing unfinished files
PARENT_CHECK_SECONDS = 1.0  # between two checks of the parent process
LAUNCHER_GRACE_SECONDS = 20.0  # for the step and its checkpoint once the launcher has ended
LAUNCHER_VARIABLES = ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION")  # set by torchrun, and by accelerate


class Interruption(KeyboardInterrupt):
    """A stop signal; the message is one sentence.

    It is a `KeyboardInterrupt` because libraries remove temporary files after one.
    """


class _State:
    """The state of the handlers in this process."""

    received = 0  # the number of the first stop signal
    received_at = 0.0
    launcher_is_gone = False
    is_interruptible = False  # whether a caller catches `Interruption`
    is_watching_launcher = False
    runs_recipe = False  # or a script
    outcome = "the same command starts again"
    released = threading.Event()  # a new one each time that handlers are installed
    reader = -1  # the pipe to which Python writes the numbers of signals
    writer = -1


def describe_signal(number: int) -> str:
    """The cause of the end of a process, as the subject of a sentence."""
    return "the end of the launcher" if _State.launcher_is_gone else signal.Signals(number).name


def set_outcome(outcome: str) -> None:
    """Set the part of the message of a stop signal that describes the next run of the same command."""
    _State.outcome = outcome


def launcher_is_gone() -> bool:
    """Whether the launcher of this process has ended before it."""
    return _State.launcher_is_gone


def start() -> None:
    """Handle stop signals, and the end of the launcher, in a process of a recipe or script."""
    _State.runs_recipe = True
    install()
    watch_launcher()


def install() -> bool:
    """Install the handlers of stop signals.

    Signals that the parent process ignores, as a shell does for background jobs, stay ignored.

    Returns:
        False if they are installed already, or outside the main thread.
    """
    is_main_thread = threading.current_thread() is threading.main_thread()
    if not is_main_thread or any(signal.getsignal(number) is _handle for number in STOP_SIGNALS):
        return False
    for number in STOP_SIGNALS:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, _handle)
    if _State.reader < 0:
        # Python runs handlers only between two of its own instructions, but writes the number to this pipe at once.
        _State.reader, _State.writer = os.pipe()
        os.set_blocking(_State.writer, False)
        os.register_at_fork(after_in_child=_restore_in_child)
        threading.Thread(target=_enforce, name="signals", daemon=True).start()
    signal.set_wakeup_fd(_State.writer, warn_on_full_buffer=False)
    _State.received = 0
    _State.released = threading.Event()
    return True


def release() -> None:
    """Undo `install`."""
    _State.released.set()
    _restore_handlers()


def _restore_handlers() -> None:
    signal.set_wakeup_fd(-1)
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is _handle:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise `Interruption` at a stop signal instead of ending the process without cleaning up."""
    is_installed_here = install()
    was_interruptible = _State.is_interruptible
    _State.is_interruptible = True
    try:
        yield
    finally:
        _State.is_interruptible = was_interruptible
        if is_installed_here:
            release()


def watch_launcher() -> None:
    """End this process soon after the launcher that started it; does nothing without a launcher."""
    if not _State.is_watching_launcher and any(name in os.environ for name in LAUNCHER_VARIABLES):
        _State.is_watching_launcher = True
        threading.Thread(target=_follow_launcher, args=(os.getppid(),), name="launcher", daemon=True).start()


def end_with_parent() -> None:
    """End this process when its parent process ends, whatever it does at that time. Returns at once."""

    def follow(parent: int) -> None:
        _wait_for_end(parent)
        os._exit(FAILED)

    threading.Thread(target=follow, args=(os.getppid(),), name="parent", daemon=True).start()


def _wait_for_end(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(PARENT_CHECK_SECONDS)


def limit_exit(status: int) -> None:
    """Bound the time until a process of a recipe or script ends with a status; see `process_exit`."""
    if _State.runs_recipe:
        process_exit.limit_exit_time(status)


def end_now(number: int) -> None:
    """End this process because of a signal, without cleaning up."""
    # Neither print nor sys.stderr: the signal may have arrived while one of them was at work.
    with suppress(OSError):
        os.write(2, f"stopped: {_sentence(number)}\n".encode())
    os._exit(STOPPED)


def _sentence(number: int) -> str:
    return f"{describe_signal(number)} ended the process; {_State.outcome}"


def _handle(number: int, frame: FrameType | None) -> None:
    now = time.monotonic()
    if _State.received:
        if now - _State.received_at > REPEAT_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        _State.received_at = time.monotonic()
        return
    _State.received = number
    _State.received_at = now
    if not _State.is_interruptible:
        end_now(number)
    raise Interruption(_sentence(number))


def _enforce() -> None:
    """End the process if its main thread does not, because it is inside a library or still cleaning up."""
    while data := os.read(_State.reader, 1):
        number = data[0]
        released = _State.released
        if signal.getsignal(number) is not _handle:  # another handler, or a signal that does not ask for the end
            continue
        if released.wait(REACTION_SECONDS) or signal.getsignal(number) is not _handle:
            continue
        if _State.received and released.wait(CLEANUP_SECONDS):
            continue
        end_now(number)


def _restore_in_child() -> None:
    """A forked process shares the pipe, but its signals are not those of this process."""
    with suppress(ValueError):
        _restore_handlers()


def _follow_launcher(launcher: int) -> None:
    _wait_for_end(launcher)
    _State.launcher_is_gone = True
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(LAUNCHER_GRACE_SECONDS)
    end_now(signal.SIGTERM)
