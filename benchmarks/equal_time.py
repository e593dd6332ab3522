"""Held-out loss after equal training time: the tiny recipes, and stock `Trainer` with their model, text and batch.

    python -m benchmarks.equal_time                   # causal and masked, half an hour on two cores
    python -m benchmarks.equal_time clm-7m --steps 150

A recipe trains for its budget, or for `--steps`. Stock `Trainer` then makes as many steps as fit in the same time: once
with its default learning rate, once with one that suits the model. All models are scored on the same rows with the same
masks, with packed documents isolated from each other. Evaluation and start-up are not counted.
"""

import argparse
import json
import subprocess
import sys
import time
from typing import TYPE_CHECKING

from benchmarks.settings import FOLDER, ROOT, SETTINGS, make_tokenizer

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from benchmarks.baselines import TrainingSetup

PROBE_STEPS = 20  # of stock Trainer, whose time says how many steps fit
EVAL_BATCH_SIZE = 64
EVAL_MLM_PROBABILITY = 0.15
STOCK_OPTIONS = {"stock": {}, "stock, learning rate 0.001": {"learning_rate": 1e-3}}


def make_step_timer() -> "TrainerCallback":
    """A callback with `steps` and `seconds`, as if the first step took as long as the others."""
    from transformers import TrainerCallback

    class StepTimer(TrainerCallback):
        steps = 0
        seconds = 0.0
        first_step_end = 0.0

        def on_step_end(self, args, state, control, **kwargs):
            now = time.perf_counter()
            self.steps = state.global_step
            if self.steps == 1:
                self.first_step_end = now
            else:
                self.seconds = (now - self.first_step_end) * self.steps / (self.steps - 1)

    return StepTimer()


def train_and_score(setting_name: str, variant: str, seconds: float, steps: int) -> dict:
    """Train the recipe for `steps` (0: its budget), or stock `Trainer` for `seconds`.

    Returns:
        Seconds of training, steps, and the metrics of the evaluation.
    """
    from benchmarks.baselines import TrainingSetup, train_ours, train_stock

    setting = SETTINGS[setting_name]
    timer = make_step_timer()
    if variant == "recipe":
        options = {}
        if steps:
            options["train_tokens"] = steps * TrainingSetup(setting, {}).args.batch_tokens
        setup = TrainingSetup(setting, options)
        train_ours(setup, timer)
    else:
        options = {"head": False}  # the model computes its own logits and loss
        train_stock(TrainingSetup(setting, options), timer, max_steps=PROBE_STEPS, **STOCK_OPTIONS[variant])
        steps = int(seconds / timer.seconds * PROBE_STEPS)
        timer = make_step_timer()
        setup = TrainingSetup(setting, options)
        train_stock(setup, timer, max_steps=steps, **STOCK_OPTIONS[variant])
    return {"seconds": timer.seconds, "steps": timer.steps, **score(setup)}


def score(setup: "TrainingSetup") -> dict:
    """The metrics of the model on the held-out rows."""
    from unlabeled.data.randomness import EVALUATION_SEED
    from unlabeled.training.evaluation import token_metrics, token_sums

    rows, manifest = setup.prepared
    masking = {"mlm_probability": EVAL_MLM_PROBABILITY, "seed": EVALUATION_SEED} if setup.is_masked else {}
    collator = setup.make_collator(**masking)
    sums = token_sums(setup.model, rows["validation"], collator, EVAL_BATCH_SIZE, shift=not setup.is_masked)
    return token_metrics(sums, setup.objective, manifest["splits"]["validation"])


def run_worker(setting_name: str, variant: str, seconds: float, steps: int) -> dict:
    """`train_and_score` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.equal_time", setting_name, "--steps", str(steps)]
    command += ["--worker", variant, str(seconds)]
    with open(FOLDER / f"equal_time-{setting_name}.log", "a") as log:
        result = subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True)
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="setting", help=f"some of {', '.join(SETTINGS)}")
    parser.add_argument("--steps", type=int, default=0, help="steps of the recipe (default: its budget)")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        variant, seconds = args.worker
        metrics = train_and_score(args.settings[0], variant, float(seconds), args.steps)
        print("\n" + json.dumps(metrics), flush=True)
        return
    FOLDER.mkdir(parents=True, exist_ok=True)
    print("| | | seconds | steps | loss | bits per byte |\n|---|---|---:|---:|---:|---:|", flush=True)
    for setting_name in args.settings or ["clm-tiny", "mlm-tiny"]:
        make_tokenizer(SETTINGS[setting_name])
        recipe_seconds = 0.0
        for variant in ("recipe", *STOCK_OPTIONS):
            metrics = run_worker(setting_name, variant, recipe_seconds, args.steps)
            if variant == "recipe":
                recipe_seconds = metrics["seconds"]
            cells = [
                setting_name,
                variant,
                f"{metrics['seconds']:.0f}",
                f"{metrics['steps']}",
                f"{metrics['eval_loss']:.3f}",
                f"{metrics['bits_per_byte']:.3f}",
            ]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
