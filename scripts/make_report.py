"""Write the report of a chain: what each stage cost, learned and generates, as one HTML page without external files.

    python scripts/make_report.py outputs/chains/tiny

Reads chain.json and what each stage left in its folder, writes report.html beside the last stage and prints its path.
The samples are kept in samples.json, so that a second report loads no model whose weights are the same.
"""

import argparse
from pathlib import Path

from unlabeled import exit_on_user_error
from unlabeled.reporting.chain_report import write_report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=Path, help="the output folder of a chain, which holds chain.json")
    print(write_report(parser.parse_args().output_dir))


if __name__ == "__main__":
    with exit_on_user_error():
        main()
