"""Arguments that choose the model and its adapter."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from unlabeled.config.yaml_values import parse_yaml
from unlabeled.errors import UserError
from unlabeled.runtime.safe_loading import check_attention


@dataclass
class ModelArguments:
    """The model to pretrain: from scratch (`model_type`) or continued (`model_name_or_path`)."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "folder or Hub name to continue"})
    model_type: str | None = field(default=None, metadata={"help": "architecture, from scratch: llama, bert, ..."})
    config_overrides: dict | str | None = field(
        default=None, metadata={"help": "sizes of the model from scratch, as in its config: '{\"hidden_size\": 192}'"}
    )
    tokenizer_name_or_path: str | None = field(
        default=None, metadata={"help": "tokenizer; by default that of model_name_or_path"}
    )
    attn_implementation: str = field(default="sdpa", metadata={"help": "sdpa, varlen (on a GPU) or flash_attention_2"})

    def __post_init__(self) -> None:
        if isinstance(self.config_overrides, str):
            self.config_overrides = parse_yaml("config_overrides", self.config_overrides)
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
    """The model to fine-tune, and its PEFT adapter."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "the model or adapter to start from"})
    attn_implementation: str = field(default="sdpa", metadata={"help": "sdpa, varlen (on a GPU) or flash_attention_2"})
    adapter: str = field(default="none", metadata={"help": "none (full fine-tuning), lora, rslora, dora or qlora"})
    lora_r: int = field(default=16, metadata={"help": "rank of the adapter"})
    lora_alpha: int = field(
        default=32, metadata={"help": "scaling of the adapter: lora_alpha / lora_r, for rslora / sqrt(lora_r)"}
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout before the adapter"})
    lora_target_modules: str = field(default="all-linear", metadata={"help": "all-linear, or names: q_proj,v_proj"})

    ADAPTERS: ClassVar[tuple[str, ...]] = ("none", "lora", "rslora", "dora", "qlora")

    def __post_init__(self) -> None:
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
    """The model to fine-tune on conversations, its PEFT adapter and its chat template."""

    chat_template: str | None = field(
        default=None, metadata={"help": "a .jinja file; by default the chat template of the model"}
    )
