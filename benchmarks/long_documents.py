"""Memory and CPU time of encoding one long document: in one call of the tokenizer, and in windows.

    python -m benchmarks.long_documents            # writes benchmarks/results/long_documents.json, 5 minutes

The document is 46 MB of random words without line breaks. Each measurement runs in a process of its own with one
thread.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

DOCUMENT_BYTES = 46_000_000
ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "long_documents.json"
VOCABULARY_SIZES = {"bpe": 384, "wordpiece": 384, "unigram": 256}
METHODS = ("one call", "windows")


def make_words() -> list[str]:
    rng = random.Random(0)
    return ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 9))) for _ in range(2000)]


def measure(algorithm: str, method: str) -> dict:
    """Peak memory beyond that of the process with the document in memory, and CPU time."""
    from unlabeled.data.encoding import encode_texts
    from unlabeled.data.tokenizer_training import train_tokenizer

    words = make_words()
    rng = random.Random(1)
    texts = [" ".join(rng.choices(words, k=50)) for _ in range(2000)]
    backend = train_tokenizer(texts, algorithm, VOCABULARY_SIZES[algorithm]).backend_tokenizer
    passage = " ".join(texts) + " "
    document = (passage * (DOCUMENT_BYTES // len(passage) + 1))[:DOCUMENT_BYTES]
    with_words = algorithm == "wordpiece"  # masked models mask whole words
    bytes_before = peak_bytes()
    started = time.process_time()
    if method == "windows":
        tokens = len(encode_texts(backend, [document], word_starts=with_words)[0].ids)
    else:
        encode = backend.encode_batch if with_words else backend.encode_batch_fast
        (encoding,) = encode([document], add_special_tokens=False)
        if with_words:
            assert len(encoding.word_ids) == len(encoding.ids)
        tokens = len(encoding.ids)
    seconds = time.process_time() - started
    return {"tokens": tokens, "cpu_seconds": round(seconds, 1), "bytes": peak_bytes() - bytes_before}


def peak_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", nargs=2, metavar=("ALGORITHM", "METHOD"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        algorithm, method = args.worker
        print(json.dumps(measure(algorithm, method)))
        return
    environment = os.environ | {"RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    results = {}
    for algorithm in VOCABULARY_SIZES:
        for method in METHODS:
            command = [sys.executable, "-m", "benchmarks.long_documents", "--worker", algorithm, method]
            process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=environment)
            result = json.loads(process.stdout.splitlines()[-1])
            results[f"{algorithm}, {method}"] = result
            print(f"{algorithm}, {method}: {result}", flush=True)
        counts = {results[f"{algorithm}, {method}"]["tokens"] for method in METHODS}
        assert len(counts) == 1, f"{algorithm}: the windows give other tokens"
    versions = {name: version(name) for name in ("tokenizers", "transformers")}
    record = {
        "machine": "to be filled in by hand: the processor, and what else was running",
        "versions": versions,
        "results": results,
    }
    RESULTS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
