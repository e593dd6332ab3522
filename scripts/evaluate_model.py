"""Loss, perplexity and bits per byte of a model, or adapter, on held-out text.

    python scripts/evaluate_model.py outputs/tiny/pretrain_clm --data data/demo/shakespeare/validation.parquet
    python scripts/evaluate_model.py outputs/tiny/sft --data data/demo/shakespeare/validation.parquet --tasks task.json

The loss is the mean over all target tokens of the text: for a masked model at 15 % masked tokens, for an
encoder-decoder that of T5's spans (15 %, 3 tokens long on average), with the same masks in every evaluation. A task is
one of lm-eval as JSON, with the keys of its YAML files and its data files beside it (`pip install lm_eval`).
"""

import argparse
import os
from pathlib import Path

from unlabeled import exit_on_user_error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER", help="output_dir of a finished run, a whole model or an adapter")
    parser.add_argument(
        "--data", nargs="+", required=True, help="file, folder or glob of text, or a data set on the Hub"
    )
    parser.add_argument("--text_column", default="text", help="the column that holds the text (default: text)")
    parser.add_argument(
        "--max_length",
        type=int,
        help="tokens in a row (default: the model's positions, at most 1024, or 512 of an encoder-decoder)",
    )
    parser.add_argument("--tasks", nargs="+", default=[], help="tasks of lm-eval, .json files")
    parser.add_argument("--output_dir", help="write metrics.json there")
    args = parser.parse_args()

    # Imported here, as --help does not need torch.
    from unlabeled.runtime.files import write_json
    from unlabeled.runtime.write_errors import user_error_on_failed_write
    from unlabeled.training.lm_eval_tasks import read_tasks
    from unlabeled.training.model_evaluation import evaluate_folder, format_evaluation

    tasks = read_tasks(args.tasks) if args.tasks else []
    metrics, scores = evaluate_folder(args.folder, args.data, args.text_column, args.max_length, tasks)
    print(format_evaluation(metrics, scores))
    if args.output_dir:
        with user_error_on_failed_write(args.output_dir, "the metrics"):
            os.makedirs(args.output_dir, exist_ok=True)
            write_json(Path(args.output_dir, "metrics.json"), metrics | scores)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
