"""Arguments that choose the data."""

import os
from dataclasses import dataclass, field

from unlabeled.config.yaml_values import is_yaml_collection, parse_yaml
from unlabeled.errors import UserError

PROBLEM_TYPES = ("regression", "single_label_classification")  # as in transformers


@dataclass
class SourceArguments:
    """The data. A source is a path, or a mapping with `path` and other fields of `unlabeled.data.sources.Source`."""

    train_data: str | None = field(
        default=None, metadata={"help": "file, folder, glob or Hub name, or a list of sources"}
    )
    eval_data: str | None = field(default=None, metadata={"help": "held-out data, like train_data"})
    eval_fraction: float = field(default=0.0, metadata={"help": "fraction of train_data to hold out instead"})
    prepared_dir: str = field(default="data/prepared", metadata={"help": "cache of tokenized and packed data"})

    def __post_init__(self) -> None:
        for name in ("train_data", "eval_data"):
            value = getattr(self, name)
            if is_yaml_collection(value) and not os.path.exists(value):
                setattr(self, name, parse_yaml(name, value))
        if not self.train_data:
            raise UserError("set train_data to text: a file, a folder, a glob or the name of a data set on the Hub")
        if bool(self.eval_data) == bool(self.eval_fraction) or not 0 <= self.eval_fraction < 1:
            raise UserError("set either eval_data or an eval_fraction between 0 and 1, so that some text is held out")


@dataclass
class DataArguments(SourceArguments):
    """Raw text for pretraining."""

    text_column: str = field(default="text", metadata={"help": "column that holds the text"})
    max_tokens: int | None = field(default=None, metadata={"help": "maximum number of training tokens to prepare"})
    isolate_documents: bool = field(default=True, metadata={"help": "documents in one row do not attend to each other"})
    stream: bool = field(default=False, metadata={"help": "tokenize and pack during training instead of before"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stream and (self.eval_fraction or self.max_tokens):
            raise UserError("stream goes with eval_data, since nothing can be held out of what has not been read yet")


@dataclass
class TaskArguments(SourceArguments):
    """Labelled data: rows of .jsonl, .parquet or .csv."""

    text_column: str = field(
        default="text", metadata={"help": "column of the texts, a list of two, or the column of the words"}
    )
    label_column: str = field(
        default="label", metadata={"help": "column of the classes or numbers, or of a tag for each word"}
    )
    test_data: str | None = field(default=None, metadata={"help": "data to score once, at the end; like train_data"})
    problem_type: str | None = field(
        default=None, metadata={"help": "regression or single_label_classification; by default as the labels are"}
    )
    is_causal: bool | None = field(
        default=None, metadata={"help": "causal attention (true) or bidirectional (false); by default as the model"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.problem_type not in (None, *PROBLEM_TYPES):
            raise UserError(f"problem_type: {self.problem_type!r} is none of {', '.join(PROBLEM_TYPES)}")
        if is_yaml_collection(self.test_data) and not os.path.exists(self.test_data):
            self.test_data = parse_yaml("test_data", self.test_data)
        if is_yaml_collection(self.text_column):
            self.text_column = parse_yaml("text_column", self.text_column)
        self.columns = self.text_column if isinstance(self.text_column, list) else [self.text_column]
        if len(self.columns) not in (1, 2) or not all(isinstance(column, str) for column in self.columns):
            raise UserError(f"text_column is {self.text_column!r}; name one column, or a list of two")
