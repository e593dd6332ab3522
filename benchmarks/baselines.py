"""Three ways to train the same model on the same text: stock `Trainer`, a plain PyTorch loop, and our trainer."""

from collections.abc import Callable
from functools import cached_property
from itertools import chain

import torch
from accelerate.utils import send_to_device
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    DataCollatorForLanguageModeling,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from benchmarks.settings import FOLDER, ROOT, Setting, tokenizer_folder
from unlabeled.config import DataArguments, MaskingArguments, ModelArguments, PretrainingArguments, parse_arguments
from unlabeled.data.collators import DataCollatorForPackedLanguageModeling
from unlabeled.data.preparing import load_prepared, prepare
from unlabeled.data.readers import read_documents
from unlabeled.data.rows import TrainingRows
from unlabeled.data.sources import parse_sources
from unlabeled.data.tokenization import load_tokenizer
from unlabeled.models.attention import needs_flat_batches, sliding_window
from unlabeled.models.configs import scratch_config
from unlabeled.models.loading import init_model
from unlabeled.models.losses import ChunkedLinearCrossEntropy, cross_entropy_sum
from unlabeled.models.optimizers import OptimizerFactory
from unlabeled.training import ExactTrainer


class TrainingSetup:
    """The model, tokenizer, text, collator and loss of a setting, as the recipe creates them.

    Args:
        optimizations: keys of the recipe, and `head`: whether `ChunkedLinearCrossEntropy` computes the output head and
            the loss (default: True).
    """

    def __init__(self, setting: Setting, optimizations: dict):
        self.objective = setting.objective
        self.is_masked = setting.objective == "mlm"
        options = ["--config", str(ROOT / f"recipes/configs/{setting.config}.yaml"), *setting.options]
        options += ["--save_strategy=no", "--eval_strategy=no", f"--output_dir={FOLDER / 'run'}"]
        options += ["--disable_tqdm=true", "--report_to=none"]
        options += [f"--{key}={value}" for key, value in optimizations.items() if key != "head"]
        if self.is_masked:
            groups = (ModelArguments, DataArguments, MaskingArguments, PretrainingArguments)
            model_args, data_args, masking_args, self.args = parse_arguments(*groups, args=options)
            self.mlm_probability = masking_args.mlm_probability
        else:
            model_args, data_args, self.args = parse_arguments(
                ModelArguments, DataArguments, PretrainingArguments, args=options
            )
            self.mlm_probability = None
        self.tokenizer = load_tokenizer(str(tokenizer_folder(setting) or model_args.tokenizer_name_or_path))
        set_seed(0)
        overrides = setting.config_overrides or model_args.config_overrides
        config = scratch_config(model_args.model_type, overrides, self.tokenizer, self.args.max_length)
        auto_class = AutoModelForMaskedLM if self.is_masked else AutoModelForCausalLM
        self.model = init_model(auto_class, config, model_args.attn_implementation).to(self.args.device)
        self.model.config.use_cache = False
        self.train_sources = parse_sources(data_args.train_data, "train_data", data_args.text_column)
        self.eval_sources = parse_sources(data_args.eval_data, "eval_data", data_args.text_column)
        self.prepared_dir = data_args.prepared_dir
        self.compute_loss = self.make_loss(chunked=optimizations.get("head", True))

    @property
    def head_share(self) -> float:
        """The share of the positions that are targets."""
        return self.mlm_probability if self.is_masked else 1.0

    @cached_property
    def prepared(self) -> tuple[dict, dict]:
        """The prepared rows by split, and their manifest. Stock `Trainer` prepares its own."""
        folder = prepare(
            self.train_sources,
            self.eval_sources,
            self.tokenizer,
            self.objective,
            self.args.max_length,
            self.prepared_dir,
        )
        return load_prepared(folder)

    def training_rows(self) -> TrainingRows:
        rows, _ = self.prepared
        return TrainingRows(rows["train"], self.args.max_steps * self.args.rows_per_step, seed=0)

    def training_collator(self) -> Callable:
        if self.is_masked:
            return self.make_collator(mlm_probability=self.mlm_probability)
        return self.make_collator()

    def make_collator(self, **options) -> Callable:
        """The collator of the recipe for this model; `options` are those of masking."""
        flat = needs_flat_batches(self.model.config)
        if not self.is_masked:
            return DataCollatorForPackedLanguageModeling(self.tokenizer, max_length=self.args.max_length, flat=flat)
        return DataCollatorForPackedLanguageModeling(
            self.tokenizer,
            mlm=True,
            max_length=self.args.max_length,
            flat=flat,
            sliding_window=sliding_window(self.model.config),
            **options,
        )

    def make_loss(self, chunked: bool) -> Callable:
        """The loss function of the trainer: mean over the targets."""
        shift = not self.is_masked
        if chunked:
            return ChunkedLinearCrossEntropy(self.model, shift=shift)

        def compute_loss(outputs, labels, num_items_in_batch):
            return cross_entropy_sum(outputs.logits, labels, shift=shift) / num_items_in_batch

        return compute_loss


def train_stock(setup: TrainingSetup, callback: TrainerCallback, **options) -> None:
    """Train as in the documentation of transformers: concatenated texts in blocks, and the defaults of `Trainer`.

    Args:
        options: `TrainingArguments` that replace the defaults.
    """
    args = setup.args
    if setup.is_masked:
        collator = DataCollatorForLanguageModeling(setup.tokenizer, mlm=True, mlm_probability=setup.mlm_probability)
    else:
        collator = DataCollatorForLanguageModeling(setup.tokenizer, mlm=False)
    training_args = {
        "output_dir": args.output_dir,
        "per_device_train_batch_size": args.rows_per_step,
        "max_steps": args.max_steps,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": args.use_cpu,
    }
    trainer = Trainer(
        model=setup.model,
        args=TrainingArguments(**(training_args | options)),
        train_dataset=make_stock_dataset(setup),
        data_collator=collator,
        callbacks=[callback],
    )
    trainer.train()


def make_stock_dataset(setup: TrainingSetup) -> Dataset:
    """The text in blocks, by `group_texts` of transformers' examples."""
    max_length = setup.args.max_length

    def tokenize(batch: dict) -> dict:
        return setup.tokenizer(batch["text"])

    def group_texts(examples: dict) -> dict:
        concatenated = {key: list(chain(*examples[key])) for key in examples}
        total_length = len(concatenated["input_ids"]) // max_length * max_length
        return {
            key: [values[start : start + max_length] for start in range(0, total_length, max_length)]
            for key, values in concatenated.items()
        }

    texts = [text for source in setup.train_sources for text in read_documents(source)]
    dataset = Dataset.from_dict({"text": texts}).map(tokenize, batched=True, remove_columns=["text"])
    return dataset.map(group_texts, batched=True)


def train_loop(setup: TrainingSetup, on_step_end: Callable[[], bool]) -> None:
    """Train in a plain loop, with our rows, loss and optimizer but without schedule, logging, callbacks or accelerate.

    Args:
        on_step_end: called after each step; training ends when it returns True.
    """
    args = setup.args
    model = setup.model.train()
    optimizer = OptimizerFactory()(model, **args.optimizer_kwargs)
    forward = torch.compile(model) if args.compile == "true" else model
    loader = DataLoader(
        setup.training_rows(),
        args.rows_per_step,
        collate_fn=setup.training_collator(),
        num_workers=args.dataloader_num_workers,
        pin_memory=args.device.type == "cuda",
    )
    for batch in loader:
        batch = send_to_device(batch, args.device, non_blocking=True)
        labels = batch.pop("labels")
        with torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16):
            outputs = forward(**batch)
        setup.compute_loss(outputs, labels, (labels != -100).sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        model.zero_grad()
        if on_step_end():
            return


def train_ours(setup: TrainingSetup, callback: TrainerCallback) -> None:
    """Train as the recipes do."""
    args = setup.args
    rows, manifest = setup.prepared
    args.torch_compile = args.compile == "true"
    args.torch_compile_backend = "inductor" if args.torch_compile else None
    trainer = ExactTrainer(
        model=setup.model,
        args=args,
        train_dataset=setup.training_rows(),
        eval_dataset=rows["validation"],
        data_collator=setup.training_collator(),
        processing_class=setup.tokenizer,
        compute_loss_func=setup.compute_loss,
        objective=setup.objective,
        splits=manifest["splits"],
        optimizer_cls_and_kwargs=(OptimizerFactory, args.optimizer_kwargs),
        callbacks=[callback],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
