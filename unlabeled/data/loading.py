"""From the arguments of a recipe to its data set: one function for each kind of data.

Each function reads the sources of `train_data` and `eval_data`, tokenizes them, brings them into the order of the whole
run and prints a summary on the main process. With several processes, text and conversations are prepared once on each
machine.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from unlabeled.config import BudgetArguments, DataArguments, DownstreamArguments, SourceArguments, TaskArguments
from unlabeled.data.conversations import show_targets
from unlabeled.data.labeled_rows import LabeledSplit, read_task
from unlabeled.data.labels import Task
from unlabeled.data.pairs import left_out_of_epoch, order_of_pairs, read_pairs, text_columns
from unlabeled.data.preferences import prepare_pairs
from unlabeled.data.preparing import load_prepared, prepare
from unlabeled.data.rows import LengthGroupedRows, TrainingRows, training_order
from unlabeled.data.sources import Source, parse_sources
from unlabeled.data.streams import StreamedRows
from unlabeled.data.summary import describe_dataset
from unlabeled.planning.spans import Denoiser


class PreparedDataset(dict[str, Any]):
    """The splits of a data set by name, like `datasets.DatasetDict`, and the manifest that describes them.

    `dataset["train"]` holds the rows of the whole run in order, over all epochs; `dataset["validation"]` the held-out
    rows.

    Args:
        splits: the splits by name.
        manifest: sources, tokenizer, fingerprint and counts of each split.
    """

    def __init__(self, splits: Mapping[str, Any], manifest: dict):
        super().__init__(splits)
        self.manifest = manifest


def load_text_dataset(
    data_args: DataArguments,
    training_args: BudgetArguments,
    tokenizer: PreTrainedTokenizerFast,
    objective: str,
    *,
    fim_rate: float = 0.0,
    denoisers: Sequence[Denoiser] = (),
) -> PreparedDataset:
    """Raw text for pretraining, tokenized and packed into rows of `training_args.max_length` tokens.

    The packed rows are cached in `data_args.prepared_dir` and found again by the fingerprint of text, tokenizer and
    options. With `data_args.stream` only the held-out text is prepared, and the training text is tokenized and packed
    while the model trains.

    Args:
        data_args: the sources, and how to read them.
        training_args: the length of a row, the budget and the seed.
        tokenizer: with every token that the objective needs.
        objective: "clm", "mlm" or "span".
        fim_rate: share of the training documents to rearrange for infilling (clm only).
        denoisers: how spans are corrupted, which decides how much text fits into a row (span only).

    Returns:
        "train": rows with `input_ids`, `lengths` (tokens of each document of the row), `epoch`, `row`, and for mlm
        `word_starts`. "validation": the rows of the held-out text.

    Raises:
        UserError: the text cannot be read, or there is nothing to learn from.
    """
    train_sources = parse_sources(data_args.train_data, "train_data", data_args.text_column)
    prepared_sources = [] if data_args.stream else train_sources
    with training_args.main_process_first(desc="preparing the text") as is_first:
        folder = prepare_text(
            prepared_sources, data_args, training_args, tokenizer, objective, fim_rate=fim_rate, denoisers=denoisers
        )
        rows, manifest = load_prepared(folder, verify=is_first)
    if data_args.stream:
        train_rows = StreamedRows(train_sources, tokenizer, manifest, training_args)
        manifest = train_rows.manifest
    else:
        train_rows = TrainingRows(rows["train"], _count_rows(training_args), training_args.seed)
    if training_args.process_index == 0:
        print(describe_dataset(manifest))
    return PreparedDataset({"train": train_rows, "validation": rows["validation"]}, manifest)


def prepare_text(
    train_sources: list[Source],
    data_args: DataArguments,
    training_args: BudgetArguments,
    tokenizer: PreTrainedTokenizerFast,
    objective: str,
    *,
    fim_rate: float = 0.0,
    denoisers: Sequence[Denoiser] = (),
) -> str:
    """Tokenize and pack the text of a pretraining run, unless that has been done already; see `load_text_dataset`.

    Args:
        train_sources: the text to train on, empty if it is streamed.

    Returns:
        the folder of the prepared rows.
    """
    return prepare(
        train=train_sources,
        evaluation=parse_sources(data_args.eval_data or [], "eval_data", data_args.text_column),
        tokenizer=tokenizer,
        objective=objective,
        max_length=training_args.max_length,
        cache_dir=data_args.prepared_dir,
        eval_fraction=data_args.eval_fraction,
        max_tokens=data_args.max_tokens,
        fim_rate=fim_rate,
        denoisers=denoisers,
    )


def load_conversation_dataset(
    data_args: SourceArguments, training_args: BudgetArguments, tokenizer: PreTrainedTokenizerFast
) -> PreparedDataset:
    """Conversations for supervised fine-tuning, rendered by the chat template, tokenized and packed.

    Cached like the text of `load_text_dataset`. Prints the first conversation with its target tokens highlighted.

    Args:
        data_args: the sources of conversations.
        training_args: the length of a row, the budget and the seed.
        tokenizer: with its chat template.

    Returns:
        "train" and "validation", each a `datasets.Dataset` with `input_ids`, `lengths` (tokens of each conversation of
        the row) and `targets` (True where a token is learned).

    Raises:
        UserError: a conversation cannot be read, or it is not clear which of its tokens are learned.
    """
    with training_args.main_process_first(desc="preparing the conversations") as is_first:
        folder = prepare(
            train=parse_sources(data_args.train_data, "train_data"),
            evaluation=parse_sources(data_args.eval_data or [], "eval_data"),
            tokenizer=tokenizer,
            objective="sft",
            max_length=training_args.max_length,
            cache_dir=data_args.prepared_dir,
            eval_fraction=data_args.eval_fraction,
        )
        rows, manifest = load_prepared(folder, verify=is_first)
    if training_args.process_index == 0:
        print(describe_dataset(manifest))
        print(f"what is learned: {show_targets(tokenizer, rows['train'][0])}")
    order = training_order(len(rows["train"]), _count_rows(training_args), training_args.seed)
    return PreparedDataset({"train": rows["train"].select(order), "validation": rows["validation"]}, manifest)


def load_preference_dataset(
    data_args: SourceArguments, training_args: BudgetArguments, tokenizer: PreTrainedTokenizerFast
) -> PreparedDataset:
    """Pairs of a chosen and a rejected answer for preference tuning, tokenized.

    Sets the token counts of `training_args`, whose budget is in pairs.

    Args:
        data_args: the sources of preferences.
        training_args: the longest prompt with an answer, the budget and the seed.
        tokenizer: with its chat template.

    Returns:
        "train" and "validation", each a `datasets.Dataset` as `DPOTrainer` takes it: `prompt_ids`, `chosen_ids` and
        `rejected_ids`.

    Raises:
        UserError: a row lacks a prompt or an answer, or no pair fits into `max_length`.
    """
    pairs, manifest = prepare_pairs(
        train=parse_sources(data_args.train_data, "train_data"),
        evaluation=parse_sources(data_args.eval_data or [], "eval_data"),
        tokenizer=tokenizer,
        max_length=training_args.max_length,
        eval_fraction=data_args.eval_fraction,
    )
    order = training_order(len(pairs["train"]), _count_rows(training_args), training_args.seed)
    training_args.set_token_counts(pairs["train"].select(order)["tokens"][:])
    if training_args.process_index == 0:
        for name, counts in manifest["splits"].items():
            print(f"{name:<11}{counts['documents']:>9,} pairs")
    return PreparedDataset({"train": pairs["train"].select(order), "validation": pairs["validation"]}, manifest)


def load_pair_dataset(
    data_args: SourceArguments, training_args: BudgetArguments, tokenizer: PreTrainedTokenizerFast
) -> PreparedDataset:
    """Pairs of texts that belong together, with optional hard negatives, for sentence embeddings.

    Batches of `training_args.batch_pairs` rows contain no text twice. Sets the token counts of `training_args`, whose
    budget is in pairs.

    Args:
        data_args: the sources of pairs.
        training_args: `EmbedArguments`: the longest text, the budget and the seed.
        tokenizer: of the model.

    Returns:
        "train" and "validation", each a `datasets.Dataset` with the texts `anchor`, `positive`, `negative_1`, ...; the
        number of negatives is `manifest["splits"]["train"]["negatives"]`.

    Raises:
        UserError: a row lacks a text, or there are too few pairs for a batch.
    """
    pairs, manifest = read_pairs(data_args, tokenizer, training_args.max_length)
    is_main_process = training_args.process_index == 0
    columns = text_columns(pairs["train"])
    texts = None
    if len(columns) > 2:  # without hard negatives, no text is in two rows
        texts = list(zip(*(pairs["train"][name][:] for name in columns), strict=True))
        manifest["splits"]["train"]["uneven_epochs"] = True
        left_out = left_out_of_epoch(len(texts), training_args, texts)
        if left_out and is_main_process:
            print(f"{left_out:,} pairs of an epoch are in no batch, as each of their batches would have a text twice")
    order = order_of_pairs(len(pairs["train"]), training_args, texts)
    tokens = np.array(pairs["train"]["tokens"][:])[order]
    training_args.train_tokens = int(tokens.sum())
    training_args.batch_tokens = tokens.sum() / training_args.max_steps
    if is_main_process:
        for name, counts in manifest["splits"].items():
            print(
                f"{name:<11}{counts['documents']:>9,} pairs, "
                f"{counts['truncated']:,} texts cut to {training_args.max_length} tokens"
            )
    train_rows = pairs["train"].select(order).select_columns(columns)
    return PreparedDataset({"train": train_rows, "validation": pairs["validation"]}, manifest)


class LabeledDataset(PreparedDataset):
    """Labelled rows for training, and the splits that are evaluated.

    `dataset["train"]` holds the rows of the whole run in order; `dataset["validation"]` and, where there are test data,
    `dataset["test"]` are a `LabeledSplit` each.

    Attributes:
        task: names of the labels, and whether each word has one.
        labeled: all splits, that of the training data with each row once.
    """

    def __init__(self, splits: dict, manifest: dict, task: Task, labeled: dict[str, LabeledSplit]):
        super().__init__(splits, manifest)
        self.task = task
        self.labeled = labeled


def load_labeled_dataset(
    data_args: TaskArguments,
    training_args: DownstreamArguments,
    tokenizer: PreTrainedTokenizerFast,
    words: bool = False,
) -> LabeledDataset:
    """Texts with a label each, or words with a tag each, tokenized.

    Sets the token counts of `training_args`, whose budget is in examples.

    Args:
        data_args: the sources, their columns, and the type of problem.
        training_args: the longest text, the budget and the seed.
        tokenizer: of the model.
        words: whether each word has a label.

    Raises:
        UserError: a row has no label, labels of several types are mixed, or nothing is left of a split.
    """
    task, labeled, manifest = read_task(
        train=parse_sources(data_args.train_data, "train_data"),
        evaluation=parse_sources(data_args.eval_data or [], "eval_data"),
        test=parse_sources(data_args.test_data or [], "test_data"),
        columns=data_args.columns,
        label_column=data_args.label_column,
        words=words,
        tokenizer=tokenizer,
        max_length=training_args.max_length,
        eval_fraction=data_args.eval_fraction,
        problem_type=data_args.problem_type,
    )
    row_count = _count_rows(training_args)
    train = labeled["train"]
    train_rows = LengthGroupedRows(
        train.rows, train.lengths, row_count, training_args.seed, training_args.rows_per_step
    )
    training_args.set_token_counts(train_rows.lengths[train_rows.order()])
    return LabeledDataset(labeled | {"train": train_rows}, manifest, task, labeled)


def _count_rows(training_args: BudgetArguments) -> int:
    """The rows of the whole run over all processes."""
    return training_args.max_steps * training_args.rows_per_step
