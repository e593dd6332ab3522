"""Pairs of real data: the columns of sentence-transformers, and hard negatives that count in every loss."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import make_text, run_recipe, weights
from datasets import Dataset
from test_embed import Table
from test_equality import launch
from test_model_loading import save_model
from transformers import AutoModel, AutoTokenizer

from unlabeled import UserError
from unlabeled.data.pairs import (
    OWN_NEGATIVE,
    SECOND_TIME,
    batches_without_repeats,
    left_out_of_epoch,
    order_of_pairs,
    read_pairs,
    text_columns,
)
from unlabeled.data.tokenization import load_tokenizer
from unlabeled.training.embedding import ExactSentenceTransformerTrainer

BATCH, LENGTH = 8, 24


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def read(tokenizers, tmp_path):
    """Reads pairs for training, with held-out ones of their own: (pairs, manifest)."""
    tokenizer = load_tokenizer(tokenizers["mlm"])
    held_out = write(tmp_path / "held_out.jsonl", [{"anchor": "to a", "positive": "in that"}])

    def make(rows: list[dict], evaluation: list[dict] | None = None, max_length: int = 8):
        train = write(tmp_path / "train.jsonl", rows)
        other = write(tmp_path / "eval.jsonl", evaluation) if evaluation else held_out
        args = SimpleNamespace(train_data=str(train), eval_data=str(other), eval_fraction=0.0)
        return read_pairs(args, tokenizer, max_length)

    return make


# --- Columns ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [("anchor", "positive"), ("query", "positive"), ("query", "answer"), ("question", "answer"),
     ("sentence1", "sentence2")],
)  # fmt: skip
@pytest.mark.parametrize("negatives", [[], ["negative"], ["negative_1", "negative_2"], ["negative", "negative_1"]])
def test_column_names(names, negatives, read):
    texts = ["the of", "and to", *["in that", "is was"][: len(negatives)]]
    pairs, manifest = read([dict(zip([*names, *negatives], texts, strict=True)) | {"id": 3}])
    assert text_columns(pairs["train"]) == ["anchor", "positive", "negative_1", "negative_2"][: len(texts)]
    assert [pairs["train"][name][0] for name in text_columns(pairs["train"])] == texts
    assert pairs["train"]["tokens"][0] == 4 * len(texts)  # [CLS], two words, [SEP]
    counts = manifest["splits"]["train"]
    assert (counts["negatives"], counts["text_tokens"]) == (len(negatives), 4 * len(texts))
    assert counts["bytes"] == sum(map(len, texts))


def test_order_of_negatives(read):
    row = {"negative_10": "or", "negative_2": "by", "anchor": "the", "positive": "of", "negative": "at"}
    pairs, _ = read([row])
    assert [pairs["train"][f"negative_{number}"][0] for number in (1, 2, 3)] == ["at", "by", "or"]


PAIR = {"anchor": "the", "positive": "of"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([PAIR | {"negative": None}], r"row 0 of .* has no negative; give each row as many hard negatives"),
        ([PAIR | {"negative": ["a", "b"]}], "row 0 of .* has no negative;"),
        ([PAIR | {"negative": "a"}, {"anchor": "a", "positive": "b"}], "row 1 of .* has the columns anchor, pos"),
        ([PAIR, {"anchor": "a", "positive": "b", "negative": "c"}], "row 1 of .* has the columns .*negative, oth"),
        ([PAIR | {"negatives": ["a", "b"]}], "row 0 of .* has texts in negatives; name the columns negative,"),
        ([PAIR | {"hard_negative": "a"}], "row 0 of .* has texts in hard_negative;"),
        ([PAIR | {"neg": ["a"]}], "row 0 of .* has texts in neg;"),
        ([{"query": "a", "positive": "b", "answer": "c"}], "row 0 of .* has more than one pair of columns"),
        ([{"text": "a", "other": "b"}], "row 0 of .* has no anchor or no positive"),
        ([{"sentence1": "a", "sentence2": "b", "score": 0.2}], "row 0 of .* has sentence1 and sentence2 with a score"),
        ([{"question": "a", "answer": "b", "label": 0}], "row 0 of .* has question and answer with a label"),
    ],
)  # fmt: skip
def test_unclear_columns(rows, message, read):
    with pytest.raises(UserError, match=message):
        read(rows)


def test_repeated_texts(read):
    rows = [
        {"anchor": "the", "positive": "of", "negative": "and"},
        {"anchor": "the", "positive": "to", "negative": "a"},  # an anchor for the second time
        {"anchor": "in", "positive": "that", "negative": "that"},
        {"anchor": "is", "positive": "was", "negative": "of"},  # the positive of another: for `order_of_pairs`
    ]
    pairs, manifest = read(rows)
    assert pairs["train"]["anchor"][:] == ["the", "is"]
    assert manifest["splits"]["train"]["left_out"] == {SECOND_TIME: 1, OWN_NEGATIVE: 1}


# --- Batches ----------------------------------------------------------------------------------------------------------


def test_batches_without_repeated_texts():
    """Hard negatives are often the positives of other rows: these rows go into different batches."""
    texts = [(f"a{row}", f"p{row}", f"p{(row + 1) % 40}") for row in range(40)]
    args = SimpleNamespace(train_pairs=96, batch_pairs=8, seed=0)
    order = order_of_pairs(40, args, texts)
    assert len(order) == 96
    for start in range(0, 96, 8):
        batch = [text for row in order[start : start + 8] for text in texts[row]]
        assert len(set(batch)) == len(batch)
    assert len(set(order[:40])) >= 32 and (order != order_of_pairs(40, args)).any()
    # Without a text in common the order is that of pairs without negatives.
    apart = [(f"a{row}", f"p{row}", f"n{row}") for row in range(40)]
    assert (order_of_pairs(40, args, apart) == order_of_pairs(40, args)).all()
    assert left_out_of_epoch(40, args, apart) == 0
    assert batches_without_repeats([0, 1, 2, 3], ["ab", "bc", "cd", "de"], 2).tolist() == [0, 2, 1, 3]


def test_negative_shared_by_all_rows():
    same = [(f"a{row}", f"p{row}", "no") for row in range(16)]
    args = SimpleNamespace(train_pairs=16, batch_pairs=8, seed=0)
    with pytest.raises(UserError, match="fewer rows of train_data have no text in common"):
        order_of_pairs(16, args, same)
    half = same[:2] + [(f"a{row}", f"p{row}", f"n{row}") for row in range(2, 16)]
    assert left_out_of_epoch(16, args, half) == 0
    third = same[:3] + half[3:]  # three rows that need three batches, and there are two
    assert left_out_of_epoch(16, args, third) == 8


# --- Losses -----------------------------------------------------------------------------------------------------------


def test_held_out_loss_with_hard_negatives():
    """Two pairs at a time; a negative that is the anchor's own positive elsewhere is no wrong answer."""
    table = Table(
        {
            "a": [1, 0, 0],
            "A": [1, 0, 0],
            "b": [0, 1, 0],
            "B": [0, 1, 1],
            "c": [0, 0, 1],
            "C": [1, 0, 1],
            "n": [1, 1, 0],
            "m": [0, 0, 1],
        }
    )
    rows = [{"anchor": "a", "positive": "A", "negative_1": "n"}, {"anchor": "b", "positive": "B", "negative_1": "A"},
            {"anchor": "c", "positive": "C", "negative_1": "m"}]  # fmt: skip

    class Self:
        model = table
        eval_dataset = Dataset.from_list(rows)

        class args:
            batch_pairs, per_device_eval_batch_size = 2, 8

    found = ExactSentenceTransformerTrainer.held_out_metrics(Self, Self.eval_dataset, "eval")
    half = 0.5**0.5
    # Own positive, the next pair's; own negative, the next pair's. For "a" the negative "A" is its positive: left out.
    expected = [[1, 0, half], [half, 0, 0, 0], [half, 0, 1, 0]]
    losses = [F.cross_entropy(20 * torch.tensor(row), torch.tensor(0)) for row in expected]
    assert found["eval_loss"] == pytest.approx(float(sum(losses) / 3), rel=1e-5)
    without = [{key: row[key] for key in ("anchor", "positive")} for row in rows]
    Self.eval_dataset = Dataset.from_list(without)
    other = ExactSentenceTransformerTrainer.held_out_metrics(Self, Self.eval_dataset, "eval")
    assert other["eval_loss"] < found["eval_loss"] and other["mrr"] == found["mrr"]


@pytest.fixture(scope="module")
def work(tmp_path_factory, tokenizers) -> Path:
    """A folder with triplets and a small model; some negatives are positives of other rows."""
    folder = tmp_path_factory.mktemp("triplets")
    texts = list(dict.fromkeys(make_text(140, 0, 4, 9)))
    for split, start, count in (("train", 0, 30), ("validation", 90, 12)):
        rows = [
            {
                "query": texts[start + 3 * row],
                "answer": texts[start + 3 * row + 1],
                "negative_1": texts[start + 3 * row + 2] if row % 3 else texts[start + 3 * ((row + 1) % count) + 1],
                "negative_2": f"{texts[start + row]} {texts[start]}",
            }
            for row in range(count)
        ]
        write(folder / f"{split}.jsonl", rows)
    save_model(folder / "bert", "bert", tokenizers["mlm"], initializer_range=0.3)
    return folder


def words_of(work: Path, folder: Path, **options) -> list[str]:
    options = {
        "model_name_or_path": work / "bert", "output_dir": folder, "max_length": LENGTH,
        "train_data": work / "train.jsonl", "eval_data": work / "validation.jsonl", "train_pairs": 3 * BATCH,
        "batch_pairs": BATCH, "per_device_train_batch_size": BATCH, "learning_rate": 0.01, "warmup_steps": 0,
        "lr_scheduler_type": "constant", "precision": "fp32", "logging_steps": 1, "use_cpu": "true",
        "adam_epsilon": 0.01, "save_steps": 2, "save_strategy": "steps",
    } | options  # fmt: skip
    return [word for key, value in options.items() for word in (f"--{key}", str(value))]


@pytest.fixture(scope="module")
def whole(work) -> Path:
    """A run on one process that embeds a batch at once."""
    run_recipe("embed", words_of(work, work / "whole"))
    return work / "whole"


def history(folder: Path) -> list[dict]:
    return json.loads((folder / "history.json").read_text())


def test_first_step_with_negatives_equals_formula(whole, work):
    """One softmax over all positives and all hard negatives of the batch, without any library for it."""
    rows = [json.loads(line) for line in (work / "train.jsonl").read_text().splitlines()]
    columns = ("query", "answer", "negative_1", "negative_2")
    texts = [tuple(row[name] for name in columns) for row in rows]
    args = SimpleNamespace(train_pairs=BATCH, batch_pairs=BATCH, seed=42)
    batch = [rows[place] for place in order_of_pairs(len(rows), args, texts)]
    model, tokenizer = AutoModel.from_pretrained(work / "bert").eval(), AutoTokenizer.from_pretrained(work / "bert")
    vectors = []
    for name in columns:
        encoded = [tokenizer(row[name], truncation=True, max_length=LENGTH, return_tensors="pt") for row in batch]
        vectors.append(torch.cat([model(**one).last_hidden_state.mean(dim=1) for one in encoded]))
    anchors, candidates = F.normalize(vectors[0]), F.normalize(torch.cat(vectors[1:]))
    loss = F.cross_entropy(20 * anchors @ candidates.T, torch.arange(BATCH))
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
    first = next(entry for entry in history(whole) if "loss" in entry)
    assert first["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert first["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    plain = F.cross_entropy(20 * anchors @ candidates[:BATCH].T, torch.arange(BATCH))
    assert loss > plain + 0.1  # the negatives count
    tokens = [[len(tokenizer(text)["input_ids"]) for text in row] for row in texts]
    splits = json.loads((whole / "lineage.json").read_text())["data"]["splits"]
    assert splits["train"]["text_tokens"] == sum(min(count, LENGTH) for row in tokens for count in row)


def assert_same(folder: Path, other: Path) -> None:
    one, two = weights(folder), weights(other)
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-5, msg=name)
    for first, second in zip(history(folder), history(other), strict=True):
        for name in first.keys() & {"loss", "grad_norm", "eval_loss"}:
            assert second[name] == pytest.approx(first[name], rel=1e-4), name


def test_mini_batches_with_negatives(whole, work):
    pieces = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 3}
    run_recipe("embed", words_of(work, work / "pieces", **pieces))
    assert_same(whole, work / "pieces")


@pytest.mark.slow
def test_two_processes_with_negatives(whole, work):
    words = words_of(work, work / "two", per_device_train_batch_size=4)
    (work / "runs.json").write_text(json.dumps([["embed", words]]), encoding="utf-8")
    launch("ddp", str(work / "runs.json"))
    assert json.loads((work / "two" / "lineage.json").read_text())["plan"]["world_size"] == 2
    assert_same(whole, work / "two")
