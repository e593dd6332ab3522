"""What is each objective good for? Five arms from the same start, then classified, tagged, compared and continued.

    python experiments/objectives/run.py                          # resumes where it stopped
    python experiments/objectives/run.py --seeds 1 --scale 0.1    # a tenth of everything, once

Prints the tables of README.md and draws objectives.png. Needs
`python scripts/get_demo_data.py shakespeare bbc wiki c4 rotten_tomatoes conll2003`.
"""

import argparse
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
import forks  # noqa: E402
from texts import TEXT, make_held_out  # noqa: E402

LENGTH, TOKENS, BATCH = 64, 512_000, 2_048  # of a row, of a run that is matched in tokens, of a step
HELD_OUT, CHARACTERS = 25, 1500  # texts of each source, and what of each; their evaluation takes seconds
SIZES = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
    "local_attention": 8, "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
}  # fmt: skip
T5_SIZES = {
    "d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4,
    "feed_forward_proj": "gated-gelu", "dropout_rate": 0.0, "tie_word_embeddings": True,
}  # fmt: skip
PRETRAINING = {
    "train_data": json.dumps(TEXT), "max_length": LENGTH, "batch_tokens": BATCH,
    "per_device_train_batch_size": BATCH // LENGTH, "per_device_eval_batch_size": 128, "optimizer": "muon",
    "learning_rate": 0.01, "lr_scheduler_type": "warmup_stable_decay", "warmup_steps": 0.02, "decay_fraction": 0.5,
    "compile": "false", "logging_steps": 50, "save_strategy": "no",
}  # fmt: skip
TUNING = {
    "batch_examples": 16, "per_device_train_batch_size": 16, "per_device_eval_batch_size": 128, "optimizer": "muon",
    "learning_rate": 0.005, "eval_on_start": "false", "logging_steps": 20, "save_strategy": "no",
}  # fmt: skip
TASKS = {  # name: (recipe, options, labelled examples, examples seen, the figure that counts)
    "topics": ("classify", {"max_length": 64}, 200, 1_600, "eval_accuracy"),
    "sentiment": ("classify", {"max_length": 48}, 1_000, 4_000, "eval_accuracy"),
    "entities": ("tag", {"max_length": 64, "text_column": "tokens", "label_column": "ner_tags"}, 500, 2_000, "eval_f1"),
    "similarity": ("embed", {"max_length": 64}, 1_792, 1_792, "mrr"),
}  # fmt: skip


class Study:
    """All runs of one seed, in order; a run that is there is not repeated."""

    def __init__(self, folder: Path, seed: int, scale: float):
        self.shared, self.folder, self.seed, self.scale = folder, folder / f"seed-{seed}", seed, scale

    def run(self, recipe: str, name: str, options: dict) -> Path:
        """Run a recipe in a process of its own and return its folder."""
        folder = self.folder / name
        if (folder / "metrics.json").exists():
            return folder
        options = {**options, "seed": self.seed, "output_dir": folder, "prepared_dir": self.shared / "prepared"}
        if recipe in ("classify", "tag", "embed"):
            del options["prepared_dir"]
        forks.run_recipe(recipe, options, folder.with_name(f"{name}.log"))
        print(f"seed {self.seed}: {name}", flush=True)
        return folder

    def pretrain(self, recipe: str, name: str, tokens: float, **options) -> Path:
        """`tokens` rounded to whole steps."""
        tokens = max(round(tokens * self.scale / BATCH), 10) * BATCH
        budget = {"train_tokens": tokens, "eval_data": self.shared / "held_out.jsonl"}
        return self.run(f"pretrain_{recipe}", name, PRETRAINING | budget | options)

    def arms(self, matched: str) -> dict[str, Path]:
        """The folder of each arm, trained on as many tokens of text as the causal one or, matched in "flops", on as
        many as its FLOPs pay for."""
        import ingredients

        start, cost = ingredients.starts(self.shared, self.seed), ingredients.flops_per_token(self.shared)
        text = dict.fromkeys(cost, 1.0) if matched == "tokens" else {k: cost["causal"] / cost[k] for k in cost}
        suffix = "" if matched == "tokens" else " at equal FLOPs"
        found = {"causal": self.pretrain("clm", "causal", TOKENS, model_name_or_path=start / "causal")}
        for rate in (0.15, 0.3):
            arm = f"masked {rate:.2f}".replace("0.", ".")
            options = {"model_name_or_path": start / "masked", "mlm_probability": rate}
            found[arm] = self.pretrain("mlm", arm + suffix, TOKENS * text[arm], **options)
        half = self.pretrain("clm", "causal, half", TOKENS / 2, model_name_or_path=start / "causal")
        options = {"model_name_or_path": ingredients.as_encoder(half), "mlm_probability": 0.3}
        arm = "causal, then masked"
        found[arm] = self.pretrain("mlm", arm + suffix, TOKENS / 2 * text["masked .30"], **options)
        options = {"model_type": "t5", "config_overrides": json.dumps(T5_SIZES)}
        options |= {"tokenizer_name_or_path": self.shared / "tokenizer-span"}
        inputs = ingredients.inputs_per_token()  # what the budget of this recipe counts
        arm = "span corruption"
        found[arm] = self.pretrain("span", arm + suffix, TOKENS * text[arm] * inputs, **options)
        return found

    def tune(self, task: str, arm: str, model: Path) -> None:
        recipe, options, _, examples, _ = TASKS[task]
        budget = {"train_examples": max(round(examples * self.scale / 32), 4) * 32}
        options = TUNING | options | {"model_name_or_path": model}
        if recipe == "embed":
            budget, batch = {"train_pairs": budget["train_examples"]}, 2 * options.pop("batch_examples")
            options |= {"batch_pairs": batch, "per_device_train_batch_size": batch}
        data = self.folder / "labelled" / task
        options |= {"train_data": data / "train.parquet", "eval_data": data / "held_out.parquet"}
        self.run(recipe, f"{arm} - {task}", options | budget)

    def everything(self) -> None:
        import ingredients

        ingredients.make_labelled(self.folder, self.seed)
        for task in TASKS:
            self.tune(task, "no pretraining", ingredients.starts(self.shared, self.seed) / "masked")
        for matched in ("tokens", "flops"):
            for arm, folder in self.arms(matched).items():
                # A causal model reads to both sides in its fine-tuning, as the others do; and also as it was trained.
                model = ingredients.as_encoder(folder) if arm == "causal" else folder
                for task in TASKS:
                    self.tune(task, folder.name, model)
                if arm == "causal":
                    for task in ("topics", "sentiment"):  # there is no tagger with causal attention
                        self.tune(task, "causal, attention as trained", folder)
                ingredients.left_to_right(folder, self.shared / "held_out.jsonl")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="how many (default: 5)")
    parser.add_argument("--scale", type=float, default=1.0, help="of all budgets (default: 1)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="seeds at a time, each on one core")
    parser.add_argument("--output_dir", default="outputs/objectives", help="default: outputs/objectives")
    args = parser.parse_args()

    forks.prepare()
    import ingredients
    import tables

    folder = Path(args.output_dir).resolve()
    ingredients.make_tokenizer(folder, TEXT)
    make_held_out(folder, HELD_OUT, CHARACTERS)
    studies = [Study(folder, seed, args.scale) for seed in range(args.seeds)]
    with ThreadPoolExecutor(args.workers) as pool:
        list(pool.map(Study.everything, studies))
    tables.show(folder, args.seeds)


if __name__ == "__main__":
    main()
