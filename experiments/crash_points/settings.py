"""What is interrupted: each recipe and script as a command that takes a second or two, and the small inputs of all."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml

from experiments import runner
from experiments.crash_points.changes import Mode
from unlabeled.data.tokenizer_training import train_tokenizer

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
T5_SIZES = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2}
LORA = {"adapter": "lora", "lora_r": 2, "lora_alpha": 4, "lora_dropout": 0.1}
TEMPLATE = str(runner.ROOT / "recipes" / "templates" / "chatml.jinja")
STEPS = 4
ROWS = 4  # of a step
LENGTH = 64
PRELOADED = [
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
    """A command."""

    name: str
    script: str
    options: Callable[[Path, Path], dict]  # of the folder of the inputs and the one that the command may write to
    argument: Callable[[Path], Path] | None = None  # of the folder of the inputs: what stands before the options
    needs: tuple[str, ...] = ()  # settings whose undisturbed runs are inputs, in order
    kill: Mode = Mode.KILL
    modes: tuple[str, ...] = ("kill", "torn", "full")

    def arguments(self, inputs: Path, folder: Path) -> list[str]:
        """The command line."""
        words = [str(self.argument(inputs))] if self.argument else []
        for key, value in self.options(inputs, folder).items():
            words += [f"--{key}", str(value)]
        return words


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
                {"messages": [{"role": "user", "content": text[:9]}, {"role": "assistant", "content": text[9:24]}]}
                for text in part
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
    (folder / "chain.yaml").write_text(yaml.safe_dump({"prompts": ["a"], "stages": stages(folder)}), "utf-8")
    (folder / "complete").touch()


def tagged(words: list[str]) -> dict:
    return {"tokens": words, "ner_tags": ["B-LOC" if "a" in word else "O" for word in words]}


def run_options(inputs: Path, folder: Path, data: str, unit: str, amount: int) -> dict:
    """Four steps of `amount` units with a checkpoint at every other one, of which the newest is kept."""
    return {
        "train_data": inputs / f"{data}-train.jsonl",
        "eval_data": inputs / f"{data}-validation.jsonl",
        "output_dir": folder / "run",
        "max_length": LENGTH,
        f"train_{unit}": STEPS * amount,
        f"batch_{unit}": amount,
        "per_device_train_batch_size": ROWS,
        "save_steps": 2,
        "save_total_limit": 1,
        "logging_steps": 1,
        "learning_rate": 0.003,
        "precision": "fp32",
        "use_cpu": "true",
    }


def pretraining(objective: str, model_type: str, sizes: dict) -> Setting:
    def options(inputs: Path, folder: Path) -> dict:
        return run_options(inputs, folder, "texts", "tokens", ROWS * LENGTH) | {
            "model_type": model_type,
            "config_overrides": json.dumps(sizes),
            "tokenizer_name_or_path": inputs / f"tokenizer-{objective}",
            "prepared_dir": folder / "prepared",
        }

    return Setting(objective, f"recipes/pretrain_{objective}.py", options)


def tuning(name: str, parent: str, data: str, unit: str, amount: int = ROWS, **more) -> Setting:
    """A recipe on the model of another setting; the name may end in "-lora"."""
    recipe, _, adapter = name.partition("-")

    def options(inputs: Path, folder: Path) -> dict:
        own = {"prepared_dir": folder / "prepared"} if recipe == "sft" else {}
        own |= LORA if adapter else {}
        return run_options(inputs, folder, data, unit, amount) | own | {
            "model_name_or_path": inputs / parent / "run"
        } | more  # fmt: skip

    return Setting(name, f"recipes/{recipe}.py", options, needs=(*NEEDS.get(parent, ()), parent))


def prepare_options(inputs: Path, folder: Path) -> dict:
    return {
        "objective": "mlm",
        "model_type": "bert",
        "tokenizer_name_or_path": inputs / "tokenizer-mlm",
        "train_data": inputs / "texts-train.jsonl",
        "eval_data": inputs / "texts-validation.jsonl",
        "prepared_dir": folder / "prepared",
        "max_length": LENGTH,
        "per_device_train_batch_size": ROWS,
        "train_tokens": ROWS * LENGTH,
        "batch_tokens": ROWS * LENGTH,
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


def stages(inputs: Path) -> list[dict]:
    """Of a chain: tokenizer, pretraining, an adapter for conversations, and both merged."""
    nowhere = Path("unused")
    pretrain = run_options(inputs, nowhere, "texts", "tokens", ROWS * LENGTH)
    pretrain |= {"model_type": "llama", "config_overrides": SIZES}
    sft = run_options(inputs, nowhere, "conversations", "tokens", ROWS * LENGTH) | LORA | {"chat_template": TEMPLATE}
    chain = [
        {"tokenizer": tokenizer_options(inputs, nowhere)},
        {"prepare": prepare_options(inputs, nowhere) | {"objective": "clm", "model_type": "llama"}},
        {"pretrain_clm": pretrain},
        {"sft": sft},
        {"merge": {}},
    ]
    for stage in chain:
        for keys in stage.values():
            for key in ("output_dir", "prepared_dir", "tokenizer_name_or_path"):
                keys.pop(key, None)
            keys |= {key: str(value) for key, value in keys.items() if isinstance(value, Path)}
            keys |= {key: True for key, value in keys.items() if value == "true"}
    return chain


NEEDS = {"sft": ("clm",)}
CHAT = {"chat_template": TEMPLATE}
CHAIN = {
    "script": "scripts/run_chain.py",
    "argument": lambda inputs: inputs / "chain.yaml",
    "options": lambda inputs, folder: {"output_dir": folder / "chain"},
}
SETTINGS = {
    setting.name: setting
    for setting in (
        pretraining("clm", "llama", SIZES),
        pretraining("mlm", "bert", SIZES),  # BERT has dropout, so that the random state counts
        pretraining("span", "t5", T5_SIZES),
        tuning("sft", "clm", "conversations", "tokens", ROWS * LENGTH, **CHAT),
        tuning(
            "sft-lora", "clm", "conversations", "tokens", ROWS * LENGTH, **CHAT
        ),  # with new tokens: a base of its own
        tuning("dpo", "sft", "preferences", "pairs"),
        tuning("dpo-lora", "sft", "preferences", "pairs"),
        tuning("classify", "mlm", "labels", "examples"),
        tuning("tag", "mlm", "tags", "examples", text_column="tokens", label_column="ner_tags"),
        tuning("tag-lora", "mlm", "tags", "examples", text_column="tokens", label_column="ner_tags"),
        tuning("embed", "mlm", "pairs", "pairs"),
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
