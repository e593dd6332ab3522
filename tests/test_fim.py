"""Filling in the middle: nothing of the text is lost or seen twice, rates are what they say, held-out text stays."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_text, recipe_arguments, run_recipe
from test_tools import make_model, run
from transformers import AutoModelForCausalLM

from unlabeled import UserError
from unlabeled.config import FIMArguments
from unlabeled.data.fim import FIM_TOKENS, add_fim_tokens, cut_in_three, rearrange
from unlabeled.data.identity import fingerprint
from unlabeled.data.preparing import load_prepared, prepare
from unlabeled.data.sources import Source
from unlabeled.data.tokenization import encode_batch, load_tokenizer

LENGTH = 64
ALPHABET = [*"aäß ,\nбж漢字🙂", "e\u0301", "👩\u200d🚀", *FIM_TOKENS]


def random_texts(number: int, longest: int, seed: int = 0) -> list[str]:
    draw = np.random.default_rng(seed)
    return ["".join(draw.choice(ALPHABET, draw.integers(1, longest))) for _ in range(number)]


@pytest.fixture
def tokenizer(tokenizers):
    tokenizer = load_tokenizer(tokenizers["clm"])
    add_fim_tokens(tokenizer, 0.5)
    return tokenizer


def signs(tokenizer) -> list[int]:
    return tokenizer.convert_tokens_to_ids(list(FIM_TOKENS))


def restored(piece, tokenizer) -> tuple[str, str]:
    """The text of a piece in its own order, by the definition of the formats, and which one it is."""
    piece, (prefix, suffix, middle) = list(map(int, piece)), signs(tokenizer)
    ends = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    if piece[1] != prefix:
        return tokenizer.decode([token for token in piece if token not in ends]), "as it is"
    assert (piece[0], piece[-1]) == ends and not set(piece[1:-1]) & set(ends)
    assert [token for token in piece if token in (prefix, suffix, middle)] == [prefix, suffix, middle]
    second, third = piece.index(suffix), piece.index(middle)
    before, after, rest = (
        tokenizer.decode(part) for part in (piece[2:second], piece[second + 1 : third], piece[third + 1 : -1])
    )
    return before + rest + after, "psm" if before else "spm"  # without a prefix they are the same


def test_cut_in_three():
    texts = random_texts(4000, 60)
    cuts = [cut_in_three(text) for text in texts]
    assert ["".join(parts) for parts in cuts] == texts
    assert cuts == [cut_in_three(text) for text in texts]
    # Each of the 11 places of ten letters is a cut equally often: 2 of 4000 cuts, within 5 sigma.
    places = [
        len(before) + i * len(between)
        for number in range(4000)
        for before, between, _ in [cut_in_three(f"{number:010}")]
        for i in (0, 1)
    ]
    counts = np.bincount(places, minlength=11)
    assert len(counts) == 11
    assert np.abs(counts - 8000 / 11).max() < 5 * (8000 / 11 * 10 / 11) ** 0.5


@pytest.mark.parametrize(("max_length", "number", "longest"), [(16, 40, 100), (64, 1000, 40)])
def test_rearranged_pieces_contain_whole_text(tokenizer, max_length, number, longest):
    """Of characters of one to four bytes, each up to four tokens, of what they combine to, and of the signs' names."""
    texts = list(dict.fromkeys(random_texts(number, longest, seed=max_length) + make_text(20, 2)))
    found, kinds = rearrange(texts, tokenizer, max_length), []
    for text in texts:
        pieces, rearranged = found[text].pieces, found[text].rearranged
        orders = [restored(piece, tokenizer) for piece in pieces]
        assert "".join(part for part, _ in orders) == text
        cut = [kind != "as it is" for _, kind in orders]
        assert rearranged == sum(cut)
        assert all(len(piece) <= max_length for piece, is_cut in zip(pieces, cut, strict=True) if is_cut)
        # What stays as it is ends only where the text does.
        ends = [int(piece[-1]) == tokenizer.eos_token_id for piece in pieces]
        assert ends == [*cut[:-1], True]
        kinds += cut
    assert 0.7 < sum(kinds) / len(kinds) < 1, "what stays as it is is tested too"


def test_psm_and_spm_rates(tokenizer):
    """Without a prefix, which 1 - (99/100)^2 of texts of 99 characters lack, they are the same."""
    texts = [f"{number:099}" for number in range(1000)]
    found = rearrange(texts, tokenizer, 256)
    psm = sum(restored(found[text].pieces[0], tokenizer)[1] == "psm" for text in texts)
    share = 0.5 * 0.99**2
    assert abs(psm - 1000 * share) < 5 * (1000 * share * (1 - share)) ** 0.5


def documents(row: dict) -> list[np.ndarray]:
    return np.split(row["input_ids"], np.cumsum(row["lengths"])[:-1])


def test_prepared_fim_text(corpus, tokenizer, tmp_path):
    """The rate, the rows, every token and character, the counts of the manifest; and held-out text as it was."""
    texts = [f"{number} {text}" for number, text in enumerate(make_text(600, 3, 3, 40))] + make_text(5, 4, 400, 500)
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    def make(rate: float, evaluation: str | None = corpus["validation"], **options):
        sources = [Source(str(tmp_path / "train.jsonl"))], [Source(evaluation)] if evaluation else []
        folder = Path(prepare(*sources, tokenizer, "clm", LENGTH, str(tmp_path), fim_rate=rate, **options))
        return folder, *load_prepared(str(folder))

    plain, _, before = make(0.0)
    for rate in (0.3, 1.0):
        folder, rows, manifest = make(rate)
        train, rows = manifest["splits"]["train"], list(rows["train"])
        pieces = [piece for row in rows for piece in documents(row)]
        assert max(len(row["input_ids"]) for row in rows) <= LENGTH
        assert train["targets"] == sum(len(piece) - 1 for piece in pieces)
        for key in ("documents", "bytes", "text_tokens"):
            assert train[key] == before["splits"]["train"][key]
        chosen = train["rearranged"]["documents"]
        assert abs(chosen - rate * len(texts)) <= 5 * (len(texts) * rate * (1 - rate)) ** 0.5
        cut = [piece for piece in pieces if piece[1] == signs(tokenizer)[0]]
        assert len(cut) == train["rearranged"]["pieces"] >= chosen
        whole = [restored(piece, tokenizer)[0] for piece in cut]
        known = set(texts)
        assert sum(text in known for text in whole) > 0.5 * chosen, "most texts fit a row"
        if rate == 1.0:
            assert sorted("".join(restored(piece, tokenizer)[0] for piece in pieces)) == sorted("".join(texts))
            assert train["rearranged"]["text_tokens"] == train["text_tokens"]
        assert (folder / "validation.arrow").read_bytes() == (plain / "validation.arrow").read_bytes()
        assert "rearranged" not in manifest["splits"]["validation"] and manifest["fim_rate"] == rate
    held_out = [make(rate, None, eval_fraction=0.3)[0] / "validation.arrow" for rate in (0.0, 1.0)]
    assert held_out[0].read_bytes() == held_out[1].read_bytes()


def test_fim_rate_zero(corpus, tokenizers, tmp_path):
    """Neither a fingerprint nor a tokenizer; the fingerprint is that of before there was such a key."""
    tokenizer = load_tokenizer(tokenizers["clm"])
    size = len(tokenizer)
    assert add_fim_tokens(tokenizer, 0.0) is None and len(tokenizer) == size
    sources = [Source(corpus["train"])], [Source(corpus["validation"])]
    manifest = load_prepared(prepare(*sources, tokenizer, "clm", LENGTH, str(tmp_path)))[1]
    assert "rearranged" not in manifest["splits"]["train"]
    later = ("fingerprint", "splits", "sources", "skipped_files", "repaired", "seconds", "seconds_per_million_tokens")
    later += ("sha256",)
    plan = {key: value for key, value in manifest.items() if key not in later}
    assert manifest["fingerprint"] == fingerprint(plan)
    assert set(plan) == {
        "format",
        "objective",
        "max_length",
        "tokenizer",
        "frame",
        "train",
        "evaluation",
        "eval_fraction",
        "max_tokens",
    }
    assert add_fim_tokens(tokenizer, 0.1) == f"new tokens to fill in the middle: {', '.join(FIM_TOKENS)}"
    assert add_fim_tokens(tokenizer, 0.1) is None and len(tokenizer) == size + 3
    forged = encode_batch(tokenizer, ["".join(FIM_TOKENS)])[0]
    assert not set(forged.tolist()) & set(signs(tokenizer)) and tokenizer.decode(forged) == "".join(FIM_TOKENS)


def test_fim_errors(corpus, tokenizers, tokenizer, tmp_path):
    for rate in (-0.1, 1.5, float("nan")):
        with pytest.raises(UserError, match=rf"^fim_rate is {rate}; set it to a share between 0 and 1$"):
            FIMArguments(rate)
    sources = [Source(corpus["train"])], [Source(corpus["validation"])]
    with pytest.raises(UserError, match=r"^max_length 15 has no room .*; set it to 16 or more$"):
        prepare(*sources, tokenizer, "clm", 15, str(tmp_path), fim_rate=0.5)
    with pytest.raises(UserError, match=r"^fim_rate is for causal models, and the objective is mlm; remove it$"):
        prepare(*sources, load_tokenizer(tokenizers["mlm"]), "mlm", LENGTH, str(tmp_path), fim_rate=0.5)
    arguments = recipe_arguments("mlm", "bert", corpus, tokenizers, tmp_path / "run", fim_rate=0.5)
    with pytest.raises(UserError, match="unknown option --fim_rate"):
        run_recipe("pretrain_mlm", arguments)


def test_fim_run(corpus, tokenizers, tmp_path, capsys):
    """Continued from one that has never seen the signs, it grows."""
    base, out = tmp_path / "base", tmp_path / "run"
    make_model(base, load_tokenizer(tokenizers["clm"]), initializer_range=0.02)
    arguments = recipe_arguments("clm", "llama", corpus, tokenizers, out, fim_rate=0.5, model_name_or_path=base)
    for key in ("--model_type", "--config_overrides", "--tokenizer_name_or_path"):
        del arguments[arguments.index(key) : arguments.index(key) + 2]
    run_recipe("pretrain_clm", arguments)
    assert "new tokens to fill in the middle" in capsys.readouterr().out
    tokenizer, model = load_tokenizer(str(out)), AutoModelForCausalLM.from_pretrained(out)
    assert None not in signs(tokenizer) and set(signs(tokenizer)) <= set(tokenizer.all_special_ids)
    assert model.config.vocab_size == len(tokenizer) == len(load_tokenizer(tokenizers["clm"])) + 3
    lineage = json.loads((out / "lineage.json").read_text())
    assert lineage["configuration"]["fim_rate"] == 0.5
    assert lineage["data"]["splits"]["train"]["rearranged"]["documents"] > 100

    run("generate", out, "the people _ of state.", "--max_new_tokens", 8)
    filled = capsys.readouterr().out.strip("\n")
    ids = encode_batch(tokenizer, ["the people ", " of state."])
    prefix, suffix, middle = ([sign] for sign in signs(tokenizer))
    asked = np.concatenate([[tokenizer.bos_token_id], prefix, ids[0], suffix, ids[1], middle]).tolist()
    said = model.generate(torch.tensor([asked]), max_new_tokens=8, do_sample=False)[0, len(asked) :]
    assert filled == f"the people {tokenizer.decode(said, skip_special_tokens=True)} of state."
