"""Seconds to 2.80 bits per byte on plays that were held out: the tiny recipe, and a plain loop as nanoGPT's on a CPU.

    python -m benchmarks.to_loss              # once each, about ten minutes on two cores
    python -m benchmarks.to_loss --rounds 3   # alternately

The loop has what nanoGPT documents for a CPU: characters, 4 layers, 4 heads, 128 wide, 12 rows of 64, 2,000 steps of
AdamW, cosine from .001 to .0001, no dropout, not compiled. Both read the same plays and are scored on all of the same
others; evaluation is not counted. The recipe's budget is cut to what it needs.
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
AIM = 2.80  # bits per byte
STEPS, EVERY, ROWS, LENGTH = 2000, 100, 12, 64


def like_nanogpt() -> dict:
    """Seconds of training until the aim, and what the last evaluation was."""
    import pandas
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from unlabeled.models.losses import cross_entropy_sum

    texts = {split: "".join(pandas.read_parquet(f"data/demo/shakespeare/{split}.parquet")["text"])
             for split in ("train", "validation")}  # fmt: skip
    letters = {letter: index for index, letter in enumerate(sorted(set(texts["train"])))}
    ids = {split: torch.tensor([letters.get(letter, 0) for letter in text]) for split, text in texts.items()}
    held_out = ids["validation"][: len(ids["validation"]) // LENGTH * LENGTH].view(-1, LENGTH)
    sizes = {"n_embd": 128, "n_layer": 4, "n_head": 4, "n_positions": LENGTH, "vocab_size": len(letters)}
    torch.manual_seed(1337)
    model = GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1)

    @torch.no_grad()
    def bits_per_byte() -> float:
        nats = sum(float(cross_entropy_sum(model(rows).logits, rows, shift=True)) for rows in held_out.split(512))
        size = len(texts["validation"].encode()) * (LENGTH - 1) / LENGTH  # the first of a block has nothing before it
        return nats / math.log(2) / size

    seconds, started = 0.0, time.perf_counter()
    for step in range(STEPS):
        share = max(0.0, (step - 100) / (STEPS - 100))
        rate = 1e-3 * (step + 1) / 100 if step < 100 else 1e-4 + 4.5e-4 * (1 + math.cos(math.pi * share))
        for group in optimizer.param_groups:
            group["lr"] = rate
        places = torch.randint(len(ids["train"]) - LENGTH, (ROWS,))
        rows = torch.stack([ids["train"][place : place + LENGTH] for place in places.tolist()])
        loss = cross_entropy_sum(model(rows).logits, rows, shift=True) / (ROWS * (LENGTH - 1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % EVERY == EVERY - 1:
            seconds += time.perf_counter() - started
            found = bits_per_byte()
            print(f"step {step + 1}: {found:.3f} bits per byte after {seconds:.1f} s", file=sys.stderr, flush=True)
            if found <= AIM:
                break
            started = time.perf_counter()
    return {"seconds": seconds, "bits_per_byte": found}


def recipe(tokens: int) -> dict:
    """The same of the tiny recipe with a budget of so many tokens, and the seconds from command to end."""
    folder = FOLDER / "to_loss"
    shutil.rmtree(folder, ignore_errors=True)
    started = time.perf_counter()
    command = [sys.executable, "recipes/pretrain_clm.py", "--config", "recipes/configs/tiny/pretrain_clm.yaml"]
    options = {"train_tokens": tokens, "output_dir": folder, "eval_strategy": "no", "save_strategy": "no"}
    command += [f"--{key}={value}" for key, value in options.items()]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    metrics = json.loads((folder / "metrics.json").read_text())
    return {"seconds": metrics["train_seconds"], "bits_per_byte": metrics["bits_per_byte"],
            "from_command_to_end": time.perf_counter() - started}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=102_400, help="budget of the recipe (default: 102,400)")
    options = parser.parse_args()
    rounds = []
    for _ in range(options.rounds):
        rounds.append((recipe(options.tokens), like_nanogpt()))
        print(json.dumps(rounds[-1]), flush=True)
    ratio = statistics.median(ours["seconds"] / theirs["seconds"] for ours, theirs in rounds)
    print(f"the recipe takes {ratio:.2f} of the loop's seconds (median of {len(rounds)})")


if __name__ == "__main__":
    main()
