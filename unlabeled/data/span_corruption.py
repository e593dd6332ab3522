"""Span corruption: sentinels replace spans of a text, and the targets say what was there (Raffel et al. 2019)."""

import re
from collections.abc import Collection, Iterable, Sequence

import numpy as np
from transformers import PreTrainedTokenizerFast

from unlabeled.data.tokenization import add_special_tokens
from unlabeled.errors import UserError
from unlabeled.planning.spans import Denoiser, span_lengths


def add_span_tokens(tokenizer: PreTrainedTokenizerFast, denoisers: Sequence[Denoiser], max_length: int) -> str | None:
    """Add the mode tokens of the denoisers that the tokenizer lacks, and check that it has enough sentinels.

    The caller resizes the embeddings of the model.

    Args:
        tokenizer: with the sentinels `<extra_id_0>`, `<extra_id_1>`, ...
        denoisers: those that a text may meet.
        max_length: tokens of the inputs in a row.

    Returns:
        A sentence for the log, or None if no token was added.

    Raises:
        UserError: there are fewer sentinels than a text can have spans.
    """
    text_length = span_lengths(denoisers, max_length)[0]
    spans = max(denoiser.counts(text_length)[1] for denoiser in denoisers)
    sentinels = len(sentinel_ids(tokenizer))
    if not sentinels:
        raise UserError(
            f"the tokenizer {tokenizer.name_or_path} lacks the sentinels <extra_id_0>, <extra_id_1>, ... that spans "
            "become; make one with scripts/train_tokenizer.py --algorithm unigram"
        )
    if spans > sentinels:
        raise UserError(
            f"max_length {max_length} takes texts of {text_length} tokens, in which {spans} spans are to be restored, "
            f"and the tokenizer has {sentinels} sentinels; lower max_length, or raise mean_noise_span_length"
        )
    modes = dict.fromkeys(denoiser.mode for denoiser in denoisers if denoiser.mode)
    vocabulary = tokenizer.get_vocab()
    new = [mode for mode in modes if mode not in vocabulary]
    if not new:
        return None
    add_special_tokens(tokenizer, {"additional_special_tokens": new})
    return f"new tokens for the modes of the denoisers: {', '.join(new)}"


def sentinel_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The ids of <extra_id_0>, <extra_id_1>, ..., wherever in the vocabulary they are."""
    ids = {
        re.sub("^▁", "", token): token_id for token, token_id in tokenizer.get_vocab().items() if "<extra_id_" in token
    }
    names = [f"<extra_id_{number}>" for number in range(len(ids))]
    return [ids[name] for name in names if name in ids]


def corrupt(ids: np.ndarray, is_noise: np.ndarray, sentinels: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets of span corruption.

    Args:
        ids: int (n,).
        is_noise: bool (n,), True where a token is to be restored.
        sentinels: ids, at least as many as there are noise spans.

    Returns:
        The text with a sentinel for each noise span, and the noise with a sentinel for each span of text, int64 each.
    """
    return _replace_spans(ids, is_noise, sentinels), _replace_spans(ids, ~is_noise, sentinels)


def _replace_spans(ids: np.ndarray, is_hidden: np.ndarray, sentinels: Sequence[int]) -> np.ndarray:
    """The ids with one sentinel for each run of hidden tokens."""
    starts_run = is_hidden & ~np.concatenate([[False], is_hidden[:-1]])
    run_numbers = np.minimum(starts_run.cumsum() - 1, len(sentinels) - 1)
    with_sentinels = np.where(starts_run, np.asarray(sentinels)[run_numbers], ids)
    return with_sentinels[starts_run | ~is_hidden].astype(np.int64)


def draw_noise(noise: int, text: int, spans: int, generator: np.random.Generator) -> np.ndarray:
    """Draw which tokens are noise, uniformly among all ways to divide noise and text into this many spans.

    Args:
        noise: tokens to restore.
        text: other tokens.
        spans: noise spans. A text starts with a span that stays and ends with one that is noise.
        generator: of the random numbers.

    Returns:
        bool (text + noise,).
    """
    text_spans = _draw_partition(text, spans, generator)
    noise_spans = _draw_partition(noise, spans, generator)
    lengths = np.stack([text_spans, noise_spans], axis=1).ravel()
    return np.repeat(np.tile([False, True], spans), lengths)


def _draw_partition(total: int, parts: int, generator: np.random.Generator) -> np.ndarray:
    """`total` as a sum of `parts` positive numbers, each way equally likely: int64 (parts,)."""
    cuts = np.sort(generator.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))


def spans_by_sentinel(target_ids: Iterable[int], sentinels: Collection[int]) -> dict[int, list[int]]:
    """{sentinel: ids} of what targets, or a generated answer, put in the place of each sentinel.

    An end of sequence is part of the last span.
    """
    spans: dict[int, list[int]] = {}
    current: list[int] | None = None
    for token_id in map(int, target_ids):
        if token_id in sentinels and token_id not in spans:
            current = []
            spans[token_id] = current
        elif current is not None:
            current.append(token_id)
    return spans
