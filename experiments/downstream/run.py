"""What MiniLM is worth on three tasks after fine-tuning on a CPU, over three seeds.

    python experiments/downstream/run.py                              # all; finished runs are not repeated
    python experiments/downstream/run.py --tasks classify_topics      # one of them

Runs recipes/configs/minilm/ as shipped, one thread each. Needs
`python scripts/get_demo_data.py minilm bbc rotten_tomatoes conll2003`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

FIGURES = {"classify_topics": "test_accuracy", "classify_sentiment": "test_accuracy", "tag": "test_f1"}


def run(task: str, seed: int) -> dict:
    """The metrics of one run."""
    folder = Path("outputs/minilm", f"{task}-{seed}")
    recipe = task.split("_")[0]
    command = [sys.executable, f"recipes/{recipe}.py", "--config", f"recipes/configs/minilm/{task}.yaml"]
    command += ["--seed", str(seed), "--output_dir", str(folder)]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return json.loads((folder / "metrics.json").read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=FIGURES, default=list(FIGURES), help="default: all")
    parser.add_argument("--seeds", type=int, default=3, help="how many (default: 3)")
    args = parser.parse_args()
    for task in args.tasks:
        found = [run(task, seed) for seed in range(args.seeds)]
        scores, seconds = ([metrics[key] for metrics in found] for key in (FIGURES[task], "train_seconds"))
        spread = statistics.stdev(scores) if len(scores) > 1 else float("nan")
        each = ", ".join(f"{score:.4f}" for score in scores)
        print(f"{task}: {FIGURES[task]} {statistics.mean(scores):.4f} ± {spread:.4f} ({each}), {max(seconds):,.0f} s")


if __name__ == "__main__":
    main()
