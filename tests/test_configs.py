"""Every shipped YAML parses, names its hardware, has a budget that divides, and trains a small model for two steps."""

import itertools
import json
from pathlib import Path

import pytest
import transformers
import yaml
from conftest import MODELS, ROOT, SPAN_MODELS, make_text, recipe_arguments, run_recipe
from test_finetuning import make_conversations, make_pairs, write_lines
from test_recipes import assert_complete

from unlabeled.data.chat_templates import set_chat_template
from unlabeled.data.sources import parse_sources
from unlabeled.models.configs import scratch_config
from unlabeled.models.exports import load_and_check_export
from unlabeled.planning import plan_steps

CONFIGS = sorted((ROOT / "recipes" / "configs").rglob("*.yaml"))
NAMES = [f"{path.parent.name}/{path.stem}" for path in CONFIGS]
PROCESSES = {"llama-1b": 8, "llama-7b": 32}
PRETRAINING = [path for path in CONFIGS if path.stem.startswith("pretrain")]
TASKS = [path for path in CONFIGS if path.stem.split("_")[0] in ("classify", "tag", "embed")]
TUNING = [path for path in CONFIGS if path not in PRETRAINING + TASKS]
ACCELERATE = sorted((ROOT / "ds_configs").glob("*.yaml"))
DEEPSPEED = sorted((ROOT / "ds_configs").glob("*.json"))


def name_of(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def recipe_of(path: Path) -> str:
    """The name of the recipe: `pretrain_clm` itself, and `sft` of `sft_lora`."""
    return path.stem if path in PRETRAINING else path.stem.split("_")[0]


def test_all_configs_exist():
    assert set(NAMES) >= {
        "tiny/pretrain_clm",
        "tiny/pretrain_mlm",
        "gpt2-124m/pretrain_clm",
        "modernbert-base/pretrain_mlm",
        "llama-1b/pretrain_clm",
        "llama-7b/pretrain_clm",
        "tiny/sft",
        "tiny/dpo",
        "llama-1b/sft",
        "llama-1b/dpo",
        "smollm2-135m/pretrain_clm",
        "smollm2-135m/sft_lora",
        "smollm2-135m/dpo_lora",
        "tiny/pretrain_span",
        "t5-base/pretrain_span",
        "minilm/tag",
        "minilm/classify_topics",
        "minilm/classify_sentiment",
        "minilm/embed",
        "tiny/classify",
        "tiny/tag",
        "tiny/embed",
        "smollm2-135m/classify_lora",
    }
    assert {path.stem for path in ACCELERATE} == {"single", "ddp", "zero1", "zero2", "zero3", "zero3_offload"}


@pytest.mark.parametrize("path", CONFIGS, ids=NAMES)
def test_config_header(path):
    assert (ROOT / "recipes" / f"{recipe_of(path)}.py").exists()
    lines = path.read_text(encoding="utf-8").splitlines()
    header = " ".join(itertools.takewhile(lambda line: line.startswith("# "), lines))
    assert "GPU" in lines[0] or "CPU" in lines[0]
    figures = ("bits per byte", "loss", "prefer", "F1", "accuracy", "nearest", "Spearman")
    assert "not yet measured" in header or ("s of training" in header and any(figure in header for figure in figures))


@pytest.mark.parametrize("path", CONFIGS, ids=NAMES)
def test_config_budget(path):
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    unit = {"dpo": "pairs", "embed": "pairs", "classify": "examples", "tag": "examples"}.get(recipe_of(path), "tokens")
    row = config["max_length"] if unit == "tokens" else 1
    sizes = (config[f"train_{unit}"], config[f"batch_{unit}"], row, config["per_device_train_batch_size"])
    budget = plan_steps(*sizes, PROCESSES.get(path.parent.name, 1), unit=unit)
    assert budget.steps >= (100 if "model_type" in config else 10)
    for key in ("train_data", "eval_data"):
        parse_sources(config.get(key) or [], key)


@pytest.mark.slow
@pytest.mark.parametrize("path", PRETRAINING, ids=name_of)
def test_two_steps_of_pretraining(path, corpus, tokenizers, shrunken, tmp_path):
    """All keys but the size, the text and the budget are those of the YAML; the run writes all its files."""
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    objective = path.stem.removeprefix("pretrain_")
    model_type = config.get("model_type", "llama")
    sizes = dict((MODELS | SPAN_MODELS)[model_type])
    if "layer_types" in config.get("config_overrides", {}):
        sizes["layer_types"] = config["config_overrides"]["layer_types"][: sizes["num_hidden_layers"]]
    options = {"train_tokens": 512, "config_overrides": json.dumps(sizes), "dataloader_num_workers": 0}
    arguments = recipe_arguments(objective, model_type, corpus, tokenizers, tmp_path, **options)
    if "model_type" not in config:  # it continues a model
        for key in ("--model_type", "--config_overrides", "--tokenizer_name_or_path"):
            del arguments[arguments.index(key) : arguments.index(key) + 2]
        arguments += ["--model_name_or_path", str(shrunken["sft"])]
    if config.get("eval_fraction"):
        place = arguments.index("--eval_data")
        arguments[place : place + 2] = ["--eval_data", "null", "--eval_fraction", "0.2"]
    run_recipe(path.stem, ["--config", str(path), *arguments])
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert_complete(tmp_path, metrics)
    assert metrics["steps"] == 2
    lineage = json.loads((tmp_path / "lineage.json").read_text())
    for key in ("optimizer", "lr_scheduler_type", "learning_rate", "mlm_probability"):
        if key in config and config[key] != "cosine" and (key, config[key]) != ("mlm_probability", 0.3):
            assert lineage["configuration"][key] == config[key]


@pytest.fixture(scope="module")
def shrunken(tokenizers, tmp_path_factory) -> dict[str, Path]:
    """For each stage the folder of an untrained model: for SFT without a chat template, for DPO with one."""
    folders = {stage: tmp_path_factory.mktemp(stage) / "model" for stage in ("sft", "dpo")}
    for stage, folder in folders.items():
        tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizers["clm"])
        if stage == "dpo":
            set_chat_template(tokenizer, str(ROOT / "recipes" / "templates" / "chatml.jinja"))
        config = scratch_config("llama", MODELS["llama"], tokenizer, 256)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folders


@pytest.mark.slow
@pytest.mark.parametrize("path", TUNING, ids=name_of)
def test_two_steps_of_tuning(path, shrunken, tmp_path, monkeypatch):
    """All keys but the model, the data and the budget are those of the YAML, its chat template included."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(transformers.GenerationMixin, "generate", lambda self, ids, **options: ids)
    config, stage = yaml.safe_load(path.read_text(encoding="utf-8")), recipe_of(path)
    examples = make_conversations(30, 0) if stage == "sft" else make_pairs(30, 0)
    data = write_lines(tmp_path / "data.jsonl", examples)
    options = {
        "model_name_or_path": shrunken[stage], "train_data": data, "eval_data": data, "max_length": 256,
        "prepared_dir": tmp_path / "prepared", "output_dir": tmp_path / "run", "per_device_train_batch_size": 2,
        "dataloader_num_workers": 0, "precision": "fp32", "compile": "false", "use_cpu": "true",
    }  # fmt: skip
    options |= {"train_tokens": 2048, "batch_tokens": 1024} if stage == "sft" else {"train_pairs": 8, "batch_pairs": 4}
    run_recipe(stage, ["--config", str(path), *(word for k, v in options.items() for word in (f"--{k}", str(v)))])
    metrics, lineage = (json.loads((tmp_path / "run" / f"{name}.json").read_text()) for name in ("metrics", "lineage"))
    assert metrics["steps"] == 2 and lineage["configuration"]["gradient_accumulation_steps"] == 2
    for key in set(config) - set(options) - {"eval_strategy", "report_to"}:
        assert lineage["configuration"].get(key, config[key]) == config[key], key
    load_and_check_export(transformers.AutoModelForCausalLM, str(tmp_path / "run"))
    assert (tmp_path / "run" / "adapter_config.json").exists() is ("adapter" in config)


@pytest.mark.slow
@pytest.mark.parametrize("path", TASKS, ids=name_of)
def test_two_steps_of_tasks(path, tokenizers, tmp_path):
    """All keys but the model, the data and the budget are those of the YAML."""
    config, recipe = yaml.safe_load(path.read_text(encoding="utf-8")), recipe_of(path)
    causal = path.parent.name == "smollm2-135m"
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizers["clm" if causal else "mlm"])
    kinds = {True: ("llama", transformers.AutoModelForCausalLM), False: ("bert", transformers.AutoModelForMaskedLM)}
    model_type, model = kinds[causal]
    sizes = scratch_config(model_type, MODELS[model_type], tokenizer, 64)
    for part in (model.from_config(sizes), tokenizer):
        part.save_pretrained(tmp_path / "model")
    texts, labels = make_text(24, 0, 5, 20), [0.0, 0.5, 1.0] if path.stem == "classify_ratings" else ["a", "b", "c"]
    text_column, label_column = config.get("text_column", "text"), config.get("label_column", "label")
    rows = [{text_column: text, label_column: labels[i % 3]} for i, text in enumerate(texts)]
    if recipe == "tag":
        rows = [{"tokens": text.split(), "ner_tags": (["B-X", "I-X", "O"] * 9)[: len(text.split())]} for text in texts]
    if recipe == "embed":
        rows = [{"anchor": text[:20] + str(i), "positive": text[20:] + str(i)} for i, text in enumerate(texts)]
    data = write_lines(tmp_path / "data.jsonl", rows)
    unit = "pairs" if recipe == "embed" else "examples"
    options = {
        "model_name_or_path": tmp_path / "model", "train_data": data, "eval_data": data, "max_length": 48,
        "output_dir": tmp_path / "run", "per_device_train_batch_size": 2, "precision": "fp32", "use_cpu": "true",
        f"train_{unit}": 8, f"batch_{unit}": 4,
    }  # fmt: skip
    options |= {"test_data": data} if "test_data" in config else {}
    run_recipe(recipe, ["--config", str(path), *(word for k, v in options.items() for word in (f"--{k}", str(v)))])
    metrics, lineage = (json.loads((tmp_path / "run" / f"{name}.json").read_text()) for name in ("metrics", "lineage"))
    assert metrics["steps"] == 2 and metrics["eval_loss_before"] > 0
    for key in set(config) - set(options) - {"eval_strategy", "report_to", "eval_steps", "save_steps"}:
        assert lineage["configuration"].get(key, config[key]) == config[key], key
    assert (tmp_path / "run" / "adapter_config.json").exists() is ("adapter" in config)


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda path: path.stem)
def test_accelerate_files(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    if path.stem.startswith("zero"):
        assert str(config.distributed_type).endswith("DEEPSPEED")
        named = config.deepspeed_config["deepspeed_config_file"]
        assert Path(named).stem == path.stem and (ROOT / named).exists()
        assert config.deepspeed_config["zero3_init_flag"] is path.stem.startswith("zero3")
    else:
        assert config.mixed_precision == "no", "the recipe decides"


@pytest.mark.parametrize("path", DEEPSPEED, ids=lambda path: path.stem)
def test_deepspeed_files(path):
    config = json.loads(path.read_text())
    batch = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    for key in (*batch, "gradient_clipping"):
        assert config[key] == "auto"
    assert config["bf16"]["enabled"] == "auto"
    assert config["zero_allow_untested_optimizer"] is True
    if "offload_optimizer" in config["zero_optimization"]:
        assert config["zero_force_ds_cpu_optimizer"] is False, "or the optimizer is replaced, and compiled for minutes"
    zero = config["zero_optimization"]
    assert zero["stage"] == int(path.stem[4])
    if zero["stage"] == 3:
        assert zero["stage3_gather_16bit_weights_on_model_save"] is True, "or the saved model is a few MB"
