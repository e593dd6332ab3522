"""The keys of a YAML: dataclasses, and the run that follows from a budget."""

import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field
from datetime import timedelta
from typing import ClassVar

import torch
import torch.distributed as dist
from transformers import SchedulerType, TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.utils import is_liger_kernel_available
from trl import DPOConfig, SFTConfig

from unlabeled.config.parser import yaml_value
from unlabeled.errors import UserError
from unlabeled.models.optimizers import check_optimizer, fast_bf16
from unlabeled.planning import Budget, plan_steps
from unlabeled.runtime.files import read_json
from unlabeled.runtime.processes import (
    share_failure,
    start_answering,
    start_waiting_group,
    stop_answering,
    wait_for_all,
)
from unlabeled.runtime.safe_loading import check_attention


@dataclass
class ModelArguments:
    """Which model: `model_type` from scratch, or `model_name_or_path` continued."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "the folder or Hub name to continue"})
    model_type: str | None = field(default=None, metadata={"help": "architecture, from scratch: llama, bert, ..."})
    config_overrides: dict | str | None = field(
        default=None, metadata={"help": "sizes of the model from scratch, as in its config: '{\"hidden_size\": 192}'"}
    )
    tokenizer_name_or_path: str | None = field(
        default=None, metadata={"help": "tokenizer; the model's own where model_name_or_path is set"}
    )
    attn_implementation: str = field(default="sdpa", metadata={"help": "sdpa, varlen (for a GPU), flash_attention_2"})

    _VALID_DICT_FIELDS = ("config_overrides",)

    def __post_init__(self):
        if isinstance(self.config_overrides, str):
            self.config_overrides = yaml_value("config_overrides", self.config_overrides)
        if not isinstance(self.config_overrides or {}, dict):
            raise UserError("config_overrides is no mapping; write it as '{\"hidden_size\": 192}'")
        if bool(self.model_name_or_path) == bool(self.model_type):
            raise UserError("set either model_type (from scratch) or model_name_or_path (continued), and not both")
        check_attention(self.attn_implementation)
        if self.model_name_or_path and self.config_overrides:
            raise UserError("config_overrides are for a model from scratch; remove them, or set model_type")
        self.tokenizer_name_or_path = self.tokenizer_name_or_path or self.model_name_or_path
        if not self.tokenizer_name_or_path:
            raise UserError("set tokenizer_name_or_path; scripts/train_tokenizer.py makes a tokenizer from your text")


@dataclass
class AdapterArguments:
    """Which model to tune, and with which adapter."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "the model or adapter to start from"})
    attn_implementation: str = field(default="sdpa", metadata={"help": "sdpa, varlen (for a GPU), flash_attention_2"})
    adapter: str = field(default="none", metadata={"help": "none (full fine-tuning), lora, rslora, dora or qlora"})
    lora_r: int = field(default=16, metadata={"help": "rank of the adapter"})
    lora_alpha: int = field(default=32, metadata={"help": "its scale: lora_alpha / lora_r, for rslora / sqrt(lora_r)"})
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout before the adapter"})
    lora_target_modules: str = field(default="all-linear", metadata={"help": "all-linear, or names: q_proj,v_proj"})
    ADAPTERS: ClassVar = ("none", "lora", "rslora", "dora", "qlora")

    def __post_init__(self):
        if not self.model_name_or_path:
            raise UserError("set model_name_or_path to the folder or Hub name of the model to tune")
        check_attention(self.attn_implementation)
        if self.adapter not in self.ADAPTERS:
            raise UserError(f"adapter: {self.adapter!r} is none of {', '.join(self.ADAPTERS)}")
        if self.lora_r < 1:
            raise UserError(f"lora_r is {self.lora_r}; set it to 1 or more")
        if self.adapter == "qlora" and not torch.cuda.is_available():
            raise UserError("adapter: qlora needs a GPU for bitsandbytes; set it to lora")


@dataclass
class FineTuningArguments(AdapterArguments):
    """Which model to tune on conversations, and with which adapter."""

    chat_template: str | None = field(
        default=None, metadata={"help": "a .jinja file; the model's own where it has one"}
    )


@dataclass
class SourceArguments:
    """Which data. A source is a path, or a mapping with `path` and the fields of `sources.Source`; see there."""

    train_data: str | None = field(
        default=None, metadata={"help": "file, folder, glob or Hub name, or a list of sources"}
    )
    eval_data: str | None = field(default=None, metadata={"help": "held-out data, like train_data"})
    eval_fraction: float = field(default=0.0, metadata={"help": "share of the documents to hold out instead"})
    prepared_dir: str = field(default="data/prepared", metadata={"help": "cache of tokenised and packed data"})

    def __post_init__(self):
        for name in ("train_data", "eval_data"):
            value = getattr(self, name)
            if isinstance(value, str) and value[:1] in ("[", "{") and not os.path.exists(value):
                setattr(self, name, yaml_value(name, value))
        if not self.train_data:
            raise UserError("set train_data to text: a file, a folder, a glob or the name of a data set on the Hub")
        if bool(self.eval_data) == bool(self.eval_fraction) or not 0 <= self.eval_fraction < 1:
            raise UserError("set either eval_data or an eval_fraction between 0 and 1, so that some text is held out")


@dataclass
class DataArguments(SourceArguments):
    """Raw text, for pretraining."""

    text_column: str = field(default="text", metadata={"help": "column that holds the text"})
    max_tokens: int | None = field(default=None, metadata={"help": "prepare at most so many training tokens"})
    isolate_documents: bool = field(default=True, metadata={"help": "documents in one row do not see each other"})
    stream: bool = field(default=False, metadata={"help": "tokenise and pack while it trains instead of before"})

    def __post_init__(self):
        super().__post_init__()
        if self.stream and (self.eval_fraction or self.max_tokens):
            raise UserError("stream goes with eval_data, since nothing can be held out of what has not been read yet")


# Keys of TrainingArguments that keep their default, and why. docs/support_matrix.md lists what becomes of all keys, and
# tests/test_options.py fails when a release brings a new one.
MEASURED = "evaluation adds up losses of its own"
WHOLE = "a checkpoint has to hold all that a resumed run needs"
ORDER = "the order of the rows is part of the run"
NO_CHOICE = "it has no effect here"
REFUSED = {
    "max_steps": "it follows from train_tokens and batch_tokens", "num_train_epochs": "it follows from train_tokens",
    "gradient_accumulation_steps": "it follows from batch_tokens", "torch_compile": "set compile instead",
    "average_tokens_across_devices": "the loss is the mean over the targets of all processes",
    "bf16": "set precision instead", "fp16": "set precision instead", "optim": "set optimizer instead",
    "bf16_full_eval": "set precision instead", "fp16_full_eval": "set precision instead",
    "optim_args": "set optimizer instead", "optim_target_modules": "set optimizer instead",
    "data_seed": "set seed instead", "label_smoothing_factor": "the loss is plain cross entropy",
    "resume_from_checkpoint": "the same command again resumes from the newest complete checkpoint",
    "ignore_data_skip": "a resumed run has to see the text that an uninterrupted one would",
    "save_only_model": WHOLE, "restore_callback_states_from_checkpoint": WHOLE,
    "save_on_each_node": "a checkpoint is written once, to a disk that all nodes share",
    "enable_jit_checkpoint": "a run saves by itself on SIGTERM, SIGINT and SIGUSR1",
    "load_best_model_at_end": "it is not supported", "auto_find_batch_size": "it is not supported",
    "metric_for_best_model": "the last model is the result", "greater_is_better": "the last model is the result",
    "remove_unused_columns": "collators need every column", "logging_nan_inf_filter": "a NaN must show",
    "label_names": "collators name the labels", "use_cache": "a cache would let packed documents see each other",
    "train_sampling_strategy": ORDER, "length_column_name": ORDER, "dataloader_in_order": ORDER,
    "dataloader_drop_last": "no batch is ever cut short", "accelerator_config": "it would change what a batch is",
    "include_num_input_tokens_seen": "every entry of the history has its tokens",
    "skip_memory_metrics": "metrics.json has the peak memory",
    "prediction_loss_only": MEASURED, "eval_do_concat_batches": MEASURED, "eval_use_gather_object": MEASURED,
    "eval_accumulation_steps": MEASURED, "include_for_metrics": MEASURED, "batch_eval_metrics": MEASURED,
    "do_train": NO_CHOICE, "do_eval": "set eval_strategy instead", "do_predict": NO_CHOICE,
    "parallelism_config": "tensor, context and sequence parallelism are not supported; use DDP or ZeRO",
    "fsdp": "FSDP is not supported; use DDP, or ZeRO from ds_configs/", "fsdp_config": "FSDP is not supported",
}  # fmt: skip
BY_METRIC = ("reduce_lr_on_plateau", "greedy")  # schedules of which nothing can be planned
LAUNCH = "launch with torchrun, or with an accelerate file from ds_configs/"
# At least, and below: what torch would refuse late and in other words, or not at all.
LIMITS = {
    "learning_rate": (0, math.inf), "weight_decay": (0, math.inf), "adam_epsilon": (0, math.inf),
    "adam_beta1": (0, 1), "adam_beta2": (0, 1), "decay_fraction": (0, 1), "loss_spike_threshold": (0, math.inf),
    "grad_norm_skip_ratio": (0, math.inf), "max_hours": (0, math.inf), "ddp_timeout": (1, math.inf),
    "per_device_eval_batch_size": (1, math.inf), "dataloader_num_workers": (0, math.inf),
    "save_total_limit": (1, math.inf), "seed": (0, 2**32),
}  # fmt: skip


def default_of(cls: type, name: str):
    """The default of a field of a dataclass."""
    member = cls.__dataclass_fields__[name]
    return member.default if member.default_factory is MISSING else member.default_factory()


@dataclass
class BudgetArguments:
    """Goes before `TrainingArguments` or a TRL config: a budget; steps, accumulation, warm-up and decay follow."""

    train_tokens: int | None = field(default=None, metadata={"help": "tokens to train on, a multiple of batch_tokens"})
    batch_tokens: int | None = field(default=None, metadata={"help": "tokens in a step over all processes"})
    max_length: int = field(default=512, metadata={"help": "tokens in a row"})
    optimizer: str = field(default="adamw", metadata={"help": "adamw, or muon for the hidden matrices"})
    decay_fraction: float = field(
        default=0.2, metadata={"help": "share of the steps that warmup_stable_decay decays over"}
    )
    precision: str = field(
        default="auto", metadata={"help": "auto (bf16 where the device is fast with it), bf16 or fp32"}
    )
    compile: str = field(
        default="auto", metadata={"help": "auto (when the run is long enough to pay for it), true or false"}
    )
    loss_spike_threshold: float = field(
        default=2.0, metadata={"help": "stop when the loss is this many nats above its recent median (0: never)"}
    )
    grad_norm_skip_ratio: float = field(
        default=20.0, metadata={"help": "leave out steps whose gradients are so many times the usual norm (0: none)"}
    )
    max_hours: float | None = field(
        default=None, metadata={"help": "save and stop after so many hours; the same command continues"}
    )

    # Exactness rests on these, see docs/support_matrix.md; they are refused rather than silently wrong.
    remove_unused_columns: bool = field(default=False, metadata={"help": "stays false: collators need every column"})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "stays false: a NaN must show"})
    train_sampling_strategy: str = field(default="sequential", metadata={"help": "stays sequential: rows are in order"})
    # Defaults of pretraining rather than of fine-tuning.
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "true for a model that leaves parameters out of its loss; costs time"}
    )
    lr_scheduler_type: SchedulerType | str = field(default="cosine", metadata={"help": "or warmup_stable_decay, ..."})
    warmup_steps: float = field(default=0.01, metadata={"help": "below 1: share of the steps"})
    adam_beta2: float = field(default=0.95, metadata={"help": "AdamW's second beta"})
    weight_decay: float = field(default=0.1, metadata={"help": "of matrices, not of embeddings, norms and biases"})

    refused: ClassVar[dict[str, str]] = REFUSED
    unit: ClassVar[str] = "tokens"

    def __post_init__(self):
        for name in (f"train_{self.unit}", f"batch_{self.unit}"):
            if getattr(self, name) is None:
                raise UserError(f"set {name}: budgets are in {self.unit}")
        if self.include_num_input_tokens_seen is False:  # as the command line reads its default
            self.include_num_input_tokens_seen = "no"
        for name, reason in self.refused.items():
            if getattr(self, name) != default_of(type(self), name):
                raise UserError(f"remove {name}: {reason}")
        if os.environ.get("ACCELERATE_USE_FSDP") == "true":
            raise UserError(f"the launcher asks for FSDP, which is not supported; {LAUNCH}")
        self._check_strategies()
        for name, (low, high) in LIMITS.items():
            if (value := getattr(self, name)) is not None and not low <= value < high:
                below = "" if high == math.inf else f" and below {high}"
                raise UserError(f"{name} is {value}; set it to at least {low}{below}")
        if isinstance(self.deepspeed, str) and self.deepspeed.endswith(".json"):
            try:
                read_json(self.deepspeed)
            except (OSError, ValueError) as error:
                raise UserError(f"deepspeed: cannot read {self.deepspeed} ({error}); ds_configs/ has some") from error
        self.compile = str(self.compile).lower()
        for name, choices in {"precision": ("auto", "bf16", "fp32"), "compile": ("auto", "true", "false")}.items():
            if getattr(self, name) not in choices:
                raise UserError(f"{name}: {getattr(self, name)!r} is none of {', '.join(choices)}")
        check_optimizer(self.optimizer, bool(self.deepspeed) or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true")

        self.processes = int(os.environ.get("WORLD_SIZE", "1"))
        if self.processes > 1 and "MASTER_ADDR" not in os.environ:
            raise UserError(f"WORLD_SIZE is {self.processes} but there is no MASTER_ADDR to meet at; {LAUNCH}")
        self.budget = self.plan_budget()
        # Before TrainingArguments reads them: DeepSpeed's "auto" values are filled in there.
        self.max_steps = self.budget.steps
        self.gradient_accumulation_steps = self.budget.gradient_accumulation_steps
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        if self.use_cpu:
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed warns when it has to find out
        if self.precision == "auto":
            self.precision = "bf16" if fast_bf16(self.use_cpu) else "fp32"
        self.bf16 = self.precision == "bf16"
        if self.bf16 and self.use_cpu:
            # oneDNN and torch's own layer above it compile a kernel for each new shape and keep up to 1,024 of them,
            # most of a megabyte each: rows of many lengths would take half a gigabyte (docs/planning.md).
            for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
                os.environ.setdefault(name, "64")
        if self.lr_scheduler_type == "warmup_stable_decay":
            decay = max(1, round(self.decay_fraction * self.max_steps))
            self.lr_scheduler_kwargs = {"num_decay_steps": decay, **(self.lr_scheduler_kwargs or {})}
        if self.use_cpu and self.processes > 1 and not dist.is_initialized():  # Trainer forgets ddp_timeout there
            dist.init_process_group(self.ddp_backend or "gloo", timeout=timedelta(seconds=self.ddp_timeout))
        super().__post_init__()
        if self.n_gpu > 1:
            raise UserError(f"one process sees {self.n_gpu} GPUs; {LAUNCH}, or set CUDA_VISIBLE_DEVICES to one")
        if self.deepspeed_plugin:
            import deepspeed

            for section, key in (("optimizer", "optimizer"), ("scheduler", "lr_scheduler_type")):
                if section in self.deepspeed_plugin.deepspeed_config:
                    raise UserError(f"deepspeed: remove {section} from its file; the key {key} decides")

            deepspeed.init_distributed()  # on a CPU only torch's process group has started, and ZeRO-3 cuts no shards
            # DeepSpeed calls collectives by names that torch deprecates: a warning for each call buries the progress.
            warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
        if self.world_size != self.processes:
            raise UserError(f"{self.processes} processes were launched but {self.world_size} train together; {LAUNCH}")
        start_waiting_group(self.ddp_timeout)
        decay = (self.lr_scheduler_kwargs or {}).get("num_decay_steps", 0)
        if self.get_warmup_steps(self.max_steps) + decay > self.max_steps:
            raise UserError(f"warmup_steps and decay_fraction take more than {self.max_steps} steps; lower one of them")
        available = get_available_reporting_integrations()
        if missing := sorted(set(self.report_to) - set(available)):
            raise UserError(f"report_to: {missing[0]} is not installed; choose from none, {', '.join(available)}")
        if self.use_liger_kernel and not is_liger_kernel_available():
            raise UserError("use_liger_kernel: liger-kernel is not installed; install it, or remove the key")

    def plan_budget(self) -> Budget:
        rows = (self.max_length, self.per_device_train_batch_size, self.processes)
        return plan_steps(self.train_tokens, self.batch_tokens, *rows)

    def _check_strategies(self) -> None:
        if self.save_strategy == "best":
            raise UserError("save_strategy: best would not save on a signal; set it to steps or epoch")
        if self.lr_scheduler_type in BY_METRIC:
            names = ", ".join(kind.value for kind in SchedulerType if kind.value not in BY_METRIC)
            raise UserError(f"lr_scheduler_type {self.lr_scheduler_type} follows evaluations; choose one of {names}")
        if self.lr_scheduler_type == "constant":
            self.warmup_steps = 0  # it has none; constant_with_warmup has

    def check_epochs(self, train: dict) -> None:
        """Refuse strategies by epochs where those have no known length: of streams, of pairs with hard negatives.

        Args:
            train: the manifest's counts of the training text.
        """
        for name in ("eval_strategy", "save_strategy", "logging_strategy"):
            if getattr(self, name) == "epoch" and (train.get("estimated") or train.get("uneven_epochs")):
                raise UserError(
                    f"{name}: epoch needs epochs of a known length, which neither streams nor pairs with hard "
                    "negatives have; set it to steps"
                )

    @contextmanager
    def main_process_first(self, local: bool = True, desc: str = "work") -> Iterator[bool]:
        """As in `TrainingArguments`, but the others wait for as long as it takes instead of `ddp_timeout` seconds.

        Where the first process fails with a `UserError`, the others raise the same one instead of running the block.

        Yields:
            Whether this process is the first one, of its machine or, unless `local`, of all.
        """
        is_first = (self.local_process_index if local else self.process_index) == 0
        if is_first:
            start_answering()
            try:
                yield True
            except (KeyboardInterrupt, SystemExit):  # the others are not kept waiting by a process that ends
                stop_answering()
                raise
            except Exception as error:
                wait_for_all()
                share_failure(str(error) if isinstance(error, UserError) else None)
                raise
        wait_for_all()
        reason = share_failure(None)
        if reason is not None:  # of a first process, be it of another machine
            raise UserError(reason)
        if not is_first:
            yield False

    @property
    def rows_per_step(self) -> int:
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.processes

    @property
    def optimizer_kwargs(self) -> dict:
        """For `OptimizerFactory`."""
        betas = (self.adam_beta1, self.adam_beta2)
        rates = {"lr": self.learning_rate, "weight_decay": self.weight_decay}
        return {"optimizer": self.optimizer, **rates, "betas": betas, "eps": self.adam_epsilon}


@dataclass
class PretrainingArguments(BudgetArguments, TrainingArguments):
    """`TrainingArguments` with a budget in tokens."""


LOADED = {
    "model_init_kwargs": "the recipe loads the model", "trust_remote_code": "models are those of transformers",
    "router_aux_loss_coef": "evaluation and training have one loss; set it in the model's config",
}  # fmt: skip
PREPARED = "rows are rendered, packed and masked by unlabeled.data.preparing"


@dataclass
class TuningArguments(BudgetArguments):
    """Defaults of fine-tuning, in which what the model could do before is worth knowing."""

    activation_checkpointing: bool = field(default=False, metadata={"help": "saves memory, costs a third more time"})
    eval_on_start: bool = field(default=True, metadata={"help": "evaluate before the first step"})
    weight_decay: float = field(default=0.0, metadata={"help": "as in pretraining, of matrices only"})
    lr_scheduler_type: SchedulerType | str = field(default="linear", metadata={"help": "linear, cosine, ..."})
    warmup_steps: float = field(default=0.05, metadata={"help": "below 1: share of the steps"})
    compile: str = field(default="false", metadata={"help": "as in pretraining; answers of any length compile anew"})
    grad_norm_skip_ratio: float = field(
        default=0.0, metadata={"help": "as in pretraining; the gradients of a few texts vary"}
    )


@dataclass
class SFTArguments(TuningArguments, SFTConfig):
    """`SFTConfig` with a budget in tokens."""

    refused: ClassVar[dict[str, str]] = REFUSED | LOADED | {
        "packing": PREPARED, "packing_strategy": PREPARED, "padding_free": PREPARED, "eval_packing": PREPARED,
        "completion_only_loss": PREPARED, "eos_token": PREPARED, "pad_token": PREPARED, "pad_to_multiple_of": PREPARED,
        "assistant_only_loss": PREPARED, "dataset_kwargs": PREPARED, "dataset_text_field": PREPARED,
        "dataset_num_proc": PREPARED, "shuffle_dataset": PREPARED, "truncation_mode": PREPARED,
        "chat_template_path": "set chat_template instead",
        "loss_type": "evaluation and training have one loss, cross entropy",
    }  # fmt: skip

    def __post_init__(self):
        super().__post_init__()
        self.dataset_kwargs = {"skip_prepare_dataset": True}
        if self.deepspeed_plugin:  # TRL's loss fetches the output head from its shards, where it must not be on its way
            self.deepspeed_plugin.deepspeed_config["zero_optimization"]["stage3_prefetch_bucket_size"] = 0


REFERENCE = "the reference is the model that the run starts from"
# Losses of TRL that are a mean over pairs. Others sort, or average tokens, over a micro-batch: how a batch is divided
# would change them.
PAIR_LOSSES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "apo_zero", "apo_down",
    "discopop", "sigmoid_norm",
)  # fmt: skip
DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
WITH_DIVERGENCE = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop")


@dataclass
class DPOArguments(TuningArguments, DPOConfig):
    """`DPOConfig` with a budget in pairs of answers."""

    train_pairs: int | None = field(default=None, metadata={"help": "pairs to train on, a multiple of batch_pairs"})
    batch_pairs: int | None = field(default=None, metadata={"help": "pairs in a step over all processes"})
    loss_spike_threshold: float = field(
        default=0.0, metadata={"help": "as in pretraining; the loss of a few pairs jumps"}
    )

    refused: ClassVar[dict[str, str]] = REFUSED | LOADED | {
        "train_tokens": "set train_pairs instead", "batch_tokens": "set batch_pairs instead",
        "truncation_mode": PREPARED, "dataset_num_proc": PREPARED, "pad_token": PREPARED, "padding_free": PREPARED,
        "sync_ref_model": REFERENCE, "ref_model_mixup_alpha": REFERENCE, "ref_model_sync_steps": REFERENCE,
        "neftune_noise_alpha": "the reference would be noisy as well",
    }  # fmt: skip
    unit: ClassVar[str] = "pairs"

    def __post_init__(self):
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        self._check_losses()
        super().__post_init__()

    def _check_losses(self) -> None:
        """Refuse what TRL would refuse in the first step, or not at all although it changes nothing."""
        kinds = self.loss_type
        for kind in kinds:
            if kind not in PAIR_LOSSES:
                raise UserError(f"loss_type: {kind!r} is none of {', '.join(PAIR_LOSSES)}, which are means over pairs")
        if self.loss_weights and len(self.loss_weights) != len(kinds):
            raise UserError(f"loss_weights has {len(self.loss_weights)} weights for {len(kinds)} losses of loss_type")
        if self.label_smoothing and not {"robust", "exo_pair"} & set(kinds):
            raise UserError(f"label_smoothing does nothing with loss_type {kinds[0]}; set loss_type to robust")
        if "robust" in kinds and not 0 <= self.label_smoothing < 0.5:
            raise UserError(f"label_smoothing is {self.label_smoothing}; set it to at least 0 and below 0.5")
        if "exo_pair" in kinds and not 0 < self.label_smoothing < 1:
            raise UserError(f"label_smoothing is {self.label_smoothing}; loss_type exo_pair needs it, such as 0.001")
        if self.ld_alpha is not None and not 0 <= self.ld_alpha <= 1:
            raise UserError(f"ld_alpha is {self.ld_alpha}; set it between 0 and 1")
        if self.f_divergence_type not in DIVERGENCES:
            raise UserError(f"f_divergence_type: {self.f_divergence_type!r} is none of {', '.join(DIVERGENCES)}")
        others = [kind for kind in kinds if kind not in WITH_DIVERGENCE]
        if self.f_divergence_type != "reverse_kl" and others:
            raise UserError(f"f_divergence_type does not go with loss_type {others[0]}; remove it")
        needed = {
            "f_alpha_divergence_coef": (
                "f_divergence_type: alpha_divergence",
                self.f_divergence_type == DIVERGENCES[3],
            ),
            "discopop_tau": ("loss_type: discopop", "discopop" in kinds),
            "precompute_ref_batch_size": ("precompute_ref_log_probs: true", self.precompute_ref_log_probs),
        }
        for name, (key, is_set) in needed.items():
            if getattr(self, name) != default_of(type(self), name) and not is_set:
                raise UserError(f"{name} does nothing without {key}; set that, or remove it")

    def plan_budget(self) -> Budget:
        rows = (1, self.per_device_train_batch_size, self.processes)
        return plan_steps(self.train_pairs, self.batch_pairs, *rows, unit=self.unit)

    def count_tokens(self, tokens, order) -> None:
        """Set the tokens that follow from the pairs: `tokens` of each, and their order in the run."""
        self.train_tokens = int(sum(tokens[int(place)] for place in order))
        self.batch_tokens = self.train_tokens / self.max_steps
