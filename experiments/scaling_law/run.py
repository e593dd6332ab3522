"""An IsoFLOP study for a laptop: five budgets, seven sizes, cool-downs from shared stable runs.

    python experiments/scaling_law/run.py                 # resumes where it stopped
    python experiments/scaling_law/run.py --budgets 3     # the three smallest budgets only

Prints the tables of README.md, writes results.json and draws scaling_law.png. Needs
`python scripts/get_demo_data.py shakespeare bbc wiki c4`.
"""

import argparse
import json
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
import forks  # noqa: E402
from texts import TEXT, make_held_out  # noqa: E402

from unlabeled.planning import training_flops_per_token  # noqa: E402
from unlabeled.planning.shapes import count_shape, shape_of  # noqa: E402

VOCABULARY, LENGTH, BATCH = 512, 64, 512
BUDGETS = [1e11 * 3**number for number in range(5)]  # FLOPs, attention and head counted
COOLDOWN = 0.2  # of a run
# (layers, width): the first and the last budget that it is trained on. A budget has four or five sizes.
SIZES = {
    (2, 16): (0, 1),
    (2, 24): (0, 2),
    (2, 32): (0, 3),
    (2, 48): (0, 4),
    (2, 64): (1, 4),
    (3, 96): (2, 4),
    (4, 128): (3, 4),
}
HELD_OUT, CHARACTERS = 50, 2_000  # texts of each source, and what of each


class Size:
    """One size: a stable run as long as its largest budget needs, and a cool-down from it for each budget."""

    def __init__(self, folder: Path, layers: int, width: int, budgets: range):
        self.folder, self.budgets = folder / f"{layers}x{width}", budgets
        self.shared = folder
        self.overrides = {
            "hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers,
            "num_attention_heads": max(width // 32, 1), "max_position_embeddings": LENGTH,
            "tie_word_embeddings": True,
        }  # fmt: skip
        shape = shape_of("llama", self.overrides | {"vocab_size": VOCABULARY})
        self.counts = count_shape(shape)
        self.flops = training_flops_per_token(shape, self.counts, LENGTH)
        first = BUDGETS[budgets[0]] / self.flops / BATCH
        # Steps are multiples of 5, so that the cool-down of each budget begins at a checkpoint of the stable run.
        self.first = max(round(first / 5), 1) * 5

    def steps(self, budget: int) -> int:
        return self.first * 3 ** (budget - self.budgets[0])

    def run(self, name: str, steps: int, **options) -> Path:
        folder = self.folder / name
        if not (folder / "metrics.json").exists():
            options = {
                "train_data": json.dumps(TEXT), "eval_data": self.shared / "held_out.jsonl", "max_length": LENGTH,
                "tokenizer_name_or_path": self.shared / "tokenizer", "prepared_dir": self.shared / "prepared",
                "train_tokens": steps * BATCH, "batch_tokens": BATCH,
                "per_device_train_batch_size": BATCH // LENGTH, "per_device_eval_batch_size": 64,
                "optimizer": "muon", "learning_rate": 0.01, "compile": "false", "logging_steps": max(steps // 50, 1),
                "output_dir": folder, **options,
            }  # fmt: skip
            forks.run_recipe("pretrain_clm", options, folder.with_name(f"{name}.log"))
            print(f"{self.folder.name}: {name}", flush=True)
        return folder

    def everything(self) -> None:
        last, cut = self.steps(self.budgets[-1]), 1 - COOLDOWN
        overrides = {"model_type": "llama", "config_overrides": json.dumps(self.overrides)}
        stable = self.run(
            f"stable-{last}", round(last * cut), lr_scheduler_type="constant_with_warmup", warmup_steps=10,
            save_strategy="steps", save_steps=round(self.first * cut), **overrides,
        )  # fmt: skip
        for budget in self.budgets:
            start = stable / f"checkpoint-{round(self.steps(budget) * cut)}"
            # The optimizer begins anew: its momentum is that of 20 steps, and the text is another.
            self.run(
                f"budget-{budget}", round(self.steps(budget) * COOLDOWN), model_name_or_path=start, seed=1 + budget,
                lr_scheduler_type="linear", warmup_steps=0, save_strategy="no",
            )  # fmt: skip
        for checkpoint in stable.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)

    def points(self) -> list[dict]:
        """What each budget came to."""
        found = []
        for budget in self.budgets:
            metrics = json.loads((self.folder / f"budget-{budget}/metrics.json").read_text(encoding="utf-8"))
            tokens = self.steps(budget) * BATCH
            found.append({
                "budget": budget, "flops": self.flops * tokens, "tokens": tokens, "loss": metrics["eval_loss"],
                "parameters": self.counts.total, "without embeddings": self.counts.hidden,
                "FLOPs / 6 tokens": self.flops / 6,
            })  # fmt: skip
        return found


def make_texts(folder: Path) -> None:
    """A tokenizer and a held-out text of all four sources."""
    from unlabeled.data.readers import read_documents
    from unlabeled.data.sources import parse_sources
    from unlabeled.data.tokenization import train_tokenizer

    if (folder / "held_out.jsonl").exists():
        return
    texts = (document for source in parse_sources(TEXT, "text") for document in read_documents(source))
    train_tokenizer(texts, "bpe", VOCABULARY).save_pretrained(folder / "tokenizer")
    make_held_out(folder, HELD_OUT, CHARACTERS)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", type=int, default=len(BUDGETS), help="how many, from the smallest (default: all)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="sizes at a time, each on one core")
    parser.add_argument("--output_dir", default="outputs/scaling_law", help="default: outputs/scaling_law")
    args = parser.parse_args()
    forks.prepare()
    import tables

    folder = Path(args.output_dir).resolve()
    make_texts(folder)
    sizes = [
        Size(folder, *size, range(first, min(last, args.budgets - 1) + 1))
        for size, (first, last) in SIZES.items()
        if first < args.budgets
    ]
    with ThreadPoolExecutor(args.workers) as pool:
        list(pool.map(Size.everything, sizes[::-1]))  # the longest first
    tables.show([point for size in sizes for point in size.points()])


if __name__ == "__main__":
    main()
