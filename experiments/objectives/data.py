"""The tokenizers of the objectives experiment and the labeled data of its tasks."""

from pathlib import Path

import pandas as pd
from tokenizers.processors import TemplateProcessing

from experiments.corpora import TRAIN_FILES
from experiments.objectives.settings import TASKS
from unlabeled.data.readers import read_documents
from unlabeled.data.sources import parse_sources
from unlabeled.data.tokenizer_training import train_tokenizer

VOCABULARY_SIZE = 1024
SENTINELS = 8
WORDS_PER_HALF = 24  # of a pair of the similarity task


def make_tokenizers(folder: Path) -> None:
    """Train one byte-level vocabulary for all arms, with a mask token and sentinels, and save it twice.

    `tokenizer` puts a text between a start and an end token, as in the rows of causal and masked models.
    `tokenizer-span` appends the end token only, as T5 does.
    """
    if (folder / "tokenizer-span" / "tokenizer.json").exists():
        return
    documents = (document for source in parse_sources(TRAIN_FILES, "text") for document in read_documents(source))
    tokenizer = train_tokenizer(documents, "bpe", VOCABULARY_SIZE)
    special_tokens = {
        "bos_token": "<|startoftext|>",
        "mask_token": "<|mask|>",
        "additional_special_tokens": [f"<extra_id_{number}>" for number in range(SENTINELS)],
    }
    tokenizer.add_special_tokens(special_tokens)
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    token_ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in (bos, eos)]
    for name, template in {"tokenizer": f"{bos} $A {eos}", "tokenizer-span": f"$A {eos}"}.items():
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=token_ids)
        tokenizer.save_pretrained(folder / name)


def make_labelled_data(folder: Path, seed: int) -> None:
    """Write `labeled/TASK/train.parquet`, few examples drawn with the seed, and all of `held_out.parquet`."""
    for name, task in TASKS.items():
        task_folder = folder / "labeled" / name
        task_folder.mkdir(parents=True, exist_ok=True)
        for part, splits in {"train": ("train",), "held_out": task.test_splits}.items():
            files = [f"data/demo/{task.dataset}/{split}.parquet" for split in splits]
            rows = pd.concat([pd.read_parquet(file) for file in files])
            if name == "similarity":
                rows = make_text_pairs(rows["text"])
            if part == "train":
                rows = rows.sample(min(task.labelled_examples, len(rows)), random_state=seed)
            rows.to_parquet(task_folder / f"{part}.parquet", index=False)


def make_text_pairs(texts: pd.Series) -> pd.DataFrame:
    """Pairs of the first 24 words of a text and the 24 words after them; shorter texts are left out."""
    words = texts.str.split()
    words = words[words.str.len() >= 2 * WORDS_PER_HALF]
    first_half = words.str[:WORDS_PER_HALF].str.join(" ")
    second_half = words.str[WORDS_PER_HALF : 2 * WORDS_PER_HALF].str.join(" ")
    return pd.DataFrame({"anchor": first_half, "positive": second_half})
