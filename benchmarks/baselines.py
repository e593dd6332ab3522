"""Who takes part: what is trained, stock `Trainer`, a plain loop and our `Trainer`, with the same model and text."""

import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "outputs" / "bench"
PLAYS = ("--train_data=data/demo/shakespeare/train.parquet", "--eval_data=data/demo/shakespeare/validation.parquet",
         "--eval_fraction=0", "--prepared_dir=outputs/bench/prepared")  # fmt: skip
ROWS = ("--max_length=256", "--batch_tokens=4096", "--per_device_train_batch_size=16", "--train_tokens=4096000")
SEVEN = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6, "num_attention_heads": 4}
WIDE = 50304  # GPT-2's pieces; the plays have not so many, which the speed of a model does not depend on


@dataclass(frozen=True)
class Setting:
    """What is trained: a configuration of `recipes/configs`, some of its keys replaced."""

    config: str
    turn: int  # steps
    changes: tuple[str, ...] = ()
    sizes: dict | None = None  # in the place of its `config_overrides`
    vocabulary: int | None = None  # of a tokenizer made for it

    @property
    def objective(self) -> str:
        return self.config.split("_")[-1]


SETTINGS = {
    "clm-tiny": Setting("tiny/pretrain_clm", 40),
    "mlm-tiny": Setting("tiny/pretrain_mlm", 40),
    "clm-7m": Setting("tiny/pretrain_clm", 4, ROWS, SEVEN | {"tie_word_embeddings": True}, 8192),
    "mlm-7m": Setting("tiny/pretrain_mlm", 4, ROWS, SEVEN | {"local_attention": 128}, 8192),
    "clm-124m": Setting(
        "gpt2-124m/pretrain_clm",
        20,
        (*PLAYS, "--batch_tokens=16384", "--per_device_train_batch_size=16", "--train_tokens=163840000"),
        {"vocab_size": WIDE, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
        16384,
    ),
    "mlm-150m": Setting(
        "modernbert-base/pretrain_mlm",
        20,
        (*PLAYS, "--batch_tokens=16384", "--per_device_train_batch_size=16", "--train_tokens=163840000"),
        {"vocab_size": WIDE},
        16384,
    ),
}


def tokenizer_of(setting: Setting) -> Path | None:
    """The folder of the tokenizer that is made for a setting, None where its configuration names one."""
    kind = {"mlm": "wordpiece", "span": "unigram"}.get(setting.objective, "bpe")
    return FOLDER / f"tokenizer-{kind}-{setting.vocabulary}" if setting.vocabulary else None


def make_tokenizer(setting: Setting) -> None:
    """Train the tokenizer of a setting, unless it is there."""
    folder = tokenizer_of(setting)
    if folder and not folder.exists():
        kind = ["--algorithm", folder.name.split("-")[1], "--vocab_size", str(setting.vocabulary)]
        command = [sys.executable, "scripts/train_tokenizer.py", *kind, "--output_dir", str(folder)]
        command += ["--data", "data/demo/shakespeare/train.parquet"]
        subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


class Ingredients:
    """A setting's model, tokenizer, text and collator, as the recipe makes them.

    Args:
        levers: keys of the recipe; `head` is whether the output head is computed by `ChunkedLinearCrossEntropy`.
    """

    def __init__(self, setting: Setting, levers: dict):
        from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, set_seed

        from unlabeled.config.arguments import DataArguments, ModelArguments, PretrainingArguments
        from unlabeled.config.parser import parse
        from unlabeled.data.collators import DataCollatorForPackedLanguageModeling, MaskedCollator, MaskingArguments
        from unlabeled.data.sources import parse_sources
        from unlabeled.data.tokenization import load_tokenizer
        from unlabeled.models.attention import needs_flat_batches, sliding_window
        from unlabeled.models.configs import scratch_config
        from unlabeled.models.loading import init_model
        from unlabeled.models.losses import ChunkedLinearCrossEntropy, cross_entropy_sum

        self.objective, masked = setting.objective, setting.objective == "mlm"
        options = ["--config", str(ROOT / f"recipes/configs/{setting.config}.yaml"), *setting.changes]
        options += ["--save_strategy=no", "--eval_strategy=no", f"--output_dir={FOLDER / 'run'}"]
        options += ["--disable_tqdm=true", "--report_to=none"]
        options += [f"--{key}={value}" for key, value in levers.items() if key != "head"]
        groups = (ModelArguments, DataArguments, *([MaskingArguments] if masked else []), PretrainingArguments)
        model_args, data_args, *masking, self.args = parse(*groups, args=options)
        self.share = masking[0].mlm_probability if masked else 1.0
        self.tokenizer = load_tokenizer(str(tokenizer_of(setting) or model_args.tokenizer_name_or_path))
        set_seed(0)
        sizes = setting.sizes or model_args.config_overrides
        config = scratch_config(model_args.model_type, sizes, self.tokenizer, self.args.max_length)
        auto_class = AutoModelForMaskedLM if masked else AutoModelForCausalLM
        self.model = init_model(auto_class, config, model_args.attn_implementation).to(self.args.device)
        self.model.config.use_cache = False
        self.sources = parse_sources(data_args.train_data, "train_data", data_args.text_column)
        self.held_out = parse_sources(data_args.eval_data, "eval_data", data_args.text_column)
        self.cache_dir = data_args.prepared_dir
        options = {"max_length": self.args.max_length, "flat": needs_flat_batches(self.model.config)}
        if masked:
            options |= {"mlm": True, "sliding_window": sliding_window(self.model.config)}
        self.collators = partial(
            MaskedCollator if masked else DataCollatorForPackedLanguageModeling, self.tokenizer, **options
        )
        if levers.get("head", True):
            self.loss = ChunkedLinearCrossEntropy(self.model, shift=not masked)
        else:
            self.loss = lambda outputs, labels, num_items_in_batch: (
                cross_entropy_sum(outputs.logits, labels, shift=not masked) / num_items_in_batch
            )

    @cached_property
    def prepared(self):
        """The prepared rows by split, and their manifest. Stock `Trainer` prepares its own."""
        from unlabeled.data.preparing import load_prepared, prepare

        length = self.args.max_length
        folder = prepare(self.sources, self.held_out, self.tokenizer, self.objective, length, self.cache_dir)
        return load_prepared(folder)

    def collator(self):
        """Of the training."""
        return self.collators(**({"mlm_probability": self.share} if self.objective == "mlm" else {}))


def stock(one: Ingredients, callback, **changes) -> None:
    """What one finds in the documentation: texts one after the other, cut into blocks, and Trainer's defaults."""
    from datasets import Dataset
    from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

    from unlabeled.data.readers import read_documents

    tokenizer, args = one.tokenizer, one.args

    def tokenize(batch):
        return tokenizer(batch["text"])

    def group_texts(examples):
        joined = {key: list(chain(*examples[key])) for key in examples}
        total = len(joined["input_ids"]) // args.max_length * args.max_length
        return {
            key: [values[i : i + args.max_length] for i in range(0, total, args.max_length)]
            for key, values in joined.items()
        }

    texts = [text for source in one.sources for text in read_documents(source)]
    blocks = Dataset.from_dict({"text": texts}).map(tokenize, batched=True, remove_columns=["text"])
    blocks = blocks.map(group_texts, batched=True)
    masked = {"mlm": True, "mlm_probability": one.share} if one.objective == "mlm" else {"mlm": False}
    defaults = {"output_dir": args.output_dir, "per_device_train_batch_size": args.rows_per_step}
    defaults |= {"max_steps": args.max_steps, "save_strategy": "no", "disable_tqdm": True, "use_cpu": args.use_cpu}
    trainer = Trainer(
        model=one.model,
        args=TrainingArguments(**(defaults | changes)),
        train_dataset=blocks,
        data_collator=DataCollatorForLanguageModeling(tokenizer, **masked),
        callbacks=[callback],
    )
    trainer.train()


def training_rows(one: Ingredients):
    from unlabeled.data.rows import TrainingRows

    return TrainingRows(one.prepared[0]["train"], one.args.max_steps * one.args.rows_per_step, seed=0)


def loop(one: Ingredients, step_is_over) -> None:
    """The same rows, loss and optimizer without Trainer, accelerate, callbacks, logging and schedule."""
    import torch
    from accelerate.utils import send_to_device
    from torch.utils.data import DataLoader

    from unlabeled.models.optimizers import OptimizerFactory

    args, model = one.args, one.model
    optimizer = OptimizerFactory()(model.train(), **args.optimizer_kwargs)
    run = torch.compile(model) if args.compile == "true" else model
    workers = {"num_workers": args.dataloader_num_workers, "pin_memory": args.device.type == "cuda"}
    for batch in DataLoader(training_rows(one), args.rows_per_step, collate_fn=one.collator(), **workers):
        batch = send_to_device(batch, args.device, non_blocking=True)
        labels = batch.pop("labels")
        with torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16):
            outputs = run(**batch)
        one.loss(outputs, labels, (labels != -100).sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        model.zero_grad()
        if step_is_over():
            return


def ours(one: Ingredients, callback) -> None:
    """As in the recipes."""
    from transformers import PrinterCallback

    from unlabeled.models.optimizers import OptimizerFactory
    from unlabeled.training import ExactTrainer

    args, (rows, manifest) = one.args, one.prepared
    args.torch_compile = args.compile == "true"
    args.torch_compile_backend = "inductor" if args.torch_compile else None
    trainer = ExactTrainer(
        model=one.model,
        args=args,
        train_dataset=training_rows(one),
        eval_dataset=rows["validation"],
        data_collator=one.collator(),
        processing_class=one.tokenizer,
        compute_loss_func=one.loss,
        objective=one.objective,
        splits=manifest["splits"],
        optimizer_cls_and_kwargs=(OptimizerFactory, args.optimizer_kwargs),
        callbacks=[callback],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
