"""The keys of a YAML: dataclasses behind `TrlParser`, and the run that follows from a budget in tokens."""

import os
import sys
from dataclasses import dataclass, field, fields
from difflib import get_close_matches

import torch
import yaml
from transformers import TrainingArguments
from trl import TrlParser

from unlabeled.budget import plan_steps
from unlabeled.errors import UserError
from unlabeled.optim import check_optimizer


@dataclass
class ModelArguments:
    """Which model: `model_type` from scratch, or `model_name_or_path` continued."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "continue this checkpoint (folder or Hub name)"}
    )
    model_type: str | None = field(
        default=None, metadata={"help": "architecture to train from scratch: llama, bert, ..."}
    )
    config_overrides: dict | str | None = field(
        default=None, metadata={"help": "sizes of the model from scratch, as in its config: '{\"hidden_size\": 192}'"}
    )
    tokenizer_name_or_path: str | None = field(
        default=None, metadata={"help": "tokenizer; the model's own where model_name_or_path is set"}
    )
    attn_implementation: str = field(default="sdpa", metadata={"help": "sdpa, flash_attention_2, ..."})

    _VALID_DICT_FIELDS = ("config_overrides",)

    def __post_init__(self):
        if isinstance(self.config_overrides, str):
            self.config_overrides = yaml.safe_load(self.config_overrides)  # JSON is YAML
        if not isinstance(self.config_overrides or {}, dict):
            raise UserError("config_overrides is no mapping; write it as '{\"hidden_size\": 192}'")
        if bool(self.model_name_or_path) == bool(self.model_type):
            raise UserError("set either model_type (from scratch) or model_name_or_path (continued), and not both")
        if self.model_name_or_path and self.config_overrides:
            raise UserError("config_overrides are for a model from scratch; remove them, or set model_type")
        self.tokenizer_name_or_path = self.tokenizer_name_or_path or self.model_name_or_path
        if not self.tokenizer_name_or_path:
            raise UserError("set tokenizer_name_or_path; scripts/train_tokenizer.py makes a tokenizer from your text")


@dataclass
class DataArguments:
    """Which text. A source is a path, or a mapping with `path` and the fields of `corpus.Source`; see there."""

    train_data: str | None = field(
        default=None, metadata={"help": "file, folder, glob or Hub name, or a list of sources"}
    )
    eval_data: str | None = field(default=None, metadata={"help": "held-out text, like train_data"})
    eval_fraction: float = field(
        default=0.0, metadata={"help": "share of the documents to hold out where eval_data is not set"}
    )
    text_column: str = field(default="text", metadata={"help": "column that holds the text"})
    max_tokens: int | None = field(
        default=None, metadata={"help": "prepare at most this many training tokens (for streams)"}
    )
    prepared_dir: str = field(default="data/prepared", metadata={"help": "cache of tokenised and packed text"})
    isolate_documents: bool = field(default=True, metadata={"help": "documents in one row do not see each other"})

    def __post_init__(self):
        self.train_data, self.eval_data = (
            yaml.safe_load(value) if isinstance(value, str) and value[:1] in "[{" else value
            for value in (self.train_data, self.eval_data)
        )
        if not self.train_data:
            raise UserError("set train_data to text: a file, a folder, a glob or the name of a data set on the Hub")
        if bool(self.eval_data) == bool(self.eval_fraction) or not 0 <= self.eval_fraction < 1:
            raise UserError("set either eval_data or an eval_fraction between 0 and 1, so that some text is held out")


@dataclass
class PretrainingArguments(TrainingArguments):
    """`TrainingArguments` with a budget in tokens; steps, accumulation, warm-up and decay follow from it."""

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
    max_loss_rise: float = field(
        default=2.0, metadata={"help": "stop when the loss is this many nats above its recent median (0: never)"}
    )

    # Exactness rests on these, see docs/support_matrix.md; they are refused rather than silently wrong.
    remove_unused_columns: bool = field(default=False, metadata={"help": "stays false: collators need every column"})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "stays false: a NaN must show"})
    train_sampling_strategy: str = field(
        default="sequential", metadata={"help": "stays sequential: TrainingRows is in order"}
    )
    # Defaults of pretraining rather than of fine-tuning.
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "cosine, warmup_stable_decay, ..."})
    warmup_steps: float = field(default=0.01, metadata={"help": "below 1: share of the steps"})
    adam_beta2: float = field(default=0.95, metadata={"help": "AdamW's second beta"})
    weight_decay: float = field(
        default=0.1, metadata={"help": "of matrices; embeddings, norms and biases are not decayed"}
    )

    def __post_init__(self):
        for name in ("remove_unused_columns", "logging_nan_inf_filter", "train_sampling_strategy"):
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise UserError(f"{name} has to stay {type(self).__dataclass_fields__[name].default!r}; remove the key")
        for name in ("train_tokens", "batch_tokens"):
            if getattr(self, name) is None:
                raise UserError(f"set {name}: budgets are in tokens")
        if self.max_steps != -1 or self.gradient_accumulation_steps != 1:
            raise UserError(
                "max_steps and gradient_accumulation_steps follow from train_tokens and batch_tokens; remove them"
            )
        if self.load_best_model_at_end or self.auto_find_batch_size:
            raise UserError("load_best_model_at_end and auto_find_batch_size are not supported; remove them")
        if self.precision not in ("auto", "bf16", "fp32") or self.bf16 or self.fp16:
            raise UserError("set precision to auto, bf16 or fp32 (and neither bf16 nor fp16)")
        self.compile = str(self.compile).lower()
        if self.compile not in ("auto", "true", "false"):
            raise UserError(f"compile {self.compile!r} is none of auto, true and false")
        check_optimizer(self.optimizer, bool(self.deepspeed) or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true")

        self.processes = int(os.environ.get("WORLD_SIZE", "1"))
        self.budget = plan_steps(
            self.train_tokens, self.batch_tokens, self.max_length, self.per_device_train_batch_size, self.processes
        )
        # Before TrainingArguments reads them: DeepSpeed's "auto" values are filled in there.
        self.max_steps = self.budget.steps
        self.gradient_accumulation_steps = self.budget.gradient_accumulation_steps
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        if self.precision == "auto":
            self.precision = "bf16" if fast_bf16(self.use_cpu) else "fp32"
        self.bf16 = self.precision == "bf16"
        if self.lr_scheduler_type == "warmup_stable_decay":
            decay = max(1, round(self.decay_fraction * self.max_steps))
            self.lr_scheduler_kwargs = {"num_decay_steps": decay, **(self.lr_scheduler_kwargs or {})}
        super().__post_init__()
        if self.world_size != self.processes:
            raise UserError(
                f"{self.processes} processes were launched but each trains alone ({self.world_size} in its group); "
                "launch with torchrun, or with an accelerate file from ds_configs/"
            )

    @property
    def rows_per_step(self) -> int:
        return self.budget.batch_tokens // self.max_length

    @property
    def optimizer_kwargs(self) -> dict:
        """For `BuildOptimizer`."""
        return {
            "optimizer": self.optimizer,
            "lr": self.learning_rate,
            "weight_decay": self.weight_decay,
            "betas": (self.adam_beta1, self.adam_beta2),
            "eps": self.adam_epsilon,
        }


def fast_bf16(use_cpu: bool) -> bool:
    """Whether matrix products in bfloat16 are faster than in float32 on this device.

    A CPU without AMX or AVX512-BF16 emulates them: 0.9 against 110 GFLOP/s, measured on two cores of an AMD EPYC with AVX2.
    """
    if use_cpu:
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16") or capabilities.get("bf16"))
    return torch.accelerator.current_accelerator().type == "cuda" and torch.cuda.is_bf16_supported(
        including_emulation=False
    )


@dataclass
class MaskingArguments:
    """How tokens become targets (Devlin et al. 2018); names as in `DataCollatorForLanguageModeling`."""

    mlm_probability: float = field(default=0.3, metadata={"help": "share of the tokens that are targets in training"})
    mask_replace_prob: float = field(default=0.8, metadata={"help": "share of the targets that become the mask token"})
    random_replace_prob: float = field(
        default=0.1, metadata={"help": "share of the targets that become a random token"}
    )
    whole_word_mask: bool = field(default=False, metadata={"help": "mask whole words"})


class _Parser(TrlParser):
    def error(self, message):  # argparse prints its whole usage otherwise
        raise UserError(f"{message}; see --help")


def parse(*classes: type, args: list[str] | None = None) -> tuple:
    """Read `--config FILE.yaml` and the command line, which wins, into one instance of each dataclass.

    Raises:
        UserError: for a missing or broken file, an unknown key (with the nearest valid name), a value of the wrong type.
    """
    args = list(sys.argv[1:] if args is None else args)
    parser = _Parser(list(classes), allow_abbrev=False)
    known = {name: member for cls in classes for name, member in cls.__dataclass_fields__.items() if member.init}
    path = args[args.index("--config") + 1] if "--config" in args[:-1] else None
    for key, value in (_read_yaml(path) if path else {}).items():
        if key != "env" and key not in known:
            raise UserError(f"{path}: unknown key {key!r}; did you mean {_nearest(key, known)!r}?")
        if isinstance(value, dict | list) and known.get(key) and known[key].type in (int, float, bool):
            raise UserError(f"{path}: {key} takes one value, not {value!r}")
    try:
        return parser.parse_args_and_config(args)
    except UserError as error:
        raise UserError(f"{path}: {error}" if path else str(error)) from error
    except ValueError as error:
        message = str(error).strip().splitlines()[0]
        if unknown := [
            arg[2:] for arg in args if arg.startswith("--") and arg[2:].split("=")[0] not in {*known, "config"}
        ]:
            message = f"unknown option --{unknown[0]}; did you mean --{_nearest(unknown[0], known)}?"
        raise UserError(message) from error


def _read_yaml(path: str) -> dict:
    try:
        with open(path, encoding="utf-8") as handle:
            config = yaml.safe_load(handle)
    except OSError as error:
        raise UserError(f"cannot read --config {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} holds no keys; see recipes/configs/ for examples")
    return config


def _nearest(key: str, known) -> str:
    return get_close_matches(key, known, 1, 0)[0]


def resolved(*arguments) -> dict:
    """Every key of the dataclasses with its value that is not the default, for lineage and the card."""
    values = {}
    for instance in arguments:
        for member in fields(instance):
            value = getattr(instance, member.name)
            if member.init and value != member.default and isinstance(value, str | int | float | bool | list | dict):
                values[member.name] = getattr(value, "value", value)
    return values


# What may change between the start of a run and its resumption: where things go and how often, and how a batch is divided.
FREE = {
    "output_dir", "logging_steps", "logging_first_step", "eval_steps", "eval_strategy", "eval_on_start", "save_steps",
    "save_strategy", "save_total_limit", "report_to", "run_name", "project", "per_device_train_batch_size",
    "per_device_eval_batch_size", "gradient_accumulation_steps", "dataloader_num_workers", "dataloader_persistent_workers",
    "dataloader_prefetch_factor", "deepspeed", "disable_tqdm", "push_to_hub", "hub_model_id", "hub_private_repo",
    "hub_token", "hub_strategy", "compile", "use_cpu", "max_loss_rise", "activation_checkpointing", "gradient_checkpointing",
}  # fmt: skip


def run_identity(manifest: dict, *arguments, **more) -> dict:
    """What makes two runs the same run: text, model, objective, budget, optimizer, seed."""
    return {k: v for k, v in resolved(*arguments).items() if k not in FREE} | {"text": manifest["fingerprint"], **more}
