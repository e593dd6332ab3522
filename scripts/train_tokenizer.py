"""Train a tokenizer on your text.

    python scripts/train_tokenizer.py --data data/demo/shakespeare/train.parquet --algorithm bpe --vocab_size 2048 \\
        --eval_data data/demo/shakespeare/validation.parquet --output_dir outputs/tiny/tokenizer

Choose bpe for causal models, wordpiece for masked ones, and unigram for span corruption. The folder is the
`tokenizer_name_or_path` of a recipe. If the folder exists already, the same settings do nothing and others are refused.
"""

import argparse

from unlabeled import exit_on_user_error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="file, folder or glob of text, or a data set on the Hub")
    parser.add_argument("--algorithm", required=True, choices=("bpe", "wordpiece", "unigram"))
    parser.add_argument("--vocab_size", required=True, type=int, help="tokens, special ones included")
    parser.add_argument("--output_dir", required=True, help="the folder to create")
    parser.add_argument("--eval_data", help="other text to measure bytes per token on")
    parser.add_argument("--text_column", default="text", help="the column that holds the text (default: text)")
    parser.add_argument("--lowercase", action="store_true", help="lowercase the text; wordpiece drops accents as well")
    parser.add_argument("--max_bytes", type=int, help="train on this much text from the start (default: all of it)")
    args = parser.parse_args()

    from unlabeled.data.tokenizer_folder import TokenizerSettings, make_tokenizer_folder  # --help needs no libraries

    settings = TokenizerSettings(
        data=args.data,
        algorithm=args.algorithm,
        vocab_size=args.vocab_size,
        text_column=args.text_column,
        lowercase=args.lowercase,
        max_bytes=args.max_bytes,
    )
    make_tokenizer_folder(settings, args.output_dir, args.eval_data)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
