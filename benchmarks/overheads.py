"""What is not training: starting up, evaluating, saving, collating.

    python -m benchmarks.overheads     # five minutes on two cores

- from the command to `--help`, and to the first step of `tiny/pretrain_clm` with its text prepared: median of three
- peak memory of an evaluation of the held-out rows, once and eight times over, by processes of their own
- what checkpoints take beside the training of `tiny/pretrain_clm`, saved every 100 steps and once, at its end
- how many tokens one thread collates a second, causal and masked, with masks and with lengths (`--collate`: only that)
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
RECIPE, CONFIG = "recipes/pretrain_clm.py", "recipes/configs/tiny/pretrain_clm.yaml"
ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1"}


def seconds_to(pattern: str, *command: str) -> float:
    """From starting a Python command until it prints a line that matches."""
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT,
        env=ENVIRONMENT | {"PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    for line in process.stdout:
        if re.search(pattern, line):
            seconds = time.perf_counter() - started
            process.kill()
            process.wait()
            return seconds
    raise SystemExit(f"{' '.join(command)} never printed {pattern!r}")


def evaluate(times: int) -> None:
    """The worker: evaluate the held-out rows so many times over, and say the time and the peak memory."""
    import torch
    from datasets import concatenate_datasets
    from transformers import AutoModelForCausalLM

    from unlabeled.data.collators import DataCollatorForPackedLanguageModeling
    from unlabeled.data.preparing import load_prepared, prepare
    from unlabeled.data.sources import Source
    from unlabeled.data.tokenization import load_tokenizer
    from unlabeled.planning import peak_memory_bytes
    from unlabeled.training.evaluation import token_sums

    tokenizer = load_tokenizer("outputs/tiny/pretrain_clm")
    text = [Source(f"data/demo/shakespeare/{split}.parquet") for split in ("train", "validation")]
    rows = load_prepared(prepare(text[:1], text[1:], tokenizer, "clm", 128, "data/prepared"))[0]["validation"]
    rows = concatenate_datasets([rows] * times).with_format("numpy")
    model = AutoModelForCausalLM.from_pretrained("outputs/tiny/pretrain_clm", trust_remote_code=False)
    model.config.use_cache = False
    started = time.perf_counter()
    sums = token_sums(
        model, rows, DataCollatorForPackedLanguageModeling(tokenizer, max_length=128), batch_size=64, shift=True
    )
    found = {"seconds": time.perf_counter() - started, "targets": sums.targets, "loss": sums.loss}
    print(json.dumps(found | {"peak_memory_bytes": peak_memory_bytes(torch.device("cpu"))}))


def saving(save_steps: int) -> str:
    """What the checkpoints of a run took, beside its training."""
    folder = FOLDER / "saving"
    shutil.rmtree(folder, ignore_errors=True)
    options = {"output_dir": folder, "save_steps": save_steps, "eval_strategy": "no"}
    command = [sys.executable, RECIPE, "--config", CONFIG, *(f"--{key}={value}" for key, value in options.items())]
    subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, check=True)
    metrics = json.loads((folder / "metrics.json").read_text())
    saved, trained = metrics["saving_seconds"], metrics["train_seconds"]
    return f"{saved:.2f} s beside {trained:.0f} s of training, {saved / trained:.1%}"


def collating() -> None:
    """Prints millions of tokens a second: rows of four documents, masked ones for a model with sliding layers."""
    import numpy as np
    import torch

    from unlabeled.data.collators import DataCollatorForPackedLanguageModeling, MaskedCollator
    from unlabeled.data.tokenization import load_tokenizer

    torch.set_num_threads(1)
    tokenizer, draw = load_tokenizer("outputs/tiny/tokenizer-wordpiece"), np.random.default_rng(0)

    def row(length: int, number: int) -> dict:
        ends = np.sort(draw.choice(np.arange(1, length), 3, replace=False))
        return {"input_ids": draw.integers(10, len(tokenizer), length), "lengths": np.diff([0, *ends, length]),
                "word_starts": np.ones(length, dtype=bool), "row": number, "epoch": 0}  # fmt: skip

    for rows, length in ((128, 128), (32, 1024), (8, 4096)):
        batch = [row(length, number) for number in range(rows)]
        for name, kind in (
            ("causal", DataCollatorForPackedLanguageModeling),
            ("masked", partial(MaskedCollator, sliding_window=64)),
        ):
            for flat in (False, True):
                collator, times = kind(tokenizer, max_length=length, flat=flat), []
                for _ in range(7):
                    started = time.perf_counter()
                    collator(batch)
                    times.append(time.perf_counter() - started)
                speed = rows * length / statistics.median(times) / 1e6
                print(f"{rows} x {length}, {name}{', flat' * flat}: {speed:.2f} M tokens/s", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluate", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--collate", action="store_true", help="measure collating only")
    options = parser.parse_args()
    if options.collate:
        return collating()
    if options.evaluate:
        return evaluate(options.evaluate)
    run = (RECIPE, "--config", CONFIG, f"--output_dir={FOLDER / 'first'}", "--logging_steps=1")
    for what, pattern, command in (
        ("--help", "every key of", (RECIPE, "--help")),
        ("the first step", r"^step +1/", run),
    ):
        times = []
        for _ in range(3):
            shutil.rmtree(FOLDER / "first", ignore_errors=True)
            times.append(seconds_to(pattern, *command))
        print(f"from the command to {what}: {statistics.median(times):.1f} s", flush=True)
    for times in (1, 8):
        command = [sys.executable, "-m", "benchmarks.overheads", "--evaluate", str(times)]
        done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout)
        print(
            f"evaluation of {found['targets']:,} targets: {found['seconds']:.1f} s, loss {found['loss']:.6f}, "
            f"{found['peak_memory_bytes'] / 1e6:,.0f} MB at most",
            flush=True,
        )
    for save_steps in (100, 500):
        print(f"checkpoints every {save_steps} steps: {saving(save_steps)}", flush=True)
    collating()


if __name__ == "__main__":
    main()
