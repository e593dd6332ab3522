"""Every key of Trainer, TRL and sentence-transformers is honoured, or refused by name. A new key fails a test."""

import json
import re
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import ROOT, recipe_arguments, run_recipe
from sentence_transformers import SentenceTransformerTrainingArguments
from test_finetuning import CHATML, make_pairs, write_lines
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl import DPOConfig, SFTConfig

from unlabeled import UserError
from unlabeled.config import DownstreamArguments, DPOArguments, EmbedArguments, PretrainingArguments, SFTArguments
from unlabeled.config.training import default_of
from unlabeled.config.tuning import PAIR_LOSSES
from unlabeled.data.tokenization import load_tokenizer
from unlabeled.models.optimizers import OptimizerFactory
from unlabeled.training.progress import TokenProgressCallback
from unlabeled.training.timer import TrainingTimer

THEIRS = {
    PretrainingArguments: TrainingArguments,
    SFTArguments: SFTConfig,
    DPOArguments: DPOConfig,
    DownstreamArguments: TrainingArguments,
    EmbedArguments: SentenceTransformerTrainingArguments,
}

# Keys that our code reads, or implements instead of Trainer, and the test that shows that they are honoured.
HONOURED = {
    "output_dir": "test_recipes.py::test_what_is_left_behind",
    "per_device_train_batch_size": "test_equality.py::test_gradient_accumulation",
    "per_device_eval_batch_size": "test_evaluation.py::test_batch_size",
    "learning_rate": "test_schedules.py::test_rates_of_a_run",
    "lr_scheduler_type": "test_schedules.py::test_rates_of_all_schedules",
    "lr_scheduler_kwargs": "test_schedules.py::test_rates_of_all_schedules",
    "warmup_steps": "test_schedules.py::test_rates_of_a_run",
    "weight_decay": "test_options.py::test_optimizer_keys",
    "adam_beta1": "test_options.py::test_optimizer_keys",
    "adam_beta2": "test_options.py::test_optimizer_keys",
    "adam_epsilon": "test_options.py::test_optimizer_keys",
    "logging_strategy": "test_schedules.py::test_strategies_by_epoch",
    "eval_strategy": "test_schedules.py::test_strategies_by_epoch",
    "eval_delay": "test_schedules.py::test_epoch_ends",
    "eval_on_start": "test_schedules.py::test_strategies_by_epoch",
    "save_strategy": "test_schedules.py::test_strategies_by_epoch",
    "save_total_limit": "test_checkpoints.py::test_deletion_of_old_checkpoints",
    "log_on_each_node": "test_options.py::test_progress_keys",
    "disable_tqdm": "test_options.py::test_progress_keys",
    "report_to": "test_recipes.py::test_trackers",
    "seed": "test_recipes.py::test_the_seed_is_the_whole_difference",
    "torch_compile_backend": "test_options.py::test_compilation_keys",
    "torch_compile_mode": "test_options.py::test_compilation_keys",
    "activation_checkpointing": "test_recipes.py::test_activation_checkpointing_and_workers_change_nothing",
    "dataloader_num_workers": "test_optimizations.py::test_data_loader_workers",
    "use_cpu": "test_options.py::test_optimizer_keys",
    "ddp_backend": "test_equality.py::test_two_processes",
    "deepspeed": "test_equality.py::test_two_processes",
    "ddp_timeout": "test_guards.py::test_watchdog_ends_a_stalled_run",
    "push_to_hub": "test_hub.py::test_hub_strategies",
    "hub_strategy": "test_hub.py::test_hub_strategies",
    "hub_model_id": "test_hub.py::test_hub_strategies",
    "hub_token": "test_secrets.py::test_secret_in_a_yaml_or_on_a_command_line",
    "hub_private_repo": "test_hub.py::test_hub_strategies",
    "hub_always_push": "test_hub.py::test_hub_strategies",
    "hub_revision": "test_hub.py::test_hub_strategies",
    # SFTConfig and DPOConfig
    "max_length": "test_finetuning.py::test_packed_conversations_do_not_see_each_other",
    "beta": "test_options.py::test_evaluation_loss_equals_training_loss",
    "loss_type": "test_options.py::test_evaluation_loss_equals_training_loss",
    "loss_weights": "test_options.py::test_evaluation_loss_equals_training_loss",
    "ld_alpha": "test_options.py::test_evaluation_loss_equals_training_loss",
    "f_divergence_type": "test_options.py::test_evaluation_loss_equals_training_loss",
    "f_alpha_divergence_coef": "test_options.py::test_evaluation_loss_equals_training_loss",
    "label_smoothing": "test_options.py::test_evaluation_loss_equals_training_loss",
    "use_weighting": "test_options.py::test_evaluation_loss_equals_training_loss",
    "discopop_tau": "test_options.py::test_evaluation_loss_equals_training_loss",
    "precompute_ref_log_probs": "test_finetuning.py::test_a_reference_that_is_computed_beforehand_is_the_same",
}

# Keys that Trainer, TRL and accelerate implement in code that ours neither overrides nor bypasses.
THEIR_OWN = {
    "eval_steps", "save_steps", "logging_steps", "logging_first_step", "log_level", "log_level_replica", "run_name",
    "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "max_grad_norm", "tf32",
    "activation_checkpointing_kwargs", "gradient_checkpointing", "gradient_checkpointing_kwargs", "use_liger_kernel",
    "liger_kernel_config", "neftune_noise_alpha", "torch_empty_cache_steps", "full_determinism",
    "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor",
    "dataloader_multiprocessing_context", "ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers",
    "ddp_static_graph", "debug", "local_rank",
    # TRL
    "activation_offloading", "disable_dropout", "pad_to_multiple_of", "precompute_ref_batch_size",
}  # fmt: skip


def budget(cls) -> dict:
    sizes = {"tokens": {"train_tokens": 64, "batch_tokens": 64, "max_length": 8}}
    sizes |= {unit: {f"train_{unit}": 8, f"batch_{unit}": 8} for unit in ("pairs", "examples")}
    return {"output_dir": "nowhere", "use_cpu": True, "per_device_train_batch_size": 8} | sizes[cls.unit]


@pytest.mark.parametrize("cls", THEIRS)
def test_partition_of_keys(cls):
    names = {member.name for member in fields(THEIRS[cls])}
    refused = cls.refused.keys()
    for name in names:
        # A key that some recipes refuse and others honour is in two groups.
        is_known = name in refused or name in HONOURED or name in THEIR_OWN
        assert is_known, f"{name}: new in this release? honour it with a test, or refuse it"
        assert not (name in HONOURED and name in THEIR_OWN), name
    assert refused <= {member.name for member in fields(cls)}


def test_listed_keys_exist():
    names = {member.name for cls in THEIRS.values() for member in fields(cls)}
    assert HONOURED.keys() | THEIR_OWN <= names
    everywhere = set.intersection(*(set(cls.refused) for cls in THEIRS))
    assert not everywhere & (HONOURED.keys() | THEIR_OWN), "refused by all recipes"


def test_tests_of_honoured_keys():
    for name, node_id in HONOURED.items():
        file, test = node_id.split("::")
        text = (Path(__file__).parent / file).read_text(encoding="utf-8")
        assert re.search(rf"^def {test}\(", text, re.MULTILINE), f"{name}: {node_id}"


def test_support_matrix_has_every_key():
    page = (ROOT / "docs" / "support_matrix.md").read_text(encoding="utf-8")
    refused = {name for cls, theirs in THEIRS.items() for name in cls.refused if name in theirs.__dataclass_fields__}
    groups = ("hub_", "trackio_", "dataloader_", "ddp_")  # which the page names as a group
    for name in refused | {name for name in HONOURED.keys() | THEIR_OWN if not name.startswith(groups)}:
        assert f"`{name}`" in page or name == "max_length", name


@pytest.mark.parametrize("cls", THEIRS)
def test_refused_keys(cls):
    for name in cls.refused:
        default = default_of(cls, name)
        if name == "include_num_input_tokens_seen":
            value = "all"
        elif isinstance(default, bool) or name in ("bf16", "fp16"):
            value = not default
        elif isinstance(default, int | float):
            value = default + 1
        else:
            value = "something"
        with pytest.raises(UserError, match=f"^remove {name}: "):
            cls(**budget(cls) | {name: value})


def test_conflicting_launchers_and_files(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="save_strategy: best would not save on a signal"):
        PretrainingArguments(**budget(PretrainingArguments), save_strategy="best")
    monkeypatch.setattr(PretrainingArguments, "n_gpu", 2)
    with pytest.raises(UserError, match="one process sees 2 GPUs; launch with torchrun"):
        PretrainingArguments(**budget(PretrainingArguments))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="the launcher asks for FSDP"):
        PretrainingArguments(**budget(PretrainingArguments))


# --- Keys that our code reads -----------------------------------------------------------------------------------------


def test_optimizer_keys():
    keys = {"learning_rate": 0.5, "weight_decay": 0.25, "adam_beta1": 0.7, "adam_beta2": 0.8, "adam_epsilon": 1e-4}
    args = PretrainingArguments(**budget(PretrainingArguments), **keys)
    assert args.device.type == "cpu"
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    model.config = SimpleNamespace()
    groups = OptimizerFactory()(model, **args.optimizer_kwargs).param_groups
    assert [group["weight_decay"] for group in groups] == [0.25, 0.0], "biases are not decayed"
    assert all(group["lr"] == 0.5 and group["betas"] == (0.7, 0.8) and group["eps"] == 1e-4 for group in groups)


def test_progress_keys(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    for disabled, each_node, is_main, bar, line in (
        (False, True, False, True, True),
        (True, True, False, False, True),
        (False, False, False, False, False),
        (False, False, True, True, True),
    ):
        progress = TokenProgressCallback(TrainingTimer(), {"peak_flops": None}, "pretrain_clm")
        args = SimpleNamespace(disable_tqdm=disabled, log_on_each_node=each_node)
        state = TrainerState(is_local_process_zero=True, is_world_process_zero=is_main, max_steps=3, log_history=[])
        progress.on_train_begin(args, state, TrainerControl())
        assert bool(progress.bar) == bar
        progress.on_log(args, state, TrainerControl(), logs={"eval_loss": 1.0, "tokens": 3})
        assert ("held-out loss 1.0000" in capsys.readouterr().out) == line
        progress.on_train_end(args, state, TrainerControl())


def test_compilation_keys(corpus, tokenizers, tmp_path, monkeypatch):
    """The keys of torch say how a model is compiled, and `compile` says whether."""
    calls = []
    monkeypatch.setattr(torch, "compile", lambda model, **options: calls.append(options) or model)
    options = {"torch_compile_backend": "eager", "torch_compile_mode": "reduce-overhead", "train_tokens": 256}
    for value in ("false", "true"):
        words = recipe_arguments("clm", "llama", corpus, tokenizers, tmp_path / value, **options, compile=value)
        run_recipe("pretrain_clm", words)
        assert [(call["backend"], call["mode"]) for call in calls] == [("eager", "reduce-overhead")] * (value == "true")


# --- DPO: one loss, in training and in evaluation ---------------------------------------------------------------------

LOSSES = {
    "sigmoid": [],
    "beta": ["--beta", "0.7"],
    "several": ["--loss_type", "hinge", "ipo", "sppo_hard", "--loss_weights", "0.5", "1.0", "0.001"],
    "smoothed": ["--loss_type", "robust", "exo_pair", "--label_smoothing", "0.1"],
    "length": ["--ld_alpha", "0.3"],
    "length of others": ["--loss_type", "nca_pair", "bco_pair", "apo_zero", "apo_down", "--ld_alpha", "0.3"],
    "divergence": ["--f_divergence_type", "js_divergence", "--use_weighting", "true"],
    "alpha": [
        "--f_divergence_type", "alpha_divergence", "--f_alpha_divergence_coef", "0.8",
        "--loss_type", "discopop", "sigmoid_norm", "--discopop_tau", "0.5",
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def preferences(tokenizers, tmp_path_factory) -> tuple[str, str]:
    """The folder of an untrained model, and a file of eight pairs."""
    folder = tmp_path_factory.mktemp("preferences")
    tokenizer = load_tokenizer(tokenizers["clm"])
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 128}
    config = AutoConfig.for_model("gpt2", vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return str(folder / "model"), write_lines(folder / "pairs.jsonl", make_pairs(8, 0))


@pytest.mark.parametrize("kind", LOSSES)
def test_evaluation_loss_equals_training_loss(kind, preferences, tmp_path, monkeypatch):
    """A batch has all pairs, so the evaluation after a step has the loss that the next step starts from."""
    monkeypatch.setattr(transformers.GenerationMixin, "generate", lambda self, ids, **options: ids)
    model, pairs = preferences
    options = {
        "model_name_or_path": model, "chat_template": CHATML, "train_data": pairs, "eval_data": pairs,
        "output_dir": tmp_path, "max_length": 64, "train_pairs": 24, "batch_pairs": 8, "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 3, "learning_rate": 0.01, "lr_scheduler_type": "constant", "precision": "fp32",
        "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "use_cpu": "true", "save_strategy": "no",
    }  # fmt: skip
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    run_recipe("dpo", [*words, *LOSSES[kind]])
    log = json.loads((tmp_path / "history.json").read_text())
    trained = {entry["step"]: entry["loss"] for entry in log if "loss" in entry}
    evaluated = {entry["step"]: entry["eval_loss"] for entry in log if "eval_loss" in entry}
    assert list(trained) == [1, 2, 3] and list(evaluated) == [0, 1, 2, 3]
    for step in (1, 2, 3):
        assert evaluated[step - 1] == pytest.approx(trained[step], rel=1e-4), step
    assert evaluated[3] != pytest.approx(evaluated[0], rel=1e-3), "it has learned"


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"loss_type": ["aot"]}, "loss_type: 'aot' is none of sigmoid, hinge"),
        ({"loss_type": ["sft"]}, "loss_type: 'sft' is none of .*, which are means over pairs"),
        ({"loss_type": ["sigmoid"], "label_smoothing": 0.1}, "label_smoothing does nothing with loss_type sigmoid"),
        ({"loss_type": ["robust"], "label_smoothing": 0.5}, "label_smoothing is 0.5; set it to at least 0 and below"),
        ({"loss_type": ["exo_pair"]}, "label_smoothing is 0.0; loss_type exo_pair needs it"),
        ({"loss_weights": [1.0, 2.0]}, "loss_weights has 2 weights for 1 losses"),
        ({"ld_alpha": 1.5}, "ld_alpha is 1.5; set it between 0 and 1"),
        ({"f_divergence_type": "kl"}, "f_divergence_type: 'kl' is none of reverse_kl"),
        (
            {"loss_type": ["apo_zero"], "f_divergence_type": "forward_kl"},
            "f_divergence_type does not go with loss_type",
        ),
        ({"discopop_tau": 0.1}, "discopop_tau does nothing without loss_type: discopop"),
        ({"f_alpha_divergence_coef": 0.1}, "f_alpha_divergence_coef does nothing without f_divergence_type"),
        ({"precompute_ref_batch_size": 4}, "precompute_ref_batch_size does nothing without precompute_ref_log_probs"),
    ],
)
def test_invalid_losses(keys, sentence):
    with pytest.raises(UserError, match=sentence):
        DPOArguments(**budget(DPOArguments) | keys)


def test_losses_of_trl():
    """Fails for a release of TRL with another loss: decide whether it is a mean over pairs."""
    text = next(member for member in fields(DPOConfig) if member.name == "loss_type").metadata["help"]
    assert set(re.findall(r"`'(\w+)'`", text)) == {*PAIR_LOSSES, "aot", "aot_unpaired", "sft"}
