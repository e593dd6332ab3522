"""What the objectives experiment trains: sizes, budgets, and the tasks that the pretrained models are fine-tuned on."""

import json
from dataclasses import dataclass

from experiments.corpora import TRAIN_FILES

MAX_LENGTH = 64  # tokens in a row
TRAIN_TOKENS = 512_000  # of the causal model, and of every arm that is matched in tokens
BATCH_TOKENS = 2_048
HELD_OUT_TEXTS = 25  # of each source; their evaluation takes seconds
HELD_OUT_CHARACTERS = 1_500  # of each text

MODEL_SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "local_attention": 8,
    "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
}
T5_SIZES = {
    "d_model": 128,
    "d_kv": 32,
    "d_ff": 256,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
    "dropout_rate": 0.0,
    "tie_word_embeddings": True,
}
PRETRAINING_OPTIONS = {
    "train_data": json.dumps(TRAIN_FILES),
    "max_length": MAX_LENGTH,
    "batch_tokens": BATCH_TOKENS,
    "per_device_train_batch_size": BATCH_TOKENS // MAX_LENGTH,
    "per_device_eval_batch_size": 128,
    "optimizer": "muon",
    "learning_rate": 0.01,
    "lr_scheduler_type": "warmup_stable_decay",
    "warmup_steps": 0.02,
    "decay_fraction": 0.5,
    "compile": "false",
    "logging_steps": 50,
    "save_strategy": "no",
}
FINE_TUNING_OPTIONS = {
    "batch_examples": 16,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 128,
    "optimizer": "muon",
    "learning_rate": 0.005,
    "eval_on_start": "false",
    "logging_steps": 20,
    "save_strategy": "no",
}


@dataclass(frozen=True)
class Task:
    """A task to fine-tune on."""

    recipe: str
    dataset: str  # in data/demo
    test_splits: tuple[str, ...]  # held out
    labelled_examples: int
    train_examples: int  # with repetition
    metric: str  # a key of metrics.json
    options: dict


TASKS = {
    "topics": Task("classify", "bbc", ("validation", "test"), 200, 1_600, "eval_accuracy", {"max_length": 64}),
    "sentiment": Task("classify", "rotten_tomatoes", ("test",), 1_000, 4_000, "eval_accuracy", {"max_length": 48}),
    "entities": Task(
        "tag",
        "conll2003",
        ("test",),
        500,
        2_000,
        "eval_f1",
        {"max_length": 64, "text_column": "tokens", "label_column": "ner_tags"},
    ),
    "similarity": Task("embed", "bbc", ("validation", "test"), 1_792, 1_792, "mrr", {"max_length": 64}),
}
