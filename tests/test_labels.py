"""Labels of real data: one class for one name in every format, names of the data, and what is no target."""

import csv
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import run_recipe
from datasets import ClassLabel, Dataset, Features, List, Value
from test_model_loading import save_model, tuning_arguments
from transformers import AddedToken, AutoConfig, AutoTokenizer

from unlabeled import UserError
from unlabeled.data.label_encoding import encode_framed
from unlabeled.data.labeled_rows import read_task
from unlabeled.data.sources import parse_sources
from unlabeled.data.targets import IGNORE_INDEX
from unlabeled.data.tokenization import load_tokenizer


def write(path: Path, labels: list, column: str = "label", texts: list | None = None) -> Path:
    """Rows with these labels, in the format that the ending names."""
    texts = texts or [f"the text {number}" for number in range(len(labels))]
    rows = [{"text": text, column: label} for text, label in zip(texts, labels, strict=True)]
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="") as handle:
            writer = csv.DictWriter(handle, ["text", column], delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.fixture
def read(tokenizers):
    """Reads labeled data with BERT's kind of tokenizer: (task, splits, manifest)."""
    tokenizer = load_tokenizer(tokenizers["mlm"])

    def make(train, evaluation=None, test=None, words: bool = False, **options):
        columns, label = (["tokens"], "ner_tags") if words else (["text"], "label")
        sources = [parse_sources(str(path), "data") if path else [] for path in (train, evaluation or train, test)]
        return read_task(*sources, columns, label, words, tokenizer, 32, **options)

    return make


def classes_of(task, split) -> list[str]:
    return [task.names[index] for index in split.truth]


# --- One class for one name -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".csv", ".tsv"])
@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["0", "1", "other", "1", "0"], ["0", "1", "other"]),
        (["007", "7", "010"], ["007", "7", "010"]),
        (["10", "9", "2"], ["2", "9", "10"]),
        (["1.0", "v2", "1"], ["1", "1.0", "v2"]),  # beside a text they are texts: versions, say
        (["NA", "null", "None"], ["NA", "None", "null"]),
        (["True", "False"], ["False", "True"]),
        (["1e3", "x"], ["1e3", "x"]),
        (["1_0", "10"], ["10", "1_0"]),  # what only Python reads as a number
    ],
)
def test_csv_labels(ending, labels, names, read, tmp_path):
    task, splits, _ = read(write(tmp_path / f"data{ending}", labels))
    assert task.names == names and classes_of(task, splits["train"]) == labels


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".parquet"])
def test_whole_numbers_are_classes(ending, read, tmp_path):
    task, splits, _ = read(write(tmp_path / f"data{ending}", [0.0, 1.0, 10.0, 1.0, 2.0]))
    assert task.names == ["0", "1", "2", "10"] and classes_of(task, splits["train"]) == ["0", "1", "10", "1", "2"]
    assert task.config["problem_type"] == "single_label_classification"


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".parquet"])
def test_fractions_are_regression(ending, read, tmp_path):
    task, splits, _ = read(write(tmp_path / f"data{ending}", [0.5, -1.0, 2.0]))
    assert task.names == [] and task.config["problem_type"] == "regression"
    assert splits["train"].truth.tolist() == [0.5, -1.0, 2.0]


def test_splits_in_different_formats(read, tmp_path):
    train = write(tmp_path / "train.jsonl", [0, 1, 1, 0])
    evaluation = write(tmp_path / "eval.csv", ["1", "0", "1.0"])
    test = write(tmp_path / "test.parquet", [1.0, 0.0, 1.0])
    task, splits, _ = read(train, evaluation, test)
    assert task.names == ["0", "1"] and splits["validation"].truth.tolist() == splits["test"].truth.tolist() == [
        1,
        0,
        1,
    ]
    for other in (evaluation, test):  # and the other way round
        again, found, _ = read(other, train)
        assert again.names == ["0", "1"] and found["validation"].truth.tolist() == [0, 1, 1, 0]
    numbers, _, _ = read(write(tmp_path / "n.jsonl", [0.5, 1]), write(tmp_path / "n.csv", ["0.25", "2"]))
    assert numbers.names == []
    with pytest.raises(UserError, match=r"row 1 of .*label '2.5', which train_data does not have; .*problem_type"):
        read(train, write(tmp_path / "half.jsonl", [1, 2.5]))


def test_problem_type(read, tmp_path):
    whole, half = write(tmp_path / "whole.csv", ["1", "2", "3"]), write(tmp_path / "half.jsonl", [0.5, 1.5, 0.5])
    task, splits, manifest = read(whole, problem_type="regression")
    assert task.names == [] and splits["train"].truth.tolist() == [1.0, 2.0, 3.0]
    assert manifest["fingerprint"] != read(whole)[2]["fingerprint"]
    task, splits, _ = read(half, problem_type="single_label_classification")
    assert task.names == ["0.5", "1.5"] and splits["train"].truth.tolist() == [0, 1, 0]
    with pytest.raises(UserError, match=r"row 0 of .* has a text as label, and problem_type is regression"):
        read(write(tmp_path / "text.jsonl", ["1", "2"]), problem_type="regression")


@pytest.mark.parametrize("label", ["good", "1"])
def test_text_among_numbers(label, read, tmp_path):
    with pytest.raises(UserError, match=r"row 1 of .* has a text as label where others have numbers"):
        read(write(tmp_path / "data.jsonl", [0.5, label, 1.5]))


@pytest.mark.parametrize("value", [None, "", float("nan"), float("inf"), ["a"], {"a": 1}])
def test_invalid_labels(value, read, tmp_path):
    with pytest.raises(UserError, match=r"row 1 of .* has (no label in label|.* as label; a label is a text)"):
        read(write(tmp_path / "data.jsonl", ["x", value, "y"]))


# --- What is no target ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".parquet"])
def test_rows_without_target(ending, read, tmp_path):
    data = write(tmp_path / f"data{ending}", [0, 1, -100, 1])
    task, splits, manifest = read(data)
    assert task.names == ["0", "1"] and classes_of(task, splits["train"]) == ["0", "1", "1"]
    assert [text[-1][-1] for text in splits["train"].texts] == ["0", "1", "3"]
    assert manifest["splits"]["train"]["left_out"] == {"no target (label -100)": 1}
    assert manifest["splits"]["train"]["documents"] == len(splits["train"].rows) == 3
    with pytest.raises(UserError, match="eval_data has no label but -100"):
        read(data, write(tmp_path / f"none{ending}", [-100, -100]))
    with pytest.raises(UserError, match="all of train_data has no label, or -100"):
        read(write(tmp_path / f"none{ending}", [-100, -100]))
    with pytest.raises(UserError, match=r"row 1 of .* has '-100' as label; it has to be a number, and not -100"):
        read(write(tmp_path / f"numbers{ending}", [0.5, -100, 1]))


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".parquet"])
def test_label_minus_one(ending, read, tmp_path):
    """In GLUE it is the label of examples without one; a class may have it for a name, as a text."""
    good, bad = write(tmp_path / f"good{ending}", [0, 1]), write(tmp_path / f"bad{ending}", [0, 1, -1])
    message = "row 2 of .*bad.* has the label -1 in label, which stands for a missing one"
    for train, test in ((bad, None), (good, bad)):
        with pytest.raises(UserError, match=message):
            read(train, good, test)
    task, _, _ = read(write(tmp_path / "text.jsonl", ["-1", "0", "1"]))
    assert task.names == ["-1", "0", "1"]


def write_tags(path: Path, rows: list[tuple[list[str], list]]) -> Path:
    path.write_text("".join(json.dumps({"tokens": words, "ner_tags": tags}) + "\n" for words, tags in rows))
    return path


def test_words_without_target(read, tmp_path):
    """They are tokens without a loss, and not scored; the words around them keep their tags."""
    data = write_tags(
        tmp_path / "tags.jsonl",
        [
            (["the", "king", "of", "you"], [-100, 1, 0, -100]),
            (["and", "to"], [-100, -100]),
            (["in", "that"], [0, 1]),
        ],
    )
    task, splits, manifest = read(data, words=True)
    split, counts = splits["train"], manifest["splits"]["train"]
    assert task.names == ["0", "1"] and split.texts == [["the", "king", "of", "you"], ["in", "that"]]
    assert split.truth.tolist() == [1, 0, 0, 1] and split.counts.tolist() == [2, 2]
    assert split.words.tolist() == [1, 2, 0, 1]
    assert [targets.tolist() for targets in split.visible_targets] == [[0, 1], [2, 3]]
    first = split.rows[0]["labels"]
    assert first[first != IGNORE_INDEX].tolist() == [1, 0]
    assert first[:2].tolist() == [IGNORE_INDEX, IGNORE_INDEX]  # [CLS] and "the"
    assert (counts["untagged_words"], counts["unseen_words"], counts["targets"]) == (2, 0, 4)
    assert counts["left_out"] == {"no target (ner_tags -100)": 1}


def test_truncated_targets(read, tmp_path):
    """A batch of them would have no loss; held out, these words count as not recognized."""
    long = ([*["the"] * 40, "king"], [*[-100] * 40, 1])
    data = write_tags(tmp_path / "tags.jsonl", [long, (["in", "that"], [0, 1])])
    _, splits, manifest = read(data, words=True)
    assert splits["train"].texts == [["in", "that"]] and splits["train"].truth.tolist() == [0, 1]
    assert manifest["splits"]["train"]["left_out"] == {"no target within max_length": 1}
    held_out = splits["validation"]
    assert held_out.truth.tolist() == [1, 0, 1] and held_out.unseen == 1 and held_out.visible_targets[0].tolist() == []


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ([0, -1], "row 1 of .* has the label -1 in ner_tags"),
        ([0, None], "row 1 of .* has no list of words or tags in ner_tags"),
        ([0, ""], "row 1 of .* has no label in ner_tags"),
        ([0, 0.5], r"row 1 of .* has the tag 0\.5; a tag is a text or a whole number"),
        ([0, [1]], "row 1 of .* has a list as ner_tags"),
    ],
)
def test_invalid_tags(tags, message, read, tmp_path):
    data = write_tags(tmp_path / "tags.jsonl", [(["the", "of"], [0, 1]), (["the", "of"], tags)])
    with pytest.raises(UserError, match=message):
        read(data, words=True)
    with pytest.raises(UserError, match="problem_type is for texts"):
        read(data, words=True, problem_type="regression")


# --- Names that the data bring ----------------------------------------------------------------------------------------

TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]


def write_classes(path: Path, names: list[str], labels: list[int]) -> Path:
    rows = {"text": [f"the text {number}" for number in range(len(labels))], "label": labels}
    features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    Dataset.from_dict(rows, features).to_parquet(path)
    return path


def write_conll(path: Path, rows: list[tuple[list[str], list[int]]], names: list[str] = TAGS) -> Path:
    features = Features({"tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=names))})
    Dataset.from_dict({"tokens": [row[0] for row in rows], "ner_tags": [row[1] for row in rows]}, features).to_parquet(
        path
    )
    return path


def test_class_names_and_order_of_features(read, tmp_path):
    """Also one without an example; -100 and numbers outside of the names are no classes."""
    names = ["world", "sports", "business", "sci"]
    train = write_classes(tmp_path / "train.parquet", names, [3, 0, 1, 0])
    other = write_classes(tmp_path / "other.parquet", names[::-1], [0, 3])  # sci, world
    text = write(tmp_path / "text.csv", ["sports", "world"])
    task, splits, _ = read(train, other, text)
    assert task.names == names and splits["train"].truth.tolist() == [3, 0, 1, 0]
    assert task.config["id2label"] == dict(enumerate(names)) and task.config["num_labels"] == 4
    assert classes_of(task, splits["validation"]) == ["sci", "world"]
    assert classes_of(task, splits["test"]) == ["sports", "world"]
    ignored = write(tmp_path / "ids.jsonl", [0, 1])
    with pytest.raises(UserError, match=r"row 0 of .*ids.jsonl has the label '0', which train_data does not have"):
        read(train, ignored)
    with pytest.raises(UserError, match="problem_type: regression, but the data name the classes"):
        read(train, problem_type="regression")


def test_labels_outside_features(read, tmp_path):
    train = write_classes(tmp_path / "train.parquet", ["a", "b"], [0, 1])
    hidden = write_classes(tmp_path / "test.parquet", ["a", "b"], [0, -1])  # GLUE's test data
    with pytest.raises(UserError, match=r"row 1 of .* has the label -1, and the features .* classes 0 to 1"):
        read(train, train, hidden)
    table = pq.read_table(train)
    labels = pa.array([0, -100], table.schema.field("label").type)
    pq.write_table(table.set_column(1, table.schema.field("label"), labels), tmp_path / "ignored.parquet")
    _, splits, manifest = read(train, tmp_path / "ignored.parquet")
    assert splits["validation"].truth.tolist() == [0]
    assert manifest["splits"]["validation"]["left_out"] == {"no target (label -100)": 1}


def test_conflicting_class_names(tokenizers, tmp_path):
    paths = [str(write_classes(tmp_path / f"{names}.parquet", list(names), [0, 1])) for names in ("ab", "ba")]
    sources = parse_sources(paths, "train_data")
    with pytest.raises(UserError, match="name the classes of label differently"):
        read_task(sources, sources[:1], [], ["text"], "label", False, load_tokenizer(tokenizers["mlm"]), 32)


def test_entity_metrics_on_conll(tokenizers, tmp_path):
    """CoNLL's parquet as it lies on the Hub: the tags have names, so entity F1 is the score."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(40):
        words = [str(word) for word in rng.choice(["the", "of", "king", "you", "people"], 6)]
        rows.append((words, [{"king": 1, "people": 2, "you": 3}.get(word, 0) for word in words]))
    rows[1][1][0] = rows[2][1][3] = -100
    for words, tags in rows[30:]:  # what cannot be known, behind a word that is no target
        words[:4], tags[:4] = ["to", "of", "the", "people"], [-100, 0, 0, 4]
    train, evaluation = (
        write_conll(tmp_path / f"{name}.parquet", part) for name, part in (("train", rows[:30]), ("eval", rows[30:]))
    )
    save_model(tmp_path / "bert", "bert", tokenizers["mlm"])
    options = {
        "model_name_or_path": tmp_path / "bert", "train_data": train, "eval_data": evaluation, "max_length": 32,
        "text_column": "tokens", "label_column": "ner_tags", "output_dir": tmp_path / "run", "train_examples": 48,
        "batch_examples": 8, "per_device_train_batch_size": 8, "learning_rate": 0.01, "precision": "fp32",
        "use_cpu": "true",
    }  # fmt: skip
    run_recipe("tag", [word for key, value in options.items() for word in (f"--{key}", str(value))])
    config = AutoConfig.from_pretrained(tmp_path / "run")
    assert config.id2label == dict(enumerate(TAGS))
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["eval_f1"] > 0.1 and "eval_accuracy" not in metrics
    errors = [line for line in (tmp_path / "run" / "samples.md").read_text().splitlines() if "people: I-LOC" in line]
    assert errors and all("| to of the people " in line and "to: " not in line for line in errors)
    splits = json.loads((tmp_path / "run" / "lineage.json").read_text())["data"]["splits"]
    assert splits["train"]["untagged_words"] == 2 and splits["train"]["targets"] == 30 * 6 - 2


# --- Control tokens ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("words", [True, False])
def test_control_tokens_in_labeled_texts(special, words, tokenizers):
    """Whether or not the tokenizer marks it as special; a pair of tags is text."""
    tokenizer = load_tokenizer(tokenizers["clm"])
    tokens = ["<|im_start|>", "<b>", "</b>"]
    tokenizer.add_tokens([AddedToken(token, special=special and token in tokens[:1]) for token in tokens])
    text = "the <|im_start|> of <b> and </b>"
    found = encode_framed(tokenizer, [text.split() if words else [text]], 64, words)[0].input_ids.tolist()
    assert tokenizer.convert_tokens_to_ids("<|im_start|>") not in found
    assert set(tokenizer.convert_tokens_to_ids(["<b>", "</b>"])) <= set(found)


@pytest.mark.parametrize("stage", ["classify", "tag", "embed"])
def test_saved_tokenizer_splits_special_tokens(stage, tokenizers, tmp_path):
    """The name of a special token in a text is text for a pipeline too."""
    save_model(tmp_path / "bert", "bert", tokenizers["mlm"])
    run_recipe(stage, tuning_arguments(stage, tmp_path / "bert", tmp_path / "run"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    ids = tokenizer("the [SEP] of")["input_ids"]
    assert ids == encode_framed(tokenizer, [["the [SEP] of"]], 32, words=False)[0].input_ids.tolist()
    assert ids.count(tokenizer.sep_token_id) == 1  # the end
