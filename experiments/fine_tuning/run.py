"""What fine-tuning and preference tuning give SmolLM2-135M on a CPU, over three seeds.

    python experiments/fine_tuning/run.py

Runs recipes/sft.py and recipes/dpo.py as shipped, once for each seed; a run that is finished is not repeated. Needs
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


def main():
    for recipe, keys in METRICS.items():
        found = []
        for seed in SEEDS:
            folder = Path("outputs/experiments/fine_tuning", f"{recipe}-{seed}")
            command = [sys.executable, f"recipes/{recipe}.py", "--config"]
            command += [f"recipes/configs/smollm2-135m/{recipe}_lora.yaml", "--seed", str(seed)]
            command += ["--eval_on_start", str(seed == SEEDS[0])]  # the model before is the same for all seeds
            subprocess.run([*command, "--output_dir", str(folder)], check=True)
            found.append(json.loads((folder / "metrics.json").read_text()))
        print(f"\n{recipe}, seeds {SEEDS}")
        for key in keys:
            after = [metrics[key] for metrics in found]
            line = f"  {key:<20} {statistics.mean(after):.4f} ± {statistics.stdev(after):.4f}  {after}"
            if f"{key}_before" in found[0]:
                line += f"  before {found[0][f'{key}_before']:.4f}"
            print(line)


if __name__ == "__main__":
    main()
