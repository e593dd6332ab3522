"""The demo texts that the experiments pretrain on, and the held-out part of them."""

import json
from itertools import islice
from pathlib import Path

from unlabeled.data.readers import read_documents
from unlabeled.data.sources import parse_sources

TRAIN_FILES = [f"data/demo/{name}/train.parquet" for name in ("shakespeare", "bbc", "wiki", "c4")]


def write_held_out_text(folder: Path, texts_per_source: int, characters: int) -> None:
    """Write `held_out.jsonl`: the beginnings of the first validation texts of each source."""
    texts = []
    for train_file in TRAIN_FILES:
        (source,) = parse_sources(train_file.replace("train", "validation"), "text")
        for document in islice(read_documents(source), texts_per_source):
            texts.append(document[:characters])
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (folder / "held_out.jsonl").write_text("".join(lines), encoding="utf-8")
