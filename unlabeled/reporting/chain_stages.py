"""What the stages of a chain have left in their folders, for the report. Missing or damaged files are left out."""

import itertools
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unlabeled.errors import UserError
from unlabeled.reporting.lineage import weights_sha256
from unlabeled.reporting.metrics import finite_number
from unlabeled.reporting.stages import STAGE_KINDS
from unlabeled.runtime.files import read_json

WITHOUT_MODEL = ("tokenizer", "prepare", "evaluate", "push")  # their folders may be those of other stages
WITHOUT_TRAINING = (*WITHOUT_MODEL, "merge")
COLORS = 8  # of stages in the template


@dataclass
class ReportStage:
    """A stage of a chain and the files that it left; whatever is missing is empty.

    Attributes:
        seconds: the wall-clock time of the whole stage; None if chain.json does not have it.
        first_token: the tokens that earlier stages were trained on.
        color: a number from 0 to `COLORS` - 1.
        weights: the sha256 of each weight file.
        samples: the model's output for each prompt of the chain.
    """

    name: str
    kind: str
    folder: Path | None
    seconds: float | None
    metrics: dict[str, Any]
    lineage: dict[str, Any]
    history: list[dict]
    first_token: float = 0.0
    color: int = 0
    weights: dict[str, str] = field(default_factory=dict)
    samples: list[str] = field(default_factory=list)

    @property
    def description(self) -> str:
        return STAGE_KINDS[self.kind].description if self.kind in STAGE_KINDS else self.kind

    @property
    def is_trained(self) -> bool:
        return self.kind not in WITHOUT_TRAINING

    @property
    def tokens(self) -> float | None:
        if not self.is_trained:
            return None
        tokens = number(self.metrics, "train_tokens")
        if tokens is not None:
            return tokens
        return max((entry["tokens"] for entry in self.history if number(entry, "tokens") is not None), default=None)

    @property
    def flops(self) -> float | None:
        return number(self.metrics, "flops") if self.is_trained else None

    @property
    def cost_seconds(self) -> float | None:
        """The wall-clock time, or the training time if the chain did not measure that."""
        if self.seconds is not None or not self.is_trained:
            return self.seconds
        return number(self.metrics, "train_seconds")

    @property
    def plan(self) -> dict[str, Any]:
        return table(self.lineage, "plan")

    @property
    def git(self) -> dict[str, Any]:
        return table(self.lineage, "git")


def number(values: dict, key: str) -> float | None:
    """A finite number of a table, or None."""
    value = values.get(key)
    return value if finite_number(value) else None


def table(values: dict, key: str) -> dict:
    """A table within a table, empty if there is none."""
    value = values.get(key)
    return value if isinstance(value, dict) else {}


def read_file(path: Path, expected: type) -> Any:
    """The dict or list of a JSON file. A missing file is empty; so is a damaged one, after a message."""
    try:
        value = read_json(path)
        if isinstance(value, expected):
            return value
    except FileNotFoundError:
        return expected()
    except (OSError, ValueError):
        pass
    print(f"{path} is damaged and was left out", file=sys.stderr)
    return expected()


def read_chain(output_dir: Path) -> tuple[str, list[str], list[ReportStage]]:
    """Read the name, the prompts and the stages of a chain.

    Raises:
        UserError: chain.json is missing or has no stages.
    """
    path = output_dir / "chain.json"
    remedy = "give the output folder of a chain that scripts/run_chain.py has run"
    if not path.is_file():
        raise UserError(f"{path} is missing; {remedy}")
    chain = read_file(path, dict)
    entries = chain.get("stages")
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{path} has no list of stages; {remedy}")
    stages = [read_stage(output_dir, entry) for entry in entries]
    for previous, stage in itertools.pairwise(stages):
        stage.first_token = previous.first_token + (previous.tokens or 0)
    # The first colors differ most, so stages with curves get them.
    for index, stage in enumerate(sorted(stages, key=lambda stage: not stage.is_trained)):
        stage.color = index % COLORS
    prompts = chain.get("prompts")
    prompts = [str(prompt) for prompt in prompts] if isinstance(prompts, list) else []
    return str(chain.get("name") or output_dir.resolve().name), prompts, stages


def read_stage(output_dir: Path, entry: dict) -> ReportStage:
    """Read what a stage of chain.json left in its folder."""
    folder = output_dir / str(entry["folder"]) if entry.get("folder") else None
    kind = str(entry.get("kind") or entry.get("name") or "stage")
    stage = ReportStage(
        name=str(entry.get("name") or kind),
        kind=kind,
        folder=folder,
        seconds=number(entry, "seconds"),
        metrics={},
        lineage={},
        history=[],
    )
    if folder is None or kind == "push":  # the folder of a push is that of the model that it pushed
        return stage
    stage.metrics = read_file(folder / "metrics.json", dict)
    stage.lineage = read_file(folder / "lineage.json", dict)
    stage.history = [point for point in read_file(folder / "history.json", list) if isinstance(point, dict)]
    if kind not in WITHOUT_MODEL:
        stage.weights = weights_sha256(str(folder))
    return stage
