"""Loading and saving models: every weight that a checkpoint has, tables for every id, adapters from anywhere."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import MODELS, SPAN_MODELS, make_text, recipe_arguments, run_recipe, weights
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from unlabeled import UserError
from unlabeled.config import AdapterArguments, FineTuningArguments, ModelArguments
from unlabeled.data.chat_templates import set_chat_template
from unlabeled.data.collators import DataCollatorForPackedLanguageModeling
from unlabeled.data.labels import Task
from unlabeled.data.preparing import load_prepared
from unlabeled.data.tokenization import add_special_tokens, load_tokenizer, ordinary_ids, vocabulary_size
from unlabeled.hub.preconditions import check_adapter_base
from unlabeled.models.adapter_files import adapter_base
from unlabeled.models.adapters import add_lora_adapter, clear_base_name, has_own_base, save_own_base
from unlabeled.models.classification import describe_heads, load_with_new_head
from unlabeled.models.configs import scratch_config
from unlabeled.models.embedding import load_embedder
from unlabeled.models.exports import load_and_check_export
from unlabeled.models.loading import load_or_init_model, load_pretrained
from unlabeled.models.tuning import load_for_tuning, load_model_for_tuning, load_reference_model
from unlabeled.models.vocabulary import fit_to_tokenizer
from unlabeled.planner.text import measure_text
from unlabeled.training.merging import merge_adapter

KINDS = {
    "llama": ("clm", AutoModelForCausalLM), "gpt2": ("clm", AutoModelForCausalLM),
    "bert": ("mlm", AutoModelForMaskedLM), "t5": ("span", AutoModelForSeq2SeqLM),
}  # fmt: skip
CHATML = str(Path(__file__).resolve().parent.parent / "recipes" / "templates" / "chatml.jinja")


def save_model(folder: Path, model_type: str, tokenizer_folder: str, auto_class=None, **options) -> torch.nn.Module:
    """An untrained model with its tokenizer in a folder."""
    tokenizer = load_tokenizer(tokenizer_folder)
    names = ("bos", "eos", "pad", "cls", "sep")
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in names}
    if model_type == "t5":
        ids["decoder_start_token_id"] = tokenizer.pad_token_id
    sizes = (MODELS | SPAN_MODELS)[model_type] | {"vocab_size": len(tokenizer)} | options
    torch.manual_seed(0)
    model = (auto_class or KINDS[model_type][1]).from_config(AutoConfig.for_model(model_type, **ids, **sizes))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


@pytest.fixture
def saved(tokenizers, tmp_path):
    """Makes a folder of an untrained model with its tokenizer: (folder, model)."""

    def make(model_type: str, **options) -> tuple[Path, torch.nn.Module]:
        folder = tmp_path / model_type
        return folder, save_model(folder, model_type, tokenizers[KINDS[model_type][0]], **options)

    return make


def rename_weights(folder: Path, rename) -> None:
    tensors = load_file(folder / "model.safetensors")
    renamed = {rename(name): tensor for name, tensor in tensors.items()}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})


def assert_equal_weights(model: torch.nn.Module, other: torch.nn.Module) -> None:
    expected = dict(other.named_parameters())
    found = dict(model.named_parameters())
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def tuning(folder, **options) -> SimpleNamespace:
    options = {"adapter": "none", "attn_implementation": "sdpa"} | options
    return SimpleNamespace(model_name_or_path=str(folder), **options)


# --- Models of recipes ------------------------------------------------------------------------------------------------

ON_CPU = SimpleNamespace(max_length=32, device=torch.device("cpu"), precompute_ref_log_probs=False)


@pytest.mark.parametrize(("model_type", "keeps_cache"), [("llama", False), ("bert", True), ("t5", False)])
def test_model_of_a_pretraining_run(model_type, keeps_cache, saved, tokenizers):
    """From scratch and continued; the cache is off in models that can generate."""
    objective, auto_class = KINDS[model_type]
    tokenizer = load_tokenizer(tokenizers[objective])
    sizes = (MODELS | SPAN_MODELS)[model_type]
    from_scratch = ModelArguments(
        model_type=model_type, config_overrides=dict(sizes), tokenizer_name_or_path=tokenizers[objective]
    )
    torch.manual_seed(0)
    model = load_or_init_model(auto_class, from_scratch, tokenizer, ON_CPU)
    folder, expected = saved(model_type)  # drawn with the same seed
    assert_equal_weights(model, expected)
    continued = load_or_init_model(auto_class, ModelArguments(model_name_or_path=str(folder)), tokenizer, ON_CPU)
    assert_equal_weights(continued, expected)
    assert model.config.use_cache == continued.config.use_cache == keeps_cache


def tuned(saved, new_tokens: bool = True, **options) -> tuple[FineTuningArguments, PreTrainedTokenizerFast, list[str]]:
    """Arguments, tokenizer and new tokens of an SFT run on an untrained llama."""
    folder, _ = saved("llama")
    tokenizer = load_tokenizer(str(folder))
    added = set_chat_template(tokenizer, CHATML) if new_tokens else []
    return FineTuningArguments(model_name_or_path=str(folder), **options), tokenizer, added


@pytest.mark.parametrize("adapter", ["none", "lora", "rslora", "dora"])
def test_model_of_a_tuning_run(adapter, saved):
    model_args, tokenizer, new_tokens = tuned(saved, adapter=adapter, lora_r=4)
    assert new_tokens
    model = load_model_for_tuning(model_args, tokenizer, ON_CPU, new_tokens)
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer)
    assert model.config.use_cache is False
    assert model.generation_config.eos_token_id == [tokenizer.bos_token_id, tokenizer.eos_token_id]
    assert has_own_base(model) == isinstance(model, PeftModel) == (adapter != "none")
    if adapter != "none":
        config = model.peft_config["default"]
        assert (config.use_rslora, config.use_dora) == (adapter == "rslora", adapter == "dora")
        new_ids = tokenizer.convert_tokens_to_ids(new_tokens)
        assert all(rows == new_ids for rows in config.trainable_token_indices.values())
        assert load_reference_model(model_args, tokenizer, ON_CPU) is None
    else:
        reference = load_reference_model(model_args, tokenizer, ON_CPU)
        assert_equal_weights(reference, model)
        assert not any(parameter.requires_grad for parameter in reference.parameters())


def test_own_base_of_an_adapter(saved, tmp_path):
    """The base that a model remembers is the one that its adapter was trained on, and is saved beside it."""
    model_args, tokenizer, new_tokens = tuned(saved, adapter="lora", lora_r=4)
    model = load_model_for_tuning(model_args, tokenizer, ON_CPU, new_tokens)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    ids = torch.arange(8)[None]
    clear_base_name(model)
    model.save_pretrained(tmp_path / "run")
    save_own_base(model.rebuild_base(), tokenizer, str(tmp_path / "run"))
    shutil.rmtree(model_args.model_name_or_path)
    exported = load_and_check_export(AutoModelForCausalLM, str(tmp_path / "run"), model)
    with torch.no_grad():
        torch.testing.assert_close(exported(ids).logits, model.eval()(ids).logits)


def test_base_on_disk(saved):
    """Without new tokens the base is the folder that the run started from."""
    model_args, tokenizer, _ = tuned(saved, new_tokens=False, adapter="lora")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = load_for_tuning(model_args)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    adapted = add_lora_adapter(model, model_args, "CAUSAL_LM")
    assert not has_own_base(adapted)
    assert adapted.peft_config["default"].base_model_name_or_path == model_args.model_name_or_path
    assert add_lora_adapter(adapted, model_args, "CAUSAL_LM") is adapted


def test_target_modules_of_an_adapter(saved):
    folder, _ = saved("llama")
    for targets, message in (
        ("q_proj,lm_head", "TRL's loss would bypass an adapter of lm_head; leave it out"),
        ("nothing", "lora_target_modules: .*; all-linear fits any model"),
        ("q_proj,score", "lora_target_modules: all of score, a new head, is trained; leave it out"),
    ):
        model_args = AdapterArguments(model_name_or_path=str(folder), adapter="lora", lora_target_modules=targets)
        heads = ["score"] if "score" in targets else None
        with pytest.raises(UserError, match=message):
            add_lora_adapter(load_for_tuning(model_args), model_args, "CAUSAL_LM", modules_to_save=heads)


# --- Every weight that there is ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bert", "t5"])
def test_weights_of_a_wrapped_model(model_type, prefix, saved, tmp_path, capsys):
    """Loaded as if they had been saved without the wrapper, and saved again without it. gpt2's tables are tied."""
    folder, model = saved(model_type)
    rename_weights(folder, lambda name: prefix + name)
    again = load_pretrained(KINDS[model_type][1], str(folder), "sdpa")
    assert_equal_weights(again, model)
    assert again.name_or_path == str(folder)
    assert f"the weights of {folder} have the names of a wrapped model: read without" in capsys.readouterr().out
    again.save_pretrained(tmp_path / "again")
    assert not [name for name in weights(tmp_path / "again") if name.startswith(("_orig", "module", "+"))]
    assert_equal_weights(KINDS[model_type][1].from_pretrained(tmp_path / "again"), model)


def test_shards_of_a_wrapped_model(saved):
    folder, model = saved("llama")
    model.save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink()
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] = {f"module.{name}": file for name, file in index["weight_map"].items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    shards = set(index["weight_map"].values())
    assert len(shards) > 1
    for shard in shards:
        tensors = {f"module.{name}": tensor for name, tensor in load_file(folder / shard).items()}
        save_file(tensors, folder / shard, metadata={"format": "pt"})
    assert_equal_weights(load_pretrained(AutoModelForCausalLM, str(folder), "sdpa"), model)


def test_weights_of_a_wrapped_model_downstream(saved):
    folder, model = saved("bert")
    rename_weights(folder, lambda name: f"module.{name}")
    tokenizer = load_tokenizer(str(folder))
    for auto_class, words in ((AutoModelForSequenceClassification, False), (AutoModelForTokenClassification, True)):
        task = Task(["a", "b"], words)
        labeled, _ = load_with_new_head(auto_class, tuning(folder), task, tokenizer, None)
        expected = {name: p for name, p in model.bert.named_parameters() if "pooler" not in name}
        found = dict(labeled.bert.named_parameters())
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    args = SimpleNamespace(device="cpu", pooling=None, is_causal=None, max_length=32)
    embedder = load_embedder(tuning(folder), args)
    found = dict(embedder.transformers_model.named_parameters())
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    for load in (
        lambda: load_for_tuning(tuning(folder, adapter="lora")),
        lambda: load_embedder(tuning(folder, adapter="lora"), args),
    ):
        with pytest.raises(UserError, match="nobody could load an adapter onto it"):
            load()


def without(part: str):
    def change(folder: Path) -> None:
        tensors = {name: t for name, t in load_file(folder / "model.safetensors").items() if part not in name}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def half_wrapped(folder: Path) -> None:
    rename_weights(folder, lambda name: f"module.{name}" if "layers.1" in name else name)


def fewer_layers(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))


def foreign_names(folder: Path) -> None:
    rename_weights(folder, lambda name: f"student.{name}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            without("layers.1.mlp"),
            r"lacks 3 weights of the model .*, such as (model\.)?layers\.1",
        ),
        (half_wrapped, "9 of its 21 weights are named as in a wrapped model"),
        (fewer_layers, r"has 9 weights .* no place for, such as (model\.)?layers\.1"),
        (foreign_names, "lacks 20 weights"),
    ],
)
def test_checkpoint_of_another_config(change, message, saved):
    """Refused by each way to load it; with a head of labels as well."""
    folder, _ = saved("llama")
    change(folder)
    tokenizer = load_tokenizer(str(folder))
    args = SimpleNamespace(device="cpu", pooling=None, is_causal=None, max_length=32)
    for load in (
        lambda: load_pretrained(AutoModelForCausalLM, str(folder), "sdpa"),
        lambda: load_for_tuning(tuning(folder), quiet=True),
        lambda: load_with_new_head(
            AutoModelForSequenceClassification, tuning(folder), Task(["a", "b"], False), tokenizer, None
        ),
        lambda: load_embedder(tuning(folder), args),
    ):
        with pytest.raises(UserError, match=message):
            load()


def test_announced_heads(saved, tmp_path, tokenizers, capsys):
    """BERT's usual checkpoint has a pooler and a head for pairs of sentences; a bare encoder has no head at all."""
    folder, _ = saved("bert", auto_class=AutoModelForPreTraining)
    load_pretrained(AutoModelForMaskedLM, str(folder), "sdpa")
    printed = capsys.readouterr().out
    assert f"{folder} has weights for bert.pooler.dense, cls.seq_relationship, which are not used" in printed
    bare = tmp_path / "bare"
    save_model(bare, "bert", tokenizers["mlm"], auto_class=AutoModel)
    load_pretrained(AutoModelForMaskedLM, str(bare), "sdpa")
    assert "has no weights for cls.predictions" in capsys.readouterr().out
    load_pretrained(AutoModelForMaskedLM, str(bare), "sdpa", quiet=True)
    assert capsys.readouterr().out == ""
    for model_type in ("gpt2", "t5"):  # tied tables are no missing head
        folder, _ = saved(model_type)
        load_pretrained(KINDS[model_type][1], str(folder), "sdpa")
        assert capsys.readouterr().out == ""


def wider(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))


def test_mismatched_shapes(saved):
    folder, _ = saved("llama")
    wider(folder)
    tokenizer, task = load_tokenizer(str(folder)), Task(["a", "b"], False)
    for load in (
        lambda: load_pretrained(AutoModelForCausalLM, str(folder), "sdpa"),
        lambda: load_with_new_head(AutoModelForSequenceClassification, tuning(folder), task, tokenizer, None),
    ):
        with pytest.raises(UserError, match=r"6 weights whose shapes .*down_proj.weight: \(32, 64\) and not"):
            load()


def test_continued_and_new_heads(saved, tmp_path):
    folder, _ = saved("bert")
    tokenizer, task = load_tokenizer(str(folder)), Task(["a", "b"], False)
    first, heads = load_with_new_head(AutoModelForSequenceClassification, tuning(folder), task, tokenizer, None)
    assert describe_heads(heads) == "new: classifier, bert.pooler.dense"
    first.save_pretrained(tmp_path / "two")
    again, heads = load_with_new_head(
        AutoModelForSequenceClassification, tuning(tmp_path / "two"), task, tokenizer, None
    )
    assert describe_heads(heads) == "continued: classifier"
    assert_equal_weights(again, first)
    three = Task(["a", "b", "c"], False)
    other, heads = load_with_new_head(
        AutoModelForSequenceClassification, tuning(tmp_path / "two"), three, tokenizer, None
    )
    assert describe_heads(heads) == "new: classifier" and other.classifier.weight.shape == (3, 32)
    assert torch.equal(other.bert.pooler.dense.weight, first.bert.pooler.dense.weight)
    assert 0 < float(other.classifier.weight.std()) < 0.1


# --- Tables for every id ----------------------------------------------------------------------------------------------


def open_hole(folder: str, target: Path, gap: int = 300) -> PreTrainedTokenizerFast:
    """A copy of a tokenizer whose last ordinary token has an id far behind the others."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(target)
    state = json.loads((target / "tokenizer.json").read_text())
    vocabulary = state["model"]["vocab"]
    last = max(vocabulary, key=vocabulary.get)
    vocabulary[last] += gap
    (target / "tokenizer.json").write_text(json.dumps(state))
    return AutoTokenizer.from_pretrained(target)


@pytest.mark.parametrize(
    ("objective", "model_type", "gap", "stream"),
    # Ids beyond 65,535 do not fit into 16 bits, however few tokens there are.
    [("clm", "llama", 70_000, "false"), ("clm", "llama", 70_000, "true"), ("mlm", "bert", 300, "false")],
)
def test_ids_with_a_gap_from_scratch(objective, model_type, gap, stream, tokenizers, tmp_path):
    """The table has a row for the largest id, and such a run trains on that token."""
    tokenizer = open_hole(tokenizers[objective], tmp_path / "tokenizer", gap)
    size = len(tokenizer) + gap
    assert vocabulary_size(tokenizer) == size and size - 1 in ordinary_ids(tokenizer)
    last = tokenizer.convert_ids_to_tokens(size - 1).replace("Ġ", " ").strip("#")
    texts = [f"{text}{last}" if last.startswith(" ") else f"{text} {last}" for text in make_text(200, 0)]
    data = {
        "train": str(write_rows(tmp_path / "train.jsonl", [{"text": text} for text in texts])),
        "validation": str(write_rows(tmp_path / "validation.jsonl", [{"text": text} for text in texts[:4]])),
    }
    folders = {objective: str(tmp_path / "tokenizer")}
    options = {"train_tokens": 128, "batch_tokens": 64, "per_device_train_batch_size": 2, "stream": stream}
    words = recipe_arguments(objective, model_type, data, folders, tmp_path / "run", **options)
    run_recipe(f"pretrain_{objective}", words)
    table = AutoModel.from_pretrained(tmp_path / "run").get_input_embeddings().weight
    assert table.shape[0] == size
    with pytest.raises(UserError, match=f"vocab_size {size - 1} is smaller than the tokenizer's {size}"):
        scratch_config(model_type, MODELS[model_type] | {"vocab_size": size - 1}, tokenizer, 32)
    if stream == "false":
        (manifest,) = (tmp_path / "prepared").glob("*/manifest.json")
        rows = load_prepared(str(manifest.parent))[0]["train"]["input_ids"]
        assert size - 1 in {index for row in rows for index in row}


def test_ids_with_a_gap_in_a_plan(tokenizers, tmp_path):
    tokenizer = open_hole(tokenizers["clm"], tmp_path / "tokenizer")
    (tmp_path / "text.txt").write_text("the of and to")
    assert measure_text(str(tmp_path / "text.txt"), str(tmp_path / "tokenizer")).vocab_size == len(tokenizer) + 300


def test_ids_with_a_gap_continued(saved, tmp_path):
    """New rows are the mean of the old ones, up to the largest id."""
    folder, model = saved("llama")
    tokenizer = open_hole(str(folder), tmp_path / "tokenizer")
    size, before = vocabulary_size(tokenizer), model.config.vocab_size
    assert fit_to_tokenizer(model, tokenizer, 32)
    for table in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
        assert table.shape[0] == size == before + 300
        assert torch.allclose(table[before:], table[:before].mean(dim=0).expand(300, -1))


def test_random_replacement_ids(tokenizers, tmp_path):
    tokenizer = open_hole(tokenizers["mlm"], tmp_path / "tokenizer")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|unnamed|>"]})
    vocabulary = set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids)
    vocabulary -= {tokenizer.convert_tokens_to_ids("<|unnamed|>")}
    options = {"mlm_probability": 1.0, "mask_replace_prob": 0.0, "random_replace_prob": 1.0}
    collator = DataCollatorForPackedLanguageModeling(tokenizer, mlm=True, max_length=4000, **options)
    ids = np.full(4000, 50)
    masked, targets = collator.mask({"input_ids": ids, "word_starts": np.ones(4000), "epoch": 0, "row": 0})
    assert len(targets) == 4000 and set(masked.tolist()) <= vocabulary
    assert vocabulary_size(tokenizer) - 1 in set(masked.tolist())


def test_id_of_a_new_token():
    """The library numbers it from the count of the tokens: 3, which is here the id of "z"."""
    backend = Tokenizer(WordPiece({"a": 0, "b": 1, "z": 3}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, name_or_path="gaps")
    with pytest.raises(UserError, match="numbers the new token <n> as 3, the id of 'z'"):
        add_special_tokens(tokenizer, {"additional_special_tokens": ["<n>"]})
    backend = Tokenizer(WordPiece({"a": 0, "b": 1, "z": 9}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    add_special_tokens(tokenizer, {"additional_special_tokens": ["<n>"]})
    assert vocabulary_size(tokenizer) == 10 and tokenizer.convert_ids_to_tokens(9) == "z"


# --- Generation configs -----------------------------------------------------------------------------------------------


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rows_of(stage: str, count: int) -> list[dict]:
    texts = make_text(count, 3, 3, 8)
    turns = [[{"role": "user", "content": "the of"}, {"role": "assistant", "content": text}] for text in texts]
    if stage == "sft":
        return [{"messages": turn} for turn in turns]
    if stage == "dpo":
        return [
            {"prompt": turn[:1], "chosen": turn[1:], "rejected": [{"role": "assistant", "content": "a"}]}
            for turn in turns
        ]
    if stage == "embed":
        return [{"anchor": text, "positive": f"{text} {number}"} for number, text in enumerate(dict.fromkeys(texts))]
    if stage == "tag":
        return [
            {"text": text.split(), "label": ["B-X" if "o" in word else "O" for word in text.split()]} for text in texts
        ]
    return [{"text": text, "label": "o" if "o" in text else "none"} for text in texts]


def tuning_arguments(stage: str, parent: Path, folder: Path, **options) -> list[str]:
    """The command line of two steps of four rows; its data lie beside the parent."""
    units = {"sft": "tokens", "dpo": "pairs", "embed": "pairs"}
    unit, scale = units.get(stage, "examples"), 32 if stage == "sft" else 1
    options = {
        "model_name_or_path": parent, "output_dir": folder, "max_length": 32, "per_device_train_batch_size": 4,
        "train_data": write_rows(folder.parent / f"{stage}.jsonl", rows_of(stage, 40)),
        "eval_data": write_rows(folder.parent / f"{stage}_eval.jsonl", rows_of(stage, 12)),
        f"train_{unit}": 8 * scale, f"batch_{unit}": 4 * scale, "save_steps": 1, "save_strategy": "steps",
        "precision": "fp32", "logging_steps": 1, "use_cpu": "true", "learning_rate": 0.01, "warmup_steps": 0,
    } | ({"chat_template": CHATML} if stage in ("sft", "dpo") else {}) | options  # fmt: skip
    if stage == "sft":
        options |= {"prepared_dir": folder.parent / "prepared"}
    return [word for key, value in options.items() for word in (f"--{key}", str(value))]


@pytest.fixture
def no_samples(monkeypatch):
    """Sampling takes longer than all the rest of such a run."""
    import transformers

    monkeypatch.setattr(transformers.GenerationMixin, "generate", lambda self, ids, **options: ids)


def spoil_generation_config(folder: Path, **values) -> None:
    (folder / "generation_config.json").write_text(json.dumps(values))


@pytest.mark.parametrize("stage", ["clm", "span", "sft", "dpo", "classify", "tag", "embed"])
def test_repaired_generation_config(stage, saved, corpus, tokenizers, tmp_path, capsys, request):
    """Sampling parameters without do_sample, as in many published models: trained, saved, and finished."""
    folder, _ = saved("t5" if stage == "span" else "llama")
    spoil_generation_config(folder, temperature=0.6, top_p=0.9, pad_token_id=1, eos_token_id=0)
    run = tmp_path / "run"
    if stage in ("clm", "span"):
        options = {"save_steps": 1, "save_strategy": "steps", "train_tokens": 512, "warmup_steps": 0}
        words = recipe_arguments(stage, "t5", corpus, tokenizers, run, model_name_or_path=folder, **options)
        place = {name: words.index(f"--{name}") for name in ("model_type", "config_overrides")}
        words = [word for at, word in enumerate(words) if not any(p <= at < p + 2 for p in place.values())]
        run_recipe(f"pretrain_{stage}", words)
    else:
        request.getfixturevalue("no_samples")
        run_recipe(stage, tuning_arguments(stage, folder, run))
    assert (run / "metrics.json").exists()
    if stage in ("classify", "tag", "embed"):  # such models do not generate
        return
    sentence = f"generation_config.json of {folder} sets how to sample but not do_sample: it is saved with do_sample"
    assert capsys.readouterr().out.count(sentence) == 1
    config = GenerationConfig.from_pretrained(run)
    assert (config.do_sample, config.temperature, config.top_p) == (True, 0.6, 0.9)


def test_repaired_generation_config_in_merge(saved, tmp_path, monkeypatch, capsys):
    """And its lineage has no path of the machine: the base is named relative to the working directory."""
    folder, model = saved("llama")
    spoil_generation_config(folder, temperature=0.6, pad_token_id=1, eos_token_id=0)
    adapter = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    adapter.peft_config["default"].base_model_name_or_path = str(folder)
    adapter.save_pretrained(tmp_path / "adapter")
    load_tokenizer(str(folder)).save_pretrained(tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)

    merge_adapter(Path("adapter"), Path("merged"))
    assert "it is saved with do_sample" in capsys.readouterr().out
    config = GenerationConfig.from_pretrained("merged")
    assert (config.do_sample, config.temperature) == (True, 0.6)
    lineage = json.loads(Path("merged/lineage.json").read_text())
    assert lineage["configuration"]["base_model_name_or_path"] == "llama"
    assert str(tmp_path) not in Path("merged/lineage.json").read_text()


def test_invalid_generation_config(saved):
    folder, _ = saved("llama")
    spoil_generation_config(folder, num_beams=1, num_beam_groups=1, early_stopping=True, temperature=0.6)
    with pytest.raises(UserError, match=r"generation_config.json of .* cannot be saved again .*early_stopping"):
        load_pretrained(AutoModelForCausalLM, str(folder), "sdpa")


# --- Adapters from anywhere -------------------------------------------------------------------------------------------


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.tensor([[20, 21, 22, 23]])
    with torch.no_grad():
        return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids))[0]


HEADS = {
    "sft": AutoModelForCausalLM, "dpo": AutoModelForCausalLM, "classify": AutoModelForSequenceClassification,
    "tag": AutoModelForTokenClassification,
}  # fmt: skip


@pytest.mark.parametrize("stage", HEADS)
def test_moved_adapter_with_own_base(stage, saved, tmp_path, monkeypatch, no_samples):
    """By transformers and by the project, from another working directory, and after its folder has moved."""
    saved("llama")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    # A relative folder, as the recipes of the README have them.
    words = tuning_arguments(stage, Path("llama"), tmp_path / "run", adapter="lora", output_dir="run")
    run_recipe(stage, words)
    expected = logits_of(load_and_check_export(HEADS[stage], "run"))
    plain = logits_of(HEADS[stage].from_pretrained("run/base"))
    assert not torch.allclose(expected, plain, atol=1e-4)  # the adapter has learned something
    monkeypatch.chdir(tmp_path / "elsewhere")
    for name in ("run", "moved"):
        folder = tmp_path / name
        assert torch.equal(logits_of(HEADS[stage].from_pretrained(folder)), expected)
        assert torch.equal(logits_of(load_and_check_export(HEADS[stage], str(folder))), expected)
        assert adapter_base(str(folder)) == str(folder / "base")
        by_hand = PeftModel.from_pretrained(HEADS[stage].from_pretrained(folder / "base"), folder)
        assert torch.equal(logits_of(by_hand), expected)
        if name == "run":
            shutil.move(folder, tmp_path / "moved")
    if stage == "sft":  # the only one that takes the path in adapter_config.json as one of the working directory
        monkeypatch.chdir(tmp_path / "moved")
        assert torch.equal(logits_of(AutoPeftModelForCausalLM.from_pretrained(".")), expected)


def test_adapter_of_a_local_model(saved, tmp_path, monkeypatch, no_samples):
    """Where the base is as it was: the config names its absolute path, and such an adapter is never pushed."""
    saved("llama")
    monkeypatch.chdir(tmp_path)
    run_recipe("sft", tuning_arguments("sft", Path("llama"), tmp_path / "full", output_dir="full"))
    run_recipe("sft", tuning_arguments("sft", Path("full"), tmp_path / "run", output_dir="run", adapter="lora"))
    run_recipe("embed", tuning_arguments("embed", Path("llama"), tmp_path / "st", output_dir="st", adapter="lora"))
    expected = logits_of(load_and_check_export(AutoModelForCausalLM, "run"))
    vector = SentenceTransformer("st", device="cpu").encode("the of and")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    base = json.loads((tmp_path / "run" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == str(tmp_path / "full")
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "run")), expected)
    assert torch.equal(logits_of(load_and_check_export(AutoModelForCausalLM, str(tmp_path / "run"))), expected)
    assert (SentenceTransformer(str(tmp_path / "st"), device="cpu").encode("the of and") == vector).all()
    for path in (base, "/gone/from/here", "../base", "~/base", "outputs/tiny/sft"):
        with pytest.raises(UserError, match=f"while its base model is the folder {path}"):
            check_adapter_base(path)
    check_adapter_base("HuggingFaceTB/SmolLM2-135M")
    # As earlier versions wrote it: relative to the working directory of the run.
    config = tmp_path / "run" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "full"}))
    assert torch.equal(logits_of(load_and_check_export(AutoModelForCausalLM, str(tmp_path / "run"))), expected)


def test_adapter_continued_from_a_moved_adapter(saved, tmp_path, no_samples):
    """DPO goes on with the adapter of SFT, whose own base has moved with it."""
    folder, _ = saved("llama")
    run_recipe("sft", tuning_arguments("sft", folder, tmp_path / "sft", adapter="lora", lora_r=4))
    shutil.move(tmp_path / "sft", tmp_path / "moved")
    words = tuning_arguments("dpo", tmp_path / "moved", tmp_path / "dpo", adapter="lora", lora_r=4)
    run_recipe("dpo", words)
    assert adapter_base(str(tmp_path / "dpo")) == str(tmp_path / "moved" / "base")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "dpo")
    assert torch.equal(logits_of(stock), logits_of(load_and_check_export(AutoModelForCausalLM, str(tmp_path / "dpo"))))


@pytest.mark.parametrize("stage", ["sft", "classify"])
def test_push_of_adapter_with_own_base(stage, saved, tmp_path, monkeypatch):
    folder, _ = saved("llama")
    monkeypatch.setattr("unlabeled.hub.preconditions.check_token", lambda *args: "token")
    words = tuning_arguments(stage, folder, tmp_path / "run", adapter="lora", push_to_hub="true")
    with pytest.raises(UserError, match="push_to_hub: the base model of this adapter has a new head or new tokens"):
        run_recipe(stage, words)


# --- Samples ----------------------------------------------------------------------------------------------------------


def test_mask_token_in_text(corpus, tokenizers, tmp_path):
    """A byte-level tokenizer gives the name back as it was written, and would read it as one more mask."""
    tokenizer = load_tokenizer(tokenizers["clm"])
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    rows = [{"text": f"<mask> the <mask> of and to<mask> a {text} <mask>"} for text in make_text(30, 1)]
    data = corpus | {"validation": str(write_rows(tmp_path / "validation.jsonl", rows))}
    folders = {"mlm": str(tmp_path / "tokenizer")}
    run_recipe("pretrain_mlm", recipe_arguments("mlm", "bert", data, folders, tmp_path / "run", train_tokens=512))
    samples = (tmp_path / "run" / "samples.md").read_text()
    for block in samples.split("\n> ")[1:]:
        masked, table = block.split("\n\n")[:2]
        assert masked.count("<mask>") == len(table.splitlines()) - 2 > 0
