"""Long texts are encoded in windows: the ids, offsets and word starts are those of the whole, in bounded memory."""

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, make_text
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from unlabeled.data import encoding, tokenizer_training
from unlabeled.data.encoding import bare_backend, encode_texts
from unlabeled.data.label_encoding import encode_framed
from unlabeled.data.pairs import read_pairs
from unlabeled.data.tokenization import load_tokenizer, token_offsets

GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
ODD = [
    "\n", "\r\n", "\n\n", " \n ", "\t", "  ", " " * 90, "é", "e\u0301", "\u0301", "ﬁ", "İ", "日本語の文", "\u202e",
    "👩‍👩‍👧", "123456", "1" * 130, "!!!", "don't", "x" * 100, "<think>", "<|endoftext|>",
    "[MASK]", "</s>", "\ufeff", "\x00",
]  # fmt: skip


def train(model, trainer, normalizer=None, pre_tokenizer=None, post_processor=None) -> Tokenizer:
    backend = Tokenizer(model)
    if normalizer is not None:
        backend.normalizer = normalizer
    if pre_tokenizer is not None:
        backend.pre_tokenizer = pre_tokenizer
    backend.train_from_iterator([*make_text(200, 0), "don't stop 12 345, é"], trainer)
    if post_processor is not None:
        backend.post_processor = post_processor
    backend.add_tokens([AddedToken("<think>", special=False), AddedToken("stop", lstrip=True, single_word=True)])
    backend.add_special_tokens([AddedToken("<|endoftext|>", rstrip=True)])
    return backend


def make_backends() -> dict[str, Tokenizer]:
    """Tokenizers as published models have them, trained on a little text."""
    silent = {"show_progress": False}
    bytes_ = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), **silent}
    metaspace = pre_tokenizers.Metaspace(prepend_scheme="always")
    replace = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    return {
        "gpt2": train(
            models.BPE(),
            trainers.BpeTrainer(vocab_size=400, **bytes_),
            pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True),
            post_processor=processors.ByteLevel(trim_offsets=True),
        ),
        "llama3": train(
            models.BPE(),
            trainers.BpeTrainer(vocab_size=400, **bytes_),
            normalizer=normalizers.NFC(),
            pre_tokenizer=pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Digits(individual_digits=True),
                    pre_tokenizers.Split(Regex(GPT2_SPLIT), behavior="isolated"),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            ),
        ),
        "bert": train(
            models.WordPiece(unk_token="[UNK]"),
            trainers.WordPieceTrainer(vocab_size=256, special_tokens=["[UNK]", "[MASK]"], **silent),
            normalizer=normalizers.BertNormalizer(lowercase=True),
            pre_tokenizer=pre_tokenizers.BertPreTokenizer(),
        ),
        "t5": train(
            models.Unigram(),
            trainers.UnigramTrainer(vocab_size=256, special_tokens=["<unk>", "</s>"], unk_token="<unk>", **silent),
            normalizer=normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]),
            pre_tokenizer=metaspace,
        ),
        "llama2": train(  # no words: all of a text is one
            models.BPE(unk_token="<unk>", fuse_unk=True),
            trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>"], max_token_length=8, **silent),
            normalizer=normalizers.Sequence(replace),
        ),
        "fixed length": train(
            models.BPE(),
            trainers.BpeTrainer(vocab_size=400, **bytes_),
            pre_tokenizer=pre_tokenizers.Sequence(
                [pre_tokenizers.FixedLength(5), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
            ),
        ),
        "no words": train(
            models.Unigram(),
            trainers.UnigramTrainer(vocab_size=256, special_tokens=["<unk>"], unk_token="<unk>", **silent),
            pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="first", split=False),
        ),
    }


@pytest.fixture(scope="module")
def backends(tokenizers) -> dict[str, Tokenizer]:
    ours = {name: load_tokenizer(folder).backend_tokenizer for name, folder in tokenizers.items()}
    return ours | make_backends()


@pytest.fixture(scope="module", autouse=True)
def small_windows():
    """Windows of a few hundred characters, so that texts of a few thousand have many."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"WINDOW": 400, "OVERLAP": 160, "MARGIN": 30, "BATCH_CHARACTERS": 1600}.items():
            patch.setattr(encoding, name, value)
        yield


def encode_whole(backend: Tokenizer, text: str) -> encoding.EncodedText:
    [whole] = backend.encode_batch([text], add_special_tokens=False)
    return encoding._Converter(backend, offsets=True, word_starts=True)(whole)


def assert_equal_to_whole(backend: Tokenizer, text: str) -> None:
    whole = encode_whole(backend, text)
    [pieces] = encode_texts(backend, [text], offsets=True, word_starts=True)
    assert np.array_equal(pieces.ids, whole.ids)
    assert np.array_equal(pieces.offsets, whole.offsets)
    assert np.array_equal(pieces.word_starts, whole.word_starts)


WORDS = " ".join(make_text(40, 1)).split()
TEXTS = st.lists(
    st.one_of(
        st.lists(st.sampled_from(WORDS), min_size=20, max_size=120).map(" ".join),
        st.sampled_from(ODD),
        st.text(max_size=8),
    ),
    min_size=3,
    max_size=14,
).map(lambda parts: "".join(parts) * 3)
WHOLE = ("fixed length", "no words")  # which cut a text nowhere
NAMES = ["fixed length", "clm", "mlm", "span", "gpt2", "llama3", "bert", "t5", "llama2", "no words"]


@pytest.mark.parametrize("name", NAMES)
@given(text=TEXTS, split_special_tokens=st.booleans())
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), print_blob=False)
def test_windows_equal_whole_text(name, backends, text, split_special_tokens):
    backend = backends[name]
    with bare_backend(backend, split_special_tokens=split_special_tokens, post_process=True):
        assert_equal_to_whole(backend, text)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in WHOLE])
def test_windows_of_ordinary_text(name, backends, monkeypatch):
    """Text with spaces is cut everywhere: no window grows, and each token is counted once."""
    text = " ".join(make_text(40, 7))
    backend = backends[name]
    lengths = []
    encode_batch = Tokenizer.encode_batch

    class Recorder:
        def __getattr__(self, attribute):
            return getattr(backend, attribute)

        def encode_batch(self, texts, **options):
            lengths.extend(map(len, texts))
            return encode_batch(backend, texts, **options)

    [pieces] = encode_texts(Recorder(), [text])
    assert max(lengths) < 2 * 400 + 160 and sum(lengths) < 1.5 * len(text)
    assert np.array_equal(pieces.ids, encode_whole(backend, text).ids)


def test_text_without_cut(backends, monkeypatch, capsys):
    """A tokenizer without words encodes it as a whole, and the memory for that is announced."""
    monkeypatch.setattr(encoding, "ANNOUNCED_CHARACTERS", 2000)
    text = " ".join(make_text(60, 7))
    assert_equal_to_whole(backends["no words"], text)
    assert "this tokenizer splits" in capsys.readouterr().out


def test_short_and_long_texts(backends):
    texts = ["", "one", " ".join(make_text(30, 2)), "two words", " ".join(make_text(60, 3)), "\n"]
    backend = backends["clm"]
    for text, pieces in zip(texts, encode_texts(backend, texts), strict=True):
        assert np.array_equal(pieces.ids, encode_whole(backend, text).ids)
        assert pieces.offsets is None and pieces.word_starts is None


def test_offsets(tokenizers):
    tokenizer = load_tokenizer(tokenizers["clm"])
    texts = [" ".join(make_text(30, 2)) + " <|endoftext|> end", "short"]
    options = {"add_special_tokens": False, "split_special_tokens": True, "return_offsets_mapping": True}
    expected = tokenizer(texts, **options)["offset_mapping"]
    for offsets, whole in zip(token_offsets(tokenizer, texts), expected, strict=True):
        assert offsets.tolist() == [list(pair) for pair in whole]


@pytest.mark.parametrize("name", NAMES)
def test_keep_beginning(name, backends):
    """The tokens that a cut to max_length leaves are those of the whole text; of a short text nothing is cut."""
    backend = backends[name]
    text = " ".join(make_text(40, 5))
    beginning = encoding.keep_beginning(backend, text, 64)
    assert np.array_equal(encode_whole(backend, beginning).ids[:64], encode_whole(backend, text).ids[:64])
    assert text.startswith(beginning) and (name in WHOLE or len(beginning) < len(text) / 2)
    assert encoding.keep_beginning(backend, text[:700], 4) == text[:700]


def test_long_labeled_texts(tokenizers):
    """A text far longer than max_length is cut as the library cuts it, and counted as cut."""
    tokenizer = load_tokenizer(tokenizers["mlm"])
    long, short = " ".join(make_text(40, 5)), "a short one"
    rows = encode_framed(tokenizer, [[long], [short, long], [short]], 32, words=False)
    for text, row in zip([(long,), (short, long), (short,)], rows, strict=True):
        expected = tokenizer(*text, truncation=True, max_length=32)["input_ids"]
        assert row.input_ids.tolist() == expected
    assert [row.is_truncated for row in rows] == [True, True, False]


def test_long_texts_in_pairs(tokenizers, tmp_path):
    """Its beginning is trained on, its size is counted in full."""
    texts = [" ".join(make_text(40, seed)) for seed in range(6)]
    rows = [{"anchor": text[:100], "positive": text} for text in texts]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = SimpleNamespace(train_data=str(file), eval_data=str(file), eval_fraction=0.0)
    tokenizer = load_tokenizer(tokenizers["mlm"])
    prepared, manifest = read_pairs(arguments, tokenizer, 64)
    split = manifest["splits"]["train"]
    assert split["bytes"] == sum(len(text) for row in rows for text in row.values())
    assert split["truncated"] == 6
    for row, text in zip(prepared["train"], texts, strict=True):
        assert text.startswith(row["positive"]) and len(row["positive"]) < len(text) / 2
        cut = {"truncation": True, "max_length": 64}
        assert tokenizer(row["positive"], **cut)["input_ids"] == tokenizer(text, **cut)["input_ids"]


@pytest.mark.parametrize("objective", ["clm", "mlm", "span"])
def test_split_for_training(objective, tokenizers, monkeypatch):
    """They have the words of the whole text, so the tokenizer is the same."""
    monkeypatch.setattr(tokenizer_training, "PIECE_CHARACTERS", 100)
    backend = load_tokenizer(tokenizers[objective]).backend_tokenizer

    def words(text: str) -> list[str]:
        normalized = backend.normalizer.normalize_str(text) if backend.normalizer else text
        return [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(normalized)]

    text = "".join(part + end for part, end in zip(make_text(60, 2), ODD * 3, strict=False))
    text += "\n".join("日本語の文" for _ in range(60))
    pieces = list(tokenizer_training.split_for_training(text))
    assert "".join(pieces) == text and len(pieces) > 20
    assert [word for piece in pieces for word in words(piece)] == words(text)
    assert list(tokenizer_training.split_for_training("x" * 1000)) == ["x" * 1000]


@pytest.mark.slow
def test_memory_of_long_text(tokenizers, tmp_path):
    """12 MB of text take 1.3 GB as one encoding."""
    script = """
import resource, sys
from unlabeled.data.tokenization import encode_batch, load_tokenizer
tokenizer = load_tokenizer(sys.argv[1])
text = "the king and the queen are not so good\\n" * 300_000
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
encode_batch(tokenizer, [text[:1000]])
before = peak()
encode_batch(tokenizer, [text])
print(peak() - before)
"""
    command = [sys.executable, "-c", script, tokenizers["clm"]]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert float(done.stdout) < 400
