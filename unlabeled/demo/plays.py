"""Rows from Shakespeare's works: scenes, short tasks on speeches, preferences, and pairs of passages."""

import configparser
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from unlabeled.demo.rows import Rows, message, sha256, sort_by_hash, tidy

HELD_OUT = ("macbeth", "tempest", "twelfth_night")  # whole works, so that validation text is new in plot and in names
NUMBER = r"(?:[IVX]+|\d+|FIRST|SECOND|THIRD|FOURTH|FIFTH)\b"
# Only at the start of a line and, if a word could also be a speaker, between empty lines: the Prologue of the play
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
HEADING_TITLES = {"": "Poem", "Enter Chorus": "Chorus"}
MIN_SCENE_WORDS = 8  # a heading alone has fewer

# A name at the start of a paragraph, in capitals or not, with or without a full stop: HAMLET, Ham., LADY MACBETH.
SPEAKER = re.compile(r"(?:[A-Z\d][\w.'&-]*|and|of)(?: +(?:[A-Z][\w.'&-]*|and|of|&)){0,4}")
MAX_TASK_CHARACTERS = 260  # of question and answer: with a chat template, 128 tokens of a vocabulary of 2,048
TASKS_PER_SPLIT = {"train": 2500, "validation": 150}  # of each kind
PASSAGE_HALF_LINES = 3  # enough to tell the subject of a passage, and two halves fit 128 tokens

Speech = tuple[str, tuple[str, ...]]  # (speaker, lines)
Task = tuple[str, str, str]  # (question, answer, work)


def shakespeare(paths: list[Path]) -> Rows:
    """A row for each scene or poem; the last path is the file of titles."""
    metadata = configparser.ConfigParser(interpolation=None)
    metadata.read_string(paths.pop().read_text(encoding="utf-8"))
    for path in paths:
        work = work_of(path)
        title = metadata[path.stem]["title"]
        for heading, text in scenes(path.read_text(encoding="utf-8")):
            row = {"text": text, "work": work, "title": f"{title}: {heading}" if heading else title}
            yield "validation" if work in HELD_OUT else "train", row


def work_of(path: Path) -> str:
    """The name of the work in a file."""
    return path.stem.removesuffix("_gut")


def scenes(text: str) -> Iterator[tuple[str, str]]:
    """Cut a work into (heading, text) pieces that together hold every line of it, once and in order.

    A piece is a scene, a prologue, a chorus, an epilogue, a numbered poem, or the text before the first of them (title
    and persons). Headings without a text of their own ("ACT I.") belong to the piece that they announce.
    """
    text = "\n".join(line.rstrip() for line in text.split("\n"))  # a line of spaces becomes empty
    cuts = [match.start() for match in HEADING.finditer(text)]
    act = ""
    part = "Front matter" if cuts else ""
    piece = ""
    for start, end in pairwise([0, *cuts, len(text)]):
        heading = text[start:end].split("\n", 1)[0].strip(" ._[]").removeprefix("THE ")
        numbers = re.findall(rf"\b(ACT|SCENE) ({NUMBER})", heading, re.IGNORECASE)
        for kind, number in numbers:
            number = ROMAN[int(number)] if number.isdigit() else ORDINALS.get(number, number)
            name = f"{kind.capitalize()} {number}"
            if kind.upper() == "ACT":
                act = name
                part = ""
            else:
                part = name
        if start and not numbers:
            is_numeral = re.fullmatch("[IVXLC]+", heading)
            name = HEADING_TITLES.get(heading, heading if is_numeral else heading.capitalize())
            if name in ("Prologue", "Chorus"):
                part = name
            else:
                act = name
                part = ""
        piece += text[start:end]
        if len(piece.split()) < MIN_SCENE_WORDS and end < len(text):
            continue
        yield ", ".join(filter(None, (act, part))), tidy(piece)
        piece = ""


def speeches(text: str) -> list[Speech | None]:
    """The paragraphs of a play in order: a speech, or None for anything else (directions, headings, persons).

    The name of a speaker stands alone on the first line of a paragraph. A name that does so only once in a play is left
    out, as misprints and lines of verse do. So are speeches with a stage direction inside and paragraphs that continue
    after one, because the text around a direction is not the continuation of the speech.
    """
    paragraphs = [paragraph.split("\n") for paragraph in tidy(text).split("\n\n")]
    # A direction beside the name ("TIMON. [Aside.]", a few with mistyped brackets) is no part of it.
    names = [re.sub(r"\s*[\[{][^\]]*\]$", "", lines[0]).removesuffix(".") for lines in paragraphs]
    is_speech = [
        SPEAKER.fullmatch(name) is not None and len(lines) > 1 for name, lines in zip(names, paragraphs, strict=True)
    ]
    counts = Counter(name for name, is_label in zip(names, is_speech, strict=True) if is_label)
    result: list[Speech | None] = []
    for name, is_label, lines in zip(names, is_speech, paragraphs, strict=True):
        if is_label and counts[name] > 1 and not re.search(r"[\[\]{}_@]", "".join(lines[1:])):
            result.append((name, tuple(line.strip() for line in lines[1:])))
        else:
            result.append(None)
    return result


def tasks_of(text: str) -> Iterator[tuple[str, str, str]]:
    """(kind, question, answer) of every speech of a play; a question shows two lines of a speech.

    The answer to `speaker` and `who` is a name in the question, as a model cannot know the persons of a new play.
    """
    for first, second in pairwise([*speeches(text), None]):
        if first is None:
            continue
        speaker, lines = first
        first_lines = "\n".join(lines[:2])
        yield "speaker", f"Who speaks here?\n\n{speaker}.\n{first_lines}", speaker
        yield "continue", f"Continue as {speaker}:\n\n{first_lines}", "\n".join(lines[2:4])
        if second is None or second[0] == speaker or set(lines[:2]) & set(second[1][:2]):
            continue
        passage = f"{speaker}.\n{first_lines}\n\n{second[0]}.\n" + "\n".join(second[1][:2])
        name, its_lines = (first, second)[sha256(passage.encode())[0] % 2]
        yield "who", f"Who says this line?\n\n{its_lines[0]}\n\n{passage}", name


def play_tasks(paths: list[Path]) -> dict[str, dict[str, list[Task]]]:
    """`{split: {kind: tasks}}` with each question once, in the order of their hashes."""
    tasks: dict = defaultdict(lambda: defaultdict(dict))
    for path in paths:
        work = work_of(path)
        split = "validation" if work in HELD_OUT else "train"
        for kind, question, answer in tasks_of(path.read_text(encoding="utf-8")):
            if answer and len(question + answer) <= MAX_TASK_CHARACTERS:
                tasks[split][kind].setdefault(question, (question, answer, work))
    return {
        split: {kind: sort_by_hash(by_question.values(), "".join) for kind, by_question in kinds.items()}
        for split, kinds in tasks.items()
    }


def play_instructions(paths: list[Path]) -> Rows:
    """Equally many tasks of each kind, in turn, so that any stretch of the rows is balanced as well."""
    for split, kinds in play_tasks(paths).items():
        for index in range(TASKS_PER_SPLIT[split]):
            for kind, tasks in kinds.items():
                question, answer, work = tasks[index]
                messages = message("user", question) + message("assistant", answer)
                yield split, {"messages": messages, "task": kind, "work": work}


def play_preferences(paths: list[Path]) -> Rows:
    """An answer that ends where a sentence ends, and one that breaks off; both are lines of a play.

    The two are equally long, and the question is that of one or of the other in turn: neither the length nor the true
    continuation tells them apart.
    """
    # In training, no question is one of `play_instructions` too. Held-out works have too few for that.
    first_task = {"train": TASKS_PER_SPLIT["train"], "validation": 0}
    for split, kinds in play_tasks(paths).items():
        # By number of lines and length in steps of eight characters: tasks whose answer ends a sentence, and others.
        alike: dict = defaultdict(lambda: {True: [], False: []})
        for task in kinds["continue"][first_task[split] :]:
            answer = task[1]
            ends_sentence = answer[-1] in ".!?"
            alike[answer.count("\n"), len(answer) // 8][ends_sentence].append(task)
        pairs = []
        for tasks in alike.values():
            for index, (complete, broken) in enumerate(zip(tasks[True], tasks[False], strict=False)):
                asked = (complete, broken)[index % 2]
                pairs.append((asked, complete[1], broken[1]))
        for (question, _, work), chosen, rejected in sort_by_hash(pairs):
            yield (
                split,
                {
                    "prompt": message("user", question),
                    "chosen": message("assistant", chosen),
                    "rejected": message("assistant", rejected),
                    "task": "continue",
                    "work": work,
                },
            )


def verse_pairs(paths: list[Path]) -> Rows:
    """The first half of a passage of a speech and its second; passages do not overlap, and no text occurs twice.

    A held-out pair comes with two second halves of other passages: the next one of the same work, and the next one of
    another work.
    """
    all_pairs: list[tuple[str, str, str]] = []
    for path in paths:
        for speech in speeches(path.read_text(encoding="utf-8")):
            if speech is not None:
                all_pairs += [(*halves, work_of(path)) for halves in passages(speech[1])]
    pairs = sort_by_hash(all_pairs, "".join)
    held_out = [pair for pair in pairs if pair[2] in HELD_OUT]
    for anchor, positive, work in pairs:
        if work not in HELD_OUT:
            yield "train", {"anchor": anchor, "positive": positive, "work": work}
    for index, (anchor, positive, work) in enumerate(held_out):
        others = held_out[index + 1 :] + held_out[:index]
        row = {"anchor": anchor, "positive": positive, "work": work}
        row["same_work"] = next(pair[1] for pair in others if pair[2] == work)
        row["other_work"] = next(pair[1] for pair in others if pair[2] != work)
        yield "validation", row


def passages(lines: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Yield the two halves of each passage of a speech."""
    length = 2 * PASSAGE_HALF_LINES
    for start in range(0, len(lines) - length + 1, length):
        middle = start + PASSAGE_HALF_LINES
        yield "\n".join(lines[start:middle]), "\n".join(lines[middle : start + length])
