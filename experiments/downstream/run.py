"""What MiniLM is worth on three tasks after fine-tuning on a CPU, over three seeds.

    python experiments/downstream/run.py                              # all; finished runs are not repeated
    python experiments/downstream/run.py --tasks classify_topics      # one of them
    python experiments/downstream/run.py --curve                      # entities from 1/8, 1/4, 1/2 of the sentences

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

import matplotlib.pyplot as plt
import pandas

METRICS = {"classify_topics": "test_accuracy", "classify_sentiment": "test_accuracy", "tag": "test_f1"}


def run(task: str, seed: int, folder: Path, **options) -> dict:
    """The metrics of one run."""
    recipe = task.split("_")[0]
    command = [sys.executable, f"recipes/{recipe}.py", "--config", f"recipes/configs/minilm/{task}.yaml"]
    options |= {"seed": seed, "output_dir": folder}
    command += [word for key, value in options.items() for word in (f"--{key}", str(value))]
    if not (folder / "metrics.json").exists():
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return json.loads((folder / "metrics.json").read_text())


def learning_curve() -> None:
    """Entity F1 by the number of sentences, five epochs each, seed 0: printed and drawn."""
    sentences = pandas.read_parquet("data/demo/conll2003/train.parquet").sample(frac=1, random_state=0)
    found = {len(sentences): run("tag", 0, Path("outputs/minilm/tag-0"))}
    for part in (2, 4, 8):
        some, file = sentences.head(len(sentences) // part), Path(f"outputs/minilm/sentences-{part}.parquet")
        file.parent.mkdir(parents=True, exist_ok=True)
        some.to_parquet(file)
        options = {"train_examples": len(some) * 5 // 32 * 32, "eval_steps": 1_000_000, "save_strategy": "no"}
        folder = Path(f"outputs/minilm/tag-fraction-{part}")
        found[len(some)] = run("tag", 0, folder, train_data=file, **options)
    for amount, metrics in sorted(found.items()):
        print(f"{amount:,} sentences: validation {metrics['eval_f1']:.4f}, test {metrics['test_f1']:.4f}")
    draw_curve(
        {split: {amount: metrics[key] for amount, metrics in sorted(found.items())}
         for split, key in (("validation", "eval_f1"), ("official test set", "test_f1"))}
    )  # fmt: skip


def draw_curve(scores: dict[str, dict[int, float]]) -> None:
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for (name, curve), colour in zip(scores.items(), ("#7a7a7a", "#0b5fa5"), strict=True):
        axes.plot(list(curve), list(curve.values()), marker="o", color=colour, label=name)
        for amount, score in curve.items():
            axes.annotate(f"{score:.3f}", (amount, score), (0, 7), textcoords="offset points", ha="center", fontsize=8)
    axes.axhline(0.88, color="#b5462f", linewidth=1, linestyle="--", label="aim: .88 on the test set")
    axes.set(xscale="log", xlabel="sentences, five epochs of each", ylabel="entity F1", ylim=(0.77, 0.94))
    axes.set_xticks(ticks := list(scores["validation"]), [f"{amount:,}" for amount in ticks])
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(Path(__file__).with_name("curve.png"), dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=METRICS, default=list(METRICS), help="default: all")
    parser.add_argument("--seeds", type=int, default=3, help="how many (default: 3)")
    parser.add_argument("--curve", action="store_true", help="the learning curve of entities instead")
    args = parser.parse_args()
    if args.curve:
        return learning_curve()
    for task in args.tasks:
        found = [run(task, seed, Path("outputs/minilm", f"{task}-{seed}")) for seed in range(args.seeds)]
        scores, seconds = ([metrics[key] for metrics in found] for key in (METRICS[task], "train_seconds"))
        spread = statistics.stdev(scores) if len(scores) > 1 else float("nan")
        each = ", ".join(f"{score:.4f}" for score in scores)
        print(f"{task}: {METRICS[task]} {statistics.mean(scores):.4f} ± {spread:.4f} ({each}), {max(seconds):,.0f} s")


if __name__ == "__main__":
    main()
