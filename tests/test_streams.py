"""A stream is read once, whoever reads it, and goes on where it stopped."""

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from batch_log import assert_same_order, recorded_batches, recorded_command
from conftest import ROOT, launch_environment, make_text, recipe_arguments, run_recipe, weights
from hub_server import USER, WRITE_TOKEN, HubServer

from unlabeled import Stopped, UserError
from unlabeled.data.preparing import load_prepared, prepare
from unlabeled.data.sources import Source
from unlabeled.data.streams import StreamedRows, reading
from unlabeled.data.streams.reading import FileSegment, read_chunks, read_with_retries
from unlabeled.data.streams.rows import SourcePosition, WindowStart
from unlabeled.data.tokenization import load_tokenizer
from unlabeled.runtime.checkpoints import commit_checkpoint, find_checkpoints, staging_folder

TEXTS = [f"{number}: {text}" for number, text in enumerate(make_text(700, seed=2))]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    """The same texts as lines and as row groups, some of them null, empty, long, or written from right to left."""
    folder = tmp_path_factory.mktemp("stream")
    texts = [*TEXTS, None, "", "שלום עולם", "x y " * 10_000]
    paths = {"jsonl": str(folder / "texts.jsonl"), "parquet": str(folder / "texts.parquet")}
    lines = [json.dumps({"text": text, "n": 1}, ensure_ascii=False) + "\n" for text in texts]
    Path(paths["jsonl"]).write_text("".join(lines), encoding="utf-8")
    pq.write_table(pa.table({"n": [1] * len(texts), "text": texts}), paths["parquet"], row_group_size=130)
    return paths


def read(share: FileSegment, place: int | None = None) -> list[str]:
    return [text for _, _, texts in read_chunks(share, "text", place) for text in texts]


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
@pytest.mark.parametrize("count", [1, 3, 64, 1000])
def test_segments_cover_the_file(files, form, count):
    texts = [text for index in range(count) for text in read(FileSegment(files[form], index, count))]
    assert texts == [*TEXTS, "", "", "שלום עולם", "x y " * 10_000]


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_segment_continues_from_every_position(files, form, monkeypatch):
    monkeypatch.setattr(reading, "CHUNK_CHARACTERS", 2_000)
    share, before = FileSegment(files[form], 1, 3), []
    whole = read(share)
    for after, _, texts in read_chunks(share, "text"):
        before += texts
        assert before + read(share, after) == whole
    assert before == whole


def stream(files, tokenizers, tmp_path, objective="clm", rows_per_step=12, sources=None) -> StreamedRows:
    tokenizer = load_tokenizer(tokenizers[objective])
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text(json.dumps({"text": TEXTS[0]}) + "\n")
    folder = prepare([], [Source(str(held_out))], tokenizer, objective, 32, str(tmp_path / "prepared"))
    args = SimpleNamespace(seed=1, rows_per_step=rows_per_step, max_steps=10_000, dataloader_num_workers=0)
    return StreamedRows(sources or [Source(files["jsonl"])], tokenizer, load_prepared(folder)[1], args)


def same(rows, others) -> None:
    assert len(rows) == len(others)
    for row, other in zip(rows, others, strict=True):
        assert row.keys() == other.keys() and row["row"] == other["row"]
        for key in row.keys() - {"row", "epoch"}:
            np.testing.assert_array_equal(row[key], other[key])


def read_steps(rows: StreamedRows, first: int, last: int) -> list[dict]:
    return [
        rows[step * rows.rows_per_step + place - rows.first]
        for step in range(first, last)
        for place in range(rows.rows_per_step)
    ]


def test_each_text_is_in_one_shard(files, tokenizers, tmp_path):
    rows = stream(files, tokenizers, tmp_path)
    assert rows.shards == 12
    found = []
    for shard in range(rows.shards):
        documents = rows.read_documents(shard, 0, SourcePosition())
        for document, (epoch, *_) in documents:
            if epoch:
                break
            found.append(rows.tokenizer.decode(document.ids))
    numbers = [text.split(":")[0] for text in found if ":" in text]
    assert sorted(numbers, key=int) == [text.split(":")[0] for text in TEXTS]
    assert len(found) == len(TEXTS) + 2  # not the null, not the empty one


def test_stream_rows_contain_whole_documents(files, tokenizers, tmp_path):
    """Each document framed, no token lost: the first epoch of a lane, put together again."""
    rows = stream(files, tokenizers, tmp_path, rows_per_step=1)
    state = WindowStart.first(sources=1)
    targets, tokens = 0, 0
    while state.positions[0].epoch == 0:
        window, state = rows.read_window(0, state)
        targets += sum(int(lengths.sum()) - len(lengths) for lengths in (row["lengths"] for row in window))
        eos = rows.tokenizer.eos_token_id
        assert all(row["input_ids"][0] == eos or len(row["input_ids"]) <= 32 for row in window)
        tokens = state.tokens[0]
    documents = state.positions[0]
    read_documents = sum(1 for _ in zip(range(10**9), iter_until(rows, documents), strict=False))
    assert targets == tokens + read_documents  # every token once, and the end of every document


def iter_until(rows, place):
    for _, found in rows.read_documents(0, 0, SourcePosition()):
        yield found
        if found == place:
            return


@pytest.mark.parametrize(("processes", "batch"), [(2, 3), (2, 6), (4, 1), (3, 2)])
def test_batches_for_any_number_of_processes(files, tokenizers, tmp_path, processes, batch):
    """Micro-batch b of a step goes to process b modulo processes, as accelerate deals them."""
    whole = read_steps(stream(files, tokenizers, tmp_path), 0, 30)
    found = {}
    for process in range(processes):
        mine = stream(files, tokenizers, tmp_path)
        places = [place for place in range(30 * 12) if place // batch % processes == process]
        found |= dict(zip(places, mine.__getitems__(places), strict=True))
    same([found[place] for place in range(30 * 12)], whole)


@pytest.mark.parametrize("objective", ["clm", "mlm"])
def test_two_resumes(files, tokenizers, tmp_path, objective):
    sources = [Source(files["jsonl"], weight=3.0), Source(files["parquet"])]
    whole = read_steps(stream(files, tokenizers, tmp_path, objective, sources=sources), 0, 120)
    rows, at = stream(files, tokenizers, tmp_path, objective, sources=sources), 0
    found = []
    for until in (41, 44, 120):
        found += read_steps(rows, at, until)
        read_steps(rows, until, until + 1)  # data loaders read ahead of the step that is saved
        folder = tmp_path / f"checkpoint-{until}"
        folder.mkdir()
        rows.save(str(folder), until, process_index=0)
        rows, at = stream(files, tokenizers, tmp_path, objective, sources=sources), until
        rows.resume(until * 12, str(folder))
    same(found, whole)


def test_resume_with_fewer_processes(files, tokenizers, tmp_path):
    whole = read_steps(stream(files, tokenizers, tmp_path), 0, 50)
    for process in range(2):
        mine = stream(files, tokenizers, tmp_path)
        mine.__getitems__([place for place in range(40 * 12) if place // 6 % 2 == process])
        mine.save(str(tmp_path), 40, process)
    rows = stream(files, tokenizers, tmp_path)
    rows.resume(40 * 12, str(tmp_path))
    same(read_steps(rows, 40, 50), whole[40 * 12 :])


def test_mixture_in_each_shard(files, tokenizers, tmp_path):
    sources = [Source(files["jsonl"], weight=3.0), Source(files["parquet"], weight=1.0)]
    rows = stream(files, tokenizers, tmp_path, sources=sources)
    for shard in range(rows.shards):
        state = WindowStart.first(sources=2)
        for _ in range(3):
            _, state = rows.read_window(shard, state)
        first, second = state.tokens
        longest = 40_000  # a document is whole
        assert abs(first - 3 * second) <= 3 * longest and (second > 0)


def test_order_by_epoch_and_seed(files, tokenizers, tmp_path):
    rows = stream(files, tokenizers, tmp_path)
    first = [row["input_ids"][:8].tolist() for row in read_steps(rows, 0, 4)]
    other = stream(files, tokenizers, tmp_path)
    other.seed = 2
    assert first != [row["input_ids"][:8].tolist() for row in read_steps(other, 0, 4)]


def test_read_with_retries(monkeypatch):
    waits, failures = [], [OSError("reset"), OSError("reset"), TimeoutError("slow")]
    monkeypatch.setattr(reading.time, "sleep", waits.append)

    def source(place):
        for number in range(place, 10):
            if number == 4 and failures:
                raise failures.pop()
            yield number + 1, number

    assert [number for _, number in read_with_retries(source, 0, "source")] == list(range(10))
    assert waits == [1, 2, 4]

    def dead(place):
        raise OSError("no route to host")
        yield

    with pytest.raises(UserError, match=r"source cannot be read \(no route to host\), tried 7 times"):
        list(read_with_retries(dead, 0, "source"))
    assert sum(waits[3:]) == 63


def test_text_files_as_stream(tokenizers, tmp_path):
    """Each is one document, those that are empty are none."""
    folder = tmp_path / "books"
    for number, text in enumerate(["", " ", *TEXTS[:90]]):
        file = folder / str(number % 3) / f"{number // 3}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    rows = stream(None, tokenizers, tmp_path, sources=[Source(str(folder))])
    found = []
    for shard in range(rows.shards):
        for document, (epoch, *_) in rows.read_documents(shard, 0, SourcePosition()):
            if epoch:
                break
            found.append(rows.tokenizer.decode(document.ids))
    assert sorted(found) == sorted(TEXTS[:90])
    assert len(rows.manifest["train"][0]["files"]) == 91, "files of one name in several folders are several"
    assert 45 <= rows.manifest["splits"]["train"]["documents"] <= 180


def test_unstreamable_sources(files, tokenizers, tmp_path):
    bad = {"a.csv": "text\nhello\n", "b.jsonl": '{"text": "hello"}\n{"text": \n', "c.jsonl": '{"body": 1}\n'}
    for name, text in bad.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "few").mkdir()
    for number in range(3):
        (tmp_path / "few" / f"{number}.txt").write_text("hello there")

    def refused(name: str, **options) -> str:
        with pytest.raises(UserError) as error:
            read_steps(stream(files, tokenizers, tmp_path, sources=[Source(str(tmp_path / name))]), 0, 1)
        return str(error.value)

    assert (
        "a.csv cannot be read from the middle, so it cannot be streamed; convert it to .parquet or .jsonl"
        in refused("a.csv")
    )
    assert "the line at byte 18 of" in refused("b.jsonl") and "is not valid JSON" in refused("b.jsonl")
    assert "has no column 'text'; set text_column to one of: body" in refused("c.jsonl")
    assert "few is too small to stream, 3 texts" in refused("few")
    (tmp_path / "blank.jsonl").write_text('{"text": " "}\n{"text": null}\n')
    assert "blank.jsonl has no text; leave it out" in refused("blank.jsonl")
    (tmp_path / "nothing.jsonl").write_text("")
    assert "nothing.jsonl is empty" in refused("nothing.jsonl")
    (tmp_path / "d.jsonl").write_text('{"text": "hello"}\n')
    assert "has no text for one of 12 shards" in refused("d.jsonl")
    whole = Path(files["parquet"]).read_bytes()
    (tmp_path / "torn.parquet").write_bytes(whole[:-100])
    assert "torn.parquet cannot be read as parquet (" in refused("torn.parquet")
    (tmp_path / "damaged.parquet").write_bytes(whole[:2000] + b"\xff" * 20_000 + whole[22_000:])
    assert "damaged.parquet cannot be read as parquet (" in refused("damaged.parquet")
    (tmp_path / "d.jsonl").write_bytes(b'{"text": "caf\xe9"}\n')
    assert "is not UTF-8 text" in refused("d.jsonl")


# --- Whole runs -----------------------------------------------------------------------------------------------------

STEPS = 8


def arguments(files, tokenizers, folder, objective="clm", model_type="llama", **options) -> list[str]:
    corpus = {"train": files["jsonl"], "validation": str(folder.parent / "held_out.jsonl")}
    Path(corpus["validation"]).write_text(json.dumps({"text": TEXTS[0] + TEXTS[1]}) + "\n")
    options = {"prepared_dir": folder.parent / "prepared"} | options
    options = {"stream": "true", "train_tokens": STEPS * 256, "save_steps": 3} | options
    return recipe_arguments(objective, model_type, corpus, tokenizers, folder, **options)


@pytest.mark.parametrize(("objective", "model_type"), [("clm", "llama"), ("mlm", "bert"), ("span", "t5")])
def test_resume_after_interruption(files, tokenizers, tmp_path, objective, model_type):
    kind = (files, tokenizers)
    logs = [tmp_path / f"batches-of-{name}" for name in ("whole", "first", "second")]
    with recorded_batches(logs[0]):
        run_recipe(f"pretrain_{objective}", arguments(*kind, tmp_path / "whole", objective, model_type))
    words = arguments(*kind, tmp_path / "stopped", objective, model_type)
    with recorded_batches(logs[1]), pytest.raises(Stopped):
        run_recipe(f"pretrain_{objective}", [*words, "--max_hours", "1e-9"])
    with recorded_batches(logs[2]):
        run_recipe(f"pretrain_{objective}", words)
    assert_same_order(*logs)
    expected = weights(tmp_path / "whole")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(tmp_path / "stopped").items())


def test_resume_time_at_step_one_million(files, tokenizers, tmp_path):
    """A checkpoint that says so, with a stream and without one: nothing before it is read or counted."""
    for name, options in {"stream": {}, "prepared": {"stream": "false"}}.items():
        folder, steps = tmp_path / name, 1_000_002
        words = arguments(files, tokenizers, folder, train_tokens=steps * 256, save_total_limit=1, **options)
        with pytest.raises(Stopped):
            run_recipe("pretrain_clm", [*words, "--max_hours", "1e-9"])
        (saved,) = find_checkpoints(str(folder))
        staged = Path(staging_folder(str(folder)), "checkpoint-1000000")
        staged.parent.mkdir(exist_ok=True)
        Path(saved).rename(staged)
        (staged / "complete.json").unlink()
        state = json.loads((staged / "trainer_state.json").read_text()) | {"global_step": 1_000_000}
        (staged / "trainer_state.json").write_text(json.dumps(state))
        if name == "stream":
            shards = json.loads((staged / "stream-0.json").read_text())
            for state in shards.values():
                state["first"] += 999_999
            (staged / "stream-0.json").write_text(json.dumps(shards))
        commit_checkpoint(str(folder), "checkpoint-1000000")
        started = time.perf_counter()
        run_recipe("pretrain_clm", [*words, "--logging_steps", "2"])
        assert time.perf_counter() - started < 10
        assert json.loads((folder / "metrics.json").read_text())["steps"] == steps


@pytest.mark.slow
def test_hub_dataset_with_failures(tokenizers, tmp_path):
    """Read through the network, in between refused: the weights are those of the same files here."""
    data = tmp_path / "texts"
    data.mkdir()
    for number in range(3):
        table = pa.table({"text": TEXTS[number::3]})
        pq.write_table(table, data / f"train-{number:05}.parquet", row_group_size=50)
    words = arguments({"jsonl": str(data)}, tokenizers, tmp_path / "here")
    run_recipe("pretrain_clm", words)
    with HubServer() as hub:
        environment = hub.environment(tmp_path / "home", WRITE_TOKEN) | {"OMP_NUM_THREADS": "1"}
        upload = (
            "from huggingface_hub import HfApi; hub = HfApi(); "
            f"hub.create_repo('{USER}/texts', repo_type='dataset'); "
            f"hub.upload_folder(repo_id='{USER}/texts', repo_type='dataset', folder_path='{data}', path_in_repo='data')"
        )
        subprocess.run([sys.executable, "-c", upload], env=environment, check=True, capture_output=True)
        words = arguments({"jsonl": f"{USER}/texts"}, tokenizers, tmp_path / "there")
        command = [sys.executable, str(ROOT / "recipes" / "pretrain_clm.py"), *words]
        hub.break_requests(r"GET .*/resolve/.*parquet", status=503, after=6, times=3)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not hub.faults[0]["times"], "it was not refused"
    expected = weights(tmp_path / "here")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(tmp_path / "there").items())


@pytest.mark.slow
def test_resume_of_two_processes_by_one(files, tokenizers, tmp_path):
    logs = [tmp_path / f"batches-of-{name}" for name in ("whole", "two", "one")]
    with recorded_batches(logs[0]):
        run_recipe("pretrain_clm", arguments(files, tokenizers, tmp_path / "whole"))
    words = arguments(files, tokenizers, tmp_path / "stopped", per_device_train_batch_size=4)
    command = [sys.executable, str(ROOT / "recipes" / "pretrain_clm.py"), *words, "--max_hours", "1e-9"]
    python, *recorded = recorded_command(command, logs[1])
    launcher = [python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*launcher, *recorded], env=launch_environment(), capture_output=True, text=True, cwd=ROOT)
    assert "max_hours ended the run after step 1 of 8" in done.stderr, done.stderr[-3000:]
    (saved,) = find_checkpoints(str(tmp_path / "stopped"))
    read = [json.loads((Path(saved) / f"stream-{rank}.json").read_text()) for rank in range(2)]
    assert not read[0].keys() & read[1].keys(), "each process reads shards of its own"
    assert read[0].keys() | read[1].keys() == {str(shard) for shard in range(8)}
    with recorded_batches(logs[2]):
        run_recipe("pretrain_clm", words)
    assert_same_order(*logs)
    expected = weights(tmp_path / "whole")
    for name, tensor in weights(tmp_path / "stopped").items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-5, rtol=0)


def test_heartbeat_per_document(files, tokenizers, tmp_path):
    """So that the watchdog does not end a run whose text comes slowly."""
    rows, beats = stream(files, tokenizers, tmp_path), []
    rows.heartbeat = lambda: beats.append(len(beats))
    rows.read_window(0, WindowStart.first(sources=1))
    assert len(beats) > 10
