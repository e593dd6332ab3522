"""Tokenize and pack text ahead of training, and print a summary.

    python scripts/prepare_data.py --config recipes/configs/tiny/pretrain_clm.yaml

Takes the YAML of a recipe, or the same keys on the command line, and fills the cache in which the recipe looks first,
so that a training job on expensive hardware finds its text prepared. A second time it only reports.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from unlabeled import UserError, exit_on_user_error

OBJECTIVES = ("clm", "mlm", "span")


def main():
    from unlabeled.config import (
        DataArguments,
        FIMArguments,
        MaskingArguments,
        ModelArguments,
        PretrainingArguments,
        SpanArguments,
        parse_arguments,
    )
    from unlabeled.data.fim import add_fim_tokens
    from unlabeled.data.loading import prepare_text
    from unlabeled.data.preparing import load_prepared
    from unlabeled.data.sources import parse_sources
    from unlabeled.data.span_corruption import add_span_tokens
    from unlabeled.data.summary import describe_dataset
    from unlabeled.data.tokenization import ensure_pad_token, load_tokenizer

    @dataclass
    class PreparationArguments:
        objective: str | None = field(
            default=None, metadata={"help": "clm, mlm or span; default: by the name of the YAML"}
        )

    own = (PreparationArguments, ModelArguments, DataArguments, FIMArguments, MaskingArguments, SpanArguments)
    preparation_args, model_args, data_args, fim_args, _, span_args, training_args = parse_arguments(
        *own, PretrainingArguments
    )
    config = Path(sys.argv[sys.argv.index("--config") + 1]).stem if "--config" in sys.argv else ""
    objective = preparation_args.objective or {f"pretrain_{name}": name for name in OBJECTIVES}.get(config)
    if objective not in OBJECTIVES:
        raise UserError(f"objective {objective!r} is none of {', '.join(OBJECTIVES)}; set --objective")
    denoisers = span_args.mixture if objective == "span" else ()

    tokenizer = load_tokenizer(model_args.tokenizer_name_or_path)
    ensure_pad_token(tokenizer)
    add_fim_tokens(tokenizer, fim_args.fim_rate)
    if denoisers:
        add_span_tokens(tokenizer, denoisers, training_args.max_length)
    train_sources = parse_sources(data_args.train_data, "train_data", data_args.text_column)
    folder = prepare_text(
        train_sources,
        data_args,
        training_args,
        tokenizer,
        objective,
        fim_rate=fim_args.fim_rate,
        denoisers=denoisers,
    )
    print(describe_dataset(load_prepared(folder)[1]))
    print(folder)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
