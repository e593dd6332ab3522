"""Memory and processor time of encoding one long document: by the tokenizer in one call, and in windows.

    python -m benchmarks.long_documents            # writes benchmarks/results/long_documents.json, 5 minutes

The document is 46 MB of random words without line ends. Each measurement is a process of its own with one thread.
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
RESULTS = Path(__file__).resolve().parent / "results" / "long_documents.json"
TOKENIZERS = {"bpe": 384, "wordpiece": 384, "unigram": 256}  # tokens of the vocabulary
METHODS = ("one call", "windows")


def make_words() -> list[str]:
    rng = random.Random(0)
    return ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 9))) for _ in range(2000)]


def measure(algorithm: str, method: str) -> dict:
    """Peak memory beyond what the process has with the document in memory, and processor time."""
    from unlabeled.data.encoding import encode_texts
    from unlabeled.data.tokenizer_training import train_tokenizer

    words, rng = make_words(), random.Random(1)
    texts = [" ".join(rng.choices(words, k=50)) for _ in range(2000)]
    backend = train_tokenizer(texts, algorithm, TOKENIZERS[algorithm]).backend_tokenizer
    passage = " ".join(texts) + " "
    document = (passage * (DOCUMENT_BYTES // len(passage) + 1))[:DOCUMENT_BYTES]
    with_words = algorithm == "wordpiece"  # masked models mask whole words
    before, started = peak_bytes(), time.process_time()
    if method == "windows":
        tokens = len(encode_texts(backend, [document], word_starts=with_words)[0].ids)
    else:
        encode = backend.encode_batch if with_words else backend.encode_batch_fast
        (encoding,) = encode([document], add_special_tokens=False)
        if with_words:
            assert len(encoding.word_ids) == len(encoding.ids)
        tokens = len(encoding.ids)
    seconds = time.process_time() - started
    return {"tokens": tokens, "cpu_seconds": round(seconds, 1), "bytes": peak_bytes() - before}


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs=2, metavar=("ALGORITHM", "METHOD"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        return print(json.dumps(measure(*arguments.one)))
    environment = os.environ | {"RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    results = {}
    for algorithm in TOKENIZERS:
        for method in METHODS:
            command = [sys.executable, "-m", "benchmarks.long_documents", "--one", algorithm, method]
            output = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
            results[f"{algorithm}, {method}"] = json.loads(output.splitlines()[-1])
            print(f"{algorithm}, {method}: {results[f'{algorithm}, {method}']}", flush=True)
        counts = {results[f"{algorithm}, {method}"]["tokens"] for method in METHODS}
        assert len(counts) == 1, f"{algorithm}: other tokens in windows"
    versions = {name: version(name) for name in ("tokenizers", "transformers")}
    record = {"machine": "write it here, and what else ran", "versions": versions, "results": results}
    RESULTS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
