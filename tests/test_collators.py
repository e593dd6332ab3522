"""Labels and masks: known rates, nothing special ever selected, and the same mask for the same (seed, epoch, row)."""

import numpy as np
import pytest
import torch
from conftest import make_text

from unlabeled.data.collators import DataCollatorForPackedLanguageModeling
from unlabeled.data.preparing import load_prepared, prepare
from unlabeled.data.randomness import epoch_permutation, seeded_generator
from unlabeled.data.rows import EvaluationRows, TrainingRows
from unlabeled.data.sources import Source
from unlabeled.data.tokenization import encode_batch, load_tokenizer


@pytest.fixture(scope="module")
def rows(corpus, tokenizers, tmp_path_factory):
    """Prepared rows of 32 tokens for both objectives."""
    cache = str(tmp_path_factory.mktemp("prepared"))
    found = {}
    for objective in ("clm", "mlm"):
        sources = [Source(corpus["train"])], [Source(corpus["validation"])]
        folder = prepare(*sources, load_tokenizer(tokenizers[objective]), objective, 32, cache)
        found[objective] = load_prepared(folder)[0]
    return found


@pytest.fixture(scope="module")
def tokenizer(tokenizers):
    return load_tokenizer(tokenizers["mlm"])


def test_causal_labels(rows, tokenizers):
    collator = DataCollatorForPackedLanguageModeling(load_tokenizer(tokenizers["clm"]), max_length=32)
    examples = TrainingRows(rows["clm"]["train"], 64, seed=0).__getitems__(list(range(64)))
    batch = collator(examples)
    assert set(batch) == {"input_ids", "labels", "position_ids"}, "an attention_mask would switch the isolation off"
    for example, ids, labels, positions in zip(examples, *batch.values(), strict=True):
        used = len(example["input_ids"])
        starts = np.cumsum([0, *example["lengths"]])[:-1]
        expected = torch.tensor(example["input_ids"].astype(np.int64))
        assert torch.equal(ids[:used], expected)
        assert (labels[used:] == -100).all() and (labels[starts] == -100).all()
        inside = np.setdiff1d(np.arange(used), starts)
        assert torch.equal(labels[inside], expected[inside]), "the closing eos is a target like any other"
        assert (positions[starts] == 0).all()


def masked(tokenizer, **options) -> DataCollatorForPackedLanguageModeling:
    return DataCollatorForPackedLanguageModeling(
        tokenizer, mlm=True, **({"max_length": 128, "mlm_probability": 0.15} | options)
    )


def long_example(tokenizer, tokens: int, row: int = 0, epoch: int = 0) -> dict:
    """One row of that many tokens in documents of 128, framed, as `prepare` would write it."""
    ordinary = np.setdiff1d(np.arange(len(tokenizer)), tokenizer.all_special_ids)
    ids = np.random.default_rng(1).choice(ordinary, tokens)
    ids[::128], ids[127::128] = tokenizer.cls_token_id, tokenizer.sep_token_id
    return {"input_ids": ids, "lengths": [128] * (tokens // 128), "word_starts": np.ones(tokens, bool), "row": row,
            "epoch": epoch}  # fmt: skip


@pytest.mark.parametrize("probability", [0.15, 0.3, 0.5])
def test_masking_rates(tokenizer, probability):
    """Selected, and of these mask / random / keep, within five standard errors; never a special token."""
    example = long_example(tokenizer, 1024 * 200)
    collator = masked(tokenizer, mlm_probability=probability)
    ids, targets = collator.mask(example)
    original = example["input_ids"]
    special = np.isin(original, tokenizer.all_special_ids)
    ordinary = (~special).sum()
    assert not special[targets].any()
    untouched = np.setdiff1d(np.arange(len(original)), targets)
    assert (ids[untouched] == original[untouched]).all()

    def near(count, total, rate):
        return abs(count / total - rate) < 5 * (rate * (1 - rate) / total) ** 0.5

    assert near(len(targets), ordinary, probability)
    to_mask = (ids[targets] == tokenizer.mask_token_id).sum()
    kept = (ids[targets] == original[targets]).sum()
    vocabulary = len(collator.ordinary_ids)
    assert near(to_mask, len(targets), 0.8)
    assert near(kept, len(targets), 0.1 + 0.1 / vocabulary), "a random token can be the original by chance"
    random_ids = ids[targets][(ids[targets] != tokenizer.mask_token_id)]
    assert not np.isin(random_ids, tokenizer.all_special_ids).any()
    assert len(np.unique(random_ids)) == vocabulary, "every ordinary token can be drawn"


def test_mask_replace_prob_of_one(tokenizer):
    ids, targets = masked(tokenizer, mask_replace_prob=1.0, random_replace_prob=0.0).mask(long_example(tokenizer, 1280))
    assert (ids[targets] == tokenizer.mask_token_id).all()


def test_at_least_one_target_per_row(tokenizer):
    collator = masked(tokenizer, mlm_probability=1e-9)
    for row in range(50):
        example = long_example(tokenizer, 128, row=row)
        assert len(collator.mask(example)[1]) == 1


def test_masks_by_seed_epoch_and_row(rows, tokenizer):
    training = TrainingRows(rows["mlm"]["train"], 3 * len(rows["mlm"]["train"]), seed=5)
    n = len(rows["mlm"]["train"])
    collator = masked(tokenizer, seed=5, max_length=32)
    first, again = (collator(training.__getitems__(list(range(40)))) for _ in range(2))
    assert all(torch.equal(first[key], again[key]) for key in first), "calling it again changes nothing"
    one_by_one = [collator([training[i]]) for i in range(40)]
    assert torch.equal(first["labels"], torch.cat([batch["labels"] for batch in one_by_one]))

    def masks(collator, epoch):
        examples = training.__getitems__([epoch * n + i for i in range(n)])
        return {e["row"]: tuple(collator.mask(e)[1]) for e in examples if len(e["input_ids"]) > 20}

    base = masks(collator, 0)
    for other in (masks(collator, 1), masks(masked(tokenizer, seed=6, max_length=32), 0)):
        assert np.mean([base[row] == other[row] for row in base]) < 0.1, "another epoch or seed, another mask"


@pytest.mark.parametrize("workers", [0, 2])
def test_data_loader_workers(rows, tokenizer, workers):
    from torch.utils.data import DataLoader

    training = TrainingRows(rows["mlm"]["train"], 100, seed=0)
    collator = masked(tokenizer, max_length=32)
    expected = [collator(training.__getitems__(list(range(i, min(i + 8, 100))))) for i in range(0, 100, 8)]
    batches = list(DataLoader(training, batch_size=8, collate_fn=collator, num_workers=workers))
    assert len(batches) == len(expected)
    for got, wanted in zip(batches, expected, strict=True):
        assert all(torch.equal(got[key], wanted[key]) for key in wanted)


def test_whole_word_mask(tokenizers):
    """Offset gaps, which the stock collator goes by, do not exist there."""
    tokenizer = load_tokenizer(tokenizers["clm"])
    tokenizer.add_special_tokens({"mask_token": "<mask>", "cls_token": "<cls>", "sep_token": "<sep>"})
    text = " ".join(make_text(40, 9))
    (ids,), (starts,) = encode_batch(tokenizer, [text], word_starts=True)
    assert 0.2 < starts.mean() < 0.95, "words of several tokens are what this is about"
    example = {"input_ids": ids, "lengths": [len(ids)], "word_starts": starts, "row": 0, "epoch": 0}
    collator = masked(tokenizer, whole_word_mask=True, mlm_probability=0.3, max_length=len(ids))
    _, targets = collator.mask(example)
    words = np.cumsum(starts) - 1
    chosen = np.zeros(len(ids), bool)
    chosen[targets] = True
    for word in range(words.max() + 1):
        assert chosen[words == word].all() or not chosen[words == word].any()
    assert 0.15 < chosen.mean() < 0.45


def test_training_rows(rows):
    data, n = rows["clm"]["train"], len(rows["clm"]["train"])
    training = TrainingRows(data, 2 * n + 5, seed=3)
    visited = [example["row"] for example in training.__getitems__(list(range(2 * n + 5)))]
    assert sorted(visited[:n]) == sorted(visited[n : 2 * n]) == list(range(n))
    assert visited[:n] != visited[n : 2 * n] and visited[:n] != list(range(n))
    assert [training[i]["row"] for i in (n + 1, 0, 2 * n)] == [visited[i] for i in (n + 1, 0, 2 * n)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_evaluation_rows(rows, world_size):
    data = rows["mlm"]["validation"]
    shares = [EvaluationRows(data, rank, world_size) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1, "under ZeRO-3 a forward pass is collective"
    examples = [example for share in shares for example in share.__getitems__(list(range(len(share))))]
    full = [example["row"] for example in examples if len(example["input_ids"])]
    assert sorted(full) == list(range(len(data)))


def test_seeded_generators_differ():
    keys = [("mask", 0), ("mask", 0, 0), ("mask", 0, 0, 0), ("order", 0), ("mask", 1), ("mask", 1, 0), ("mask", 0, 1)]
    draws = [seeded_generator(*key).integers(1 << 62) for key in keys]
    assert len(set(draws)) == len(draws)
    assert seeded_generator("mask", 1, 2, 3).integers(1 << 62) == seeded_generator("mask", 1, 2, 3).integers(1 << 62)
    assert epoch_permutation(0, 0, 50).tolist() != epoch_permutation(0, 1, 50).tolist()


def test_golden_random_numbers():
    """A mask of today has to be that of next year: a changed stream would break every resumed run."""
    assert epoch_permutation(0, 0, 8).tolist() == [7, 0, 3, 1, 2, 6, 5, 4]
