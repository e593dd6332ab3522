"""Prepares the process of a run: its file-system changes are counted and its batches are recorded."""

import atexit
import hashlib
import os
import runpy
import signal
import subprocess
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from experiments.crash_points.changes import Mode, add_group, remove_group, watch


@dataclass(frozen=True)
class Setup:
    """Called in the new process, before its script. Makes the process the leader of a process group."""

    folder: Path  # whose changes are counted
    records: Path  # outside of it: for the files `changes` and `batches`
    mode: Mode
    number: int

    def __call__(self) -> None:
        os.setsid()
        self.records.mkdir(parents=True, exist_ok=True)
        skip_sampling()
        record_batches(self.records / "batches", self.folder)
        fork_python_scripts()
        watch(self.folder, self.records / "changes", self.mode, self.number)


def skip_sampling() -> None:
    """Skip the samples at the end of a run, which take longer than the rest of it and write nothing."""
    transformers.GenerationMixin.generate = lambda self, ids=None, input_ids=None, **options: (
        input_ids if ids is None else ids
    )


def record_batches(log: Path, folder: Path) -> None:
    """Append a line to `log` for each micro-batch: output folder within `folder`, step, hash of the tensors."""
    original = transformers.Trainer.training_step

    def training_step(self, model, inputs, *args, **kwargs):
        digest = hashlib.sha256()
        for name, value in sorted(inputs.items()):
            digest.update(name.encode())
            if isinstance(value, torch.Tensor):
                digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
                digest.update(value.detach().cpu().contiguous().numpy().tobytes())
            else:
                digest.update(repr(value).encode())
        run = os.path.relpath(self.args.output_dir, folder)
        with open(log, "a", encoding="utf-8") as handle:
            handle.write(f"{run} {self.state.global_step + 1} {digest.hexdigest()[:16]}\n")
        return original(self, model, inputs, *args, **kwargs)

    transformers.Trainer.training_step = training_step


def fork_python_scripts() -> None:
    """Let `subprocess.Popen` fork this process instead of starting Python with a script, to save seconds of imports."""
    original = subprocess.Popen

    def start(command, *args, **kwargs):
        is_python = isinstance(command, list) and Path(command[0]).name.startswith("python") and kwargs.get("env")
        if not is_python:
            return original(command, *args, **kwargs)
        words = command[1:]
        if words[:2] == ["-m", "accelerate.commands.launch"]:  # it would start one process
            words = words[words.index("--config_file") + 2 :]
        return ForkedScript(words, kwargs["env"])

    subprocess.Popen = start


class ForkedScript:
    """Stands in for `subprocess.Popen` with `start_new_session` and one pipe for stdout and stderr.

    All files of this process stay open in the fork, including those of `pass_fds`.
    """

    def __init__(self, words: list[str], environment: dict[str, str]):
        reading, writing = os.pipe()
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(reading)
            self._run(words, environment, writing)
        os.close(writing)
        self.stdout = os.fdopen(reading, "rb")
        self.status: int | None = None

    def wait(self) -> int:
        """The exit status, negative for a signal."""
        if self.status is None:
            _, status = os.waitpid(self.pid, 0)
            self.status = os.waitstatus_to_exitcode(status)
            remove_group(self.pid)
        return self.status

    def _run(self, words: list[str], environment: dict[str, str], output: int) -> None:
        status = 1
        try:
            os.setsid()
            add_group(os.getpid())
            signal.signal(signal.SIGINT, signal.default_int_handler)  # as after the start of a program
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.environ.clear()
            os.environ.update(environment)
            os.dup2(output, 1)
            os.dup2(output, 2)
            sys.stdout.reconfigure(line_buffering=True)
            sys.argv = words
            runpy.run_path(words[0], run_name="__main__")
            status = 0
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else int(error.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            atexit._run_exitfuncs()
            sys.stdout.flush()
            os._exit(status)
