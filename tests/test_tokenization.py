"""Tokenizers: round trips, framing, word starts, control tokens that text cannot forge, fingerprints, the script."""

import json
import random
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from unlabeled import UserError
from unlabeled.data.tokenization import (
    Framing,
    bytes_per_token,
    encode_batch,
    ensure_pad_token,
    framing,
    load_tokenizer,
    tokenizer_fingerprint,
)
from unlabeled.data.tokenizer_folder import take_bytes
from unlabeled.data.tokenizer_training import train_tokenizer

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "train_tokenizer.py"
TEXTS = [
    "BERNARDO.\nWho's there?\n\nFRANCISCO.\nNay, answer me: stand, and unfold yourself.\n\nBERNARDO.\nLong live the",
    "To be, or not to be, that is the question:\nWhether 'tis nobler in the mind to suffer\nThe slings and arrows of",
    "outrageous fortune, or to take arms against a sea of troubles, and by opposing end them. To die: to sleep;",
    "no more; and by a sleep to say we end the heart-ache and the thousand natural shocks that flesh is heir to,",
    "Tomorrow, and tomorrow, and tomorrow,\nCreeps in this petty pace from day to day,\nTo the last syllable of",
    "recorded time; and all our yesterdays have lighted fools the way to dusty death. Out, out, brief candle!",
] * 3 + ["Zürich, 1599: naïve œuvre, 你好 мир ἀρχή  two  spaces\ttab <extra_id_0123456789>"]
SIZES = {"bpe": 320, "wordpiece": 256, "unigram": 220}


@pytest.fixture(scope="module")
def trained() -> dict[str, PreTrainedTokenizerFast]:
    return {algorithm: train_tokenizer(iter(TEXTS), algorithm, size) for algorithm, size in SIZES.items()}


def by_hand(words: list[str], **special: str) -> PreTrainedTokenizerFast:
    """A word-level tokenizer: ids are positions in `words`."""
    unk = special.get("unk_token")
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=unk or words[0]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def words_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[str]:
    """The text cut at the word starts."""
    (ids,), (starts,) = encode_batch(tokenizer, [text], word_starts=True)
    assert ids.dtype == np.int32 and starts.dtype == bool and ids.shape == starts.shape and starts[0]
    return [tokenizer.decode(part) for part in np.split(ids, np.flatnonzero(starts)[1:])]


# ------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("algorithm", SIZES)
def test_size_special_tokens_and_reload(trained, algorithm, tmp_path):
    tokenizer = trained[algorithm]
    assert len(tokenizer) == SIZES[algorithm]
    assert sorted(tokenizer.get_vocab().values()) == list(range(SIZES[algorithm]))
    assert tokenizer.model_max_length > 1e20
    names = {"bpe": ("pad", "eos"), "wordpiece": ("pad", "unk", "cls", "sep", "mask"), "unigram": ("pad", "eos", "unk")}
    assert len({getattr(tokenizer, f"{name}_token_id") for name in names[algorithm]}) == len(names[algorithm])
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.is_fast and again.special_tokens_map == tokenizer.special_tokens_map
    assert tokenizer_fingerprint(again) == tokenizer_fingerprint(tokenizer)
    assert again(TEXTS)["input_ids"] == tokenizer(TEXTS)["input_ids"]


def test_frame_of_each_algorithm(trained):
    def tokens(algorithm, *texts):
        return trained[algorithm].convert_ids_to_tokens(trained[algorithm](*texts)["input_ids"])

    assert trained["bpe"].bos_token == trained["bpe"].eos_token == "<|endoftext|>"
    assert "<|endoftext|>" not in tokens("bpe", "to be")
    assert tokens("wordpiece", "to be") == ["[CLS]", "to", "be", "[SEP]"]
    assert tokens("wordpiece", "to", "be") == ["[CLS]", "to", "[SEP]", "be", "[SEP]"]
    assert tokens("unigram", "to be")[-1] == "</s>" and tokens("unigram", "to be").count("</s>") == 1
    sentinels = trained["unigram"].convert_tokens_to_ids([f"<extra_id_{i}>" for i in range(100)])
    assert sentinels == list(range(219, 119, -1))  # as in T5, the last ids, counted down


def test_bpe_round_trip(trained, tmp_path):
    rng = random.Random(0)
    pools = [
        [chr(code) for code in (*range(0x20), *range(0x7F, 0xA1))],
        [chr(code) for code in (*range(0x100, 0xD800), *range(0xE000, 0x110000))],
        [" ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u2028", " .", " ,", "?!"],
        ["👩\u200d👩\u200d👧", "🇫🇷", "e\u0301", "\u0301", "\ufeff", "ﬁ", "İ", "▁", "Ġ"],
        ["king", "King", "don't", "DON'T", "12345", "<|pad|>", "<|endoftext|>"],
    ]
    texts = ["".join(rng.choice(rng.choice(pools)) for _ in range(rng.randrange(1, 40))) for _ in range(2000)]
    texts += ["", " ", "\n", *TEXTS]
    trained["bpe"].save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    encoded = encode_batch(tokenizer, texts)
    assert [tokenizer.decode(ids) for ids in encoded] == texts
    assert not {tokenizer.eos_token_id, tokenizer.pad_token_id} & set(np.concatenate(encoded).tolist())


def test_wordpiece_characters_inside_words(trained):
    tokenizer = trained["wordpiece"]
    characters = sorted(set("".join(TEXTS)) - set(" \n\t"))
    words = [form.format(c) for c in characters for form in ("{0}", "k{0}", "{0}k", "{0}{0}")]
    assert "Zürich" not in tokenizer.get_vocab()
    assert all(tokenizer.unk_token_id not in ids for ids in encode_batch(tokenizer, [*words, *TEXTS, "a" * 500]))
    assert encode_batch(tokenizer, ["\u0950"])[0].tolist() == [tokenizer.unk_token_id]


def test_unigram_white_space(trained):
    text = "  To be,  or\n\nnot to be\n"
    assert trained["unigram"].decode(encode_batch(trained["unigram"], [text])[0]) == text


def test_training_is_repeatable(trained):
    again = train_tokenizer(TEXTS, "bpe", SIZES["bpe"])
    assert tokenizer_fingerprint(again) == tokenizer_fingerprint(trained["bpe"])


@pytest.mark.parametrize("algorithm", SIZES)
def test_lowercase(algorithm):
    tokenizer = train_tokenizer(TEXTS, algorithm, SIZES[algorithm], lowercase=True)
    upper, lower = encode_batch(tokenizer, ["THE KING", "the king"])
    assert upper.tolist() == lower.tolist()


@pytest.mark.parametrize("algorithm", SIZES)
@pytest.mark.parametrize("vocab_size", [-1, 0, 3, 110])
def test_too_small_vocabulary(algorithm, vocab_size):
    with pytest.raises(UserError, match=r"^vocab_size: -?\d+ is too small"):
        train_tokenizer(TEXTS, algorithm, vocab_size)


@pytest.mark.parametrize("algorithm", SIZES)
def test_bad_input_of_training(algorithm):
    with pytest.raises(UserError, match=r"^vocab_size: 50000 is out of reach, this text yields only (\d+) tokens"):
        train_tokenizer(TEXTS, algorithm, 50_000)
    for texts in ([], [""], [" \n"]):
        with pytest.raises(UserError, match="no text"):
            train_tokenizer(texts, algorithm, 300)

    def broken():
        yield TEXTS[0]
        raise UserError("the file ends too early")

    with pytest.raises(UserError, match="ends too early"):
        train_tokenizer(broken(), algorithm, 300)


def test_size_in_error_message():
    with pytest.raises(UserError) as error:
        train_tokenizer(TEXTS, "bpe", 50_000)
    size = int(str(error.value).split("yields only ")[1].split()[0])
    assert len(train_tokenizer(TEXTS, "bpe", size)) == size


def test_unknown_algorithm():
    with pytest.raises(UserError, match="algorithm: 'bqe' is none of bpe, wordpiece, unigram"):
        train_tokenizer(TEXTS, "bqe", 300)


# ------------------------------------------------------------------------------------------ loading


MODEL_TYPES = ("gpt2", "llama", "qwen3", "gemma2", "bert", "modernbert", "eurobert", "roberta", "t5", "mt5")


@pytest.mark.parametrize("algorithm", SIZES)
def test_tokenizer_beside_a_model(trained, algorithm, tmp_path):
    trained[algorithm].save_pretrained(tmp_path)
    for model_type in MODEL_TYPES:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        again = load_tokenizer(str(tmp_path))
        assert tokenizer_fingerprint(again) == tokenizer_fingerprint(trained[algorithm]), model_type
        assert again("to be")["input_ids"] == trained[algorithm]("to be")["input_ids"], model_type


def test_tokenizer_beside_a_qwen2_model(trained, tmp_path):
    """A trap of transformers: for this model type AutoTokenizer puts Qwen2's own split into any tokenizer."""
    trained["bpe"].save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    assert tokenizer_fingerprint(load_tokenizer(str(tmp_path))) != tokenizer_fingerprint(trained["bpe"])


def test_loading_errors(trained, tmp_path):
    cases = {
        "absent": "there is no folder",
        "empty": "no tokenizer in",
        "model": "holds a model",
        "broken": "no tokenizer",
    }
    for name in cases:
        if name != "absent":
            (tmp_path / name).mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "bert"}')
    trained["bpe"].save_pretrained(tmp_path / "broken")
    text = (tmp_path / "broken" / "tokenizer.json").read_text()
    (tmp_path / "broken" / "tokenizer.json").write_text(text[: len(text) // 2])
    for name, fault in cases.items():
        with pytest.raises(UserError, match=f"^tokenizer_name_or_path: .*{fault}") as error:
            load_tokenizer(str(tmp_path / name))
        assert "scripts/train_tokenizer.py" in str(error.value) and "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------ framing and padding


def test_framing(trained):
    assert framing(trained["bpe"], "clm") == Framing(0, 0)
    assert framing(trained["wordpiece"], "mlm") == Framing(2, 3)
    words = ["a", "<s>", "</s>", "<pad>", "<cls>", "<sep>", "<mask>"]
    own = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "mask_token": "<mask>"}
    assert framing(by_hand(words, **own), "clm") == Framing(1, 2)
    assert framing(by_hand(words, **own), "mlm") == Framing(1, 2)
    assert framing(by_hand(words, **own, cls_token="<cls>", sep_token="<sep>"), "mlm") == Framing(4, 5)
    assert framing(by_hand(words, **own, cls_token="<cls>", sep_token="<sep>"), "clm") == Framing(1, 2)
    # Id 0 is an id, not the lack of one.
    assert (
        framing(
            by_hand(["<s>", "</s>", "<pad>"], bos_token="<s>", eos_token="</s>", pad_token="<pad>"), "clm"
        ).prefix_id
        == 0
    )


@pytest.mark.parametrize(
    ("objective", "special", "fault"),
    [
        ("clm", {"pad_token": "<pad>"}, "lacks eos, which clm needs"),
        ("clm", {"bos_token": "<s>", "pad_token": "<pad>"}, "lacks eos"),
        ("clm", {"eos_token": "</s>"}, "has no pad token"),
        ("clm", {"eos_token": "</s>", "pad_token": "</s>"}, "pads with its eos token </s>"),
        ("mlm", {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}, "lacks mask"),
        ("mlm", {"mask_token": "<mask>", "pad_token": "<pad>"}, r"lacks cls \(or bos\) and sep \(or eos\)"),
        ("mlm", {"bos_token": "<s>", "eos_token": "</s>", "mask_token": "<mask>"}, "has no pad token"),
    ],
)
def test_framing_errors(objective, special, fault):
    tokenizer = by_hand(["a", "<s>", "</s>", "<pad>", "<mask>"], **special)
    tokenizer.name_or_path = "some/model"
    with pytest.raises(UserError, match=f"^the tokenizer some/model {fault}") as error:
        framing(tokenizer, objective)
    assert "\n" not in str(error.value) and "tokenizer_config.json" in str(error.value)


def test_ensure_pad_token():
    # GPT-2: one special token for everything, no pad.
    tokenizer = by_hand(
        ["a", "<|endoftext|>"], **dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    )
    assert "new token <|pad|> (id 2)" in ensure_pad_token(tokenizer)
    assert (tokenizer.pad_token_id, len(tokenizer)) == (2, 3)
    assert ensure_pad_token(tokenizer) is None
    assert framing(tokenizer, "clm") == Framing(1, 1)
    # SmolLM2-Instruct: pads with eos, has an unk of its own.
    tokenizer = by_hand(["a", "<unk>", "<eos>"], unk_token="<unk>", eos_token="<eos>", pad_token="<eos>")
    assert "<unk> now pads" in ensure_pad_token(tokenizer)
    assert (tokenizer.pad_token_id, len(tokenizer)) == (1, 3)
    # The token is there, only not named.
    tokenizer = by_hand(["a", "<|pad|>", "<eos>"], eos_token="<eos>")
    assert "known token <|pad|> (id 1)" in ensure_pad_token(tokenizer) and len(tokenizer) == 3
    # Nothing to do.
    tokenizer = by_hand(["a", "<pad>", "<eos>"], eos_token="<eos>", pad_token="<pad>")
    assert ensure_pad_token(tokenizer) is None and tokenizer.pad_token_id == 1


# ------------------------------------------------------------------------------------------ encoding


def test_word_starts_of_trained_tokenizers(trained):
    text = "Who's there?\n\nNay, answer  me: 12345 troubles"
    bpe = ["Who's", " there", "?\n\n", "Nay", ",", " answer", " ", " me", ":", " ", "123", "45", " troubles"]
    assert words_of(trained["bpe"], text) == bpe
    assert words_of(trained["wordpiece"], "Nay, outrageous slings!") == ["Nay", ",", "outrageous", "slings", "!"]
    assert words_of(trained["unigram"], text.replace("12345 ", "")) == [
        "Who's",
        " there?\n\n",
        "Nay,",
        " answer",
        " ",
        " me:",
        " troubles",
    ]


def test_word_starts_by_hand():
    """[first letter, rest] of each word are two tokens; the space goes where the tokenizer puts it."""
    vocab = {"▁": 0, "▁t": 1, "o": 2, "b": 3, "e": 4, "▁b": 5, "t": 6}
    pieces = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.Unigram([(piece, -1.0 - (piece == "▁") * 9) for piece in vocab], unk_id=0))
    )
    backend = pieces.backend_tokenizer
    for pre_tokenizer in (pre_tokenizers.Metaspace(), pre_tokenizers.Metaspace(split=False)):
        backend.pre_tokenizer = pre_tokenizer
        ids, starts = encode_batch(pieces, ["to be", "bot", ""], word_starts=True)
        assert [x.tolist() for x in ids] == [[1, 2, 5, 4], [5, 2, 6], []]
        assert [x.tolist() for x in starts] == [[True, False, True, False], [True, False, False], []]
    # Llama 2: no pre-tokenizer at all, so the library sees one word.
    merges = [("▁", "t"), ("▁", "b")]
    backend = Tokenizer(models.BPE(vocab, merges))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Metaspace()
    llama = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert set(backend.encode("to be").word_ids) == {0}
    ids, starts = encode_batch(llama, ["to be"], word_starts=True)
    assert ids[0].tolist() == [1, 2, 5, 4] and starts[0].tolist() == [True, False, True, False]


@pytest.mark.parametrize("algorithm", SIZES)
def test_control_tokens_in_texts(trained, algorithm):
    tokenizer = trained[algorithm]
    names = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    texts = [f"{name} to be{name}or {name}" for name in names] + names
    control = set(tokenizer.added_tokens_decoder) - {tokenizer.unk_token_id}
    assert control & set(tokenizer(texts[0], add_special_tokens=False)["input_ids"])  # what a plain call does
    plain, (marked, starts) = encode_batch(tokenizer, texts), encode_batch(tokenizer, texts, word_starts=True)
    for a, b, start in zip(plain, marked, starts, strict=True):
        assert a.tolist() == b.tolist() and len(b) == len(start) > 0
        assert not control & set(a.tolist())
    if algorithm != "wordpiece":
        assert [tokenizer.decode(ids) for ids in plain] == texts


def test_control_tokens_that_are_unigram_pieces():
    """T5's own tokenizer: `</s>` is a piece of the Unigram model, which finds it in text whatever it is told."""
    backend = Tokenizer(models.Unigram([("<unk>", 0.0), ("</s>", 0.0), ("▁a", -1.0), ("▁", -2.0)], unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    ids, starts = encode_batch(tokenizer, ["a </s> a"], word_starts=True)
    assert ids[0].tolist() == [2, 3, 2] and starts[0].tolist() == [True, True, True]


def test_saved_truncation_is_ignored(trained, tmp_path):
    tokenizer = trained["bpe"]
    want = encode_batch(tokenizer, TEXTS)
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(str(tmp_path))
    again.model_max_length = 4
    again.backend_tokenizer.enable_truncation(max_length=4)
    again.backend_tokenizer.enable_padding(pad_id=1, pad_token="<|pad|>", length=9)
    assert [ids.tolist() for ids in encode_batch(again, TEXTS)] == [ids.tolist() for ids in want]
    assert again.backend_tokenizer.truncation["max_length"] == 4 and again.backend_tokenizer.padding["length"] == 9
    assert again.backend_tokenizer.encode_special_tokens is False
    assert tokenizer_fingerprint(again) == tokenizer_fingerprint(tokenizer)
    assert encode_batch(again, []) == [] and encode_batch(again, [], word_starts=True) == ([], [])


def test_fingerprint(trained):
    prints = {tokenizer_fingerprint(tokenizer) for tokenizer in trained.values()}
    prints |= {tokenizer_fingerprint(train_tokenizer(TEXTS, "bpe", size)) for size in (300, 319)}
    prints |= {tokenizer_fingerprint(train_tokenizer(TEXTS, "bpe", 320, lowercase=True))}
    assert len(prints) == 6
    # The value of one: what is hashed must not change unnoticed, or prepared data is made again.
    tokenizer = by_hand(["a", "b"])
    assert tokenizer_fingerprint(tokenizer) == "926d8e13ca8f8ef98484eda006a7236ace226092f8afa77ebef49b98b77fe018"


def test_bytes_per_token():
    tokenizer = train_tokenizer(TEXTS, "bpe", 258)  # no merges: a token is a byte
    assert bytes_per_token(tokenizer, iter(TEXTS)) == 1.0
    assert bytes_per_token(by_hand(["to", "be"]), ["to be", "be"]) == 7 / 3
    with pytest.raises(UserError, match="no text"):
        bytes_per_token(tokenizer, [""])


# ------------------------------------------------------------------------------------------ the script


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Run the script: (exit status, standard output, standard error)."""
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (tmp_path / "eval.txt").write_text(TEXTS[1])

    def call(**options):
        options = {
            "data": "train.jsonl",
            "algorithm": "bpe",
            "vocab_size": 300,
            "output_dir": "out/tokenizer",
        } | options
        words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["train_tokenizer.py", *words])
        status = 0
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as error:
            status = error.code
        return status, *capsys.readouterr()

    return call


def test_script_trains_once(command, tmp_path):
    status, out, err = command(eval_data="eval.txt")
    assert (status, err) == (0, "")
    tokenizer = load_tokenizer(str(tmp_path / "out" / "tokenizer"))
    assert len(tokenizer) == 300
    ratio = bytes_per_token(tokenizer, [TEXTS[1]])
    assert f"{ratio:.2f} bytes per token of held-out text" in out and "<|endoftext|> 0, <|pad|> 1" in out
    record = json.loads((tmp_path / "out" / "tokenizer" / "tokenizer_training.json").read_text())
    assert record["settings"]["vocab_size"] == 300 and record["result"]["bytes_per_token"] == round(ratio, 4)
    files = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}

    assert command()[:2] == (0, "already there: out/tokenizer\n")
    for options, fault in (
        ({"vocab_size": 290}, "made with another vocab_size"),
        ({"data": "eval.txt", "lowercase": ""}, "unrecognized"),
        ({"data": "eval.txt"}, "made with another data"),
    ):
        status, _, err = command(**options)
        assert status == 2 and fault in err
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == files


def test_script_skipped_files(command, tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "train.jsonl").rename(tmp_path / "texts" / "train.jsonl")
    (tmp_path / "texts" / "notes.pdf").write_text("no")
    status, out, _ = command(data="texts")
    assert status == 0 and "  not read   1 path, ending that is not read: texts/notes.pdf\n" in out


def test_script_on_part_of_the_text(command):
    assert list(take_bytes(["é", "", "ab", "c"], 3)) == ["é", "ab"]
    status, out, _ = command(algorithm="wordpiece", vocab_size=80, max_bytes=200)
    assert status == 0 and "bytes per token of the training text" in out and "[MASK] 4" in out


def test_script_bad_input(command, tmp_path):
    (tmp_path / "void.jsonl").write_text('{"text": ""}\n')
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "weights.bin").write_text("x")
    for options, fault in (
        ({"data": "absent.txt"}, "no file matches absent.txt"),
        ({"data": "void.jsonl"}, "void.jsonl has no text in it"),
        ({"text_column": "body"}, "no column 'body'"),
        ({"vocab_size": 20}, "vocab_size: 20 is too small"),
        ({"vocab_size": 20_000}, "vocab_size: 20000 is out of reach"),
        ({"eval_data": "absent.txt"}, "no file matches absent.txt"),
        ({"output_dir": "full"}, "full holds something else"),
        ({"output_dir": "eval.txt"}, "eval.txt is a file"),
        ({"output_dir": "eval.txt/tokenizer"}, "output_dir: cannot write eval.txt/tokenizer"),
    ):
        status, out, err = command(**options)
        assert (status, out) == (2, ""), options
        assert err.startswith("error: ") and err.count("\n") == 1 and fault in err, options
    assert not list(tmp_path.rglob("*.incomplete-*")) and not (tmp_path / "out" / "tokenizer").exists()


def test_script_help_time():
    code = f"""
import runpy, sys
sys.argv = ["x", "--help"]
try:
    runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
except SystemExit:
    assert not {{"torch", "transformers", "datasets", "tokenizers"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "--vocab_size" in done.stdout, done.stderr
