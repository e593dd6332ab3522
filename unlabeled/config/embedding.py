"""Training arguments of sentence embeddings. Needs sentence-transformers: `pip install unlabeled[embeddings]`."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

from sentence_transformers import SentenceTransformerTrainingArguments

from unlabeled.config import refused_keys
from unlabeled.config.tuning import RowBudgetArguments
from unlabeled.errors import UserError
from unlabeled.planning import Budget

POOLING_MODES = ("mean", "lasttoken", "cls")


@dataclass
class EmbedArguments(RowBudgetArguments, SentenceTransformerTrainingArguments):
    """`SentenceTransformerTrainingArguments` with a budget in pairs.

    A batch is one softmax, so it is never accumulated: `per_device_train_batch_size` texts are embedded at a time.
    """

    train_pairs: int | None = field(default=None, metadata={"help": "pairs to train on, a multiple of batch_pairs"})
    batch_pairs: int | None = field(
        default=None, metadata={"help": "global batch size; the other positives are in-batch negatives"}
    )
    pooling: str | None = field(default=None, metadata={"help": "mean (default), lasttoken or cls, for a new embedder"})
    is_causal: bool | None = field(
        default=None, metadata={"help": "causal attention (true) or bidirectional (false); by default as the model"}
    )
    dataloader_drop_last: bool = field(default=True, metadata={"help": "nothing is dropped: every batch is full"})

    refused: ClassVar[Mapping[str, str]] = refused_keys.EMBEDDING_KEYS
    unit: ClassVar[str] = "pairs"
    # Texts are embedded for the softmax over the batch, and again piece by piece for the gradients (GradCache).
    embeds_twice: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.pooling not in (None, *POOLING_MODES):
            raise UserError(f"pooling: {self.pooling!r} is none of {', '.join(POOLING_MODES)}")
        super().__post_init__()
        if self.deepspeed_plugin:
            raise UserError("DeepSpeed cannot replay a batch in pieces; launch with torchrun")

    def plan_budget(self) -> Budget:
        return replace(super().plan_budget(), gradient_accumulation_steps=1)

    @property
    def train_batch_size(self) -> int:
        """Pairs that the Trainer takes at a time in a process. The loss divides them into smaller pieces."""
        return self.batch_pairs // self.processes

    @property
    def rows_per_step(self) -> int:
        return self.batch_pairs
