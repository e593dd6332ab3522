"""The text of the demo data that experiments pretrain on, and what of it is held out."""

import json
from itertools import islice
from pathlib import Path

from unlabeled.data.readers import read_documents
from unlabeled.data.sources import parse_sources

TEXT = [f"data/demo/{name}/train.parquet" for name in ("shakespeare", "bbc", "wiki", "c4")]


def make_held_out(folder: Path, texts: int, characters: int) -> None:
    """`held_out.jsonl`: the first `characters` of the first `texts` validation texts of each source."""
    found = []
    for file in TEXT:
        (source,) = parse_sources(file.replace("train", "validation"), "text")
        found += [document[:characters] for document in islice(read_documents(source), texts)]
    lines = "".join(json.dumps({"text": one}) + "\n" for one in found)
    (folder / "held_out.jsonl").write_text(lines, encoding="utf-8")
