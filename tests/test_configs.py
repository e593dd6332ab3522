"""Every shipped YAML parses, says what hardware it is for, divides, and trains: two steps on a shrunken model."""

import json
from pathlib import Path

import pytest
import yaml
from conftest import MODELS, ROOT, recipe_arguments, run_recipe
from test_recipes import assert_complete

from unlabeled.budget import plan_steps
from unlabeled.corpus import parse_sources

CONFIGS = sorted((ROOT / "recipes" / "configs").rglob("*.yaml"))
NAMES = [f"{path.parent.name}/{path.stem}" for path in CONFIGS]
PROCESSES = {"llama-1b": 8, "llama-7b": 32}
ACCELERATE = sorted((ROOT / "ds_configs").glob("*.yaml"))
DEEPSPEED = sorted((ROOT / "ds_configs").glob("*.json"))


def test_there_are_all():
    assert set(NAMES) >= {
        "tiny/pretrain_clm", "tiny/pretrain_mlm", "gpt2-124m/pretrain_clm", "modernbert-base/pretrain_mlm",
        "llama-1b/pretrain_clm", "llama-7b/pretrain_clm",
    }  # fmt: skip
    assert {path.stem for path in ACCELERATE} == {"single", "ddp", "zero1", "zero2", "zero3", "zero3_offload"}


@pytest.mark.parametrize("path", CONFIGS, ids=NAMES)
def test_the_path_and_the_first_line_say_everything(path):
    assert (ROOT / "recipes" / f"{path.stem}.py").exists()
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# ") and ("GPU" in first or "CPU" in first)
    assert "not yet measured" in first or ("s of training" in first and ("bits per byte" in first or "loss" in first))


@pytest.mark.parametrize("path", CONFIGS, ids=NAMES)
def test_the_budget_divides(path):
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    keys = ("train_tokens", "batch_tokens", "max_length", "per_device_train_batch_size")
    budget = plan_steps(*(config[key] for key in keys), PROCESSES.get(path.parent.name, 1))
    assert budget.steps >= 100
    for key in ("train_data", "eval_data"):
        parse_sources(config.get(key) or [], key)


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=NAMES)
def test_two_steps_on_a_shrunken_model(path, corpus, tokenizers, tmp_path):
    """Everything but the size, the text and the budget is as in the YAML; all that a run leaves behind is there."""
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    objective = path.stem.removeprefix("pretrain_")
    sizes = dict(MODELS[config["model_type"]])
    if "layer_types" in config.get("config_overrides", {}):
        sizes["layer_types"] = config["config_overrides"]["layer_types"][: sizes["num_hidden_layers"]]
    options = {"train_tokens": 512, "config_overrides": json.dumps(sizes), "dataloader_num_workers": 0}
    arguments = recipe_arguments(objective, config["model_type"], corpus, tokenizers, tmp_path, **options)
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


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda path: path.stem)
def test_accelerate_files_load_and_name_files_that_exist(path):
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
def test_deepspeed_files_leave_the_batch_to_the_recipe(path):
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
