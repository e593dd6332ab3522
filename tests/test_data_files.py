"""From a path to texts, labels and conversations: what arrives is what was written, or one sentence names the fault."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import re
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import transformers
from conftest import MODELS, make_text, run_recipe
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unlabeled import UserError
from unlabeled.config import SourceArguments, TaskArguments
from unlabeled.data.chat_templates import set_chat_template
from unlabeled.data.conversations import read_conversations
from unlabeled.data.files import find_files
from unlabeled.data.labeled_rows import read_task
from unlabeled.data.pairs import read_pairs
from unlabeled.data.preferences import prepare_pairs
from unlabeled.data.preparing import load_prepared, prepare
from unlabeled.data.readers import class_names, is_untyped, read_documents, read_rows
from unlabeled.data.sources import Source
from unlabeled.data.streams import StreamedRows
from unlabeled.data.streams.reading import FileSegment, read_chunks
from unlabeled.data.streams.rows import SourcePosition
from unlabeled.data.summary import data_warnings, describe_dataset, describe_left_out, describe_sources
from unlabeled.data.tokenization import load_tokenizer
from unlabeled.planning.spans import Denoiser


def streamed_texts(file, repaired: Counter | None = None) -> list[str]:
    """The texts of a whole file, read as a stream reads it."""
    chunks = read_chunks(FileSegment(str(file), 0, 1), "text", None, repaired)
    return [text for chunk in chunks for text in chunk.texts]


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_rows(path: Path, rows: list[dict]) -> Path:
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def documents(path: Path, column: str = "text") -> list[str]:
    return list(read_documents(Source(str(path), text_column=column)))


def rows_of(path: Path, columns=None) -> list[dict]:
    return [row for _, row in read_rows(Source(str(path)), columns)]


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as error:
        documents(path)
    return str(error.value)


# --- Values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cells", [
    ["007", "010"], ["1e5", "1.0"], ["true", "false"], ["NA", "null"], ["2021-03-10", "2021-03-11"], ["", "0"],
], ids=lambda cells: cells[0])  # fmt: skip
def test_csv_cells_are_text(cells, tmp_path):
    file = write(tmp_path / "a.csv", "text,label\n" + "".join(f"{cell},{cell}\n" for cell in cells))
    assert rows_of(file) == [{"text": cell, "label": cell} for cell in cells]
    assert documents(file) == cells


def test_classes_of_long_csv(tokenizers, tmp_path):
    """One class for one name, wherever it stands: readers that guess types do so anew after some thousand rows."""
    lines = [f"text {i},{i % 2}\n" for i in range(12_000)] + ["the end,other\n"]
    source = Source(str(write(tmp_path / "labels.csv", "text,label\n" + "".join(lines))))
    assert is_untyped(source) and not is_untyped(Source(str(write_rows(tmp_path / "a.jsonl", [{"text": "a"}]))))
    assert Counter(row["label"] for _, row in read_rows(source)) == {"0": 6000, "1": 6000, "other": 1}


@pytest.mark.parametrize("dates", [
    ["2021-03-10", "2021-03-11"], ["2021-03-10T10:00:00", "2021-03-11T10:00:00"],
    ["2021-03-10T10:00:00Z", "2021-03-11T10:00:00Z"], ["2021-03-10 10:30", "2021-03-11 10:30"],
], ids=lambda dates: dates[0])  # fmt: skip
def test_date_like_strings(dates, tokenizers, tmp_path):
    assert documents(write_rows(tmp_path / "a.jsonl", [{"text": date} for date in dates])) == dates
    tokenizer = load_tokenizer(tokenizers["clm"])
    file = write_rows(tmp_path / "b.jsonl", [{"prompt": date, "completion": date} for date in dates])
    found = [tokenizer.decode(conversation.ids) for conversation in read_conversations(Source(str(file)), tokenizer)]
    assert [text.count(date) for text, date in zip(found, dates, strict=True)] == [2, 2]
    set_chat_template(tokenizer, "recipes/templates/chatml.jinja")
    messages = [[{"role": "user", "content": date}, {"role": "assistant", "content": date}] for date in dates]
    file = write_rows(tmp_path / "c.jsonl", [{"messages": value} for value in messages])
    found = [tokenizer.decode(conversation.ids) for conversation in read_conversations(Source(str(file)), tokenizer)]
    assert [text.count(date) for text, date in zip(found, dates, strict=True)] == [2, 2]
    source = Source(str(write_rows(tmp_path / "d.jsonl", [{"text": "year", "label": date} for date in dates])))
    task, _, _ = read_task([source], [source], [], ["text"], "label", False, tokenizer, 32)
    assert task.names == sorted(dates)
    pair = [{"prompt": date, "chosen": date, "rejected": "no"} for date in dates]
    source = Source(str(write_rows(tmp_path / "e.jsonl", pair)))
    pairs, _ = prepare_pairs([source], [source], tokenizer, 64)
    assert [tokenizer.decode(row["chosen_ids"]).split("<")[0].strip() for row in pairs["train"]] == dates
    file = str(write_rows(tmp_path / "f.jsonl", [{"anchor": f"{date}?", "positive": date} for date in dates]))
    pairs, _ = read_pairs(SourceArguments(train_data=file, eval_data=file), tokenizer, 64)
    assert list(pairs["train"]["positive"]) == dates


@pytest.mark.parametrize("late", [{"text": "last one", "note": "a remark"}, {"text": "last one", "extra": [1]}])
def test_unused_columns(late, tmp_path):
    """They change their type, or begin, after more than a reader would look at (10 MB)."""
    long = "the of and to a in that is " * 40
    rows = [{"text": f"{i} {long}", "note": None} for i in range(10_200)]
    found = documents(write_rows(tmp_path / "late.jsonl", [*rows, late]))
    assert len(found) == 10_201 and found[-1] == "last one"


def test_unused_parquet_columns_are_not_read(tmp_path):
    damaged = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(np.array([0, 1, 2], np.int32)), pa.py_buffer(b"\xff\xff")]
    )
    table = pa.table(
        {
            "text": pa.array(["a", None]).dictionary_encode(),
            "when": pa.array([1, 2], pa.timestamp("ns")),
            "damaged": damaged,
            "nested": [[{"a": 1}], None],
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    assert documents(tmp_path / "a.parquet") == ["a", ""]
    assert rows_of(tmp_path / "a.parquet", ["nested"]) == [{"nested": [{"a": 1}]}, {"nested": None}]
    with pytest.raises(UserError, match=r"row 0 of .*a.parquet is not UTF-8 text \(byte 0\)"):
        documents(tmp_path / "a.parquet", "damaged")
    with pytest.raises(UserError, match=r"column 'when' in row 0 of .* holds Timestamp, not text"):
        documents(tmp_path / "a.parquet", "when")
    with pytest.raises(UserError, match=r"row 0 of .* has no column 'none'; set text_column to one of: text, when"):
        pq.write_table(table.drop_columns(["damaged"]), tmp_path / "b.parquet")
        documents(tmp_path / "b.parquet", "none")


def test_row_numbers_per_file(tmp_path):
    for name in "ab":
        write_rows(tmp_path / f"{name}.jsonl", [{"text": name}] * 2)
    places = [place for place, _ in read_rows(Source(str(tmp_path)))]
    assert places == [f"row {row} of {tmp_path}/{name}.jsonl" for name in "ab" for row in range(2)]


def test_class_names_from_features(tmp_path):
    from datasets import ClassLabel, Dataset, Features, List, Value

    features = Features(
        {
            "text": Value("string"),
            "label": ClassLabel(names=["neg", "unused", "pos"]),
            "tags": List(ClassLabel(names=["O", "B-X"])),
        }
    )
    rows = {"text": ["a", "b"], "label": [2, 0], "tags": [[0, 1], [0]]}
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "a.parquet")
    source = Source(str(tmp_path / "a.parquet"))
    assert class_names(source, "label") == ["neg", "unused", "pos"]
    assert class_names(source, "tags") == ["O", "B-X"]
    assert class_names(source, "text") is None and class_names(source, "none") is None
    assert [row["label"] for _, row in read_rows(source)] == [2, 0]
    pq.write_table(pa.table(rows), tmp_path / "b.parquet")
    assert class_names(Source(str(tmp_path / "b.parquet")), "label") is None
    with pytest.raises(UserError, match=r"a.parquet and .*b.parquet name the classes of label differently"):
        class_names(Source(str(tmp_path)), "label")


@pytest.mark.parametrize(("name", "content"), [
    ("lines.json", '{"text": "a"}\n\n{"text": "b"}\r\n'),
    ("array.json", ' [{"text": "a"},\n {"text": "b"}\n]\n'),
    ("array.jsonl", '[{"text": "a"}, {"text": "b"}]'),
    ("texts.json", '["a", "b"]'),
    ("data.json", '{"version": 1, "data": [{"text": "a"}, {"text": "b"}]}'),
    ("pretty.json", '{\n  "data": [\n    {"text": "a"},\n    {"text": "b"}\n  ]\n}'),
    ("mac.csv", "text\ra\rb\r"),
    ("dos.csv", "text,id\r\na,1\r\n\r\n\"b\",2"),
    ("pandas.csv", ",text\n0,a\n1,b\n"),
    ("tabs.tsv", "id\ttext\n1\ta\n2\t\"b\"\n"),
])  # fmt: skip
def test_format_variants(name, content, tmp_path):
    for bom in (b"", b"\xef\xbb\xbf"):
        assert documents(write(tmp_path / name, bom + content.encode())) == ["a", "b"]


def test_json_array_in_chunks(tmp_path, monkeypatch):
    from unlabeled.data import json_rows

    rows = [{"text": text, "n": [1, {"a": "]},{"}]} for text in make_text(50, seed=3)]
    for size in (1, 2, 7, 100):
        monkeypatch.setattr(json_rows, "CHUNK_CHARACTERS", size)
        for indent in (None, 1):
            assert rows_of(write(tmp_path / "a.json", json.dumps(rows, indent=indent))) == rows
    assert refusal(write(tmp_path / "a.json", "[]")).endswith("a.json has no rows; remove it or put text into it")
    assert "a.json is not valid JSON after 1 rows (" in refusal(write(tmp_path / "a.json", '[{"text": "a"},]'))


def test_long_csv_field(tmp_path):
    text = 'she said "no", and\nwent ' * 20_000
    with open(tmp_path / "a.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["text"], [text]])
    assert documents(tmp_path / "a.csv") == [text]


def test_surrogate_repair(tokenizers, tmp_path):
    """Prepared or streamed, in texts, labels and messages: U+FFFD, and counted."""
    content = '{"text": "the king \\ud83d said \\ud83d\\ude00"}\n{"text": "fine"}\n'
    file = write(tmp_path / "half.jsonl", content)
    expected = ["the king \ufffd said \U0001f600", "fine"]
    repaired = Counter()
    assert list(read_documents(Source(str(file)), repaired)) == expected
    assert repaired == {"half a surrogate pair": 1}
    streamed = Counter()
    found = [
        text for _, _, texts in read_chunks(FileSegment(str(file), 0, 1), "text", None, streamed) for text in texts
    ]
    assert (found, streamed) == (expected, repaired)
    tokenizer = load_tokenizer(tokenizers["clm"])
    source = Source(str(file))
    _, manifest = load_prepared(prepare([source], [source], tokenizer, "clm", 32, str(tmp_path / "prepared")))
    assert manifest["repaired"] == {"half a surrogate pair": 2}, "in the training and in the held-out text"
    assert "repaired: half a surrogate pair became U+FFFD in 2 rows" in describe_dataset(manifest)
    several = write(tmp_path / "several.json", '{"data": [{"text": "\\ud83d"}, {"text": "\\udc00"}, {"text": "a"}]}')
    repaired = Counter()
    assert [row["text"] for _, row in read_rows(Source(str(several)), None, repaired)] == ["\ufffd", "\ufffd", "a"]
    assert repaired == {"half a surrogate pair": 2}
    nested = write(tmp_path / "nested.jsonl", '{"messages": [{"role": "user", "content": "\\udc00"}]}\n')
    assert rows_of(nested) == [{"messages": [{"role": "user", "content": "\ufffd"}]}]
    lines = [
        f'{{"text": "{i} \\udc00", "label": "{i} \\ud83d", "anchor": "{i} \\udc00", "positive": "p{i}"}}\n'
        for i in "12"
    ]
    labeled = write(tmp_path / "labeled.jsonl", "".join(lines))
    source = Source(str(labeled))
    task, splits, manifest = read_task([source], [source], [], ["text"], "label", False, tokenizer, 32)
    assert task.names == ["1 \ufffd", "2 \ufffd"] and splits["train"].texts == [["1 \ufffd"], ["2 \ufffd"]]
    assert manifest["repaired"] == {"half a surrogate pair": 4}
    pairs, manifest = read_pairs(SourceArguments(str(labeled), str(labeled)), tokenizer, 32)
    assert list(pairs["train"]["anchor"]) == ["1 \ufffd", "2 \ufffd"]
    assert manifest["repaired"] == {"half a surrogate pair": 4}


def test_hub_dataset(monkeypatch):
    """Only the columns that are needed are decoded, and the names of its classes are kept."""
    import datasets

    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["neg", "pos"]),
            "picture": datasets.Image(),
        }
    )
    dataset = datasets.Dataset.from_dict(
        {"text": ["a", None], "label": [1, 0], "picture": [{"bytes": b"none", "path": None}] * 2}, features=features
    )
    asked = []

    def load_dataset(path, **options):
        asked.append((path, options))
        return dataset

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = Source("someone/texts", name="small", split="test", revision="abc")
    assert list(read_documents(source)) == ["a", ""]
    assert list(read_rows(source, ["label"])) == [
        ("row 0 of someone/texts", {"label": 1}),
        ("row 1 of someone/texts", {"label": 0}),
    ]
    assert class_names(source, "label") == ["neg", "pos"] and class_names(source, "text") is None
    assert not is_untyped(source)
    assert asked[0] == ("someone/texts", {"name": "small", "split": "test", "revision": "abc", "streaming": False})
    with pytest.raises(UserError, match=r"someone/texts cannot be read after 0 rows \(.*\); check its name"):
        list(read_rows(source))


# --- Files ------------------------------------------------------------------------------------------------------------


def test_existing_path_is_literal(tmp_path):
    write_rows(tmp_path / "train1.jsonl", [{"text": "train1"}])
    write_rows(tmp_path / "train[1].jsonl", [{"text": "train[1]"}])
    write_rows(tmp_path / "data[2]" / "train.jsonl", [{"text": "data[2]"}])
    write_rows(tmp_path / "data2" / "train.jsonl", [{"text": "data2"}])
    write_rows(tmp_path / "what?" / "a*.jsonl", [{"text": "stars"}])
    assert documents(tmp_path / "train[1].jsonl") == ["train[1]"]
    assert documents(tmp_path / "train[12].jsonl") == ["train1"]
    assert documents(tmp_path / "data[2]" / "train.jsonl") == ["data[2]"]
    assert documents(tmp_path / "data[2]") == ["data[2]"]
    assert documents(tmp_path / "data[2]" / "*.jsonl") == ["data[2]"]
    assert documents(tmp_path / "data[12]" / "*.jsonl") == ["data2"]
    assert documents(tmp_path / "what?" / "a*.jsonl") == ["stars"]
    for path in ("train[1].jsonl", "data[2]/train.jsonl", "what?/a*.jsonl"):
        streamed = [
            text for _, _, texts in read_chunks(FileSegment(str(tmp_path / path), 0, 1), "text") for text in texts
        ]
        assert streamed == documents(tmp_path / path)


def test_key_with_bracket(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "[1].jsonl", [{"text": "a"}])
    assert SourceArguments(train_data="[1].jsonl", eval_fraction=0.5).train_data == "[1].jsonl"
    assert TaskArguments("[1].jsonl", "[1].jsonl", test_data="[1].jsonl").test_data == "[1].jsonl"


def test_folder_files_read_or_skipped(tmp_path):
    folder = tmp_path / "texts"
    texts = {
        "a.txt": "a",
        "B.TXT": "b",
        "d.md": "d",
        "e.ndjson": '{"text": "e"}',
        "f.JSONL.gz": gzip.compress(b'{"text": "f"}'),
        "g.csv.bz2": bz2.compress(b"text\ng"),
        "h.txt.xz": lzma.compress(b"h"),
        "i.TSV": "text\ni",
        "j.json.zst": pa.Codec("zstd").compress(b'["j"]', asbytes=True),
        "sub/k.txt": "k",
    }
    for name, content in texts.items():
        write(folder / name, content)
    pq.write_table(pa.table({"text": ["l"]}), folder / "l.PARQUET")
    write(folder / "m.parquet.gz", gzip.compress((folder / "l.PARQUET").read_bytes()))
    write(tmp_path / "elsewhere" / "n.txt", "n")
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "again").symlink_to(tmp_path / "elsewhere")
    (folder / "sub" / "round").symlink_to(folder)
    (folder / "gone").symlink_to(tmp_path / "none")
    for name in (".hidden.txt", ".ipynb_checkpoints/a-checkpoint.txt", "p.docx", "q", "README.md"):
        write(folder / name, "no")
    write(folder / "r.txt", "")
    os.mkfifo(folder / "pipe.txt")
    expected = [*"badefghij", "n", *"kll"]
    found = find_files(Source(str(folder)))
    assert sorted(documents(folder)) == sorted(expected)
    relative = {reason: [os.path.relpath(path, folder) for path in paths] for reason, paths in found.skipped.items()}
    assert {key.partition(",")[0]: paths for key, paths in relative.items()} == {
        "hidden": [".ipynb_checkpoints", ".hidden.txt"],
        "ending that is not read": ["p.docx", "q"],
        "README.md": ["README.md"],
        "empty": ["r.txt"],
        "link to nothing": ["gone"],
        "pipe": ["pipe.txt"],
        "link to a folder that is read already": ["linked", "sub/round"],
    }
    (folder / "lost.txt").symlink_to(tmp_path / "none")
    assert "lost.txt is a link to a file that is not there" in refusal(folder)


def test_folder_without_readable_files(tmp_path, monkeypatch):
    write(tmp_path / ".git" / "a.txt", "a")
    write(tmp_path / "b.docx", "b")
    assert refusal(tmp_path).endswith(
        f"in the folder {tmp_path} (not read: 1 path, hidden: {tmp_path}/.git; "
        f"1 path, ending that is not read: {tmp_path}/b.docx)"
    )
    scandir = os.scandir
    write(tmp_path / "closed" / "c.txt", "c")

    def scan(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scan)
    assert refusal(tmp_path) == (
        f"cannot read the folder {tmp_path}/closed (Permission denied); make it readable or leave it out"
    )


def test_skipped_files_of_pattern(tmp_path):
    write(tmp_path / "a.txt", "a")
    write(tmp_path / "README.md", "read me")
    write(tmp_path / "b.docx", "b")
    write(tmp_path / "sub" / "c.txt", "c")
    assert documents(tmp_path / "*") == ["read me", "a"]
    skipped = find_files(Source(str(tmp_path / "*"))).skipped
    assert skipped == {
        "ending that is not read": [f"{tmp_path}/b.docx"],
        "folder (name it, or end the pattern in /**)": [f"{tmp_path}/sub"],
    }
    assert documents(tmp_path / "**") == ["read me", "a", "c"]
    assert list(find_files(Source(str(tmp_path / "**"))).skipped) == ["ending that is not read"]
    assert "sub is a folder" in refusal(tmp_path / "s*b")


def test_skipped_files_in_manifest(tokenizers, tmp_path):
    write(tmp_path / "texts" / "a.txt", "the king")
    for number in range(7):
        write(tmp_path / "texts" / f"{number}.pdf", "no")
    tokenizer, source = load_tokenizer(tokenizers["clm"]), Source(str(tmp_path / "texts"))
    held_out = Source(str(write(tmp_path / "held_out.txt", "the queen")))
    _, manifest = load_prepared(prepare([source], [held_out], tokenizer, "clm", 32, str(tmp_path / "prepared")))
    paths = [f"{tmp_path}/texts/{number}.pdf" for number in range(7)]
    assert manifest["skipped_files"] == {"ending that is not read": paths}
    assert f"not read: 7 paths, ending that is not read: {', '.join(paths[:5])}, ..." in describe_dataset(manifest)
    (tmp_path / "texts" / "0.pdf").unlink()
    _, manifest = load_prepared(prepare([source], [held_out], tokenizer, "clm", 32, str(tmp_path / "prepared")))
    assert manifest["skipped_files"] == {"ending that is not read": paths[1:]}, (
        "of today, though the text is found again"
    )
    rows = [
        {"text": text, "label": text, "anchor": text, "positive": f"{text}!", "prompt": text}
        | {"chosen": "he", "rejected": "she"}
        for text in ("the king", "the queen")
    ]
    write_rows(tmp_path / "rows" / "a.jsonl", rows)
    write(tmp_path / "rows" / "b.pdf", "no")
    source, folder = Source(str(tmp_path / "rows")), str(tmp_path / "rows")
    expected = {"ending that is not read": [f"{folder}/b.pdf"]}
    assert read_task([source], [source], [], ["text"], "label", False, tokenizer, 32)[2]["skipped_files"] == expected
    data_args = SourceArguments(train_data=folder, eval_data=folder)
    assert set(read_pairs(data_args, tokenizer, 32)[1]["skipped_files"]) == set(expected)
    set_chat_template(tokenizer, "recipes/templates/chatml.jinja")
    manifest = prepare_pairs([source], [source], tokenizer, 64)[1]
    assert manifest["skipped_files"] == expected
    assert describe_sources(manifest)["not read"] == f"1 path, ending that is not read: {folder}/b.pdf"


# --- Identity ---------------------------------------------------------------------------------------------------------


def test_cache_hit_for_moved_data(tokenizers, tmp_path, monkeypatch):
    for name in ("a.txt", "sub/b.txt"):
        write(tmp_path / "here" / name, f"the king of {name}")
    held_out = write(tmp_path / "held_out.txt", "the queen")
    tokenizer, cache = load_tokenizer(tokenizers["clm"]), str(tmp_path / "prepared")

    def prepared(path: str, **options) -> str:
        return prepare([Source(path, **options)], [Source(str(held_out))], tokenizer, "clm", 32, cache)

    first = prepared(str(tmp_path / "here"))
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    assert prepared(str(tmp_path / "there")) == first
    manifest = load_prepared(first)[1]
    assert manifest["train"][0]["path"] == manifest["sources"][0]["path"] == str(tmp_path / "there"), (
        "the path of today"
    )
    monkeypatch.chdir(tmp_path)
    assert prepared("there") == prepared("./here/") == prepared("here/**") == first
    assert prepared("there", weight=2.0) != first
    write(tmp_path / "there" / "a.txt", "another king")
    assert prepared("there") != first
    write(tmp_path / "here" / "c.txt", "more")
    assert prepared("here") != first
    (tmp_path / "one.jsonl").write_text('{"text": "a"}')
    (tmp_path / "one.txt").write_text('{"text": "a"}')
    assert prepared("one.jsonl") != prepared("one.txt"), "the same bytes mean something else"


@pytest.fixture(scope="module")
def base(tokenizers, tmp_path_factory) -> str:
    """A folder with a model that nobody trained, and its tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("base")
    tokenizer = load_tokenizer(tokenizers["clm"])
    tokenizer.save_pretrained(folder)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **MODELS["llama"])).save_pretrained(folder)
    return str(folder)


RUNS = {
    "pretrain_clm": {"train_tokens": 512, "batch_tokens": 512},
    "pretrain_clm, stream": {"train_tokens": 512, "batch_tokens": 512, "stream": "true"},
    "sft": {"train_tokens": 512, "batch_tokens": 512, "chat_template": "recipes/templates/chatml.jinja"},
    "dpo": {"train_pairs": 8, "batch_pairs": 8, "chat_template": "recipes/templates/chatml.jinja"},
    "classify": {"train_examples": 8, "batch_examples": 8},
    "tag": {"train_examples": 8, "batch_examples": 8, "text_column": "words", "label_column": "tags"},
    "embed": {"train_pairs": 8, "batch_pairs": 8},
}


@pytest.mark.parametrize("run", RUNS)
def test_resume_with_moved_data(run, base, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(transformers.GenerationMixin, "generate", lambda self, ids, **options: ids)  # it takes longest
    rows = []
    for text in make_text(40, 4, high=8):
        row = {"text": text, "label": str(len(text) % 2), "prompt": text, "completion": "he", "chosen": "he"}
        row |= {"rejected": "she", "anchor": text, "positive": f"{text}!", "words": text.split()}
        rows.append(row | {"tags": [str(len(word) % 2) for word in text.split()]})
    write_rows(tmp_path / "here" / "rows.jsonl", rows)
    write(tmp_path / "here" / "notes.pdf", "no")
    options = RUNS[run] | {
        "model_name_or_path": base, "output_dir": tmp_path / "run", "max_length": 64, "precision": "fp32",
        "per_device_train_batch_size": 8, "use_cpu": "true",
    }  # fmt: skip
    if run not in ("dpo", "classify", "tag", "embed"):
        options["prepared_dir"] = tmp_path / "prepared"
    if run.startswith("pretrain"):
        options["compile"] = "false"

    def start(path: Path) -> str:
        capsys.readouterr()
        given = options | {"train_data": path, "eval_data": path}
        run_recipe(run.partition(",")[0], [word for key, value in given.items() for word in (f"--{key}", str(value))])
        return capsys.readouterr().out

    assert f"1 path, ending that is not read: {tmp_path}/here/notes.pdf" in start(tmp_path / "here")
    moved = (tmp_path / "here").rename(tmp_path / "there")
    assert "holds this run, finished" in start(moved)
    file = moved / "rows.jsonl"
    file.write_text(file.read_text().replace("he", "him"))
    with pytest.raises(UserError, match="text"):
        start(moved)


# --- What is left out -------------------------------------------------------------------------------------------------


def test_left_out_counts(tokenizers, tmp_path):
    texts = ["the king of men", "", None, " \n", "the queen", "\x01", "of"]
    source = Source(str(write_rows(tmp_path / "a.jsonl", [{"text": text} for text in texts])))
    expected = {
        "clm": {"empty text": 3},
        "mlm": {"empty text": 3, "no token of the tokenizer": 1},
        "span": {"empty text": 3, "one token, of which no span can be restored": 1},
    }
    for objective, counts in expected.items():
        tokenizer = load_tokenizer(tokenizers[objective])
        options = {"denoisers": [Denoiser()]} if objective == "span" else {}
        folder = prepare([source], [source], tokenizer, objective, 32, str(tmp_path / "prepared"), **options)
        manifest = load_prepared(folder)[1]
        for split in manifest["splits"].values():
            assert split["left_out"] == counts, objective
            assert split["documents"] == 7 - sum(counts.values())
        assert "left out: 3 empty text" in describe_dataset(manifest)
        assert manifest["sources"][0]["documents"] == 7 - sum(counts.values()) or objective == "span"


def test_left_out_counts_of_stream(tokenizers, tmp_path):
    """As prepared text does, estimated from the beginning of each source, which here is all of it."""
    tokenizer = load_tokenizer(tokenizers["mlm"])
    lines = [json.dumps({"text": text}) for text in ["", None, " ", "\x01", *["the king of men"] * 36]]
    write(tmp_path / "texts" / "a.jsonl", "\n".join([*lines, '{"text": "the \\ud83d"}']))
    write(tmp_path / "texts" / "b.pdf", "no")
    source = Source(str(tmp_path / "texts"))
    cache = str(tmp_path / "prepared")
    prepared = load_prepared(prepare([source], [source], tokenizer, "mlm", 32, cache))[1]["splits"]["train"]
    assert prepared["left_out"] == {"empty text": 3, "no token of the tokenizer": 1}
    manifest = load_prepared(prepare([], [source], tokenizer, "mlm", 32, cache))[1]
    args = SimpleNamespace(seed=1, rows_per_step=2, max_steps=10, dataloader_num_workers=0)
    stream = StreamedRows([source], tokenizer, manifest, args)
    counts = stream.manifest["splits"]["train"]
    for key in ("documents", "text_tokens", "left_out", "bytes"):
        assert counts[key] == prepared[key], key
    assert stream.manifest["skipped_files"] == {"ending that is not read": [f"{tmp_path}/texts/b.pdf"]}
    assert stream.manifest["repaired"] == {"half a surrogate pair": 2}, "once in the held-out text"
    (warning,) = data_warnings(stream.manifest, 1, "tokens")[:1]
    assert warning.startswith("9.8% of the train documents are left out: 3 empty text, 1 no token of the tokenizer")
    stream.thread.shutdown()


def test_left_out_warning():
    def manifest(documents: int, **left_out: int) -> dict:
        split = {"documents": documents, "rows": 100, "left_out": left_out}
        return {"splits": {"train": split, "validation": split | {"left_out": {}}}}

    assert data_warnings(manifest(990, empty=10), 1, "tokens") == []
    assert data_warnings(manifest(900, empty=60, short=40), 1, "pairs") == [
        "10.0% of the train pairs are left out: 60 empty, 40 short"
    ]
    assert describe_left_out(manifest(3, empty=1)["splits"]["train"]) == "1 empty (25.00%)"


# --- All formats ------------------------------------------------------------------------------------------------------

COMPRESS = {
    "": lambda data: data, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress,
    ".zst": lambda data: pa.Codec("zstd").compress(data, asbytes=True),
}  # fmt: skip


def csv_bytes(rows: list[dict], delimiter: str = ",", newline: str = "\r\n", quoting: int = csv.QUOTE_MINIMAL) -> bytes:
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, list(rows[0]), delimiter=delimiter, lineterminator=newline, quoting=quoting)
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue().encode()


def parquet_bytes(rows: list[dict]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer, row_group_size=7)
    return buffer.getvalue()


def test_same_tokens_in_every_format(tokenizers, tmp_path):
    texts = [
        *make_text(40, seed=5), 'she said: "no, never"', "two\nlines", "dos\r\nlines", " spaces around ", "007", "NA",
        "2021-03-10", "שלום עולם", "emoji \U0001f600 and \u2028 and \x85", "tab\there", "a,b;c", "[not, json]",
    ]  # fmt: skip
    rows = [{"text": text, "n": str(number)} for number, text in enumerate(texts)]
    lines = "".join(json.dumps(row) + "\r\n" for row in rows).encode()
    contents = {
        "jsonl": lines, "ndjson": lines.replace(b"\r\n", b"\n\n"), "JSON": json.dumps(rows, indent=2).encode(),
        "csv": csv_bytes(rows), "tsv": csv_bytes(rows, "\t"), "parquet": parquet_bytes(rows),
    }  # fmt: skip
    tokenizer = load_tokenizer(tokenizers["clm"])
    held_out = Source(str(write(tmp_path / "held_out.txt", "the queen")))
    folders = {}
    for ending, content in contents.items():
        for compression, compress in COMPRESS.items():
            file = write(tmp_path / "files" / f"texts.{ending}{compression}", compress(content))
            folders[file.name] = file
    for number, text in enumerate(texts):
        ending = ("txt", "md", "TXT.gz")[number % 3]
        data = b"\xef\xbb\xbf" * (number % 2) + text.encode()
        write(tmp_path / "books" / f"{number:03}.{ending}", gzip.compress(data) if ending == "TXT.gz" else data)
    folders["books"] = tmp_path / "books"
    found = {}
    for name, path in folders.items():
        folder = prepare([Source(str(path))], [held_out], tokenizer, "clm", 32, str(tmp_path / "prepared"))
        found[name] = [row.tolist() for row in load_prepared(folder)[0]["train"]["input_ids"]]
    different = [name for name, ids in found.items() if ids != found["texts.jsonl"]]
    assert not different
    args = SimpleNamespace(seed=1, rows_per_step=2, max_steps=10, dataloader_num_workers=0)
    manifest = load_prepared(folder)[1]
    expected = sorted(tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
    for path in (tmp_path / "books", *folders.values()):
        try:
            rows = StreamedRows([Source(str(path))], tokenizer, manifest, args)
        except UserError as error:
            assert "cannot be read from the middle, so it cannot be streamed" in str(error)
            assert path.suffix[1:] not in ("jsonl", "ndjson", "parquet")
            continue
        ids = []
        for shard in range(rows.shards):
            for document, (epoch, *_) in rows.read_documents(shard, 0, SourcePosition()):
                if epoch:
                    break
                ids.append(document.ids.tolist())
        assert sorted(ids) == expected, path
    rows.thread.shutdown()


# Texts that readers have stumbled over, beside random ones.
TRAPS = [
    "", " ", "NA", "null", "None", "nan", "true", "007", "1.0", "1e5", "2021-03-10", "2021-03-10T10:00:00Z", "10:30",
    '"', '""', "'", ",", "\t", "\n", "\r", "\r\n", "a\rb", 'a "quoted" word', "a,b", "\u2028", "\x85", "\x1c", "\ufeff",
    "\ufffe", "{", "[1]", '{"text": "x"}', "\\", "\\n", "\\ud83d", "\U0001f600", "e\u0301", "#", "text", "\0",
]  # fmt: skip
plain_texts = st.one_of(
    st.sampled_from(TRAPS),
    st.lists(st.sampled_from(TRAPS), min_size=2, max_size=6).map("".join),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
)
half_texts = st.text(st.sampled_from(["\ud83d", "\ude00", "a", '"']), max_size=4)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | plain_texts,
    lambda values: st.lists(values, max_size=3) | st.dictionaries(plain_texts, values, max_size=3),
    max_leaves=5,
)


def without_halves(text: str) -> str:
    """What JSON means by a text: two halves in order are one character, and a lone half is none."""
    pairs = re.sub(
        "[\ud800-\udbff][\udc00-\udfff]",
        lambda pair: pair[0].encode("utf-16-le", "surrogatepass").decode("utf-16-le"),
        text,
    )
    return re.sub("[\ud800-\udfff]", "\ufffd", pairs)


@st.composite
def data_files(draw) -> tuple[str, bytes, list[dict], bool]:
    """(name, content, rows as they have to arrive, whether it has to be refused) of a random file."""
    form = draw(st.sampled_from(["jsonl", "ndjson", "json", "csv", "tsv", "parquet"]))
    compression = draw(st.sampled_from(list(COMPRESS)))
    count = draw(st.integers(1, 5))
    refused = False
    if form in ("csv", "tsv"):
        named = plain_texts.filter(lambda name: name and name[0] != "\ufeff" and "\0" not in name)
        names = draw(st.lists(named, max_size=3, unique=True))
        names = draw(st.permutations(sorted({*names, "text", "label"})))
        rows = [{name: draw(plain_texts) for name in names} for _ in range(count)]
        newline = draw(st.sampled_from(["\n", "\r\n"]))
        # The writer quotes only those line ends that it writes itself.
        quoting = draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])) if newline == "\r\n" else csv.QUOTE_ALL
        content = csv_bytes(rows, "," if form == "csv" else "\t", newline, quoting)
        refused = b"\0" in content
    elif form == "parquet":
        texts = draw(st.lists(st.none() | plain_texts, min_size=count, max_size=count))
        rows = [
            {
                "text": text,
                "label": draw(plain_texts),
                "messages": [{"role": "user", "content": draw(plain_texts)} for _ in range(draw(st.integers(0, 2)))],
                "extra": draw(st.none() | st.integers(-(2**60), 2**60)),
            }
            for text in texts
        ]
        content = parquet_bytes(rows)
    else:
        texts = st.one_of(st.none(), plain_texts, half_texts)
        rows = [
            draw(st.dictionaries(plain_texts, json_values, max_size=3))
            | {"text": draw(texts), "label": draw(json_values)}
            | {
                "messages": [
                    {"role": "user", "content": draw(plain_texts | half_texts)} for _ in range(draw(st.integers(0, 2)))
                ]
            }
            for _ in range(count)
        ]
        ascii_only = draw(st.booleans())
        if form == "json" and draw(st.booleans()):
            indent = draw(st.sampled_from([None, 1]))
            shown = {"data": rows} if draw(st.booleans()) else rows
            text = json.dumps(shown, ensure_ascii=ascii_only, indent=indent)
        else:
            newline = draw(st.sampled_from(["\n", "\r\n", "\n\n"]))
            text = newline.join(json.dumps(row, ensure_ascii=ascii_only) for row in rows) + draw(
                st.sampled_from(["", newline])
            )
        content = text.encode("utf-8", "surrogatepass")
        refused = not ascii_only and bool(re.search("[\ud800-\udfff]", text))
    if form != "parquet" and draw(st.booleans()):
        content = b"\xef\xbb\xbf" + content
    name = f"file.{draw(st.sampled_from([form, form.upper()]))}{compression}"
    return name, COMPRESS[compression](content), rows, refused


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.one_of(plain_texts, st.lists(plain_texts).map("".join)),
    ending=st.sampled_from(["txt", "md", "TXT"]),
    compression=st.sampled_from(list(COMPRESS)),
    bom=st.booleans(),
)
def test_text_file_is_one_document(text, ending, compression, bom, tmp_path):
    shutil.rmtree(tmp_path)
    data = b"\xef\xbb\xbf" * bom + text.encode()
    file = write(tmp_path / f"file.{ending}{compression}", COMPRESS[compression](data))
    if not file.read_bytes() or "\0" in text:
        assert re.search("is (empty|binary)", refusal(file))
        return
    expected = text if bom else text.removeprefix("\ufeff")
    assert documents(file) == [expected]
    if not compression:
        assert [found for _, _, texts in read_chunks(FileSegment(str(file), 0, 1), "text") for found in texts] == [
            expected
        ]


CHECKS = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@settings(max_examples=300, deadline=None, suppress_health_check=CHECKS)
@given(data=data_files())
def test_texts_round_trip(data, tmp_path):
    name, content, rows, refused = data
    shutil.rmtree(tmp_path)
    file = write(tmp_path / name, content)
    source = Source(str(file))
    if refused:
        with pytest.raises(UserError, match=r"is (not UTF-8|binary)") as error:
            list(read_rows(source))
        assert str(file) in str(error.value) and re.search(r"line \d+ of|after \d+ rows|byte \d+", str(error.value))
        return

    def arrived(value):
        if isinstance(value, str):
            return without_halves(value)
        if isinstance(value, list):
            return [arrived(item) for item in value]
        return {key: arrived(item) for key, item in value.items()} if isinstance(value, dict) else value

    expected = [arrived(row) for row in rows]
    repaired = Counter()
    assert [row for _, row in read_rows(source, None, repaired)] == expected
    changed = [new != old for new, old in zip(expected, rows, strict=True) if "\ufffd" in repr(new)]
    assert sum(repaired.values()) == sum(changed)
    assert list(read_documents(source)) == [row["text"] or "" for row in expected]
    assert [row["label"] for _, row in read_rows(source, ["label"])] == [row["label"] for row in expected]
    if name.lower().endswith(("jsonl", "ndjson", "parquet")):
        for count in (1, 3, 40):
            streamed = [
                text
                for index in range(count)
                for _, _, texts in read_chunks(FileSegment(str(file), index, count), "text")
                for text in texts
            ]
            assert streamed == [row["text"] or "" for row in expected]
