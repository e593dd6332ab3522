"""The commands that are interrupted: each recipe and script with small inputs, so that it takes a second or two."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml

from experiments import runner
from experiments.crash_points.changes import Mode
from unlabeled.data.tokenizer_training import train_tokenizer

MODEL_SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
T5_SIZES = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2}
LORA = {"adapter": "lora", "lora_r": 2, "lora_alpha": 4, "lora_dropout": 0.1}
TEMPLATE = str(runner.ROOT / "recipes" / "templates" / "chatml.jinja")
STEPS = 4
BATCH_ROWS = 4
MAX_LENGTH = 64
BATCH_TOKENS = BATCH_ROWS * MAX_LENGTH
PRELOADED_MODULES = [
    "experiments.crash_points.child",
    "matplotlib.pyplot",
    "transformers.models.bert.modeling_bert",
    "transformers.models.llama.modeling_llama",
    "transformers.models.t5.modeling_t5",
    "trl",
    "unlabeled.reporting.plots",
    "unlabeled.training",
]


@dataclass(frozen=True)
class Setting:
    """A command.

    Attributes:
        options: called with the folder of the inputs and the folder that the command may write to.
        argument: called with the folder of the inputs; returns the positional argument.
        needs: settings whose undisturbed runs are inputs, in order.
        kill: which processes a kill ends.
    """

    name: str
    script: str
    options: Callable[[Path, Path], dict]
    argument: Callable[[Path], Path] | None = None
    needs: tuple[str, ...] = ()
    kill: Mode = Mode.KILL
    modes: tuple[str, ...] = ("kill", "torn", "full")

    def arguments(self, inputs: Path, folder: Path) -> list[str]:
        """The command line without the script."""
        arguments = [str(self.argument(inputs))] if self.argument else []
        for key, value in self.options(inputs, folder).items():
            arguments += [f"--{key}", str(value)]
        return arguments


def make_inputs(folder: Path) -> None:
    """Write text, conversations, preferences, labels, tags, pairs and tokenizers, unless they exist."""
    if (folder / "complete").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    words = ["".join(rng.choice("abcdefghij") for _ in range(rng.randint(2, 7))) for _ in range(200)]
    texts = list(dict.fromkeys(" ".join(rng.choices(words, k=rng.randint(5, 40))) + "." for _ in range(150)))
    for split, part in {"train": texts[:120], "validation": texts[120:]}.items():
        examples = {
            "texts": [{"text": text} for text in part],
            "conversations": [
                {"messages": [{"role": "user", "content": text[:9]}, {"role": "assistant", "content": text[9:24]}]}
                for text in part
            ],
            "preferences": [
                {"prompt": text[:20], "chosen": text[20:60], "rejected": text[60:90]} for text in part if len(text) > 70
            ],
            "labels": [{"text": text[:80], "label": "early" if text < "e" else "late"} for text in part],
            "tags": [tag_words(text[:-1].split()) for text in part],
            "pairs": [{"anchor": text[:30], "positive": text[30:60]} for text in part if len(text) > 40],
        }
        for kind, rows in examples.items():
            lines = [json.dumps(row) + "\n" for row in rows]
            (folder / f"{kind}-{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    for objective, algorithm in {"clm": "bpe", "mlm": "wordpiece", "span": "unigram"}.items():
        train_tokenizer(texts, algorithm, 300).save_pretrained(folder / f"tokenizer-{objective}")
    (folder / "chain.yaml").write_text(yaml.safe_dump({"prompts": ["a"], "stages": chain_stages(folder)}), "utf-8")
    (folder / "complete").touch()


def tag_words(words: list[str]) -> dict:
    """A row of a named-entity data set: words with an "a" are locations."""
    return {"tokens": words, "ner_tags": ["B-LOC" if "a" in word else "O" for word in words]}


def run_options(inputs: Path, folder: Path, data: str, unit: str, amount: int) -> dict:
    """Options of a run of four steps, with a checkpoint every other step, of which the newest is kept.

    Args:
        data: first part of the names of the data files.
        unit: of the budget: "tokens", "pairs" or "examples".
        amount: units per step.
    """
    return {
        "train_data": inputs / f"{data}-train.jsonl",
        "eval_data": inputs / f"{data}-validation.jsonl",
        "output_dir": folder / "run",
        "max_length": MAX_LENGTH,
        f"train_{unit}": STEPS * amount,
        f"batch_{unit}": amount,
        "per_device_train_batch_size": BATCH_ROWS,
        "save_steps": 2,
        "save_total_limit": 1,
        "logging_steps": 1,
        "learning_rate": 0.003,
        "precision": "fp32",
        "use_cpu": "true",
    }


def pretraining(objective: str, model_type: str, sizes: dict) -> Setting:
    """A pretraining recipe from scratch."""

    def options(inputs: Path, folder: Path) -> dict:
        return run_options(inputs, folder, "texts", "tokens", BATCH_TOKENS) | {
            "model_type": model_type,
            "config_overrides": json.dumps(sizes),
            "tokenizer_name_or_path": inputs / f"tokenizer-{objective}",
            "prepared_dir": folder / "prepared",
        }

    return Setting(objective, f"recipes/pretrain_{objective}.py", options)


def fine_tuning(name: str, parent: str, data: str, unit: str, amount: int = BATCH_ROWS, **recipe_options) -> Setting:
    """A recipe on the model of another setting.

    Args:
        name: of the recipe, with "-lora" for an adapter.
        parent: setting whose model it starts from.
    """
    recipe, _, adapter = name.partition("-")

    def options(inputs: Path, folder: Path) -> dict:
        options = run_options(inputs, folder, data, unit, amount)
        options["model_name_or_path"] = inputs / parent / "run"
        if recipe == "sft":
            options["prepared_dir"] = folder / "prepared"
        if adapter:
            options |= LORA
        return options | recipe_options

    return Setting(name, f"recipes/{recipe}.py", options, needs=(*NEEDS_OF.get(parent, ()), parent))


def prepare_options(inputs: Path, folder: Path) -> dict:
    return {
        "objective": "mlm",
        "model_type": "bert",
        "tokenizer_name_or_path": inputs / "tokenizer-mlm",
        "train_data": inputs / "texts-train.jsonl",
        "eval_data": inputs / "texts-validation.jsonl",
        "prepared_dir": folder / "prepared",
        "max_length": MAX_LENGTH,
        "per_device_train_batch_size": BATCH_ROWS,
        "train_tokens": BATCH_TOKENS,
        "batch_tokens": BATCH_TOKENS,
        "use_cpu": "true",
    }


def tokenizer_options(inputs: Path, folder: Path) -> dict:
    return {
        "data": inputs / "texts-train.jsonl",
        "eval_data": inputs / "texts-validation.jsonl",
        "algorithm": "bpe",
        "vocab_size": 300,
        "output_dir": folder / "tokenizer",
    }


def chain_stages(inputs: Path) -> list[dict]:
    """A chain: tokenizer, prepared data, pretraining, SFT with an adapter, and the adapter merged."""
    unused = Path("unused")
    pretrain = run_options(inputs, unused, "texts", "tokens", BATCH_TOKENS)
    pretrain |= {"model_type": "llama", "config_overrides": MODEL_SIZES}
    sft = run_options(inputs, unused, "conversations", "tokens", BATCH_TOKENS) | LORA | {"chat_template": TEMPLATE}
    chain = [
        {"tokenizer": tokenizer_options(inputs, unused)},
        {"prepare": prepare_options(inputs, unused) | {"objective": "clm", "model_type": "llama"}},
        {"pretrain_clm": pretrain},
        {"sft": sft},
        {"merge": {}},
    ]
    for stage in chain:
        for options in stage.values():
            for key in ("output_dir", "prepared_dir", "tokenizer_name_or_path"):  # which the chain sets
                options.pop(key, None)
            options |= {key: str(value) for key, value in options.items() if isinstance(value, Path)}
            options |= {key: True for key, value in options.items() if value == "true"}
    return chain


NEEDS_OF = {"sft": ("clm",)}  # of the parents of settings
CHAT = {"chat_template": TEMPLATE}
CHAIN = {
    "script": "scripts/run_chain.py",
    "argument": lambda inputs: inputs / "chain.yaml",
    "options": lambda inputs, folder: {"output_dir": folder / "chain"},
}
SETTINGS = {
    setting.name: setting
    for setting in (
        pretraining("clm", "llama", MODEL_SIZES),
        pretraining("mlm", "bert", MODEL_SIZES),  # BERT has dropout, so the random state matters
        pretraining("span", "t5", T5_SIZES),
        fine_tuning("sft", "clm", "conversations", "tokens", BATCH_TOKENS, **CHAT),
        # The chat template adds tokens, so the adapter is saved with a base model of its own.
        fine_tuning("sft-lora", "clm", "conversations", "tokens", BATCH_TOKENS, **CHAT),
        fine_tuning("dpo", "sft", "preferences", "pairs"),
        fine_tuning("dpo-lora", "sft", "preferences", "pairs"),
        fine_tuning("classify", "mlm", "labels", "examples"),
        fine_tuning("tag", "mlm", "tags", "examples", text_column="tokens", label_column="ner_tags"),
        fine_tuning("tag-lora", "mlm", "tags", "examples", text_column="tokens", label_column="ner_tags"),
        fine_tuning("embed", "mlm", "pairs", "pairs"),
        Setting("prepare", "scripts/prepare_data.py", prepare_options),
        Setting("tokenizer", "scripts/train_tokenizer.py", tokenizer_options),
        Setting(
            "merge",
            "scripts/merge_adapter.py",
            lambda inputs, folder: {"output_dir": folder / "merged"},
            argument=lambda inputs: inputs / "sft-lora" / "run",
            needs=("clm", "sft-lora"),
        ),
        Setting("chain", **CHAIN),
        Setting("chain-one-process", **CHAIN, kill=Mode.KILL_GROUP, modes=("kill",)),
    )
}
