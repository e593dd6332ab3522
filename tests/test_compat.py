"""Private and undocumented parts of libraries still have the signatures and effects that `compat` expects."""

import importlib
import inspect
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from conftest import MODELS
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
