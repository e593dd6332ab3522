"""Private and undocumented parts of libraries still have the signatures and effects that `compat` expects."""

import ast
import importlib
import inspect
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from conftest import MODELS, ROOT
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    Trainer,
    TrainingArguments,
)

from unlabeled import compat


def resolve(name: str) -> type:
    """The class that "module:Class" names."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def small_model(auto_class: type = AutoModelForCausalLM) -> nn.Module:
    config = AutoConfig.for_model("llama", vocab_size=64, pad_token_id=0, **MODELS["llama"])
    return auto_class.from_config(config, attn_implementation="sdpa")


@pytest.fixture
def trainer(tmp_path) -> Trainer:
    args = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, max_steps=2, save_strategy="no")
    rows = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 16
    return Trainer(small_model(), args, train_dataset=rows)


# --- transformers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_implementation(implementation):
    config = AutoConfig.for_model("llama", vocab_size=64, **MODELS["llama"])
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    assert compat.attention_implementation(model.config) == implementation


def test_model_class():
    llama = AutoConfig.for_model("llama")
    assert compat.has_model_class(AutoModelForCausalLM, llama)
    assert not compat.has_model_class(AutoModelForCausalLM, AutoConfig.for_model("t5"))


def test_loaded_adapter():
    model = small_model()
    assert not compat.has_loaded_adapter(model)
    model.add_adapter(LoraConfig(target_modules=["q_proj"]))
    assert compat.has_loaded_adapter(model)


def test_sharding_switch():
    from transformers import modeling_utils

    assert not modeling_utils._is_ds_init_called
    with compat.without_zero3_sharding():
        assert modeling_utils._is_ds_init_called
    assert not modeling_utils._is_ds_init_called


def test_deepspeed_config_is_forgotten():
    from transformers.integrations import HfDeepSpeedConfig, is_deepspeed_zero3_enabled

    pytest.importorskip("deepspeed")
    config = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})  # transformers keeps a weak reference
    assert config.is_zero3()
    assert is_deepspeed_zero3_enabled()
    compat.forget_deepspeed_config()
    assert not is_deepspeed_zero3_enabled()


def test_adapter_config_file(tmp_path):
    assert compat.find_adapter_config(str(tmp_path)) is None
    get_peft_model(small_model(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    assert compat.find_adapter_config(str(tmp_path)) == str(tmp_path / "adapter_config.json")


def test_generation_regions():
    template = (
        "{% for m in messages %}<{{ m.role }}>{% generation %}{{ m.content }}{% endgeneration %}{{ end }}{% endfor %}"
    )
    text, regions = compat.render_with_generation_regions(
        [{"role": "assistant", "content": "yes"}], template, None, {"end": "."}
    )
    assert text == "<assistant>yes."
    assert [text[start:end] for start, end in regions] == ["yes"]


def test_generic_classifier():
    bert = BertConfig(vocab_size=64, **MODELS["bert"])
    assert compat.is_generic_classifier(small_model(AutoModelForSequenceClassification))
    assert not compat.is_generic_classifier(AutoModelForSequenceClassification.from_config(bert))


def test_prepared_inputs(trainer):
    batch = compat.prepare_inputs(trainer, {"input_ids": torch.tensor([[1]]), "labels": torch.tensor([0.5])})
    assert {name: value.dtype for name, value in batch.items()} == {"input_ids": torch.int64, "labels": torch.float32}


def test_running_loss(trainer):
    losses = []
    step = trainer.training_step

    def record(*args, **kwargs):
        losses.append(float(compat.running_loss(trainer)))
        return step(*args, **kwargs)

    trainer.training_step = record
    trainer.train()
    assert losses[0] == 0 < losses[1]


# --- Other libraries --------------------------------------------------------------------------------------------------


def test_prepared_model():
    accelerator = Accelerator(cpu=True)
    assert not compat.has_prepared_model(accelerator)
    accelerator.prepare_model(small_model())
    assert compat.has_prepared_model(accelerator)


@pytest.mark.parametrize("name", ["trl:SFTTrainer", "trl:DPOTrainer"])
def test_counts_of_trl(name):
    """The attributes are set in `__init__` and read where TRL logs."""
    source = inspect.getsource(resolve(name))
    assert "self._total_train_tokens = 0" in source
    assert '"num_tokens"] = [self._total_train_tokens]' in source
    assert 'self._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}' in source


def test_token_count():
    counting = SimpleNamespace(_total_train_tokens=0)
    compat.restore_token_count(counting, 7)
    assert counting._total_train_tokens == 7
    other = SimpleNamespace()
    compat.restore_token_count(other, 7)
    assert not vars(other)


def test_trainable_tokens():
    config = LoraConfig(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [1, 2]})
    model = get_peft_model(small_model(), config)
    (layer,) = compat.trainable_token_layers(model)
    assert layer.token_indices["default"] == [1, 2]
    assert layer.trainable_tokens_delta["default"].shape == (2, 32)
    assert layer.base_layer.weight.shape == (64, 32)
    assert not layer.tied_adapter
    embeddings = model.get_input_embeddings()
    assert compat.is_trainable_tokens_wrapper(embeddings)
    assert isinstance(embeddings.original_module, nn.Embedding)
    assert not compat.is_trainable_tokens_wrapper(model.get_output_embeddings())


def test_tensor_lists():
    tensors = [torch.tensor([1.0, 2.0]), torch.tensor([3.0])]
    ends = [torch.tensor([3.0, 2.0]), torch.tensor([5.0])]
    assert [tensor.tolist() for tensor in compat.lerp_all(tensors, ends, 0.5)] == [[2.0, 2.0], [4.0]]
    compat.lerp_all_(tensors, ends, 0.5)
    compat.mul_all_(tensors, 10)
    compat.add_all_(tensors, ends, alpha=2)
    assert [tensor.tolist() for tensor in tensors] == [[26.0, 24.0], [50.0]]


def test_whole_parameters():
    """What DeepSpeed sets on a sharded parameter; tests/test_equality.py trains with them."""
    parameter = nn.Parameter(torch.zeros(2, 3))
    assert (compat.whole_shape(parameter), compat.whole_numel(parameter)) == ((2, 3), 6)
    parameter.data = torch.zeros(0)
    parameter.ds_shape = torch.Size([2, 3])
    parameter.ds_numel = 6
    assert (compat.whole_shape(parameter), compat.whole_numel(parameter)) == ((2, 3), 6)
    partition = pytest.importorskip("deepspeed.runtime.zero.partition_parameters")
    source = inspect.getsource(partition)
    assert "param.ds_shape = " in source
    assert "param.ds_numel = " in source


# --- Overridden methods -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", compat.OVERRIDDEN_METHODS, ids=lambda entry: f"{entry.override}.{entry.method}")
def test_overridden_method(entry):
    """The library's method has the expected parameters, and the class named here overrides it."""
    method = getattr(resolve(entry.library_class), entry.method)
    assert tuple(inspect.signature(method).parameters) == ("self", *entry.parameters)
    override = vars(resolve(entry.override))[entry.method]
    assert tuple(inspect.signature(override).parameters) == ("self", *entry.parameters)


def test_staging_folder():
    """Trainer asks for the folder of a checkpoint while it saves one, so that it goes to the staging folder."""
    assert "self._get_output_dir(" in inspect.getsource(Trainer._save_checkpoint)


# --- Nothing private elsewhere ----------------------------------------------------------------------------------------

FILES = sorted(path for folder in ("unlabeled", "recipes", "scripts") for path in (ROOT / folder).rglob("*.py"))
# Documented, in spite of their names: leaving a process at once, and the methods that a metric of `evaluate` defines.
DOCUMENTED = {"_exit", "_info", "_compute"}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def is_own(node: ast.expr) -> bool:
    """Whether an expression is the instance or the class of a method."""
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def defined_names(tree: ast.AST) -> set[str]:
    """Names of the functions, classes, variables and attributes that a file defines."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_own(node.value):
            names.add(node.attr)
    return names


def used_names(tree: ast.AST) -> dict[str, int]:
    """Private attributes that a file reads or sets, also by `getattr` and the like, and names that it imports."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            names[node.attr] = node.lineno
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id in ("getattr", "setattr", "hasattr") and isinstance(node.args[1], ast.Constant):
                name = node.args[1].value
                if is_private(name):
                    names[name] = node.lineno
        elif isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith("unlabeled"):
            for name in (*node.module.split("."), *(alias.name for alias in node.names)):
                if is_private(name):
                    names[name] = node.lineno
    return names


def imported_names(tree: ast.AST) -> set[str]:
    """ "module.name" of everything that a file imports by name."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    return {f"{node.module}.{alias.name}" for node in nodes for alias in node.names}


COMPAT = ast.parse(inspect.getsource(compat))
UNDOCUMENTED = {
    f"{node.module}.{alias.name}"
    for function in COMPAT.body
    if isinstance(function, ast.FunctionDef)
    for node in ast.walk(function)
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
}
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES if path.name != "compat.py"}
OWN_NAMES = set().union(*(defined_names(tree) for tree in TREES.values())) - used_names(COMPAT).keys()
OVERRIDDEN_NAMES = {entry.method for entry in compat.OVERRIDDEN_METHODS}


@pytest.mark.parametrize("path", TREES, ids=lambda path: str(path.relative_to(ROOT)))
def test_private_names(path):
    """Private names are those of the project, which includes the methods that it overrides."""
    own = OWN_NAMES | OVERRIDDEN_NAMES | DOCUMENTED
    foreign = {name: line for name, line in used_names(TREES[path]).items() if name not in own}
    assert not foreign, f"{path.name} uses private names of a library; put them into unlabeled/compat.py: {foreign}"
    assert not imported_names(TREES[path]) & UNDOCUMENTED


LIBRARY_CLASSES = (
    "transformers:Trainer",
    "transformers:TrainerCallback",
    "trl:SFTTrainer",
    "trl:DPOTrainer",
    "trl:TrlParser",
    "sentence_transformers:SentenceTransformerTrainer",
    "torch.optim:Optimizer",
    "transformers:DataCollatorForLanguageModeling",
    "argparse:ArgumentParser",
)


@pytest.mark.parametrize("name", LIBRARY_CLASSES)
def test_overrides_are_listed(name):
    """No class of the project defines a private name of these library classes, unless it is in the table."""
    library_names = {attribute for attribute in dir(resolve(name)) if is_private(attribute)}
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.ClassDef):
                continue
            methods = {member.name for member in node.body if isinstance(member, ast.FunctionDef)}
            listed = {entry.method for entry in compat.OVERRIDDEN_METHODS if entry.override.endswith(f":{node.name}")}
            assert methods & library_names <= listed | DOCUMENTED, (path.name, node.name)
