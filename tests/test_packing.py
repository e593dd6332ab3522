"""Nothing of the text is lost, nothing is predicted twice, and a prepared folder is what its name says."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_text

from unlabeled import UserError
from unlabeled.data.attention_masks import block_mask
from unlabeled.data.packing import best_fit, layout_rows, split_points
from unlabeled.data.preparing import load_prepared, prepare
from unlabeled.data.sources import Source, parse_sources
from unlabeled.data.tokenization import encode_batch, load_tokenizer


@pytest.mark.parametrize(("length", "room", "overlap", "expected"), [
    (5, 8, 1, [(0, 5)]),
    (8, 8, 1, [(0, 8)]),
    (9, 8, 1, [(0, 8), (7, 9)]),
    (15, 8, 1, [(0, 8), (7, 15)]),
    (16, 8, 1, [(0, 8), (7, 15), (14, 16)]),
    (16, 8, 0, [(0, 8), (8, 16)]),
    (1, 8, 0, [(0, 1)]),
])  # fmt: skip
def test_split_points_known_answers(length, room, overlap, expected):
    assert split_points(length, room, overlap) == expected


def test_causal_pieces_predict_each_token_once():
    for length in range(2, 200):
        targets = [i for start, end in split_points(length, 16, 1) for i in range(start + 1, end)]
        assert targets == list(range(1, length))


def test_best_fit_known_answer():
    # 6 opens a row, 5 another; 4 fits the 6 exactly, 3 and 2 the 5, 1 opens the third.
    assert best_fit([5, 4, 6, 3, 2, 1], 10) == [[2, 1], [0, 3, 4], [5]]


def test_best_fit_invariants():
    rng = np.random.default_rng(0)
    for row_length in (7, 64, 257):
        lengths = rng.integers(1, row_length + 1, size=3000).tolist()
        rows = best_fit(lengths, row_length)
        assert sorted(piece for row in rows for piece in row) == list(range(3000))
        assert max(sum(lengths[piece] for piece in row) for row in rows) <= row_length
        assert len(rows) <= 1.05 * -(-sum(lengths) // row_length)


def test_layout_known_answer():
    rows = layout_rows([[3, 2], [6]], 6)
    assert rows.document_ids.tolist() == [[0, 0, 0, 1, 1, 2], [0] * 6]
    assert rows.position_ids.tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]]
    assert rows.padding.tolist() == [[False] * 5 + [True], [False] * 6]
    assert rows.starts.tolist() == [[True, False, False, True, False, True], [True] + [False] * 5]


def test_layout_of_empty_row():
    rows = layout_rows([[]], 4)
    assert rows.padding.all() and rows.position_ids.tolist() == [[0, 1, 2, 3]]


def test_block_mask_known_answer():
    documents = torch.tensor([[0, 0, 0, 1, 1]])
    mask = block_mask(documents)[0, 0]
    assert mask.tolist() == [[True] * 3 + [False] * 2] * 3 + [[False] * 3 + [True] * 2] * 2
    windowed = block_mask(documents, window=1)[0, 0]
    assert windowed[0].tolist() == [True, True, False, False, False]
    assert windowed.dtype == torch.bool


@pytest.mark.parametrize("window", [None, 0, 3, 100])
def test_block_mask_equals_pairwise_comparison(window):
    rng = np.random.default_rng(0)
    lengths = [rng.integers(1, 9, 8).tolist() for _ in range(20)] + [[], [72]]
    ids = layout_rows(lengths, 72).document_ids
    far = (torch.arange(72)[:, None] - torch.arange(72)[None, :]).abs()
    expected = (ids[:, :, None] == ids[:, None, :]) & (far <= (72 if window is None else window))
    assert torch.equal(block_mask(ids, window), expected[:, None])


def prepared(corpus, tokenizers, objective, tmp_path, **options):
    tokenizer = load_tokenizer(tokenizers[objective])
    options = {"max_length": 32, "cache_dir": str(tmp_path)} | options
    folder = prepare(
        [Source(corpus["train"])], [Source(corpus["validation"])], tokenizer, objective=objective, **options
    )
    return tokenizer, folder, *load_prepared(folder)


def test_causal_rows_contain_whole_documents(corpus, tokenizers, tmp_path):
    tokenizer, _, rows, manifest = prepared(corpus, tokenizers, "clm", tmp_path)
    texts = [json.loads(line)["text"] for line in Path(corpus["train"]).read_text().splitlines()]
    documents = {tuple(ids.tolist()) for ids in encode_batch(tokenizer, texts)}
    eos = tokenizer.eos_token_id

    pieces = []  # of all rows
    for row in rows["train"]:
        assert row["lengths"].sum() == len(row["input_ids"]) <= 32
        pieces += np.split(row["input_ids"], np.cumsum(row["lengths"])[:-1])
    whole = {tuple(p[1:-1].tolist()) for p in pieces if p[0] == eos and p[-1] == eos}
    assert whole == {d for d in documents if len(d) + 2 <= 32}, "a document that fits stays whole"
    assert sum(len(p) - 1 for p in pieces) == sum(len(d) + 1 for d in encode_batch(tokenizer, texts))
    assert sum(p[0] == eos for p in pieces) == sum(p[-1] == eos for p in pieces) == len(texts)
    counts = manifest["splits"]["train"]
    assert counts["documents"] == len(texts)
    assert counts["bytes"] == sum(len(text.encode()) for text in texts)
    assert counts["targets"] == sum(len(p) - 1 for p in pieces)
    assert counts["packing_efficiency"] == pytest.approx(sum(map(len, pieces)) / 32 / len(rows["train"]))
    assert counts["packing_efficiency"] > 0.97


def test_masked_pieces(corpus, tokenizers, tmp_path):
    tokenizer, _, rows, manifest = prepared(corpus, tokenizers, "mlm", tmp_path)
    total = 0
    for row in rows["train"]:
        for piece in np.split(row["input_ids"], np.cumsum(row["lengths"])[:-1]):
            assert (piece[0], piece[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
            assert not np.isin(piece[1:-1], tokenizer.all_special_ids).any()
            total += len(piece) - 2
        assert len(row["word_starts"]) == len(row["input_ids"])
    assert total == manifest["splits"]["train"]["text_tokens"]


def test_cache_of_prepared_data(corpus, tokenizers, tmp_path):
    _, folder, _, _ = prepared(corpus, tokenizers, "clm", tmp_path)
    before = Path(folder, "train.arrow").stat().st_mtime_ns
    assert prepared(corpus, tokenizers, "clm", tmp_path)[1] == folder
    assert Path(folder, "train.arrow").stat().st_mtime_ns == before
    others = {
        prepared(corpus, tokenizers, "clm", tmp_path, max_length=33)[1],
        prepared(corpus, tokenizers, "mlm", tmp_path)[1],
        prepared(corpus, tokenizers, "clm", tmp_path, max_tokens=500)[1],
    }
    changed = tmp_path / "train.jsonl"
    changed.write_text(Path(corpus["train"]).read_text() + '{"text": "one more"}\n')
    others.add(prepared(corpus | {"train": str(changed)}, tokenizers, "clm", tmp_path)[1])
    assert len(others) == 4 and folder not in others
    assert not list(tmp_path.glob("*.incomplete*"))


def test_max_tokens(corpus, tokenizers, tmp_path):
    _, _, _, manifest = prepared(corpus, tokenizers, "clm", tmp_path, max_tokens=2000)
    assert 2000 <= manifest["splits"]["train"]["text_tokens"] < 2600


def test_eval_fraction_by_content(corpus, tokenizers, tmp_path):
    """A copy of a document is never on the other side."""
    lines = Path(corpus["train"]).read_text().splitlines()
    twice = tmp_path / "twice.jsonl"
    twice.write_text("\n".join(lines + lines))
    tokenizer = load_tokenizer(tokenizers["clm"])
    folder = prepare([Source(str(twice))], [], tokenizer, "clm", 32, str(tmp_path), eval_fraction=0.2)
    splits = load_prepared(folder)[1]["splits"]
    assert splits["train"]["documents"] + splits["validation"]["documents"] == 800
    assert splits["train"]["documents"] % 2 == splits["validation"]["documents"] % 2 == 0
    assert 0.12 < splits["validation"]["documents"] / 800 < 0.28


def test_mixture_weights(tokenizers, tmp_path):
    """Long and short documents, 3 : 1 in tokens; the smaller source is read again, and the manifest says so."""
    tokenizer = load_tokenizer(tokenizers["clm"])
    for name, low, high in (("short", 3, 6), ("long", 80, 120)):
        lines = [json.dumps({"text": text}) for text in make_text(150, 3, low, high)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    (tmp_path / "valid.txt").write_text("held out text of its own")
    weights = {"short": 3, "long": 1}
    sources = parse_sources([{"path": str(tmp_path / f"{n}.jsonl"), "weight": w} for n, w in weights.items()], "key")
    folder = prepare(
        sources, [Source(str(tmp_path / "valid.txt"))], tokenizer, "clm", 64, str(tmp_path), max_tokens=20_000
    )
    short, long = load_prepared(folder)[1]["sources"]
    assert short["tokens"] / (short["tokens"] + long["tokens"]) == pytest.approx(0.75, abs=0.01)
    assert short["documents"] > 150, "read more than once"


def test_same_documents_in_every_format(tmp_path):
    import pandas as pd

    from unlabeled.data.readers import read_documents

    texts = ["First, with a comma.", 'Second "quoted"\nand broken over lines.', "Third: naïve café."]
    frame = pd.DataFrame({"text": texts, "other": [1, 2, 3]})
    frame.to_json(tmp_path / "a.jsonl", orient="records", lines=True)
    frame.to_csv(tmp_path / "a.csv", index=False)
    frame.to_parquet(tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.csv", "a.parquet"):
        assert list(read_documents(Source(str(tmp_path / name)))) == texts
    for index, text in enumerate(texts):
        (tmp_path / f"t{index}.txt").write_text(text, encoding="utf-8")
    assert list(read_documents(Source(str(tmp_path / "t*.txt")))) == texts
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.csv").rename(tmp_path / "folder" / "b.csv")
    assert list(read_documents(Source(str(tmp_path / "folder")))) == texts


def test_unknown_source_field():
    with pytest.raises(UserError, match="train_data: a source has no field 'wieght'; did you mean 'weight'"):
        parse_sources({"path": "x.txt", "wieght": 2}, "train_data")
