"""Rows of packed documents to batches: next-token labels, or masks and spans that (seed, epoch, row) alone decide."""

import re
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
import torch
from transformers import DataCollatorForLanguageModeling

from unlabeled.data.attention_masks import block_mask
from unlabeled.data.packing import RowLayout, layout_rows
from unlabeled.data.randomness import seeded_generator
from unlabeled.data.targets import IGNORE_INDEX
from unlabeled.data.tokenization import add_special_tokens, ordinary_ids, vocabulary_size
from unlabeled.errors import UserError
from unlabeled.planning.spans import Denoiser, span_lengths


@dataclass
class DataCollatorForPackedLanguageModeling(DataCollatorForLanguageModeling):
    """`DataCollatorForLanguageModeling(tokenizer, mlm=False)` for packed rows that must not leak.

    The stock collator hides every pad token from the loss, also a real end of text where the two share an id, and its
    attention mask switches off the isolation by `position_ids`. Here the layout of the row decides: the first token of
    a document and the padding are no targets, and there is no attention mask.

    Each example needs `input_ids` and `lengths` as `prepare` writes them. Where it has `targets` (bool, as long as
    `input_ids`), only those tokens are learned.

    Returns (batch, max_length) tensors: `input_ids`, `labels` (-100 where there is no target), `position_ids`, int64.
    `flat` makes them (1, batch · max_length), for attention that is told the lengths of the documents
    (`attention.needs_flat_batches`): `cu_seq_lens_q`, int32, where each begins, and the end.
    """

    mlm: bool = False
    max_length: int = 512
    isolate_documents: bool = True
    flat: bool = False
    probe_tokens: ClassVar[int] = 8

    def torch_call(self, examples: list[dict]) -> dict:
        input_ids, rows = self._rows(examples)
        labels = input_ids.masked_fill(rows.starts | rows.padding, IGNORE_INDEX)
        for row, example in enumerate(examples):
            if "targets" in example:
                labels[row, : len(example["targets"])][~torch.as_tensor(example["targets"], dtype=torch.bool)] = (
                    IGNORE_INDEX
                )
        return self._batch(rows, input_ids=input_ids, labels=labels)

    def _rows(self, examples: list[dict]) -> tuple[torch.Tensor, RowLayout]:
        input_ids = np.full((len(examples), self.max_length), self.tokenizer.pad_token_id, dtype=np.int64)
        for row, example in enumerate(examples):
            input_ids[row, : len(example["input_ids"])] = example["input_ids"]
        return torch.from_numpy(input_ids), layout_rows([example["lengths"] for example in examples], self.max_length)

    def _batch(self, rows: RowLayout, **tensors: torch.Tensor) -> dict:
        positions, starts = rows.position_ids, rows.starts
        if not self.isolate_documents:
            positions = torch.arange(self.max_length).expand_as(positions).contiguous()
            starts = (positions == 0) | (starts & rows.padding)
        tensors["position_ids"] = positions
        if not self.flat:
            return tensors
        # Documents without tokens fill up to a power of two: flash attention skips them, and a compiled model sees few
        # shapes. The bound on their lengths is that of a row, always.
        begins = starts.flatten().nonzero()[:, 0]
        ends = torch.full((max(16, 1 << len(begins).bit_length()),), starts.numel(), dtype=torch.int32)
        ends[: len(begins)] = begins
        both = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": self.max_length}
        return {key: value.view(1, -1) for key, value in tensors.items()} | both | {"max_length_k": self.max_length}

    def probe(self, documents: tuple[np.ndarray, ...], bare: bool) -> dict:
        """Model inputs for `check_isolation`: these documents in one row, unmasked; `bare`, nothing but their ids."""
        ids = np.concatenate(documents)
        example = {"input_ids": ids, "lengths": [len(document) for document in documents], "row": 0, "epoch": 0}
        full = replace(self, max_length=len(ids))
        batch = full([example | {"word_starts": np.ones(len(ids), bool)}]) | {"input_ids": torch.from_numpy(ids)[None]}
        return {key: value for key, value in batch.items() if key == "input_ids" or not (bare or key == "labels")}


@dataclass
class MaskedCollator(DataCollatorForPackedLanguageModeling):
    """`DataCollatorForLanguageModeling(tokenizer, mlm=True)` whose masks are a function of (seed, epoch, row).

    The generator of the stock collator advances and is in no checkpoint: its evaluation masks change from one
    evaluation to the next and a resumed run masks differently. Here the same row has the same mask in the same epoch,
    always. Each ordinary token is a target with probability `mlm_probability` (Devlin et al. 2018); of the targets
    `mask_replace_prob` become the mask token, `random_replace_prob` an ordinary token drawn uniformly, the rest stay.
    A row has at least one target. `whole_word_mask` selects words, by the tokenizer's own `word_ids`, for any fast
    tokenizer.

    Each example needs `input_ids`, `lengths`, `word_starts`, `row` and `epoch`.

    Returns what `DataCollatorForPackedLanguageModeling` does and, where it is not flat, `attention_mask`: bool
    (batch, 1, max_length, max_length), block-diagonal, because `position_ids` alone isolate nothing in a
    bidirectional model. For a model with sliding layers it is a dictionary with one such mask for each kind of layer.
    """

    mlm: bool = True
    seed: int = 0
    sliding_window: int | None = None
    ordinary_ids: np.ndarray = field(init=False, repr=False)

    def __post_init__(self):
        if not 0 < self.mlm_probability <= 1:
            raise UserError(f"mlm_probability is {self.mlm_probability}; set it above 0 and at most 1")
        if (
            min(self.mask_replace_prob, self.random_replace_prob) < 0
            or self.mask_replace_prob + self.random_replace_prob > 1
        ):
            raise UserError(
                "mask_replace_prob and random_replace_prob are shares of the targets; let their sum be at most 1"
            )
        self.ordinary_ids = ordinary_ids(self.tokenizer)
        self.is_special = np.ones(vocabulary_size(self.tokenizer), dtype=bool)
        self.is_special[self.ordinary_ids] = False

    def torch_call(self, examples: list[dict]) -> dict:
        original, rows = self._rows(examples)
        input_ids, labels = original.clone(), torch.full_like(original, IGNORE_INDEX)
        for row, example in enumerate(examples):
            masked, targets = self.mask(example)
            input_ids[row, : len(masked)] = torch.from_numpy(masked)
            labels[row, torch.from_numpy(targets)] = original[row, torch.from_numpy(targets)]
        batch = self._batch(rows, input_ids=input_ids, labels=labels)
        if self.flat:
            return batch
        visible = rows.document_ids if self.isolate_documents else rows.padding.long()
        mask = block_mask(visible)
        if self.sliding_window is not None:
            mask = {"full_attention": mask, "sliding_attention": block_mask(visible, self.sliding_window)}
        return batch | {"attention_mask": mask}

    def mask(self, example: dict) -> tuple[np.ndarray, np.ndarray]:
        """Mask one row: (int64 (n,) ids after masking, int64 (targets,) positions of the targets)."""
        ids = np.array(example["input_ids"], dtype=np.int64)  # a copy: masked in place
        draw = seeded_generator("mask", self.seed, int(example["epoch"]), int(example["row"]))
        ordinary = ~self.is_special[ids]
        # One number for each word, or for each token when every token is a word of its own.
        word = np.cumsum(example["word_starts"]) - 1 if self.whole_word_mask else np.arange(len(ids))
        score = draw.random(len(ids))[word]
        selected = ordinary & (score < self.mlm_probability)
        if not selected.any() and ordinary.any():
            selected = ordinary & (score == score[ordinary].min())
        targets = np.flatnonzero(selected)
        action = draw.random(len(targets))
        random_ids = self.ordinary_ids[draw.integers(len(self.ordinary_ids), size=len(targets))]
        masked = action < self.mask_replace_prob
        replaced = ~masked & (action < self.mask_replace_prob + self.random_replace_prob)
        ids[targets[masked]] = self.tokenizer.mask_token_id
        ids[targets[replaced]] = random_ids[replaced]
        return ids, targets


def prepare_tokenizer(tokenizer, denoisers: tuple[Denoiser, ...], max_length: int) -> str | None:
    """Give the tokenizer the mode tokens that it lacks, and see to it that there are enough sentinels.

    Returns:
        A sentence for the log, or None when nothing was added.

    Raises:
        UserError: there are fewer sentinels than a text can have spans.
    """
    length = span_lengths(denoisers, max_length)[0]
    spans, there = max(denoiser.counts(length)[1] for denoiser in denoisers), len(sentinel_ids(tokenizer))
    if not there:
        raise UserError(
            f"the tokenizer {tokenizer.name_or_path} lacks the sentinels <extra_id_0>, <extra_id_1>, ... that spans "
            "become; make one with scripts/train_tokenizer.py --algorithm unigram"
        )
    if spans > there:
        raise UserError(
            f"max_length {max_length} takes texts of {length} tokens, in which {spans} spans are to be restored, and "
            f"the tokenizer has {there} sentinels; lower max_length, or raise mean_noise_span_length"
        )
    modes = dict.fromkeys(denoiser.mode for denoiser in denoisers if denoiser.mode)
    new = [mode for mode in modes if mode not in tokenizer.get_vocab()]
    add_special_tokens(tokenizer, {"additional_special_tokens": new})
    return f"new tokens for the modes of the denoisers: {', '.join(new)}" if new else None


def sentinel_ids(tokenizer) -> list[int]:
    """The ids of <extra_id_0>, <extra_id_1>, ..., wherever in the vocabulary they are."""
    named = {re.sub("^▁", "", token): index for token, index in tokenizer.get_vocab().items() if "<extra_id_" in token}
    ids = (named.get(f"<extra_id_{number}>") for number in range(len(named)))
    return [index for index in ids if index is not None]


def corrupt(ids: np.ndarray, noise: np.ndarray, sentinels: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """A text without its noise, and the noise without the text: int64 each, with a sentinel for what is left out.

    Args:
        ids: int (n,).
        noise: bool (n,), True where a token is to be restored.
        sentinels: at least as many as there are spans.
    """

    def without(hidden: np.ndarray) -> np.ndarray:
        first = hidden & ~np.concatenate([[False], hidden[:-1]])
        numbered = np.asarray(sentinels)[np.minimum(first.cumsum() - 1, len(sentinels) - 1)]
        return np.where(first, numbered, ids)[first | ~hidden].astype(np.int64)

    return without(noise), without(~noise)


def spans_of(target_ids, sentinels: list[int]) -> dict[int, list[int]]:
    """What targets, or an answer, put in the place of each sentinel: {sentinel: ids}, the end in the last one."""
    spans: dict[int, list[int]] = {}
    for token in map(int, target_ids):
        if token in sentinels and token not in spans:
            spans[token] = current = []
        elif spans:
            current.append(token)
    return spans


@dataclass
class DataCollatorForSpanCorruption(DataCollatorForPackedLanguageModeling):
    """T5's denoising: spans of a text become sentinels in the inputs, and the targets say what was there.

    Each document of a row is corrupted by itself, the same in the same epoch always: a function of (seed, epoch, row).
    The counts are exact and `Denoiser.fitting` has cut the text such that a row is full; which spans are noise is drawn
    uniformly from all ways to divide noise and text into that many spans.

    Each example needs `input_ids` and `lengths` as `prepare(objective="span")` writes them, `row` and `epoch`.

    Returns `input_ids` (batch, max_length), `decoder_input_ids` and `labels` (batch, target_length), int64, -100 where
    there is no target, and bool masks (batch, 1, query, key): `attention_mask`, `decoder_attention_mask` and
    `cross_attention_mask`, block-diagonal so that packed documents are apart. The last one is for
    `separate_cross_attention_mask`. T5's positions are relative to each other and need nothing.
    """

    denoisers: tuple[Denoiser, ...] = (Denoiser(),)
    decoder_start_token_id: int = 0
    seed: int = 0
    probe_tokens: ClassVar[int] = 4  # so short that there is one way to corrupt them

    def __post_init__(self):
        self.target_length = span_lengths(self.denoisers, self.max_length)[1]
        self.sentinels = sentinel_ids(self.tokenizer)
        self.modes = [self.tokenizer.convert_tokens_to_ids([one.mode] if one.mode else []) for one in self.denoisers]

    def torch_call(self, examples: list[dict]) -> dict:
        pairs = [self.pairs(example) for example in examples]
        inputs = [{"input_ids": np.concatenate([[], *(i for i, _ in row)]), "lengths": [len(i) for i, _ in row]}
                  for row in pairs]  # fmt: skip
        input_ids, encoder = self._rows(inputs)
        decoder = layout_rows([[len(target) for _, target in row] for row in pairs], self.target_length)
        labels = torch.full(decoder.padding.shape, IGNORE_INDEX)
        labels[~decoder.padding] = torch.from_numpy(
            np.concatenate([np.empty(0, int), *(t for row in pairs for _, t in row)])
        )
        before = torch.cat([labels[:, :1], labels[:, :-1]], dim=1).masked_fill(
            decoder.starts, self.decoder_start_token_id
        )
        apart = (encoder.document_ids, decoder.document_ids) if self.isolate_documents else (
            encoder.padding.long(), decoder.padding.long())  # fmt: skip
        cross = apart[1][:, :, None] == apart[0][:, None, :]
        return {
            "input_ids": input_ids,
            "decoder_input_ids": before.masked_fill(decoder.padding, self.tokenizer.pad_token_id),
            "labels": labels,
            "attention_mask": block_mask(apart[0]),
            "decoder_attention_mask": block_mask(apart[1]).tril(),
            # Padding looks at everything, since a query that may look at nothing has no softmax.
            "cross_attention_mask": (cross | decoder.padding[:, :, None])[:, None],
        }

    def pairs(self, example: dict) -> list[tuple[np.ndarray, np.ndarray]]:
        """(inputs, targets) of each document of a row: int64, each with its end."""
        draw = seeded_generator("span", self.seed, int(example["epoch"]), int(example["row"]))
        ends, found = np.cumsum(example["lengths"], dtype=int), []
        for document in np.split(np.asarray(example["input_ids"]), ends)[: len(ends)]:
            which = int(draw.integers(len(self.denoisers)))
            noise, spans = self.denoisers[which].counts(len(document))
            parts = np.stack([_partition(len(document) - noise, spans, draw), _partition(noise, spans, draw)], axis=1)
            is_noise = np.repeat(np.tile([False, True], spans), parts.ravel())
            inputs, targets = corrupt(document, is_noise, self.sentinels)
            end = [self.tokenizer.eos_token_id]
            found.append((np.concatenate([self.modes[which], inputs, end]).astype(int), np.concatenate([targets, end])))
        return found

    def probe(self, documents: tuple[np.ndarray, ...], bare: bool) -> dict:
        example = {"input_ids": np.concatenate(documents), "lengths": [len(d) for d in documents], "row": 0, "epoch": 0}
        one = replace(self, denoisers=self.denoisers[:1])
        inputs, targets = (sum(map(len, side)) for side in zip(*one.pairs(example), strict=True))
        batch = one([example])
        sizes = {"input_ids": (inputs,), "decoder_input_ids": (targets,)}
        sizes |= {"attention_mask": (inputs,) * 2, "decoder_attention_mask": (targets,) * 2}
        sizes |= {"cross_attention_mask": (targets, inputs)}
        cut = {key: batch[key][(..., *map(slice, size))] for key, size in sizes.items()}
        return {key: value for key, value in cut.items() if not bare or key.endswith("input_ids")}


def _partition(total: int, parts: int, draw: np.random.Generator) -> np.ndarray:
    """`total` as a sum of `parts` positive numbers, each way equally likely: int64 (parts,)."""
    cuts = np.sort(draw.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))
