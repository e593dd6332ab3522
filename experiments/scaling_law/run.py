"""An IsoFLOP study for a laptop: five budgets, seven model sizes, cool-downs that branch off from stable runs.

    python -m experiments.scaling_law.run                 # resumes where it stopped
    python -m experiments.scaling_law.run --budgets 3     # the three smallest budgets only

Prints the tables of README.md, writes results.json and draws scaling_law.png. Needs
`python scripts/get_demo_data.py shakespeare bbc wiki c4`.
"""

import argparse
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from experiments import runner


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", type=int, help="number of budgets, the smallest ones (default: all)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="sizes at a time, each on one core")
    parser.add_argument("--output_dir", default="outputs/scaling_law", help="default: outputs/scaling_law")
    args = parser.parse_args()

    runner.start_fork_server()
    # Imported here: torch reads the number of threads, which the line above sets, when it is imported.
    from experiments.scaling_law.study import BUDGETS, ModelSize, make_inputs, make_sizes
    from experiments.scaling_law.tables import report

    folder = Path(args.output_dir).resolve()
    make_inputs(folder)
    sizes = make_sizes(folder, args.budgets or len(BUDGETS))
    with ThreadPoolExecutor(args.workers) as pool:
        list(pool.map(ModelSize.run_all, sizes[::-1]))  # the longest first
    report([result for size in sizes for result in size.read_results()])


if __name__ == "__main__":
    main()
