"""Seconds of training to 2.80 bits per byte on held-out plays: the tiny recipe, and nanoGPT's setting for a CPU.

    python -m benchmarks.to_loss              # once each, about ten minutes on two cores
    python -m benchmarks.to_loss --rounds 3   # alternately

The plain loop follows nanoGPT's documentation for a CPU: characters, 4 layers, 4 heads, a width of 128, 12 rows of 64,
2,000 steps of AdamW, a cosine schedule from 0.001 to 0.0001, no dropout, not compiled. Both read the same plays and are
scored on all held-out plays; evaluation is not timed. The budget of the recipe is what it needs to reach the target.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "outputs" / "bench"
TARGET_BITS_PER_BYTE = 2.80
STEPS = 2000
WARMUP_STEPS = 100
EVAL_STEPS = 100  # steps between two evaluations
BATCH_ROWS = 12
MAX_LENGTH = 64
MAX_LEARNING_RATE = 1e-3
MIN_LEARNING_RATE = 1e-4


def learning_rate(step: int) -> float:
    """Linear warm-up, then half a cosine."""
    if step < WARMUP_STEPS:
        return MAX_LEARNING_RATE * (step + 1) / WARMUP_STEPS
    progress = (step - WARMUP_STEPS) / (STEPS - WARMUP_STEPS)
    half_range = (MAX_LEARNING_RATE - MIN_LEARNING_RATE) / 2
    return MIN_LEARNING_RATE + half_range * (1 + math.cos(math.pi * progress))


def train_like_nanogpt() -> dict:
    """Train in a plain loop until the target is reached.

    Returns:
        Seconds of training, and the bits per byte of the last evaluation.
    """
    import pandas as pd
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from unlabeled.models.losses import cross_entropy_sum

    texts = {}
    for split in ("train", "validation"):
        texts[split] = "".join(pd.read_parquet(f"data/demo/shakespeare/{split}.parquet")["text"])
    vocabulary = {character: index for index, character in enumerate(sorted(set(texts["train"])))}
    ids = {split: torch.tensor([vocabulary.get(character, 0) for character in text]) for split, text in texts.items()}
    held_out_rows = ids["validation"][: len(ids["validation"]) // MAX_LENGTH * MAX_LENGTH].view(-1, MAX_LENGTH)
    # The first character of a row is not predicted.
    held_out_bytes = len(texts["validation"].encode()) * (MAX_LENGTH - 1) / MAX_LENGTH

    torch.manual_seed(1337)
    config = GPT2Config(
        n_embd=128,
        n_layer=4,
        n_head=4,
        n_positions=MAX_LENGTH,
        vocab_size=len(vocabulary),
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
    )
    model = GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=MAX_LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.1)

    @torch.no_grad()
    def evaluate() -> float:
        nats = 0.0
        for rows in held_out_rows.split(512):
            nats += float(cross_entropy_sum(model(rows).logits, rows, shift=True))
        return nats / math.log(2) / held_out_bytes

    def train_step(step: int) -> None:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        starts = torch.randint(len(ids["train"]) - MAX_LENGTH, (BATCH_ROWS,))
        rows = torch.stack([ids["train"][start : start + MAX_LENGTH] for start in starts.tolist()])
        loss = cross_entropy_sum(model(rows).logits, rows, shift=True) / (BATCH_ROWS * (MAX_LENGTH - 1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    seconds = 0.0
    bits_per_byte = math.inf
    for first_step in range(0, STEPS, EVAL_STEPS):
        started = time.perf_counter()
        for step in range(first_step, first_step + EVAL_STEPS):
            train_step(step)
        seconds += time.perf_counter() - started
        bits_per_byte = evaluate()
        progress = f"step {first_step + EVAL_STEPS}: {bits_per_byte:.3f} bits per byte after {seconds:.1f} s"
        print(progress, file=sys.stderr, flush=True)
        if bits_per_byte <= TARGET_BITS_PER_BYTE:
            break
    return {"seconds": seconds, "bits_per_byte": bits_per_byte}


def train_recipe(tokens: int) -> dict:
    """Run the tiny recipe with a budget of `tokens`.

    Returns:
        Seconds of training, bits per byte at the end, and seconds from the start of the command to its end.
    """
    output_dir = FOLDER / "to_loss"
    shutil.rmtree(output_dir, ignore_errors=True)
    command = [sys.executable, "recipes/pretrain_clm.py", "--config", "recipes/configs/tiny/pretrain_clm.yaml"]
    command += [f"--train_tokens={tokens}", f"--output_dir={output_dir}", "--eval_strategy=no", "--save_strategy=no"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    started = time.perf_counter()
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL, env=environment)
    total_seconds = time.perf_counter() - started
    metrics = json.loads((output_dir / "metrics.json").read_text(encoding="utf-8"))
    return {
        "seconds": metrics["train_seconds"],
        "bits_per_byte": metrics["bits_per_byte"],
        "from_command_to_end": total_seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1, help="runs of each (default: 1)")
    parser.add_argument("--tokens", type=int, default=102_400, help="budget of the recipe (default: 102,400)")
    args = parser.parse_args()
    ratios = []
    for _ in range(args.rounds):
        recipe = train_recipe(args.tokens)
        loop = train_like_nanogpt()
        print(json.dumps([recipe, loop]), flush=True)
        ratios.append(recipe["seconds"] / loop["seconds"])
    print(f"the recipe takes {statistics.median(ratios):.2f} times the loop's seconds (median of {len(ratios)})")


if __name__ == "__main__":
    main()
