"""Data collators: rows of packed documents, or of labeled texts, to batches.

Masks and spans are a function of (seed, epoch, row), so that a resumed run and every evaluation see the same ones.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from transformers import DataCollatorForLanguageModeling

from unlabeled.data.attention_masks import block_mask
from unlabeled.data.packing import RowLayout, layout_rows
from unlabeled.data.randomness import seeded_generator
from unlabeled.data.span_corruption import corrupt, draw_noise, sentinel_ids
from unlabeled.data.targets import IGNORE_INDEX
from unlabeled.data.tokenization import ordinary_ids, vocabulary_size
from unlabeled.errors import UserError
from unlabeled.planning.spans import Denoiser, span_lengths

Batch = dict[str, Any]


@dataclass
class DataCollatorForPackedLanguageModeling(DataCollatorForLanguageModeling):
    """`DataCollatorForLanguageModeling` for packed rows whose documents must not attend to each other.

    With `mlm=False`, labels are the inputs, and the model shifts them. The stock collator hides every pad token from
    the loss, also a real end of text where the two share an id, and its attention mask switches off the isolation by
    `position_ids`. Here the layout of the row decides: the first token of a document and the padding are no targets,
    and there is no attention mask. Where examples have `targets` (bool, as long as `input_ids`), only these tokens are
    targets.

    With `mlm=True`, masks are a function of (seed, epoch, row). The generator of the stock collator advances and is in
    no checkpoint: its evaluation masks change from one evaluation to the next, and a resumed run masks differently.
    Each ordinary token is a target with probability `mlm_probability` (Devlin et al. 2018). Of the targets,
    `mask_replace_prob` become the mask token and `random_replace_prob` an ordinary token drawn uniformly; the rest
    stay. A row has at least one target. `whole_word_mask` selects words, by the tokenizer's own `word_ids`, for any
    fast tokenizer.

    Examples need `input_ids` and `lengths`, as `preparing.prepare` writes them, and with `mlm=True` also `word_starts`,
    `row` and `epoch`.

    Args:
        tokenizer: for the ids of padding and masks.
        max_length: tokens in a row.
        isolate_documents: whether documents of a row are kept apart.
        flat: one row of batch · max_length tokens instead, for attention that gets the lengths of the documents, as
            flash attention does (`models.attention.needs_flat_batches`).
        sliding_window: with `mlm=True`, the distance that sliding layers see to each side, or None.
        seed: with `mlm=True`, of the masks.

    Returns:
        `input_ids`, `labels` (-100 where there is no target) and `position_ids`: int64 (batch, max_length), or
        (1, batch · max_length) if `flat`.

        - if `flat`: `cu_seq_lens_q` and `cu_seq_lens_k`, int32, where each document starts, and the end; and
          `max_length_q` and `max_length_k`.
        - otherwise, with `mlm=True`: `attention_mask`, bool (batch, 1, max_length, max_length), block-diagonal, because
          `position_ids` alone isolate nothing in a bidirectional model. For a model with sliding layers it is a
          dictionary with one such mask for each kind of layer.
    """

    mlm: bool = False
    seed: int = 0
    max_length: int = 512
    isolate_documents: bool = True
    flat: bool = False
    sliding_window: int | None = None
    probe_tokens: ClassVar[int] = 8  # of each document of `probe`

    def __post_init__(self) -> None:
        if not self.mlm:
            return
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

    def torch_call(self, examples: list[dict]) -> Batch:
        return self._masked_batch(examples) if self.mlm else self._causal_batch(examples)

    def _causal_batch(self, examples: list[dict]) -> Batch:
        input_ids, layout = self._pad_rows(examples)
        labels = input_ids.masked_fill(layout.starts | layout.padding, IGNORE_INDEX)
        for row, example in enumerate(examples):
            if "targets" in example:
                is_target = torch.as_tensor(example["targets"], dtype=torch.bool)
                row_labels = labels[row, : len(is_target)]
                row_labels[~is_target] = IGNORE_INDEX
        return self._make_batch(layout, input_ids, labels)

    def _masked_batch(self, examples: list[dict]) -> Batch:
        original_ids, layout = self._pad_rows(examples)
        input_ids = original_ids.clone()
        labels = torch.full_like(original_ids, IGNORE_INDEX)
        for row, example in enumerate(examples):
            masked_ids, targets = self.mask(example)
            input_ids[row, : len(masked_ids)] = torch.from_numpy(masked_ids)
            positions = torch.from_numpy(targets)
            labels[row, positions] = original_ids[row, positions]
        batch = self._make_batch(layout, input_ids, labels)
        if self.flat:
            return batch
        visible = layout.document_ids if self.isolate_documents else layout.padding.long()
        mask: Any = block_mask(visible)
        if self.sliding_window is not None:
            mask = {"full_attention": mask, "sliding_attention": block_mask(visible, self.sliding_window)}
        return batch | {"attention_mask": mask}

    def mask(self, example: dict) -> tuple[np.ndarray, np.ndarray]:
        """Mask one row.

        Returns:
            The ids after masking, int64 (n,), and the positions of the targets, int64 (targets,).
        """
        ids = np.array(example["input_ids"], dtype=np.int64)  # a copy
        generator = seeded_generator("mask", self.seed, int(example["epoch"]), int(example["row"]))
        is_ordinary = ~self.is_special[ids]
        word_of_token = np.cumsum(example["word_starts"]) - 1 if self.whole_word_mask else np.arange(len(ids))
        score = generator.random(len(ids))[word_of_token]  # one random number for each word
        is_target = is_ordinary & (score < self.mlm_probability)
        if not is_target.any() and is_ordinary.any():
            is_target = is_ordinary & (score == score[is_ordinary].min())
        targets = np.flatnonzero(is_target)
        action = generator.random(len(targets))
        random_ids = self.ordinary_ids[generator.integers(len(self.ordinary_ids), size=len(targets))]
        is_masked = action < self.mask_replace_prob
        is_replaced = ~is_masked & (action < self.mask_replace_prob + self.random_replace_prob)
        ids[targets[is_masked]] = self.tokenizer.mask_token_id
        ids[targets[is_replaced]] = random_ids[is_replaced]
        return ids, targets

    def _pad_rows(self, examples: list[dict]) -> tuple[torch.Tensor, RowLayout]:
        """The ids of the rows, int64 (rows, max_length), and where their documents lie."""
        input_ids = np.full((len(examples), self.max_length), self.tokenizer.pad_token_id, dtype=np.int64)
        for row, example in enumerate(examples):
            input_ids[row, : len(example["input_ids"])] = example["input_ids"]
        layout = layout_rows([example["lengths"] for example in examples], self.max_length)
        return torch.from_numpy(input_ids), layout

    def _make_batch(self, layout: RowLayout, input_ids: torch.Tensor, labels: torch.Tensor) -> Batch:
        """Add `position_ids`, and if `flat` the lengths of the documents."""
        position_ids = layout.position_ids
        starts = layout.starts
        if not self.isolate_documents:
            position_ids = torch.arange(self.max_length).expand_as(position_ids).contiguous()
            starts = (position_ids == 0) | (starts & layout.padding)
        batch = {"input_ids": input_ids, "labels": labels, "position_ids": position_ids}
        if not self.flat:
            return batch
        flat_batch: Batch = {name: tensor.view(1, -1) for name, tensor in batch.items()}
        cumulative_lengths = _cumulative_lengths(starts)
        return flat_batch | {
            "cu_seq_lens_q": cumulative_lengths,
            "cu_seq_lens_k": cumulative_lengths,
            "max_length_q": self.max_length,
            "max_length_k": self.max_length,
        }

    def probe(self, documents: tuple[np.ndarray, ...], bare: bool) -> Batch:
        """Model inputs for `models.attention.check_isolation`: these documents in one row, without masked tokens.

        Args:
            documents: int (tokens,) each.
            bare: nothing but the ids.
        """
        ids = np.concatenate(documents)
        example = {
            "input_ids": ids,
            "lengths": [len(document) for document in documents],
            "word_starts": np.ones(len(ids), dtype=bool),
            "row": 0,
            "epoch": 0,
        }
        batch = replace(self, max_length=len(ids))([example])
        batch["input_ids"] = torch.from_numpy(ids)[None]
        if bare:
            return {"input_ids": batch["input_ids"]}
        return {name: value for name, value in batch.items() if name != "labels"}


def _cumulative_lengths(starts: torch.Tensor) -> torch.Tensor:
    """Where documents start in the flat batch, and its end, int32.

    Filled up with empty documents to a power of two, at least 16: flash attention skips them, and a compiled model sees
    few shapes.
    """
    positions = starts.flatten().nonzero()[:, 0]
    size = max(16, 1 << len(positions).bit_length())
    cumulative_lengths = torch.full((size,), starts.numel(), dtype=torch.int32)
    cumulative_lengths[: len(positions)] = positions
    return cumulative_lengths


@dataclass
class DataCollatorForSpanCorruption(DataCollatorForPackedLanguageModeling):
    """T5's denoising: spans of a text become sentinels in the inputs, and the targets say what was there.

    Each document of a row is corrupted by itself, as a function of (seed, epoch, row). The number of noise tokens is
    exact, and the text was cut so that a row is full (`Denoiser.fitting`). Which spans are noise is drawn uniformly
    from all ways to divide noise and text into that many spans.

    Examples need `input_ids` and `lengths`, as `preparing.prepare(objective="span")` writes them, `row` and `epoch`.

    Args:
        denoisers: one is drawn for each document.
        decoder_start_token_id: in front of the targets of each document.

    Returns:
        `input_ids` (batch, max_length), `decoder_input_ids` and `labels` (batch, target_length), int64, -100 where
        there is no target; and bool masks (batch, 1, query, key), block-diagonal so that packed documents are kept
        apart: `attention_mask`, `decoder_attention_mask` and `cross_attention_mask`. The last one is for
        `models.attention.separate_cross_attention_mask`. T5's positions are relative and need nothing.
    """

    denoisers: tuple[Denoiser, ...] = (Denoiser(),)
    decoder_start_token_id: int = 0
    probe_tokens: ClassVar[int] = 4  # so few that there is one way to corrupt them

    def __post_init__(self) -> None:
        self.target_length = span_lengths(self.denoisers, self.max_length)[1]
        self.sentinels = sentinel_ids(self.tokenizer)
        self.mode_ids = [
            self.tokenizer.convert_tokens_to_ids([denoiser.mode] if denoiser.mode else [])
            for denoiser in self.denoisers
        ]

    def torch_call(self, examples: list[dict]) -> Batch:
        rows = [self.corrupt_documents(example) for example in examples]
        input_ids, encoder = self._pad_rows(
            [
                {"input_ids": _join_ids([inputs for inputs, _ in row]), "lengths": [len(inputs) for inputs, _ in row]}
                for row in rows
            ]
        )
        decoder = layout_rows([[len(targets) for _, targets in row] for row in rows], self.target_length)
        labels = torch.full(decoder.padding.shape, IGNORE_INDEX)
        labels[~decoder.padding] = torch.from_numpy(_join_ids([targets for row in rows for _, targets in row]))
        shifted = torch.cat([labels[:, :1], labels[:, :-1]], dim=1)
        decoder_input_ids = shifted.masked_fill(decoder.starts, self.decoder_start_token_id)
        if self.isolate_documents:
            encoder_documents = encoder.document_ids
            decoder_documents = decoder.document_ids
        else:
            encoder_documents = encoder.padding.long()
            decoder_documents = decoder.padding.long()
        is_same_document = decoder_documents[:, :, None] == encoder_documents[:, None, :]
        return {
            "input_ids": input_ids,
            "decoder_input_ids": decoder_input_ids.masked_fill(decoder.padding, self.tokenizer.pad_token_id),
            "labels": labels,
            "attention_mask": block_mask(encoder_documents),
            "decoder_attention_mask": block_mask(decoder_documents).tril(),
            # Padding attends to everything, since the softmax of a query that attends to nothing is undefined.
            "cross_attention_mask": (is_same_document | decoder.padding[:, :, None])[:, None],
        }

    def corrupt_documents(self, example: dict) -> list[tuple[np.ndarray, np.ndarray]]:
        """(inputs, targets) of each document of a row: int64, each with its end of sequence."""
        generator = seeded_generator("span", self.seed, int(example["epoch"]), int(example["row"]))
        ends = np.cumsum(example["lengths"], dtype=int)
        documents = np.split(np.asarray(example["input_ids"]), ends)[: len(ends)]
        eos = [self.tokenizer.eos_token_id]
        pairs = []
        for document in documents:
            index = int(generator.integers(len(self.denoisers)))
            noise, spans = self.denoisers[index].counts(len(document))
            is_noise = draw_noise(noise, len(document) - noise, spans, generator)
            inputs, targets = corrupt(document, is_noise, self.sentinels)
            pairs.append((_join_ids([self.mode_ids[index], inputs, eos]), _join_ids([targets, eos])))
        return pairs

    def probe(self, documents: tuple[np.ndarray, ...], bare: bool) -> Batch:
        example = {
            "input_ids": np.concatenate(documents),
            "lengths": [len(document) for document in documents],
            "row": 0,
            "epoch": 0,
        }
        collator = replace(self, denoisers=self.denoisers[:1])
        pairs = collator.corrupt_documents(example)
        batch = collator([example])
        inputs = sum(len(input_ids) for input_ids, _ in pairs)
        targets = sum(len(target_ids) for _, target_ids in pairs)
        ids = {
            "input_ids": batch["input_ids"][:, :inputs],
            "decoder_input_ids": batch["decoder_input_ids"][:, :targets],
        }
        if bare:
            return ids
        return ids | {
            "attention_mask": batch["attention_mask"][..., :inputs, :inputs],
            "decoder_attention_mask": batch["decoder_attention_mask"][..., :targets, :targets],
            "cross_attention_mask": batch["cross_attention_mask"][..., :targets, :inputs],
        }


def _join_ids(parts: list) -> np.ndarray:
    """The parts one after the other, int64; no parts give no ids."""
    return np.concatenate([np.empty(0, dtype=np.int64), *parts]).astype(np.int64)


@dataclass
class DataCollatorForClassification:
    """Pads labeled texts on the right to the longest one, rounded up to a multiple of 8 but at most `max_length`.

    Args:
        pad_token_id: the id of padding.
        max_length: tokens of the longest text.
        type_ids: whether the model has an embedding of token types.

    Returns:
        `input_ids`, `attention_mask` and with `type_ids` also `token_type_ids`, int64 (batch, length). `labels`: int64
        (batch,) for classes, float32 (batch,) for numbers, int64 (batch, length) for tags, -100 where there is none.
    """

    pad_token_id: int
    max_length: int
    type_ids: bool

    def __call__(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        longest = max(len(example["input_ids"]) for example in examples)
        length = max(longest, min(-(-longest // 8) * 8, self.max_length))
        ids = [example["input_ids"] for example in examples]
        batch = {
            "input_ids": _pad(ids, length, self.pad_token_id),
            "attention_mask": _pad([np.ones_like(row) for row in ids], length, 0),
        }
        if self.type_ids:
            batch["token_type_ids"] = _pad([example["type_ids"] for example in examples], length, 0)
        labels = [example["labels"] for example in examples]
        if isinstance(labels[0], np.ndarray):
            batch["labels"] = _pad(labels, length, IGNORE_INDEX)
        else:
            is_number = np.issubdtype(np.asarray(labels).dtype, np.floating)
            batch["labels"] = torch.tensor(labels, dtype=torch.float32 if is_number else torch.int64)
        return batch


def _pad(arrays: list[np.ndarray], length: int, value: int) -> torch.Tensor:
    """int64 (arrays, length)."""
    padded = [np.pad(array, (0, length - len(array)), constant_values=value) for array in arrays]
    return torch.from_numpy(np.stack(padded).astype(np.int64))
