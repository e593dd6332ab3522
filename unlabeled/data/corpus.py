"""Documents of several sources: batches for the tokenizer, mixtures by weight, and text to fill in the middle of."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise

from unlabeled.data.files import local_files
from unlabeled.data.held_out import check_held_out, unit_hash
from unlabeled.data.identity import identity
from unlabeled.data.left_out import EMPTY_TEXT, join_reasons
from unlabeled.data.readers import read_documents
from unlabeled.data.sources import Source, parse_sources
from unlabeled.errors import UserError

__all__ = [
    "FIM_TOKENS",
    "FIMArguments",
    "Source",
    "batches",
    "check_held_out",
    "cut_in_three",
    "identity",
    "local_files",
    "mix",
    "parse_sources",
    "read_documents",
    "rearrange",
    "unit_hash",
]

BATCH_BYTES = 4_000_000  # text handed to the tokenizer's threads at a time
BATCH_DOCUMENTS = 10_000
# What stands before each part of a rearranged text, by the names that it has in the tokenizer of Qwen2.5.
FIM_TOKENS = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")


@dataclass
class FIMArguments:
    """Text rearranged so that a causal model learns to fill in the middle as well (Bavarian et al. 2022)."""

    fim_rate: float = field(
        default=0.0, metadata={"help": "share of the training documents to rearrange for infilling"}
    )

    def __post_init__(self):
        if not 0 <= self.fim_rate <= 1:
            raise UserError(f"fim_rate is {self.fim_rate}; set it to a share between 0 and 1")

    def prepare_tokenizer(self, tokenizer) -> str | None:
        """Give the tokenizer those of `FIM_TOKENS` that it lacks and needs; a sentence for the log where it grew."""
        from unlabeled.data.tokenization import add_special_tokens

        new = [token for token in FIM_TOKENS if self.fim_rate and token not in tokenizer.get_vocab()]
        if new:
            add_special_tokens(tokenizer, {"additional_special_tokens": new})
        return f"new tokens to fill in the middle: {', '.join(new)}" if new else None


def batches(texts: Iterator[str]) -> Iterator[list[str]]:
    """The texts in lists that keep the tokenizer's threads busy and fit in memory."""
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_BYTES or len(batch) == BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def mix(sources: list[Source], open_source: Callable, max_tokens: int | None) -> Iterator[tuple[int, object]]:
    """Documents of several sources in proportion to their weights in tokens: (index of the source, document).

    `open_source(source)` begins to read a source; what it yields has `ids`.

    The next document comes from the source that is furthest behind its share. A source that ends begins again, until
    each has been read once, or `max_tokens` are reached; so with one source this is simply that source.
    """
    streams = [open_source(source) for source in sources]
    tokens, rounds = [0] * len(sources), [0] * len(sources)
    left_out: list[Counter] = [Counter() for _ in sources]
    while sources and (max_tokens is None or sum(tokens) < max_tokens):
        index = min(range(len(sources)), key=lambda i: tokens[i] / sources[i].weight)
        document = next(streams[index], None)
        if document is None:
            rounds[index] += 1
            if not tokens[index]:
                raise UserError(_nothing_to_learn(sources[index], left_out[index]))
            if all(rounds):
                return
            streams[index] = open_source(sources[index])
            continue
        tokens[index] += len(document.ids)
        reason = getattr(document, "left_out", None)
        if reason:
            left_out[index][reason] += 1
        yield index, document


def _nothing_to_learn(source: Source, left_out: Counter) -> str:
    """What is wrong with a source without a token; `left_out` counts its documents by reason."""
    if not left_out or set(left_out) == {EMPTY_TEXT}:
        return f"{source.path} has no text; leave it out"
    return f"{source.path} has nothing to learn from ({join_reasons(left_out)}); correct it or leave it out"


def cut_in_three(text: str) -> tuple[str, str, str]:
    """(prefix, middle, suffix): cut at two characters, each place equally likely; which ones is up to the text."""
    raw = text.encode("utf-8")
    first, second = sorted(int(unit_hash(name + raw) * (len(text) + 1)) for name in (b"one", b"two"))
    return text[:first], text[first:second], text[second:]


def rearrange(texts: list[str], tokenizer, encode: Callable, frame, max_length: int) -> dict[str, tuple[list, int]]:
    """Texts as pieces of at most `max_length` tokens to learn to fill in the middle from: {text: (pieces, rearranged)}.

    Bavarian et al. 2022: prefix, suffix, middle (PSM) or suffix, prefix, middle (SPM), as often, each behind its sign
    and tokenised by itself. A piece that grows too long for that stays as it is.
    """
    import numpy as np

    from unlabeled.data.tokenization import token_offsets

    prefix, suffix, middle = ([index] for index in tokenizer.convert_tokens_to_ids(list(FIM_TOKENS)))
    room = max_length - 9  # bos, eos, three signs, and 4 tokens of growth by cuts inside of tokens: 98 % need no more
    offsets = token_offsets(tokenizer, texts)
    cuts = [[0, *of[room::room, 0].tolist(), len(text)] for of, text in zip(offsets, texts, strict=True)]
    pieces = [[text[a:b] for a, b in pairwise(at) if a < b] for at, text in zip(cuts, texts, strict=True)]
    parts = iter(encode(tokenizer, [part for of in pieces for piece in of for part in cut_in_three(piece)]))
    found: dict[str, tuple[list, int]] = {}
    for text, of in zip(texts, pieces, strict=True):
        framed, rearranged = [], 0
        for piece in of:
            before, between, after = next(parts), next(parts), next(parts)
            psm = unit_hash(b"order" + piece.encode("utf-8")) < 0.5
            order = [prefix, before, suffix, after, middle] if psm else [prefix, suffix, after, middle, before]
            ids = [*order, between, [frame.suffix_id]]
            if 1 + sum(map(len, ids)) <= max_length:
                rearranged += 1
            else:  # the end of the text is where it was
                ids = [*encode(tokenizer, [piece]), [frame.suffix_id] * (piece is of[-1])]
            framed.append(np.concatenate([[frame.prefix_id], *ids]).astype(np.int32))
        found[text] = framed, rearranged
    return found
