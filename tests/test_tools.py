"""The tools on a finished folder: merging an adapter, evaluating, generating; on models made here, not trained."""

import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import MODELS, ROOT, SPAN_MODELS, make_text, recipe_arguments, run_recipe
from peft import LoraConfig, LoraModel, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
)

from unlabeled.data.chat_templates import set_chat_template, stop_at_end_of_turn
from unlabeled.errors import UserError
from unlabeled.models.adapters import new_token_rows
from unlabeled.models.configs import scratch_config
from unlabeled.models.generation import fill_spans, load_for_generation, reply
from unlabeled.models.loading import init_model
from unlabeled.models.vocabulary import fit_to_tokenizer
from unlabeled.training import merging

TEMPLATE = str(ROOT / "recipes/templates/chatml.jinja")
METHODS = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}


def run(name: str, *words) -> None:
    """A script as `python scripts/NAME.py` runs it, in this process."""
    before, sys.argv = sys.argv, [name, *map(str, words)]
    try:
        runpy.run_path(str(ROOT / "scripts" / f"{name}.py"), run_name="__main__")
    finally:
        sys.argv = before


def refused(capsys, name: str, *words) -> str:
    """What a script says when it leaves with status 2, which is one line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        run(name, *words)
    said = capsys.readouterr().err.strip().splitlines()
    assert left.value.code == 2 and len(said) == 1 and said[0].startswith("error: "), said
    return said[0]


def make_model(folder: Path, tokenizer, model_type: str = "llama", auto_class=AutoModelForCausalLM, **overrides):
    """A model of random weights; large ones, so that it is sure of something."""
    torch.manual_seed(0)
    sizes = MODELS[model_type] | {"initializer_range": 0.3} if model_type in MODELS else SPAN_MODELS[model_type]
    config = scratch_config(model_type, sizes | overrides, tokenizer, 64)
    model = init_model(auto_class, config, "sdpa").eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def make_adapter(folder: Path, base: Path, tokenizer, grow: bool = False, **options) -> PeftModel:
    """An adapter as recipes/sft.py leaves one, of random weights; `grow`: with a chat template and its new tokens."""
    model = AutoModelForCausalLM.from_pretrained(base)
    if grow:
        new = set_chat_template(tokenizer, TEMPLATE)
        assert fit_to_tokenizer(model, tokenizer, 64) | stop_at_end_of_turn(model, tokenizer)
        options["trainable_token_indices"] = new_token_rows(model, tokenizer.convert_tokens_to_ids(new))
        base = folder / "base"
        model.save_pretrained(base)
    config = LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 16, "target_modules": "all-linear"} | options)
    model = get_peft_model(model, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = 0.1 * torch.randn_like(parameter)
                parameter.copy_(parameter * (1 + noise) if "magnitude" in name else parameter + noise)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.eval()


@pytest.fixture
def tokenizer(tokenizers):
    return AutoTokenizer.from_pretrained(tokenizers["clm"])


# --- merge_adapter --------------------------------------------------------------------------------------------------

CASES = [
    (model_type, tied, method, grow)
    for model_type in ("llama", "gpt2")
    for tied in (True, False)
    for method in METHODS
    for grow in (False, True)
]


@pytest.mark.parametrize(("model_type", "tied", "method", "grow"), CASES)
def test_merged_logits(model_type, tied, method, grow, tokenizer, tmp_path):
    base, folder, out = tmp_path / "base", tmp_path / "adapter", tmp_path / "merged"
    plain = make_model(base, tokenizer, model_type, tie_word_embeddings=tied)
    adapted = make_adapter(folder, base, tokenizer, grow=grow, **METHODS[method])
    run("merge_adapter", folder, "--output_dir", out)

    merged, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.arange(len(tokenizer))[None, : 4 * (len(tokenizer) // 4)].reshape(4, -1)  # every token but the last few
    ids = torch.cat([ids, torch.arange(len(tokenizer) - ids.shape[1], len(tokenizer))[None]])
    with torch.no_grad():
        expected, found = adapted(ids).logits, merged(ids).logits
        moved = (found[..., : plain.config.vocab_size] - plain(ids.clamp(max=plain.config.vocab_size - 1)).logits).abs()
    assert found.shape[-1] == len(tokenizer)
    assert (found - expected).abs().max() < 1e-4 < 0.1 < moved[:4].max(), "and the adapter does something"

    first, last = merged.get_input_embeddings().weight, merged.get_output_embeddings().weight
    assert (first is last) == tied == merged.config.tie_word_embeddings
    assert not tied or not ({"lm_head.weight"} & set(merged.state_dict()) - set(merged.all_tied_weights_keys))
    assert not (out / "adapter_config.json").exists() and merged.config.use_cache
    assert json.loads((out / "metrics.json").read_text())["logits_difference"] < 1e-4


def test_merged_folder_content(tokenizer, tmp_path, capsys):
    base, folder, out = tmp_path / "base", tmp_path / "adapter", tmp_path / "merged"
    make_model(base, tokenizer)
    make_adapter(folder, base, tokenizer, grow=True)
    below = {"stage": "pretrain_clm", "parent": None, "plan": {"parameters": 1}, "metrics": {"eval_loss": 3.0}}
    (folder / "lineage.json").write_text(json.dumps(below | {"configuration": {}, "data": {}, "versions": {}}))
    out.mkdir()  # an empty folder is no obstacle
    shutil.copytree(folder, f"{out}.incomplete-merge")  # nor what a merge left that was killed
    run("merge_adapter", folder, "--output_dir", out)
    assert "merged: " in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.glob("[!.]*")) == ["adapter", "base", "merged"]
    assert sorted(os.listdir(out)) == [
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "lineage.json",
        "metrics.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]

    merged, again = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    lineage = json.loads((out / "lineage.json").read_text())
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics == lineage["metrics"] and metrics["parameters"] == merged.num_parameters()
    assert lineage["stage"] == "merge" and lineage["parent"]["lineage"]["stage"] == "pretrain_clm"
    assert list(lineage["parent"]["weights"]) == ["adapter_model.safetensors"]
    card = (out / "README.md").read_text()
    assert "\nlibrary_name: transformers\n" in card and "# merged\n" in card and '"merged"' in card
    assert "next-token prediction, then merging" in card and str(tmp_path) not in card

    # The tokenizer, the template and where a turn ends have come along, and the old end still is one.
    text = "the people of state"
    chat = [{"role": "user", "content": text}]
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.apply_chat_template(chat, tokenize=False) == tokenizer.apply_chat_template(chat, tokenize=False)
    ends = GenerationConfig.from_pretrained(out).eos_token_id
    assert again.eos_token == "<|im_end|>"
    assert ends == GenerationConfig.from_pretrained(folder / "base").eos_token_id
    assert again.eos_token_id in ends and again.bos_token_id in ends

    changed = (out / "model.safetensors").stat().st_mtime_ns
    run("merge_adapter", folder, "--output_dir", out)
    assert "holds this adapter, merged" in capsys.readouterr().out
    assert (out / "model.safetensors").stat().st_mtime_ns == changed
    make_adapter(folder, base, tokenizer)
    assert "holds something other" in refused(capsys, "merge_adapter", folder, "--output_dir", out)
    assert (out / "model.safetensors").stat().st_mtime_ns == changed


@pytest.mark.parametrize("together", [True, False])
def test_merge_of_tied_embeddings(together, tokenizer, tmp_path, capsys):
    """Learned together they stay one table; learned apart they become two, as the configuration says (peft#2777)."""
    make_model(tmp_path / "base", tokenizer, tie_word_embeddings=True)
    how = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": together}
    adapted = make_adapter(tmp_path / "adapter", tmp_path / "base", tokenizer, **how)
    run("merge_adapter", tmp_path / "adapter", "--output_dir", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tables = [merged.get_input_embeddings().weight, merged.get_output_embeddings().weight]
    assert (tables[0] is tables[1]) == merged.config.tie_word_embeddings == together
    assert ("no longer tied" in capsys.readouterr().out) != together
    ids = torch.arange(100)[None]
    with torch.no_grad():
        assert (merged(ids).logits - adapted(ids).logits).abs().max() < 1e-4


def test_refused_untied_embeddings(tokenizer, tmp_path, monkeypatch):
    """Two tables under a configuration that calls them tied: reloading makes one of them (transformers#45127)."""
    make_model(tmp_path / "base", tokenizer, tie_word_embeddings=True)
    make_adapter(tmp_path / "adapter", tmp_path / "base", tokenizer, modules_to_save=["embed_tokens"])
    merge_and_unload = LoraModel.merge_and_unload

    def as_once(model):
        merged = merge_and_unload(model)
        merged.config.tie_word_embeddings = True
        return merged

    monkeypatch.setattr(LoraModel, "merge_and_unload", as_once)
    words = (tmp_path / "adapter", tmp_path / "merged")
    with pytest.raises(UserError, match="tied embeddings came apart in memory"):
        merging.merge_adapter(*words)
    check_tied_embeddings = merging.check_tied_embeddings
    monkeypatch.setattr(
        merging,
        "check_tied_embeddings",
        lambda model, where: where == "on disk" and check_tied_embeddings(model, where),
    )
    with pytest.raises(UserError, match="tied embeddings came apart on disk"):
        merging.merge_adapter(*words)
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base"]


def test_refused_changed_logits(tokenizer, tmp_path, capsys):
    """LoRA of an input table that is the output table too: only merged does it act on both (peft#2777)."""
    make_model(tmp_path / "base", tokenizer, tie_word_embeddings=True)
    make_adapter(tmp_path / "adapter", tmp_path / "base", tokenizer, target_modules=["embed_tokens"])
    said = refused(capsys, "merge_adapter", tmp_path / "adapter", "--output_dir", tmp_path / "merged")
    assert "merging changes logits by" in said and "in memory" in said
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_interrupted_merge(error, tokenizer, tmp_path, monkeypatch):
    make_model(tmp_path / "base", tokenizer)
    make_adapter(tmp_path / "adapter", tmp_path / "base", tokenizer)

    def stop(*args):
        assert next(tmp_path.glob("merged.incomplete-*/model.safetensors"))
        raise error

    monkeypatch.setattr(merging, "check_tied_embeddings", lambda model, where: where == "on disk" and stop())
    expected = KeyboardInterrupt if error is KeyboardInterrupt else UserError
    with pytest.raises(expected, match="No space left" if expected is not KeyboardInterrupt else None):
        merging.merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.glob("[!.]*")) == ["adapter", "base"]


@pytest.mark.slow
def test_killed_merge(tokenizer, tmp_path):
    make_model(tmp_path / "base", tokenizer, num_hidden_layers=24)
    make_adapter(tmp_path / "adapter", tmp_path / "base", tokenizer)
    out = tmp_path / "merged"
    command = [sys.executable, ROOT / "scripts/merge_adapter.py", tmp_path / "adapter", "--output_dir", out]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not list(tmp_path.glob("merged.incomplete-*")) and process.poll() is None:
            time.sleep(0.001)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert list(tmp_path.glob("merged.incomplete-*")) and not out.exists()
    run("merge_adapter", tmp_path / "adapter", "--output_dir", out)
    assert (out / "metrics.json").exists() and not list(tmp_path.glob("merged.incomplete-*"))


def test_refused_merges(tokenizer, tmp_path, capsys):
    out = ("--output_dir", tmp_path / "merged")
    assert "there is no folder" in refused(capsys, "merge_adapter", tmp_path / "nowhere", *out)
    make_model(tmp_path / "base", tokenizer)
    assert "a whole model, nothing to merge" in refused(capsys, "merge_adapter", tmp_path / "base", *out)
    (tmp_path / "empty").mkdir()
    assert "no adapter, nothing to merge" in refused(capsys, "merge_adapter", tmp_path / "empty", *out)
    make_adapter(tmp_path / "adapter", tmp_path / "base", tokenizer)
    words = (tmp_path / "adapter", "--output_dir", tmp_path / "base")
    assert "holds something other" in refused(capsys, "merge_adapter", *words)
    (tmp_path / "adapter/run.json").write_text("{}")
    assert "unfinished run" in refused(capsys, "merge_adapter", tmp_path / "adapter", *out)
    (tmp_path / "adapter/run.json").unlink()
    (tmp_path / "classifier").mkdir()
    (tmp_path / "classifier/adapter_config.json").write_text('{"task_type": "SEQ_CLS"}')
    words = (tmp_path / "classifier", *out)
    assert "an adapter for SEQ_CLS, and CAUSAL_LM can be merged" in refused(capsys, "merge_adapter", *words)
    os.rename(tmp_path / "base", tmp_path / "gone")
    assert "is not there; put it back" in refused(capsys, "merge_adapter", tmp_path / "adapter", *out)
    assert not (tmp_path / "merged").exists()


# --- evaluate_model -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "model_type"), [("clm", "gpt2"), ("mlm", "modernbert"), ("span", "t5")])
def test_evaluation_equals_recipe(objective, model_type, corpus, tokenizers, tmp_path):
    out = tmp_path / "run"
    run_recipe(f"pretrain_{objective}", recipe_arguments(objective, model_type, corpus, tokenizers, out))
    run("evaluate_model", out, "--data", corpus["validation"], "--max_length", 32, "--output_dir", tmp_path / "figures")
    expected, found = (json.loads((folder / "metrics.json").read_text()) for folder in (out, tmp_path / "figures"))
    for key in ("eval_loss", "perplexity", "unigram_entropy", "targets", *["bits_per_byte"] * (objective != "span")):
        assert found[key] == pytest.approx(expected[key], rel=1e-6), key


def test_evaluation_of_an_adapter(tokenizer, corpus, tmp_path):
    make_model(tmp_path / "base", tokenizer)
    make_adapter(tmp_path / "adapter", tmp_path / "base", tokenizer, grow=True)
    run("merge_adapter", tmp_path / "adapter", "--output_dir", tmp_path / "merged")
    found = {}
    for name in ("base", "adapter", "merged"):
        out = tmp_path / f"figures-{name}"
        run("evaluate_model", tmp_path / name, "--data", corpus["validation"], "--max_length", 64, "--output_dir", out)
        found[name] = json.loads((out / "metrics.json").read_text())
    assert found["merged"] == pytest.approx(found["adapter"], rel=1e-5)
    assert abs(found["base"]["bits_per_byte"] - found["adapter"]["bits_per_byte"]) > 1e-3
    # The same targets: a document ends as it did in pretraining, and not with the end of a turn.
    assert found["adapter"]["unigram_entropy"] == pytest.approx(found["base"]["unigram_entropy"], rel=1e-12)


def test_bits_per_byte_of_uniform_model(tokenizer, tmp_path, capsys):
    """Equal probability for each token: log2(vocabulary) bits for each token and the end."""
    model = make_model(tmp_path / "model", tokenizer, "gpt2")
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("the of and to a in that")
    run("evaluate_model", tmp_path / "model", "--data", tmp_path / "text.txt", "--output_dir", tmp_path / "out")
    found = json.loads((tmp_path / "out/metrics.json").read_text())
    targets = len(tokenizer("the of and to a in that")["input_ids"]) + 1
    bits = torch.log2(torch.tensor(float(len(tokenizer)))).item()
    assert found["targets"] == targets and found["perplexity"] == pytest.approx(len(tokenizer))
    assert found["bits_per_byte"] == pytest.approx(bits * targets / found["bytes"]) and found["bytes"] == 23
    assert found["max_length"] == 128, "the model's positions"
    assert f"{found['bits_per_byte']:.4f} bits per byte" in capsys.readouterr().out


def test_evaluation_without_pad_token(tokenizer, corpus, tmp_path):
    """Padding is never looked at; a vocabulary that grew for it would change the loss."""
    losses = []
    for name, pad in (("with", tokenizer.pad_token), ("without", tokenizer.eos_token)):
        make_model(tmp_path / name, tokenizer)
        tokenizer.pad_token = pad
        if name == "without":  # in its vocabulary neither
            file = tmp_path / name / "tokenizer.json"
            file.write_text(file.read_text().replace("<|pad|>", "<|other|>"))
            settings = json.loads((tmp_path / name / "tokenizer_config.json").read_text())
            (tmp_path / name / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": pad}))
        run("evaluate_model", tmp_path / name, "--data", corpus["validation"], "--output_dir", tmp_path / f"{name}-out")
        losses.append(json.loads((tmp_path / f"{name}-out/metrics.json").read_text())["eval_loss"])
    assert losses[0] == losses[1]


TASK = {  # keys as in the YAML files of lm-eval
    "task": "next_words",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "questions.jsonl"}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "choices",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


@pytest.mark.slow
def test_lm_eval_task(tokenizer, corpus, tmp_path, capsys):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install lm_eval==0.4.13")
    model = make_model(tmp_path / "model", tokenizer)
    questions = [
        ("the of and", [" to a", " off year"]),
        ("people how", [" great", " too little"]),
        ("I", [" this", " x"]),
    ]

    def nats(text: str, answer: str) -> float:
        ids, length = tokenizer(text + answer, return_tensors="pt")["input_ids"], len(tokenizer(text)["input_ids"])
        with torch.no_grad():
            shares = model(ids).logits[0].log_softmax(-1)
        return -float(shares[:-1].gather(1, ids[0, 1:, None])[length - 1 :].sum())

    chosen = [min(range(2), key=lambda i, q=q, c=c: nats(q, c[i])) for q, c in questions]
    answers = [chosen[0], chosen[1], 1 - chosen[2]]  # so that two of three are what the model prefers
    rows = [{"question": q, "choices": c, "answer": a} for (q, c), a in zip(questions, answers, strict=True)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "task.json").write_text(json.dumps(TASK))
    words = (tmp_path / "model", "--data", corpus["validation"], "--tasks", tmp_path / "task.json")
    run("evaluate_model", *words, "--output_dir", tmp_path / "out")
    assert json.loads((tmp_path / "out/metrics.json").read_text())["next_words_acc"] == pytest.approx(2 / 3)
    assert "next_words_acc 0.6667" in capsys.readouterr().out
    make_adapter(tmp_path / "adapter", tmp_path / "model", tokenizer)
    run("evaluate_model", tmp_path / "adapter", *words[1:])
    assert "next_words_acc" in capsys.readouterr().out
    (tmp_path / "task.json").write_text(json.dumps(TASK | {"output_type": "guess"}))
    assert "lm-eval stops with" in refused_last(capsys, "evaluate_model", *words)
    (tmp_path / "task.json").write_text(json.dumps(TASK | {"dataset_kwargs": {"data_files": {"test": "no.jsonl"}}}))
    assert "which is not there" in refused(capsys, "evaluate_model", *words)
    (tmp_path / "task.json").write_text("[]")
    assert "lacks task or dataset_path" in refused(capsys, "evaluate_model", *words)


def refused_last(capsys, name: str, *words) -> str:
    """As `refused`, where a library writes to stderr too."""
    with pytest.raises(SystemExit) as left:
        run(name, *words)
    assert left.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_refused_evaluations(tokenizer, tokenizers, corpus, tmp_path, capsys, monkeypatch):
    folder, data = tmp_path / "model", ("--data", corpus["validation"])
    assert "there is no folder" in refused(capsys, "evaluate_model", tmp_path / "nowhere", *data)
    folder.mkdir()
    assert "holds no model" in refused(capsys, "evaluate_model", folder, *data)
    make_model(folder, tokenizer)
    assert "no file matches" in refused(capsys, "evaluate_model", folder, "--data", tmp_path / "*.txt")
    assert "no column 'story'" in refused(capsys, "evaluate_model", folder, *data, "--text_column", "story")
    assert "longer than the model's 2048" in refused(capsys, "evaluate_model", folder, *data, "--max_length", 4096)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert "pip install lm_eval" in refused(capsys, "evaluate_model", folder, *data, "--tasks", "task.json")
    (tmp_path / "file").write_text("")
    words = ("--max_length", 32, "--output_dir", tmp_path / "file")
    assert "cannot write the metrics" in refused(capsys, "evaluate_model", folder, *data, *words)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "cannot be loaded" in refused(capsys, "evaluate_model", folder, *data)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaModel"]}))
    assert "neither a causal nor a masked" in refused(capsys, "evaluate_model", folder, *data)


# --- generate -------------------------------------------------------------------------------------------------------


def constant(folder: Path, model, token_id: int) -> None:
    """Make a GPT-2 say one token, whatever it reads."""
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.zero_()[0] = 1.0
        model.transformer.wte.weight[:, 0] = 0.0
        model.transformer.wte.weight[token_id, 0] = 50.0
    model.save_pretrained(folder)


def test_generate_continues(tokenizer, tmp_path, capsys):
    model = make_model(tmp_path / "model", tokenizer)
    expected = [reply(model, tokenizer, prompt, 12) for prompt in ("the of", "people")]
    run("generate", tmp_path / "model", "the of", "people", "--max_new_tokens", 12)
    assert capsys.readouterr().out == f"the of{expected[0]}\npeople{expected[1]}\n"
    drawn = []
    for seed in (1, 1, 2):
        run("generate", tmp_path / "model", "the of", "--max_new_tokens", 12, "--sample", "--seed", seed)
        drawn.append(capsys.readouterr().out)
    assert drawn[0] == drawn[1] != drawn[2]


def test_generate_from_long_prompt(tokenizer, tmp_path, capsys):
    """GPT-2 has 128 positions and a table of them, which a longer text would run out of."""
    make_model(tmp_path / "model", tokenizer, "gpt2")
    prompt = " ".join(make_text(3, 0, low=100, high=101))
    assert len(tokenizer(prompt)["input_ids"]) > 200
    run("generate", tmp_path / "model", prompt, "--max_new_tokens", 1000)
    assert capsys.readouterr().out.startswith(prompt)


def test_generate_fills_masks(tokenizers, tmp_path, capsys):
    tokenizer = AutoTokenizer.from_pretrained(tokenizers["mlm"])
    model = make_model(tmp_path / "model", tokenizer, "bert", AutoModelForMaskedLM)
    run("generate", tmp_path / "model", "the people _ state and [MASK].")
    text, first, second = capsys.readouterr().out.splitlines()
    inputs = tokenizer("the people [MASK] state and [MASK].", return_tensors="pt")
    with torch.no_grad():
        best = model(**inputs).logits[0].softmax(-1)[inputs["input_ids"][0] == tokenizer.mask_token_id].max(-1)
    for line, share, token in zip((first, second), best.values, best.indices, strict=True):
        assert line.startswith(f"  {tokenizer.decode([token])} {share:.0%}, ") and line.count(", ") >= 4
    assert "_" not in text and "[MASK]" not in text and text.startswith("the people")
    assert "nothing to fill" in refused(capsys, "generate", tmp_path / "model", "snake_case")
    assert "leave out --chat" in refused(capsys, "generate", tmp_path / "model", "the _", "--chat")
    assert "longer than the model's 128" in refused(capsys, "generate", tmp_path / "model", "the _ " * 200)


def test_encoder_decoder(tokenizers, corpus, tmp_path, capsys):
    tokenizer = AutoTokenizer.from_pretrained(tokenizers["span"])
    model = make_model(tmp_path / "model", tokenizer, "t5", AutoModelForSeq2SeqLM)
    sentinels = tokenizer.convert_tokens_to_ids(["<extra_id_0>", "<extra_id_1>"])
    words = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in (" the", " of and")]
    answer = [0, sentinels[0], *words[0], sentinels[1], *words[1], tokenizer.eos_token_id, *words[0]]
    asked = []

    def generate_known(ids, **how):
        asked.append((ids.tolist()[0], how["max_new_tokens"], how["do_sample"]))
        return torch.tensor([answer])

    model.generate = generate_known
    for prompt in ("the people _ state and _.", "the people <extra_id_0> state and <extra_id_1>."):
        assert fill_spans(model, tokenizer, prompt) == "the people the state and of and."
    assert asked[0] == asked[1] == (tokenizer("the people<extra_id_0> state and<extra_id_1>.")["input_ids"], 100, False)
    assert asked[0][0][-1] == tokenizer.eos_token_id
    assert fill_spans(model, tokenizer, "_ a _ to _") == " the a of and to<extra_id_2>"

    data = ("--data", corpus["validation"], "--max_length", 32)
    run("generate", tmp_path / "model", "the _ and", "--max_new_tokens", 5, "--sample", "--seed", 1)
    said = capsys.readouterr().out
    assert said.startswith("the") and " and" in said and "_ " not in said
    assert "leaves out 0 spans" in refused(capsys, "generate", tmp_path / "model", "snake_case")
    assert "leave out --chat" in refused(capsys, "generate", tmp_path / "model", "the _", "--chat")
    with torch.no_grad():
        model.shared.weight.zero_()  # tied: knows nothing
    model.save_pretrained(tmp_path / "model")
    run("evaluate_model", tmp_path / "model", *data, "--output_dir", tmp_path / "out")
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert metrics["perplexity"] == pytest.approx(len(tokenizer), rel=1e-5) and "bits_per_byte" not in metrics
    assert "bits per byte" not in capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(tokenizers["clm"])
    make_model(tmp_path / "bare", tokenizer, "t5", AutoModelForSeq2SeqLM)
    assert "lacks the sentinels" in refused(capsys, "evaluate_model", tmp_path / "bare", *data)


@pytest.mark.parametrize(("objective", "options"), [("span", {}), ("clm", {"fim_rate": 0.5})])
def test_text_prepared_ahead(objective, options, corpus, tokenizers, tmp_path, capsys):
    model_type = {"span": "t5", "clm": "llama"}[objective]
    options |= {"prepared_dir": tmp_path / "prepared", "train_tokens": 256}
    arguments = recipe_arguments(objective, model_type, corpus, tokenizers, tmp_path / "run", **options)
    run("prepare_data", *arguments, "--objective", objective)
    folder = capsys.readouterr().out.splitlines()[-1]
    run_recipe(f"pretrain_{objective}", arguments)
    assert [str(path) for path in (tmp_path / "prepared").iterdir()] == [folder]


def test_generate_answer(tokenizer, tmp_path, capsys):
    """Where the model says that its turn ends, generation stops: through an adapter, and when it is merged."""
    make_model(tmp_path / "base", tokenizer, "gpt2")
    make_adapter(tmp_path / "adapter", tmp_path / "base", tokenizer, grow=True, target_modules=["c_fc"])
    run("merge_adapter", tmp_path / "adapter", "--output_dir", tmp_path / "merged")
    for name in ("adapter", "merged"):
        model, again, masked = load_for_generation(str(tmp_path / name), "cpu")
        assert not masked and again.eos_token_id in model.generation_config.eos_token_id
        capsys.readouterr()
        run("generate", tmp_path / name, "the people", "--max_new_tokens", 12)
        assert capsys.readouterr().out == reply(model, again, "the people", 12) + "\n"
    end, other = again.eos_token_id, again.convert_tokens_to_ids("e")
    for token, length in ((end, 1), (other, 40)):
        constant(tmp_path / "merged", model, token)
        ids = torch.tensor([again("the people")["input_ids"]])
        said = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").generate(ids, max_new_tokens=40)
        assert said.shape[1] - ids.shape[1] == length
        run("generate", tmp_path / "merged", "the people", "--max_new_tokens", 40)
        assert capsys.readouterr().out == ("\n" if token == end else "e" * 40 + "\n")


def test_chat_history(tokenizer, tmp_path, capsys, monkeypatch):
    make_model(tmp_path / "model", tokenizer)
    assert "leave out --chat" in refused(capsys, "generate", tmp_path / "model", "x", "--chat")
    make_adapter(tmp_path / "adapter", tmp_path / "model", tokenizer, grow=True)
    model, again, _ = load_for_generation(str(tmp_path / "adapter"), "cpu")
    said, answers = [], []
    for turn in ("the of", "people"):
        said.append({"role": "user", "content": turn})
        answers.append(reply(model, again, said, 8))
        said.append({"role": "assistant", "content": answers[-1]})
    apart = reply(model, again, "people", 8)
    assert apart != answers[1], "or the test would prove nothing"
    capsys.readouterr()
    run("generate", tmp_path / "adapter", "the of", "people", "--max_new_tokens", 8, "--chat")
    assert capsys.readouterr().out == "\n".join(answers) + "\n"
    run("generate", tmp_path / "adapter", "the of", "people", "--max_new_tokens", 8)
    assert capsys.readouterr().out == f"{answers[0]}\n{apart}\n"
    lines = iter(["the of", "people"])
    monkeypatch.setattr("builtins.input", lambda shown: next(lines, None) or (_ for _ in ()).throw(EOFError))
    run("generate", tmp_path / "adapter", "--max_new_tokens", 8)
    assert capsys.readouterr().out == "\n".join(answers) + "\n"


def test_refused_generation(tokenizer, tmp_path, capsys, monkeypatch):
    assert "there is no folder" in refused(capsys, "generate", tmp_path / "nowhere", "x")
    make_model(tmp_path / "model", tokenizer)
    assert "--max_new_tokens is 0" in refused(capsys, "generate", tmp_path / "model", "x", "--max_new_tokens", 0)
    monkeypatch.setattr("sys.stdin", open(os.devnull))  # noqa: SIM115
    assert "there is no PROMPT" in refused(capsys, "generate", tmp_path / "model")
    shutil.rmtree(tmp_path / "model")
    shutil.copytree(ROOT / "recipes/templates", tmp_path / "model")
    assert re.search("holds no model; name the output_dir", refused(capsys, "generate", tmp_path / "model", "x"))
