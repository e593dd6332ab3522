"""Run the stages of a chain in order, each reading the folder that an earlier one wrote, and write its report.

    python scripts/run_chain.py recipes/chains/tiny.yaml             # the same command again goes on where it stopped
    python scripts/run_chain.py recipes/chains/tiny.yaml --dry-run   # prints every command, and what is done already

A stage is a kind (a recipe, or tokenizer, prepare, merge, evaluate, push), its configuration and overrides. A stage
that is finished and whose inputs are the same is skipped. One that has changed runs again, and its old folder is kept
under another name. Paths are relative to the repository. OUTPUT_DIR/chain.json records what was done, and
OUTPUT_DIR/logs/ has what was printed.
"""

import argparse
import os
from pathlib import Path

from unlabeled import exit_on_user_error
from unlabeled.chain.commands import relative_path
from unlabeled.chain.runner import run_chain

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chain", metavar="CHAIN.yaml", help="the chain; recipes/chains/ has examples")
    parser.add_argument("--output_dir", help="where the stages write their folders; default: that of the YAML")
    parser.add_argument("--dry-run", action="store_true", help="print what would be run, and run nothing")
    args = parser.parse_args()
    # The paths in the YAML are relative to the repository; those of the command line to the working directory.
    absolute_path = os.path.abspath(args.chain)
    absolute_output_dir = os.path.abspath(args.output_dir) if args.output_dir else None
    os.chdir(ROOT)
    path = relative_path(absolute_path) if os.path.exists(absolute_path) else args.chain
    output_dir = relative_path(absolute_output_dir) if absolute_output_dir else None
    run_chain(path, output_dir, args.dry_run)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
