"""`scripts/plan.py --config` agrees with the plan that the recipe prints: every shipped YAML, shrunk, and variants."""

import ast
import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import transformers
import yaml
from conftest import MODELS, ROOT, SPAN_MODELS, WORDS, load_recipe, make_text
from test_finetuning import make_conversations, make_pairs, write_lines

from unlabeled.config.stages import argument_classes
from unlabeled.data.chat_templates import set_chat_template
from unlabeled.models.configs import scratch_config
from unlabeled.planner.options import PlanOptions
from unlabeled.planner.recipe_config import budget_unit, guess_recipe, plan_recipe_budget, read_recipe_config
from unlabeled.training import trainer

CHATML = str(ROOT / "recipes" / "templates" / "chatml.jinja")
CONFIGS = sorted((ROOT / "recipes" / "configs").rglob("*.yaml"))
# What continued models are shrunk to: model_type and tokenizer.
BASES = {
    "llama": ("llama", "clm", transformers.AutoModelForCausalLM),
    "minilm": ("bert", "mlm", transformers.AutoModelForMaskedLM),
    "tiny": ("modernbert", "mlm", transformers.AutoModelForMaskedLM),
    "t5": ("t5", "span", transformers.AutoModelForSeq2SeqLM),
}
UL2 = [
    {"noise_density": 0.15, "mean_noise_span_length": 3, "mode": "[NLU]"},
    {"noise_density": 0.25, "mean_noise_span_length": 1e9, "mode": "[S2S]"},
    {"noise_density": 0.5, "mean_noise_span_length": 3, "mode": "[NLG]"},
]
CHAT = {"chat_template": CHATML}
# name: the YAML and what differs from it
VARIANTS = {
    "denoisers": ("t5-base/pretrain_span", {"denoisers": UL2}),
    "fill in the middle": ("tiny/pretrain_clm", {"fim_rate": 0.5}),
    "continued, fill in the middle": ("smollm2-135m/pretrain_clm", {"fim_rate": 0.5}),
    "a DoRA with new tokens": ("smollm2-135m/sft_lora", CHAT | {"adapter": "dora", "lora_r": 4}),
    "DPO of an adapter with new tokens": ("smollm2-135m/dpo_lora", CHAT | {"adapter": "rslora"}),
    "DPO with a reference": ("tiny/dpo", {"activation_checkpointing": True}),
    "DPO, precomputed": ("tiny/dpo", {"precompute_ref_log_probs": True, "optimizer": "muon"}),
    "adapter of some layers": ("smollm2-135m/sft_lora", {"lora_target_modules": "q_proj,v_proj"}),
    "classes by an encoder-decoder": ("tiny/classify", {"base": "t5"}),
    "tags by an adapter": ("minilm/tag", {"adapter": "lora", "lora_r": 2}),
    "embeddings by a decoder": ("minilm/embed", {"base": "llama"}),
    "eager attention": ("tiny/pretrain_clm", {"attn_implementation": "eager"}),
}
CASES = {f"{path.parent.name}/{path.stem}": (f"{path.parent.name}/{path.stem}", {}) for path in CONFIGS} | VARIANTS


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, tokenizers) -> dict[str, str]:
    """Paths of data for each recipe, and of a model for each name in `BASES`; "chat" has a template."""
    folder, draw = tmp_path_factory.mktemp("plans"), np.random.default_rng(0)
    rows = {
        "pretrain": [{"text": text} for text in make_text(60, 0)],
        "sft": make_conversations(40, 0),
        "dpo": make_pairs(40, 0),
        "classify": [
            {"text": " ".join(WORDS[i : i + 1 + i % 7]), "label": ("early", "late", "never")[i % 3], "coarse": i % 3}
            for i in range(60)
        ],
        "tag": [{"tokens": WORDS[i : i + 2 + i % 6], "ner_tags": (["O", "B-LOC"] * 4)[: 2 + i % 6]} for i in range(60)],
        "embed": [
            {"anchor": " ".join(draw.permutation(WORDS)[:5]), "positive": " ".join(draw.permutation(WORDS)[:6])}
            for _ in range(40)
        ],
    }
    for row in rows["classify"]:
        row["rating"] = float(row["coarse"]) + 0.5
    paths = {name: write_lines(folder / f"{name}.jsonl", lines) for name, lines in rows.items()}
    paths["folder"] = str(folder)
    for name, (model_type, kind, auto_class) in {**BASES, "chat": BASES["llama"]}.items():
        tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizers[kind])
        if name == "chat":
            set_chat_template(tokenizer, CHATML)
        config = scratch_config(model_type, (MODELS | SPAN_MODELS)[model_type], tokenizer, 64)
        auto_class.from_config(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        paths[name] = str(folder / name)
    return paths


def shrink(name: str, changes: dict, inputs: dict, tokenizers: dict, folder: Path) -> tuple[str, Path]:
    """The recipe of a YAML, and the YAML with everything that decides its cost as it is, but smaller."""
    path = ROOT / "recipes" / "configs" / f"{name}.yaml"
    config = yaml.safe_load(path.read_text(encoding="utf-8")) | changes
    recipe = guess_recipe(str(path), config)
    unit = budget_unit(recipe)
    length = 32 if recipe.startswith("pretrain") else 64
    row = length if unit == "tokens" else 1
    data = inputs["pretrain" if recipe.startswith("pretrain") else recipe]
    config |= {
        "max_length": length, "per_device_train_batch_size": 4, f"batch_{unit}": 8 * row, f"train_{unit}": 24 * row,
        "train_data": data, "output_dir": str(folder / "run"), "prepared_dir": str(folder / "prepared"),
        "precision": "fp32", "use_cpu": True, "dataloader_num_workers": 0, "report_to": "none",
    }  # fmt: skip
    if recipe in ("classify", "tag"):
        config["text_column"] = "tokens" if recipe == "tag" else "text"
        config["test_data"] = data
    if "eval_fraction" in config:
        config["eval_fraction"] = 0.2
    else:
        config["eval_data"] = data
    config.pop("max_tokens", None)
    if "model_type" in config:
        sizes = dict((MODELS | SPAN_MODELS)[config["model_type"]])
        given = config.get("config_overrides") or {}
        kept = {key: given[key] for key in ("feed_forward_proj", "tie_word_embeddings") if key in given}
        if "layer_types" in given:
            kept["layer_types"] = given["layer_types"][-sizes["num_hidden_layers"] :]
        if "num_key_value_heads" in given:
            kept["num_key_value_heads"] = 2
        config["config_overrides"] = sizes | kept
        config["tokenizer_name_or_path"] = tokenizers[recipe.removeprefix("pretrain_")]
    else:
        family = "llama" if recipe in ("pretrain_clm", "sft", "dpo") else path.parent.name
        family = {"smollm2-135m": "llama"}.get(config.pop("base", family), config.pop("base", family))
        config["model_name_or_path"] = inputs[family]
        if recipe in ("sft", "dpo") and "chat_template" not in changes:
            config.pop("chat_template", None)
            config["model_name_or_path"] = inputs["chat"]
    file = folder / path.name
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    return recipe, file


class Planned(Exception):
    """Carries the plan out of a recipe, before anything is trained."""


def plan_of_recipe(recipe: str, file: Path, monkeypatch) -> tuple[dict, object, dict]:
    """The recipe's own plan, its arguments and its manifest."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()  # as run_recipe of conftest
    module = load_recipe(recipe)
    make_run_plan = trainer.make_run_plan

    def carry_out(model, args, manifest, *more):
        raise Planned(make_run_plan(model, args, manifest, *more), args, manifest, model)

    monkeypatch.setattr(trainer, "make_run_plan", carry_out)
    monkeypatch.setattr(sys, "argv", [recipe, "--config", str(file)])
    with pytest.raises(Planned) as planned:
        module.main()
    return planned.value.args


def plan_of_script(monkeypatch, capsys, *words) -> tuple[dict, str]:
    """The JSON of scripts/plan.py, and what it prints."""
    printed = []
    for more in ((), ("--json",)):
        monkeypatch.setattr(sys, "argv", ["plan.py", *map(str, words), *more])
        capsys.readouterr()
        runpy.run_path(str(ROOT / "scripts/plan.py"), run_name="__main__")
        printed.append(capsys.readouterr().out)
    return json.loads(printed[1]), printed[0]


@pytest.mark.parametrize("name", CASES)
def test_planner_agrees_with_recipe(name, inputs, tokenizers, tmp_path, monkeypatch, capsys):
    recipe, file = shrink(*CASES[name], inputs, tokenizers, tmp_path)
    plan, args, manifest, model = plan_of_recipe(recipe, file, monkeypatch)
    words = ["--config", file, "--device", "cpu", "--precision", "fp32"]
    if recipe in ("classify", "tag"):
        words += ["--labels", model.config.num_labels]
    if budget_unit(recipe) != "tokens":
        most, text = plan_of_script(monkeypatch, capsys, *words)
        assert most["tokens"] >= args.train_tokens and not most["exact"] and "tokens      at most " in text
        words += ["--tokens", args.train_tokens]
    found, text = plan_of_script(monkeypatch, capsys, *words)
    assert found["recipe"] == recipe
    assert found["model"]["total"] == plan["parameters"]
    assert found["model"]["matmul"] == plan["matmul_parameters"]
    assert found["model"]["embedding"] == plan["embedding_parameters"]
    adapted = "an adapter of" in plan["lines"]["model"]
    assert found["trainable"] == (plan["trainable_parameters"] if adapted else None)
    assert found["tokens"] == args.train_tokens
    assert found["steps"] == args.max_steps == 3
    assert found["flops"] == pytest.approx(plan["flops"], rel=1e-12)
    assert found["target_length"] == manifest.get("target_length", 0)
    assert found["checkpoint_bytes"] == plan["checkpoint_bytes"]
    assert found["in_memory"]["memory"] == plan["memory_estimate"]
    doubt = None
    if args.activation_checkpointing:
        doubt = "not calibrated for activation checkpointing on a CPU"
    elif recipe in ("sft", "dpo"):
        doubt = "not calibrated for fine-tuning on conversations on a CPU"
    assert found["not_calibrated"] == doubt
    for said in (text, plan["lines"]["memory"]):
        assert (f" a process ({doubt})" if doubt else " a process") in said and ("(not cal" in said) == bool(doubt)
    assert f"{found['model']['total']:,}" in text and f"checkpoint  {plan['checkpoint_bytes'] / 1e9:.2f} GB" in text


def test_target_length_of_ul2_mixture(tmp_path):
    """512 inputs of T5 have 114 targets; in UL2's mixture a text is shorter, and its longest targets are 380."""
    path = ROOT / "recipes" / "configs" / "t5-base" / "pretrain_span.yaml"
    mixture = [line.removeprefix("# ") for line in path.read_text(encoding="utf-8").splitlines() if "mode: " in line]
    config = yaml.safe_load(path.read_text(encoding="utf-8")) | {"denoisers": yaml.safe_load("\n".join(mixture))}
    assert len(config["denoisers"]) == 7
    for denoisers, target_length in ((config["denoisers"], 380), (None, 114)):
        file = tmp_path / "pretrain_span.yaml"
        file.write_text(yaml.safe_dump(config | {"denoisers": denoisers}), encoding="utf-8")
        recipe, values = read_recipe_config(str(file))
        budget = plan_recipe_budget(
            recipe,
            values,
            PlanOptions(config=str(file)),
            trainable=1,
            is_encoder_decoder=True,
            precision="bf16",
            device="cuda",
        )
        assert budget.sizes.target_length == target_length


@pytest.mark.parametrize("recipe", sorted(path.stem for path in (ROOT / "recipes").glob("*.py")))
def test_argument_classes(recipe):
    """The table of `unlabeled.config.stages` names the classes that the recipe parses, in the same order."""
    tree = ast.parse((ROOT / "recipes" / f"{recipe}.py").read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    (parse,) = [call for call in calls if call.func.id == "parse_arguments"]
    assert [cls.__name__ for cls in argument_classes(recipe)] == [argument.id for argument in parse.args]
