"""The runs of the objectives experiment for one seed."""

import json
from pathlib import Path

from experiments import runner
from experiments.objectives.data import make_labelled_data
from experiments.objectives.models import (
    convert_to_encoder,
    flops_per_text_token,
    make_initial_models,
    span_inputs_per_text_token,
)
from experiments.objectives.scoring import score_left_to_right
from experiments.objectives.settings import (
    BATCH_TOKENS,
    FINE_TUNING_OPTIONS,
    PRETRAINING_OPTIONS,
    T5_SIZES,
    TASKS,
    TRAIN_TOKENS,
)

FINE_TUNING_BATCH = 32  # the number of examples is rounded to a multiple of it


class Study:
    """All runs of one seed, in order. Finished runs are not repeated.

    Args:
        folder: holds the tokenizers and the held-out text; this study writes to `seed-N` in it.
        scale: factor of all budgets.
    """

    def __init__(self, folder: Path, seed: int, scale: float):
        self.shared_folder = folder
        self.folder = folder / f"seed-{seed}"
        self.seed = seed
        self.scale = scale
        self.held_out = folder / "held_out.jsonl"

    def run_all(self) -> None:
        """Pretrain all arms, fine-tune each on every task, and score how well it predicts text left to right."""
        make_labelled_data(self.folder, self.seed)
        initial_folder = make_initial_models(self.shared_folder, self.seed)
        for task in TASKS:
            self.fine_tune(task, "no pretraining", initial_folder / "masked")
        for matched in ("tokens", "flops"):
            for arm, folder in self.pretrain_arms(matched).items():
                # Like the other arms, the causal model is fine-tuned with bidirectional attention ...
                model = convert_to_encoder(folder) if arm == "causal" else folder
                for task in TASKS:
                    self.fine_tune(task, folder.name, model)
                if arm == "causal":  # ... and, on the tasks whose recipe allows it, with causal attention too.
                    for task in ("topics", "sentiment"):
                        self.fine_tune(task, "causal, attention as trained", folder)
                score_left_to_right(folder, self.held_out)

    def pretrain_arms(self, matched: str) -> dict[str, Path]:
        """Pretrain each arm.

        Args:
            matched: "tokens": every arm reads as much text as the causal one; "flops": as much as its FLOPs pay for.

        Returns:
            The output folder of each arm.
        """
        initial_folder = make_initial_models(self.shared_folder, self.seed)
        flops = flops_per_text_token(self.shared_folder)
        if matched == "tokens":
            text_ratio = dict.fromkeys(flops, 1.0)
            suffix = ""
        else:
            text_ratio = {arm: flops["causal"] / flops[arm] for arm in flops}
            suffix = " at equal FLOPs"

        folders = {"causal": self.pretrain("clm", "causal", TRAIN_TOKENS, model_name_or_path=initial_folder / "causal")}
        for rate in (0.15, 0.3):
            arm = f"masked {rate:.2f}"
            options = {"model_name_or_path": initial_folder / "masked", "mlm_probability": rate}
            folders[arm] = self.pretrain("mlm", arm + suffix, TRAIN_TOKENS * text_ratio[arm], **options)

        arm = "causal, then masked"
        half = self.pretrain("clm", "causal, half", TRAIN_TOKENS / 2, model_name_or_path=initial_folder / "causal")
        options = {"model_name_or_path": convert_to_encoder(half), "mlm_probability": 0.3}
        folders[arm] = self.pretrain("mlm", arm + suffix, TRAIN_TOKENS / 2 * text_ratio["masked 0.30"], **options)

        arm = "span corruption"
        options = {
            "model_type": "t5",
            "config_overrides": json.dumps(T5_SIZES),
            "tokenizer_name_or_path": self.shared_folder / "tokenizer-span",
        }
        # The budget of this recipe counts input tokens instead of text tokens.
        input_tokens = TRAIN_TOKENS * text_ratio[arm] * span_inputs_per_text_token()
        folders[arm] = self.pretrain("span", arm + suffix, input_tokens, **options)
        return folders

    def pretrain(self, objective: str, name: str, tokens: float, **options) -> Path:
        """Run a pretraining recipe for `tokens`, scaled and rounded to whole steps."""
        steps = max(round(tokens * self.scale / BATCH_TOKENS), 10)
        budget = {"train_tokens": steps * BATCH_TOKENS, "eval_data": self.held_out}
        return self.run(f"pretrain_{objective}", name, PRETRAINING_OPTIONS | budget | options)

    def fine_tune(self, task_name: str, arm: str, model: Path) -> None:
        """Fine-tune a model on a task."""
        task = TASKS[task_name]
        examples = max(round(task.train_examples * self.scale / FINE_TUNING_BATCH), 4) * FINE_TUNING_BATCH
        options = FINE_TUNING_OPTIONS | task.options | {"model_name_or_path": model}
        if task.recipe == "embed":
            pairs_per_batch = 2 * options.pop("batch_examples")
            options["train_pairs"] = examples
            options["batch_pairs"] = pairs_per_batch
            options["per_device_train_batch_size"] = pairs_per_batch
        else:
            options["train_examples"] = examples
        data_folder = self.folder / "labeled" / task_name
        options["train_data"] = data_folder / "train.parquet"
        options["eval_data"] = data_folder / "held_out.parquet"
        self.run(task.recipe, f"{arm} - {task_name}", options)

    def run(self, recipe: str, name: str, options: dict) -> Path:
        """Run a recipe, unless it has finished before. Returns its output folder."""
        folder = self.folder / name
        if (folder / "metrics.json").exists():
            return folder
        options = options | {"seed": self.seed, "output_dir": folder}
        if recipe.startswith("pretrain"):
            options["prepared_dir"] = self.shared_folder / "prepared"
        runner.run_recipe(recipe, options, folder.with_name(f"{name}.log"))
        print(f"seed {self.seed}: {name}", flush=True)
        return folder
