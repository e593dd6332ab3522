"""Training a tokenizer from text: byte-level BPE, WordPiece or Unigram."""

import json
import re
import sys
from collections.abc import Iterable, Iterator

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from unlabeled.data.encoding import SPACE
from unlabeled.errors import UserError

ALGORITHMS = ("bpe", "wordpiece", "unigram")
PIECE_CHARACTERS = 200_000  # of a text that are handed to the trainer at a time
# Where a text may be cut without changing its words: between a letter and a space that is followed by a letter, and
# after a line that ends with something else than white space.
SAFE_CUT = re.compile(r"(?<=[^\W\d_])(?= [^\W\d_])|(?<=\S\n)(?=[^\W\d_])")

# What a token never crosses. Byte-level BPE splits as GPT-4o does (`o200k_base` in github.com/openai/tiktoken): a word
# keeps its leading space and its contraction, and digits are grouped by three. On held-out Shakespeare
# (scripts/get_demo_data.py) 2,048 tokens then give 2.85 bytes per token, with GPT-4's split 2.84, with GPT-2's 2.60;
# 8,192 tokens give 3.44, 3.41 and 3.06. Unigram splits at spaces as SentencePiece does, with newlines at the end of
# their word: 2.66 bytes per token, with the finer split 2.54.
SPLITS = {
    "bpe": "|".join(
        [
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
            r"\p{N}{1,3}",
            r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
            r"\s*[\r\n]+",
            r"\s+(?!\S)",
            r"\s+",
        ]
    ),
    "unigram": r" ?\S+[\r\n]*|\s+(?!\S)|\s+",
}
SPECIAL_TOKENS = {
    "bpe": {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|pad|>"},
    "wordpiece": {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")},
    "unigram": {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"},
}
SENTINELS = {"unigram": [f"<extra_id_{i}>" for i in reversed(range(100))]}
TEMPLATES = {  # for one text, and for a pair
    "bpe": ("$A", "$A $B:1"),
    "wordpiece": ("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1"),
    "unigram": ("$A </s>", "$A </s> $B:1 </s>:1"),
}
# BERT's limit of 100 would make a sentence in a script without spaces one unknown token.
MAX_WORD_CHARACTERS = 500
# The score of a special token as a Unigram piece, so low that "</s>" in a text is encoded as its characters.
SPECIAL_PIECE_SCORE = -1000.0


def train_tokenizer(
    texts: Iterable[str], algorithm: str, vocab_size: int, lowercase: bool = False
) -> PreTrainedTokenizerFast:
    """Train a tokenizer that `save_pretrained` writes and `AutoTokenizer` loads.

    - "bpe", for causal models: byte-level, so that nothing is unknown and decoding restores any text exactly (in lower
      case with `lowercase`). `<|endoftext|>` is bos and eos, as in GPT-2; `<|pad|>` is a token of its own.
    - "wordpiece", for masked models: as in BERT, with [CLS] and [SEP] around a text; white space is lost. Every
      character of `texts` can be encoded anywhere in a word of up to 500 characters.
    - "unigram", for span corruption: as in T5, with `</s>` after a text and `<extra_id_99>` to `<extra_id_0>` at the
      end of the vocabulary. Unlike T5's it keeps white space. A character that is not in `texts` is unknown.

    `model_max_length` stays unset, as a tokenizer knows nothing of a model's positions. The same text always gives the
    same "bpe" tokenizer; the trainers of the other two break ties at random.

    Args:
        texts: what to train on.
        algorithm: "bpe", "wordpiece" or "unigram".
        vocab_size: `len(tokenizer)`, special tokens included.
        lowercase: fold case.

    Raises:
        UserError: there is no text, or `vocab_size` is too small for the alphabet, or larger than the text can fill.
    """
    if algorithm not in ALGORITHMS:
        raise UserError(f"algorithm: {algorithm!r} is none of {', '.join(ALGORITHMS)}")
    backend = _untrained_backend(algorithm, lowercase)
    sentinels = SENTINELS.get(algorithm, [])
    special_tokens = list(dict.fromkeys(SPECIAL_TOKENS[algorithm].values()))
    characters: set[str] = set()

    def pieces() -> Iterator[str]:
        for text in texts:
            characters.update(text)
            yield from split_for_training(text)
        if algorithm == "wordpiece":
            # Each character inside of a word as well: otherwise a new word that contains it would be [UNK].
            yield from (f"a{character}" for character in sorted(characters))

    trainer, alphabet = _make_trainer(algorithm, max(vocab_size - len(sentinels), 1), special_tokens)
    try:
        backend.train_from_iterator(pieces(), trainer)
        size = backend.get_vocab_size() + len(sentinels)
    except Exception as error:
        if "not large enough to contain all chars" not in str(error):  # Unigram raises; the others exceed the size
            raise
        size = len(characters | set(alphabet)) + len(special_tokens) + len(sentinels)
    if not "".join(characters).strip():
        raise UserError("there is no text to train a tokenizer on; choose data that is not empty")
    _check_size(size, vocab_size)
    if algorithm == "unigram":
        _lower_special_scores(backend, special_tokens)
    backend.add_special_tokens(special_tokens + sentinels)
    single, pair = TEMPLATES[algorithm]
    ids = [(token, backend.token_to_id(token)) for token in special_tokens]
    backend.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=ids)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        extra_special_tokens=sentinels,
        clean_up_tokenization_spaces=False,
        **SPECIAL_TOKENS[algorithm],
    )


def split_for_training(text: str) -> Iterator[str]:
    """Cut a text into pieces that consist of the same words for each of `ALGORITHMS`; the trainers need less memory.

    A text without a safe place to cut stays whole.
    """
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        cut = SAFE_CUT.search(text, start + PIECE_CHARACTERS)
        if cut is None:
            break
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:] if start else text


def _untrained_backend(algorithm: str, lowercase: bool) -> Tokenizer:
    if algorithm == "wordpiece":
        backend = Tokenizer(models.WordPiece(unk_token="[UNK]", max_input_chars_per_word=MAX_WORD_CHARACTERS))
        backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece()
        return backend
    split = pre_tokenizers.Split(Regex(SPLITS[algorithm]), behavior="isolated")
    if algorithm == "bpe":
        backend = Tokenizer(models.BPE())
        units = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
    else:
        backend = Tokenizer(models.Unigram())
        metaspace = {"replacement": SPACE, "prepend_scheme": "never", "split": False}
        units = pre_tokenizers.Metaspace(**metaspace)
        backend.decoder = decoders.Metaspace(**metaspace)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, units])
    if lowercase:
        backend.normalizer = normalizers.Lowercase()
    return backend


def _make_trainer(
    algorithm: str, vocab_size: int, special_tokens: list[str]
) -> tuple[trainers.BpeTrainer | trainers.WordPieceTrainer | trainers.UnigramTrainer, list[str]]:
    """The trainer and its initial alphabet."""
    options = {
        "vocab_size": vocab_size,
        "special_tokens": special_tokens,
        "show_progress": sys.stderr.isatty(),
    }
    if algorithm == "bpe":
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        return trainers.BpeTrainer(initial_alphabet=alphabet, min_frequency=2, **options), alphabet
    if algorithm == "wordpiece":
        return trainers.WordPieceTrainer(min_frequency=2, **options), []
    alphabet = sorted(set("".join(special_tokens)))
    return trainers.UnigramTrainer(initial_alphabet=alphabet, unk_token="<unk>", **options), alphabet


def _check_size(size: int, vocab_size: int) -> None:
    """Refuse a `vocab_size` that the trained vocabulary does not have."""
    if size > vocab_size:
        raise UserError(
            f"vocab_size: {vocab_size} is too small, as special tokens and the characters of this text take {size}; "
            "set it well above that"
        )
    if size < vocab_size:
        raise UserError(
            f"vocab_size: {vocab_size} is out of reach, this text yields only {size} tokens; set it to {size} or less, "
            "or train on more text"
        )


def _lower_special_scores(backend: Tokenizer, special_tokens: list[str]) -> None:
    """Make the special tokens, which are pieces of a Unigram model, more expensive than their characters."""
    pieces = json.loads(backend.to_str())["model"]["vocab"]
    scores = [(piece, SPECIAL_PIECE_SCORE if piece in special_tokens else score) for piece, score in pieces]
    backend.model = models.Unigram(scores, unk_id=special_tokens.index("<unk>"))
