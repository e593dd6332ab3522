"""What a push sends, of every recipe: files that a run writes, without secrets, paths of the machine and user names."""

import random
import sys
from pathlib import Path

import pytest
import transformers
from conftest import ROOT, recipe_arguments, run_recipe
from test_finetuning import CHATML, make_conversations, make_pairs, phrase, write_lines

USER_NAME = "planted-user-name"
COMMON = {
    "precision": "fp32", "logging_steps": 1, "use_cpu": "true", "save_steps": 1, "max_length": 64,
    "per_device_train_batch_size": 4,
}  # fmt: skip


def words_of(options: dict) -> list[str]:
    return [word for key, value in options.items() for word in (f"--{key}", str(value))]


def merge(adapter: Path, output_dir: Path) -> None:
    sys.path.insert(0, str(ROOT / "scripts"))
    import merge_adapter

    merge_adapter.merge(adapter, output_dir)


@pytest.fixture(scope="module")
def folders(corpus, tokenizers, tmp_path_factory) -> dict[str, Path]:
    """{name: output_dir} of a run of two steps of every recipe, in the home folder of a user, by absolute paths."""
    home = tmp_path_factory.mktemp("home") / USER_NAME
    data = home / "data"
    data.mkdir(parents=True)
    for split, count in (("train", 40), ("validation", 12)):
        draw = random.Random(count)
        write_lines(data / f"text_{split}.jsonl", [{"text": phrase(draw, 20)} for _ in range(2 * count)])
        write_lines(data / f"sft_{split}.jsonl", make_conversations(count, seed=count))
        write_lines(data / f"dpo_{split}.jsonl", make_pairs(count, seed=count))
        labels = [{"text": phrase(draw, 8), "label": ("early", "late")[i % 2]} for i in range(count)]
        write_lines(data / f"classify_{split}.jsonl", labels)
        tags = [{"tokens": phrase(draw, 4).split(), "ner_tags": ["B-LOC", "O", "O", "O"]} for _ in range(count)]
        write_lines(data / f"tag_{split}.jsonl", tags)
        pairs = {phrase(draw, 6): phrase(draw, 9) for _ in range(2 * count)}
        write_lines(data / f"embed_{split}.jsonl", [{"anchor": a, "positive": b} for a, b in pairs.items()][:count])
    runs = {name: home / "runs" / name for name in ("clm", "mlm", "span", "sft", "lora", "dpo", "classify", "tag",
                                                    "embed", "merge")}  # fmt: skip
    text = {"train": str(data / "text_train.jsonl"), "validation": str(data / "text_validation.jsonl")}
    two_steps = {"train_tokens": 2 * 256, "save_steps": 1}
    for name, model_type in (("clm", "llama"), ("mlm", "bert"), ("span", "t5")):
        arguments = recipe_arguments(name, model_type, text, tokenizers, runs[name], **two_steps)
        run_recipe(f"pretrain_{name}", arguments)
    tokens = {"train_tokens": 2 * 256, "batch_tokens": 256, "prepared_dir": data / "prepared", "compile": "false"}
    tokens |= {"chat_template": CHATML}
    lora = {"adapter": "lora", "lora_r": 2}
    examples = {"train_examples": 8, "batch_examples": 4}
    tag = {"text_column": "tokens", "label_column": "ner_tags"}
    stages = {
        "sft": ("sft", "clm", tokens),
        "lora": ("sft", "sft", tokens | lora),
        "dpo": ("dpo", "sft", {"train_pairs": 8, "batch_pairs": 4, "prepared_dir": data / "prepared"}),
        "classify": (
            "classify",
            "mlm",
            examples | {"early_stopping_patience": 2, "eval_strategy": "steps", "eval_steps": 1},
        ),
        "tag": ("tag", "mlm", examples | tag),
        "embed": ("embed", "mlm", {"train_pairs": 8, "batch_pairs": 4}),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.GenerationMixin, "generate", lambda self, ids, **options: ids)
        for name, (recipe, parent, options) in stages.items():
            options = COMMON | {
                "model_name_or_path": runs[parent], "output_dir": runs[name],
                "train_data": data / f"{recipe}_train.jsonl", "eval_data": data / f"{recipe}_validation.jsonl",
            } | options  # fmt: skip
            run_recipe(recipe, words_of(options))
        merge(runs["lora"], runs["merge"])
    return runs


def test_folders(folders):
    for name, folder in folders.items():
        print("=====", name)
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                data = path.read_bytes()
                flag = "   <-- " + str(data.count(USER_NAME.encode())) if USER_NAME.encode() in data else ""
                print("   ", path.relative_to(folder), path.stat().st_size, flag)
    import shutil

    shutil.rmtree("/tmp/push/runs", ignore_errors=True)
    shutil.copytree(folders["clm"].parent, "/tmp/push/runs")
