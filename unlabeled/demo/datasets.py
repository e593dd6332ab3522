"""Rows of labeled texts, ratings, entities, instructions and preferences.

Rows for fine-tuning are conversations as TRL reads them: `messages` to imitate, or a `prompt` with a `chosen` and a
`rejected` answer. Rows are paired or selected in the order of their hashes, never at random.
"""

import bz2
import csv
import io
import json
from collections import defaultdict
from pathlib import Path
from urllib.parse import unquote

from unlabeled.demo.rows import Rows, message, sort_by_hash, split_of, tidy

ROLES = {"system": "system", "human": "user", "gpt": "assistant"}
SMALL_WORDS = {"a", "an", "and", "as", "at", "by", "del", "for", "from", "in", "of", "on", "or", "the", "to", "with"}
CAPITALS = {"abc", "cq", "et", "ii", "imax", "pa", "xtc", "xxx"}


def bbc(paths: list[Path]) -> Rows:
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # one article has its pound sign in the Windows code page
            text = path.read_text(encoding="cp1252")
        headline = text.split("\n", 1)[0].strip().lower()  # about a hundred stories are in the package twice
        yield split_of(headline), {"text": tidy(text), "label": path.parent.name}


def rotten_tomatoes(paths: list[Path]) -> Rows:
    for row in csv.DictReader(io.StringIO(bz2.decompress(paths[0].read_bytes()).decode("utf-8"))):
        if row["category"] != "plot":
            movie = row["movie_name"]
            yield split_of(movie), {"text": row["text"].strip(), "label": row["category"], "movie": movie}


def trec(paths: list[Path]) -> Rows:
    questions: dict[str, str] = {}  # most occur several times; the first label counts if one has two
    for line in paths[0].read_text(encoding="utf-8").splitlines():
        fine, text = line.split(" ", 1)
        questions.setdefault(text.strip(), fine)
    for text, fine in questions.items():
        yield split_of(text), {"text": text, "coarse": fine.split(":")[0], "fine": fine}


def conll2003(paths: list[Path]) -> Rows:
    for split, path in zip(("train", "validation", "test"), paths, strict=True):
        for block in path.read_text(encoding="utf-8").split("\n\n"):
            if block.strip() and not block.startswith("-DOCSTART-"):
                fields = [line.split(" ") for line in block.strip().split("\n")]
                yield split, {"tokens": [field[0] for field in fields], "ner_tags": [field[-1] for field in fields]}


def vader(paths: list[Path]) -> Rows:
    for path in paths:
        source = path.name.removesuffix("_GroundTruth.txt").removesuffix("Snippets")
        for line in path.read_text(encoding="utf-8").splitlines()[1:]:
            number, rating, text = line.split("\t", 2)  # quotation marks are text here, so no csv reader
            document = number.split("_")[0]  # sentences 1_1, 1_2, ... come from one review or editorial
            yield split_of(f"{source} {document}"), {"text": text.strip(), "rating": float(rating), "source": source}


def records(paths: list[Path]) -> Rows:
    """Rows of a JSON list, of JSON lines, or of bare lines. Rows with the same first field share a split."""
    text = paths[0].read_text(encoding="utf-8")
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if paths[0].suffix == ".json":
        rows = json.loads(text)
    elif paths[0].suffix == ".jsonl":
        rows = [json.loads(line) for line in lines]
    else:
        rows = [{"text": line} for line in lines]
    for row in rows:
        yield split_of(json.dumps(next(iter(row.values()))), 90, 10), row


def alpaca(paths: list[Path]) -> Rows:
    for split, row in records(paths):
        question = "\n\n".join(filter(None, (row["instruction"], row["input"])))
        yield split, {"messages": message("user", question) + message("assistant", row["output"])}


def preferences(paths: list[Path]) -> Rows:
    for split, row in records(paths):
        turns = {"prompt": row["conversations"], "chosen": [row["chosen"]], "rejected": [row["rejected"]]}
        for column, conversation in turns.items():
            turns[column] = [{"role": ROLES[turn["from"]], "content": turn["value"]} for turn in conversation]
        yield split, turns


def film_preferences(paths: list[Path]) -> Rows:
    """Pairs of reviews of one film, so that a model learns the verdict and not the film."""
    films: dict[str, dict[str, list[str]]] = defaultdict(lambda: {"fresh": [], "rotten": []})
    for _, row in rotten_tomatoes(paths):
        films[row["movie"]][row["label"]].append(row["text"])
    for movie, reviews in films.items():
        prompt = message("user", f"Write a one-line review of {film_title(movie)}.")
        pairs = zip(sort_by_hash(reviews["fresh"]), sort_by_hash(reviews["rotten"]), strict=False)
        for fresh, rotten in pairs:
            answers = {"chosen": message("assistant", fresh), "rejected": message("assistant", rotten)}
            yield split_of(movie), {"prompt": prompt, **answers, "movie": movie}


def film_title(movie: str) -> str:
    """The title of a film from its key, such as `the_count_of_monte_cristo`. Lost punctuation stays lost."""
    words = [word.upper() if word in CAPITALS else word for word in unquote(movie, "latin-1").split("_") if word]
    capitalized = [word if word in SMALL_WORDS else word[0].upper() + word[1:] for word in words]
    return " ".join([capitalized[0][0].upper() + capitalized[0][1:], *capitalized[1:]])
