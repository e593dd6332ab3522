"""Bad input ends with one sentence that names the fault and the remedy, before training where possible.

Nothing that was trained is lost or overwritten.
"""

import gzip
import hashlib
import importlib.util
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
from collections import namedtuple
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
import yaml
from conftest import MODELS, ROOT, make_text, recipe_arguments, run_recipe, weights
from safetensors.torch import load_file

from unlabeled import UserError
from unlabeled.config import DataArguments, ModelArguments, PretrainingArguments, SourceArguments, parse_arguments
from unlabeled.data.files import ENDINGS
from unlabeled.models.losses import ChunkedLinearCrossEntropy
from unlabeled.runtime.checkpoints import find_checkpoints

MODEL_TYPE = {"clm": "llama", "mlm": "bert"}


@pytest.fixture
def start(corpus, tokenizers, tmp_path, monkeypatch):
    """Run a small recipe with changed options; a value of None removes the option."""
    # Sampling takes longer than all the rest of such a run.
    monkeypatch.setattr(transformers.GenerationMixin, "generate", lambda self, ids, **options: ids)

    def run(objective: str = "clm", output_dir=None, **options) -> Path:
        output_dir = output_dir or tmp_path / "run"
        model_type = options.get("model_type") or MODEL_TYPE[objective]
        sizes = {"config_overrides": json.dumps(MODELS[MODEL_TYPE[objective]])}
        options = {"model_type": model_type} | sizes | options
        arguments = recipe_arguments(objective, MODEL_TYPE[objective], corpus, tokenizers, output_dir)
        options = dict(zip(arguments[::2], arguments[1::2], strict=True)) | {f"--{k}": v for k, v in options.items()}
        given = [word for key, value in options.items() if value is not None for word in (key, str(value))]
        run_recipe(f"pretrain_{objective}", given)
        return Path(output_dir)

    return run


@pytest.fixture
def refused(start, tmp_path, capfd):
    """Run a recipe that refuses its input, and return the message. Nothing was trained, written or logged."""

    def run(objective: str = "clm", **options) -> str:
        before = hashes(tmp_path)
        with pytest.raises(UserError) as error:
            start(objective, **options)
        assert hashes(tmp_path) == before, "nothing is written, nothing is overwritten"
        assert "\n" not in str(error.value), "one line"
        out, err = capfd.readouterr()
        assert "loss" not in out, "before training"
        assert not [line for line in err.split("\n") if line.strip() and "Loading weights" not in line], "it is alone"
        return str(error.value)

    return run


def hashes(folder) -> dict[str, str]:
    """The SHA-256 of every file below a folder."""
    files = (path for path in sorted(Path(folder).rglob("*")) if path.is_file() and not path.is_symlink())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# --- Text ------------------------------------------------------------------------------------------------------------

GOOD = b'{"text": "the of and to a in that is"}\n'
SPOILT = {
    "empty.txt": (b"", "{file} is empty; remove it or put text into it"),
    "empty.jsonl": (b"", "{file} is empty; remove it or put text into it"),
    "empty.parquet": (b"", "{file} is empty; remove it or put text into it"),
    "blank.txt": (b" \n\t\n ", "{file} has no text; leave it out"),
    "blank.jsonl": (b'{"text": " "}\n{"text": ""}\n{"text": null}\n', "{file} has no text; leave it out"),
    "lines.jsonl": (b"\n\n\n", "{file} has no rows; remove it or put text into it"),
    "header.csv": (b"text,id\n", "{file} has no rows; remove it or put text into it"),
    "binary.txt": (b"one\0two", "{file} is binary, not text (a NUL at character 3); leave it out"),
    "program.txt": (b"\x7fELF\x01\xff", "{file} is not UTF-8 text (byte 5); convert it, for example with iconv"),
    "latin.txt": ("café".encode("latin-1"), "{file} is not UTF-8 text (byte 3); convert it, for example with iconv"),
    "utf16.txt": ("one two".encode("utf-16"), "{file} is not UTF-8 text (byte 0); convert it, for example with iconv"),
    "latin.jsonl": (
        GOOD * 3 + '{"text": "café"}\n'.encode("latin-1"),
        "line 4 of {file} is not UTF-8 text (byte 13); convert it, for example with iconv",
    ),
    "latin.csv": (
        "text\ncafé\n".encode("latin-1"),
        "line 2 of {file} is not UTF-8 text (byte 3); convert it, for example with iconv",
    ),
    "torn.jsonl": (GOOD + GOOD[:-12], "line 2 of {file} is not valid JSON (*); repair it or leave it out"),
    "prose.jsonl": (b"not json\n", "line 1 of {file} is not valid JSON (*); repair it or leave it out"),
    "twice.jsonl": (
        b'{"text": "a", "text": "b"}\n',
        "line 1 of {file} is not valid JSON (the key 'text' occurs twice); repair it or leave it out",
    ),
    "list.jsonl": (
        GOOD + b"5\n",
        "line 2 of {file} holds int, not an object with columns; correct it or leave it out",
    ),
    "torn.json": (b'[{"text": "a"}, {"te', "{file} is not valid JSON after 1 rows (*); repair it or leave it out"),
    "tail.json": (b'[{"text": "a"}] {}', "{file} is not valid JSON after 1 rows (*); repair it or leave it out"),
    "pretty.json": (b'{\n "text": "a"\n}\n{}', "{file} is not valid JSON (*); repair it or leave it out"),
    "latin.json": (
        '[{"text": "a"}, {"text": "café"}]'.encode("latin-1"),
        "{file} is not UTF-8 text (after 0 rows); convert it, for example with iconv",
    ),
    "binary.jsonl": (bytes(range(256)), "line 1 of {file} is binary, not text (a NUL at character 0); leave it out"),
    "torn.csv": (
        b'text\n"one\n',
        "line 2 of {file} is not valid .csv (unexpected end of data); enclose texts that contain quotes in quotes, and "
        "double those inside",
    ),
    "quotes.csv": (
        b'text\n"one" two\n',
        "line 2 of {file} is not valid .csv (*); enclose texts that contain quotes in quotes, and double those inside",
    ),
    "twice.csv": (b"text,text\na,b\n", "{file} has 2 columns with the name 'text'; rename all but one of them"),
    "few.tsv": (
        b"id\ttext\n1\ta\n2\n",
        "row 1 of {file} (line 3) has 1 fields and the header 2; quote texts that contain delimiters, quotes or line "
        "breaks",
    ),
    "torn.jsonl.gz": (
        gzip.compress(GOOD * 100)[:-9],
        "{file} cannot be read as gzip after *; repair it or leave it out",
    ),
    "foreign.txt.zst": (b"one", "{file} cannot be read (*); repair it or leave it out"),
    "commas.csv": (
        b"text\none, two\n",
        "row 0 of {file} (line 2) has 2 fields and the header 1; quote texts that contain delimiters, quotes or line "
        "breaks",
    ),
    "commas_later.csv": (
        b"text\none\ntwo, three\n",
        "row 1 of {file} (line 3) has 2 fields and the header 1; quote texts that contain delimiters, quotes or line "
        "breaks",
    ),
    "column.jsonl": (
        b'{"content": "one", "id": 1}\n',
        "row 0 of {file} has no column 'text'; set text_column to one of: content, id",
    ),
    "column.csv": (
        b"content,id\none,1\n",
        "row 0 of {file} has no column 'text'; set text_column to one of: content, id",
    ),
    "number.jsonl": (
        GOOD[:-1] + b'\n{"text": 5}\n',
        "column 'text' in row 1 of {file} holds int, not text; set text_column to a column of text",
    ),
    "nested.jsonl": (
        b'{"text": {"a": "b"}}\n',
        "column 'text' in row 0 of {file} holds dict, not text; set text_column to a column of text",
    ),
    "text.docx": (b"one", f"{{file}} ends in none of {ENDINGS}; convert it to one of them"),
    "text": (b"one", f"{{file}} ends in none of {ENDINGS}; convert it to one of them"),
}


def matches(message: str, pattern: str) -> bool:
    """Whether a message matches a pattern, in which * stands for the words of a library."""
    start, *rest = pattern.split("*")
    return message.startswith(start) and (message == start if not rest else message.endswith(rest[0]))


@pytest.mark.parametrize("name", SPOILT)
def test_spoilt_text(name, refused, tmp_path):
    content, sentence = SPOILT[name]
    file = tmp_path / name
    file.write_bytes(content)
    message = refused(train_data=file)
    assert matches(message, sentence.replace("{file}", str(file))), message


@pytest.mark.parametrize("fault", ["torn", "damaged", "without rows", "without text"])
def test_spoilt_parquet(fault, refused, tmp_path):
    file = tmp_path / "text.parquet"
    pq.write_table(pa.table({"text": pa.array([] if fault == "without rows" else ["one two"] * 1000)}), file)
    whole, reading = file.read_bytes(), f"{file} cannot be read as parquet after 0 rows (*); repair it or leave it out"
    if fault == "torn":
        file.write_bytes(whole[: len(whole) // 2])
    elif fault == "damaged":
        file.write_bytes(whole[:20] + b"\xff" * 100 + whole[120:])
    elif fault == "without text":
        pq.write_table(pa.table({"text": [b"one"]}), file)
        reading = f"column 'text' in row 0 of {file} holds bytes, not text; set text_column to a column of text"
    else:
        reading = f"{file} has no rows; remove it or put text into it"
    message = refused(train_data=file)
    assert matches(message, reading), message


@pytest.mark.parametrize(("path", "sentence"), [
    ("{tmp}/a.txt", "no file matches {tmp}/a.txt; check the path, or fetch the demo text with `make demo-data`"),
    ("{tmp}/*.txt", "no file matches {tmp}/*.txt; check the path, or fetch the demo text with `make demo-data`"),
    ("{tmp}", f"no {ENDINGS} file in the folder {{tmp}}"),
    ("no-such/data-set", "no-such/data-set is neither a local file nor a data set that the Hub lets you read "
                         "(OfflineModeIsEnabled); check the name, the network and HF_TOKEN"),
])  # fmt: skip
def test_missing_text(path, sentence, refused, tmp_path):
    assert refused(train_data=path.format(tmp=tmp_path)) == sentence.format(tmp=tmp_path)


def test_unreadable_file(refused, tmp_path):
    """Root may read everything, so the file is a link to something that no user can read."""
    file = tmp_path / "text.txt"
    file.symlink_to("/proc/self/mem")
    if not os.path.isfile("/proc/self/mem"):
        pytest.skip("only Linux has such a file")
    assert refused(train_data=file) == f"cannot read {file} (Input/output error); make it readable or leave it out"


def test_spoilt_held_out_text(refused, tmp_path):
    blank = tmp_path / "blank.jsonl"
    blank.write_text('{"text": " "}\n')
    assert refused(eval_data=blank) == "there is no validation text; set eval_data to text that is not empty"


@pytest.mark.parametrize(("fraction", "sentence"), [
    (1e-9, "eval_fraction 1e-09 holds out none of the {}; raise it, or set eval_data"),
    (1 - 1e-9, "eval_fraction 0.999999999 holds out all of the {}; lower it, or set eval_data"),
])  # fmt: skip
def test_invalid_eval_fraction(fraction, sentence, refused, tokenizers, tmp_path):
    """In every recipe the message names the key, and not the data."""
    from unlabeled.data.chat_templates import set_chat_template
    from unlabeled.data.labeled_rows import read_task
    from unlabeled.data.pairs import read_pairs
    from unlabeled.data.preferences import prepare_pairs
    from unlabeled.data.preparing import prepare
    from unlabeled.data.sources import Source
    from unlabeled.data.tokenization import load_tokenizer

    assert refused(eval_data=None, eval_fraction=fraction) == sentence.format("400 documents")
    row = {"text": "the king", "label": "a", "words": ["the", "king"], "tags": ["a", "b"], "anchor": "the king",
           "positive": "of men", "prompt": "who", "chosen": "he", "rejected": "she", "completion": "he"}  # fmt: skip
    file = tmp_path / "rows.jsonl"
    rows = [row, row | {"text": "the queen", "label": "b", "anchor": "a queen", "positive": "in it", "prompt": "what"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = load_tokenizer(tokenizers["clm"])
    sources = [Source(str(file))]
    data_args = SourceArguments(train_data=str(file), eval_fraction=fraction)

    def message(function, *arguments, **options) -> str:
        with pytest.raises(UserError) as error:
            function(*arguments, **options)
        return str(error.value)

    found = message(prepare, sources, [], tokenizer, "sft", 64, str(tmp_path / "prepared"), fraction)
    assert found == sentence.format("2 documents")
    labeled = {"tokenizer": tokenizer, "max_length": 64, "eval_fraction": fraction}
    found = message(read_task, sources, [], [], ["text"], "label", False, **labeled)
    assert found == sentence.format("2 examples")
    found = message(read_task, sources, [], [], ["words"], "tags", True, **labeled)
    assert found == sentence.format("2 examples")
    assert message(read_pairs, data_args, tokenizer, 64) == sentence.format("2 pairs")
    set_chat_template(tokenizer, "recipes/templates/chatml.jinja")
    assert message(prepare_pairs, sources, [], tokenizer, 64, fraction) == sentence.format("2 pairs")


@pytest.mark.parametrize("key", ["train_data", "eval_data"])
def test_text_of_unknown_characters(key, refused, tmp_path):
    greek = tmp_path / "greek.txt"
    greek.write_text("αβγ δεζ " * 100)
    name = {"train_data": "train", "eval_data": "validation"}[key]
    sentence = f"the tokenizer knows no token of the {name} text; choose one made from such text"
    assert refused("mlm", **{key: greek}) == sentence


def test_csv_cell_na(tmp_path):
    from unlabeled.data.readers import read_documents
    from unlabeled.data.sources import Source

    file = tmp_path / "text.csv"
    file.write_text('text,id\nNA,1\n"one, two",2\n,3\nnull,4\n')
    assert list(read_documents(Source(str(file)))) == ["NA", "one, two", "", "null"]


def test_fingerprint_of_equal_file_names(tmp_path):
    """A fingerprint without one of them would find prepared data of the other."""
    from unlabeled.data.identity import identity
    from unlabeled.data.sources import Source

    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "text.txt").write_text(folder)
    before = identity(Source(str(tmp_path)))
    assert len(before["files"]) == 2
    (tmp_path / "a" / "text.txt").write_text("another")
    assert identity(Source(str(tmp_path))) != before


@pytest.mark.parametrize(("source", "sentence"), [
    ("5", "5 is neither a local file nor a data set that the Hub lets you read (OfflineModeIsEnabled); "
          "check the name, the network and HF_TOKEN"),
    ("[5]", "train_data: 5 is neither a path nor a mapping with a path"),
    ("{weight: 1}", "train_data: {'weight': 1} is neither a path nor a mapping with a path"),
    ("{path: a.txt, wieght: 2}", "train_data: a source has no field 'wieght'; did you mean 'weight'?"),
    ("{path: a.txt, weight: two}", "train_data: weight of the source 'a.txt' is 'two'; correct it"),
    ("{path: a.txt, weight: 0}", "train_data: the weight of a.txt is 0; give each source a positive weight"),
    ("{path: 5}", "train_data: path of the source 5 is 5; correct it"),
    ("[{path: a.txt", "train_data is not valid YAML; correct it: *"),
])  # fmt: skip
def test_invalid_sources(source, sentence, refused):
    assert matches(refused(train_data=source), sentence)


def test_warning_of_small_corpus(start, tmp_path, capsys):
    file = tmp_path / "small.txt"
    file.write_text("the of and")
    start(train_data=file)
    out = capsys.readouterr().out
    assert "1,024 tokens = 32.00 epochs" in out
    assert (
        "WARNING    the text fills 1 rows and a batch takes 8: each batch repeats the text 8.0 times; add text, or "
        "lower batch_tokens"
    ) in out


# --- Tokenizer and model ---------------------------------------------------------------------------------------------


def test_unsuitable_tokenizer(refused, tokenizers, tmp_path):
    from transformers import AutoTokenizer

    advice = "name such a token in its tokenizer_config.json, or make a tokenizer with scripts/train_tokenizer.py"
    for objective, other, algorithm, lacks in (("clm", "mlm", "bpe", "eos"), ("mlm", "clm", "wordpiece", "mask")):
        name = tokenizers[other]
        sentence = f"the tokenizer {name} lacks {lacks}, which {objective} needs; {advice} --algorithm {algorithm}"
        assert refused(objective, tokenizer_name_or_path=name) == sentence
    bare = AutoTokenizer.from_pretrained(tokenizers["mlm"])
    bare.cls_token = bare.sep_token = None
    bare.save_pretrained(tmp_path / "bare")
    message = refused("mlm", tokenizer_name_or_path=tmp_path / "bare")
    assert message.startswith(f"the tokenizer {tmp_path / 'bare'} lacks cls (or bos) and sep (or eos), which mlm needs")


def test_missing_tokenizer(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    remedy = "set another, or make one with scripts/train_tokenizer.py"
    sentence = f"tokenizer_name_or_path: there is no folder {tmp_path}/none; {remedy}"
    assert refused(tokenizer_name_or_path=tmp_path / "none") == sentence
    message = refused(tokenizer_name_or_path=tmp_path / "empty")
    assert matches(message, f"tokenizer_name_or_path: no tokenizer in {tmp_path}/empty (*); {remedy}")


@pytest.mark.parametrize(("objective", "options", "sentence"), [
    ("clm", {"model_type": "lama"}, "model_type 'lama' is unknown to transformers; did you mean 'llama'?"),
    ("clm", {"config_overrides": "{hiden_size: 32}"},
     "config_overrides: llama has no 'hiden_size'; did you mean 'hidden_size'?"),
    ("clm", {"config_overrides": "{hidden_size: big}"},
     "config_overrides: Validation error for field 'hidden_size': *expected int, got str (value: 'big')"),
    ("clm", {"config_overrides": "{vocab_size: 5}"},
     "config_overrides: vocab_size 5 is smaller than the tokenizer's 384; remove it"),
    ("clm", {"config_overrides": "hidden_size"},
     "config_overrides is no mapping; write it as '{\"hidden_size\": 192}'"),
    ("clm", {"config_overrides": "{hidden_size: "}, "config_overrides is not valid YAML; correct it: *"),
    ("mlm", {"config_overrides": "{hidden_size: 32, num_attention_heads: 5}"},
     "no model of model_type bert can be made (The hidden size (32) is not a multiple of the number of attention heads "
     "(5)); correct model_type, config_overrides or attn_implementation"),
    ("mlm", {"config_overrides": "{max_position_embeddings: 16}"},
     "max_length 32 is longer than the model's 16 positions; lower it, or raise max_position_embeddings in "
     "config_overrides"),
    ("clm", {"model_type": "t5", "config_overrides": None}, "no model of model_type t5 can be made (Unrecognized *"),
    ("mlm", {"model_type": "llama", "config_overrides": None},
     "no model of model_type llama can be made (Unrecognized *"),
    ("clm", {"model_type": "jamba", "config_overrides": "{num_hidden_layers: 2, hidden_size: 32}",
             "attn_implementation": "eager"},
     "model_type jamba is not supported: FLOPs per token are not defined for layers of type linear_attention; choose "
     "another"),
    ("mlm", {"model_type": "deberta-v2", "config_overrides": "{num_hidden_layers: 1, hidden_size: 48}",
             "attn_implementation": "eager"},
     "DebertaV2ForMaskedLM cannot read packed documents (*); choose another model_type"),
    ("mlm", {"model_type": "roberta", "config_overrides": "{num_hidden_layers: 1, hidden_size: 48}"},
     "RobertaForMaskedLM with attn_implementation sdpa leaks between packed documents (a packed document differs from "
     "the same document alone); set attn_implementation to sdpa, or isolate_documents to false"),
    ("clm", {"attn_implementation": "spda"},
     "no model of model_type llama can be made (Specified `attn_implementation=\"spda\"` is not supported); correct "
     "model_type, config_overrides or attn_implementation"),
    ("clm", {"model_type": None, "config_overrides": None, "model_name_or_path": "/no/such"},
     "model_name_or_path: there is no folder /no/such; correct the path"),
    ("clm", {"model_type": None, "config_overrides": None, "model_name_or_path": "no/such"},
     "model_name_or_path no/such cannot be loaded (*); set it to a folder or a model of the Hub that this objective "
     "can continue"),
    ("clm", {"model_type": None, "config_overrides": None},
     "set either model_type (from scratch) or model_name_or_path (continued), and not both"),
    ("clm", {"model_name_or_path": "/no/such"},
     "set either model_type (from scratch) or model_name_or_path (continued), and not both"),
    ("clm", {"tokenizer_name_or_path": None},
     "set tokenizer_name_or_path; scripts/train_tokenizer.py makes a tokenizer from your text"),
])  # fmt: skip
def test_invalid_model(objective, options, sentence, refused):
    message = refused(objective, **options)
    assert matches(message, sentence), message


def test_row_longer_than_positions(finished, refused):
    sizes = {"model_name_or_path": finished, "model_type": None, "config_overrides": None}
    message = refused(**sizes, max_length=4096, batch_tokens=32768, train_tokens=32768)
    assert message == (
        "max_length 4096 is longer than the model's 2048 positions; lower it, or raise max_position_embeddings in "
        "config_overrides"
    )


def test_broken_weights(finished, refused, tmp_path):
    shutil.copytree(finished, tmp_path / "broken")
    os.truncate(tmp_path / "broken" / "model.safetensors", 5000)
    options = {"model_type": None, "config_overrides": None, "model_name_or_path": tmp_path / "broken"}
    message, remedy = refused(**options), "set it to a folder or a model of the Hub that this objective can continue"
    assert matches(message, f"model_name_or_path {tmp_path}/broken cannot be loaded (*); {remedy}"), message


# --- Keys and values -------------------------------------------------------------------------------------------------

BASE = {
    "model_type": "llama", "tokenizer_name_or_path": "t", "train_data": "a.txt", "eval_data": "b.txt", "use_cpu": True,
    "max_length": 32, "train_tokens": 1024, "batch_tokens": 256, "per_device_train_batch_size": 8, "precision": "fp32",
}  # fmt: skip


@pytest.fixture
def parsed(tmp_path, monkeypatch):
    """Parse a YAML of BASE with changes, and a command line."""
    monkeypatch.chdir(tmp_path)

    def read(*args: str, text: str | bytes | None = None, without: tuple[str, ...] = (), **keys):
        content = yaml.safe_dump({k: v for k, v in (BASE | keys).items() if k not in without}) if text is None else text
        Path("run.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
        arguments = ["--config", "run.yaml", *args]
        return parse_arguments(ModelArguments, DataArguments, PretrainingArguments, args=arguments)

    return read


@pytest.mark.parametrize(("text", "sentence"), [
    ("", "run.yaml holds no keys; see recipes/configs/ for examples"),
    ("# nothing\n", "run.yaml holds no keys; see recipes/configs/ for examples"),
    ("- model_type\n", "run.yaml holds no keys; see recipes/configs/ for examples"),
    ("model_type: [llama\n", "run.yaml is not valid YAML; correct it: *"),
    ("model_type:\n\tllama", "run.yaml is not valid YAML; correct it: *line 2*"),
    (b"\0\0", "run.yaml is not valid YAML; correct it: *"),
    ("train_data: café".encode("latin-1"), "run.yaml is not UTF-8 text (byte 15); convert it, for example with iconv"),
    ("trian_tokens: 5", "run.yaml: unknown key 'trian_tokens'; did you mean 'train_tokens'?"),
    ("model: gpt2", "run.yaml: unknown key 'model'; did you mean 'model_type'?"),
    ("1: 2", "run.yaml: unknown key 1; did you mean *?"),
    ("env: 3", "run.yaml: `env` field should be a dict in the YAML file."),
])  # fmt: skip
def test_invalid_yaml(text, sentence, parsed):
    with pytest.raises(UserError) as error:
        parsed(text=text)
    start, *rest = sentence.split("*")
    assert str(error.value).startswith(start) and all(part in str(error.value) for part in rest)
    assert rest or str(error.value) == sentence


@pytest.mark.parametrize(("keys", "sentence"), [
    ({"learning_rate": "fast"}, "learning_rate: invalid float value: 'fast'; see --help"),
    ({"learning_rate": [1, 2]}, "learning_rate takes a number, not [1, 2]"),
    ({"learning_rate": True}, "learning_rate takes a number, not True"),
    ({"learning_rate": None}, "learning_rate has no value; give it one, or remove the key"),
    ({"learning_rate": -1.0}, "learning_rate is -1.0; set it to at least 0"),
    ({"learning_rate": float("nan")}, "learning_rate is nan; set it to at least 0"),
    ({"train_tokens": "many"}, "train_tokens: invalid int value: 'many'; see --help"),
    ({"train_tokens": 1024.5}, "train_tokens takes a whole number, not 1024.5"),
    ({"train_tokens": "1.5e0"}, "train_tokens: invalid int value: '1.5e0'; see --help"),
    ({"train_tokens": True}, "train_tokens takes a whole number, not True"),
    ({"train_tokens": [1024]}, "train_tokens takes a whole number, not [1024]"),
    ({"train_tokens": None}, "set train_tokens: budgets are in tokens"),
    ({"train_tokens": 1000},
     "train_tokens 1000 does not divide into steps of batch_tokens 256; the nearest values are 768 and 1024"),
    ({"train_tokens": -5},
     "train_tokens -5 does not divide into steps of batch_tokens 256; the nearest values are 256 and 512"),
    ({"batch_tokens": 300},
     "batch_tokens 300 does not divide into rows of max_length 32 x per_device_train_batch_size 8 x 1 process; the "
     "nearest values are 256 and 512"),
    ({"max_length": 0}, "max_length 0 is not a size; it must be at least 1"),
    ({"per_device_train_batch_size": 0}, "per_device_train_batch_size 0 is not a size; it must be at least 1"),
    ({"per_device_eval_batch_size": 0}, "per_device_eval_batch_size is 0; set it to at least 1"),
    ({"isolate_documents": 3}, "isolate_documents takes true or false, not 3"),
    ({"isolate_documents": "maybe"}, "isolate_documents: Truthy value expected: got maybe but expected *"),
    ({"lr_scheduler_type": "cosin"}, "lr_scheduler_type: 'cosin' is none of linear, cosine, *"),
    ({"eval_strategy": "stepz"}, "eval_strategy: 'stepz' is none of no, steps, epoch"),
    ({"warmup_steps": -1}, "Got warmup_steps = -1, Expected value warmup_steps >= 0"),
    ({"warmup_steps": 0.9, "decay_fraction": 0.5, "lr_scheduler_type": "warmup_stable_decay"},
     "warmup_steps and decay_fraction take more than 4 steps; lower one of them"),
    ({"decay_fraction": 2.0}, "decay_fraction is 2.0; set it to at least 0 and below 1"),
    ({"adam_beta2": 1.0}, "adam_beta2 is 1.0; set it to at least 0 and below 1"),
    ({"seed": -1}, "seed is -1; set it to at least 0 and below 4294967296"),
    ({"save_total_limit": 0}, "save_total_limit is 0; set it to at least 1"),
    ({"precision": "fp16"}, "precision: 'fp16' is none of auto, bf16, fp32"),
    ({"compile": "maybe"}, "compile: 'maybe' is none of auto, true, false"),
    ({"bf16": True}, "remove bf16: set precision instead"),
    ({"optim": "sgd"}, "remove optim: set optimizer instead"),
    ({"label_smoothing_factor": 0.1}, "remove label_smoothing_factor: the loss is plain cross entropy"),
    ({"max_steps": 5}, "remove max_steps: it follows from train_tokens and batch_tokens"),
    ({"num_train_epochs": 5}, "remove num_train_epochs: it follows from train_tokens"),
    ({"resume_from_checkpoint": "x"},
     "remove resume_from_checkpoint: the same command again resumes from the newest complete checkpoint"),
    ({"remove_unused_columns": True}, "remove remove_unused_columns: collators need every column"),
    ({"logging_nan_inf_filter": True}, "remove logging_nan_inf_filter: a NaN must show"),
    ({"report_to": "tensorboad"}, "report_to: tensorboad is not installed; choose from none, *"),
    ({"optimizer": "adam"}, "optimizer 'adam' is unknown; set it to adamw or muon"),
    ({"optimizer": "muon", "deepspeed": str(ROOT / "ds_configs" / "zero2.json")},
     "optimizer muon needs whole matrices and DeepSpeed ZeRO shards them; set optimizer to adamw, or use DDP"),
    ({"deepspeed": "no.json"}, "deepspeed: cannot read no.json (*'no.json'); ds_configs/ has some"),
    ({"train_data": None}, "set train_data to text: a file, a folder, a glob or the name of a data set on the Hub"),
    ({"eval_data": None}, "set either eval_data or an eval_fraction between 0 and 1, so that some text is held out"),
    ({"eval_fraction": 0.1}, "set either eval_data or an eval_fraction between 0 and 1, so that some text is held out"),
    ({"eval_data": None, "eval_fraction": 1.5},
     "set either eval_data or an eval_fraction between 0 and 1, so that some text is held out"),
])  # fmt: skip
def test_invalid_values(keys, sentence, parsed):
    with pytest.raises(UserError) as error:
        parsed(**keys)
    assert matches(str(error.value), f"run.yaml: {sentence}"), str(error.value)


@pytest.mark.parametrize(("args", "sentence"), [
    (["--learning_rat", "1"], "unknown option --learning_rat; did you mean --learning_rate?"),
    (["--trian-tokens=5"], "unknown option --trian-tokens; did you mean --train_tokens?"),
    (["--learning_rate"], "run.yaml: learning_rate: expected one argument; see --help"),
    (["--learning_rate", "fast"], "run.yaml: learning_rate: invalid float value: 'fast'; see --help"),
    (["--lr_scheduler_type", "cosin"], "run.yaml: lr_scheduler_type: invalid choice: 'cosin' *; see --help"),
    (["surplus"], "run.yaml: Some specified arguments are not used by the HfArgumentParser: ['surplus']"),
])  # fmt: skip
def test_invalid_options(args, sentence, parsed):
    with pytest.raises(UserError) as error:
        parsed(*args)
    assert matches(str(error.value), sentence), str(error.value)


@pytest.mark.parametrize(("args", "sentence"), [
    (["run.yaml"], "unexpected 'run.yaml'; a YAML file goes after --config"),
    (["--config"], "--config needs the path of a YAML file; recipes/configs/ has some"),
    (["--config", "no.yaml"], "cannot read --config no.yaml: No such file or directory; recipes/configs/ has examples"),
    (["--config=no.yaml"], "cannot read --config no.yaml: No such file or directory; recipes/configs/ has examples"),
    (["--config", "."], "cannot read --config .: Is a directory; recipes/configs/ has examples"),
    ([], "set either model_type (from scratch) or model_name_or_path (continued), and not both"),
])  # fmt: skip
def test_missing_yaml(args, sentence):
    with pytest.raises(UserError) as error:
        parse_arguments(ModelArguments, DataArguments, PretrainingArguments, args=args)
    assert str(error.value) == sentence


def test_equivalent_values(parsed):
    """An integer may be written as 1e9, and the `no` of YAML is the choice "no"."""
    for tokens in (1024.0, "1024", "1.024e3", "1_024"):
        value = parsed(train_tokens=tokens)[2].train_tokens
        assert value == 1024 and type(value) is int
    assert parsed("--train_tokens", "2.56e3")[2].train_tokens == 2560
    assert parsed(text=yaml.safe_dump(BASE) + "batch_tokens: 1.024e+3\neval_strategy: no\n")[2].batch_tokens == 1024
    assert parsed(learning_rate="1e-3")[2].learning_rate == parsed("--learning-rate=0.001")[2].learning_rate == 1e-3
    taken_back = parsed("--max_tokens", "null", "--save_total_limit", "null", max_tokens=5, save_total_limit=2)
    assert taken_back[1].max_tokens is None and taken_back[2].save_total_limit is None  # also at the very end


def test_invalid_world_size(parsed, monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError) as error:
        parsed(batch_tokens=512)
    launch = "launch with torchrun, or with an accelerate file from ds_configs/"
    assert str(error.value) == f"run.yaml: WORLD_SIZE is 2 but MASTER_ADDR is not set; {launch}"
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError) as error:
        parsed()
    assert str(error.value) == (
        "run.yaml: batch_tokens 256 does not divide into rows of max_length 32 x per_device_train_batch_size 8 x 3 "
        "processes; the nearest values are 768 and 1536"
    )


def test_muon_with_deepspeed_launcher(parsed, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(
        UserError, match=r"^run.yaml: optimizer muon needs whole matrices and DeepSpeed ZeRO shards them"
    ):
        parsed(optimizer="muon")


def test_invalid_deepspeed_file(parsed, tmp_path):
    (tmp_path / "ds.json").write_text('{"zero_optimization": ')
    with pytest.raises(UserError) as error:
        parsed(deepspeed="ds.json")
    assert matches(str(error.value), "run.yaml: deepspeed: cannot read ds.json (Expecting *); ds_configs/ has some")


@pytest.mark.parametrize(("options", "sentence"), [
    ({"lr_scheduler_type": "cosine_with_min_lr"},
     "lr_scheduler_type cosine_with_min_lr: *; correct lr_scheduler_kwargs"),
    ({"lr_scheduler_kwargs": '{"cycles": 1}'}, "lr_scheduler_type cosine: *'cycles'; correct lr_scheduler_kwargs"),
])  # fmt: skip
def test_invalid_schedule(options, sentence, refused):
    assert matches(refused(**options), sentence)


def test_preparation_options(refused):
    sentence = "max_length {} has no room for a target beside its frame; set it to {} or more"
    assert refused(max_length=1, batch_tokens=8, train_tokens=8) == sentence.format(1, 2)
    assert refused("mlm", max_length=2, batch_tokens=16, train_tokens=16) == sentence.format(2, 3)
    assert refused(max_tokens=0) == "max_tokens is 0; set it to 1 or more, or remove it"
    assert refused("mlm", mlm_probability=1.5) == "mlm_probability is 1.5; set it above 0 and at most 1"
    sentence = "mask_replace_prob and random_replace_prob are shares of the targets; let their sum be at most 1"
    assert refused("mlm", mask_replace_prob=0.9, random_replace_prob=0.2) == sentence


def test_preparation_script(corpus, tokenizers, tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("prepare_data", ROOT / "scripts" / "prepare_data.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    arguments = recipe_arguments("clm", "llama", corpus, tokenizers, tmp_path / "run")
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", *arguments])
    with pytest.raises(UserError, match=r"^objective None is none of clm, mlm, span; set --objective$"):
        script.main()
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", *arguments, "--objective", "mlm"])
    with pytest.raises(UserError, match=r"^the tokenizer .* lacks mask, which mlm needs"):
        script.main()


def test_lineage_without_hub_token(parsed):
    from unlabeled.reporting.lineage import non_default_arguments

    arguments = parsed()
    arguments[-1].hub_token = "secret"  # as code that uses the dataclasses may set it
    assert "hub_token" not in non_default_arguments(*arguments)


# --- Folders and disks -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(corpus, tokenizers, tmp_path_factory):
    """An uninterrupted run of four steps with a checkpoint every two steps."""
    folder = tmp_path_factory.mktemp("finished")
    run_recipe("pretrain_clm", recipe_arguments("clm", "llama", corpus, tokenizers, folder, save_steps=2))
    return folder


@pytest.fixture
def unfinished(finished, tmp_path):
    """A copy of the finished run as if it had been killed after its last checkpoint."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    for path in folder.iterdir():
        if path.is_file() and path.name != "run.json":
            path.unlink()
    return folder


@contextmanager
def largest_file(size: int):
    """No file may grow beyond `size` bytes, which has the effect of a full disk or a quota."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_output_dir_below_a_file(refused, tmp_path):
    (tmp_path / "file").write_text("mine")
    sentence = f"cannot write to output_dir {tmp_path}/file/run (Not a directory); set it to another folder"
    assert refused(output_dir=tmp_path / "file" / "run") == sentence
    sentence = f"cannot write to output_dir {tmp_path}/file (File exists); set it to another folder"
    assert refused(output_dir=tmp_path / "file") == sentence
    sentence = f"cannot write prepared data to {tmp_path}/file (File exists); set prepared_dir"
    assert refused(prepared_dir=tmp_path / "file") == sentence


@pytest.mark.parametrize(
    "name", ["model.safetensors", "pytorch_model.bin", "config.json", "README.md", "checkpoint-9/x"]
)
def test_output_dir_of_another_program(name, refused, tmp_path):
    stranger = tmp_path / "run" / name
    stranger.parent.mkdir(parents=True)
    stranger.write_bytes(b"somebody's work")
    named = stranger.parent if "/" in name else stranger
    assert refused() == f"{named} was not written by this run; set output_dir to another folder"


@pytest.mark.parametrize(("options", "key", "was", "now"), [
    ({"learning_rate": 0.5}, "learning_rate", "its default", "0.5"),
    ({"seed": 7}, "seed", "its default", "7"),
    ({"train_tokens": 2048}, "train_tokens", "1024", "2048"),
    ({"isolate_documents": "false"}, "isolate_documents", "its default", "false"),
])  # fmt: skip
def test_output_dir_of_another_run(options, key, was, now, unfinished, refused):
    sentence = (
        f"{unfinished} holds a run with {key} {was}, not {now}; set output_dir to another folder, or the key back"
    )
    assert refused(save_steps=2, **options) == sentence


def test_output_dir_of_another_text(unfinished, refused, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"text": text}) + "\n" for text in make_text(50, seed=5)))
    assert refused(save_steps=2, train_data=other) == (
        f"{unfinished} holds a run on another text than train_data, eval_data and test_data have now, or one that was "
        "prepared in another way; set output_dir to another folder, or put the text back"
    )


def test_finished_run_unchanged(finished, start, capsys):
    before = hashes(finished)
    start(output_dir=finished, save_steps=2)
    assert f"{finished} holds this run, finished; delete the folder to train again" in capsys.readouterr().out
    assert hashes(finished) == before


def test_damaged_run_file(refused, unfinished):
    (unfinished / "run.json").write_text("{")
    sentence = f"{unfinished}/run.json is damaged, so what this run was is not known; set output_dir to another folder"
    assert refused(save_steps=2) == sentence


def test_disk_too_small_for_checkpoints(start, refused, unfinished, tmp_path, monkeypatch):
    """Refused before training: the disk has to hold two checkpoints and the one being written, less existing ones."""
    Usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(10**9, 10**9 - 10**6, 10**6))
    remedy = "free some space, or lower save_total_limit"
    with pytest.raises(UserError) as error:
        start(output_dir=tmp_path / "new", save_steps=2)
    held = sum(path.stat().st_size for path in unfinished.rglob("checkpoint-*/*"))
    needed = 3 * 3 * 4 * 45_216 / 1e6  # fp32 weights and two moments
    said = f"the disk of output_dir {tmp_path}/new has 1.0 MB free and the checkpoints need {needed:.1f} MB; {remedy}"
    assert str(error.value) == said
    assert find_checkpoints(str(tmp_path / "new")) == []
    assert held > 2 * 500_000
    start(output_dir=unfinished, save_steps=2)
    assert (unfinished / "metrics.json").exists(), "two of three are there already"


def test_full_disk_during_preparation(corpus, start, tmp_path):
    with largest_file(20_000), pytest.raises(UserError) as error:
        start(prepared_dir=tmp_path / "prepared")
    sentence = f"cannot write prepared data to {tmp_path}/prepared (*); make room, or set prepared_dir"
    assert matches(str(error.value), sentence) and "File too large" in str(error.value)
    assert list((tmp_path / "prepared").iterdir()) == [], "nothing half-written stays"


def test_damaged_prepared_text(start, tmp_path):
    options = {"prepared_dir": tmp_path / "prepared", "output_dir": tmp_path / "run"}
    with pytest.raises(UserError, match="there is no folder"):
        start(**options, model_type=None, config_overrides=None, model_name_or_path="/no/such")
    (folder,) = (tmp_path / "prepared").iterdir()

    def flip_a_bit() -> None:
        with open(folder / "train.arrow", "r+b") as handle:
            handle.seek(len(whole["train.arrow"]) // 2)
            byte = handle.read(1)[0]
            handle.seek(-1, os.SEEK_CUR)
            handle.write(bytes([byte ^ 1]))

    whole = {name: (folder / name).read_bytes() for name in ("train.arrow", "validation.arrow", "manifest.json")}
    for damage, defect in (
        (lambda: os.truncate(folder / "train.arrow", 1000), "it cannot be read: *"),
        (lambda: os.truncate(folder / "train.arrow", 0), "it cannot be read: *"),
        (flip_a_bit, "train.arrow has changed"),
        ((folder / "validation.arrow").unlink, "validation.arrow is missing"),
        (lambda: os.truncate(folder / "manifest.json", 100), "manifest.json is incomplete"),
        ((folder / "manifest.json").unlink, "manifest.json is missing"),
    ):
        damage()
        with pytest.raises(UserError) as error:
            start(**options)
        sentence = f"the prepared text in {folder} is damaged ({defect}); delete that folder and run this again"
        assert matches(str(error.value), sentence), error.value
        for name, content in whole.items():
            (folder / name).write_bytes(content)
    shutil.rmtree(folder)
    start(**options)


@pytest.mark.parametrize(("fails", "reason"), [
    pytest.param("weights", "File too large", marks=pytest.mark.slow),
    ("optimizer", "the disk is full, or the file larger than allowed"),
    pytest.param("flush", "No space left on device", marks=pytest.mark.slow),
])  # fmt: skip
def test_full_disk_during_checkpoint(fails, reason, start, finished, tmp_path, monkeypatch, capsys):
    """The last complete checkpoint is named and kept. With free space, the same command gives the same result."""
    from unlabeled.training import ExactTrainer

    save, weight_bytes = ExactTrainer._save_checkpoint, (finished / "model.safetensors").stat().st_size

    def save_without_room(self, model, trial):
        if self.state.global_step < 4:
            return save(self, model, trial)
        if fails == "flush":
            with monkeypatch.context() as patch:
                patch.setattr(os, "fsync", full)
                return save(self, model, trial)
        with largest_file(weight_bytes + (-1000 if fails == "weights" else 1000)):
            return save(self, model, trial)

    def full(descriptor):
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch, pytest.raises(UserError) as error:
        patch.setattr(ExactTrainer, "_save_checkpoint", save_without_room)
        start(save_steps=2)
    run = tmp_path / "run"
    assert str(error.value) == (
        f"cannot write checkpoint-4 to {run} ({reason}); the last complete checkpoint is {run}/checkpoint-2: make room "
        "and run the same command again"
    )
    assert sorted(path.name for path in run.iterdir()) == ["checkpoint-2", "run.json"]
    start(save_steps=2)
    assert f"resuming from {run}/checkpoint-2" in capsys.readouterr().out
    assert all(torch.equal(tensor, weights(run)[name]) for name, tensor in weights(finished).items())


@pytest.mark.parametrize("fails", ["model", pytest.param("results", marks=pytest.mark.slow)])
def test_full_disk_during_export(fails, unfinished, start, monkeypatch, finished):
    from unlabeled.reporting import plots
    from unlabeled.training import saving

    def full(*args, **kwargs):
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch, pytest.raises(UserError) as error:
        if fails == "model":
            patch.setattr(saving.PushMixin, "_save", lambda *args, **kwargs: full(), raising=False)
        else:
            patch.setattr(plots, "plot_loss", full)
        start(save_steps=2)
    assert str(error.value) == (
        f"cannot write the {fails} to {unfinished} (No space left on device); the last complete checkpoint is "
        f"{unfinished}/checkpoint-4: make room and run the same command again"
    )
    start(save_steps=2)
    assert (unfinished / "metrics.json").exists()
    assert all(torch.equal(tensor, weights(unfinished)[name]) for name, tensor in weights(finished).items())


def test_torn_checkpoints(unfinished, start, finished, capsys):
    os.truncate(unfinished / "checkpoint-4" / "optimizer.pt", 5)
    (unfinished / "incomplete" / "checkpoint-4").mkdir(parents=True)
    (unfinished / "incomplete" / "checkpoint-4" / "config.json").write_text("{")
    start(save_steps=2)
    out = capsys.readouterr().out
    being_written = f"skipped {unfinished}/incomplete: a checkpoint that was being written when the run stopped"
    assert being_written in out
    assert f"skipped {unfinished}/checkpoint-4: optimizer.pt has 5 bytes, not " in out
    assert f"resuming from {unfinished}/checkpoint-2" in out
    assert all(torch.equal(tensor, weights(unfinished)[name]) for name, tensor in weights(finished).items())


def test_only_torn_checkpoints(unfinished, start, finished, capsys):
    for step in (2, 4):
        (unfinished / f"checkpoint-{step}" / "complete.json").unlink()
    start(save_steps=2)
    out = capsys.readouterr().out
    for step in (2, 4):
        assert f"skipped {unfinished}/checkpoint-{step}: it has no readable complete.json" in out
    assert "resuming" not in out
    assert all(torch.equal(tensor, weights(unfinished)[name]) for name, tensor in weights(finished).items())


# --- A loss that goes wrong ------------------------------------------------------------------------------------------


def test_loss_spike(start, tmp_path, monkeypatch, capsys):
    """The run stops before it saves, names the last good checkpoint, and the same command continues from it."""
    right, calls = ChunkedLinearCrossEntropy.__call__, []

    def loss(self, outputs, labels, num_items_in_batch=1):
        calls.extend([1] if num_items_in_batch != 1 else [])  # not in evaluation
        return right(self, outputs, labels, num_items_in_batch) * (5 if len(calls) == 8 else 1)

    run, options = tmp_path / "run", {"train_tokens": 12 * 256, "save_steps": 3}
    with monkeypatch.context() as patch, pytest.raises(UserError) as error:
        patch.setattr(ChunkedLinearCrossEntropy, "__call__", loss)
        start(**options)
    error.match(
        rf"^the loss rose from \d\.\d{{3}} to \d\d\.\d{{3}} at step 8; the last good checkpoint is {run}/checkpoint-6: "
        "lower learning_rate or max_grad_norm and set another output_dir, or raise loss_spike_threshold$"
    )
    assert sorted(path.name for path in run.iterdir()) == ["checkpoint-3", "checkpoint-6", "run.json"]
    start(**options)
    assert f"resuming from {run}/checkpoint-6" in capsys.readouterr().out
    assert (run / "metrics.json").exists()


def test_no_save_of_non_finite_weights(start, tmp_path):
    """The loss of a step belongs to the weights before the step, so it is finite when the new weights are not."""
    with pytest.raises(UserError) as error:
        start(learning_rate=1e30, warmup_steps=0, loss_spike_threshold=0, save_steps=1, train_tokens=8 * 256)
    kept = find_checkpoints(str(tmp_path / "run"))
    last = kept[0] if kept else "none"
    assert any(what in str(error.value) for what in ("no longer finite", "held-out loss is nan", "last 3 steps"))
    assert f"; the last good checkpoint is {last}: lower learning_rate" in str(error.value)
    for checkpoint in kept:
        assert all(tensor.isfinite().all() for tensor in load_file(Path(checkpoint, "model.safetensors")).values())
    assert not (tmp_path / "run" / "model.safetensors").exists()


# --- The Hub ---------------------------------------------------------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    """Answer every request with `status` and `answer`."""

    status, answer = 200, {}

    def do_GET(self):
        body = json.dumps(self.answer).encode()
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch):
    """A local server in place of the Hub: sets its answer, and returns its address."""
    import huggingface_hub

    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", "hf_not_a_token")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    huggingface_hub.close_session()

    def answers(status: int, answer: dict | None = None) -> str:
        monkeypatch.setattr(Hub, "status", status)
        monkeypatch.setattr(Hub, "answer", answer or {})
        return address

    yield answers
    server.shutdown()
    server.server_close()
    huggingface_hub.close_session()


@pytest.mark.parametrize("objective", ["clm", "mlm"])
def test_invalid_hub_token(objective, hub, refused):
    address = hub(401, {"error": "Invalid credentials in Authorization header"})
    remedy = "set HF_TOKEN to a valid one, or set push_to_hub to false"
    sentence = f"push_to_hub: {address} refuses the token (status 401); {remedy}"
    assert refused(objective, push_to_hub="true") == sentence


def test_read_only_hub_token(hub, refused):
    hub(200, {"name": "someone", "auth": {"accessToken": {"role": "read"}}})
    sentence = "push_to_hub: the token may only read; set HF_TOKEN to one that may write, or set push_to_hub to false"
    assert refused(push_to_hub="true") == sentence


def test_unreachable_hub(hub, refused, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    remedy = "check the network, or set push_to_hub to false"
    sentence = "push_to_hub: http://127.0.0.1:9 cannot be reached (ConnectError: connection refused); " + remedy
    assert refused(push_to_hub="true") == sentence
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    sentence = "push_to_hub: http://127.0.0.1:9 cannot be reached (OfflineModeIsEnabled); " + remedy
    assert refused(push_to_hub="true") == sentence


def test_missing_hub_token(hub, refused, monkeypatch, tmp_path):
    import huggingface_hub

    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    sentence = "push_to_hub needs a token; set HF_TOKEN or run `hf auth login`, or set push_to_hub to false"
    assert refused(push_to_hub="true") == sentence


def test_valid_hub_token(hub):
    from argparse import Namespace

    from unlabeled.hub.preconditions import check_push

    hub(200, {"name": "someone", "auth": {"accessToken": {"role": "write"}}})
    check_push(Namespace(push_to_hub=True, process_index=0, hub_token=None))
    hub(500)
    check_push(Namespace(push_to_hub=False, process_index=0, hub_token=None))
    check_push(Namespace(push_to_hub=True, process_index=1, hub_token=None))


# --- In a process of its own: one line on stderr, exit status 2 ------------------------------------------------------


def in_a_process(objective: str, arguments: list[str], **environment: str) -> str:
    """Run a recipe that refuses its input in a process of its own; returns its only line on stderr."""
    command = [sys.executable, str(ROOT / "recipes" / f"pretrain_{objective}.py"), *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment
    )
    assert done.returncode == 2, done.stderr[-2000:]
    assert "Traceback" not in done.stdout + done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr.rstrip("\n")


def test_typo_in_own_process(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(BASE | {"learning_rat": 0.1}))
    said = in_a_process("mlm", ["--config", str(config)])
    assert said == f"error: {config}: unknown key 'learning_rat'; did you mean 'learning_rate'?"


@pytest.mark.slow
def test_spoilt_text_in_own_process(corpus, tokenizers, tmp_path):
    """The fault appears during preparation, where the readers would log the exceptions that they raise."""
    file = tmp_path / "torn.parquet"
    pq.write_table(pa.table({"text": ["one two"] * 1000}), file)
    os.truncate(file, 100)
    said = in_a_process("clm", recipe_arguments("clm", "llama", corpus, tokenizers, tmp_path / "run", train_data=file))
    sentence = f"error: {file} cannot be read as parquet after 0 rows (*); repair it or leave it out"
    assert matches(said, sentence), said
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_invalid_hub_token_in_own_process(corpus, tokenizers, tmp_path, hub):
    address = hub(401)
    arguments = recipe_arguments("mlm", "bert", corpus, tokenizers, tmp_path / "run", push_to_hub="true")
    said = in_a_process("mlm", arguments, HF_ENDPOINT=address, HF_HUB_OFFLINE="0")
    remedy = "set HF_TOKEN to a valid one, or set push_to_hub to false"
    assert said == f"error: push_to_hub: {address} refuses the token (status 401); {remedy}"
    assert not (tmp_path / "run").exists()
