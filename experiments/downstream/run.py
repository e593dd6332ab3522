"""Fine-tune MiniLM on three tasks on a CPU, with three seeds each.

    python -m experiments.downstream.run                              # all; finished runs are not repeated
    python -m experiments.downstream.run --tasks classify_topics      # one of them
    python -m experiments.downstream.run --curve                      # entity F1 from 1/8, 1/4 and 1/2 of the sentences

Runs the configurations of recipes/configs/minilm as shipped, with one thread each. Needs
`python scripts/get_demo_data.py minilm bbc rotten_tomatoes conll2003`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

METRICS = {"classify_topics": "test_accuracy", "classify_sentiment": "test_accuracy", "tag": "test_f1"}
OUTPUT_DIR = Path("outputs/minilm")
TARGET_F1 = 0.88
CURVE_METRICS = {"validation": "eval_f1", "official test set": "test_f1"}
CURVE_COLORS = {"validation": "#7a7a7a", "official test set": "#0b5fa5"}
EPOCHS = 5
BATCH_SIZE = 32


def run(task: str, seed: int, folder: Path, **options) -> dict:
    """Run the recipe of a task, unless it has finished before. Returns its metrics."""
    if not (folder / "metrics.json").exists():
        recipe = task.split("_")[0]
        command = [sys.executable, f"recipes/{recipe}.py", "--config", f"recipes/configs/minilm/{task}.yaml"]
        options = options | {"seed": seed, "output_dir": folder}
        command += [f"--{key}={value}" for key, value in options.items()]
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


def print_scores(task: str, seeds: int) -> None:
    """Run a task with several seeds; print the mean and the standard deviation of its metric."""
    key = METRICS[task]
    runs = [run(task, seed, OUTPUT_DIR / f"{task}-{seed}") for seed in range(seeds)]
    scores = [metrics[key] for metrics in runs]
    seconds = max(metrics["train_seconds"] for metrics in runs)
    deviation = statistics.stdev(scores) if seeds > 1 else float("nan")
    per_seed = ", ".join(f"{score:.4f}" for score in scores)
    print(f"{task}: {key} {statistics.mean(scores):.4f} ± {deviation:.4f} ({per_seed}), {seconds:,.0f} s")


def measure_learning_curve() -> None:
    """Print and draw the entity F1 by the number of sentences: five epochs each, seed 0."""
    sentences = pd.read_parquet("data/demo/conll2003/train.parquet").sample(frac=1, random_state=0)
    metrics = {len(sentences): run("tag", 0, OUTPUT_DIR / "tag-0")}
    OUTPUT_DIR.mkdir(parents=True, exist_ok=True)
    for divisor in (2, 4, 8):
        part = sentences.head(len(sentences) // divisor)
        file = OUTPUT_DIR / f"sentences-{divisor}.parquet"
        part.to_parquet(file)
        metrics[len(part)] = run(
            "tag",
            0,
            OUTPUT_DIR / f"tag-fraction-{divisor}",
            train_data=file,
            train_examples=len(part) * EPOCHS // BATCH_SIZE * BATCH_SIZE,
            eval_steps=1_000_000,
            save_strategy="no",
        )
    curves: dict[str, dict[int, float]] = {split: {} for split in CURVE_METRICS}
    for count in sorted(metrics):
        print(f"{count:,} sentences: validation {metrics[count]['eval_f1']:.4f}, test {metrics[count]['test_f1']:.4f}")
        for split, key in CURVE_METRICS.items():
            curves[split][count] = metrics[count][key]
    draw_learning_curve(curves)


def draw_learning_curve(curves: dict[str, dict[int, float]]) -> None:
    """Draw curve.png.

    Args:
        curves: for each split, the F1 by the number of sentences.
    """
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for split, curve in curves.items():
        axes.plot(list(curve), list(curve.values()), marker="o", color=CURVE_COLORS[split], label=split)
        for count, score in curve.items():
            axes.annotate(f"{score:.3f}", (count, score), (0, 7), textcoords="offset points", ha="center", fontsize=8)
    label = f"target: {TARGET_F1} on the test set"
    axes.axhline(TARGET_F1, color="#b5462f", linewidth=1, linestyle="--", label=label)
    axes.set(xscale="log", xlabel="sentences, five epochs each", ylabel="entity F1", ylim=(0.77, 0.94))
    counts = list(curves["validation"])
    axes.set_xticks(counts, [f"{count:,}" for count in counts])
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(Path(__file__).with_name("curve.png"), dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=METRICS, default=list(METRICS), help="default: all")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default: 3)")
    parser.add_argument("--curve", action="store_true", help="measure the learning curve of entities instead")
    args = parser.parse_args()
    if args.curve:
        measure_learning_curve()
        return
    for task in args.tasks:
        print_scores(task, args.seeds)


if __name__ == "__main__":
    main()
