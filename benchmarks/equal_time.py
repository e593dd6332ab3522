"""Held-out loss after equal time: the tiny recipes, and stock `Trainer` with their model, text and batch.

    python -m benchmarks.equal_time                   # causal and masked, half an hour on two cores
    python -m benchmarks.equal_time clm-7m --steps 150

A recipe trains for its budget, or for `--steps`; then stock `Trainer` makes as many steps as fit in the seconds that it
took: once with its default learning rate, once with one that suits the model. All are scored on the same rows with the
same masks, packed documents apart; neither evaluating nor starting up counts.
"""

import argparse
import json
import subprocess
import sys
import time

from benchmarks.baselines import FOLDER, ROOT, SETTINGS, Ingredients, make_tokenizer, ours, stock

PROBE = 20  # steps whose time says how many there will be
RATES = {"stock": {}, "stock, learning rate .001": {"learning_rate": 1e-3}}


def work(name: str, who: str, seconds: float, steps: int) -> dict:
    """Seconds of training, steps and held-out loss of one contestant."""
    from transformers import TrainerCallback

    from unlabeled.data.randomness import EVALUATION_SEED
    from unlabeled.training.evaluation import figures, token_sums

    class Watch(TrainerCallback):
        """Times the steps after the first, which is paid for as the others are."""

        def __init__(self):
            self.steps = 0

        def on_step_end(self, args, state, control, **kwargs):
            self.steps = state.global_step
            if self.steps == 1:
                self.started = time.perf_counter()
            self.seconds = (time.perf_counter() - self.started) * self.steps / max(1, self.steps - 1)

    setting, watch = SETTINGS[name], Watch()
    if who == "recipe":
        keys = {"train_tokens": steps * Ingredients(setting, {}).args.batch_tokens} if steps else {}
        one = Ingredients(setting, keys)
        ours(one, watch)
    else:
        plain = {"head": False}  # the model computes its own logits and loss
        stock(Ingredients(setting, plain), watch, max_steps=PROBE, **RATES[who])
        steps, watch = int(seconds / watch.seconds * PROBE), Watch()
        one = Ingredients(setting, plain)
        stock(one, watch, max_steps=steps, **RATES[who])
    rows, manifest = one.prepared
    masked = one.objective == "mlm"
    collator = one.collators(**({"mlm_probability": 0.15, "seed": EVALUATION_SEED} if masked else {}))
    sums = token_sums(one.model, rows["validation"], collator, 64, shift=not masked)
    found = figures(sums, one.objective, manifest["splits"]["validation"])
    return {"seconds": watch.seconds, "steps": watch.steps, **found}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="setting", help=f"some of {', '.join(SETTINGS)}")
    parser.add_argument("--steps", type=int, default=0, help="of the recipe, in the place of its budget")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        who, seconds = options.worker
        print("\n" + json.dumps(work(options.settings[0], who, float(seconds), options.steps)), flush=True)
        return
    FOLDER.mkdir(parents=True, exist_ok=True)
    print("| | | seconds | steps | loss | bits per byte |\n|---|---|---:|---:|---:|---:|", flush=True)
    for name in options.settings or ["clm-tiny", "mlm-tiny"]:
        make_tokenizer(SETTINGS[name])
        seconds = 0.0
        for who in ("recipe", *RATES):
            command = [
                sys.executable,
                "-m",
                "benchmarks.equal_time",
                name,
                "--steps",
                str(options.steps),
                "--worker",
                who,
                str(seconds),
            ]
            with open(FOLDER / f"equal_time-{name}.log", "a") as log:
                said = subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True)
            found = json.loads(said.stdout.splitlines()[-1])
            seconds = seconds or found["seconds"]
            print(
                f"| {name} | {who} | {found['seconds']:.0f} | {found['steps']} | {found['eval_loss']:.3f} "
                f"| {found['bits_per_byte']:.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
