"""Rows of packed documents to batches: next-token labels, or masks that depend on (seed, epoch, row) alone."""

from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import DataCollatorForLanguageModeling

from unlabeled import UserError
from unlabeled.evaluation import IGNORE
from unlabeled.packing import Layout, block_mask, generator, layout


@dataclass
class PackedCollator(DataCollatorForLanguageModeling):
    """`DataCollatorForLanguageModeling(tokenizer, mlm=False)` for packed rows that must not leak.

    The stock collator hides every pad token from the loss, also a real end of text where the two share an id, and its
    attention mask switches off the isolation by `position_ids`. Here the layout of the row decides: the first token of
    a document and the padding are no targets, and there is no attention mask.

    Each example needs `input_ids` and `lengths` as `prepare` writes them. Where it has `targets` (bool, as long as
    `input_ids`), only those tokens are learned.

    Returns (batch, max_length) tensors: `input_ids`, `labels` (-100 where there is no target), `position_ids`, int64.
    """

    mlm: bool = False
    max_length: int = 512
    isolate_documents: bool = True

    def torch_call(self, examples: list[dict]) -> dict:
        input_ids, rows = self._rows(examples)
        labels = input_ids.masked_fill(rows.starts | rows.padding, IGNORE)
        for row, example in enumerate(examples):
            if "targets" in example:
                labels[row, : len(example["targets"])][~torch.as_tensor(example["targets"], dtype=torch.bool)] = IGNORE
        return {"input_ids": input_ids, "labels": labels, "position_ids": self._positions(rows)}

    def _rows(self, examples: list[dict]) -> tuple[torch.Tensor, Layout]:
        input_ids = np.full((len(examples), self.max_length), self.tokenizer.pad_token_id, dtype=np.int64)
        for row, example in enumerate(examples):
            input_ids[row, : len(example["input_ids"])] = example["input_ids"]
        return torch.from_numpy(input_ids), layout([example["lengths"] for example in examples], self.max_length)

    def _positions(self, rows: Layout) -> torch.Tensor:
        if self.isolate_documents:
            return rows.position_ids
        return torch.arange(self.max_length).expand_as(rows.position_ids).contiguous()


@dataclass
class MaskingArguments:
    """How tokens become targets (Devlin et al. 2018); names as in `DataCollatorForLanguageModeling`."""

    mlm_probability: float = field(default=0.3, metadata={"help": "share of the tokens that are targets in training"})
    mask_replace_prob: float = field(default=0.8, metadata={"help": "share of the targets that become the mask token"})
    random_replace_prob: float = field(default=0.1, metadata={"help": "share of them that becomes a random token"})
    whole_word_mask: bool = field(default=False, metadata={"help": "mask whole words"})


@dataclass
class MaskedCollator(PackedCollator):
    """`DataCollatorForLanguageModeling(tokenizer, mlm=True)` whose masks are a function of (seed, epoch, row).

    The generator of the stock collator advances and is in no checkpoint: its evaluation masks change from one
    evaluation to the next and a resumed run masks differently. Here the same row has the same mask in the same epoch,
    always. Each ordinary token is a target with probability `mlm_probability` (Devlin et al. 2018); of the targets
    `mask_replace_prob` become the mask token, `random_replace_prob` an ordinary token drawn uniformly, the rest stay.
    A row has at least one target. `whole_word_mask` selects words, by the tokenizer's own `word_ids`, for any fast
    tokenizer.

    Each example needs `input_ids`, `lengths`, `word_starts`, `row` and `epoch`.

    Returns the tensors of `PackedCollator` and `attention_mask`: bool (batch, 1, max_length, max_length),
    block-diagonal, because `position_ids` alone isolate nothing in a bidirectional model. For a model with sliding
    layers it is a dictionary with one such mask for each kind of layer.
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
        special = np.zeros(len(self.tokenizer), dtype=bool)
        special[self.tokenizer.all_special_ids] = True
        self.is_special, self.ordinary_ids = special, np.flatnonzero(~special)

    def torch_call(self, examples: list[dict]) -> dict:
        original, rows = self._rows(examples)
        input_ids, labels = original.clone(), torch.full_like(original, IGNORE)
        for row, example in enumerate(examples):
            masked, targets = self.mask(example)
            input_ids[row, : len(masked)] = torch.from_numpy(masked)
            labels[row, torch.from_numpy(targets)] = original[row, torch.from_numpy(targets)]
        visible = rows.document_ids if self.isolate_documents else rows.padding.long()
        attention_mask = block_mask(visible)
        if self.sliding_window is not None:
            attention_mask = {
                "full_attention": attention_mask,
                "sliding_attention": block_mask(visible, self.sliding_window),
            }
        return {
            "input_ids": input_ids,
            "labels": labels,
            "position_ids": self._positions(rows),
            "attention_mask": attention_mask,
        }

    def mask(self, example: dict) -> tuple[np.ndarray, np.ndarray]:
        """Mask one row: (int64 (n,) ids after masking, int64 (targets,) positions of the targets)."""
        ids = np.array(example["input_ids"], dtype=np.int64)  # a copy: masked in place
        draw = generator("mask", self.seed, int(example["epoch"]), int(example["row"]))
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
