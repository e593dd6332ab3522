"""What is each pretraining objective good for? Five arms with the same initial weights, compared on five tasks.

    python -m experiments.objectives.run                          # resumes where it stopped
    python -m experiments.objectives.run --seeds 1 --scale 0.1    # one seed, a tenth of every budget

Prints the tables of README.md, writes results.json and draws objectives.png. Needs
`python scripts/get_demo_data.py shakespeare bbc wiki c4 rotten_tomatoes conll2003`.
"""

import argparse
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from experiments import runner


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds (default: 5)")
    parser.add_argument("--scale", type=float, default=1.0, help="factor of all budgets (default: 1)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="seeds at a time, each on one core")
    parser.add_argument("--output_dir", default="outputs/objectives", help="default: outputs/objectives")
    args = parser.parse_args()

    runner.start_fork_server()
    # Imported here: torch reads the number of threads, which the line above sets, when it is imported.
    from experiments.corpora import write_held_out_text
    from experiments.objectives.data import make_tokenizers
    from experiments.objectives.settings import HELD_OUT_CHARACTERS, HELD_OUT_TEXTS
    from experiments.objectives.study import Study
    from experiments.objectives.tables import report

    folder = Path(args.output_dir).resolve()
    make_tokenizers(folder)
    write_held_out_text(folder, HELD_OUT_TEXTS, HELD_OUT_CHARACTERS)
    studies = [Study(folder, seed, args.scale) for seed in range(args.seeds)]
    with ThreadPoolExecutor(args.workers) as pool:
        list(pool.map(Study.run_all, studies))
    report(folder, args.seeds)


if __name__ == "__main__":
    main()
