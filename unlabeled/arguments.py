"""The keys of a YAML: dataclasses behind `TrlParser`, and the run that follows from a budget in tokens."""

import json
import math
import os
import re
import sys
import warnings
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path

import torch
import yaml
from transformers import SchedulerType, TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.utils import is_liger_kernel_available
from trl import TrlParser

from unlabeled.budget import plan_steps
from unlabeled.errors import UserError
from unlabeled.optim import check_optimizer, fast_bf16


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
            self.config_overrides = _from_text("config_overrides", self.config_overrides)
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
    eval_fraction: float = field(default=0.0, metadata={"help": "share of the documents to hold out instead"})
    text_column: str = field(default="text", metadata={"help": "column that holds the text"})
    max_tokens: int | None = field(default=None, metadata={"help": "prepare at most so many training tokens"})
    prepared_dir: str = field(default="data/prepared", metadata={"help": "cache of tokenised and packed text"})
    isolate_documents: bool = field(default=True, metadata={"help": "documents in one row do not see each other"})

    def __post_init__(self):
        for name in ("train_data", "eval_data"):
            value = getattr(self, name)
            if isinstance(value, str) and value[:1] in ("[", "{"):
                setattr(self, name, _from_text(name, value))
        if not self.train_data:
            raise UserError("set train_data to text: a file, a folder, a glob or the name of a data set on the Hub")
        if bool(self.eval_data) == bool(self.eval_fraction) or not 0 <= self.eval_fraction < 1:
            raise UserError("set either eval_data or an eval_fraction between 0 and 1, so that some text is held out")


# Keys of TrainingArguments that keep their default, and why.
REFUSED = {
    "max_steps": "it follows from train_tokens and batch_tokens", "num_train_epochs": "it follows from train_tokens",
    "gradient_accumulation_steps": "it follows from batch_tokens", "torch_compile": "set compile instead",
    "bf16": "set precision instead", "fp16": "set precision instead", "optim": "set optimizer instead",
    "data_seed": "set seed instead", "label_smoothing_factor": "the loss is plain cross entropy",
    "resume_from_checkpoint": "the same command again resumes from the newest complete checkpoint",
    "ignore_data_skip": "a resumed run has to see the text that an uninterrupted one would",
    "load_best_model_at_end": "it is not supported", "auto_find_batch_size": "it is not supported",
    "remove_unused_columns": "collators need every column", "logging_nan_inf_filter": "a NaN must show",
    "train_sampling_strategy": "the order of the rows is part of the run",
}  # fmt: skip
LAUNCH = "launch with torchrun, or with an accelerate file from ds_configs/"
# At least, and below: what torch would refuse late and in other words, or not at all.
LIMITS = {
    "learning_rate": (0, math.inf), "weight_decay": (0, math.inf), "adam_epsilon": (0, math.inf),
    "adam_beta1": (0, 1), "adam_beta2": (0, 1), "decay_fraction": (0, 1), "max_loss_rise": (0, math.inf),
    "per_device_eval_batch_size": (1, math.inf), "dataloader_num_workers": (0, math.inf),
    "save_total_limit": (1, math.inf), "seed": (0, 2**32),
}  # fmt: skip


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
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "true for a model that leaves parameters out of its loss; costs time"}
    )
    lr_scheduler_type: SchedulerType | str = field(
        default="cosine", metadata={"help": "cosine, warmup_stable_decay, ..."}
    )
    warmup_steps: float = field(default=0.01, metadata={"help": "below 1: share of the steps"})
    adam_beta2: float = field(default=0.95, metadata={"help": "AdamW's second beta"})
    weight_decay: float = field(
        default=0.1, metadata={"help": "of matrices; embeddings, norms and biases are not decayed"}
    )

    def __post_init__(self):
        for name in ("train_tokens", "batch_tokens"):
            if getattr(self, name) is None:
                raise UserError(f"set {name}: budgets are in tokens")
        for name, reason in REFUSED.items():
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise UserError(f"remove {name}: {reason}")
        for name, (low, high) in LIMITS.items():
            if (value := getattr(self, name)) is not None and not low <= value < high:
                below = "" if high == math.inf else f" and below {high}"
                raise UserError(f"{name} is {value}; set it to at least {low}{below}")
        if isinstance(self.deepspeed, str) and self.deepspeed.endswith(".json"):
            try:
                json.loads(Path(self.deepspeed).read_text(encoding="utf-8"))
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
        self.budget = plan_steps(
            self.train_tokens, self.batch_tokens, self.max_length, self.per_device_train_batch_size, self.processes
        )
        # Before TrainingArguments reads them: DeepSpeed's "auto" values are filled in there.
        self.max_steps = self.budget.steps
        self.gradient_accumulation_steps = self.budget.gradient_accumulation_steps
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        if self.use_cpu:
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed warns when it has to find out
        if self.precision == "auto":
            self.precision = "bf16" if fast_bf16(self.use_cpu) else "fp32"
        self.bf16 = self.precision == "bf16"
        if self.lr_scheduler_type == "warmup_stable_decay":
            decay = max(1, round(self.decay_fraction * self.max_steps))
            self.lr_scheduler_kwargs = {"num_decay_steps": decay, **(self.lr_scheduler_kwargs or {})}
        super().__post_init__()
        if self.deepspeed_plugin:
            import deepspeed

            deepspeed.init_distributed()  # on a CPU only torch's process group has started, and ZeRO-3 cuts no shards
            # DeepSpeed calls collectives by names that torch deprecates: a warning for each call buries the progress.
            warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
        if self.world_size != self.processes:
            raise UserError(f"{self.processes} processes were launched but {self.world_size} train together; {LAUNCH}")
        decay = (self.lr_scheduler_kwargs or {}).get("num_decay_steps", 0)
        if self.get_warmup_steps(self.max_steps) + decay > self.max_steps:
            raise UserError(f"warmup_steps and decay_fraction take more than {self.max_steps} steps; lower one of them")
        available = get_available_reporting_integrations()
        if missing := sorted(set(self.report_to) - set(available)):
            raise UserError(f"report_to: {missing[0]} is not installed; choose from none, {', '.join(available)}")
        if self.use_liger_kernel and not is_liger_kernel_available():
            raise UserError("use_liger_kernel: liger-kernel is not installed; install it, or remove the key")

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


@dataclass
class MaskingArguments:
    """How tokens become targets (Devlin et al. 2018); names as in `DataCollatorForLanguageModeling`."""

    mlm_probability: float = field(default=0.3, metadata={"help": "share of the tokens that are targets in training"})
    mask_replace_prob: float = field(default=0.8, metadata={"help": "share of the targets that become the mask token"})
    random_replace_prob: float = field(default=0.1, metadata={"help": "share of them that becomes a random token"})
    whole_word_mask: bool = field(default=False, metadata={"help": "mask whole words"})


class _Parser(TrlParser):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.kinds = {f.name: f.type for cls in self.dataclass_types for f in fields(cls) if f.init}
        for action in self._actions:
            if self.kinds.get(action.dest) is int:
                action.type = _with_exponent(action.type)
        self.unset: set[str] = set()

    def error(self, message):  # argparse prints its whole usage otherwise
        raise UserError(re.sub(r"^argument --(\w+)\S*:", r"\1:", message) + "; see --help")

    def set_defaults_with_config(self, **config):
        """Values of a YAML, which argparse converts and checks only where they are strings."""
        actions = {action.dest: action for action in reversed(self._actions)}  # reversed: --no_KEY comes after --KEY
        checked = {key: _checked(key, value, self.kinds[key], actions[key]) for key, value in config.items()}
        checked = {key: value for key, value in checked.items() if key not in self.unset}
        return super().set_defaults_with_config(**checked)


def _with_exponent(parse_int):
    """`parse_int`, which also takes 1e9."""

    def parse_whole(text: str) -> int | None:
        exponent = re.fullmatch(r"[\d.]+[eE]\+?\d+", text) and float(text).is_integer()
        return parse_int(f"{float(text):.0f}" if exponent else text)

    parse_whole.__name__ = "int"  # argparse complains of an "invalid int value"
    return parse_whole


def _checked(key: str, value, kind: type, action):
    """A value of a YAML as what its key takes, or a UserError; strings are left to argparse."""
    if value is None and action.default is not None:
        raise UserError(f"{key} has no value; give it one, or remove the key")
    if value is False and "no" in (action.choices or ()):
        value = "no"  # which YAML takes for false
    if value is not None and action.choices and value not in action.choices:
        raise UserError(f"{key}: {value!r} is none of {', '.join(map(str, action.choices))}")
    if value is None or isinstance(value, str):
        return value
    number = isinstance(value, int | float) and not isinstance(value, bool)
    takes = {int: "a whole number", float: "a number", bool: "true or false"}.get(kind)
    fits = {int: number and float(value).is_integer(), float: number, bool: isinstance(value, bool)} if takes else {}
    if takes and not fits[kind]:
        raise UserError(f"{key} takes {takes}, not {value!r}")
    return kind(value) if number and kind in (int, str) else value


def parse(*classes: type, args: list[str] | None = None) -> tuple:
    """Read `--config FILE.yaml` and the command line, which wins, into an instance of each class, or a UserError."""
    args = [word for arg in (sys.argv[1:] if args is None else args)
            for word in (arg.split("=", 1) if arg.startswith("--config=") else [arg])]  # fmt: skip
    parser = _Parser(list(classes), allow_abbrev=False)
    known = {name: member for cls in classes for name, member in cls.__dataclass_fields__.items() if member.init}
    options = {option for action in parser._actions for option in action.option_strings} | {"--config"}
    if args and not args[0].startswith("-"):
        raise UserError(f"unexpected {args[0]!r}; a YAML file goes after --config")
    for arg in args:
        if arg.startswith("--") and arg.split("=")[0] not in options:
            raise UserError(f"unknown option {arg}; did you mean --{_nearest(arg[2:].split('=')[0], known)}?")
    if args[-1:] == ["--config"]:
        raise UserError("--config needs the path of a YAML file; recipes/configs/ has some")
    path = args[args.index("--config") + 1] if "--config" in args else None
    for i in reversed(range(len(args) - 1)):  # `--KEY null` takes back what the YAML says
        if args[i + 1] == "null" and (member := known.get(args[i][2:])) and member.default is None:
            parser.unset.add(member.name)
            del args[i : i + 2]
    for key in _read_yaml(path) if path else ():
        if key != "env" and key not in known:
            raise UserError(f"{path}: unknown key {key!r}; did you mean {_nearest(str(key), known)!r}?")
    try:
        return parser.parse_args_and_config(args)
    except (UserError, ValueError) as error:  # transformers raises ValueError, over several lines
        message = str(error) if isinstance(error, UserError) else str(error).strip().splitlines()[0]
        raise UserError(f"{path}: {message}" if path else message) from error


def _read_yaml(path: str) -> dict:
    try:
        with open(path, encoding="utf-8") as handle:
            config = _from_text(path, handle.read())
    except OSError as error:
        raise UserError(f"cannot read --config {path}: {error.strerror}; recipes/configs/ has examples") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}); convert it, for example with iconv") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} holds no keys; see recipes/configs/ for examples")
    return config


def _from_text(where: str, text: str):
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{where} is not valid YAML; correct it: {' '.join(str(error).split())}") from error


def _nearest(key: str, known) -> str:
    return get_close_matches(key, known, 1, 0)[0]
