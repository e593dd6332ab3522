"""The cost of everything but training: start-up, evaluation, checkpoints, collation.

    python -m benchmarks.overheads     # five minutes on two cores

- start-up: seconds from the command to `--help`, and to the first step of `tiny/pretrain_clm` with prepared text
  (median of three)
- evaluation: peak memory for the held-out rows, once and repeated eight times, in processes of their own
- checkpoints: seconds of saving beside the training of `tiny/pretrain_clm`, every 100 steps and once at the end
- collation: tokens per second of one thread, causal and masked, with masks and with lengths (`--collate` measures
  this only)
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "outputs" / "bench"
RECIPE = "recipes/pretrain_clm.py"
CONFIG = "recipes/configs/tiny/pretrain_clm.yaml"
MODEL = "outputs/tiny/pretrain_clm"
ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1"}
START_UP_RUNS = 3
COLLATION_RUNS = 7


def measure_start_up() -> None:
    """Print the seconds until the recipe prints its help, and until it has made its first step."""
    output_dir = FOLDER / "first"
    training = [RECIPE, "--config", CONFIG, f"--output_dir={output_dir}", "--logging_steps=1"]
    for label, pattern, command in (
        ("--help", "every key of", [RECIPE, "--help"]),
        ("the first step", r"^step +1/", training),
    ):
        seconds = []
        for _ in range(START_UP_RUNS):
            shutil.rmtree(output_dir, ignore_errors=True)
            seconds.append(seconds_until_output(pattern, command))
        print(f"from the command to {label}: {statistics.median(seconds):.1f} s", flush=True)


def seconds_until_output(pattern: str, command: list[str]) -> float:
    """Seconds from the start of a Python command until it prints a line that matches; the command is killed then."""
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
        env=ENVIRONMENT | {"PYTHONUNBUFFERED": "1"},
    )
    for line in process.stdout:
        if re.search(pattern, line):
            seconds = time.perf_counter() - started
            process.kill()
            process.wait()
            return seconds
    raise SystemExit(f"{' '.join(command)} never printed {pattern!r}")


def measure_evaluation() -> None:
    """Print time and peak memory of evaluations of different sizes, each in a process of its own."""
    for repeats in (1, 8):
        command = [sys.executable, "-m", "benchmarks.overheads", "--evaluate", str(repeats)]
        process = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=True)
        result = json.loads(process.stdout)
        print(
            f"evaluation of {result['targets']:,} targets: {result['seconds']:.1f} s, loss {result['loss']:.6f}, "
            f"peak memory {result['peak_memory_bytes'] / 1e6:,.0f} MB",
            flush=True,
        )


def evaluate(repeats: int) -> None:
    """Evaluate the held-out rows, repeated, and print time, loss and peak memory as JSON."""
    import torch
    from datasets import concatenate_datasets
    from transformers import AutoModelForCausalLM

    from unlabeled.data.collators import DataCollatorForPackedLanguageModeling
    from unlabeled.data.preparing import load_prepared, prepare
    from unlabeled.data.sources import Source
    from unlabeled.data.tokenization import load_tokenizer
    from unlabeled.planning import peak_memory_bytes
    from unlabeled.training.evaluation import token_sums

    max_length = 128
    tokenizer = load_tokenizer(MODEL)
    train_source = Source("data/demo/shakespeare/train.parquet")
    eval_source = Source("data/demo/shakespeare/validation.parquet")
    folder = prepare([train_source], [eval_source], tokenizer, "clm", max_length, "data/prepared")
    splits, _ = load_prepared(folder)
    rows = concatenate_datasets([splits["validation"]] * repeats).with_format("numpy")
    model = AutoModelForCausalLM.from_pretrained(MODEL, trust_remote_code=False)
    model.config.use_cache = False
    collator = DataCollatorForPackedLanguageModeling(tokenizer, max_length=max_length)
    started = time.perf_counter()
    sums = token_sums(model, rows, collator, batch_size=64, shift=True)
    result = {
        "seconds": time.perf_counter() - started,
        "targets": sums.targets,
        "loss": sums.loss,
        "peak_memory_bytes": peak_memory_bytes(torch.device("cpu")),
    }
    print(json.dumps(result))


def measure_saving() -> None:
    """Print the seconds that checkpoints add to a run."""
    output_dir = FOLDER / "saving"
    for save_steps in (100, 500):
        shutil.rmtree(output_dir, ignore_errors=True)
        command = [sys.executable, RECIPE, "--config", CONFIG, f"--output_dir={output_dir}"]
        command += [f"--save_steps={save_steps}", "--eval_strategy=no"]
        subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, check=True)
        metrics = json.loads((output_dir / "metrics.json").read_text(encoding="utf-8"))
        saving = metrics["saving_seconds"]
        training = metrics["train_seconds"]
        print(
            f"checkpoints every {save_steps} steps: {saving:.2f} s beside {training:.0f} s of training, "
            f"{saving / training:.1%}",
            flush=True,
        )


def measure_collation() -> None:
    """Print the tokens per second of the collators: rows of four documents, masked ones for sliding windows."""
    import numpy as np
    import torch

    from unlabeled.data.collators import DataCollatorForPackedLanguageModeling
    from unlabeled.data.tokenization import load_tokenizer

    torch.set_num_threads(1)
    tokenizer = load_tokenizer("outputs/tiny/tokenizer-wordpiece")
    rng = np.random.default_rng(0)

    def make_row(length: int, index: int) -> dict:
        ends = np.sort(rng.choice(np.arange(1, length), 3, replace=False))
        return {
            "input_ids": rng.integers(10, len(tokenizer), length),
            "lengths": np.diff([0, *ends, length]),
            "word_starts": np.ones(length, dtype=bool),
            "row": index,
            "epoch": 0,
        }

    collators = {
        "causal": DataCollatorForPackedLanguageModeling,
        "masked": partial(DataCollatorForPackedLanguageModeling, mlm=True, sliding_window=64),
    }
    for row_count, length in ((128, 128), (32, 1024), (8, 4096)):
        batch = [make_row(length, index) for index in range(row_count)]
        for name, make_collator in collators.items():
            for flat in (False, True):
                collator = make_collator(tokenizer, max_length=length, flat=flat)
                seconds = []
                for _ in range(COLLATION_RUNS):
                    started = time.perf_counter()
                    collator(batch)
                    seconds.append(time.perf_counter() - started)
                speed = row_count * length / statistics.median(seconds) / 1e6
                label = f"{name}, flat" if flat else name
                print(f"{row_count} x {length}, {label}: {speed:.2f}M tokens/s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluate", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--collate", action="store_true", help="measure collation only")
    args = parser.parse_args()
    if args.evaluate:
        evaluate(args.evaluate)
    elif args.collate:
        measure_collation()
    else:
        measure_start_up()
        measure_evaluation()
        measure_saving()
        measure_collation()


if __name__ == "__main__":
    main()
