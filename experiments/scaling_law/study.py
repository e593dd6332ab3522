"""The runs of the scaling-law study: models of several sizes, each trained for several budgets."""

import json
import shutil
from pathlib import Path

from experiments import runner
from experiments.corpora import TRAIN_FILES, write_held_out_text
from unlabeled.data.readers import read_documents
from unlabeled.data.sources import parse_sources
from unlabeled.data.tokenizer_training import train_tokenizer
from unlabeled.planning import training_flops_per_token
from unlabeled.planning.shapes import count_shape, shape_of

VOCABULARY_SIZE = 512
MAX_LENGTH = 64
BATCH_TOKENS = 512
BUDGETS = [1e11 * 3**index for index in range(5)]  # FLOPs, with attention and output head
COOLDOWN_FRACTION = 0.2  # of the steps of a run
STEP_MULTIPLE = 5  # of all runs, so that every cool-down starts at a checkpoint of the stable run
# (layers, width): index of the first and the last budget of that size. Every budget has four or five sizes.
SIZES = {
    (2, 16): (0, 1),
    (2, 24): (0, 2),
    (2, 32): (0, 3),
    (2, 48): (0, 4),
    (2, 64): (1, 4),
    (3, 96): (2, 4),
    (4, 128): (3, 4),
}
HELD_OUT_TEXTS = 50  # of each source
HELD_OUT_CHARACTERS = 2_000  # of each text


class ModelSize:
    """All runs of one model size: a stable run for its largest budget, and a cool-down for each budget.

    The stable run has a constant learning rate. The cool-down of a budget starts at the checkpoint of the stable run
    after 80 % of the budget's steps.

    Args:
        folder: holds the tokenizer and the held-out text.
        budgets: indices into `BUDGETS`.
    """

    def __init__(self, folder: Path, layers: int, width: int, budgets: range):
        self.shared_folder = folder
        self.folder = folder / f"{layers}x{width}"
        self.budgets = budgets
        self.config_overrides = {
            "hidden_size": width,
            "intermediate_size": 3 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": max(width // 32, 1),
            "max_position_embeddings": MAX_LENGTH,
            "tie_word_embeddings": True,
        }
        shape = shape_of("llama", self.config_overrides | {"vocab_size": VOCABULARY_SIZE})
        self.counts = count_shape(shape)
        self.flops_per_token = training_flops_per_token(shape, self.counts, MAX_LENGTH)
        smallest_steps = BUDGETS[budgets[0]] / self.flops_per_token / BATCH_TOKENS
        self.smallest_steps = max(round(smallest_steps / STEP_MULTIPLE), 1) * STEP_MULTIPLE

    def steps(self, budget: int) -> int:
        """Steps of a budget, with its cool-down."""
        return self.smallest_steps * 3 ** (budget - self.budgets[0])

    def stable_steps(self, budget: int) -> int:
        """Steps of a budget before its cool-down."""
        return round(self.steps(budget) * (1 - COOLDOWN_FRACTION))

    def run_all(self) -> None:
        """Make the stable run and all cool-downs."""
        last_budget = self.budgets[-1]
        stable = self.run(
            f"stable-{self.steps(last_budget)}",
            self.stable_steps(last_budget),
            model_type="llama",
            config_overrides=json.dumps(self.config_overrides),
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=10,
            save_strategy="steps",
            save_steps=self.stable_steps(self.budgets[0]),
        )
        for budget in self.budgets:
            # The optimizer starts anew: its momentum is that of 20 steps. The seed draws other text.
            self.run(
                f"budget-{budget}",
                round(self.steps(budget) * COOLDOWN_FRACTION),
                model_name_or_path=stable / f"checkpoint-{self.stable_steps(budget)}",
                seed=1 + budget,
                lr_scheduler_type="linear",
                warmup_steps=0,
                save_strategy="no",
            )
        for checkpoint in stable.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)

    def run(self, name: str, steps: int, **options) -> Path:
        """Pretrain for a number of steps, unless the run has finished before. Returns its output folder."""
        folder = self.folder / name
        if (folder / "metrics.json").exists():
            return folder
        options = {
            "train_data": json.dumps(TRAIN_FILES),
            "eval_data": self.shared_folder / "held_out.jsonl",
            "tokenizer_name_or_path": self.shared_folder / "tokenizer",
            "prepared_dir": self.shared_folder / "prepared",
            "max_length": MAX_LENGTH,
            "train_tokens": steps * BATCH_TOKENS,
            "batch_tokens": BATCH_TOKENS,
            "per_device_train_batch_size": BATCH_TOKENS // MAX_LENGTH,
            "per_device_eval_batch_size": 64,
            "optimizer": "muon",
            "learning_rate": 0.01,
            "compile": "false",
            "logging_steps": max(steps // 50, 1),
            "output_dir": folder,
        } | options
        runner.run_recipe("pretrain_clm", options, folder.with_name(f"{name}.log"))
        print(f"{self.folder.name}: {name}", flush=True)
        return folder

    def read_results(self) -> list[dict]:
        """Size, tokens, FLOPs and held-out loss of each budget."""
        results = []
        for budget in self.budgets:
            metrics = json.loads((self.folder / f"budget-{budget}/metrics.json").read_text(encoding="utf-8"))
            tokens = self.steps(budget) * BATCH_TOKENS
            result = {
                "budget": budget,
                "flops": self.flops_per_token * tokens,
                "tokens": tokens,
                "loss": metrics["eval_loss"],
                "parameters": self.counts.total,
                "without embeddings": self.counts.hidden,
                "FLOPs / 6 tokens": self.flops_per_token / 6,
            }
            results.append(result)
        return results


def make_inputs(folder: Path) -> None:
    """Train the tokenizer and write the held-out text, unless they exist."""
    if (folder / "held_out.jsonl").exists():
        return
    documents = (document for source in parse_sources(TRAIN_FILES, "text") for document in read_documents(source))
    train_tokenizer(documents, "bpe", VOCABULARY_SIZE).save_pretrained(folder / "tokenizer")
    write_held_out_text(folder, HELD_OUT_TEXTS, HELD_OUT_CHARACTERS)


def make_sizes(folder: Path, budget_count: int) -> list[ModelSize]:
    """All sizes that have one of the first `budget_count` budgets."""
    sizes = []
    for (layers, width), (first, last) in SIZES.items():
        if first < budget_count:
            sizes.append(ModelSize(folder, layers, width, range(first, min(last, budget_count - 1) + 1)))
    return sizes
