"""Runs that are interrupted at a file-system change and resumed leave the files of an undisturbed run."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from experiments.crash_points.changes import Mode, compile_library, read_changes

pytestmark = pytest.mark.skipif(
    not shutil.which("cc") or sys.platform != "linux", reason="needs Linux and a C compiler"
)
# Seven changes: change 2 creates a file, 3 and 4 write to it.
SCRIPT = """
import os, sys
from pathlib import Path
from experiments.crash_points.changes import Mode, watch
folder, log, mode, number = Path(sys.argv[1]), Path(sys.argv[2]), Mode[sys.argv[3]], int(sys.argv[4])
os.setsid()
watch(folder, log, mode, number)
(folder / "new").mkdir()
with open(folder / "new" / "file", "wb", buffering=0) as file:
    for _ in range(2):
        try:
            print(file.write(b"0123456789"), flush=True)
        except OSError as error:
            print(error.errno, flush=True)
os.rename(folder / "new" / "file", folder / "renamed")
os.unlink(folder / "renamed")
os.rmdir(folder / "new")
"""


def interrupt(folder: Path, mode: Mode, number: int) -> subprocess.CompletedProcess:
    (folder / "watched").mkdir()
    environment = os.environ | {
        "LD_PRELOAD": str(compile_library(folder)),
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-c", SCRIPT, folder / "watched", folder / "log", mode.name, str(number)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def test_changes_are_counted(tmp_path):
    assert interrupt(tmp_path, Mode.COUNT, 0).returncode == 0
    changes = read_changes(tmp_path / "log", tmp_path / "watched")
    expected = "mkdir new, create new/file, write new/file, write new/file, rename renamed, unlink renamed, rmdir new"
    assert ", ".join(f"{change.kind} {change.path}" for change in changes) == expected


def test_kill_before_a_change(tmp_path):
    assert interrupt(tmp_path, Mode.KILL, 4).returncode == -signal.SIGKILL
    assert (tmp_path / "watched" / "new" / "file").read_bytes() == b"0123456789"


def test_kill_during_a_write(tmp_path):
    assert interrupt(tmp_path, Mode.TORN, 4).returncode == -signal.SIGKILL
    assert (tmp_path / "watched" / "new" / "file").read_bytes() == b"012345678901234"


def test_full_disk_during_a_write(tmp_path):
    result = interrupt(tmp_path, Mode.FULL, 3)
    assert result.returncode == 0
    assert result.stdout.split() == ["5", "28"]  # bytes of the first write, ENOSPC of the second
    assert not list((tmp_path / "watched").iterdir())  # renaming and deleting work


@pytest.mark.slow
def test_interrupted_runs(tmp_path):
    command = [sys.executable, "-m", "experiments.crash_points.run", "--folder", str(tmp_path), "--workers", "1"]
    options = ["--settings", "clm", "sft-lora", "prepare", "tokenizer", "merge", "--points", "3"]
    result = subprocess.run([*command, *options], capture_output=True, text=True, cwd=ROOT, timeout=900)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "45 points to try" in result.stdout
    assert "15 of 15" in result.stdout.splitlines()[-1]
