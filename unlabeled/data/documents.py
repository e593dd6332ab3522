"""Documents and conversations as token ids, with the flags and counts that packing and the manifest need."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
from transformers import PreTrainedTokenizerFast

from unlabeled.data.conversations import LeftOut, read_conversations
from unlabeled.data.fim import is_rearranged, rearrange
from unlabeled.data.held_out import unit_hash
from unlabeled.data.left_out import EMPTY_TEXT
from unlabeled.data.sources import Source
from unlabeled.data.tokenization import encode_batch

BATCH_CHARACTERS = 4_000_000  # handed to the tokenizer's threads at a time
BATCH_DOCUMENTS = 10_000

NO_TOKENS = "no token of the tokenizer"  # why a document is left out


@dataclass
class Document:
    """A tokenized document or conversation.

    Attributes:
        ids: int32 (tokens,), without framing for text, with it for conversations.
        token_flags: bool (tokens,), or None: whether a word starts (mlm) or whether the token is a target (sft).
        text_bytes: UTF-8 bytes of what is learned.
        targets: tokens that are learned.
        held_out: whether it belongs to the validation split.
        unknown_tokens: how many of the ids are the unknown token.
        pieces: int32 (tokens,) each, with framing, if the text is rearranged for infilling.
        rearranged: how many of the pieces are rearranged.
        left_out: why it is counted but not trained on, or None.
    """

    ids: np.ndarray
    token_flags: np.ndarray | None
    text_bytes: int
    targets: int
    held_out: bool
    unknown_tokens: int = 0
    pieces: list[np.ndarray] = field(default_factory=list)
    rearranged: int = 0
    left_out: str | None = None


def left_out_document(reason: str) -> Document:
    """A document that is only counted."""
    no_ids = np.empty(0, dtype=np.int32)
    no_flags = np.empty(0, dtype=bool)
    return Document(no_ids, no_flags, text_bytes=0, targets=0, held_out=False, left_out=reason)


def tokenize_conversations(
    source: Source, tokenizer: PreTrainedTokenizerFast, eval_fraction: float, repaired: Counter
) -> Iterator[Document]:
    """The conversations of a source, rendered by the chat template.

    Args:
        source: of conversations.
        tokenizer: with its chat template.
        eval_fraction: share to hold out, by content.
        repaired: counts the rows that were changed, by reason.
    """
    for conversation in read_conversations(source, tokenizer, repaired):
        if isinstance(conversation, LeftOut):
            yield left_out_document(conversation.reason)
            continue
        yield Document(
            ids=conversation.ids,
            token_flags=conversation.targets,
            text_bytes=conversation.target_bytes,
            targets=int(conversation.targets[1:].sum()),  # nothing predicts the first token
            held_out=eval_fraction > 0 and unit_hash(conversation.ids.tobytes()) < eval_fraction,
        )


def tokenize_texts(
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerFast,
    objective: str,
    eval_fraction: float = 0.0,
    fim_rate: float = 0.0,
    max_length: int = 0,
) -> Iterator[Document]:
    """Tokenize texts a batch at a time with the tokenizer's threads.

    Texts without content become documents that are left out, ahead of the others of their batch.

    Args:
        texts: the texts.
        tokenizer: with the tokens that the objective needs.
        objective: "clm", "mlm" or "span".
        eval_fraction: share to hold out. It depends on the content, so that copies of a text end in the same split.
        fim_rate: share of the training texts to rearrange for infilling.
        max_length: tokens in a row, for texts that are rearranged.
    """
    unknown_id = tokenizer.unk_token_id
    if unknown_id is None or unknown_id == tokenizer.eos_token_id:
        unknown_id = -1  # GPT-2 calls its end of text unknown as well
    for batch in batch_texts(texts):
        filled = [text for text in batch if text and not text.isspace()]
        for _ in range(len(batch) - len(filled)):
            yield left_out_document(EMPTY_TEXT)
        if not filled:
            continue
        if objective == "mlm":
            all_ids, all_word_starts = encode_batch(tokenizer, filled, word_starts=True)
        else:
            all_ids = encode_batch(tokenizer, filled)
            all_word_starts = [None] * len(filled)
        to_rearrange = [text for text in filled if is_rearranged(text, fim_rate)]
        rearranged = rearrange(to_rearrange, tokenizer, max_length) if to_rearrange else {}
        for text, ids, word_starts in zip(filled, all_ids, all_word_starts, strict=True):
            if not len(ids):  # for example control characters
                yield left_out_document(NO_TOKENS)
                continue
            raw = text.encode("utf-8")
            document = Document(
                ids=ids,
                token_flags=word_starts,
                text_bytes=len(raw),
                targets=_count_targets(len(ids), objective),
                held_out=eval_fraction > 0 and unit_hash(raw) < eval_fraction,
                unknown_tokens=int((ids == unknown_id).sum()),
            )
            if text in rearranged and not document.held_out:
                document.pieces = rearranged[text].pieces
                document.rearranged = rearranged[text].rearranged
                document.targets = sum(len(piece) - 1 for piece in document.pieces)
            yield document


def _count_targets(tokens: int, objective: str) -> int:
    """The targets of a text with this many tokens. For spans only 0 matters: the number depends on the denoiser."""
    if objective == "span":
        return tokens - 1  # a single token leaves nothing to restore it from
    if objective == "clm":
        return tokens + 1  # every token and the closing eos, exactly once
    return tokens


def batch_texts(texts: Iterable[str]) -> Iterator[list[str]]:
    """Group texts into lists that keep the tokenizer's threads busy and fit into memory."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS or len(batch) == BATCH_DOCUMENTS:
            yield batch
            batch = []
            size = 0
    if batch:
        yield batch
