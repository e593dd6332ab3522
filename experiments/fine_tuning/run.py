"""Fine-tune SmolLM2-135M with SFT and DPO on a CPU, with three seeds each.

    python -m experiments.fine_tuning.run

Runs recipes/sft.py and recipes/dpo.py with the configurations of recipes/configs/smollm2-135m as shipped, once per
seed. Finished runs are not repeated. Needs
`python scripts/get_demo_data.py smollm2-135m alpaca film_preferences`.
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path

SEEDS = (0, 1, 2)
METRICS = {
    "dpo": ("preference_accuracy", "reward_accuracy", "reward_margin", "eval_loss"),
    "sft": ("eval_loss", "bits_per_byte"),
}


def run(recipe: str, seed: int) -> dict:
    """Run a recipe and return its metrics. Only the first seed evaluates the initial model, which all seeds share."""
    folder = Path("outputs/experiments/fine_tuning", f"{recipe}-{seed}")
    options = {
        "config": f"recipes/configs/smollm2-135m/{recipe}_lora.yaml",
        "seed": seed,
        "eval_on_start": seed == SEEDS[0],
        "output_dir": folder,
    }
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    subprocess.run([sys.executable, f"recipes/{recipe}.py", *words], check=True)
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


def main() -> None:
    for recipe, keys in METRICS.items():
        runs = [run(recipe, seed) for seed in SEEDS]
        print(f"\n{recipe}, seeds {SEEDS}")
        for key in keys:
            values = [metrics[key] for metrics in runs]
            line = f"  {key:<20} {statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}  {values}"
            if f"{key}_before" in runs[0]:
                line += f"  before training {runs[0][f'{key}_before']:.4f}"
            print(line)


if __name__ == "__main__":
    main()
