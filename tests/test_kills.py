"""The harness of docs/reliability.md in short: two processes, killed at random moments, end in the same weights."""

import subprocess
import sys

import pytest
from conftest import ROOT, launch_environment


@pytest.mark.slow
def test_killed_runs_end_in_the_same_weights(tmp_path):
    settings = ["causal-2", "sft-2", "masked-2"]
    command = [sys.executable, "experiments/kills/run.py", "--settings", *settings, "--kills", "2", "--steps", "20"]
    done = subprocess.run(
        [*command, "--folder", str(tmp_path / "kills")],
        capture_output=True, text=True, cwd=ROOT, env=launch_environment(), timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "| all | 6 |" in done.stdout
