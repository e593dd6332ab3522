"""Disk faults, clocks, odd texts and secrets: nothing is lost or leaked, and the message is one clear line."""

import json
import os
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT, make_text, recipe_arguments, run_recipe, weights

from unlabeled import UserError
from unlabeled.data.preparing import load_prepared, prepare
from unlabeled.data.sources import Source
from unlabeled.data.tokenization import load_tokenizer
from unlabeled.runtime.checkpoints import find_checkpoints


@contextmanager
def disk(folder: Path, options: str):
    """Mount a small file system on a new folder."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_full_disk_during_run(corpus, tokenizers, tmp_path):
    """Another program fills a real disk during the run, and frees it again."""
    options = {"train_tokens": 40 * 256, "save_steps": 10, "save_total_limit": 2}
    run_recipe("pretrain_clm", recipe_arguments("clm", "llama", corpus, tokenizers, tmp_path / "whole", **options))
    with disk(tmp_path / "small", "size=4m") as small:
        run, filler = small / "run", small / "filler"

        def fill() -> None:
            while not (run / "checkpoint-10").exists():
                time.sleep(0.001)
            with suppress(OSError), open(filler, "wb", buffering=0) as handle:
                while handle.write(bytes(4096)):
                    pass

        thread = threading.Thread(target=fill)
        thread.start()
        words = recipe_arguments("clm", "llama", corpus, tokenizers, run, **options)
        with pytest.raises(UserError, match=r"the last complete checkpoint is .*run/checkpoint-\d+: make room and run"):
            run_recipe("pretrain_clm", words)
        thread.join()
        assert find_checkpoints(str(run)) and not (run / "metrics.json").exists()
        with pytest.raises(UserError, match=r"the disk of output_dir .* has 0.0 MB free and the checkpoints need"):
            run_recipe("pretrain_clm", words)
        filler.unlink()
        run_recipe("pretrain_clm", words)
        expected = weights(tmp_path / "whole")
        assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(run).items())


def test_read_only_disk(corpus, tokenizers, tmp_path):
    with disk(tmp_path / "fixed", "ro,size=1m") as fixed:
        for key, remedy in {"output_dir": "it to another folder", "prepared_dir": "prepared_dir"}.items():
            words = recipe_arguments("clm", "llama", corpus, tokenizers, tmp_path / "run")
            words += [f"--{key}", str(fixed / "new")]
            with pytest.raises(UserError, match=rf"cannot write .*{fixed}.*\(Read-only file system\).*; set {remedy}"):
                run_recipe("pretrain_clm", words)


def test_clock_going_backwards(corpus, tokenizers, tmp_path, monkeypatch):
    """The clock goes back an hour at each reading, so newer files seem older."""
    options = {"save_steps": 1, "save_total_limit": 2, "max_hours": 1}
    run_recipe("pretrain_clm", recipe_arguments("clm", "llama", corpus, tokenizers, tmp_path / "whole", **options))
    now, run = [time.time()], tmp_path / "run"

    def earlier() -> float:
        now[0] -= 3600
        return now[0]

    with monkeypatch.context() as patch:
        patch.setattr(time, "time", earlier)
        run_recipe("pretrain_clm", recipe_arguments("clm", "llama", corpus, tokenizers, run, **options))
    assert [Path(path).name for path in find_checkpoints(str(run))] == ["checkpoint-4", "checkpoint-3"]
    metrics = json.loads((run / "metrics.json").read_text())
    assert 0 < metrics["train_seconds"] < 3600
    expected = weights(tmp_path / "whole")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(run).items())


ODD = [
    None, "", " \n\t ", "שלום עולם، كيف الحال", "a\u202eb\u200fc", "naïve café", "日本語のテキスト",
    "\ufeffafter a mark",
    "one\r\ntwo\rthree", "tab\tand\x0cfeed", "👩‍👩‍👧‍👦 family", "e\u0301 is not é", "x" * 2000, "\x7f\x1b[31m control",
    (" ".join(make_text(2_000, 3)) * 30)[: 10 << 20],
]  # fmt: skip


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_odd_texts(form, tokenizers, tmp_path):
    """Nulls and blanks are not documents; long lines, all scripts, combining marks and control characters are kept."""
    assert len(ODD[-1]) == 10 << 20
    texts = ODD if form == "jsonl" else [*ODD[:-1], ODD[-1][: 1 << 20]]  # a cell of 10 MB takes long to read
    file = tmp_path / f"odd.{form}"
    if form == "jsonl":
        file.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), "utf-8")
    else:
        pq.write_table(pa.table({"text": texts}), file)
    tokenizer = load_tokenizer(tokenizers["clm"])
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text('{"text": "one"}\n')
    folder = prepare([Source(str(file))], [Source(str(held_out))], tokenizer, "clm", 4096, str(tmp_path / "prepared"))
    rows, manifest = load_prepared(folder)
    pieces = []
    for row in rows["train"]:
        start = 0
        for length in row["lengths"]:
            pieces.append(row["input_ids"][start : start + length])
            start += length
    short = {tokenizer.decode(piece[1:-1]) for piece in pieces if len(piece) < 4096}
    assert set(ODD[3:-1]) <= short
    assert manifest["splits"]["train"]["documents"] == len(ODD) - 3
    assert manifest["splits"]["train"]["bytes"] == sum(
        len((text or "").encode()) for text in texts if (text or "").strip()
    )


def test_file_in_another_encoding(corpus, tokenizers, tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("café", encoding="utf-8")
    (tmp_path / "texts" / "b.txt").write_text("café", encoding="latin-1")
    words = recipe_arguments("clm", "llama", corpus, tokenizers, tmp_path / "run", train_data=tmp_path / "texts")
    with pytest.raises(UserError, match=r"b\.txt is not UTF-8 text \(byte 3\)"):
        run_recipe("pretrain_clm", words)


def test_tokenizer_larger_than_model(corpus, tokenizers, tmp_path):
    """The embeddings grow, and the rows of the old tokens stay as they were."""
    run_recipe("pretrain_clm", recipe_arguments("clm", "llama", corpus, tokenizers, tmp_path / "small"))
    small = weights(tmp_path / "small")["model.embed_tokens.weight"]
    tokenizer = load_tokenizer(tokenizers["clm"])
    tokenizer.add_tokens(["wholly", "newly"])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    options = {"model_name_or_path": tmp_path / "small", "tokenizer_name_or_path": tmp_path / "tokenizer"}
    options |= {"learning_rate": 0.0}
    words = recipe_arguments("clm", "llama", corpus, tokenizers, tmp_path / "large", **options)
    for key in ("--model_type", "--config_overrides"):
        index = words.index(key)
        del words[index : index + 2]
    run_recipe("pretrain_clm", words)
    large = weights(tmp_path / "large")["model.embed_tokens.weight"]
    assert len(large) == len(small) + 2 and torch.equal(large[: len(small)], small)
    torch.testing.assert_close(large[-1], small.mean(dim=0))


# --- Safety ---------------------------------------------------------------------------------------------------------

SECRET = "hf_PlantedSecretThatNobodyMaySee"


@pytest.mark.slow
def test_planted_secret(corpus, tokenizers, tmp_path):
    """It is in no checkpoint, log, card, lineage or tracker. It comes by the environment, as YAML keys are refused."""
    run, home = tmp_path / "run", tmp_path / "home"
    options = {"save_steps": 2, "stream": "true"}
    words = recipe_arguments("clm", "llama", corpus, tokenizers, run, **options)
    (tmp_path / "trackers.yaml").write_text("report_to: [tensorboard, trackio]\n")
    words += ["--prepared_dir", str(tmp_path / "prepared"), "--config", str(tmp_path / "trackers.yaml")]
    trackers = {"TENSORBOARD_LOGGING_DIR": str(run / "runs"), "TRACKIO_DIR": str(run / "trackio"), "HOME": str(home)}
    environment = os.environ | {"HF_TOKEN": SECRET, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | trackers
    command = [sys.executable, str(ROOT / "recipes" / "pretrain_clm.py"), *words]
    done = subprocess.run(command, env=environment, capture_output=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"metrics.json", "lineage.json", "README.md", "trainer_state.json", "run.json"} <= names
    assert any("tfevents" in name for name in names) and any(name.endswith(".db") for name in names)
    outputs = {"output": done.stdout, "errors": done.stderr} | {path: path.read_bytes() for path in files}
    for source, data in outputs.items():
        assert SECRET.encode() not in data, source


def test_yaml_with_code(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(f"output_dir: !!python/object/apply:os.mkdir ['{tmp_path}/made']\n")
    command = [sys.executable, str(ROOT / "recipes" / "pretrain_clm.py"), "--config", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "made").exists()


def test_lock_file_pins():
    """Every package once, with hashes; torch is left to the machine."""
    wanted = [line.split("#")[0].split(";")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    wanted = {line.lower().replace("_", "-") for line in wanted if "==" in line and not line.startswith("torch==")}
    entries = (ROOT / "requirements.lock").read_text().replace("\\\n", "").splitlines()
    entries = [line for line in entries if not line.startswith("#")]
    assert all("==" in line and "--hash=sha256:" in line for line in entries)
    assert wanted <= {line.split()[0] for line in entries}
