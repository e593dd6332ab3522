"""Facts about the installed libraries that this project relies on."""

import math

import numpy as np
import pytest
import torch
from conftest import MODELS
from test_isolation import build, documents
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

from unlabeled.data.tokenization import load_tokenizer
from unlabeled.models.losses import ChunkedLinearCrossEntropy, cross_entropy_sum


class Rows(torch.utils.data.Dataset):
    """Rows with very different numbers of targets."""

    def __init__(self, vocabulary: int, rows: int = 8, length: int = 24):
        rng = np.random.default_rng(0)
        self.ids = rng.integers(10, vocabulary, (rows, length))
        self.targets = rng.random((rows, length)) < np.linspace(0.05, 0.9, rows)[:, None]
        self.targets[:, 3] = True

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        ids = torch.from_numpy(self.ids[i])
        return {"input_ids": ids, "labels": torch.where(torch.from_numpy(self.targets[i]), ids, -100)}


def first_step(model_type, tokenizers, tmp_path, batch: int, accumulation: int, exact: bool) -> tuple[float, float]:
    """Loss and gradient norm of the first step."""
    model, _, _ = build(model_type, tokenizers)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=batch,
        max_steps=1,
        gradient_accumulation_steps=accumulation,
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    loss = ChunkedLinearCrossEntropy(model, shift=model_type not in ("bert", "modernbert")) if exact else None
    trainer = Trainer(model, arguments, train_dataset=Rows(model.config.vocab_size), compute_loss_func=loss)
    trainer.train()
    return trainer.state.log_history[0]["loss"], trainer.state.log_history[0]["grad_norm"]


@pytest.mark.parametrize(("model_type", "factor"), [("bert", 8.0), ("modernbert", 1.0), ("gpt2", 1.0), ("llama", 1.0)])
def test_loss_with_accumulation(model_type, factor, tokenizers, tmp_path):
    at_once = first_step(model_type, tokenizers, tmp_path, 8, 1, exact=True)
    accumulated = first_step(model_type, tokenizers, tmp_path, 1, 8, exact=True)
    assert accumulated == pytest.approx(at_once, rel=1e-4)
    trainers_own = first_step(model_type, tokenizers, tmp_path, 1, 8, exact=False)
    assert trainers_own[0] / at_once[0] == pytest.approx(factor, rel=0.2)


def test_loss_by_hand():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 5, 7), torch.tensor([[1, 2, -100, 3, 4], [5, -100, -100, -100, 6]])
    log_p = logits.log_softmax(-1)
    masked = [-log_p[r, t, labels[r, t]] for r in range(2) for t in range(5) if labels[r, t] >= 0]
    causal = [-log_p[r, t - 1, labels[r, t]] for r in range(2) for t in range(1, 5) if labels[r, t] >= 0]
    assert cross_entropy_sum(logits, labels, shift=False) == pytest.approx(float(sum(masked)), rel=1e-6)
    assert cross_entropy_sum(logits, labels, shift=True) == pytest.approx(float(sum(causal)), rel=1e-6)


def test_stock_collator_with_pad_as_eos(tokenizers):
    tokenizer = load_tokenizer(tokenizers["clm"])
    tokenizer.pad_token = tokenizer.eos_token
    batch = DataCollatorForLanguageModeling(tokenizer, mlm=False)([{"input_ids": [5, 6, tokenizer.eos_token_id]}])
    assert batch["labels"][0, 2] == -100


def test_stock_masks_differ_between_evaluations(tokenizers):
    tokenizer = load_tokenizer(tokenizers["mlm"])
    collator = DataCollatorForLanguageModeling(tokenizer, seed=0)
    examples = [{"input_ids": list(range(10, 60))} for _ in range(4)]
    first, second = collator(examples)["labels"], collator(examples)["labels"]
    assert not torch.equal(first, second)


def test_attention_mask_disables_isolation(tokenizers):
    model, tokenizer, _ = build("llama", tokenizers)
    first, other, second = documents(tokenizer, [10, 10, 10])
    positions = torch.cat([torch.arange(10)] * 2)[None]

    def second_logits(*parts, **more):
        ids = torch.from_numpy(np.concatenate(parts))[None]
        with torch.no_grad():
            return model(input_ids=ids, position_ids=positions, **more).logits[0, 10:]

    ones = torch.ones(1, 20, dtype=torch.long)
    with_mask = second_logits(first, second, attention_mask=ones) - second_logits(other, second, attention_mask=ones)
    without_mask = second_logits(first, second) - second_logits(other, second)
    assert with_mask.abs().max() > 1e-2
    assert without_mask.abs().max() < 1e-5


def test_positions_of_bidirectional_models(tokenizers):
    model, tokenizer, _ = build("bert", tokenizers)
    first, other, second = documents(tokenizer, [10, 10, 10])
    positions = torch.cat([torch.arange(10)] * 2)[None]
    with torch.no_grad():
        rows = (torch.from_numpy(np.concatenate([changed, second]))[None] for changed in (first, other))
        a, b = (model(input_ids=ids, position_ids=positions).logits[0, 10:] for ids in rows)
    assert (a - b).abs().max() > 1e-2


def test_files_of_trainer_save_model(tokenizers, tmp_path):
    """`ExactTrainerMixin.save_model` corrects both."""
    model, _, _ = build("llama", tokenizers)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, save_strategy="no", max_steps=1, disable_tqdm=True
    )
    trainer = Trainer(model, arguments, train_dataset=Rows(300))
    trainer.train()
    trainer.save_model()
    assert '"use_cache": false' in (tmp_path / "config.json").read_text()
    assert (tmp_path / "training_args.bin").exists()


def test_model_loss_without_targets(tokenizers):
    model, _, _ = build("llama", tokenizers)
    ids = torch.randint(10, 200, (1, 8))
    assert math.isnan(model(input_ids=ids, labels=torch.full_like(ids, -100)).loss.item())


def test_overridden_public_methods():
    """Private ones are in tests/test_compat.py."""
    from unlabeled.training.saving import SavingMixin
    from unlabeled.training.trainer import ExactTrainerMixin

    for method in ("evaluate", "log", "train", "get_train_dataloader"):
        assert method in vars(ExactTrainerMixin)
        assert method in vars(Trainer)
    assert "save_model" in vars(SavingMixin)
    assert "save_model" in vars(Trainer)
    assert "eval_steps" in TrainingArguments.__dataclass_fields__
    assert "warmup_ratio" not in TrainingArguments.__dataclass_fields__


def test_stock_model_types():
    from transformers import CONFIG_MAPPING

    assert set(MODELS) <= set(CONFIG_MAPPING.keys())
