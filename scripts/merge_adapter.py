"""Merge an adapter into its base model: an ordinary folder that loads without PEFT.

    python scripts/merge_adapter.py outputs/smollm2-135m/sft_lora --output_dir outputs/smollm2-135m/sft_merged

The merged model is loaded from disk and compared with base and adapter before it gets its name; if logits differ by
more than rounding, there is no merged model. It stops generating where its base does. An interrupted merge leaves
nothing behind, and the same command starts again.
"""

import argparse
from pathlib import Path

from unlabeled import exit_on_user_error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER", help="output_dir of a run that trained an adapter", type=Path)
    parser.add_argument("--output_dir", metavar="DIR", help="the folder to create", type=Path, required=True)
    args = parser.parse_args()

    from unlabeled.training.merging import merge_adapter  # imports torch, which --help does not wait for

    merge_adapter(args.folder, args.output_dir)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
