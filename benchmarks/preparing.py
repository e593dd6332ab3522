"""Tokenise and pack: megabytes a second and core, and the memory that it takes.

    python -m benchmarks.preparing                 # Shakespeare, then 0.1 and 1 GB made from it: half an hour
    python -m benchmarks.preparing --gigabytes 0.1

A core second is a second of CPU time of the process, tokenizer threads included.
"""

import argparse
import json
import resource
import shutil
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "outputs" / "bench"


def synthetic(gigabytes: float) -> Path:
    """A .jsonl of so many bytes: documents of some paragraphs of the plays, drawn at random."""
    import numpy as np
    import pandas

    path = FOLDER / f"synthetic-{gigabytes:g}.jsonl"
    if path.exists():
        return path
    texts = pandas.read_parquet("data/demo/shakespeare/train.parquet")["text"]
    paragraphs = [part for text in texts for part in text.split("\n\n") if part.strip()]
    draw, written = np.random.default_rng(0), 0
    FOLDER.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        while written < gigabytes * 1e9:
            chosen = [paragraphs[i] for i in draw.integers(len(paragraphs), size=draw.integers(1, 20))]
            written += file.write(json.dumps({"text": "\n\n".join(chosen)}) + "\n")
    return path


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of synthetic text (default: 1)")
    options = parser.parse_args()

    from unlabeled.data.preparing import load_prepared, prepare
    from unlabeled.data.sources import Source
    from unlabeled.data.tokenization import load_tokenizer

    cache, held_out = FOLDER / "prepared", Source("data/demo/shakespeare/validation.parquet")
    titles = ("text", "objective", "MB", "tokens", "seconds", "MB/s", "MB/s and core", "most memory")
    print(f"| {' | '.join(titles)} |\n|---|---|{'---:|' * 6}", flush=True)
    sources = [("Shakespeare", "data/demo/shakespeare/train.parquet")]
    sources += [(f"{share * options.gigabytes:g} GB", str(synthetic(share * options.gigabytes))) for share in (0.1, 1)]
    for name, path in sources:
        for objective, kind in (("clm", "tokenizer"), ("mlm", "tokenizer-wordpiece")):
            shutil.rmtree(cache, ignore_errors=True)
            tokenizer = load_tokenizer(f"outputs/tiny/{kind}")
            wall, cores = time.perf_counter(), time.process_time()
            folder = prepare([Source(path)], [held_out], tokenizer, objective, 128, str(cache))
            wall, cores = time.perf_counter() - wall, time.process_time() - cores
            splits = load_prepared(folder)[1]["splits"].values()
            size, tokens = (sum(split[key] for split in splits) for key in ("bytes", "text_tokens"))
            unit = 1 if sys.platform == "darwin" else 1024
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit  # so far: it grows from line to line
            print(
                f"| {name} | {objective} | {size / 1e6:,.1f} | {tokens:,} | {wall:.1f} | {size / 1e6 / wall:.2f} "
                f"| {size / 1e6 / cores:.2f} | {memory / 1e9:.2f} GB |",
                flush=True,
            )
    shutil.rmtree(cache, ignore_errors=True)


if __name__ == "__main__":
    main()
