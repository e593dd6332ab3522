"""What a plan starts from: a budget, a size, a text or a YAML file, and the hardware."""

from dataclasses import dataclass

from unlabeled.errors import UserError

BUDGETS = ("flops", "hours", "price")
STARTING_POINTS = (*BUDGETS, "parameters", "tokens", "data", "config")
POSITIVE = (
    *BUDGETS,
    "parameters",
    "tokens",
    "gpus",
    "mfu",
    "usd_per_gpu_hour",
    "vocab_size",
    "max_length",
    "tokens_per_parameter",
    "labels",
)


@dataclass(frozen=True)
class PlanOptions:
    """The options of `scripts/plan.py`. At least one of the starting points has to be given.

    Attributes:
        flops: Starting point: a compute budget.
        hours: Starting point: hours on `gpus` devices.
        price: Starting point: a price at `usd_per_gpu_hour`.
        parameters: Starting point: the size of the model, embeddings included.
        tokens: Starting point: the tokens to train on. With `config`, the tokens that a recipe without a budget in
            tokens has counted.
        data: Starting point: a file, folder or glob of text.
        config: Starting point: the YAML file of a recipe.
        recipe: The recipe of `config`, if the name of the file does not begin with it.
        tokenizer: The folder of a tokenizer.
        vocab_size: The size of the vocabulary. It defaults to that of `tokenizer`.
        max_length: Tokens in a row.
        labels: Classes or tags of a `config` of a classification recipe.
        law: A name in `scaling_laws.LAWS`, or a JSON file with the constants of a law.
        fit: Folders of finished runs to fit the law to.
        tokens_per_parameter: A fixed ratio instead of the optimum of the law.
        device: The name of a device, or "cpu".
        gpus: The number of devices.
        mfu: The model FLOPs utilization to assume.
        measured: The folder of a finished run. The plan uses its device and speed.
        usd_per_gpu_hour: The price of a device.
        precision: bf16 or fp32.
    """

    flops: float | None = None
    hours: float | None = None
    price: float | None = None
    parameters: float | None = None
    tokens: float | None = None
    data: str | None = None
    config: str | None = None
    recipe: str | None = None
    tokenizer: str | None = None
    vocab_size: int | None = None
    max_length: int | None = None
    labels: int = 2
    law: str = "besiroglu"
    fit: list[str] | None = None
    tokens_per_parameter: float | None = None
    device: str | None = None
    gpus: int = 1
    mfu: float = 0.4
    measured: str | None = None
    usd_per_gpu_hour: float | None = None
    precision: str = "bf16"

    def __post_init__(self) -> None:
        """Raise `UserError` for options that contradict each other and for sizes that are not positive."""
        self._check_starting_points()
        for name in POSITIVE:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"--{name} is {value:g}; it must be above 0")
        self._check_hardware()

    def _check_starting_points(self) -> None:
        budgets = [f"--{name}" for name in BUDGETS if getattr(self, name) is not None]
        if len(budgets) > 1:
            raise UserError(f"{' and '.join(budgets)} are two budgets; give one of them")
        given = [name for name in STARTING_POINTS if getattr(self, name) is not None]
        if not given:
            raise UserError("name where to start from: one of " + ", ".join(f"--{name}" for name in STARTING_POINTS))
        conflicting = [name for name in given if name not in ("config", "data", "tokens")]
        if self.config and conflicting:
            raise UserError(
                f"--config has a size and a budget of its own; leave out --{conflicting[0]}, or change the YAML"
            )
        if budgets and self.parameters and self.tokens:
            raise UserError(f"--parameters and --tokens already make a budget; leave out {budgets[0]} or one of them")

    def _check_hardware(self) -> None:
        if self.mfu > 1:
            raise UserError(f"--mfu {self.mfu:g} is more than the peak of the device; give a share, such as 0.4")
        if self.price and not self.usd_per_gpu_hour:
            raise UserError("--price buys hours at --usd_per_gpu_hour; give it too")
        if (self.hours or self.price) and not (self.device or self.measured):
            raise UserError("hours are FLOPs on some device; add --device, or --measured with a run of your own")
        if (self.hours or self.price) and str(self.device).lower() == "cpu":
            raise UserError("the table of peaks has no CPU; give --measured with a run of your own, not --device cpu")
        if self.device and self.measured:
            raise UserError("--measured says which device it was; leave out --device")
