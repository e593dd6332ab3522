"""What holds for every input, over thousands that hypothesis thinks of: packing, masks, spans, budgets, streams."""

import json
import re
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from unlabeled import UserError
from unlabeled.data.collators import DataCollatorForPackedLanguageModeling, DataCollatorForSpanCorruption
from unlabeled.data.fim import cut_in_three
from unlabeled.data.packing import best_fit, layout_rows, span_row_cost, split_points
from unlabeled.data.rows import TrainingRows
from unlabeled.data.span_corruption import spans_by_sentinel
from unlabeled.data.streams.reading import FileSegment, read_chunks
from unlabeled.data.tokenization import encode_batch, load_tokenizer
from unlabeled.planning import plan_steps
from unlabeled.planning.spans import Denoiser, span_lengths

# The same examples each time: a failure is a fault and not luck.
many = settings(
    max_examples=400, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
row_lengths = st.integers(2, 200)


@pytest.fixture(scope="module")
def tokenizer(tokenizers):
    return {objective: load_tokenizer(path) for objective, path in tokenizers.items()}


@many
@given(st.integers(0, 5000), row_lengths, st.integers(0, 1))
def test_split_points(length, room, overlap):
    points = split_points(length, room, overlap)
    assert points[0][0] == 0 and points[-1][1] == length
    assert all(0 < end - start <= room for start, end in points) or length == 0
    assert all(end - overlap == start for (_, end), (start, _) in pairwise(points))
    assert overlap == 0 or length < 2 or all(end - start >= 2 for start, end in points), "context and a target"


@many
@given(st.data(), row_lengths)
def test_best_fit(data, row_length):
    lengths = data.draw(st.lists(st.integers(1, row_length), max_size=300))
    rows = best_fit(lengths, row_length)
    assert sorted(piece for row in rows for piece in row) == list(range(len(lengths)))
    used = sorted(sum(lengths[piece] for piece in row) for row in rows)
    assert all(tokens <= row_length for tokens in used)
    assert len(used) < 2 or used[0] + used[1] > row_length, "two rows that would be one"


@many
@given(st.data(), row_lengths)
def test_layout_rows(data, row_length):
    documents = data.draw(st.lists(st.integers(1, row_length), max_size=20))
    assume(sum(documents) <= row_length)
    rows = layout_rows([documents], row_length)
    assert int(rows.padding.sum()) == row_length - sum(documents)
    assert int(rows.starts.sum()) == len(documents) + (sum(documents) < row_length)
    place = 0
    for number, length in enumerate(documents):
        assert (rows.document_ids[0, place : place + length] == number).all()
        assert rows.position_ids[0, place : place + length].tolist() == list(range(length))
        place += length


@many
@given(st.integers(1, 40), st.integers(1, 200), st.integers(0, 2**31), st.integers(0, 150))
def test_training_rows_after_resume(rows, total, seed, first):
    class Rows(list):
        def __getitem__(self, places):
            return {"place": places}

    order = TrainingRows(Rows([None] * rows), total + first, seed)
    whole = [one["place"] for one in order.__getitems__(list(range(total + first)))]
    for start in range(0, len(whole) - rows + 1, rows):
        assert sorted(whole[start : start + rows]) == list(range(rows))
    order.resume(first, "")
    assert [one["place"] for one in order.__getitems__(list(range(total)))] == whole[first:]


def documents_of(draw, vocabulary: np.ndarray, row_length: int, least: int = 1) -> list[np.ndarray]:
    lengths, left = [], row_length
    while left >= least and (length := draw(st.integers(0, left))) >= least:
        lengths.append(length)
        left -= length
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    return [rng.choice(vocabulary, length) for length in lengths]


@many
@given(st.data(), st.floats(0.01, 1.0), st.integers(0, 10**6), st.integers(0, 5), st.booleans())
def test_masks(tokenizer, data, probability, row, epoch, whole_words):
    known = tokenizer["mlm"]
    ordinary = np.setdiff1d(np.arange(len(known)), known.all_special_ids)
    documents = [
        np.concatenate([[known.cls_token_id], ids, [known.sep_token_id]])
        for ids in documents_of(data.draw, ordinary, 60)
    ][:10]
    length = sum(map(len, documents)) + 4
    ids = np.concatenate([*documents, np.empty(0, int)]).astype(int)
    example = {"input_ids": ids, "lengths": [len(one) for one in documents], "word_starts": np.ones(len(ids), bool)}
    example |= {"row": row, "epoch": epoch}
    collator = DataCollatorForPackedLanguageModeling(
        known, mlm=True, max_length=length, mlm_probability=probability, whole_word_mask=whole_words, seed=3
    )
    other = {**example, "row": row + 1, "input_ids": ids[::-1].copy()}
    batch, among = collator([example]), collator([other, example])
    labels, inputs = batch["labels"][0].numpy(), batch["input_ids"][0].numpy()
    assert (labels == among["labels"][1].numpy()).all() and (inputs == among["input_ids"][1].numpy()).all()
    targets = labels != -100
    padded = np.concatenate([ids, np.full(length - len(ids), known.pad_token_id)])
    assert (labels[targets] == padded[targets]).all() and (inputs[~targets] == padded[~targets]).all()
    assert not np.isin(padded[targets], known.all_special_ids).any()
    assert targets.any() == bool(documents), "a row has a target"
    assert np.isin(inputs[targets], [*ordinary, known.mask_token_id]).all()


@many
@given(st.data())
def test_causal_labels(tokenizer, data):
    known = tokenizer["clm"]
    documents = documents_of(data.draw, np.arange(len(known)), 50)
    ids = np.concatenate([*documents, np.empty(0, int)]).astype(int)
    batch = DataCollatorForPackedLanguageModeling(known, max_length=50)(
        [{"input_ids": ids, "lengths": [len(one) for one in documents]}]
    )
    labels = batch["labels"][0].numpy()
    assert (labels[labels != -100] == np.concatenate([*(one[1:] for one in documents), np.empty(0, int)])).all()
    assert int((labels != -100).sum()) == len(ids) - len(documents)


@many
@given(st.data(), st.floats(0.02, 0.9), st.floats(1, 20), st.integers(0, 10**6))
def test_span_corruption(tokenizer, data, density, mean, row):
    known, denoiser = tokenizer["span"], Denoiser(density, mean)
    collator = DataCollatorForSpanCorruption(known, max_length=1024)
    collator.denoisers, collator.mode_ids = (denoiser,), [[]]
    ordinary = np.setdiff1d(np.arange(len(known)), known.all_special_ids)
    documents = documents_of(data.draw, ordinary, 90, least=2)
    assume(documents)
    example = {
        "input_ids": np.concatenate(documents),
        "lengths": [len(one) for one in documents],
        "row": row,
        "epoch": 0,
    }
    for text, (inputs, targets) in zip(documents, collator.corrupt_documents(example), strict=True):
        assert (len(inputs), len(targets)) == denoiser.lengths(len(text))
        used = [token for token in inputs.tolist() if token in set(collator.sentinels)]
        restored = spans_by_sentinel(targets[:-1], used)
        assert [token for place in inputs[:-1].tolist() for token in restored.get(place, [place])] == text.tolist()


@many
@given(st.integers(8, 600), st.lists(st.tuples(st.floats(0.02, 0.9), st.floats(1, 40)), min_size=1, max_size=4))
def test_span_row_lengths(inputs_length, mixture):
    denoisers = [Denoiser(*one) for one in mixture]
    longest, most = span_lengths(denoisers, inputs_length)
    assume(longest >= 2)
    room = span_row_cost(denoisers, inputs_length)
    for denoiser in denoisers:
        inputs, targets = denoiser.lengths(longest)
        assert inputs <= inputs_length and targets <= most
        length, _ = denoiser.fitting(inputs_length)
        assert denoiser.lengths(length + 2)[0] > inputs_length, "there would be room for more"
    assert (room[2:] >= 1).all() and room.max() <= inputs_length


@many
@given(
    st.integers(1, 10**9), st.integers(1, 10**6), st.integers(1, 4096), st.integers(1, 64), st.integers(1, 64)
)  # fmt: skip
def test_budget(train, batch, max_length, micro, processes):
    sizes = (max_length, micro, processes)
    try:
        budget = plan_steps(train, batch, *sizes)
    except UserError as error:
        key, nearest = re.match(r"(\w+) .* the nearest values are (\d+) and \d+", str(error)).groups()
        batch = int(nearest) if key == "batch_tokens" else batch
        train = int(nearest) if key == "train_tokens" else batch * 3
        budget = plan_steps(train, batch, *sizes)
    assert budget.gradient_accumulation_steps * max_length * micro * processes == batch
    assert budget.steps * batch == train


@many
@given(st.text(st.characters(codec="utf-8"), max_size=200))
def test_cut_in_three(text):
    assert "".join(cut_in_three(text)) == text


@many
@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=60), max_size=12))
def test_bpe_round_trip(tokenizer, texts):
    known = tokenizer["clm"]
    for text, ids in zip(texts, encode_batch(known, texts), strict=True):
        assert known.decode(ids, clean_up_tokenization_spaces=False) == text


@many
@given(
    st.lists(st.none() | st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=40), max_size=30),
    st.integers(1, 40),
    st.sampled_from(["\n", "\r\n", "\n\n"]),
)
def test_segments_of_any_lines(tmp_path, texts, count, newline):
    file = tmp_path / "lines.jsonl"
    lines = [json.dumps({"text": text}, ensure_ascii=len(texts) % 2 == 0) for text in texts]
    file.write_bytes(newline.join(lines).encode())
    found = [
        text
        for index in range(count)
        for _, _, part in read_chunks(FileSegment(str(file), index, count), "text")
        for text in part
    ]
    assert found == [text or "" for text in texts]
