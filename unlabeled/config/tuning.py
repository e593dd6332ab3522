"""Training arguments of the stages after pretraining: SFT, DPO, and sequence and token classification."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from transformers import SchedulerType, TrainingArguments
from trl import DPOConfig, SFTConfig

from unlabeled.config import refused_keys
from unlabeled.config.training import BudgetArguments, default_of
from unlabeled.errors import UserError

# Losses of TRL that are a mean over pairs. Others sort, or average tokens, over a micro-batch, so that their value
# depends on how a batch is divided.
PAIR_LOSSES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "apo_zero", "apo_down",
    "discopop", "sigmoid_norm",
)  # fmt: skip
DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
LOSSES_WITH_DIVERGENCE = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop")


@dataclass
class TuningArguments(BudgetArguments):
    """Defaults of fine-tuning, which also evaluates the model that it starts from."""

    activation_checkpointing: bool = field(
        default=False, metadata={"help": "recompute activations: saves memory, takes a third longer"}
    )
    eval_on_start: bool = field(default=True, metadata={"help": "evaluate before the first step"})
    weight_decay: float = field(default=0.0, metadata={"help": "as in pretraining, of matrices only"})
    lr_scheduler_type: SchedulerType | str = field(default="linear", metadata={"help": "linear, cosine, ..."})
    warmup_steps: float = field(default=0.05, metadata={"help": "warm-up steps; below 1, a fraction of all steps"})
    compile: str = field(
        default="false", metadata={"help": "as in pretraining; rows of varying length are compiled again and again"}
    )
    grad_norm_skip_ratio: float = field(
        default=0.0, metadata={"help": "as in pretraining; gradients of few examples vary"}
    )


@dataclass
class RowBudgetArguments(TuningArguments):
    """Mixin for stages whose budget counts rows: pairs or examples. Their tokens are known once they are tokenized."""

    loss_spike_threshold: float = field(
        default=0.0, metadata={"help": "as in pretraining; the loss of few rows varies"}
    )

    def set_token_counts(self, tokens: Sequence[int] | np.ndarray) -> None:
        """Set `train_tokens` and the mean `batch_tokens` from the rows of the run.

        Args:
            tokens: The number of tokens of each row, in the order of the run: repeated rows are counted again.
        """
        self.train_tokens = int(np.sum(tokens))
        self.batch_tokens = self.train_tokens / self.max_steps  # type: ignore[assignment]  # the key is an integer


@dataclass
class SFTArguments(TuningArguments, SFTConfig):
    """`SFTConfig` with a budget in tokens."""

    refused: ClassVar[Mapping[str, str]] = refused_keys.SFT_KEYS

    def __post_init__(self) -> None:
        super().__post_init__()
        self.dataset_kwargs = {"skip_prepare_dataset": True}
        if self.deepspeed_plugin:
            # TRL's loss gathers the output head from its ZeRO-3 shards, which fails while it is being prefetched.
            self.deepspeed_plugin.deepspeed_config["zero_optimization"]["stage3_prefetch_bucket_size"] = 0


@dataclass
class DPOArguments(RowBudgetArguments, DPOConfig):
    """`DPOConfig` with a budget in pairs of answers."""

    train_pairs: int | None = field(default=None, metadata={"help": "pairs to train on, a multiple of batch_pairs"})
    batch_pairs: int | None = field(default=None, metadata={"help": "pairs in a step over all processes"})

    refused: ClassVar[Mapping[str, str]] = refused_keys.DPO_KEYS
    unit: ClassVar[str] = "pairs"

    def __post_init__(self) -> None:
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        self._check_losses()
        self._check_label_smoothing()
        self._check_divergence()
        self._check_unused_keys()
        super().__post_init__()

    def _check_losses(self) -> None:
        for loss in self.loss_type:
            if loss not in PAIR_LOSSES:
                raise UserError(f"loss_type: {loss!r} is none of {', '.join(PAIR_LOSSES)}, which are means over pairs")
        if self.loss_weights and len(self.loss_weights) != len(self.loss_type):
            raise UserError(
                f"loss_weights has {len(self.loss_weights)} weights for {len(self.loss_type)} losses of loss_type"
            )
        if self.ld_alpha is not None and not 0 <= self.ld_alpha <= 1:
            raise UserError(f"ld_alpha is {self.ld_alpha}; set it between 0 and 1")

    def _check_label_smoothing(self) -> None:
        if self.label_smoothing and not {"robust", "exo_pair"} & set(self.loss_type):
            raise UserError(f"label_smoothing does nothing with loss_type {self.loss_type[0]}; set loss_type to robust")
        if "robust" in self.loss_type and not 0 <= self.label_smoothing < 0.5:
            raise UserError(f"label_smoothing is {self.label_smoothing}; set it to at least 0 and below 0.5")
        if "exo_pair" in self.loss_type and not 0 < self.label_smoothing < 1:
            raise UserError(f"label_smoothing is {self.label_smoothing}; loss_type exo_pair needs it, such as 0.001")

    def _check_divergence(self) -> None:
        if self.f_divergence_type not in DIVERGENCES:
            raise UserError(f"f_divergence_type: {self.f_divergence_type!r} is none of {', '.join(DIVERGENCES)}")
        others = [loss for loss in self.loss_type if loss not in LOSSES_WITH_DIVERGENCE]
        if self.f_divergence_type != "reverse_kl" and others:
            raise UserError(f"f_divergence_type does not go with loss_type {others[0]}; remove it")

    def _check_unused_keys(self) -> None:
        """Refuse keys that have no effect without another one, which TRL ignores."""
        has_effect = {
            "f_alpha_divergence_coef": self.f_divergence_type == "alpha_divergence",
            "discopop_tau": "discopop" in self.loss_type,
            "precompute_ref_batch_size": self.precompute_ref_log_probs,
        }
        needed = {
            "f_alpha_divergence_coef": "f_divergence_type: alpha_divergence",
            "discopop_tau": "loss_type: discopop",
            "precompute_ref_batch_size": "precompute_ref_log_probs: true",
        }
        for name, setting in needed.items():
            if getattr(self, name) != default_of(type(self), name) and not has_effect[name]:
                raise UserError(f"{name} does nothing without {setting}; set that, or remove it")


@dataclass
class DownstreamArguments(RowBudgetArguments, TrainingArguments):
    """`TrainingArguments` with a budget in examples, for sequence and token classification."""

    train_examples: int | None = field(
        default=None, metadata={"help": "examples to train on, a multiple of batch_examples"}
    )
    batch_examples: int | None = field(default=None, metadata={"help": "examples in a step over all processes"})
    early_stopping_patience: int = field(
        default=0, metadata={"help": "stop after this many evaluations without improvement, keep the best (0: never)"}
    )

    refused: ClassVar[Mapping[str, str]] = refused_keys.DOWNSTREAM_KEYS
    unit: ClassVar[str] = "examples"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.early_stopping_patience < 0:
            raise UserError(f"early_stopping_patience is {self.early_stopping_patience}; set it to 0 or more")
        if self.early_stopping_patience:
            if self.eval_strategy != "steps" or self.save_strategy != "steps" or self.eval_steps != self.save_steps:
                raise UserError(
                    "early_stopping_patience needs eval_strategy: steps, and save_steps equal to eval_steps"
                )
            self.load_best_model_at_end = True
            self.restore_callback_states_from_checkpoint = True
