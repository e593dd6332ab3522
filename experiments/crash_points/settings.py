"""What is interrupted: each recipe and script as a command that takes a second or two, and the small inputs of all."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from unlabeled.tokenization import train_tokenizer

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
T5_SIZES = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2}
LORA = {"adapter": "lora", "lora_r": 2, "lora_alpha": 4, "lora_dropout": 0.1}
STEPS = 4
PRELOADED = [
    "child",
    "matplotlib.pyplot",
    "transformers.models.bert.modeling_bert",
    "transformers.models.llama.modeling_llama",
    "transformers.models.t5.modeling_t5",
    "trl",
    "unlabeled.plots",
    "unlabeled.training",
]


@dataclass(frozen=True)
class Setting:
    """A command. `options` takes the folder of the inputs and the one that the command may write to."""

    name: str
    script: str
    options: Callable[[Path, Path], dict]
    needs: tuple[str, ...] = ()  # settings whose undisturbed run it reads
    trains: bool = True

    def arguments(self, inputs: Path, folder: Path) -> list[str]:
        options = self.options(inputs, folder)
        return [word for key, value in options.items() for word in (f"--{key}", str(value))]


def make_inputs(folder: Path) -> None:
    """Text, conversations, preferences, labels, tags, pairs and tokenizers; nothing where they are there already."""
    if (folder / "complete").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    words = ["".join(rng.choice("abcdefghij") for _ in range(rng.randint(2, 7))) for _ in range(200)]
    texts = list(dict.fromkeys(" ".join(rng.choices(words, k=rng.randint(5, 40))) + "." for _ in range(150)))
    for split, part in {"train": texts[:120], "validation": texts[120:]}.items():
        rows = {
            "texts": [{"text": text} for text in part],
            "conversations": [
                {"messages": [{"role": "user", "content": text[:30]}, {"role": "assistant", "content": text[30:90]}]}
                for text in part
                if len(text) > 40
            ],
            "preferences": [
                {"prompt": text[:20], "chosen": text[20:60], "rejected": text[60:90]} for text in part if len(text) > 70
            ],
            "labels": [{"text": text[:80], "label": "early" if text < "e" else "late"} for text in part],
            "tags": [tagged(text[:-1].split()) for text in part],
            "pairs": [{"anchor": text[:30], "positive": text[30:60]} for text in part if len(text) > 40],
        }  # fmt: skip
        for kind, examples in rows.items():
            lines = [json.dumps(example) + "\n" for example in examples]
            (folder / f"{kind}-{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    for objective, algorithm in {"clm": "bpe", "mlm": "wordpiece", "span": "unigram"}.items():
        train_tokenizer(texts, algorithm, 300).save_pretrained(folder / f"tokenizer-{objective}")
    (folder / "complete").touch()


def tagged(words: list[str]) -> dict:
    return {"tokens": words, "ner_tags": ["B-LOC" if "a" in word else "O" for word in words]}


def common(inputs: Path, folder: Path, data: str) -> dict:
    """Four steps with a checkpoint at every other one, of which the newest is kept."""
    return {
        "train_data": inputs / f"{data}-train.jsonl",
        "eval_data": inputs / f"{data}-validation.jsonl",
        "output_dir": folder / "run",
        "max_length": 32,
        "per_device_train_batch_size": 4,
        "save_steps": 2,
        "save_total_limit": 1,
        "logging_steps": 1,
        "learning_rate": 0.003,
        "precision": "fp32",
        "compile": "false",
        "use_cpu": "true",
    }


def pretraining(objective: str, model_type: str, sizes: dict) -> Setting:
    def options(inputs: Path, folder: Path) -> dict:
        return common(inputs, folder, "texts") | {
            "model_type": model_type,
            "config_overrides": json.dumps(sizes),
            "tokenizer_name_or_path": inputs / f"tokenizer-{objective}",
            "prepared_dir": folder / "prepared",
            "train_tokens": STEPS * 128,
            "batch_tokens": 128,
        }

    return Setting(objective, f"recipes/pretrain_{objective}.py", options)


def preparation(inputs: Path, folder: Path) -> dict:
    return {
        "objective": "mlm",
        "model_type": "bert",
        "tokenizer_name_or_path": inputs / "tokenizer-mlm",
        "train_data": inputs / "texts-train.jsonl",
        "eval_data": inputs / "texts-validation.jsonl",
        "prepared_dir": folder / "prepared",
        "max_length": 32,
        "train_tokens": 1024,
        "batch_tokens": 256,
        "use_cpu": "true",
    }


def tokenizer(inputs: Path, folder: Path) -> dict:
    return {
        "data": inputs / "texts-train.jsonl",
        "eval_data": inputs / "texts-validation.jsonl",
        "algorithm": "bpe",
        "vocab_size": 300,
        "output_dir": folder / "tokenizer",
    }


SETTINGS = {
    setting.name: setting
    for setting in (
        pretraining("clm", "llama", SIZES),
        pretraining("mlm", "bert", SIZES),  # BERT has dropout, so that the random state counts
        pretraining("span", "t5", T5_SIZES),
        Setting("prepare", "scripts/prepare_data.py", preparation, trains=False),
        Setting("tokenizer", "scripts/train_tokenizer.py", tokenizer, trains=False),
    )
}
