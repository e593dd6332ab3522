"""A sample of experiments/crash_points: runs that are interrupted at a change to the file system end the same."""

import shutil
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("cc") or sys.platform != "linux", reason="needs Linux and a C compiler")
def test_interrupted_runs_end_the_same(tmp_path):
    command = [sys.executable, "experiments/crash_points/run.py", "--folder", str(tmp_path), "--workers", "1"]
    options = ["--settings", "clm", "sft-lora", "prepare", "tokenizer", "merge", "--points", "3"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, cwd=ROOT, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "45 points to try" in done.stdout
    assert "15 of 15" in done.stdout.splitlines()[-1]
