"""Tokenization and packing: megabytes per second, megabytes per core second, and peak memory.

    python -m benchmarks.preparing                 # Shakespeare, then 0.1 and 1 GB made from it: half an hour
    python -m benchmarks.preparing --gigabytes 0.1

A core second is a second of CPU time of the process, including the threads of the tokenizer.
"""

import argparse
import json
import shutil
import time
from pathlib import Path

from benchmarks.tables import table_header

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "outputs" / "bench"
MAX_LENGTH = 128
TOKENIZERS = {"clm": "outputs/tiny/tokenizer", "mlm": "outputs/tiny/tokenizer-wordpiece"}
TRAIN_FILE = "data/demo/shakespeare/train.parquet"
EVAL_FILE = "data/demo/shakespeare/validation.parquet"
COLUMNS = ("text", "objective", "MB", "tokens", "seconds", "MB/s", "MB per core second", "peak memory")


def make_synthetic_text(gigabytes: float) -> Path:
    """Write a .jsonl file of this size, unless it exists: documents of random paragraphs of the plays."""
    import numpy as np
    import pandas as pd

    path = FOLDER / f"synthetic-{gigabytes:g}.jsonl"
    if path.exists():
        return path
    texts = pd.read_parquet(TRAIN_FILE)["text"]
    paragraphs = [paragraph for text in texts for paragraph in text.split("\n\n") if paragraph.strip()]
    rng = np.random.default_rng(0)
    written = 0
    FOLDER.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        while written < gigabytes * 1e9:
            chosen = [paragraphs[index] for index in rng.integers(len(paragraphs), size=rng.integers(1, 20))]
            written += file.write(json.dumps({"text": "\n\n".join(chosen)}) + "\n")
    return path


def measure(label: str, path: str, objective: str) -> str:
    """Prepare a file and return its row of the table. The peak memory is that of all rows so far."""
    import torch

    from unlabeled.data.preparing import load_prepared, prepare
    from unlabeled.data.sources import Source
    from unlabeled.data.tokenization import load_tokenizer
    from unlabeled.planning import peak_memory_bytes

    prepared_dir = FOLDER / "prepared"
    shutil.rmtree(prepared_dir, ignore_errors=True)
    tokenizer = load_tokenizer(TOKENIZERS[objective])
    wall_start = time.perf_counter()
    cpu_start = time.process_time()
    folder = prepare([Source(path)], [Source(EVAL_FILE)], tokenizer, objective, MAX_LENGTH, str(prepared_dir))
    wall_seconds = time.perf_counter() - wall_start
    cpu_seconds = time.process_time() - cpu_start
    _, manifest = load_prepared(folder)
    shutil.rmtree(prepared_dir, ignore_errors=True)
    megabytes = sum(split["bytes"] for split in manifest["splits"].values()) / 1e6
    tokens = sum(split["text_tokens"] for split in manifest["splits"].values())
    cells = [
        label,
        objective,
        f"{megabytes:,.1f}",
        f"{tokens:,}",
        f"{wall_seconds:.1f}",
        f"{megabytes / wall_seconds:.2f}",
        f"{megabytes / cpu_seconds:.2f}",
        f"{peak_memory_bytes(torch.device('cpu')) / 1e9:.2f} GB",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of the synthetic text (default: 1)")
    args = parser.parse_args()
    files = {"Shakespeare": TRAIN_FILE}
    for gigabytes in (0.1 * args.gigabytes, args.gigabytes):
        files[f"{gigabytes:g} GB"] = str(make_synthetic_text(gigabytes))
    print(table_header(COLUMNS, text_columns=2), flush=True)
    for label, path in files.items():
        for objective in TOKENIZERS:
            print(measure(label, path, objective), flush=True)


if __name__ == "__main__":
    main()
