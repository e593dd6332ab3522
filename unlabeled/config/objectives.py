"""Arguments of the pretraining objectives: infilling, masking and span corruption."""

from dataclasses import dataclass, field, fields
from typing import Any

from unlabeled.config.yaml_values import parse_yaml
from unlabeled.errors import UserError
from unlabeled.planning.spans import Denoiser


@dataclass
class FIMArguments:
    """Fill-in-the-middle for causal models (Bavarian et al. 2022)."""

    fim_rate: float = field(
        default=0.0, metadata={"help": "fraction of the training documents to rearrange for infilling"}
    )

    def __post_init__(self) -> None:
        if not 0 <= self.fim_rate <= 1:
            raise UserError(f"fim_rate is {self.fim_rate}; set it to a share between 0 and 1")


@dataclass
class MaskingArguments:
    """Masked language modeling (Devlin et al. 2018); names as in `DataCollatorForLanguageModeling`."""

    mlm_probability: float = field(default=0.3, metadata={"help": "fraction of the tokens to predict in training"})
    mask_replace_prob: float = field(
        default=0.8, metadata={"help": "fraction of the targets that the mask token replaces"}
    )
    random_replace_prob: float = field(
        default=0.1, metadata={"help": "fraction of the targets that a random token replaces"}
    )
    whole_word_mask: bool = field(default=False, metadata={"help": "mask whole words"})


@dataclass
class SpanArguments:
    """Span corruption (Raffel et al. 2019), or a mixture of denoisers (UL2; Tay et al. 2022)."""

    noise_density: float = field(default=0.15, metadata={"help": "fraction of the tokens that are targets"})
    mean_noise_span_length: float = field(default=3.0, metadata={"help": "mean length of a corrupted span, in tokens"})
    denoisers: list[Any] | None = field(
        default=None, metadata={"help": "mixture of denoisers instead: a list of mappings, each with a mode token"}
    )

    def __post_init__(self) -> None:
        denoisers = self.denoisers
        if isinstance(denoisers, str):
            denoisers = parse_yaml("denoisers", denoisers)
        if not denoisers:
            denoisers = [
                {"noise_density": self.noise_density, "mean_noise_span_length": self.mean_noise_span_length},
            ]
        names = [member.name for member in fields(Denoiser)]
        for settings in denoisers:
            if not isinstance(settings, dict) or not settings.keys() <= set(names):
                raise UserError(f"denoisers: {settings!r} is no mapping of {', '.join(names)}; correct it")
        self.mixture = tuple(Denoiser(**settings) for settings in denoisers)
