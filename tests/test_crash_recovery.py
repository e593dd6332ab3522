"""Runs of two processes that are killed at random moments end in the weights of an undisturbed run."""

import subprocess
import sys

import pytest
from conftest import ROOT, launch_environment


@pytest.mark.slow
def test_weights_after_random_kills(tmp_path):
    command = [sys.executable, "-m", "experiments.crash_recovery.run", "--folder", str(tmp_path / "runs")]
    command += ["--settings", "causal-2", "sft-2", "masked-2", "--kills", "2", "--steps", "20"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=launch_environment(), timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "| all | 6 |" in result.stdout
