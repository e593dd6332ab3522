"""Check whether this machine, or this allocation, is fit to train on. Takes about a minute.

    python scripts/doctor.py                                     # this machine
    torchrun --nproc_per_node 8 scripts/doctor.py                # all of its processes together
    srun python scripts/doctor.py                                # every node of an allocation (scripts/launch.slurm)
    python scripts/doctor.py --folder /scratch/me/outputs        # the folder that checkpoints will be written to

A line that begins with `!` is a problem, one with `?` a warning. The exit status is 1 if there is a problem.
"""

import argparse
import os
import socket
from pathlib import Path

from unlabeled import exit_on_user_error
from unlabeled.planner.machine_checks import Severity, check_machine, check_peers

REQUIREMENTS = Path(__file__).resolve().parents[1] / "requirements.txt"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("outputs"), help="folder to write to (default: outputs)")
    args = parser.parse_args()
    is_launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    is_first = os.environ.get("RANK", "0") == "0"
    is_first_of_machine = os.environ.get("LOCAL_RANK", "0") == "0"

    findings = []
    if is_first_of_machine:
        findings += check_machine(args.folder, REQUIREMENTS)
    if is_launched:
        findings += check_peers()
    has_problem = any(finding.severity is Severity.PROBLEM for finding in findings)
    if is_first or is_first_of_machine or has_problem:
        prefix = f"{socket.gethostname()} " if is_launched else ""
        print("\n".join(f"{prefix}{finding}" for finding in findings), flush=True)
    return int(has_problem)


if __name__ == "__main__":
    with exit_on_user_error():
        raise SystemExit(main())
