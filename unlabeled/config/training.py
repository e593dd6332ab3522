"""Training arguments that have a budget in tokens: steps, accumulation, warm-up and decay follow from it."""

import math
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.distributed as dist
from transformers import SchedulerType, TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.utils import is_liger_kernel_available

from unlabeled.config import refused_keys
from unlabeled.config.precision import has_fast_bf16, limit_cpu_kernel_caches
from unlabeled.errors import UserError
from unlabeled.planning import Budget, plan_steps
from unlabeled.runtime.files import read_json
from unlabeled.runtime.processes import (
    share_failure,
    start_answering,
    start_waiting_group,
    stop_answering,
    wait_for_all,
)

OPTIMIZERS = ("adamw", "muon")
PRECISIONS = ("auto", "bf16", "fp32")
COMPILE_MODES = ("auto", "true", "false")
METRIC_SCHEDULES = ("reduce_lr_on_plateau", "greedy")  # they follow evaluations, so no plan can be made of them
# [minimum, limit) of the keys that torch would refuse late and in other words, or not at all.
RANGES = {
    "learning_rate": (0, math.inf),
    "weight_decay": (0, math.inf),
    "adam_epsilon": (0, math.inf),
    "adam_beta1": (0, 1),
    "adam_beta2": (0, 1),
    "decay_fraction": (0, 1),
    "loss_spike_threshold": (0, math.inf),
    "grad_norm_skip_ratio": (0, math.inf),
    "max_hours": (0, math.inf),
    "ddp_timeout": (1, math.inf),
    "per_device_eval_batch_size": (1, math.inf),
    "dataloader_num_workers": (0, math.inf),
    "save_total_limit": (1, math.inf),
    "seed": (0, 2**32),
}
LAUNCH_REMEDY = "launch with torchrun, or with an accelerate file from ds_configs/"


def default_of(cls: type, name: str) -> Any:
    """Return the default of a field of a dataclass."""
    (member,) = [member for member in fields(cls) if member.name == name]
    return member.default if member.default_factory is MISSING else member.default_factory()


if TYPE_CHECKING:  # a mixin, which stands before a subclass of TrainingArguments in the bases of a class
    from transformers import TrainingArguments as _MixinBase
else:
    _MixinBase = object


@dataclass
class BudgetArguments(_MixinBase):
    """Mixin for `TrainingArguments` and the configuration classes of TRL: a budget, and what follows from it.

    It goes before the class that it extends. After initialization, `processes` is the number of processes, `budget` the
    resolved `Budget`, and `max_steps`, `gradient_accumulation_steps`, `precision` and `bf16` are set.

    Class attributes:
        refused: The keys that have to keep their default, and the reason or the remedy.
        unit: What the budget counts. The keys of the budget are `train_{unit}` and `batch_{unit}`.
    """

    train_tokens: int | None = field(default=None, metadata={"help": "tokens to train on, a multiple of batch_tokens"})
    batch_tokens: int | None = field(default=None, metadata={"help": "tokens in a step over all processes"})
    max_length: int = field(default=512, metadata={"help": "tokens in a row"})
    optimizer: str = field(default="adamw", metadata={"help": "adamw, or muon for the hidden matrices"})
    decay_fraction: float = field(
        default=0.2, metadata={"help": "fraction of the steps in which warmup_stable_decay decays"}
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
        default=20.0, metadata={"help": "skip steps whose gradient norm is this many times the median (0: none)"}
    )
    max_hours: float | None = field(
        default=None, metadata={"help": "save and stop after this many hours; the same command continues"}
    )

    # Exactness rests on these, see docs/support_matrix.md. Other values are refused rather than silently wrong.
    remove_unused_columns: bool = field(default=False, metadata={"help": "stays false: collators need every column"})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "stays false: a NaN must show"})
    train_sampling_strategy: str = field(default="sequential", metadata={"help": "stays sequential: rows are in order"})
    # Defaults of pretraining, where those of the library are for fine-tuning.
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "true for a model that leaves parameters out of its loss; costs time"}
    )
    lr_scheduler_type: SchedulerType | str = field(default="cosine", metadata={"help": "or warmup_stable_decay, ..."})
    warmup_steps: float = field(default=0.01, metadata={"help": "warm-up steps; below 1, a fraction of all steps"})
    adam_beta2: float = field(default=0.95, metadata={"help": "AdamW's second beta"})
    weight_decay: float = field(
        default=0.1, metadata={"help": "decay of matrices; not of embeddings, norms and biases"}
    )

    refused: ClassVar[Mapping[str, str]] = refused_keys.TRAINER_KEYS
    unit: ClassVar[str] = "tokens"

    def __post_init__(self) -> None:
        self._check_budget_keys()
        self._check_refused_keys()
        self._check_strategies()
        self._check_ranges()
        self._check_deepspeed_file()
        self.compile = str(self.compile).lower()
        self._check_choice("precision", PRECISIONS)
        self._check_choice("compile", COMPILE_MODES)
        self._check_optimizer()

        # TrainingArguments fills in DeepSpeed's "auto" values, so these have to be set before.
        self._set_processes()
        self._set_budget()
        self._set_device_and_precision()
        self._set_decay_steps()
        self._start_process_group_on_cpu()
        super().__post_init__()

        self._check_visible_gpus()
        if self.deepspeed_plugin:
            self._prepare_deepspeed()
        if self.world_size != self.processes:
            raise UserError(
                f"{self.processes} processes were launched but {self.world_size} train together; {LAUNCH_REMEDY}"
            )
        start_waiting_group(self.ddp_timeout)
        self._check_schedule_length()
        self._check_installed_packages()

    def plan_budget(self) -> Budget:
        """Resolve the budget into steps and gradient accumulation."""
        return plan_steps(
            getattr(self, f"train_{self.unit}"),
            getattr(self, f"batch_{self.unit}"),
            self.max_length if self.unit == "tokens" else 1,
            self.per_device_train_batch_size,
            self.processes,
            unit=self.unit,
        )

    def check_epochs(self, train_counts: dict) -> None:
        """Refuse strategies by epochs where these have no known length: for streams, and pairs with hard negatives.

        Args:
            train_counts: The counts of the training text in the manifest.

        Raises:
            UserError: `eval_strategy`, `save_strategy` or `logging_strategy` is `epoch`.
        """
        if not (train_counts.get("estimated") or train_counts.get("uneven_epochs")):
            return
        for name in ("eval_strategy", "save_strategy", "logging_strategy"):
            if getattr(self, name) == "epoch":
                raise UserError(
                    f"{name}: epoch needs epochs of a known length, which neither streams nor pairs with hard "
                    "negatives have; set it to steps"
                )

    @contextmanager
    def main_process_first(self, local: bool = True, desc: str = "work") -> Iterator[bool]:
        """As in `TrainingArguments`, but without a timeout: the other processes wait as long as the first one works.

        Where the first process fails with a `UserError`, the others raise the same error instead of running the block.

        Args:
            local: Whether the first process of each machine goes first, or only the first of all.
            desc: Not used; the signature is that of `TrainingArguments`.

        Yields:
            Whether this process is the one that goes first.
        """
        is_first = (self.local_process_index if local else self.process_index) == 0
        if is_first:
            start_answering()
            try:
                yield True
            except (KeyboardInterrupt, SystemExit):  # the others do not wait for a process that ends
                stop_answering()
                raise
            except Exception as error:
                wait_for_all()
                share_failure(str(error) if isinstance(error, UserError) else None)
                raise
        wait_for_all()
        failure = share_failure(None)  # of the first process of any machine
        if failure is not None:
            raise UserError(failure)
        if not is_first:
            yield False

    @property
    def rows_per_step(self) -> int:
        """Rows in an optimizer step, over all processes."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.processes

    @property
    def optimizer_kwargs(self) -> dict[str, Any]:
        """Keyword arguments for `unlabeled.models.optimizers.OptimizerFactory`."""
        return {
            "optimizer": self.optimizer,
            "lr": self.learning_rate,
            "weight_decay": self.weight_decay,
            "betas": (self.adam_beta1, self.adam_beta2),
            "eps": self.adam_epsilon,
        }

    # --- Checks before TrainingArguments is initialized ---------------------------------------------------------------

    def _check_budget_keys(self) -> None:
        for name in (f"train_{self.unit}", f"batch_{self.unit}"):
            if getattr(self, name) is None:
                raise UserError(f"set {name}: budgets are in {self.unit}")

    def _check_refused_keys(self) -> None:
        if self.include_num_input_tokens_seen is False:  # the command line reads the default, "no", as false
            self.include_num_input_tokens_seen = "no"
        for name, reason in self.refused.items():
            if getattr(self, name) != default_of(type(self), name):
                raise UserError(f"remove {name}: {reason}")
        if os.environ.get("ACCELERATE_USE_FSDP") == "true":
            raise UserError(f"the launcher asks for FSDP, which is not supported; {LAUNCH_REMEDY}")

    def _check_strategies(self) -> None:
        if self.save_strategy == "best":
            raise UserError("save_strategy: best would not save on a signal; set it to steps or epoch")
        if self.lr_scheduler_type in METRIC_SCHEDULES:
            names = ", ".join(kind.value for kind in SchedulerType if kind.value not in METRIC_SCHEDULES)
            raise UserError(f"lr_scheduler_type {self.lr_scheduler_type} follows evaluations; choose one of {names}")
        if self.lr_scheduler_type == "constant":
            self.warmup_steps = 0  # only constant_with_warmup has a warm-up

    def _check_ranges(self) -> None:
        for name, (minimum, limit) in RANGES.items():
            value = getattr(self, name)
            if value is not None and not minimum <= value < limit:
                below = "" if limit == math.inf else f" and below {limit}"
                raise UserError(f"{name} is {value}; set it to at least {minimum}{below}")

    def _check_deepspeed_file(self) -> None:
        if not (isinstance(self.deepspeed, str) and self.deepspeed.endswith(".json")):
            return
        try:
            read_json(self.deepspeed)
        except (OSError, ValueError) as error:
            raise UserError(f"deepspeed: cannot read {self.deepspeed} ({error}); ds_configs/ has some") from error

    def _check_choice(self, name: str, choices: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if value not in choices:
            raise UserError(f"{name}: {value!r} is none of {', '.join(choices)}")

    def _check_optimizer(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise UserError(f"optimizer {self.optimizer!r} is unknown; set it to {' or '.join(OPTIMIZERS)}")
        is_sharded = bool(self.deepspeed) or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
        if self.optimizer == "muon" and is_sharded:
            raise UserError(
                "optimizer muon needs whole matrices and DeepSpeed ZeRO shards them; set optimizer to adamw, or use DDP"
            )

    # --- Values that follow from the keys -----------------------------------------------------------------------------

    def _set_processes(self) -> None:
        self.processes = int(os.environ.get("WORLD_SIZE", "1"))
        if self.processes > 1 and "MASTER_ADDR" not in os.environ:
            raise UserError(f"WORLD_SIZE is {self.processes} but MASTER_ADDR is not set; {LAUNCH_REMEDY}")

    def _set_budget(self) -> None:
        self.budget = self.plan_budget()
        self.max_steps = self.budget.steps
        self.gradient_accumulation_steps = self.budget.gradient_accumulation_steps

    def _set_device_and_precision(self) -> None:
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        if self.use_cpu:
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed warns when it has to find out
        if self.precision == "auto":
            self.precision = "bf16" if has_fast_bf16(self.use_cpu) else "fp32"
        self.bf16 = self.precision == "bf16"
        if self.bf16 and self.use_cpu:
            limit_cpu_kernel_caches()

    def _set_decay_steps(self) -> None:
        if self.lr_scheduler_type == "warmup_stable_decay":
            decay_steps = max(1, round(self.decay_fraction * self.max_steps))
            self.lr_scheduler_kwargs = {"num_decay_steps": decay_steps, **(self.lr_scheduler_kwargs or {})}

    def _start_process_group_on_cpu(self) -> None:
        """Start the process group where TrainingArguments would ignore `ddp_timeout`: on a CPU."""
        if self.use_cpu and self.processes > 1 and not dist.is_initialized():
            dist.init_process_group(self.ddp_backend or "gloo", timeout=timedelta(seconds=self.ddp_timeout))

    # --- Checks after TrainingArguments is initialized ----------------------------------------------------------------

    def _check_visible_gpus(self) -> None:
        if self.n_gpu > 1:
            raise UserError(f"one process sees {self.n_gpu} GPUs; {LAUNCH_REMEDY}, or set CUDA_VISIBLE_DEVICES to one")

    def _prepare_deepspeed(self) -> None:
        import deepspeed

        for section, key in (("optimizer", "optimizer"), ("scheduler", "lr_scheduler_type")):
            if section in self.deepspeed_plugin.deepspeed_config:
                raise UserError(f"deepspeed: remove {section} from its file; the key {key} decides")
        # On a CPU only the process group of torch has been started, with which ZeRO-3 would not shard anything.
        deepspeed.init_distributed()
        # DeepSpeed calls collectives by names that torch deprecates. A warning for each call buries the progress bar.
        warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)

    def _check_schedule_length(self) -> None:
        decay_steps = (self.lr_scheduler_kwargs or {}).get("num_decay_steps", 0)
        if self.get_warmup_steps(self.max_steps) + decay_steps > self.max_steps:
            raise UserError(f"warmup_steps and decay_fraction take more than {self.max_steps} steps; lower one of them")

    def _check_installed_packages(self) -> None:
        available = get_available_reporting_integrations()
        missing = sorted(set(self.report_to) - set(available))
        if missing:
            raise UserError(f"report_to: {missing[0]} is not installed; choose from none, {', '.join(available)}")
        if self.use_liger_kernel and not is_liger_kernel_available():
            raise UserError("use_liger_kernel: liger-kernel is not installed; install it, or remove the key")


@dataclass
class PretrainingArguments(BudgetArguments, TrainingArguments):
    """`TrainingArguments` with a budget in tokens."""
